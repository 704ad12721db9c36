"""Routes through rings, shells and meshes: against an oracle of its own, and the properties that any route has."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hil.errors import UsageError
from hil.mission import routes as routes_module
from hil.mission.constellation import EARTH_KM, Constellation
from hil.mission.frames import Station
from hil.mission.isl import IslConfig, IslOutage
from hil.mission.orbit import Ephemeris, Orbit
from hil.mission.passes import find_passes
from hil.mission.routes import GROUND, UNREACHABLE, LinkSpan, Network, Routes, compile_routes
from hil.mission.shadow import find_eclipses

TLE = (Path(__file__).parents[2] / "fixtures" / "tle" / "ref_qwen3_535_ltdn1030.tle").read_text()
START = datetime(2026, 1, 1, tzinfo=UTC)
STATIONS = (Station("miyun", 40.45, 116.86), Station("kashgar", 39.50, 75.93), Station("sanya", 18.31, 109.31))
LIGHT_KM_S = 299_792.458
RING = Constellation.ring(Orbit.from_tle(TLE), 12)


def network(**changes: object) -> Network:
    values = {
        "constellation": RING,
        "isl": IslConfig(1e9),
        "stations": STATIONS,
        "start": START,
        "duration_s": 21_600.0,
    }
    return Network(**{**values, **changes})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def ring() -> Routes:
    return compile_routes(network())


def grid_network(seed: int = 0, hours: float = 2.0, **isl: object) -> Network:
    """A shell whose links between planes come and go at high latitudes."""
    orbit = Orbit.kepler(START, altitude_km=780.0, inclination_deg=86.4, raan_deg=float(seed * 37 % 360))
    shell = Constellation.walker(orbit, 4, 11, phasing=seed % 4, raan_spread_deg=180.0)
    config = IslConfig(**{"rate_bps": 1e9, "topology": "grid", "max_range_km": 4_200.0, **isl})  # type: ignore[arg-type]
    return network(constellation=shell, isl=config, stations=STATIONS[:2], duration_s=hours * 3_600.0)


@pytest.fixture(scope="module")
def shell() -> Routes:
    return compile_routes(grid_network(1, acquisition_s=45.0))


def positions_km(routes: Routes, t_s: np.ndarray) -> np.ndarray:
    """Straight from SGP4, one satellite at a time: (satellites, n, 3)."""
    return np.array([Ephemeris(o, START).teme_km(t_s)[0] for o in routes.network.constellation.orbits])


def line_km(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """Length and lowest height by sampling."""
    points = a + np.linspace(0.0, 1.0, 1_001)[:, np.newaxis] * (b - a)
    return float(np.linalg.norm(b - a)), float(np.linalg.norm(points, axis=1).min() - EARTH_KM)


def working(routes: Routes, t_s: float) -> Iterator[LinkSpan]:
    return (span for span in routes.link_spans if span.start_s <= t_s < span.end_s)


def oracle_delays(routes: Routes, step: int) -> np.ndarray:
    """Bellman and Ford over links judged from scratch; no acquisition, no outages."""
    t_s = float(routes.t_s[step])
    config, count = routes.network.isl, len(routes.network.constellation)
    where = positions_km(routes, np.array([t_s]))[:, 0]
    best = np.full(count, np.inf)
    for index, orbit in enumerate(routes.network.constellation.orbits):
        for station in routes.network.stations:
            seen = Ephemeris(orbit, START).look(station, np.array([t_s]))
            if seen.elevation_deg[0] > station.mask_deg:
                best[index] = min(best[index], seen.range_m[0] / 1e3 / LIGHT_KM_S)
    edges = []
    for a, b in routes.links:
        far, low = line_km(where[a], where[b])
        if low > config.grazing_altitude_km and far < (config.max_range_km or np.inf):
            edges.append((a, b, far / LIGHT_KM_S))
    for _ in range(count):
        for a, b, delay in edges:
            best[b] = min(best[b], best[a] + delay)
            best[a] = min(best[a], best[b] + delay)
    return best


def test_delays_are_the_oracles(ring: Routes) -> None:
    for step in range(0, len(ring.t_s), 23):
        np.testing.assert_allclose(ring.delay_s[step], oracle_delays(ring, step), atol=1e-8)


def test_delays_of_a_shell_are_the_oracles() -> None:
    found = compile_routes(grid_network(2, hours=1.0))
    assert any(span.end_s < 3_600.0 for span in found.link_spans if span.a != GROUND), "no link ever goes: a weak test"
    for step in range(0, len(found.t_s), 13):
        np.testing.assert_allclose(found.delay_s[step], oracle_delays(found, step), atol=1e-8)


def test_ground_legs_are_the_passes_of_each_satellite(ring: Routes) -> None:
    compared = 0
    for index, orbit in enumerate(RING.orbits):
        for station in STATIONS:
            expected = find_passes(Ephemeris(orbit, START), station, 0.0, 21_600.0)
            legs = [s for s in ring.link_spans if (s.a, s.b, s.station) == (GROUND, index, station.name)]
            assert len(legs) == len(expected)
            for leg, item in zip(legs, expected, strict=True):
                assert leg.start_s == pytest.approx(max(item.aos_s, 0.0), abs=5e-3)
                assert leg.end_s == pytest.approx(min(item.los_s, 21_600.0), abs=5e-3)
                compared += 1
    assert compared > 30


def test_a_pass_shorter_than_a_step_is_not_missed() -> None:
    station = replace(STATIONS[0], mask_deg=42.0)
    found = compile_routes(network(stations=(station,), step_s=300.0, duration_s=86_400.0))
    short = 0
    for index, orbit in enumerate(RING.orbits):
        expected = find_passes(Ephemeris(orbit, START), station, 0.0, 86_400.0)
        legs = [s for s in found.link_spans if (s.a, s.b) == (GROUND, index)]
        assert [round(leg.start_s) for leg in legs] == [round(item.aos_s) for item in expected]
        short += sum(item.duration_s < 150.0 for item in expected)
    assert short > 2


@pytest.mark.parametrize("which", ["ring", "shell"])
def test_no_link_below_the_grazing_height_or_out_of_reach(which: str, request: pytest.FixtureRequest) -> None:
    routes: Routes = request.getfixturevalue(which)
    config = routes.network.isl
    links = [span for span in routes.link_spans if span.a != GROUND]
    assert links
    for span in links[:: max(1, len(links) // 60)]:
        for share in (1e-6, 0.5, 1 - 1e-6):
            t_s = np.array([span.start_s + share * (span.end_s - span.start_s)])
            a, b = (
                Ephemeris(routes.network.constellation.orbits[k], START).teme_km(t_s)[0][0] for k in (span.a, span.b)
            )
            far, low = line_km(a, b)
            assert low > config.grazing_altitude_km - 1e-2
            assert config.max_range_km is None or far < config.max_range_km + 1e-2


def test_acquisition_is_waited_for(shell: Routes) -> None:
    """With 45 s of acquisition every link that appears in flight starts exactly 45 s later than without."""
    plain = compile_routes(replace(shell.network, isl=replace(shell.network.isl, acquisition_s=0.0)))
    late = {(s.a, s.b, s.station, s.end_s): s.start_s for s in shell.link_spans}
    appeared = 0
    for span in plain.link_spans:
        key = (span.a, span.b, span.station, span.end_s)
        if span.a == GROUND or span.start_s == 0.0:
            assert late[key] == span.start_s
        elif span.end_s - span.start_s > 45.0:
            assert late[key] == pytest.approx(span.start_s + 45.0, abs=1e-9)
            appeared += 1
        else:
            assert key not in late
    assert appeared > 10


def test_acquisition_keeps_a_young_link_out_of_every_route(shell: Routes) -> None:
    used = 0
    for step in range(0, len(shell.t_s) - 1, 7):
        t_s = float(shell.t_s[step])
        up = {(s.a, s.b) for s in working(shell, t_s)}
        for target in range(0, 44, 5):
            path = shell.path(step, target)
            for a, b in pairwise(path):
                assert (min(a, b), max(a, b)) in up
                used += 1
            if path:
                assert (GROUND, path[0]) in up
    assert used > 100


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 40), step=st.integers(0, 30), acquisition_s=st.sampled_from([0.0, 15.0]))
def test_triangle_and_straight_line(seed: int, step: int, acquisition_s: float) -> None:
    routes = compile_routes(grid_network(seed, hours=0.5, acquisition_s=acquisition_s))
    t_s = float(routes.t_s[step])
    where = positions_km(routes, np.array([t_s]))[:, 0]
    delay = routes.delay_s[step]
    for span in working(routes, t_s):
        if span.a != GROUND:
            hop = np.linalg.norm(where[span.a] - where[span.b]) / LIGHT_KM_S
            # symmetric: the same bound in both directions
            if np.isfinite(delay[[span.a, span.b]]).any():
                assert abs(delay[span.a] - delay[span.b]) <= hop + 1e-9
    for index, orbit in enumerate(routes.network.constellation.orbits):
        nearest = min(Ephemeris(orbit, START).look(s, np.array([t_s])).range_m[0] for s in routes.network.stations)
        assert delay[index] >= nearest / 1e3 / LIGHT_KM_S - 1e-9
        path = routes.path(step, index)
        assert len(set(path)) == len(path)
        if path:
            legs = sum(float(np.linalg.norm(where[a] - where[b])) for a, b in pairwise(path)) / LIGHT_KM_S
            assert delay[index] == pytest.approx(delay[path[0]] + legs, abs=1e-9)


def test_columns_agree_with_paths(shell: Routes) -> None:
    for target in (0, 17, 43):
        route = shell.to(target)
        for step in range(0, len(shell.t_s), 11):
            path = shell.path(step, target)
            assert route.hops[step] == len(path)
            assert np.isfinite(route.delay_s[step]) == bool(path)
            assert route.access[step] == (path[0] if path else -1)
            assert (route.station[step] >= 0) == bool(path)
            assert (shell.previous[step, target] == UNREACHABLE) == (not path)


def test_a_ring_with_one_satellite_lost_still_reaches_all_others() -> None:
    lost = 4
    isl = IslConfig(1e9, outages=(IslOutage(lost),))
    whole, broken = compile_routes(network()), compile_routes(network(isl=isl))
    others = [k for k in range(12) if k != lost]
    assert (~np.isfinite(broken.delay_s[:, lost])).all()
    assert not any(lost in (span.a, span.b) for span in broken.link_spans)
    # whenever the ground sees any other satellite at all
    seen = np.isfinite(broken.delay_s[:, others]).any(axis=1)
    assert seen.mean() > 0.5
    assert np.isfinite(broken.delay_s[np.ix_(np.nonzero(seen)[0], others)]).all()
    assert (broken.delay_s[:, others] >= whole.delay_s[:, others] - 1e-12).all()
    longer = np.isfinite(broken.delay_s[:, others]) & (broken.delay_s[:, others] > whole.delay_s[:, others] + 1e-6)
    assert longer.any()


def test_two_lost_satellites_cut_the_ring_in_two() -> None:
    isl = IslConfig(1e9, outages=(IslOutage(2), IslOutage(8)))
    routes = compile_routes(network(isl=isl))
    sides = (list(range(3, 8)), [9, 10, 11, 0, 1])
    for step in range(0, len(routes.t_s), 10):
        for side in sides:
            reached = np.isfinite(routes.delay_s[step, side])
            seen = (routes.station[step, side] >= 0).any()
            assert reached.all() if seen else not reached.any()
    assert (np.isfinite(routes.delay_s[:, 5]) != np.isfinite(routes.delay_s[:, 11])).any()


def test_an_outage_ends_with_a_new_acquisition() -> None:
    isl = IslConfig(
        1e9, acquisition_s=15.0, outages=(IslOutage(3, 1_000.0, 2_000.0, other=4), IslOutage(7, 0.0, 500.0))
    )
    routes = compile_routes(network(isl=isl))
    spans = {(a, b): [(s.start_s, s.end_s) for s in routes.link_spans if (s.a, s.b) == (a, b)] for a, b in routes.links}
    assert spans[3, 4] == [(0.0, 1_000.0), (2_015.0, 21_600.0)]
    assert spans[7, 8] == [(515.0, 21_600.0)]
    assert spans[5, 6] == [(0.0, 21_600.0)]


def test_links_lock_again_after_every_eclipse() -> None:
    isl = IslConfig(1e9, acquisition_s=15.0, reacquire_after_eclipse=True)
    routes = compile_routes(network(isl=isl))
    exits = {
        k: [e.penumbra_exit_s for e in find_eclipses(Ephemeris(orbit, START), 0.0, 21_600.0)]
        for k, orbit in enumerate(RING.orbits)
    }
    assert all(len(times) >= 3 for times in exits.values())
    for a, b in routes.links.tolist():
        breaks = sorted(t for t in (*exits[a], *exits[b]) if t < 21_600.0)
        spans = [s for s in routes.link_spans if (s.a, s.b) == (a, b)]
        assert [s.end_s for s in spans] == [*breaks, 21_600.0]
        assert [s.start_s for s in spans] == [0.0, *(t + 15.0 for t in breaks)]
    # the ground legs know nothing of it
    legs = [s for s in routes.link_spans if s.a == GROUND]
    assert legs == [s for s in compile_routes(network()).link_spans if s.a == GROUND]


def test_spans_use_a_way_only_while_all_its_links_work(ring: Routes, shell: Routes) -> None:
    for routes, target, keep in ((ring, 5, False), (ring, 0, True), (shell, 20, False), (shell, 20, True)):
        spans = routes.spans(target, keep=keep)
        assert spans
        for before, after in pairwise(spans):
            assert before.end_s <= after.start_s
        by_key: dict[tuple[int, int, str], list[LinkSpan]] = {}
        for item in routes.link_spans:
            by_key.setdefault((item.a, item.b, item.station), []).append(item)
        for span in spans:
            keys = [(GROUND, span.path[0], span.station)]
            keys += [(min(a, b), max(a, b), "") for a, b in pairwise(span.path)]
            for key in keys:
                assert any(s.start_s <= span.start_s and span.end_s <= s.end_s for s in by_key[key])


def test_spans_begin_and_end_at_root_found_edges(ring: Routes) -> None:
    """Silence before a span ends with an AOS, a span before silence with an LOS: never with a step of the grid."""
    spans = ring.spans(5)
    aos = {s.start_s for s in ring.link_spans if s.a == GROUND}
    los = {s.end_s for s in ring.link_spans if s.a == GROUND}
    gaps = [(before, after) for before, after in pairwise(spans) if after.start_s > before.end_s]
    assert len(gaps) >= 3
    for before, after in gaps:
        assert before.end_s in los
        assert after.start_s in aos
    covered = sum(span.duration_s for span in spans)
    # reachable whenever anyone is seen: what the steps lose is less than a step at each end of a gap
    assert covered == pytest.approx(60.0 * np.isfinite(ring.delay_s[:, 5]).sum(), rel=0.02)


def test_a_way_that_is_kept_changes_only_when_a_link_goes(ring: Routes) -> None:
    eager, kept = ring.spans(5), ring.spans(5, keep=True)
    assert len(kept) < len(eager)
    ends = {span.end_s for span in ring.link_spans}
    changes = [after.start_s for before, after in pairwise(kept) if before.end_s == after.start_s]
    assert changes
    assert set(changes) <= ends
    assert not {after.start_s for before, after in pairwise(eager) if before.end_s == after.start_s} <= ends
    # and nothing is lost by it
    assert sum(s.duration_s for s in kept) >= sum(s.duration_s for s in eager) - 1e-6


def test_windows_join_without_a_seam(ring: Routes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Computed in slices of four steps: the very same links, delays and predecessors."""
    monkeypatch.setattr(routes_module, "_CHUNK_CELLS", 1)
    sliced = compile_routes(ring.network)
    assert [(s.a, s.b, s.station) for s in sliced.link_spans] == [(s.a, s.b, s.station) for s in ring.link_spans]
    np.testing.assert_allclose(
        [(s.start_s, s.end_s) for s in sliced.link_spans], [(s.start_s, s.end_s) for s in ring.link_spans], atol=1e-6
    )
    np.testing.assert_array_equal(sliced.delay_s, ring.delay_s)
    np.testing.assert_array_equal(sliced.previous, ring.previous)
    shell = grid_network(1, acquisition_s=45.0)
    monkeypatch.undo()
    whole = compile_routes(shell)
    monkeypatch.setattr(routes_module, "_CHUNK_CELLS", 1)
    np.testing.assert_array_equal(compile_routes(shell).delay_s, whole.delay_s)


def test_processing_is_added_a_link() -> None:
    plain = compile_routes(network(duration_s=7_200.0))
    slow = compile_routes(network(duration_s=7_200.0, isl=IslConfig(1e9, processing_s=1e-3), ground_processing_s=5e-3))
    hops = plain.to(5).hops
    reached = np.isfinite(plain.delay_s[:, 5])
    same_way = reached & (slow.to(5).hops == hops)
    assert same_way.sum() > 10
    extra = slow.delay_s[same_way, 5] - plain.delay_s[same_way, 5]
    np.testing.assert_allclose(extra, 5e-3 + 1e-3 * (hops[same_way] - 1), atol=1e-9)


def test_a_mesh_routes_inside_the_cluster() -> None:
    path = Path(__file__).parents[2] / "fixtures" / "omm" / "suncatcher-cluster-81.json"
    cluster = Constellation.from_omm(path.read_text())
    isl = IslConfig(8e11, "mesh", max_range_km=0.25)
    polar = (Station("svalbard", 78.23, 15.39),)
    routes = compile_routes(network(constellation=cluster, isl=isl, stations=polar, duration_s=6_000.0))
    seen = np.isfinite(routes.delay_s).any(axis=1)
    assert seen.any()
    assert np.isfinite(routes.delay_s[seen]).all()
    lengths = (routes.delay_s[seen].max(axis=1) - routes.delay_s[seen].min(axis=1)) * LIGHT_KM_S
    assert lengths.max() < 2.5  # nobody is further than the cluster is wide


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"step_s": 0.5}, "step_s is 0.5"),
        ({"stations": ()}, "need a ground station"),
        ({"duration_s": 0.0}, "duration above zero"),
        ({"duration_s": 86_400.0 * 365, "step_s": 1.0}, "GB"),
    ],
)
def test_refusals(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        network(**changes)
    assert message in str(caught.value)


def test_unknown_target(ring: Routes) -> None:
    with pytest.raises(UsageError, match="no satellite 12"):
        ring.to(12)
