"""The Mission dashboard's queries, run by a real Prometheus that scrapes the real exporter (with invented values)."""

from __future__ import annotations

import asyncio
import re
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import prometheus
import pytest

from hil import dashboards, paths
from hil.bench import exporter
from hil.mission.thermal import ThermalState
from hil.virtual.images import ensure_prometheus

pytestmark = pytest.mark.xdist_group("prometheus")


@pytest.fixture(scope="module")
def binary() -> Path:
    return ensure_prometheus(paths.cache_dir(), lambda line: None)


def snapshot(start_s: float) -> exporter.BenchMetrics:
    """An invented flight in the umbra that generates ten tokens a second at 15 W."""
    t_s = time.monotonic() - start_s
    board = exporter.BoardMetrics(
        board="vb1",
        type="virtual-arm64",
        phase="umbra",
        commanded_on=True,
        power_w=15.0,
        voltage_v=14.2,
        current_a=15.0 / 14.2,
        sampled_at_s=time.time(),
        energy_j={**exporter.per_phase(), "umbra": 15.0 * t_s},
        tokens={**exporter.per_phase(), "umbra": float(int(10 * t_s))},
        upload_bytes=1e5 * t_s,
        lateness_s=0.002,
        overruns=0,
        player_overruns=0,
        power_cuts=int(t_s > 3),
        link=exporter.LinkMetrics(True, {"uplink": 0.005, "downlink": 0.005}, {"uplink": 3e5, "downlink": 1e6}),
        flight=exporter.FlightMetrics(60 * t_s, 60.0, 0.6, 14.2, ThermalState({"chip": 41.5, "hull": -3.0}, True)),
    )
    return exporter.BenchMetrics("virtual", "0.1.0", True, 1, (board,))


@pytest.fixture(scope="module")
def metrics_port() -> Iterator[int]:
    start_s = time.monotonic()
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    serving = exporter.serve_metrics(exporter.Exporter(lambda: snapshot(start_s)))
    server, port = asyncio.run_coroutine_threadsafe(serving, loop).result(5)
    yield port
    loop.call_soon_threadsafe(server.close)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(5)
    loop.close()


@pytest.fixture(scope="module")
def server(
    binary: Path, metrics_port: int, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[prometheus.Prometheus]:
    with prometheus.running(binary, tmp_path_factory.mktemp("prometheus")) as started:
        started.scrape(f"127.0.0.1:{metrics_port}", bench="virtual")
        started.wait_for("count_over_time(hil_board_power_watts[1m])", lambda s: bool(s) and s[0].value >= 3)
        yield started


def test_every_panel_query_answers_with_finite_values(server: prometheus.Prometheus) -> None:
    found = prometheus.check_panels(server, dashboards.mission_dashboard(), "vb1")
    assert len(found) >= 20


def test_values_are_those_of_the_exporter(server: prometheus.Prometheus) -> None:
    queries = dashboards.panel_queries(dashboards.mission_dashboard(), board="vb1")
    per_token = next(q for q in queries if "joules_total" in q and "tokens_total" in q)
    assert {s.labels["phase"]: s.value for s in server.query(per_token)} == {"umbra": pytest.approx(1.5, rel=0.2)}
    light = next(q for q in queries if "hil_orbit_phase" in q)
    assert [s.value for s in server.query(light)] == [3.0]
    heat = next(q for q in queries if "hil_thermal_node_celsius" in q)
    assert {s.labels["node"]: s.value for s in server.query(heat)} == {"chip": 41.5, "hull": -3.0}


def test_legends_have_the_labels_they_name(server: prometheus.Prometheus) -> None:
    dashboard = dashboards.mission_dashboard()
    queries = dashboards.panel_queries(dashboard, board="vb1")
    for query, (_, legend) in zip(queries, prometheus.legends(dashboard), strict=True):
        for label in re.findall(r"\{\{(\w+)\}\}", legend):
            assert all(label in sample.labels for sample in server.query(query)), (query, label)


def test_board_variable_lists_the_boards(server: prometheus.Prometheus) -> None:
    (variable,) = dashboards.mission_dashboard()["templating"]["list"]
    metric, label = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["definition"]).groups()  # type: ignore[union-attr]
    assert server.label_values(metric, label) == ["vb1"]


def test_a_wrong_panel_is_noticed(server: prometheus.Prometheus) -> None:
    dashboard = dashboards.mission_dashboard()
    dashboard["panels"].append({"targets": [{"expr": 'hil_no_such_metric{board="$board"}', "legendFormat": ""}]})
    with pytest.raises(AssertionError, match="empty: hil_no_such_metric"):
        prometheus.check_panels(server, dashboard, "vb1")


def test_configuration_is_what_promtool_accepts(binary: Path) -> None:
    done = subprocess.run(
        [binary.with_name("promtool"), "check", "config", prometheus.CONFIG], capture_output=True, text=True, timeout=20
    )
    assert done.returncode == 0, done.stdout + done.stderr
