"""Pairs that a policy wrote, as token ids in JSON lines."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fasttr.batch import Tree, TreeSource
from fasttr.console import say
from fasttr.data.in_memory import ListTrees
from fasttr.data.load import DataConfig, load_trees
from fasttr.errors import FasttrError
from fasttr.files import write_text

PAIRS = "pairs.jsonl"

Row = dict[str, Any]  # prompt_ids, chosen_ids, rejected_ids


def read_pairs(folder: Path) -> list[Row]:
    lines = (folder / PAIRS).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def write_pairs(folder: Path, rows: Sequence[Row]) -> None:
    write_text(folder / PAIRS, "".join(json.dumps(row) + "\n" for row in rows))


def pair_row(tree: Tree, chosen: int, rejected: int) -> Row:
    return {
        "prompt_ids": tree.prompt_ids.tolist(),
        "chosen_ids": tree.completions[chosen].tolist(),
        "rejected_ids": tree.completions[rejected].tolist(),
    }


def with_sides(row: Row, changed: Callable[[np.ndarray], np.ndarray]) -> Row:
    sides = {
        name: changed(np.array(row[name], dtype=np.int32)).tolist()
        for name in ("chosen_ids", "rejected_ids")
    }
    return {**row, **sides}


def labelled_pairs(trees: TreeSource, first: np.ndarray, labelled: np.ndarray) -> list[Row]:
    """Two completions of a tree after two others: those that have a label and differ. (P,) whether
    the first is preferred, and whether there is a label."""
    pairs = trees.completion_lengths.shape[1] // 2
    rows = []
    for number in np.flatnonzero(labelled).tolist():
        place = 2 * (number % pairs)
        sides = (place, place + 1) if first[number] else (place + 1, place)
        row = pair_row(trees[number // pairs], *sides)
        if row["chosen_ids"] != row["rejected_ids"]:
            rows.append(row)
    return rows


class GivenPairs(NamedTuple):
    """Pairs of a data set, and what changes with any of their tokens."""

    rows: list[Row]
    fingerprint: str


def given_pairs(tokenizer: Any, name: str, hf_config: Any) -> GivenPairs:
    """Pairs as if a policy had drawn them: a side ends with EOS, without what a chat template
    writes behind it. Those that have no room in the model's positions are dropped."""
    positions = getattr(hf_config.get_text_config(), "max_position_embeddings", None)
    trees = load_trees(tokenizer, DataConfig(name, max_length=None))
    for line in trees.report.lines():
        say(line)
    longest = trees.prompt_lengths + trees.completion_lengths.max(axis=1)
    fits = np.flatnonzero(longest <= (positions or np.inf))
    if len(fits) < len(trees):
        say(f"  dropped {len(trees) - len(fits)}: longer than {positions} tokens")
    if len(fits) == 0:
        raise FasttrError(f"{name}: every pair has more than {positions} tokens")
    eos = tokenizer.eos_token_id
    rows = [pair_row(trees[row], 0, 1) for row in fits.tolist()]
    return GivenPairs(
        [with_sides(row, lambda ids: _to_end(ids, eos)) for row in rows], trees.fingerprint
    )


def _to_end(ids: np.ndarray, eos: int) -> np.ndarray:
    """Up to the last EOS; all where there is none."""
    ends = np.flatnonzero(ids == eos)
    return ids[: ends[-1] + 1] if len(ends) else ids


def read_trees(folder: Path) -> ListTrees:
    return ListTrees([_pair_tree(row) for row in read_pairs(folder)])


def _pair_tree(row: Row) -> Tree:
    prompt, chosen, rejected = (
        np.array(row[name], dtype=np.int32) for name in ("prompt_ids", "chosen_ids", "rejected_ids")
    )
    return Tree(0, prompt, (chosen, rejected))
