"""The daemon's HTTP interface: paths, request shapes, errors as JSON. What happens is decided in `operations`."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Annotated, Any, Literal

from fastapi import FastAPI, Header, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, field_validator

from hil.bench.cutpoint import CutPoint
from hil.bench.request_limits import Asgi, bounded
from hil.bench.sockets import describe_error
from hil.errors import BenchError, BoardError, HilError, SafetyError, UsageError
from hil.model import Direction, LinkState

if TYPE_CHECKING:
    from hil.bench.account import Account
    from hil.bench.operations import Operations

log = logging.getLogger("hil.api")
Token = Annotated[str | None, Header(alias="X-Hil-Token")]
STATUS: tuple[tuple[type[HilError], int], ...] = (
    (SafetyError, 500),
    (BenchError, 409),
    (BoardError, 424),
    (UsageError, 400),
)


# What an answer says about a request that is wrong all over.
ERRORS_TOLD = 5
ERROR_CHARS = 200
ROWS = 10_000
COLUMNS = 20


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class LeaseBody(Body):
    """`boards`, or the first of `any_of` that is free."""

    boards: list[str] = Field(default_factory=list, max_length=100)
    any_of: list[Annotated[list[str], Field(max_length=100)]] = Field(default_factory=list, max_length=1000)
    holder: str = Field(max_length=200)
    user: str = Field(default="", max_length=100)
    priority: int = Field(default=0, ge=-10, le=10)
    pid: int | None = Field(default=None, gt=0, lt=2**31)
    ttl_s: float = 30.0
    wait_s: float = Field(default=0.0, ge=0, le=24 * 3600)
    preempt: bool = False
    reason: str = Field(default="", max_length=500)


class FlashBody(Body):
    grace_s: float = Field(gt=0)


class PowerBody(Body):
    action: Literal["on", "off", "cycle"]
    voltage_v: float | None = None


class BrownOutBody(Body):
    """Bounds are the board's own and judged by the daemon."""

    depth_v: float
    duration_s: float


class LatchUpBody(Body):
    threshold_a: float
    hold_s: float
    off_s: float
    added_a: float = 0.0
    wait_s: float = Field(default=60.0, ge=0, le=3600)
    input: str | None = None


class CutPointBody(Body):
    """Exactly one of `pattern` and `byte_offset`."""

    pattern: str | None = Field(default=None, max_length=1000)
    byte_offset: int | None = None
    delay_s: float = 0.0
    timeout_s: float = 120.0

    def value(self) -> CutPoint:
        return CutPoint(**self.model_dump())


class LineBody(Body):
    action: Literal["press", "hold", "release"]
    hold_s: float = 0.2


class OutletBody(Body):
    on: bool


class LinkBody(Body):
    uplink: LinkState
    downlink: LinkState


class FlightBody(Body):
    board: str
    mission_path: str
    run_dir: str
    start_s: float = Field(default=0.0, ge=0)


class ClockBody(Body):
    """Exactly one of `rate` and `skip_to`."""

    rate: float | None = Field(default=None, gt=0)
    skip_to: float | None = None
    assumed_board_w: float | None = Field(default=None, ge=0)
    cause: str = Field(default="", max_length=200)


class RecordBody(Body):
    table: Literal["tokens", "progress"]
    rows: list[Any] = Field(max_length=ROWS)

    @field_validator("rows")
    @classmethod
    def _plain(cls, rows: list[Any]) -> list[Any]:
        """By hand, up to the first that is wrong: an error for each cell of a long record would take seconds."""
        for number, row in enumerate(rows):
            if not isinstance(row, dict) or len(row) > COLUMNS or not all(map(_is_cell, row.values())):
                raise ValueError(f"row {number} is no mapping of at most {COLUMNS} columns to numbers and texts")
        return rows


def _is_cell(value: object) -> bool:
    if isinstance(value, int):
        return abs(value) < 2**63  # what the database holds
    return value is None or isinstance(value, str) or (isinstance(value, float) and math.isfinite(value))


class EventBody(BaseModel):
    model_config = ConfigDict(extra="allow")
    kind: str = Field(min_length=1, max_length=60)


class StopBody(Body):
    force: bool = False


def make_app(account: Account, operations: Operations) -> Asgi:
    """The application over a running daemon's parts, behind the limits of every request."""
    app = FastAPI(title="hil bench daemon", openapi_url="/v1/openapi.json", docs_url=None, redoc_url=None)
    app.add_exception_handler(HilError, _hil_error)
    app.add_exception_handler(RequestValidationError, _invalid_request)
    app.add_exception_handler(Exception, _unexpected)
    _bench_routes(app, account, operations)
    _board_routes(app, operations)
    _flight_routes(app, operations)
    return bounded(app)


def _bench_routes(app: FastAPI, account: Account, operations: Operations) -> None:
    @app.get("/v1/status", response_model=None)
    async def status() -> JSONResponse:
        return JSONResponse(account.status())

    @app.get("/v1/bench", response_model=None)
    async def bench() -> JSONResponse:
        return JSONResponse(account.describe_bench())

    @app.post("/v1/leases", response_model=None)
    async def acquire(body: LeaseBody, request: Request) -> JSONResponse:
        user = getattr(request.state, "user", None)  # of a client on another host
        return JSONResponse(await operations.acquire(body, user, request.is_disconnected))

    @app.get("/v1/leases", response_model=None)
    async def leases() -> JSONResponse:
        return JSONResponse(account.list_leases())

    @app.get("/v1/waiting", response_model=None)
    async def waiting() -> JSONResponse:
        return JSONResponse(account.list_waiting())

    @app.post("/v1/leases/{lease}/renew", response_model=None)
    async def renew(lease: str, token: Token = None) -> JSONResponse:
        return JSONResponse(await operations.renew(lease, token))

    @app.delete("/v1/leases/{lease}", response_model=None)
    async def release(lease: str, token: Token = None) -> JSONResponse:
        return JSONResponse(await operations.release(lease, token))

    @app.get("/v1/doctor", response_model=None)
    async def doctor() -> JSONResponse:
        return JSONResponse(await operations.doctor())

    @app.post("/v1/stop", response_model=None)
    async def stop(body: StopBody) -> JSONResponse:
        operations.request_stop(body.force)
        return JSONResponse({"stopping": True})

    @app.get("/metrics", response_model=None)
    async def metrics(accept: Annotated[str, Header()] = "") -> Response:
        content, kind = account.exporter.render(accept)
        return Response(content, headers={"Content-Type": kind})


def _board_routes(app: FastAPI, operations: Operations) -> None:
    @app.get("/v1/boards/{board}/check", response_model=None)
    async def check(board: str, power_epoch: int | None = None, token: Token = None) -> JSONResponse:
        return JSONResponse(operations.check(board, power_epoch, token))

    @app.post("/v1/boards/{board}/flash", response_model=None)
    async def begin_flash(board: str, body: FlashBody, token: Token = None) -> JSONResponse:
        return JSONResponse(operations.flash(board, body.grace_s, token))

    @app.delete("/v1/boards/{board}/flash", response_model=None)
    async def end_flash(board: str, token: Token = None) -> JSONResponse:
        return JSONResponse(operations.flash(board, None, token))

    @app.get("/v1/boards/{board}/power", response_model=None)
    async def read_power(board: str) -> JSONResponse:
        return JSONResponse(await operations.read_power(board))

    @app.post("/v1/boards/{board}/power", response_model=None)
    async def power(board: str, body: PowerBody, token: Token = None) -> JSONResponse:
        return JSONResponse(await operations.switch_power(board, body.action, body.voltage_v, token))

    @app.post("/v1/boards/{board}/power/brown-out", response_model=None)
    async def brown_out(board: str, body: BrownOutBody, token: Token = None) -> JSONResponse:
        return JSONResponse(await operations.brown_out(board, body.depth_v, body.duration_s, token))

    @app.post("/v1/boards/{board}/power/latch-up", response_model=None)
    async def latch_up(board: str, body: LatchUpBody, token: Token = None) -> JSONResponse:
        return JSONResponse(await operations.latch_up(board, body, token))

    @app.post("/v1/boards/{board}/power/cut-at", response_model=None)
    async def arm_cut(board: str, body: CutPointBody, token: Token = None) -> JSONResponse:
        return JSONResponse(await operations.arm_cut(board, body.value(), token))

    @app.get("/v1/boards/{board}/power/cut-at", response_model=None)
    async def read_cut(board: str, wait_s: Annotated[float, Query(ge=0, le=60)] = 0.0) -> JSONResponse:
        return JSONResponse(await operations.read_cut(board, wait_s))

    @app.delete("/v1/boards/{board}/power/cut-at", response_model=None)
    async def disarm_cut(board: str, token: Token = None) -> JSONResponse:
        return JSONResponse(await operations.disarm_cut(board, token))

    @app.get("/v1/boards/{board}/lines", response_model=None)
    async def read_lines(board: str) -> JSONResponse:
        return JSONResponse(operations.read_lines(board))

    @app.post("/v1/boards/{board}/lines/{line}", response_model=None)
    async def drive_line(board: str, line: str, body: LineBody, token: Token = None) -> JSONResponse:
        return JSONResponse(await operations.drive_line(board, line, body.action, body.hold_s, token))

    @app.get("/v1/boards/{board}/outlet", response_model=None)
    async def read_outlet(board: str) -> JSONResponse:
        return JSONResponse(await operations.outlet(board, None, None))

    @app.post("/v1/boards/{board}/outlet", response_model=None)
    async def switch_outlet(board: str, body: OutletBody, token: Token = None) -> JSONResponse:
        return JSONResponse(await operations.outlet(board, body.on, token))

    @app.get("/v1/boards/{board}/link", response_model=None)
    async def read_link(board: str) -> JSONResponse:
        return JSONResponse(operations.read_link(board))

    @app.put("/v1/boards/{board}/link", response_model=None)
    async def set_link(board: str, body: LinkBody, token: Token = None) -> JSONResponse:
        states: dict[Direction, LinkState] = {"uplink": body.uplink, "downlink": body.downlink}
        return JSONResponse(await operations.set_link(board, states, token))

    @app.delete("/v1/boards/{board}/link", response_model=None)
    async def clear_link(board: str, token: Token = None) -> JSONResponse:
        return JSONResponse(await operations.set_link(board, None, token))

    @app.get("/v1/boards/{board}/console", response_model=None)
    async def read_console(
        board: str, since: Annotated[int, Query(ge=0)] = 0, wait_s: Annotated[float, Query(ge=0, le=60)] = 0.0
    ) -> Response:
        offset, data = await operations.read_console(board, since, wait_s)
        return Response(data, media_type="application/octet-stream", headers={"X-Hil-Offset": str(offset)})


def _flight_routes(app: FastAPI, operations: Operations) -> None:
    @app.post("/v1/flights", response_model=None)
    async def start(body: FlightBody, token: Token = None) -> JSONResponse:
        return JSONResponse(await operations.start_flight(body, token))

    @app.get("/v1/flight", response_model=None)
    async def state() -> JSONResponse:
        return JSONResponse(operations.flight_state())

    @app.post("/v1/flight/clock", response_model=None)
    async def clock(body: ClockBody, token: Token = None) -> JSONResponse:
        return JSONResponse(await operations.change_clock(body, token))

    @app.post("/v1/flight/record", response_model=None)
    async def record(body: RecordBody, token: Token = None) -> JSONResponse:
        return JSONResponse(operations.record(body.table, body.rows, token))

    @app.post("/v1/flight/event", response_model=None)
    async def event(body: EventBody, token: Token = None) -> JSONResponse:
        fields: dict[str, Any] = dict(body.model_extra or {})
        return JSONResponse(operations.event(body.kind, fields, token))

    @app.post("/v1/flight/end", response_model=None)
    async def end(token: Token = None) -> JSONResponse:
        return JSONResponse(await operations.end_flight(token))


async def _hil_error(request: Request, error: Exception) -> JSONResponse:
    if not isinstance(error, HilError):
        raise error
    status = next((status for kind, status in STATUS if isinstance(error, kind)), 500)
    return JSONResponse({"error": describe_error(error)}, status_code=status)


async def _invalid_request(request: Request, error: Exception) -> JSONResponse:
    details = error.errors() if isinstance(error, RequestValidationError) else []
    told = [
        f"{'.'.join(str(part) for part in item['loc'])[:ERROR_CHARS]}: {item['msg'][:ERROR_CHARS]}"
        for item in details[:ERRORS_TOLD]
    ]
    told += [f"{len(details) - ERRORS_TOLD} more"] * (len(details) > ERRORS_TOLD)
    text = "; ".join(told) or str(error)[:ERROR_CHARS]
    return await _hil_error(request, UsageError(f"{request.method} {request.url.path}: {text}"))


async def _unexpected(request: Request, error: Exception) -> JSONResponse:
    log.error("%s %s failed", request.method, request.url.path, exc_info=error)
    text = f"{request.method} {request.url.path} failed in the daemon: {type(error).__name__}: {error}"
    return await _hil_error(request, BenchError(text, hint="the daemon's log has the details; please report it"))
