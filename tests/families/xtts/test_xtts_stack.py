"""XTTS-v2 through the whole installation."""

from __future__ import annotations

from functools import partial

import pytest

from tests.families.stack import Conversations, Family
from tests.families.xtts.tiny import make_tiny_pack

pytestmark = pytest.mark.timeout(400)

FAMILY = Family(
    "tiny-xtts", "xtts", partial(make_tiny_pack, max_codes=60), "tests.families.xtts.narrow_worker"
)


class TestXtts(Conversations):
    pass
