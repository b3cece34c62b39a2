"""Metrics under TRL's names: summed on the device, read to the host only when a line is written.

Legend: R scored rows, N completions.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from fasttr.batch import PackedBatch
from fasttr.losses import Loss, Weighted
from fasttr.metrics.trackers import Trackers

# The entries of the vector of sums that a pack adds to. Chosen and rejected are the two sides of a
# pair, or the desirable and undesirable rows of unpaired data.
SUMS = (
    "loss",
    "rows",
    "chosen_rows",
    "rejected_rows",
    "chosen",
    "rejected",
    "chosen_reward",
    "rejected_reward",
    "wins",
    "distance",
    "chosen_tokens",
    "rejected_tokens",
    "chosen_logit",
    "rejected_logit",
    "entropy",
    "correct",
    "kl",
    "groups",
)
# What each is divided by to give a mean; the rest are sums already, or counts.
DENOMINATORS = {
    "chosen": "chosen_rows",
    "rejected": "rejected_rows",
    "chosen_reward": "chosen_rows",
    "rejected_reward": "rejected_rows",
    "wins": "rows",
    "distance": "rows",
    "chosen_logit": "chosen_tokens",
    "rejected_logit": "rejected_tokens",
    "correct": "chosen_tokens",
    "kl": "groups",
}


class Scores(Protocol):
    """What the head returns of a pack, as far as metrics read it."""

    @property
    def loss(self) -> Tensor: ...  # ()
    @property
    def logp(self) -> Tensor: ...  # (N,)
    @property
    def entropy(self) -> Tensor | None: ...  # (R,)
    @property
    def correct(self) -> Tensor | None: ...  # (R,) bool
    @property
    def logit_mean(self) -> Tensor | None: ...  # (R,)


@torch.no_grad()
def pack_sums(
    scores: Scores, ref_logp: Tensor | None, batch: PackedBatch, loss: Loss | Weighted
) -> Tensor:
    """(len(SUMS),) fp32 on the device."""
    m, logp = loss.completions, scores.logp
    # (N,) 1 where the completion counts as chosen, and as rejected; a mismatched completion is
    # neither.
    chosen_N = torch.zeros_like(logp)
    rejected_N = torch.zeros_like(logp)
    if loss.unpaired:
        chosen_N[::m] = batch.labels.to(logp.dtype)
        rejected_N[::m] = 1 - chosen_N[::m]
    else:
        chosen_N[::m] = 1
        if m > 1:
            rejected_N[1::m] = 1
    rows = len(batch.rows)
    sums = {
        "loss": scores.loss.detach(),
        "rows": logp.new_full((), rows),
        "chosen_rows": chosen_N.sum(),
        "rejected_rows": rejected_N.sum(),
        "chosen": logp @ chosen_N,
        "rejected": logp @ rejected_N,
    }
    # Without a reference, rewards are those of SimPO and ORPO: beta times the mean log-prob of a
    # token.
    reward = logp - ref_logp if ref_logp is not None else logp / batch.token_counts
    sums |= {
        "chosen_reward": loss.beta * (reward @ chosen_N),
        "rejected_reward": loss.beta * (reward @ rejected_N),
        "distance": reward.abs() @ (chosen_N + rejected_N) / (1 if loss.unpaired else m),
    }
    if m > 1 and not loss.unpaired:
        sums["wins"] = (reward[0::m] > reward[1::m]).sum()
    if m > 1 and loss.unpaired and ref_logp is not None:
        sums["groups"] = logp.new_full((), len(batch.cu_rows) - 1)
        sums["kl"] = torch.stack(
            [part.mean().clamp(min=0) for part in reward[1::m].split(_diff(batch.cu_rows))]
        ).sum()
    if scores.entropy is not None and scores.correct is not None and scores.logit_mean is not None:
        lengths = batch.cu_completions.diff().to(logp.device, non_blocking=True)
        size = scores.entropy.shape[0]
        chosen_R, rejected_R = (
            x.repeat_interleave(lengths, output_size=size) for x in (chosen_N, rejected_N)
        )
        sums |= {
            "chosen_tokens": chosen_R.sum(),
            "rejected_tokens": rejected_R.sum(),
            "chosen_logit": scores.logit_mean @ chosen_R,
            "rejected_logit": scores.logit_mean @ rejected_R,
            "entropy": scores.entropy @ (chosen_R + rejected_R),
            "correct": scores.correct.to(logp.dtype) @ chosen_R,
        }
    zero = logp.new_zeros(())
    return torch.stack([sums.get(name, zero).to(torch.float32) for name in SUMS])


def _diff(offsets: tuple[int, ...]) -> list[int]:
    return [b - a for a, b in itertools.pairwise(offsets)]


def means(sums: Tensor) -> Tensor:
    """Sums of one optimizer step (or of an evaluation) to means, still on the device, in the order
    of SUMS.

    NaN where there was nothing to average: a step without desirable rows has no mean of them.
    """
    s = dict(zip(SUMS, sums, strict=True))
    tokens = s["chosen_tokens"] + s["rejected_tokens"]
    denominators = {name: s[by] for name, by in DENOMINATORS.items()} | {"entropy": tokens}
    return torch.stack(
        [s[name] / denominators[name] if name in denominators else s[name] for name in SUMS]
    )


class Averages:
    """Means of steps, averaged over the steps that have them, until a line is written."""

    def __init__(self, device: torch.device):
        self.sums = torch.zeros(2, len(SUMS), device=device)  # values, and how many steps had one

    def add(self, step_means: Tensor) -> None:
        there = ~step_means.isnan()
        there[0] = True  # a loss that is not a number is never left out
        self.sums += torch.stack([torch.where(there, step_means, 0.0), there.to(self.sums.dtype)])

    def read(self) -> list[float]:
        values = (self.sums[0] / self.sums[1]).tolist()
        self.sums.zero_()
        return values


def named(values: list[float], loss: Loss | Weighted, prefix: str = "") -> dict[str, float]:
    """Means in the order of SUMS to TRL's metric names; what a loss or the rows do not have is left
    out."""
    m = dict(zip(SUMS, values, strict=True))
    both = loss.completions > 1 or loss.unpaired
    out = {"loss": m["loss"], "logps/chosen": m["chosen"], "logits/chosen": m["chosen_logit"]}
    if both:
        out |= {"logps/rejected": m["rejected"], "logits/rejected": m["rejected_logit"]}
        out |= {
            "rewards/chosen": m["chosen_reward"],
            "rewards/rejected": m["rejected_reward"],
            "rewards/margins": m["chosen_reward"] - m["rejected_reward"],
        }
    if loss.needs_reference:
        out["ref/distance"] = m["distance"]
    if loss.unpaired:
        out |= {"kl": m["kl"] if loss.completions > 1 else 0.0, "entropy": m["entropy"]}
    else:
        out |= {"rewards/accuracies": m["wins"]} if both else {}
        out |= {"entropy": m["entropy"], "mean_token_accuracy": m["correct"]}
    return {
        prefix + key: value for key, value in out.items() if key == "loss" or not math.isnan(value)
    }


def binomial_stderr(share: float, n: int) -> float:
    """Standard error of a share of n independent rows."""
    return math.sqrt(share * (1 - share) / n)


class MetricsLog:
    """`metrics.jsonl` (one object a line with `step`, unrounded) and the trackers of
    `report_to`."""

    def __init__(
        self,
        output_dir: Path,
        report_to: str | Sequence[str] = "none",
        keep_until: int | None = None,
        run_name: str | None = None,
        project: str = "huggingface",
        config: dict[str, Any] | None = None,
    ):
        """`keep_until`: the step that a run resumes from; later lines, and a torn last one, are cut
        off. The rest is for `Trackers`."""
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
        self._trackers = Trackers(
            report_to,
            output_dir,
            keep_until=keep_until,
            run_name=run_name,
            project=project,
            config=config,
        )

    def write(self, step: int, values: dict[str, Any]) -> None:
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._trackers.log(step, values)

    def close(self) -> None:
        self._file.close()
        self._trackers.close()
