"""The routing decision, by tables and by properties."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from src.common.config import ConfigError, parse_config
from src.orchestrator.ports import VoiceRequest
from src.orchestrator.routing import Preload, WorkerView, decide
from src.orchestrator.routing_policy import ModePolicy, RoutingPolicy, load_policy
from src.rpc.announcement import (
    Announcement,
    Audio,
    Capabilities,
    Hardware,
    ModelEntry,
    WorkerMetrics,
)
from src.rpc.errors import DuplexError, Exhausted, InvalidArgument, Unavailable, UnknownName

ROUTING_YAML = Path(__file__).parents[2] / "configs" / "routing.yaml"
NOW = 10_000.0

PIPER = ModelEntry(
    model_id="piper-joe",
    family="piper",
    languages=["en-US"],
    voices=["joe"],
    tags=["low-jitter"],
    cpu_ok=True,
)
ESPEAK = ModelEntry(
    model_id="espeak-any", family="espeak", languages=["en", "de", "fr"], cpu_ok=True
)
COSY = ModelEntry(
    model_id="cosyvoice2-en-base",
    family="cosyvoice2",
    languages=["en", "zh"],
    voices=["seed"],
    tags=["expressive", "low-jitter"],
    needs_gpu=True,
)
SESAME = ModelEntry(
    model_id="sesame-lora01", family="sesame", languages=["en"], tags=["expressive"], lora=True
)


def worker(
    name: str = "w",
    *models: ModelEntry,
    resident: list[str] | None = None,
    queue_depth: int = 0,
    sessions: int = 0,
    p50: float = 0.0,
    local: dict[str, Any] | None = None,
    **fields: Any,
) -> WorkerView:
    entries = list(models) or [PIPER]
    announcement = Announcement(
        name=name,
        addr=f"grpc://{name}:7001",
        models=entries,
        resident_models=[entries[0].model_id] if resident is None else resident,
        default_model=fields.pop("default_model", entries[0].model_id),
        metrics=WorkerMetrics(queue_depth=queue_depth, sessions=sessions, first_audio_p50_ms=p50),
        **fields,
    )
    return WorkerView(announcement, **(local or {}))


def ask(**fields: Any) -> VoiceRequest:
    return VoiceRequest("s1", **fields)


def policy(**mode: Any) -> RoutingPolicy:
    return RoutingPolicy(routing={"default": ModePolicy(**mode)})


def chosen(views: list[WorkerView], request: VoiceRequest | None = None, **mode: Any) -> str:
    decision = decide(request or ask(), views, policy(**mode), NOW)
    return f"{decision.worker}/{decision.model_id}"


# --- choosing among workers ---


@pytest.mark.parametrize(
    ("better", "worse"),
    [
        ({}, {"queue_depth": 1}),
        ({"queue_depth": 1, "p50": 900}, {"queue_depth": 2, "p50": 10}),
        ({"p50": 40}, {"p50": 80}),
        ({"p50": 40, "sessions": 9}, {"p50": 80, "sessions": 0}),
        ({"sessions": 1}, {"sessions": 2}),
        ({"p50": 30, "sessions": 1}, {"p50": 26, "sessions": 2}),
        ({"p50": 0, "sessions": 1}, {"p50": 60, "sessions": 0}),
        ({"queue_depth": 1}, {"local": {"unseen": 2}}),
        ({"queue_depth": 5}, {"resident": []}),
        ({"queue_depth": 5, "sessions": 9}, {"local": {"avoid_until_ms": NOW + 1}}),
        ({"queue_depth": 5}, {"capabilities": Capabilities(fallback=True)}),
    ],
    ids=str,
)
def test_the_better_worker_wins_whatever_its_name(
    better: dict[str, Any], worse: dict[str, Any]
) -> None:
    for names in (("a", "b"), ("b", "a")):
        views = [worker(names[0], **better), worker(names[1], **worse)]
        assert decide(ask(), views, policy(), NOW).worker == names[0]


def test_an_avoided_worker_is_still_better_than_none() -> None:
    view = worker("only", local={"avoid_until_ms": NOW + 500})
    assert decide(ask(), [view], policy(), NOW).worker == "only"


def test_avoidance_ends() -> None:
    views = [worker("a", local={"avoid_until_ms": NOW}), worker("b", queue_depth=1)]
    assert decide(ask(), views, policy(), NOW).worker == "a"


def test_decisions_within_one_heartbeat_spread() -> None:
    counts = {"a": 0, "b": 0, "c": 0}
    for _ in range(9):
        views = [
            worker(name, p50=p50, local={"unseen": counts[name], "open_here": counts[name]})
            for name, p50 in (("a", 20), ("b", 300), ("c", 90))
        ]
        counts[decide(ask(), views, policy(), NOW).worker] += 1
    assert counts == {"a": 3, "b": 3, "c": 3}


# --- choosing among models ---


def test_without_wishes_the_workers_default_model_speaks() -> None:
    both = worker(
        "w", ESPEAK, PIPER, resident=["piper-joe", "espeak-any"], default_model="piper-joe"
    )
    assert chosen([both]) == "w/piper-joe"


def test_liked_tags_come_before_the_order_of_fallbacks() -> None:
    views = [worker("p", PIPER), worker("c", COSY)]
    assert chosen(views, prefer_tags=["expressive"], fallbacks=["piper"]) == "c/cosyvoice2-en-base"
    assert chosen(views, fallbacks=["piper"]) == "p/piper-joe"
    assert chosen(views, fallbacks=["cosyvoice2", "piper"]) == "c/cosyvoice2-en-base"


def test_a_fallback_may_be_the_beginning_of_a_model_id() -> None:
    views = [worker("a", PIPER), worker("z", COSY.model_copy(update={"family": ""}))]
    assert chosen(views, fallbacks=["cosyvoice2-en"]) == "z/cosyvoice2-en-base"
    assert chosen(views, fallbacks=["cosyvoice2-e"]) == "a/piper-joe"


def test_resident_goes_first_only_where_the_mode_says_so() -> None:
    views = [worker("w", PIPER, COSY)]
    assert chosen(views, fallbacks=["cosyvoice2"]) == "w/piper-joe"
    assert chosen(views, fallbacks=["cosyvoice2"], prefer_resident=False) == "w/cosyvoice2-en-base"


def test_the_preferred_cold_model_is_loaded_for_later_where_the_mode_says_so() -> None:
    views = [worker("w", PIPER, COSY)]
    decision = decide(ask(), views, policy(fallbacks=["cosyvoice2"], preload_preferred=True), NOW)
    assert decision.model_id == "piper-joe"
    assert not decision.substitute
    assert decision.preload == Preload("w", "w:7001", "cosyvoice2-en-base")
    assert decide(ask(), views, policy(fallbacks=["cosyvoice2"]), NOW).preload is None


def test_nothing_is_preloaded_when_the_preferred_model_is_resident_but_full() -> None:
    views = [worker("c", COSY, max_sessions=1, sessions=1), worker("w", PIPER, COSY)]
    liked = policy(fallbacks=["cosyvoice2"], preload_preferred=True)
    decision = decide(ask(), views, liked, NOW)
    assert (decision.model_id, decision.preload) == ("piper-joe", None)


@pytest.mark.parametrize(
    ("language", "expected"),
    [
        ("en-US", "p/piper-joe"),
        ("EN_us", "p/piper-joe"),
        ("en", "e/espeak-any"),
        ("de-AT", "e/espeak-any"),
        ("zh", "c/cosyvoice2-en-base"),
    ],
)
def test_language(language: str, expected: str) -> None:
    views = [worker("p", PIPER), worker("e", ESPEAK), worker("c", COSY, queue_depth=1)]
    assert chosen(views, ask(language=language)) == expected


def test_a_model_that_lists_no_language_is_the_last_resort() -> None:
    silent = worker("a", ModelEntry(model_id="any", family="x"))
    assert chosen([silent, worker("p", PIPER)], ask(language="en-US")) == "p/piper-joe"
    assert chosen([silent, worker("p", PIPER)], ask(language="sw")) == "a/any"


@pytest.mark.parametrize(
    ("mode", "expected"),
    [("default", "c/cosyvoice2-en-base"), ("edge", "p/piper-joe"), ("lora", "s/sesame-lora01")],
)
def test_modes_of_the_shipped_policy(mode: str, expected: str) -> None:
    views = [worker("p", PIPER), worker("c", COSY), worker("s", SESAME), worker("e", ESPEAK)]
    decision = decide(ask(mode=mode), views, load_policy(ROUTING_YAML), NOW)
    assert f"{decision.worker}/{decision.model_id}" == expected


def test_requirements_reach_worker_flags_and_tags() -> None:
    plain = worker("a", PIPER)
    cloning = worker(
        "b", COSY, capabilities=Capabilities(zero_shot=True), hardware=Hardware(gpu=True)
    )
    assert chosen([plain, cloning], require=["zero_shot", "gpu", "expressive"]).startswith("b/")


def test_a_record_with_residents_only_is_enough() -> None:
    """The announcement as the design document prints it, without a list of models."""
    bare = Announcement(
        name="tts-cosyvoice2@0",
        addr="grpc://tts-cosy:7002",
        capabilities=Capabilities(languages=["en", "zh"], cpu_ok=True),
        resident_models=["cosyvoice2-en-base"],
    )
    edge = policy(require=["cpu_ok"], fallbacks=["cosyvoice2"])
    decision = decide(ask(language="zh"), [WorkerView(bare)], edge, NOW)
    assert decision.target == "tts-cosy:7002"
    assert decision.model_id == "cosyvoice2-en-base"
    assert decision.resident


# --- a session that names its model ---


def test_a_named_model_is_taken_where_it_is_resident() -> None:
    views = [worker("a", PIPER, COSY), worker("b", COSY, queue_depth=7)]
    assert chosen(views, ask(model="cosyvoice2-en-base")) == "b/cosyvoice2-en-base"


def test_a_family_name_will_do() -> None:
    assert chosen([worker("w", PIPER, ESPEAK)], ask(model="espeak")) == "w/espeak-any"


def test_a_named_cold_model_is_waited_for() -> None:
    decision = decide(ask(model="espeak-any"), [worker("w", PIPER, ESPEAK)], policy(), NOW)
    assert decision.model_id == "espeak-any"
    assert not decision.resident
    assert decision.preload is None


def test_a_named_cold_model_is_stood_in_for_where_the_mode_says_so() -> None:
    views = [worker("w", PIPER, COSY), worker("v", ESPEAK)]
    request = ask(model="cosyvoice2-en-base", voice="seed", language="en-US")
    decision = decide(request, views, policy(serve_while_loading=True), NOW)
    assert decision.model_id == "piper-joe"
    assert decision.substitute
    assert decision.voice == ""
    assert decision.preload == Preload("w", "w:7001", "cosyvoice2-en-base")


def test_no_stand_in_of_another_language_or_outside_the_mode() -> None:
    views = [worker("w", PIPER, COSY)]
    waiting = policy(serve_while_loading=True)
    request = ask(model="cosyvoice2-en-base", language="zh")
    assert decide(request, views, waiting, NOW).model_id == "cosyvoice2-en-base"
    strict = policy(serve_while_loading=True, require=["expressive"])
    request = ask(model="cosyvoice2-en-base")
    assert decide(request, views, strict, NOW).model_id == "cosyvoice2-en-base"


def test_a_voice_chooses_its_model() -> None:
    views = [worker("p", PIPER), worker("c", COSY, queue_depth=4)]
    decision = decide(ask(voice="seed"), views, policy(), NOW)
    assert (decision.worker, decision.voice) == ("c", "seed")


def test_a_voice_nobody_lists_goes_to_a_model_that_lists_none() -> None:
    views = [worker("p", PIPER), worker("e", ESPEAK)]
    assert chosen(views, ask(voice="en-us+f2")) == "e/espeak-any"


def test_no_model_is_loaded_on_the_chance_that_it_knows_an_unknown_voice() -> None:
    views = [worker("p", PIPER, ESPEAK, resident=["piper-joe"])]
    with pytest.raises(UnknownName, match="unknown voice 'joo'; did you mean 'joe'"):
        decide(ask(voice="joo"), views, policy(), NOW)
    assert chosen(views, ask(model="espeak-any", voice="en-us+f2")) == "p/espeak-any"


# --- errors ---


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (ask(mode="egde"), r"unknown mode 'egde'; did you mean 'edge'\?"),
        (ask(model="piper-jo"), r"unknown model 'piper-jo'; did you mean 'piper-joe'\?"),
        (ask(language="xx"), r"unknown language 'xx'; known: en-US"),
        (ask(voice="jo"), r"unknown voice 'jo'; did you mean 'joe'\?"),
    ],
)
def test_unknown_names_say_the_nearest(request_: VoiceRequest, message: str) -> None:
    both = RoutingPolicy(routing={"default": ModePolicy(), "edge": ModePolicy()})
    with pytest.raises(UnknownName, match=message):
        decide(request_, [worker()], both, NOW)


def test_names_are_judged_before_availability() -> None:
    """A model that is only on a draining worker is known."""
    with pytest.raises(Unavailable, match="w is draining"):
        decide(ask(model="piper-joe"), [worker(draining=True)], policy(), NOW)
    with pytest.raises(UnknownName):
        decide(ask(model="melody"), [worker(draining=True)], policy(), NOW)


def test_no_worker_at_all_says_what_to_start() -> None:
    with pytest.raises(Unavailable, match="just run-tts-piper"):
        decide(ask(), [], policy(), NOW)


def test_a_worker_at_another_rate_is_skipped() -> None:
    odd = worker("odd", audio=Audio(sr=24_000))
    assert chosen([odd, worker("w", queue_depth=9)]) == "w/piper-joe"
    with pytest.raises(Unavailable, match="odd speaks 24000 Hz in 20 ms frames"):
        decide(ask(), [odd], policy(), NOW)


@pytest.mark.parametrize(
    "view",
    [
        worker(sessions=2, max_sessions=2),
        worker(max_sessions=2, local={"open_here": 2}),
    ],
)
def test_full_is_exhausted_with_a_time_to_come_back(view: WorkerView) -> None:
    with pytest.raises(Exhausted) as caught:
        decide(ask(), [view], policy(), NOW)
    assert caught.value.retry_after_ms == 1_000


def test_a_full_worker_is_passed_over() -> None:
    views = [worker("full", sessions=1, max_sessions=1), worker("free", queue_depth=9)]
    assert chosen(views) == "free/piper-joe"


def test_no_limit_announced_is_no_limit() -> None:
    assert chosen([worker(sessions=500, max_sessions=0)]) == "w/piper-joe"


def test_excluded_workers_are_not_asked_again() -> None:
    views = [worker("a"), worker("b", queue_depth=9)]
    assert decide(ask(), views, policy(), NOW, exclude={"a"}).worker == "b"
    with pytest.raises(Unavailable, match="has just failed"):
        decide(ask(), views, policy(), NOW, exclude={"a", "b"})


def test_a_named_model_outside_the_mode_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="is not lora, which mode 'default' requires"):
        decide(ask(model="piper-joe"), [worker()], policy(require=["lora"]), NOW)


def test_a_requirement_nobody_meets_names_the_nearest() -> None:
    with pytest.raises(Unavailable, match=r"did you mean 'cpu_ok'\?"):
        decide(ask(), [worker()], policy(require=["cpu_okay"]), NOW)


# --- the policy file ---


def test_the_shipped_file_shows_the_defaults() -> None:
    shipped = load_policy(ROUTING_YAML)
    plain = RoutingPolicy()
    assert shipped.audio == plain.audio
    assert shipped.latency_step_ms == plain.latency_step_ms
    assert shipped.retry_after_ms == plain.retry_after_ms
    default = shipped.routing["default"].model_copy(update={"prefer_tags": [], "fallbacks": []})
    assert default == plain.mode("default")


def test_an_unknown_key_in_a_mode_names_the_nearest() -> None:
    raw = {"routing": {"edge": {"requires": ["cpu_ok"]}}}
    with pytest.raises(ConfigError, match=r"routing\.edge\.requires.*did you mean 'require'"):
        parse_config(raw, RoutingPolicy, where="routing.yaml")


# --- properties ---

_entries = st.sampled_from([PIPER, ESPEAK, COSY, SESAME])


@st.composite
def fleets(draw: st.DrawFn) -> list[WorkerView]:
    def one(index: int) -> WorkerView:
        models = draw(st.lists(_entries, min_size=1, max_size=4, unique_by=lambda m: m.model_id))
        resident = draw(st.lists(st.sampled_from([m.model_id for m in models]), unique=True))
        return worker(
            f"w{index}",
            *models,
            resident=resident,
            queue_depth=draw(st.integers(0, 3)),
            sessions=draw(st.integers(0, 3)),
            p50=draw(st.sampled_from([0.0, 20.0, 30.0, 80.0])),
            max_sessions=draw(st.integers(0, 4)),
            draining=draw(st.booleans()),
            audio=Audio(sr=draw(st.sampled_from([48_000, 48_000, 24_000]))),
            local={
                "unseen": draw(st.integers(0, 2)),
                "open_here": draw(st.integers(0, 3)),
                "avoid_until_ms": draw(st.sampled_from([0.0, NOW + 1])),
            },
        )

    return [one(index) for index in range(draw(st.integers(0, 4)))]


requests = st.builds(
    VoiceRequest,
    session_id=st.just("s"),
    mode=st.sampled_from(["default", "edge", "lora"]),
    model=st.sampled_from(["", "", "piper-joe", "espeak", "cosyvoice2-en-base"]),
    voice=st.sampled_from(["", "", "joe", "seed"]),
    language=st.sampled_from(["", "", "en", "en-US", "zh", "de"]),
)
policies = st.builds(
    lambda **flags: RoutingPolicy(
        routing={
            "default": ModePolicy(
                prefer_tags=["expressive", "low-jitter"], fallbacks=["cosyvoice2"], **flags
            ),
            "edge": ModePolicy(require=["cpu_ok"], fallbacks=["piper"], **flags),
            "lora": ModePolicy(require=["lora"], **flags),
        }
    ),
    prefer_resident=st.booleans(),
    preload_preferred=st.booleans(),
    serve_while_loading=st.booleans(),
)


def outcome(request: VoiceRequest, views: list[WorkerView], policy: RoutingPolicy) -> object:
    try:
        return decide(request, views, policy, NOW)
    except DuplexError as error:
        return type(error), str(error)


@given(requests, fleets(), policies)
def test_a_decision_is_always_one_that_can_be_served(
    request: VoiceRequest, views: list[WorkerView], policy: RoutingPolicy
) -> None:
    try:
        decision = decide(request, views, policy, NOW)
    except (UnknownName, InvalidArgument, Unavailable, Exhausted):
        return
    view = next(view for view in views if view.name == decision.worker)
    model = next(m for m in view.announcement.models if m.model_id == decision.model_id)
    assert not view.announcement.draining
    assert view.announcement.audio.sr == 48_000
    assert not view.full
    assert decision.resident == (model.model_id in view.announcement.resident_models)
    if request.mode == "edge":
        assert model.cpu_ok
    if request.mode == "lora":
        assert model.lora
    if request.language:
        assert request.language[:2] in {language[:2] for language in model.languages}
    if request.model:
        assert decision.substitute != (request.model in (model.model_id, model.family))
    if decision.substitute:
        assert policy.mode(request.mode).serve_while_loading
        assert decision.resident
        assert decision.preload is not None


@given(requests, fleets(), policies, st.randoms(use_true_random=False))
def test_the_order_of_announcements_does_not_matter(
    request: VoiceRequest, views: list[WorkerView], policy: RoutingPolicy, random: Any
) -> None:
    shuffled = random.sample(views, len(views))
    assert outcome(request, views, policy) == outcome(request, shuffled, policy)


@given(requests, fleets(), policies)
def test_a_resident_model_is_never_passed_over_for_a_cold_one(
    request: VoiceRequest, views: list[WorkerView], policy: RoutingPolicy
) -> None:
    if not policy.mode(request.mode).prefer_resident:
        return
    healthy = [dataclasses.replace(view, avoid_until_ms=0.0) for view in views]
    try:
        decision = decide(request, healthy, policy, NOW)
    except DuplexError:
        return
    if decision.resident:
        return
    for view in healthy:
        residents_only = view.announcement.model_copy(
            update={
                "models": [
                    m
                    for m in view.announcement.models
                    if m.model_id in view.announcement.resident_models
                ],
                "default_model": "",
            }
        )
        with pytest.raises(DuplexError):
            decide(request, [dataclasses.replace(view, announcement=residents_only)], policy, NOW)


@given(fleets(), policies)
def test_more_load_never_attracts(views: list[WorkerView], policy: RoutingPolicy) -> None:
    try:
        first = decide(ask(), views, policy, NOW)
    except DuplexError:
        return
    others_loaded = [
        view
        if view.name == first.worker
        else dataclasses.replace(view, unseen=view.unseen + 1, open_here=view.open_here + 1)
        for view in views
    ]
    assert decide(ask(), others_loaded, policy, NOW).worker == first.worker
