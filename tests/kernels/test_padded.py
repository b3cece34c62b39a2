"""Other forms of the same call: padded batches, lengths, sizes of groups, and what is left out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from fasttr_kernels import from_padded, halves, linear_preference_loss

from tests.kernels.accuracy import DEVICE, LENGTHS, Problem, dpo


def test_padded_batch_of_halves_gives_the_loss_of_padded_torch(rows: str) -> None:
    """Two chosen, then two rejected sequences, as transformers' labels: prompts of 2 and 3 tokens,
    padding on the right."""
    make = torch.Generator().manual_seed(0)
    hidden = torch.randn(4, 9, 6, generator=make, dtype=torch.float64).to(DEVICE).requires_grad_()
    weight = torch.randn(11, 6, generator=make, dtype=torch.float64).to(DEVICE).requires_grad_()
    labels = torch.randint(11, (4, 9), generator=make).to(DEVICE)
    for row, (prompt, end) in enumerate([(2, 9), (3, 6), (2, 5), (3, 8)]):
        labels[row, :prompt] = -100
        labels[row, end:] = -100
    scored = from_padded(hidden[:, :-1], labels[:, 1:], order=halves(4))
    assert scored.lengths == [7, 3, 3, 5]
    got = linear_preference_loss(
        scored.hidden, weight, scored.target, loss_fn=dpo, lengths=scored.lengths
    ).loss
    logp = (hidden[:, :-1] @ weight.t()).log_softmax(-1)
    mask = labels[:, 1:] != -100
    token = logp.gather(2, labels[:, 1:].clamp(min=0)[..., None])[..., 0]
    chosen, rejected = (token * mask).sum(1).chunk(2)
    want = -F.logsigmoid(0.1 * (chosen - rejected)).mean()
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    leaves = (hidden, weight)
    pairs = zip(torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


def test_halves_are_dealt_in_turn() -> None:
    assert halves(6).tolist() == [0, 3, 1, 4, 2, 5]
    assert halves(6, parts=3).tolist() == [0, 2, 4, 1, 3, 5]
    with pytest.raises(ValueError, match="multiple of 2"):
        halves(5)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"hidden": torch.zeros(6, 4)}, "hidden"),
        ({"labels": torch.zeros(2, 2).long()}, "labels"),
        ({"labels": torch.zeros(2, 3)}, "int64"),
    ],
)
def test_padded_batch_that_does_not_fit_is_refused(change: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        from_padded(
            **{"hidden": torch.zeros(2, 3, 4), "labels": torch.zeros(2, 3).long(), **change}
        )


@pytest.mark.parametrize("group", [1, 2, 3])
def test_lengths_and_sizes_of_groups_stand_for_offsets(group: int) -> None:
    problem = Problem(LENGTHS, group=group)
    full = problem.loss()
    short = linear_preference_loss(
        problem.hidden,
        problem.weight,
        problem.target,
        cu_groups=group,
        loss_fn=problem.loss_fn,
        lengths=LENGTHS,
        ref_logp=problem.ref_logp,
    )
    assert torch.equal(full.loss, short.loss), "normalizer: the number of groups"
    assert torch.equal(full.logp, short.logp)
    assert full.loss != 0


def test_pairs_are_the_default() -> None:
    problem, seen = Problem(LENGTHS), []

    def loss_fn(logp, ref_logp, groups):
        assert ref_logp is None
        seen.append((len(logp), groups))
        return dpo(logp, None, groups)

    linear_preference_loss(
        problem.hidden, problem.weight, problem.target, loss_fn=loss_fn, lengths=LENGTHS
    )
    assert seen == [(6, slice(0, 3))]
