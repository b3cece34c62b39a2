"""An evaluation inside a run: against the window's reference and against the initial policy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fasttr.data.in_memory import ListTrees
from fasttr.data.unpaired import Unpaired
from fasttr.evaluation.split import BLOCK, EvaluationSplit, evaluate
from fasttr.losses import CustomLoss, Kto, Loss, Objective, Sft, Sigmoid
from fasttr.metrics.ledger import PreferenceLedger
from fasttr.packing.plan import Plan
from tests.tiny import alone_logps, packed_tiny, random_trees, tiny_model

SHAPES = [(3, 4, 2), (0, 5, 1), (6, 1, 3), (2, 2, 9), (1, 7, 2)]
# Log-ratios of chosen and rejected; the chosen side is higher in three of five rows, and in two.
TO_REFERENCE = np.array([[1.0, -0.5], [0.25, -2.0], [-1.5, -1.75], [-0.5, 0.5], [0.75, 3.0]])
TO_ANCHOR = np.array([[0.5, 1.5], [2.0, -1.0], [-0.25, 0.75], [1.25, 0.5], [-3.0, -2.0]])


def split_of(trees, loss: Loss, budget: int = 20, columns: int = 2) -> EvaluationSplit:
    """With both references as far from the model as the log-ratios say."""
    logps = alone_logps(tiny_model(), list(trees)).detach().numpy().reshape(len(trees), -1)
    split = EvaluationSplit(trees, budget, 1).with_tables(loss)
    split.ref_logps.values[:] = logps - TO_REFERENCE[:, :columns]
    split.anchor_logps.values[:] = logps - TO_ANCHOR[:, :columns]
    return split


def measured(split: EvaluationSplit, loss: Loss, after=None) -> dict[str, float]:
    return evaluate(packed_tiny(), split, Objective(loss), PreferenceLedger(loss), after)


def test_rewards_are_against_the_reference_and_the_anchor_against_the_initial_policy():
    """Several packs, whose rows come in another order."""
    loss = Sigmoid(beta=0.2)
    split = split_of(ListTrees(random_trees(SHAPES)), loss)
    assert len(list(split.packs())) > 2
    found = measured(split, loss)
    u, v = TO_REFERENCE.T
    a, b = TO_ANCHOR.T
    expected = {
        "eval_loss": np.log1p(np.exp(-0.2 * (u - v))).mean(),
        "eval_rewards/chosen": 0.2 * u.mean(),
        "eval_rewards/rejected": 0.2 * v.mean(),
        "eval_rewards/margins": 0.2 * (u - v).mean(),
        "eval_rewards/accuracies": 3 / 5,
        "eval_rewards/accuracies_stderr": math.sqrt(3 / 5 * 2 / 5 / 5),
        "eval_ref/distance": np.abs(TO_REFERENCE).mean(),
        "eval_anchor/logratios/chosen": a.mean(),
        "eval_anchor/logratios/rejected": b.mean(),
        "eval_anchor/rewards/margins": 0.2 * (a - b).mean(),
        "eval_anchor/rewards/accuracies": 2 / 5,
        "eval_anchor/rewards/accuracies_stderr": math.sqrt(2 / 5 * 3 / 5 / 5),
    }
    assert (u > v).mean() == 3 / 5
    assert (a > b).mean() == 2 / 5
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-5), name


def test_unpaired_rows_are_anchored_by_label():
    """Of a row the first completion counts; the mismatched one has no part in the anchor."""
    loss = Kto(beta=0.2)
    labels = np.array([True, False, True, True, False])
    single = [tree._replace(completions=tree.completions[:1]) for tree in random_trees(SHAPES)]
    rows = Unpaired(ListTrees(single), labels=labels, block=5, max_length=None)
    trees = [rows[row] for row in range(5)]
    split = split_of(ListTrees(trees), loss)
    found = measured(split, loss)
    chosen, rejected = TO_ANCHOR[labels, 0].mean(), TO_ANCHOR[~labels, 0].mean()
    assert found["eval_anchor/logratios/chosen"] == pytest.approx(chosen, abs=1e-5)
    assert found["eval_anchor/logratios/rejected"] == pytest.approx(rejected, abs=1e-5)
    margin = 0.2 * (chosen - rejected)
    assert found["eval_anchor/rewards/margins"] == pytest.approx(margin, abs=1e-5)
    assert not [name for name in found if "accuracies" in name]


def test_a_loss_without_a_reference_has_no_tables():
    trees = ListTrees([t._replace(completions=t.completions[:1]) for t in random_trees(SHAPES)])
    plan = Plan(trees, train_batch_size=2, max_tokens_per_batch=30)
    split = EvaluationSplit.of(trees, Sft(), plan)
    assert split.ref_logps is split.anchor_logps is None
    assert not split.lacks_reference()
    found = measured(split, Sft())
    logps = alone_logps(tiny_model(), list(trees)).detach()
    predicted = sum(len(t.completions[0]) for t in trees) - 1  # one row has no prompt
    assert found["eval_loss"] == pytest.approx(-float(logps.sum()) / predicted, rel=1e-5)
    assert not [name for name in found if "anchor" in name or "ref/" in name]


def test_a_loss_of_one_completion_has_a_reference_too():
    """A likelihood held near the reference: there is no other side, so nothing is won."""
    trees = ListTrees([t._replace(completions=t.completions[:1]) for t in random_trees(SHAPES)])
    loss = CustomLoss(lambda inputs: inputs.chosen_logratio**2, beta=0.2, completions=1)
    split = split_of(trees, loss, columns=1)
    found = measured(split, loss)
    u, a = TO_REFERENCE[:, 0], TO_ANCHOR[:, 0]
    assert found["eval_loss"] == pytest.approx((u**2).mean(), abs=1e-4)
    assert found["eval_ref/distance"] == pytest.approx(np.abs(u).mean(), abs=1e-5)
    assert found["eval_anchor/logratios/chosen"] == pytest.approx(a.mean(), abs=1e-5)
    others = [name for name in found if "rejected" in name or "margins" in name]
    assert not [*others, *(name for name in found if "accuracies" in name)]


def test_every_pack_is_handed_on_with_its_logps():
    loss = Sigmoid()
    trees = ListTrees(random_trees(SHAPES))
    seen = {}

    def keep(batch, out) -> None:
        seen.update(zip(batch.rows, out.logp.view(-1, 2).tolist(), strict=True))

    measured(split_of(trees, loss), loss, keep)
    want = alone_logps(tiny_model(), list(trees)).detach().view(-1, 2)
    got = torch.tensor([seen[row] for row in range(5)])
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-6)


@pytest.mark.parametrize("group_rows", [1, 3])
def test_the_packs_of_an_evaluation_hold_every_row_once_and_groups_whole(group_rows):
    trees = ListTrees(random_trees([(2, 3, 1)] * (BLOCK + 7)))
    split = EvaluationSplit(trees, 40, group_rows)
    packs = list(split.packs())
    assert sorted(row for batch in packs for row in batch.rows) == list(range(BLOCK + 7))
    for batch in packs:
        sizes = np.diff(batch.cu_rows)
        assert set(sizes) <= {group_rows, (BLOCK + 7) % group_rows}
        firsts = [batch.rows[first] for first in batch.cu_rows[:-1]]
        assert all(row % group_rows == 0 for row in firsts)


def test_a_split_lacks_its_reference_until_every_row_is_scored():
    split = split_of(ListTrees(random_trees(SHAPES)), Sigmoid())
    assert not split.lacks_reference()
    split.ref_logps.values[3, 1] = np.nan
    assert split.lacks_reference()
