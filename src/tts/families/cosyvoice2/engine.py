"""CosyVoice 2's network, loaded from a pack by the package's own classes. `Engine` on torch."""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from src.audio.pcm import Float32
from src.tts.families.cosyvoice2.layers import Sampler, Stops, StretchedFlow
from src.tts.families.cosyvoice2.plan import END_OF_PROMPT
from src.tts.families.cosyvoice2.speech import Manner, Vocoder
from src.tts.families.torch_host import give_back_memory, own_generator, speaking
from src.tts.segmenter import speakable
from src.tts.tts_base import CancelToken

_RUN = "run"
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Speaker:
    """A voice, as tensors on the model's device.

    `text` (1, n), `speech` (1, n) and `mel` (1, 2n, 80) are those of its recording, or empty;
    `embedding` is (1, 192).
    """

    text: Any
    speech: Any
    mel: Any
    embedding: Any


class TorchEngine:
    """One step of one run computes at a time: the package's GPU stream and its text front end are
    shared. `model`: the package's `CosyVoice2Model`; `frontend`: as of frontend.py beside this.

    What fails while speaking is raised as `speaking` of torch_host says."""

    def __init__(
        self, model_id: str, model: Any, frontend: Any, speakers: Mapping[str, Speaker]
    ) -> None:
        self._model_id = model_id
        self._model = model
        self._frontend = frontend
        self._speakers = dict(speakers)
        self._lock = threading.Lock()
        self._stops = Stops(model)
        self.look_ahead = int(model.flow.pre_lookahead_len)

    @property
    def voices(self) -> Sequence[str]:
        return tuple(self._speakers)

    def prompt(self, voice: str) -> int:
        return int(self._speakers[voice].speech.shape[1])

    def normal(self, text: str) -> str:
        with self._step():
            try:
                said: str = self._frontend.text_normalize(text, split=False)
            except (IndexError, AssertionError) as error:
                # Its rules fail on what they leave nothing of, and on two spaces in a row.
                _log.warning("a text was not normalised (%s)", type(error).__name__)
                return text
        return said if speakable(said) else text

    def tokens(self, text: str, manner: Manner) -> Generator[int, None, None]:
        with self._step():
            llm = self._language_model(manner, flowing=False)
            words = self._frontend.text_ids(text)
            prompt = self._prompt(manner)
            made = llm.inference(text=words, text_len=_length(words), **prompt)
        return self._drawn(made)

    def tokens_while_written(
        self, texts: Iterator[str], manner: Manner
    ) -> Generator[int, None, None]:
        """Without the recording's words and tokens: the run would wait until there are five tokens
        of text for every 15 of the recording, some forty words for one of ten seconds."""
        with self._step():
            llm = self._language_model(manner, flowing=True)
            prompt = self._prompt(manner, recording=False)
            made = llm.inference_bistream(text=self._ids(texts), **prompt)
        return self._drawn(made)

    def vocoder(self, manner: Manner, cancel: CancelToken) -> Vocoder:
        speaker = self._speakers[manner.voice]
        # A view, so that what the package keeps of a run ends with the run.
        model = copy.copy(self._model)
        model.hift_cache_dict = {_RUN: None}
        if manner.speed != 1.0:
            model.flow = StretchedFlow(model.flow, manner.speed)

        def sound(tokens: Sequence[int], offset: int, *, final: bool) -> Float32:
            import torch

            with self._step(), self._stops.at(cancel), torch.inference_mode():
                wave = model.token2wav(
                    token=torch.tensor([tokens]),
                    prompt_token=speaker.speech,
                    prompt_feat=speaker.mel,
                    embedding=speaker.embedding,
                    token_offset=offset,
                    uuid=_RUN,
                    stream=not final,
                    finalize=final,
                )
                samples: Float32 = wave[0].float().cpu().numpy().clip(-1.0, 1.0)
                return samples

        return sound

    def close(self) -> None:
        device = str(self._model.device)
        self._speakers.clear()
        self._model = self._frontend = None
        give_back_memory(device)

    def _language_model(self, manner: Manner, *, flowing: bool) -> Any:
        """A view of it that samples with this run's draws."""
        generator = own_generator(manner.seed)
        llm = copy.copy(self._model.llm)
        llm.sampling = Sampler(llm.speech_token_size, generator, flowing=flowing)
        return llm

    def _prompt(self, manner: Manner, *, recording: bool = True) -> dict[str, Any]:
        """An instruction takes the place of the recording's words and tokens; the flow keeps
        them, so that the timbre stays."""
        import torch

        speaker = self._speakers[manner.voice]
        nothing = torch.zeros(1, 0, dtype=torch.int32, device=self._model.device)
        text, speech = (speaker.text, speaker.speech) if recording else (nothing, nothing)
        if manner.instruct:
            text = self._frontend.text_ids(manner.instruct + END_OF_PROMPT)
            speech = nothing
        return {
            "prompt_text": text,
            "prompt_text_len": _length(text),
            "prompt_speech_token": speech,
            "prompt_speech_token_len": _length(speech),
            "embedding": speaker.embedding,
        }

    def _drawn(self, made: Generator[int, None, None]) -> Generator[int, None, None]:
        try:
            while True:
                with self._step():
                    token = next(made, None)
                if token is None:
                    return
                yield int(token)
        finally:
            made.close()

    def _ids(self, texts: Iterator[str]) -> Iterator[Any]:
        """Called from inside a step, which ends while the text is waited for."""
        while True:
            self._lock.release()
            try:
                text = next(texts, None)
            finally:
                self._lock.acquire()
            if text is None:
                return
            ids = self._frontend.text_ids(text)
            yield from (ids[:, i : i + 1] for i in range(ids.shape[1]))

    @contextmanager
    def _step(self) -> Iterator[None]:
        """One after the other, on the package's stream of a GPU."""
        import torch

        with self._lock, speaking(self._model_id), ExitStack() as held:
            if self._model.device.type == "cuda":
                held.enter_context(torch.cuda.device(self._model.device))
                held.enter_context(torch.cuda.stream(self._model.llm_context.stream))
            yield


def _length(ids: Any) -> Any:
    import torch

    return torch.tensor([ids.shape[1]], dtype=torch.int32, device=ids.device)
