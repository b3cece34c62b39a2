"""A reward model on packed trees against transformers' own, and the folder that it writes."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fasttr.batch import Tree
from fasttr.data.in_memory import ListTrees
from fasttr.losses.reward import RewardObjective, reward_loss
from fasttr.models import attention
from fasttr.models.reward import RewardModel, score_all
from fasttr.packing.layout import pack
from fasttr.packing.plan import Plan, prompt_numbers
from tests.tiny import gradients, random_trees, tiny_config

PAD = 0
SHAPES = [(5, 3, 7), (2, 9, 1), (6, 2, 2), (1, 4, 8)]


def classifier(arch, implementation, **overrides):
    from transformers import AutoModelForSequenceClassification

    config = tiny_config(arch, num_labels=1, **overrides)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(
        copy.deepcopy(config), attn_implementation=implementation
    )
    return model.float().train()


def wholes(trees):
    return [np.concatenate([t.prompt_ids, c]) for t in trees for c in t.completions]


def padded(rows, pad, side):
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), pad)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(longest - len(row), None) if side == "left" else slice(len(row))
        ids[i, place], mask[i, place] = torch.from_numpy(row).long(), 1
    return ids, mask


def transformers_scores(model, trees, side="right", pad=PAD):
    ids, mask = padded(wholes(trees), pad, side)
    position_ids = (mask.cumsum(1) - 1).clamp(min=0)
    out = model(input_ids=ids, attention_mask=mask, position_ids=position_ids, use_cache=False)
    return out.logits[:, 0]


@pytest.mark.parametrize("arch", ["llama", "qwen3", "mistral", "gpt_neox", "olmo2", "phi3"])
def test_loss_and_every_gradient_are_those_of_the_padded_model(arch):
    trees = random_trees(SHAPES)
    trees = [
        tree._replace(weight=weight) for tree, weight in zip(trees, (1, 0.5, 2, 1), strict=True)
    ]
    own = classifier(arch, "eager")
    scores = transformers_scores(own, trees).view(-1, 2)
    difference = scores[:, 0] - scores[:, 1]
    weight = torch.tensor([tree.weight for tree in trees])
    loss = (weight * (-F.logsigmoid(difference) + 0.05 * scores.sum(1) ** 2)).sum() / len(trees)
    loss.backward()

    packed = RewardModel(classifier(arch, attention.register()))
    objective = RewardObjective(reward_loss(2, 0.05)).of_rows(ListTrees(trees), np.arange(4))
    batch = pack(trees)
    out = packed(batch, objective.loss_fn(batch), normalizer=objective.normalizer)
    out.loss.backward()

    assert abs(out.loss.item() - loss.item()) < 1e-5 * loss.item()
    theirs, ours = gradients(own), gradients(packed.model)
    assert theirs.keys() == ours.keys()
    for name, grad in theirs.items():
        bound = 2e-5 * float(grad.abs().max()) + 1e-6
        assert float((ours[name] - grad).abs().max()) < bound, name


def test_weights_are_rows_that_often():
    trees = random_trees(SHAPES[:3])
    weighted = [tree._replace(weight=w) for tree, w in zip(trees, (1.0, 2.0, 3.0), strict=True)]
    repeated = [tree for tree, n in zip(trees, (1, 2, 3), strict=True) for _ in range(n)]
    found = []
    for rows in (weighted, repeated):
        model = RewardModel(classifier("llama", attention.register()))
        batch = pack(rows)
        objective = RewardObjective(reward_loss(2)).of_rows(ListTrees(rows), np.arange(len(rows)))
        model(batch, objective.loss_fn(batch), normalizer=1).loss.backward()
        found.append(gradients(model.model))
    for name, grad in found[0].items():
        bound = 1e-5 * float(grad.abs().max()) + 1e-6
        assert float((found[1][name] - grad).abs().max()) < bound, name


def of_one_prompt(pairs, prompt=20):
    rng = np.random.default_rng(3)
    ids = lambda n: rng.integers(3, 97, n).astype(np.int32)  # noqa: E731
    first, second = ids(prompt), ids(4)
    trees = [Tree(row, first, (ids(3), ids(5))) for row in range(pairs)]
    return [*trees, Tree(pairs, second, (ids(2), ids(6)))]


def test_pairs_of_one_prompt_share_it_and_score_the_same():
    trees = of_one_prompt(3)
    model = RewardModel(classifier("llama", attention.register()))
    together = pack(trees)
    assert len(together.input_ids) == (20 + 3 * 8) + (4 + 8)
    assert len(together.weights) == 4
    alone = torch.cat([model.scores(pack([tree])) for tree in trees])
    torch.testing.assert_close(model.scores(together), alone, rtol=1e-5, atol=1e-6)


def test_a_sweep_brings_scattered_pairs_of_one_prompt_together():
    trees = of_one_prompt(3)
    scattered = ListTrees([trees[i] for i in (0, 3, 1, 2)])
    model = RewardModel(classifier("llama", attention.register()))
    scores = score_all(model, scattered, budget=1000)
    wanted = torch.cat([model.scores(pack([tree])) for tree in scattered]).view(-1, 2)
    np.testing.assert_allclose(scores, wanted.numpy(), rtol=1e-5, atol=1e-6)


def test_a_plan_by_prompt_keeps_prompts_together_in_every_epoch():
    trees = ListTrees([of_one_prompt(3)[i] for i in (0, 3, 1, 2)])
    numbers = prompt_numbers(trees)
    assert numbers.tolist() == [0, 1, 0, 0]
    plan = Plan(trees, train_batch_size=4, max_tokens_per_batch=60, prompts=numbers)
    orders = {tuple(plan.rows(step).tolist()) for step in range(8)}
    assert orders == {(0, 2, 3, 1), (1, 0, 2, 3)}
    # Three pairs of the long prompt are 44 tokens and the other row 12.
    assert [len(p.input_ids) for p in plan.packs(0)] == [56]
    tight = Plan(trees, train_batch_size=4, max_tokens_per_batch=40, prompts=numbers)
    # Two pairs of it fit into 40 tokens; the third goes with the other row.
    assert sorted(len(p.input_ids) for p in tight.packs(0)) == [36, 40]


@pytest.mark.parametrize("side", ["left", "right"])
def test_scores_are_transformers_under_any_padding(side):
    trees = random_trees(SHAPES)
    own = classifier("llama", "sdpa").eval()
    ours = RewardModel(classifier("llama", attention.register())).scores(pack(trees))
    with torch.no_grad():
        theirs = transformers_scores(own, trees, side)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_where_padding_is_eos_transformers_reads_the_token_before_it():
    eos = 2
    trees = [
        tree._replace(completions=tuple(np.append(ids, eos).astype(np.int32) for ids in both))
        for tree in random_trees(SHAPES)
        for both in [tree.completions]
    ]
    own = classifier("llama", "sdpa", pad_token_id=eos).eval()
    with torch.no_grad():
        theirs = transformers_scores(own, trees, pad=eos)
    model = RewardModel(classifier("llama", attention.register(), pad_token_id=eos))
    at_eos = model.scores(pack(trees))
    model.ignored_id = eos
    before_eos = model.scores(pack(trees))
    torch.testing.assert_close(before_eos, theirs, rtol=1e-5, atol=1e-5)
    assert float((at_eos - theirs).abs().min()) > 1e-3
