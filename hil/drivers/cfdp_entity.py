"""CFDP on the board: receives one file over UDP, class 2 (CCSDS 727.0-B-5). Also what both ends of a transfer share.

    python3 cfdp.pyz receive --port 4556 --directory /opt/hil

It stands alone (the standard library, cfdppy and spacepackets), because it is copied to boards as part of one archive.
The state machines are cfdp-py's. Around them here, which the library leaves out: a transaction survives outages of any
length, since a timer that runs out only makes the receiver ask again; it says how far it is (Keep Alive) and asks again
for gaps that stay open, before the end of the file too; an EOF that comes again is acknowledged again; files cannot
leave `--directory`. With `--state` what it knows of a transaction is on the disk every few seconds, never more than is
there of the file: started with `--resume` after a reboot it goes on from there. It ends when the ground knows that the
file is whole; a ground that never says so has to kill it.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import os
import select
import socket
import struct
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from cfdppy import exceptions
from cfdppy.filestore import NativeFilestore
from cfdppy.handler.dest import DestHandler
from cfdppy.mib import (
    CheckTimerProvider,
    DefaultFaultHandlerBase,
    IndicationConfig,
    LocalEntityConfig,
    RemoteEntityConfig,
    RemoteEntityConfigTable,
)
from cfdppy.user import CfdpUserBase
from spacepackets.cfdp import ChecksumType, ConditionCode, Direction, TransmissionMode
from spacepackets.cfdp.pdu import AckPdu, DirectiveType, KeepAlivePdu, NakPdu
from spacepackets.cfdp.pdu.ack import TransactionStatus
from spacepackets.cfdp.pdu.helper import PduFactory
from spacepackets.countdown import Countdown
from spacepackets.util import ByteFieldU16

GROUND_ID, BOARD_ID = 1, 2
# Frames of 1500 bytes with room for IP, UDP and a tunnel.
MAX_PDU_BYTES = 1400
# Outages are part of the plan: nobody gives a transaction up because a timer ran out.
NEVER = 1 << 30
_POLL_S = 0.1
_TELL_S = 0.5
_KEEP_S = 5.0  # a power cut costs about what came in this time
_GAPS_A_PDU = 150  # 8 bytes each
_BUFFER_BYTES = 4 << 20
_SO_RCVBUFFORCE = 33  # beyond the board's rmem_max, for root

# What a PDU that is late, doubled or of another transaction makes the library raise.
STRAY = (
    exceptions.PduIgnoredForDest,
    exceptions.PduIgnoredForSource,
    exceptions.InvalidPduForDestHandler,
    exceptions.InvalidPduForSourceHandler,
    exceptions.InvalidTransactionSeqNum,
    exceptions.InvalidDestinationId,
    exceptions.InvalidSourceId,
    exceptions.InvalidPduDirection,
    exceptions.InvalidNakPdu,
    exceptions.NoRemoteEntityConfigFound,
    ValueError,
)


class Files(NativeFilestore):  # type: ignore[misc]
    """Files that stay open between segments, and, with a `root`, only those below it."""

    def __init__(self, root: Path | None = None) -> None:
        super().__init__()
        self._root = None if root is None else root.resolve()
        self._open: dict[Path, BinaryIO] = {}
        self.spared_bytes = 0  # what truncation leaves: the part of a resumed transaction

    def file_exists(self, path: Path) -> bool:
        return self._allowed(path).exists()

    def read_data(self, file: Path, offset: int | None, read_len: int | None = None) -> bytes:
        stream = self._stream(file, "rb")
        stream.seek(offset or 0)
        return stream.read(-1 if read_len is None else read_len)

    def write_data(self, file: Path, data: bytes, offset: int | None) -> None:
        stream = self._stream(file, "r+b")
        stream.seek(offset or 0)
        stream.write(data)

    def truncate_file(self, file: Path) -> None:
        if (stream := self._open.pop(file, None)) is not None:
            stream.close()  # what it still holds would be written behind the new end
        with self._allowed(file).open("r+b") as whole:
            whole.truncate(self.spared_bytes)

    def calculate_checksum(
        self, checksum_type: ChecksumType, file_path: Path, size_to_verify: int, segment_len: int = 4096
    ) -> bytes:
        """CRC-32 of the first bytes; the library's own reads a segment at a time."""
        if checksum_type != ChecksumType.CRC_32:
            return bytes(super().calculate_checksum(checksum_type, file_path, size_to_verify, segment_len))
        self.flush()
        crc, left = 0, size_to_verify
        with self._allowed(file_path).open("rb") as stream:
            while left > 0 and (data := stream.read(min(left, 1 << 20))):
                crc, left = zlib.crc32(data, crc), left - len(data)
        return struct.pack("!I", crc)

    def flush(self) -> None:
        """Put on disk what was written."""
        for stream in self._open.values():
            if stream.writable():
                stream.flush()
                os.fsync(stream.fileno())

    def close(self) -> None:
        """Flush and close all files."""
        self.flush()
        for stream in self._open.values():
            stream.close()
        self._open.clear()

    def _stream(self, file: Path, mode: str) -> BinaryIO:
        if file not in self._open:
            self._open[file] = self._allowed(file).open(mode)  # type: ignore[assignment]
        return self._open[file]

    def _allowed(self, path: Path) -> Path:
        if self._root is not None and self._root not in path.resolve().parents:
            raise PermissionError(f"{path} is outside {self._root}")
        return path


class User(CfdpUserBase):  # type: ignore[misc]
    """Remembers how the transaction ended. What was written is on the disk before the other end hears of it."""

    def __init__(self, files: Files) -> None:
        super().__init__(files)
        self._files = files
        self.finished: Any = None

    def transaction_finished_indication(self, params: Any) -> None:
        self._files.flush()  # the library flushes nothing, and takes a checksum only where gaps were filled
        self.finished = params.finished_params

    def transaction_indication(self, transaction_indication_params: Any) -> None: ...
    def eof_sent_indication(self, transaction_id: Any) -> None: ...
    def eof_recv_indication(self, transaction_id: Any) -> None: ...
    def metadata_recv_indication(self, params: Any) -> None: ...
    def file_segment_recv_indication(self, params: Any) -> None: ...
    def report_indication(self, transaction_id: Any, status_report: Any) -> None: ...
    def suspended_indication(self, transaction_id: Any, cond_code: Any) -> None: ...
    def resumed_indication(self, transaction_id: Any, progress: int) -> None: ...
    def fault_indication(self, transaction_id: Any, cond_code: Any, progress: int) -> None: ...
    def abandoned_indication(self, transaction_id: Any, cond_code: Any, progress: int) -> None: ...


class Faults(DefaultFaultHandlerBase):  # type: ignore[misc]
    """Remembers the last fault that ended a transaction."""

    def __init__(self) -> None:
        super().__init__()
        self.last: ConditionCode | None = None

    def notice_of_cancellation_cb(self, transaction_id: Any, cond: ConditionCode, progress: int) -> None:
        self.last = cond

    def notice_of_suspension_cb(self, transaction_id: Any, cond: ConditionCode, progress: int) -> None: ...
    def ignore_cb(self, transaction_id: Any, cond: ConditionCode, progress: int) -> None: ...

    def abandoned_cb(self, transaction_id: Any, cond: ConditionCode, progress: int) -> None:
        self.last = cond


class CheckTimers(CheckTimerProvider):  # type: ignore[misc]
    """Wanted by the library for class 1 only."""

    def provide_check_timer(self, local_entity_id: Any, remote_entity_id: Any, entity_type: Any) -> Countdown:
        return Countdown.from_seconds(10.0)


def configuration(own: int, other: int, ask_again_s: float, faults: Faults) -> tuple[Any, Any]:
    """The local and the remote entity's settings; `ask_again_s` must exceed the round trip."""
    local = LocalEntityConfig(ByteFieldU16(own), IndicationConfig(), faults)
    remote = RemoteEntityConfig(
        entity_id=ByteFieldU16(other),
        max_file_segment_len=None,
        max_packet_len=MAX_PDU_BYTES,
        closure_requested=True,
        crc_on_transmission=False,
        default_transmission_mode=TransmissionMode.ACKNOWLEDGED,
        crc_type=ChecksumType.CRC_32,
        positive_ack_timer_interval_seconds=ask_again_s,
        positive_ack_timer_expiration_limit=NEVER,
        nak_timer_interval_seconds=ask_again_s,
        nak_timer_expiration_limit=NEVER,
    )
    return local, RemoteEntityConfigTable([remote])


def acknowledgement(pdu: Any, status: TransactionStatus) -> bytes:
    """The ACK of an EOF or Finished PDU, as the other side of its transaction sends it."""
    conf = copy.copy(pdu.pdu_header.pdu_conf)
    towards_sender = pdu.directive_type == DirectiveType.EOF_PDU
    conf.direction = Direction.TOWARDS_SENDER if towards_sender else Direction.TOWARDS_RECEIVER
    return bytes(AckPdu(conf, pdu.directive_type, pdu.condition_code, status).pack())


def outgoing(handler: Any) -> Iterator[bytes]:
    """The PDUs that a state machine wants to be sent."""
    while (holder := handler.get_next_packet()) is not None:
        yield bytes(holder.pdu.pack())


def parse(data: bytes) -> Any:
    """A PDU, or None for whatever else comes to an open port."""
    try:
        return PduFactory.from_raw(data)
    except Exception:  # the library has no common error for what is not a PDU
        return None


class Receiver:
    """One transaction: `datagram` in, answers out; `tick` after each and several times a second without.

    `tell_s`: seconds between Keep Alive PDUs while data come. `state`: where the transaction is kept for a receiver
    that takes it up after a reboot, at most every `keep_s`.
    """

    def __init__(
        self,
        root: Path,
        ask_again_s: float,
        tell_s: float = _TELL_S,
        *,
        state: Path | None = None,
        keep_s: float = _KEEP_S,
    ) -> None:
        self.files = Files(root)
        self.user, self.faults = User(self.files), Faults()
        local, remotes = configuration(BOARD_ID, GROUND_ID, ask_again_s, self.faults)
        self._handler = DestHandler(local, self.user, remotes, CheckTimers())
        self._transaction: Any = None
        self._ask_again_s, self._tell_s = ask_again_s, tell_s
        self._tick_s = self._ask_s = self._told_s = self._keep_at_s = 0.0
        self._state, self._keep_s = state, keep_s
        self._metadata = self._eof = b""
        self._kept: tuple[int, bytes] | None = None
        self.lack = ""  # why `resume` found nothing
        self._known_gaps: set[tuple[int, int]] = set()
        self._news = False

    @property
    def done(self) -> bool:
        """The file is whole (or the transaction cancelled) and the ground knows."""
        return self.user.finished is not None and self._handler.transaction_id is None

    def datagram(self, data: bytes) -> Iterator[bytes]:
        """Take one PDU; yields the answers."""
        pdu = parse(data)
        kind = getattr(pdu, "directive_type", None)
        if kind == DirectiveType.PROMPT_PDU:  # who asks may have come to another port: whoever calls us has its address
            if self._handler.transaction_id is not None and _transaction(pdu) == self._transaction:
                yield self._keep_alive()
            return
        if pdu is None or not self._ours(pdu):
            return
        self._news = True
        if kind == DirectiveType.METADATA_PDU:
            self._metadata = data
        if kind != DirectiveType.EOF_PDU:
            yield from self._step(pdu)
        elif self._eof_seen:
            yield acknowledgement(pdu, TransactionStatus.ACTIVE)
            yield from self._step(None)
        else:
            self._eof = data
            answers = list(self._step(pdu))
            self._keep()  # once it is acknowledged nobody sends it again, to a receiver after a reboot neither
            yield from answers

    def tick(self) -> Iterator[bytes]:
        """Let timers run; yields what is to be asked or told again."""
        now = time.monotonic()
        if now < self._tick_s:
            return
        self._tick_s = now + min(_POLL_S, self._tell_s)
        yield from self._step(None)
        if now >= self._keep_at_s:
            self._keep_at_s = now + self._keep_s
            self._keep()
        if self._handler.transaction_id is None or self._eof_seen:
            return
        if now >= self._ask_s:
            self._ask_s = now + self._ask_again_s
            yield from self._gaps_again()
        if self._news and now >= self._told_s:
            self._news, self._told_s = False, now + self._tell_s
            yield self._keep_alive()

    def resume(self) -> tuple[int, int] | None:
        """Take up what an earlier receiver kept: (transaction, up to where its file is there), None without such."""
        try:
            metadata, eof, offset = self._read_state()
        except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
            self.lack = f"{type(error).__name__}: {error}"
            return None
        self._metadata, self._transaction = metadata, _transaction(parse(metadata))
        self._gaps.clear()
        self.files.spared_bytes = offset
        list(self._step(parse(metadata)))
        self.files.spared_bytes = 0
        self._params.fp.progress = offset
        self._params.acked_params.last_start_offset = self._params.acked_params.last_end_offset = offset
        if eof:
            self._eof = eof
            list(self._step(parse(eof)))
        return self._transaction[1], offset

    def forget(self) -> None:
        """What was kept of a transaction is of no use any more."""
        if self._state is not None:
            self._state.unlink(missing_ok=True)

    def _keep(self) -> None:
        """Write down, durably, how far the file is on the disk, with the PDUs that began and ended it."""
        if self._state is None or not self._metadata or self._handler.transaction_id is None:
            return
        now = (self.offset, self._eof)
        if now == self._kept:
            return
        self.files.flush()
        fresh = self._state.with_suffix(".new")
        with fresh.open("w", encoding="utf-8") as file:
            json.dump({"metadata": self._metadata.hex(), "eof": self._eof.hex(), "offset": now[0]}, file)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(self._state)
        # The names of both files, too.
        directory = os.open(self._state.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
        self._kept = now

    def _read_state(self) -> tuple[bytes, bytes, int]:
        """Metadata PDU, EOF PDU or nothing, offset. Raises all sorts of errors unless it makes sense with the file."""
        if self._state is None:
            raise ValueError("no --state")
        kept = json.loads(self._state.read_text(encoding="utf-8"))
        metadata, eof, offset = bytes.fromhex(kept["metadata"]), bytes.fromhex(kept["eof"]), int(kept["offset"])
        there = Path(parse(metadata).dest_file_name).stat().st_size
        if not 0 <= offset <= there:
            raise ValueError(f"{offset} bytes were kept, the file has {there}")
        return metadata, eof, offset

    def _keep_alive(self) -> bytes:
        return bytes(KeepAlivePdu(self._params.pdu_conf, self.offset).pack())

    @property
    def offset(self) -> int:
        """The file is here up to this byte without a gap."""
        return min((start for start, _ in self._gaps), default=int(self._handler.progress))

    @property
    def _params(self) -> Any:
        return self._handler._params  # the library shows neither its gaps nor the header of its PDUs

    @property
    def _gaps(self) -> list[tuple[int, int]]:
        gaps: list[tuple[int, int]] = self._params.acked_params.lost_seg_tracker.lost_segments
        return gaps

    def _gaps_again(self) -> Iterator[bytes]:
        """Ask for gaps that were open the last time too: the request was lost on the way, or what it asked for."""
        known, self._known_gaps = self._known_gaps, set(self._gaps)
        old = sorted(known & self._known_gaps)[:_GAPS_A_PDU]
        if old:
            yield bytes(NakPdu(self._params.pdu_conf, 0, old[-1][1], old).pack())

    @property
    def _eof_seen(self) -> bool:
        return self._handler.deferred_lost_segment_procedure_active or self.user.finished is not None

    def _ours(self, pdu: Any) -> bool:
        """Whether it belongs to the transaction; new metadata begin another one: the ground started again."""
        transaction = _transaction(pdu)
        if transaction != self._transaction:
            if self._transaction is not None and getattr(pdu, "directive_type", None) != DirectiveType.METADATA_PDU:
                return False
            self._gaps.clear()  # the library's transactions share one list
            self._handler.reset()
            self._transaction, self.user.finished = transaction, None
            self._metadata = self._eof = b""
        return True

    def _step(self, pdu: Any) -> Iterator[bytes]:
        with contextlib.suppress(*STRAY):
            self._handler.state_machine(pdu)
        yield from outgoing(self._handler)


def _transaction(pdu: Any) -> tuple[int, int]:
    """Whose transaction a PDU belongs to, and its number."""
    return pdu.source_entity_id.value, pdu.transaction_seq_num.value


def receive(
    port: int,
    directory: Path,
    ask_again_s: float,
    host: str = "",
    *,
    state: Path | None = None,
    keep_s: float = _KEEP_S,
    resume: bool = False,
) -> int:
    """Receive one file; prints a JSON line when ready and one at the end. Returns the exit code.

    With `resume` the first line says which transaction was taken up from `state` and from where, both null if none.
    """
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER_BYTES)
    except OSError:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER_BYTES)
    sock.bind((host, port))
    receiver = Receiver(directory, ask_again_s, state=state, keep_s=keep_s)
    transaction, offset = (receiver.resume() if resume else None) or (None, None)
    if resume and transaction is None:
        print(f"nothing to take up: {receiver.lack}", file=sys.stderr, flush=True)
    if transaction is None:
        receiver.forget()
    ready = {"ready": sock.getsockname()[1], "transaction": transaction, "offset": offset}
    print(json.dumps(ready), flush=True)
    peer, told = None, False
    while not receiver.done:
        answers: list[bytes] = []
        if select.select([sock], [], [], _POLL_S)[0]:
            data, peer = sock.recvfrom(65536)
            answers += receiver.datagram(data)
        answers += receiver.tick()
        for answer in answers:
            if peer is not None:
                with contextlib.suppress(OSError):  # as good as lost on the way: it is said again
                    sock.sendto(answer, peer)
        if receiver.user.finished is not None and not told:
            condition = receiver.user.finished.condition_code
            print(json.dumps({"finished": condition.name}), flush=True)
            told = True
    receiver.files.close()
    receiver.forget()
    return 0 if receiver.user.finished.condition_code == ConditionCode.NO_ERROR else 1


def main(argv: list[str] | None = None) -> int:
    """Entry point; see the module's text."""
    parser = argparse.ArgumentParser(prog="cfdp.pyz")
    parser.add_argument("command", choices=["receive"])
    parser.add_argument("--port", type=int, default=4556)
    parser.add_argument("--host", default="")
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--ask-again-s", type=float, default=5.0)
    parser.add_argument("--state", type=Path, help="where the transaction is kept for --resume after a reboot")
    parser.add_argument("--keep-s", type=float, default=_KEEP_S)
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args(argv)
    return receive(
        options.port,
        options.directory,
        options.ask_again_s,
        options.host,
        state=options.state,
        keep_s=options.keep_s,
        resume=options.resume,
    )


if __name__ == "__main__":
    sys.exit(main())
