"""SSH to a board: commands, port forwards and resumable uploads that never hang on a dead link.

Host keys are pinned, keys only. Every call has a time limit; when the link dies under one, the connection is torn down
and the call raises. `Upload` survives loss of signal and power cuts: it resumes where the board's file is proven good.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import re
import selectors
import shlex
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hil.drivers import broker as payload_broker
from hil.errors import BenchError, BoardError
from hil.model import Completed

if TYPE_CHECKING:
    import paramiko

_GRACE_S = 3.0  # what killing a command that ran out of time may take


class ShellLost(BoardError):
    """The connection to the board ended in mid-call. During an outage this is what is expected."""


class ShellTimeout(BoardError):
    """The board did not answer or finish within the call's time limit."""


# ---------------------------------------------------------------------------------------------------------------------
# Connecting


def dial(
    sock: socket.socket, *, host: str, port: int, user: str, key: Path, known_hosts: Path, timeout_s: float
) -> paramiko.SSHClient:
    """Speak SSH on a connected socket, with a pinned host key. The socket is closed when this fails.

    Raises BenchError when the bench's keys or pins are wrong, ShellLost or ShellTimeout when the far end is.
    """
    import paramiko

    # What goes wrong is raised; without a handler paramiko would also print it, with tracebacks.
    logger = logging.getLogger("paramiko")
    if not logger.handlers:
        logger.addHandler(logging.NullHandler())
    client = paramiko.SSHClient()
    name = host if port == 22 else f"[{host}]:{port}"
    trust = f"check the board, then pin its key: hil board trust (writes {known_hosts})"
    expired = threading.Event()

    def expire() -> None:
        expired.set()
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)

    # The limit for all steps together. paramiko has one for each: later, so that this one tells a time-out from a loss.
    watchdog = threading.Timer(timeout_s, expire)
    watchdog.daemon = True
    watchdog.start()
    try:
        client.load_host_keys(str(known_hosts))
        client.set_missing_host_key_policy(paramiko.RejectPolicy())
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        client.connect(
            host,
            port,
            user,
            sock=sock,
            key_filename=str(key),
            allow_agent=False,
            look_for_keys=False,
            timeout=timeout_s + 5,
            banner_timeout=timeout_s + 5,
            auth_timeout=timeout_s + 5,
        )
        return client
    except paramiko.BadHostKeyException as error:
        raise BenchError(f"{name} has another host key than the one pinned in {known_hosts}", hint=trust) from error
    except paramiko.AuthenticationException as error:
        if expired.is_set():
            raise ShellTimeout(f"SSH to {user}@{name}: no answer within {timeout_s:.1f} s") from error
        raise BenchError(
            f"{name} does not accept the key {key} for user {user}", hint="check `key` and `user`"
        ) from error
    except FileNotFoundError as error:
        raise BenchError(f"{error.filename}: no such file", hint=trust) from error
    except (paramiko.SSHException, OSError, EOFError) as error:
        if "not found in known_hosts" in str(error):
            raise BenchError(f"{name} has no pinned host key in {known_hosts}", hint=trust) from error
        if expired.is_set():
            raise ShellTimeout(f"SSH to {user}@{name}: no answer within {timeout_s:.1f} s") from error
        raise ShellLost(f"SSH to {user}@{name}: {error}") from error
    finally:
        watchdog.cancel()
        if client.get_transport() is None or not client.get_transport().is_authenticated():  # type: ignore[union-attr]
            client.close()
            sock.close()


# ---------------------------------------------------------------------------------------------------------------------
# The shell


class Shell:
    """One SSH connection to a board. Calls may come from several threads; each has its own channel.

    Remote commands are argument vectors, quoted for the far shell (POSIX `sh` or `bash` as login shell). `guard` is
    asked before each call and after one that failed: it raises what the owner of the board knows better, for example
    that its power was cut.
    """

    def __init__(
        self, client: paramiko.SSHClient, sock: socket.socket, name: str, guard: Callable[[], None] | None = None
    ) -> None:
        transport = client.get_transport()
        assert transport is not None
        self._client = client
        self._transport = transport
        self._sock = sock
        self._guard = guard or (lambda: None)
        self.name = name

    @classmethod
    def connect(
        cls,
        host: str,
        port: int,
        user: str,
        key: Path,
        known_hosts: Path,
        *,
        broker: Path | None = None,
        timeout_s: float = 20.0,
        sndbuf: int | None = None,
        guard: Callable[[], None] | None = None,
    ) -> Shell:
        """Connect within `timeout_s`; through the payload `broker` where one is given.

        `sndbuf`: bytes the kernel may hold before the wire takes them; keep it small (256 KiB) for uploads, else a cut
        loses what was "sent" but never left. Raises ShellTimeout or ShellLost (board), BenchError (keys, pins, broker).
        """
        deadline = time.monotonic() + timeout_s
        name = f"{user}@{host}:{port}"
        try:
            sock = payload_broker.connect(broker, host, port, timeout_s, sndbuf)
        except TimeoutError as error:
            raise ShellTimeout(f"SSH to {name}: no answer within {timeout_s:.1f} s") from error
        except OSError as error:
            raise ShellLost(f"SSH to {name}: {error.strerror or error}") from error
        left_s = max(0.1, deadline - time.monotonic())
        client = dial(sock, host=host, port=port, user=user, key=key, known_hosts=known_hosts, timeout_s=left_s)
        return cls(client, sock, name, guard)

    def __enter__(self) -> Shell:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def alive(self) -> bool:
        """False once the connection is known to be gone; a silent outage does not show here."""
        return self._transport.is_active()

    def run(self, argv: Sequence[str], timeout_s: float, check: bool = False) -> Completed:
        """Run a command to its end. `check`: a status other than 0 raises BoardError.

        Past `timeout_s` the remote process group is killed and ShellTimeout raised, 3 s later at most.
        """
        began = time.monotonic()
        with self.guarded():
            with self._deadline(timeout_s + _GRACE_S, shlex.join(argv)), self._exec(argv, timeout_s) as channel:
                channel.shutdown_write()
                out, err = self._collect(channel, argv, began + timeout_s)
            status = channel.recv_exit_status() if channel.exit_status_ready() else -1
            if status == -1:
                raise ShellLost(f"{self.name}: the connection ended during `{shlex.join(argv)}`")
        done = Completed(tuple(argv), _text(out), _text(err), status, time.monotonic() - began)
        if check and status != 0:
            tail = "\n  ".join((done.stderr or done.stdout).strip().splitlines()[-6:])
            raise BoardError(f"{self.name}: `{shlex.join(argv)}` ended with status {status}\n  {tail}")
        return done

    def start(self, argv: Sequence[str], timeout_s: float = 10.0) -> Process:
        """Start a command that runs while the connection lasts; returns once the board says its process id."""
        with self.guarded(), self._deadline(timeout_s, shlex.join(argv)):
            channel = self._open(argv, timeout_s)
            process = Process(self, channel, tuple(argv))
            process.wait_for_pid(time.monotonic() + timeout_s)
        return process

    def boot_id(self, timeout_s: float = 10.0) -> str:
        """The kernel's id of this boot: another one means that everything unsynced may be gone."""
        return self.run(["cat", "/proc/sys/kernel/random/boot_id"], timeout_s, check=True).stdout.strip()

    def forward(self, host: str, port: int, timeout_s: float = 10.0) -> paramiko.Channel:
        """A byte stream to `host`:`port` as seen from the board (`direct-tcpip`), for HTTP and the like.

        Socket-like: send, recv, settimeout, makefile, close. Its time-out is `timeout_s` until changed.
        """
        with self.guarded(), self._deadline(timeout_s, f"forward to {host}:{port}"):
            channel = self._transport.open_channel("direct-tcpip", (host, port), ("127.0.0.1", 0), timeout=timeout_s)
            channel.settimeout(timeout_s)
            return channel

    def subsystem(self, name: str, timeout_s: float = 10.0) -> paramiko.Channel:
        """A channel with an SSH subsystem such as `sftp` at its far end."""
        with self.guarded(), self._deadline(timeout_s, name):
            channel = self._transport.open_session(timeout=timeout_s)
            channel.invoke_subsystem(name)
            return channel

    def close(self) -> None:
        """Close the connection; never blocks for long, also when the link is dead."""
        with contextlib.suppress(OSError):
            self._sock.settimeout(0.1)
        self._client.close()

    def abort(self) -> None:
        """Drop the connection as a loss of signal does: with a reset, and with what was not sent yet thrown away."""
        with contextlib.suppress(OSError):
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._client.close()

    @contextlib.contextmanager
    def guarded(self) -> Iterator[None]:
        """Ask the guard before the body, and again when the board failed in it."""
        self._guard()
        try:
            yield
        except (ShellLost, ShellTimeout):
            self._guard()
            raise

    @contextlib.contextmanager
    def _deadline(self, timeout_s: float, doing: str) -> Iterator[None]:
        """Tear the connection down when the body takes longer, and translate what it then raises.

        Needed because paramiko has calls that wait for ever: for a channel's reply, and for room in the socket.
        """
        import paramiko

        expired = threading.Event()

        def expire() -> None:
            expired.set()
            self.abort()

        watchdog = threading.Timer(timeout_s, expire)
        watchdog.daemon = True
        watchdog.start()
        try:
            yield
        except (paramiko.SSHException, OSError, EOFError) as error:
            if expired.is_set() or isinstance(error, TimeoutError):
                raise ShellTimeout(f"{self.name}: no answer within {timeout_s:g} s: {doing}") from error
            raise ShellLost(f"{self.name}: {error or 'connection lost'}: {doing}") from error
        finally:
            watchdog.cancel()

    def _open(self, argv: Sequence[str], timeout_s: float) -> paramiko.Channel:
        """Start `argv` in the far login shell, which first says its process id on stderr and then becomes it."""
        if not argv:
            raise ValueError("argv is empty")
        channel = self._transport.open_session(timeout=timeout_s)
        channel.exec_command(f"printf 'hil:%s\\n' \"$$\" >&2; exec {shlex.join(argv)}")
        return channel

    @contextlib.contextmanager
    def _exec(self, argv: Sequence[str], timeout_s: float) -> Iterator[paramiko.Channel]:
        channel = self._open(argv, timeout_s)
        try:
            yield channel
        finally:
            channel.close()

    def _collect(self, channel: paramiko.Channel, argv: Sequence[str], deadline_s: float) -> tuple[bytes, bytes]:
        """Everything the command writes until it ends: stdout, stderr."""
        out, err = bytearray(), bytearray()
        with selectors.DefaultSelector() as selector:
            selector.register(channel, selectors.EVENT_READ)
            while True:
                while channel.recv_ready():
                    out += channel.recv(1 << 16)
                while channel.recv_stderr_ready():
                    err += channel.recv_stderr(1 << 16)
                left_s = deadline_s - time.monotonic()
                ended = channel.closed or channel.eof_received
                if ended and (channel.status_event.wait(max(left_s, 0)) or channel.closed):
                    if not (channel.recv_ready() or channel.recv_stderr_ready()):
                        break
                    continue
                if left_s <= 0:
                    pid, _ = _split_pid(bytes(err))
                    self._kill_group(pid)
                    raise ShellTimeout(f"{self.name}: `{shlex.join(argv)}` did not end in time and was killed")
                if not ended:
                    selector.select(left_s)
        return bytes(out), _split_pid(bytes(err))[1]

    def _kill_group(self, pid: int) -> None:
        """Kill a remote process and those it started; sshd makes each command a session of its own."""
        if pid <= 1 or not self.alive:
            return
        with contextlib.suppress(Exception):  # the link may be the reason; the caller reports the time-out
            channel = self._transport.open_session(timeout=_GRACE_S)
            channel.settimeout(_GRACE_S)
            channel.exec_command(f"kill -KILL -{pid} 2>/dev/null || kill -KILL {pid}")  # dash knows no `--`
            channel.status_event.wait(_GRACE_S)
            channel.close()


class Process:
    """A command running on the board for as long as its connection lasts."""

    def __init__(self, shell: Shell, channel: paramiko.Channel, argv: tuple[str, ...]) -> None:
        self._shell, self._channel, self.argv = shell, channel, argv
        self._began = time.monotonic()
        self._stderr = bytearray()
        self.pid = 0

    def wait_for_pid(self, deadline_s: float) -> None:
        """Read the process id that the far shell prints first."""
        while b"\n" not in self._stderr:
            self._channel.settimeout(max(0.01, deadline_s - time.monotonic()))
            data = self._channel.recv_stderr(4096)
            if not data:
                raise EOFError("the command ended before it started")
            self._stderr += data
        self.pid, rest = _split_pid(bytes(self._stderr))
        self._stderr = bytearray(rest)

    @property
    def running(self) -> bool:
        """False once its status is known or the connection is gone."""
        return not self._channel.exit_status_ready() and self._shell.alive

    def read(self, timeout_s: float) -> bytes:
        """Some bytes of its stdout; empty at its end. Raises ShellTimeout when nothing comes."""
        self._channel.settimeout(timeout_s)
        with self._shell.guarded():
            try:
                return self._channel.recv(1 << 16)
            except TimeoutError as error:
                raise ShellTimeout(
                    f"{self._shell.name}: `{shlex.join(self.argv)}` printed nothing for {timeout_s:g} s"
                ) from error

    def write(self, data: bytes, timeout_s: float) -> None:
        """Write all of `data` to its stdin."""
        with self._shell.guarded(), self._shell._deadline(timeout_s, shlex.join(self.argv)):
            self._channel.sendall(data)

    def wait(self, timeout_s: float) -> Completed:
        """Its remaining output and status; past `timeout_s` it is killed and ShellTimeout raised."""
        with self._shell.guarded(), self._shell._deadline(timeout_s + _GRACE_S, shlex.join(self.argv)):
            deadline = time.monotonic() + timeout_s
            try:
                out, err = self._shell._collect(self._channel, self.argv, deadline)
            except ShellTimeout:
                self.kill()
                raise
        status = self._channel.recv_exit_status() if self._channel.exit_status_ready() else -1
        duration_s = time.monotonic() - self._began
        return Completed(self.argv, _text(out), _text(bytes(self._stderr) + err), status, duration_s)

    def kill(self) -> None:
        """Kill it and what it started."""
        self._shell._kill_group(self.pid)
        self._channel.close()


def _split_pid(stderr: bytes) -> tuple[int, bytes]:
    """The process id that `_open` made the far shell print, and the rest of stderr."""
    match = re.match(rb"hil:(\d+)\n", stderr)
    return (int(match[1]), stderr[match.end() :]) if match else (0, stderr)


def _text(data: bytes) -> str:
    return data.decode("utf-8", errors="replace")


# ---------------------------------------------------------------------------------------------------------------------
# SFTP, as much as an upload needs (draft-ietf-secsh-filexfer-02)


class SftpError(BoardError):
    """The board's SFTP server refused: no space, no permission, a wrong path."""


_INIT, _VERSION, _OPEN, _CLOSE, _WRITE, _FSTAT, _FSETSTAT = 1, 2, 3, 4, 6, 8, 10
_STATUS, _HANDLE, _ATTRS, _EXTENDED = 101, 102, 105, 200
_FSYNC = b"fsync@openssh.com"  # OpenSSH's PROTOCOL file, section 4.4
_PF_WRITE, _PF_CREAT, _ATTR_SIZE = 2, 8, 1


def sftp_packet(kind: int, *fields: int | bytes | tuple[int]) -> bytes:
    """One SFTP packet: an int is a uint32, bytes a string, a 1-tuple of int a uint64."""
    body = bytearray([kind])
    for item in fields:
        if isinstance(item, int):
            body += struct.pack(">I", item)
        elif isinstance(item, tuple):
            body += struct.pack(">Q", item[0])
        else:
            body += struct.pack(">I", len(item)) + item
    return struct.pack(">I", len(body)) + bytes(body)


class SftpDecoder:
    """Cuts a byte stream into (type, request id, rest of the packet)."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[tuple[int, int, bytes]]:
        """Add bytes and yield every packet that is whole."""
        self._buffer += data
        while len(self._buffer) >= 4:
            (length,) = struct.unpack_from(">I", self._buffer)
            if not 5 <= length <= 1 << 20:
                raise EOFError(f"not an SFTP stream (packet of {length} bytes)")
            if len(self._buffer) < 4 + length:
                return
            kind, number = struct.unpack_from(">BI", self._buffer, 4)
            body = bytes(self._buffer[9 : 4 + length])
            del self._buffer[: 4 + length]
            yield kind, number, body


class _RemoteFile:
    """A file on the board, open for writing, with its requests counted in and out."""

    def __init__(self, channel: paramiko.Channel, path: str, timeout_s: float) -> None:
        self._channel, self._path, self._timeout_s = channel, path, timeout_s
        self._decoder, self._ready = SftpDecoder(), deque[tuple[int, int, bytes]]()
        self._next = 1
        channel.settimeout(timeout_s)
        channel.sendall(sftp_packet(_INIT, 3))
        kind, _, extensions = self._receive()
        if kind != _VERSION:
            raise EOFError("the far end does not speak SFTP")
        self.can_sync = _FSYNC in extensions
        self._handle = self._string(self._ask(_HANDLE, _OPEN, path.encode(), _PF_WRITE | _PF_CREAT, 0))

    def size(self) -> int:
        body = self._ask(_ATTRS, _FSTAT, self._handle)
        flags, size = struct.unpack_from(">IQ", body)
        if not flags & _ATTR_SIZE:
            raise SftpError(f"{self._path}: the server does not tell the file's size")
        return int(size)

    def truncate(self, size: int) -> None:
        self._ask(_STATUS, _FSETSTAT, self._handle, _ATTR_SIZE, (size,))

    def close(self) -> None:
        self._ask(_STATUS, _CLOSE, self._handle)

    def write(self, offset: int, data: bytes) -> int:
        """Send one write request without waiting; returns its number."""
        number = self._next
        self._next += 1
        self._channel.sendall(sftp_packet(_WRITE, number, self._handle, (offset,), data))
        return number

    def sync(self) -> int:
        """Send one request to put on disk what was written, without waiting; returns its number."""
        number = self._next
        self._next += 1
        self._channel.sendall(sftp_packet(_EXTENDED, number, _FSYNC, self._handle))
        return number

    def acknowledged(self, wait_s: float) -> list[int]:
        """Numbers of the writes and syncs that the server has confirmed since, waiting for one at most `wait_s`."""
        if not self._ready and (wait_s > 0 or self._channel.recv_ready()):
            self._channel.settimeout(max(wait_s, 0.001))
            try:
                self._fill()
            except TimeoutError:
                return []
            finally:
                self._channel.settimeout(self._timeout_s)
        numbers = []
        while self._ready:
            kind, number, body = self._ready.popleft()
            self._check(_STATUS, kind, body)
            numbers.append(number)
        return numbers

    def _ask(self, expected: int, kind: int, *fields: int | bytes | tuple[int]) -> bytes:
        number = self._next
        self._next += 1
        self._channel.sendall(sftp_packet(kind, number, *fields))
        kind, got, body = self._receive()
        if got != number:
            raise EOFError(f"SFTP answer {got} to request {number}")
        self._check(expected, kind, body)
        return body

    def _receive(self) -> tuple[int, int, bytes]:
        while not self._ready:
            self._fill()
        return self._ready.popleft()

    def _fill(self) -> None:
        data = self._channel.recv(1 << 16)
        if not data:
            raise EOFError("connection lost")
        self._ready.extend(self._decoder.feed(data))

    def _check(self, expected: int, kind: int, body: bytes) -> None:
        if kind == _STATUS:
            (code,) = struct.unpack_from(">I", body)
            if code != 0 or expected != _STATUS:
                raise SftpError(f"{self._path}: {self._string(body[4:]).decode(errors='replace')} (SFTP status {code})")
        elif kind != expected:
            raise EOFError(f"SFTP answer of type {kind}")

    @staticmethod
    def _string(body: bytes) -> bytes:
        (length,) = struct.unpack_from(">I", body)
        return body[4 : 4 + length]


# ---------------------------------------------------------------------------------------------------------------------
# Uploads


@dataclass(frozen=True, slots=True)
class Attempt:
    """What one contact achieved. `offset` is the board's acknowledged size; bytes are payload, without protocol.

    `resent_bytes`: what this contact sent again because an earlier one was cut before the board confirmed it.
    """

    start_offset: int
    offset: int
    sent_bytes: int
    resent_bytes: int
    duration_s: float
    complete: bool


class Upload:
    """One file on its way to a board, over as many connections as it takes. Not for use by two threads at once.

    It writes `<target>.part` in order with at most `window_bytes` unconfirmed, so a cut costs at most that much again.
    Within one boot the file's size tells how far it got. After a reboot, or in a new process, nothing is believed: the
    board hashes what it has (`PYTHON ONBOARD chunk-hash FILE OFFSET LENGTH`) and the upload resumes after the last
    `chunk_bytes` chunk that is right.
    """

    def __init__(
        self,
        source: Path,
        target: str,
        *,
        onboard: str = "/opt/hil/onboard.py",
        python: str = "python3",
        chunk_bytes: int = 1 << 20,
        window_bytes: int = 512 << 10,
        write_bytes: int = 32000,  # with its header it fits one 32 KiB channel packet
        sync_bytes: int = 4 << 20,  # a power cut costs about this much, where the server can sync
    ) -> None:
        self.source, self.target, self.part = source, target, f"{target}.part"
        self.total = source.stat().st_size
        self.attempts: list[Attempt] = []
        self.high_water = 0
        self._onboard, self._chunk = (python, onboard), chunk_bytes
        self._window, self._write, self._sync = window_bytes, write_bytes, sync_bytes
        self._boot_id = ""
        self._sha256 = ""

    @property
    def sha256(self) -> str:
        """Hex digest of the source file (read once)."""
        if not self._sha256:
            with self.source.open("rb") as stream:
                self._sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
        return self._sha256

    @property
    def complete(self) -> bool:
        """True when the board has confirmed every byte; not yet verified nor activated."""
        return bool(self.attempts) and self.attempts[-1].complete

    def run(
        self,
        shell: Shell,
        *,
        stall_s: float,
        stop: threading.Event | None = None,
        on_progress: Callable[[int], None] | None = None,
    ) -> Attempt:
        """Upload over `shell` until done or `stop` is set (loss of signal); returns what was achieved.

        `on_progress(offset)` gets the confirmed size. No confirmation for `stall_s`, or a lost connection: the shell is
        aborted and ShellTimeout or ShellLost raised; the attempt is in `attempts` all the same. On `stop` the shell is
        aborted only if a call hangs. SftpError when the board refuses.
        """
        stop = stop or threading.Event()
        progress = _Progress(time.monotonic())
        boot_id = shell.boot_id(stall_s)
        with shell.guarded(), self._sftp(shell, stall_s) as channel:
            with shell._deadline(stall_s, f"opening {self.part}"):
                remote = _RemoteFile(channel, self.part, stall_s)
                size = remote.size()
            start = self._verified(shell, boot_id, size, stall_s)
            if size > start:
                with shell._deadline(stall_s, f"truncating {self.part}"):
                    remote.truncate(start)
            self._boot_id = boot_id
            progress.offset = progress.sent_to = start
            with self._guard(shell, progress, stop, stall_s):
                try:
                    self._stream(remote, progress, stop, on_progress)
                    if progress.offset == self.total:
                        remote.close()
                except SftpError:
                    self._boot_id = ""  # writes behind the refused one may have landed: its size proves nothing now
                    raise
                finally:
                    self._record(start, progress)
        return self.attempts[-1]

    def activate(self, shell: Shell, timeout_s: float) -> None:
        """Have the board check the whole file's SHA-256 and only then put it in place, durably."""
        argv = [*self._onboard, "activate", self.part, self.target, self.sha256]
        shell.run(argv, timeout_s, check=True)

    @contextlib.contextmanager
    def _sftp(self, shell: Shell, timeout_s: float) -> Iterator[paramiko.Channel]:
        channel = shell.subsystem("sftp", timeout_s)
        try:
            yield channel
        finally:
            # Saying goodbye blocks when the link died with the socket's buffer full.
            with contextlib.suppress(BoardError), shell._deadline(1.0, "closing sftp"):
                channel.close()

    def _stream(
        self, remote: _RemoteFile, progress: _Progress, stop: threading.Event, on_progress: Callable[[int], None] | None
    ) -> None:
        pending: dict[int, int] = {}  # request -> offset after it; the server answers in order
        with self.source.open("rb") as source:
            source.seek(progress.offset)
            unsynced = 0
            while progress.offset < self.total and not stop.is_set():
                while progress.sent_to < self.total and progress.sent_to - progress.offset < self._window:
                    data = source.read(min(self._write, self.total - progress.sent_to))
                    # Counted before it is handed over: a cut inside `write` leaves unknown how much left.
                    at, progress.sent_to = progress.sent_to, progress.sent_to + len(data)
                    pending[remote.write(at, data)] = progress.sent_to
                    unsynced += len(data)
                    if unsynced >= self._sync and remote.can_sync:
                        pending[remote.sync()], unsynced = progress.sent_to, 0
                    if stop.is_set():
                        return
                    self._confirm(remote, 0.0, pending, progress, on_progress)
                self._confirm(remote, 0.2, pending, progress, on_progress)

    def _confirm(
        self,
        remote: _RemoteFile,
        wait_s: float,
        pending: dict[int, int],
        progress: _Progress,
        on_progress: Callable[[int], None] | None,
    ) -> None:
        for number in remote.acknowledged(wait_s):
            progress.offset = pending.pop(number)
            progress.moved_s = time.monotonic()
            if on_progress:
                on_progress(progress.offset)

    def _verified(self, shell: Shell, boot_id: str, size: int, timeout_s: float) -> int:
        """How many leading bytes of the board's file are known to be right."""
        size = min(size, self.total)
        if boot_id == self._boot_id or size == 0:
            return size

        def good(length: int) -> bool:
            argv = [*self._onboard, "chunk-hash", self.part, "0", str(length)]
            # Hashing is quick beside the link, but an emulated board reads its disk slowly.
            printed = shell.run(argv, timeout_s + length / 5e6, check=True).stdout
            return self._prefix_sha256(length) in printed

        if good(size):
            return size
        low, high = 0, (size - 1) // self._chunk  # chunks known good; chunks that may be
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if good(middle * self._chunk) else (low, middle - 1)
        return low * self._chunk

    def _prefix_sha256(self, length: int) -> str:
        digest = hashlib.sha256()
        with self.source.open("rb") as stream:
            while length > 0 and (data := stream.read(min(length, 1 << 20))):
                digest.update(data)
                length -= len(data)
        return digest.hexdigest()

    def _record(self, start: int, progress: _Progress) -> None:
        resent = max(0, min(self.high_water, progress.sent_to) - start)
        self.high_water = max(self.high_water, progress.sent_to)
        duration_s = time.monotonic() - progress.began_s
        complete = progress.offset == self.total
        self.attempts.append(Attempt(start, progress.offset, progress.sent_to - start, resent, duration_s, complete))

    @contextlib.contextmanager
    def _guard(self, shell: Shell, progress: _Progress, stop: threading.Event, stall_s: float) -> Iterator[None]:
        """Abort the connection when nothing is confirmed for `stall_s`, or when `stop` finds the upload stuck."""
        import paramiko

        done, stalled = threading.Event(), threading.Event()

        def watch() -> None:
            while not done.wait(0.1):
                if stop.is_set() and not done.wait(0.5):
                    shell.abort()
                    return
                if time.monotonic() - progress.moved_s > stall_s:
                    stalled.set()
                    shell.abort()
                    return

        watcher = threading.Thread(target=watch, daemon=True)
        progress.moved_s = time.monotonic()
        watcher.start()
        try:
            yield
        except (paramiko.SSHException, OSError, EOFError) as error:
            if stop.is_set():
                return
            where = f"{shell.name}: upload of {self.source.name} at {progress.offset} of {self.total} bytes"
            if stalled.is_set() or isinstance(error, TimeoutError):
                shell.abort()
                raise ShellTimeout(f"{where}: nothing confirmed for {stall_s:g} s") from error
            raise ShellLost(f"{where}: {error or 'connection lost'}") from error
        finally:
            done.set()
            watcher.join()


@dataclass(slots=True)
class _Progress:
    """Where one attempt stands; written by the uploading thread, read by its watcher."""

    began_s: float
    moved_s: float = 0.0
    offset: int = 0
    sent_to: int = 0
