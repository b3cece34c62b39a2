"""Children that run on rollouts, or in stages, and kill themselves at a chosen point."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers.models.llama.modeling_llama  # noqa: F401  # what every run would import first

import fasttr.training.loop
import fasttr.training.ocrm
import fasttr.training.ocrm_steps
import fasttr.training.online
import fasttr.training.stages
from fasttr.config.ocrm_config import OcrmConfig
from fasttr.config.online_config import OnlineConfig

# Where stages may be cut off: a module and the function that is counted.
POINTS = {
    "update": (fasttr.training.online, "policy_step"),
    "fit": (fasttr.training.loop, "train_step"),
    "mark": (fasttr.training.stages, "write_json"),
    "score": (fasttr.training.ocrm_steps, "summed_logps"),
    "judge": (fasttr.training.ocrm_steps, "judge"),
    "draw": (fasttr.training.ocrm_steps, "draw_rollout"),
}


class Ended(NamedTuple):
    status: int
    text: str


def vowels(prompts: Any, completions: Any, **columns: Any) -> list[float]:
    """A reward that a random model can raise at once."""
    return [sum(text.count(v) for v in "aeiou") / 4 for text in completions]


def killed_while_generating(values: dict[str, Any], calls: int) -> Ended:
    """A run on rollouts that is killed when its rewards are asked for the `calls`-th time."""
    return _child(_generates, values, calls, log=Path(values["output_dir"]).with_suffix(".txt"))


def killed_in_stages(values: dict[str, Any], what: str, calls: int) -> Ended:
    """Stages that are killed when the named function is entered for the `calls`-th time."""
    return _child(_stages, values, what, calls, log=Path(values["output_dir"]).with_suffix(".txt"))


def _child(target: Any, *arguments: Any, log: Path) -> Ended:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.killed_online"])
    process = context.Process(target=target, args=(*arguments, log))
    process.start()
    process.join(timeout=120)
    assert process.exitcode is not None
    return Ended(process.exitcode, log.read_text())


def _generates(values: dict[str, Any], calls: int, log: Path) -> None:
    _begin(log)
    original, made = vowels, []

    def rewards(prompts: Any, completions: Any, **columns: Any) -> list[float]:
        made.append(1)
        if len(made) == calls:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(prompts, completions)

    rewards.__name__ = "vowels"
    fasttr.training.online.train_online(OnlineConfig(**values), reward_funcs=[rewards])


def _stages(values: dict[str, Any], what: str, calls: int, log: Path) -> None:
    _begin(log)
    owner, name = POINTS[what]
    original, made = getattr(owner, name), []

    def counted(*args: Any, **kwargs: Any) -> Any:
        made.append(1)
        if len(made) == calls:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(owner, name, counted)
    fasttr.training.ocrm.run_ocrm(OcrmConfig(**values))


def _begin(log: Path) -> None:
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
