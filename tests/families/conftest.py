"""What holds for every family's tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

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
