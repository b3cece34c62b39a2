"""Losses as a module: padded batches in either order, packed rows, any loss by its name."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fasttr.errors import FasttrError
from fasttr.integrations import LinearPreferenceLoss

V, D, S = 13, 6, 9
SPANS = [
    (2, 9),
    (3, 6),
    (4, 9),
    (2, 5),
    (3, 8),
    (5, 7),
]  # prompt, end: three chosen, three rejected


class Batch:
    """Six sequences as transformers labels them, halves first, in fp64."""

    def __init__(self, seed: int = 0) -> None:
        make = torch.Generator().manual_seed(seed)
        normal = lambda *size: torch.randn(*size, generator=make, dtype=torch.float64)  # noqa: E731
        self.hidden = normal(6, S, D).requires_grad_()
        self.weight = normal(V, D).requires_grad_()
        self.bias = normal(V).requires_grad_()
        self.ref_hidden, self.ref_weight = normal(6, S, D), normal(V, D)
        self.labels = torch.randint(V, (6, S), generator=make)
        for row, (prompt, end) in enumerate(SPANS):
            self.labels[row, :prompt] = -100
            self.labels[row, end:] = -100
        self.leaves = (self.hidden, self.weight, self.bias)

    def plain_logp(self, hidden, weight, bias=0.0):
        """(6,) by the whole logits."""
        table = (hidden[:, :-1] @ weight.t() + bias).log_softmax(-1)
        labels = self.labels[:, 1:]
        token = table.gather(2, labels.clamp(min=0)[..., None])[..., 0]
        return (token * (labels != -100)).sum(1)

    def ref_logp(self):
        return self.plain_logp(self.ref_hidden, self.ref_weight)

    def call(self, module, without_reference=False, **kw):
        ref_logp = None if without_reference else self.ref_logp()
        return module(self.hidden, self.weight, self.labels, ref_logp, bias=self.bias, **kw)


COUNTS = torch.tensor([end - prompt for prompt, end in SPANS]).double()


def s(x):
    return x.sigmoid()


# Each typed from its paper: c, r chosen and rejected, u, v their log-ratios, n, k their tokens.
EQUATIONS = {
    "sigmoid": ({"beta": 0.3}, lambda c, r, u, v, n, k: -s(0.3 * (u - v)).log()),
    "ipo": ({"beta": 0.2}, lambda c, r, u, v, n, k: (u / n - v / k - 2.5) ** 2),
    "simpo": (
        {"beta": 2.0, "simpo_gamma": 0.7},
        lambda c, r, u, v, n, k: -s(2.0 * (c / n - r / k) - 0.7).log(),
    ),
    "robust": (
        {"beta": 0.3, "label_smoothing": 0.2},
        lambda c, r, u, v, n, k: (
            (-0.8 * s(0.3 * (u - v)).log() + 0.2 * s(-0.3 * (u - v)).log()) / 0.6
        ),
    ),
    "sft": ({}, lambda c, r, u, v, n, k: -c / n.mean()),
    # Coupled: the KL terms are means over the call.
    "kto_paired": (
        {"beta": 0.1},
        lambda c, r, u, v, n, k: (
            1
            - 0.5 * s(0.1 * (u - v.mean().clamp(min=0)))
            - 0.5 * s(0.1 * (u.mean().clamp(min=0) - v))
        ),
    ),
}


@pytest.mark.parametrize("name", EQUATIONS)
def test_a_loss_by_name_equals_its_equation_on_whole_logits(name):
    batch = Batch()
    settings, equation = EQUATIONS[name]
    module = LinearPreferenceLoss(name, **settings)
    if module.loss.completions == 1:
        # Chosen completions alone: the batch holds no rejected half.
        got = module(batch.hidden[:3], batch.weight, batch.labels[:3], bias=batch.bias)
    else:
        got = batch.call(module)
    logp, ref = batch.plain_logp(*batch.leaves), batch.ref_logp()
    (c, r), (u, v) = logp.chunk(2), (logp - ref).chunk(2)
    want = equation(c, r, u, v, COUNTS[:3], COUNTS[3:]).mean()
    torch.testing.assert_close(got.loss, want, rtol=1e-12, atol=0)
    pairs = zip(
        torch.autograd.grad(got.loss, batch.leaves),
        torch.autograd.grad(want, batch.leaves),
        strict=True,
    )
    for a, b in pairs:
        assert b.abs().max() > 1e-4
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_log_probs_and_rewards_stand_in_the_order_of_the_batch():
    batch = Batch()
    module = LinearPreferenceLoss("sigmoid", beta=0.3)
    out = batch.call(module)
    logp, ref = batch.plain_logp(*batch.leaves).detach(), batch.ref_logp()
    torch.testing.assert_close(out.logp, logp)
    torch.testing.assert_close(out.rewards, 0.3 * (logp - ref))
    assert out.token_counts.tolist() == COUNTS.int().tolist()
    orpo = batch.call(LinearPreferenceLoss("orpo", beta=0.3), without_reference=True)
    torch.testing.assert_close(orpo.rewards, 0.3 * logp / COUNTS)
    torch.testing.assert_close(module.logps(batch.ref_hidden, batch.ref_weight, batch.labels), ref)


def test_halves_rows_shifted_labels_and_packed_rows_are_one_batch():
    batch = Batch()
    want = batch.call(LinearPreferenceLoss("ipo", beta=0.2))
    in_turn = torch.tensor([0, 3, 1, 4, 2, 5])
    ref = batch.ref_logp()
    rows = LinearPreferenceLoss("ipo", beta=0.2, order="rows")(
        batch.hidden[in_turn], batch.weight, batch.labels[in_turn], ref[in_turn], bias=batch.bias
    )
    shifted = LinearPreferenceLoss("ipo", beta=0.2, labels_are_shifted=True)(
        batch.hidden[:, :-1], batch.weight, batch.labels[:, 1:], ref, bias=batch.bias
    )
    scored = batch.labels[:, 1:] != -100
    packed = LinearPreferenceLoss("ipo", beta=0.2)(
        batch.hidden[:, :-1][scored],
        batch.weight,
        batch.labels[:, 1:][scored],
        ref,
        bias=batch.bias,
        lengths=COUNTS.int().tolist(),
    )
    for got in (rows, shifted, packed):
        assert torch.equal(got.loss, want.loss)
    assert torch.equal(rows.logp, want.logp[in_turn])
    assert torch.equal(packed.logp, want.logp)


def test_kto_takes_verdicts_and_a_mismatched_completion_for_its_kl():
    batch = Batch()
    verdicts = torch.tensor([True, False, True])
    module = LinearPreferenceLoss("kto", beta=0.2, undesirable_weight=1.5)
    got = batch.call(module, desirable=verdicts)
    ratio = batch.plain_logp(*batch.leaves) - batch.ref_logp()
    z = ratio[3:].detach().mean().clamp(min=0)
    h = 0.2 * (ratio[:3] - z)
    want = torch.where(verdicts, 1 - s(h), 1.5 * (1 - s(-h))).mean()
    torch.testing.assert_close(got.loss, want, rtol=1e-12, atol=0)
    with pytest.raises(FasttrError, match=r"desirable: got none; wanted \(3,\) bool"):
        batch.call(module)


def test_a_loss_of_one_s_own_with_row_weights_and_the_rows_of_a_step():
    batch = Batch()
    module = LinearPreferenceLoss(lambda inputs: F.relu(2 - inputs.chosen_logratio), beta=0.5)
    by = torch.tensor([1.0, 0.0, 3.0])
    got = batch.call(module, row_weights=by, normalizer=12)
    u = (batch.plain_logp(*batch.leaves) - batch.ref_logp())[:3]
    torch.testing.assert_close(got.loss, (by * F.relu(2 - u)).sum() / 12, rtol=1e-12, atol=0)
    assert got.loss > 0.05


def test_a_list_of_losses_is_their_weighted_sum():
    batch = Batch()
    both = batch.call(
        LinearPreferenceLoss(["sigmoid", "apo_zero"], loss_weights=[2.0, 0.5], beta=0.3)
    )
    alone = [batch.call(LinearPreferenceLoss(n, beta=0.3)).loss for n in ("sigmoid", "apo_zero")]
    torch.testing.assert_close(both.loss, 2 * alone[0] + 0.5 * alone[1])


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: LinearPreferenceLoss("dpo"), "DPO is called sigmoid"),
        (lambda: LinearPreferenceLoss("sigmoid", bta=0.1), r"bta: .*did you mean 'beta'"),
        (lambda: LinearPreferenceLoss("ipo", label_smoothing=0.1), "ipo has no such setting"),
        (lambda: LinearPreferenceLoss(lambda x: x, gamma=1.0), "inside that loss"),
        (lambda: LinearPreferenceLoss(order="half"), "wanted one of halves, rows"),
    ],
)
def test_what_a_loss_does_not_have_is_refused_by_name(make, says):
    with pytest.raises(ValueError, match=says):
        make()


def test_a_missing_reference_and_an_incomplete_pair_are_refused():
    batch = Batch()
    module = LinearPreferenceLoss("sigmoid")
    with pytest.raises(FasttrError, match="ref_logp: got none"):
        module(batch.hidden, batch.weight, batch.labels)
    with pytest.raises(FasttrError, match="got 5 completions; wanted a multiple of 2"):
        module(batch.hidden[:5], batch.weight, batch.labels[:5], torch.zeros(5))
