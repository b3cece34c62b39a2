"""What a run must be: constants at step 0, independence of packing, a reference that is where it
should be."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import pytest
import torch

from fasttr.batch import TreeSource
from fasttr.data.in_memory import ListTrees
from fasttr.data.load import DataConfig, load_trees
from fasttr.data.unpaired import Unpaired
from fasttr.losses import LOSSES, Loss, Objective, Sigmoid
from fasttr.metrics.sums import as_metrics, by_name, means, over_micro_batches, pack_sums, zeros
from fasttr.models.load import ModelConfig, load_model, load_tokenizer
from fasttr.models.packed import PackedModel
from fasttr.optim.adamw import OptimizerConfig
from fasttr.packing.plan import Plan, pack_rows
from fasttr.reference.moving import MovingReference
from fasttr.reference.schedule import Fixed, Hard, Soft
from tests.runs import LOG2, evaluations, lines, read_rows, run, same_weights, steps, weights
from tests.tiny import gradients, packed_tiny, random_trees

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
SCHEDULES = {"none": Fixed(), "soft": Soft(0.6, 2), "hard": Hard(2)}
# Prompts of 0 to 11 tokens; completions of 1 to 9, in every row another length.
SHAPES = [(3, 4, 2), (0, 5, 1), (6, 1, 3), (2, 2, 9), (11, 3, 4), (1, 7, 2), (4, 6, 1), (2, 1, 8)]


def trees_for(loss: Loss, shapes: list[tuple[int, ...]] = SHAPES, block: int = 4) -> TreeSource:
    """Random rows in the shape of the loss: pairs, chosen sides, or pairs taken apart."""
    trees = random_trees(shapes)
    if not loss.unpaired:
        kept = [tree._replace(completions=tree.completions[: loss.completions]) for tree in trees]
        return ListTrees(kept)
    rotates = loss.completions == 2
    return Unpaired(
        ListTrees(trees), labels=None, block=block if rotates else None, max_length=None
    )


def test_every_loss_with_a_reference_has_its_constant():
    assert CONSTANT.keys() == {name for name, loss in LOSSES.items() if loss.needs_reference}


@pytest.mark.parametrize("name", CONSTANT)
def test_at_step_0_the_loss_is_its_constant_and_every_logratio_is_0(name):
    """Several packs, groups of four; rows 6 to 9 of pairs taken apart hold both labels."""
    loss = LOSSES[name](**SMOOTHED.get(name, {}))
    trees = trees_for(loss)
    rows = np.arange(4, 12) if loss.unpaired else np.arange(8)
    step = Objective(loss).of_rows(trees, rows)
    model = packed_tiny()
    sums = zeros(model.device)
    packs = pack_rows(trees, rows, budget=60, group_rows=4 if loss.coupled else 1)
    assert len(packs) > 1
    for batch in packs:
        ref_logp = model.logps(batch)
        out = model(batch, step.loss_fn(batch), ref_logp, normalizer=step.normalizer, stats=True)
        assert torch.equal(out.logp, ref_logp)
        out.loss.backward()
        sums += pack_sums(out, ref_logp, batch, loss)
    found = as_metrics(by_name(over_micro_batches(means(sums))), loss)
    assert found["loss"] == pytest.approx(CONSTANT[name], rel=1e-6)
    assert found["ref/distance"] == found["rewards/margins"] == 0.0
    assert found.get("rewards/accuracies", 0.0) == 0.0  # strict, as TRL's
    assert found.get("kl", 0.0) == 0.0
    norm = torch.stack([g.norm() for g in gradients(model).values()]).norm()
    assert norm > 0.01


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_under_every_schedule_the_first_reference_scores_as_the_policy(schedule):
    trees = trees_for(Sigmoid())
    model = packed_tiny()
    reference = MovingReference(schedule, model)
    for batch in pack_rows(trees, np.arange(8), budget=60):
        with reference.model() as first:
            assert torch.equal(first.logps(batch), model.logps(batch))


@pytest.mark.parametrize(
    ("loss_type", "ref_update"), [("ipo", "none"), ("sigmoid", "soft"), ("kto", "hard")]
)
def test_a_run_begins_at_the_constant(workspace, tmp_path, loss_type, ref_update):
    run(
        workspace,
        tmp_path,
        loss_type=loss_type,
        ref_update=ref_update,
        ref_update_every=2,
        max_steps=1,
        max_tokens_per_batch=100,
    )
    (first,) = steps(tmp_path)
    assert first["ref/distance"] == 0.0
    assert first["loss"] == pytest.approx(CONSTANT[loss_type], rel=1e-6)
    assert first["grad_norm"] > 0.01


def test_every_logratio_is_0_right_after_a_hard_update_and_not_before(workspace, tmp_path):
    run(workspace, tmp_path, ref_update="hard", ref_update_every=2)
    found = steps(tmp_path)
    is_0 = [line["ref/distance"] == 0.0 for line in found]
    assert is_0 == [True, False, True, False, True, False]
    assert [line["ref/age_steps"] for line in found] == [0, 1, 0, 1, 0, 1]
    assert [line["ref/updates"] for line in found] == [0, 0, 1, 1, 2, 2]


def test_weights_multiply_the_loss_and_the_row_count_divides_it(workspace, tmp_path):
    data = workspace / "weighted.jsonl"
    given = [row["weight"] for row in read_rows(data)]
    assert len(set(given)) > 1
    run(
        workspace,
        tmp_path,
        dataset_name=str(data),
        weight_column="weight",
        train_batch_size=8,
        max_steps=1,
    )
    assert steps(tmp_path)[0]["loss"] == pytest.approx(np.mean(given) * LOG2, rel=1e-6)


@pytest.fixture(scope="module")
def tiny() -> PackedModel:
    return packed_tiny()


class Packing(NamedTuple):
    """A budget of tokens, and the rows of a step in some order."""

    budget: int
    rows: np.ndarray


class Backward(NamedTuple):
    """What a step on some packs gave."""

    packs: int
    loss: float
    gradients: dict[str, torch.Tensor]


def backward_of(
    model: PackedModel, loss: Loss, trees: TreeSource, packing: Packing, group_rows: int
) -> Backward:
    """The step's gradient against a reference that differs from the policy row by row."""
    model.zero_grad()
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(len(trees), loss.completions, generator=generator)
    step = Objective(loss).of_rows(trees, packing.rows)
    packs = pack_rows(trees, packing.rows, packing.budget, group_rows)
    total = 0.0
    for batch in packs:
        ref_logp = None
        if loss.needs_reference:
            ref_logp = model.logps(batch) + noise[list(batch.rows)].flatten()
        out = model(batch, step.loss_fn(batch), ref_logp, normalizer=step.normalizer)
        out.loss.backward()
        total += float(out.loss.detach())
    return Backward(len(packs), total, gradients(model))


@pytest.mark.parametrize("name", LOSSES)
def test_pack_size_and_order_do_not_change_the_gradient(tiny, name):
    loss = LOSSES[name](beta=0.3)
    trees = trees_for(loss)
    group_rows = 4 if loss.coupled else 1
    rows = np.arange(4, 12) if loss.unpaired else np.arange(8)  # both labels
    groups = rows.reshape(-1, group_rows)
    backwards = groups[::-1].reshape(-1)
    whole = backward_of(tiny, loss, trees, Packing(10_000, rows), group_rows)
    assert whole.packs == 1
    for packing in (Packing(10_000, backwards), Packing(50, rows), Packing(1, rows)):
        parts = backward_of(tiny, loss, trees, packing, group_rows)
        assert (parts.packs == 1) == (packing.budget == 10_000)
        assert parts.loss == pytest.approx(whole.loss, rel=1e-5)
        for key, want in whole.gradients.items():
            error = (parts.gradients[key] - want).abs().max()
            assert error <= 1e-5 * want.abs().max() + 1e-7, key


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
    assert max(float((wide[name] - narrow[name]).abs().max()) for name in wide) < 2e-5
    assert not same_weights(tmp_path / "wide", workspace / "model")


def test_a_reference_moves_at_its_interval_and_never_after_the_last_step(workspace, tmp_path):
    run(workspace, tmp_path, ref_update="soft", ref_update_every=2, max_steps=5)
    events = [line for line in lines(tmp_path) if line.get("event") == "reference_update"]
    assert [(line["step"], line["ref/updates"]) for line in events] == [(2, 1), (4, 2)]


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


def live_reference_run(workspace, share_of_policy: float, total: int, every: int):
    """The run written plainly: a second model in memory that scores every pack at the moment it is
    trained on. Returns the trained model."""
    tokenizer = load_tokenizer(str(workspace / "model"))
    trees = load_trees(tokenizer, DataConfig(str(workspace / "train.jsonl"), max_length=64))
    policy, live = (load_model(ModelConfig(str(workspace / "model"))) for _ in range(2))
    plan = Plan(trees, train_batch_size=4, max_steps=total, max_tokens_per_batch=8192)
    config = OptimizerConfig(learning_rate=3e-3)
    optimizer = config.optimizer(policy.model)
    rates = config.scheduler(optimizer, total)
    for step in range(total):
        objective = Objective(Sigmoid()).of_rows(trees, plan.rows(step))
        for batch in plan.packs(step):
            ref_logp = live.logps(batch)
            out = policy(batch, objective.loss_fn(batch), ref_logp, normalizer=objective.normalizer)
            out.loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        rates.step()
        optimizer.zero_grad()
        if (step + 1) % every == 0:
            with torch.no_grad():
                for mine, theirs in zip(live.parameters(), policy.parameters(), strict=True):
                    mine.lerp_(theirs, share_of_policy)
    return policy.model


@pytest.mark.parametrize(("ref_update", "share"), [("none", 0.0), ("hard", 1.0), ("soft", 0.5)])
def test_the_window_cache_equals_a_live_second_model(workspace, tmp_path, ref_update, share):
    run(workspace, tmp_path, ref_update=ref_update, ref_update_every=2, ref_update_alpha=0.5)
    got = weights(tmp_path)
    trained = live_reference_run(workspace, share, total=6, every=2).state_dict()
    assert got.keys() <= trained.keys()
    # Hard and none are the same numbers bit for bit; a soft move rounds once more or less.
    bound = 2e-5 if ref_update == "soft" else 0.0
    for name, value in got.items():
        assert (value - trained[name]).abs().max() <= bound, name


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
    # After a hard move the distance would be 0.
    assert all(line["eval_ref/distance"] > 0 for line in found[1:])
    margins = [(a["eval_rewards/margins"], a["eval_anchor/rewards/margins"]) for a in found]
    are_same = [abs(a - b) < 1e-6 for a, b in margins]
    assert are_same == ([True] * 4 if ref_update == "none" else [True, True, False, False])


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
    assert not {"rewards/margins", "logps/rejected"} & steps(tmp_path)[0].keys()


def test_the_last_line_has_the_mean_loss_of_all_steps(workspace, tmp_path):
    """Steps of one size; the loss against a hard reference goes up and down."""
    run(workspace, tmp_path, ref_update="hard", ref_update_every=3, logging_steps=1)
    losses = [line["loss"] for line in steps(tmp_path)]
    last = lines(tmp_path)[-1]
    assert last["train_loss"] == pytest.approx(np.mean(losses), rel=1e-6)
    assert abs(last["train_loss"] - losses[-1]) > 1e-3
    assert last["step"] == len(losses) == 6
