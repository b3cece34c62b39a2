"""The packs of the next step, made while the caller works on this one's."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from fasttr.batch import PackedBatch

Packs = list[PackedBatch]


class PacksAhead:
    """`packs` of a step, called one step ahead in a thread; it lets go of the interpreter in its
    large copies, and a GPU works on meanwhile.

    Args:
        packs: the packs of a step (counted from 0), a pure function.
        steps: of the run; nothing is made beyond.
    """

    def __init__(self, packs: Callable[[int], Packs], steps: int):
        self._packs = packs
        self._steps = steps
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="packs")
        self._next: tuple[int, Future[Packs]] | None = None

    def __call__(self, step: int) -> Packs:
        """The packs of `step`; errors of making them are raised here."""
        if self._next is not None and self._next[0] == step:
            found = self._next[1].result()
        else:
            found = self._packs(step)
        self._next = None
        if step + 1 < self._steps:
            self._next = step + 1, self._worker.submit(self._packs, step + 1)
        return found
