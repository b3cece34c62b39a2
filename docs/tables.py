"""The tables of REFERENCE.md, made from the code: losses, formats of rows, keys.

python -m docs.tables REFERENCE.md    # writes the parts between the markers anew
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

from fasttr.data.formats import find_format
from fasttr.losses import LOSSES

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
    (("prompt", "completion"), None, 1, "completions alone, for sft", False),
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
    """Every key of TRL and what becomes of it."""
    from fasttr.config.trl import markdown

    return markdown()


PARTS = {"losses": losses_table, "formats": formats_table, "keys": keys_table}


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
