"""The model folder and the pairs that every provider gets: the same rows, dropped once, by fasttr's
rules."""

from __future__ import annotations

import gzip
import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from bench.shapes import SHAPES, SIZES
from fasttr.batch import Tree
from fasttr.data.formats import Skipped, find_format
from fasttr.data.reading import read_batch
from fasttr.data.tokens import Encoded, cut, encode

BLOCK = 256  # rows tokenised together


class Rows(NamedTuple):
    """Rows of a file that survive dropping, and their tokens."""

    rows: list[dict[str, Any]]  # as the file has them
    trees: list[Tree]
    read: int


def model_folder(
    out: Path, size: str, tokenizer_data: Path, device: torch.device | None = None
) -> Path:
    """A folder with a random model of that size and a tokenizer trained on the data, made unless it
    is there; weights of billions of parameters are drawn on a GPU."""
    folder = out / f"model-{size}"
    if not folder.is_dir():
        from fasttr.models.scratch import init_model

        with device or torch.device("cpu"):
            init_model(
                tokenizer_data=str(tokenizer_data),
                output_dir=str(folder),
                **SHAPES[SIZES[size]].init_settings(),
            )
    return folder


def generated_file(path: Path, rows: int) -> Path:
    """Pairs made by a formula, for machines without data."""
    from fasttr.toy.task import preference_rows, write_jsonl

    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(preference_rows(rows, seed=0), path)
    return path


def drawn_file(path: Path, lengths: str, rows: int) -> Path:
    """Pairs of random words with the lengths of a data set, where the words are tokens: for
    machines that have no data and want its lengths."""
    from bench.lengths import make_trees

    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        trees = make_trees(lengths, rows, WORDS)
        path.write_text("".join(json.dumps(_words_of(tree)) + "\n" for tree in trees))
    return path


# Of letters alone: tokenizers part letters from digits.
LETTERS = "abcdefghij"
WORDS = 100  # different ones in a drawn file; the smallest tokenizer that is trained learns each


def _words_of(tree: Tree) -> dict[str, str]:
    def text(ids: np.ndarray) -> str:
        return "".join(f" {LETTERS[i // 10]}{LETTERS[i % 10]}" for i in ids)

    chosen, rejected = tree.completions
    return {"prompt": text(tree.prompt_ids), "chosen": text(chosen), "rejected": text(rejected)}


def read_file(name: str) -> Iterator[dict[str, Any]]:
    """Rows of a preference file: JSON lines without any package, whatever else the trainer reads
    through `datasets`."""
    path = Path(name)
    if path.is_file() and path.name.removesuffix(".gz").endswith(".jsonl"):
        opened = gzip.open if path.suffix == ".gz" else open
        with opened(path, "rt", encoding="utf-8") as lines:
            yield from (json.loads(line) for line in lines if line.strip())
        return
    from fasttr.data.sources import read_rows

    yield from read_rows(name)


def survivors(
    rows: Iterable[dict[str, Any]], tokenizer: Any, max_length: int | None, wanted: int
) -> Rows:
    """The first `wanted` rows that fasttr would train on."""
    kept: list[dict[str, Any]] = []
    trees: list[Tree] = []
    read = 0
    remaining = iter(rows)
    while len(kept) < wanted:
        block = list(itertools.islice(remaining, BLOCK))
        if not block:
            break
        read += len(block)
        for row, ids in _fitting(block, tokenizer, max_length):
            trees.append(Tree(len(trees), ids.prompt_ids, ids.completions))
            kept.append(row)
    return Rows(kept[:wanted], trees[:wanted], read)


def _fitting(
    block: list[dict[str, Any]], tokenizer: Any, max_length: int | None
) -> Iterator[tuple[dict[str, Any], Encoded]]:
    """The rows of a block that are not dropped, with their tokens."""
    row_format = find_format(list(block[0]))
    columns = {name: [row.get(name) for row in block] for name in row_format.columns}
    examples = read_batch(columns, range(len(block)), row_format)
    encoded = iter(encode(tokenizer, [e for e in examples if not isinstance(e, Skipped)]))
    for row, example in zip(block, examples, strict=True):
        if isinstance(example, Skipped):
            continue
        ids = next(encoded)
        if max_length is not None and len(ids.prompt_ids) >= max_length:
            continue
        ids = cut(ids, max_length)
        is_empty = any(len(completion) == 0 for completion in ids.completions)
        if not is_empty and not np.array_equal(*ids.completions):
            yield row, ids
