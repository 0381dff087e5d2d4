"""Parler-TTS through the whole installation."""

from __future__ import annotations

import pytest

from tests.families.stack import Conversations, Family

pytestmark = pytest.mark.timeout(400)

FAMILY = Family("tiny-parler", "parler_tts")


class TestParler(Conversations):
    pass
