"""What is summed over the packs of a step, and the metrics that the means become: by kind of run.

Legend: N completions, B rows, m completions of a row.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
from torch import Tensor

from fasttr.batch import PackedBatch
from fasttr.losses import Loss
from fasttr.losses.reward import RewardLoss, accuracy
from fasttr.metrics import sums


class Ledger(Protocol):
    """A vector of sums with its names; the first of them is the loss."""

    @property
    def names(self) -> tuple[str, ...]: ...

    def zeros(self, device: torch.device) -> Tensor:
        """The sums of nothing, fp32."""
        ...

    def of_pack(self, out: Any, ref_logp: Tensor | None, batch: PackedBatch) -> Tensor:
        """The sums of one pack, on the device."""
        ...

    def merged(self, total: Tensor, of_pack: Tensor) -> Tensor: ...

    def means(self, total: Tensor) -> Tensor:
        """Means of a step, still on the device."""
        ...

    def metrics(self, means: dict[str, float], prefix: str = "") -> dict[str, float]:
        """Means by name, under their names in metrics.jsonl."""
        ...


class PreferenceLedger:
    """Of runs on log-probs: see `fasttr.metrics.sums`."""

    names = sums.NAMES

    def __init__(self, loss: Loss):
        self._loss = loss

    def zeros(self, device: torch.device) -> Tensor:
        return sums.zeros(device)

    def of_pack(self, out: Any, ref_logp: Tensor | None, batch: PackedBatch) -> Tensor:
        return sums.pack_sums(out, ref_logp, batch, self._loss)

    def merged(self, total: Tensor, of_pack: Tensor) -> Tensor:
        return total + of_pack

    def means(self, total: Tensor) -> Tensor:
        return sums.means(total)

    def metrics(self, means: dict[str, float], prefix: str = "") -> dict[str, float]:
        return sums.as_metrics(means, self._loss, prefix)


class RewardLedger:
    """Of reward models, under the names of TRL's RewardTrainer; `margin` is of the best and the
    worst completion of a row."""

    names: tuple[str, ...] = (
        "loss",
        "rows",
        "mean_reward",
        "accuracy",
        "margin",
        "min_reward",
        "max_reward",
    )
    # Each row's weight, for how many rows a weighted step is worth.
    _weights = ("weight", "weight_square", "weights/max")
    _all = (*names, *_weights)

    def __init__(self, loss: RewardLoss, has_weights: bool = False):
        self._m = loss.completions
        self.names = self._all if has_weights else RewardLedger.names

    def zeros(self, device: torch.device) -> Tensor:
        start = {"min_reward": math.inf, "max_reward": -math.inf}
        return torch.tensor([start.get(name, 0.0) for name in self.names], device=device)

    @torch.no_grad()
    def of_pack(self, out: Any, ref_logp: Tensor | None, batch: PackedBatch) -> Tensor:
        score_Bm = out.score.view(-1, self._m)
        found = {
            "loss": out.loss.detach(),
            "rows": score_Bm.new_tensor(len(score_Bm)),
            "mean_reward": score_Bm.mean(dim=1).sum(),
            "accuracy": accuracy(score_Bm).sum(),
            "margin": (score_Bm[:, 0] - score_Bm[:, -1]).sum(),
            "min_reward": score_Bm.min(),
            "max_reward": score_Bm.max(),
            "weight": batch.weights.sum(),
            "weight_square": (batch.weights**2).sum(),
            "weights/max": batch.weights.max(),
        }
        return torch.stack([found[name].float() for name in self.names])

    def merged(self, total: Tensor, of_pack: Tensor) -> Tensor:
        merged = total + of_pack
        for name, meet in (
            ("min_reward", torch.minimum),
            ("max_reward", torch.maximum),
            ("weights/max", torch.maximum),
        ):
            if name in self.names:
                place = self.names.index(name)
                merged[place] = meet(total[place], of_pack[place])
        return merged

    def means(self, total: Tensor) -> Tensor:
        rows = total[self.names.index("rows")]
        of_rows = ("mean_reward", "accuracy", "margin")
        values = [
            value / rows if name in of_rows else value
            for name, value in zip(self.names, total, strict=True)
        ]
        return torch.stack(values)

    def metrics(self, means: dict[str, float], prefix: str = "") -> dict[str, float]:
        found = {name: value for name, value in means.items() if name != "rows"}
        if "weight" in found:
            total, square = found.pop("weight"), found.pop("weight_square")
            found["weights/ess"] = total**2 / square if square else 0.0
            found["weights/max_share"] = found.pop("weights/max") / total if total else 0.0
        return {prefix + name: value for name, value in found.items()}
