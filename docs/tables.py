"""The tables of REFERENCE.md, made from the code.

python -m docs.tables REFERENCE.md    # writes the parts between the markers anew
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

from docs import on_policy_tables
from docs.markdown import head, row
from fasttr.cluster.settings import PlanSettings
from fasttr.config.train_config import TrainConfig
from fasttr.config.trl_table import SECTIONS, TABLE
from fasttr.data.formats import find_format
from fasttr.losses import LOSSES
from fasttr.metrics.names import METRICS, SAMPLE_METRICS
from fasttr.settings import settings_of

# (columns of a row, dataset_format, sides, how it is read, accepted by TRL 1.16)
FORMATS: list[tuple[tuple[str, ...], str | None, int, str, bool]] = [
    (
        ("prompt", "chosen", "rejected"),
        None,
        2,
        "pairs; text, or lists of messages through the chat template",
        True,
    ),
    (
        ("chosen", "rejected"),
        None,
        2,
        "pairs; the prompt is what both sides begin with (characters, or turns)",
        True,
    ),
    (
        ("prompt", "completion", "label"),
        None,
        2,
        "unpaired rows with a verdict, for kto and apo_zero_unpaired",
        True,
    ),
    (
        ("prompt", "chosen", "rejected", "tools"),
        None,
        2,
        "tools (a list, or JSON text) reach the template",
        True,
    ),
    (
        ("prompt", "chosen", "rejected", "chat_template_kwargs"),
        None,
        2,
        "a mapping a row reaches the template",
        True,
    ),
    (
        ("chosen", "rejected"),
        "hh_rlhf",
        2,
        "raw transcripts, split at the last Assistant turn, as plain text",
        False,
    ),
    (("conversations", "chosen", "rejected"), None, 2, "pairs under ShareGPT's keys", False),
    (
        ("instruction", "input", "chosen", "rejected"),
        None,
        2,
        "pairs under Alpaca's keys; without `input` too",
        False,
    ),
    (("prompt", "completion"), None, 1, "completions alone, for sft", True),
    (("instruction", "input", "output"), None, 1, "the same under Alpaca's keys", False),
    (("messages",), None, 1, "whole conversations, for sft; also `conversations`", True),
    (
        ("prompt_ids", "chosen_ids", "rejected_ids"),
        None,
        2,
        "pairs of token ids, taken as they are",
        False,
    ),
    (("prompt_ids", "completion_ids", "label"), None, 2, "unpaired rows of token ids", False),
]


def losses_table() -> str:
    """Name, equation and source from each loss's docstring, and what it reads."""
    rows = [
        "| `loss_type` | equation and source | reference | rows | settings beside beta |",
        "|---|---|---|---|---|",
    ]
    for name, cls in LOSSES.items():
        text = " ".join((cls.__doc__ or "").split()).replace("|", "\\|")
        shape = "unpaired" if cls.unpaired else "pairs" if cls.completions == 2 else "chosen alone"
        settings = ", ".join(f"`{f.name}`" for f in dataclasses.fields(cls) if f.name != "beta")
        group = ", in groups" if cls.coupled else ""
        rows.append(
            f"| `{name}` | {text} | {'yes' if cls.needs_reference else 'none'} | {shape}{group} | "
            f"{settings} |"
        )
    return "\n".join(rows)


def formats_table() -> str:
    """Each format as `find_format` understands its columns."""
    rows = ["| columns | `dataset_format` | read as | in TRL 1.16 |", "|---|---|---|---|"]
    for columns, dataset_format, sides, text, in_trl in FORMATS:
        name = find_format(columns, dataset_format=dataset_format, sides=sides).name
        shown = ", ".join(f"`{column}`" for column in columns)
        rows.append(
            f"| {shown} | {dataset_format or ''} | {name}: {text} | {'yes' if in_trl else 'no'} |"
        )
    return "\n".join(rows)


def keys_table() -> str:
    """Every key of TRL and what becomes of it, one section for each place that keys come from."""
    lines = []
    for title, keys in SECTIONS.items():
        lines += [f"**{title}**", "", *head("key", "TRL's default", "here", "")]
        for key in keys:
            here = key.ours if key.kind == "renamed" else key.kind
            default = "none" if key.default is None else json.dumps(key.default)
            lines.append(row(f"`{key.name}`", default, here, key.note))
        lines.append("")
    return "\n".join(lines)


def settings_table() -> str:
    """Every setting of a run, by group."""
    trls = {name for name, key in TABLE.items() if key.kind == "honoured"}
    lines = []
    group = None
    for one in settings_of(TrainConfig).values():
        if one.group != group:
            group = one.group
            lines += ["", f"**{group}**", "", *head("setting", "default", "", "TRL's name")]
        default = "none" if one.default is None else json.dumps(one.default)
        is_trls = "yes" if one.name in trls else ""
        lines.append(row(f"`{one.name}`", default, one.sentence, is_trls))
    return "\n".join(lines[1:])


def metrics_table() -> str:
    """Every metric of metrics.jsonl."""
    lines = head("metric", "meaning", "unit", "when")
    lines += [
        row(f"`{one.name}`", one.meaning, one.unit, one.when) for one in (*METRICS, *SAMPLE_METRICS)
    ]
    return "\n".join(lines)


def plan_table() -> str:
    """The settings of `fasttr plan`."""
    lines = head("setting", "default", "")
    for one in settings_of(PlanSettings).values():
        default = "required" if one.is_required else json.dumps(one.default)
        lines.append(row(f"`{one.name}`", default.replace("null", "none"), one.sentence))
    return "\n".join(lines)


PARTS = {
    "plan": plan_table,
    "losses": losses_table,
    "formats": formats_table,
    "settings": settings_table,
    "metrics": metrics_table,
    "keys": keys_table,
    **on_policy_tables.PARTS,
}


def filled(page: str) -> str:
    """`page` with every part between `<!-- NAME -->` and `<!-- /NAME -->` made anew."""
    for name, make in PARTS.items():
        start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        if start in page:
            before, rest = page.split(start, 1)
            page = before + start + "\n" + make() + "\n" + end + rest.split(end, 1)[1]
    return page


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.write_text(filled(path.read_text()))
