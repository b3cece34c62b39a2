"""The language-model study: what its table and its sentences make of numbers, and that it runs."""

import json

import numpy as np
import pytest

from bench.paper import ocrm_lm
from bench.paper.ocrm_lm_report import best, by_prompts, paired, table, verdict
from fasttr.toy.exact import fit_linear
from fasttr.toy.task import gold_reward


def line(arm, stage, gold, **more):
    numbers = {"kl": 0.1 * stage, "length": 10.0, "episodes": 5 * stage, "labels": 7}
    return {"arm": arm, "stage": stage, "gold": gold, **numbers, **more}


def found_of(ends, excess):
    """Two stages a seed; `ends`: arm -> gold at the end of each seed."""
    found = {}
    for arm, golds in ends.items():
        for seed, gold in enumerate(golds):
            last = line(arm, 2, gold)
            if arm != "fixed":
                last |= {"gold_difference": gold - ends["fixed"][seed]}
                last |= {"gold_difference_stderr": 0.15}
            if arm == "weighted":
                last |= {f"{name}/excess_loss": x + seed / 100 for name, x in excess.items()}
                last |= {f"{name}/accuracy": 0.7 for name in excess} | {"ess": 90.0}
            found.setdefault(arm, {})[seed] = [line(arm, 1, 0.5), last]
    return found


ENDS = {
    "fixed": [-0.3, 0.1, 0.2],
    "weighted": [0.2, 0.5, 0.8],
    "shuffled": [-0.4, 0.2, 0.1],
    "fresh": [0.5, 0.6, 0.7],
}
EXCESS = {"reward": 0.1, "reward_1": 0.3, "shuffled": 0.31, "unweighted": 0.3}


def test_differences_are_paired_by_seed():
    found = found_of(ENDS, EXCESS)
    ends = dict(enumerate(ENDS["weighted"]))
    difference = paired(ends, dict(enumerate(ENDS["fixed"])))
    assert difference.mean == pytest.approx(1.5 / 3)
    spread = np.std([0.5, 0.4, 0.6], ddof=1)
    assert difference.high - difference.mean == pytest.approx(4.303 * spread / 3**0.5)
    assert best(found, "weighted") == {0: 0.5, 1: 0.5, 2: 0.8}
    # A refit without weights is the first fit here, and is shown once.
    assert table(found).count("+0.310 [") == 1
    assert "unweighted" not in table(found)
    row = next(text for text in table(found).splitlines() if text.startswith("| weighted | 3"))
    assert "| 0.500 +- 0.245 | +0.500 [+0.252, +0.748] | 3, 0 | 0.600, 0.400 | 0.20 |" in row
    # An arm that draws the same samples as the first one differs by 0 +- 0.
    same = {"fixed": ENDS["fixed"], "weighted": ENDS["fixed"]}
    alike = found_of(same, EXCESS)
    for lines in alike["weighted"].values():
        lines[-1]["gold_difference_stderr"] = 0.0
    assert by_prompts(alike, "weighted") == (0, 0)
    # -0.1, 0.1 and -0.1 beside a standard error of 0.15 say nothing.
    assert by_prompts(found, "shuffled") == (0, 0)


def test_sentences_follow_from_the_intervals():
    said = verdict(found_of(ENDS, EXCESS))
    assert "weighted: more gold reward than one reward model at the end (+0.500" in "\n".join(said)
    assert any("shuffled: no difference from one reward model at the end" in x for x in said)
    assert any("own samples: a smaller loss than the unweighted one" in x for x in said)
    worse = verdict(found_of(ENDS, {**EXCESS, "reward": 0.9}))
    assert any("own samples: a larger loss than shuffled weights" in x for x in worse)


def test_a_bag_cannot_know_the_length():
    """More asked letters are better up to n, and the fit does not see n."""
    rng = np.random.default_rng(0)
    asked, other = rng.integers(0, 12, (2, 400, 2))
    texts = ["a" * a + "d" * b for a, b in zip(asked.ravel(), other.ravel(), strict=True)]
    gold = np.array([gold_reward("write 12 of abc:", text) for text in texts]).reshape(400, 2)
    steps = ocrm_lm.BagSteps.__new__(ocrm_lm.BagSteps)
    bags = steps.features(["write 12 of abc:"] * 800, texts, [[]] * 800).reshape(400, 2, 2)
    best_first = np.argsort(-gold, axis=1)
    sides = np.take_along_axis(bags, best_first[:, :, None], axis=1)
    theta = fit_linear(sides[:, 0] - sides[:, 1], np.ones(400), ocrm_lm.RIDGE)
    assert theta[0] > 0 > theta[1]
    same = steps.features(["write 08 of abc:", "write 16 of abc:"], ["abcabc"] * 2, [[]] * 2)
    assert same.tolist() == [[6.0, 0.0]] * 2


@pytest.mark.slow
@pytest.mark.parametrize("reward", ocrm_lm.STEPS)
def test_the_quick_study_runs_and_goes_on(tmp_path, capsys, reward):
    words = ["--quick", "--reward", reward, "--out", str(tmp_path)]
    ocrm_lm.main(words)
    results = tmp_path / f"results-{reward}.json"
    document = json.loads(results.read_text())
    assert set(document["lines"]) == set(ocrm_lm.Settings(reward).arms)
    assert (tmp_path / f"ocrm-lm-{reward}.png").stat().st_size > 10_000
    first = capsys.readouterr().out
    ocrm_lm.main(words)
    again = capsys.readouterr().out
    # Everything was there: the same lines of results, and no step is made.
    assert "== " in first
    assert "== " not in again
    assert json.loads(results.read_text()) == document
