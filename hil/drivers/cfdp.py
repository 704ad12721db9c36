"""CFDP class 2 (CCSDS 727.0-B-5) from the ground: a file over UDP, suspended between contacts, gaps sent again.

The space-grade alternative to an SFTP upload: no connection to set up in each contact, no congestion control that
takes a long, lossy link for a crowded one; the sender keeps to the rate of the contact plan. Needs the extra `cfdp`.

    upload = CfdpUpload(Path("model.gguf"), "/opt/hil/model.gguf.part")
    while not upload.complete:
        ...                                               # wait for the next contact
        upload.run(sock, rate_bps=2e6, stop=loss_of_signal)

The board runs `cfdp_entity` from an archive that `archive` makes: pure Python, whatever its architecture.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import select
import socket
import threading
import time
import zipfile
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hil.errors import BenchError, BoardError, UsageError

if TYPE_CHECKING:
    from hil.drivers.ssh import Detached, Shell

PORT = 4556
# What each datagram costs beyond its PDU: Ethernet, IPv4 and UDP headers.
OVERHEAD_BYTES = 14 + 20 + 8
# The metadata go out this often: a receiver that misses them asks for all that came before again.
_METADATA_TIMES = 3
_PACKAGES = ("cfdppy", "spacepackets", "deprecation", "packaging")
_DISTRIBUTIONS = ("cfdp-py", "spacepackets")
# Two functions are all that those packages need of fastcrc, whose wheels are of one architecture.
_CRC = '''"""CRCs by the standard library, under the names that fastcrc gives them."""
import binascii
import zlib


class crc32:
    iso_hdlc = staticmethod(lambda data, initial=None: zlib.crc32(data, initial or 0))


class crc16:
    ibm_3740 = staticmethod(lambda data, initial=None: binascii.crc_hqx(data, 0xFFFF if initial is None else initial))
'''


@dataclass(frozen=True, slots=True)
class CfdpContact:
    """What one contact moved. `sent_bytes` are of the file, new ones; `resent_bytes` those that were asked for again.

    `wire_bytes` is everything, with headers down to Ethernet. Nothing is confirmed before the end of the file, but for
    gaps that the receiver names.
    """

    sent_bytes: int
    resent_bytes: int
    wire_bytes: int
    naks: int
    duration_s: float
    complete: bool


def require() -> None:
    """Raise UsageError when the extra is not installed."""
    if importlib.util.find_spec("cfdppy") is None:
        raise UsageError("CFDP needs the package cfdp-py", hint="pip install 'hil[cfdp]'")


def archive(target: Path) -> Path:
    """Write the receiver and all it needs as one Python archive for a board with Python 3.10 or newer."""
    require()
    from hil.drivers import cfdp_entity

    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as pack:
        pack.write(Path(cfdp_entity.__file__), "__main__.py")
        pack.writestr("fastcrc.py", _CRC)
        for name in _PACKAGES:
            spec = importlib.util.find_spec(name)
            if spec is None or spec.origin is None:
                raise BenchError(f"the package {name} of cfdp-py is missing", hint="pip install 'hil[cfdp]'")
            origin = Path(spec.origin)
            if origin.name != "__init__.py":
                pack.write(origin, origin.name)
                continue
            for file in sorted(origin.parent.rglob("*.py")):
                pack.write(file, file.relative_to(origin.parent.parent))
        for name in _DISTRIBUTIONS:  # they look their own versions up
            found = importlib.metadata.distribution(name)
            folder = f"{name.replace('-', '_')}-{found.version}.dist-info"
            pack.writestr(f"{folder}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {found.version}\n")
    return target


def start_receiver(
    shell: Shell, pyz: str, directory: str, *, port: int = PORT, ask_again_s: float = 5.0, python: str = "python3"
) -> Detached:
    """Start the receiver on the board over `shell` (mgmt) and wait until it listens; it outlives the connection.

    `pyz` is the archive's path there, `directory` where files may go. `ask_again_s` must exceed the round trip. Raises
    BoardError with what it said when it ends at once.
    """
    from hil.drivers.ssh import Detached

    argv = [python, pyz, "receive", "--port", str(port), "--directory", directory, "--ask-again-s", str(ask_again_s)]
    job = Detached.start(shell, argv, f"{directory}/.cfdp")
    deadline = time.monotonic() + 30
    while True:
        said, complaint = job.output(shell)
        if '"ready"' in said:
            return job
        if job.poll(shell) is not None or time.monotonic() > deadline:
            job.kill(shell)
            raise BoardError(f"{shell.name}: the CFDP receiver does not start: {(complaint or said).strip()[-400:]}")
        time.sleep(0.1)


class CfdpUpload:
    """One file on its way to a board as one class 2 transaction over as many contacts as it takes. Not thread-safe.

    While suspended nothing is sent and no timer counts against it. The receiver keeps the transaction in memory: after
    its reboot make a new object, which begins anew (an SFTP `Upload` resumes there).
    """

    def __init__(self, source: Path, target: str, *, ask_again_s: float = 5.0) -> None:
        require()
        from cfdppy.handler.source import SourceHandler
        from cfdppy.request import PutRequest
        from spacepackets.cfdp import TransmissionMode
        from spacepackets.seqcount import SeqCountProvider
        from spacepackets.util import ByteFieldU16

        from hil.drivers import cfdp_entity as entity

        self.source, self.target, self.total = source, target, source.stat().st_size
        self.contacts: list[CfdpContact] = []
        self._entity = entity
        self._files, self._faults = entity.Files(), entity.Faults()
        self._user = entity.User(self._files)
        local, remotes = entity.configuration(entity.GROUND_ID, entity.BOARD_ID, ask_again_s, self._faults)
        numbers = SeqCountProvider(32)
        numbers.count = int.from_bytes(os.urandom(3), "big")  # a receiver must not take it for an earlier transaction
        self._handler = SourceHandler(local, self._user, remotes, entity.CheckTimers(), numbers)
        request = PutRequest(
            ByteFieldU16(entity.BOARD_ID), source, Path(target), TransmissionMode.ACKNOWLEDGED, closure_requested=True
        )
        self._handler.put_request(request)
        self._queue: deque[bytes] = deque()
        self._sent = self._resent = self._wire = self._naks = 0

    @property
    def complete(self) -> bool:
        """The receiver has said that the file is whole there."""
        finished = self._user.finished
        return finished is not None and finished.condition_code.name == "NO_ERROR"

    @property
    def offset(self) -> int:
        """How far it got for the first time, bytes; gaps may be open behind it."""
        return self.total if self.complete else int(self._handler.progress)

    def run(
        self,
        sock: socket.socket,
        *,
        rate_bps: float,
        stop: threading.Event | None = None,
        silence_s: float = 60.0,
        on_progress: Callable[[int], None] | None = None,
    ) -> CfdpContact:
        """Send over a connected UDP socket at `rate_bps` (Ethernet bits) until done or `stop` is set.

        Nothing heard for `silence_s` after the end of the file was sent: returns as well, incomplete. Raises BoardError
        when the receiver cancels, for example because it may not write there.
        """
        stop = stop or threading.Event()
        began = time.monotonic()
        before = (self._sent, self._resent, self._wire, self._naks)
        free_s = heard_s = began
        sock.setblocking(False)
        while not stop.is_set() and self._user.finished is None:
            now = time.monotonic()
            if self._listen(sock):
                heard_s = now
            if not self._queue and now >= free_s:
                self._advance()
            if self._queue and now >= free_s:
                # A clock that was late is not made up for by more than a few packets: queues on the way are short.
                free_s = max(free_s, now - 0.005) + self._send(sock) * 8 / rate_bps
                heard_s = max(heard_s, now) if self._handler.progress < self.total else heard_s
                if on_progress is not None:
                    on_progress(self.offset)
            else:
                wait_s = free_s - now if self._queue or self._handler.progress < self.total else 0.02
                select.select([sock], [], [], min(max(wait_s, 0.0), 0.05))
            if now - heard_s > silence_s:
                break
        if self._user.finished is not None:
            self._say_goodbye(sock)
        return self._record(began, before)

    def _listen(self, sock: socket.socket) -> bool:
        """Hand over what has come; whether anything has."""
        heard = False
        while True:
            try:
                data = sock.recv(65536)
            except (BlockingIOError, ConnectionRefusedError):  # refused: the receiver is not there, or not yet
                return heard
            heard = True
            self._take(data)

    def _take(self, data: bytes) -> None:
        from spacepackets.cfdp.pdu import DirectiveType

        pdu = self._entity.parse(data)
        if pdu is None:
            return
        self._naks += getattr(pdu, "directive_type", None) == DirectiveType.NAK_PDU
        with contextlib.suppress(*self._entity.STRAY):
            self._handler.state_machine(pdu)
        self._collect(again=True)
        if self._user.finished is not None and not self.complete:
            raise BoardError(f"the CFDP receiver cancelled: {self._user.finished.condition_code.name}")

    def _advance(self) -> None:
        self._handler.state_machine(None)
        self._collect(again=False)

    def _collect(self, again: bool) -> None:
        """Queue what the state machine wants sent; `again`: in answer to a request, so file data are not new."""
        for data in self._entity.outgoing(self._handler):
            if data[0] >> 4 & 1:  # the header's PDU type: file data
                size = len(data) - _data_header(data)
                self._resent += size * again
                self._sent += size * (not again)
                self._queue.append(data)
            else:
                first = self._handler.progress == 0 and data[_header(data)] == 7  # metadata
                self._queue.extend([data] * (_METADATA_TIMES if first else 1))

    def _send(self, sock: socket.socket) -> int:
        """Send one PDU; returns what it takes on the wire, bytes."""
        data = self._queue.popleft()
        with contextlib.suppress(OSError):  # as good as lost on the way: the receiver asks for it
            sock.send(data)
        self._wire += len(data) + OVERHEAD_BYTES
        return len(data) + OVERHEAD_BYTES

    def _say_goodbye(self, sock: socket.socket) -> None:
        while self._queue:
            self._send(sock)
        self._handler.state_machine(None)
        self._files.close()

    def _record(self, began: float, before: tuple[int, int, int, int]) -> CfdpContact:
        sent, resent, wire, naks = (
            now - then for now, then in zip((self._sent, self._resent, self._wire, self._naks), before, strict=True)
        )
        contact = CfdpContact(sent, resent, wire, naks, time.monotonic() - began, self.complete)
        self.contacts.append(contact)
        return contact


def _header(data: bytes) -> int:
    """Length of a PDU's fixed header (727.0-B-5, table 5-1): lengths of ids and number are in its fourth byte."""
    return 4 + 2 * ((data[3] >> 4 & 7) + 1) + (data[3] & 7) + 1


def _data_header(data: bytes) -> int:
    """Length of all that precedes the file's bytes: header and offset, 4 bytes or for large files 8."""
    return _header(data) + (8 if data[0] & 1 else 4)
