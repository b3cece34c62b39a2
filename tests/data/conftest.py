"""A tokenizer of one token a byte, and a way to load rows with it."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fasttr.data.load import DataConfig, TreeSet, load_trees
from tests.data.rows import write_data


@pytest.fixture(scope="module")
def tokenizer():
    """One token a byte, so that lengths can be counted by hand."""
    alphabet = {token: i for i, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    return tokenizer


@pytest.fixture
def load(tokenizer, tmp_path):
    def load(source, **options) -> TreeSet:
        path = (
            source
            if isinstance(source, str | Path)
            else write_data(tmp_path / "data.jsonl", source)
        )
        return load_trees(
            tokenizer, DataConfig(str(path), cache_dir=str(tmp_path / "cache"), **options)
        )

    return load
