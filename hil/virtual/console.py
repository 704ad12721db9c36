"""The virtual board's serial line: a PTY for whoever owns the console, fed by a listener that QEMU connects out to.

The listener exists before QEMU starts, so the first byte of the firmware has somewhere to go; what nobody reads yet is
kept. The far end is an ordinary serial device path: pyserial opens it as it would open /dev/ttyUSB0. An opener that
flushes its input (pyserial does) loses up to 4 KiB that the kernel holds at that moment, as with a real port: open it
before the power goes on.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import tty
from pathlib import Path

BUFFER_BYTES = 4 * 2**20
"""How much unread output is kept; beyond that the oldest is dropped and counted."""

_INPUT_BYTES = 65536
_CHUNK = 65536


class ConsoleRelay:
    """Relays bytes between QEMU's unix socket and a PTY, in a running asyncio loop.

    `link` becomes a symbolic link to the PTY's slave (0600); `socket_path` is where QEMU connects, again after each
    power cycle. Bytes written while the board is off are lost, as on a real line.
    """

    def __init__(self, socket_path: Path, link: Path) -> None:
        self.dropped_bytes = 0
        self._socket_path, self._link = socket_path, link
        self._loop = asyncio.get_running_loop()
        self._output = bytearray()
        self._input = bytearray()
        self._peer: socket.socket | None = None
        self._writing = self._sending = False
        # the slave stays open here too: else the master would report a hang-up whenever no reader is attached
        self._master, self._slave = os.openpty()
        tty.setraw(self._slave)
        os.fchmod(self._slave, 0o600)
        os.set_blocking(self._master, False)
        fresh = link.with_name(f".{link.name}.new")
        for stale in (fresh, socket_path):
            stale.unlink(missing_ok=True)
        fresh.symlink_to(os.ttyname(self._slave))
        fresh.replace(link)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(os.fspath(socket_path))
        socket_path.chmod(0o600)
        self._listener.listen(4)
        self._listener.setblocking(False)
        self._loop.add_reader(self._listener, self._accept)
        self._loop.add_reader(self._master, self._read_line)

    def close(self) -> None:
        """Hang up: remove the PTY's link and the socket."""
        self._loop.remove_reader(self._listener)
        self._loop.remove_reader(self._master)
        self._loop.remove_writer(self._master)
        self._hang_up()
        self._listener.close()
        for path in (self._link, self._socket_path):
            path.unlink(missing_ok=True)
        os.close(self._master)
        os.close(self._slave)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            peer, _ = self._listener.accept()
            if self._peer is not None:
                self._drain_peer()  # the board was cut and is on again: its last words come before the new ones
                self._hang_up()
            peer.setblocking(False)
            self._peer = peer
            self._input.clear()
            self._loop.add_reader(peer, self._read_peer)

    def _hang_up(self) -> None:
        if self._peer is not None:
            self._loop.remove_reader(self._peer)
            self._loop.remove_writer(self._peer)
            self._sending = False
            self._peer.close()
            self._peer = None

    def _drain_peer(self) -> None:
        while self._peer is not None and self._read_peer():
            pass

    def _read_peer(self) -> bool:
        """Take what the board printed; False when there is nothing more."""
        assert self._peer is not None
        try:
            data = self._peer.recv(_CHUNK)
        except BlockingIOError:
            return False
        except OSError:
            data = b""
        if not data:
            self._hang_up()
            return False
        self._output += data
        excess = len(self._output) - BUFFER_BYTES
        if excess > 0:
            del self._output[:excess]
            self.dropped_bytes += excess
        self._write_line()
        return True

    def _write_line(self) -> None:
        """Give the PTY what it takes now; wait for room when it takes less."""
        while self._output:
            try:
                written = os.write(self._master, bytes(self._output[:_CHUNK]))
            except BlockingIOError:
                break
            del self._output[:written]
        if bool(self._output) != self._writing:
            self._writing = bool(self._output)
            if self._writing:
                self._loop.add_writer(self._master, self._write_line)
            else:
                self._loop.remove_writer(self._master)

    def _read_line(self) -> None:
        """Take what the console's user typed; the writer is held back while the board does not read."""
        with contextlib.suppress(BlockingIOError):
            data = os.read(self._master, 4096)
            if self._peer is not None:
                self._input += data
                self._send()

    def _send(self) -> None:
        while self._input and self._peer is not None:
            try:
                sent = self._peer.send(self._input)
            except BlockingIOError:
                break
            except OSError:
                self._input.clear()
                break
            del self._input[:sent]
        waiting = bool(self._input) and self._peer is not None
        if waiting != self._sending and self._peer is not None:
            self._sending = waiting
            if waiting:
                self._loop.add_writer(self._peer, self._send)
            else:
                self._loop.remove_writer(self._peer)
        if len(self._input) > _INPUT_BYTES:
            self._loop.remove_reader(self._master)
        else:
            self._loop.add_reader(self._master, self._read_line)
