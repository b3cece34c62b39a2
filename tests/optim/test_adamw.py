"""Which parameters decay, and how the rate goes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import Trainer

from fasttr.errors import FasttrError
from fasttr.optim.adamw import (
    PLATEAU,
    OptimizerConfig,
    after_evaluation,
    after_step,
    parameter_groups,
    schedule_state,
    take_up_schedule,
)
from tests.architectures import ARCHITECTURES
from tests.tiny import packed_tiny, tiny_model


def names_by_decay(model: torch.nn.Module, weight_decay: float) -> dict[float, set[str]]:
    groups = OptimizerConfig(weight_decay=weight_decay).optimizer(model).param_groups
    assert all(len(group["names"]) == len(group["params"]) for group in groups)
    return {group["weight_decay"]: set(group["names"]) for group in groups}


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_what_decays_is_what_transformers_decays(arch):
    model = tiny_model(arch, implementation="eager")
    names = {name for name, _ in model.named_parameters()}  # a tied weight under one of its names
    decayed = names & set(Trainer.get_decay_parameter_names(None, model))
    rest = names - decayed
    assert any("norm" in name or "ln_" in name for name in rest)
    assert names_by_decay(model, 0.25) == {0.25: decayed, 0.0: rest}


def test_the_names_of_a_group_are_those_of_its_parameters():
    model = packed_tiny("gpt_neox")
    parameters = dict(model.named_parameters())
    for group in parameter_groups(model, 0.1):
        for name, parameter in zip(group["names"], group["params"], strict=True):
            assert parameters[name] is parameter


def test_a_tied_head_and_embedding_are_one_parameter():
    model = packed_tiny("qwen3").model
    assert model.lm_head.weight is model.model.embed_tokens.weight
    optimizer = OptimizerConfig(weight_decay=0.1).optimizer(model)
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(held) == len({id(p) for p in held}) == len(list(model.parameters()))


def test_a_frozen_parameter_is_in_no_group():
    model = packed_tiny()
    model.model.lm_head.weight.requires_grad_(False)
    assert "model.lm_head.weight" not in set().union(*names_by_decay(model, 0.1).values())


def rates(steps: int, **settings) -> list[float]:
    """The rate of each step."""
    config = OptimizerConfig(learning_rate=2.0, **settings)
    optimizer = config.optimizer(torch.nn.Linear(2, 2))
    scheduler = config.scheduler(optimizer, steps)
    found = []
    for _ in range(steps):
        found.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return found


def test_a_rate_warms_up_over_steps_or_a_share_of_them_rounded_up():
    assert rates(6, warmup_steps=2) == pytest.approx([0, 1, 2, 1.5, 1, 0.5])
    assert rates(6, warmup_steps=0.3) == pytest.approx([0, 1, 2, 1.5, 1, 0.5])  # ceil(1.8)
    assert rates(3, schedule="constant") == [2.0] * 3


def plateau() -> tuple[torch.optim.Optimizer, Any]:
    """A rate that halves after a second evaluation in a row that is no better."""
    settings = {"schedule": PLATEAU, "schedule_kwargs": {"patience": 1, "factor": 0.5}}
    config = OptimizerConfig(learning_rate=2.0, **settings)
    optimizer = config.optimizer(torch.nn.Linear(2, 2))
    return optimizer, config.scheduler(optimizer, 10)


def test_a_schedule_that_follows_evaluations_follows_no_step_and_goes_on_where_it_was():
    _, whole = plateau()
    for value in (1.0, 1.5):
        after_evaluation(whole, value)
    for _ in range(5):
        after_step(whole)
    assert whole.get_last_lr() == [2.0, 2.0]
    optimizer, resumed = plateau()
    take_up_schedule(resumed, optimizer, 5, schedule_state(whole))
    for scheduler in (whole, resumed):
        after_evaluation(scheduler, 1.5)
        assert scheduler.get_last_lr() == [1.0, 1.0]
    assert [group["lr"] for group in optimizer.param_groups] == [1.0, 1.0]


def test_arguments_that_a_schedule_does_not_take_are_one_line():
    with pytest.raises(FasttrError, match="lr_scheduler_type: cosine with lr_scheduler_kwargs"):
        rates(3, schedule="cosine", schedule_kwargs={"bent": 2})
