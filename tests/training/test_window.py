"""The reference's sweep of a window: what is kept of a broken one, and when it is taken up."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fasttr import TrainConfig, train
from fasttr.errors import FasttrError
from fasttr.training import window as windows
from fasttr.training.run import Run
from fasttr.training.setup import Given, setup
from fasttr.training.stopping import StopSignal
from fasttr.training.window import PARTIAL_FILE, SweepStopped, score_window
from tests.killed import resumable
from tests.runs import Asks, evaluations, run, same_weights, settings, stopped_run
from tests.tiny import perturb

WINDOW = range(0, 2)
BOUND = TrainConfig.bound_on_resume()
FREE = ("output_dir", "logging_steps", "max_steps", "dataset_name", "save_total_limit")


class Changed(SimpleNamespace):
    """A configuration of which one setting has another value, whatever the rules say of it."""

    @classmethod
    def of(cls, config: TrainConfig, name: str) -> Changed:
        values = {**config.as_dict(), "resume_from_checkpoint": True}
        values[name] = "another" if name != "resume_from_checkpoint" else True
        more = {"as_dict": lambda: values, "output_folder": config.output_folder}
        return cls(**{**values, **more})


class SignalAfter(StopSignal):
    """A signal that comes while the window's pack number `packs` is scored."""

    def __init__(self, packs: int):
        super().__init__()
        self.left = packs

    @property
    def signum(self) -> int | None:
        self.left -= 1
        return 15 if self.left <= 0 else None

    @signum.setter
    def signum(self, value: int | None) -> None:
        assert value is None


@pytest.fixture
def broken_off(workspace, tmp_path) -> Run:
    """A run whose first sweep was stopped by a signal in its third pack."""
    config = TrainConfig(**settings(workspace, tmp_path, max_tokens_per_batch=100))
    ready = setup(config, Given())
    assert sum(len(ready.plan.packs(step)) for step in WINDOW) > 3
    with pytest.raises(SweepStopped):
        score_window(ready, WINDOW, evaluates=False, stop=SignalAfter(packs=3))
    assert (tmp_path / PARTIAL_FILE).is_file()
    return ready


def said_of_a_new_sweep(run: Run, capsys) -> str:
    """What the same run says when it scores the window from the start; the table is whole."""
    capsys.readouterr()
    score_window(run, WINDOW, evaluates=False, stop=StopSignal())
    rows = np.concatenate([run.plan.rows(step) for step in WINDOW])
    assert not run.window_logps.lacks(rows)
    return capsys.readouterr().out


def partial_again(run: Run, content: bytes) -> None:
    (run.output_dir / PARTIAL_FILE).write_bytes(content)


def is_taken_up(run: Run, partial: bytes, capsys) -> bool:
    """Whether a new sweep begins with what a broken one left; it ends after its first pack."""
    partial_again(run, partial)
    with pytest.raises(SweepStopped):
        score_window(run, WINDOW, evaluates=False, stop=SignalAfter(packs=1))
    return "taking up" in capsys.readouterr().out


def test_a_broken_sweep_is_taken_up_by_the_same_run_alone(broken_off, capsys):
    """Every setting that touches what is computed, in turn, and the weights too."""
    run = broken_off
    config = run.config
    partial = (run.output_dir / PARTIAL_FILE).read_bytes()
    assert len(BOUND) > 40
    assert {"ld_alpha", "beta", "max_length", "train_batch_size"} <= set(BOUND)
    for name in BOUND:
        run.config = Changed.of(config, name)
        assert not is_taken_up(run, partial, capsys), name
    for name in FREE:
        run.config = Changed.of(config, name)
        assert is_taken_up(run, partial, capsys), name
    perturb(run.policy, 1e-3)
    assert not is_taken_up(run, partial, capsys)


def test_what_is_taken_up_is_not_scored_again(broken_off, capsys):
    """Its values, changed here on disk, are those of the window."""
    path = broken_off.output_dir / PARTIAL_FILE
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        key = file.metadata()
    rows = tensors["rows"].numpy()
    assert 0 < len(rows) < 4 * len(WINDOW)
    save_file({**tensors, "logp": tensors["logp"] - 1000}, path, metadata=key)
    broken_off.config = Changed.of(broken_off.config, "resume_from_checkpoint")
    assert f"log-probs of {len(rows)} rows" in said_of_a_new_sweep(broken_off, capsys)
    values = broken_off.window_logps.values
    assert (values[rows] < -1000).all()
    assert np.nanmin(np.delete(values, rows, axis=0)) > -1000
    assert not path.exists()


def test_what_a_kill_left_beside_the_partial_file_goes_with_it(broken_off, capsys):
    beside = broken_off.output_dir / f".{PARTIAL_FILE}.tmp"
    beside.write_bytes(b"half")
    said_of_a_new_sweep(broken_off, capsys)
    assert not beside.exists()


@pytest.mark.parametrize(
    "damage",
    [lambda content: b"", lambda content: bytes(len(content)), lambda content: content[:-9]],
    ids=["empty", "zeros", "cut"],
)
def test_a_broken_partial_file_is_left_out(broken_off, capsys, damage):
    content = (broken_off.output_dir / PARTIAL_FILE).read_bytes()
    partial_again(broken_off, damage(content))
    broken_off.config = Changed.of(broken_off.config, "resume_from_checkpoint")
    assert "cannot be read and is left out" in said_of_a_new_sweep(broken_off, capsys)


def test_a_partial_file_that_cannot_be_written_is_one_line(workspace, tmp_path, monkeypatch):
    ready = setup(TrainConfig(**settings(workspace, tmp_path)), Given())
    monkeypatch.setattr(windows, "PARTIAL_SECONDS", -1.0)

    def full(*_: object, **__: object) -> None:
        raise windows.SafetensorError("No space left on device (os error 28)")

    monkeypatch.setattr(windows, "save_file", full)
    with pytest.raises(FasttrError, match=rf"cannot write .*{PARTIAL_FILE}: No space left"):
        score_window(ready, WINDOW, evaluates=False, stop=StopSignal())
    assert not list(tmp_path.glob(".*"))


def evaluated_late(workspace, output_dir, ref_update: str) -> list[dict]:
    """Evaluations of a run that is resumed at step 2 and asked for one at 3, in a window that had
    none planned."""
    changes = {"ref_update": ref_update, "ref_update_every": 4, "eval_steps": 8, "save_steps": 2}
    values = resumable(workspace, **changes)
    stopped_run(workspace, output_dir, at=2, **values)
    resumed = settings(workspace, output_dir, **values, resume_from_checkpoint=True)
    asks = Asks("evaluate", at=3, may_evaluate=True)
    train(TrainConfig(**resumed), callbacks=[asks])
    return evaluations(output_dir)


def test_a_soft_reference_can_score_the_evaluation_rows_late(workspace, tmp_path):
    """Its weights are still those that the window began with."""
    late = evaluated_late(workspace, tmp_path / "late", "soft")
    planned = {"ref_update": "soft", "ref_update_every": 4, "eval_steps": 3}
    run(workspace, tmp_path / "planned", **resumable(workspace, **planned))
    assert late[0] == evaluations(tmp_path / "planned")[0]
    assert late[0]["step"] == 3


def test_a_hard_reference_cannot_and_says_so(workspace, tmp_path):
    with pytest.raises(FasttrError, match=r"window of step 3, which was scored without it"):
        evaluated_late(workspace, tmp_path, "hard")


def test_a_soft_reference_scores_the_rows_of_a_run_that_was_made_longer(workspace, tmp_path):
    """Windows of 4 steps: the second was scored for 2 of them, and has 4 now."""
    changes = {"ref_update": "soft", "lr_scheduler_type": "constant", "eval_strategy": "no"}
    values = resumable(workspace, **changes)
    run(workspace, tmp_path, **{**values, "max_steps": 6})
    run(workspace, tmp_path, **{**values, "max_steps": 8}, resume_from_checkpoint=True)
    run(workspace, tmp_path / "whole", **{**values, "max_steps": 8})
    assert same_weights(tmp_path, tmp_path / "whole")


def test_a_run_that_lacks_its_final_model_alone_needs_no_reference(workspace, tmp_path):
    """Resumed at its last step, in a window without evaluations, by a callback that may ask."""
    values = resumable(workspace, "hard", eval_delay=100, max_steps=6)
    whole = run(workspace, tmp_path, **values)
    (tmp_path / "model.safetensors").unlink()
    resumed = settings(workspace, tmp_path, **values, resume_from_checkpoint=True)
    asks = Asks("evaluate", at=100, may_evaluate=True)
    ended = train(TrainConfig(**resumed), callbacks=[asks])
    assert ended.steps == whole.steps
    assert same_weights(tmp_path, tmp_path / "checkpoint-6")


def test_a_hard_reference_whose_weights_are_gone_says_how_far_it_reaches(workspace, tmp_path):
    """24 rows, 4 a step: no row of the last two steps of the epoch has been scored."""
    values = resumable(workspace, "hard", ref_update_every=6, save_steps=2)
    run(workspace, tmp_path, **{**values, "max_steps": 4})
    with pytest.raises(FasttrError, match=r"scored no rows of step 5; .*wanted at most 4"):
        run(workspace, tmp_path, **{**values, "max_steps": 6}, resume_from_checkpoint=True)


@pytest.mark.parametrize("named", [False, True])
def test_a_fixed_reference_is_read_again_for_rows_of_a_longer_run(workspace, tmp_path, named):
    values = resumable(workspace, "none", save_steps=2, lr_scheduler_type="constant")
    if named:
        values["ref_model_name_or_path"] = str(workspace / "reference")
    whole = {**values, "max_steps": 6}
    run(workspace, tmp_path / "whole", **whole)
    run(workspace, tmp_path / "longer", **{**values, "max_steps": 4})
    run(workspace, tmp_path / "longer", **whole, resume_from_checkpoint=True)
    assert same_weights(tmp_path / "whole", tmp_path / "longer")
    assert evaluations(tmp_path / "whole")[-1] == evaluations(tmp_path / "longer")[-1]


def test_another_model_in_the_place_of_a_fixed_reference_is_noticed(workspace, tmp_path):
    first = Path(shutil.copytree(workspace / "model", tmp_path / "first"))
    values = resumable(workspace, "none", save_steps=2, model_name_or_path=str(first))
    run(workspace, tmp_path / "out", **{**values, "max_steps": 4})
    shutil.copy(workspace / "reference" / "model.safetensors", first)
    longer = {**values, "max_steps": 6, "resume_from_checkpoint": True}
    with pytest.raises(FasttrError, match=r"first is to score .* gives other log-probs"):
        run(workspace, tmp_path / "out", **longer)


def test_a_fixed_reference_that_has_seen_every_row_reaches_any_step(workspace, tmp_path):
    values = resumable(workspace, "none", eval_strategy="no", save_steps=2)
    run(workspace, tmp_path, **{**values, "max_steps": 6})
    longer = {**values, "max_steps": 8, "resume_from_checkpoint": True}
    assert run(workspace, tmp_path, **longer).steps == 8
