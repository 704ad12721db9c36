"""The content hash of a compiled timeline: equal missions have equal hashes, on every machine."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from hil.mission.timeline import Timeline

FORMAT = 3  # raise it when a column's meaning changes: it is part of the hash and of the file
# quanta of the content hash: far coarser than the last-bit differences between machines, finer than what matters
_HASH_QUANTA = {
    "sunlit_fraction": 1e-4,
    "beta_deg": 1e-3,
    "contact_range_m": 10.0,
    "relay_delay_s": 1e-7,
    "uplink_step_bps": 1.0,
    "downlink_step_bps": 1.0,
    "uplink_step_loss": 1e-6,
    "downlink_step_loss": 1e-6,
}
_HASH_TIME_S = 1e-3
_HASH_DIGITS = 12  # of the environment's numbers: an orbit made from altitude and node has last bits of its own


def content_hash(timeline: Timeline) -> str:
    """SHA-256 over the environment and the results, both rounded.

    The environment determines the results, so equal inputs give equal hashes; the results are in it so that a change of
    the code that moves them shows: in thousands of rows even a shift far below the quantum meets some boundary. They
    are rounded to `_HASH_QUANTA` and `_HASH_TIME_S`, because two machines' libm differ in the last bit: with noise of
    that size put into the propagator, edges move by a nanosecond at most, sunlight by 1e-11, and the chance that any
    value of a two-day mission meets a boundary is about one in thirty thousand.
    """
    digest = hashlib.sha256(f"hil timeline {FORMAT}\n".encode())
    digest.update(json.dumps(_rounded(timeline.environment.as_dict()), sort_keys=True).encode())
    digest.update("\n".join(f"{edge.kind} {edge.detail}" for edge in timeline.edges).encode())
    digest.update("\n".join(f"{fault.kind} {fault.in_saa}" for fault in timeline.faults).encode())
    times = {
        "edge_s": np.array([edge.t_s for edge in timeline.edges]),
        "fault_s": np.array([fault.t_s for fault in timeline.faults]),
        "uplink_step_t_s": timeline.uplink_step_t_s,
        "downlink_step_t_s": timeline.downlink_step_t_s,
    }
    quantised = [(name, values, _HASH_TIME_S) for name, values in times.items()]
    quantised += [(name, getattr(timeline, name), quantum) for name, quantum in _HASH_QUANTA.items()]
    for name, values, quantum in quantised:
        digest.update(name.encode())
        digest.update(np.rint(values / quantum).astype("<i8").tobytes())
    return digest.hexdigest()


def _rounded(value: Any) -> Any:
    """The same value with every number rounded: 86400 and 86400.0 in a mission file are one mission."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(item) for item in value]
    if isinstance(value, float):
        return int(value) if value.is_integer() else f"{value:.{_HASH_DIGITS}g}"
    return value
