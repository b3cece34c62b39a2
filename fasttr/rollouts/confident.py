"""Pairs of samples without a label: a prompt on which most samples agree gives one, its preferred
side from those that agree (RLP-SPG, "Reward Learning on Policy", NAACL 2024).

Legend: m samples of a prompt.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np

# (prompt, texts (m,)) -> (m,) labels, equal for samples that say the same.
Cluster = Callable[[Any, Sequence[str]], Sequence[Hashable]]


def same_text(prompt: Any, texts: Sequence[str]) -> list[str]:
    """Texts that differ in space and case alone are one. Whether two texts mean the same is for a
    model of entailment to say, which is the user's."""
    return [" ".join(text.lower().split()) for text in texts]


def confident_pair(
    labels: Sequence[Hashable], score_m: np.ndarray, share: float, rng: np.random.Generator
) -> tuple[int, int] | None:
    """(preferred, rejected) among m samples: the best by `score_m` of the largest cluster, and any
    of the others. None where that cluster holds no more than `share` of all, or everything."""
    largest, size = Counter(labels).most_common(1)[0]
    others = [place for place, label in enumerate(labels) if label != largest]
    if size <= share * len(labels) or not others:
        return None
    agree = [place for place, label in enumerate(labels) if label == largest]
    best = max(agree, key=lambda place: score_m[place])
    return best, others[int(rng.integers(len(others)))]
