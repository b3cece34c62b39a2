"""What a run must be: constants at step 0, independence of packing, a reference that is where it
should be."""

import json
import math

import numpy as np
import pytest
import torch

from fasttr.data.load import DataConfig, load_trees
from fasttr.data.unpaired import Unpaired
from fasttr.losses import LOSSES, group_loss
from fasttr.models.load import ModelConfig, load_model, load_tokenizer
from fasttr.optim.adamw import OptimizerConfig
from fasttr.packing.plan import Plan, pack_rows
from tests.runs import LOG2, evaluations, lines, run, same_weights, steps, weights
from tests.tiny import gradients, packed_tiny

# The loss at policy = reference, beta 0.1, label smoothing 0 (0.1 for exo_pair).
CONSTANT = {
    "sigmoid": LOG2,
    "sigmoid_norm": LOG2,
    "hinge": 1.0,
    "ipo": 25.0,
    "ipo_sum": 25.0,
    "cdpo": LOG2,
    "robust": LOG2,
    "exo_pair": -LOG2 - 0.5 * math.log(0.9) - 0.5 * math.log(0.1),
    "nca_pair": 2 * LOG2,
    "bco_pair": 2 * LOG2,
    "sppo_hard": 50.0,
    "aot": LOG2,
    "aot_unpaired": LOG2,
    "apo_zero": 1.0,
    "apo_down": 1.0,
    "discopop": 0.5 * LOG2 + 0.5,
    "kto_paired": 0.5,
    "kto": 0.5,
    "apo_zero_unpaired": 0.5,
}
SMOOTHED = {"exo_pair": {"label_smoothing": 0.1}}


def test_every_loss_with_a_reference_has_its_constant():
    assert CONSTANT.keys() == {name for name, loss in LOSSES.items() if loss.needs_reference}


# gate 1


@pytest.mark.parametrize("ref_update", ["none", "soft", "hard"])
@pytest.mark.parametrize("loss_type", CONSTANT)
def test_step_0_is_the_constant_of_the_loss_and_every_logratio_is_0(
    workspace, tmp_path, loss_type, ref_update
):
    run(
        workspace,
        tmp_path,
        loss_type=loss_type,
        ref_update=ref_update,
        ref_update_every=2,
        max_steps=1,
        **SMOOTHED.get(loss_type, {}),
    )
    first = steps(tmp_path)[0]
    assert first["ref/distance"] == 0.0
    assert first.get("rewards/margins", 0.0) == 0.0
    assert first.get("rewards/accuracies", 0.0) == 0.0  # strict, as TRL's
    assert first.get("kl", 0.0) == 0.0
    assert abs(first["loss"] / CONSTANT[loss_type] - 1) < 1e-6
    assert first["grad_norm"] > 0.01


def test_every_logratio_is_0_right_after_a_hard_update_and_not_before(workspace, tmp_path):
    run(workspace, tmp_path, ref_update="hard", ref_update_every=2)
    distance = [line["ref/distance"] for line in steps(tmp_path)]
    assert [d == 0.0 for d in distance] == [True, False, True, False, True, False]


def test_weights_multiply_the_loss_and_the_row_count_divides_it(workspace, tmp_path):
    data = workspace / "weighted.jsonl"
    given = [json.loads(line)["weight"] for line in data.read_text().splitlines()]
    assert len(set(given)) > 1
    run(
        workspace,
        tmp_path,
        dataset_name=str(data),
        weight_column="weight",
        train_batch_size=8,
        max_steps=1,
    )
    assert abs(steps(tmp_path)[0]["loss"] / (np.mean(given) * LOG2) - 1) < 1e-6


# gate 4


@pytest.mark.parametrize("loss_type", LOSSES)
def test_pack_size_and_order_do_not_change_the_gradient(workspace, loss_type):
    loss = LOSSES[loss_type](beta=0.3)
    tokenizer = load_tokenizer(str(workspace / "model"))
    sides = 1 if loss_type == "sft" else 2
    trees = load_trees(tokenizer, DataConfig(str(workspace / "train.jsonl"), sides=sides))
    if loss.unpaired:
        trees = Unpaired(
            trees, labels=None, block=4 if loss.completions == 2 else None, max_length=1024
        )
    group = 4 if loss.coupled else 1
    model = load_model(ModelConfig(str(workspace / "model")))
    rows = np.arange(20, 28)  # both labels, when the pairs are taken apart
    noise = torch.randn(48, loss.completions, generator=torch.Generator().manual_seed(0))
    rows = rows if loss.unpaired else rows - 20
    reversed_groups = np.concatenate([rows[4:], rows[:4]]) if group == 4 else rows[::-1]
    found, packs_of = [], []
    for budget, order in ((10_000, rows), (10_000, reversed_groups), (60, rows), (1, rows)):
        model.zero_grad()
        total = 0.0
        packs = pack_rows(trees, order, budget, group)
        for batch in packs:
            ref = model.logps(batch) + noise[list(batch.rows)].flatten()
            fn = group_loss(
                loss,
                batch.token_counts,
                batch.weights,
                cu_rows=list(batch.cu_rows),
                labels=batch.labels,
                chosen_tokens_mean=3.0,
            )
            out = model(batch, fn, ref if loss.needs_reference else None, normalizer=len(rows))
            out.loss.backward()
            total += float(out.loss.detach())
        found.append((total, gradients(model)))
        packs_of.append(len(packs))
    assert packs_of[0] == 1
    assert packs_of[2] > 1
    assert packs_of[3] == len(rows) // group
    want_loss, want = found[0]
    for got_loss, got in found[1:]:
        assert abs(got_loss - want_loss) < 1e-5 * max(1, abs(want_loss))
        for name, gradient in want.items():
            assert (got[name] - gradient).abs().max() <= 1e-5 * gradient.abs().max() + 1e-7, name


def test_a_whole_run_does_not_depend_on_the_pack_size(workspace, tmp_path):
    for name, budget in (("wide", 8192), ("narrow", 64)):
        run(
            workspace,
            tmp_path / name,
            max_tokens_per_batch=budget,
            ref_update="soft",
            ref_update_every=2,
            adam_epsilon=1e-4,
        )
    wide, narrow = weights(tmp_path / "wide"), weights(tmp_path / "narrow")
    assert max(float((wide[k] - narrow[k]).abs().max()) for k in wide) < 2e-5
    assert not same_weights(tmp_path / "wide", workspace / "model")


# gate 7


def test_the_soft_reference_is_its_closed_form(workspace, tmp_path):
    """reference_k = alpha policy_k + (1 - alpha) reference_(k-1), from the checkpoints' own
    policies."""
    alpha, every = 0.3, 2
    run(
        workspace,
        tmp_path,
        ref_update="soft",
        ref_update_alpha=alpha,
        ref_update_every=every,
        save_strategy="steps",
        save_steps=1,
    )
    from safetensors.torch import load_file

    expected = {k: v.double() for k, v in weights(workspace / "model").items()}
    moved = 0
    for step in range(1, 7):
        folder = tmp_path / f"checkpoint-{step}"
        if step % every == 0:
            policy = weights(folder)
            expected = {
                k: alpha * policy[k].double() + (1 - alpha) * v for k, v in expected.items()
            }
            moved += 1
        stored = load_file(folder / "fasttr" / "reference.safetensors")
        got = {name.removeprefix("model."): value for name, value in stored.items()}
        assert got.keys() == expected.keys()
        for name, value in expected.items():
            assert (got[name] - value).abs().max() < 1e-6, (step, name)
    assert moved == 3
    assert [
        line["step"] for line in lines(tmp_path) if line.get("event") == "reference_update"
    ] == [2, 4, 6]


def test_soft_with_alpha_1_is_hard(workspace, tmp_path):
    run(workspace, tmp_path / "soft", ref_update="soft", ref_update_alpha=1.0, ref_update_every=2)
    run(workspace, tmp_path / "hard", ref_update="hard", ref_update_every=2)
    assert same_weights(tmp_path / "soft", tmp_path / "hard")


def test_alpha_0_is_no_update_and_other_schedules_differ(workspace, tmp_path):
    run(workspace, tmp_path / "none")
    run(workspace, tmp_path / "zero", ref_update="soft", ref_update_alpha=0.0, ref_update_every=2)
    run(workspace, tmp_path / "hard", ref_update="hard", ref_update_every=2)
    assert same_weights(tmp_path / "none", tmp_path / "zero")
    assert not same_weights(tmp_path / "none", tmp_path / "hard")


def test_another_first_reference_scores_window_0_alone_under_hard_updates(workspace, tmp_path):
    run(
        workspace,
        tmp_path,
        ref_update="hard",
        ref_update_every=2,
        ref_model_name_or_path=str(workspace / "reference"),
    )
    distance = [line["ref/distance"] for line in steps(tmp_path)]
    assert distance[0] > 0.01
    assert distance[2] == 0.0


# gate 8


@pytest.mark.parametrize("ref_update", ["none", "hard", "soft"])
def test_the_window_cache_equals_a_live_second_model(workspace, tmp_path, ref_update):
    """The same run written plainly: a second model in memory that scores every pack at the moment
    it is trained on."""
    every, alpha, total = 2, 0.5, 6
    run(workspace, tmp_path, ref_update=ref_update, ref_update_every=every, ref_update_alpha=alpha)

    loss = LOSSES["sigmoid"]()
    tokenizer = load_tokenizer(str(workspace / "model"))
    trees = load_trees(tokenizer, DataConfig(str(workspace / "train.jsonl"), max_length=64))
    policy, live = (load_model(ModelConfig(str(workspace / "model"))) for _ in range(2))
    plan = Plan(trees, train_batch_size=4, max_steps=total, max_tokens_per_batch=8192)
    config = OptimizerConfig(learning_rate=3e-3)
    optimizer = config.optimizer(policy.model)
    rates = config.scheduler(optimizer, total)
    for step in range(total):
        for batch in plan.packs(step):
            fn = group_loss(loss, batch.token_counts, batch.weights)
            policy(batch, fn, live.logps(batch), normalizer=len(plan.rows(step))).loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        rates.step()
        optimizer.zero_grad()
        if (step + 1) % every == 0:
            share = {"none": 0.0, "hard": 1.0, "soft": alpha}[ref_update]
            with torch.no_grad():
                for mine, theirs in zip(live.parameters(), policy.parameters(), strict=True):
                    mine.lerp_(theirs, share)
    got = weights(tmp_path)
    for name, value in policy.model.state_dict().items():
        if name in got:
            # Hard and none are the same numbers bit for bit; a soft move rounds once more or less.
            bound = 2e-5 if ref_update == "soft" else 0.0
            assert (got[name] - value).abs().max() <= bound, name


# evaluation


@pytest.mark.parametrize("ref_update", ["none", "soft", "hard"])
def test_evaluation_comes_before_the_move_and_is_anchored_at_the_initial_policy(
    workspace, tmp_path, ref_update
):
    run(
        workspace,
        tmp_path,
        ref_update=ref_update,
        ref_update_every=2,
        eval_strategy="steps",
        eval_steps=2,
        eval_on_start=True,
        eval_dataset_name=str(workspace / "test.jsonl"),
    )
    found = evaluations(tmp_path)
    assert [line["step"] for line in found] == [0, 2, 4, 6]
    assert found[0]["eval_rewards/margins"] == found[0]["eval_anchor/rewards/margins"] == 0.0
    assert all(
        line["eval_ref/distance"] > 0 for line in found[1:]
    )  # after a hard move it would be 0
    same = [abs(a["eval_rewards/margins"] - a["eval_anchor/rewards/margins"]) < 1e-6 for a in found]
    assert same == ([True] * 4 if ref_update == "none" else [True, True, False, False])


def test_sft_reads_the_chosen_side_alone_and_lowers_its_loss(workspace, tmp_path):
    run(
        workspace,
        tmp_path,
        loss_type="sft",
        max_steps=20,
        eval_strategy="steps",
        eval_steps=10,
        eval_on_start=True,
        eval_dataset_name=str(workspace / "test.jsonl"),
    )
    first, *_, last = evaluations(tmp_path)
    assert last["eval_loss"] < first["eval_loss"] - 0.5
    assert "rewards/margins" not in steps(tmp_path)[0]
    assert "logps/rejected" not in steps(tmp_path)[0]


def test_tied_head_and_embedding_train_as_one(tmp_path):
    model = packed_tiny("qwen3").model
    assert model.lm_head.weight is model.model.embed_tokens.weight
    groups = OptimizerConfig(weight_decay=0.1).optimizer(model).param_groups
    assert sum(p.numel() for g in groups for p in g["params"]) == sum(
        p.numel() for p in model.parameters()
    )
