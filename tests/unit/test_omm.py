"""CCSDS 502 messages as the catalogues write them: the same orbit as the TLE's, and every nonsense refused by field."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hil.errors import UsageError
from hil.mission.orbit import Ephemeris, Orbit

TLE = (Path(__file__).parents[2] / "fixtures" / "tle" / "starcloud1_flown_epoch_2026-07-26.tle").read_text()
# The same elements as the TLE, in the forms of the two public catalogues: numbers in one, text in the other.
PLAIN: dict[str, Any] = {
    "OBJECT_NAME": "STARCLOUD-1",
    "OBJECT_ID": "2025-248L",
    "EPOCH": "2026-07-26T03:50:49.227072",
    "MEAN_MOTION": 15.2165207,
    "ECCENTRICITY": 0.0006321,
    "INCLINATION": 45.3997,
    "RA_OF_ASC_NODE": 271.0639,
    "ARG_OF_PERICENTER": 268.115,
    "MEAN_ANOMALY": 91.9012,
    "EPHEMERIS_TYPE": 0,
    "CLASSIFICATION_TYPE": "U",
    "NORAD_CAT_ID": 66303,
    "ELEMENT_SET_NO": 999,
    "REV_AT_EPOCH": 4047,
    "BSTAR": 0.00022976,
    "MEAN_MOTION_DOT": 5.005e-05,
    "MEAN_MOTION_DDOT": 0,
}
META = {
    "CCSDS_OMM_VERS": "3.0",
    "CREATION_DATE": "2026-07-26T08:00:00",
    "ORIGINATOR": "SOMEBODY",
    "CENTER_NAME": "EARTH",
    "REF_FRAME": "TEME",
    "TIME_SYSTEM": "UTC",
    "MEAN_ELEMENT_THEORY": "SGP4",
}
TEXT = {key: str(value) for key, value in {**META, **PLAIN}.items()} | {"DECAY_DATE": None, "SEMIMAJOR_AXIS": "6877.9"}


def as_xml(fields: dict[str, Any], *, prefix: str = "") -> str:
    meta = ("OBJECT_NAME", "OBJECT_ID", "CENTER_NAME", "REF_FRAME", "TIME_SYSTEM", "MEAN_ELEMENT_THEORY")
    tle = ("EPHEMERIS_TYPE", "CLASSIFICATION_TYPE", "NORAD_CAT_ID", "ELEMENT_SET_NO", "REV_AT_EPOCH", "BSTAR")

    def block(tag: str, keys: tuple[str, ...]) -> str:
        rows = "".join(f"<{key}>{fields[key]}</{key}>\n" for key in keys if key in fields)
        return f"<{tag}>\n{rows}</{tag}>\n"

    mean = (
        "EPOCH",
        "MEAN_MOTION",
        "ECCENTRICITY",
        "INCLINATION",
        "RA_OF_ASC_NODE",
        "ARG_OF_PERICENTER",
        "MEAN_ANOMALY",
    )
    return (
        '<?xml version="1.0" encoding="UTF-8"?>\n<ndm xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance">\n'
        f'<omm id="CCSDS_OMM_VERS" version="3.0">\n{prefix}<header><CREATION_DATE/><ORIGINATOR/></header>\n'
        f"<body><segment>\n{block('metadata', meta)}<data>\n{block('meanElements', mean)}{block('tleParameters', tle)}"
        "</data></segment></body></omm></ndm>\n"
    )


@pytest.mark.parametrize(
    "text",
    [
        json.dumps([PLAIN]),
        json.dumps(PLAIN, indent=2),
        json.dumps([TEXT]),
        "\ufeff" + json.dumps([PLAIN]),
        as_xml({**META, **PLAIN}),
        json.dumps({**PLAIN, "EPOCH": "2026-207T03:50:49.227072Z"}),
    ],
    ids=["numbers", "one object", "text", "byte order mark", "xml", "day of year"],
)
def test_every_form_is_the_orbit_of_the_tle(text: str) -> None:
    ours, theirs = Orbit.from_omm(text), Orbit.from_tle(TLE)
    assert ours.name == "STARCLOUD-1"
    assert ours.epoch == datetime(2026, 7, 26, 3, 50, 49, 227_072, tzinfo=UTC)
    start = datetime(2026, 7, 27, tzinfo=UTC)
    t_s = np.linspace(0, 86_400, 50)
    apart = Ephemeris(ours, start).teme_km(t_s)[0] - Ephemeris(theirs, start).teme_km(t_s)[0]
    assert np.abs(apart).max() < 1e-6  # km
    assert Orbit.from_dict(ours.as_dict()) == ours


def test_elements_age_as_those_of_a_tle_do() -> None:
    orbit = Orbit.from_omm(json.dumps(PLAIN))
    (caution,) = orbit.warnings(datetime(2026, 8, 26, tzinfo=UTC))
    assert "30.8 days old" in caution.message


def test_digits_beyond_a_tle_are_kept() -> None:
    """Neighbours 100 m apart in a formation differ by e = 7.1e-5 and less; a TLE rounds e to 1e-7: 0.7 m of 6,878 km,
    and angles to 1e-4 deg: 12 m."""
    plain = Orbit.from_omm(json.dumps(PLAIN))
    near = Orbit.from_omm(json.dumps({**PLAIN, "ECCENTRICITY": 0.00063210004, "MEAN_ANOMALY": 91.90121234567}))
    assert (near.eccentricity, near.mean_anomaly_deg) == (0.00063210004, 91.90121234567)
    t_s = np.linspace(0, 6_000, 30)
    apart_m = 1e3 * np.linalg.norm(
        Ephemeris(near, plain.epoch).teme_km(t_s)[0] - Ephemeris(plain, plain.epoch).teme_km(t_s)[0], axis=1
    )
    along_m = np.radians(0.00001234567) * 6_878e3
    assert apart_m == pytest.approx(along_m, abs=1.0)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"MEAN_MOTION": None}, "MEAN_MOTION is missing"),
        ({"MEAN_MOTION": None, "SEMI_MAJOR_AXIS": 6878}, "another theory"),
        ({"EPOCH": None}, "EPOCH is missing"),
        ({"EPOCH": "yesterday"}, "EPOCH is 'yesterday'"),
        ({"EPOCH": "2026-400T00:00:00"}, "EPOCH"),
        ({"ECCENTRICITY": 1.2}, "hyperbolic"),
        ({"ECCENTRICITY": 0.3}, "below ground"),
        ({"MEAN_MOTION": 16.8}, "decayed"),
        ({"MEAN_MOTION": 99}, "MEAN_MOTION is 99"),
        ({"INCLINATION": 181}, "INCLINATION is 181"),
        ({"INCLINATION": "many"}, "INCLINATION is 'many'"),
        ({"INCLINATION": True}, "INCLINATION is .?True"),
        ({"MEAN_ANOMALY": "nan"}, "MEAN_ANOMALY is 'nan'"),
        ({"REF_FRAME": "GCRF"}, "REF_FRAME"),
        ({"TIME_SYSTEM": "TAI"}, "TIME_SYSTEM"),
        ({"CENTER_NAME": "MARS"}, "CENTER_NAME"),
        ({"MEAN_ELEMENT_THEORY": "DSST"}, "MEAN_ELEMENT_THEORY"),
        ({"EPHEMERIS_TYPE": 4}, "EPHEMERIS_TYPE"),
        ({"DECAY_DATE": "2026-08-01"}, "has decayed"),
    ],
)
def test_nonsense_is_refused_with_file_and_field(change: dict[str, Any], says: str) -> None:
    fields = {key: value for key, value in {**META, **PLAIN, **change}.items() if value is not None}
    texts = [json.dumps([fields])]
    if not {"DECAY_DATE", "SEMI_MAJOR_AXIS"} & set(change):
        texts.append(as_xml(fields))
    for text in texts:
        with pytest.raises(UsageError, match=says) as caught:
            Orbit.from_omm(text, source="sat.omm")
        assert caught.value.message.startswith("sat.omm: ")
        assert caught.value.hint


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "neither XML nor JSON"),
        ("[]", "expected one satellite, found 0"),
        (json.dumps([PLAIN, PLAIN]), "found 2"),
        ("[7]", "not an OMM"),
        ('{\n"EPOCH": ,}', "sat.omm:2: "),
        ("<ndm>\n<omm></ndm>", "sat.omm:2: not valid XML"),
        ("<ndm/>", "found 0"),
        ('<!DOCTYPE x [<!ENTITY a "b">]><ndm/>', "DOCTYPE"),
        (TLE, "neither XML nor JSON"),
    ],
)
def test_what_is_no_message_is_refused(text: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        Orbit.from_omm(text, source="sat.omm")
