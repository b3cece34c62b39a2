"""Samples for a file of prompts."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fasttr.console import Progress
from fasttr.data.reading import read_prompt
from fasttr.data.sources import FILE_KINDS, read_rows
from fasttr.data.tokens import Messages
from fasttr.errors import FasttrError
from fasttr.models.choice import Candidate
from fasttr.models.load import ModelConfig, load_model, tokenizer_of
from fasttr.models.packed import PackedModel
from fasttr.rollouts.sampler import Sample, Sampling, draw, encode_prompts


@dataclass(frozen=True)
class PromptFile:
    """Which prompts to draw for, and where the samples go."""

    prompts: Path  # rows with a column `prompt` (text or messages), or lines of text
    samples_file: Path  # JSON lines
    batch_size: int = 16  # prompts drawn for at once
    disable_tqdm: bool = False


def sample_file(
    model: ModelConfig,
    files: PromptFile,
    sampling: Sampling,
    draw_batch: Callable[..., list[list[Sample]]] = draw,
) -> int:
    """Write JSON lines of prompt, sample (0..), completion, tokens and finished; return how many.

    Lines are written as they are made into `SAMPLES_FILE.partial`, which gets the name
    `samples_file` once it is complete. Batch k draws from seed + k. Messages go through the chat
    template. FasttrError, one line, for what cannot be read, drawn or written.
    """
    sampling.check()
    if files.batch_size < 1:
        raise FasttrError(f"batch_size: got {files.batch_size}; wanted a whole number from 1")
    prompts = read_prompts(files.prompts)
    tokenizer = tokenizer_of(model)
    ids = encode_prompts(tokenizer, prompts, str(files.prompts))
    tier = Candidate.named(model).support.best()
    packed = load_model(dataclasses.replace(model, tier=tier, is_trained=False))
    check_lengths(packed, ids, sampling)
    partial = files.samples_file.with_name(files.samples_file.name + ".partial")
    written = 0
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("w", encoding="utf-8", buffering=1) as file:
            for line in _lines(packed, tokenizer, prompts, ids, files, sampling, draw_batch):
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
                written += 1
        os.replace(partial, files.samples_file)
    except OSError as error:
        raise FasttrError(f"samples_file: cannot write {files.samples_file}: {error}") from error
    return written


def read_prompts(path: str | Path, key: str = "prompts") -> list[str | Messages]:
    """Prompts of a data file (column `prompt`) or of the lines of a text file.

    FasttrError names the setting `key` and the row at fault.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FasttrError(
            f"{key}: {path} does not exist; wanted a file of rows with a prompt, or of lines of "
            "text"
        )
    if Path(path.name.removesuffix(".gz")).suffix.lower() in FILE_KINDS:
        return _prompts_of_rows(path, key)
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise FasttrError(f"{key}: cannot read {path}: {error}") from error
    prompts: list[str | Messages] = [line for line in lines if line.strip()]
    if not prompts:
        raise FasttrError(f"{key}: {path} holds no line of text; wanted one prompt a line")
    return prompts


def _prompts_of_rows(path: Path, key: str) -> list[str | Messages]:
    rows = read_rows(str(path))
    if "prompt" not in rows.column_names:
        raise FasttrError(
            f"{key}: {path} has no column 'prompt': it has {', '.join(rows.column_names)}"
        )
    try:
        column = rows.with_format(None)["prompt"]
        return [read_prompt(row, prompt) for row, prompt in enumerate(column)]
    except FasttrError as error:
        raise FasttrError(f"{key}: {path}: {error}") from error


def check_lengths(
    packed: PackedModel,
    ids: Sequence[np.ndarray],
    sampling: Sampling,
    key: str = "max_new_tokens",
) -> None:
    """Raise FasttrError (naming the setting `key`) where prompt and sample are longer than the
    model's positions allow."""
    positions = getattr(packed.model.config, "max_position_embeddings", None)
    if positions is None:
        return
    for i, prompt in enumerate(ids):
        if len(prompt) + sampling.max_new_tokens > positions:
            raise FasttrError(
                f"{key}: prompt {i} (counted from 0) has {len(prompt)} tokens, and with "
                f"{sampling.max_new_tokens} new ones it is longer than the model's positions "
                "allow; shorten one of them"
            )


def _lines(
    packed: PackedModel,
    tokenizer: Any,
    prompts: Sequence[str | Messages],
    ids: Sequence[np.ndarray],
    files: PromptFile,
    sampling: Sampling,
    draw_batch: Callable[..., list[list[Sample]]],
) -> Iterator[dict[str, Any]]:
    total = len(ids) * sampling.num_samples
    with Progress("sampling", total, "sample", hides_bar=files.disable_tqdm) as bar:
        for batch, first in enumerate(range(0, len(ids), files.batch_size)):
            here = slice(first, first + files.batch_size)
            of_batch = sampling._replace(seed=sampling.seed + batch)
            drawn = draw_batch(packed, tokenizer, ids[here], of_batch)
            for prompt, samples in zip(prompts[here], drawn, strict=True):
                for number, sample in enumerate(samples):
                    yield {
                        "prompt": prompt,
                        "sample": number,
                        "completion": sample.completion,
                        "tokens": sample.tokens,
                        "finished": sample.finished,
                    }
                    bar.update()
