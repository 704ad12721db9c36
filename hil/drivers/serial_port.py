"""Serial lines to boards: one non-blocking port for ttys, pseudo terminals, raw TCP, RFC 2217 servers and unix sockets.

    /dev/ttyUSB0, /dev/serial/by-id/…   a tty of this host (also a pseudo terminal's path, or a link to either)
    socket://HOST:PORT                  raw TCP: a terminal server, ser2net in raw mode
    rfc2217://HOST:PORT                 TCP with the line's settings (ser2net, pyserial's rfc2217_server, Moxa)
    unix:///PATH                        a unix socket, such as QEMU's `-chardev socket,path=…,server=on`

Every port has a file descriptor to wait on; reading and writing never block. Nothing is flushed at opening: what the
board said before is still to be read.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import select
import socket
import struct
import termios
import time
from dataclasses import dataclass
from typing import Any, Literal, Protocol
from urllib.parse import urlsplit

from hil.drivers.transport import tune
from hil.errors import UsageError

TTY_BYTES = 4096  # what one read of a tty gives at most
SOCKET_BYTES = 1 << 16
OPEN_S = 5.0

Parity = Literal["none", "even", "odd"]
Flow = Literal["none", "hardware", "software"]
Kind = Literal["tty", "tcp", "rfc2217", "unix"]


@dataclass(frozen=True, slots=True)
class LineSettings:
    """How the bytes travel. `combined_uart`: the tags of NVIDIA's combined UART are taken out (`CombinedUart`)."""

    baud: int = 115200
    data_bits: Literal[7, 8] = 8
    parity: Parity = "none"
    stop_bits: Literal[1, 2] = 1
    flow: Flow = "none"
    combined_uart: bool = False


class Port(Protocol):
    """An open line. `read` and `write` raise OSError when it is gone."""

    def fileno(self) -> int: ...

    def read(self) -> bytes:
        """What has come, some KiB at most; nothing when nothing has."""
        ...

    def write(self, data: bytes) -> int:
        """How many bytes were taken: 0 when there is no room before `fileno` is writable."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class PortAddress:
    """A checked address: `target` is a path or a host."""

    kind: Kind
    target: str
    port: int = 0


def parse_port(address: str) -> PortAddress:
    """The parts of a console's address; UsageError when it is not understood."""
    if "://" not in address and address:
        return PortAddress("tty", address)
    parts = urlsplit(address)
    try:
        if parts.scheme == "unix" and not parts.netloc and len(parts.path) > 1:
            return PortAddress("unix", parts.path)
        if parts.scheme in ("socket", "rfc2217") and parts.hostname and parts.port and parts.path in ("", "/"):
            return PortAddress("tcp" if parts.scheme == "socket" else "rfc2217", parts.hostname, parts.port)
    except ValueError:
        pass
    raise UsageError(
        f"console port {address!r} is not understood",
        hint="write /dev/serial/by-id/NAME, socket://HOST:PORT, rfc2217://HOST:PORT or unix:///PATH",
    )


def check_settings(settings: LineSettings) -> None:
    """UsageError for a baud rate that this host's ttys do not have."""
    if not isinstance(getattr(termios, f"B{settings.baud}", None), int):
        raise UsageError(f"this host has no baud rate {settings.baud}", hint="115200 is usual")


def open_port(address: str, settings: LineSettings | None = None, timeout_s: float = OPEN_S) -> Port:
    """Open a line. Blocks up to `timeout_s` for those over a network only. Raises OSError saying why it is not there,
    UsageError for an address or settings that are wrong.
    """
    settings = settings or LineSettings()
    parsed = parse_port(address)
    port: Port
    if parsed.kind == "tty":
        check_settings(settings)
        port = TtyPort(parsed.target, settings)
    elif parsed.kind == "rfc2217":
        port = Rfc2217Port(_connect(parsed, timeout_s), settings, timeout_s)
    else:
        port = SocketPort(_connect(parsed, timeout_s))
    return CombinedUart(port) if settings.combined_uart else port


def _connect(address: PortAddress, timeout_s: float) -> socket.socket:
    if address.kind == "unix":
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.settimeout(timeout_s)
        try:
            sock.connect(address.target)
        except OSError:
            sock.close()
            raise
    else:
        sock = socket.create_connection((address.target, address.port), timeout=timeout_s)
        tune(sock)
    sock.setblocking(False)
    return sock


class TtyPort:
    """A tty, raw, locked for its owner. Not through a serial library: those flush the input when they open."""

    def __init__(self, path: str, settings: LineSettings) -> None:
        fd = os.open(path, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _set_raw(fd, settings)
        except termios.error as error:
            os.close(fd)
            raise OSError(error.args[0], f"not a serial port: {error.args[-1]}") from error
        except OSError as error:
            os.close(fd)
            if error.errno == errno.EWOULDBLOCK:
                raise OSError(error.errno, "another program has it open") from error
            raise
        self._fd = fd

    def fileno(self) -> int:
        return self._fd

    def read(self) -> bytes:
        try:
            data = os.read(self._fd, TTY_BYTES)
        except BlockingIOError:
            return b""
        if not data:
            raise ConnectionError(errno.EIO, "the port was hung up")
        return data

    def write(self, data: bytes) -> int:
        try:
            return os.write(self._fd, data)
        except BlockingIOError:
            return 0

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _set_raw(fd: int, settings: LineSettings) -> None:
    control: Any = list(termios.tcgetattr(fd)[6])
    control[termios.VMIN], control[termios.VTIME] = 1, 0
    speed = getattr(termios, f"B{settings.baud}")
    cflag = termios.CREAD | termios.CLOCAL | (termios.CS8 if settings.data_bits == 8 else termios.CS7)
    cflag |= {"none": 0, "even": termios.PARENB, "odd": termios.PARENB | termios.PARODD}[settings.parity]
    cflag |= termios.CSTOPB if settings.stop_bits == 2 else 0
    cflag |= termios.CRTSCTS if settings.flow == "hardware" else 0
    iflag = termios.IXON | termios.IXOFF if settings.flow == "software" else 0
    termios.tcsetattr(fd, termios.TCSANOW, [iflag, 0, cflag, 0, speed, speed, control])


class SocketPort:
    """Bytes over a connected socket."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    def fileno(self) -> int:
        return self._sock.fileno()

    def read(self) -> bytes:
        try:
            data = self._sock.recv(SOCKET_BYTES)
        except BlockingIOError:
            return b""
        if not data:
            raise ConnectionError(errno.EPIPE, "the far end closed the connection")
        return data

    def write(self, data: bytes) -> int:
        try:
            return self._sock.send(data)
        except BlockingIOError:
            return 0

    def close(self) -> None:
        self._sock.close()


# ---------------------------------------------------------------------------------------------------------------------
# RFC 2217: Telnet (RFC 854) with the COM port option

_IAC, _DONT, _DO, _WONT, _WILL, _SB, _SE = 255, 254, 253, 252, 251, 250, 240
_BINARY, _ECHO, _SUPPRESS_GO_AHEAD, _COM_PORT = 0, 1, 3, 44
_SET_BAUD, _SET_DATA_BITS, _SET_PARITY, _SET_STOP_BITS, _SET_CONTROL = 1, 2, 3, 4, 5
_FROM_SERVER = 100  # added to a command's number in the server's answer
_IAC_BYTE = bytes([_IAC])


class Telnet:
    """Cuts the bytes of a Telnet connection into data, option requests and subnegotiations; pure.

    After `feed`: `options` holds (verb, option) pairs and `subs` the bodies of subnegotiations, both to be taken by
    the caller.
    """

    def __init__(self) -> None:
        self.options: list[tuple[int, int]] = []
        self.subs: list[bytes] = []
        self._left = b""

    def feed(self, raw: bytes) -> bytes:
        """The data among `raw`; an unfinished command waits for the next call."""
        if not self._left and _IAC_BYTE not in raw:
            return raw
        raw, self._left = self._left + raw, b""
        data, at = bytearray(), 0
        while (found := raw.find(_IAC_BYTE, at)) >= 0:
            data += raw[at:found]
            used = self._command(raw, found, data)
            if used == 0:
                self._left = raw[found:]
                return bytes(data)
            at = found + used
        return bytes(data + raw[at:])

    def _command(self, raw: bytes, at: int, data: bytearray) -> int:
        """The length of the command that begins at `at`; 0 when it is not all there yet."""
        if len(raw) < at + 2:
            return 0
        verb = raw[at + 1]
        if verb == _IAC:
            data.append(_IAC)
            return 2
        if verb in (_DO, _DONT, _WILL, _WONT):
            if len(raw) < at + 3:
                return 0
            self.options.append((verb, raw[at + 2]))
            return 3
        if verb != _SB:
            return 2  # NOP, go-ahead and the like
        end = at + 2
        while (end := raw.find(_IAC_BYTE, end)) >= 0 and len(raw) > end + 1:
            if raw[end + 1] == _SE:
                self.subs.append(raw[at + 2 : end].replace(_IAC_BYTE * 2, _IAC_BYTE))
                return end + 2 - at
            end += 2
        return 0


class Rfc2217Port:
    """The client's end of RFC 2217. OSError when the server does not speak it or refuses the settings."""

    def __init__(self, sock: socket.socket, settings: LineSettings, timeout_s: float) -> None:
        self._sock = sock
        self._telnet = Telnet()
        self._control = bytearray()  # commands, and half of a doubled byte: they go out before any data
        self._data = bytearray()
        self._wanted = _wanted(settings)
        self._confirmed: dict[int, bytes] = {}
        self._agreed: bool | None = None
        for verb, option in ((_WILL, _COM_PORT), (_WILL, _BINARY), (_DO, _BINARY), (_DO, _SUPPRESS_GO_AHEAD)):
            self._control += bytes((_IAC, verb, option))
        try:
            self._negotiate(time.monotonic() + timeout_s)
        except OSError:
            sock.close()
            raise

    def fileno(self) -> int:
        return self._sock.fileno()

    def read(self) -> bytes:
        if not self._data:
            self._receive()
        data, self._data = bytes(self._data), bytearray()
        return data

    def write(self, data: bytes) -> int:
        if not self._flush():
            return 0
        encoded = data.replace(_IAC_BYTE, _IAC_BYTE * 2)
        try:
            sent = self._sock.send(encoded)
        except BlockingIOError:
            return 0
        if sent == len(encoded):
            return len(data)
        doubled = encoded[:sent]
        if (len(doubled) - len(doubled.rstrip(_IAC_BYTE))) % 2:  # it ends between the two of a pair
            self._control += _IAC_BYTE
            doubled += _IAC_BYTE
        return len(doubled.replace(_IAC_BYTE * 2, _IAC_BYTE))

    def close(self) -> None:
        self._sock.close()

    def _negotiate(self, deadline_s: float) -> None:
        poll = select.poll()  # unlike `select` it takes any descriptor
        poll.register(self._sock, select.POLLIN)
        while self._wanted.keys() - self._confirmed.keys():
            self._flush()
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                raise ConnectionError(errno.EPROTO, "the server confirms no line settings (RFC 2217)")
            if poll.poll(min(left_s, 0.1) * 1000):
                self._receive()
            if self._agreed is False:
                raise ConnectionError(errno.EPROTO, "the server does not speak RFC 2217; try socket://")
        for command, value in self._wanted.items():
            if command != _SET_CONTROL and self._confirmed[command] != value:
                raise ConnectionError(errno.EPROTO, f"the server refuses the line settings: {_refused(command)}")

    def _receive(self) -> None:
        try:
            raw = self._sock.recv(SOCKET_BYTES)
        except BlockingIOError:
            return
        if not raw:
            raise ConnectionError(errno.EPIPE, "the far end closed the connection")
        self._data += self._telnet.feed(raw)
        if self._telnet.options or self._telnet.subs:
            self._answer()
            self._flush()

    def _answer(self) -> None:
        for verb, option in self._telnet.options:
            if option == _COM_PORT and verb in (_DO, _DONT) and self._agreed is None:
                self._agreed = verb == _DO
                if self._agreed:
                    for command, value in self._wanted.items():
                        self._control += bytes((_IAC, _SB, _COM_PORT, command))
                        self._control += value.replace(_IAC_BYTE, _IAC_BYTE * 2) + bytes((_IAC, _SE))
            elif option not in (_COM_PORT, _BINARY, _SUPPRESS_GO_AHEAD) and verb in (_DO, _WILL):
                willing = verb == _WILL and option == _ECHO  # the board echoes, not we
                refusal = _DO if willing else _WONT if verb == _DO else _DONT
                self._control += bytes((_IAC, refusal, option))
        self._telnet.options.clear()
        for body in self._telnet.subs:
            if len(body) > 2 and body[0] == _COM_PORT:
                self._confirmed[body[1] - _FROM_SERVER] = body[2:]
        self._telnet.subs.clear()

    def _flush(self) -> bool:
        """Send what waits; True when nothing is left."""
        while self._control:
            try:
                del self._control[: self._sock.send(self._control)]
            except BlockingIOError:
                return False
        return True


def _wanted(settings: LineSettings) -> dict[int, bytes]:
    """Command -> value, RFC 2217 section 4."""
    return {
        _SET_BAUD: struct.pack(">I", settings.baud),
        _SET_DATA_BITS: bytes([settings.data_bits]),
        _SET_PARITY: bytes([{"none": 1, "odd": 2, "even": 3}[settings.parity]]),
        _SET_STOP_BITS: bytes([settings.stop_bits]),
        _SET_CONTROL: bytes([{"none": 1, "software": 2, "hardware": 3}[settings.flow]]),
    }


def _refused(command: int) -> str:
    names = {_SET_BAUD: "baud", _SET_DATA_BITS: "data_bits", _SET_PARITY: "parity", _SET_STOP_BITS: "stop_bits"}
    return names[command]


# ---------------------------------------------------------------------------------------------------------------------
# NVIDIA's combined UART

_TAG = re.compile(rb"\xff(?:[\xe0-\xef\xfd])", re.DOTALL)


class CombinedUart:
    """The debug UART of a Jetson (Xavier and later), on which several processors speak in turn.

    Where the speaker changes the board puts two bytes: 0xFF and the speaker's number (0xE0 sensor processor, 0xE1 the
    CPUs, 0xE2 power manager …), or 0xFF 0xFD for a reset. 0xFF does not occur in UTF-8. They are taken out and every
    speaker's text is kept: what the firmware says before Linux is worth reading. What is typed goes to the CPUs.
    Sources: NVIDIA's Jetson Linux Developer Guide, "Tegra Combined UART", and free firmware for that processor; not
    tried on hardware.
    """

    def __init__(self, port: Port) -> None:
        self._port = port
        self._left = b""

    def fileno(self) -> int:
        return self._port.fileno()

    def read(self) -> bytes:
        data = self._port.read()
        if not self._left and _IAC_BYTE not in data:
            return data
        data, self._left = self._left + data, b""
        if data.endswith(b"\xff"):
            data, self._left = data[:-1], b"\xff"
        return _TAG.sub(b"", data)

    def write(self, data: bytes) -> int:
        return self._port.write(data)

    def close(self) -> None:
        self._port.close()
