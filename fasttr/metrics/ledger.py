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
    """A vector of sums with its names for every micro-batch of a step; the first is the loss."""

    @property
    def names(self) -> tuple[str, ...]: ...

    def zeros(self, device: torch.device, micro_batches: int = 1) -> Tensor:
        """The sums of nothing, (micro_batches, len(names)) fp32."""
        ...

    def of_pack(
        self,
        out: Any,
        ref_logp: Tensor | None,
        batch: PackedBatch,
        micro_batches: sums.MicroBatches | None = None,
        router_loss: Tensor | None = None,
    ) -> Tensor:
        """The sums of one pack, on the device; by default all its rows are of one micro-batch."""
        ...

    def merged(self, total: Tensor, of_pack: Tensor) -> Tensor: ...

    def means(self, total: Tensor) -> Tensor:
        """Means of micro-batches, still on the device; the loss stands in the first."""
        ...

    def metrics(self, means: dict[str, float]) -> dict[str, float]:
        """Means by name, under their names in metrics.jsonl."""
        ...


class PreferenceLedger:
    """Of runs on log-probs: see `fasttr.metrics.sums`."""

    names = sums.NAMES

    def __init__(self, loss: Loss):
        self._loss = loss

    def zeros(self, device: torch.device, micro_batches: int = 1) -> Tensor:
        return sums.zeros(device, micro_batches)

    def of_pack(
        self,
        out: Any,
        ref_logp: Tensor | None,
        batch: PackedBatch,
        micro_batches: sums.MicroBatches | None = None,
        router_loss: Tensor | None = None,
    ) -> Tensor:
        return sums.pack_sums(out, ref_logp, batch, self._loss, micro_batches, router_loss)

    def merged(self, total: Tensor, of_pack: Tensor) -> Tensor:
        return total + of_pack

    def means(self, total: Tensor) -> Tensor:
        return sums.means(total)

    def metrics(self, means: dict[str, float]) -> dict[str, float]:
        return sums.as_metrics(means, self._loss)


class RewardLedger:
    """Of reward models, under the names of TRL's RewardTrainer; `margin` is of the best and the
    worst completion of a row."""

    names: tuple[str, ...]
    _of_rows = ("mean_reward", "accuracy", "margin")
    _extremes = (("min_reward", torch.minimum), ("max_reward", torch.maximum))

    def __init__(self, loss: RewardLoss, has_weights: bool = False):
        self._m = loss.completions
        # Each row's weight, for how many rows a weighted step is worth.
        weights = ("weight", "weight_square", "weights/max") if has_weights else ()
        extremes = tuple(name for name, _ in self._extremes)
        self.names = ("loss", "rows", *self._of_rows, *extremes, *weights)

    def zeros(self, device: torch.device, micro_batches: int = 1) -> Tensor:
        start = {"min_reward": math.inf, "max_reward": -math.inf}
        one = torch.tensor([start.get(name, 0.0) for name in self.names], device=device)
        return one.repeat(micro_batches, 1)

    @torch.no_grad()
    def of_pack(
        self,
        out: Any,
        ref_logp: Tensor | None,
        batch: PackedBatch,
        micro_batches: sums.MicroBatches | None = None,
        router_loss: Tensor | None = None,
    ) -> Tensor:
        score_Bm = out.score.view(-1, self._m)
        number, place_B = 1, torch.zeros(len(score_Bm), device=score_Bm.device)
        if micro_batches is not None:
            number, place_B = micro_batches.number, micro_batches.of_row_B
        is_there = place_B == torch.arange(number, device=score_Bm.device)[:, None]
        summed = {
            "rows": torch.ones_like(score_Bm[:, 0]),
            "mean_reward": score_Bm.mean(dim=1),
            "accuracy": accuracy(score_Bm),
            "margin": score_Bm[:, 0] - score_Bm[:, -1],
            "weight": batch.weights,
            "weight_square": batch.weights**2,
        }
        found = {name: (values * is_there).sum(dim=1) for name, values in summed.items()}
        lowest = torch.where(is_there, score_Bm.amin(dim=1), math.inf)
        highest = torch.where(is_there, score_Bm.amax(dim=1), -math.inf)
        found["min_reward"], found["max_reward"] = lowest.amin(dim=1), highest.amax(dim=1)
        found["weights/max"] = (batch.weights * is_there).amax(dim=1)
        found["loss"] = torch.zeros_like(found["rows"])
        found["loss"][0] = out.loss.detach()
        return torch.stack([found[name].float() for name in self.names], dim=1)

    def merged(self, total: Tensor, of_pack: Tensor) -> Tensor:
        merged = total + of_pack
        for name, meet in (*self._extremes, ("weights/max", torch.maximum)):
            if name in self.names:
                place = self.names.index(name)
                merged[:, place] = meet(total[:, place], of_pack[:, place])
        return merged

    def means(self, total: Tensor) -> Tensor:
        rows = total[:, self.names.index("rows")]
        found = total.clone()
        for name in self._of_rows:
            found[:, self.names.index(name)] /= rows
        found[1:, 0] = torch.nan
        return found

    def metrics(self, means: dict[str, float]) -> dict[str, float]:
        found = {name: value for name, value in means.items() if name != "rows"}
        if "weight" in found:
            total, square = found.pop("weight"), found.pop("weight_square")
            found["weights/ess"] = total**2 / square if square else 0.0
            found["weights/max_share"] = found.pop("weights/max") / total if total else 0.0
        return found
