"""The results of stages as a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

COLUMNS = (
    "arm",
    "stage",
    "episodes",
    "labels",
    "gold reward",
    "beside {first}",
    "KL to SFT",
    "length",
    "effective pairs",
    "accuracy on its own pairs: its reward model, the first one",
)


def table(results: Sequence[dict[str, Any]]) -> str:
    """A line a stage; "beside" is the difference of gold reward to the first arm's after as many
    stages, paired by prompt."""
    first = results[0]["arm"] if results else ""
    lines = [_row([column.format(first=first) for column in COLUMNS]), "|---" * len(COLUMNS) + "|"]
    return "\n".join([*lines, *(_row(_cells(found)) for found in results)])


def _cells(found: dict[str, Any]) -> list[str]:
    first_accuracy = found.get("reward_1/accuracy", found["reward/accuracy"])
    return [
        found["arm"],
        str(found["stage"]),
        str(found["episodes"]),
        str(found["labels"]),
        _with_stderr(found, "gold"),
        _with_stderr(found, "gold_difference") if "gold_difference" in found else "",
        f"{found['kl']:.2f}",
        f"{found['length']:.1f}",
        f"{found['ess']:.0f}" if "ess" in found else "",
        f"{found['reward/accuracy']:.2f}, {first_accuracy:.2f}",
    ]


def _with_stderr(found: dict[str, Any], name: str) -> str:
    return f"{found[name]:+.3f} +- {found[name + '_stderr']:.3f}"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
