"""The lines of `bench step`: the same optimizer step, from padded batches to the trainer, each with
what the line above it has.

All lines train one set of weights with one optimizer, so that a large model fits once.
"""

from __future__ import annotations

import contextlib
import copy
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bench import baselines
from bench.shapes import Shape, build
from fasttr.batch import Tree
from fasttr.losses import Sigmoid, group_loss
from fasttr.models.given import pack_model
from fasttr.models.load import ModelConfig
from fasttr.models.packed import PackedModel
from fasttr.optim.adamw import OptimizerConfig

BETA = 0.1
REFERENCE_NOISE = 0.02  # share of a weight: at policy = reference a loss shows no wrong sign
Step = Callable[[], None]


class Outcome(NamedTuple):
    """What a step computed; on the device until it is read."""

    loss: Tensor
    gradient_norm: Tensor

    def as_numbers(self) -> tuple[float, float]:
        return float(self.loss), float(self.gradient_norm)


class Ablation:
    """One model, its optimizer, a live reference and a table of its log-probs, and the steps that
    use them."""

    def __init__(
        self,
        shape: Shape,
        trees: list[Tree],
        device: torch.device,
        *,
        padded_batch: int,
        max_tokens_per_batch: int,
    ):
        self.trees = trees
        self.device = device
        self.padded_batch = padded_batch
        self.budget = max_tokens_per_batch
        self.bf16 = device.type == "cuda"
        self.plain = build(shape, device)
        self.policy = self._packed(self.plain)
        self.plain_reference = build(shape, device).requires_grad_(False)
        _perturb(self.plain_reference, REFERENCE_NOISE)
        self.reference = self._packed(self.plain_reference)
        self.optimizer = OptimizerConfig(learning_rate=1e-6).optimizer(self.plain)
        self.initial = [p.detach().cpu().clone() for p in self.plain.parameters()]
        # Tree by tree: what a sweep of the reference leaves behind.
        scored = [next(baselines.packed_shared([tree], budget=1)) for tree in trees]
        self.ref_logps = torch.stack([self.reference.logps(batch).cpu() for batch in scored])
        self.outcome: Outcome | None = None

    def lines(self) -> dict[str, Callable[[], Step]]:
        """Each makes its step ready."""
        return {
            "padded": lambda: self._padded,
            "packed": lambda: self._packs(baselines.packed_alone, baselines.full_head),
            "prefix sharing": lambda: self._packs(baselines.packed_shared, baselines.full_head),
            "completion-only head": lambda: self._packs(
                baselines.packed_shared, baselines.completion_head
            ),
            "fused loss": lambda: self._fused(self.policy, is_live=True),
            "window cache": lambda: self._fused(self.policy),
            "liger norms": self._with_liger,
            "compile": self._compiled,
        }

    def check(self, step: Step) -> tuple[float, float]:
        """Loss and gradient norm of one step from the initial weights, which come back after it."""
        step()
        assert self.outcome is not None
        with torch.no_grad():
            for parameter, start in zip(self.plain.parameters(), self.initial, strict=True):
                parameter.copy_(start)
        self.optimizer.state.clear()
        return self.outcome.as_numbers()

    def _packed(self, model: Any, **how: Any) -> PackedModel:
        """A twin of `model` whose attention is packed; the weights are the same tensors."""
        config = ModelConfig(
            name="the benchmark's model",
            device=self.device,
            bf16=self.bf16,
            **how,
        )
        return pack_model(twin(model), config)

    def _update(self, loss: Tensor) -> None:
        norm = nn.utils.clip_grad_norm_(self.plain.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.outcome = Outcome(loss, norm)

    def _padded(self) -> None:
        total = torch.zeros((), device=self.device)
        for first in range(0, len(self.trees), self.padded_batch):
            trees = self.trees[first : first + self.padded_batch]
            with torch.no_grad():
                ref_N = baselines.padded_logps(self.plain_reference, trees, self.bf16)
            logp_N = baselines.padded_logps(self.plain, trees, self.bf16)
            loss = baselines.dpo_sum(logp_N, ref_N, BETA) / len(self.trees)
            loss.backward()
            total += loss.detach()
        self._update(total)

    def _packs(self, packs: baselines.Packs, head: baselines.Head) -> Step:
        def step() -> None:
            total = torch.zeros((), device=self.device)
            for batch in packs(self.trees, self.budget):
                with torch.no_grad():
                    ref_N = head(self.reference, batch)
                logp_N = head(self.policy, batch)
                loss = baselines.dpo_sum(logp_N, ref_N, BETA) / len(self.trees)
                loss.backward()
                total += loss.detach()
            self._update(total)

        return step

    def _fused(self, model: PackedModel, *, is_live: bool = False) -> Step:
        def step() -> None:
            total = torch.zeros((), device=self.device)
            for host_batch in baselines.packed_shared(self.trees, self.budget):
                batch = host_batch.to(self.device)
                if is_live:
                    ref_N = self.reference.logps(batch)
                else:
                    ref_N = self.ref_logps[list(batch.rows)].flatten().to(self.device)
                loss_fn = group_loss(Sigmoid(BETA), batch.token_counts, batch.weights)
                out = model(batch, loss_fn, ref_N, normalizer=len(self.trees))
                out.loss.backward()
                total += out.loss.detach()
            self._update(total)

        return step

    def _with_liger(self) -> Step:
        module = sys.modules[type(self.plain).__module__]
        before = dict(vars(module))
        step = self._fused(self._packed(self.plain, use_liger_kernel=True))
        # Liger also replaces functions of the architecture's module, under every other line too.
        replaced = {name: value for name, value in vars(module).items() if before[name] != value}
        _assign(module, {name: before[name] for name in replaced})

        def step_with_liger() -> None:
            with _assigned(module, replaced):
                step()

        return step_with_liger

    def _compiled(self) -> Step:
        return self._fused(self._packed(self.plain, compile=True))


def twin(model: Any) -> Any:
    """A second module over the same parameters and buffers, with a configuration of its own."""
    shared = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, memo={id(tensor): tensor for tensor in shared})


@torch.no_grad()
def _perturb(model: Any, share: float) -> None:
    make = torch.Generator(model.device).manual_seed(1)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=make, device=parameter.device)
        parameter.add_(parameter * noise.mul_(share))


@contextlib.contextmanager
def _assigned(module: Any, values: Mapping[str, Any]) -> Iterator[None]:
    before = {name: getattr(module, name) for name in values}
    _assign(module, values)
    try:
        yield
    finally:
        _assign(module, before)


def _assign(module: Any, values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        setattr(module, name, value)
