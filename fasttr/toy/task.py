"""A preference task made by a formula: its gold reward is known for anything that a model writes.

A prompt names three letters of a..l and a length n in 8..16, a completion is a string of letters:

    prompt "write 12 of bdf:"      completion "bdabfkdcbb"

With m the characters of the completion that are among the three, L all its characters and x =
max(0, L - n) / n,

    gold = max(-2, min(m, n) / n - 2 x^2)                                              in [-2, 1]

so the best answer is n letters of the three, and gold reward is lost by stopping early, by other
letters and, ever faster, by going past n. Labels are Bradley-Terry: P(a preferred to b) = 1 / (1 +
exp(-(gold(a) - gold(b)) / noise)).

Completions come from a known base distribution that a language model can be fitted to: L uniform on
n-7..n+1, each letter one of the three with probability 2/3 (then any of the three alike), else any
of the other nine alike. Within
it more is nearly always better, for x is at most 1/8: a policy that carries this beyond the data
writes past n and loses what it won. That is the room for over-optimisation.

Prompts whose letters add up to a multiple of five (a = 0) are held out: `held_out=True` draws from
these alone, and `False` from the others alone. Every function is determined by its arguments, on
every machine (numpy's PCG64).
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

LETTERS = "abcdefghijkl"
ASKED = 3  # letters that a prompt names
LENGTHS = range(8, 17)  # n
SPREAD = range(-7, 2)  # L - n under the base distribution
ON_TARGET = 2 / 3  # share of the asked letters under the base distribution
LONGEST_TAIL = 13  # letters past n
LOWEST = -2.0
OVERSHOOT = 2.0  # the factor of x^2
NOISE = 0.1  # temperature of the labels, in units of gold reward
HELD_OUT_MODULUS = 5
_PROMPT = re.compile(rf"write (\d\d) of ([{LETTERS}]{{{ASKED}}}):")


def parse_prompt(prompt: str) -> tuple[int, str]:
    """The asked length and letters. ValueError when it is no prompt of this task."""
    match = _PROMPT.fullmatch(prompt)
    if match is None:
        raise ValueError(
            f"{prompt!r} is not a prompt of the generated task; wanted one like 'write 12 of bdf:'"
        )
    return int(match[1]), match[2]


def gold_reward(prompt: str, completion: str) -> float:
    """The equation above, for any completion: a character that is no letter of the task counts in
    L, never in m."""
    n, asked = parse_prompt(prompt)
    matches = sum(character in asked for character in completion)
    overshoot = max(0, len(completion) - n) / n
    return max(LOWEST, min(matches, n) / n - OVERSHOOT * overshoot**2)


def reward(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    """Gold rewards as on-policy training asks for them: `--reward_funcs gold`."""
    pairs = zip(prompts, completions, strict=True)
    return [gold_reward(prompt, completion) for prompt, completion in pairs]


def is_held_out(prompt: str) -> bool:
    """Whether its letters are kept from training."""
    return sum(map(LETTERS.index, parse_prompt(prompt)[1])) % HELD_OUT_MODULUS == 0


def base_logp(prompt: str, completion: str) -> float:
    """Log-probability (nats) of a completion under the base distribution, its end included; -inf
    outside of it."""
    n, asked = parse_prompt(prompt)
    if len(completion) - n not in SPREAD or not set(completion) <= set(LETTERS):
        return -math.inf
    matches = sum(character in asked for character in completion)
    others = len(completion) - matches
    asked_logp, other_logp = (
        math.log(ON_TARGET / ASKED),
        math.log((1 - ON_TARGET) / (len(LETTERS) - ASKED)),
    )
    return matches * asked_logp + others * other_logp - math.log(len(SPREAD))


def base_completion(prompt: str, rng: np.random.Generator, tail: float = 0.0) -> str:
    """One draw from the base distribution; the share `tail` of draws runs past n instead, by 1 +
    Geometric(1/4) letters, at most 13, so that there are pairs where the gold reward falls."""
    n, asked = parse_prompt(prompt)
    others = [letter for letter in LETTERS if letter not in asked]
    if tail > 0 and rng.random() < tail:
        length = n + min(int(rng.geometric(0.25)) + 1, LONGEST_TAIL)
    else:
        length = n + SPREAD[rng.integers(len(SPREAD))]
    picks = [asked if on_target else others for on_target in rng.random(length) < ON_TARGET]
    return "".join(letters[rng.integers(len(letters))] for letters in picks)


def label_pair(
    prompt: str, a: str, b: str, rng: np.random.Generator, noise: float = NOISE
) -> dict[str, Any]:
    """A row of two completions, labelled by Bradley-Terry at temperature `noise` (0: the better
    one, a tie by a coin).

    Columns: prompt, chosen, rejected and their gold rewards, gold_chosen and gold_rejected.
    """
    gold_a, gold_b = gold_reward(prompt, a), gold_reward(prompt, b)
    draw = rng.random()
    if noise > 0:
        a_wins = draw < 1 / (1 + math.exp(-(gold_a - gold_b) / noise))
    else:
        a_wins = gold_a > gold_b or (gold_a == gold_b and draw < 0.5)
    sides = [(a, gold_a), (b, gold_b)] if a_wins else [(b, gold_b), (a, gold_a)]
    (chosen, gold_chosen), (rejected, gold_rejected) = sides
    return {
        "prompt": prompt,
        "chosen": chosen,
        "rejected": rejected,
        "gold_chosen": gold_chosen,
        "gold_rejected": gold_rejected,
    }


def prompts(n: int, seed: int, held_out: bool = False) -> list[str]:
    """n prompts, drawn uniformly with replacement from those that are (or are not) held out."""
    rng = np.random.default_rng(seed)
    return [_draw_prompt(rng, held_out) for _ in range(n)]


def sft_rows(n: int, seed: int, held_out: bool = False, tail: float = 0.0) -> list[dict[str, Any]]:
    """n rows of the base distribution, with a tail past the asked length: prompt, completion,
    gold."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(n):
        prompt = _draw_prompt(rng, held_out)
        completion = base_completion(prompt, rng, tail)
        rows.append(
            {"prompt": prompt, "completion": completion, "gold": gold_reward(prompt, completion)}
        )
    return rows


def preference_rows(
    n: int, seed: int, noise: float = NOISE, held_out: bool = False
) -> list[dict[str, Any]]:
    """n pairs of different draws from the base distribution, as `label_pair` labels them."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(n):
        prompt = _draw_prompt(rng, held_out)
        a = b = base_completion(prompt, rng)
        while b == a:
            b = base_completion(prompt, rng)
        rows.append(label_pair(prompt, a, b, rng, noise))
    return rows


def _draw_prompt(rng: np.random.Generator, held_out: bool) -> str:
    while True:
        letters = "".join(LETTERS[i] for i in rng.permutation(len(LETTERS))[:ASKED])
        prompt = f"write {LENGTHS[rng.integers(len(LENGTHS))]:02d} of {letters}:"
        if is_held_out(prompt) == held_out:
            return prompt


def write_jsonl(rows: Iterable[dict[str, Any]], path: str | Path) -> None:
    """One JSON object a line; written aside, then renamed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
    )
    os.replace(aside, path)
