"""TRL's own trainers with our ops in them: every number that they log, the rows that the head sees,
and the memory that it takes."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from importlib import metadata
from types import MappingProxyType

import pytest
import torch

import fasttr.integrations.trl as patch_of_trl
from fasttr.errors import FasttrError
from fasttr.integrations.trl import patch, patched, unpatch
from tests.kernels.test_package import peak_bytes
from tests.runs import read_rows
from tests.tiny import perturb, tiny_model

pytest.importorskip("trl")

OF_THE_CLOCK = ("runtime", "per_second", "total_flos", "epoch")
USUAL = MappingProxyType(
    {
        "use_cpu": True,
        "bf16": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "max_length": 48,
        "max_steps": 5,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-3,
        # Adam turns the rounding of gradients near zero into steps of full size.
        "adam_epsilon": 1e-4,
        "lr_scheduler_type": "constant",
    }
)


def unpaired(rows):
    sides = ("chosen", "rejected")
    return [
        {"prompt": row["prompt"], "completion": row[sides[i % 2]], "label": i % 2 == 0}
        for i, row in enumerate(rows)
    ]


def log_of(workspace, folder, model=None, **changes):
    """What TRL logs of a short run: DPOTrainer, or KTOTrainer where the loss is kto."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

    is_kto = changes.get("loss_type") == "kto"
    lora = changes.pop("lora", None)
    rows = read_rows(workspace / "train.jsonl")
    policy = AutoModelForCausalLM.from_pretrained(workspace / "model", dtype=torch.float32)
    reference = AutoModelForCausalLM.from_pretrained(workspace / "reference", dtype=torch.float32)
    if model is not None:
        policy, reference = model(seed=0), model(seed=0)
        perturb(reference, 0.05)
    data = Dataset.from_list(unpaired(rows) if is_kto else rows)
    torch.manual_seed(0)  # an adapter's first weights
    trainer = (KTOTrainer if is_kto else DPOTrainer)(
        model=policy,
        ref_model=None if lora else reference.eval(),
        args=(KTOConfig if is_kto else DPOConfig)(output_dir=str(folder), **{**USUAL, **changes}),
        train_dataset=data,
        eval_dataset=data.select(range(8)),
        processing_class=AutoTokenizer.from_pretrained(workspace / "model"),
        peft_config=lora,
    )
    trainer.train()
    trainer.evaluate()
    kept = []
    for line in trainer.state.log_history:
        kept.append({k: v for k, v in line.items() if not any(w in k for w in OF_THE_CLOCK)})
    return kept, trainer


def lora():
    from peft import LoraConfig

    return LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])


def gemma(seed):
    """Soft-capped logits and a tied head."""
    model = tiny_model("gemma2", seed=seed, vocab_size=300, final_logit_softcapping=3.0)
    perturb(model, 0.2, seed=5)
    return model


def granite(seed):
    """Divided logits."""
    model = tiny_model("granite", seed=seed, vocab_size=300, logits_scaling=2.0)
    perturb(model, 0.2, seed=5)
    return model


CASES = {
    "dpo, the reference moves": {
        "sync_ref_model": True,
        "ref_model_sync_steps": 2,
        "ref_model_mixup_alpha": 0.6,
    },
    "dpo, every output of the head": {"use_weighting": True, "loss_type": "ipo"},
    "dpo, lora": {"lora": lora},
    "kto": {"loss_type": "kto", "beta": 0.5, "sync_ref_model": True, "ref_model_sync_steps": 3},
    "kto, lora": {"loss_type": "kto", "beta": 0.5, "lora": lora},
    "soft-capped": {"model": gemma, "max_steps": 2},
    "scaled": {"model": granite, "max_steps": 2},
}


@pytest.mark.parametrize("case", CASES)
def test_an_unchanged_run_logs_the_same_numbers(workspace, tmp_path, monkeypatch, case):
    changes = dict(CASES[case])
    found = {}
    moves = []
    calls = []
    op, move = patch_of_trl.linear_logprob, patch_of_trl.multi_tensor_lerp_
    monkeypatch.setattr(
        patch_of_trl, "linear_logprob", lambda *a, **k: calls.append(name) or op(*a, **k)
    )
    monkeypatch.setattr(
        patch_of_trl, "multi_tensor_lerp_", lambda *a, **k: moves.append(a[2]) or move(*a, **k)
    )
    for name, way in (("trl", nullcontext()), ("ours", patched())):
        made = {**changes, "lora": changes["lora"]()} if "lora" in changes else changes
        with way:
            found[name], _ = log_of(workspace, tmp_path / name, **made)
    syncs = changes.get("max_steps", 5) // changes.get("ref_model_sync_steps", 9)
    assert moves == [0.6] * syncs
    assert set(calls) == {"ours"}
    assert len(found["ours"]) == len(found["trl"]) >= 4
    assert any(abs(line.get("rewards/margins", 0)) > 1e-3 for line in found["trl"])
    for ours, theirs in zip(found["ours"], found["trl"], strict=True):
        assert ours.keys() == theirs.keys()
        for key, want in theirs.items():
            # Rewards, their margins and mean logits lie near 0 against terms of order 1 and more.
            floor = 1.0 if any(w in key for w in ("rewards", "logits/", "kl")) else 0.0
            assert abs(ours[key] - want) <= 1e-5 * max(abs(want), floor), (key, ours[key], want)
    assert {"loss", "grad_norm", "entropy"} <= found["ours"][0].keys()
    assert "eval_loss" in found["ours"][-1]


def test_the_head_takes_the_rows_and_the_memory_of_completions(monkeypatch):
    """Forward and backward of 12 sequences of 64 tokens, 8 of each a completion's."""
    from trl.trainer import dpo_trainer

    vocabulary, tokens = 6000, (12, 64)
    ids = torch.randint(vocabulary, tokens)
    labels = ids.masked_fill(torch.arange(64) < 56, -100)
    found = {}
    seen = []
    op = patch_of_trl.linear_logprob
    monkeypatch.setattr(
        patch_of_trl, "linear_logprob", lambda *a, **k: seen.append(len(a[0])) or op(*a, **k)
    )
    for name, way in (("trl", nullcontext()), ("ours", patched())):
        model = tiny_model("llama", seed=0, vocab_size=vocabulary)
        with way:
            dpo_trainer.add_fused_lm_head(model, outputs=("log_probs", "entropy"))

        def step(model=model):
            model.zero_grad()
            model(input_ids=ids, labels=labels, fused_lm_head=True).log_probs.sum().backward()

        found[name] = peak_bytes(step)
    rows = 12 * 8
    assert set(seen) == {rows}
    assert found["trl"] > 12 * 63 * vocabulary * 4, "one tile of every position"
    assert found["ours"] < found["trl"] - 12 * 63 * vocabulary * 4 + 3 * rows * vocabulary * 4


def test_patching_is_undone_and_done_once():
    from trl.trainer import callbacks, dpo_trainer, kto_trainer

    names = [
        (dpo_trainer, "add_fused_lm_head"),
        (kto_trainer, "add_fused_lm_head"),
        (callbacks.SyncRefModelCallback, "_sync_target_model"),
    ]
    before = [vars(owner)[name] for owner, name in names]
    patch()
    once = [vars(owner)[name] for owner, name in names]
    patch()
    assert [vars(owner)[name] for owner, name in names] == once
    assert not any(a is b for a, b in zip(once, before, strict=True))
    unpatch()
    assert [vars(owner)[name] for owner, name in names] == before


@pytest.mark.parametrize(
    ("version", "says"),
    [
        ("1.17.0", "trl: got version 1.17.0; wanted 1.16"),
        ("0.29.1", "got version 0.29.1"),
        (None, "trl is not installed"),
    ],
)
def test_another_trl_is_refused_by_name(monkeypatch, version, says):
    def found(name):
        if version is None:
            raise metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(patch_of_trl.importlib.metadata, "version", found)
    with pytest.raises(FasttrError, match=says):
        patch()
    from trl.trainer import dpo_trainer

    assert dpo_trainer.add_fused_lm_head.__module__ == "trl.trainer.utils"


def test_zero_3_is_refused_by_name():
    from trl.trainer import dpo_trainer

    model = tiny_model("llama", seed=0)
    with patched():
        dpo_trainer.add_fused_lm_head(model)
    model.lm_head.weight.ds_id = 7
    ids = torch.ones(1, 4, dtype=torch.long)
    with pytest.raises(FasttrError, match="ZeRO-3"):
        model(input_ids=ids, labels=ids, fused_lm_head=True)


def test_a_head_in_another_dtype_than_the_model_is_read_as_trl_reads_it():
    """As models that were prepared for adapters have it: a float32 head on bfloat16 layers."""
    from trl.trainer import dpo_trainer

    ids = torch.arange(3, 15).view(2, 6)
    found = {}
    for name, way in (("trl", nullcontext()), ("ours", patched())):
        model = tiny_model("llama", seed=0).bfloat16()
        model.lm_head.float()
        with way:
            dpo_trainer.add_fused_lm_head(model)
        logps = model(input_ids=ids, labels=ids, fused_lm_head=True).log_probs
        logps.sum().backward()
        found[name] = (logps.detach(), model.lm_head.weight.grad)
        assert model.lm_head.weight.grad.dtype == torch.float32
    for ours, theirs in zip(found["ours"], found["trl"], strict=True):
        # Theirs come from logits that were rounded to bfloat16.
        assert (ours - theirs).abs().max() < 0.02 * theirs.abs().max()


def test_generation_and_its_arguments_are_untouched():
    from trl.trainer import dpo_trainer

    ids = torch.arange(3, 8)[None]
    want = tiny_model("llama", seed=0).generate(ids, max_new_tokens=4, do_sample=False)
    model = tiny_model("llama", seed=0)
    with patched():
        dpo_trainer.add_fused_lm_head(model)
    assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), want)
    with pytest.raises(ValueError, match="not_an_argument"):
        model.generate(ids, max_new_tokens=1, not_an_argument=1)


def test_a_script_runs_patched_and_sees_its_own_line(tmp_path, monkeypatch, capsys):
    script = tmp_path / "train.py"
    (tmp_path / "beside.py").write_text("here = 'beside'\n")
    script.write_text(
        "import json, sys\n"
        "from beside import here\n"
        "from trl.trainer import dpo_trainer\n"
        "print(json.dumps([__name__, here, sys.argv[1:], "
        "type(dpo_trainer.add_fused_lm_head).__name__]))\n"
    )
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setattr(sys, "path", list(sys.path))
    try:
        patch_of_trl.main([str(script), "--learning_rate", "5e-7"])
    finally:
        unpatch()
    said = json.loads(capsys.readouterr().out)
    assert said == ["__main__", "beside", ["--learning_rate", "5e-7"], "partial"]
