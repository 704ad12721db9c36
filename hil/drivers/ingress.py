"""Shaping what comes in: where a host has one port to the board, its arriving packets are led through an ifb device.

netem shapes what leaves an interface. `ingress:eth0` in a bench file stands for what arrives at eth0: redirected to an
ifb device of hil's, on whose egress netem can work. The device is the mark by which hil knows what it added.
"""

from __future__ import annotations

_PREFIX = "ingress:"


def port_of(interface: str) -> str | None:
    """The port whose arriving packets are meant, or None for an ordinary interface."""
    return interface.removeprefix(_PREFIX) if interface.startswith(_PREFIX) else None


def device(interface: str) -> str:
    """The device on whose egress the qdisc sits: the interface itself, or hil's ifb device for its port."""
    port = port_of(interface)
    return interface if port is None else f"hi-{port[-12:]}"


def set_up(port: str) -> list[list[str]]:
    """The commands that lead what arrives at `port` through its device."""
    ifb = device(_PREFIX + port)
    everything = ["protocol", "all", "pref", "1", "u32", "match", "u32", "0", "0"]
    redirect = ["action", "mirred", "egress", "redirect", "dev", ifb]
    return [
        ["ip", "link", "add", ifb, "type", "ifb"],
        ["ip", "link", "set", "dev", ifb, "up"],
        # Fails where somebody else already has an ingress qdisc, as it should.
        ["tc", "qdisc", "add", "dev", port, "handle", "ffff:", "ingress"],
        ["tc", "filter", "add", "dev", port, "parent", "ffff:", *everything, *redirect],
    ]


def take_down(port: str) -> list[list[str]]:
    """The commands that undo `set_up`."""
    return [
        ["tc", "qdisc", "del", "dev", port, "handle", "ffff:", "ingress"],
        ["ip", "link", "del", device(_PREFIX + port)],
    ]
