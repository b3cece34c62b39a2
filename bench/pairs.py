"""The model folder and the pairs that every provider gets: the same rows, dropped once, by fasttr's
rules."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fasttr.batch import Tree
from fasttr.data.formats import Skipped, find_format
from fasttr.data.reading import read_batch
from fasttr.data.tokens import Encoded, cut, encode

BLOCK = 256  # rows tokenised together

# Sizes of models with random weights; all of them llama.
MODELS: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "vocab_size": 400},
    "10m": {"hidden_size": 256, "num_layers": 8, "num_heads": 4, "vocab_size": 8000},
    "1b": {
        "hidden_size": 2048,
        "num_layers": 16,
        "num_heads": 32,
        "num_kv_heads": 8,
        "intermediate_size": 8192,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
    "3b": {
        "hidden_size": 3072,
        "num_layers": 28,
        "num_heads": 24,
        "num_kv_heads": 8,
        "intermediate_size": 8192,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
    "8b": {
        "hidden_size": 4096,
        "num_layers": 32,
        "num_heads": 32,
        "num_kv_heads": 8,
        "intermediate_size": 14336,
        "vocab_size": 128256,
    },
}


class Rows(NamedTuple):
    """Rows of a file that survive dropping, and their tokens."""

    rows: list[dict[str, Any]]  # as the file has them
    trees: list[Tree]
    read: int


def model_folder(out: Path, size: str, tokenizer_data: Path) -> Path:
    """A folder with a random model of that size and a tokenizer trained on the data, made unless it
    is there."""
    folder = out / f"model-{size}"
    if not folder.is_dir():
        from fasttr.models.scratch import init_model

        init_model("llama", tokenizer_data=tokenizer_data, output_dir=folder, **MODELS[size])
    return folder


def generated_file(path: Path, rows: int) -> Path:
    """Pairs made by a formula, for machines without data."""
    from fasttr.toy.task import preference_rows, write_jsonl

    if not path.is_file():
        write_jsonl(preference_rows(rows, seed=0), path)
    return path


def read_file(name: str) -> Iterator[dict[str, Any]]:
    """Rows of a preference file: JSON lines without any package, whatever else the trainer reads
    through `datasets`."""
    path = Path(name)
    if path.is_file() and path.name.removesuffix(".gz").endswith(".jsonl"):
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as lines:
            yield from (json.loads(line) for line in lines if line.strip())
        return
    from fasttr.data.sources import read_rows

    yield from read_rows(name)


def survivors(
    rows: Iterator[dict[str, Any]], tokenizer: Any, max_length: int | None, wanted: int
) -> Rows:
    """The first `wanted` rows that fasttr would train on."""
    kept, trees, read, block = [], [], 0, []
    for row in rows:
        block.append(row)
        if len(block) == BLOCK:
            read += _keep(block, tokenizer, max_length, kept, trees)
            block = []
            if len(kept) >= wanted:
                break
    read += _keep(block, tokenizer, max_length, kept, trees)
    return Rows(kept[:wanted], trees[:wanted], read)


def _keep(
    block: list[dict[str, Any]],
    tokenizer: Any,
    max_length: int | None,
    kept: list,
    trees: list[Tree],
) -> int:
    if not block:
        return 0
    row_format = find_format(list(block[0]))
    columns = {name: [row.get(name) for row in block] for name in row_format.columns}
    examples = read_batch(columns, range(len(block)), row_format)
    encoded = iter(encode(tokenizer, [e for e in examples if not isinstance(e, Skipped)]))
    for row, example in zip(block, examples, strict=True):
        if isinstance(example, Skipped):
            continue
        ids = next(encoded)
        if (ids := _fitting(ids, max_length)) is not None:
            trees.append(Tree(len(trees), ids.prompt_ids, ids.completions))
            kept.append(row)
    return len(block)


def _fitting(ids: Encoded, max_length: int | None) -> Encoded | None:
    if max_length is not None and len(ids.prompt_ids) >= max_length:
        return None
    ids = cut(ids, max_length)
    empty = any(len(c) == 0 for c in ids.completions)
    return None if empty or np.array_equal(*ids.completions) else ids


def counted_tokens(trees: list[Tree]) -> int:
    """Tokens without padding, the prompt once per completion: the same number for every
    provider."""
    return sum(len(t.completions) * len(t.prompt_ids) + sum(map(len, t.completions)) for t in trees)
