"""Small models, trees and files of rows that the tests share."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fasttr.batch import Tree
from fasttr.models import attention
from fasttr.models.packed import HeadSpec, PackedModel
from fasttr.packing.tiers import SHARED
from tests.architectures import ARCHITECTURES, COMMON, VOCAB

WORDS = [
    "alpha",
    "beta",
    "gamma",
    "delta",
    "epsilon",
    "zeta",
    "eta",
    "theta",
    "iota",
    "kappa",
    "lambda",
    "omicron",
]


def write_pairs(path: Path, rows: int, seed: int, weights: bool = False) -> Path:
    """Plain preference rows of unequal lengths, one-word completions among them."""
    rng = random.Random(seed)

    def text(low: int, high: int) -> str:
        return " ".join(rng.choice(WORDS) for _ in range(rng.randint(low, high)))

    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        for i in range(rows):
            row: dict[str, Any] = {
                "prompt": text(1, 12) + "?",
                "chosen": " " + text(1, 9),
                "rejected": " " + text(10, 14) + str(i),
            }
            if weights:
                row["weight"] = rng.choice([0.25, 1.0, 2.0])
            file.write(json.dumps(row) + "\n")
    return path


def tiny_config(arch: str, **overrides: Any) -> Any:
    """A config of `arch` of few layers whose features are all on."""
    from transformers import AutoConfig

    values = {**COMMON, **ARCHITECTURES[arch], **overrides}
    return AutoConfig.for_model(arch, **{k: v for k, v in values.items() if v is not None})


def tiny_model(
    arch: str = "llama", seed: int = 0, implementation: str | None = None, **overrides: Any
) -> Any:
    """A transformers model with random fp32 weights; the same seed gives the same weights for any
    implementation."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    config = copy.deepcopy(tiny_config(arch, **overrides))
    model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation)
    return model.float().train()


def packed(model: Any, tier: str = SHARED) -> PackedModel:
    return PackedModel(model, HeadSpec.of(model.config), tier=tier)


def packed_tiny(
    arch: str = "llama", seed: int = 0, tier: str = SHARED, **overrides: Any
) -> PackedModel:
    model = tiny_model(arch, seed, **overrides)
    name = attention.register() if tier == SHARED else attention.own_attention(model)
    model.set_attn_implementation(name)
    return packed(model, tier)


def perturb(model: torch.nn.Module, scale: float, seed: int = 1) -> None:
    """Add noise to every parameter, so that a reference differs from the policy."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))


def random_trees(shapes: list[tuple[int, ...]], seed: int = 0) -> list[Tree]:
    """One tree per shape (prompt length, completion lengths...)."""
    rng = np.random.default_rng(seed)

    def ids(n: int) -> np.ndarray:
        return rng.integers(3, VOCAB, n).astype(np.int32)

    return [Tree(row, ids(p), tuple(ids(c) for c in cs)) for row, (p, *cs) in enumerate(shapes)]


def token_logps(model: Any, prompt_ids: np.ndarray, completion: np.ndarray) -> torch.Tensor:
    """The specification: a completion alone, unpadded, through the model's own forward and a plain
    log-softmax. One number a token; without a prompt nothing predicts the first."""
    ids = torch.from_numpy(np.concatenate([prompt_ids, completion])).long()[None]
    logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
    logp = torch.log_softmax(logits, -1).gather(1, ids[0, 1:, None])[:, 0]
    return logp[max(len(prompt_ids) - 1, 0) :]


def alone_logps(model: Any, trees: list[Tree]) -> torch.Tensor:
    """Summed log-probs of each completion alone, (N,)."""
    sums = []
    for tree in trees:
        for completion in tree.completions:
            sums.append(token_logps(model, tree.prompt_ids, completion).sum())
    return torch.stack(sums)


def padded_logps(model: Any, trees: list[Tree]) -> torch.Tensor:
    """Those of all completions in one right-padded batch with an attention mask, (N,)."""
    rows = [np.concatenate([tree.prompt_ids, c]) for tree in trees for c in tree.completions]
    starts = [max(len(tree.prompt_ids) - 1, 0) for tree in trees for _ in tree.completions]
    longest = max(map(len, rows))
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.from_numpy(row).long()
        mask[i, : len(row)] = 1
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
    logp = torch.log_softmax(logits, -1).gather(2, ids[:, 1:, None])[..., 0]
    ends = [len(row) - 1 for row in rows]
    spans = zip(starts, ends, strict=True)
    return torch.stack([logp[i, start:end].sum() for i, (start, end) in enumerate(spans)])


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
