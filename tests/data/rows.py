"""Rows of data sets, and how they are written and read back."""

from __future__ import annotations

import gzip
import json

import datasets

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
