"""The parts of `python -m bench gpu`, in the order of evidence a minute."""

from __future__ import annotations

from typing import NamedTuple


class Part(NamedTuple):
    """One part: a process of its own.

    `seconds` are what it is expected to take on an H200; `run` names a function of a Task.
    """

    name: str
    seconds: float
    run: str  # module:function under bench.gpu
    evidence: str
    passes: str


PARTS = (
    Part("facts", 25, "facts:run", "rates of copies and products, what is installed", "sane"),
    Part("kernels", 100, "kernels:run", "the ops' own tests, compiled; poison; repeats", "all"),
    Part("gates", 45, "gates:run", "packed = alone, log-ratio 0, log 2, repeats", "all"),
    Part("layer", 100, "suites:layer", "one layer: fp32, split, bf16, compiled", "20 % of model"),
    Part(
        "fit8b", 130, "fit:run_8b", "8B, full fine-tuning, moving reference: peak, MFU", "it fits"
    ),
    Part("model8b", 90, "model8b:run", "8B forward and backward: ms, MFU, peak", "it fits"),
    Part("optim", 40, "suites:optim", "the optimizer's sweep beside its peers", "90 % of a copy"),
    Part("head", 60, "suites:head", "the loss head beside its peers", "errors at fp64's bar"),
    Part("lerp", 25, "suites:lerp", "the reference update", "90 % of a copy"),
    Part("step", 75, "suites:step", "what each part brings, at 1b", "losses equal"),
    Part("peers1b", 150, "suites:peers1b", "beside TRL, 1b, HH lengths", "losses within 2e-2"),
    Part("train", 60, "train:run", "waits, idle share, own time; kill and resume", "idle < 3 %"),
    Part("peers3b", 120, "suites:peers3b", "beside TRL, 3b, checkpointing", "losses within 2e-2"),
    Part("tune", 80, "tune:run", "configurations of the row kernels", "-"),
    Part("fit24", 90, "fit:run_small_cards", "1.2B and 2.8B on 24 and 48 GB", "they fit"),
)
BY_NAME = {part.name: part for part in PARTS}
