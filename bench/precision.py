"""Error of sequence log-probs against fp64, in nats: `python -m bench.precision`.

Hidden states and weights are bf16 numbers, so that every path starts from the same inputs; hidden
states lean toward one row of the weight, which gives softmax an entropy like that of a language
model; targets are drawn from it.

Legend: T tokens, N completions, V vocabulary, D hidden size.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from fasttr_kernels.logprob import linear_logprob
from torch import Tensor
from torch.nn.functional import linear

VOCABULARIES = {"Pythia": 50304, "Llama-3": 128256, "Qwen3": 151936}


def _ours(dtype: torch.dtype) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return lambda hidden, weight, target: (
        linear_logprob(hidden.to(dtype), weight.to(dtype), target).logp
    )


def _torch(logits: torch.dtype, softmax: torch.dtype) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def path(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        z = linear(hidden.to(logits), weight.to(logits)).to(softmax)
        return z.log_softmax(-1).gather(1, target[:, None])[:, 0]

    return path


PATHS = {
    "linear_logprob, bf16 inputs": _ours(torch.bfloat16),
    "linear_logprob, fp32 inputs": _ours(torch.float32),
    "torch, fp32 throughout": _torch(torch.float32, torch.float32),
    "bf16 logits, fp32 log_softmax": _torch(torch.bfloat16, torch.float32),
    "bf16 logits and log_softmax": _torch(torch.bfloat16, torch.bfloat16),
}


@torch.no_grad()
def completion(
    tokens: int, weight: Tensor, lean: float, make: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, float]:
    """One completion: (hidden, target, fp64 log-prob of each token, mean entropy)."""
    vocab, dim = weight.shape
    toward = torch.randint(vocab, (tokens,), generator=make)
    hidden = lean * weight[toward].float() + torch.randn(tokens, dim, generator=make) * 2
    hidden = hidden.bfloat16()
    logprobs = linear(hidden.double(), weight.double()).log_softmax(-1)
    target = torch.multinomial(logprobs.exp(), 1, generator=make)
    entropy = -(logprobs.exp() * logprobs).sum(-1).mean().item()
    return hidden, target[:, 0], logprobs.gather(1, target)[:, 0], entropy


@torch.no_grad()
def table(
    vocab: int, dim: int, completions: int, tokens: int, lean: float
) -> tuple[dict[str, Tensor], float]:
    """(absolute error of each completion's log-prob by path, mean entropy)."""
    make = torch.Generator().manual_seed(0)
    weight = (torch.randn(vocab, dim, generator=make) / dim**0.5).bfloat16()
    errors: dict[str, list[Tensor]] = {name: [] for name in PATHS}
    entropies = []
    for _ in range(completions):
        hidden, target, exact, entropy = completion(tokens, weight, lean, make)
        entropies.append(entropy)
        for name, path in PATHS.items():
            errors[name].append((path(hidden, weight, target).double().sum() - exact.sum()).abs())
    return {name: torch.stack(e) for name, e in errors.items()}, sum(entropies) / completions


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.precision", description=__doc__)
    parser.add_argument("--hidden_size", type=int, default=256)
    parser.add_argument("--completions", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=300)
    parser.add_argument("--lean", type=float, default=16.0)
    args = parser.parse_args()
    print(
        f"{args.completions} completions of {args.tokens} tokens, D = {args.hidden_size}, "
        f"{torch.get_num_threads()} CPU threads, torch {torch.__version__}"
    )
    print("| V | entropy | path | mean error, nats | worst |")
    print("|---|---|---|---|---|")
    for name, vocab in VOCABULARIES.items():
        errors, entropy = table(vocab, args.hidden_size, args.completions, args.tokens, args.lean)
        for path, error in errors.items():
            print(
                f"| {vocab} ({name}) | {entropy:.1f} | {path} | {error.mean():.1e} | "
                f"{error.max():.1e} |"
            )


if __name__ == "__main__":
    main()
