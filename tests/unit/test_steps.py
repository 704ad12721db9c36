"""Steps of a mission that must end when nothing comes of them, on a flight that says what it is told to say."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from hil.campaign import steps
from hil.errors import BoardError


def flying(power: str, t_mission: float, *, modelled: bool = True) -> Any:
    state = {"t_mission": t_mission, "power": {"state": power, "power_w": 7.2}}
    kind = SimpleNamespace(
        power=SimpleNamespace(inference_w=15.0), modelled_power=SimpleNamespace() if modelled else None
    )
    return SimpleNamespace(board_name="vb1", flight=SimpleNamespace(state=lambda: state), type=kind)


def test_an_eclipse_without_shedding_ends_with_its_end_and_says_what_was_drawn() -> None:
    assert steps._is_shed(flying("shed", 150.0), 100.0)
    assert not steps._is_shed(flying("on", 99.0), 100.0)
    with pytest.raises(BoardError, match=r"vb1: the eclipse is over .* drew 7\.2 W .* says 15 W") as caught:
        steps._is_shed(flying("on", 101.0), 100.0)
    assert "is the host busy" in caught.value.hint
    with pytest.raises(BoardError) as caught:
        steps._is_shed(flying("on", 101.0, modelled=False), 100.0)
    assert "measure the board" in caught.value.hint
