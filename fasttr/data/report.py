"""What became of the rows of a data set, in the lines that a run prints at its start."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from fasttr.data.arrow import IDENTICAL, MISMATCH, PROMPT_CUT, TRUNCATED, Columns
from fasttr.data.encoder import Shape
from fasttr.data.formats import Status


@dataclass(frozen=True)
class DataReport:
    """What was read, dropped and counted; `str()` is what a run prints at its start."""

    name: str
    split: str
    rows: int  # as read
    kept: int
    truncated: int  # kept rows with a side cut at max_length
    boundary_mismatches: int  # rows whose prompt ids are not a prefix of every side's ids
    max_length: int | None
    dropped: Mapping[str, int] = field(default_factory=dict)  # reason -> rows
    pairs: int | None = None  # of rows that were taken apart
    prompts_cut: int = 0
    identical: int = 0  # kept pairs whose sides are the same tokens
    keeps_end: bool = False  # sides were cut on the left
    hints: tuple[str, ...] = ()  # what a person may want to mend

    @classmethod
    def of(
        cls,
        columns: Columns,
        *,
        name: str,
        split: str,
        shape: Shape,
        hints: Sequence[str] = (),
    ) -> DataReport:
        status = columns.numbers["status"]
        counts = np.bincount(status, minlength=len(Status))
        reasons = [one for one in Status if one is not Status.KEPT and counts[one]]

        def flagged(bit: int) -> int:
            return int(np.count_nonzero(columns.numbers["flags"] & bit))

        return cls(
            name=name,
            split=split,
            rows=len(status),
            kept=int(counts[Status.KEPT]),
            truncated=flagged(TRUNCATED),
            boundary_mismatches=flagged(MISMATCH),
            max_length=shape.max_length,
            keeps_end=shape.keeps_end,
            dropped={one.reason: int(counts[one]) for one in reasons},
            pairs=len(status) // 2 if "read_row" in columns.numbers else None,
            prompts_cut=flagged(PROMPT_CUT),
            identical=flagged(IDENTICAL),
            hints=tuple(hints),
        )

    def lines(self) -> list[str]:
        read = f"read {self.rows} rows of {self.name} ({self.split})"
        if self.pairs is not None:
            read = (
                f"read {self.pairs} pairs of {self.name} ({self.split}), taken apart to "
                f"{self.rows} rows"
            )
        lines = [f"{read}, kept {self.kept}"]
        lines += [f"  dropped {count}: {reason}" for reason, count in self.dropped.items()]
        if self.identical:
            lines.append(
                f"  kept {self.identical} pairs whose sides are the same tokens, as TRL does; they "
                "teach nothing"
            )
        if self.prompts_cut:
            lines.append(f"  cut the first tokens of {self.prompts_cut} prompts")
        if self.truncated:
            lines.append(f"  cut {self.truncated} at max_length {self.max_length}{self._end}")
        if self.boundary_mismatches:
            share = self.boundary_mismatches / self.rows
            lines += [
                f"  boundary: in {self.boundary_mismatches} ({share:.1%}) a prompt's last "
                "characters get other tokens once",
                "    a completion follows; those are trained on as the completion's. A blank at a "
                "prompt's",
                "    end does that: move it to the start of the completions",
            ]
        return lines + [f"  {hint}" for hint in self.hints]

    @property
    def _end(self) -> str:
        return ": their first tokens" if self.keeps_end else ": their last tokens, EOS included"

    def __str__(self) -> str:
        return "\n".join(self.lines())
