"""What the commands that are named as TRL's mean, and what they refuse as TRL does."""

from __future__ import annotations

import pytest

from fasttr.cli.train import parse_train
from fasttr.errors import FasttrError

NEEDED = ["--model_name_or_path", "m", "--dataset_name", "d"]


def test_a_word_brings_the_defaults_of_trls_command():
    read = {method: parse_train(NEEDED, method) for method in ("train", "dpo", "kto", "sft")}
    assert {method: config.loss_type for method, config in read.items()} == {
        "train": None,
        "dpo": "sigmoid",
        "kto": "kto",
        "sft": "sft",
    }
    assert {method: config.train_sampling_strategy for method, config in read.items()} == {
        "train": "random",
        "dpo": "random",
        "kto": "sequential",
        "sft": "random",
    }
    assert [read[method].drop_identical_sides for method in ("train", "dpo")] == [True, False]
    assert [read[method].learning_rate for method in ("dpo", "sft")] == [1e-6, 2e-5]


def test_a_preset_and_a_flag_win_over_the_word():
    config = parse_train([*NEEDED, "--preset", "tr-soft", "--loss_type", "ipo"], "dpo")
    assert (config.loss_type, config.beta, config.ref_update) == ("ipo", 0.05, "soft")
    assert parse_train([*NEEDED, "--learning_rate", "1e-4"], "sft").learning_rate == 1e-4


@pytest.mark.parametrize(
    ("method", "words", "expected"),
    [
        ("dpo", ["--loss_type", "kto"], "loss_type: got 'kto'; fasttr dpo has .*fasttr kto has"),
        ("kto", ["--loss_type", "sigmoid"], "got 'sigmoid'; fasttr kto has kto, .*fasttr dpo has"),
        ("sft", ["--loss_type", "ipo"], "got 'ipo'; fasttr sft has sft"),
        (
            "kto",
            ["--train_sampling_strategy", "random"],
            "got random with kto, .*wanted sequential, or fasttr train",
        ),
        ("sft", ["--packing", "true"], "packing: got True; .*leave it out"),
        ("sft", ["--assistant_only_loss"], "assistant_only_loss: got True; turns of a conversat"),
        ("sft", ["--dataset_text_field", "content"], "dataset_text_field: got 'content'; rows of"),
    ],
)
def test_what_trl_refuses_there_is_refused(method, words, expected):
    with pytest.raises(FasttrError, match=expected):
        parse_train([*NEEDED, *words], method)


def test_the_order_that_trl_refuses_for_kto_is_there_for_the_unpaired_apo_loss():
    words = ["--loss_type", "apo_zero_unpaired", "--train_sampling_strategy", "random"]
    assert parse_train([*NEEDED, *words], "kto").train_sampling_strategy == "random"


def test_smoothing_that_trl_passes_over_is_passed_over_and_said(capsys):
    config = parse_train([*NEEDED, "--label_smoothing", "0.1"], "dpo")
    assert config.label_smoothing == 0.0
    assert "label_smoothing: ignored: none of the losses reads it" in capsys.readouterr().out
    robust = ["--loss_type", "robust", "--label_smoothing", "0.1"]
    assert parse_train([*NEEDED, *robust], "dpo").label_smoothing == 0.1
