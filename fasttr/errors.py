"""The one exception that a user is meant to read, and the pieces that its messages are made of.

A message says what was got, what is wanted and how to mend it, in one line.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

LONGEST = 300  # characters of somebody else's message that are worth repeating
LONGEST_LIST = 1600  # characters of several reasons in one line


class FasttrError(ValueError):
    """A mistake in the input or the set-up. The command line prints it and exits with status 2."""

    def __init__(self, message: str) -> None:
        # A value from a file or a command line, quoted in the message, may hold line breaks.
        super().__init__(" ".join(message.splitlines()))


def all_of(reasons: Sequence[str]) -> FasttrError:
    """One error that says several things, as far as a line is read to its end."""
    if len(reasons) == 1:
        return FasttrError(reasons[0])
    shown = [f"({number}) {reason}" for number, reason in enumerate(reasons, 1)]
    line = f"{len(reasons)} settings cannot be taken: "
    while len(shown) > 1 and sum(map(len, shown)) > LONGEST_LIST:
        shown.pop()
    left = len(reasons) - len(shown)
    rest = f" ... and {left} more" if left else ""
    return FasttrError(line + " ".join(shown) + rest)


def one_line(error: BaseException) -> str:
    """All of an error's message in one line, or its type where it has none."""
    return " ".join(str(error).split())[:LONGEST] or type(error).__name__


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type: what follows is often a page of advice."""
    lines = str(error).strip().splitlines()
    return lines[0][:LONGEST] if lines else type(error).__name__


def nearest(word: str, words: Iterable[str]) -> str | None:
    """The one of `words` that `word` is likely to be a misspelling of, or None."""
    distances = {candidate: edit_distance(word, candidate) for candidate in words}
    best = min(distances, key=lambda candidate: distances[candidate], default=None)
    # One mistake in a short word, one in every four letters of a long one.
    if best is None or distances[best] > max(1, len(word) // 4):
        return None
    return best


def did_you_mean(word: str, words: Iterable[str]) -> str:
    """` (did you mean ...?)` for the end of a message, or nothing when no word is near."""
    words = list(dict.fromkeys(words))
    near = nearest(word.lower(), words)
    meant = [near] if near is not None else _longer_names(word, words)
    return f" (did you mean {' or '.join(map(repr, meant))}?)" if meant else ""


def _longer_names(word: str, words: Sequence[str]) -> list[str]:
    """Names that begin or end with `word`, such as num_train_epochs for epochs: one or two."""
    found = [
        name
        for name in words
        if re.search(rf"^{re.escape(word)}[_-]|[_-]{re.escape(word)}$", name, re.IGNORECASE)
    ]
    return found if len(found) <= 2 else []


def edit_distance(a: str, b: str) -> int:
    """How many letters must be put in, taken out, replaced or swapped with a neighbour."""
    before: list[int] = []
    row = list(range(len(b) + 1))
    for i, letter in enumerate(a, 1):
        above_that, before, row = before, row, [i]
        for j, other in enumerate(b, 1):
            cost = min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (letter != other))
            swapped = i > 1 and j > 1 and letter == b[j - 2] and a[i - 2] == other
            if swapped:
                cost = min(cost, above_that[j - 2] + 1)
            row.append(cost)
    return row[-1]
