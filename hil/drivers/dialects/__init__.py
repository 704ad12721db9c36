"""Supply dialects as data, one module a maker; `dialect(name)` finds one."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from hil.drivers.dialects.base import (
    Capabilities,
    ChannelRange,
    Command,
    Dialect,
    ListLimits,
    Operation,
    Quirk,
    Reply,
    Source,
    Watchdog,
    number,
)
from hil.drivers.dialects.rigol import RIGOL_DP800, RIGOL_DP2000
from hil.errors import UsageError

__all__ = [
    "DIALECTS",
    "RIGOL_DP800",
    "Capabilities",
    "ChannelRange",
    "Command",
    "Dialect",
    "ListLimits",
    "Operation",
    "Quirk",
    "Reply",
    "Source",
    "Watchdog",
    "dialect",
    "number",
]

DIALECTS: Mapping[str, Dialect] = MappingProxyType({entry.name: entry for entry in (RIGOL_DP800, RIGOL_DP2000)})


def dialect(name: str) -> Dialect:
    """The dialect called `name`; UsageError lists the known ones."""
    found = DIALECTS.get(name)
    if found is None:
        raise UsageError(f"unknown supply dialect {name!r}", hint=f"known dialects: {', '.join(sorted(DIALECTS))}")
    return found
