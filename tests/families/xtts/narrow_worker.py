"""The worker for a tiny pack of XTTS: the package gives the vocoder its width, and no pack can."""

from __future__ import annotations

import sys

from src.tts.worker import main
from tests.families.xtts.tiny import narrow_vocoder

if __name__ == "__main__":
    with narrow_vocoder():
        sys.exit(main())
