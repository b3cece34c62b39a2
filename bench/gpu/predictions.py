"""What was predicted of the figures of each part before any of them was measured, so that a miss
teaches. Ranges from bench/model.py are its value, 20 % either way."""

from __future__ import annotations

from typing import NamedTuple

from bench.model import FUSED, H200, layer_seconds, mfu, work_of
from bench.shapes import SHAPES
from fasttr.cluster.step import COMPILED, EAGER
from fasttr.memory.choose import USABLE

MODEL = "bench/model.py"
GOAL = "goal"
GUESS = "estimate"
LAYER_TOKENS = 16384
EIGHT_B = SHAPES["llama-3-8b"]

AS_PREDICTED = "as predicted"


class Predicted(NamedTuple):
    """A range; None where it has no end."""

    low: float | None
    high: float | None
    source: str

    def verdict(self, value: float) -> str:
        if self.low is not None and value < self.low:
            return "below"
        if self.high is not None and value > self.high:
            return "above"
        return AS_PREDICTED

    def __str__(self) -> str:
        low, high = _short(self.low), _short(self.high)
        if self.high is None:
            return f"at least {low} ({self.source})"
        if self.low is None:
            return f"at most {high} ({self.source})"
        return f"{low} to {high} ({self.source})"


def _short(value: float | None) -> str:
    """Three digits, or all those before the point."""
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def within(value: float, share: float = 0.2, source: str = MODEL) -> Predicted:
    return Predicted(value * (1 - share), value * (1 + share), source)


def at_least(value: float, source: str = GOAL) -> Predicted:
    return Predicted(value, None, source)


def at_most(value: float, source: str = GOAL) -> Predicted:
    return Predicted(None, value, source)


def _of_layers() -> dict[tuple[str, str], Predicted]:
    """Forward and backward of one layer, ms, by the model."""
    found = {}
    for arch in ("llama-3-8b", "pythia-2.8b"):
        for mode, elementwise, casts in (("fp32", EAGER, True), ("compiled", COMPILED, False)):
            seconds = layer_seconds(SHAPES[arch], LAYER_TOKENS, elementwise, casts, H200)
            for what, value in zip(("forward", "backward"), seconds, strict=True):
                found["layer", f"{arch}, {mode}, {what}"] = within(value * 1e3)
    # Counted on a Llama layer on a CPU.
    found["layer", "llama-3-8b, fp32, kept, D bytes a token"] = within(61.5, 0.1)
    found["layer", "llama-3-8b, bf16, kept, D bytes a token"] = within(49, 0.1)
    found["layer", "llama-3-8b, compiled, kept, D bytes a token"] = within(36, 0.1)
    found["layer", "llama-3-8b, compiled@0.8, kept, D bytes a token"] = within(25, 0.1)
    found["layer", "pythia-2.8b, fp32, gather's share"] = Predicted(0.02, 0.05, GUESS)
    return found


def _mfu_without_optimizer(lengths: str) -> Predicted:
    """Forward and backward alone, split weights, compiled, all made again in the backward."""
    bare = FUSED._replace(sweep=0, each_pack=0)
    return within(mfu(EIGHT_B, work_of(lengths), bare, H200), 0.12)


PREDICTIONS: dict[tuple[str, str], Predicted] = {
    ("facts", "copy"): Predicted(4000, 4500, "seen on such a machine"),
    ("facts", "product of 8192 cubed"): Predicted(730, 800, "seen on such a machine"),
    ("facts", "layer products, T 16384"): Predicted(680, 760, GUESS),
    ("facts", "odd T over even T"): Predicted(0.90, 0.97, GUESS),
    **_of_layers(),
    ("model8b", "hh, packs of 8192, MFU"): _mfu_without_optimizer("hh"),
    ("model8b", "ultrafeedback, packs of 8192, MFU"): _mfu_without_optimizer("ultrafeedback"),
    ("head", "llama-3-8b, bf16, fasttr, ms"): within(40, 0.1, GUESS),
    ("head", "llama-3-8b, bf16, fasttr, share of bare products"): Predicted(0.85, 0.95, GUESS),
    ("head", "llama-3-8b, bf16, over TRL"): at_least(1.25),
    ("head", "llama-3-8b, bf16, over Liger chunked DPO"): at_least(2.0),
    ("lerp", "llama-3-8b, least share of the copy"): at_least(0.9),
    ("peers1b", "over trl-default"): Predicted(5, 8, GUESS),
    ("peers1b", "over trl-best"): Predicted(3, 4, GUESS),
    ("train", "idle share"): at_most(0.02, GUESS),
    ("train", "waits of the host a step"): at_most(1),
    ("train", "own host time of a step"): at_most(5),
    ("optim", "llama-3-8b-layer, fp32 moments, share of the copy"): at_least(0.9),
    ("fit8b", "llama-3-8b, bf16 moments, peak"): at_most(140e9 / 2**30),
    ("fit8b", "llama-3-8b, bf16 moments, MFU"): within(
        mfu(EIGHT_B, work_of("hh"), FUSED, H200), 0.12
    ),
    ("fit8b", "llama-3-8b, fp32 moments, peak"): at_most(143771 * 2**20 * USABLE / 2**30, MODEL),
    ("fit8b", "llama-3-8b, bf16 moments, peak over planned"): Predicted(0.9, 1.1, GOAL),
    ("fit8b", "llama-3-8b, fp32 moments, peak over planned"): Predicted(0.9, 1.1, GOAL),
    ("fit24", "pythia-2.8b, bf16 moments on 48 GB, peak over planned"): Predicted(0.9, 1.1, GOAL),
}
