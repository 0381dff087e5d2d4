"""CosyVoice 2 through the whole installation."""

from __future__ import annotations

import pytest

from tests.families.cosyvoice.tiny import make_tiny_pack
from tests.families.stack import Conversations, Family

pytestmark = pytest.mark.timeout(400)

FAMILY = Family("tiny-cosyvoice", "cosyvoice2", make_tiny_pack)


class TestCosyVoice(Conversations):
    pass
