"""Advantages and KL estimates against loops, definitions and enumeration."""

import math
import statistics

import pytest
import torch

from fasttr.losses.advantages import (
    generalised,
    group_relative,
    k1,
    k2,
    k3,
    leave_one_out,
    share_without_spread,
    whitened,
)

REWARD = torch.tensor([1.0, 3.0, -2.0, 0.5, 0.25, 4.0], dtype=torch.float64)
WITH_NONE = torch.tensor([1.0, math.nan, -2.0, math.nan, math.nan, 4.0], dtype=torch.float64)


def test_leave_one_out_is_the_loop():
    wanted = []
    for group in REWARD.view(2, 3).tolist():
        for i, reward in enumerate(group):
            others = group[:i] + group[i + 1 :]
            wanted.append(reward - sum(others) / 2)
    assert leave_one_out(REWARD, 3).tolist() == pytest.approx(wanted)


def test_a_missing_reward_leaves_the_baseline_and_a_lone_one_has_none():
    assert leave_one_out(WITH_NONE, 3).tolist() == pytest.approx([3.0, 0.0, -3.0, 0.0, 0.0, 0.0])
    spread = statistics.stdev([1.0, -2.0])
    wanted = [1.5 / (spread + 1e-4), 0.0, -1.5 / (spread + 1e-4), 0.0, 0.0, 0.0]
    assert group_relative(WITH_NONE, 3).tolist() == pytest.approx(wanted)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_group_relative_is_the_loop(scale):
    wanted = []
    for group in REWARD.view(2, 3).tolist():
        over = {"group": group, "batch": REWARD.tolist(), "none": None}[scale]
        by = 1.0 if over is None else statistics.stdev(over) + 1e-4
        wanted += [(reward - statistics.mean(group)) / by for reward in group]
    assert group_relative(REWARD, 3, scale).tolist() == pytest.approx(wanted)


def test_normalised_advantages_are_of_those_that_have_others():
    """TRL's lines, typed again: a lone reward's baseline is 0 / 0 there, which the deviation leaves
    out."""
    reward = torch.cat([WITH_NONE, torch.tensor([0.5, 2.0, 2.5], dtype=torch.float64)])
    grouped = reward.view(-1, 3)
    known = (~grouped.isnan()).sum(dim=1, keepdim=True)
    wanted = reward - ((grouped.nansum(dim=1, keepdim=True) - grouped) / (known - 1)).view(-1)
    own = wanted[~wanted.isnan()]
    assert len(own) == 5
    wanted = ((wanted - own.mean()) / (own.std() + 1e-4)).nan_to_num(nan=0.0)
    torch.testing.assert_close(leave_one_out(reward, 3, normalize=True), wanted)
    assert wanted[5] == 0 < wanted[0]


def test_rows_without_spread_hold_two_equal_rewards():
    """A lone reward says nothing of a spread."""
    none = math.nan
    rows = [[1.0, 1.0, none], [1.0, none, none], [none] * 3, [1.0, 2.0, 1.0], [0.1, 0.1, 0.1]]
    assert share_without_spread(torch.tensor(rows, dtype=torch.float64)) == 2 / 5


def test_generalised_advantages_are_their_definition():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([4, 1, 3])
    reward, value = torch.randn(2, 8, generator=generator, dtype=torch.float64)
    gamma, lam = 0.9, 0.7
    wanted = []
    for start, end in ((0, 4), (4, 5), (5, 8)):
        r, v = reward[start:end].tolist(), [*value[start:end].tolist(), 0.0]
        delta = [r[t] + gamma * v[t + 1] - v[t] for t in range(end - start)]
        for t in range(end - start):
            later = range(end - start - t)
            wanted.append(sum((gamma * lam) ** k * delta[t + k] for k in later))
    found = generalised(reward, value, lengths, gamma, lam)
    assert found.tolist() == pytest.approx(wanted)


def test_without_a_critic_and_without_discount_it_is_the_return():
    reward = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0])
    found = generalised(reward, torch.zeros(5), torch.tensor([3, 2]), 1.0, 1.0)
    assert found.tolist() == [7.0, 6.0, 4.0, 24.0, 16.0]


def test_whitened():
    found = whitened(REWARD, torch.ones(6, dtype=torch.bool))
    assert float(found.mean()) == pytest.approx(0, abs=1e-12)
    assert float(found.var(unbiased=False)) == pytest.approx(1, abs=1e-6)


def test_k1_and_k3_average_to_the_kl_and_k2_to_second_order():
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(7, generator=generator, dtype=torch.float64)
    policy = logits.log_softmax(0)
    for scale in (1.0, 0.01):
        noise = torch.randn(7, generator=generator, dtype=torch.float64)
        reference = (logits + scale * noise).log_softmax(0)
        kl = float((policy.exp() * (policy - reference)).sum())
        for estimate in (k1, k3):
            mean = float((policy.exp() * estimate(policy, reference)).sum())
            assert mean == pytest.approx(kl, abs=1e-14)
        assert bool((k3(policy, reference) >= 0).all())
    second = float((policy.exp() * k2(policy, reference)).sum())
    assert second == pytest.approx(kl, rel=0.05)
    assert second != pytest.approx(kl, rel=1e-6)
