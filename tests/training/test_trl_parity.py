"""The same rows, weights and reference through TRL's DPOTrainer: loss, gradient norm, metrics and
parameters."""

from __future__ import annotations

import gc
import json

import pytest
import torch

from tests.runs import run, steps, weights
from tests.trl_trainers import trl_arguments, trl_log

SHARED = [
    "loss",
    "grad_norm",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
    "logits/chosen",
    "logits/rejected",
    "entropy",
    "mean_token_accuracy",
    "num_tokens",
    "learning_rate",
]
# fasttr leaves the rejected side out of an sft run, so nothing that reads it is shared there.
SHARED_SFT = [
    "loss",
    "grad_norm",
    "logps/chosen",
    "logits/chosen",
    "mean_token_accuracy",
    "learning_rate",
]
SHARED_KTO = [
    "loss",
    "grad_norm",
    "kl",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
    "logits/chosen",
    "logits/rejected",
    "entropy",
    "learning_rate",
]

UNMOVED = {"learning_rate": 0.0, "max_grad_norm": 0.0, "max_steps": 3}

# forward_kl and alpha_divergence take exp(-u): the fp32 rounding of a long sum of log-probs is a
# relative error there.
DPO_CASES = {
    **{
        name: {}
        for name in (
            "sigmoid",
            "sigmoid_norm",
            "hinge",
            "ipo",
            "nca_pair",
            "bco_pair",
            "sppo_hard",
            "aot",
            "aot_unpaired",
            "apo_zero",
            "apo_down",
            "discopop",
            "sft",
        )
    },
    "robust": {"label_smoothing": 0.1},
    "exo_pair": {"label_smoothing": 0.1},
    "aot smoothed": {"label_smoothing": 0.2},
    "sigmoid forward_kl": {"f_divergence_type": "forward_kl", "max_length": 24},
    "ipo js_divergence": {"f_divergence_type": "js_divergence"},
    "hinge alpha_divergence": {
        "f_divergence_type": "alpha_divergence",
        "f_alpha_divergence_coef": 0.3,
        "max_length": 24,
    },
    "sigmoid ld_alpha": {"ld_alpha": 0.4},
    "ipo ld_alpha": {"ld_alpha": 0.4},
    "list": {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    "sigmoid weighted": {"use_weighting": True},
    "ipo weighted": {"use_weighting": True, "ld_alpha": 0.4},
    "list weighted": {"loss_type": ["ipo", "apo_zero"], "use_weighting": True},
}
# The other losses that take WPO's weights; TRL's backward stops with hinge, as its weight is
# multiplied onto the loss in place.
WEIGHTED_CASES = {
    **{
        name: {}
        for name in (
            "sigmoid_norm",
            "ipo",
            "nca_pair",
            "bco_pair",
            "sppo_hard",
            "apo_zero",
            "apo_down",
        )
    },
    "discopop": {"max_length": 24},  # divided by a temperature of 0.05, rounding grows
    "robust": {"label_smoothing": 0.1},
    "exo_pair": {"label_smoothing": 0.1},
    "sigmoid js_divergence": {"f_divergence_type": "js_divergence"},
}


@pytest.fixture(scope="module", autouse=True)
def _trl_is_imported():
    """Its trainers collect garbage again and again: they need not look at their own modules."""
    from trl import DPOTrainer, KTOTrainer  # noqa: F401

    gc.collect()
    gc.freeze()


def trl_run(workspace, tmp_path, after_step=None, **changes):
    """TRL's log, one dict a step, on the workspace's rows: DPOTrainer, or KTOTrainer for its
    losses."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

    kto = changes["loss_type"] in ("kto", "apo_zero_unpaired")
    rows = [json.loads(line) for line in (workspace / "train.jsonl").read_text().splitlines()]
    model = AutoModelForCausalLM.from_pretrained(workspace / "model", dtype=torch.float32)
    reference = AutoModelForCausalLM.from_pretrained(
        workspace / "reference", dtype=torch.float32
    ).eval()
    if kto:
        rows = unpaired_rows(rows)
        changes = {"train_sampling_strategy": "sequential", **changes}
    args = trl_arguments(
        KTOConfig if kto else DPOConfig,
        tmp_path / "trl",
        **{"per_device_train_batch_size": 4, "max_length": 64, **UNMOVED, **changes},
    )
    trainer = (KTOTrainer if kto else DPOTrainer)(
        model=model,
        ref_model=reference,
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(workspace / "model"),
    )
    return trl_log(trainer, after_step)


def unpaired_rows(rows):
    """Chosen and rejected of the pairs in turn, so that most groups hold both classes; one holds a
    single one."""
    out = []
    for i, row in enumerate(rows):
        side = ("chosen", "rejected")[i % 2 if i >= 4 else 0]
        out.append({"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"})
    return out


def assert_same_log(ours, theirs, keys):
    assert len(ours) == len(theirs) > 0
    for mine, other in zip(ours, theirs, strict=True):
        for key in keys:
            assert (key in mine) == (key in other), key
            if key not in mine:
                continue
            # Means of logits and margins lie near 0 against terms of order 1 and more.
            bound = 1e-5 * max(
                abs(other[key]), 1.0 if key.startswith(("logits", "rewards", "kl")) else 0.0
            )
            assert abs(mine[key] - other[key]) <= bound, (key, mine[key], other[key])


@pytest.mark.parametrize("case", DPO_CASES)
def test_every_shared_metric_is_trls_with_a_perturbed_reference(workspace, tmp_path, case):
    changes = {"loss_type": case.split()[0], **DPO_CASES[case]}
    theirs = trl_run(workspace, tmp_path, **changes)
    assert any(abs(line["rewards/margins"]) > 1e-3 for line in theirs)
    sft = case == "sft"
    reference = {} if sft else {"ref_model_name_or_path": str(workspace / "reference")}
    # An sft term in a list averages over TRL's micro-batch, which is the whole step here.
    run(workspace, tmp_path / "ours", **UNMOVED, **changes, **reference)
    assert_same_log(steps(tmp_path / "ours"), theirs, SHARED_SFT if sft else SHARED)


@pytest.mark.slow
@pytest.mark.parametrize("case", WEIGHTED_CASES)
def test_wpo_weighs_every_loss_as_trl_does(workspace, tmp_path, case):
    changes = {"loss_type": case.split()[0], "use_weighting": True, **WEIGHTED_CASES[case]}
    theirs = trl_run(workspace, tmp_path, **changes)
    reference = {"ref_model_name_or_path": str(workspace / "reference")}
    run(workspace, tmp_path / "ours", **UNMOVED, **changes, **reference)
    assert_same_log(steps(tmp_path / "ours"), theirs, SHARED)


@pytest.mark.parametrize("case", ["kto", "kto weighted", "apo_zero_unpaired"])
def test_kto_is_trls_with_a_perturbed_reference(workspace, tmp_path, case):
    """Rows in the order of the file, as TRL demands; the first group holds desirable rows alone."""
    weights_ = (
        {"desirable_weight": 1.5, "undesirable_weight": 0.5} if case == "kto weighted" else {}
    )
    changes = {"loss_type": case.split()[0], "beta": 0.5, **weights_}
    theirs = trl_run(workspace, tmp_path, **changes)
    assert case == "apo_zero_unpaired" or any(line["kl"] > 1e-3 for line in theirs)
    data = tmp_path / "unpaired.jsonl"
    rows = [json.loads(line) for line in (workspace / "train.jsonl").read_text().splitlines()]
    data.write_text("".join(json.dumps(row) + "\n" for row in unpaired_rows(rows)))
    run(
        workspace,
        tmp_path / "ours",
        dataset_name=str(data),
        **UNMOVED,
        train_sampling_strategy="sequential",
        ref_model_name_or_path=str(workspace / "reference"),
        **changes,
    )
    ours = steps(tmp_path / "ours")
    assert "rewards/rejected" not in ours[0]
    assert_same_log(ours, theirs, SHARED_KTO)


def test_parameters_follow_trl_over_8_steps_and_two_soft_updates(workspace, tmp_path):
    """adam_epsilon is large: Adam amplifies differences of gradients near zero."""
    common = {
        "learning_rate": 1e-3,
        "max_steps": 8,
        "lr_scheduler_type": "constant",
        "adam_epsilon": 1e-4,
        "max_grad_norm": 1.0,
    }
    theirs = {}

    def keep(step, model):
        theirs[step] = {k: v.detach().clone() for k, v in model.named_parameters()}

    log = trl_run(
        workspace,
        tmp_path,
        keep,
        loss_type="sigmoid",
        sync_ref_model=True,
        ref_model_mixup_alpha=0.6,
        ref_model_sync_steps=3,
        **common,
    )
    run(
        workspace,
        tmp_path / "ours",
        ref_update="soft",
        ref_update_alpha=0.6,
        ref_update_every=3,
        ref_model_name_or_path=str(workspace / "reference"),
        save_strategy="steps",
        save_steps=1,
        **common,
    )
    assert_same_log(steps(tmp_path / "ours"), log, ["loss", "rewards/margins"])
    assert len(theirs) == 8
    start = weights(workspace / "model")
    for step, parameters in theirs.items():
        ours = weights(tmp_path / "ours" / f"checkpoint-{step}")
        for name, value in ours.items():
            assert (value - parameters[name]).abs().max() < 2e-6 * step + 1e-6, (step, name)
    assert max(float((theirs[8][k] - start[k]).abs().max()) for k in start) > 1e-3
