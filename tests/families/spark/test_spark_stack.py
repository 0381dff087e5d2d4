"""Spark-TTS through the whole installation."""

from __future__ import annotations

import pytest

from tests.families.spark.tiny import make_tiny_pack
from tests.families.stack import Conversations, Family

pytestmark = pytest.mark.timeout(400)

FAMILY = Family("tiny-spark", "spark_tts", make_tiny_pack)


class TestSpark(Conversations):
    pass
