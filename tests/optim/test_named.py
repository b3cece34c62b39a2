"""Optimizers by transformers' names: what they compute, and that they go on as they were."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch

from fasttr.errors import FasttrError
from fasttr.optim.adamw import OptimizerConfig
from fasttr.optim.named import OPTIMIZERS, state_tensors, take_up_state, update
from tests.tiny import packed_tiny

ARGUMENTS = {
    "rmsprop": "momentum=0.5,alpha=0.9",
    "sgd": "momentum=0.5,nesterov=true",
    "adagrad": "lr_decay=0.1",
}
PLAIN = ("adamw_torch_fused", "rmsprop", "sgd", "adagrad", "adafactor")
QUANTISED = ("adamw_torch_8bit", "adamw_torch_4bit")


def optimizer_of(name: str, model: torch.nn.Module) -> torch.optim.Optimizer:
    config = OptimizerConfig(
        learning_rate=1e-2, weight_decay=0.1, name=name, arguments=ARGUMENTS.get(name)
    )
    return config.optimizer(model)


def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    update(optimizer, torch.tensor(False))


def weights(model: torch.nn.Module) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("name", ["rmsprop", "sgd", "adagrad", "adafactor", "adamw_torch"])
def test_its_steps_are_those_of_transformers(name):
    """By the Trainer's own choice of class and arguments, with its decay of some weights alone."""
    from transformers import Trainer, TrainingArguments

    ours = packed_tiny().model
    theirs = copy.deepcopy(ours)
    arguments = TrainingArguments(
        output_dir="unused",
        optim=name,
        optim_args=ARGUMENTS.get(name),
        learning_rate=1e-2,
        weight_decay=0.1,
        use_cpu=True,
        report_to=[],
    )
    trainer = SimpleNamespace(
        args=arguments,
        model=theirs,
        optimizer=None,
        optimizer_cls_and_kwargs=None,
        model_accepts_loss_kwargs=False,
        get_decay_parameter_names=lambda model: Trainer.get_decay_parameter_names(None, model),
        get_optimizer_cls_and_kwargs=Trainer.get_optimizer_cls_and_kwargs,
    )
    wanted = Trainer.create_optimizer(trainer)
    optimizer = optimizer_of(name, ours)
    before = weights(ours)
    for seed in range(3):
        step(ours, optimizer, seed)
        step(theirs, wanted, seed)
    moved = False
    for mine, other, old in zip(ours.parameters(), theirs.parameters(), before, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-7)
        moved |= not torch.equal(mine, old)
    assert moved


def check_resumed(name: str) -> None:
    model = packed_tiny().model
    optimizer = optimizer_of(name, model)
    for seed in range(2):
        step(model, optimizer, seed)
    saved = {key: value.clone() for key, value in state_tensors(optimizer).items()}
    assert saved or name == "sgd"
    other = copy.deepcopy(model)
    resumed = optimizer_of(name, other)
    take_up_state(resumed, saved)
    step(model, optimizer, 2)
    step(other, resumed, 2)
    assert same(weights(model), weights(other))
    fresh = copy.deepcopy(model)
    step(fresh, optimizer_of(name, fresh), 3)
    step(model, optimizer, 3)
    assert not same(weights(model), weights(fresh))  # the state is not for nothing


@pytest.mark.parametrize("name", PLAIN)
def test_it_goes_on_from_its_saved_state_bit_for_bit(name):
    check_resumed(name)


@pytest.mark.parametrize("name", QUANTISED)
def test_a_quantised_state_is_saved_as_it_is(name):
    pytest.importorskip("torchao")
    check_resumed(name)


@pytest.mark.parametrize("name", PLAIN)
def test_a_step_that_is_not_finite_changes_nothing(name):
    model = packed_tiny().model
    optimizer = optimizer_of(name, model)
    step(model, optimizer, 0)
    before = weights(model), state_tensors(optimizer)
    before = before[0], {key: value.clone() for key, value in before[1].items()}
    update(optimizer, torch.tensor(True))
    assert same(before[0], weights(model))
    after = state_tensors(optimizer)
    assert after.keys() == before[1].keys()
    assert all(torch.equal(after[key], value) for key, value in before[1].items())


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("rmsprop", "momentum", "optim_args: got 'momentum' with optim rmsprop; wanted momentum, "),
        ("sgd", "lr=1", "optim_args: got 'lr=1' with optim sgd; wanted momentum, dampening"),
        ("adamw_torch", "beta=1", "wanted nothing: it is set by adam_beta1"),
        ("sgd", "momentum=much", "optim_args: got momentum=much; wanted a number"),
    ],
)
def test_arguments_that_it_does_not_know_are_one_line(name, text, expected):
    config = OptimizerConfig(name=name, arguments=text)
    with pytest.raises(FasttrError, match=expected):
        config.optimizer(packed_tiny().model)


def test_what_a_name_hides_is_said():
    assert {name for name, kind in OPTIMIZERS.items() if kind.notice} == {
        "paged_adamw_32bit",
        "paged_adamw",
        "adamw_8bit",
        "adamw_bnb_8bit",
        "paged_adamw_8bit",
    }
