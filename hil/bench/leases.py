"""Who may drive which board: leases in SQLite, with a TTL, a rising fencing token and the death of their holder.

The store survives the daemon. Its clock is a parameter: seconds since the host booted (`boot_clock`), because that
runs on while the daemon is away and cannot be set by anybody; a lease of another boot of the host is over.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
import select
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from hil.errors import BenchError, UsageError

EndCause = Literal["released", "expired", "holder_died", "preempted", "host_rebooted", "user_removed"]

_SCHEMA = """
CREATE TABLE IF NOT EXISTS lease (
    id TEXT PRIMARY KEY, token_sha256 TEXT NOT NULL UNIQUE, fence INTEGER NOT NULL UNIQUE, holder TEXT NOT NULL,
    reason TEXT NOT NULL, pid INTEGER, pid_start INTEGER, boot_id TEXT NOT NULL, acquired_s REAL NOT NULL,
    ttl_s REAL NOT NULL, expires_s REAL NOT NULL);
-- The primary key is the promise: the database itself cannot hold two leases for one board.
CREATE TABLE IF NOT EXISTS leased_board (
    board TEXT PRIMARY KEY, lease TEXT NOT NULL REFERENCES lease(id) ON DELETE CASCADE);
-- Leases whose end the daemon has not yet acted on; a daemon that dies in between finds them at its next start.
CREATE TABLE IF NOT EXISTS ended (board TEXT NOT NULL, lease TEXT NOT NULL, cause TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS fence (one INTEGER PRIMARY KEY CHECK (one = 1), value INTEGER NOT NULL);
INSERT OR IGNORE INTO fence VALUES (1, 0);
CREATE TABLE IF NOT EXISTS boot (one INTEGER PRIMARY KEY CHECK (one = 1), id TEXT NOT NULL);
-- What became of the latest leases, for those who come with a token of one.
CREATE TABLE IF NOT EXISTS over (
    token_sha256 TEXT PRIMARY KEY, lease TEXT NOT NULL, told TEXT NOT NULL);
"""
OVER_KEPT = 200
# More leases than can have been granted since SQLite last waited for the disk: it does so every 1,000 pages.
FENCES_A_BOOT = 10_000
OVER_TLS = " over TLS"  # behind the name of a lease's user who is on another host
_TOLD: dict[EndCause, str] = {
    "released": "was released",
    "expired": "ran out: it was not renewed in time",
    "holder_died": "ended with the process that held it",
    "preempted": "was taken over",
    "host_rebooted": "ended when the bench's host was booted",
    "user_removed": "ended with its user, who was removed from this bench",
}


class Taken(BenchError):
    """A board that was asked for is leased."""


@dataclass(frozen=True, slots=True)
class Lease:
    """One granted lease. `expires_s` is on the store's clock; `pid` None means that only the TTL ends it."""

    id: str
    fence: int
    holder: str
    reason: str
    pid: int | None
    pid_start: int | None
    boards: tuple[str, ...]
    acquired_s: float
    ttl_s: float
    expires_s: float
    user: str = ""


@dataclass(frozen=True, slots=True)
class Ended:
    """A board whose lease is over and why; it waits for `settled` after the daemon has acted on it."""

    board: str
    lease: str
    cause: EndCause


class LeaseStore:
    """The leases of one bench. One process owns it (the daemon holds the bench's lock); not for several threads.

    No call waits for the disk: fit for an event loop. `checkpoint` does, now and then, on a thread.

    `started` gives the kernel's start time of a process or None when it is dead (OSError: it cannot tell): pid and
    start time together name a process for good, a pid alone is used again. `groups` names for a board all those that
    can only be leased together with it: they hang on one supply whose channels are not independent. `removed` says
    whether a user of another host is no longer one of the bench's.
    """

    def __init__(
        self,
        path: Path,
        boards: Iterable[str],
        *,
        boot_id: str,
        started: Callable[[int], int | None],
        groups: Mapping[str, tuple[str, ...]] = MappingProxyType({}),
        removed: Callable[[str], bool] = lambda user: False,
    ) -> None:
        self._path = path
        self._removed = removed
        self._groups = groups
        # What the tables hold, read once after each change: nobody else writes them.
        self._held: tuple[tuple[Lease, str], ...] | None = None
        self._ended: tuple[Ended, ...] | None = None
        self._boards = frozenset(boards)
        self._boot_id = boot_id
        self._started = started
        try:
            self._database = sqlite3.connect(path, timeout=5.0, isolation_level=None)
            self._database.execute("PRAGMA foreign_keys=ON")
            self._database.execute("PRAGMA journal_mode=WAL")
            # Survives the death of this process without waiting for the disk. What a power cut of the host takes with
            # it was over anyway: no lease outlives a boot. Only the fence must not go back; see `_new_boot`.
            self._database.execute("PRAGMA synchronous=NORMAL")
            self._database.execute("PRAGMA wal_autocheckpoint=0")
            self._database.executescript(_SCHEMA)
            if "user" not in {row[1] for row in self._database.execute("PRAGMA table_info(lease)")}:
                self._database.execute("ALTER TABLE lease ADD COLUMN user TEXT NOT NULL DEFAULT ''")
            self._new_boot()
        except sqlite3.Error as error:
            raise BenchError(f"cannot open the lease store {path}: {error}") from error

    def acquire(
        self,
        boards: Iterable[str],
        *,
        holder: str,
        pid: int | None,
        ttl_s: float,
        now_s: float,
        reason: str = "",
        preempt: bool = False,
        user: str = "",
    ) -> tuple[Lease, str]:
        """Grant all boards or none; returns the lease and its secret token (only its hash is stored).

        `holder` says who it is for people, `user` for the queue. Raises UsageError for an unknown board or a preemption
        without a reason, Taken naming the holders when a board is leased.
        """
        asked = tuple(dict.fromkeys(boards))
        wanted = self.together(asked)
        self.check_request(asked, ttl_s, preempt, reason)
        try:
            pid_start = None if pid is None else self._started(pid)
        except OSError as error:
            raise BenchError(f"the lease's holder, process {pid}, cannot be looked at: {error.strerror}") from error
        if pid is not None and pid_start is None:
            raise UsageError(f"the lease's holder, process {pid}, does not run on this host")
        self.expire(now_s)
        taken = [lease for lease in self.leases() if set(lease.boards) & set(wanted)]
        if taken and not preempt:
            raise Taken(
                "; ".join(said for lease in taken for said in describe(lease, wanted, now_s)) + self.why(asked),
                hint="wait for it (wait_s, --wait-s), or take over with --preempt --reason TEXT",
            )
        token = secrets.token_urlsafe(24)
        held, ended = self._rows(), self._ended
        with self._transaction():
            for lease in taken:
                self._end(lease, "preempted", f"was taken over by {holder}: {reason}")
            lease = self._insert(wanted, token, holder, reason, pid, pid_start, ttl_s, now_s, user)
        if not taken:  # nothing else has changed
            self._held, self._ended = (*held, (lease, self._boot_id)), ended
        return lease, token

    def together(self, boards: Iterable[str]) -> tuple[str, ...]:
        """These boards and all that have to be leased with them."""
        return tuple(dict.fromkeys(other for board in boards for other in (board, *self._groups.get(board, ()))))

    def why(self, asked: tuple[str, ...]) -> str:
        """Why more than the boards asked for are needed; empty when they are not."""
        wanted = self.together(asked)
        if len(asked) == len(wanted):
            return ""
        return (
            f" ({', '.join(asked)} can only be leased with {', '.join(b for b in wanted if b not in asked)}: "
            "they hang on one supply whose channels are not independent)"
        )

    def renew(self, lease_id: str, token: str, now_s: float) -> Lease:
        """Extend by the lease's TTL from now. Raises BenchError when it is over."""
        lease = self._by_token(token, now_s)
        if lease.id != lease_id:
            raise BenchError(f"lease {lease_id} belongs to another token")
        with self._transaction():
            self._database.execute("UPDATE lease SET expires_s = ? WHERE id = ?", (now_s + lease.ttl_s, lease_id))
        return self._get(lease_id)

    def release(self, lease_id: str, token: str, now_s: float) -> None:
        """End the lease now. Raises BenchError when it is over already or the token is not its own."""
        lease = self._by_token(token, now_s)
        if lease.id != lease_id:
            raise BenchError(f"lease {lease_id} belongs to another token")
        with self._transaction():
            self._end(lease, "released")

    def check(self, token: str | None, board: str, now_s: float) -> Lease:
        """The lease that `token` stands for, if it holds `board` now; BenchError otherwise."""
        if board not in self._boards:
            raise UsageError(f"the bench has no board {board!r}", hint=f"its boards: {', '.join(sorted(self._boards))}")
        if not token:
            raise BenchError(f"board {board} may be driven only under a lease", hint=f"hil lease acquire {board}")
        lease = self._by_token(token, now_s)
        if board not in lease.boards:
            raise BenchError(f"this lease is for {', '.join(lease.boards)}, not for board {board}")
        return lease

    def expire(self, now_s: float) -> None:
        """End what is over: TTL passed, holder dead, user removed, or of another boot of the host; see `unsettled`."""
        for lease, boot_id in self._rows():
            if boot_id != self._boot_id:
                cause: EndCause = "host_rebooted"
            elif lease.expires_s <= now_s:
                cause = "expired"
            elif self._died(lease):
                cause = "holder_died"
            elif lease.user.endswith(OVER_TLS) and self._removed(lease.user.removesuffix(OVER_TLS)):
                cause = "user_removed"
            else:
                continue
            with self._transaction():
                self._end(lease, cause)

    def _died(self, lease: Lease) -> bool:
        try:
            return lease.pid is not None and self._started(lease.pid) != lease.pid_start
        except OSError:
            return False  # nobody knows: its TTL bounds it

    def unsettled(self) -> tuple[Ended, ...]:
        """Boards whose lease ended and that the daemon has not yet brought to their `on_lease_end` state."""
        if self._ended is None:
            self._ended = tuple(Ended(*row) for row in self._database.execute("SELECT board, lease, cause FROM ended"))
        return self._ended

    def settled(self, ended: Ended) -> None:
        """The board is in its `on_lease_end` state, or has been leased again."""
        with self._transaction():
            self._database.execute("DELETE FROM ended WHERE board = ? AND lease = ?", (ended.board, ended.lease))

    def leases(self) -> tuple[Lease, ...]:
        """Every lease that has not ended, by fencing token."""
        return tuple(lease for lease, _ in self._rows())

    def next_expiry_s(self) -> float | None:
        """When the next lease runs out on the store's clock, or None without a lease."""
        return min((lease.expires_s for lease in self.leases()), default=None)

    def checkpoint(self) -> None:
        """Move what was written into the database file and wait for the disk; from any thread."""
        with (
            contextlib.closing(sqlite3.connect(self._path, timeout=5.0)) as database,
            contextlib.suppress(sqlite3.Error),
        ):
            database.execute("PRAGMA wal_checkpoint(PASSIVE)")

    def close(self) -> None:
        self._database.close()

    def check_request(self, wanted: tuple[str, ...], ttl_s: float, preempt: bool, reason: str) -> None:
        """Raises UsageError for what can never be granted."""
        unknown = sorted(set(wanted) - self._boards)
        if unknown or not wanted:
            raise UsageError(
                f"the bench has no board {', '.join(unknown)}" if unknown else "a lease needs at least one board",
                hint=f"its boards: {', '.join(sorted(self._boards))}",
            )
        if not 0 < ttl_s <= 24 * 3600:
            raise UsageError(f"a lease lives between 0 s and a day without renewal, not {ttl_s} s")
        if preempt and not reason:
            raise UsageError("taking over a lease needs a reason", hint="--preempt --reason TEXT")

    def _insert(
        self,
        boards: tuple[str, ...],
        token: str,
        holder: str,
        reason: str,
        pid: int | None,
        pid_start: int | None,
        ttl_s: float,
        now_s: float,
        user: str,
    ) -> Lease:
        fence = int(self._database.execute("UPDATE fence SET value = value + 1 RETURNING value").fetchall()[0][0])
        lease = Lease(
            id=f"L{fence}-{secrets.token_hex(3)}",
            fence=fence,
            holder=holder,
            reason=reason,
            pid=pid,
            pid_start=pid_start,
            boards=boards,
            acquired_s=now_s,
            ttl_s=ttl_s,
            expires_s=now_s + ttl_s,
            user=user,
        )
        self._database.execute(
            "INSERT INTO lease VALUES (?,?,?,?,?,?,?,?,?,?,?,?)",
            (
                lease.id,
                _hashed(token),
                fence,
                holder,
                reason,
                pid,
                pid_start,
                self._boot_id,
                now_s,
                ttl_s,
                lease.expires_s,
                user,
            ),
        )
        self._database.executemany("INSERT INTO leased_board VALUES (?,?)", [(board, lease.id) for board in boards])
        return lease

    def _new_boot(self) -> None:
        """A power cut may have taken the newest fences with it: the first of a boot is beyond all that may be lost."""
        row = self._database.execute("SELECT id FROM boot").fetchone()
        if row is not None and row[0] == self._boot_id:
            return
        with self._transaction():
            # The daemon opens the store twice; whoever comes second finds it done.
            self._database.execute(
                "UPDATE fence SET value = value + ? WHERE EXISTS (SELECT 1 FROM boot WHERE id != ?)",
                (FENCES_A_BOOT, self._boot_id),
            )
            self._database.execute("INSERT OR REPLACE INTO boot VALUES (1, ?)", (self._boot_id,))

    def _end(self, lease: Lease, cause: EndCause, told: str = "") -> None:
        self._database.execute(
            "INSERT OR REPLACE INTO over SELECT token_sha256, id, ? FROM lease WHERE id = ?",
            (told or _TOLD[cause], lease.id),
        )
        self._database.execute(
            "DELETE FROM over WHERE rowid <= (SELECT max(rowid) FROM over) - ?",
            (OVER_KEPT,),
        )
        self._database.executemany("INSERT INTO ended VALUES (?,?,?)", [(b, lease.id, cause) for b in lease.boards])
        self._database.execute("DELETE FROM lease WHERE id = ?", (lease.id,))

    def _by_token(self, token: str, now_s: float) -> Lease:
        row = self._database.execute("SELECT id FROM lease WHERE token_sha256 = ?", (_hashed(token),)).fetchone()
        lease = None if row is None else self._get(row[0])
        if lease is None or lease.expires_s <= now_s:
            raise BenchError(self._became(token, lease), hint="hil lease list shows who holds the boards")
        return lease

    def _became(self, token: str, lease: Lease | None) -> str:
        """What to tell somebody whose token holds nothing."""
        if lease is not None:
            return f"lease {lease.id} {_TOLD['expired']}"
        row = self._database.execute(
            "SELECT lease, told FROM over WHERE token_sha256 = ?", (_hashed(token),)
        ).fetchone()
        return "this lease is over, or never was one of this bench" if row is None else f"lease {row[0]} {row[1]}"

    def _get(self, lease_id: str) -> Lease:
        return next(lease for lease in self.leases() if lease.id == lease_id)

    def _rows(self) -> tuple[tuple[Lease, str], ...]:
        if self._held is None:
            self._held = self._read()
        return self._held

    def _read(self) -> tuple[tuple[Lease, str], ...]:
        boards: dict[str, list[str]] = {}
        for board, lease_id in self._database.execute("SELECT board, lease FROM leased_board ORDER BY rowid"):
            boards.setdefault(lease_id, []).append(board)
        rows = self._database.execute(
            "SELECT id, fence, holder, reason, pid, pid_start, acquired_s, ttl_s, expires_s, user, boot_id FROM lease "
            "ORDER BY fence"
        )
        return tuple(
            (Lease(row[0], row[1], row[2], row[3], row[4], row[5], tuple(boards.get(row[0], ())), *row[6:10]), row[10])
            for row in rows
        )

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        try:
            self._held = self._ended = None
            self._database.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                self._database.execute("ROLLBACK")
                self._held = self._ended = None
                raise
            self._database.execute("COMMIT")
            self._held = self._ended = None
        except sqlite3.Error as error:
            raise BenchError(
                f"the lease store refuses: {error}", hint="free disk space; nothing was granted"
            ) from error


def describe(lease: Lease, boards: Iterable[str], now_s: float) -> list[str]:
    """Who holds which of `boards`, why and for how long, one text a board."""
    reason = f" ({lease.reason})" if lease.reason else ""
    left_s = max(0.0, lease.expires_s - now_s)
    return [
        f"board {board} is leased by {lease.holder}{reason} for another {left_s:.0f} s"
        for board in lease.boards
        if board in frozenset(boards)
    ]


def boot_clock() -> float:
    """Seconds since the host booted, suspension included: the clock that `LeaseStore` is run on."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def host_boot_id() -> str:
    """Identity of this boot of the host."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def process_started(pid: int) -> int | None:
    """Kernel start time of a living process (clock ticks since boot); None when it is dead or a zombie.

    Its pidfd says which: `/proc` calls a process a zombie as soon as its first thread has ended, when the others may
    still hold its locks and sockets. Raises OSError when it cannot tell, for want of descriptors say.
    """
    pidfd = _pidfd(pid)
    if pidfd is None:
        return None
    try:
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        ended = bool(poll.poll(0))
        handle = os.open(f"/proc/{pid}/stat", os.O_RDONLY)
        try:
            stat = os.read(handle, 4096)
        finally:
            os.close(handle)
    except (FileNotFoundError, ProcessLookupError):
        return None
    finally:
        os.close(pidfd)
    # The command name may hold spaces and brackets: count the fields after its last bracket.
    return None if ended else int(stat[stat.rindex(b")") + 2 :].split()[19])


def watch_process(pid: int, started: int | None) -> int | None:
    """A pidfd that turns readable when that very process ends; None when it is gone already. Raises OSError as
    `process_started` does.
    """
    fd = _pidfd(pid)
    if fd is None:
        return None
    try:
        living = process_started(pid) == started
    except OSError:
        os.close(fd)
        raise
    if not living:
        os.close(fd)
        return None
    return fd


def _pidfd(pid: int) -> int | None:
    try:
        return os.pidfd_open(pid)
    except OSError as error:
        if error.errno in (errno.ESRCH, errno.EINVAL):  # the second: now a thread's number
            return None
        raise


def _hashed(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()
