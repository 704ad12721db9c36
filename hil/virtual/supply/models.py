"""Every supply the virtual bench can play, by its vendor-series name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from hil.errors import UsageError
from hil.virtual.supply import (
    bk,
    chroma,
    ea,
    itech,
    keysight,
    keysight_solar,
    korad,
    rigol,
    rohde_schwarz,
    siglent,
    tdk,
    tti,
)
from hil.virtual.supply.instrument import SupplyModel

MODELS: Mapping[str, SupplyModel] = {
    model.name: model
    for maker in (
        rigol,
        keysight,
        siglent,
        rohde_schwarz,
        tti,
        korad,
        bk,
        itech,
        ea,
        tdk,
        chroma,
        keysight_solar,
    )
    for model in maker.MODELS
}


def supply_model(name: str) -> SupplyModel:
    """The model called `name`; UsageError lists the known ones."""
    try:
        return MODELS[name]
    except KeyError:
        raise UsageError(f"no virtual supply model {name!r}", hint=f"known models: {', '.join(MODELS)}") from None


def iter_models() -> Iterable[str]:
    """Names for `hil virtual supply --model`."""
    return MODELS.keys()
