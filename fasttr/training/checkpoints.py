"""The checkpoints of a run: which one it goes on from, and when another is written."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fasttr import files
from fasttr.checkpoint import divided
from fasttr.checkpoint import folder as folders
from fasttr.checkpoint import state as states
from fasttr.config.train_config import TrainConfig
from fasttr.console import say
from fasttr.distributed.ranks import ALONE, Ranks
from fasttr.errors import FasttrError
from fasttr.losses import Loss
from fasttr.metrics import log
from fasttr.packing.plan import Plan
from fasttr.training.callbacks import Callbacks
from fasttr.training.card import model_card
from fasttr.training.facts import write_facts
from fasttr.training.run import PendingCheckpoint, Run

_CONFIG = "train_config.json"
CARD = "README.md"


class Resume(NamedTuple):
    """A checkpoint to go on from."""

    folder: Path
    state: states.RunState


def find_resume(config: TrainConfig, ranks: Ranks = ALONE) -> Resume | None:
    """The checkpoint to go on from, or None for a fresh start in a folder that holds no run."""
    asked, output_dir = config.resume_from_checkpoint, config.output_folder
    if output_dir.exists() and not output_dir.is_dir():
        raise FasttrError(f"output_dir: {output_dir} is a file; wanted a folder")
    for key in ("model_name_or_path", "ref_model_name_or_path"):
        name = getattr(config, key)
        if name is not None and Path(name).resolve() == output_dir.resolve():
            raise FasttrError(
                f"output_dir: {output_dir} is {key} too, and its weights would be replaced; wanted "
                "another folder"
            )
    files.remove_torn(output_dir, "checkpoint-*")
    folders.remove_torn_final(output_dir)
    share = states.Share(ranks.rank, ranks.world)
    if isinstance(asked, str):
        return Resume(Path(asked), states.read_state(Path(asked), share))
    if asked:
        newest = folders.newest_with_state(output_dir)
        if newest is None and folders.list_checkpoints(output_dir):
            raise FasttrError(
                f"resume_from_checkpoint: no checkpoint in {output_dir} can be resumed from, since "
                "each holds no reference, position or window; pass --overwrite_output_dir true to "
                "start over"
            )
        if newest is None:
            say(
                f"resume_from_checkpoint: {output_dir} holds no checkpoint yet; starting from the "
                "beginning"
            )
            return None
        return Resume(newest, states.read_state(newest, share))
    _require_no_run(config)
    return None


def check_resume(resume: Resume, config: TrainConfig, loss: Loss, plan: Plan) -> None:
    """Raise FasttrError when the checkpoint is of another run than the one that takes it up, or
    what lies in its output folder is."""
    _require_own_folder(resume, config)
    facts = resume.state.facts
    changed = config.differences(facts["config"])
    if changed:
        raise FasttrError(
            f"resume_from_checkpoint: {resume.folder} was made with another configuration "
            f"({'; '.join(changed)}); use the same, or start over in another output_dir"
        )
    now = _name_of(loss)
    if facts.get("loss", now) != now:
        raise FasttrError(
            f"resume_from_checkpoint: {resume.folder} was made with the loss {facts['loss']}; got "
            f"{now}"
        )
    if facts["data"] != plan.trees.fingerprint:
        raise FasttrError(
            f"resume_from_checkpoint: the rows are not those that {resume.folder} was made on"
        )
    if facts["step"] > plan.total_steps:
        raise FasttrError(
            f"max_steps: got {plan.total_steps} steps in all, and {resume.folder} has done "
            f"{facts['step']}; wanted as many or more"
        )
    _check_scored(resume, config, plan)


def take_up(run: Run, resume: Resume) -> None:
    """Put a run where its checkpoint was."""
    states.apply(resume.state, run)
    run.is_resumed = True
    run.saved_step = run.step
    facts = resume.state.facts
    before = facts.get("total_steps", run.plan.total_steps)
    if before != run.plan.total_steps:
        say(
            f"the run was planned for {before} steps and now has {run.plan.total_steps}: its "
            "learning rate follows the new schedule from here on, so it does not equal a run of "
            "that length"
        )
    _take_up_best(run, facts.get("best"))
    if run.patience is not None and facts.get("patience") is not None:
        run.patience.best, run.patience.waited = facts["patience"]
    say(f"resumed from {resume.folder} at step {run.step}")


def own_output_dir(run: Run) -> None:
    """Make the output folder this run's: nothing of another one stays that could be mistaken."""
    with run.ranks.together():
        if run.ranks.is_first:
            _own_output_dir(run)


def _own_output_dir(run: Run) -> None:
    output_dir = run.output_dir
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        files.write_json(output_dir / _CONFIG, run.config.as_dict())
        write_facts(run, output_dir)
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise FasttrError(f"output_dir: cannot write {run.config.output_dir!r}: {error}") from error
    if run.is_resumed:
        folders.supersede_after(output_dir, run.step)
    else:
        folders.remove_checkpoints(output_dir)
    folders.rotate(output_dir, run.config.save_total_limit, best_folder(run))


def is_finished(run: Run) -> bool:
    """Whether the run that was taken up had come to its end, its final model included."""
    (found,) = run.ranks.largest([int(run.ranks.is_first and _is_finished(run))])
    return found == 1


def _is_finished(run: Run) -> bool:
    if not run.is_resumed or run.step < run.plan.total_steps:
        return False
    last = log.last_line(run.output_dir)
    ended = "train_runtime" in last and last["step"] == run.step
    return ended and folders.holds_final(run.output_dir)


def save(run: Run, callbacks: Callbacks) -> Path:
    """Write checkpoint-STEP and return it, unless it was just written."""
    settle(run, callbacks)
    folder = folders.folder_of(run.output_dir, run.step)
    is_there = run.ranks.is_first and run.saved_step == run.step and folder.is_dir()
    if run.ranks.largest([int(is_there)]) == [1]:
        return folder
    return _save(run, callbacks, states.capture(run, _facts(run)))


def save_model_alone(run: Run, callbacks: Callbacks) -> Path:
    """Write checkpoint-STEP without what resuming needs."""
    return _save(run, callbacks, None)


def save_final(run: Run) -> None:
    """The final model: the best checkpoint's where that is asked for, else the policy."""
    best = best_folder(run) if run.config.load_best_model_at_end else None
    if best is not None and not best.is_dir():
        say(f"{best} was the best checkpoint and is gone")
        best = None
    if run.config.load_best_model_at_end:
        if best is None or run.best is None:
            say("no checkpoint was called the best: the final model is the last one")
        else:
            say(f"the final model is {best.name}, the best by {run.best.metric}")
    is_copied = best is not None and not run.config.merge_adapter
    if run.config.merge_adapter and run.policy.adapter is not None:
        if best is not None:
            run.policy.adapter.read(best)
        run.policy.merge_adapter()
    if run.policy.shards is not None and not is_copied:
        divided.save_final(run.output_dir, run.policy, run.tokenizer)
    else:
        with run.ranks.together():
            if is_copied and run.ranks.is_first:
                assert best is not None
                folders.copy_final(best, run.output_dir)
            elif run.ranks.is_first:
                folders.save_final(run.output_dir, run.policy, run.tokenizer)
    if not is_copied:  # the card came with the best checkpoint
        _write_card(run, run.output_dir, model_card(run))


def best_folder(run: Run) -> Path | None:
    if run.best is None or run.best.step is None:
        return None
    return folders.folder_of(run.output_dir, run.best.step)


def _save(run: Run, callbacks: Callbacks, state: states.RunState | None) -> Path:
    settle(run, callbacks)
    if state is not None:
        run.saved_step = run.step
    if run.policy.shards is None:
        with run.ranks.together():
            if run.ranks.is_first:
                folders.save_checkpoint(run.output_dir, run.step, run.policy, run.tokenizer, state)
        return _after(run, callbacks, run.step, model_card(run))
    asked = run.config.save_in_background
    in_background = run.device.type == "cuda" if asked is None else asked
    writing = divided.begin_checkpoint(
        run.output_dir, run.step, run.policy, run.tokenizer, state, in_background
    )
    run.pending = PendingCheckpoint(writing, run.step, model_card(run))
    if not in_background:
        settle(run, callbacks)
    return folders.folder_of(run.output_dir, run.step)


def settle(run: Run, callbacks: Callbacks) -> None:
    """Wait for a checkpoint that is under way and put it into its place."""
    if run.pending is not None:
        pending, run.pending = run.pending, None
        pending.writing.finish()
        _after(run, callbacks, pending.step, pending.card)


def _after(run: Run, callbacks: Callbacks, step: int, card: str) -> Path:
    """What follows when a checkpoint is there."""
    folder = folders.folder_of(run.output_dir, step)
    _write_card(run, folder, card)
    with run.ranks.together():
        if run.ranks.is_first:
            folders.rotate(run.output_dir, run.config.save_total_limit, best_folder(run))
    callbacks.on_save(run, folder)
    return folder


def _write_card(run: Run, folder: Path, card: str) -> None:
    with run.ranks.together():
        if run.ranks.is_first:
            with folders.disk_errors(folder):
                files.write_text(folder / CARD, card)


def _facts(run: Run) -> dict[str, Any]:
    best, patience = run.best, run.patience
    return {
        "config": run.config.as_dict(),
        "loss": _name_of(run.loss),
        "data": run.trees.fingerprint,
        "total_steps": run.plan.total_steps,
        "best": None if best is None or best.step is None else [best.value, best.step],
        "patience": None if patience is None else [patience.best, patience.waited],
    }


def _name_of(loss: Loss) -> str:
    """Its settings without the addresses that Python shows of functions: a process has its own."""
    return re.sub(r" at 0x[0-9a-f]+", "", str(loss))


def _check_scored(resume: Resume, config: TrainConfig, plan: Plan) -> None:
    """A run that was made longer may reach rows that its reference has not scored."""
    step = first_unscored(resume, config, plan)
    if step is not None and not reads_reference_again(config):
        raise FasttrError(
            f"max_steps: got {plan.total_steps} steps in all, and the reference that "
            f"{resume.folder} trains against has scored no rows of step {step + 1}; its weights "
            f"are gone: wanted at most {step}, or a new run"
        )


def first_unscored(resume: Resume, config: TrainConfig, plan: Plan) -> int | None:
    """The first step of the window under way whose rows the checkpoint brings no scores of."""
    facts = resume.state.facts
    if not facts["window_scored"] or config.ref_update == "soft":
        return None
    known = resume.state.tensors["scores.rows"].numpy()
    # A later window is scored by the policy as it then is.
    window = next(iter(plan.windows(config.schedule.every, start=facts["step"])), range(0))
    steps = range(facts["step"], window.stop)
    return next((s for s in steps if not np.isin(plan.rows(s), known).all()), None)


def reads_reference_again(config: TrainConfig) -> bool:
    """Whether the reference of a run is a folder or hub id that can be read once more."""
    is_named = bool(config.ref_model_name_or_path or config.model_name_or_path)
    return config.ref_update == "none" and is_named and not config.use_peft


def _require_own_folder(resume: Resume, config: TrainConfig) -> None:
    """A checkpoint that lies elsewhere is gone on from in an empty folder, or again in the one that
    the same run had begun: not over another run's log and model."""
    if resume.folder.resolve().parent == config.output_folder.resolve():
        return
    try:
        begun = json.loads((config.output_folder / _CONFIG).read_text(encoding="utf-8"))
        is_own = not config.differences(begun)
    except (OSError, ValueError, AttributeError, TypeError):  # absent, torn, or of another kind
        is_own = False
    if not is_own:
        _require_no_run(config)


def _take_up_best(run: Run, saved: list[Any] | None) -> None:
    if run.best is None or saved is None:
        return
    run.best.value, run.best.step = saved
    folder = best_folder(run)
    if folder is not None and not folder.is_dir():
        say(f"{folder} was the best checkpoint and is gone: the search for the best starts anew")
        run.best.value = run.best.step = None


def _require_no_run(config: TrainConfig) -> None:
    """A folder that holds a run is not written into without being told to."""
    output_dir = config.output_folder
    if config.overwrite_output_dir:
        return
    found = folders.list_checkpoints(output_dir)
    held = found[-1].name if found else None
    if held is None and (output_dir / log.FILE).exists():
        held = log.FILE
    if held is None and folders.holds_final(output_dir):
        held = "a model"
    if held is not None:
        raise FasttrError(
            f"output_dir: {output_dir} already holds {held}; pass --resume_from_checkpoint true to "
            "go on, --overwrite_output_dir true to start over, or another output_dir"
        )
