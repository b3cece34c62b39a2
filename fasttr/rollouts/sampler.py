"""Samples of a model for a file of prompts, batched through transformers' own generation."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from fasttr.data.formats import Messages, read_prompt
from fasttr.data.sources import FILE_KINDS, read_rows
from fasttr.data.tokens import encode_texts
from fasttr.errors import FasttrError
from fasttr.models.load import load_model, load_tokenizer
from fasttr.models.packed import PackedModel


class Sampling(NamedTuple):
    """How completions are drawn."""

    max_new_tokens: int = 256
    temperature: float = 1.0  # 0: the most likely token each time
    num_samples: int = 1  # for each prompt
    seed: int = 42

    def check(self) -> None:
        for key in ("max_new_tokens", "num_samples"):
            if getattr(self, key) < 1:
                raise FasttrError(f"{key}: got {getattr(self, key)}; wanted a whole number from 1")
        if not 0 <= self.temperature < float("inf"):
            raise FasttrError(
                f"temperature: got {self.temperature}; wanted a number from 0 (0 takes the "
                "likeliest)"
            )
        if self.temperature == 0 and self.num_samples > 1:
            raise FasttrError(
                "num_samples: all are the same at temperature 0; wanted 1, or a temperature above 0"
            )


def sample_file(
    model_name_or_path: str,
    prompts: str | Path,
    samples_file: str | Path,
    *,
    sampling: Sampling,
    batch_size: int = 16,
    use_cpu: bool = False,
    bf16: bool | None = None,
    disable_tqdm: bool = False,
) -> int:
    """Write JSON lines of prompt, sample (0..), completion, tokens and finished (it ended by
    itself); return how many.

    `prompts`: rows with a column `prompt`, text or messages (.json, .jsonl, .parquet, .gz too); of
    any other file each line that is not blank. Lines are written as they are made into
    `SAMPLES_FILE.partial`, which gets the name `samples_file` once it is complete. Batch k draws
    from seed + k. Messages go through the chat template.
    """
    sampling.check()
    if batch_size < 1:
        raise FasttrError(f"batch_size: got {batch_size}; wanted a whole number from 1")
    asked = read_prompts(prompts)
    device = torch.device("cuda" if torch.cuda.is_available() and not use_cpu else "cpu")
    tokenizer = load_tokenizer(model_name_or_path)
    ids = encode_prompts(tokenizer, asked, str(prompts))
    model = load_model(
        model_name_or_path, device=device, bf16=device.type == "cuda" if bf16 is None else bf16
    )
    limit = model.model.config.max_position_embeddings - sampling.max_new_tokens
    too_long = next((i for i, prompt in enumerate(ids) if len(prompt) > limit), None)
    if too_long is not None:
        raise FasttrError(
            f"max_new_tokens: prompt {too_long} (counted from 0) has {len(ids[too_long])} tokens, "
            "and with "
            f"{sampling.max_new_tokens} new ones it is longer than the model's positions allow; "
            "shorten one of them"
        )
    path, written = Path(samples_file), 0
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with (
            partial.open("w", encoding="utf-8", buffering=1) as file,
            tqdm(
                total=len(ids) * sampling.num_samples,
                desc="Sampling",
                unit="sample",
                disable=disable_tqdm or None,
            ) as bar,
        ):
            for first in range(0, len(ids), batch_size):
                here = slice(first, first + batch_size)
                drawn = draw(
                    model,
                    tokenizer,
                    ids[here],
                    sampling._replace(seed=sampling.seed + first // batch_size),
                )
                for prompt, samples in zip(asked[here], drawn, strict=True):
                    for k, sample in enumerate(samples):
                        line = {"prompt": prompt, "sample": k, **sample._asdict()}
                        del line["ids"]
                        file.write(json.dumps(line, ensure_ascii=False) + "\n")
                        written += 1
                        bar.update()
        os.replace(partial, path)
    except OSError as error:
        raise FasttrError(f"samples_file: cannot write {path}: {error}") from error
    return written


def read_prompts(path: str | Path) -> list[str | Messages]:
    """Prompts of a data file (column `prompt`) or of the lines of a text file. FasttrError names
    the row at fault."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise FasttrError(
            f"prompts: {path} does not exist; wanted a file of rows with a prompt, or of lines of "
            "text"
        )
    if Path(path.name.removesuffix(".gz")).suffix.lower() in FILE_KINDS:
        rows = read_rows(str(path))
        if "prompt" not in rows.column_names:
            raise FasttrError(
                f"prompts: {path} has no column 'prompt': it has {', '.join(rows.column_names)}"
            )
        try:
            return [
                read_prompt(i, prompt) for i, prompt in enumerate(rows.with_format(None)["prompt"])
            ]
        except FasttrError as error:
            raise FasttrError(f"prompts: {path}: {error}") from error
    try:
        lines = [line for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise FasttrError(f"prompts: cannot read {path}: {error}") from error
    if not lines:
        raise FasttrError(f"prompts: {path} holds no line of text; wanted one prompt a line")
    return list(lines)


def encode_prompts(
    tokenizer: Any, prompts: Sequence[str | Messages], name: str = "prompts"
) -> list[np.ndarray]:
    """Token ids: text as the tokenizer's call has it (BOS included), messages as its chat template
    writes them."""
    if any(not isinstance(prompt, str) for prompt in prompts) and not tokenizer.chat_template:
        raise FasttrError(
            f"prompts: {name} holds messages, but the tokenizer has no chat template; give plain "
            "text"
        )
    ids: list[np.ndarray] = []
    for i, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            ids += encode_texts(tokenizer, [prompt], add_special_tokens=True)
            continue
        try:
            text = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
        except Exception as error:  # a template is a program: it raises whatever it likes
            told = " ".join(str(error).split())[:300]
            raise FasttrError(
                f"prompts: {name}: the chat template refuses prompt {i}: {told}"
            ) from error
        ids += encode_texts(tokenizer, [text], add_special_tokens=False)
    empty = next((i for i, prompt in enumerate(ids) if len(prompt) == 0), None)
    if empty is not None:
        raise FasttrError(
            f"prompts: {name}: prompt {empty} (counted from 0) has no tokens; wanted at least one"
        )
    return ids


class Sample(NamedTuple):
    """One completion."""

    completion: str  # without special tokens
    tokens: int  # the one that ended it included
    finished: bool  # it ended by itself
    ids: np.ndarray  # (tokens,) int32


@torch.no_grad()
def draw(
    model: PackedModel, tokenizer: Any, prompts: Sequence[np.ndarray], sampling: Sampling
) -> list[list[Sample]]:
    """`num_samples` completions for each tokenised prompt, in one batch. The caller's random state
    is left as it was.

    A completion ends at the tokenizer's EOS or at those of the model's own generation config.
    """
    own = model.model
    ends = _end_ids(own, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (ends or [0])[0]
    width = max(map(len, prompts))
    input_ids = torch.full((len(prompts), width), pad)
    mask = torch.zeros(len(prompts), width, dtype=torch.long)
    for i, prompt in enumerate(prompts):
        input_ids[i, width - len(prompt) :] = torch.from_numpy(prompt.astype(np.int64))
        mask[i, width - len(prompt) :] = 1
    how: dict[str, Any] = {"do_sample": False}
    if sampling.temperature > 0:
        how = {"do_sample": True, "temperature": sampling.temperature, "top_k": 0, "top_p": 1.0}
    devices = [model.device] if model.device.type == "cuda" else []
    with (
        _generating(own),
        torch.random.fork_rng(devices=devices),
        torch.autocast(model.device.type, torch.bfloat16, enabled=model.bf16),
    ):
        torch.manual_seed(sampling.seed)
        rows = own.generate(
            input_ids=input_ids.to(model.device),
            attention_mask=mask.to(model.device),
            **how,
            max_new_tokens=sampling.max_new_tokens,
            num_return_sequences=sampling.num_samples,
            pad_token_id=pad,
            eos_token_id=ends or None,
        )
    samples = []
    for row in rows[:, width:].cpu().numpy().astype(np.int32):
        stops = np.flatnonzero(np.isin(row, ends))
        row = row[: stops[0] + 1] if len(stops) else row
        samples.append(
            Sample(tokenizer.decode(row, skip_special_tokens=True), len(row), len(stops) > 0, row)
        )
    return [
        samples[i : i + sampling.num_samples] for i in range(0, len(samples), sampling.num_samples)
    ]


def _end_ids(model: Any, tokenizer: Any) -> list[int]:
    own = model.generation_config.eos_token_id
    ends = [*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id]
    return list(dict.fromkeys(end for end in ends if end is not None))


@contextlib.contextmanager
def _generating(model: Any) -> Iterator[None]:
    """Within, the model attends as transformers does, with a cache, and is not in training mode."""
    packed, training = model.config._attn_implementation, model.training
    # SDPA has no soft cap on attention scores and would leave it out.
    model.set_attn_implementation(
        "eager" if getattr(model.config, "attn_logit_softcapping", None) else "sdpa"
    )
    model.eval()
    try:
        yield
    finally:
        model.set_attn_implementation(packed)
        model.train(training)
