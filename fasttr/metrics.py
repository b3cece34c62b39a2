"""Metrics under TRL's names: summed on the device, read to the host only when a line is written.

Legend: R scored rows, N completions, P rows of data.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fasttr.batch import PackedBatch
from fasttr.errors import FasttrError

# The entries of the vector of sums that a pack adds to.
SUMS = (
    "loss", "rows", "chosen", "rejected", "chosen_reward", "rejected_reward", "wins", "distance",
    "chosen_tokens", "rejected_tokens", "chosen_logit", "rejected_logit", "entropy", "correct",
)  # fmt: skip


class Scores(NamedTuple):
    """What the head returns of a pack, as far as metrics read it."""

    loss: Tensor  # ()
    logp: Tensor  # (N,)
    entropy: Tensor | None  # (R,)
    correct: Tensor | None  # (R,) bool
    logit_mean: Tensor | None  # (R,)


@torch.no_grad()
def pack_sums(scores: Any, ref_logp: Tensor | None, batch: PackedBatch, beta: float, per_row: int) -> Tensor:
    """(len(SUMS),) fp32 on the device. `scores` has the fields of `Scores`."""
    zero = scores.logp.new_zeros(())
    chosen, rejected = scores.logp[::per_row], scores.logp[1::per_row] if per_row > 1 else None
    sums = dict.fromkeys(SUMS, zero)
    sums |= {"loss": scores.loss.detach(), "rows": zero + len(chosen), "chosen": chosen.sum()}
    if rejected is not None:
        sums["rejected"] = rejected.sum()
    if ref_logp is not None:
        logratio = scores.logp - ref_logp
        u, v = logratio[::per_row], logratio[1::per_row]
        sums |= {"chosen_reward": beta * u.sum(), "rejected_reward": beta * v.sum(), "wins": (u > v).sum(),
                 "distance": logratio.abs().sum() / per_row}  # fmt: skip
    if scores.entropy is not None:
        lengths = batch.cu_completions.diff()
        first_of_row = torch.arange(len(lengths)) % per_row == 0
        is_chosen = first_of_row.repeat_interleave(lengths).to(scores.logp.device, non_blocking=True)
        sums |= {
            "chosen_tokens": is_chosen.sum(), "rejected_tokens": (~is_chosen).sum(),
            "chosen_logit": (scores.logit_mean * is_chosen).sum(),
            "rejected_logit": (scores.logit_mean * ~is_chosen).sum(),
            "entropy": scores.entropy.sum(), "correct": (scores.correct & is_chosen).sum(),
        }  # fmt: skip
    return torch.stack([sums[name].to(torch.float32) for name in SUMS])


def means(sums: Tensor) -> Tensor:
    """Sums of one optimizer step (or of an evaluation) to means, still on the device, in the order of SUMS."""
    s = dict(zip(SUMS, sums, strict=True))
    tokens = s["chosen_tokens"] + s["rejected_tokens"]
    denominators = {"loss": 1.0, "rows": 1.0, "chosen_tokens": 1.0, "rejected_tokens": 1.0, "entropy": tokens,
                    "chosen_logit": s["chosen_tokens"], "rejected_logit": s["rejected_tokens"],
                    "correct": s["chosen_tokens"]}  # fmt: skip
    return torch.stack([s[name] / denominators.get(name, s["rows"]) for name in SUMS])


def named(values: list[float], *, reference: bool, pairs: bool, prefix: str = "") -> dict[str, float]:
    """Means in the order of SUMS to TRL's metric names; what a loss does not have is left out."""
    m = dict(zip(SUMS, values, strict=True))
    out = {"loss": m["loss"], "logps/chosen": m["chosen"], "logits/chosen": m["chosen_logit"]}
    if pairs:
        out |= {"logps/rejected": m["rejected"], "logits/rejected": m["rejected_logit"]}
    if reference:
        out |= {
            "rewards/chosen": m["chosen_reward"], "rewards/rejected": m["rejected_reward"],
            "rewards/margins": m["chosen_reward"] - m["rejected_reward"], "rewards/accuracies": m["wins"],
            "ref/distance": m["distance"],
        }  # fmt: skip
    out |= {"entropy": m["entropy"], "mean_token_accuracy": m["correct"]}
    return {prefix + key: value for key, value in out.items()}


def binomial_stderr(share: float, n: int) -> float:
    """Standard error of a share of n independent rows."""
    return math.sqrt(share * (1 - share) / n)


class MetricsLog:
    """`metrics.jsonl` (one object a line with `step`, unrounded) and, when asked for, TensorBoard."""

    def __init__(self, output_dir: Path, report_to: str, keep_until: int | None = None):
        """`keep_until`: the step that a run resumes from; later lines, and a torn last one, are cut off."""
        self.path = output_dir / "metrics.jsonl"
        kept: list[str] = []
        if keep_until is not None and self.path.exists():
            for line in self.path.read_text().splitlines():
                try:
                    step = json.loads(line)["step"]
                except (json.JSONDecodeError, KeyError):
                    break  # torn by a kill in mid-write: nothing after it can be older
                if step <= keep_until:
                    kept.append(line + "\n")
        aside = self.path.with_suffix(".jsonl.tmp")
        aside.write_text("".join(kept))
        os.replace(aside, self.path)
        self._file = self.path.open("a", buffering=1)
        self._board = _summary_writer(output_dir, keep_until) if report_to == "tensorboard" else None

    def write(self, step: int, values: dict[str, Any]) -> None:
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        if self._board is not None:
            for key, value in values.items():
                if isinstance(value, (int, float)):
                    tag = f"eval/{key[5:]}" if key.startswith("eval_") else f"train/{key}"
                    self._board.add_scalar(tag, value, step)

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()


def _summary_writer(output_dir: Path, keep_until: int | None) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise FasttrError("report_to: tensorboard is not installed; run pip install 'fasttr[train]'") from error
    return SummaryWriter(str(output_dir / "runs"), purge_step=None if keep_until is None else keep_until + 1)
