"""Parler-TTS through the whole installation."""

from __future__ import annotations

import pytest

from tests.families.parler.tiny import make_tiny_pack
from tests.families.stack import Conversations, Family

pytestmark = pytest.mark.timeout(400)

FAMILY = Family("tiny-parler", "parler_tts", make_tiny_pack)


class TestParler(Conversations):
    pass
