"""The thermal model: published radiator figures, closed solutions, an independent integration, energy, the cut-off."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hil.errors import UsageError
from hil.mission.thermal import (
    STEFAN_BOLTZMANN,
    Coupling,
    Cutoff,
    Node,
    Radiator,
    ThermalConfig,
    ThermalModel,
    albedo_cosine,
    burst_forecast,
    radiator_area_m2,
    radiator_temperature_c,
)

BOX = ThermalConfig(
    nodes=(
        Node("chip", 60.0, board_share=0.8),
        Node("case", 400.0, board_share=0.2),
        Node("panel", 900.0, constant_w=3),
    ),
    couplings=(Coupling("chip", "case", 2.0), Coupling("case", "panel", 4.0)),
    radiators=(Radiator("panel", 0.05, 2, sun_share=0.1, earth_view_factor=0.3), Radiator("case", 0.01)),
    cutoff=Cutoff("chip", 45.0, 40.0),
)


@pytest.mark.parametrize(
    ("power_w", "area_m2", "sides", "expected_c"),
    [(120e3, 110.0, 2, 48.0), (150e3, 110.0, 2, 67.0), (120e3, 110.0, 1, 109.0), (12.0, 0.011, 2, 48.0)],
)
def test_radiators_of_the_announced_systems(power_w: float, area_m2: float, sides: int, expected_c: float) -> None:
    """reference/missions.md, 2.3 and 2.4: the figures, and the model comes to rest at them."""
    steady_c = radiator_temperature_c(power_w, area_m2, sides=sides)
    assert steady_c == pytest.approx(expected_c, abs=0.5)
    node = Node("bus", 10.0 * area_m2, board_share=1.0)
    model = ThermalModel(ThermalConfig((node,), radiators=(Radiator("bus", area_m2, sides),)))
    assert model.step(600.0, power_w).nodes["bus"] == pytest.approx(steady_c, abs=0.01)
    assert radiator_area_m2(power_w, steady_c, sides=sides) == pytest.approx(area_m2)


def test_the_radiator_of_a_data_centre_chip() -> None:
    """700 W at 40 C, one side, emissivity 0.9, 150 W/m2 absorbed."""
    area_m2 = radiator_area_m2(700.0, 40.0, absorbed_w_m2=150.0)
    assert area_m2 == pytest.approx(2.05, abs=0.005)
    assert radiator_temperature_c(700.0, area_m2, absorbed_w_m2=150.0) == pytest.approx(40.0)
    with pytest.raises(UsageError, match="absorbs"):
        radiator_area_m2(700.0, -150.0, absorbed_w_m2=150.0)
    with pytest.raises(UsageError, match="gives nothing off"):
        radiator_temperature_c(10.0, 0.0)


def test_cooling_in_the_dark_follows_its_closed_solution() -> None:
    """1/T^3 = 1/T0^3 + 3 emissivity sigma A t / C."""
    radiator = Radiator("plate", 0.2, emissivity=0.8)
    model = ThermalModel(ThermalConfig((Node("plate", 500.0, initial_c=90.0),), radiators=(radiator,)))
    for seconds in (10.0, 600.0, 5_000.0):
        began = model.state.nodes["plate"] + 273.15
        ended = model.step(seconds).nodes["plate"] + 273.15
        exact = (began**-3 + 3 * 0.8 * STEFAN_BOLTZMANN * 0.2 * seconds / 500.0) ** (-1 / 3)
        assert ended == pytest.approx(exact, abs=0.1)


def test_two_nodes_level_out_exponentially() -> None:
    nodes = (Node("a", 100.0, initial_c=80.0), Node("b", 300.0, initial_c=0.0))
    model = ThermalModel(ThermalConfig(nodes, (Coupling("a", "b", 5.0),)))
    state = model.step(30.0)
    apart = 80.0 * math.exp(-30.0 * 5.0 * (1 / 100 + 1 / 300))
    assert state.nodes["a"] - state.nodes["b"] == pytest.approx(apart, rel=0.01)
    assert model.step(10_000.0).nodes == pytest.approx({"a": 20.0, "b": 20.0})


def test_a_network_agrees_with_an_independent_integration() -> None:
    integrate = pytest.importorskip("scipy.integrate")

    def slope(_: float, t: list[float]) -> list[float]:
        chip, case, panel = t
        sun = 0.2 * 1361 * 0.05 * 0.1 * 0.7
        earth = 0.05 * 0.3 * (0.2 * 1361 * 0.3 * 0.4 + 0.9 * 237)
        return [
            (0.8 * 20 - 2 * (chip - case)) / 60,
            (0.2 * 20 + 2 * (chip - case) - 4 * (case - panel) - 0.9 * 5.670374419e-8 * 0.01 * case**4) / 400,
            (3 + 4 * (case - panel) + sun + earth - 2 * 0.9 * 5.670374419e-8 * 0.05 * panel**4) / 900,
        ]

    solved = integrate.solve_ivp(
        slope, (0.0, 3_000.0), [293.15] * 3, rtol=1e-9, atol=1e-9, t_eval=[60.0, 600.0, 3_000.0]
    )
    model, now_s = ThermalModel(BOX), 0.0
    for until_s, kelvin in zip(solved.t, solved.y.T, strict=True):
        state = model.step(until_s - now_s, 20.0, 0.7, 0.4)
        now_s = until_s
        assert list(state.nodes.values()) == pytest.approx(list(kelvin - 273.15), abs=0.05)


configs = st.builds(
    lambda a, b, capacities, link, area, sides, view: ThermalConfig(
        (Node("a", capacities[0], a, board_share=0.6), Node("b", capacities[1], b, constant_w=5.0)),
        (Coupling("a", "b", link),),
        (Radiator("b", area, sides, sun_share=0.5, earth_view_factor=view), Radiator("a", 0.1 * area)),
    ),
    st.floats(-200, 150),
    st.floats(-200, 150),
    st.tuples(st.floats(1, 1e4), st.floats(1, 1e4)),
    st.floats(0, 50),
    st.floats(0, 2),
    st.integers(1, 2),
    st.floats(0, 1),
)
steps = st.lists(st.tuples(st.floats(0, 200), st.floats(0, 1e4), st.floats(0, 1), st.floats(0, 1)), max_size=5)


@settings(max_examples=40, deadline=None)
@given(configs, steps)
def test_energy_is_conserved_and_nothing_falls_below_absolute_zero(
    config: ThermalConfig, run: list[tuple[float, float, float, float]]
) -> None:
    model, heat_j = ThermalModel(config), 0.0
    for dt_s, board_w, sunlit, albedo in run:
        state = model.step(dt_s, board_w, sunlit, albedo)
        heat_j += dt_s * (0.6 * board_w + 5.0)
        assert all(math.isfinite(celsius) and celsius > -273.15 for celsius in state.nodes.values())
    ledger = model.ledger
    assert ledger.heat_j == pytest.approx(heat_j)
    kelvin = [model.state.nodes[node.name] - node.initial_c for node in config.nodes]
    assert ledger.stored_j == pytest.approx(
        sum(node.heat_capacity_j_per_k * k for node, k in zip(config.nodes, kelvin, strict=True)), rel=1e-9, abs=1e-6
    )
    content_j = sum(node.heat_capacity_j_per_k * 300.0 for node in config.nodes)
    assert abs(ledger.residual_j) <= 1e-9 * ledger.throughput_j + 1e-12 * content_j


def test_steep_heating_of_a_light_radiator_does_not_overshoot() -> None:
    """5 kW into one joule per kelvin: a step by the cold plate's time constant would throw it below absolute zero."""
    config = ThermalConfig((Node("plate", 1.0, 0.0, board_share=0.6),), radiators=(Radiator("plate", 0.5),))
    hot_c = radiator_temperature_c(0.6 * 5_166.0, 0.5)
    assert ThermalModel(config).step(2.0, 5_166.0).nodes["plate"] == pytest.approx(hot_c, abs=0.5)
    frozen = ThermalConfig((Node("plate", 1.0, -273.15, board_share=1.0),), radiators=(Radiator("plate", 0.5),))
    assert 0 < ThermalModel(frozen).step(100.0, 0.1).nodes["plate"] + 273.15 < 10.5


def test_one_long_step_is_many_short_ones() -> None:
    long, short = ThermalModel(BOX), ThermalModel(BOX)
    long.step(1_800.0, 20.0, 1.0, 0.5)
    for _ in range(3_600):
        short.step(0.5, 20.0, 1.0, 0.5)
    assert long.state.nodes == pytest.approx(short.state.nodes, abs=0.05)
    assert long.step(0.0).nodes == long.state.nodes


def test_the_ledger_by_hand() -> None:
    node = Node("plate", 1e9, initial_c=26.85, board_share=0.5, constant_w=2.0)
    radiator = Radiator("plate", 2.0, 2, emissivity=0.9, absorptivity=0.2, sun_share=0.5, earth_view_factor=0.4)
    model = ThermalModel(ThermalConfig((node,), radiators=(radiator,)))
    model.step(10.0, 6.0, sunlit=0.5, albedo=0.25)
    ledger = model.ledger
    assert ledger.heat_j == pytest.approx(10 * (3 + 2))
    assert ledger.sun_j == pytest.approx(10 * 0.2 * 1361 * 2 * 0.5 * 0.5)
    assert ledger.albedo_j == pytest.approx(10 * 0.2 * 1361 * 0.3 * 2 * 0.4 * 0.25)
    assert ledger.earth_j == pytest.approx(10 * 0.9 * 237 * 2 * 0.4)
    assert ledger.radiated_j == pytest.approx(10 * 0.9 * STEFAN_BOLTZMANN * 300.0**4 * 4, rel=1e-6)


def test_run_until_hot_cool_repeat() -> None:
    """340 J/K without a radiator: 15 W for 900 s is 40 K (reference/missions.md, scenario 05)."""
    burst = ThermalConfig((Node("chip", 340.0, board_share=1.0),), cutoff=Cutoff("chip", 60.0, 30.0))
    forecast = burst_forecast(burst, 15.0, 0.0, limit_s=3_600.0)
    assert forecast.run_s == pytest.approx(340 * 40 / 15, abs=1.0)
    assert forecast.cool_s is None  # it has nowhere to radiate to
    assert not forecast.state.may_run
    radiating = replace(burst, radiators=(Radiator("chip", 0.02),))
    forecast = burst_forecast(radiating, 40.0, 0.0)
    assert forecast.run_s is not None
    assert forecast.cool_s is not None
    assert forecast.state.may_run
    assert forecast.state.nodes["chip"] == pytest.approx(30.0, abs=0.1)
    assert burst_forecast(radiating, 5.0, 0.0, limit_s=10_000.0).run_s is None  # never that hot


def test_the_cut_off_has_hysteresis() -> None:
    model = ThermalModel(
        ThermalConfig(
            (Node("chip", 100.0, 20.0, 1.0),),
            radiators=(Radiator("chip", 0.1),),
            cutoff=Cutoff("chip", 60.0, 30.0),
        )
    )
    seen = [model.step(1.0, 100.0) for _ in range(150)] + [model.step(1.0, 0.0) for _ in range(300)]
    switches = [b for a, b in pairwise(seen) if a.may_run != b.may_run]
    assert [state.may_run for state in switches] == [False, True]
    assert 62.0 > switches[0].nodes["chip"] >= 60.0
    assert 28.0 < switches[1].nodes["chip"] <= 30.0
    assert not ThermalModel(ThermalConfig((Node("chip", 1.0, 70.0),), cutoff=Cutoff("chip", 60, 30))).state.may_run


def test_albedo_is_lit_below_the_sun_only() -> None:
    position = np.array([[7000.0, 0.0, 0.0], [0.0, 7000.0, 0.0], [-7000.0, 0.0, 0.0], [4950.0, 4950.0, 0.0]])
    sun = np.array([[1.5e8, 0.0, 0.0]] * 4)
    assert albedo_cosine(position, sun) == pytest.approx([1.0, 0.0, 0.0, math.sqrt(0.5)])


def test_a_configuration_survives_json() -> None:
    for config in (BOX, replace(BOX, cutoff=None)):
        assert ThermalConfig.from_dict(json.loads(json.dumps(asdict(config)))) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nodes": ()}, "thermal nodes"),
        ({"nodes": (*BOX.nodes, BOX.nodes[0])}, "thermal nodes"),
        ({"couplings": (Coupling("chip", "hull", 1.0),)}, "hull"),
        ({"nodes": (*BOX.nodes, Node("x", -1.0))}, "x: heat capacity"),
        ({"nodes": (*BOX.nodes, Node("x", 1.0, initial_c=-300.0))}, "x: initial_c"),
        ({"nodes": (*BOX.nodes, Node("x", 1.0, board_share=0.5))}, "sum of board_share"),
        ({"radiators": (Radiator("panel", 1.0, sides=3),)}, "sides"),
        ({"radiators": (Radiator("panel", 1.0, emissivity=math.nan),)}, "emissivity"),
        ({"cutoff": Cutoff("chip", 30.0, 60.0)}, "on_c"),
    ],
)
def test_impossible_spacecraft_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        replace(BOX, **change)  # type: ignore[arg-type]
    assert caught.value.hint


@pytest.mark.parametrize("arguments", [(-1.0,), (1.0, math.nan), (1.0, 5.0, -0.1)])
def test_impossible_steps_are_refused(arguments: tuple[float, ...]) -> None:
    with pytest.raises(UsageError, match="thermal step"):
        ThermalModel(BOX).step(*arguments)
