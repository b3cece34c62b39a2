"""The model card (README.md) of a saved folder: what was trained, how, and what it came to."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from fasttr.environment import environment
from fasttr.metrics.ties import without_ties
from fasttr.settings import settings_of
from fasttr.training.facts import data_lines
from fasttr.training.run import Run

# Where a run lies, and what it did to be watched, is nothing of the model.
_UNSAID = ("output_dir", "hub_token", "overwrite_output_dir", "resume_from_checkpoint")
_VERSIONS = ("fasttr", "torch", "transformers", "datasets", "triton")


def model_card(run: Run) -> str:
    """Markdown with the hub's metadata before it."""
    config = run.config
    method = " + ".join(config.loss_names)
    base = config.model_name_or_path or "a model that was handed over"
    lines = [
        "---",
        *hub_metadata(run),
        "---",
        "",
        f"# {config.output_folder.resolve().name}",
        "",
        f"{base}, trained with the loss {method} on {_rows(config)} to step {run.step:,} of "
        f"{run.plan.total_steps:,}, by fasttr. {_reference(run)}",
        "",
        *_evaluation(run),
        "## Data",
        "",
        *(f"    {line}" for line in data_lines(run.trees)),
        "",
        "## Settings",
        "",
        "Those that are not a default:",
        "",
        *_table("setting", _changed(config)),
        "",
        "## Versions",
        "",
        *_table("package", _versions()),
    ]
    return "\n".join(lines) + "\n"


def hub_metadata(run: Run) -> list[str]:
    config = run.config
    lines = [
        f"library_name: {'peft' if config.use_peft else 'transformers'}",
        "tags:",
        *(f"- {tag}" for tag in ("fasttr", *config.loss_names)),
    ]
    # The hub takes its own names alone, no folders of this machine.
    if _is_of_hub(config.model_name_or_path):
        lines.append(f"base_model: {config.model_name_or_path}")
    if _is_of_hub(config.dataset_name):
        lines += ["datasets:", f"- {config.dataset_name}"]
    return lines


def _is_of_hub(name: str | None) -> bool:
    return name is not None and name.count("/") == 1 and not Path(name).exists()


def _rows(config: Any) -> str:
    return str(config.dataset_name or "rows of its own")


def _reference(run: Run) -> str:
    if not run.loss.needs_reference:
        return ""
    config = run.config
    if config.ref_update == "none":
        return "The reference did not move."
    share = f", to {config.ref_update_alpha:g} of the policy" if config.ref_update == "soft" else ""
    return (
        f"The reference moved every {config.ref_update_every} steps ({config.ref_update}{share}), "
        f"{run.reference.updates} times so far."
    )


def _evaluation(run: Run) -> list[str]:
    if not run.last_evaluation:
        return []
    shown = {
        name: f"{value:.4g}"
        for name, value in without_ties(run.last_evaluation).items()
        if not name.endswith("_stderr")
    }
    for name in shown:
        stderr = run.last_evaluation.get(f"{name}_stderr")
        if stderr:
            shown[name] += f" +- {stderr:.2g}"
    return ["## Last evaluation", "", *_table("metric", shown), ""]


def _changed(config: Any) -> dict[str, Any]:
    values = config.as_dict()
    return {
        name: values[name]
        for name, one in settings_of(type(config)).items()
        if name not in _UNSAID and values[name] != one.default
    }


@functools.cache
def _versions() -> dict[str, Any]:
    found = environment()
    versions = {name: found["versions"][name] for name in _VERSIONS}
    return {**versions, "commit of fasttr": found["git_commit"] or "not from a checkout"}


def _table(head: str, values: dict[str, Any]) -> list[str]:
    rows = [f"| {name} | {str(value).replace('|', ' ')} |" for name, value in values.items()]
    return [f"| {head} | |", "|---|---|", *rows]
