"""What CFDP's receiver takes on the board this runs on: `python3 cfdp_receiver.py /var/lib/hil/cfdp.pyz`.

File data PDUs of 1,400 bytes are handed to it one after the other, out of memory, so that no link and no sender bounds
them; the kernel's part of a datagram is not in it. Prints one report for a `run` step, in Ethernet bits a second: the
figure that `cfdp_receiver` of a board type is made from, less a margin.
"""

from __future__ import annotations

import json
import runpy
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PACKETS = 1000
OVERHEAD_BYTES = 42  # Ethernet, IPv4 and UDP


def pdus(target: Path) -> list[bytes]:
    """Metadata, and file data without a gap."""
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
    data = bytes(1383)
    size = (PACKETS + 1) * len(data)  # one never comes: the file does not end
    begin = MetadataPdu(conf, MetadataParams(True, ChecksumType.CRC_32, size, "source", str(target)))
    packets = [FileDataPdu(conf, FileDataParams(data, len(data) * number)) for number in range(PACKETS)]
    return [bytes(begin.pack()), *(bytes(packet.pack()) for packet in packets)]


def main(archive: str) -> None:
    sys.path.insert(0, archive)
    entity: dict[str, Any] = runpy.run_path(archive, run_name="cfdp_entity")
    with tempfile.TemporaryDirectory() as directory:
        packets = pdus(Path(directory) / "file")
        receiver = entity["Receiver"](Path(directory), 5.0, state=Path(directory) / "state")
        list(receiver.datagram(packets[0]))
        began = time.monotonic()
        for packet in packets[1:]:
            list(receiver.datagram(packet))
            list(receiver.tick())
        took_s = time.monotonic() - began
        received = receiver.offset
        receiver.files.close()
    bits = 8 * sum(len(packet) + OVERHEAD_BYTES for packet in packets[1:])
    assert received == PACKETS * 1383, f"only {received} bytes arrived"
    print(json.dumps({"measure": "cfdp_receiver_rate", "value": bits / took_s, "unit": "bit/s"}))


if __name__ == "__main__":
    main(sys.argv[1])
