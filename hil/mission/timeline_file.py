"""A compiled timeline as a file (.npz) and back, with nothing lost; `hil.mission.exports` writes for other readers."""

from __future__ import annotations

import json
import zipfile
import zlib
from dataclasses import asdict
from pathlib import Path

import numpy as np

from hil.errors import UsageError
from hil.mission.environment import MissionEnvironment
from hil.mission.faults import Fault
from hil.mission.frames import Floats
from hil.mission.linkplan import Edge
from hil.mission.passes import Contact
from hil.mission.shadow import Eclipse
from hil.mission.timeline import AXES, COLUMNS, Timeline
from hil.mission.timeline_hash import FORMAT
from hil.model import Span

_NAN_OUTSIDE_CONTACTS = ("delay_s", "elevation_deg")


def save(timeline: Timeline, path: Path) -> None:
    """Write an .npz: the columns, and `meta` (JSON as bytes) with environment, edges, contacts, eclipses, hash."""
    meta = {
        "format": FORMAT,
        "hash": timeline.hash,
        "environment": timeline.environment.as_dict(),
        "edges": [asdict(edge) for edge in timeline.edges],
        "contacts": [asdict(contact) for contact in timeline.contacts],
        "eclipses": [asdict(eclipse) for eclipse in timeline.eclipses],
        "faults": [asdict(fault) for fault in timeline.faults],
    }
    packed = np.frombuffer(json.dumps(meta, sort_keys=True).encode(), dtype=np.uint8)
    with path.open("wb") as file:  # a file object: numpy appends .npz to a bare name
        np.savez_compressed(file, meta=packed, **{name: getattr(timeline, name) for name in COLUMNS})


def load(path: Path) -> Timeline:
    """Read what `save` wrote; UsageError when it is something else or its hash does not agree."""
    try:
        with np.load(path, allow_pickle=False) as file:
            meta = json.loads(bytes(file["meta"]))
            if meta["format"] != FORMAT:
                raise ValueError(f"format {meta['format']}, this version reads {FORMAT}")
            columns = {name: np.array(file[name], dtype=np.float64) for name in COLUMNS}
        _check_columns(columns)
        timeline = Timeline(
            environment=MissionEnvironment.from_dict(meta["environment"]),
            edges=tuple(Edge(**edge) for edge in meta["edges"]),
            contacts=tuple(
                Contact(**{**contact, "spans": tuple(Span(**span) for span in contact["spans"])})
                for contact in meta["contacts"]
            ),
            eclipses=tuple(Eclipse(**eclipse) for eclipse in meta["eclipses"]),
            faults=tuple(Fault(**fault) for fault in meta["faults"]),
            **columns,
        )
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UsageError(f"{path} is not a timeline: {error}", hint="compile the mission again") from error
    if timeline.hash != meta["hash"]:
        raise UsageError(f"{path} was altered: its hash does not agree", hint="compile the mission again")
    return timeline


def _check_columns(columns: dict[str, Floats]) -> None:
    """Raises ValueError for columns that no compilation makes: the hash does not cover all of them."""
    for axis, names in AXES.items():
        rows = len(columns[axis])
        if any(columns[name].shape != (rows,) for name in (axis, *names)):
            raise ValueError(f"columns over {axis} differ in length")
        if not (np.isfinite(columns[axis]).all() and (np.diff(columns[axis]) >= 0).all()):
            raise ValueError(f"{axis} does not rise")
        for name in names:
            if name not in _NAN_OUTSIDE_CONTACTS and not np.isfinite(columns[name]).all():
                raise ValueError(f"{name} has values that are no numbers")
    for name in ("sunlit_fraction", "uplink_step_loss", "downlink_step_loss"):
        if ((columns[name] < 0) | (columns[name] > 1)).any():
            raise ValueError(f"{name} leaves 0..1")
    for name in ("array_w", "contact_range_m", "relay_delay_s", "uplink_step_bps", "downlink_step_bps"):
        if (columns[name] < 0).any():
            raise ValueError(f"{name} is below zero")
