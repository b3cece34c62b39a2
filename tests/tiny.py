"""Small models and trees that the tests share."""

from __future__ import annotations

import copy

import numpy as np
import torch

from fasttr.batch import Tree
from fasttr.models import attention
from fasttr.models.packed import HeadSpec, PackedModel

VOCAB = 97
WINDOW = 5


def tiny_config(arch: str, **overrides):
    """A two-layer config of `arch` whose features (windows, soft caps, partial rotary, tied heads)
    are all on."""
    from transformers import AutoConfig

    common = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    special = {
        "llama": {},
        "qwen2": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
        "qwen3": {"head_dim": 8, "tie_word_embeddings": True},
        "mistral": {"sliding_window": WINDOW, "head_dim": 8},
        "gemma2": {
            "sliding_window": WINDOW,
            "head_dim": 8,
            "query_pre_attn_scalar": 8,
            "layer_types": ["sliding_attention", "full_attention"],
            "final_logit_softcapping": 3.0,
            "attn_logit_softcapping": 2.0,
        },
        "gemma3_text": {
            "sliding_window": WINDOW,
            "head_dim": 8,
            "query_pre_attn_scalar": 8,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        "phi3": {"sliding_window": WINDOW},
        "olmo2": {},
        "gpt_neox": {"rotary_pct": 0.25, "num_key_value_heads": None},
    }[arch]
    values = {
        key: value for key, value in {**common, **special, **overrides}.items() if value is not None
    }
    return AutoConfig.for_model(arch, **values)


def tiny_model(arch: str = "llama", seed: int = 0, implementation: str = "sdpa", **overrides):
    """A transformers model with random fp32 weights; the same seed gives the same weights for any
    implementation."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    config = tiny_config(arch, **overrides)
    return (
        AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation=implementation)
        .float()
        .train()
    )


def packed(model) -> PackedModel:
    softcap = getattr(model.config, "final_logit_softcapping", None)
    return PackedModel(model, HeadSpec(softcap=softcap), "segments", bf16=False)


def packed_tiny(arch: str = "llama", seed: int = 0, **overrides) -> PackedModel:
    return packed(tiny_model(arch, seed, attention.register(), **overrides))


def perturb(model, scale: float, seed: int = 1) -> None:
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


def alone_logps(model, trees: list[Tree]) -> torch.Tensor:
    """The specification: each completion alone, unpadded, through the model's own forward and a
    plain log-softmax."""
    out = []
    for tree in trees:
        for completion in tree.completions:
            ids = torch.from_numpy(np.concatenate([tree.prompt_ids, completion])).long()[None]
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
            token = torch.log_softmax(logits, -1).gather(1, ids[0, 1:, None])[:, 0]
            start = max(len(tree.prompt_ids) - 1, 0)
            out.append(token[start:].sum())
    return torch.stack(out)


def padded_logps(model, trees: list[Tree]) -> torch.Tensor:
    """All completions in one right-padded batch with an attention mask."""
    rows = [np.concatenate([t.prompt_ids, c]) for t in trees for c in t.completions]
    starts = [max(len(t.prompt_ids) - 1, 0) for t in trees for _ in t.completions]
    longest = max(map(len, rows))
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = torch.from_numpy(row).long(), 1
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
    token = torch.log_softmax(logits, -1).gather(2, ids[:, 1:, None])[..., 0]
    return torch.stack(
        [token[i, s : len(r) - 1].sum() for i, (s, r) in enumerate(zip(starts, rows, strict=True))]
    )


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
