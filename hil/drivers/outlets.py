"""Switched outlets, on or off and nothing else: the coarse cut behind a supply, or all there is for a mains adapter.

    tasmota://HOST[:PORT][/OUTLET]     a plug or power strip with Tasmota firmware, over HTTP
    lcus:///dev/ttyUSB0[?relay=1]      a USB relay board with CH340 and the LCUS protocol: A0 relay state checksum

A Tasmota outlet says what its relay does, so switching is read back. An LCUS board is deaf and dumb: nothing proves
that it obeyed, and `Outlet.confirms` says so. Blocking on purpose: the dead-man uses them too, the daemon on a thread.
"""

from __future__ import annotations

import http.client
import json
from dataclasses import dataclass
from typing import Protocol
from urllib.parse import parse_qs, quote, urlsplit

from hil.drivers.codec import InstrumentClosed, InstrumentTimeout, ReadbackError, ReplyError
from hil.drivers.transport_serial import SerialPipe
from hil.errors import UsageError


class Outlet(Protocol):
    """One switched outlet. Every call opens and closes its own connection: outlets are used rarely."""

    @property
    def confirms(self) -> bool:
        """Whether the outlet tells its state, so that a switch is read back."""
        ...

    def switch(self, on: bool) -> None:
        """Switch. ReadbackError when it says that it did not, InstrumentError when it cannot be reached."""
        ...

    def state(self) -> bool | None:
        """Whether it is on; None when it cannot say."""
        ...


def outlet_for(address: str, *, timeout_s: float = 2.0) -> Outlet:
    """The outlet behind an address; nothing is opened yet. UsageError when the address is not understood."""
    parts = urlsplit(address)
    try:
        if parts.scheme == "tasmota" and parts.hostname:
            return TasmotaOutlet(parts.hostname, parts.port or 80, int(parts.path.strip("/") or 1), timeout_s)
        if parts.scheme == "lcus" and not parts.netloc and len(parts.path) > 1:
            return LcusRelay(parts.path, int(parse_qs(parts.query).get("relay", ["1"])[0]))
    except ValueError:
        pass
    raise UsageError(
        f"outlet address {address!r} is not understood",
        hint="write tasmota://HOST/1 or lcus:///dev/ttyUSB0?relay=1",
    )


@dataclass(frozen=True, slots=True)
class TasmotaOutlet:
    """One relay of a Tasmota device. `http://HOST/cm?cmnd=Power1%20On` answers `{"POWER1":"ON"}`."""

    host: str
    port: int
    outlet: int
    timeout_s: float

    @property
    def confirms(self) -> bool:
        return True

    def switch(self, on: bool) -> None:
        self._command(f"Power{self.outlet} {'On' if on else 'Off'}")
        if self.state() != on:
            raise ReadbackError(f"outlet {self.outlet} of {self.host} did not switch {'on' if on else 'off'}")

    def state(self) -> bool:
        return self._command(f"Power{self.outlet}")

    def _command(self, text: str) -> bool:
        connection = http.client.HTTPConnection(self.host, self.port, timeout=self.timeout_s)
        try:
            connection.request("GET", "/cm?cmnd=" + quote(text))
            answer = connection.getresponse()
            body = answer.read(4096)
        except TimeoutError as error:
            raise InstrumentTimeout(f"outlet {self.host}:{self.port} did not answer in time") from error
        except (OSError, http.client.HTTPException) as error:
            raise InstrumentClosed(
                f"cannot reach outlet {self.host}:{self.port}: {error}", hint="is it on the network, and powered?"
            ) from error
        finally:
            connection.close()
        if answer.status == 401:
            raise UsageError(f"outlet {self.host} asks for a password", hint="allow HTTP commands from this host")
        return self._parsed(answer.status, body)

    def _parsed(self, status: int, body: bytes) -> bool:
        """A device with a single relay says POWER, others POWER1, POWER2 …"""
        try:
            said = {key.upper(): value for key, value in json.loads(body).items()}
        except (ValueError, AttributeError):
            said = {}
        word = said.get(f"POWER{self.outlet}", said.get("POWER") if self.outlet == 1 else None)
        if status != 200 or word not in ("ON", "OFF"):
            raise ReplyError(f"outlet {self.host} answered {status} {body[:200]!r} instead of its state")
        return bool(word == "ON")


@dataclass(frozen=True, slots=True)
class LcusRelay:
    """One relay of an LCUS board. Its normally-open contact should carry the load: unplugged means off."""

    device: str
    relay: int

    def __post_init__(self) -> None:
        if not 1 <= self.relay <= 16:
            raise UsageError(f"an LCUS board has relays 1 to 16, got {self.relay}")

    @property
    def confirms(self) -> bool:
        return False

    def switch(self, on: bool) -> None:
        pipe = SerialPipe(self.device, 9600)
        try:
            pipe.send(lcus_message(self.relay, on))
        finally:
            pipe.close()

    def state(self) -> None:
        return None


def lcus_message(relay: int, on: bool) -> bytes:
    """Start byte, relay from 1, state, and the sum of the three modulo 256."""
    message = (0xA0, relay, int(on))
    return bytes((*message, sum(message) & 0xFF))
