"""Runs on the board (Python 3, nothing but its library): one TCP connection carried over the console it was started on.

    python3 relay.py NONCE HOST PORT

Lines in: `NUMBER BASE64 LENGTH` are bytes for the connection, `? NUMBER 0` asks for all frames from that one on, and
`. . 0` ends. Out: `HIL-NONCE-A-NUMBER.` is how many lines were taken, `HIL-NONCE-D-NUMBER-BASE64-LENGTH.` bytes of the
connection, `HIL-NONCE-Z-COUNT.` its end after so many frames, `HIL-NONCE-X-BASE64.` an error at opening it, told again
at each `?`.
"""

from __future__ import annotations

import base64
import os
import select
import socket
import sys

FRAME_BYTES = 450


def main(nonce: str, host: str, port: str) -> None:
    def say(text: str) -> None:
        os.write(1, f"HIL-{nonce}-{text}.\n".encode())

    try:
        sock = socket.create_connection((host, int(port)), timeout=10)
    except OSError as error:
        refusal = "X-" + base64.b64encode(str(error).encode()[:300]).decode()
        say(refusal)
        for line in sys.stdin:
            if line.startswith("."):
                return
            if line.startswith("?"):
                say(refusal)
        return
    sock.settimeout(10)
    say("A-0")
    frames: list[bytes] = []
    taken, left, ended = 0, b"", False

    def tell(first: int) -> None:
        for number in range(first, len(frames)):
            text = base64.b64encode(frames[number]).decode()
            say(f"D-{number}-{text}-{len(text)}")
        if ended:
            say(f"Z-{len(frames)}")

    while True:
        waited: list[int] = [0] if ended else [0, sock.fileno()]
        ready = select.select(waited, [], [])[0]
        if sock.fileno() in ready:
            try:
                data = sock.recv(FRAME_BYTES)
            except OSError:
                data = b""
            if data:
                frames.append(data)
            else:
                ended = True
            tell(len(frames) - 1 if data else len(frames))
        if 0 in ready:
            data = os.read(0, 4096)
            if not data:
                return
            *lines, left = (left + data).split(b"\n")
            for line in lines:
                words = line.split()
                if len(words) != 3:
                    continue
                if words[0] == b".":
                    return
                if words[0] == b"?" and words[1].isdigit():
                    say(f"A-{taken}")
                    tell(int(words[1]))
                elif words[0] == b"%d" % (taken + 1) and words[2] == b"%d" % len(words[1]):
                    taken += 1
                    try:
                        sock.sendall(base64.b64decode(words[1]))
                    except OSError:
                        ended = True
                    say(f"A-{taken}")


if __name__ == "__main__":
    main(*sys.argv[1:4])
