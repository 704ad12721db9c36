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
import json
import math
import os
import select
import socket
import threading
import time
import zipfile
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from hil.errors import BenchError, BoardError, UsageError

if TYPE_CHECKING:
    from hil.drivers.ssh import Detached, Shell

PORT = 4556
# Seconds after which the receiver puts on the board's disk how far it is: about what a reboot costs.
KEEP_S = 5.0
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
    """What one contact moved. `sent_bytes` are of the file; `resent_bytes` of them were asked for again.

    `start_offset`, `offset`: up to where the receiver had said it has the file without a gap. `resent_pdus` carried
    `resent_bytes`; `wire_bytes` is everything, with headers down to Ethernet. `heard_pdus` came from the receiver.
    """

    start_offset: int
    offset: int
    sent_bytes: int
    resent_bytes: int
    resent_pdus: int
    wire_bytes: int
    naks: int
    heard_pdus: int
    duration_s: float
    complete: bool


@dataclass(slots=True)
class _Counts:
    """Of a whole transaction so far."""

    offset: int = 0
    sent_bytes: int = 0
    resent_bytes: int = 0
    resent_pdus: int = 0
    wire_bytes: int = 0
    naks: int = 0
    heard_pdus: int = 0


def require() -> None:
    """Raise UsageError when the extra is not installed."""
    if importlib.util.find_spec("cfdppy") is None:
        raise UsageError(
            "CFDP needs the package cfdp-py", hint="pip install 'hil[cfdp]', or `protocol: sftp` in the upload step"
        )


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
    shell: Shell,
    pyz: str,
    directory: str,
    *,
    port: int = PORT,
    ask_again_s: float = 5.0,
    python: str = "python3",
    resume: bool = False,
) -> Detached:
    """Start the receiver on the board over `shell` (mgmt) and wait until it listens; it outlives the connection.

    `pyz` is the archive's path there, `directory` where files may go. `ask_again_s` must exceed the round trip.
    `resume`: after a reboot, take up what the earlier receiver kept; `resumed` says whether there was something. Raises
    BoardError with what it said when it ends at once. Kill the job in the end: the ground's last word may be lost.
    """
    from hil.drivers.ssh import Detached

    argv = [python, pyz, "receive", "--port", str(port), "--directory", directory, "--ask-again-s", str(ask_again_s)]
    argv += ["--state", f"{directory}/.cfdp-state.json", "--keep-s", str(KEEP_S), *(["--resume"] if resume else [])]
    job = Detached(f"{directory}/.cfdp", tuple(argv))
    try:
        Detached.start(shell, argv, job.directory)
        deadline = time.monotonic() + 60  # an emulated board compiles the archive for a while
        while True:
            said, complaint = job.output(shell)
            if '"ready"' in said:
                return job
            if job.poll(shell) is not None or time.monotonic() > deadline:
                words = (complaint or said).strip()[-400:] or "it says nothing"
                raise BoardError(
                    f"{shell.name}: the CFDP receiver does not start: {words}",
                    hint=f"it needs {python} there, 3.10 or newer, and UDP port {port} for itself",
                )
            time.sleep(0.1)
    except BaseException:
        with contextlib.suppress(BoardError):  # what went wrong first says more
            job.kill(shell)
        raise


def resumed(job: Detached, shell: Shell) -> tuple[int, int] | None:
    """Which transaction the receiver `job` took up from before a reboot and from which byte; None: it knows of none."""
    told = json.loads(job.output(shell)[0].splitlines()[0])
    return None if told["transaction"] is None else (int(told["transaction"]), int(told["offset"]))


class CfdpUpload:
    """One file on its way to a board as one class 2 transaction over as many contacts as it takes. Not thread-safe.

    While suspended nothing is sent and no timer counts against it. After a reboot of the board start a receiver with
    `resume` there: where `take_up` says that it goes on with this transaction, so do we; else make a new object.
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
        self._ask_again_s = ask_again_s
        self._queue: deque[tuple[bytes, bool]] = deque()  # and whether it is sent again
        self._counts = _Counts()

    @property
    def complete(self) -> bool:
        """The receiver has said that the file is whole there."""
        finished = self._user.finished
        return finished is not None and finished.condition_code.name == "NO_ERROR"

    @property
    def offset(self) -> int:
        """Up to where the receiver has said that it has the file without a gap, bytes."""
        return self.total if self.complete else self._counts.offset

    @property
    def sent_to(self) -> int:
        """The file was sent up to this byte, what was asked for again apart."""
        return self._counts.sent_bytes - self._counts.resent_bytes

    def take_up(self, known: tuple[int, int] | None) -> bool:
        """Go on with a receiver that was started again; `known` is what `resumed` says of it. False: it cannot."""
        if known is None or self.sent_to == 0 or known[0] != self._handler.transaction_seq_num.value:
            return False
        self._counts.offset = known[1]
        return True

    def run(
        self,
        sock: socket.socket,
        *,
        rate_bps: float | Callable[[], float],
        stop: threading.Event | None = None,
        silence_s: float = 60.0,
        deaf_s: float = math.inf,
        on_progress: Callable[[int], None] | None = None,
    ) -> CfdpContact:
        """Send over a connected UDP socket at `rate_bps` (Ethernet bits) until done or `stop` is set.

        A rate that changes is a function of no arguments; 0 is silence for now. `on_progress(offset)` hears of every
        new offset. Nothing heard for `silence_s` after the end of the file was sent, or for `deaf_s` while it is being
        sent (a receiver that is there says how far it is): returns as well, incomplete.
        Raises BoardError when the receiver cancels, for example because it may not write there, and when another
        thread shuts the socket down.
        """
        stop = stop or threading.Event()
        rate: Callable[[], float] = rate_bps if callable(rate_bps) else lambda: rate_bps
        began = time.monotonic()
        before = replace(self._counts)
        told = self.offset
        free_s = heard_s = spoken_s = prompt_s = began
        sock.setblocking(False)
        while not stop.is_set() and self._user.finished is None:
            now = time.monotonic()
            if self._listen(sock):
                heard_s = spoken_s = now
            if on_progress is not None and self.offset != told:
                told = self.offset
                on_progress(told)
            if not self._queue and now >= free_s:
                self._advance()
            if not self._queue and now >= prompt_s and self.sent_to > 0:
                # All is said and the receiver has the word. In a new contact it does not know our address yet.
                prompt_s = now + self._ask_again_s
                self._queue.append((self._prompt(), False))
            bps = rate() if self._queue and now >= free_s else 0.0
            if bps > 0:
                # A clock that was late is not made up for by more than a few packets: queues on the way are short.
                free_s = max(free_s, now - 0.005) + self._send(sock) * 8 / bps
                heard_s = max(heard_s, now) if self.sent_to < self.total else heard_s
            else:
                if self._queue and now >= free_s:
                    spoken_s = now  # silence for now: nobody could have heard anything
                wait_s = free_s - now if free_s > now else 0.02
                select.select([sock], [], [], min(wait_s, 0.05))
            if now - heard_s > silence_s or (self.sent_to < self.total and now - spoken_s > deaf_s):
                break
        if self._user.finished is not None:
            self._say_goodbye(sock)
            if on_progress is not None and self.offset != told:
                on_progress(self.offset)
        return self._record(began, before)

    def _listen(self, sock: socket.socket) -> bool:
        """Hand over what has come; whether anything has."""
        heard = False
        while True:
            try:
                data = sock.recv(65536)
            except (BlockingIOError, ConnectionRefusedError):  # refused: the receiver is not there, or not yet
                return heard
            if not data:
                raise BoardError(f"the CFDP upload of {self.source.name} was hung up at {self.offset} bytes")
            heard = True
            self._take(data)

    def _take(self, data: bytes) -> None:
        from spacepackets.cfdp.pdu import DirectiveType

        pdu = self._entity.parse(data)
        if pdu is None:
            return
        self._counts.heard_pdus += 1
        kind = getattr(pdu, "directive_type", None)
        if kind == DirectiveType.KEEP_ALIVE_PDU:  # the library has no use for it
            if pdu.pdu_header.transaction_seq_num.value == self._handler.transaction_seq_num.value:
                self._counts.offset = max(self._counts.offset, pdu.progress)
            return
        self._counts.naks += kind == DirectiveType.NAK_PDU
        with contextlib.suppress(*self._entity.STRAY):
            self._handler.state_machine(pdu)
        self._collect(again=True)
        if self._user.finished is not None and not self.complete:
            raise BoardError(f"the CFDP receiver cancelled: {self._user.finished.condition_code.name}")

    def _advance(self) -> None:
        self._handler.state_machine(None)
        self._collect(again=False)

    def _prompt(self) -> bytes:
        """A Prompt PDU: the receiver answers how far it is."""
        from spacepackets.cfdp.pdu.prompt import PromptPdu, ResponseRequired

        return bytes(PromptPdu(self._handler._params.pdu_conf, ResponseRequired.KEEP_ALIVE).pack())

    def _collect(self, again: bool) -> None:
        """Queue what the state machine wants sent; `again`: in answer to a request, so file data are not new."""
        for data in self._entity.outgoing(self._handler):
            first = not _has_file_data(data) and self._handler.progress == 0 and data[_header(data)] == 7  # metadata
            self._queue.extend([(data, again)] * (_METADATA_TIMES if first else 1))

    def _send(self, sock: socket.socket) -> int:
        """Send one PDU; returns what it takes on the wire, bytes."""
        data, again = self._queue.popleft()
        try:
            sock.send(data)
        except BrokenPipeError:
            raise BoardError(f"the CFDP upload of {self.source.name} was hung up at {self.offset} bytes") from None
        except OSError:  # as good as lost on the way: the receiver asks for it
            pass
        if _has_file_data(data):
            size = len(data) - _data_header(data)
            self._counts.sent_bytes += size
            self._counts.resent_bytes += size * again
            self._counts.resent_pdus += again
        self._counts.wire_bytes += len(data) + OVERHEAD_BYTES
        return len(data) + OVERHEAD_BYTES

    def _say_goodbye(self, sock: socket.socket) -> None:
        while self._queue:
            self._send(sock)
        self._handler.state_machine(None)
        self._files.close()

    def _record(self, began: float, before: _Counts) -> CfdpContact:
        now = self._counts
        contact = CfdpContact(
            start_offset=before.offset,
            offset=self.offset,
            sent_bytes=now.sent_bytes - before.sent_bytes,
            resent_bytes=now.resent_bytes - before.resent_bytes,
            resent_pdus=now.resent_pdus - before.resent_pdus,
            wire_bytes=now.wire_bytes - before.wire_bytes,
            naks=now.naks - before.naks,
            heard_pdus=now.heard_pdus - before.heard_pdus,
            duration_s=time.monotonic() - began,
            complete=self.complete,
        )
        self.contacts.append(contact)
        return contact


def _has_file_data(data: bytes) -> bool:
    """By the header's PDU type; else it is a directive."""
    return bool(data[0] >> 4 & 1)


def _header(data: bytes) -> int:
    """Length of a PDU's fixed header (727.0-B-5, table 5-1): lengths of ids and number are in its fourth byte."""
    return 4 + 2 * ((data[3] >> 4 & 7) + 1) + (data[3] & 7) + 1


def _data_header(data: bytes) -> int:
    """Length of all that precedes the file's bytes: header and offset, 4 bytes or for large files 8."""
    return _header(data) + (8 if data[0] & 1 else 4)
