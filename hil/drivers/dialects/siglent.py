"""Siglent SPD3303X: two channels, no protection over remote, and at least 20 ms between messages.

Its third output has a fixed voltage, neither measurement nor state over remote, and is not driven. `*SAV` within 50 ms
of another message stops the instrument until its mains are cycled: no dialogue here contains it.
"""

from __future__ import annotations

from hil.drivers.dialects.base import (
    COMMON,
    ONE,
    Capabilities,
    Dialect,
    ListLimits,
    Reply,
    bit,
    channel,
    channels,
    manual,
    table,
)


def _spd(name: str, pattern: str, step: float) -> tuple[str, Capabilities]:
    one = channel(32.0, 3.2, v_step=step, a_step=step)
    record = Capabilities(
        model=name,
        channels=channels(one, one),
        ovp=False,
        ocp=False,
        lists=ListLimits(5, 1.0, 10_000.0, 1.0, unused="it counts in whole seconds and ends with the output off"),
        command_s=0.03,
        source="unverified",
    )
    return pattern, record


SIGLENT_SPD3303X = Dialect(
    name="siglent-spd3303x",
    title="Siglent SPD3303X series",
    min_gap_s=0.02,
    models=(
        _spd("SPD3303X-E", r"^Siglent Technologies,SPD3303X-E,", 0.01),
        _spd("SPD3303X", r"^Siglent Technologies,SPD3303X,", 0.001),
    ),
    commands=table(
        COMMON,
        {
            "set_voltage": manual("CH{ch}:VOLT {v}"),
            "set_current": manual("CH{ch}:CURR {a}"),
            "get_voltage": manual("CH{ch}:VOLT?", ONE),
            "get_current": manual("CH{ch}:CURR?", ONE),
            "set_output": manual("OUTP CH{ch},{state}"),
            "get_output": manual("SYST:STAT?", bit(0x10, 0x20)),
            "get_tracking": manual("SYST:STAT?", bit(0x08)),  # bits 2 and 3: 01 independent, 10 and 11 coupled
            "measure_voltage": manual("MEAS:VOLT? CH{ch}", ONE),
            "measure_current": manual("MEAS:CURR? CH{ch}", ONE),
            "regulation": manual("SYST:STAT?", Reply("bits", masks=(0, 1), words=((1, "CC"), (0, "CV")))),
        },
    ),
)
