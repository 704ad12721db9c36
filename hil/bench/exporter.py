"""`/metrics`: one immutable snapshot of the bench as Prometheus metrics, on a registry of our own.

The daemon builds a `BenchMetrics` when it is asked for one; nothing here does I/O. Every label set exists from the
start at 0, so that `rate()` and `increase()` see the first increment. Energy is counted per phase at the source,
because a join with a phase gauge would attribute it wrongly.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from hil.errors import BenchError
from hil.model import Direction

if TYPE_CHECKING:
    from prometheus_client.core import Metric

    from hil.mission.thermal import ThermalState

PHASES: Final = ("none", "sunlit", "penumbra", "umbra")
"""`none`: no flight. The label values of `phase`."""
DIRECTIONS: Final[tuple[Direction, ...]] = ("uplink", "downlink")
REQUEST_BYTES = 8192
REQUEST_S = 5.0


def phase_of(sunlit_fraction: float | None) -> str:
    """The phase for the visible share of the solar disc, None without a flight."""
    if sunlit_fraction is None:
        return "none"
    return "umbra" if sunlit_fraction <= 0 else "sunlit" if sunlit_fraction >= 1 else "penumbra"


def per_phase() -> dict[str, float]:
    """A counter per phase, all at 0."""
    return dict.fromkeys(PHASES, 0.0)


@dataclass(frozen=True, slots=True)
class LinkMetrics:
    """What is applied to one board's link. `delay_s` and `rate_bps` per direction; 0 in an outage."""

    visible: bool
    delay_s: Mapping[Direction, float]
    rate_bps: Mapping[Direction, float]


@dataclass(frozen=True, slots=True)
class FlightMetrics:
    """What only a flight has."""

    mission_time_s: float
    clock_rate: float
    soc: float | None
    bus_voltage_v: float | None
    thermal: ThermalState | None = None
    invalid: int = 0


@dataclass(frozen=True, slots=True)
class BoardMetrics:
    """One board at one moment; None where nothing has been measured yet."""

    board: str
    type: str
    phase: str
    commanded_on: bool
    power_w: float | None
    voltage_v: float | None
    current_a: float | None
    sampled_at_s: float | None
    energy_j: Mapping[str, float]
    tokens: Mapping[str, float]
    upload_bytes: float
    lateness_s: float
    overruns: int
    player_overruns: int
    power_cuts: int
    link: LinkMetrics | None
    flight: FlightMetrics | None


@dataclass(frozen=True, slots=True)
class BenchMetrics:
    """The bench at one moment."""

    bench: str
    version: str
    deadman_alive: bool
    leases: int
    boards: tuple[BoardMetrics, ...] = field(default=())


class _Collector:
    """Turns a snapshot into metric families; the registry calls `collect` at each scrape."""

    def __init__(self, snapshot: Callable[[], BenchMetrics]) -> None:
        self._snapshot = snapshot

    def describe(self) -> list[Metric]:
        return []  # nothing to check for duplicates: the registry is ours alone

    def collect(self) -> Iterator[Metric]:
        bench = self._snapshot()
        yield from _bench_families(bench)
        yield from _board_families(bench.boards)
        yield from _link_families(bench.boards)
        yield from _flight_families(bench.boards)


class Exporter:
    """Renders snapshots. `render` is cheap enough for the event loop (some 30 families)."""

    def __init__(self, snapshot: Callable[[], BenchMetrics]) -> None:
        from prometheus_client import CollectorRegistry

        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(_Collector(snapshot))

    def render(self, accept: str = "") -> tuple[bytes, str]:
        """(body, content type) in the format that the scraper accepts."""
        from prometheus_client.exposition import choose_encoder

        encoder, content_type = choose_encoder(accept)
        return encoder(self._registry), content_type


async def serve_metrics(exporter: Exporter, port: int = 0) -> tuple[asyncio.Server, int]:
    """Serve `/metrics` and nothing else on 127.0.0.1 (Prometheus cannot scrape a unix socket); returns the port."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            request = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), REQUEST_S)
            writer.write(_response(request.decode("latin-1"), exporter))
            await writer.drain()
        writer.close()

    try:
        server = await asyncio.start_server(answer, "127.0.0.1", port, limit=REQUEST_BYTES)
    except OSError as error:
        raise BenchError(
            f"/metrics cannot listen on 127.0.0.1:{port}: {error.strerror}",
            hint="another port as `metrics_port` in the bench file; 0 takes a free one",
        ) from error
    return server, int(server.sockets[0].getsockname()[1])


def _response(request: str, exporter: Exporter) -> bytes:
    first, *headers = request.split("\r\n")
    method, _, rest = first.partition(" ")
    target = rest.partition(" ")[0].partition("?")[0]
    if target != "/metrics" or method not in ("GET", "HEAD"):
        body, kind, status = b"only GET /metrics here\n", "text/plain", "404 Not Found"
    else:
        accept = next((h.partition(":")[2].strip() for h in headers if h.lower().startswith("accept:")), "")
        (body, kind), status = exporter.render(accept), "200 OK"
    head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    return head.encode("latin-1") + (b"" if method == "HEAD" else body)


def _gauge(name: str, text: str, labels: list[str], rows: list[tuple[list[str], float | None]]) -> Metric:
    from prometheus_client.core import GaugeMetricFamily

    family = GaugeMetricFamily(name, text, labels=labels)
    for values, value in rows:
        if value is not None:
            family.add_metric(values, float(value))
    return family


def _counter(name: str, text: str, labels: list[str], rows: list[tuple[list[str], float]]) -> Metric:
    from prometheus_client.core import CounterMetricFamily

    family = CounterMetricFamily(name, text, labels=labels)
    for values, value in rows:
        family.add_metric(values, float(value))
    return family


def _bench_families(bench: BenchMetrics) -> Iterator[Metric]:
    yield _gauge("hil_bench_info", "Constant 1.", ["bench", "version"], [([bench.bench, bench.version], 1)])
    yield _gauge("hil_deadman_alive", "1 while the dead-man process answers.", [], [([], bench.deadman_alive)])
    yield _gauge("hil_leases", "Leases held now.", [], [([], bench.leases)])


def _board_families(boards: tuple[BoardMetrics, ...]) -> Iterator[Metric]:
    def gauge(name: str, text: str, value: Callable[[BoardMetrics], float | None]) -> Metric:
        return _gauge(name, text, ["board"], [([b.board], value(b)) for b in boards])

    def counter(name: str, text: str, value: Callable[[BoardMetrics], float]) -> Metric:
        return _counter(name, text, ["board"], [([b.board], value(b)) for b in boards])

    def by_phase(name: str, text: str, value: Callable[[BoardMetrics], Mapping[str, float]]) -> Metric:
        rows = [([b.board, phase], value(b).get(phase, 0.0)) for b in boards for phase in PHASES]
        return _counter(name, text, ["board", "phase"], rows)

    yield _gauge("hil_board_info", "Constant 1.", ["board", "type"], [([b.board, b.type], 1) for b in boards])
    yield gauge("hil_board_power_commanded", "1 when the board's output shall be on.", lambda b: b.commanded_on)
    yield gauge("hil_board_power_watts", "Power at the supply's terminals, newest sample.", lambda b: b.power_w)
    yield gauge("hil_supply_voltage_volts", "Measured at the supply's terminals.", lambda b: b.voltage_v)
    yield gauge("hil_supply_current_amperes", "Measured at the supply's terminals.", lambda b: b.current_a)
    yield gauge("hil_board_last_sample_timestamp_seconds", "Unix time of the newest sample.", lambda b: b.sampled_at_s)
    yield by_phase(
        "hil_board_energy_joules", "Energy drawn (wall time), by the phase it was drawn in.", lambda b: b.energy_j
    )
    yield counter(
        "hil_board_power_cuts", "Times the board's power was cut since the daemon started.", lambda b: b.power_cuts
    )
    yield gauge(
        "hil_power_loop_lateness_seconds", "How late the newest tick of the power loop was.", lambda b: b.lateness_s
    )
    yield counter("hil_power_loop_overruns", "Ticks that ended after the next was due.", lambda b: b.overruns)
    yield by_phase(
        "hil_inference_output_tokens", "Content tokens counted by the client as they came.", lambda b: b.tokens
    )
    yield counter("hil_upload_bytes", "Upload bytes that the board has acknowledged.", lambda b: b.upload_bytes)


def _link_families(boards: tuple[BoardMetrics, ...]) -> Iterator[Metric]:
    linked = [(b.board, b.link) for b in boards if b.link is not None]
    yield _gauge(
        "hil_link_visible",
        "1 when the link carries traffic, 0 in an outage.",
        ["board"],
        [([board], link.visible) for board, link in linked],
    )
    yield _gauge(
        "hil_link_delay_seconds",
        "One-way delay applied.",
        ["board", "direction"],
        [([board, d], link.delay_s.get(d, 0.0)) for board, link in linked for d in DIRECTIONS],
    )
    yield _gauge(
        "hil_link_rate_bits_per_second",
        "Rate applied, scaled by the mission clock; 0: not limited, or an outage.",
        ["board", "direction"],
        [([board, d], link.rate_bps.get(d, 0.0)) for board, link in linked for d in DIRECTIONS],
    )
    yield _counter(
        "hil_link_overruns",
        "Edges of the link that were played too late.",
        ["board"],
        [([b.board], b.player_overruns) for b in boards if b.link is not None],
    )


def _flight_families(boards: tuple[BoardMetrics, ...]) -> Iterator[Metric]:
    yield _gauge(
        "hil_orbit_phase",
        "1 for the phase the board is in; `none` without a flight.",
        ["board", "phase"],
        [([b.board, phase], b.phase == phase) for b in boards for phase in PHASES],
    )
    flying = [(b.board, b.flight) for b in boards if b.flight is not None]

    def gauge(name: str, text: str, value: Callable[[FlightMetrics], float | None]) -> Metric:
        return _gauge(name, text, ["board"], [([board], value(flight)) for board, flight in flying])

    yield gauge("hil_battery_state_of_charge_ratio", "State of charge of the modelled battery.", lambda f: f.soc)
    yield gauge("hil_bus_voltage_volts", "Modelled voltage of the satellite's bus.", lambda f: f.bus_voltage_v)
    yield gauge("hil_mission_time_seconds", "Seconds since the mission's start.", lambda f: f.mission_time_s)
    yield gauge("hil_mission_clock_rate", "Mission seconds a wall second.", lambda f: f.clock_rate)
    yield gauge(
        "hil_flight_invalid_reasons", "Reasons for which the flight's record is invalid.", lambda f: float(f.invalid)
    )
    warm = [(board, flight.thermal) for board, flight in flying if flight.thermal is not None]
    yield _gauge(
        "hil_thermal_node_celsius",
        "Modelled temperature of a thermal node; never measured.",
        ["board", "node"],
        [([board, node], celsius) for board, thermal in warm for node, celsius in thermal.nodes.items()],
    )
    yield _gauge(
        "hil_thermal_may_run",
        "1 while the thermal model lets the workload run.",
        ["board"],
        [([board], thermal.may_run) for board, thermal in warm],
    )
