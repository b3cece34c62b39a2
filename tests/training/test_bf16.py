"""Runs that compute in bf16: their steps are those of fp32 masters, their folders are bf16, and a
checkpoint gives every bit back."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from fasttr_kernels import SplitAdamW, clip_factor, multi_tensor_lerp_
from safetensors.torch import load_file, save_file

from fasttr import TrainConfig, train
from fasttr.checkpoint.folder import list_checkpoints
from fasttr.data.load import DataConfig, load_trees
from fasttr.errors import FasttrError
from fasttr.losses import LOSSES, group_loss
from fasttr.models.load import ModelConfig, load_model, load_tokenizer
from fasttr.optim.adamw import OptimizerConfig, parameter_groups
from fasttr.packing.plan import Plan
from tests.runs import lines, run, same_weights, settings, steps, timeless, weights
from tests.several import launched

BF16 = {"bf16": True, "save_strategy": "steps", "save_steps": 2}
SOFT = {"ref_update": "soft", "ref_update_every": 2, "ref_update_alpha": 0.3}


def joined(high: torch.Tensor, low: torch.Tensor) -> np.ndarray:
    """The fp32 numbers of two halves, in numpy."""
    bits = high.view(torch.int16).numpy().astype(np.int32) << 16
    return (bits + low.numpy()).view(np.float32)


def masters(folder) -> dict[str, np.ndarray]:
    """The fp32 weights of a checkpoint."""
    low = load_file(folder / "fasttr" / "remainders.safetensors")
    high = weights(folder)
    assert {x.dtype for x in high.values()} == {torch.bfloat16}
    assert high.keys() == low.keys()
    return {name: joined(x, low[name]) for name, x in high.items()}


def reference(folder) -> dict[str, np.ndarray]:
    """The fp32 weights of a checkpoint's soft reference."""
    saved = load_file(folder / "fasttr" / "reference.safetensors")
    found = {}
    for name, x in saved.items():
        if name.endswith(".remainder"):
            continue
        low = saved.get(f"{name}.remainder")
        found[name.removeprefix("model.")] = x.numpy() if low is None else joined(x, low)
    return found


def plain_run(workspace, total: int):
    """The same run with fp32 weights under autocast, a second fp32 model as its reference, and no
    halves anywhere; yields both after every step."""
    loss = LOSSES["sigmoid"]()
    tokenizer = load_tokenizer(str(workspace / "model"))
    trees = load_trees(tokenizer, DataConfig(str(workspace / "train.jsonl"), max_length=64))
    wanted = ModelConfig(str(workspace / "model"), bf16=True)
    policy, live = load_model(wanted), load_model(wanted)
    plan = Plan(trees, train_batch_size=4, max_steps=total, max_tokens_per_batch=8192)
    config = OptimizerConfig(learning_rate=3e-3)
    optimizer = SplitAdamW(parameter_groups(policy.model, 0.0), lr=3e-3)
    rates = config.scheduler(optimizer, total)
    table: dict[int, torch.Tensor] = {}
    for step in range(total):
        if step % SOFT["ref_update_every"] == 0:
            table = {
                row: live.logps(batch)[2 * i : 2 * i + 2]
                for later in range(step, min(step + 2, total))
                for batch in plan.packs(later)
                for i, row in enumerate(batch.rows)
            }
        (batch,) = plan.packs(step)
        ref_logp = torch.cat([table[row] for row in batch.rows])
        fn = group_loss(loss, batch.token_counts, batch.weights)
        policy(batch, fn, ref_logp, normalizer=len(plan.rows(step))).loss.backward()
        optimizer.step(clip=clip_factor(optimizer.grad_squares(), 1.0))
        rates.step()
        optimizer.zero_grad()
        if (step + 1) % SOFT["ref_update_every"] == 0:
            with torch.no_grad():
                multi_tensor_lerp_(
                    [p.data for p in live.parameters()],
                    [p.data for p in policy.parameters()],
                    SOFT["ref_update_alpha"],
                )
        yield policy.model.state_dict(), live.model.state_dict()


def test_masters_and_reference_equal_those_of_a_run_on_fp32_weights_bit_for_bit(
    workspace, tmp_path
):
    run(workspace, tmp_path, **BF16, **SOFT, max_tokens_per_batch=8192)
    compared = 0
    for step, (policy, live) in enumerate(plain_run(workspace, 6), start=1):
        if step % 2 == 0:
            folder = tmp_path / f"checkpoint-{step}"
            for found, want in ((masters(folder), policy), (reference(folder), live)):
                for name, x in found.items():
                    assert np.array_equal(x, want[name].numpy()), (step, name)
                compared += len(found)
    assert compared > 100
    moved = masters(tmp_path / "checkpoint-6")
    assert any(not np.array_equal(moved[name], want.numpy()) for name, want in live.items())


@pytest.fixture(scope="module")
def whole(workspace, tmp_path_factory):
    """Uninterrupted runs of 6 steps by how their numbers are held."""
    return {
        name: started(workspace, tmp_path_factory.mktemp("bf16") / name, changes)
        for name, changes in HELD.items()
    }


HELD = {
    "split": {},
    "split, bf16 moments": {"adam_moments": "bf16"},
    "split, int8 moments, hard": {"adam_moments": "int8", "ref_update": "hard"},
    "bf16 alone": {"dtype": "bfloat16", "bf16": None, "adam_moments": "bf16"},
    "fp32 compute, int8 moments": {"bf16": False, "adam_moments": "int8"},
}


def started(workspace, folder, changes):
    run(workspace, folder, **{**BF16, **SOFT, "max_tokens_per_batch": 100, **changes})
    return folder


@pytest.mark.parametrize("held", HELD)
def test_resumed_is_bitwise_the_uninterrupted_run(workspace, tmp_path, whole, held):
    folder = tmp_path / "run"
    shutil.copytree(whole[held], folder)
    for later in list_checkpoints(folder)[1:]:
        shutil.rmtree(later)
    started(workspace, folder, {**HELD[held], "resume_from_checkpoint": True})
    assert same_weights(folder, whole[held])
    a, b = folder / "checkpoint-6", whole[held] / "checkpoint-6"
    for name in ("optimizer", "remainders", "reference", "state"):
        path = f"fasttr/{name}.safetensors"
        assert (a / path).is_file() == (b / path).is_file()
        if (b / path).is_file():
            mine, theirs = load_file(a / path), load_file(b / path)
            assert mine.keys() == theirs.keys()
            assert all(torch.equal(mine[k], theirs[k]) for k in mine if k != "rng"), path
    assert list(map(timeless, lines(folder))) == list(map(timeless, lines(whole[held])))


def test_folders_are_bf16_and_load_in_transformers_as_they_are(workspace, whole):
    from transformers import AutoModelForCausalLM

    for folder in (whole["split"], whole["split"] / "checkpoint-4", whole["bf16 alone"]):
        assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        assert weights(folder).keys() == weights(workspace / "model").keys()
    saved = whole["split"] / "checkpoint-4"
    files = json.loads((saved / "fasttr" / "state.json").read_text())["files"]
    there = {str(p.relative_to(saved)) for p in saved.rglob("*") if p.is_file()}
    # The card is for people, who may write in it.
    assert files.keys() == there - {"fasttr/state.json", "README.md"}
    assert all(len(was["blake2b"]) == 32 for was in files.values())
    assert {x.dtype for x in weights(whole["fp32 compute, int8 moments"]).values()} == {
        torch.float32
    }


def test_bytes_of_a_checkpoint_are_those_of_the_table(whole):
    """Of each weight: bf16 and 2 bytes beside it, moments of 8, 4 or 2.06 bytes."""

    def bytes_of(path) -> int:
        return sum(x.numel() * x.element_size() for x in load_file(path).values())

    n = sum(x.numel() for x in weights(whole["split"]).values())
    for held, moments in (("split", 8), ("split, bf16 moments", 4)):
        saved = whole[held] / "checkpoint-6"
        assert bytes_of(saved / "model.safetensors") == 2 * n
        assert bytes_of(saved / "fasttr" / "remainders.safetensors") == 2 * n
        clocks = 24 * len(weights(saved))
        assert bytes_of(saved / "fasttr" / "optimizer.safetensors") == moments * n + clocks


def test_a_damaged_remainder_is_refused(workspace, tmp_path, whole):
    folder = tmp_path / "run"
    shutil.copytree(whole["split"], folder)
    path = folder / "checkpoint-6" / "fasttr" / "remainders.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(FasttrError, match=r"damaged: fasttr/remainders.safetensors"):
        started(workspace, folder, {"resume_from_checkpoint": True})


def as_format_1(folder) -> None:
    """Rewrite a checkpoint of format 2 as format 1 had it: fp32 weights, torch's AdamW, an fp32
    reference, no remainders."""
    inner = folder / "fasttr"
    whole, follows = masters(folder), reference(folder)
    state = json.loads((inner / "state.json").read_text())
    as_tensors = lambda arrays: {k: torch.from_numpy(x.copy()) for k, x in arrays.items()}  # noqa: E731
    save_file(as_tensors(whole), folder / "model.safetensors", metadata={"format": "pt"})
    renamed = {f"model.{name}": x for name, x in follows.items()}
    save_file(as_tensors(renamed), inner / "reference.safetensors")
    moments = load_file(inner / "optimizer.safetensors")
    for name in moments:
        if name.endswith(".step"):
            moments[name] = moments[name][0].float()
    save_file(moments, inner / "optimizer.safetensors")
    (inner / "remainders.safetensors").unlink()
    del state["config"]["adam_moments"]
    state["format"] = 1
    names = [p for p in folder.rglob("*") if p.is_file() and p.name != "state.json"]
    state["files"] = {str(p.relative_to(folder)): p.stat().st_size for p in names}
    (inner / "state.json").write_text(json.dumps(state))


def test_format_1_is_still_read(workspace, tmp_path, whole):
    folder = tmp_path / "run"
    shutil.copytree(whole["split"], folder)
    as_format_1(folder / "checkpoint-2")
    for later in list_checkpoints(folder)[1:]:
        shutil.rmtree(later)
    started(workspace, folder, {"resume_from_checkpoint": True})
    assert same_weights(folder, whole["split"])
    mine, theirs = (masters(f / "checkpoint-6") for f in (folder, whole["split"]))
    assert all(np.array_equal(mine[name], theirs[name]) for name in theirs)


def test_two_ranks_read_format_1(workspace, tmp_path, whole):
    """Divided, each takes its rows of the fp32 weights, and splits them itself."""
    shutil.copytree(whole["split"] / "checkpoint-2", tmp_path / "run" / "checkpoint-2")
    as_format_1(tmp_path / "run" / "checkpoint-2")
    common = {**BF16, **SOFT, "max_tokens_per_batch": 100, "save_strategy": "no"}
    resumed = {**common, "resume_from_checkpoint": str(tmp_path / "run" / "checkpoint-2")}
    runs = [
        settings(workspace, tmp_path / str(size), **resumed, shard_size=size) for size in (0, 1)
    ]
    ended = launched(2, runs, tmp_path / "output")
    assert [rank.status for rank in ended] == [0, 0], ended
    expected = steps(whole["split"])[2:]
    for size in ("0", "1"):
        got = steps(tmp_path / size)
        for mine, theirs in zip(got, expected, strict=True):
            for key in ("loss", "ref/distance", "learning_rate"):
                assert mine[key] == pytest.approx(theirs[key], rel=2e-2, abs=2e-2), key


def test_a_checkpoint_of_another_format_is_refused(workspace, tmp_path, whole):
    folder = tmp_path / "run"
    shutil.copytree(whole["split"], folder)
    path = folder / "checkpoint-6" / "fasttr" / "state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 3}))
    with pytest.raises(FasttrError, match="format 3, wanted 2"):
        started(workspace, folder, {"resume_from_checkpoint": True})


def test_a_given_model_comes_back_with_its_masters(workspace, tmp_path, whole):
    from transformers import AutoModelForCausalLM

    config = settings(workspace, tmp_path / "run", **BF16, **SOFT, max_tokens_per_batch=100)
    named = config.pop("model_name_or_path")
    model = AutoModelForCausalLM.from_pretrained(named, dtype=torch.float32)
    tokenizer = load_tokenizer(named)
    result = train(TrainConfig(**config), model=model, tokenizer=tokenizer)
    assert result.model is model
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    want = masters(whole["split"] / "checkpoint-6")
    for name, p in model.named_parameters():
        assert np.array_equal(p.detach().numpy(), want[name]), name
    ids = tokenizer("alpha beta", return_tensors="pt")
    assert torch.isfinite(model(**ids).logits).all()


def test_bf16_weights_alone_go_the_way_of_masters_at_a_small_rate(workspace, tmp_path):
    """Rounded to nearest they would hardly move."""
    small = {
        "learning_rate": 1e-6,
        "lr_scheduler_type": "constant",
        "max_steps": 20,
        "bf16": True,
        "save_steps": 20,
        "save_strategy": "steps",
    }
    run(workspace, tmp_path / "split", **small)
    run(workspace, tmp_path / "alone", **small, dtype="bfloat16")
    start = weights(workspace / "model")
    exact = masters(tmp_path / "split" / "checkpoint-20")
    alone = weights(tmp_path / "alone")
    names = [name for name in start if "_proj" in name]
    assert names
    bf16_start = {name: start[name].bfloat16().double() for name in names}
    way = torch.cat([(alone[n].double() - bf16_start[n]).flatten() for n in names])
    truth = torch.cat(
        [(torch.from_numpy(exact[n]).double() - start[n].double()).flatten() for n in names]
    )
    assert truth.abs().max() < 2.1e-5
    assert 0.85 <= float(way @ truth / (truth @ truth)) <= 1.15


def test_other_dtypes_are_refused_with_their_reason(workspace, tmp_path):
    with pytest.raises(FasttrError, match=r"dtype: got 'float16'.*float16 loses small gradients"):
        run(workspace, tmp_path, dtype="float16")
    with pytest.raises(FasttrError, match="dtype: got bfloat16 with bf16 false"):
        run(workspace, tmp_path, dtype="bfloat16", bf16=False)
