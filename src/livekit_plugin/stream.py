"""LiveKit's stream: one segment, spoken by whichever worker takes it."""

from __future__ import annotations

import time

from livekit.agents import APIConnectOptions, APIError, tts
from livekit.agents.utils import shortuuid

from src.audio.pcm import FRAME_MS, SAMPLE_RATE
from src.livekit_plugin.fleet import Fleet
from src.livekit_plugin.utterance import Utterance
from src.rpc.generated import tts_pb2 as pb


class SynthesizeStream(tts.SynthesizeStream):
    """The base class retries, with the text so far, until the first audio has been heard."""

    def __init__(
        self,
        *,
        tts: tts.TTS[str],
        fleet: Fleet,
        asked: pb.StartSessionReq,
        conn_options: APIConnectOptions,
    ) -> None:
        super().__init__(tts=tts, conn_options=conn_options)
        self._fleet = fleet
        self._asked = asked

    async def _run(self, output_emitter: tts.AudioEmitter) -> None:
        utterance_id = shortuuid("u-")
        output_emitter.initialize(
            request_id=utterance_id,
            sample_rate=SAMPLE_RATE,
            num_channels=1,
            mime_type="audio/pcm",
            frame_size_ms=FRAME_MS,
            stream=True,
        )
        output_emitter.start_segment(segment_id=utterance_id)
        asked_at = time.perf_counter()
        # Before there is any text: the way to the worker, and its loading of the model if need be,
        # cost nothing while the language model thinks.
        async with self._fleet.lease(self._asked, self._conn_options.timeout) as lease:
            self._acquire_time = time.perf_counter() - asked_at
            utterance = Utterance(
                utterance_id, lease, self._input_ch, output_emitter, self._mark_started
            )
            try:
                await utterance.run(self._conn_options.timeout)
            except APIError as error:
                self._fleet.failed(lease.target, error)
                raise
