"""Low-rank adapters under a reference that may move: what is trained, and compared with."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fasttr.data.load import DataConfig, load_trees
from fasttr.losses import LOSSES, group_loss
from fasttr.models.given import pack_model
from fasttr.models.load import ModelConfig, load_model, load_tokenizer
from fasttr.models.lora import AdapterConfig
from fasttr.optim.adamw import OptimizerConfig
from fasttr.packing.layout import pack
from fasttr.packing.plan import Plan
from tests.runs import LOG2, lines, run, steps, timeless
from tests.tiny import alone_logps, perturb, random_trees, tiny_model
from tests.training.adapters import (
    ADAPTER,
    KINDS,
    adapter_of,
    assert_same_adapters,
    products_of,
)

# what is trained


@pytest.mark.parametrize("kind", KINDS)
def test_the_adapter_starts_at_the_base_and_all_of_it_moves(workspace, tmp_path, kind):
    """B alone has a gradient in the first step, since it starts at 0; A from the second on."""
    changes = {**ADAPTER, **KINDS[kind]}
    result = run(
        workspace,
        tmp_path,
        max_steps=2,
        lr_scheduler_type="constant",
        save_strategy="steps",
        save_steps=1,
        **changes,
    )
    first, second = steps(tmp_path)
    assert first["ref/distance"] == 0.0
    assert abs(first["loss"] / LOG2 - 1) < 1e-6
    assert second["ref/distance"] > 0
    assert first["grad_norm"] > 0.01
    before, after = (adapter_of(tmp_path / f"checkpoint-{step}") for step in (1, 2))
    trained = [name for name, p in result.model.named_parameters() if p.requires_grad]
    assert len(after) == len(trained) > 0
    assert all(not torch.equal(before[name], after[name]) for name in after)
    base = load_file(workspace / "model" / "model.safetensors")
    frozen = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): p
        for name, p in result.model.named_parameters()
        if not p.requires_grad
    }
    for name, value in base.items():
        kept = frozen.get(name, frozen.get(name.replace(".weight", ".original_module.weight")))
        assert torch.equal(kept, value), name


def test_packed_logps_of_an_adapted_model_equal_its_own_one_by_one():
    model = tiny_model("llama")
    adapter = AdapterConfig(r=4, target_modules="all-linear")
    config = ModelConfig("tiny", adapter=adapter, gradient_checkpointing=True)
    policy = pack_model(model, config)
    assert policy.adapter is not None
    perturb(policy.adapter.peft_model.base_model, 0.05)
    trees = random_trees([(5, 4, 7), (3, 6, 2), (9, 1, 1)])
    with torch.no_grad():
        packed = policy.logps(pack(trees))
        policy.model.set_attn_implementation("sdpa")
        alone = alone_logps(policy.adapter.peft_model, trees)
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-4)


def test_a_whole_run_does_not_depend_on_the_pack_size_or_on_recomputation(workspace, tmp_path):
    run(workspace, tmp_path / "wide", **ADAPTER, gradient_checkpointing=False)
    run(workspace, tmp_path / "narrow", **ADAPTER, max_tokens_per_batch=64)
    wide, narrow = adapter_of(tmp_path / "wide"), adapter_of(tmp_path / "narrow")
    for name, value in wide.items():
        assert (narrow[name] - value).abs().max() < 2e-5, name


def test_a_frozen_base_is_kept_in_bf16_where_products_are_bf16(workspace):
    """The same bits as from fp32 weights, which autocast would round in every forward."""
    from transformers import AutoModelForCausalLM

    config = ModelConfig(
        str(workspace / "model"), bf16=True, adapter=AdapterConfig(r=4, target_modules="all-linear")
    )
    halved = load_model(config)
    whole = pack_model(AutoModelForCausalLM.from_pretrained(workspace / "model"), config)
    kinds = {name: p.dtype for name, p in halved.named_parameters()}
    assert kinds["model.model.layers.0.mlp.down_proj.base_layer.weight"] == torch.bfloat16
    assert kinds["model.lm_head.weight"] == torch.bfloat16
    assert kinds["model.model.embed_tokens.weight"] == torch.float32
    assert {p.dtype for p in halved.parameters() if p.requires_grad} == {torch.float32}
    batch = pack(random_trees([(5, 4, 7), (3, 6, 2)]))
    for policy in (halved, whole):
        perturb_trained(policy)
    assert torch.equal(halved.logps(batch), whole.logps(batch))


def perturb_trained(policy) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in policy.parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn(p.shape, generator=generator))


# the reference


def test_every_logratio_is_0_right_after_a_hard_update_and_not_before(workspace, tmp_path):
    run(workspace, tmp_path, **ADAPTER, ref_update="hard", ref_update_every=2)
    distance = [line["ref/distance"] for line in steps(tmp_path)]
    assert [d == 0.0 for d in distance] == [True, False, True, False, True, False]


@pytest.mark.parametrize("rank", [None, 8])
def test_the_soft_reference_is_the_average_of_the_products(workspace, tmp_path, rank):
    """product_k = alpha (s B A)_k + (1 - alpha) product_(k-1), from the checkpoints' own adapters;
    under a rank of 8 the third move has more than fits, and says what it left out."""
    alpha, every = 0.3, 2
    run(
        workspace,
        tmp_path,
        **ADAPTER,
        ref_lora_rank=rank,
        learning_rate=1e-2,
        ref_update="soft",
        ref_update_alpha=alpha,
        ref_update_every=every,
        save_strategy="steps",
        save_steps=every,
    )
    expected = dict.fromkeys(products_of(tmp_path / "checkpoint-2"), 0.0)
    scale = 32 / 4
    moves = [line for line in lines(tmp_path) if line.get("event") == "reference_update"]
    for step, move in zip((2, 4, 6), moves, strict=True):
        folder = tmp_path / f"checkpoint-{step}"
        stored = load_file(folder / "fasttr" / "reference.safetensors")
        worst = 0.0
        for name, product in products_of(folder).items():
            expected[name] = alpha * product + (1 - alpha) * expected[name]
            prefix = f"model.{name.removesuffix('.weight')}"
            a = stored[f"{prefix}.lora_A.default.weight"].double().numpy()
            b = stored[f"{prefix}.lora_B.default.weight"].double().numpy()
            assert a.shape[0] == (rank or 24)
            error = np.linalg.norm(scale * b @ a - expected[name])
            worst = max(worst, error / np.linalg.norm(expected[name]))
            if rank is not None:
                expected[name] = scale * b @ a
        assert worst == pytest.approx(move["ref/lora_dropped"], rel=1e-3, abs=2e-6)
        assert (move["ref/lora_dropped"] > 1e-4) == (rank == 8 and step == 6)


@pytest.mark.parametrize("ref_update", ["none", "hard", "soft"])
def test_the_window_cache_equals_a_live_dense_reference(workspace, tmp_path, ref_update):
    """The same run written plainly: a second model without an adapter, whose weights are the base
    plus the average of the products."""
    every, alpha, total = 2, 0.5, 6
    run(
        workspace,
        tmp_path,
        **ADAPTER,
        ref_update=ref_update,
        ref_update_every=every,
        ref_update_alpha=alpha,
    )
    tokenizer = load_tokenizer(str(workspace / "model"))
    trees = load_trees(tokenizer, DataConfig(str(workspace / "train.jsonl"), max_length=64))
    name = str(workspace / "model")
    adapter = AdapterConfig(r=4, target_modules="all-linear")
    policy, live = load_model(ModelConfig(name, adapter=adapter)), load_model(ModelConfig(name))
    config = OptimizerConfig(learning_rate=3e-3)
    optimizer = config.optimizer(policy.model)
    rates = config.scheduler(optimizer, total)
    plan = Plan(trees, train_batch_size=4, max_steps=total, max_tokens_per_batch=1024)
    expected = []
    for step in range(total):
        loss = 0.0
        for batch in plan.packs(step):
            fn = group_loss(LOSSES["sigmoid"](), batch.token_counts, batch.weights)
            out = policy(batch, fn, live.logps(batch), normalizer=len(plan.rows(step)))
            out.loss.backward()
            loss += float(out.loss.detach())
        expected.append(loss)
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        rates.step()
        optimizer.zero_grad()
        if (step + 1) % every == 0:
            share = {"none": 0.0, "hard": 1.0, "soft": alpha}[ref_update]
            move_dense(live, policy, share)
    got = [line["loss"] for line in steps(tmp_path)]
    assert got == pytest.approx(expected, rel=1e-5)
    assert len({round(loss, 3) for loss in got}) > 3


@torch.no_grad()
def move_dense(live, policy, share: float) -> None:
    """live <- (1 - share) live + share (base + update), weight by weight."""
    modules = dict(policy.model.named_modules())
    for name, weight in live.model.named_parameters():
        module = modules[name.removesuffix(".weight")]
        if hasattr(module, "get_delta_weight"):
            weight.lerp_(module.base_layer.weight + module.get_delta_weight("default"), share)


# checkpoints


@pytest.mark.parametrize("ref_update", ["none", "soft", "hard"])
def test_resumed_is_bitwise_the_uninterrupted_run(workspace, tmp_path, ref_update):
    """From the middle of a window, with the reference's factors cut to their bound before."""
    changes = {
        **ADAPTER,
        "ref_lora_rank": 4,
        "ref_update": ref_update,
        "ref_update_every": 2,
        "max_steps": 7,
        "save_strategy": "steps",
        "save_steps": 5,
    }
    run(workspace, tmp_path / "whole", **changes)
    run(
        workspace,
        tmp_path / "resumed",
        **changes,
        resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"),
    )
    assert_same_adapters(tmp_path / "whole", tmp_path / "resumed")
    whole, resumed = steps(tmp_path / "whole"), steps(tmp_path / "resumed")
    assert [timeless(line) for line in whole[5:]] == [timeless(line) for line in resumed]
    assert not (tmp_path / "whole" / "checkpoint-5" / "model.safetensors").exists()
