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
from hil.drivers.dialects.bk import BK_9130B
from hil.drivers.dialects.chroma import CHROMA_62000H_S, CHROMA_62000P
from hil.drivers.dialects.ea import EA_PSI, EA_PV
from hil.drivers.dialects.itech import ITECH_IT6500
from hil.drivers.dialects.keysight import KEYSIGHT_E4360, KEYSIGHT_E36300, KEYSIGHT_MP4300, KEYSIGHT_N6700
from hil.drivers.dialects.korad import KORAD_KA3005P
from hil.drivers.dialects.rigol import RIGOL_DP800, RIGOL_DP2000
from hil.drivers.dialects.rohde_schwarz import RS_HMP, RS_NGE
from hil.drivers.dialects.siglent import SIGLENT_SPD3303X
from hil.drivers.dialects.tdk import TDK_GENESYS
from hil.drivers.dialects.tti import TTI_CPX
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

_ALL = (
    KEYSIGHT_E36300,
    KEYSIGHT_N6700,
    RIGOL_DP800,
    RIGOL_DP2000,
    SIGLENT_SPD3303X,
    RS_HMP,
    RS_NGE,
    TTI_CPX,
    KORAD_KA3005P,
    BK_9130B,
    ITECH_IT6500,
    EA_PSI,
    TDK_GENESYS,
    CHROMA_62000P,
    KEYSIGHT_E4360,
    KEYSIGHT_MP4300,
    CHROMA_62000H_S,
    EA_PV,
)
DIALECTS: Mapping[str, Dialect] = MappingProxyType({entry.name: entry for entry in _ALL})


def dialect(name: str) -> Dialect:
    """The dialect called `name`; UsageError lists the known ones."""
    found = DIALECTS.get(name)
    if found is None:
        raise UsageError(f"unknown supply dialect {name!r}", hint=f"known dialects: {', '.join(sorted(DIALECTS))}")
    return found
