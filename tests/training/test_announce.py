"""The lines of a run: what stands in them, in which order, and how long they are."""

from __future__ import annotations

import itertools

import pytest

from fasttr import TrainConfig, train
from fasttr.training.announce import evaluation_lines, step_line
from tests.runs import settings

LINE = {
    "loss": 0.65432,
    "rewards/margins": 0.41234,
    "rewards/accuracies": 0.6875,
    "ref/distance": 2.0,
    "grad_norm": 1.25,
    "perf/tokens_per_second": 12345.0,
    "memory/peak_gib": 34.21,
}
EVALUATION = {
    "eval_loss": 0.6543,
    "eval_rewards/accuracies": 0.74,
    "eval_rewards/accuracies_stderr": 0.031,
    "eval_rewards/margins": 0.0346,
    "eval_ref/distance": 1.5,
    "eval_anchor/logratios/chosen": 0.3,
    "eval_anchor/logratios/rejected": -0.9,
    "eval_anchor/rewards/margins": 0.115,
    "eval_anchor/rewards/accuracies": 0.783,
    "eval_anchor/rewards/accuracies_stderr": 0.029,
}


def test_a_step_line_says_time_loss_speed_and_memory():
    assert step_line(12, 94, LINE, elapsed=62.0, left=425.0) == (
        "step 12/94 1m02s<7m05s loss 0.6543 margin +0.412 acc 0.688 12.3k tok/s 34.2G"
    )


def test_a_step_line_has_at_most_80_columns():
    widest = {**LINE, "rewards/margins": -123.4567, "kl": 12.25, "memory/peak_gib": 134.2}
    for step, seconds in itertools.product((1, 999, 123456), (1, 4000, 900000)):
        line = step_line(step, 123456, widest, elapsed=seconds, left=seconds)
        assert len(line) <= 80
        assert "loss 0.6543" in line
        assert "tok/s" in line


def test_no_accuracy_is_said_where_policy_and_reference_are_equal():
    tied = {**LINE, "rewards/accuracies": 0.0, "ref/distance": 0.0}
    assert "acc" not in step_line(1, 9, tied, elapsed=1.0, left=8.0)
    wrong = {**tied, "ref/distance": 0.1}
    assert "acc 0.000" in step_line(1, 9, wrong, elapsed=1.0, left=8.0)


def test_an_evaluation_leads_with_the_accuracy_against_the_initial_policy():
    assert evaluation_lines(60, EVALUATION) == [
        "evaluation at step 60: accuracy 0.783 +- 0.029 against the initial policy",
        "  margin +0.115  loss 0.6543; against the reference accuracy 0.740 margin +0.035",
    ]


def test_with_a_fixed_reference_nothing_is_said_twice():
    fixed = {**EVALUATION, "eval_rewards/margins": 0.115, "eval_rewards/accuracies": 0.783}
    assert evaluation_lines(60, fixed)[1] == "  margin +0.115  loss 0.6543"


def test_before_the_first_step_there_is_only_a_loss():
    start = {key: 0.0 for key in EVALUATION} | {"eval_loss": 0.6931}
    assert evaluation_lines(0, start) == [
        "evaluation at step 0: the policy is the initial one  loss 0.6931"
    ]


def test_losses_without_a_reference_have_their_own_accuracy():
    own = {"loss": 0.5, "rewards/accuracies": 0.61, "rewards/accuracies_stderr": 0.04}
    metrics = {f"eval_held_{key}": value for key, value in own.items()}
    assert evaluation_lines(5, metrics, "held") == [
        "evaluation on held at step 5: accuracy 0.610 +- 0.040  loss 0.5000"
    ]


@pytest.mark.parametrize("loss_type", ["kto", ["kto"], None], ids=["a name", "a list", "absent"])
@pytest.mark.parametrize("order", ["random", "sequential"])
def test_shuffled_rows_of_kto_are_said_however_the_loss_is_given(
    workspace, tmp_path, capsys, loss_type, order
):
    rows = [
        {"prompt": f"{i} is", "completion": f" {i % 3}.", "label": i % 2 == 0} for i in range(8)
    ]
    config = TrainConfig(
        **settings(
            workspace,
            tmp_path,
            dataset_name=None,
            loss_type=loss_type,
            train_sampling_strategy=order,
            max_steps=1,
        )
    )
    train(config, train_dataset=rows)
    said = "rows are shuffled, each with its mismatched completion" in capsys.readouterr().out
    assert said == (order == "random")
