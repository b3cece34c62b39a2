"""A reference that moves in any transformers Trainer."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fasttr.errors import FasttrError
from fasttr.integrations.callback import MoveReference
from tests.tiny import perturb, tiny_model


def after(steps, callback, policies):
    """Run the callback's hooks over steps; `policies(step)` is the policy after each."""
    callback.on_train_begin(None, None, None, model=policies(0))
    for step in range(1, steps + 1):
        state = SimpleNamespace(global_step=step)
        callback.on_step_end(None, state, None, model=policies(step))


def module(value: float, dtype=torch.float32) -> nn.Module:
    made = nn.Linear(3, 4, dtype=dtype)
    with torch.no_grad():
        for p in made.parameters():
            p.fill_(value)
    return made


def test_the_reference_follows_the_closed_form():
    """Policies 1, 2, 3, ... : after moves at 2 and 4, 0.4 (0.6 * 2) + 0.6 * 4."""
    reference = module(0.0)
    callback = MoveReference(reference, alpha=0.6, every=2)
    after(5, callback, lambda step: module(float(step)))
    assert callback.moves == 2
    for p in reference.parameters():
        torch.testing.assert_close(p, torch.full_like(p, 0.4 * 0.6 * 2 + 0.6 * 4))


def test_a_hard_move_copies_bit_for_bit_through_wrappers():
    policy = tiny_model("llama", seed=1)
    reference = tiny_model("llama", seed=0)
    wrapper = nn.Module()
    wrapper.module = policy
    after(1, MoveReference(reference, alpha=1.0, every=1), lambda step: wrapper)
    for a, b in zip(reference.parameters(), policy.parameters(), strict=True):
        assert torch.equal(a, b)


def test_remainders_let_a_bf16_reference_take_small_steps():
    """Forty moves of 1 % towards a policy 0.1 % away: less than half a bf16 spacing each."""
    policy = module(1.001)
    plain, kept = (module(1.0, torch.bfloat16) for _ in range(2))
    after(40, MoveReference(plain, alpha=0.01, every=1), lambda step: policy)
    callback = MoveReference(kept, alpha=0.01, every=1, remainders=True)
    after(40, callback, lambda step: policy)
    assert (plain.weight == 1).all()
    low = callback.remainders["weight"]
    joined = (kept.weight.view(torch.int16).int() << 16) + low.int()
    got = joined.view(torch.float32)
    torch.testing.assert_close(got, torch.full_like(got, 1.001 - 0.001 * 0.99**40))


def test_it_takes_the_place_of_trls_own_sync(workspace, tmp_path):
    """Four steps of TRL's trainer: with its sync, and with this callback instead."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    from tests.runs import read_rows

    references = []
    for sync in (True, False):
        reference = AutoModelForCausalLM.from_pretrained(workspace / "reference").float().eval()
        trainer = DPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(workspace / "model").float(),
            ref_model=reference,
            args=DPOConfig(
                output_dir=str(tmp_path / str(sync)),
                use_cpu=True,
                bf16=False,
                learning_rate=1e-3,
                max_steps=4,
                per_device_train_batch_size=2,
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
                sync_ref_model=sync,
                ref_model_sync_steps=2,
                ref_model_mixup_alpha=0.3,
            ),
            train_dataset=Dataset.from_list(read_rows(workspace / "train.jsonl")),
            processing_class=AutoTokenizer.from_pretrained(workspace / "model"),
        )
        if not sync:
            trainer.add_callback(MoveReference(trainer.ref_model, alpha=0.3, every=2))
        trainer.train()
        references.append(reference)
    start = AutoModelForCausalLM.from_pretrained(workspace / "reference").float()
    theirs, ours = (dict(model.named_parameters()) for model in references)
    moved = 0.0
    for name, p in start.named_parameters():
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-6, atol=1e-7)
        moved = max(moved, float((theirs[name] - p).detach().abs().max()))
    assert moved > 1e-3


def test_what_cannot_move_is_refused_by_name():
    for settings, says in (
        ({"alpha": 0.0}, "alpha: got 0.0"),
        ({"alpha": 1.5}, "alpha: got 1.5"),
        ({"every": 0}, "every: got 0"),
    ):
        with pytest.raises(FasttrError, match=says):
            MoveReference(module(0.0), **settings)
    callback = MoveReference(nn.Linear(3, 4, bias=False), every=1)
    with pytest.raises(FasttrError, match=r"for weight, \(4, 3\), the policy has shape \(5, 3\)"):
        callback.on_train_begin(None, None, None, model=nn.Linear(3, 5))


def test_a_policy_with_adapters_is_refused_before_the_first_step():
    from peft import LoraConfig, get_peft_model

    reference = tiny_model("llama", seed=0)
    policy = tiny_model("llama", seed=0)
    perturb(policy, 0.1)
    wrapped = get_peft_model(policy, LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(FasttrError, match=r"the policy has nothing; .*merge them"):
        MoveReference(reference).on_train_begin(None, None, None, model=wrapped)
