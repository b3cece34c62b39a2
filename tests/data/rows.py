"""Rows of data sets, and how they are written and read back."""

from __future__ import annotations

import gzip
import json

import datasets
from transformers import AutoTokenizer

from fasttr.data.load import DataConfig, load_trees

PAIR = {"prompt": "The sky is", "chosen": " blue", "rejected": " black"}
OTHER = {"prompt": "The sun is", "chosen": " warm", "rejected": " far away"}


def say(role, content):
    return {"role": role, "content": content}


CHAT = {
    "prompt": [say("user", "a")],
    "chosen": [say("assistant", "b")],
    "rejected": [say("assistant", "c")],
}


def write_data(path, rows):
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    elif path.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(str(path))
    else:
        path.write_text(text)
    return path


def decoded(tokenizer, trees):
    return [
        (tokenizer.decode(tree.prompt_ids), *map(tokenizer.decode, tree.completions))
        for tree in trees
    ]


def send_fingerprint(sender, path: str, tokenizer: str, cache_dir: str) -> None:
    """What another process makes of the same rows, and of the hash of a text."""
    config = DataConfig(path, cache_dir=cache_dir)
    trees = load_trees(AutoTokenizer.from_pretrained(tokenizer), config)
    sender.send((trees.fingerprint, hash("a text")))
