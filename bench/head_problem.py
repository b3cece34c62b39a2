"""A problem for loss heads, laid out as a pack has it, and its truth in fp64.

Legend: T rows, N completions of unequal numbers of rows, V vocabulary, D hidden size. Completions
lie pair by pair: chosen, rejected, chosen, ...
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# Sums over a completion differ by hundreds of nats here: at the usual 0.1 gradients would vanish.
BETA = 1e-3
ENTROPY = 1.5  # nats, of peaked inputs
ROWS_OF_A_COMPLETION = 128
SPREAD_OF_ROWS = 0.4  # standard deviation of the logarithm
BLOCK_ROWS = 512  # of fp64 logits at a time


class Leaf(NamedTuple):
    """What the gradients arrive at."""

    dtype: torch.dtype
    autocast: bool = False  # products in bf16 although the leaves are fp32, as trainers run
    accumulates: bool = False  # a later micro-batch: the weight already has a gradient

    @property
    def compute(self) -> torch.dtype:
        return torch.bfloat16 if self.autocast else self.dtype


LEAVES = {
    "bf16": Leaf(torch.bfloat16),
    "fp32": Leaf(torch.float32),
    "fp32-later": Leaf(torch.float32, accumulates=True),
    "fp32-autocast": Leaf(torch.float32, autocast=True),
    "fp32-autocast-later": Leaf(torch.float32, autocast=True, accumulates=True),
}


class Problem(NamedTuple):
    """Leaves of one case; `ref_hidden` and `ref_weight` are None where the reference's log-probs
    are 0."""

    hidden: Tensor  # (T, D), requires grad
    weight: Tensor  # (V, D), requires grad
    target: Tensor  # (T,)
    lengths: tuple[int, ...]  # (N,) rows of each completion
    ref_hidden: Tensor | None
    ref_weight: Tensor | None
    entropy: float  # mean over rows of the softmax, nats
    leaf: Leaf

    def summed(self, token_T: Tensor) -> Tensor:
        """(N,) sums over the rows of each completion."""
        return torch.stack([part.sum() for part in token_T.split(list(self.lengths))])


def make_problem(
    vocabulary: int,
    dim: int,
    tokens: int,
    *,
    inputs: str = "peaked",
    reference: bool = False,
    device: torch.device,
    leaf: Leaf,
) -> Problem:
    """`inputs`: `flat` are random hidden states (entropy near log V); `peaked` ones lean toward a
    row of the weight, which gives the entropy of a language model."""
    make = torch.Generator(device).manual_seed(tokens + vocabulary)
    weight = torch.randn(vocabulary, dim, generator=make, device=device) * dim**-0.5
    toward = torch.randint(vocabulary, (tokens,), generator=make, device=device)
    noise = torch.randn(tokens, dim, generator=make, device=device)
    lean = _lean_for(ENTROPY, weight, toward, noise) if inputs == "peaked" else 0.0
    hidden = weight[toward] * lean + noise
    # What the model predicts, half of the time; something else otherwise.
    other = torch.randint(vocabulary, (tokens,), generator=make, device=device)
    is_predicted = torch.rand(tokens, generator=make, device=device) < 0.5
    near = torch.randn(tokens, dim, generator=make, device=device) * 0.05
    dtype = leaf.dtype
    # Copies: in fp32 .to() gives the tensor itself, and a leaf must not be another's storage.
    return Problem(
        hidden=hidden.to(dtype, copy=True).requires_grad_(),
        weight=weight.to(dtype, copy=True).requires_grad_(),
        target=torch.where(is_predicted, toward, other),
        lengths=ragged_lengths(tokens),
        ref_hidden=(hidden + near).to(dtype) if reference else None,
        ref_weight=weight.to(dtype) if reference else None,
        entropy=_entropy(weight, hidden),
        leaf=leaf,
    )


def ragged_lengths(tokens: int) -> tuple[int, ...]:
    """Log-normal lengths of whole pairs that sum to `tokens`."""
    pairs = max(1, round(tokens / ROWS_OF_A_COMPLETION / 2))
    share = np.random.default_rng(tokens).lognormal(0.0, SPREAD_OF_ROWS, 2 * pairs)
    lengths = np.maximum(1, np.floor(share / share.sum() * tokens)).astype(int)
    lengths[0] += tokens - lengths.sum()
    return tuple(lengths.tolist())


def _lean_for(entropy: float, weight: Tensor, toward: Tensor, noise: Tensor) -> float:
    """How far hidden states lean toward their row for a softmax of that entropy, by bisection."""
    low, high = 0.0, 100.0
    for _ in range(16):
        middle = (low + high) / 2
        if _entropy(weight, weight[toward[:256]] * middle + noise[:256]) > entropy:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _entropy(weight: Tensor, hidden: Tensor) -> float:
    logp = (hidden[:256] @ weight.t()).log_softmax(-1)
    return float(-(logp.exp() * logp).sum(-1).mean())


def dpo(logp_N: Tensor, ref_logp_N: Tensor | None) -> Tensor:
    """Mean over pairs."""
    ratio = logp_N if ref_logp_N is None else logp_N - ref_logp_N
    return -F.logsigmoid(BETA * (ratio[0::2] - ratio[1::2])).mean()


def kto(logp_N: Tensor, ref_logp_N: Tensor | None) -> Tensor:
    """With its baseline at 0; chosen completions are the desirable ones."""
    rewards = BETA * (logp_N if ref_logp_N is None else logp_N - ref_logp_N)
    desirable = 1 - rewards[0::2].sigmoid()
    undesirable = 1 - (-rewards[1::2]).sigmoid()
    return torch.cat([desirable, undesirable]).mean()


def objective(kind: str, p: Problem, token_logp_T: Tensor, ref_logp_N: Tensor | None) -> Tensor:
    """The loss of an objective from log-probs of tokens: the specification that every head is held
    to."""
    if kind == "cross_entropy":
        return -token_logp_T.mean()
    loss = {"preference": dpo, "kto": kto}[kind]
    return loss(p.summed(token_logp_T), ref_logp_N)


class Gradients(NamedTuple):
    """What a head gave for a problem."""

    loss: Tensor  # ()
    logp: Tensor | None  # (N,) where the head gives it
    hidden: Tensor  # (T, D)
    weight: Tensor  # (V, D)


class Truth:
    """Losses, log-probs and gradients in fp64, a few rows at a time."""

    def __init__(self, problem: Problem):
        self.problem = problem
        self.logp_T = self._token_logp(problem.hidden, problem.weight)
        self.ref_N: Tensor | None = None
        if problem.ref_hidden is not None and problem.ref_weight is not None:
            ref_T = self._token_logp(problem.ref_hidden, problem.ref_weight)
            self.ref_N = problem.summed(ref_T)
        self._known: dict[str, Gradients] = {}

    def error(self, kind: str, found: Gradients) -> dict[str, float]:
        """Relative errors of a head's loss and gradients; of its log-probs the largest, nats."""
        truth = self.of(kind)
        loss = float(truth.loss)
        errors = {
            "loss": abs(float(found.loss) - loss) / max(abs(loss), 1e-3),
            "d_hidden": _relative(found.hidden, truth.hidden),
            "d_weight": _relative(found.weight, truth.weight),
        }
        if found.logp is not None:
            assert truth.logp is not None
            errors["logp_nats"] = float((found.logp.double() - truth.logp).abs().max())
        return errors

    def of(self, kind: str) -> Gradients:
        if kind not in self._known:
            leaf = self.logp_T.clone().requires_grad_()
            loss = objective(kind, self.problem, leaf, self.ref_N)
            (by_token,) = torch.autograd.grad(loss, leaf)
            d_hidden, d_weight = self._products(by_token)
            logp = self.problem.summed(self.logp_T)
            self._known[kind] = Gradients(loss.detach(), logp, d_hidden, d_weight)
        return self._known[kind]

    @torch.no_grad()
    def logit_gradient(self, kind: str, dtype: torch.dtype) -> Tensor:
        """dZ (T, V) of an objective: what the products of a backward are fed."""
        p = self.problem
        leaf = self.logp_T.clone().requires_grad_()
        with torch.enable_grad():
            loss = objective(kind, p, leaf, self.ref_N)
        (by_token,) = torch.autograd.grad(loss, leaf)
        out = torch.empty(len(p.hidden), len(p.weight), dtype=dtype, device=p.hidden.device)
        for rows in _blocks(len(p.hidden)):
            z = p.hidden[rows].float() @ p.weight.float().t()
            out[rows] = _by_logits(z, p.target[rows], by_token[rows]).to(dtype)
        return out

    @torch.no_grad()
    def _token_logp(self, hidden: Tensor, weight: Tensor) -> Tensor:
        wide = weight.double()
        parts = []
        for rows in _blocks(len(hidden)):
            logp = (hidden[rows].double() @ wide.t()).log_softmax(-1)
            parts.append(logp.gather(1, self.problem.target[rows, None])[:, 0])
        return torch.cat(parts)

    @torch.no_grad()
    def _products(self, by_token: Tensor) -> tuple[Tensor, Tensor]:
        p = self.problem
        wide = p.weight.double()
        d_hidden = torch.empty_like(p.hidden, dtype=torch.float32)
        d_weight = torch.zeros_like(wide)
        for rows in _blocks(len(p.hidden)):
            hidden = p.hidden[rows].double()
            dz = _by_logits(hidden @ wide.t(), p.target[rows], by_token[rows])
            d_hidden[rows] = (dz @ wide).float()
            d_weight.addmm_(dz.t(), hidden)
        return d_hidden, d_weight.float()


def _by_logits(z: Tensor, target: Tensor, by_token: Tensor) -> Tensor:
    """The gradient by logits: (onehot - softmax) times that by log-probs of tokens."""
    dz = z.softmax(-1).neg_()
    dz.scatter_add_(1, target[:, None], torch.ones_like(dz[:, :1]))
    return dz.mul_(by_token[:, None].to(dz.dtype))


def _blocks(rows: int) -> Sequence[slice]:
    return [slice(start, start + BLOCK_ROWS) for start in range(0, rows, BLOCK_ROWS)]


def _relative(found: Tensor, truth: Tensor) -> float:
    return float((found.float() - truth).norm() / truth.norm())
