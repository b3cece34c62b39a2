"""What torch reads from the environment when it is first imported, set where the user has not."""

from __future__ import annotations

import os

# Threads of OpenMP wait for each other at the end of every operation. GNU's spin for long, and
# where another process has their core that makes a step many times slower; threads that sleep at
# once lose a quarter of a step to waking up on a quiet machine. So they spin for a moment, then
# sleep: bench/README.md has the figures.
_WAITING = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "3000"}


def prepare() -> None:
    """Set them. Packs of several sizes would leave holes in a GPU's memory, which is planned nearly
    whole, so its segments grow."""
    if "OMP_WAIT_POLICY" not in os.environ:
        for name, value in _WAITING.items():
            os.environ.setdefault(name, value)
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
