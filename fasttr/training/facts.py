"""run.json: what a run was made of, for whoever reads its folder later."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from fasttr import files
from fasttr.batch import TreeSource
from fasttr.environment import environment
from fasttr.training.run import Run

FILE = "run.json"


def write_facts(run: Run, output_dir: Path) -> None:
    files.write_json(output_dir / FILE, facts_of(run))


def facts_of(run: Run) -> dict[str, Any]:
    """Plain JSON values: rows, sizes, device, versions and commit."""
    parameters = list(run.policy.parameters())
    splits = {f"evaluation {name}".strip(): split.trees for name, split in run.splits.items()}
    return {
        "began": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "data": {name: data_lines(one) for name, one in {"training": run.trees, **splits}.items()},
        "total_steps": run.plan.total_steps,
        "steps_per_epoch": run.plan.steps_per_epoch,
        "parameters": sum(p.numel() for p in parameters),
        "trained_parameters": sum(p.numel() for p in parameters if p.requires_grad),
        "processes": run.ranks.world,
        "device": run.device.type,
        "attention_tier": run.policy.tier,
        "environment": environment(),
    }


def data_lines(trees: TreeSource) -> list[str]:
    """What was said of the rows when they were read; of others their number."""
    source = getattr(trees, "source", trees)
    report = getattr(source, "report", None)
    return report.lines() if report is not None else [f"{len(trees)} rows"]
