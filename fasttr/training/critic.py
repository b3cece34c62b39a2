"""The critic of PPO: a reward model whose head is read at every token, trained beside the policy.

Legend: R predicting rows of a pack, one for each token of its completions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fasttr.batch import PackedBatch
from fasttr.config.online_config import OnlineConfig
from fasttr.errors import FasttrError
from fasttr.losses.values import KlCoefficient, ValueLoss
from fasttr.models.gather import gather_rows
from fasttr.models.load import load_tokenizer
from fasttr.models.reward import RewardModel, load_reward_model, read_calibration
from fasttr.models.vocabulary import rows_wanted
from fasttr.optim.adamw import after_step, take_up_schedule
from fasttr.optim.update import (
    Update,
    begin_step,
    masters,
    state_tensors,
    take_up_state,
    update,
)

_WEIGHT, _OPTIMIZER, _COEFFICIENT = "weight/", "optimizer/", "kl_coefficient"


class ValueSums(NamedTuple):
    """Sums over the tokens of a pack that are kept, on the device."""

    loss: Tensor  # () of the value loss, before vf_coef
    clipped: Tensor  # () tokens where the clip decides
    tokens: Tensor  # ()


class Critic:
    """Values of tokens, their optimizer, and the coefficient of the KL, which a checkpoint keeps
    with them."""

    def __init__(self, config: OnlineConfig, model: RewardModel, total_steps: int, offset: float):
        self.model = model
        self.coefficient = KlCoefficient(config.beta, config.kl_target, config.kl_horizon)
        self._loss = ValueLoss(config.cliprange_value)
        self._weight = config.vf_coef
        self._max_grad_norm = config.max_grad_norm
        self._offset = offset
        self.optimizer = config.optimizer().optimizer(model.model, model.bf16)
        self._scheduler = config.optimizer().scheduler(self.optimizer, total_steps)

    def values(self, batch: PackedBatch) -> Tensor:
        """(R,) fp32: what is expected before each token, of a pack on the device."""
        with self.model.autocast():
            hidden_TD = self.model.hidden_states(batch)
        return self.model.score_rows(gather_rows(hidden_TD, batch.predicting)) - self._offset

    @torch.no_grad()
    def frozen_values(self, batch: PackedBatch) -> Tensor:
        """(R,) without gradients."""
        return self.values(batch.to(self.model.device))

    def begin_step(self, packs: int) -> None:
        begin_step(self.optimizer, packs)

    def backward(
        self, batch: PackedBatch, old_value: Tensor, target: Tensor, keep: Tensor, normalizer: float
    ) -> ValueSums:
        """Gradients of a pack's share of the loss; all (R,) but the normalizer."""
        value = self.values(batch)
        loss = (self._loss(value, old_value, target) * keep).sum()
        (self._weight / normalizer * loss).backward()
        clipped = self._loss.is_clipped(value.detach(), old_value, target) * keep
        return ValueSums(loss.detach(), clipped.sum(), keep.sum())

    def finish_step(self, loss: Tensor) -> Update:
        """The update on the gradients that are there."""
        done = update(self.optimizer, self.model, loss, self._max_grad_norm)
        after_step(self._scheduler)
        return done

    def named_tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps: fp32 weights, moments, the coefficient."""
        whole = masters(self.optimizer, self.model.model)
        weights = {_WEIGHT + name: x for name, x in whole.items()}
        moments = {_OPTIMIZER + key: x for key, x in state_tensors(self.optimizer).items()}
        coefficient = torch.tensor(self.coefficient.value, dtype=torch.float64)
        return {**weights, **moments, _COEFFICIENT: coefficient}

    def take_up(self, saved: Mapping[str, Tensor], step: int) -> None:
        """Go on from `named_tensors` after so many steps; the weights have been read by
        `read_critic`."""
        moments = {
            key.removeprefix(_OPTIMIZER): x
            for key, x in saved.items()
            if key.startswith(_OPTIMIZER)
        }
        take_up_state(self.optimizer, moments)
        take_up_schedule(self._scheduler, self.optimizer, step, None)
        self.coefficient.value = float(saved[_COEFFICIENT])


def read_critic(
    config: OnlineConfig,
    device: torch.device,
    tokenizer: Any,
    total_steps: int,
    saved: Mapping[str, Tensor] | None,
) -> Critic:
    """The critic of a run, with the weights of a checkpoint where there is one."""
    name = config.value_source
    key = "value_model_name_or_path"
    if Path(name).is_dir() and load_tokenizer(name, key=key).get_vocab() != tokenizer.get_vocab():
        raise FasttrError(
            f"{key}: the tokenizer of {name} is not the policy's, whose tokens a critic reads; "
            "name a folder with the same one"
        )
    wanted = dataclasses.replace(
        config.model(device, name),
        key=key,
        gradient_checkpointing=config.gradient_checkpointing is not False,
        ld_alpha=None,
        embedding_rows=rows_wanted(tokenizer) if config.resize_embeddings else None,
    )
    model = load_reward_model(wanted, config.seed)
    if saved is not None:
        with torch.no_grad():
            for name_of, p in model.model.named_parameters():
                p.copy_(saved[_WEIGHT + name_of])
    return Critic(config, model, total_steps, read_calibration(name))
