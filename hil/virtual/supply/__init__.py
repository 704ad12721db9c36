"""A programmable supply without the hardware: a server that speaks a maker's language in front of modelled channels.

`physics` is what happens at the terminals, `language` the grammar of SCPI, one module a maker its commands and habits,
`server` the wire. Nothing here was compared with an instrument; each maker's module says what is unverified.
"""

from hil.virtual.supply.instrument import Fault, Instrument, SupplyModel
from hil.virtual.supply.loads import (
    DEFAULT_LOAD_LABEL,
    Load,
    OhmicLoad,
    RecordedLoad,
    ResistiveLoad,
    default_loads,
    parse_load,
)
from hil.virtual.supply.models import MODELS, iter_models, supply_model
from hil.virtual.supply.physics import DECAY_TAU_S, RETURN_DWELL_S, RISE_TAU_S, Channel, ChannelModel
from hil.virtual.supply.server import VirtualSupply, run_supply, serve_supply

__all__ = [
    "DECAY_TAU_S",
    "DEFAULT_LOAD_LABEL",
    "MODELS",
    "RETURN_DWELL_S",
    "RISE_TAU_S",
    "Channel",
    "ChannelModel",
    "Fault",
    "Instrument",
    "Load",
    "OhmicLoad",
    "RecordedLoad",
    "ResistiveLoad",
    "SupplyModel",
    "VirtualSupply",
    "default_loads",
    "iter_models",
    "parse_load",
    "run_supply",
    "serve_supply",
    "supply_model",
]
