"""What the commands that are named as TRL's mean beside the keys that follow them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from fasttr.errors import FasttrError
from fasttr.losses import LOSSES


class Method(NamedTuple):
    """A word of the command line: `fasttr NAME`, as `trl NAME`."""

    name: str
    about: str  # what its help begins with
    defaults: Mapping[str, Any]  # settings where neither a file nor a flag nor a preset has one
    losses: tuple[str, ...]  # names that it may have
    elsewhere: str = ""  # where the others are at home
    # Its token mean is over the whole step, so that micro-batches mean nothing for it.
    averages_the_step: bool = False


_PAIRED = tuple(name for name, loss in LOSSES.items() if not loss.unpaired)
_UNPAIRED = tuple(name for name, loss in LOSSES.items() if loss.unpaired)

METHODS = {
    "train": Method("train", "Train on preferences.", {}, tuple(LOSSES)),
    # TRL keeps pairs whose sides are equal; without them, steps and order would be other ones.
    "dpo": Method(
        "dpo",
        "As trl dpo: train on pairs (prompt, chosen, rejected).",
        {"loss_type": "sigmoid", "drop_identical_sides": False},
        _PAIRED,
        "fasttr kto has the losses of unpaired rows",
    ),
    "kto": Method(
        "kto",
        "As trl kto: train on rows with a verdict (prompt, completion, label), or on pairs taken "
        "apart.",
        {"loss_type": "kto", "train_sampling_strategy": "sequential"},
        _UNPAIRED,
        "fasttr dpo has the losses of pairs",
    ),
    "sft": Method(
        "sft",
        "As trl sft: train on completions of prompts, on conversations (messages), or on the "
        "chosen side of pairs.",
        {"loss_type": "sft", "learning_rate": 2e-5},
        ("sft",),
        "fasttr dpo has the losses of pairs",
        averages_the_step=True,
    ),
}


def check_method(method: Method, settings: Mapping[str, Any]) -> None:
    """Raise FasttrError for settings (the method's defaults among them) that TRL refuses there."""
    losses = settings.get("loss_type")
    for name in [losses] if isinstance(losses, str) else losses or []:
        if name in LOSSES and name not in method.losses:
            raise FasttrError(
                f"loss_type: got {name!r}; fasttr {method.name} has "
                f"{', '.join(method.losses)}; {method.elsewhere}, fasttr train has all"
            )
    strategy = settings.get("train_sampling_strategy")
    if method.name == "kto" and strategy == "random" and losses in ("kto", ["kto"]):
        raise FasttrError(
            "train_sampling_strategy: got random with kto, whose mismatched completions are fixed "
            "by the order of the rows, so that TRL refuses it; wanted sequential, or fasttr train, "
            "where each row keeps its own in any order"
        )
