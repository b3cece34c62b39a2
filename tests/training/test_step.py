"""One optimizer step: what it does to weights and moments, and what a broken one does not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fasttr import TrainConfig
from fasttr.metrics.throughput import Throughput
from fasttr.training.run import Run
from fasttr.training.setup import Given, setup
from fasttr.training.step import StepMetrics, train_step
from fasttr.training.stopping import StopSignal
from fasttr.training.window import score_window
from tests.runs import settings


def ready_run(workspace, output_dir, loss: Callable | None = None, **changes) -> Run:
    """A run whose first window is scored."""
    config = TrainConfig(**settings(workspace, output_dir, **changes))
    run = setup(config, Given(loss=loss))
    if run.loss.needs_reference:
        score_window(run, range(0, config.max_steps), evaluates=False, stop=StopSignal())
    return run


def step_of(run: Run, step: int) -> StepMetrics:
    return train_step(run, step, Throughput(run.policy.model, run.device))


def state_of(run: Run) -> dict[str, Tensor]:
    """Weights and moments by name."""
    found = {name: p.detach().clone() for name, p in run.policy.model.named_parameters()}
    for group in run.optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            for key, value in run.optimizer.state[parameter].items():
                found[f"{name}.{key}"] = value.clone()
    return found


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def not_a_number(logp: Tensor) -> Tensor:
    return logp * float("nan")


def infinite_slope(logp: Tensor) -> Tensor:
    """0, with a gradient that is not a number."""
    return (logp - logp.detach()).sqrt()


@pytest.mark.parametrize("breaks", [not_a_number, infinite_slope])
@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0], ids=["unclipped", "clipped"])
def test_a_step_that_is_not_finite_changes_no_weight_and_no_moment(
    workspace, tmp_path, breaks, max_grad_norm
):
    broken = False

    def loss(inputs):
        logp = inputs.chosen_logp - inputs.rejected_logp
        return breaks(logp) if broken else -logp / 100

    run = ready_run(workspace, tmp_path, loss, max_grad_norm=max_grad_norm)
    before = state_of(run)
    assert float(step_of(run, 0).is_broken) == 0
    after_one = state_of(run)
    assert not same(before, after_one)
    assert len(after_one) == 4 * len(before)  # two moments and a count each
    broken = True
    assert float(step_of(run, 1).is_broken) == 1
    assert same(state_of(run), after_one)
    broken = False
    assert float(step_of(run, 2).is_broken) == 0
    assert not same(state_of(run), after_one)


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "split weights"])
def test_an_infinite_loss_with_a_finite_gradient_changes_nothing(workspace, tmp_path, bf16):
    broken = False

    def loss(inputs):
        return -inputs.chosen_logp / 100 + (float("inf") if broken else 0.0)

    run = ready_run(workspace, tmp_path, loss, bf16=bf16)
    step_of(run, 0)
    before = state_of(run)
    broken = True
    metrics = step_of(run, 1)
    assert float(metrics.gradient_norm) > 0
    assert float(metrics.is_broken) == 1
    assert same(state_of(run), before)


def test_a_first_step_that_is_not_finite_changes_no_weight(workspace, tmp_path):
    run = ready_run(workspace, tmp_path, lambda inputs: not_a_number(inputs.chosen_logp))
    before = {name: p.detach().clone() for name, p in run.policy.model.named_parameters()}
    assert float(step_of(run, 0).is_broken) == 1
    assert same({name: p.detach() for name, p in run.policy.model.named_parameters()}, before)


@pytest.mark.parametrize("max_norm", [0.5, 0.0], ids=["clipped", "unclipped"])
def test_a_step_is_adamws_on_the_clipped_gradient(workspace, tmp_path, max_norm):
    """The first update of AdamW by its equation: moments (1 - b) g and (1 - b) g^2."""
    rate, eps, decay = 3e-3, 1e-4, 0.1
    run = ready_run(
        workspace,
        tmp_path,
        lambda inputs: -inputs.chosen_logp / 10,
        max_grad_norm=max_norm,
        weight_decay=decay,
        adam_epsilon=eps,
    )
    before = {name: p.detach().clone() for name, p in run.policy.model.named_parameters()}
    gradients = {}
    for batch in run.plan.packs(0):
        out = run.policy(batch, run.objective.of_rows(run.trees, run.plan.rows(0)).loss_fn(batch))
        (out.loss / 4).backward()
    for name, parameter in run.policy.model.named_parameters():
        gradients[name] = parameter.grad.double()
        parameter.grad = None
    norm = torch.stack([g.norm() for g in gradients.values()]).norm()
    metrics = step_of(run, 0)
    assert float(metrics.gradient_norm) == pytest.approx(float(norm), rel=1e-5)
    assert metrics.learning_rate == rate
    assert norm > 2 * max_norm
    share = max_norm / norm if max_norm else 1.0
    undecayed = set(run.optimizer.param_groups[1]["names"])
    for name, parameter in run.policy.model.named_parameters():
        g = gradients[name] * share
        kept = 1 - rate * (0.0 if name in undecayed else decay)
        want = before[name].double() * kept - rate * g / (g.abs() + eps)
        assert (parameter.double() - want).abs().max() < 1e-7, name


def test_a_step_reports_the_rate_that_it_used(workspace, tmp_path):
    """From 3e-3 to 0 in six steps, the first of which is warm-up: it uses a rate of 0."""
    run = ready_run(workspace, tmp_path, warmup_steps=1)
    used = [step_of(run, step).learning_rate for step in range(3)]
    assert used == pytest.approx([0.0, 3e-3, 3e-3 * 4 / 5])


def test_what_a_step_reports_is_read_under_trls_names(workspace, tmp_path):
    found = step_of(ready_run(workspace, tmp_path), 0).read()
    assert {"loss", "grad_norm", "learning_rate", "rewards/margins"} <= found.keys()
