"""How many cores an engine computes with on a processor.

A frame is some 3,000 operations after each other, and OpenMP meets after each of those that it
shares out. On the main thread its team spins until the next; beside a second thread of the process
that computes (a loader, another engine) it sleeps instead, and each meeting is a wake-up: for a
narrow model that takes several times what is computed, and the more the busier the machine is.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from src.tts.families.csm.weights import CsmWeights

WIDE = 256
"""Of such a width a layer's largest matrix has 1 MB: a core reads it in the time that waking
another one takes."""


def settle(weights: CsmWeights) -> None:
    """The calling thread belongs to an engine of these weights from now on."""
    if weights.device.type == "cpu" and weights.hidden < WIDE:
        keep_to_one_core()


def keep_to_one_core() -> None:
    """The calling thread's operations; all others', and those of threads to come, are as before.

    torch keeps the number for each thread, and sets with it what threads to come begin with; so
    another thread sets that back.
    """
    before = torch.get_num_threads()
    if before > 1:
        torch.set_num_threads(1)
        back = threading.Thread(target=torch.set_num_threads, args=(before,))
        back.start()
        back.join()
