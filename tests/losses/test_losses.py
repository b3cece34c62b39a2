"""Losses: known values, and the fused head against the plain one in fp64 for every loss."""

from __future__ import annotations

import math

import pytest
import torch
from fasttr_kernels import linear_preference_loss

from fasttr.losses import LOSSES, IpoSum, LossInputs, Orpo, Sigmoid, group_loss, make_loss


def inputs(logp, ref=None, tokens=None, **more):
    logp = torch.tensor(logp, dtype=torch.float64)
    tokens = torch.ones(len(logp), dtype=torch.int64) if tokens is None else torch.tensor(tokens)
    return LossInputs(
        logp, None if ref is None else torch.tensor(ref, dtype=torch.float64), tokens, **more
    )


def test_an_update_of_the_reference_moves_the_target_margin_of_ipo_by_half_over_beta():
    """At policy = reference IPO pulls the margin up by 1/(2 beta), wherever the pair stands."""
    for margin in (0.0, 3.0):
        logp = torch.tensor([margin, 0.0], dtype=torch.float64, requires_grad=True)
        loss = IpoSum(beta=0.25)(LossInputs(logp, logp.detach(), torch.ones(2)))
        loss.sum().backward()
        assert logp.grad.tolist() == pytest.approx([-2 / (2 * 0.25), 2 / (2 * 0.25)])


def test_orpos_odds_of_certain_tokens_are_those_of_one_minus_a_millionth():
    """A completion whose every token is certain has infinite odds, and no gradient through them."""
    logp = torch.tensor([0.0, -1.0], dtype=torch.float64, requires_grad=True)
    loss = Orpo(beta=0.5)(LossInputs(logp, None, torch.ones(2)))
    odds = math.log(1 - 1e-6) - math.log(1e-6) - (-1 - math.log(1 - math.exp(-1)))
    assert loss.item() == pytest.approx(0.5 * math.log1p(math.exp(-odds)), rel=1e-5)
    loss.sum().backward()
    assert logp.grad[0] == -1  # of the likelihood
    assert logp.grad.isfinite().all()


def test_a_loss_with_a_reference_refuses_to_go_without():
    with pytest.raises(ValueError, match="got no ref_logp"):
        Sigmoid()(inputs([-1.0, -2.0]))


def test_settings_that_a_loss_would_ignore_are_refused():
    with pytest.raises(ValueError, match=r"label_smoothing: got 0\.1, which sigmoid ignores.*cdpo"):
        make_loss(["sigmoid"], label_smoothing=0.1)
    with pytest.raises(ValueError, match=r"robust; wanted a number from 0 to below 0\.5"):
        make_loss(["robust"], label_smoothing=0.5)
    with pytest.raises(ValueError, match="exo_pair; wanted a number above 0"):
        make_loss(["exo_pair"], label_smoothing=0.0)
    with pytest.raises(ValueError, match="forward_kl with nca_pair"):
        make_loss(["nca_pair"], f_divergence_type="forward_kl")
    with pytest.raises(ValueError, match="stands alone"):
        make_loss(["sigmoid", "kto"])
    with pytest.raises(ValueError, match="got 1 for 2 losses"):
        make_loss(["sigmoid", "sft"], [1.0])


@pytest.mark.parametrize("name", LOSSES)
def test_fused_head_equals_the_plain_head_in_fp64(name):
    """Loss and every gradient, with weights, labels, unequal lengths, a one-token side, groups and
    several chunks."""
    loss = LOSSES[name](beta=0.3)
    m, cu_rows = loss.completions, [0, 3, 4] if LOSSES[name].coupled else [0, 1, 2, 3, 4]
    generator = torch.Generator().manual_seed(1)
    lengths = [3, 1, 4, 6, 2, 5, 7, 1][: 4 * m]
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    T, D, V = int(cu[-1]), 6, 11

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    hidden, weight, bias = (random(*s).requires_grad_() for s in ((T, D), (V, D), (V,)))
    target = torch.randint(V, (T,), generator=generator)
    ref = random(len(lengths)) - 8 if loss.needs_reference else None
    weights, labels = torch.tensor([0.5, 1.0, 2.0, 1.0]), torch.tensor([True, False, False, True])
    fn = group_loss(
        loss, torch.tensor(lengths), weights, cu_rows=cu_rows, labels=labels, chosen_tokens_mean=2.5
    )

    token = torch.log_softmax(hidden @ weight.T + bias, -1).gather(1, target[:, None])[:, 0]
    logp = torch.stack([piece.sum() for piece in token.split(lengths)])
    plain = fn(logp, ref, slice(0, len(cu_rows) - 1)) / 7
    want = torch.autograd.grad(plain, (hidden, weight, bias))

    out = linear_preference_loss(
        hidden,
        weight,
        target,
        cu,
        m * torch.tensor(cu_rows),
        fn,
        ref_logp=ref,
        normalizer=7,
        bias=bias,
        chunk_rows=9,
    )
    got = torch.autograd.grad(out.loss, (hidden, weight, bias))
    assert abs(float((out.loss - plain).detach())) < 1e-12
    for mine, theirs in zip(got, want, strict=True):
        assert (mine - theirs).abs().max() < 1e-12
        assert theirs.abs().max() > 1e-4


@pytest.mark.parametrize("max_weight", [None, 0.5])
@pytest.mark.parametrize("name", ["hinge", "sigmoid"])
def test_wpo_weighs_a_pair_by_how_likely_the_policy_is_to_write_it(name, max_weight):
    """The paper's equation typed again in fp64, through the fused head: exp of the means over both
    sides' tokens of log p(token) - log sum_v p(v)^2, which trains nothing."""
    generator = torch.Generator().manual_seed(3)
    lengths = [3, 1, 4, 6, 2, 5]
    cu = [0, *torch.tensor(lengths).cumsum(0).tolist()]

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    hidden, weight = (0.3 * random(cu[-1], 6)).requires_grad_(), random(11, 6).requires_grad_()
    target = torch.randint(11, (cu[-1],), generator=generator)
    ref = random(6) - 8
    loss = make_loss([name], use_weighting=True, wpo_max_weight=max_weight, beta=0.3)
    out = linear_preference_loss(
        hidden,
        weight,
        target,
        torch.tensor(cu),
        2,
        group_loss(loss, torch.tensor(lengths), torch.ones(3, dtype=torch.float64)),
        ref_logp=ref,
        normalizer=3,
        loss_reads=loss.head_means,
    )
    got = torch.autograd.grad(out.loss, (hidden, weight))

    p = torch.softmax(hidden @ weight.T, dim=-1)
    token = p.gather(1, target[:, None])[:, 0].log()
    aligned = (token - (p * p).sum(dim=-1).log()).detach().split(lengths)
    sides = torch.stack([one.mean().exp() for one in aligned])
    weights = sides[0::2] * sides[1::2]
    assert len({float(x) > 0.5 for x in weights}) == 2
    if max_weight is not None:
        weights = weights.clamp(max=max_weight)
    ratio = torch.stack([one.sum() for one in token.split(lengths)]) - ref
    h = 0.3 * (ratio[0::2] - ratio[1::2])
    rows = {"hinge": (1 - h).clamp(min=0), "sigmoid": torch.log1p((-h).exp())}[name]
    plain = (weights * rows).mean()
    assert float(out.loss.detach()) == pytest.approx(float(plain.detach()), rel=1e-12)
    for mine, wanted in zip(got, torch.autograd.grad(plain, (hidden, weight)), strict=True):
        assert (mine - wanted).abs().max() < 1e-12
        assert wanted.abs().max() > 1e-4


def test_wpo_is_refused_where_rows_have_no_weight_of_their_own():
    for names in (["sft"], ["sigmoid", "sft"], ["aot"], ["kto"], ["kto_paired"]):
        with pytest.raises(ValueError, match=r"use_weighting: got true with .*it weighs pairs one"):
            make_loss(names, use_weighting=True)
    with pytest.raises(ValueError, match=r"wpo_max_weight: got 1\.0 without use_weighting"):
        make_loss(["sigmoid"], wpo_max_weight=1.0)
