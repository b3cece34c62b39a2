"""TRL 1.16's DPO and KTO trainers on our ops.

    from fasttr.integrations.trl import patch

    patch()                 # anywhere before the trainer is made; the script stays as it is

or, with a script that nobody may touch (`dpo` and `kto` are TRL's own):

    python -m fasttr.integrations.trl my_dpo.py --learning_rate 5e-7
    python -m fasttr.integrations.trl dpo --model_name_or_path ... --dataset_name ...

Two things change. Log-probs and statistics of the head, of policy and reference, come from
`fasttr_kernels.linear_logprob`: float32 logits from bf16 products, and on a CPU too the rows of
completions alone. `sync_ref_model` moves the reference by `fasttr_kernels.multi_tensor_lerp_`.
Trainers, data, losses, metrics and arguments are TRL's.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import runpy
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from fasttr_kernels import linear_logprob, multi_tensor_lerp_
from torch import Tensor, nn

from fasttr.errors import FasttrError

VERSION = "1.16"
# TRL's own commands that train on preferences.
SCRIPTS = {"dpo": "trl.scripts.dpo", "kto": "trl.scripts.kto"}
# What TRL's head may be asked for beside log-probs, in the order in which it returns it, and the
# name of each here.
OUTPUTS = {
    "entropy": "entropy",
    "log_sum_sq_probs": "log_sum_squares",
    "mean_logits": "logit_mean",
    "is_top1": "correct",
}
_replaced: list[tuple[Any, str, Any]] = []


def patch() -> None:
    """Put our ops into TRL's DPO and KTO trainers; a second call does nothing.

    Trainers that exist already keep TRL's head. Raises FasttrError where trl is not installed, or
    not of version 1.16.
    """
    if _replaced:
        return
    _check_version()
    callback = importlib.import_module("trl.trainer.callbacks").SyncRefModelCallback
    replacements: list[tuple[Any, str, Any]] = [
        (callback, "_sync_target_model", staticmethod(_move))
    ]
    for name in ("dpo_trainer", "kto_trainer"):
        module = importlib.import_module(f"trl.trainer.{name}")
        head = functools.partial(_add_head, module.add_fused_lm_head)
        replacements.append((module, "add_fused_lm_head", head))
    for owner, name, value in replacements:
        _replaced.append((owner, name, vars(owner)[name]))
        setattr(owner, name, value)


def unpatch() -> None:
    """Undo `patch`; trainers that were made in between keep our head."""
    while _replaced:
        owner, name, before = _replaced.pop()
        setattr(owner, name, before)


@contextlib.contextmanager
def patched() -> Iterator[None]:
    """`patch()` for the time of a block, as a test or a notebook wants it."""
    patch()
    try:
        yield
    finally:
        unpatch()


def _check_version() -> None:
    try:
        found = importlib.metadata.version("trl")
    except importlib.metadata.PackageNotFoundError:
        raise FasttrError("trl is not installed; run pip install trl==1.16.0") from None
    if found.split(".")[:2] != VERSION.split("."):
        raise FasttrError(
            f"trl: got version {found}; wanted {VERSION}, whose trainers this was held to; run pip "
            "install trl==1.16.0, or train without patch()"
        )


class _Rows:
    """Called as TRL's autograd function is, with scored rows alone."""

    @staticmethod
    def apply(
        hidden: Tensor,  # (T, D)
        weight: Tensor,  # (V, D)
        bias: Tensor | None,  # (V,)
        targets: Tensor,  # (T,)
        temperature: float,
        chunk_size: int,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = tuple(OUTPUTS),
    ) -> tuple[Tensor | None, ...]:
        """Log-probs and what `OUTPUTS` names, each (T,), None where it is not asked for."""
        if hasattr(weight, "ds_id"):
            raise FasttrError(
                "fasttr.integrations.trl: got DeepSpeed ZeRO-3, which takes the head's weight away "
                "before the backward; wanted FSDP2, ZeRO-2 or one process; or train without patch()"
            )
        if not torch.is_autocast_enabled(hidden.device.type):
            # As TRL's, whose products are made in the dtype of the hidden states.
            weight = weight.to(hidden.dtype)
            bias = None if bias is None else bias.to(hidden.dtype)
        found = linear_logprob(
            hidden,
            weight,
            targets,
            bias,
            logit_scale=logit_scale / temperature,
            softcap=None if softcap is None else softcap / temperature,
            stats=not {"entropy", "mean_logits", "is_top1"}.isdisjoint(outputs),
            squares="log_sum_sq_probs" in outputs,
        )
        wanted = (
            getattr(found, ours) if name in outputs else None for name, ours in OUTPUTS.items()
        )
        return (found.logp, *wanted)


def _add_head(add_fused_lm_head: Callable[..., None], model: nn.Module, **options: Any) -> None:
    """TRL's forward with a fused head, of which two names mean something else: the function that
    scores rows, and the question whether rows without a label are left out."""
    add_fused_lm_head(model, **options)
    theirs = model.forward.__func__  # type: ignore[attr-defined]
    names = {
        **theirs.__globals__,
        "_ChunkedLogProbFunction": _Rows,
        "_use_triton": _leaves_out_rows,
    }
    ours = types.FunctionType(
        theirs.__code__, names, theirs.__name__, theirs.__defaults__, theirs.__closure__
    )
    ours.__kwdefaults__ = theirs.__kwdefaults__
    # Its signature is read through `__wrapped__`, which stays the model's own forward.
    vars(ours).update(vars(theirs))
    model.forward = types.MethodType(ours, model)  # type: ignore[method-assign]


def _leaves_out_rows(device: torch.device) -> bool:
    return device.type in ("cpu", "cuda")


def _move(model: nn.Module, target_model: nn.Module, alpha: float) -> None:
    multi_tensor_lerp_(target_model.parameters(), model.parameters(), alpha)


def main(argv: list[str]) -> None:
    """Patch, and run a script with the rest of the line as its own."""
    if not argv:
        raise SystemExit(
            "usage: python -m fasttr.integrations.trl SCRIPT.py|dpo|kto [its arguments]"
        )
    try:
        patch()
    except FasttrError as error:
        raise SystemExit(f"fasttr: error: {error}") from None
    sys.argv = argv
    if argv[0] in SCRIPTS:
        runpy.run_module(SCRIPTS[argv[0]], run_name="__main__", alter_sys=True)
        return
    sys.path[0] = str(Path(argv[0]).resolve().parent)
    runpy.run_path(argv[0], run_name="__main__")


if __name__ == "__main__":
    # Under -m this file is `__main__`: the script, and whoever asks, must find the patched one.
    from fasttr.integrations.trl import main as run

    run(sys.argv[1:])
