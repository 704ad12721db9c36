"""Steps on a link whose budget opens it late and closes it early: they go by the link, not by the horizon."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from test_radio import ACM, ENVIRONMENT, ROUGH, UP

from hil.campaign import steps
from hil.errors import BenchError
from hil.mission.compile import compile_timeline
from hil.mission.radio import Channel
from hil.mission.timeline import Timeline
from hil.model import Span


class Hop:
    """A flight that jumps where it is told and whose link is up whenever the timeline's is."""

    def __init__(self, timeline: Timeline) -> None:
        self.now = 0.0
        self.timeline = timeline
        self.visited: list[float] = []
        self.flying: Any = SimpleNamespace(
            timeline=timeline,
            mission=SimpleNamespace(file=SimpleNamespace(link=SimpleNamespace(acquisition_s=10.0))),
            flight=SimpleNamespace(state=self.state),
            clock=lambda rate, cause: rate,
            go_to=self.go_to,
            wait=self.wait,
            event=lambda kind, **fields: None,
            say=lambda line: None,
        )

    def state(self) -> dict[str, Any]:
        up = not any(state.outage for state in self.timeline.link_at(self.now).values())
        return {"t_mission": self.now, "rate": 1.0, "link": {"up": up}}

    def go_to(self, t_s: float, cause: str) -> None:
        assert t_s >= self.now
        self.now = t_s
        self.visited.append(t_s)

    def wait(self, what: str, condition: Any, *, timeout_s: float, every_s: float = 0.1) -> None:
        started = self.now
        while not condition():
            self.now += every_s
            assert self.now < started + timeout_s, "waited in vain"


@pytest.fixture(scope="module")
def timeline() -> Timeline:
    return compile_timeline(ENVIRONMENT)


def test_a_contact_is_entered_when_its_budget_opens_it(timeline: Timeline) -> None:
    hop = Hop(timeline)
    late = 0
    while True:
        try:
            contact = steps.enter_contact(hop.flying)
        except BenchError as error:
            assert "no contact" in error.message  # noqa: PT017
            break
        up = steps.opening(hop.flying, contact)
        assert up.start_s - steps.LEAD_S <= hop.visited[-1] < hop.now <= up.start_s + 0.1
        assert contact.aos_s < up.start_s < up.end_s < contact.los_s
        late += up.start_s > contact.aos_s + ACM.acquisition_s + 20
    assert late >= 2


def test_contacts_whose_link_never_comes_up_are_passed_over() -> None:
    weak = compile_timeline(replace(ENVIRONMENT, link=replace(ACM, uplink=Channel(budget=replace(UP, eirp_dbw=29.0)))))
    never = [contact for contact in weak.contacts if weak.opening(contact) is None]
    assert 0 < len(never) < len(weak.contacts)
    hop = Hop(weak)
    contact = steps.next_contact(hop.flying)
    assert contact not in never
    with pytest.raises(BenchError, match="never comes up"):
        steps.opening(hop.flying, never[0])


def test_a_fixed_rate_opens_at_lock_and_closes_at_loss_of_signal() -> None:
    calm = replace(ROUGH, outages=(), random_outages=None)
    timeline = compile_timeline(replace(ENVIRONMENT, link=calm))
    for contact in timeline.contacts:
        assert timeline.opening(contact) == Span(contact.aos_s + 15.0, contact.los_s, contact.station)
        # fades do not change what the published rate is
        assert timeline.mean_rate_bps("uplink", contact.aos_s, contact.los_s) == pytest.approx(3e5, rel=1e-12)
    assert timeline.mean_rate_bps("uplink", timeline.contacts[0].los_s, timeline.contacts[1].aos_s) == 0.0


def test_the_mean_rate_of_a_ladder_is_capacity_over_time(timeline: Timeline) -> None:
    contact = timeline.contacts[2]
    mean = timeline.mean_rate_bps("downlink", contact.aos_s, contact.los_s)
    carrying_s = sum(span.duration_s for span in timeline.open_spans(contact.aos_s, contact.los_s))
    assert mean * carrying_s <= timeline.capacity_bits("downlink", contact.aos_s, contact.los_s) * (1 + 1e-9)
    rates = {
        timeline.link_at(t)["downlink"].rate_bps
        for t in timeline.downlink_step_t_s
        if contact.aos_s <= t < contact.los_s
    }
    assert min(r for r in rates if r) < mean < max(rates)
