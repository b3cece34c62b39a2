"""The generated preference task: its gold reward, its base distribution, its labels and its
split."""

import json
import math

import numpy as np
import pytest

from fasttr.toy import task as task

PROMPT = "write 08 of bdf:"


@pytest.mark.parametrize(
    ("completion", "gold"),
    [
        ("", 0.0),
        ("bdfbdfbd", 1.0),
        ("bdfb", 0.5),
        ("bbbbbbbb", 1.0),
        ("acegacegi", -2 / 64),
        ("bdfbdfbdbdfb", 1 - 2 * 0.25),
        ("b" * 16, 1 - 2.0),
        ("b" * 500, -2.0),
        ("bd\x00é<", 2 / 8),
    ],
)
def test_gold_reward_is_its_equation_and_bounded(completion, gold):
    assert task.gold_reward(PROMPT, completion) == pytest.approx(gold)


@pytest.mark.parametrize(
    "prompt", ["", "write 8 of bdf:", "write 08 of bdz:", f"{PROMPT} ", f"{PROMPT}b"]
)
def test_a_prompt_of_another_form_is_refused(prompt):
    with pytest.raises(ValueError, match="not a prompt"):
        task.gold_reward(prompt, "b")


def test_rows_are_a_function_of_the_seed():
    assert task.preference_rows(50, seed=3) == task.preference_rows(50, seed=3)
    assert task.preference_rows(50, seed=3) != task.preference_rows(50, seed=4)
    # The same on every machine and in every release: published figures rest on these rows.
    assert task.sft_rows(1, seed=0) == [
        {"prompt": "write 10 of jch:", "completion": "jbjicgjchc", "gold": 0.7}
    ]


def test_base_logp_is_the_log_of_a_distribution_and_what_the_draws_follow():
    n, asked = task.parse_prompt(PROMPT)
    total = 0.0
    for extra in task.SPREAD:
        length = n + extra
        for matches in range(length + 1):
            one = asked[0] * matches + "a" * (length - matches)
            others = (len(task.LETTERS) - len(asked)) ** (length - matches)
            total += (
                math.comb(length, matches)
                * len(asked) ** matches
                * others
                * math.exp(task.base_logp(PROMPT, one))
            )
    assert total == pytest.approx(1.0)

    rng = np.random.default_rng(0)
    draws = [task.base_completion(PROMPT, rng) for _ in range(4000)]
    assert all(math.isfinite(task.base_logp(PROMPT, draw)) for draw in draws)
    share = np.mean([character in asked for draw in draws for character in draw])
    assert share == pytest.approx(task.ON_TARGET, abs=0.015)
    lengths = np.bincount(
        [len(draw) - n - task.SPREAD[0] for draw in draws], minlength=len(task.SPREAD)
    ) / len(draws)
    assert lengths == pytest.approx(1 / len(task.SPREAD), abs=0.025)


def test_nothing_outside_the_base_distribution_has_mass():
    assert task.base_logp(PROMPT, "") == -math.inf
    assert task.base_logp(PROMPT, "b" * 10) == -math.inf
    assert task.base_logp(PROMPT, "bdz") == -math.inf


def test_held_out_prompts_never_occur_in_training():
    train, held = set(task.prompts(3000, seed=0)), set(task.prompts(3000, seed=0, held_out=True))
    assert train
    assert held
    assert not {task.parse_prompt(p)[1] for p in train} & {task.parse_prompt(p)[1] for p in held}
    assert all(map(task.is_held_out, held))
    assert all(len(p) == len(PROMPT) for p in train | held)


def test_labels_follow_bradley_terry():
    rng = np.random.default_rng(1)
    a, b = "bdfbdf", "bdfbda"  # gold 6/8 and 5/8
    wins = np.mean(
        [task.label_pair(PROMPT, a, b, rng, noise=0.1)["chosen"] == a for _ in range(4000)]
    )
    expected = 1 / (1 + math.exp(-(1 / 8) / 0.1))
    assert wins == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / 4000))
    assert {task.label_pair(PROMPT, b, a, rng, noise=0)["chosen"] for _ in range(20)} == {a}
    assert {task.label_pair(PROMPT, "b", "d", rng, noise=0)["chosen"] for _ in range(40)} == {
        "b",
        "d",
    }


def test_pairs_differ_and_are_noisy_yet_informative():
    rows = task.preference_rows(2000, seed=0)
    assert all(row["chosen"] != row["rejected"] for row in rows)
    assert all(row["gold_chosen"] == task.gold_reward(row["prompt"], row["chosen"]) for row in rows)
    decided = [
        row["gold_chosen"] > row["gold_rejected"]
        for row in rows
        if row["gold_chosen"] != row["gold_rejected"]
    ]
    assert 0.7 < np.mean(decided) < 0.95


def test_longer_is_better_in_the_data_and_worse_beyond_it():
    rows = task.preference_rows(2000, seed=0)
    longer = np.mean([len(row["chosen"]) > len(row["rejected"]) for row in rows])
    shorter = np.mean([len(row["chosen"]) < len(row["rejected"]) for row in rows])
    assert longer > shorter + 0.2
    gold = [
        task.gold_reward(PROMPT, "bdf" * (length // 3) + "bdf"[: length % 3])
        for length in range(1, 25)
    ]
    assert np.argmax(gold) + 1 == 8
    assert all(np.diff(gold[:8]) > 0)
    assert gold[15] < gold[0]


def test_jsonl_reads_back(tmp_path):
    rows = task.sft_rows(5, seed=0)
    task.write_jsonl(rows, tmp_path / "new" / "rows.jsonl")
    assert [
        json.loads(line) for line in (tmp_path / "new" / "rows.jsonl").read_text().splitlines()
    ] == rows
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["rows.jsonl"]


def test_a_tail_runs_past_the_asked_length():
    rows = task.sft_rows(3000, seed=2, tail=0.15)
    over = []
    for row in rows:
        n, _ = task.parse_prompt(row["prompt"])
        over.append(len(row["completion"]) - n)
    beyond = [x for x in over if x > 1]
    assert abs(len(beyond) / len(rows) - 0.15) < 0.025
    assert min(beyond) == 2
    assert max(beyond) == 13
    # Of 1 + Geometric(1/4): a quarter of the tail is 2 letters past n.
    assert abs(beyond.count(2) / len(beyond) - 0.25) < 0.07
    assert max(over) > max(
        len(r["completion"]) - task.parse_prompt(r["prompt"])[0] for r in task.sft_rows(500, seed=2)
    )
