"""Metrics of three rows by hand: every name that is made of sums, no value 0, 1/2 or 1.

Rows have prompts of 2 tokens, so every token of a completion is predicted.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from fasttr.losses import ApoZeroUnpaired, Kto, Loss, Sft, Sigmoid, Simpo
from fasttr.metrics.names import NAMES
from fasttr.metrics.sums import (
    SUMS,
    Averages,
    MicroBatches,
    as_metrics,
    binomial_stderr,
    by_name,
    means,
    over_micro_batches,
    pack_sums,
    zeros,
)
from fasttr.packing.layout import pack
from tests.tiny import random_trees

CPU = torch.device("cpu")


class Head(NamedTuple):
    """What the head says of a pack, made up."""

    loss: Tensor
    logp: Tensor
    entropy: Tensor | None
    correct: Tensor | None
    logit_mean: Tensor | None


# Chosen and rejected tokens: 2 and 1, 1 and 3, 3 and 2.
PAIRS = [(2, 2, 1), (2, 1, 3), (2, 3, 2)]
LOGP = [-3.0, -4.5, -2.0, -9.0, -6.0, -5.5]
REF = [-4.0, -4.0, -3.5, -7.0, -5.0, -5.25]
# Log-ratios: 1, -0.5 | 1.5, -2 | -1, -0.25.
ENTROPY = [0.5, 1.5, 2.0, 1.25, 0.75, 0.25, 1.75, 2.5, 3.0, 0.125, 1.0, 2.25]
CORRECT = [True, False, True, True, False, False, False, False, False, False, True, True]
LOGIT = [0.1, 0.3, -0.2, 0.55, 0.7, -0.4, 0.2, -0.6, 0.9, 0.4, 0.8, -0.1]
# The twelve tokens in order: chosen 0 1, rejected 2, chosen 3, rejected 4 5 6, chosen 7 8 9,
# rejected 10 11.
CHOSEN_TOKENS = [0, 1, 3, 7, 8, 9]
REJECTED_TOKENS = [2, 4, 5, 6, 10, 11]


def head(loss: float, completions: slice = slice(None), tokens: slice = slice(None)) -> Head:
    return Head(
        torch.tensor(loss),
        torch.tensor(LOGP[completions]),
        torch.tensor(ENTROPY[tokens]),
        torch.tensor(CORRECT[tokens]),
        torch.tensor(LOGIT[tokens]),
    )


def metrics_of(loss: Loss, sums: Tensor) -> dict[str, float]:
    return as_metrics(by_name(over_micro_batches(means(sums))), loss)


def mean_at(values: list[float], places: list[int]) -> float:
    return sum(values[place] for place in places) / len(places)


def assert_metrics(got: dict[str, float], want: dict[str, float]) -> None:
    assert not {0.0, 0.5, 1.0} & set(want.values())
    assert got.keys() == want.keys()
    assert want.keys() <= NAMES
    for name, value in want.items():
        assert got[name] == pytest.approx(value, rel=1e-6), name


def test_pairs_in_two_packs():
    """Rows 0 and 1 in one pack, row 2 in another, as a step adds them up."""
    trees = random_trees(PAIRS)
    loss = Sigmoid(beta=0.2)
    first = head(0.375, slice(0, 4), slice(0, 7))
    second = head(0.25, slice(4, 6), slice(7, 12))
    sums = zeros(CPU)
    sums += pack_sums(first, torch.tensor(REF[:4]), pack(trees[:2]), loss)
    sums += pack_sums(second, torch.tensor(REF[4:]), pack(trees[2:]), loss)
    assert_metrics(
        metrics_of(loss, sums),
        {
            "loss": 0.375 + 0.25,
            "logps/chosen": -11 / 3,
            "logps/rejected": -19 / 3,
            "rewards/chosen": 0.2 * 1.5 / 3,
            "rewards/rejected": 0.2 * -2.75 / 3,
            "rewards/margins": 0.2 * 4.25 / 3,
            "rewards/accuracies": 2 / 3,
            "logits/chosen": mean_at(LOGIT, CHOSEN_TOKENS),
            "logits/rejected": mean_at(LOGIT, REJECTED_TOKENS),
            "entropy": sum(ENTROPY) / 12,
            "mean_token_accuracy": 1 / 3,
            # Of both sides of a pair: (1 + 0.5 + 1.5 + 2 + 1 + 0.25) / 6.
            "ref/distance": 6.25 / 6,
        },
    )


def test_a_tie_is_no_win():
    (tree,) = random_trees([(2, 2, 1)])
    tied = torch.tensor([-4.0, -5.5])
    sums = pack_sums(head(1.0, slice(0, 2), slice(0, 3)), tied, pack([tree]), Sigmoid())
    assert LOGP[0] - tied[0] == LOGP[1] - tied[1]
    assert metrics_of(Sigmoid(), sums)["rewards/accuracies"] == 0.0


def test_pairs_without_a_reference_are_rewarded_by_the_mean_logp_of_a_token():
    loss = Simpo(beta=2.0)
    sums = pack_sums(head(0.7), None, pack(random_trees(PAIRS)), loss)
    found = metrics_of(loss, sums)
    chosen = [-3 / 2, -2 / 1, -6 / 3]
    rejected = [-4.5 / 1, -9 / 3, -5.5 / 2]
    assert found["rewards/chosen"] == pytest.approx(2 * sum(chosen) / 3)
    assert found["rewards/rejected"] == pytest.approx(2 * sum(rejected) / 3)
    assert "ref/distance" not in found


def test_unpaired_rows_count_by_label_and_their_mismatched_completions_estimate_kl():
    """Groups of rows 0, 1 and of row 2: estimates max(0, (1.9 + 0.5) / 2) and max(0, -0.25)."""
    loss = Kto(beta=0.2)
    labels = [True, False, True]
    trees = [tree._replace(label=labels[tree.row]) for tree in random_trees(PAIRS)]
    ref = torch.tensor([-4.25, -6.4, -3.5, -9.5, -5.25, -5.25])  # own: 1.25, 1.5, -0.75
    assert_metrics(
        metrics_of(loss, pack_sums(head(0.625), ref, pack(trees, [2, 1]), loss)),
        {
            "loss": 0.625,
            "logps/chosen": -9 / 2,
            "logps/rejected": -2.0,
            "rewards/chosen": 0.2 * 0.25,
            "rewards/rejected": 0.2 * 1.5,
            "rewards/margins": 0.2 * -1.25,
            "logits/chosen": mean_at(LOGIT, [0, 1, 7, 8, 9]),
            "logits/rejected": LOGIT[3],
            "entropy": mean_at(ENTROPY, [0, 1, 3, 7, 8, 9]),
            "kl": 1.2 / 2,
            "ref/distance": 3.5 / 3,
        },
    )


def test_a_step_without_rejected_rows_has_no_mean_of_them():
    loss = ApoZeroUnpaired(beta=0.2)
    trees = [tree._replace(completions=tree.completions[:1]) for tree in random_trees(PAIRS)]
    own = Head(*(x if x.dim() == 0 else x[[0, 2, 4]] for x in head(0.3)[:2]), None, None, None)
    found = metrics_of(loss, pack_sums(own, torch.tensor([-4.0, -3.5, -5.0]), pack(trees), loss))
    assert found["rewards/chosen"] == pytest.approx(0.2 * 1.5 / 3)
    assert not {"rewards/rejected", "logps/rejected", "rewards/margins"} & found.keys()
    assert found["kl"] == 0.0  # there is no mismatched completion


def test_sft_has_the_chosen_side_alone():
    trees = [tree._replace(completions=tree.completions[:1]) for tree in random_trees(PAIRS)]
    chosen = head(1.75)
    chosen = Head(chosen.loss, chosen.logp[0::2], *(x[CHOSEN_TOKENS] for x in chosen[2:]))
    assert_metrics(
        metrics_of(Sft(), pack_sums(chosen, None, pack(trees), Sft())),
        {
            "loss": 1.75,
            "logps/chosen": -11 / 3,
            "logits/chosen": mean_at(LOGIT, CHOSEN_TOKENS),
            "entropy": mean_at(ENTROPY, CHOSEN_TOKENS),
            "mean_token_accuracy": 1 / 3,
        },
    )


def test_steps_are_averaged_over_those_that_have_a_mean():
    averages = Averages(CPU)
    for reward in (1.25, math.nan, 2.0):
        step_means = dict.fromkeys(SUMS, 3.0) | {"rejected_reward": reward}
        averages.add(torch.tensor([list(step_means.values())]))
    found = averages.read()
    assert found["rejected_reward"] == pytest.approx(3.25 / 2)
    assert found["chosen_reward"] == 3.0
    assert float(averages.sums.sum()) == 0.0


def test_a_margin_is_of_micro_batches_that_hold_both_classes():
    """Unpaired rows in micro-batches of 2 and 1 rows: the second has no undesirable one."""
    loss = ApoZeroUnpaired(beta=0.2)
    trees = [
        tree._replace(completions=tree.completions[:1], label=tree.row != 1)
        for tree in random_trees(PAIRS)
    ]
    own = Head(*(x if x.dim() == 0 else x[[0, 2, 4]] for x in head(0.3)[:2]), None, None, None)
    parts = MicroBatches(torch.tensor([0, 0, 1]), 2)
    ref = torch.tensor([-4.0, -3.5, -5.5])  # log-ratios 1, 1.5, -0.5
    found = metrics_of(loss, pack_sums(own, ref, pack(trees), loss, parts))
    assert found["rewards/chosen"] == pytest.approx(0.2 * (1 - 0.5) / 2)
    assert found["rewards/margins"] == pytest.approx(0.2 * (1 - 1.5))


def test_a_loss_that_is_not_a_number_is_never_left_out():
    averages = Averages(CPU)
    sound = dict.fromkeys(SUMS, 3.0)
    broken = sound | {"loss": math.nan}
    for step_means in (sound, broken, sound):
        averages.add(torch.tensor([list(step_means.values())]))
    assert math.isnan(averages.read()["loss"])
    assert math.isnan(as_metrics(broken, Sigmoid())["loss"])


def test_the_standard_error_of_a_share():
    assert binomial_stderr(0.2, 25) == pytest.approx(0.08)
