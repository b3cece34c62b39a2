"""When a moving reference helps: the study's design, its measures, its rule and its resumption."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from bench.paper.when import __main__ as command
from bench.paper.when import effects, report, study
from bench.paper.when.design import FACTORS, SEEDS, Setting, design_matrix, settings_of
from bench.paper.when.runs import ARMS, CONTROLS, MOVING, LinearMargin, Scale
from bench.paper.when.study import Record
from fasttr.losses import LossInputs, Sigmoid
from fasttr.models.load import ModelConfig, load_model, load_tokenizer
from fasttr.models.scratch import init_model
from fasttr.toy import demo, judge
from fasttr.toy.writers import (
    FormulaWriter,
    habitual_completion,
    in_grammar,
    longest_run,
    pairs,
    tailed_completion,
)

REFERENCES = ("fixed", *MOVING)
BY = (*FACTORS, "writer part")
ALL = [setting for seed in range(SEEDS) for setting in settings_of(seed)]


def scaled(matrix: np.ndarray) -> np.ndarray:
    return matrix / np.linalg.norm(matrix, axis=0)


def test_any_two_levels_of_two_factors_meet_equally_often():
    assert len(set(ALL)) == len(ALL) == 72
    for first, second in itertools.combinations(FACTORS, 2):
        met = Counter((getattr(s, first), getattr(s, second)) for s in ALL)
        assert len(met) == len(FACTORS[first]) * len(FACTORS[second])
        assert len(set(met.values())) == 1, (first, second)
    for seed in range(SEEDS):
        for name, levels in FACTORS.items():
            assert {getattr(s, name) for s in settings_of(seed)} == set(levels)


def test_effects_of_the_reference_are_not_aliased():
    """Main effects, and the reference by every factor and by writer x part: as many independent
    columns as there are columns. Half of the seeds would not do."""
    matrix = scaled(design_matrix(ALL, REFERENCES, BY))
    assert matrix.shape == (360, 70)
    assert np.linalg.matrix_rank(matrix) == 70
    assert np.linalg.cond(matrix) < 6
    half = scaled(design_matrix(ALL[:36], REFERENCES, BY))
    assert np.linalg.matrix_rank(half) < 70


@pytest.mark.parametrize(
    ("writer", "completion", "is_in"),
    [
        ("sft", "bdfabdfkbd", True),
        ("sft", "b", True),  # 7 fewer than 8
        ("sft", "bdfabdfkbd" + "a", False),  # 3 more than 8
        ("tail", "bdfabdfkbd" + "bdbdbdbdbdb", True),  # 13 more
        ("tail", "bdfabdfkbd" + "bdbdbdbdbdbd", False),
        ("cold", "bdfabdfkb", True),
        ("sft", "bdf bdf", False),  # a character that is no letter of the task
        ("sft", "bbbbbd", True),
        ("sft", "bbbbbbd", False),  # six in a row
        ("habit", "bdfabdfk", True),  # the SFT policy would write it
        ("habit", "*bbddff", True),
        ("habit", "*bbddf", True),  # the last letter may stand alone
        ("habit", "*bbdfdd", False),
        ("sft", "*bbddff", False),
        ("habit", "*bbddffbbdd", False),
        ("habit", "*bbzz", False),
    ],
)
def test_what_nobody_would_have_written(writer, completion, is_in):
    prompt = "write 08 of bdf:"
    if writer in ("sft", "tail") and len(completion) == 10:
        prompt = "write 09 of bdf:"
    assert in_grammar(writer, prompt, completion) == is_in


def test_longest_run():
    assert [longest_run(text) for text in ("", "a", "abba", "aabbb")] == [0, 1, 2, 3]


@pytest.mark.parametrize("one", [habitual_completion, tailed_completion])
def test_pairs_part_where_they_should_and_stay_in_the_grammar(one):
    name = "habit" if one is habitual_completion else "tail"
    for part in ("early", "late"):
        drawn = pairs(FormulaWriter(one), part, 200, seed=3, held_out=False)
        assert len(drawn) == 200
        for _, first, second in drawn:
            assert first != second
            if part == "early":
                assert first.lstrip("*")[:1] != second.lstrip("*")[:1]
            else:
                shared = int(3 / 4 * len(first)) - (name == "habit")
                assert first[:shared] == second[:shared]
        inside = [in_grammar(name, prompt, side) for prompt, *both in drawn for side in both]
        assert np.mean(inside) > 0.98


def test_the_linear_margin_is_dpo_with_a_reference_that_is_the_policy():
    logp = torch.tensor([-3.0, -4.0, -2.0, -1.0], requires_grad=True)
    counts = torch.tensor([2, 3, 1, 2])
    fresh = LossInputs(logp=logp, ref_logp=logp.detach(), token_counts=counts)
    (of_dpo,) = torch.autograd.grad(Sigmoid(beta=0.3)(fresh).sum(), logp)
    linear = LinearMargin(beta=0.3)
    (of_linear,) = torch.autograd.grad(linear(fresh._replace(ref_logp=None)).sum(), logp)
    assert of_linear.tolist() == pytest.approx([-0.3, 0.3, -0.3, 0.3])
    assert of_dpo.tolist() == pytest.approx((of_linear / 2).tolist())
    assert not linear.needs_reference


def test_the_estimate_of_kl_is_that_of_the_full_distribution(tmp_path, monkeypatch):
    """Completions of one token: there the sum over all of them is exact."""
    models = []
    for seed in (0, 1):
        folder = tmp_path / str(seed)
        init_model("llama", hidden_size=8, num_heads=1, output_dir=folder, seed=seed)
        models.append(load_model(ModelConfig(str(folder))))
        with torch.no_grad():
            models[-1].model.lm_head.weight *= 20
    tokenizer = load_tokenizer(str(tmp_path / "0"))
    prompt = "write 08 of bdf:"
    monkeypatch.setattr(judge, "LONGEST", 1)
    found = judge.judge_model(*models, tokenizer, [prompt] * 1000, seed=0)

    [ids] = judge.encode_prompts(tokenizer, [prompt])
    logp, anchor = (_next_token_logp(model, ids) for model in models)
    exact = float((logp.exp() * (logp - anchor)).sum())
    assert exact > 0.5
    assert found.kl.stderr < 0.1 * exact
    assert abs(found.kl.value - exact) < 3 * found.kl.stderr


def _next_token_logp(model, ids) -> torch.Tensor:
    causal_lm = model.model
    causal_lm.set_attn_implementation("eager")
    with torch.no_grad():
        return causal_lm(torch.from_numpy(ids.astype(np.int64))[None]).logits[0, -1].log_softmax(-1)


def row(kl: float, gold: float, **others: float) -> dict[str, float]:
    of_pairs = {"chosen": -kl / 2, "rejected": -kl, "margin_stderr": 0.1, "accuracy": 0.6}
    return {"kl": kl, "gold": gold, "outside": 0.1 * kl, "length": 9.0, **of_pairs, **others}


def test_a_difference_at_equal_kl_by_hand():
    """Both reach a KL of 2. Between 1 and 2 one run rises from 0.6 to 0.8 and the other falls from
    0.5 to 0.3: 0.7 - 0.4 in the mean."""
    moving = [row(0, 0.4), row(1, 0.6), row(3, 1.0)]
    fixed = [row(0, 0.4), row(2, 0.3), row(1, 0.5)]  # drift may turn back
    assert effects.at_equal_kl("gold", moving, fixed) == pytest.approx(0.3)
    assert effects.at_the_end("gold", moving, fixed) == pytest.approx(0.5)


def test_a_run_is_stopped_by_its_held_out_margin_in_units_of_its_error():
    rows = [row(0, 0.1), row(2, 0.5, margin_stderr=0.2), row(4, 0.2, margin_stderr=0.8)]
    start = [row(0, 0.1), row(0, 0.1)]
    assert effects.when_stopped("gold", rows, start) == pytest.approx(0.4)


def test_the_critical_value_by_brute_force():
    table = np.random.default_rng(0).normal(size=(8, 3))
    table[2, 1] = np.nan
    largest = []
    for signs in itertools.product([1, -1], repeat=8):
        flipped = np.array(signs)[:, None] * table
        columns = [column[~np.isnan(column)] for column in flipped.T]
        largest.append(max(abs(c.mean()) / (c.std(ddof=1) / len(c) ** 0.5) for c in columns))
    critical = effects.critical_value(table, 0.05)
    assert np.mean(np.array(largest) > critical + 1e-9) <= 0.05
    assert critical == pytest.approx(sorted(largest)[-13])  # 12 of 256 may lie above
    assert effects.critical_value(table[:4], 0.05) == np.inf


def made_up(gain_of: dict[str, float], noise: float = 0.02, seeds: int = 18) -> list[Record]:
    """Runs in which a moving reference gains, by the writer, at any KL above 0."""
    rng = np.random.default_rng(0)
    records = []
    for seed in range(seeds):
        for setting in settings_of(seed):
            for arm in ARMS:
                gain = gain_of[setting.writer] if arm in MOVING else 0.0
                shift = gain + noise * rng.normal()
                rows = [row(0, 0.4)] + [row(kl, 0.5 + shift) for kl in (1.0, 2.0)]
                rows = [{"step": 12.0 * i, **one} for i, one in enumerate(rows)]
                records.append(Record(seed, setting, arm, rows))
    return records


def test_the_rule_helps_hurts_and_not_shown():
    gains = {"sft": 0.1, "cold": -0.1, "habit": 0.0, "tail": 0.0}
    found = effects.effects(made_up(gains), effects.PRIMARY)
    words = {level: report.word(found["soft 3", level], effects.PRIMARY) for _, level in found}
    assert words["writer sft"] == words["sft x late"] == "helps"
    assert words["writer cold"] == words["cold x early"] == "hurts"
    assert words["all"] == words["writer tail"] == "not shown to differ"
    assert found["soft 3", "writer sft"].mean == pytest.approx(0.1, abs=0.02)
    assert found["soft 3", "sft x late"].seeds == 9
    fewer = effects.Outcome("mass", effects.at_equal_kl, "gold", good=-1)
    assert report.word(found["soft 3", "writer sft"], fewer) == "hurts"


def test_false_alarms_are_as_rare_as_asked_for():
    """Of 300 tables without any effect a fifth, give or take, shows one somewhere."""
    rng = np.random.default_rng(1)
    tables = [rng.normal(size=(9, 1)) + rng.normal(size=(9, 5)) for _ in range(300)]
    alarms = [any(e.sign for e in effects.simultaneous(table, 0.2)) for table in tables]
    assert 0.14 < np.mean(alarms) < 0.26


def test_too_few_seeds_show_nothing():
    large = dict.fromkeys(FACTORS["writer"], 0.5)
    few = effects.effects(made_up(large, seeds=2), effects.PRIMARY)
    assert len(few) == 4 * (16 + 8)
    assert all(effect.sign == 0 for effect in few.values())


def test_the_report_names_what_it_found(tmp_path):
    records = made_up({"sft": 0.1, "cold": 0.1, "habit": 0.1, "tail": 0.1}, seeds=SEEDS)
    said = report.write(records, Scale(), tmp_path)
    assert "gold reward at equal KL: **soft 3: helps**" in said
    assert "gold reward at equal KL: linear: not shown to differ from fixed" in said
    assert "hard 24: more than smaller beta" in said
    saved = json.loads((tmp_path / "results.json").read_text())
    assert len(saved["runs"]) == 576
    mean, low, high, seeds = saved["effects"][effects.PRIMARY.name]["soft 3 | all"]
    assert mean == pytest.approx(0.1, abs=0.02)
    assert low < mean < high
    assert seeds == SEEDS
    assert "| linear |" in (tmp_path / "table.md").read_text()

    paper = tmp_path / "paper"
    (paper / "when").mkdir(parents=True)
    (paper / "README.md").write_text("before\n<!-- when -->\nstale\n<!-- /when -->\nafter\n")
    report.publish(tmp_path, paper)
    page = (paper / "README.md").read_text()
    assert page.startswith("before\n<!-- when -->\n**18 of the 18 planned seeds")
    assert page.endswith("<!-- /when -->\nafter\n")
    assert "| gold reward at equal KL | helps (in 20) | helps (in 21) |" in page
    assert "| mass out of distribution at equal KL | not shown to differ |" in page
    assert "stale" not in page
    assert "| writer cold | **+0." in page
    for name in ("when-paths.png", "when-effects.png", "when/verdict.md"):
        assert (paper / name).exists()


TINY = Scale(
    steps=2,
    every=1,
    samples=4,
    batch=4,
    pairs=8,
    held_pairs=4,
    width=16,
    sft_steps=2,
    sft_rows=64,
)


def test_a_killed_study_loses_one_run_and_repeats_none(tmp_path, monkeypatch):
    arms = ("fixed", "hard 24", "linear")
    monkeypatch.setattr(study, "ARMS", {arm: ARMS[arm] for arm in arms})
    [task] = study.tasks_of([0], tmp_path, TINY)[2:3]
    trained = []

    def killed(context, arm, folder):
        if len(trained) == 1:
            folder.mkdir(parents=True)
            (folder / "half").touch()
            raise KeyboardInterrupt
        trained.append(arm)
        return train_arm(context, arm, folder)

    train_arm = study.train_arm
    monkeypatch.setattr(study, "train_arm", killed)
    with pytest.raises(KeyboardInterrupt):
        study.make([task], workers=1)
    assert task.missing == ["hard 24", "linear"]
    assert study.read([task]) == []
    first = task.path("fixed").read_bytes()

    monkeypatch.setattr(study, "train_arm", train_arm)
    study.make([task], workers=1)
    assert task.path("fixed").read_bytes() == first
    records = study.read([task])
    assert [record.arm for record in records] == list(arms)
    assert [one["step"] for one in records[0].rows] == [0, 1, 2]
    assert not list(tmp_path.glob("runs/*/making"))


def test_a_folder_belongs_to_one_scale(tmp_path, capsys):
    command.main(["--out", str(tmp_path), "--report-only"])
    assert "no seed is complete" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="another scale"):
        command.main(["--out", str(tmp_path), "--quick", "--report-only"])


def test_settings_are_named_apart():
    assert len({setting.name for setting in ALL}) == len(ALL)
    assert Setting("sft", "late", 0.0, "sigmoid", 1.0).name == "sft-late-noise0-sigmoid-beta1"
    assert set(ARMS) == {"fixed", *MOVING, *CONTROLS}


def test_the_demo_repeats_a_setting_of_the_cell_that_the_rule_names():
    """The middle one in noise and beta of those with DPO, at the study's scale."""
    verdict = (Path(command.__file__).parent / "verdict.md").read_text()
    assert f"by their KL after the same steps: {demo.WRITER} x {demo.PART}\n" in verdict
    of_dpo = [
        setting
        for setting in ALL
        if setting[:2] == (demo.WRITER, demo.PART) and setting.loss == "sigmoid"
    ]
    middle = [sorted(getattr(one, key) for one in of_dpo)[1] for key in ("noise", "beta")]
    assert len(of_dpo) == 3
    assert middle == [demo.NOISE, demo.BETA]
    assert any([one.noise, one.beta] == middle for one in of_dpo)

    scale, settings = Scale(), demo.DemoSettings()
    assert (scale.steps, scale.sft_steps) == (settings.steps, settings.sft_steps)
    assert (scale.width, scale.sft_rows, scale.pairs) == (demo.WIDTH, demo.SFT_ROWS, demo.PAIRS)
    assert (scale.held_pairs, scale.samples) == (demo.HELD_OUT_PAIRS, demo.PROMPTS)
    assert scale.every == scale.steps // demo.EVALUATIONS
    hard, soft = (demo.ARMS[f"TR-DPO {kind}"] for kind in ("hard", "soft"))
    assert hard["ref_update_every"] == ARMS["hard 6"].every
    assert soft["ref_update_every"] == ARMS["soft 12"].every
    assert soft["ref_update_alpha"] == scale.alpha
