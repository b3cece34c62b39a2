"""PPO's numbers of tokens against their definitions, typed again in numpy."""

import numpy as np
import pytest
import torch

from fasttr.losses.advantages import (
    explained_variance,
    generalised,
    leave_one_out,
    token_rewards,
    whitened,
)
from fasttr.losses.policy_gradient import PolicyLoss, TokenInputs
from fasttr.losses.values import KlCoefficient, ValueLoss


def test_the_value_loss_is_the_larger_of_two_errors():
    generator = torch.Generator().manual_seed(0)
    value, old, target = torch.randn(3, 40, generator=generator, dtype=torch.float64)
    value.requires_grad_()
    loss = ValueLoss(clip=0.3)
    v, o, g = value.detach().numpy(), old.numpy(), target.numpy()
    near = np.minimum(np.maximum(v, o - 0.3), o + 0.3)
    plain, clipped = (v - g) ** 2, (near - g) ** 2
    found = loss(value, old, target)
    np.testing.assert_allclose(found.detach(), 0.5 * np.maximum(plain, clipped), rtol=1e-14)
    assert loss.is_clipped(value, old, target).tolist() == (clipped > plain).tolist()
    assert 5 < (clipped > plain).sum() < 35
    # Where the clip decides the value is out of its range, so it gets no gradient.
    (gradient,) = torch.autograd.grad(found.sum(), value)
    np.testing.assert_allclose(gradient, np.where(clipped > plain, 0.0, v - g), rtol=1e-14)


def test_the_score_is_the_reward_of_the_last_token():
    penalty = torch.tensor([0.5, -1.0, 2.0, 0.25])
    found = token_rewards(torch.tensor([10.0, 20.0]), penalty, torch.tensor([3, 1]))
    assert found.tolist() == [-0.5, 1.0, 8.0, 19.75]


@pytest.mark.parametrize("keeps_mean", [False, True])
def test_what_is_left_out_does_not_move_the_mean(keeps_mean):
    x = torch.tensor([1.0, 5.0, 100.0, 3.0], dtype=torch.float64)
    kept = torch.tensor([True, True, False, True])
    found = whitened(x, kept, keeps_mean)
    of_kept = np.array([1.0, 5.0, 3.0])
    wanted = (of_kept - 3) / of_kept.std() + (3 if keeps_mean else 0)
    np.testing.assert_allclose(found[kept], wanted, atol=1e-7)


def test_the_variance_that_a_critic_explains():
    target = torch.tensor([1.0, 2.0, 4.0])
    assert explained_variance(target, target) == 1
    assert explained_variance(torch.full((3,), 9.0), target) == pytest.approx(0, abs=1e-6)
    half = target + torch.tensor([1.0, -1.0, 0.0])
    assert explained_variance(half, target) == pytest.approx(1 - 1.0 / (7 / 3))


def test_the_coefficient_follows_its_target():
    """The rule of arXiv:1909.08593, section 2.2, at points on both sides of its clip."""
    coefficient = KlCoefficient(0.2, target=6.0, horizon=10_000)
    wanted = 0.2
    for kl, completions in ((6.6, 256), (30.0, 512), (5.7, 64), (0.0, 128)):
        coefficient.follow(kl, completions)
        wanted *= 1 + np.clip((kl - 6) / 6, -0.2, 0.2) * completions / 10_000
        assert coefficient.value == pytest.approx(wanted, rel=1e-14)
    fixed = KlCoefficient(0.2)
    fixed.follow(30.0, 512)
    assert fixed.value == 0.2


def test_with_the_others_mean_as_critic_its_gradient_is_rloos():
    """lam 1, one pass: every token's advantage is its completion's reward minus that of the
    others, so that only the divisor differs."""
    generator = torch.Generator().manual_seed(3)
    lengths = torch.tensor([3, 1, 4, 2, 5, 2])
    reward = torch.randn(6, generator=generator, dtype=torch.float64)
    logp = torch.randn(17, generator=generator, dtype=torch.float64).requires_grad_()
    baseline = reward - leave_one_out(reward, 3)
    no_penalty = torch.zeros(17, dtype=torch.float64)
    advantage = generalised(
        token_rewards(reward, no_penalty, lengths),
        baseline.repeat_interleave(lengths),
        lengths,
        gamma=1.0,
        lam=1.0,
    )
    gradients = {}
    for name, used in (("ppo", advantage), ("rloo", leave_one_out(reward, 3))):
        loss = PolicyLoss(loss_type=name)
        inputs = TokenInputs(logp, None, None, used, lengths, torch.ones(6))
        (gradient,) = torch.autograd.grad(loss(inputs), logp)
        gradients[name] = gradient / loss.normalizer(6, 17)
    assert float(gradients["rloo"].abs().min()) > 1e-3
    torch.testing.assert_close(gradients["ppo"] * 17 / 6, gradients["rloo"])
