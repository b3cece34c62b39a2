"""The objects of a run and the counters that its loop moves on; nothing else."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fasttr.batch import TreeSource
from fasttr.checkpoint.divided import Writing
from fasttr.config.train_config import TrainConfig
from fasttr.distributed.ranks import ALONE, Ranks
from fasttr.evaluation.split import EvaluationSplit
from fasttr.losses import Loss
from fasttr.losses.objective import AnyObjective
from fasttr.memory.choose import Plan as MemoryPlan
from fasttr.metrics.ledger import Ledger
from fasttr.metrics.sums import Averages
from fasttr.models.packed import PackedModel
from fasttr.packing.ahead import PacksAhead
from fasttr.packing.plan import Plan
from fasttr.reference.logp_table import LogpTable
from fasttr.reference.moving import MovingReference
from fasttr.training.best import Best, Patience

REQUESTS = ("stop", "save", "evaluate")


class PendingCheckpoint(NamedTuple):
    """A checkpoint that is written while the run goes on."""

    writing: Writing
    step: int
    card: str  # of the model, as it was then


@dataclass
class Run:
    config: TrainConfig
    device: torch.device
    tokenizer: Any
    objective: AnyObjective
    ledger: Ledger
    trees: TreeSource
    plan: Plan
    packs: PacksAhead  # of the plan
    policy: PackedModel
    reference: MovingReference
    optimizer: torch.optim.Optimizer
    scheduler: Any
    window_logps: LogpTable  # of the reference, for the rows of the current window
    splits: dict[str, EvaluationSplit]  # what is evaluated on, by its name; "" for one without
    best: Best | None  # None: no checkpoint is called the best
    averages: Averages  # since the last line of metrics
    total_loss: Tensor  # () over all steps
    patience: Patience | None = None  # None: the run is not stopped early
    ranks: Ranks = ALONE  # this process among those of the run
    memory: MemoryPlan | None = None  # what was planned before weights were read
    is_resumed: bool = False
    step: int = 0  # optimizer steps done
    window_scored: bool = False
    num_tokens: int = 0
    saved_step: int | None = None  # of the newest checkpoint with a state
    pending: PendingCheckpoint | None = None  # one that is under way
    last_evaluation: dict[str, float] = field(default_factory=dict)
    requests: set[str] = field(default_factory=set)  # what callbacks asked for, until it is done

    @property
    def loss(self) -> Loss:
        return self.objective.loss

    @property
    def output_dir(self) -> Path:
        return self.config.output_folder

    @property
    def critic_tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps of a critic, where there is one."""
        return {}

    @property
    def tables(self) -> dict[str, LogpTable]:
        """The log-probs that resuming needs, by their names in a checkpoint."""
        found = {"scores": self.window_logps}
        for name, split in self.splits.items():
            ending = f"/{name}" if name else ""
            if split.ref_logps is not None:
                found[f"eval_scores{ending}"] = split.ref_logps
            if split.anchor_logps is not None:
                found[f"anchor{ending}"] = split.anchor_logps
        return found

    def ask(self, request: str) -> None:
        """Stop, save or evaluate after this step, as a callback wishes."""
        if request not in REQUESTS:
            raise ValueError(f"ask: got {request!r}; wanted one of {', '.join(REQUESTS)}")
        self.requests.add(request)
