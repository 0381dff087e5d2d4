"""A TTS for LiveKit Agents that speaks through a fleet of Duplex workers over gRPC.

    session = AgentSession(tts=duplex.TTS(target="10.0.0.5:7001,10.0.0.6:7001"), ...)

Importing it opens no connection: LiveKit imports plugins in the process that its jobs are forked
from, and a gRPC channel does not survive a fork.
"""

from __future__ import annotations

from livekit.agents import Plugin

from src.livekit_plugin.stream import SynthesizeStream
from src.livekit_plugin.tts import TTS
from src.livekit_plugin.version import __version__

__all__ = ["TTS", "SynthesizeStream", "__version__"]


class DuplexPlugin(Plugin):
    def __init__(self) -> None:
        super().__init__(__name__, __version__, __name__)


Plugin.register_plugin(DuplexPlugin())
