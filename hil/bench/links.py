"""From a link of the bench file to the driver that shapes it."""

from __future__ import annotations

from hil.drivers.link import LinkEmulator
from hil.inventory.bench_link import LinkWire, NetemSshWire, NetemWire


def link_driver(name: str, wire: LinkWire) -> LinkEmulator:
    """The driver of a link; does not connect yet."""
    if isinstance(wire, NetemSshWire):
        from hil.drivers.netem import NetemSsh

        return NetemSsh.at(
            name,
            host=wire.host,
            port=wire.port,
            user=wire.user,
            key=wire.key,
            known_hosts=wire.known_hosts,
            uplink_interface=wire.uplink_interface,
            downlink_interface=wire.downlink_interface,
            replace_foreign=wire.replace_qdisc,
        )
    if isinstance(wire, NetemWire):
        from hil.drivers.netem_local import NetemLocal

        return NetemLocal(
            name,
            {"uplink": wire.uplink_interface, "downlink": wire.downlink_interface},
            seed=wire.seed,
            replace_foreign=wire.replace_qdisc,
        )
    from hil.drivers.userspace_link import UserSpaceLink

    return UserSpaceLink(name, wire.control)
