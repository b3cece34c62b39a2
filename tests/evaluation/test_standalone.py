"""`measure`: the same numbers as inside a run, and standard errors that are those of the rows."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from fasttr import TrainConfig
from fasttr.data.load import DataConfig, TreeSet, load_trees
from fasttr.errors import FasttrError
from fasttr.evaluation.standalone import measure
from fasttr.models.load import load_tokenizer
from fasttr.models.scratch import init_model
from tests.runs import evaluations, read_rows, run, write_rows
from tests.tiny import alone_logps, token_logps


def config(workspace, **changes) -> TrainConfig:
    values = {
        "model_name_or_path": str(workspace / "model"),
        "dataset_name": str(workspace / "test.jsonl"),
        "max_length": 64,
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "max_tokens_per_batch": 256,
    }
    return TrainConfig(**(values | changes))


def trees_of(workspace) -> TreeSet:
    data = DataConfig(str(workspace / "test.jsonl"), max_length=64)
    return load_trees(load_tokenizer(str(workspace / "model")), data)


def pair_logps(folder, trees) -> np.ndarray:
    """(rows, 2) of the specification."""
    with torch.no_grad():
        logp = alone_logps(AutoModelForCausalLM.from_pretrained(folder), list(trees))
    return logp.view(-1, 2).double().numpy()


def mean_and_error(values: np.ndarray) -> tuple[float, float]:
    return values.mean(), values.std(ddof=1) / math.sqrt(len(values))


CASES = {
    "sigmoid": {"loss_type": "sigmoid"},
    "sigmoid ld_alpha": {"loss_type": "sigmoid", "ld_alpha": 0.3},
    "ipo": {"loss_type": "ipo"},
    "list": {"loss_type": ["sigmoid", "sft"]},
    "kto_paired": {"loss_type": "kto_paired", "group_size": 4},
    "simpo": {"loss_type": "simpo"},
    "kto": {"loss_type": "kto", "group_size": 4},
    "absent": {},
}


@pytest.mark.parametrize("case", CASES)
def test_it_agrees_with_the_evaluation_inside_a_run(workspace, tmp_path, case):
    """After training against the initial policy, the anchor is that policy."""
    changes = {"beta": 0.3, **CASES[case]}
    run(
        workspace,
        tmp_path,
        eval_strategy="steps",
        eval_steps=3,
        max_steps=3,
        eval_dataset_name=str(workspace / "test.jsonl"),
        save_strategy="steps",
        save_steps=3,
        **changes,
    )
    inside = evaluations(tmp_path)[-1]
    trained = config(workspace, model_name_or_path=str(tmp_path / "checkpoint-3"), **changes)
    found = measure(trained, str(workspace / "model")).metrics
    shared = [
        name for name in inside if name.startswith("eval_") and not name.startswith("eval_anchor/")
    ]
    assert "eval_loss" in shared
    for name in shared:
        got = found[name.removeprefix("eval_")]
        assert got == pytest.approx(inside[name], rel=1e-5, abs=1e-6), name
    for name in ("logratios/chosen", "logratios/rejected"):
        if f"eval_anchor/{name}" in inside:
            assert found[name] == pytest.approx(inside[f"eval_anchor/{name}"], abs=1e-5)


def test_ld_alpha_weighs_what_lies_beyond_the_shorter_side(workspace):
    """LD-DPO, arXiv:2409.06411: sums up to the shorter length, and alpha times the rest."""
    alpha = 0.3
    trees = list(trees_of(workspace))
    model = AutoModelForCausalLM.from_pretrained(workspace / "model")
    expected = []
    for tree in trees:
        shorter = min(map(len, tree.completions))
        sides = [token_logps(model, tree.prompt_ids, ids) for ids in tree.completions]
        expected.append([float(s[:shorter].sum() + alpha * s[shorter:].sum()) for s in sides])
    found = measure(config(workspace, ld_alpha=alpha)).metrics
    assert found["logps/chosen"] == pytest.approx(np.mean(expected, axis=0)[0], rel=1e-5)
    assert found["logps/rejected"] == pytest.approx(np.mean(expected, axis=0)[1], rel=1e-5)
    whole = measure(config(workspace)).metrics
    assert abs(whole["logps/rejected"] - found["logps/rejected"]) > 1


def test_standard_errors_are_those_of_the_rows(workspace):
    measured = measure(
        config(workspace, loss_type="sigmoid", beta=0.2), str(workspace / "reference")
    )
    trees = trees_of(workspace)
    logp, ref = (pair_logps(workspace / name, trees) for name in ("model", "reference"))
    u, v = (logp - ref).T
    share = (u > v).mean()
    expected = {
        "loss": mean_and_error(np.log1p(np.exp(-0.2 * (u - v)))),
        "rewards/chosen": mean_and_error(0.2 * u),
        "rewards/margins": mean_and_error(0.2 * (u - v)),
        "rewards/accuracies": (share, math.sqrt(share * (1 - share) / 10)),
        "logratios/chosen": mean_and_error(u),
        "logratios/rejected": mean_and_error(v),
        "logps/rejected": mean_and_error(logp[:, 1]),
        "logps/margins": mean_and_error(logp[:, 0] - logp[:, 1]),
    }
    assert measured.rows == len(trees) == 10
    assert share not in (0.0, 0.5, 1.0)
    for name, (value, error) in expected.items():
        assert measured.metrics[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
        stderr = measured.metrics[f"{name}_stderr"]
        assert stderr == pytest.approx(error, rel=1e-3, abs=1e-6), name
    assert "loss " in measured.table()
    assert " +- " in measured.table()


def test_without_an_anchor_there_are_log_probs_alone(workspace):
    found = measure(config(workspace)).metrics
    assert "loss" not in found
    assert not [name for name in found if name.startswith(("rewards/", "logratios/", "ref/"))]
    trees = trees_of(workspace)
    logp = pair_logps(workspace / "model", trees)
    assert found["logps/accuracies"] == pytest.approx((logp[:, 0] > logp[:, 1]).mean())
    per_token = logp / trees.completion_lengths
    share = (per_token[:, 0] > per_token[:, 1]).mean()
    assert found["logps/accuracies_per_token"] == pytest.approx(share)
    stderr = math.sqrt(share * (1 - share) / 10)
    assert found["logps/accuracies_per_token_stderr"] == pytest.approx(stderr)
    with pytest.raises(FasttrError, match="anchor_model_name_or_path: missing"):
        measure(config(workspace, loss_type="ipo"))


def test_a_model_against_itself_has_no_margin(workspace):
    found = measure(config(workspace, loss_type="sigmoid"), str(workspace / "model")).metrics
    assert found["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert found["rewards/margins"] == found["ref/distance"] == 0.0


def test_unpaired_rows_are_measured_by_class(workspace, tmp_path):
    rows = []
    for i, pair in enumerate(read_rows(workspace / "test.jsonl")):
        is_desirable = i % 3 == 0
        text = pair["chosen" if is_desirable else "rejected"]
        rows.append({"prompt": pair["prompt"], "completion": text, "label": is_desirable})
    data = str(write_rows(tmp_path / "unpaired.jsonl", rows))
    alone = measure(config(workspace, dataset_name=data)).metrics
    assert not {"loss", "logps/accuracies"} & alone.keys()
    logp, ref = (
        pair_logps(workspace / name, trees_of(workspace)) for name in ("model", "reference")
    )
    first = np.arange(10) % 3 == 0
    expected = mean_and_error(logp[first, 0])
    assert (alone["logps/chosen"], alone["logps/chosen_stderr"]) == pytest.approx(
        expected, rel=1e-4
    )
    found = measure(config(workspace, dataset_name=data), str(workspace / "reference")).metrics
    rewards = 0.1 * (logp - ref)[~first, 1]
    expected = mean_and_error(rewards)
    got = (found["rewards/rejected"], found["rewards/rejected_stderr"])
    assert got == pytest.approx(expected, rel=1e-3)
    assert {"loss", "loss_stderr"} <= found.keys()


def test_another_tokenizer_is_refused(workspace, tmp_path):
    init_model("llama", hidden_size=16, num_layers=1, num_heads=2, output_dir=tmp_path / "bytes")
    with pytest.raises(FasttrError, match="another vocabulary"):
        measure(config(workspace), str(tmp_path / "bytes"))


def test_a_metric_that_is_not_finite_is_null_in_the_file(workspace, tmp_path):
    measured = measure(config(workspace))
    metrics = {**measured.metrics, "kl": math.nan}
    measured._replace(metrics=metrics).write(tmp_path / "out" / "eval.json")
    written = json.loads((tmp_path / "out" / "eval.json").read_text())
    assert written["metrics"]["kl"] is None
    assert written["metrics"]["logps/chosen"] == measured.metrics["logps/chosen"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["eval.json"]
