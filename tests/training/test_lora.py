"""Low-rank adapters under a reference that may move: what is trained, compared with, saved and
read."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fasttr import TrainConfig
from fasttr.data.load import DataConfig, load_trees
from fasttr.errors import FasttrError
from fasttr.evaluation.standalone import measure
from fasttr.losses import LOSSES, group_loss
from fasttr.models.given import pack_model
from fasttr.models.load import ModelConfig, load_model, load_tokenizer
from fasttr.models.lora import AdapterConfig
from fasttr.optim.adamw import OptimizerConfig
from fasttr.packing.layout import pack
from fasttr.packing.plan import Plan
from tests.runs import LOG2, lines, run, same_weights, steps, timeless
from tests.tiny import alone_logps, perturb, random_trees, tiny_model

ADAPTER = {"use_peft": True, "lora_r": 4, "lora_target_modules": "all-linear"}
# The last name is regarded as the end of a path; gate_proj is in every layer.
KINDS = {
    "plain": {"lora_target_modules": None},
    "all-linear": {},
    "one module": {"lora_target_modules": "down_proj"},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "embedding": {"lora_target_modules": ["embed_tokens", "q_proj"]},
    "modules_to_save": {"lora_target_modules": "q_proj", "lora_modules_to_save": ["lm_head"]},
    "parameters": {
        "lora_target_modules": ["q_proj"],
        "lora_target_parameters": ["gate_proj.weight"],
    },
}


def adapter_of(folder):
    return load_file(folder / "adapter_model.safetensors")


def products_of(folder) -> dict[str, np.ndarray]:
    """lora_alpha / r B A of every adapted weight of a peft folder, by the weight's name."""
    config = json.loads((folder / "adapter_config.json").read_text())
    weights = adapter_of(folder)
    found = {}
    for name, a in weights.items():
        if "lora_A" in name:
            b = weights[name.replace("lora_A", "lora_B")]
            weight = name.removeprefix("base_model.model.").replace(".lora_A", "")
            product = b.double().numpy() @ a.double().numpy()
            found[weight] = config["lora_alpha"] / config["r"] * product
    return found


def logits_of(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(40)[None] + 3, use_cache=False).logits


def assert_same_adapters(a, b):
    x, y = adapter_of(a), adapter_of(b)
    assert x.keys() == y.keys()
    assert all(torch.equal(x[name], y[name]) for name in x)


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
        args=DPOConfig(
            output_dir=str(tmp_path / "trl"),
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            per_device_train_batch_size=4,
            **common,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(workspace / "model"),
    )
    trainer.train()
    theirs = [line for line in trainer.state.log_history if "grad_norm" in line]
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
