"""The upload step: the model file over the payload link, contact by contact, by SFTP or by CFDP class 2."""

from __future__ import annotations

import contextlib
import math
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Protocol, cast

from hil.campaign import steps
from hil.campaign.flying import Flying
from hil.campaign.reboots import Reboots
from hil.client.console_shell import ConsoleShell
from hil.drivers import broker, cfdp
from hil.drivers.cfdp import CfdpUpload
from hil.drivers.ssh import Detached, Shell, ShellLost, ShellTimeout, Upload
from hil.drivers.ssh.hashing import HASH_BYTES_PER_S
from hil.errors import BenchError, BoardError, HilError, UsageError
from hil.inference import onboard
from hil.inventory.mission_steps import UploadStep
from hil.mission.passes import Contact
from hil.model import Completed

# Wall seconds after loss of signal at which an upload is given up: later than the link's edge, so the cut is real.
AFTER_LOS_S = 0.3
# CFDP sends at this share of the link's rate: the queue in front of it stays short.
SENDER_SHARE = 0.98
# Wall seconds of contact without a word from the CFDP receiver after which it is taken not to be there; a slow board
# says nothing while it puts a whole model on its disk and takes its CRC. Sending ends after as long without a word.
SILENCE_S = 20.0
# Wall seconds after which CFDP asks again, beside the round trip: a slow board takes a while to answer.
ASK_AGAIN_S = 2.0
# Wall seconds between two reports of progress.
TELL_S = 0.25
# How often the activation is begun: a board that goes down each time goes down because of it.
ACTIVATIONS = 3


@dataclass(frozen=True, slots=True)
class Moved:
    """What one contact moved. Up to the offsets the board had confirmed the file before it and after it.

    `bytes_sent` are of the file; `bytes_resent` of them had been sent before: from where SFTP resumed, or what CFDP was
    asked for. `retransmissions`: packets that went out again, SFTP's TCP segments or CFDP's file data PDUs.
    """

    bytes_acked_start: int
    bytes_acked_end: int
    bytes_sent: int = 0
    bytes_resent: int = 0
    retransmissions: int = 0


@dataclass(frozen=True, slots=True)
class Window:
    """The rest of a contact: when it is lost, on the monotonic clock, and what the link carries now, bit/s.

    `stop` is set a moment after loss of signal; `progress` is told what the board has confirmed.
    """

    los_mono: float
    rate_bps: Callable[[], float]
    stop: threading.Event
    progress: Callable[[int], None]


class Carrier(Protocol):
    """A protocol that brings one file on board; `part` is where it lies there until it is activated."""

    part: str
    total: int

    @property
    def complete(self) -> bool:
        """The board has confirmed every byte."""
        ...

    def start(self) -> int:
        """Before the first contact; returns how many bytes are on board already."""
        ...

    def send(self, window: Window) -> Moved | None:
        """Send until done, `window.stop`, or a failure that `failed` tells of; None when there was no contact."""
        ...

    def failed(self) -> HilError | None:
        """Why the last contact ended before loss of signal; asked when the board did not go through a reboot."""
        ...

    def resume(self) -> str:
        """The board is up again after a reboot: prepare the next contact. Returns how the protocol goes on there."""
        ...

    def hang_up(self) -> None:
        """Loss of signal: the ground station knows its schedule and gives up what is under way. From any thread."""
        ...

    def close(self) -> None:
        """Leave nothing behind."""
        ...


def upload(flying: Flying, step: UploadStep) -> None:
    """The model file, contact by contact over the payload link; activated on board after its hash agrees."""
    model = flying.mission.file.model
    if model.sha256 is None:
        raise UsageError(f"{flying.mission.path}: model.sha256 is not written down", hint="`sha256sum` of the file")
    carrier: Carrier = Cfdp(flying) if step.protocol == "cfdp" else Sftp(flying, step)
    with contextlib.closing(carrier):
        preloaded = carrier.start()
        reboots = Reboots(flying, step.clock_rate)
        moved, count = _fly_contacts(flying, step, carrier, preloaded, reboots)
    result, count = _activate(flying, step, carrier, reboots, count)
    ok = result.returncode == 0
    flying.event(
        "upload_done",
        protocol=step.protocol,
        windows=len(moved),
        size=carrier.total,
        preloaded=preloaded,
        bytes_sent=sum(item.bytes_sent for item in moved),
        resent_bytes_max_per_cut=max((item.bytes_resent for item in moved), default=0),
        reboots=count,
        sha256_ok=ok,
    )
    if not ok:
        message = (result.stderr or result.stdout).strip()[-400:]
        flying.event("activation_refused", message=message)
        raise BoardError(f"board {flying.board_name} refused the model: {message}")
    flying.event("activated", sha256=model.sha256)


def _activate(
    flying: Flying, step: UploadStep, carrier: Carrier, reboots: Reboots, count: int
) -> tuple[Completed, int]:
    """Hash and put in service on board, begun again after a reboot; with how often the board went through one by then.

    What was in service before the reboot stays so: `onboard.py activate` says then that it is.
    """
    sha256 = str(flying.mission.file.model.sha256)
    argv = steps.onboard_argv(flying, "activate", carrier.part, steps.model_path(flying), sha256)
    tries = 0
    while True:
        tries += 1
        try:
            return flying.board.shell.run(argv, timeout_s=120), count
        except (BoardError, BenchError):
            cause = reboots.since()
            if cause is None or tries == ACTIVATIONS:
                raise
        count += 1
        _put_program_again(flying)
        _tell_reboot(flying, step, cause, "the activation is begun again", count, carrier.total)


def _tell_reboot(flying: Flying, step: UploadStep, cause: str, goes_on: str, number: int, acknowledged: int) -> None:
    told = {"protocol": step.protocol, "cause": cause, "goes_on": goes_on}
    flying.event("upload_rebooted", **told, number=number, bytes_acked=acknowledged)
    flying.say(f"  the board went through a reboot ({cause}) and is back: {goes_on}")


def _fly_contacts(
    flying: Flying, step: UploadStep, carrier: Carrier, offset: int, reboots: Reboots
) -> tuple[list[Moved], int]:
    """One contact after the other until the file is on board, through reboots; `offset` bytes are there already.

    Returns what each contact moved and how often the board went through a reboot.
    """
    before = flying.flight.state()["upload_bytes"]  # what an earlier upload step brought
    found: list[Moved] = []
    contact: Contact | None = None
    after_reboot, count = False, 0
    while not carrier.complete:
        if len(found) == step.max_contacts:
            raise BoardError(
                f"board {flying.board_name}: {offset} of {carrier.total} bytes after {len(found)} contacts",
                hint="max_contacts in the mission's upload step bounds the windows",
            )
        found.append(_fly_contact(flying, step, carrier, _Use(offset, before, len(found) + 1, contact, after_reboot)))
        offset = found[-1].bytes_acked_end
        cause = reboots.since()
        if cause is None and (failure := carrier.failed()) is not None:
            raise failure
        after_reboot = cause is not None or (after_reboot and found[-1].bytes_sent == 0)
        if cause is not None:
            count += 1
            _tell_reboot(flying, step, cause, carrier.resume(), count, offset)
        contact = _rest_of_contact(flying)
    return found, count


@dataclass(frozen=True, slots=True)
class _Use:
    """One window: `offset` bytes are confirmed, `before` of earlier steps; `contact` that runs already, or the next."""

    offset: int
    before: float
    number: int
    contact: Contact | None
    after_reboot: bool


def _rest_of_contact(flying: Flying) -> Contact | None:
    """The contact that runs now, when enough of it is left to go on in: a window may end before loss of signal."""
    now_s = flying.flight.state()["t_mission"]
    contact = flying.timeline.contact_at(now_s)
    if contact is None or (up := flying.timeline.opening(contact)) is None:
        return None
    return contact if up.end_s - max(now_s, up.start_s) >= steps.SHORTEST_CONTACT_S else None


def _fly_contact(flying: Flying, step: UploadStep, carrier: Carrier, use: _Use) -> Moved:
    """Fly to the next contact, or go on in this one, use it, and write down what it moved."""
    contact = use.contact or steps.next_contact(flying)
    # With a share below 1 the last part of the contact is used: it is loss of signal that ends the window.
    up = steps.opening(flying, contact)
    begin_s = up.end_s - step.contact_share * (up.end_s - contact.aos_s)
    lead_s, now_s = steps.LEAD_S + flying.mission.file.link.acquisition_s, flying.flight.state()["t_mission"]
    at_s = max(begin_s - steps.LEAD_S, up.start_s - lead_s)
    if use.contact is None or at_s > now_s:
        flying.go_to(at_s, "next contact")
    else:
        begin_s = max(begin_s, now_s)
    rate = flying.clock(step.clock_rate, cause="upload")
    steps.await_link(flying)
    on_wire, started_s = _ground_sent(flying), time.monotonic()
    sent, to_the_end = _send(flying, carrier, up.end_s, use.before)
    moved = sent or Moved(use.offset, use.offset)
    lost = max(use.offset - moved.bytes_acked_start, 0)
    # What came unconfirmed is progress of this contact, what a reboot took is none: all of them add up to the file.
    moved = replace(moved, bytes_acked_start=use.offset)
    ended_s = time.monotonic()
    flying.flight.clock(1.0, cause="upload window over")  # not flying.clock: the window is told before the end
    on_wire_after = _ground_sent(flying)
    flying.event(
        "upload_window",
        window=use.number,
        protocol=step.protocol,
        station=contact.station,
        **asdict(moved),
        bytes_lost=lost,
        after_reboot=use.after_reboot,
        bytes_on_wire=None if on_wire is None or on_wire_after is None else on_wire_after - on_wire,
        cut_by_los=to_the_end and not carrier.complete,
        complete=carrier.complete,
        wall_s=ended_s - started_s,
        t_start_mono=started_s,
        t_end_mono=ended_s,
        contact_s=up.end_s - begin_s,
        clock_rate=rate,
        rate_bps=round(flying.timeline.mean_rate_bps("uplink", begin_s, up.end_s), 3),
    )
    ending = "" if carrier.complete else ", cut by loss of signal" if to_the_end else ", ended before loss of signal"
    flying.say(
        f"  window {use.number}, {contact.station}: {moved.bytes_acked_end / 1e6:.1f} of {carrier.total / 1e6:.1f} MB"
        f"{ending}"
    )
    return moved


def _send(flying: Flying, carrier: Carrier, end_s: float, before: float) -> tuple[Moved | None, bool]:
    """Send until done or to the end of the link at mission time `end_s`; says whether that end was reached."""
    state, now = flying.flight.state(), time.monotonic()
    t_mission, clock_rate = float(state["t_mission"]), float(state["rate"])
    los_mono = now + (end_s - t_mission) / clock_rate
    stop = threading.Event()
    shown = [0.0]

    def rate_bps() -> float:
        at_s = t_mission + (time.monotonic() - now) * clock_rate
        return flying.timeline.link_at(at_s, clock_rate)["uplink"].rate_bps

    def progress(acknowledged: int) -> None:
        if time.monotonic() - shown[0] > TELL_S or acknowledged == carrier.total:
            shown[0] = time.monotonic()
            flying.flight.progress("upload_bytes", before + acknowledged)

    def lost() -> None:
        stop.set()
        carrier.hang_up()

    timer = threading.Timer(max(los_mono + AFTER_LOS_S - time.monotonic(), 0.0), lost)
    timer.daemon = True
    timer.start()
    try:
        moved = carrier.send(Window(los_mono, rate_bps, stop, progress))
    finally:
        timer.cancel()
    return moved, time.monotonic() >= los_mono


def _ground_sent(flying: Flying) -> int | None:
    """Bytes that the ground has put on the payload link, by its interface's counter; None where it has none of its own.

    With all headers, handshakes and what TCP sends again: the same measure for every protocol.
    """
    if flying.payload.broker is None:
        return None
    counters = broker.counters(flying.payload.broker)
    return sum(item["tx_bytes"] for name, item in counters.items() if name != "lo")


class Sftp:
    """Over SSH, a new connection each contact; resumed where the board's file is proven good, after a reboot too."""

    def __init__(self, flying: Flying, step: UploadStep) -> None:
        self._flying, self._preload_bytes = flying, step.preload_bytes
        self._send = Upload(
            flying.mission.file.model.file,
            steps.model_path(flying),
            onboard=f"{flying.type.onboard_dir}/onboard.py",
            chunk_bytes=step.chunk_bytes,
            window_bytes=step.chunk_bytes // 2,
        )
        self.part, self.total = self._send.part, self._send.total
        self._shell: Shell | None = None
        self._failure: HilError | None = None
        self._doubted = False

    @property
    def complete(self) -> bool:
        return self._send.complete and not self._doubted

    def start(self) -> int:
        return preload(self._flying, self._send, self._preload_bytes) if self._preload_bytes else 0

    def send(self, window: Window) -> Moved | None:
        attempts, self._shell, self._failure = len(self._send.attempts), None, None
        try:
            left_s = max(window.los_mono - time.monotonic(), 1.0)
            self._shell = self._flying.board.payload_shell(timeout_s=left_s)
            self._send.run(self._shell, stall_s=max(left_s, 5.0), stop=window.stop, on_progress=window.progress)
            self._doubted = False
        except (ShellLost, ShellTimeout) as error:
            if time.monotonic() < window.los_mono:
                name = self._flying.board_name
                self._failure = BoardError(f"payload link of {name} failed before loss of signal: {error}")
                self._failure.__cause__ = error
        except (BoardError, BenchError) as error:  # refused; or cut off the power, which a load shed may do
            self._failure = error
        finally:
            self.hang_up()
        if len(self._send.attempts) == attempts:
            return None
        last = self._send.attempts[-1]
        again = 0 if self._shell is None else self._shell.retransmissions()
        return Moved(last.start_offset, last.offset, last.sent_bytes, last.resent_bytes, again)

    def failed(self) -> HilError | None:
        return self._failure

    def resume(self) -> str:
        """What the board had confirmed may be lost: the next connection hashes it, with what is put there anew."""
        _put_program_again(self._flying)
        self._doubted = True
        return "where the board's file is proven good"

    def hang_up(self) -> None:
        if self._shell is not None:
            self._shell.abort()

    def close(self) -> None:
        """Nothing stays on the board."""


def _put_program_again(flying: Flying) -> None:
    """The program that hashes and activates: a reboot took it where the board's directory is in its memory."""
    shell, directory = flying.board.shell, flying.type.onboard_dir
    shell.run(["mkdir", "-p", directory], timeout_s=20, check=True)
    steps.put_file(shell, Path(onboard.__file__), f"{directory}/onboard.py")


def preload(flying: Flying, send: Upload, count: int) -> int:
    """Bring the first `count` bytes on the board over mgmt; returns how many it really was."""
    flying.say(f"  putting {count / 1e6:.0f} MB on the board over mgmt beforehand (not part of the measured upload)")
    enough = threading.Event()

    def progress(acknowledged: int) -> None:
        if acknowledged >= count:
            enough.set()

    shell = flying.board.shell
    if isinstance(shell, ConsoleShell):
        raise UsageError(
            f"board {flying.board_name} has no mgmt port, and its console is too slow for `preload_bytes`",
            hint="add `mgmt:` to the bench file, or leave `preload_bytes` out",
        )
    return send.run(shell, stall_s=30.0, stop=enough, on_progress=progress).offset


class Cfdp:
    """CFDP class 2 over UDP at the rate of the contact plan: one transaction, suspended from contact to contact.

    Its receiver is put on the board and started over mgmt (or the console); its PDUs use the payload link alone.
    """

    def __init__(self, flying: Flying) -> None:
        cfdp.require()
        if flying.payload.jump:
            raise UsageError(
                f"board {flying.board_name}: `protocol: cfdp` is UDP, which no jump host of `payload:` passes on",
                hint="`protocol: sftp`, or a bench whose ground end is on the link itself",
            )
        source = flying.mission.file.model.file
        self._flying, self._source = flying, source
        self.part, self.total = f"{steps.model_path(flying)}.part", source.stat().st_size
        self._ask_again_s = ASK_AGAIN_S + _round_trip_s(flying)
        self._send = CfdpUpload(source, self.part, ask_again_s=self._ask_again_s)
        self._job: Detached | None = None
        self._silent_s = 0.0
        self._reached = 0  # up to where transactions had sent the file that a reboot ended

    @property
    def complete(self) -> bool:
        return self._send.complete

    def start(self) -> int:
        self._start_receiver(resume=False)
        return 0

    def _start_receiver(self, *, resume: bool) -> Detached:
        flying, directory = self._flying, self._flying.type.onboard_dir
        shell, archive = flying.board.shell, f"{directory}/cfdp.pyz"
        shell.run(["mkdir", "-p", directory], timeout_s=20, check=True)
        # Put there whole and durably, it survives a reboot, but for a directory in the board's memory.
        if not resume or shell.run(["test", "-e", archive], timeout_s=20).returncode != 0:
            with tempfile.TemporaryDirectory(prefix="hil-") as scratch:
                steps.put_file(shell, cfdp.archive(Path(scratch) / "cfdp.pyz"), archive)
        began = time.monotonic()
        self._job = cfdp.start_receiver(
            cast("Shell", shell),  # a console's shell runs commands alike
            archive,
            directory,
            port=cfdp.PORT,
            ask_again_s=self._ask_again_s,
            python=flying.type.runtime_python,
            resume=resume,
        )
        flying.say(f"  CFDP receiver on board after {time.monotonic() - began:.1f} s")
        return self._job

    def resume(self) -> str:
        """The same transaction where the board kept it, else a new one: what it sends was sent before."""
        self._silent_s, self._job = 0.0, None  # it ran in the earlier boot
        _put_program_again(self._flying)
        if self.complete:
            if self._proven():
                return "the file was complete"
            self._start_receiver(resume=False)
            why = "the complete file is gone"
        else:
            job = self._start_receiver(resume=True)
            shell = cast("Shell", self._flying.board.shell)
            if self._send.take_up(cfdp.resumed(job, shell)):
                return f"the transaction is continued at byte {self._send.offset}"
            why = job.output(shell)[1].strip()[-200:] or "the receiver kept another one"
        self._reached = max(self._reached, self._send.sent_to)
        self._send = CfdpUpload(self._source, self.part, ask_again_s=self._ask_again_s)
        return f"a new transaction from byte 0 ({why})"

    def _proven(self) -> bool:
        """The whole part lies on the board as it was sent; hashing is slow there, but this is rare."""
        argv = steps.onboard_argv(self._flying, "chunk-hash", self.part, "0", str(self.total))
        done = self._flying.board.shell.run(argv, timeout_s=60 + self.total / HASH_BYTES_PER_S)
        return done.returncode == 0 and str(self._flying.mission.file.model.sha256) in done.stdout

    def send(self, window: Window) -> Moved | None:
        sent_before = self._send.sent_to
        with self._flying.connect_payload_udp(cfdp.PORT) as sock:
            contact = self._send.run(
                sock,
                rate_bps=lambda: SENDER_SHARE * window.rate_bps(),
                stop=window.stop,
                silence_s=math.inf,
                deaf_s=SILENCE_S,
                on_progress=window.progress,
            )
        self._silent_s = 0.0 if contact.heard_pdus else self._silent_s + contact.duration_s
        # A new transaction sends for the first time what an earlier one had sent.
        again = min(self._reached, self._send.sent_to) - min(self._reached, sent_before)
        resent = contact.resent_bytes + again
        return Moved(contact.start_offset, contact.offset, contact.sent_bytes, resent, contact.resent_pdus)

    def failed(self) -> HilError | None:
        return self._silence() if self._silent_s > SILENCE_S else None

    def hang_up(self) -> None:
        """`Window.stop` suspends it: there is no connection."""

    def close(self) -> None:
        if self._job is not None:
            with contextlib.suppress(HilError):  # whatever ends the step is told; without power there is no receiver
                self._job.kill(cast("Shell", self._flying.board.shell))

    def _silence(self) -> BoardError:
        """Why nothing was heard for whole contacts, as far as the board can say."""
        name, wire = self._flying.board_name, self._flying.payload
        assert self._job is not None
        try:
            status = self._job.poll(cast("Shell", self._flying.board.shell))
        except BoardError as error:
            return BoardError(
                f"there is no CFDP entity on board {name} any more: {error.message}",
                hint="the board is in the same boot: its console log says what killed it",
            )
        if status is None:
            return BoardError(
                f"the CFDP entity on board {name} runs, but nothing of it came in {self._silent_s:.0f} s of contact",
                hint=f"does the board let UDP port {cfdp.PORT} of {wire.address} through? `protocol: sftp` needs SSH",
            )
        _, said = self._job.output(cast("Shell", self._flying.board.shell))
        return BoardError(
            f"the CFDP entity on board {name} ended with status {status}: {said.strip()[-400:]}",
            hint="fly it again, or `protocol: sftp`",
        )


def _round_trip_s(flying: Flying) -> float:
    """Of the emulated link as the next contact's signal comes up."""
    up = steps.opening(flying, steps.next_contact(flying))
    return sum(state.delay_s for state in flying.timeline.link_at(up.start_s + 1e-3).values())
