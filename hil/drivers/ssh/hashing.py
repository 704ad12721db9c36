"""SHA-256 at both ends of a transfer: on this host, and on the board after the transfer or beside it."""

from __future__ import annotations

import contextlib
import hashlib
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from hil.drivers.ssh.shell import Process, Shell
from hil.errors import BoardError, HilError

# Digest of standard input, first word of the line. Every POSIX board has `sha256sum`, but few build it to use the
# processor's own instructions; `openssl`, where it is there, does, and is up to six times as fast.
DIGEST = """
digest() {
  if openssl dgst -sha256 -r </dev/null >/dev/null 2>&1; then openssl dgst -sha256 -r; else sha256sum; fi
}
"""
_HASH_HEAD = f'{DIGEST} head -c "$1" <"$2" | digest'
_HASH_WHOLE = f'{DIGEST} digest <"$1"'
# Hashing is quick beside the link, but an emulated board reads its disk slowly.
HASH_BYTES_PER_S = 5e6


def local_sha256(path: Path, length: int) -> str:
    """Hex digest of the first `length` bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while length > 0 and (data := stream.read(min(length, 1 << 20))):
            digest.update(data)
            length -= len(data)
    return digest.hexdigest()


def board_sha256(shell: Shell, path: str, length: int, timeout_s: float) -> str:
    """Hex digest of the first `length` bytes of a file on the board; needs `head` and `sha256sum` there."""
    argv = ["sh", "-c", _HASH_HEAD, "sh", str(length), path]
    return shell.run(argv, timeout_s + length / HASH_BYTES_PER_S, check=True).stdout.split(" ")[0].strip()


@contextlib.contextmanager
def started_beside(shell: Shell, argv: Sequence[str], timeout_s: float) -> Iterator[Future[Process]]:
    """A command that starts and runs while the body goes on; what still runs at the end of the body is killed."""
    with ThreadPoolExecutor(1) as pool:
        starting = pool.submit(shell.start, argv, timeout_s)
        try:
            yield starting
        finally:
            with contextlib.suppress(HilError):  # the body tells why it could not be started, if it needed it
                process = starting.result()
                if process.running:
                    process.kill()


@contextlib.contextmanager
def hashed_beside(shell: Shell, path: str, timeout_s: float) -> Iterator[Callable[[int], str]]:
    """Have the board hash the whole file at `path` while the body downloads it.

    Yields what waits for the hex digest, given the file's size for its time limit; the digest is empty when the board
    could not tell.
    """
    with started_beside(shell, ["sh", "-c", _HASH_WHOLE, "sh", path], timeout_s) as starting:

        def wait(length: int) -> str:
            done = starting.result().wait(timeout_s + length / HASH_BYTES_PER_S)
            return done.stdout.split(" ")[0].strip()

        yield wait


# ---------------------------------------------------------------------------------------------------------------------
# Uploads

# The board's end of an upload. Lines `SKIP COUNT` on its standard input say which blocks are there by now; `0 0` that
# this was all, and the line behind it what they must hash to. Writing to disk begins while the rest is on its way: it
# is what takes longest at the end. A sync that fails ends it all, for the kernel tells of a bad disk only once; the
# last one beside the reading is waited for, or it would not find the part any more, and fail for that.
_LAND = f"""{DIGEST}
part=$1 target=$2
found=$({{ while read -r skip count && [ "$count" -gt 0 ]; do
  dd if="$part" bs=1048576 skip="$skip" count="$count" 2>/dev/null
  wait
  {{ sync "$part" || kill $$; }} >/dev/null &
done; wait; }} | digest)
found=${{found%% *}}
read -r expected || exit 1
[ "$found" = "$expected" ] || {{ echo "$found"; exit 9; }}
sync "$part" || kill $$
mv -f "$part" "$target"
"""
_BLOCK = 1 << 20
_STEP_BLOCKS = 8
_MISMATCH = 9


class Landing:
    """The board's end of one upload: `part` is hashed and synced as it grows, compared, only then moved to `target`.

    Needs `dd`, `sync`, `mv` and `sha256sum` on the board. Nothing happens to the files there before `finish`, nor when
    the connection ends.
    """

    def __init__(self, shell: Shell, part: str, starting: Future[Process]) -> None:
        self._shell, self._part, self._starting = shell, part, starting
        self._told = 0  # blocks

    @classmethod
    @contextlib.contextmanager
    def beside(cls, shell: Shell, part: str, target: str, timeout_s: float) -> Iterator[Landing]:
        """A landing that is prepared while the body begins the upload, and given up if the body ends before it."""
        with started_beside(shell, ["sh", "-c", _LAND, "sh", part, target], timeout_s) as starting:
            yield cls(shell, part, starting)

    def reached(self, offset: int, timeout_s: float) -> None:
        """The first `offset` bytes of the part are there and will not change."""
        blocks = offset // _BLOCK
        if blocks - self._told >= _STEP_BLOCKS:
            # A landing that has ended tells at `finish` why.
            with contextlib.suppress(BoardError):
                self._starting.result().write(b"%d %d\n" % (self._told, blocks - self._told), timeout_s)
            self._told = blocks

    def finish(self, total: int, sha256: str, timeout_s: float) -> None:
        """Put the part in place if all of its `total` bytes hash to `sha256`. Raises BoardError if they do not."""
        process = self._starting.result()
        rest = -(-total // _BLOCK) - self._told
        lines = f"{self._told} {rest}\n0 0\n{sha256}\n" if rest else f"0 0\n{sha256}\n"
        with contextlib.suppress(BoardError):
            process.write(lines.encode(), timeout_s)
        done = process.wait(timeout_s + total / HASH_BYTES_PER_S)
        if done.returncode == _MISMATCH:
            raise BoardError(f"{self._shell.name}: {self._part} has SHA-256 {done.stdout.strip()}, not {sha256}")
        if done.returncode == -signal.SIGTERM:
            raise BoardError(
                f"{self._shell.name}: sync failed on the board: {self._part} was not put in place",
                hint="`dmesg` and `df` there say what is wrong with its disk; then put the file again",
            )
        if done.returncode != 0:
            raise BoardError(
                f"{self._shell.name}: {self._part} was not put in place, status {done.returncode}: "
                f"{done.stderr.strip()[-400:]}"
            )
