"""A reference model that moves, in any transformers `Trainer`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from fasttr_kernels import multi_tensor_lerp_
from torch import Tensor, nn
from transformers import TrainerCallback

from fasttr.errors import FasttrError


class MoveReference(TrainerCallback):
    """reference <- reference + alpha (policy - reference) after every so many optimizer steps
    (TR-DPO, arXiv:2404.09656: soft; with alpha 1 hard), in one sweep with one rounding.

        trainer.add_callback(MoveReference(trainer.ref_model, alpha=0.6, every=64))

    It takes the place of TRL's `sync_ref_model`, and works where a trainer has none, with any
    module that has the policy's parameters by name.

    Args:
        reference: the module that is moved, in place. Its parameters may have another dtype and lie
            on another device than the policy's, and under FSDP2 in equal shards.
        alpha: share of the policy, above 0 and at most 1.
        every: optimizer steps between two moves.
        remainders: keep the 16 bits that a bf16 reference drops beside it (2 bytes a parameter), so
            that its average is the float32 one. Without them a bf16 reference keeps nothing of a
            step that is smaller than half its spacing, 2^-9 of the weight.

    Raises:
        FasttrError: alpha or every out of range; parameters that do not match by name and shape
            (adapters, DeepSpeed ZeRO-3), at the start of training.
    """

    def __init__(
        self, reference: nn.Module, alpha: float = 0.6, every: int = 512, remainders: bool = False
    ) -> None:
        if not 0 < alpha <= 1:
            raise FasttrError(
                f"alpha: got {alpha}; wanted a share of the policy above 0, at most 1"
            )
        if every < 1:
            raise FasttrError(f"every: got {every}; wanted a number of optimizer steps from 1")
        self.reference = reference
        self.alpha = alpha
        self.every = every
        self.moves = 0
        self.remainders = dict(self._remainders()) if remainders else {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        _pairs(self.reference, kwargs["model"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.every:
            return
        pairs = _pairs(self.reference, kwargs["model"])
        multi_tensor_lerp_(
            [reference for _, reference, _ in pairs],
            [policy for _, _, policy in pairs],
            self.alpha,
            remainders=[self.remainders.get(name) for name, _, _ in pairs],
        )
        self.moves += 1

    def _remainders(self) -> Iterator[tuple[str, Tensor]]:
        for name, p in self.reference.named_parameters():
            if p.dtype == torch.bfloat16:
                yield name, torch.zeros_like(p, dtype=torch.int16, requires_grad=False)


# What wraps a module: compile, data parallelism.
WRAPPERS = ("_orig_mod.", "module.")


def _named(module: nn.Module) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, parameter in module.named_parameters():
        for wrapper in WRAPPERS:
            name = name.replace(wrapper, "")
        found[name] = parameter
    return found


def _pairs(reference: nn.Module, policy: nn.Module) -> list[tuple[str, Tensor, Tensor]]:
    """(name, reference, policy) for every parameter of the reference."""
    policies = _named(policy)
    pairs = []
    for name, parameter in _named(reference).items():
        other = policies.get(name)
        if other is None or other.shape != parameter.shape:
            got = "nothing" if other is None else f"shape {tuple(other.shape)}"
            raise FasttrError(
                f"reference: for {name}, {tuple(parameter.shape)}, the policy has {got}; wanted a "
                "reference of the same parameters, whole or in equal shards (with adapters merge "
                "them, or train without; DeepSpeed ZeRO-3 hides shapes: use FSDP2)"
            )
        pairs.append((name, parameter, other))
    return pairs
