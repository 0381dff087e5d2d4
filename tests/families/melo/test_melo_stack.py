"""MeloTTS through the whole installation."""

from __future__ import annotations

import pytest

from tests.families.melo.tiny import make_tiny_pack
from tests.families.stack import Conversations, Family

pytestmark = pytest.mark.timeout(400)

FAMILY = Family("tiny-melo", "melo", make_tiny_pack)


class TestMelo(Conversations):
    pass
