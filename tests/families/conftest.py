"""What holds for every family's tests."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

if TYPE_CHECKING:
    from tests.families.stack import Family
    from tests.integration.live import Installation

# Nothing here may ask a hub for anything, not even whether it knows a newer file.
os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Many small products on two cores: a second thread costs more than it does."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def family(request: pytest.FixtureRequest) -> Family:
    """What the module says: see tests/families/stack.py."""
    said: Family = request.module.FAMILY
    return said


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running(
    family: Family, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Installation]:
    from tests.families.stack import standing

    async with standing(family, tmp_path_factory.mktemp("stack")) as one:
        yield one
