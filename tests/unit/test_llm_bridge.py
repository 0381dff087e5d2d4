"""The way out to a language model, over real HTTP on loopback; and the echo, and the context."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from src.common.config import ConfigError
from src.common.tasks import timeout
from src.orchestrator.llm_bridge import EchoBridge, LlmSettings, make_bridge
from src.orchestrator.llm_context import Conversation, Exchange, SentenceStop
from src.orchestrator.llm_host import HostHub
from src.orchestrator.llm_openai import OpenAIBridge, SseParser, read_delta
from src.orchestrator.ports import BridgeSession
from src.rpc.errors import Unavailable
from tests.scripted_llm import Answer, Script, ScriptedLlm, words

LIVENESS_S = 5.0


class Rig:
    """A scripted endpoint and one session that talks to it."""

    def __init__(self, llm: ScriptedLlm) -> None:
        self.llm = llm
        self._bridges: list[OpenAIBridge] = []

    async def session(self, **settings: Any) -> BridgeSession:
        settings = {"base_url": self.llm.base_url, "warm_up": False, **settings}
        bridge = OpenAIBridge(LlmSettings(**settings))
        self._bridges.append(bridge)
        return await bridge.open("s1")

    async def aclose(self) -> None:
        for bridge in self._bridges:
            await bridge.aclose()


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    async with ScriptedLlm(lambda _: words("Paris is the capital.")).serving() as llm:
        rig = Rig(llm)
        yield rig
        await rig.aclose()


def says(rig: Rig, answer: Answer | Script) -> None:
    rig.llm.script = answer if callable(answer) else lambda _: answer


async def all_of(reply: AsyncIterator[str]) -> str:
    async with timeout(LIVENESS_S):
        return "".join([text async for text in reply])


async def text_then_error(reply: AsyncIterator[str]) -> tuple[str, str]:
    said: list[str] = []

    async def listen() -> None:
        async for text in reply:
            said.append(text)

    with pytest.raises(Unavailable) as caught:
        await asyncio.wait_for(listen(), LIVENESS_S)
    return "".join(said), caught.value.message


async def until(condition: Callable[[], object]) -> None:
    async with timeout(LIVENESS_S):
        while not condition():  # noqa: ASYNC110 - the other side has no event to wait for
            await asyncio.sleep(0.005)


class TestAnswering:
    async def test_streams_the_reply_in_the_pieces_it_came_in(self, rig: Rig) -> None:
        session = await rig.session()
        pieces = [text async for text in session.respond("t1", "Capital of France?")]
        assert "".join(pieces) == "Paris is the capital."
        assert len(pieces) == 4

    async def test_first_piece_is_handed_out_before_the_second_is_written(self, rig: Rig) -> None:
        says(rig, words("One two.", gap_ms=60_000))
        reply = (await rig.session()).respond("t1", "Count.")
        async with timeout(LIVENESS_S):
            assert await anext(reply) == "One"
        assert rig.llm.pieces_sent == 1
        await reply.aclose()  # type: ignore[attr-defined]

    async def test_asks_with_the_settings_and_the_key(self, rig: Rig) -> None:
        session = await rig.session(
            model="m", api_key="secret", temperature=0.1, repeat_penalty=1.1, extra_body={"seed": 7}
        )
        await all_of(session.respond("t1", "Hi."))
        asked = rig.llm.requests[0]
        assert asked["model"] == "m"
        assert asked["stream"] is True
        assert (asked["temperature"], asked["repeat_penalty"], asked["seed"]) == (0.1, 1.1, 7)
        assert "frequency_penalty" not in asked
        assert rig.llm.headers[0]["Authorization"] == "Bearer secret"

    async def test_stops_the_generation_after_two_sentences(self, rig: Rig) -> None:
        says(rig, words("One. Two. " + "More. " * 500, gap_ms=5))
        assert await all_of((await rig.session()).respond("t1", "Talk.")) == "One. Two."
        await until(lambda: rig.llm.hung_up == 1)
        assert rig.llm.pieces_sent < 100

    async def test_one_connection_serves_turn_after_turn(self, rig: Rig) -> None:
        session = await rig.session(stop_after_sentences=0)
        for turn in range(4):
            await all_of(session.respond(f"t{turn}", "Again."))
        assert len(rig.llm.peers) == 1

    async def test_warms_up_with_the_system_prompt_and_one_token(self, rig: Rig) -> None:
        session = await rig.session(warm_up=True, system_prompt="Be brief.")
        await until(lambda: rig.llm.requests)
        assert rig.llm.requests[0]["max_tokens"] == 1
        assert rig.llm.requests[0]["messages"][0] == {"role": "system", "content": "Be brief."}
        await session.aclose()

    async def test_an_endpoint_that_does_not_stream_is_understood(self, rig: Rig) -> None:
        body = {"choices": [{"message": {"content": "All at once."}, "finish_reason": "stop"}]}
        says(rig, Answer((), raw=json.dumps(body).encode(), content_type="application/json"))
        assert await all_of((await rig.session()).respond("t1", "Hi.")) == "All at once."


class TestCancelling:
    async def test_closing_the_iterator_closes_the_request(self, rig: Rig) -> None:
        says(rig, words("word " * 1000, gap_ms=5))
        reply = (await rig.session()).respond("t1", "Talk.")
        await anext(reply)
        await reply.aclose()  # type: ignore[attr-defined]
        await until(lambda: rig.llm.hung_up == 1)
        assert rig.llm.pieces_sent < 500

    async def test_cancelling_the_reader_closes_the_request(self, rig: Rig) -> None:
        says(rig, words("never", first_ms=60_000))
        task = asyncio.create_task(all_of((await rig.session()).respond("t1", "Talk.")))
        await until(lambda: rig.llm.requests)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: rig.llm.hung_up == 1)

    async def test_hold_keeps_the_text_back_and_go_loses_none(self, rig: Rig) -> None:
        says(rig, words("a b c d e f g h"))
        session = await rig.session()
        reply = session.respond("t1", "Talk.")
        said = [await anext(reply)]
        session.hold("t1")
        session.hold("t1")
        waiting = asyncio.ensure_future(anext(reply))
        await until(lambda: rig.llm.pieces_sent == 8)
        await asyncio.sleep(0.02)
        assert not waiting.done()
        session.go("t1")
        said.append(await waiting)
        assert "".join(said) + await all_of(reply) == "a b c d e f g h"

    async def test_a_held_reply_does_not_time_out(self, rig: Rig) -> None:
        session = await rig.session(idle_timeout_ms=30)
        reply = session.respond("t1", "Talk.")
        await anext(reply)
        session.hold("t1")
        waiting = asyncio.ensure_future(anext(reply))
        await asyncio.sleep(0.1)
        session.go("t1")
        assert await waiting == " is"

    async def test_hold_of_an_unknown_turn_is_ignored(self, rig: Rig) -> None:
        session = await rig.session()
        session.hold("nobody")
        session.go("nobody")
        assert await all_of(session.respond("t1", "Hi.")) == "Paris is the capital."


class TestFailing:
    async def test_nobody_listens(self, rig: Rig) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        session = await rig.session(base_url=f"http://127.0.0.1:{port}/v1")
        said, why = await text_then_error(session.respond("t1", "Hi."))
        assert said == ""
        assert f"127.0.0.1:{port}" in why

    async def test_slow_to_begin(self, rig: Rig) -> None:
        says(rig, words("late", first_ms=60_000))
        session = await rig.session(first_token_timeout_ms=50)
        _, why = await text_then_error(session.respond("t1", "Hi."))
        assert "did not begin to answer within 50 ms" in why
        await until(lambda: rig.llm.hung_up == 1)

    async def test_keep_alive_comments_do_not_count_as_an_answer(self, rig: Rig) -> None:
        says(rig, Answer(["late"], before=b": keep-alive\n\n", first_ms=60_000))
        session = await rig.session(first_token_timeout_ms=50)
        _, why = await text_then_error(session.respond("t1", "Hi."))
        assert "did not begin to answer" in why

    async def test_stalls_in_mid_answer(self, rig: Rig) -> None:
        says(rig, words("One two", gap_ms=60_000))
        session = await rig.session(idle_timeout_ms=50)
        said, why = await text_then_error(session.respond("t1", "Hi."))
        assert said == "One"
        assert "did not go on within 50 ms" in why

    async def test_dies_in_mid_answer_after_what_it_had_said(self, rig: Rig) -> None:
        says(rig, Answer(["One", " two"], gap_ms=20, die=True))
        said, why = await text_then_error((await rig.session()).respond("t1", "Hi."))
        assert said == "One two"
        assert "broke off" in why

    async def test_ends_without_saying_that_it_ends(self, rig: Rig) -> None:
        says(rig, Answer((), raw=b'data: {"choices":[{"delta":{"content":"One"}}]}\n\n'))
        said, why = await text_then_error((await rig.session()).respond("t1", "Hi."))
        assert said == "One"
        assert "stopped in mid-answer" in why

    async def test_error_object_in_mid_stream(self, rig: Rig) -> None:
        says(rig, Answer(["One"], error="out of memory"))
        said, why = await text_then_error((await rig.session()).respond("t1", "Hi."))
        assert said == "One"
        assert "out of memory" in why

    @pytest.mark.parametrize(
        ("status", "hint"),
        [(401, "LLM_API_KEY"), (404, "LLM_BASE_URL"), (400, "too long"), (500, "too long")],
    )
    async def test_refusals_say_what_to_do(self, rig: Rig, status: int, hint: str) -> None:
        says(rig, Answer((), status=status, error="too long"))
        _, why = await text_then_error((await rig.session()).respond("t1", "Hi."))
        assert hint in why
        assert str(status) in why

    async def test_not_json(self, rig: Rig) -> None:
        says(rig, Answer((), raw=b"data: <html>\n\n"))
        _, why = await text_then_error((await rig.session()).respond("t1", "Hi."))
        assert "not JSON" in why

    async def test_the_next_turn_works_again(self, rig: Rig) -> None:
        session = await rig.session()
        says(rig, Answer(["x"], die=True))
        await text_then_error(session.respond("t1", "Hi."))
        says(rig, words("Better."))
        assert await all_of(session.respond("t2", "Hi?")) == "Better."

    async def test_a_warm_up_that_fails_leaves_the_session_usable(self, rig: Rig) -> None:
        says(rig, Answer((), status=500, error="loading"))
        session = await rig.session(warm_up=True)
        await until(lambda: rig.llm.requests)
        says(rig, words("Ready."))
        assert await all_of(session.respond("t1", "Hi.")) == "Ready."
        await session.aclose()


class TestContext:
    async def test_examples_stand_before_the_conversation(self, rig: Rig) -> None:
        example = Exchange(user="Hi?", assistant="Hello.")
        session = await rig.session(system_prompt="S", examples=[example])
        await all_of(session.respond("t1", "First?"))
        messages = rig.llm.requests[0]["messages"]
        assert [m["content"] for m in messages] == ["S", "Hi?", "Hello.", "First?"]
        assert [m["role"] for m in messages] == ["system", "user", "assistant", "user"]

    async def test_only_commit_changes_the_conversation(self, rig: Rig) -> None:
        session = await rig.session(system_prompt="S", examples=[])
        await all_of(session.respond("t1", "First?", speculative=True))
        await all_of(session.respond("t1", "First, really?"))
        assert [m["content"] for m in rig.llm.requests[1]["messages"]] == ["S", "First, really?"]
        session.commit("t1", "First, really?", "Paris is", completed=False)
        await all_of(session.respond("t2", "Second?"))
        contents = [m["content"] for m in rig.llm.requests[2]["messages"]]
        assert contents == ["S", "First, really?", "Paris is—", "Second?"]

    def test_a_question_without_an_audible_answer_is_put_again(self) -> None:
        talk = Conversation("")
        talk.commit("What is", "", completed=False)
        assert talk.prompt("the time?") == [{"role": "user", "content": "What is\nthe time?"}]

    def test_words_nobody_asked_for_keep_the_roles_alternating(self) -> None:
        talk = Conversation("S")
        talk.commit("", "Welcome!", completed=True)
        talk.commit("", "How can I help?", completed=True)
        roles = [message["role"] for message in talk.prompt("Hi.")]
        assert roles == ["system", "user", "assistant", "user"]
        assert talk.prompt("Hi.")[2]["content"] == "Welcome! How can I help?"

    @given(
        st.lists(st.tuples(st.text(max_size=30), st.text(max_size=30), st.booleans()), max_size=60)
    )
    def test_bounded_alternating_and_mostly_appended(
        self, turns: list[tuple[str, str, bool]]
    ) -> None:
        talk = Conversation("S", max_turns=6, max_chars=200)
        rewritten = 0
        before = talk.prompt("?")
        for user, heard, completed in turns:
            talk.commit(user, heard, completed=completed)
            now = talk.prompt("?")
            rewritten += now[: len(before) - 1] != before[:-1]
            before = now
            roles = [message["role"] for message in now[1:]]
            assert roles == ["user", "assistant"] * (len(roles) // 2) + ["user"]
            assert len(now) <= 2 + 2 * 6
            assert sum(len(message["content"]) for message in now[1:-1]) <= 200
        if all(user and len(user) + len(heard) < 30 for user, heard, _ in turns):
            assert rewritten <= len(turns) / 3

    def test_settings_take_the_environment_over_the_file(self) -> None:
        settings = LlmSettings(base_url="http://file/v1", model="file")
        env = {"LLM_BASE_URL": "http://env/v1", "LLM_API_KEY": "k", "LLM_MODEL": ""}
        merged = settings.with_env(env)
        assert (merged.base_url, merged.model) == ("http://env/v1", "file")
        assert merged.api_key.get_secret_value() == "k"
        assert "k" not in repr(merged.api_key)

    def test_a_wrong_url_is_named(self) -> None:
        with pytest.raises(ConfigError, match=r"base_url.*http://"):
            LlmSettings().with_env({"LLM_BASE_URL": "localhost:8091"})


class TestChoosing:
    async def test_the_endpoint_when_one_is_named(self) -> None:
        bridge = make_bridge(LlmSettings(model="m"), HostHub(), {"LLM_BASE_URL": "http://h:1/v1"})
        assert bridge.name == "m@h:1"

    async def test_the_echo_when_there_is_nothing_and_says_so(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        bridge = make_bridge(LlmSettings(), HostHub(), {})
        assert bridge.name == "echo"
        assert "LLM_BASE_URL" in caplog.text
        session = await bridge.open("s1")
        assert session.name == "echo"
        assert await all_of(session.respond("t1", "two words")) == "You said: two words"

    async def test_the_echo_obeys_hold(self) -> None:
        session = await EchoBridge().open("s1")
        reply = session.respond("t1", "hello")
        assert await anext(reply) == "You"
        session.hold("t1")
        waiting = asyncio.ensure_future(anext(reply))
        await asyncio.sleep(0.01)
        assert not waiting.done()
        session.go("t1")
        assert await waiting + await all_of(reply) == " said: hello"


PAYLOADS = st.lists(st.text(alphabet='abc é:{}"', min_size=1, max_size=20), max_size=8)


class TestParsing:
    @given(PAYLOADS, st.sampled_from([b"\n", b"\r\n", b"\r"]), st.data())
    def test_any_chunking_gives_the_same_payloads(
        self, payloads: list[str], newline: bytes, data: st.DataObject
    ) -> None:
        stream = b": comment" + newline
        for payload in payloads:
            stream += b"data: " + payload.encode() + newline + newline
        parser, out = SseParser(), []
        while stream:
            size = data.draw(st.integers(1, len(stream)))
            out += parser.push(stream[:size])
            stream = stream[size:]
        assert out + parser.end() == payloads

    def test_several_data_lines_are_one_payload(self) -> None:
        assert SseParser().push(b"data: a\ndata:b\nid: 3\n\n") == ["a\nb"]

    def test_an_endless_line_is_refused(self) -> None:
        parser = SseParser()
        with pytest.raises(Unavailable):
            parser.push(b"x" * 2_000_000)

    def test_a_usage_chunk_is_no_text(self) -> None:
        assert read_delta('{"choices":[],"usage":{"total_tokens":3}}').text == ""
        assert read_delta('{"choices":[{"delta":{"content":null}}]}').text == ""
        assert read_delta("[DONE]").finished


class TestSentences:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("One. Two. Three.", "One. Two."),
            ("It costs 3.5 euros. Yes! No.", "It costs 3.5 euros. Yes!"),
            ("Mr. Smith came. He left. Bye.", "Mr. Smith came. He left."),
            ('He said "Stop." Then he left. Bye.', 'He said "Stop." Then he left.'),
            ("Really?! Yes... Well.", "Really?! Yes..."),
            ("It was 1945. And so on. Bye.", "It was 1945. And so on."),
            ("1. Eat. 2. Sleep.", "1. Eat. 2. Sleep."),
            ("你好。我是乔。再见。", "你好。我是乔。"),
            ("No end", "No end"),
        ],
    )
    def test_two_sentences_pass(self, text: str, expected: str) -> None:
        for size in (1, 3, len(text)):
            stop = SentenceStop(2)
            out = ""
            for start in range(0, len(text), size):
                if not stop.done:
                    out += stop.push(text[start : start + size])
            assert out == expected

    def test_no_limit(self) -> None:
        assert SentenceStop(0).push("A. B. C. ") == "A. B. C. "
