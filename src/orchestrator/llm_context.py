"""What every way to a language model shares: settings, context, the gate, where to stop."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field, SecretStr, field_validator

from src.common.config import StrictModel, parse_config

Message = dict[str, str]

INTERRUPTED = "—"
"""Ends an assistant message that the user cut short, as a transcript of a conversation would."""

OPENING = "(The assistant speaks first.)"
"""Stands before a reply nobody asked for: chat templates want the user to begin."""

_ENV = {"LLM_BASE_URL": "base_url", "LLM_MODEL": "model", "LLM_API_KEY": "api_key"}


class Exchange(StrictModel):
    """One question and its answer."""

    user: str
    assistant: str


EXAMPLES = (
    Exchange(
        user="Hello, who are you?",
        assistant="I am a voice assistant, and I am happy to help you.",
    ),
    Exchange(
        user="Tell me about the sea.",
        assistant="The sea is a large body of salt water. It covers most of the earth, and many "
        "animals live in it.",
    ),
    Exchange(
        user="How many months are there in a year?",
        assistant="There are twelve months in a year.",
    ),
)


class LlmSettings(StrictModel):
    """The language model behind the agent. LLM_BASE_URL, LLM_MODEL and LLM_API_KEY win."""

    base_url: str = Field(
        "",
        description="an OpenAI-compatible endpoint, e.g. http://127.0.0.1:8091/v1; empty: a host "
        "that connects in answers, and with none the agent echoes",
    )
    model: str = Field("default", description="as the endpoint names it")
    api_key: SecretStr = SecretStr("")
    system_prompt: str = (
        "You are a helpful voice assistant. You always answer in English, in two short sentences."
    )
    examples: list[Exchange] = Field(
        default=list(EXAMPLES),
        description="exchanges put before the conversation: a small model copies their manner, and "
        "without them it wanders into French or lists; empty for a large one",
    )
    temperature: float = Field(0.2, ge=0.0, le=2.0)
    max_tokens: int = Field(120, ge=1, description="the longest reply the endpoint may write")
    frequency_penalty: float = Field(0.0, ge=-2.0, le=2.0)
    repeat_penalty: float | None = Field(
        None, gt=0.0, description="llama.cpp and vLLM only; others refuse the field, so it is unset"
    )
    stop_after_sentences: int = Field(
        2, ge=0, description="cancel the generation after so many sentences; 0: let it end"
    )
    connect_timeout_ms: int = Field(2_000, gt=0)
    first_token_timeout_ms: int = Field(
        8_000, gt=0, description="from the request to the first word"
    )
    idle_timeout_ms: int = Field(4_000, gt=0, description="between two pieces of one reply")
    history_turns: int = Field(12, ge=0, description="exchanges the model is reminded of")
    history_chars: int = Field(8_000, ge=0, description="and never more text than this")
    warm_up: bool = Field(
        True,
        description="when a session opens, let the endpoint read the system prompt (one request of "
        "one token), so that the first answer comes as fast as the others",
    )
    extra_body: dict[str, Any] = Field(
        default_factory=dict, description="more fields for the request, as the endpoint likes them"
    )

    @field_validator("base_url")
    @classmethod
    def _is_url(cls, value: str) -> str:
        if value and not value.startswith(("http://", "https://")):
            raise ValueError(f"must begin with http:// or https://, got {value!r}")
        return value

    def with_env(self, environ: Mapping[str, str]) -> LlmSettings:
        """These settings with what the environment says laid over them. Raises ConfigError."""
        found = {field: environ[key] for key, field in _ENV.items() if environ.get(key)}
        return parse_config({**self.model_dump(), **found}, LlmSettings, where="LLM settings")


def _messages(user: str, assistant: str) -> list[Message]:
    return [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]


class Conversation:
    """What was said, as the model will read it: whole turns of the user, heard words of the agent.

    The prompt only grows at its end, so that the endpoint's prompt cache stays warm. When it is too
    long the older *half* goes at once: sliding by one exchange would miss the cache on every turn.
    """

    def __init__(
        self,
        system_prompt: str,
        max_turns: int = 12,
        max_chars: int = 8_000,
        examples: Sequence[Exchange] = (),
    ) -> None:
        self._opening: list[Message] = (
            [{"role": "system", "content": system_prompt}] if system_prompt else []
        )
        for example in examples:
            self._opening += _messages(example.user, example.assistant)
        self._max_turns = max_turns
        self._max_chars = max_chars
        self._turns: list[tuple[str, str]] = []
        # Bounded: only the last few questions that got no audible answer still matter.
        self._unanswered: deque[str] = deque(maxlen=3)

    def prompt(self, user_text: str) -> list[Message]:
        """Messages for the reply to `user_text`, roles strictly alternating after the system's."""
        messages = list(self._opening)
        for user, assistant in self._turns:
            messages += _messages(user, assistant)
        messages.append({"role": "user", "content": "\n".join((*self._unanswered, user_text))})
        return messages

    def commit(self, user_text: str, heard_text: str, *, completed: bool) -> None:
        """A question nobody heard an answer to is put again together with the next one."""
        heard = heard_text.strip()
        if not heard:
            if user_text:
                self._unanswered.append(user_text)
            return
        reply = heard if completed else heard.rstrip(INTERRUPTED) + INTERRUPTED
        if not user_text and not self._unanswered and self._turns:
            user, before = self._turns.pop()
            self._turns.append((user, f"{before} {reply}"))
        else:
            asked = [*self._unanswered, user_text] if user_text else list(self._unanswered)
            self._turns.append(("\n".join(asked) or OPENING, reply))
        self._unanswered.clear()
        self._trim()

    def _trim(self) -> None:
        while self._turns and (len(self._turns) > self._max_turns or self._chars > self._max_chars):
            del self._turns[: (len(self._turns) + 1) // 2]

    @property
    def _chars(self) -> int:
        return sum(len(user) + len(assistant) for user, assistant in self._turns)


class Gate:
    """Open until held. Text waits in front of it; none is lost."""

    def __init__(self) -> None:
        self._open = asyncio.Event()
        self._open.set()

    @property
    def held(self) -> bool:
        return not self._open.is_set()

    def hold(self) -> None:
        self._open.clear()

    def go(self) -> None:
        self._open.set()

    async def passed(self) -> None:
        await self._open.wait()


class Gates:
    """One gate per turn that is being answered; a turn that nobody knows is ignored."""

    # Bounded: a session answers one turn at a time, a second one speculatively.
    _MAX = 8

    def __init__(self) -> None:
        self._gates: dict[str, Gate] = {}

    def open(self, turn_id: str) -> Gate:
        """A fresh gate; an older one of the same turn lets go of whoever waits at it."""
        self.drop(turn_id)
        while len(self._gates) >= self._MAX:
            self.drop(next(iter(self._gates)))
        gate = self._gates[turn_id] = Gate()
        return gate

    def hold(self, turn_id: str) -> None:
        if gate := self._gates.get(turn_id):
            gate.hold()

    def go(self, turn_id: str) -> None:
        if gate := self._gates.get(turn_id):
            gate.go()

    def drop(self, turn_id: str) -> None:
        if gate := self._gates.pop(turn_id, None):
            gate.go()


_ENDERS = ".!?…"
_WIDE_ENDERS = "。！？"
_CLOSERS = "\"'”’)]»"
_ABBREVIATIONS = frozenset(
    "mr mrs ms dr prof st jr sr vs etc e.g i.e a.m p.m u.s u.k approx dept".split()
)


class SentenceStop:
    """Lets `limit` sentences pass (0: all), whatever the chunks.

    A sentence counts when the next one begins, so "3.5" and "Mr. Smith" are not ends, and nothing
    is held back to find out.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._sentences = 0
        self._tail = ""
        self.done = False

    def push(self, text: str) -> str:
        """The part of `text` that may pass. Sets `done` when the limit is reached."""
        if not self._limit:
            return text
        for index, char in enumerate(text):
            if _ends_before(self._tail, char):
                self._tail = ""
                self._sentences += 1
                if self._sentences >= self._limit:
                    self.done = True
                    return text[:index]
            self._tail = (self._tail + char)[-24:]
        return text


def _ends_before(tail: str, char: str) -> bool:
    """Is `tail` a finished sentence, now that `char` follows it?"""
    bare = tail.rstrip(_CLOSERS)
    if bare[-1:] in tuple(_WIDE_ENDERS):
        return char not in _CLOSERS + _WIDE_ENDERS
    if not char.isspace() or bare[-1:] not in tuple(_ENDERS):
        return False
    words = bare[:-1].lower().split() if bare.endswith(".") else []
    if not words:
        return True
    last = words[-1].lstrip("(\"'“‘")
    numbering = len(words) == 1 and last.isdigit()
    return not numbering and last not in _ABBREVIATIONS and (len(last) != 1 or last == "i")
