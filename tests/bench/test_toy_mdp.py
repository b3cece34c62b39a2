"""The toy MDP of the TR paper: its losses, references and pairs are the trainer's."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from bench.paper import toy_mdp
from bench.paper.mdp import Rnn, Tabular, Tree, align, draw_pairs, fit, rows_of, seed_losses
from fasttr import batch
from fasttr.data.in_memory import ListTrees
from fasttr.data.unpaired import Unpaired
from fasttr.losses import make_loss
from fasttr.reference.schedule import Fixed, Hard, Soft

TREE = Tree()


def toy(seeds: int = 3, pairs: int = 2, shared: int | None = 0):
    drawn = draw_pairs(TREE, list(range(seeds)), pairs, shared)
    initial = Rnn(TREE, list(range(seeds)))
    fit(initial, drawn, 10, 3e-3)
    return initial, drawn


def test_direction_of_both_pair_constructions_is_the_recorded_one():
    """With pairs that diverge early both moving references lower the mass out of distribution, with
    a shared prefix both raise it; 40 seeds are enough for either interval to leave zero out."""
    settings = toy_mdp.Settings(seeds=40, beta=(0.5,), losses=("sigmoid",), steps=400)
    runs = toy_mdp.study(settings, progress=False)
    for arm in ("soft", "hard"):
        assert toy_mdp.against_fixed(runs["early", "sigmoid", 0.5], arm)[0].sign == -1
        assert toy_mdp.against_fixed(runs["shared", "sigmoid", 0.5], arm)[0].sign == 1
    for history in runs["early", "sigmoid", 0.5].values():
        assert history.ood[0].mean() < history.ood.mean(1).max() > history.ood[-1].mean()
    said = "\n".join(toy_mdp.verdict(runs))
    assert "early, DPO, beta 0.5, soft: the claim holds" in said
    assert "shared, DPO, beta 0.5, soft: the claim does not hold" in said


def test_soft_reference_is_its_closed_form_inside_the_toy():
    """reference_n = (1 - a)^n initial + sum over k of a (1 - a)^(n - k) policy_k."""
    initial, pairs = toy()
    alpha, every, at_updates, found = 0.3, 4, [], []

    def watch(step, policy, reference):
        if step % every == 0:
            at_updates.append(
                {name: p.detach().double().clone() for name, p in policy.named_parameters()}
            )
            found.append(
                {name: weight.double().clone() for name, weight in reference.weights.items()}
            )

    align(initial, pairs, make_loss(["sigmoid"], beta=0.5), Soft(alpha, every), 21, 3e-3, watch)
    assert len(found) == 5
    for n in range(1, 6):
        for name, start in initial.named_parameters():
            closed = (1 - alpha) ** n * start.detach().double()
            for k in range(1, n + 1):
                closed = closed + alpha * (1 - alpha) ** (n - k) * at_updates[k - 1][name]
            torch.testing.assert_close(found[n - 1][name], closed, rtol=1e-5, atol=1e-6)
    assert not torch.equal(found[-1]["U"], initial.U.double())


def test_schedules_meet_at_their_ends():
    """alpha 0 is the fixed reference and alpha 1 the hard one, bit for bit."""
    initial, pairs = toy()
    loss = make_loss(["ipo_sum"], beta=0.5)

    def run(schedule):
        return align(initial, pairs, loss, schedule, 20, 3e-3)

    assert np.array_equal(run(Fixed()).ood, run(Soft(0.0, 4)).ood)
    assert np.array_equal(run(Hard(4)).ood, run(Soft(1.0, 4)).ood)
    assert np.array_equal(run(Hard(4)).ood[:5], run(Fixed()).ood[:5])
    assert not np.allclose(run(Hard(4)).ood[-1], run(Fixed()).ood[-1])


AT_REFERENCE = [("sigmoid", math.log(2)), ("ipo_sum", 25.0), ("kto_paired", 0.5), ("kto", 0.5)]


@pytest.mark.parametrize(("name", "value"), AT_REFERENCE)
def test_loss_where_policy_is_reference(name, value):
    initial, pairs = toy()
    loss = make_loss([name], beta=0.1)
    rows = rows_of(TREE, pairs, loss)
    logp = initial.leaf_logps().detach().gather(1, rows.leaf)
    assert seed_losses(loss, rows, logp, logp).tolist() == pytest.approx([value] * 3, rel=1e-5)


def test_unpaired_rows_are_those_of_the_trainer():
    pairs = [[1, 2], [3, 4], [7, 5]]
    rows = rows_of(TREE, torch.tensor([pairs]), make_loss(["kto"]))
    prompt = np.zeros(1, dtype=np.int32)
    trees = ListTrees(
        [batch.Tree(i, prompt, tuple(np.array([leaf]) for leaf in p)) for i, p in enumerate(pairs)]
    )
    unpaired = Unpaired(trees, labels=None, block=6, max_length=None)
    assert rows.leaf[0].tolist() == [int(c[0]) for i in range(6) for c in unpaired[i].completions]
    assert rows.labels.tolist() == unpaired.labels.tolist()


def test_a_seed_does_not_depend_on_the_others():
    settings = toy_mdp.Settings(
        seeds=3, beta=(0.5,), losses=("kto_paired",), constructions=("early",), steps=15
    )
    together = toy_mdp.study(settings, progress=False)["early", "kto_paired", 0.5]["soft"]
    pairs = draw_pairs(TREE, [2], *settings.pairs_of("early"))
    alone = Rnn(TREE, [2])
    fit(alone, pairs, settings.sft_steps, settings.learning_rate)
    history = align(
        alone, pairs, make_loss(["kto_paired"], beta=0.5), Soft(0.6, 1), 15, settings.learning_rate
    )
    np.testing.assert_allclose(history.ood[:, 0], together.ood[:, 2], atol=1e-4)


def test_leaf_logps_equal_a_walk_down_the_tree():
    policy = Rnn(TREE, [0, 1], hidden=5)
    logp = policy.leaf_logps().detach()
    torch.testing.assert_close(logp.exp().sum(1), torch.ones(2))
    for leaf in (0, 5, 26):
        path, total, h = [leaf // 9, leaf // 3 % 3, leaf % 3], torch.zeros(()), torch.zeros(5)
        word = policy.x[1, 0]
        for level, action in enumerate(path):
            h = torch.tanh(word @ policy.W[1] + policy.b[1, 0] + (h @ policy.U[1] if level else 0))
            total += (h @ policy.V[1] + policy.c[1, 0]).log_softmax(-1)[action]
            word = policy.x[1, 1 + action]
        assert total.item() == pytest.approx(float(logp[1, leaf]), abs=1e-5)
    table = Tabular(TREE, [0])
    expected = sum(
        table.logits[0, state].log_softmax(-1)[a] for state, a in ((0, 1), (2, 2), (4 + 5, 0))
    )
    assert float(table.leaf_logps()[0, 9 + 6]) == pytest.approx(float(expected), abs=1e-5)


def test_pairs_are_disjoint_and_share_what_is_asked():
    for shared in (0, 1, 2):
        pairs = draw_pairs(TREE, list(range(20)), 3, shared)
        assert all(len(set(seed.flatten().tolist())) == 6 for seed in pairs)
        assert {TREE.shared_prefix(a, b) for a, b in pairs.flatten(0, 1).tolist()} == {shared}
    assert draw_pairs(TREE, [7], 3, None).tolist() == draw_pairs(TREE, [5, 7], 3, None)[1:].tolist()
    with pytest.raises(ValueError, match="no room"):
        draw_pairs(Tree(depth=1, actions=3), [0], 2, 0)
    with pytest.raises(ValueError, match="wanted 1 or more"):
        draw_pairs(TREE, [0], 3, 3)


def test_toy_command_writes_tables_pictures_and_what_is_not_known(tmp_path, capsys):
    toy_mdp.main(
        [
            "--seeds",
            "3",
            "--steps",
            "4",
            "--sft_steps",
            "2",
            "--beta",
            "0.5",
            "--losses",
            "sigmoid",
            "kto",
            "--network",
            "tabular",
            "--depth",
            "2",
            "--pairs",
            "2",
            "--out",
            str(tmp_path),
        ]
    )
    assert "Not known of the paper's setting" in capsys.readouterr().out
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["not_known_of_the_paper"]
    assert len(found["cells"]) == 4
    assert {"early-sigmoid-beta0.5.png", "finals-shared.png", "table.md"} <= {
        p.name for p in tmp_path.iterdir()
    }
    with pytest.raises(SystemExit):
        toy_mdp.main(["--losses", "simpo", "--out", str(tmp_path)])
    assert "have no reference to move" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        toy_mdp.main(["--depth", "1", "--pairs", "2", "--seeds", "1", "--out", str(tmp_path)])
    assert "no room" in capsys.readouterr().err
