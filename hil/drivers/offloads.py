"""Segmentation offloads of this host's interfaces: with them one emulated loss takes 64 KiB, 44 segments, at once.

The kernel's ethtool ioctl (linux/ethtool.h), because a small host may lack the program.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import socket
import struct
from collections.abc import Iterable

_SIOCETHTOOL = 0x8946
_GET_SET = {"tso": (0x1E, 0x1F), "gso": (0x23, 0x24), "gro": (0x2B, 0x2C)}
_GET_FLAGS, _SET_FLAGS, _LRO = 0x25, 0x26, 1 << 15

NAMES = (*_GET_SET, "lro")
"""The offloads that matter here, as ethtool abbreviates them."""


def read(interface: str) -> dict[str, bool] | None:
    """Offload -> on, for those that the driver has; None when the interface tells nothing. Raises OSError (ENODEV)."""
    socket.if_nametoindex(interface)
    found: dict[str, bool] = {}
    for name, (get, _) in _GET_SET.items():
        with contextlib.suppress(OSError):
            found[name] = bool(_ask(interface, get, 0))
    with contextlib.suppress(OSError):
        found["lro"] = bool(_ask(interface, _GET_FLAGS, 0) & _LRO)
    return found or None


def switch(interface: str, names: Iterable[str], on: bool) -> None:
    """Switch offloads. Raises OSError where the driver cannot, or we may not."""
    for name in names:
        if name == "lro":
            flags = _ask(interface, _GET_FLAGS, 0)
            _ask(interface, _SET_FLAGS, flags | _LRO if on else flags & ~_LRO)
        else:
            _ask(interface, _GET_SET[name][1], int(on))


def _ask(interface: str, command: int, value: int) -> int:
    data = ctypes.create_string_buffer(struct.pack("=II", command, value), 8)
    request = struct.pack("=16sQ16x", interface.encode(), ctypes.addressof(data))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        fcntl.ioctl(sock, _SIOCETHTOOL, request)
    return int(struct.unpack("=II", data.raw)[1])
