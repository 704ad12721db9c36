"""Korad KA3005P and its Tenma, Velleman and RND twins: no terminator, replies of fixed length, 80 ms between messages.

Nothing protects over remote that could be read back: `OVP1` and `OCP1` are flags without a query, their threshold is
the set point, and bits of the status byte differ between the twins. They count as missing, and nobody should let this
supply be the only protection of a board. There is no error queue either: only the read-back tells.
"""

from __future__ import annotations

from hil.drivers.dialects.base import Capabilities, Dialect, Reply, channel, channels, manual, table

#: Channel 1 regulates voltage (bit 0), the output is on (bit 6).
_CV, _OUTPUT = 0x01, 0x40
_FIVE = Reply("numbers", length=5)

_KA3005P = Capabilities(
    model="KA3005P",
    channels=channels(channel(31.0, 5.1, v_step=0.01, a_step=0.001)),
    ovp=False,
    ocp=False,
    command_s=0.09,
    source="unverified",
)

KORAD_KA3005P = Dialect(
    name="korad-ka3005p",
    title="Korad KA3005P and Tenma 72-2540",
    terminator="",
    on="1",
    off="0",
    baud=9600,
    min_gap_s=0.08,
    errors="none",
    models=((r"KA3005P|72-2540|VELLEMANPS3005D|KA3005D", _KA3005P),),
    commands=table(
        {
            "identify": manual("*IDN?", Reply(length=-1)),
            "set_voltage": manual("VSET{ch}:{volts:05.2f}"),
            "set_current": manual("ISET{ch}:{amps:.3f}"),
            "get_voltage": manual("VSET{ch}?", _FIVE),
            "get_current": manual("ISET{ch}?", Reply("numbers", length=5, stray=1)),
            "set_output": manual("OUT{state}"),  # 1 is on, not a channel
            "get_output": manual("STATUS?", Reply("byte", masks=(_OUTPUT,), length=1)),
            "measure_voltage": manual("VOUT{ch}?", _FIVE),
            "measure_current": manual("IOUT{ch}?", _FIVE),
            "regulation": manual("STATUS?", Reply("byte", words=((_CV, "CV"), (0, "CC")), length=1)),
        }
    ),
)
