"""Low-rank adapters: the folders they are saved to and read from, TRL beside them, and what is
refused."""

import json

import pytest
import torch

from fasttr import TrainConfig
from fasttr.errors import FasttrError
from fasttr.evaluation.standalone import measure
from fasttr.models.given import pack_model
from fasttr.models.load import ModelConfig, load_model
from fasttr.models.lora import AdapterConfig
from tests.runs import run, same_weights, steps
from tests.tiny import tiny_model
from tests.training.adapters import (
    ADAPTER,
    KINDS,
    adapter_of,
    assert_same_adapters,
    logits_of,
)
from tests.trl_trainers import trl_arguments, trl_log


@pytest.mark.parametrize("kind", ["all-linear", "rslora", "dora", "modules_to_save"])
def test_the_saved_adapter_loads_in_peft_in_transformers_and_here(workspace, tmp_path, kind):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    changes = {**ADAPTER, **KINDS[kind], "learning_rate": 2e-2}
    result = run(workspace, tmp_path / "adapter", **changes)
    merged = run(workspace, tmp_path / "merged", **changes, merge_adapter=True)
    expected = logits_of(result.model)
    base = AutoModelForCausalLM.from_pretrained(workspace / "model")
    assert (logits_of(base) - expected).abs().max() > 0.1
    loaded = {
        "peft": PeftModel.from_pretrained(base, tmp_path / "adapter"),
        "transformers": AutoModelForCausalLM.from_pretrained(tmp_path / "adapter"),
        "merged": AutoModelForCausalLM.from_pretrained(tmp_path / "merged"),
        "merged in memory": merged.model,
        "ours": load_model(ModelConfig(str(tmp_path / "adapter"))).model,
    }
    loaded["ours"].set_attn_implementation("sdpa")
    if kind == "dora":
        # transformers 5.23 looks for the magnitudes under another name than peft gives them.
        del loaded["transformers"]
    for reader, model in loaded.items():
        difference = float((logits_of(model) - expected).abs().max())
        assert difference < 2e-5 * float(expected.abs().max()), reader
    assert not (tmp_path / "merged" / "adapter_config.json").exists()


def test_an_adapter_on_experts_is_trained_and_loads_in_peft(workspace, tmp_path):
    """Experts are one tensor of a layer, which peft adapts as a parameter."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tiny_model("qwen3_moe", vocab_size=300).save_pretrained(tmp_path / "experts")
    AutoTokenizer.from_pretrained(workspace / "model").save_pretrained(tmp_path / "experts")
    changes = {
        **ADAPTER,
        "lora_target_modules": ["q_proj"],
        "lora_target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        "model_name_or_path": str(tmp_path / "experts"),
        "learning_rate": 2e-2,
    }
    result = run(workspace, tmp_path / "adapter", **changes)
    saved = adapter_of(tmp_path / "adapter")
    of_experts = {name: x for name, x in saved.items() if "experts" in name and "lora_B" in name}
    assert len(of_experts) == 4  # two of each layer
    assert all(x.abs().max() > 1e-3 for x in of_experts.values())
    expected = logits_of(result.model)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "experts")
    assert (logits_of(base) - expected).abs().max() > 1e-2
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter")
    difference = float((logits_of(loaded) - expected).abs().max())
    assert difference < 2e-5 * float(expected.abs().max())


def test_an_adapter_folder_is_measured_like_a_model(workspace, tmp_path):
    run(workspace, tmp_path / "adapter", **ADAPTER, learning_rate=2e-2)
    run(workspace, tmp_path / "merged", **ADAPTER, learning_rate=2e-2, merge_adapter=True)
    found = {}
    for name in ("adapter", "merged"):
        config = TrainConfig(
            model_name_or_path=str(tmp_path / name),
            dataset_name=str(workspace / "test.jsonl"),
            use_cpu=True,
            disable_tqdm=True,
        )
        found[name] = measure(config, str(workspace / "model")).metrics
    assert abs(found["adapter"]["rewards/margins"]) > 1e-2
    for metric, value in found["merged"].items():
        assert found["adapter"][metric] == pytest.approx(value, rel=1e-4, abs=1e-4), metric


def test_a_full_run_over_an_adapters_folder_leaves_a_model_alone(workspace, tmp_path):
    from transformers import AutoModelForCausalLM

    run(workspace, tmp_path / "run", **ADAPTER, max_steps=1)
    run(workspace, tmp_path / "run", max_steps=1, overwrite_output_dir=True)
    run(workspace, tmp_path / "alone", max_steps=1)
    assert same_weights(tmp_path / "run", tmp_path / "alone")
    loaded = logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "run"))
    alone = logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "alone"))
    assert torch.equal(loaded, alone)


def test_the_final_model_is_the_best_of_the_adapters(workspace, tmp_path):
    changes = {
        **ADAPTER,
        "learning_rate": 0.05,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "eval_dataset_name": str(workspace / "test.jsonl"),
        "save_strategy": "best",
        "load_best_model_at_end": True,
        "metric_for_best_model": "rewards/margins",
        "greater_is_better": False,
    }
    run(workspace, tmp_path / "adapter", **changes)
    run(workspace, tmp_path / "merged", **changes, merge_adapter=True)
    best = sorted((tmp_path / "adapter").glob("checkpoint-*"))[-1]
    assert best.name != "checkpoint-6"
    assert_same_adapters(tmp_path / "adapter", best)
    folders = (tmp_path / "adapter", tmp_path / "merged")
    adapter, merged = (load_model(ModelConfig(str(folder))).model for folder in folders)
    for name, value in adapter.state_dict().items():
        torch.testing.assert_close(merged.state_dict()[name], value, rtol=1e-6, atol=1e-6)


# TRL


def test_loss_and_gradient_norm_are_those_of_trl_with_the_adapter_off_as_reference(
    workspace, tmp_path
):
    """TRL draws A after its own seeding; both draws are put at the same place here."""
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    common = {
        "learning_rate": 1e-2,
        "max_steps": 6,
        "lr_scheduler_type": "constant",
        "adam_epsilon": 1e-4,
        "max_grad_norm": 1.0,
        "max_length": 64,
    }
    model = AutoModelForCausalLM.from_pretrained(workspace / "model", dtype=torch.float32)
    torch.manual_seed(42)
    targets = ["q_proj", "v_proj", "up_proj"]
    lora = LoraConfig(
        r=4, lora_alpha=32, lora_dropout=0.05, target_modules=targets, task_type="CAUSAL_LM"
    )
    rows = [json.loads(line) for line in (workspace / "train.jsonl").read_text().splitlines()]
    trainer = DPOTrainer(
        model=get_peft_model(model, lora),
        args=trl_arguments(DPOConfig, tmp_path / "trl", per_device_train_batch_size=4, **common),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(workspace / "model"),
    )
    theirs = trl_log(trainer)
    run(
        workspace,
        tmp_path / "ours",
        use_peft=True,
        lora_r=4,
        lora_target_modules=targets,
        **common,
    )
    ours = steps(tmp_path / "ours")
    assert len(ours) == len(theirs) == 6
    assert theirs[-1]["rewards/margins"] > 0.1
    for mine, other in zip(ours, theirs, strict=True):
        for key in ("loss", "grad_norm", "rewards/chosen", "rewards/margins", "logps/chosen"):
            bound = 2e-5 * max(abs(other[key]), 1.0 if "rewards" in key else 0.0)
            assert abs(mine[key] - other[key]) <= bound, (mine["step"], key)


# what is refused


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"lora_target_modules": ["lm_head"]}, "lora_target_modules: got the head"),
        ({"lora_target_modules": ["no_such"]}, "lora_target_modules: peft cannot adapt"),
        ({"ref_update": "soft", "use_dora": True}, "use_dora: got true with ref_update soft"),
        (
            {"ref_update": "soft", "lora_target_parameters": ["gate_proj.weight"]},
            "lora_target_parameters: got",
        ),
        (
            {"ref_update": "soft", "ref_model_name_or_path": "somewhere"},
            "ref_model_name_or_path: got somewhere with use_peft",
        ),
        ({"ref_update": "soft", "ref_lora_rank": 3}, "ref_lora_rank: got 3; wanted lora_r 4"),
        ({"use_peft": False, "merge_adapter": True}, "merge_adapter: got true without an adapter"),
    ],
)
def test_what_cannot_be_trained_is_refused_in_one_line(workspace, tmp_path, changes, expected):
    with pytest.raises(FasttrError) as stopped:
        run(workspace, tmp_path, **{**ADAPTER, **changes})
    assert str(stopped.value).startswith(expected)
    assert "\n" not in str(stopped.value)


@pytest.mark.parametrize(
    "adapter",
    [
        AdapterConfig(modules_to_save=["embed_tokens"]),
        AdapterConfig(modules_to_save=["lm_head"]),
        AdapterConfig(target_modules=["embed_tokens", "q_proj"]),
    ],
)
def test_one_weight_as_embedding_and_head_is_not_taken_apart(adapter):
    with pytest.raises(FasttrError, match="where they are one weight"):
        pack_model(tiny_model("qwen3"), ModelConfig("tiny", adapter=adapter))


def test_an_adapter_on_an_adapter_is_refused(workspace, tmp_path):
    result = run(workspace, tmp_path / "first", **ADAPTER, max_steps=1)
    with pytest.raises(FasttrError, match="is an adapter itself"):
        run(
            workspace,
            tmp_path / "second",
            **ADAPTER,
            model_name_or_path=str(tmp_path / "first"),
        )
    config = ModelConfig("tiny", adapter=AdapterConfig())
    with pytest.raises(FasttrError, match="carries an adapter already"):
        pack_model(result.model.get_base_model(), config)
