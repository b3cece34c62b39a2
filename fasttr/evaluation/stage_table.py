"""The results of stages as a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def table(results: Sequence[dict[str, Any]]) -> str:
    """A line a stage."""
    lines = [
        "| arm | stage | gold reward | KL to SFT | length | effective pairs | accuracy on its own "
        "pairs: its reward model, the first one |",
        "|---|---|---|---|---|---|---|",
    ]
    for found in results:
        cells = [
            found["arm"],
            str(found["stage"]),
            f"{found['gold']:+.3f} +- {found['gold_stderr']:.3f}",
            f"{found['kl']:.2f}",
            f"{found['length']:.1f}",
            f"{found['ess']:.0f}" if "ess" in found else "",
            f"{found['reward/accuracy']:.2f}, "
            f"{found.get('reward_1/accuracy', found['reward/accuracy']):.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
