"""Shapes of published models, from their config.json, so that a plan needs no network.

Legend: V vocabulary, D hidden size, F width of the MLP, L layers.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple


class Shape(NamedTuple):
    """What decides the shapes of a model's parameters."""

    vocabulary: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    tied: bool = False
    arch: str = "llama"

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    def matrices(self) -> dict[str, tuple[int, int]]:
        """The matrices of one layer, (outputs, inputs)."""
        q = self.heads * self.head_dim
        kv = self.kv_heads * self.head_dim
        if self.arch == "gpt_neox":
            return {
                "query_key_value": (q + 2 * kv, self.hidden),
                "dense": (self.hidden, q),
                "h_to_4h": (self.intermediate, self.hidden),
                "4h_to_h": (self.hidden, self.intermediate),
            }
        return {
            "q": (q, self.hidden),
            "k": (kv, self.hidden),
            "v": (kv, self.hidden),
            "o": (self.hidden, q),
            "gate": (self.intermediate, self.hidden),
            "up": (self.intermediate, self.hidden),
            "down": (self.hidden, self.intermediate),
        }

    def vectors(self) -> list[tuple[int]]:
        """Norms and biases of one layer."""
        if self.arch != "gpt_neox":
            return [(self.hidden,)] * 2
        biases = [(rows,) for rows, _ in self.matrices().values()]
        return [(self.hidden,)] * 4 + biases

    def tensors(self) -> list[tuple[int, ...]]:
        """Shapes of all parameters."""
        embedding = (self.vocabulary, self.hidden)
        last_norm = [(self.hidden,)] * (2 if self.arch == "gpt_neox" else 1)
        layer = [*self.matrices().values(), *self.vectors()]
        return [embedding] * (1 if self.tied else 2) + layer * self.layers + last_norm

    @property
    def layer_weights(self) -> int:
        """Parameters of the matrices of one layer."""
        return sum(rows * columns for rows, columns in self.matrices().values())

    @property
    def head_weights(self) -> int:
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.tensors())

    def init_settings(self) -> dict[str, Any]:
        """What `fasttr init` takes for this shape."""
        settings = {
            "arch": self.arch,
            "hidden_size": self.hidden,
            "num_layers": self.layers,
            "num_heads": self.heads,
            "intermediate_size": self.intermediate,
            "vocab_size": self.vocabulary,
        }
        if self.arch == "gpt_neox":
            return settings
        return settings | {"num_kv_heads": self.kv_heads, "tie_word_embeddings": self.tied}

    def config(self, *, layers: int | None = None) -> Any:
        """A transformers config, without special tokens."""
        from transformers import AutoConfig

        sizes = {
            "vocab_size": self.vocabulary,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers if layers is None else layers,
            "num_attention_heads": self.heads,
            "max_position_embeddings": 4096,
            "tie_word_embeddings": self.tied,
            "pad_token_id": None,
            "bos_token_id": None,
            "eos_token_id": None,
        }
        if self.arch != "gpt_neox":
            sizes |= {"num_key_value_heads": self.kv_heads, "head_dim": self.head_dim}
        return AutoConfig.for_model(self.arch, **sizes)


SHAPES = {
    "qwen2.5-0.5b": Shape(151936, 896, 24, 14, 2, 4864, tied=True),
    "llama-3.2-1b": Shape(128256, 2048, 16, 32, 8, 8192, tied=True),
    "llama-3.2-3b": Shape(128256, 3072, 28, 24, 8, 8192, tied=True),
    "pythia-2.8b": Shape(50304, 2560, 32, 32, 32, 10240, arch="gpt_neox"),
    "pythia-6.9b": Shape(50432, 4096, 32, 32, 32, 16384, arch="gpt_neox"),
    "mistral-7b": Shape(32000, 4096, 32, 32, 8, 14336),
    "llama-3-8b": Shape(128256, 4096, 32, 32, 8, 14336),
    "qwen3-8b": Shape(151936, 4096, 36, 32, 8, 12288),
    "llama-3-70b": Shape(128256, 8192, 80, 64, 8, 28672),
    "llama-3.1-405b": Shape(128256, 16384, 126, 128, 8, 53248),
}
