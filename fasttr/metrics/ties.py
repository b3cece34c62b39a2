"""Where policy and reference are equal every pair is a tie, and an accuracy of pairs says nothing.

metrics.jsonl holds what TRL writes there, 0. It is not shown: neither in a line nor in a picture.
"""

from __future__ import annotations

import re
from typing import Any

_ACCURACY = re.compile(r"(?P<start>(eval_(.+_)?)?)(?P<anchor>anchor/)?rewards/accuracies(_stderr)?")


def without_ties(line: dict[str, Any]) -> dict[str, Any]:
    """A line of metrics less the accuracies of which all pairs tie."""
    return {key: value for key, value in line.items() if not _is_of_ties(key, line)}


def _is_of_ties(key: str, line: dict[str, Any]) -> bool:
    match = _ACCURACY.fullmatch(key)
    if match is None:
        return False
    start = match["start"]
    if not match["anchor"]:
        return line.get(f"{start}ref/distance") == 0
    sides = [line.get(f"{start}anchor/logratios/{side}") for side in ("chosen", "rejected")]
    return sides == [0, 0]
