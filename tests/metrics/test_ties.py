"""An accuracy of pairs that all tie is not shown."""

from __future__ import annotations

from fasttr.metrics.ties import without_ties

AT_START = {
    "eval_loss": 0.69,
    "eval_rewards/accuracies": 0.0,
    "eval_rewards/accuracies_stderr": 0.0,
    "eval_ref/distance": 0.0,
    "eval_anchor/logratios/chosen": 0.0,
    "eval_anchor/logratios/rejected": 0.0,
    "eval_anchor/rewards/accuracies": 0.0,
    "eval_anchor/rewards/accuracies_stderr": 0.0,
}


def test_where_policy_and_references_are_equal_no_accuracy_is_left():
    assert without_ties(AT_START) == {
        "eval_loss": 0.69,
        "eval_ref/distance": 0.0,
        "eval_anchor/logratios/chosen": 0.0,
        "eval_anchor/logratios/rejected": 0.0,
    }


def test_after_a_hard_update_the_accuracy_against_the_initial_policy_stays():
    line = {**AT_START, "eval_anchor/logratios/chosen": 0.4, "eval_anchor/rewards/accuracies": 0.7}
    shown = without_ties(line)
    assert shown["eval_anchor/rewards/accuracies"] == 0.7
    assert "eval_rewards/accuracies" not in shown


def test_an_accuracy_of_0_that_is_no_tie_stays():
    line = {"rewards/accuracies": 0.0, "ref/distance": 0.3}
    assert without_ties(line) == line
    without_a_reference = {"rewards/accuracies": 0.0}
    assert without_ties(without_a_reference) == without_a_reference


def test_sets_with_names_are_held_apart():
    line = {
        "eval_hard_rewards/accuracies": 0.0,
        "eval_hard_ref/distance": 0.0,
        "eval_easy_rewards/accuracies": 0.0,
        "eval_easy_ref/distance": 0.2,
    }
    assert set(line) - set(without_ties(line)) == {"eval_hard_rewards/accuracies"}
