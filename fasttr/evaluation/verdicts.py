"""What outside judges said, read from their own files: a number for every question.

alpaca_eval  AlpacaEval 2's annotations.json: preference from 1 (baseline) to 2 (the model), 0 is a
             draw
arena_hard   Arena-Hard's model_judgment/JUDGE/MODEL.jsonl: two games a question, the model second
             and first; A>>B and B>>A count three times
mt_bench     FastChat's JUDGE_single.jsonl: a score from 1 to 10 for every turn, -1 for none
pairwise     lines of `fasttr eval --samples_format pairwise` with a `verdict`: A, B or tie
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fasttr.errors import FasttrError, one_line
from fasttr.evaluation.length_controlled import length_controlled, read_gamed
from fasttr.metrics.results import Results

STRONG = 3  # how often a verdict such as A>>B counts
# What the first of two answers scored.
_FIRST_WINS = {"A>>B": (1.0, STRONG), "A>B": (1.0, 1), "A=B": (0.5, 1), "B=A": (0.5, 1)}
_FIRST_LOSES = {"B>>A": (0.0, STRONG), "B>A": (0.0, 1), "A<B": (0.0, 1), "A<<B": (0.0, STRONG)}
_SCORES = {**_FIRST_WINS, **_FIRST_LOSES, "B<A": (1.0, 1), "B<<A": (1.0, STRONG)}
_PAIRWISE = {"A": 1.0, "B": 0.0, "tie": 0.5}
POLICY_FIRST, POLICY_SECOND = "policy first", "policy second"


class _Verdicts(NamedTuple):
    """Of every question: its id, the sum of its scores and how many they are."""

    ids: Sequence[str]
    sums: Sequence[float]
    counts: Sequence[float]


def read_verdicts(
    path: str | Path, kind: str, length_control_file: str | Path | None = None
) -> list[Results]:
    """Results of a judge's file; of AlpacaEval also the length-controlled win rate where
    `length_control_file` (its df_gamed.csv) is given. FasttrError names the line at fault."""
    rows = read_objects(path, key="verdicts")
    try:
        found = _READERS[kind](rows)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise FasttrError(
            f"verdicts: {path} is not as {kind} writes it: {type(error).__name__} {one_line(error)}"
        ) from error
    if not found.ids:
        raise FasttrError(f"verdicts: {path} holds no verdict; wanted at least one")
    is_score = kind == "mt_bench"
    name = f"{kind}_{'score' if is_score else 'win_rate'}"
    title = f"{kind.replace('_', ' ')}: {'score, 1 to 10' if is_score else 'win rate'}"
    no_effect = None if is_score else 0.5
    values = _linearised(found)
    results = [Results(name, title, _digest(found.ids), values, None, no_effect)]
    if length_control_file is not None:
        if kind != "alpaca_eval":
            raise FasttrError(
                f"length_control_file: got it with verdicts_format {kind}; only alpaca_eval has a "
                "length-controlled win rate"
            )
        results.append(_controlled(rows, length_control_file))
    return results


def read_objects(path: str | Path, key: str) -> list[dict[str, Any]]:
    """Objects of a JSON list or of JSON lines. FasttrError names the setting `key`."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        if text.lstrip().startswith("["):
            rows = json.loads(text)
        else:
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise FasttrError(f"{key}: cannot read {path}: {one_line(error)}") from error
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise FasttrError(f"{key}: {path} holds no rows; wanted a JSON list or lines of objects")
    return rows


def _alpaca_eval(rows: list[dict[str, Any]]) -> _Verdicts:
    values = {row["instruction"]: _preference(row) for row in rows}
    known = {name: value for name, value in values.items() if not math.isnan(value)}
    return _Verdicts(list(known), list(known.values()), [1.0] * len(known))


def _preference(row: Mapping[str, Any]) -> float:
    """Of [0, 1]: 1 where the model (output_2) is preferred; NaN without a verdict."""
    value = row["preference"]
    if value is None or math.isnan(float(value)):
        return math.nan
    return 0.5 if float(value) == 0 else float(value) - 1


def _arena_hard(rows: list[dict[str, Any]]) -> _Verdicts:
    ids, sums, counts = [], [], []
    for row in rows:
        games = row["games"]
        if any(game is None or game["score"] is None for game in games[:2]):
            continue
        as_second, second = _SCORES[games[0]["score"]]
        as_first, first = _SCORES[games[1]["score"]]
        ids.append(str(row.get("uid", row.get("question_id"))))
        sums.append((1 - as_second) * second + as_first * first)
        counts.append(float(second + first))
    return _Verdicts(ids, sums, counts)


def _mt_bench(rows: list[dict[str, Any]]) -> _Verdicts:
    sums: dict[str, float] = {}
    counts: dict[str, float] = {}
    for row in rows:
        if float(row["score"]) != -1:
            name = str(row["question_id"])
            sums[name] = sums.get(name, 0.0) + float(row["score"])
            counts[name] = counts.get(name, 0.0) + 1
    return _Verdicts(list(sums), list(sums.values()), list(counts.values()))


def _pairwise(rows: list[dict[str, Any]]) -> _Verdicts:
    """A question counts once both of its orders are judged."""
    scores: dict[str, dict[str, float]] = {}
    for row in rows:
        if row.get("verdict") is not None:
            first = _PAIRWISE[row["verdict"]]
            is_first = {POLICY_FIRST: True, POLICY_SECOND: False}[row["order"]]
            scores.setdefault(str(row["id"]), {})[row["order"]] = first if is_first else 1 - first
    both = {name: found for name, found in scores.items() if len(found) == 2}
    return _Verdicts(list(both), [sum(one.values()) for one in both.values()], [2.0] * len(both))


_READERS: dict[str, Callable[[list[dict[str, Any]]], _Verdicts]] = {
    "alpaca_eval": _alpaca_eval,
    "arena_hard": _arena_hard,
    "mt_bench": _mt_bench,
    "pairwise": _pairwise,
}
VERDICT_FORMATS = tuple(_READERS)


def _linearised(found: _Verdicts) -> list[float]:
    """A value a question whose mean is the sum of all scores over their number, and whose spread
    gives that ratio's standard error."""
    sums, counts = np.array(found.sums), np.array(found.counts)
    ratio = sums.sum() / counts.sum()
    return (ratio + (sums - ratio * counts) / counts.mean()).tolist()


def _controlled(rows: list[dict[str, Any]], length_control_file: str | Path) -> Results:
    values = length_controlled(
        [_preference(row) for row in rows],
        [len(row["output_2"]) for row in rows],
        [len(row["output_1"]) for row in rows],
        read_gamed(length_control_file),
    )
    return Results(
        "alpaca_eval_length_controlled",
        "alpaca eval: length-controlled win rate",
        _digest([row["instruction"] for row in rows]),
        values.tolist(),
        None,
        0.5,
    )


def _digest(ids: Sequence[str]) -> str:
    return hashlib.blake2b("\n".join(ids).encode(), digest_size=16).hexdigest()
