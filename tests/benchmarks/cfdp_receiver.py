"""What CFDP's receiver takes on the board this runs on: `python3 cfdp_receiver.py /var/lib/hil/cfdp.pyz`.

File data PDUs of 1,400 bytes are handed to it one after the other for as long as it lets pass in a flight before it
puts what it has on the disk, out of memory, so that no link and no sender bounds them; the disk's part is in it, the
kernel's part of a datagram is not. Prints one report for a `run` step, in Ethernet bits a second: the figure that
`cfdp_receiver` of a board type is made from, less a margin. Writes to where the archive lies, as a flight does.
"""

from __future__ import annotations

import json
import math
import runpy
import struct
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SPAN_S = 5.0  # `KEEP_S` of `hil.drivers.cfdp`
DATA = bytes(1383)
OVERHEAD_BYTES = 42  # Ethernet, IPv4 and UDP


def pdus(target: Path) -> tuple[bytes, Iterator[bytes]]:
    """Metadata, and file data without a gap and without an end."""
    from spacepackets.cfdp import ChecksumType, CrcFlag, Direction, LargeFileFlag, PduConfig, TransmissionMode
    from spacepackets.cfdp.pdu import FileDataPdu, MetadataParams, MetadataPdu
    from spacepackets.cfdp.pdu.file_data import FileDataParams
    from spacepackets.util import ByteFieldU16, ByteFieldU32

    conf = PduConfig(
        source_entity_id=ByteFieldU16(1),
        dest_entity_id=ByteFieldU16(2),
        transaction_seq_num=ByteFieldU32(7),
        trans_mode=TransmissionMode.ACKNOWLEDGED,
        file_flag=LargeFileFlag.NORMAL,
        crc_flag=CrcFlag.NO_CRC,
        direction=Direction.TOWARDS_RECEIVER,
    )
    begin = MetadataPdu(conf, MetadataParams(True, ChecksumType.CRC_32, 1 << 31, "source", str(target)))
    header = bytes(FileDataPdu(conf, FileDataParams(DATA, 0)).pack())[: -len(DATA) - 4]  # packing is the sender's work
    return bytes(begin.pack()), (header + struct.pack("!I", offset) + DATA for offset in range(0, 1 << 31, len(DATA)))


def main(archive: str) -> None:
    sys.path.insert(0, archive)
    entity: dict[str, Any] = runpy.run_path(archive, run_name="cfdp_entity")
    with tempfile.TemporaryDirectory(dir=Path(archive).parent) as directory:
        begin, packets = pdus(Path(directory) / "file")
        receiver = entity["Receiver"](Path(directory), 5.0, state=Path(directory) / "state", keep_s=math.inf)
        list(receiver.datagram(begin))
        list(receiver.tick())  # keeps at once, and by itself no more
        count, wire_bytes, began = 0, 0, time.monotonic()
        while time.monotonic() - began < SPAN_S:
            packet = next(packets)
            list(receiver.datagram(packet))
            list(receiver.tick())
            count, wire_bytes = count + 1, wire_bytes + len(packet) + OVERHEAD_BYTES
        receiver._keep()
        took_s = time.monotonic() - began
        received = receiver.offset
        receiver.files.close()
    assert received == count * len(DATA), f"only {received} bytes arrived"
    print(json.dumps({"measure": "cfdp_receiver_rate", "value": 8 * wire_bytes / took_s, "unit": "bit/s"}))


if __name__ == "__main__":
    main(sys.argv[1])
