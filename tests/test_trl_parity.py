"""The same rows, weights and reference through TRL's DPOTrainer: loss, gradient norm, metrics and parameters."""

import json

import pytest
import torch

from tests.runs import run, steps, weights

SHARED = [
    "loss", "grad_norm", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies",
    "logps/chosen", "logps/rejected", "logits/chosen", "logits/rejected", "entropy", "mean_token_accuracy",
    "num_tokens", "learning_rate",
]  # fmt: skip
# fasttr leaves the rejected side out of an sft run, so nothing that reads it is shared there.
SHARED_SFT = ["loss", "grad_norm", "logps/chosen", "logits/chosen", "mean_token_accuracy", "learning_rate"]


def trl_run(workspace, tmp_path, loss_type, after_step=None, **changes):
    """TRL's log, one dict a step, on the workspace's rows in TRL's own order."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    rows = [json.loads(line) for line in (workspace / "train.jsonl").read_text().splitlines()]
    model = AutoModelForCausalLM.from_pretrained(workspace / "model", dtype=torch.float32)
    reference = AutoModelForCausalLM.from_pretrained(workspace / "reference", dtype=torch.float32).eval()
    args = DPOConfig(
        output_dir=str(tmp_path / "trl"), loss_type=[loss_type], use_cpu=True, bf16=False, gradient_checkpointing=False,
        logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True, max_length=64, beta=0.1,
        **{"learning_rate": 0.0, "max_grad_norm": 0.0, "per_device_train_batch_size": 4, "max_steps": 6, **changes},
    )  # fmt: skip

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if after_step is not None:
                after_step(state.global_step, model)

    trainer = DPOTrainer(
        model=model, ref_model=reference, args=args, train_dataset=Dataset.from_list(rows), callbacks=[Watch()],
        processing_class=AutoTokenizer.from_pretrained(workspace / "model"),
    )  # fmt: skip
    trainer.train()
    return [line for line in trainer.state.log_history if "grad_norm" in line]


def assert_same_log(ours, theirs, keys):
    assert len(ours) == len(theirs) > 0
    for mine, other in zip(ours, theirs, strict=True):
        for key in keys:
            # Means of logits and margins lie near 0 against terms of order 1 and more.
            bound = 1e-5 * max(abs(other[key]), 1.0 if key.startswith(("logits", "rewards")) else 0.0)
            assert abs(mine[key] - other[key]) <= bound, (key, mine[key], other[key])


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "sft"])
def test_every_shared_metric_is_trls_with_a_perturbed_reference(workspace, tmp_path, loss_type):
    theirs = trl_run(workspace, tmp_path, loss_type)
    assert any(abs(line["rewards/margins"]) > 1e-3 for line in theirs)
    sft = loss_type == "sft"
    reference = {} if sft else {"ref_model_name_or_path": str(workspace / "reference")}
    run(workspace, tmp_path / "ours", loss_type=loss_type, learning_rate=0.0, max_grad_norm=0.0, **reference)
    assert_same_log(steps(tmp_path / "ours"), theirs, SHARED_SFT if sft else SHARED)


def test_parameters_follow_trl_over_8_steps_and_two_soft_updates(workspace, tmp_path):
    """adam_epsilon is large: Adam amplifies differences of gradients near zero."""
    common = {"learning_rate": 1e-3, "max_steps": 8, "lr_scheduler_type": "constant", "adam_epsilon": 1e-4,
              "max_grad_norm": 1.0}  # fmt: skip
    theirs = {}

    def keep(step, model):
        theirs[step] = {k: v.detach().clone() for k, v in model.named_parameters()}

    log = trl_run(workspace, tmp_path, "sigmoid", keep, sync_ref_model=True, ref_model_mixup_alpha=0.6,
                  ref_model_sync_steps=3, **common)  # fmt: skip
    run(workspace, tmp_path / "ours", ref_update="soft", ref_update_alpha=0.6, ref_update_every=3,
        ref_model_name_or_path=str(workspace / "reference"), save_strategy="steps", save_steps=1, **common)  # fmt: skip
    assert_same_log(steps(tmp_path / "ours"), log, ["loss", "rewards/margins"])
    assert len(theirs) == 8
    start = weights(workspace / "model")
    for step, parameters in theirs.items():
        ours = weights(tmp_path / "ours" / f"checkpoint-{step}")
        for name, value in ours.items():
            assert (value - parameters[name]).abs().max() < 2e-6 * step + 1e-6, (step, name)
    assert max(float((theirs[8][k] - start[k]).abs().max()) for k in start) > 1e-3
