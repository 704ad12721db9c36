"""The balance of an orbit against the power system flown: for a tracker, direct transfer and a regulated bus."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from hil.mission.budget import fly, orbit_balance
from hil.mission.compile import compile_timeline
from hil.mission.environment import MissionEnvironment, PowerEnvironment
from hil.mission.eps import ConverterLoss, EpsConfig
from hil.mission.orbit import Orbit
from hil.mission.radio import Channel, LinkEnvironment
from hil.mission.solar_array import ArrayConfig, SasCurve
from hil.mission.timeline import Timeline

TLE = (Path(__file__).parents[2] / "fixtures" / "tle" / "ref_qwen3_535_ltdn1030.tle").read_text()
BATTERY = EpsConfig(2.0, resistance_ohm=0.1, charge_max_c=2.0, platform_w=6.0)
CURVE = SasCurve(20.0, 2.4, 17.5, 2.2)


def compiled(power: PowerEnvironment) -> Timeline:
    return compile_timeline(
        MissionEnvironment(
            name="balance",
            orbit=Orbit.from_tle(TLE),
            stations=(),
            start=datetime(2026, 1, 1, tzinfo=UTC),
            duration_s=24_000.0,
            link=LinkEnvironment(Channel(1e6), Channel(1e6)),
            power=power,
            step_s=60.0,
        )
    )


def sized(eps: EpsConfig, bol_w: float, *, direct: bool) -> PowerEnvironment:
    array = ArrayConfig(bol_w, 0.9, temperature_c=60.0, distance_scaling=True, curve=CURVE)
    return PowerEnvironment(array, replace(eps, direct=array.operating_curve if direct else None), None, 5.0, 15.0)


@pytest.mark.parametrize("kind", ["tracker", "direct", "regulated", "polarized"])
def test_an_array_that_just_closes_keeps_the_charge_and_a_smaller_one_loses_it(kind: str) -> None:
    eps = {
        "regulated": replace(BATTERY, regulated_bus_v=12.0, converter=ConverterLoss(0.8, 0.05, 0.002)),
        "polarized": replace(BATTERY, polarization_ohm=2.0, polarization_s=120.0),
        "direct": replace(BATTERY, cells_series=3),  # far below the curve's knee: a quarter of its power is lost
    }.get(kind, BATTERY)
    environment = compiled(sized(eps, 30.0, direct=kind == "direct")).environment
    bol_w = 30.0
    for _ in range(3):  # what comes in is proportional to the size, what is needed nearly constant
        balance = orbit_balance(replace(environment, power=sized(eps, bol_w, direct=kind == "direct")))
        bol_w *= balance.needed_wh / balance.available_wh
    drift = []
    for factor in (0.95, 1.05):
        timeline = compiled(sized(eps, bol_w * factor, direct=kind == "direct"))
        entries = [eclipse.penumbra_entry_s for eclipse in timeline.eclipses if eclipse.penumbra_entry_s > 0]
        flight = fly(timeline, 5.0, initial_soc=0.75)
        soc = np.interp(entries, flight.t_s, flight.soc)
        drift.append(soc[-1] - soc[0])
    assert drift[0] < -0.01
    assert drift[1] > -0.01
    assert drift[1] - drift[0] > 0.05
