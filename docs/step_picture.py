"""The first page's picture: what one step computes, position by position.

python -m docs.step_picture docs/site/step.png
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

from bench.lengths import make_trees, packed_tokens
from fasttr.batch import Tree

PAIRS = 8
COLOURS = {"prompt": "#9aa5b1", "chosen": "#3b6fb6", "rejected": "#d98032", "padding": "#eceff2"}


class Positions(NamedTuple):
    padded: int  # every sequence as long as the longest of the batch
    packed: int  # the prompt once, no padding


def trees() -> list[Tree]:
    """Eight pairs with lengths drawn as those of HH-RLHF."""
    return make_trees("hh", PAIRS, vocabulary=1000)


def positions(pairs: list[Tree]) -> Positions:
    return Positions(2 * len(pairs) * longest(pairs), sum(packed_tokens(tree) for tree in pairs))


def longest(pairs: list[Tree]) -> int:
    """Positions of a padded sequence, and here of a line, so that areas compare."""
    return max(len(tree.prompt_ids) + len(ids) for tree in pairs for ids in tree.completions)


def draw(path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.patches import Patch

    pairs = trees()
    count = positions(pairs)
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.2), width_ratios=(1, 1))
    _padded(left, pairs)
    _packed(right, pairs)
    left.set_title(f"padded, as TRL computes it: {count.padded:,} positions", fontsize=10)
    right.set_title(f"packed trees: {count.packed:,} positions", fontsize=10)
    left.set_ylabel("sequences of a batch of 8 pairs", fontsize=8)
    right.set_ylabel("one row, broken into lines", fontsize=8)
    for axis in (left, right):
        axis.set_xlabel("positions", fontsize=8)
        axis.set_yticks([])
        axis.set_xlim(0, longest(pairs))
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.invert_yaxis()
    patches = [Patch(color=colour, label=name) for name, colour in COLOURS.items()]
    figure.legend(handles=patches, loc="lower center", ncols=4, frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0.08, 1, 1))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _padded(axis: Any, pairs: list[Tree]) -> None:
    width = longest(pairs)
    row = 0
    for side, name in enumerate(("chosen", "rejected")):
        for tree in pairs:
            prompt, own = len(tree.prompt_ids), len(tree.completions[side])
            axis.barh(row, width, color=COLOURS["padding"], height=0.8)
            axis.barh(row, prompt, color=COLOURS["prompt"], height=0.8)
            axis.barh(row, own, left=prompt, color=COLOURS[name], height=0.8)
            row += 1


def _packed(axis: Any, pairs: list[Tree]) -> None:
    """One long row, broken into lines."""
    width = longest(pairs)
    start = 0
    for tree in pairs:
        chosen, rejected = tree.completions
        parts = (("prompt", tree.prompt_ids), ("chosen", chosen), ("rejected", rejected))
        for name, ids in parts:
            for first, length in _broken(start, len(ids), width):
                line, place = divmod(first, width)
                axis.barh(line, length, left=place, color=COLOURS[name], height=0.8)
            start += len(ids)
    axis.set_ylim(-0.6, 2 * len(pairs) - 0.4)


def _broken(start: int, length: int, width: int) -> list[tuple[int, int]]:
    """A span as pieces that end where a line ends."""
    pieces = []
    while length:
        piece = min(length, width - start % width)
        pieces.append((start, piece))
        start += piece
        length -= piece
    return pieces


if __name__ == "__main__":
    draw(sys.argv[1])
