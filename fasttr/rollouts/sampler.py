"""Completions of a model for tokenised prompts, in batches, through transformers' own generation.

Legend: B prompts of a batch, L tokens of the longest.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fasttr.data.tokens import Messages, encode_texts
from fasttr.errors import FasttrError, one_line
from fasttr.models.attention import own_attention
from fasttr.models.compiled import uncompiled
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

    def options(self) -> dict[str, Any]:
        """As transformers' generate takes them."""
        fixed = {
            "max_new_tokens": self.max_new_tokens,
            "num_return_sequences": self.num_samples,
        }
        if self.temperature == 0:
            return {**fixed, "do_sample": False}
        return {
            **fixed,
            "do_sample": True,
            "temperature": self.temperature,
            "top_k": 0,
            "top_p": 1.0,
        }


class Sample(NamedTuple):
    """One completion."""

    completion: str  # without special tokens
    tokens: int  # the one that ended it included
    finished: bool  # it ended by itself
    ids: np.ndarray  # (tokens,) int32


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
        else:
            text = _rendered(tokenizer, prompt, f"{name}: the chat template refuses prompt {i}")
            ids += encode_texts(tokenizer, [text], add_special_tokens=False)
        if len(ids[-1]) == 0:
            raise FasttrError(
                f"prompts: {name}: prompt {i} (counted from 0) has no tokens; wanted at least one"
            )
    return ids


@torch.no_grad()
def draw(
    model: PackedModel, tokenizer: Any, prompts: Sequence[np.ndarray], sampling: Sampling
) -> list[list[Sample]]:
    """`num_samples` completions for each tokenised prompt, in one batch.

    The caller's random state is left as it was. A completion ends at the tokenizer's EOS or at
    those of the model's own generation config.
    """
    causal_lm = model.model
    ends = _end_ids(causal_lm, tokenizer)
    pad = tokenizer.pad_token_id
    if pad is None:
        pad = ends[0] if ends else 0
    input_ids_BL, mask_BL = _left_padded(prompts, pad)
    devices = [model.device] if model.device.type == "cuda" else []
    # Every token reads all weights: what must be cast is cast once for all of them.
    autocast = model.autocast(keeps_copies=True)
    with _generating(causal_lm), torch.random.fork_rng(devices=devices), autocast:
        torch.manual_seed(sampling.seed)
        rows = causal_lm.generate(
            input_ids=input_ids_BL.to(model.device),
            attention_mask=mask_BL.to(model.device),
            pad_token_id=pad,
            eos_token_id=ends or None,
            **sampling.options(),
        )
    drawn = rows[:, input_ids_BL.shape[1] :].cpu().numpy().astype(np.int32)
    samples = [_sample(tokenizer, ids, ends) for ids in drawn]
    starts = range(0, len(samples), sampling.num_samples)
    return [samples[start : start + sampling.num_samples] for start in starts]


def _rendered(tokenizer: Any, messages: Messages, refused: str) -> str:
    try:
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    except Exception as error:  # a template is a program: it raises whatever it likes
        raise FasttrError(f"prompts: {refused}: {one_line(error)}") from error


def _left_padded(prompts: Sequence[np.ndarray], pad: int) -> tuple[Tensor, Tensor]:
    """(B, L) ids that end together, and 1 where there is a token."""
    longest = max(map(len, prompts))
    input_ids = torch.full((len(prompts), longest), pad)
    mask = torch.zeros(len(prompts), longest, dtype=torch.long)
    for i, prompt in enumerate(prompts):
        input_ids[i, longest - len(prompt) :] = torch.from_numpy(prompt.astype(np.int64))
        mask[i, longest - len(prompt) :] = 1
    return input_ids, mask


def _sample(tokenizer: Any, ids: np.ndarray, ends: Sequence[int]) -> Sample:
    """A completion up to the token that ended it."""
    stops = np.flatnonzero(np.isin(ids, ends))
    if len(stops):
        ids = ids[: stops[0] + 1]
    text = tokenizer.decode(ids, skip_special_tokens=True)
    return Sample(text, len(ids), len(stops) > 0, ids)


def _end_ids(causal_lm: Any, tokenizer: Any) -> list[int]:
    own = causal_lm.generation_config.eos_token_id
    ends = [*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id]
    return list(dict.fromkeys(end for end in ends if end is not None))


@contextlib.contextmanager
def _generating(causal_lm: Any) -> Iterator[None]:
    """Within, the model attends as transformers does, with a cache, and is not in training mode.

    What its folder says of sampling is not read: with a penalty of repetition, say, samples would
    be of another distribution than the one whose log-probs are taken.
    """
    from transformers import GenerationConfig

    packed, training = causal_lm.config._attn_implementation, causal_lm.training
    folders = causal_lm.generation_config
    causal_lm.set_attn_implementation(own_attention(causal_lm))
    causal_lm.eval()
    causal_lm.generation_config = GenerationConfig()
    try:
        with uncompiled(causal_lm):
            yield
    finally:
        causal_lm.generation_config = folders
        causal_lm.set_attn_implementation(packed)
        causal_lm.train(training)
