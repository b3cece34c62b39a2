"""An optimizer by its name and schedules from transformers, with TRL's parameter groups."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from fasttr.errors import FasttrError
from fasttr.optim.matrices import matrices
from fasttr.optim.named import OPTIMIZERS, Arguments, parse_arguments
from fasttr.optim.update import MasterAdamW

PLATEAU = "reduce_lr_on_plateau"
# Schedules of transformers that are known before training, and the one that follows evaluations.
SCHEDULES = (
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "warmup_stable_decay",
    PLATEAU,
)


class LocalRows(NamedTuple):
    """What lies here of a model that is divided among processes, by the names of its parameters."""

    parameters: Mapping[str, nn.Parameter]  # bf16 already, those that are split
    remainders: Mapping[str, Tensor]  # of those, int16


@dataclass(frozen=True)
class OptimizerConfig:
    """An optimizer and the schedule of its rate."""

    learning_rate: float = 1e-6
    weight_decay: float = 0.0  # decoupled; none on biases and norms
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    name: str = "adamw_torch_fused"
    arguments: str | None = None  # what an optimizer other than AdamW reads, as optim_args
    schedule: str = "linear"
    schedule_kwargs: dict[str, Any] | None = None
    warmup_steps: float = 0  # below 1 a share of all steps, rounded up
    moments: str = "fp32"  # how AdamW's are held: fp32, bf16 or int8
    keeps_masters: bool = True  # bf16 weights have the other 16 bits of fp32 beside them
    seed: int = 0  # of stochastic rounding

    def splits(self, bf16: bool) -> bool:
        """Whether bf16 compute makes the matrices bf16 in place: where AdamW is the optimizer."""
        return bf16 and OPTIMIZERS[self.name].is_adamw

    def check_rows(self) -> None:
        """Raise FasttrError where the optimizer looks at more than single weights, and so cannot
        step the rows of a divided model."""
        if not OPTIMIZERS[self.name].is_elementwise:
            raise FasttrError(
                f"optim: got {self.name} with shard_size above 1; it looks at whole matrices, of "
                "which a process has some rows: take adamw_torch_fused"
            )

    def optimizer(
        self, model: nn.Module, bf16: bool = False, rows: LocalRows | None = None
    ) -> torch.optim.Optimizer:
        """Over all trainable parameters; step it by `fasttr.optim.update.update`.

        Under bf16 compute the matrices become bf16 in place where AdamW is the optimizer (see
        `MasterAdamW`); all other parameters, and all of other optimizers, stay fp32 leaves. Of a
        divided model it is over `rows`; see `check_rows`.
        """
        own = parse_arguments(self.name, self.arguments)
        kind = OPTIMIZERS[self.name]
        local = None if rows is None else rows.parameters
        if kind.is_adamw and (bf16 or self.moments != "fp32"):
            if rows is not None:
                return self._of_rows(model, rows)
            return self._master_adamw(model, matrices(model) if bf16 else set())
        wanted = Arguments(self.learning_rate, self.betas, self.eps, own)
        return kind.build(parameter_groups(model, self.weight_decay, local=local), wanted)

    def _of_rows(self, model: nn.Module, rows: LocalRows) -> MasterAdamW:
        """Over rows some of which are bf16, with their remainders."""
        halves = {p for p in rows.parameters.values() if p.dtype == torch.bfloat16}
        groups = parameter_groups(model, self.weight_decay, halves, rows.parameters)
        if not self.keeps_masters:
            groups = [{**group, "split": False} for group in groups]
        optimizer = MasterAdamW(groups, **self._options())
        for name, remainder in rows.remainders.items():
            state = optimizer.state[rows.parameters[name]]
            if "remainder" in state:
                state["remainder"].copy_(remainder)
        return optimizer

    def _options(self) -> dict[str, Any]:
        return {
            "lr": self.learning_rate,
            "betas": self.betas,
            "eps": self.eps,
            "moments": self.moments,
            "split": False,  # but for the groups that say otherwise
            "seed": self.seed,
        }

    def _master_adamw(self, model: nn.Module, split: set[nn.Parameter]) -> MasterAdamW:
        groups = parameter_groups(model, self.weight_decay, split)
        options = self._options()
        if self.keeps_masters:
            return MasterAdamW.from_fp32(groups, **options)
        for p in split:
            p.grad = None
            p.data = p.data.to(torch.bfloat16)
        return MasterAdamW([{**group, "split": False} for group in groups], **options)

    def check_schedule(self) -> None:
        """Raise FasttrError where the schedule cannot be made, before there is a model."""
        parameter = nn.Parameter(torch.zeros(()))
        self.scheduler(torch.optim.SGD([parameter], lr=self.learning_rate), total_steps=100)

    def scheduler(self, optimizer: torch.optim.Optimizer, total_steps: int) -> Any:
        """transformers' schedule of that name."""
        from transformers import get_scheduler

        warmup = self.warmup_steps
        try:
            return get_scheduler(
                self.schedule,
                optimizer,
                num_warmup_steps=math.ceil(warmup * total_steps) if warmup < 1 else int(warmup),
                num_training_steps=total_steps,
                scheduler_specific_kwargs=self.schedule_kwargs,
            )
        except (ValueError, TypeError) as error:
            raise FasttrError(
                f"lr_scheduler_type: {self.schedule} with lr_scheduler_kwargs "
                f"{self.schedule_kwargs}: {error}"
            ) from error


def after_step(scheduler: Any) -> None:
    """A schedule moves on with every step, unless it follows evaluations."""
    if not isinstance(scheduler, ReduceLROnPlateau):
        scheduler.step()


def after_evaluation(scheduler: Any, value: float) -> None:
    """Tell a schedule that follows evaluations what one has found."""
    if isinstance(scheduler, ReduceLROnPlateau):
        scheduler.step(value)


def schedule_state(scheduler: Any) -> dict[str, Any] | None:
    """What a schedule that follows evaluations has seen, as JSON values; None for any other one."""
    if not isinstance(scheduler, ReduceLROnPlateau):
        return None
    names = ("best", "num_bad_epochs", "cooldown_counter", "last_epoch")
    state: dict[str, Any] = {name: getattr(scheduler, name) for name in names}
    state["best"] = None if math.isinf(state["best"]) else float(state["best"])
    return state | {"rates": scheduler.get_last_lr()}


def take_up_schedule(
    scheduler: Any,
    optimizer: torch.optim.Optimizer,
    step: int,
    state: dict[str, Any] | None,
) -> None:
    """Put a schedule where it was after `step` steps."""
    scheduler.last_epoch = step
    if state is None:
        rates = zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
        scheduler._last_lr = [base * factor(step) for base, factor in rates]
    else:
        scheduler._last_lr = state["rates"]
        scheduler.num_bad_epochs = state["num_bad_epochs"]
        scheduler.cooldown_counter = state["cooldown_counter"]
        scheduler.last_epoch = state["last_epoch"]
        if state["best"] is not None:
            scheduler.best = state["best"]
    for group, rate in zip(optimizer.param_groups, scheduler._last_lr, strict=True):
        group["lr"] = rate


def parameter_groups(
    model: nn.Module,
    weight_decay: float,
    split: AbstractSet[nn.Parameter] = frozenset(),
    local: Mapping[str, nn.Parameter] | None = None,
) -> list[dict[str, Any]]:
    """Every trainable parameter once, with its name: no decay on biases and on norms.

    Those of `split` have groups of their own. A group without parameters is left out, but for the
    first two. `local`: in place of the model's own parameters of the same names.
    """
    kinds: dict[tuple[bool, bool], dict[str, nn.Parameter]] = {
        (decays, is_split): {} for is_split in (False, True) for decays in (True, False)
    }
    undecayed = _undecayed(model)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if local is not None:
        trained = {name: local[name] for name in trained}
    for name, parameter in trained.items():
        kinds[name not in undecayed, parameter in split][name] = parameter
    groups: list[dict[str, Any]] = []
    for (decays, is_split), found in kinds.items():
        if not found and is_split:
            continue
        group: dict[str, Any] = {
            "params": list(found.values()),
            "names": list(found),
            "weight_decay": weight_decay if decays else 0.0,
        }
        groups.append({**group, "split": is_split} if split else group)
    wanted = sum(p.numel() for p in trained.values())
    counted = sum(p.numel() for group in groups for p in group["params"])
    if counted != wanted:
        raise RuntimeError(f"parameter groups hold {counted} of {wanted} trainable values")
    return groups


# Of names in lower case: what transformers' trainer leaves undecayed.
_UNDECAYED = re.compile(r"bias|layernorm|rmsnorm|(^|[._])norm($|\.)")


def _undecayed(model: nn.Module) -> set[str]:
    """Biases and norms as transformers' trainer tells them: by name, layer norms by type too."""
    by_name = {name for name, _ in model.named_parameters() if _UNDECAYED.search(name.lower())}
    norms = [part for part in model.modules() if isinstance(part, nn.LayerNorm)]
    by_type = {p for norm in norms for p in norm.parameters()}
    return by_name | {name for name, p in model.named_parameters() if p in by_type}
