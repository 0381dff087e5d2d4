"""Parler-TTS through the whole installation."""

from __future__ import annotations

from functools import partial

import pytest

from tests.families.parler.tiny import make_tiny_pack
from tests.families.stack import Conversations, Family

pytestmark = pytest.mark.timeout(400)

# Three seconds of noise a piece, however long it is: more would only cost processor time.
FAMILY = Family("tiny-parler", "parler_tts", partial(make_tiny_pack, max_length=270))


class TestParler(Conversations):
    pass
