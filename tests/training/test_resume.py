"""Resumed = uninterrupted, bit for bit, wherever the run was cut off."""

import json
import multiprocessing
import shutil
import signal

import pytest

from fasttr.checkpoint.folder import list_checkpoints
from fasttr.errors import FasttrError
from fasttr.training.window import PARTIAL_FILE
from tests.killed import signalled_run
from tests.runs import lines, run, same_weights, settings, timeless, weights

CHANGES = {
    "save_strategy": "steps",
    "save_steps": 2,
    "max_steps": 8,
    "logging_steps": 3,
    "ref_update_every": 4,
    "eval_strategy": "steps",
    "eval_steps": 3,
    "max_tokens_per_batch": 100,
}


def changes(workspace, ref_update, **more):
    return {
        **CHANGES,
        "ref_update": ref_update,
        "eval_dataset_name": str(workspace / "test.jsonl"),
        **more,
    }


@pytest.fixture(scope="session")
def whole(workspace, tmp_path_factory):
    """An uninterrupted run for each kind of reference."""
    folders = {}
    for ref_update in ("none", "soft", "hard"):
        folders[ref_update] = tmp_path_factory.mktemp("whole") / ref_update
        run(workspace, folders[ref_update], **changes(workspace, ref_update))
    return folders


def signalled(workspace, folder, ref_update, what, calls, signum, after=None):
    """Run in a child that gets a signal; returns its exit status and output."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.killed"])
    output = folder.with_suffix(".txt")
    process = context.Process(
        target=signalled_run,
        args=(
            settings(workspace, folder, **changes(workspace, ref_update)),
            what,
            calls,
            signum,
            output,
            after,
        ),
    )
    process.start()
    process.join(timeout=120)
    return process.exitcode, output.read_text()


def assert_same_run(resumed, uninterrupted):
    assert same_weights(resumed, uninterrupted)
    assert [timeless(line) for line in lines(resumed)] == [
        timeless(line) for line in lines(uninterrupted)
    ]


# With saves every 2 steps and windows of 4, step 6 is in the middle of the second window; the 14th
# pack to be scored belongs to the first sweep, after the evaluation split.
@pytest.mark.parametrize(
    ("what", "calls"), [("step", 6), ("score", 14), ("save", 3), ("rename", 3)]
)
@pytest.mark.parametrize("ref_update", ["none", "soft", "hard"])
def test_killed_then_resumed_is_bitwise_the_uninterrupted_run(
    workspace, tmp_path, whole, ref_update, what, calls
):
    folder = tmp_path / "run"
    status, text = signalled(workspace, folder, ref_update, what, calls, signal.SIGKILL)
    assert status == -signal.SIGKILL, text
    assert not (folder / "model.safetensors").exists()
    run(workspace, folder, **changes(workspace, ref_update, resume_from_checkpoint=True))
    assert_same_run(folder, whole[ref_update])
    assert not list(folder.glob(".*tmp"))


@pytest.mark.parametrize("ref_update", ["soft", "hard"])
def test_killed_while_scoring_a_later_window(workspace, tmp_path, whole, ref_update):
    folder = tmp_path / "run"
    status, text = signalled(
        workspace, folder, ref_update, "score", 2, signal.SIGKILL, folder / "checkpoint-4"
    )
    assert status == -signal.SIGKILL, text
    saved = list_checkpoints(folder)[-1]
    assert saved.name == "checkpoint-4"
    assert json.loads((saved / "fasttr" / "state.json").read_text())["window_scored"] is False
    run(workspace, folder, **changes(workspace, ref_update, resume_from_checkpoint=True))
    assert_same_run(folder, whole[ref_update])


def test_a_first_sweep_that_was_killed_is_taken_up(workspace, tmp_path, whole, capsys):
    folder = tmp_path / "run"
    status, text = signalled(workspace, folder, "none", "score", 14, signal.SIGKILL)
    assert status == -signal.SIGKILL, text
    assert not list_checkpoints(folder)
    assert (folder / PARTIAL_FILE).is_file()
    run(workspace, folder, **changes(workspace, "none", resume_from_checkpoint=True))
    assert "taking up the reference's log-probs of" in capsys.readouterr().out
    assert_same_run(folder, whole["none"])
    assert not (folder / PARTIAL_FILE).exists()


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_stops_with_its_status(workspace, tmp_path, whole, signum):
    folder = tmp_path / "run"
    status, text = signalled(workspace, folder, "hard", "step", 3, signum)
    assert status == 128 + signum, text
    assert "Traceback" not in text
    assert f"saved {folder / 'checkpoint-3'}" in text
    run(workspace, folder, **changes(workspace, "hard", resume_from_checkpoint=True))
    assert same_weights(folder, whole["hard"])


def test_resuming_from_a_named_older_folder(workspace, tmp_path, whole):
    folder = tmp_path / "run"
    shutil.copytree(whole["soft"], folder)
    run(
        workspace,
        folder,
        **changes(workspace, "soft", resume_from_checkpoint=str(folder / "checkpoint-2")),
    )
    assert_same_run(folder, whole["soft"])


def test_save_total_limit_keeps_the_newest(workspace, tmp_path):
    run(workspace, tmp_path, **changes(workspace, "none", save_total_limit=2))
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-6", "checkpoint-8"]


def test_a_folder_that_holds_a_run_is_not_written_over(workspace, tmp_path, whole):
    shutil.copytree(whole["none"], tmp_path / "run")
    with pytest.raises(FasttrError, match="already holds checkpoint-8"):
        run(workspace, tmp_path / "run", **changes(workspace, "none"))
    run(workspace, tmp_path / "run", **changes(workspace, "none", overwrite_output_dir=True))
    assert_same_run(tmp_path / "run", whole["none"])


def test_another_configuration_is_refused_and_named(workspace, tmp_path, whole):
    shutil.copytree(whole["none"], tmp_path / "run")
    with pytest.raises(FasttrError, match=r"another configuration \(beta: 0.1 -> 0.2\)"):
        run(
            workspace,
            tmp_path / "run",
            **changes(workspace, "none", resume_from_checkpoint=True, beta=0.2),
        )


@pytest.mark.parametrize("cut", ["fasttr/optimizer.safetensors", "model.safetensors"])
def test_an_incomplete_checkpoint_is_refused(workspace, tmp_path, whole, cut):
    shutil.copytree(whole["soft"], tmp_path / "run")
    path = tmp_path / "run" / "checkpoint-8" / cut
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(FasttrError, match=f"checkpoint-8 is incomplete: {cut}"):
        run(workspace, tmp_path / "run", **changes(workspace, "soft", resume_from_checkpoint=True))


def test_a_checkpoint_without_a_state_is_passed_over(workspace, tmp_path, whole, capsys):
    shutil.copytree(whole["soft"], tmp_path / "run")
    (tmp_path / "run" / "checkpoint-8" / "fasttr" / "state.json").unlink()
    (tmp_path / "run" / "checkpoint-9").write_text("no folder")
    run(workspace, tmp_path / "run", **changes(workspace, "soft", resume_from_checkpoint=True))
    said = capsys.readouterr().out
    assert "checkpoint-8: it holds no fasttr/state.json" in said
    assert "resumed from" in said
    assert "checkpoint-6 at step 6" in said
    assert_same_run(tmp_path / "run", whole["soft"])


@pytest.mark.parametrize("fails", ["safetensors.torch.save_file", "os.fsync"])
def test_a_full_disk_leaves_the_last_good_checkpoint(
    workspace, tmp_path, whole, monkeypatch, fails
):
    import importlib

    module, name = fails.rsplit(".", 1)
    owner = importlib.import_module(module)
    original = getattr(owner, name)

    def full(*args, **kwargs):
        if (tmp_path / "run" / "checkpoint-4").exists():
            raise OSError(28, "No space left on device")
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, full)
    with pytest.raises(
        FasttrError, match=r"No space left on device.*last good checkpoint is .*checkpoint-4"
    ):
        run(workspace, tmp_path / "run", **changes(workspace, "hard"))
    left = sorted(path.name for path in (tmp_path / "run").iterdir() if "checkpoint" in path.name)
    assert left == ["checkpoint-2", "checkpoint-4"]
    monkeypatch.undo()
    run(workspace, tmp_path / "run", **changes(workspace, "hard", resume_from_checkpoint=True))
    assert_same_run(tmp_path / "run", whole["hard"])


def test_checkpoints_load_in_transformers_as_they_are(whole):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for folder in (whole["soft"], whole["soft"] / "checkpoint-4"):
        model = AutoModelForCausalLM.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert tokenizer.chat_template
        assert model.config.attention_dropout == 0.0
        ids = tokenizer("alpha beta", return_tensors="pt")
        assert torch.isfinite(model(**ids).logits).all()
    assert weights(whole["soft"]).keys() == weights(whole["soft"] / "checkpoint-4").keys()
