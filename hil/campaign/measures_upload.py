"""Measures of what an upload cost, and the same by protocol for the report's comparison."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hil.campaign import derive
from hil.campaign.evidence import Measure, Measured, NoEvidence, events_of
from hil.campaign.record import Event, Record

SFTP = "sftp"


@dataclass(frozen=True, slots=True)
class Cost:
    """Contacts of one protocol, or of all; None is not known: records of earlier versions, a ground without counters.

    `file_bytes` are what the board acknowledged; `wire_bytes` what the ground put on the link for it, with headers,
    handshakes and repetitions. `resent_bytes` are of the file, `retransmissions` packets: TCP segments of SFTP, file
    data PDUs of CFDP. `open_s` are mission seconds in which the applied uplink was open, `capacity_bits` what it could
    have carried in them.
    """

    contacts: int
    cut: int
    file_bytes: int
    wire_bytes: int | None
    resent_bytes: int | None
    retransmissions: int | None
    open_s: float | None
    capacity_bits: float | None

    @property
    def goodput_share(self) -> float | None:
        """Acknowledged file bits over the bits that the link could have carried."""
        return 8.0 * self.file_bytes / self.capacity_bits if self.capacity_bits else None

    @property
    def goodput_bps(self) -> float | None:
        """Acknowledged file bits a second of open contact, both in mission time."""
        return 8.0 * self.file_bytes / self.open_s if self.open_s else None

    @property
    def overhead_share(self) -> float | None:
        """Bytes on the wire beyond those of the file, over those of the file."""
        return self.wire_bytes / self.file_bytes - 1.0 if self.wire_bytes is not None and self.file_bytes else None


def by_protocol(record: Record) -> dict[str, Cost]:
    """The cost of each protocol that this run uploaded by, in the order of their first contact."""
    windows = record.of("upload_window")
    names = dict.fromkeys(protocol_of(event) for event in windows)
    return {name: cost(record, [event for event in windows if protocol_of(event) == name]) for name in names}


def protocol_of(event: Event) -> str:
    """Of an upload event; records of earlier versions know SFTP only and do not say so."""
    return str(event.get("protocol", SFTP))


def cost(record: Record, windows: Sequence[Event]) -> Cost:
    """Of these contacts together."""
    spans = [derive.event_span(event) for event in windows]
    capacities = [derive.capacity_bits(record, "uplink", span) for span in spans]
    opened = [
        None if (wall_s := derive.open_s(record, "uplink", span)) is None else wall_s * float(event["clock_rate"])
        for event, span in zip(windows, spans, strict=True)
    ]
    return Cost(
        contacts=len(windows),
        cut=sum(bool(event["cut_by_los"]) for event in windows),
        file_bytes=sum(int(event["bytes_acked_end"]) - int(event["bytes_acked_start"]) for event in windows),
        wire_bytes=_sum(windows, "bytes_on_wire"),
        resent_bytes=_sum(windows, "bytes_resent"),
        retransmissions=_sum(windows, "retransmissions"),
        open_s=_total(opened),
        capacity_bits=_total(capacities),
    )


def _sum(events: Sequence[Event], name: str) -> int | None:
    total = _total([event.get(name) for event in events])
    return None if total is None else int(total)


def _total(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None


def _of_all(name: str, lack: str) -> Callable[[Record], Measured]:
    """The measure that is this figure of all contacts together."""

    def of(record: Record) -> Measured:
        windows = events_of(record, "upload_window")
        value = getattr(cost(record, windows), name)
        if value is None:
            raise NoEvidence(lack)
        protocols = ", ".join(dict.fromkeys(protocol_of(event) for event in windows))
        spans = tuple(derive.event_span(event) for event in windows)
        return Measured(float(value), f"{len(windows)} contacts, protocol {protocols}", spans)

    return of


def _reboots(record: Record) -> Measured:
    windows, reboots = events_of(record, "upload_window"), record.of("upload_rebooted")
    how = "; ".join(f"{event['cause']}: {event['goes_on']}" for event in reboots) or "none"
    return Measured(float(len(reboots)), how, tuple(derive.event_span(event) for event in windows))


_NO_STATE = "no applied uplink state in telemetry.sqlite for an upload window, or it was never open"
MEASURES = (
    Measure(
        "upload.wire_bytes",
        "B",
        "What the ground put on the payload link in upload windows, by its interface's counter: with all headers.",
        _of_all("wire_bytes", "the ground end of the payload link has no counter of its own (`broker:`)"),
    ),
    Measure(
        "upload.resent_bytes",
        "B",
        "Bytes of the file that were sent again: from where SFTP resumed, or what CFDP was asked for.",
        _of_all("resent_bytes", "an upload window does not say what was sent again"),
    ),
    Measure(
        "upload.retransmissions",
        "packets",
        "Packets that went out again: TCP segments under SFTP, file data PDUs of CFDP.",
        _of_all("retransmissions", "an upload window does not say what was retransmitted"),
    ),
    Measure("upload.reboots", "reboots", "Reboots of the board that an upload went on after.", _reboots),
    Measure(
        "upload.goodput_bps",
        "bit/s",
        "Acknowledged file bits a second of open contact, both in mission time.",
        _of_all("goodput_bps", _NO_STATE),
    ),
)
