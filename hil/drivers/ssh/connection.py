"""Connecting: pinned host keys, key files or an agent, jump hosts; and the first contact that pins a key."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hil.drivers import broker as payload_broker
from hil.errors import BenchError, BoardError, UsageError

if TYPE_CHECKING:
    import paramiko

# Counter mode with a MAC apart, paramiko's first choice, costs half as much again as AES-GCM.
_CIPHERS = ("aes128-gcm@openssh.com", "aes256-gcm@openssh.com")
# What the board may send before it must wait for us: 8 MiB fill 200 Mbit/s at a round trip of 300 ms.
_WINDOW_BYTES = 8 << 20
_PACKET_BYTES = 1 << 17
# Gives a connected socket within so many seconds, to a machine that cannot be dialled from here.
Opener = Callable[[float], socket.socket]
_REJECTED = "check the board, then pin its key: hil board trust (writes {})"


class ShellLost(BoardError):
    """The connection to the board ended in mid-call. During an outage this is what is expected."""


class ShellTimeout(BoardError):
    """The board did not answer or finish within the call's time limit."""


@dataclass(frozen=True, slots=True)
class Login:
    """Where and as whom to log in. `key` None: the keys of the SSH agent (`SSH_AUTH_SOCK`)."""

    host: str
    port: int
    user: str
    key: Path | None
    known_hosts: Path

    @property
    def name(self) -> str:
        return f"{self.user}@{host_name(self.host, self.port)}"


@dataclass(frozen=True, slots=True)
class HostKey:
    """A server's public key: its algorithm and the key itself, base64 as in known_hosts."""

    kind: str
    base64: str

    @property
    def fingerprint(self) -> str:
        """SHA-256 as OpenSSH prints it, to be compared with the board's own `ssh-keygen -lf`."""
        digest = hashlib.sha256(base64.b64decode(self.base64)).digest()
        return "SHA256:" + base64.b64encode(digest).decode().rstrip("=")


def host_name(host: str, port: int) -> str:
    """A host as known_hosts names it."""
    return host if port == 22 else f"[{host}]:{port}"


# ---------------------------------------------------------------------------------------------------------------------
# Logging in


def dial(
    sock: socket.socket | paramiko.Channel,
    *,
    host: str,
    port: int,
    user: str,
    key: Path | None,
    known_hosts: Path,
    timeout_s: float,
) -> paramiko.SSHClient:
    """Speak SSH on a connected socket or a forwarded channel. The socket is closed when this fails.

    Raises BenchError when the bench's keys or pins are wrong, ShellLost or ShellTimeout when the far end is.
    """
    import paramiko

    _silence(paramiko.__name__)
    client = paramiko.SSHClient()
    name = host_name(host, port)
    trust = _REJECTED.format(known_hosts)
    try:
        with _limit(sock, timeout_s) as expired:
            if key is None and not os.environ.get("SSH_AUTH_SOCK"):
                raise BenchError("no key file is given and no SSH agent runs", hint="`key:`, or ssh-agent and ssh-add")
            if isinstance(sock, socket.socket) and sock.family != socket.AF_UNIX:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            client.load_host_keys(str(known_hosts))
            client.set_missing_host_key_policy(paramiko.RejectPolicy())
            client.connect(
                host,
                port,
                user,
                sock=sock,
                key_filename=None if key is None else str(key),
                allow_agent=key is None,
                look_for_keys=False,
                # Later than our own limit, which alone tells a time-out from a loss.
                timeout=timeout_s + 5,
                banner_timeout=timeout_s + 5,
                auth_timeout=timeout_s + 5,
                transport_factory=_transport,
            )
        return client
    except paramiko.BadHostKeyException as error:
        raise BenchError(f"{name} has another host key than the one pinned in {known_hosts}", hint=trust) from error
    except FileNotFoundError as error:
        raise BenchError(f"{error.filename}: no such file", hint=trust) from error
    except (paramiko.SSHException, OSError, EOFError) as error:
        if "not found in known_hosts" in str(error):
            raise BenchError(f"{name} has no pinned host key in {known_hosts}", hint=trust) from error
        if expired.is_set():
            raise ShellTimeout(f"SSH to {user}@{name}: no answer within {timeout_s:.1f} s") from error
        # The latter is how paramiko says that the agent holds no key at all.
        if isinstance(error, paramiko.AuthenticationException) or "No authentication methods" in str(error):
            offered = "any key of the SSH agent" if key is None else f"the key {key}"
            raise BenchError(f"{name} does not accept {offered} for {user}", hint="check `key` and `user`") from error
        raise ShellLost(f"SSH to {user}@{name}: {error or 'connection lost'}") from error
    finally:
        transport = client.get_transport()
        if transport is None or not transport.is_authenticated():
            client.close()
            sock.close()


def reach(
    login: Login,
    jump: Sequence[Login],
    *,
    broker: Path | None,
    timeout_s: float,
    sndbuf: int | None,
    opener: Opener | None = None,
) -> tuple[paramiko.SSHClient, socket.socket, list[paramiko.SSHClient]]:
    """A logged-in client, the real socket beneath it, and the clients of the jump hosts on the way, first one first.

    The first hop is reached through `broker` where one is given, or by the `opener` that has a way there. Raises as
    `dial` does; a jump host that fails is the bench's fault (BenchError), the board behind it is not reached then.
    """
    deadline = time.monotonic() + timeout_s
    hops = [*jump, login]
    clients: list[paramiko.SSHClient] = []
    with contextlib.ExitStack() as undo:
        try:
            sock = _connect(hops[0], broker, timeout_s, sndbuf, opener)
            undo.callback(sock.close)
            wire: socket.socket | paramiko.Channel = sock
            for hop, following in zip(hops, [*hops[1:], None], strict=True):
                left_s = max(0.1, deadline - time.monotonic())
                clients.append(_log_in(wire, hop, left_s))
                undo.callback(clients[-1].close)
                if following is not None:
                    wire = _through(clients[-1], hop, following, max(0.1, deadline - time.monotonic()))
        except BoardError as error:
            if len(clients) < len(jump):
                raise BenchError(f"jump host: {error.message}", hint=error.hint) from error
            raise
        undo.pop_all()
    return clients.pop(), sock, clients


def _log_in(wire: socket.socket | paramiko.Channel, login: Login, timeout_s: float) -> paramiko.SSHClient:
    return dial(
        wire,
        host=login.host,
        port=login.port,
        user=login.user,
        key=login.key,
        known_hosts=login.known_hosts,
        timeout_s=timeout_s,
    )


def _through(client: paramiko.SSHClient, hop: Login, following: Login, timeout_s: float) -> paramiko.Channel:
    import paramiko

    transport = client.get_transport()
    if transport is None:
        raise ShellLost(f"SSH to {hop.name}: connection lost")
    try:
        return transport.open_channel(
            "direct-tcpip", (following.host, following.port), ("127.0.0.1", 0), timeout=timeout_s
        )
    except (paramiko.SSHException, OSError, EOFError) as error:
        raise ShellLost(f"SSH to {following.name} through {hop.name}: {error or 'connection lost'}") from error


def _connect(
    login: Login, broker: Path | None, timeout_s: float, sndbuf: int | None, opener: Opener | None
) -> socket.socket:
    try:
        if opener is not None:
            return opener(timeout_s)
        return payload_broker.connect(broker, login.host, login.port, timeout_s, sndbuf)
    except TimeoutError as error:
        raise ShellTimeout(f"SSH to {login.name}: no answer within {timeout_s:.1f} s") from error
    except OSError as error:
        raise ShellLost(f"SSH to {login.name}: {error.strerror or error}") from error


def _transport(sock: Any, **words: Any) -> paramiko.Transport:
    import paramiko

    transport = paramiko.Transport(
        sock, default_window_size=_WINDOW_BYTES, default_max_packet_size=_PACKET_BYTES, **words
    )
    options = transport.get_security_options()
    options.ciphers = (*_CIPHERS, *(cipher for cipher in options.ciphers if cipher not in _CIPHERS))
    return transport


@contextlib.contextmanager
def _limit(sock: socket.socket | paramiko.Channel, timeout_s: float) -> Iterator[threading.Event]:
    """Shut the socket down when all steps together take longer, so that whatever waits for it ends."""
    expired = threading.Event()

    def expire() -> None:
        expired.set()
        with contextlib.suppress(OSError, EOFError):
            sock.shutdown(socket.SHUT_RDWR)

    watchdog = threading.Timer(timeout_s, expire)
    watchdog.daemon = True
    watchdog.start()
    try:
        yield expired
    finally:
        watchdog.cancel()


def _silence(name: str) -> None:
    """What goes wrong is raised; without a handler paramiko would also print it, with tracebacks."""
    logger = logging.getLogger(name)
    if not logger.handlers:
        logger.addHandler(logging.NullHandler())


# ---------------------------------------------------------------------------------------------------------------------
# First contact


def host_key(
    login: Login,
    jump: Sequence[Login] = (),
    *,
    broker: Path | None = None,
    timeout_s: float = 20.0,
    opener: Opener | None = None,
) -> HostKey:
    """The key that the server at `login` shows now, without logging in there. Raises as `Shell.connect` does."""
    import paramiko

    _silence(paramiko.__name__)
    close: list[Callable[[], None]] = []
    try:
        if jump:
            client, sock, before = reach(
                jump[-1], jump[:-1], broker=broker, timeout_s=timeout_s, sndbuf=None, opener=opener
            )
            close += [hop.close for hop in (client, *reversed(before))]
            wire: socket.socket | paramiko.Channel = _through(client, jump[-1], login, timeout_s)
        else:
            sock = _connect(login, broker, timeout_s, None, opener)
            wire = sock
        close.append(sock.close)
        with _limit(wire, timeout_s) as expired:
            try:
                transport = paramiko.Transport(wire)
                close.insert(0, transport.close)
                transport.start_client(timeout=timeout_s + 5)
                key = transport.get_remote_server_key()
            except (paramiko.SSHException, OSError, EOFError) as error:
                if expired.is_set():
                    raise ShellTimeout(f"SSH to {login.name}: no answer within {timeout_s:.1f} s") from error
                raise ShellLost(f"SSH to {login.name}: {error or 'connection lost'}") from error
        return HostKey(key.get_name(), key.get_base64())
    finally:
        for step in close:
            step()


def pinned(known_hosts: Path, host: str, port: int) -> tuple[HostKey, ...]:
    """The keys pinned for a host; none when the file does not exist."""
    import paramiko

    if not known_hosts.is_file():
        return ()
    found = paramiko.HostKeys(str(known_hosts)).lookup(host_name(host, port))
    return tuple(HostKey(kind, key.get_base64()) for kind, key in (found or {}).items())


def pin(known_hosts: Path, host: str, port: int, key: HostKey, *, replace: bool = False) -> bool:
    """Write `key` as the only one of the host; False when it is pinned already.

    Raises UsageError when another key is pinned, unless `replace`. The file is replaced whole: a reader sees the old
    or the new one.
    """
    name, known = host_name(host, port), pinned(known_hosts, host, port)
    if known == (key,):
        return False
    if known and not replace:
        others = ", ".join(f"{item.kind} {item.fingerprint}" for item in known)
        raise UsageError(
            f"{name} has another key pinned in {known_hosts}: {others}",
            hint="was the board reinstalled or swapped? then: hil board trust --replace",
        )
    kept = _lines_of_others(known_hosts, name) if known_hosts.is_file() else []
    known_hosts.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    fresh = known_hosts.with_name(f".{known_hosts.name}.{os.getpid()}")
    fresh.write_text("".join(f"{line}\n" for line in [*kept, f"{name} {key.kind} {key.base64}"]), encoding="utf-8")
    fresh.replace(known_hosts)
    return True


def _lines_of_others(known_hosts: Path, name: str) -> list[str]:
    """The file's lines without `name`; other names on the same line, comments and hashed names stay."""
    import paramiko

    lines = []
    for line in known_hosts.read_text(encoding="utf-8").splitlines():
        hosts, _, rest = line.partition(" ")
        others = [
            item
            for item in hosts.split(",")
            if item != name and not (item.startswith("|1|") and paramiko.HostKeys.hash_host(name, item) == item)
        ]
        if line.startswith(("#", "@")) or not rest:
            lines.append(line)
        elif others:
            lines.append(f"{','.join(others)} {rest}")
    return lines
