"""Whom an agent listens to, and which of two agents stays."""

from __future__ import annotations

import datetime
from types import SimpleNamespace
from typing import Any

import pytest
from livekit import rtc

from src.orchestrator.rooms.link import is_senior, is_user

Kind = rtc.ParticipantKind


def somebody(**fields: Any) -> Any:
    joined_s = fields.pop("joined_s", 0.0)
    made = {
        "identity": "user",
        "name": "",
        "sid": "PA_1",
        "kind": Kind.PARTICIPANT_KIND_STANDARD,
        "attributes": {},
        "joined_at": datetime.datetime.fromtimestamp(joined_s, datetime.timezone.utc),
    }
    return SimpleNamespace(**made | fields)


def agent(**fields: Any) -> Any:
    return somebody(kind=Kind.PARTICIPANT_KIND_AGENT, name="duplex", **fields)


@pytest.mark.parametrize(
    ("kind", "wanted", "heard"),
    [
        (Kind.PARTICIPANT_KIND_STANDARD, "", True),
        (Kind.PARTICIPANT_KIND_STANDARD, "user", True),
        (Kind.PARTICIPANT_KIND_STANDARD, "other", False),
        (Kind.PARTICIPANT_KIND_AGENT, "", False),
        (Kind.PARTICIPANT_KIND_EGRESS, "", False),
        (Kind.PARTICIPANT_KIND_SIP, "user", False),
    ],
)
def test_only_people_are_listened_to(
    kind: rtc.ParticipantKind.ValueType, wanted: str, heard: bool
) -> None:
    assert is_user(somebody(kind=kind), wanted) == heard


def test_of_two_agents_of_one_name_exactly_one_is_the_senior() -> None:
    early, late = agent(joined_s=1.0, sid="PA_2"), agent(joined_s=2.0, sid="PA_1")
    assert is_senior(early, late, "duplex")
    assert not is_senior(late, early, "duplex")
    twin = agent(joined_s=1.0, sid="PA_3")
    assert is_senior(early, twin, "duplex")
    assert not is_senior(twin, early, "duplex")


def test_others_are_not_in_our_way() -> None:
    ours = agent(joined_s=2.0)
    assert not is_senior(agent(joined_s=1.0), ours, "another")
    assert not is_senior(somebody(joined_s=1.0, name="duplex"), ours, "duplex")
    renamed = somebody(
        joined_s=1.0,
        kind=Kind.PARTICIPANT_KIND_AGENT,
        attributes={"lk.agent.name": "duplex"},
    )
    assert is_senior(renamed, ours, "duplex")
