"""Ground track on a world map as inline SVG: equirectangular, as wide as the time plots below it.

The land is `coastlines.txt`: one ring a line, points as longitude,latitude in degrees. Facts: Natural Earth 1:110 m (in
the public domain), simplified to 0.3 degrees.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from hil.campaign.page import text
from hil.campaign.plot import LEFT, LETTER, RIGHT, WIDTH
from hil.mission import faults, frames
from hil.mission.frames import Floats, Station
from hil.mission.orbit import Ephemeris
from hil.mission.timeline import Timeline

EARTH_KM = 6371.0
STEP_S = 20.0
_SCALE = (WIDTH - LEFT - RIGHT) / 360.0  # pixels per degree
_TOP = 22.0
_HEIGHT = _TOP + 180.0 * _SCALE + 20.0


@dataclass(frozen=True, slots=True)
class _Track:
    latitude_deg: Floats
    longitude_deg: Floats
    kind: tuple[str, ...]
    """Of each piece between two points: t-contact, t-dark or t-sun."""


def world(timeline: Timeline, start_s: float, end_s: float) -> str:
    """The map with the ground track of [start_s, end_s] and each station's circle in which it hears the satellite."""
    ephemeris = Ephemeris(timeline.environment.orbit, timeline.start)
    t_s = np.linspace(start_s, end_s, max(int((end_s - start_s) / STEP_S), 2) + 1)
    latitude, longitude, altitude_m = frames.geodetic(ephemeris.itrf_m(t_s))
    track = _Track(latitude, longitude, tuple(_kinds(timeline, t_s)))
    stations = timeline.environment.stations
    height_km = float(np.mean(altitude_m)) / 1e3
    box = f'x="{LEFT:g}" y="{_TOP:g}" width="{360 * _SCALE:.1f}" height="{180 * _SCALE:.1f}"'
    return "".join(
        [
            f'<svg class="plot map" viewBox="0 0 {WIDTH:g} {_HEIGHT:g}" role="img" aria-label="Ground track">',
            f"<desc>{html.escape(', '.join(station.name for station in stations))}</desc>",
            f'<text class="title" x="{LEFT:g}" y="13">Ground track</text>{_key()}',
            f'<clipPath id="earth"><rect {box}/></clipPath><rect class="sea" {box}/><g clip-path="url(#earth)">',
            f'<path class="land" d="{_land()}"/>{_graticule()}{_anomaly()}',
            *(f'<path class="heard" d="{_path(_footprint(item, height_km))}"/>' for item in stations),
            *(f'<path class="{kind}" d="{_drawn(track, kind)}"/>' for kind in ("t-sun", "t-dark", "t-contact")),
            f'<circle class="craft" cx="{_x(longitude[0]):.1f}" cy="{_y(latitude[0]):.1f}" r="4"/>',
            f"</g>{''.join(_marks(stations))}{''.join(_degrees())}</svg>",
        ]
    )


def _kinds(timeline: Timeline, t_s: Floats) -> Iterator[str]:
    middle = (t_s[:-1] + t_s[1:]) / 2
    sunlit = np.interp(middle, timeline.t_s, timeline.sunlit_fraction)
    for now_s, light in zip(middle.tolist(), sunlit.tolist(), strict=True):
        # a window of the link belongs to no station: nothing on the ground hears the satellite there
        contact = timeline.contact_at(now_s) if len(timeline.contact_t_s) else None
        yield "t-contact" if contact is not None else "t-dark" if light < 0.5 else "t-sun"


def _x(longitude_deg: float) -> float:
    return LEFT + (longitude_deg + 180.0) * _SCALE


def _y(latitude_deg: float) -> float:
    return _TOP + (90.0 - latitude_deg) * _SCALE


def _land() -> str:
    rings = []
    for line in text("coastlines.txt").splitlines():
        points = (tuple(map(float, point.split(","))) for point in line.split())
        rings.append("M" + "L".join(f"{_x(east):.1f} {_y(north):.1f}" for east, north in points) + "Z")
    return "".join(rings)


def _graticule() -> str:
    meridians = "".join(f"M{_x(east):.1f} {_y(90):.1f}V{_y(-90):.1f}" for east in range(-150, 180, 30))
    parallels = "".join(f"M{_x(-180):.1f} {_y(north):.1f}H{_x(180):.1f}" for north in range(-60, 90, 30))
    return f'<path class="graticule" d="{meridians}{parallels}"/>'


def _degrees() -> Iterator[str]:
    for east in range(-180, 181, 60):
        side = "E" if 0 < east < 180 else "W" if -180 < east < 0 else ""
        yield f'<text class="tick mid" x="{_x(east):.1f}" y="{_HEIGHT - 5:.1f}">{abs(east)}°{side}</text>'
    for north in range(-60, 61, 30):
        side = "N" if north > 0 else "S" if north < 0 else ""
        yield f'<text class="tick end" x="{LEFT - 7:g}" y="{_y(north) + 3.5:.1f}">{abs(north)}°{side}</text>'


def _anomaly() -> str:
    east, north = faults.SAA_LONGITUDE_DEG, faults.SAA_LATITUDE_DEG
    width, height = faults.SAA_HALF_WIDTH_DEG * _SCALE, faults.SAA_HALF_HEIGHT_DEG * _SCALE
    return (
        f'<ellipse class="saa" cx="{_x(east):.1f}" cy="{_y(north):.1f}" rx="{width:.1f}" ry="{height:.1f}"/>'
        f'<text class="saa-name" x="{_x(east):.1f}" y="{_y(north) + height - 7:.1f}">South Atlantic Anomaly, '
        "modelled</text>"
    )


def _footprint(station: Station, height_km: float) -> tuple[Floats, Floats]:
    """Where the satellite is above the station's mask, a sphere of `height_km` taken for the orbit."""
    mask = math.radians(station.mask_deg)
    radius = math.acos(EARTH_KM * math.cos(mask) / (EARTH_KM + height_km)) - mask
    azimuth = np.radians(np.arange(0.0, 361.0, 3.0))
    north, east = math.radians(station.latitude_deg), math.radians(station.longitude_deg)
    latitude = np.arcsin(math.sin(north) * math.cos(radius) + math.cos(north) * math.sin(radius) * np.cos(azimuth))
    across = np.arctan2(
        np.sin(azimuth) * math.sin(radius) * math.cos(north), math.cos(radius) - math.sin(north) * np.sin(latitude)
    )
    longitude = (np.degrees(east + across) + 180.0) % 360.0 - 180.0
    return np.degrees(latitude), longitude


def _path(points: tuple[Floats, Floats]) -> str:
    """A line through latitudes and longitudes, lifted where it passes the date line."""
    return "".join(_pieces(*points, [True] * (len(points[0]) - 1)))


def _drawn(track: _Track, kind: str) -> str:
    return "".join(_pieces(track.latitude_deg, track.longitude_deg, [own == kind for own in track.kind]))


def _pieces(latitude: Floats, longitude: Floats, drawn: Sequence[bool]) -> Iterator[str]:
    """The pieces between points that are drawn; one over the date line is drawn twice, leaving and coming in."""
    pen_down = False
    for index, wanted in enumerate(drawn):
        if not wanted:
            pen_down = False
            continue
        east, north = float(longitude[index]), float(latitude[index])
        to_east, to_north = float(longitude[index + 1]), float(latitude[index + 1])
        if not pen_down:
            yield f"M{_x(east):.1f} {_y(north):.1f}"
        turn = 360.0 if to_east - east < -180 else -360.0 if to_east - east > 180 else 0.0
        yield f"L{_x(to_east + turn):.1f} {_y(to_north):.1f}"
        if turn:
            yield f"M{_x(east - turn):.1f} {_y(north):.1f}L{_x(to_east):.1f} {_y(to_north):.1f}"
        pen_down = True


def _marks(stations: Iterable[Station]) -> Iterator[str]:
    """A dot and a name each; a name goes where no other is, if there is such a place."""
    taken: list[tuple[float, float, float, float]] = []
    for station in stations:
        east = (station.longitude_deg + 180.0) % 360.0 - 180.0
        x, y, width = _x(east), _y(station.latitude_deg), LETTER * len(station.name)
        places = ((x + 7, y + 4, 0.0), (x - 7, y + 4, 1.0), (x, y - 8, 0.5), (x, y + 16, 0.5))
        boxes = [(at - share * width, low - 11, at + (1 - share) * width, low + 2) for at, low, share in places]
        inside = [box[0] >= LEFT and box[2] <= WIDTH - RIGHT for box in boxes]
        at = next((i for i, box in enumerate(boxes) if inside[i] and not _hits(box, taken)), inside.index(True))
        taken += [boxes[at], (x - 4, y - 4, x + 4, y + 4)]
        name = html.escape(station.name)
        yield f'<circle class="station" cx="{x:.1f}" cy="{y:.1f}" r="3.4"/>'
        name_x, name_y, share = places[at]
        anchor = {0.0: "start", 0.5: "mid", 1.0: "end"}[share]
        yield f'<text class="named {anchor}" x="{name_x:.1f}" y="{name_y:.1f}">{name}</text>'


def _hits(box: tuple[float, float, float, float], taken: Iterable[tuple[float, float, float, float]]) -> bool:
    left, top, right, bottom = box
    return any(left < other[2] and other[0] < right and top < other[3] and other[1] < bottom for other in taken)


def _key() -> str:
    out, x = [], WIDTH - RIGHT
    keys = (("heard", "station hears"), ("t-contact", "in contact"), ("t-dark", "eclipse"), ("t-sun", "sunlight"))
    for kind, label in keys:
        out.append(f'<text class="key end" x="{x:.1f}" y="13">{label}</text>')
        x -= LETTER * len(label)
        out.append(f'<path class="{kind}" d="M{x - 28:.1f} 9.5H{x - 8:.1f}"/>')
        x -= 44
    return "".join(out)
