"""Which weights a reference has, and how they move."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch
from torch import Tensor

from fasttr.errors import FasttrError
from fasttr.models.packed import PackedModel
from fasttr.optim.adamw import OptimizerConfig
from fasttr.packing.layout import pack
from fasttr.reference.moving import MovingReference
from fasttr.reference.schedule import Fixed, Hard, Soft
from tests.tiny import packed_tiny, perturb, random_trees


def weights_of(model: PackedModel) -> dict[str, Tensor]:
    return {name: p.detach().double().clone() for name, p in model.named_parameters()}


def apart(policy: PackedModel) -> bool:
    """No room for a soft reference beside the policy."""
    return False


@pytest.mark.parametrize("rests", ["beside", "apart"])
@pytest.mark.parametrize("every", [1, 3])
def test_a_soft_reference_is_its_closed_form(rests, every):
    """reference_n = (1 - a)^n initial + sum over k of a (1 - a)^(n - k) policy_k."""
    alpha = 0.3
    policy = packed_tiny()
    at_updates = [weights_of(policy)]
    reference = MovingReference(
        Soft(alpha, every), policy, fits_beside=None if rests == "beside" else apart
    )
    for n in range(1, 4):
        perturb(policy, 0.1, seed=n)
        at_updates.append(weights_of(policy))
        reference.move()
        assert reference.updates == n
        for name, weight in reference.weights.items():
            closed = (1 - alpha) ** n * at_updates[0][name]
            for k in range(1, n + 1):
                closed += alpha * (1 - alpha) ** (n - k) * at_updates[k][name]
            torch.testing.assert_close(weight.double(), closed, rtol=1e-6, atol=1e-6)
            assert (weight - at_updates[n][name]).abs().max() > 1e-3


@pytest.mark.parametrize("rests", ["beside", "apart"])
@pytest.mark.parametrize("steers", ["optimizer", "itself"])
def test_a_soft_reference_of_bf16_weights_averages_their_masters(rests, steers):
    """The same closed form, where a step of the policy is far below what bf16 can tell apart."""
    alpha, every = 0.3, 2 if rests == "apart" else 1
    policy = packed_tiny()
    policy.bf16 = True
    config = OptimizerConfig(learning_rate=1e-6, betas=(0.0, 0.0))
    optimizer = config.optimizer(policy.model, bf16=True)
    masters = lambda: {n: optimizer.master(p).double() for n, p in policy.named_parameters()}  # noqa: E731
    expected = masters()
    reference = MovingReference(
        Soft(alpha, every),
        policy,
        fits_beside=None if rests == "beside" else apart,
        optimizer=optimizer,
    )
    begin = reference_masters(reference)
    for n in range(1, 4):
        for p in policy.parameters():
            p.grad = torch.full_like(p, 1.0 if n % 2 else -0.5)
        followers = reference.followers() if steers == "optimizer" else None
        assert (followers is not None) == (steers == "optimizer" and rests == "beside")
        optimizer.update(torch.zeros(()), 0.0, followers)
        reference.move()
        expected = {k: x + alpha * (masters()[k] - x) for k, x in expected.items()}
        found = reference_masters(reference)
        for name, want in expected.items():
            ulp = want.abs().clamp(min=2.0**-10) * 2.0**-22
            assert ((found[name] - want).abs() <= n * ulp).all(), (n, name)
    assert reference.updates == 3
    for name, weight in reference.weights.items():
        is_matrix = "proj" in name or "lm_head" in name
        assert (weight.dtype == torch.bfloat16) == is_matrix == (name in reference.remainders)
        assert not torch.equal(found[name], begin[name])


def reference_masters(reference):
    return {
        name: (x if name not in reference.remainders else joined(x, reference.remainders[name]))
        .double()
        .clone()
        for name, x in reference.weights.items()
    }


def joined(high, low):
    bits = high.view(torch.int16).numpy().astype(np.int32) * 2**16 + low.numpy()
    return torch.from_numpy(bits.view(np.float32))


def test_a_soft_reference_that_does_not_fit_beside_rests_in_memory_of_its_own():
    policy = packed_tiny()
    asked = []
    reference = MovingReference(Soft(0.5, 2), policy, fits_beside=lambda p: bool(asked.append(p)))
    assert asked == [policy]
    own = {p.data_ptr() for p in policy.parameters()}
    assert not own & {x.data_ptr() for x in reference.weights.values()}
    MovingReference(Soft(0.5, 1), policy, fits_beside=asked.append)
    assert asked == [policy]  # one that moves at every step is never sent away


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_the_ends_of_alpha_are_exact(alpha):
    policy = packed_tiny()
    initial = weights_of(policy)
    reference = MovingReference(Soft(alpha, 2), policy)
    perturb(policy, 0.1)
    reference.move()
    want = weights_of(policy) if alpha == 1 else initial
    assert all(torch.equal(x.double(), want[name]) for name, x in reference.weights.items())


def test_the_policys_module_computes_with_a_soft_reference_only_while_it_is_lent():
    batch = pack(random_trees([(3, 4, 2), (2, 5, 1)]))
    policy = packed_tiny()
    initial_logps = policy.logps(batch)
    reference = MovingReference(Soft(0.3, 2), policy)
    perturb(policy, 0.1)
    own_logps = policy.logps(batch)
    own = {name: p.data_ptr() for name, p in policy.named_parameters()}
    with contextlib.suppress(KeyError), reference.model() as lent:
        assert lent is policy
        assert torch.equal(lent.logps(batch), initial_logps)
        raise KeyError("a sweep that is broken off")
    assert {name: p.data_ptr() for name, p in policy.named_parameters()} == own
    assert torch.equal(policy.logps(batch), own_logps)
    assert not torch.equal(own_logps, initial_logps)


@pytest.mark.parametrize("schedule", [Fixed(), Hard(2)], ids=["fixed", "hard"])
def test_a_named_first_reference_scores_window_0_and_is_let_go(schedule):
    policy, initial = packed_tiny(seed=0), packed_tiny(seed=1)
    reference = MovingReference(schedule, policy, initial)
    assert not reference.is_the_policy
    with reference.model() as model:
        assert model is initial
    reference.window_scored()
    reference.move()
    assert reference.is_the_policy
    with reference.model() as model:
        assert model is policy
    assert reference.weights is None


def test_a_move_ends_the_time_of_a_named_first_reference():
    """Whether or not its window was scored: under hard updates the policy is the next one."""
    policy, initial = packed_tiny(seed=0), packed_tiny(seed=1)
    reference = MovingReference(Hard(2), policy, initial)
    reference.move()
    assert reference.is_the_policy
    with reference.model() as model:
        assert model is policy


def test_a_named_soft_reference_begins_at_its_weights():
    policy, initial = packed_tiny(seed=0), packed_tiny(seed=1)
    before = weights_of(initial)
    reference = MovingReference(Soft(0.25, 2), policy, initial)
    assert not reference.is_the_policy
    reference.move()
    own = weights_of(policy)
    for name, weight in reference.weights.items():
        want = 0.25 * own[name] + 0.75 * before[name]
        torch.testing.assert_close(weight.double(), want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        ({"num_hidden_layers": 3}, r"layers\.2.* has shape .*wanted none as in the policy"),
        ({"num_hidden_layers": 1}, r"layers\.1.* has shape none .*wanted \(\d+"),
        ({"intermediate_size": 64}, r"has shape \(\d+.*wanted \(\d+"),
        ({"rope_theta": 500.0}, "rotary_emb.* differs from the policy's"),
    ],
    ids=["one layer more", "one layer fewer", "wider", "other positions"],
)
def test_a_soft_reference_that_is_another_model_is_refused(other, expected):
    """Half of its layers mixed into the policy's would be a reference of nothing."""
    initial = packed_tiny(seed=1, **other)
    with pytest.raises(FasttrError, match=f"ref_model_name_or_path: got a model whose.*{expected}"):
        MovingReference(Soft(0.5, 2), packed_tiny(), initial)
    MovingReference(Hard(2), packed_tiny(), initial)  # which is never mixed


def test_updates_and_ages_of_a_schedule():
    """The mean age is every (1 - a) / a + (every - 1) / 2 under soft updates."""
    assert Fixed().updates(100) == 0
    assert [Soft(0.5, 8).updates(steps) for steps in (7, 8, 20)] == [0, 1, 2]
    assert [Hard(8).updates(steps) for steps in (7, 8, 20)] == [0, 1, 2]
    assert Fixed().mean_age(9) == 4.0
    assert Hard(8).mean_age(100) == 3.5
    assert Hard(8).mean_age(3) == 1.0
    assert Soft(0.25, 8).mean_age(100) == 8 * 3 + 3.5
    assert Soft(0.25, 8).mean_age(5) == 2.0
    assert Soft(0.0, 8).mean_age(101) == 50.0
