"""Commands and forwarded streams over one SSH connection."""

from __future__ import annotations

import contextlib
import re
import selectors
import shlex
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from hil.drivers.ssh.connection import Login, Opener, ShellLost, ShellTimeout, reach
from hil.drivers.ssh.watchdog import Watchdog
from hil.drivers.ssh.worker import Worker
from hil.errors import BoardError
from hil.model import Completed

if TYPE_CHECKING:
    import paramiko

_GRACE_S = 3.0  # what killing a command that ran out of time may take

Stream = Literal["stdout", "stderr"]
Sink = Callable[[Stream, bytes], None]
_TOTAL_RETRANS = 100  # where `tcpi_total_retrans` lies in struct tcp_info, linux/tcp.h


class Shell:
    """One SSH connection to a board. Calls may come from several threads; each has its own channel.

    Remote commands are argument vectors, quoted for the far shell (POSIX `sh` or `bash` as login shell). `guard` is
    asked before each call and after one that failed: it raises what the owner of the board knows better, for example
    that its power was cut. `hops` are the connections to jump hosts that this one runs through.
    """

    def __init__(
        self,
        client: paramiko.SSHClient,
        sock: socket.socket,
        name: str,
        guard: Callable[[], None] | None = None,
        hops: Sequence[paramiko.SSHClient] = (),
        python: str | None = "python3",
    ) -> None:
        transport = client.get_transport()
        assert transport is not None
        self._clients = (client, *reversed(hops))
        self._transport = transport
        self._sock = sock
        self._retransmissions = 0
        self._guard = guard or (lambda: None)
        self._watchdog = Watchdog()
        self._worker = Worker(self._command, python)
        self._signals = _note_signals(transport)
        self.name = name

    @classmethod
    def connect(
        cls,
        host: str,
        port: int,
        user: str,
        key: Path | None,
        known_hosts: Path,
        *,
        jump: Sequence[Login] = (),
        broker: Path | None = None,
        timeout_s: float = 20.0,
        sndbuf: int | None = None,
        guard: Callable[[], None] | None = None,
        python: str | None = "python3",
        opener: Opener | None = None,
    ) -> Shell:
        """Connect within `timeout_s`; through the payload `broker` and over `jump` hosts, in order, where given.

        `opener` gives the socket to the first of these machines where it cannot be dialled from here. `key` None: the
        SSH agent's keys. `sndbuf`: bytes the kernel may hold before the wire takes them; keep it small (256 KiB) for
        uploads, else a cut loses what was "sent" but never left. `python`: the board's interpreter for the helper that
        makes many short commands quick (see `worker`); None sends none. Raises ShellTimeout or ShellLost (board),
        BenchError (keys, pins, broker, jump hosts).
        """
        login = Login(host, port, user, key, known_hosts)
        client, sock, hops = reach(login, jump, broker=broker, timeout_s=timeout_s, sndbuf=sndbuf, opener=opener)
        return cls(client, sock, f"{user}@{host}:{port}", guard, hops, python)

    def __enter__(self) -> Shell:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def alive(self) -> bool:
        """False once the connection is known to be gone; a silent outage does not show here."""
        return self._transport.is_active()

    def run(
        self, argv: Sequence[str], timeout_s: float, check: bool = False, on_output: Sink | None = None
    ) -> Completed:
        """Run a command to its end. `check`: a status other than 0 raises BoardError.

        `on_output("stdout" or "stderr", data)` gets the bytes as they come. Past `timeout_s` the remote process group
        is killed and ShellTimeout raised, 3 s later at most. `returncode` is negative when a signal ended it. Ends
        when the command and all that inherited its output have: a server to be left behind needs `start` or `Detached`.
        """
        if not argv:
            raise ValueError("argv is empty")
        began = time.monotonic()
        output: dict[Stream, bytearray] = {"stdout": bytearray(), "stderr": bytearray()}

        def sink(stream: Stream, data: bytes) -> None:
            output[stream] += data
            if on_output is not None and data:
                on_output(stream, data)

        with self.guarded(), self.limited(timeout_s + _GRACE_S, lambda: shlex.join(argv)):
            if self._worker.claim(timeout_s):
                try:
                    status = self._run_by_worker(argv, began + timeout_s, sink)
                finally:
                    self._worker.release()
            else:
                with self._exec(argv, timeout_s) as channel:
                    self._collect(channel, argv, began + timeout_s, sink)
                    status = self._status(channel, argv)
        done = Completed(
            tuple(argv), _text(output["stdout"]), _text(output["stderr"]), status, time.monotonic() - began
        )
        if check and status != 0:
            tail = "\n  ".join((done.stderr or done.stdout).strip().splitlines()[-6:])
            raise BoardError(f"{self.name}: `{shlex.join(argv)}` ended with status {status}\n  {tail}")
        return done

    def start(self, argv: Sequence[str], timeout_s: float = 10.0) -> Process:
        """Start a command that runs while the connection lasts; returns once the board says its process id."""
        with self.guarded(), self.limited(timeout_s, lambda: shlex.join(argv)):
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
        with self.guarded(), self.limited(timeout_s, lambda: f"forward to {host}:{port}"):
            channel = self._transport.open_channel("direct-tcpip", (host, port), ("127.0.0.1", 0), timeout=timeout_s)
            channel.settimeout(timeout_s)
            return channel

    def subsystem(self, name: str, timeout_s: float = 10.0) -> paramiko.Channel:
        """A channel with an SSH subsystem such as `sftp` at its far end."""
        with self.guarded(), self.limited(timeout_s, lambda: name):
            channel = self._transport.open_session(timeout=timeout_s)
            channel.invoke_subsystem(name)
            return channel

    def close(self) -> None:
        """Close the connection; never blocks for long, also when the link is dead."""
        with contextlib.suppress(OSError):
            self._sock.settimeout(0.1)
        for client in self._clients:
            client.close()

    def abort(self) -> None:
        """Drop the connection as a loss of signal does: with a reset, and with what was not sent yet thrown away."""
        self.retransmissions()  # the kernel forgets it with the socket
        with contextlib.suppress(OSError):
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        for client in reversed(self._clients):  # the one on the wire first: the others would wait for it
            client.close()

    def retransmissions(self) -> int:
        """TCP segments that this end has sent again so far, by the kernel's count; the last known of a closed one."""
        with contextlib.suppress(OSError):
            told = self._sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TOTAL_RETRANS + 4)
            self._retransmissions = int.from_bytes(told[_TOTAL_RETRANS:], sys.byteorder)
        return self._retransmissions

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
    def limited(self, timeout_s: float, doing: Callable[[], str]) -> Iterator[None]:
        """Tear the connection down when the body takes longer, and translate what it then raises.

        Needed because paramiko has calls that wait for ever: for a channel's reply, and for room in the socket.
        """
        import paramiko

        expired = threading.Event()

        def expire() -> None:
            expired.set()
            self.abort()

        try:
            with self._watchdog.limit(timeout_s, expire):
                yield
        except (paramiko.SSHException, OSError, EOFError) as error:
            # The last one is all that tells paramiko's own time limit of opening a channel from a refusal.
            if expired.is_set() or isinstance(error, TimeoutError) or str(error).startswith("Timeout"):
                raise ShellTimeout(f"{self.name}: no answer within {timeout_s:g} s: {doing()}") from error
            raise ShellLost(f"{self.name}: {error or 'connection lost'}: {doing()}") from error

    def kill_group(self, pid: int) -> None:
        """Kill a remote process and those it started; sshd makes each command a session of its own."""
        if pid <= 1 or not self.alive:
            return
        with contextlib.suppress(Exception):  # the link may be the reason; the caller reports the time-out
            channel = self._command(f"kill -KILL -{pid} 2>/dev/null || kill -KILL {pid}", _GRACE_S)  # dash knows no --
            channel.status_event.wait(_GRACE_S)
            channel.close()

    def _run_by_worker(self, argv: Sequence[str], deadline_s: float, sink: Sink) -> int:
        try:
            return self._worker.run(argv, deadline_s, sink)  # type: ignore[arg-type]
        except TimeoutError:
            self.kill_group(self._worker.pid)
            raise ShellTimeout(f"{self.name}: `{shlex.join(argv)}` did not end in time and was killed") from None

    def _command(self, line: str, timeout_s: float) -> paramiko.Channel:
        channel = self._transport.open_session(timeout=timeout_s)
        channel.settimeout(timeout_s)
        channel.exec_command(line)
        return channel

    def _open(self, argv: Sequence[str], timeout_s: float, stdin: str = "") -> paramiko.Channel:
        """Start `argv` in the far login shell, which first says its process id on stderr and then becomes it."""
        if not argv:
            raise ValueError("argv is empty")
        return self._command(f"printf 'hil:%s\\n' \"$$\" >&2; exec {shlex.join(argv)}{stdin}", timeout_s)

    @contextlib.contextmanager
    def _exec(self, argv: Sequence[str], timeout_s: float) -> Iterator[paramiko.Channel]:
        # Not `shutdown_write`: when the command ends just then, paramiko sends that end of its input behind the end of
        # the channel, and OpenSSH drops the whole connection for it.
        channel = self._open(argv, timeout_s, " </dev/null")
        try:
            yield channel
        finally:
            channel.close()

    def _collect(self, channel: paramiko.Channel, argv: Sequence[str], deadline_s: float, sink: Sink) -> None:
        """Hand everything that the command writes until it ends to `sink`."""
        head: bytearray | None = bytearray()  # of stderr, until the line with the process id is whole
        pid = 0
        with selectors.DefaultSelector() as selector:
            selector.register(channel, selectors.EVENT_READ)
            while True:
                while channel.recv_ready():
                    sink("stdout", channel.recv(1 << 16))
                while channel.recv_stderr_ready():
                    data = channel.recv_stderr(1 << 16)
                    if head is not None:
                        head += data
                        if b"\n" not in head:
                            continue
                        (pid, data), head = split_pid(bytes(head)), None
                    sink("stderr", data)
                left_s = deadline_s - time.monotonic()
                ended = channel.closed or channel.eof_received
                if ended and (channel.status_event.wait(max(left_s, 0)) or channel.closed):
                    if not (channel.recv_ready() or channel.recv_stderr_ready()):
                        break
                    continue
                if left_s <= 0:
                    self.kill_group(pid)
                    raise ShellTimeout(f"{self.name}: `{shlex.join(argv)}` did not end in time and was killed")
                if not ended:
                    selector.select(left_s)
        if head:
            sink("stderr", bytes(head))

    def _status(self, channel: paramiko.Channel, argv: Sequence[str]) -> int:
        if channel.get_id() in self._signals:
            return -self._signals.pop(channel.get_id())
        status = channel.recv_exit_status() if channel.exit_status_ready() else -1
        if status == -1:
            raise ShellLost(f"{self.name}: the connection ended during `{shlex.join(argv)}`")
        return status


class Process:
    """A command running on the board for as long as its connection lasts."""

    def __init__(self, shell: Shell, channel: paramiko.Channel, argv: tuple[str, ...]) -> None:
        self._shell, self._channel, self.argv = shell, channel, argv
        self._began = time.monotonic()
        self._output: dict[Stream, bytearray] = {"stdout": bytearray(), "stderr": bytearray()}
        self.pid = 0

    def wait_for_pid(self, deadline_s: float) -> None:
        """Read the process id that the far shell prints first."""
        head = b""
        while b"\n" not in head:
            self._channel.settimeout(max(0.01, deadline_s - time.monotonic()))
            data = self._channel.recv_stderr(4096)
            if not data:
                raise EOFError("the command ended before it started")
            head += data
        self.pid, rest = split_pid(head)
        self._output["stderr"] += rest

    @property
    def running(self) -> bool:
        """False once its status is known or the connection is gone."""
        return not self._channel.exit_status_ready() and self._shell.alive

    def poll(self) -> int | None:
        """Its status if it has ended (negative: by a signal), else None. Raises ShellLost when nobody can know."""
        if self.running:
            return None
        return self._shell._status(self._channel, self.argv)

    def output(self) -> tuple[str, str]:
        """stdout and stderr so far, without waiting and without what `read` took."""
        while self._channel.recv_ready():
            self._output["stdout"] += self._channel.recv(1 << 16)
        while self._channel.recv_stderr_ready():
            self._output["stderr"] += self._channel.recv_stderr(1 << 16)
        return _text(self._output["stdout"]), _text(self._output["stderr"])

    def read(self, timeout_s: float) -> bytes:
        """Some bytes of its stdout; empty at its end. Raises ShellTimeout when nothing comes."""
        if kept := bytes(self._output["stdout"]):
            self._output["stdout"].clear()
            return kept
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
        with self._shell.guarded(), self._shell.limited(timeout_s, lambda: shlex.join(self.argv)):
            self._channel.settimeout(timeout_s)
            self._channel.sendall(data)

    def close_stdin(self) -> None:
        """Tell it that no more comes on its stdin."""
        self._channel.shutdown_write()

    def wait(self, timeout_s: float) -> Completed:
        """Its remaining output and status; past `timeout_s` it is killed and ShellTimeout raised."""

        def sink(stream: Stream, data: bytes) -> None:
            self._output[stream] += data

        with self._shell.guarded(), self._shell.limited(timeout_s + _GRACE_S, lambda: shlex.join(self.argv)):
            try:
                self._shell._collect(self._channel, self.argv, time.monotonic() + timeout_s, sink)
            except ShellTimeout:
                self.kill()
                raise
            status = self._shell._status(self._channel, self.argv)
        out, err = _text(self._output["stdout"]), _text(self._output["stderr"])
        return Completed(self.argv, out, err, status, time.monotonic() - self._began)

    def kill(self) -> None:
        """Kill it and what it started."""
        self._shell.kill_group(self.pid)
        self._channel.close()


def split_pid(stderr: bytes) -> tuple[int, bytes]:
    """The process id that `Shell` makes the far shell print first, and the rest of stderr."""
    match = re.match(rb"hil:(\d+)\n", stderr)
    return (int(match[1]), stderr[match.end() :]) if match else (0, stderr)


def _note_signals(transport: paramiko.Transport) -> dict[int, int]:
    """Channel -> number of the signal that ended its command, filled as the server tells: paramiko passes it over."""
    from paramiko import Message
    from paramiko.common import MSG_CHANNEL_REQUEST

    noted: dict[int, int] = {}
    table = dict(getattr(transport, "_channel_handler_table", {}))
    original = table.get(MSG_CHANNEL_REQUEST)
    if original is None:
        return noted  # then such an end counts as a lost connection

    def handle(channel: paramiko.Channel, message: Message) -> None:
        peek = Message(message.get_remainder())
        if peek.get_text() == "exit-signal":
            peek.get_boolean()
            number = getattr(signal, f"SIG{peek.get_text()}", signal.SIGKILL)
            noted[channel.get_id()] = int(number)
            channel.status_event.set()
        original(channel, message)

    table[MSG_CHANNEL_REQUEST] = handle
    transport._channel_handler_table = table  # type: ignore[attr-defined]
    return noted


def _text(data: bytes | bytearray) -> str:
    return data.decode("utf-8", errors="replace")
