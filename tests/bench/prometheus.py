"""A real Prometheus for tests: Debian's program from the cache, on 127.0.0.1, with a data directory of its own."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from host import free_ports

from hil import dashboards

CONFIG = Path(__file__).parents[2] / "grafana/prometheus/prometheus.yml"


@dataclass(frozen=True, slots=True)
class Sample:
    """One series of an answer and its newest value."""

    labels: Mapping[str, str]
    value: float


@dataclass(frozen=True, slots=True)
class Series:
    """One series of an answer over a span of time."""

    labels: Mapping[str, str]
    values: Sequence[float]


class Prometheus:
    """A running server; `query` and friends talk to its API."""

    def __init__(self, base: str, targets: Path) -> None:
        self._targets = targets
        self._http = httpx.Client(base_url=base, timeout=10.0, trust_env=False)

    def scrape(self, *addresses: str, **labels: str) -> None:
        """Scrape these `host:port` from now on, and nothing else."""
        part = self._targets / ".bench.part"
        part.write_text(json.dumps([{"targets": list(addresses), "labels": labels}]))
        os.replace(part, self._targets / "bench.json")

    def query(self, expr: str) -> list[Sample]:
        """An instant query; a scalar is one series without labels. AssertionError carries Prometheus's complaint."""
        data = self._get("/api/v1/query", query=expr)
        if data["resultType"] == "scalar":
            return [Sample({}, float(data["result"][1]))]
        return [Sample(item["metric"], float(item["value"][1])) for item in data["result"]]

    def query_range(self, expr: str, start: str, end: str, step_s: int = 2) -> list[Series]:
        """A query over a span, as a graph asks it; `start` and `end` in RFC 3339."""
        data = self._get("/api/v1/query_range", query=expr, start=start, end=end, step=f"{step_s}s")
        return [Series(item["metric"], [float(value) for _, value in item["values"]]) for item in data["result"]]

    def label_values(self, metric: str, label: str) -> list[str]:
        """What a dashboard's `label_values(metric, label)` shows."""
        return list(self._get(f"/api/v1/label/{label}/values", **{"match[]": metric}))

    def ready(self) -> bool:
        try:
            return self._http.get("/-/ready").status_code == 200
        except httpx.TransportError:
            return False

    def wait_for(
        self, expr: str, accept: Callable[[list[Sample]], bool] = bool, *, timeout_s: float = 60.0
    ) -> list[Sample]:
        """The first answer to `expr` that `accept` takes; by default the first that is not empty."""
        deadline = time.monotonic() + timeout_s
        while True:
            found = self.query(expr)
            if accept(found):
                return found
            assert time.monotonic() < deadline, f"waited {timeout_s:g} s for {expr}, last answer {found}"
            time.sleep(0.2)

    def _get(self, path: str, **parameters: str) -> Any:
        answer = self._http.get(path, params=parameters).json()
        assert answer["status"] == "success", f"{parameters}: {answer.get('error')}"
        assert not answer.get("warnings"), answer["warnings"]
        return answer["data"]


@contextmanager
def running(binary: Path, directory: Path) -> Iterator[Prometheus]:
    """Start `binary` with the repository's own configuration; stopped at the end."""
    directory.mkdir(parents=True, exist_ok=True)
    shutil.copy(CONFIG, directory)
    (directory / "targets").mkdir(exist_ok=True)
    address = f"127.0.0.1:{free_ports(1)[0]}"
    log = directory / "prometheus.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [
                binary,
                f"--config.file={directory / CONFIG.name}",
                f"--storage.tsdb.path={directory / 'data'}",
                f"--web.listen-address={address}",
                "--log.level=warn",
            ],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    server = Prometheus(f"http://{address}", directory / "targets")
    try:
        deadline = time.monotonic() + 60
        while not server.ready():
            assert process.poll() is None, f"Prometheus ended: {log.read_text()}"
            assert time.monotonic() < deadline, f"Prometheus is not ready after 60 s: {log.read_text()}"
            time.sleep(0.1)
        yield server
    finally:
        process.terminate()
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(5)


def check_panels(server: Prometheus, dashboard: Mapping[str, Any], board: str, **variables: str) -> dict[str, int]:
    """Run every panel query; each must answer, with finite values only. Returns the number of series per query.

    `server` must have scraped the board at least twice, and seen tokens, within `rate_interval`.
    """
    found: dict[str, int] = {}
    wrong: list[str] = []
    for expr in dashboards.panel_queries(dashboard, board=board, **variables):
        samples = server.query(expr)
        found[expr] = len(samples)
        if not samples:
            wrong.append(f"empty: {expr}")
        wrong += [
            f"{sample.value} for {dict(sample.labels)}: {expr}" for sample in samples if not math.isfinite(sample.value)
        ]
        if len(samples) > 20:
            wrong.append(f"{len(samples)} series: {expr}")
    for expr in dashboards.annotation_queries(dashboard, board=board, **variables):
        server.query(expr)
    assert not wrong, "\n".join(wrong)
    assert found
    return found


def check_panels_over(
    server: Prometheus, dashboard: Mapping[str, Any], board: str, start: str, end: str
) -> dict[str, int]:
    """Run every panel query over a span; each must have values, all of them finite. Returns how many per query."""
    found: dict[str, int] = {}
    wrong: list[str] = []
    for expr in dashboards.panel_queries(dashboard, board=board):
        series = server.query_range(expr, start, end)
        values = [value for item in series for value in item.values]
        found[expr] = len(values)
        if not values:
            wrong.append(f"empty: {expr}")
        if not all(map(math.isfinite, values)):
            wrong.append(f"not finite: {expr}")
    assert not wrong, "\n".join(wrong)
    return found


def legends(dashboard: Mapping[str, Any]) -> Sequence[tuple[str, str]]:
    """Query and legend of every target."""
    return [(t["expr"], t["legendFormat"]) for panel in dashboard["panels"] for t in panel.get("targets", ())]
