"""Pairs that a policy wrote, as token ids in JSON lines."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fasttr.batch import Tree
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


def pair_tree(row: Row) -> Tree:
    prompt, chosen, rejected = (
        np.array(row[name], dtype=np.int32) for name in ("prompt_ids", "chosen_ids", "rejected_ids")
    )
    return Tree(0, prompt, (chosen, rejected))
