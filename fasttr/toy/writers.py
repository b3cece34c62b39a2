"""Who writes the pairs: completions of four writers, pairs that part early or late, and the grammar
that says whether anybody would have written a sample."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from fasttr.models.packed import PackedModel
from fasttr.rollouts.sampler import Sampling, draw, encode_prompts
from fasttr.toy.judge import LONGEST
from fasttr.toy.task import (
    LETTERS,
    LONGEST_TAIL,
    SPREAD,
    base_completion,
    label_pair,
    parse_prompt,
    prompts,
)

WRITERS = ("sft", "cold", "habit", "tail")
PARTS = ("early", "late")
COLD = 0.7  # temperature
TAIL = 0.15  # share of completions past the asked length
MARK = "*"  # opens what the generator with habits writes
IN_A_ROW = 5  # the base distribution repeats a letter more often in 2 of 1000 completions
SHARED = 3 / 4  # of the first completion, where pairs part late
PROMPTS_AT_ONCE = 512


class Writer(Protocol):
    def __call__(self, prompts: Sequence[str], starts: Sequence[str], seed: int) -> list[str]:
        """A completion of each prompt that begins with its start."""
        ...


class ModelWriter:
    """A language model at a temperature."""

    def __init__(self, model: PackedModel, tokenizer: Any, temperature: float):
        self.model = model
        self.tokenizer = tokenizer
        self.temperature = temperature

    def __call__(self, prompts: Sequence[str], starts: Sequence[str], seed: int) -> list[str]:
        ids = encode_prompts(self.tokenizer, [p + s for p, s in zip(prompts, starts, strict=True)])
        texts = []
        for first in range(0, len(ids), PROMPTS_AT_ONCE):
            sampling = Sampling(LONGEST, temperature=self.temperature, seed=seed + first)
            drawn = draw(self.model, self.tokenizer, ids[first : first + PROMPTS_AT_ONCE], sampling)
            texts += [one.completion for (one,) in drawn]
        return [start + text for start, text in zip(starts, texts, strict=True)]


class FormulaWriter:
    """A generator whose completions end with those of another draw: the start replaces as many of
    its characters, so a draw that is too short is drawn again."""

    def __init__(self, one: Callable[[str, np.random.Generator], str]):
        self.one = one

    def __call__(self, prompts: Sequence[str], starts: Sequence[str], seed: int) -> list[str]:
        rng = np.random.default_rng(seed)
        return [self._complete(p, s, rng) for p, s in zip(prompts, starts, strict=True)]

    def _complete(self, prompt: str, start: str, rng: np.random.Generator) -> str:
        while True:
            text = self.one(prompt, rng)
            if len(text) > len(start):
                return start + text[len(start) :]


def habitual_completion(prompt: str, rng: np.random.Generator) -> str:
    """What the SFT policy never writes: a mark, then every letter twice; as long as the base
    distribution's, the mark included (the last letter may stand alone)."""
    text = base_completion(prompt, rng)
    doubled = "".join(letter * 2 for letter in text)
    return (MARK + doubled)[: max(len(text), 2)]


def tailed_completion(prompt: str, rng: np.random.Generator) -> str:
    return base_completion(prompt, rng, tail=TAIL)


def writer_of(name: str, initial: PackedModel, tokenizer: Any) -> Writer:
    if name == "habit":
        return FormulaWriter(habitual_completion)
    if name == "tail":
        return FormulaWriter(tailed_completion)
    return ModelWriter(initial, tokenizer, COLD if name == "cold" else 1.0)


def pairs(
    writer: Writer, part: str, n: int, seed: int, held_out: bool
) -> list[tuple[str, str, str]]:
    """n times (prompt, first, second), both by `writer`: they differ in their first letter
    ("early"), or share three quarters of the first ("late")."""
    found: list[tuple[str, str, str]] = []
    for asking in _seeds(seed):
        asked = prompts(n + n // 2, asking, held_out)
        first = writer(asked, [""] * len(asked), asking + 1)
        starts = [_shared(text, part) for text in first]
        second = writer(asked, starts, asking + 2)
        drawn = zip(asked, first, second, strict=True)
        found += [pair for pair in drawn if _parts(pair[1], pair[2], part)]
        if len(found) >= n:
            return found[:n]
    raise AssertionError("seeds never end")


def _seeds(seed: int) -> Iterator[int]:
    while True:
        yield seed
        seed += 3


def _shared(first: str, part: str) -> str:
    if part == "early":
        return ""
    length = int(SHARED * len(first))
    if first.startswith(MARK):
        length -= (length - len(MARK)) % 2  # what is written twice is shared whole
    return first[:length]


def _parts(first: str, second: str, part: str) -> bool:
    if not first or not second or first == second:
        return False
    letters = [text.lstrip(MARK)[:1] for text in (first, second)]
    return part == "late" or letters[0] != letters[1]


def labelled_pairs(
    writer: Writer, part: str, noise: float, n: int, seed: int, held_out: bool
) -> list[dict[str, Any]]:
    """n rows as `label_pair` makes them, of pairs that part where `pairs` is asked to."""
    rng = np.random.default_rng(seed + 30)
    return [label_pair(*pair, rng, noise) for pair in pairs(writer, part, n, seed, held_out)]


def share_outside(writer: str, prompts: Sequence[str], completions: Sequence[str]) -> float:
    """Of samples that neither the SFT policy's data nor this writer could hold."""
    samples = zip(prompts, completions, strict=True)
    return float(np.mean([not in_grammar(writer, *sample) for sample in samples]))


def in_grammar(writer: str, prompt: str, completion: str) -> bool:
    """Whether the SFT policy's data, or this writer, could hold the completion.

    Both: letters of the task alone, from 7 fewer than asked to 1 more, at most five alike in a row.
    "tail": up to 13 more. "habit": also a mark and letters in twos, within the same lengths. A
    temperature changes how often something is written, not what: "cold" is "sft".
    """
    n, _ = parse_prompt(prompt)
    surplus = len(completion) - n
    if writer == "habit" and completion.startswith(MARK):
        body = completion[len(MARK) :]
        in_twos = all(body[i] == body[i + 1] for i in range(0, len(body) - 1, 2))
        return surplus in SPREAD and set(body) <= set(LETTERS) and in_twos
    most = LONGEST_TAIL if writer == "tail" else SPREAD[-1]
    in_length = SPREAD[0] <= surplus <= most
    return in_length and set(completion) <= set(LETTERS) and longest_run(completion) <= IN_A_ROW


def longest_run(text: str) -> int:
    """The most equal characters in a row."""
    longest = length = 0
    before = ""
    for character in text:
        length = length + 1 if character == before else 1
        longest = max(longest, length)
        before = character
    return longest
