"""The reproduction of the TR paper: the toy MDP, the over-optimisation study, the recipes for a
GPU."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from bench.paper import curves, overoptimization, stats, toy_mdp
from bench.paper.curves import Run
from bench.paper.mdp import Rnn, Tabular, Tree, align, draw_pairs, fit, rows_of, seed_losses
from fasttr import batch
from fasttr.cli.train import parse_train
from fasttr.data.in_memory import ListTrees
from fasttr.data.unpaired import Unpaired
from fasttr.losses import make_loss
from fasttr.reference.schedule import Fixed, Hard, Soft
from fasttr.training.loop import train
from tests.runs import lines

TREE = Tree()
RECIPES = sorted((Path(__file__).parents[2] / "fasttr" / "recipes").glob("*.yaml"))


def toy(seeds: int = 3, pairs: int = 2, shared: int | None = 0):
    drawn = draw_pairs(TREE, list(range(seeds)), pairs, shared)
    initial = Rnn(TREE, list(range(seeds)))
    fit(initial, drawn, 10, 3e-3)
    return initial, drawn


# -- the toy MDP


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


# -- intervals and words


def test_intervals_over_seeds():
    found = stats.interval([1.0, 2.0, 3.0, math.nan])
    assert (found.mean, found.n, found.sign) == (2.0, 3, 0)
    assert found.high - 2 == pytest.approx(4.303 / math.sqrt(3))
    assert stats.t975(30) == pytest.approx(2.042, abs=1e-3)
    assert stats.interval([1.0]).sign == 0
    assert "no interval" in stats.interval([1.0]).text()
    assert [
        stats.words(stats.interval(x), "up", "down", "none")[:4]
        for x in ([1, 1.1], [-1, -1.1], [-1, 1])
    ] == [
        "up (",
        "down",
        "none",
    ]


def made_up(
    gold_fixed, gold_moving, kl_fixed=(0, 1, 2, 4), kl_moving=(0, 1, 2, 4), seeds=3
) -> list[Run]:
    runs = []
    for seed in range(seeds):
        for arm in curves.ARMS:
            kl, gold = (kl_fixed, gold_fixed) if arm == "fixed" else (kl_moving, gold_moving)
            rows = [
                {
                    "step": i,
                    "kl": k,
                    "gold": g + 0.001 * seed * (i + (arm == "hard")),
                    "length": 9.0 + k,
                }
                for i, (k, g) in enumerate(zip(kl, gold, strict=True))
            ]
            runs.append(Run("sigmoid", arm, 0.1, seed, rows))
    return runs


def test_verdict_where_the_claim_holds():
    said = curves.verdict(made_up((0.5, 0.6, 0.4, 0.1), (0.5, 0.6, 0.62, 0.63)))
    assert "DPO, soft: **the claim holds here**" in said
    assert "a moving reference gives less gold: nowhere shown" in said


def test_verdict_where_it_does_not():
    same = curves.verdict(made_up((0.5, 0.6, 0.4, 0.1), (0.5, 0.6, 0.4, 0.1)))
    soft = next(line for line in same if line.startswith("DPO, soft: **"))
    assert "not shown to be better" in soft
    assert "the moving one falls as well" in soft
    assert "a moving reference gives more gold: nowhere shown" in same
    worse = curves.verdict(made_up((0.5, 0.6, 0.62, 0.63), (0.5, 0.5, 0.3, 0.0)))
    soft = next(line for line in worse if line.startswith("DPO, soft: **"))
    assert "the fixed reference is not shown to fall" in soft
    assert "worse" in soft
    assert any(
        line.startswith("a moving reference gives less gold: DPO soft at equal KL")
        for line in worse
    )
    assert curves.verdict(made_up((0.5, 0.1), (0.5, 0.6), (0, 1), (0, 1), seeds=1)) == [
        "one seed has no interval: nothing is claimed; ask for two or more"
    ]


def test_further_along_the_same_curve_is_no_difference_at_equal_kl():
    c = curves.compare(
        made_up((0.5, 0.55, 0.6), (0.5, 0.6, 0.4), (0, 0.5, 1), (0, 1, 3)), "sigmoid", "soft"
    )
    assert c.equal_kl.mean == pytest.approx(0, abs=1e-3)
    assert c.gold_at_end.sign == -1
    assert c.kl_at_end.mean == pytest.approx(2)
    assert c.fall_moving.mean == pytest.approx(0.2, abs=0.01)


# -- the over-optimisation study


def test_overoptimization_end_to_end_and_resumed(tmp_path, monkeypatch, capsys):
    command = [
        "--out",
        str(tmp_path),
        "--losses",
        "kto_paired",
        "--beta",
        "0.5",
        "--seeds",
        "2",
        "--steps",
        "2",
        "--checkpoint_every",
        "1",
        "--pairs",
        "16",
        "--test_pairs",
        "4",
        "--samples",
        "4",
        "--batch",
        "8",
        "--width",
        "16",
        "--sft_steps",
        "3",
        "--sft_pairs",
        "64",
        "--tau",
        "1",
        "--soft_every",
        "1",
    ]
    overoptimization.main(command)
    found = json.loads((tmp_path / "results.json").read_text())
    assert len(found["runs"]) == 6
    assert len(found["compared"]) == 2
    row = found["runs"][0]["rows"][-1]
    assert row["step"] == 2
    assert {"gold", "kl", "kl_stderr", "length", "logps_chosen", "logratio_rejected"} <= row.keys()
    assert found["runs"][0]["rows"][0]["kl"] == 0
    assert (tmp_path / "gold-against-kl.png").exists()
    assert (tmp_path / "steps.png").exists()
    assert "the claim" in (tmp_path / "verdict.md").read_text()

    def no_more(config):
        raise AssertionError("a finished run was repeated")

    monkeypatch.setattr(overoptimization, "train", no_more)
    overoptimization.main(command)
    with pytest.raises(SystemExit, match="tau: 1 -> 2"):
        overoptimization.main([*command, "--tau", "2"])


# -- the recipes


def rows_like(name: str) -> list[dict]:
    """Rows in the shape of the data set that a recipe names."""
    if "hh" in name:
        asked = "\n\nHuman: how many{}?\n\nAssistant:"
        return [
            {"chosen": asked.format(i) + " many of them", "rejected": asked.format(i) + " no"}
            for i in range(8)
        ]
    if "tldr" in name:
        asked = "SUBREDDIT: r/x\n\nPOST: it was {}\n\nTL;DR:"
        return [
            {"prompt": asked.format(i), "chosen": " short", "rejected": " much longer"}
            for i in range(8)
        ]
    user = [{"content": "how many?", "role": "user"}]
    answers = (("chosen", "two"), ("rejected", "no"))
    sides = {side: [*user, {"content": text, "role": "assistant"}] for side, text in answers}
    return [
        {
            "prompt": "how many?",
            "prompt_id": str(i),
            **sides,
            "messages": sides["chosen"],
            "score_chosen": 8.0,
            "score_rejected": 4.0,
        }
        for i in range(8)
    ]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_loads_and_takes_a_step(recipe, workspace, tmp_path):
    config = parse_train(["--config", str(recipe)])
    assert config.output_dir == f"runs/{recipe.stem}"
    assert (config.max_length, config.max_grad_norm, config.num_train_epochs) == (1024, 2.0, 1.0)
    if config.loss_type != "sft":
        assert (config.beta, config.learning_rate, config.warmup_steps) == (0.05, 1e-6, 100)
        assert config.ref_update == {"dpo": "none", "oft": "soft", "ard": "hard"}[recipe.stem[-3:]]
    if "pythia" in recipe.stem and config.ref_update != "none":
        assert config.schedule in (Soft(0.6, 64), Hard(512))
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows_like(recipe.stem)))
    stand_in = {
        "model_name_or_path": workspace / "model",
        "dataset_name": file,
        "eval_dataset_name": file,
        "dataset_train_split": "train",
        "output_dir": tmp_path / "run",
        "max_steps": 1,
        "train_batch_size": 4,
        "use_cpu": "true",
        "bf16": "false",
        "warmup_steps": 0,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "disable_tqdm": "true",
        "save_strategy": "no",
    }
    train(
        parse_train(
            ["--config", str(recipe), *(f"--{key}={value}" for key, value in stand_in.items())]
        )
    )
    assert [line["eval_loss"] for line in lines(tmp_path / "run") if line.get("eval_loss")][-1] > 0


def test_recipes_cover_the_study():
    assert len(RECIPES) == 11
    for recipe in RECIPES:
        if not recipe.stem.endswith("sft"):
            for flags in (
                ["--loss_type", "ipo_sum"],
                ["--loss_type", "kto_paired", "--group_size", "8"],
            ):
                parse_train(["--config", str(recipe), *flags])
