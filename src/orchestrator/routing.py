"""Which worker speaks with which model: one pure decision over what the registry last saw.

`decide` narrows every (worker, model) pair by what the session asked for, raising the error that
fits at the step where nothing is left, and then takes the best pair that is left. The policy comes
from `configs/routing.yaml`, which is its manual.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from src.common.names import nearest_hint
from src.orchestrator.ports import VoiceRequest
from src.orchestrator.routing_policy import ModePolicy, RoutingPolicy
from src.rpc.announcement import Announcement, ModelEntry
from src.rpc.errors import Exhausted, InvalidArgument, Unavailable, UnknownName

HOW_TO_START = "start one with `just run-tts-piper`"


@dataclass(frozen=True, slots=True)
class WorkerView:
    """A worker as it announced itself, and what this process knows better than its last heartbeat.

    `unseen`: sessions opened here since then, less those closed; `open_here`: all that are open.
    """

    announcement: Announcement
    unseen: int = 0
    open_here: int = 0
    avoid_until_ms: float = 0.0

    @property
    def name(self) -> str:
        return self.announcement.name

    @property
    def sessions(self) -> int:
        return max(self.announcement.metrics.sessions + self.unseen, self.open_here)

    @property
    def queue_depth(self) -> int:
        # What was just sent there will queue there: otherwise all decisions between two heartbeats
        # would fall on the same worker.
        return self.announcement.metrics.queue_depth + max(self.unseen, 0)

    @property
    def full(self) -> bool:
        # What was opened since is left out: it may be among the announced sessions already, and a
        # claim that is one too many is refused where it is counted exactly.
        limit = self.announcement.max_sessions
        announced = self.announcement.metrics.sessions + min(self.unseen, 0)
        return limit > 0 and max(announced, self.open_here) >= limit


@dataclass(frozen=True, slots=True)
class Preload:
    worker: str
    target: str
    model_id: str
    tls: bool = False


@dataclass(frozen=True, slots=True)
class Decision:
    """`substitute`: another model than the one that was asked for speaks, until `preload` is done.

    `voice` is empty (the model's own first voice) where the one asked for belongs to another model.
    """

    worker: str
    target: str
    model_id: str
    voice: str
    resident: bool
    reason: str
    substitute: bool = False
    preload: Preload | None = None
    tls: bool = False


@dataclass(frozen=True, slots=True)
class _Pair:
    view: WorkerView
    model: ModelEntry

    @property
    def resident(self) -> bool:
        return self.model.model_id in self.view.announcement.resident_models


_Key = tuple[Any, ...]


def decide(
    request: VoiceRequest,
    views: Iterable[WorkerView],
    policy: RoutingPolicy,
    now_ms: float,
    exclude: Collection[str] = (),
) -> Decision:
    """The worker and model for a new session. `exclude`: workers that were already tried.

    Raises UnknownName (mode, model, language, voice), InvalidArgument (the model is not for this
    mode), Unavailable (nobody alive who could) and Exhausted (all who could are full).
    """
    mode = policy.mode(request.mode)
    everyone = _pairs(views)
    if not everyone:
        raise Unavailable(f"no TTS worker is announced; {HOW_TO_START}")
    named = _named(everyone, request.model)
    able = _meeting(named, mode, request)
    able = _speaking(able, request.language)
    able = _with_voice(able, request)
    best = min(_free(able, policy, exclude), key=_rank(request, mode, policy, now_ms))
    if best.resident:
        preload = None if request.model else _preferred_cold(best, able, request, mode, policy)
        return _decision(best, request.voice, "resident", preload=preload)
    if request.model and mode.serve_while_loading:
        fitting = [pair for pair in everyone if _fits(pair, request, mode) and pair.resident]
        if stand_ins := _with_room(fitting, policy, exclude):
            stand_in = min(stand_ins, key=_rank(request, mode, policy, now_ms))
            decision = _decision(stand_in, "", "speaks meanwhile", preload=_preload(best))
            return replace(decision, substitute=True)
    return _decision(best, request.voice, "the model has to load first")


def catalog(announcement: Announcement) -> list[ModelEntry]:
    """Every model the worker offers, also where it announced residents only."""
    entries = {entry.model_id: entry for entry in announcement.models}
    capabilities = announcement.capabilities
    for model_id in filter(None, [*announcement.resident_models, announcement.default_model]):
        if model_id not in entries:
            entries[model_id] = ModelEntry(
                model_id=model_id,
                family="",
                languages=capabilities.languages,
                cpu_ok=capabilities.cpu_ok,
                lora=capabilities.lora,
            )
    return list(entries.values())


def _pairs(views: Iterable[WorkerView]) -> list[_Pair]:
    return [_Pair(view, model) for view in views for model in catalog(view.announcement)]


# --- narrowing: each step keeps what fits, or raises what the caller should read ---


def _named(pairs: Sequence[_Pair], model: str) -> Sequence[_Pair]:
    """By model id, else by family."""
    if not model:
        return pairs
    named = [pair for pair in pairs if pair.model.model_id == model]
    named = named or [pair for pair in pairs if pair.model.family == model]
    if not named:
        raise UnknownName.among("model", model, _model_names(pairs))
    return named


def _model_names(pairs: Iterable[_Pair]) -> set[str]:
    names = {name for pair in pairs for name in (pair.model.model_id, pair.model.family)}
    return names - {""}


def _meeting(pairs: Sequence[_Pair], mode: ModePolicy, request: VoiceRequest) -> Sequence[_Pair]:
    able = [pair for pair in pairs if _meets(pair, mode)]
    if able:
        return able
    needs = " and ".join(mode.require)
    if request.model:
        raise InvalidArgument(
            f"model {request.model!r} is not {needs}, which mode {request.mode!r} requires; "
            "choose another model or another mode"
        )
    known = {trait for pair in pairs for trait in _traits(pair)}
    missing = next((need for need in mode.require if need not in known), needs)
    raise Unavailable(
        f"no worker has a model that is {needs}, which mode {request.mode!r} requires; "
        f"missing: {missing!r}{nearest_hint(missing, known)}"
    )


def _meets(pair: _Pair, mode: ModePolicy) -> bool:
    return _traits(pair).issuperset(mode.require)


def _traits(pair: _Pair) -> set[str]:
    """Everything that a mode may require of a model: its flags, its worker's, and its tags."""
    capabilities = pair.view.announcement.capabilities
    flags = {
        "cpu_ok": pair.model.cpu_ok,
        "lora": pair.model.lora,
        "gpu": pair.view.announcement.hardware.gpu,
        "streaming": capabilities.streaming,
        "zero_shot": capabilities.zero_shot,
        "emotive_zero_prompt": capabilities.emotive_zero_prompt,
    }
    return {name for name, holds in flags.items() if holds} | {*pair.model.tags}


def _speaking(pairs: Sequence[_Pair], language: str) -> Sequence[_Pair]:
    able = [pair for pair in pairs if _language_distance(pair, language) is not None]
    if not able:
        known = {name for pair in pairs for name in _languages(pair)}
        raise UnknownName.among("language", language, known)
    return able


def _language_distance(pair: _Pair, language: str) -> int | None:
    """0: the very tag, or none was asked for; 1: near, or not known; None: another language."""
    languages = {_tag(name) for name in _languages(pair)}
    if not language or _tag(language) in languages:
        return 0
    if not languages:  # it did not say; its worker will
        return 1
    primary = _tag(language).split("-")[0]
    return 1 if primary in {name.split("-")[0] for name in languages} else None


def _languages(pair: _Pair) -> list[str]:
    return pair.model.languages or pair.view.announcement.capabilities.languages


def _tag(language: str) -> str:
    return language.lower().replace("_", "-")


def _fits(pair: _Pair, request: VoiceRequest, mode: ModePolicy) -> bool:
    return _meets(pair, mode) and _language_distance(pair, request.language) is not None


def _with_voice(pairs: Sequence[_Pair], request: VoiceRequest) -> Sequence[_Pair]:
    if not request.voice:
        return pairs
    able = [pair for pair in pairs if request.voice in pair.model.voices]
    # A model that lists no voices may know the one asked for, and its worker will say; but none is
    # loaded on that chance unless it was named.
    able = able or [
        pair for pair in pairs if not pair.model.voices and (pair.resident or request.model)
    ]
    if not able:
        known = {voice for pair in pairs for voice in pair.model.voices}
        raise UnknownName.among("voice", request.voice, known)
    return able


def _free(
    pairs: Sequence[_Pair], policy: RoutingPolicy, exclude: Collection[str]
) -> Sequence[_Pair]:
    free = _with_room(pairs, policy, exclude)
    if free:
        return free
    if any(_usable(pair.view, policy) and pair.view.name not in exclude for pair in pairs):
        raise Exhausted(
            "every TTS worker that could speak this is full; try again shortly",
            retry_after_ms=policy.retry_after_ms,
        )
    raise Unavailable(
        f"no TTS worker can take this session: {_why_not(pairs, policy)}; "
        f"wait a moment or {HOW_TO_START}",
        retry_after_ms=policy.retry_after_ms,
    )


def _with_room(
    pairs: Sequence[_Pair], policy: RoutingPolicy, exclude: Collection[str]
) -> Sequence[_Pair]:
    return [
        pair
        for pair in pairs
        if _usable(pair.view, policy) and pair.view.name not in exclude and not pair.view.full
    ]


def _usable(view: WorkerView, policy: RoutingPolicy) -> bool:
    return not view.announcement.draining and _audio_fits(view, policy)


def _audio_fits(view: WorkerView, policy: RoutingPolicy) -> bool:
    audio = view.announcement.audio
    return (audio.sr, audio.frame_ms) == (policy.audio.sr, policy.audio.frame_ms)


def _why_not(pairs: Iterable[_Pair], policy: RoutingPolicy) -> str:
    def reason(view: WorkerView) -> str:
        if view.announcement.draining:
            return "is draining"
        if not _audio_fits(view, policy):
            audio = view.announcement.audio
            return f"speaks {audio.sr} Hz in {audio.frame_ms} ms frames"
        return "has just failed"

    return ", ".join(sorted({f"{pair.view.name} {reason(pair.view)}" for pair in pairs}))


# --- choosing ---


def _rank(
    request: VoiceRequest, mode: ModePolicy, policy: RoutingPolicy, now_ms: float
) -> Callable[[_Pair], _Key]:
    """A sort key: what serves the session best comes first, what is least loaded next."""

    def key(pair: _Pair) -> _Key:
        return (
            pair.view.avoid_until_ms > now_ms,
            *_preference(pair, request, mode),
            *_load(pair.view, policy),
            pair.view.name,
            pair.model.model_id,
        )

    return key


def _preference(pair: _Pair, request: VoiceRequest, mode: ModePolicy) -> _Key:
    cold, taste = not pair.resident, _taste(pair, request, mode)
    return (cold, *taste) if mode.prefer_resident else (*taste, cold)


def _taste(pair: _Pair, request: VoiceRequest, mode: ModePolicy) -> _Key:
    """How far the model is from what the mode would like, whether it is loaded or not."""
    return (
        _language_distance(pair, request.language),
        pair.view.announcement.capabilities.fallback,
        -len({*mode.prefer_tags} & {*pair.model.tags}),
        _fallback_place(pair.model, mode.fallbacks),
        pair.model.model_id != pair.view.announcement.default_model,
    )


def _fallback_place(model: ModelEntry, fallbacks: list[str]) -> int:
    """`xtts-v2` means the model of that name, the family, or models like `xtts-v2-en`."""
    for place, name in enumerate(fallbacks):
        if name in (model.model_id, model.family) or model.model_id.startswith(f"{name}-"):
            return place
    return len(fallbacks)


def _load(view: WorkerView, policy: RoutingPolicy) -> _Key:
    # First-audio times wobble by a few ms from one heartbeat to the next: only whole steps count.
    # A worker that has measured nothing yet (0) is tried first, so that it will have.
    p50_steps = int(view.announcement.metrics.first_audio_p50_ms) // policy.latency_step_ms
    return (view.queue_depth, p50_steps, view.sessions)


def _preferred_cold(
    best: _Pair,
    able: Sequence[_Pair],
    request: VoiceRequest,
    mode: ModePolicy,
    policy: RoutingPolicy,
) -> Preload | None:
    """The model this mode would rather have had, where the policy says to load it for later."""
    if not mode.preload_preferred:
        return None
    usable = [pair for pair in able if _usable(pair.view, policy)]
    ideal = min(usable, key=lambda pair: (_taste(pair, request, mode), _load(pair.view, policy)))
    resident_somewhere = any(
        pair.resident for pair in usable if pair.model.model_id == ideal.model.model_id
    )
    better = _taste(ideal, request, mode) < _taste(best, request, mode)
    return _preload(ideal) if better and not resident_somewhere else None


def _preload(pair: _Pair) -> Preload:
    record = pair.view.announcement
    return Preload(record.name, record.target, pair.model.model_id, record.tls)


def _decision(pair: _Pair, voice: str, reason: str, preload: Preload | None = None) -> Decision:
    return Decision(
        worker=pair.view.name,
        target=pair.view.announcement.target,
        model_id=pair.model.model_id,
        voice=voice,
        resident=pair.resident,
        reason=reason,
        preload=preload,
        tls=pair.view.announcement.tls,
    )
