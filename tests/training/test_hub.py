"""Uploads to the hub, against a stand-in server: what is sent, when, and what a failure says."""

from __future__ import annotations

import json
import threading

import pytest

from fasttr.errors import FasttrError
from tests.runs import run
from tests.training.hub_server import HubServer


@pytest.fixture
def hub(monkeypatch):
    from huggingface_hub import constants

    server = HubServer()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", server.address)
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def pushing_run(workspace, tmp_path, **changes):
    saving = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "push_to_hub": True}
    return run(workspace, tmp_path / "out", **{"hub_token": "mine", **saving, **changes})


def test_the_final_model_is_uploaded_without_the_state_of_the_run(hub, workspace, tmp_path):
    pushing_run(workspace, tmp_path, hub_strategy="end", hub_model_id="group/model")
    (commit,) = hub.commits
    assert (commit.repository, commit.revision) == ("group/model", "main")
    assert commit.message == "End of training"
    assert hub.tokens == {"mine"}
    assert commit.files["model.safetensors"] == (tmp_path / "out/model.safetensors").read_bytes()
    assert {"config.json", "tokenizer.json", "metrics.jsonl"} <= commit.files.keys()
    assert not [name for name in commit.files if "checkpoint" in name or name.startswith("fasttr")]
    assert not [name for name in commit.files if name.startswith(".")]


def test_every_save_uploads_the_model_of_that_step(hub, workspace, tmp_path):
    pushing_run(workspace, tmp_path, hub_private_repo=True, hub_always_push=True)
    assert hub.repositories == {"someone/out": hub.repositories["someone/out"]}
    assert hub.repositories["someone/out"]["visibility"] == "private"
    by_message = {commit.message: commit.files for commit in hub.commits}
    assert set(by_message) == {
        "Training in progress, step 1",
        "Training in progress, step 2",
        "End of training",
    }
    first = tmp_path / "out" / "checkpoint-1" / "model.safetensors"
    assert by_message["Training in progress, step 1"]["model.safetensors"] == first.read_bytes()
    assert not [name for files in by_message.values() for name in files if "state.json" in name]
    assert not list((tmp_path / "out").glob(".*push"))


@pytest.mark.parametrize(
    ("strategy", "folder"), [("checkpoint", "last-checkpoint"), ("all_checkpoints", "checkpoint-1")]
)
def test_a_checkpoint_is_uploaded_whole_beside_the_model(
    hub, workspace, tmp_path, strategy, folder
):
    pushing_run(
        workspace, tmp_path, max_steps=1, hub_strategy=strategy, hub_revision="v1", save_steps=1
    )
    assert hub.branches == ["v1"]
    assert {commit.revision for commit in hub.commits} == {"v1"}
    sent = {name for commit in hub.commits for name in commit.files}
    state = f"{folder}/fasttr/state.json"
    assert {state, f"{folder}/model.safetensors", "model.safetensors"} <= sent
    (content,) = [c.files[state] for c in hub.commits if state in c.files]
    written = (tmp_path / "out/checkpoint-1/fasttr/state.json").read_bytes()
    assert content == written
    assert "mine" not in written.decode()  # the token is in no file
    assert json.loads(written)["config"]["hub_token"] is None


def test_what_stops_an_upload_is_one_line(hub, workspace, tmp_path, capsys):
    with pytest.raises(FasttrError, match=r"push_to_hub: cannot make or open the repository 'out'"):
        pushing_run(workspace, tmp_path, hub_token="wrong")
    assert not (tmp_path / "out" / "model.safetensors").exists()
    hub.refused = "Training in progress"
    pushing_run(workspace, tmp_path / "saves")
    assert "WARNING: push_to_hub: an upload failed (" in capsys.readouterr().out
    assert [commit.message for commit in hub.commits] == ["End of training"]
    hub.refused = "End of training"
    with pytest.raises(FasttrError, match=r"the final model could not be uploaded .*; it is in"):
        pushing_run(workspace, tmp_path / "ends", hub_strategy="end")
    assert (tmp_path / "ends" / "out" / "model.safetensors").is_file()


def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch):
    import datasets
    from huggingface_hub import constants

    from fasttr.hub import go_offline_if_unreachable

    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens
    assert go_offline_if_unreachable()
    assert constants.HF_HUB_OFFLINE
    assert datasets.config.HF_HUB_OFFLINE


def test_a_hub_that_answers_is_left_alone(hub):
    from huggingface_hub import constants

    from fasttr.hub import go_offline_if_unreachable

    assert not go_offline_if_unreachable()
    assert not constants.HF_HUB_OFFLINE
