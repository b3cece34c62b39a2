"""Weights divided among processes give the run of one: each test here fails for some mistake that
loss curves hide, such as layers with half their gradient or weights that never move."""

import json
import signal

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from fasttr.checkpoint.pieces import SavedTensors
from fasttr.checkpoint.state import read_state
from tests.distributed.cases import (
    CASES,
    MOVING,
    assert_same_numbers,
    assert_same_weights,
    case_settings,
    trained,
)
from tests.runs import checkpoint_names, run, settings, steps, timeless
from tests.several import Fault, launched

# Of 4: two copies of two shards each, and one copy among all with fewer rows than ranks.
OF_SHARDS = {2: list(CASES), 4: ["soft", "gradient", "fewer rows than ranks"]}
SHARD_SIZE = {"soft": 2, "gradient": 2}
RESUMED = {
    **MOVING,
    "train_batch_size": 8,
    "max_tokens_per_batch": 100,
    "save_strategy": "steps",
    "save_steps": 4,
    "max_steps": 7,
}


def divided(changes, shard_size=0):
    return {**changes, "shard_size": shard_size}


@pytest.fixture(scope="session")
def sharded(models, tmp_path_factory):
    """All cases by 2 ranks, some by 4; and runs with a checkpoint in the middle of a window."""
    folders = {}
    for world, names in OF_SHARDS.items():
        folder = folders[world] = tmp_path_factory.mktemp(f"shards{world}")
        runs = [
            divided(
                case_settings(models, folder, name), SHARD_SIZE.get(name, 0) if world == 4 else 0
            )
            for name in names
        ]
        if world == 2:
            runs.append(divided(settings(models, folder / "saved", **RESUMED)))
            runs.append(divided({**resumed(models, folder, folder / "saved"), "_watch": "counts"}))
            runs.append(divided(settings(models, folder / "closed", **{**RESUMED, **CLOSED})))
            behind = {**RESUMED, "save_in_background": True, "save_steps": 2}
            runs.append(divided(settings(models, folder / "behind", **behind)))
        else:
            runs.append(divided(resumed(models, folder, folders[2] / "saved")))
        ended = launched(world, runs, folder / "output")
        assert [rank.status for rank in ended] == [0] * world, ended
        assert [rank.text for rank in ended[1:]] == [""] * (world - 1)  # one speaks for all
    return folders


CLOSED = {"save_steps": 3, "max_steps": 6}


def resumed(models, folder, whole):
    changes = {**RESUMED, "resume_from_checkpoint": str(whole / "checkpoint-4")}
    return settings(models, folder / "resumed", **changes)


@pytest.mark.parametrize(
    ("world", "name"), [(world, name) for world, names in OF_SHARDS.items() for name in names]
)
def test_divided_weights_give_the_run_of_one_process(one, sharded, world, name):
    """Under `gradient` the weights move by their gradients, every one of them."""
    assert_same_numbers(one(name), sharded[world] / name, name)


@pytest.mark.slow
def test_compiled_layers_of_divided_weights_give_the_same_run(models, one, tmp_path):
    changes = divided({**case_settings(models, tmp_path, "soft"), "_watch": "compiles"})
    ended = launched(2, [changes], tmp_path / "output")
    assert [rank.status for rank in ended] == [0, 0], ended
    assert "compile: done" in ended[0].text
    assert_same_numbers(one("soft"), tmp_path / "soft", "soft")


def test_every_weight_moves(models, sharded):
    before, after = load_file(models / "model/model.safetensors"), trained(sharded[2] / "gradient")
    assert before.keys() == after.keys()
    still = [name for name, x in after.items() if torch.equal(x, before[name])]
    assert not still


def test_logratios_are_0_at_step_0_and_after_every_hard_update(sharded):
    distance = [line["ref/distance"] for line in steps(sharded[2] / "hard")]
    assert [d == 0.0 for d in distance] == [True, False] * 3


# checkpoints


def test_a_run_that_is_resumed_on_as_many_shards_is_the_same_bit_for_bit(sharded):
    whole, again = sharded[2] / "saved", sharded[2] / "resumed"
    assert [timeless(x) for x in steps(again)] == [timeless(x) for x in steps(whole)[4:]]
    mine, theirs = trained(again), trained(whole)
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_a_run_goes_on_with_more_shards(sharded):
    assert_goes_on(sharded[2] / "saved", sharded[4] / "resumed")


def test_a_divided_run_goes_on_in_one_process(models, sharded, tmp_path):
    changes = resumed(models, tmp_path, sharded[2] / "saved")
    run(models, **{**changes, "output_dir": tmp_path / "resumed"})
    assert_goes_on(sharded[2] / "saved", tmp_path / "resumed")


def test_a_run_of_one_process_goes_on_divided(models, tmp_path):
    run(models, tmp_path / "whole", **RESUMED)
    changes = divided(resumed(models, tmp_path, tmp_path / "whole"))
    ended = launched(2, [changes], tmp_path / "output")
    assert [rank.status for rank in ended] == [0, 0], ended
    assert_goes_on(tmp_path / "whole", tmp_path / "resumed")


def assert_goes_on(whole, again):
    for expected, got in zip(steps(whole)[4:], steps(again), strict=True):
        assert got["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert_same_weights(whole, again, 1e-4)


def test_the_reference_of_a_checkpoint_is_its_closed_form(models, sharded):
    """After two updates: 0.4 (0.4 w0 + 0.6 w3) + 0.6 w6, from weights that other files hold."""
    folder = sharded[2] / "closed"
    w0 = load_file(models / "model/model.safetensors")
    w3, w6 = trained(folder / "checkpoint-3"), trained(folder / "checkpoint-6")
    reference = SavedTensors(folder / "checkpoint-6/fasttr", "reference")
    assert {name.removeprefix("model.") for name in reference} == w0.keys()
    for name, w in w0.items():
        expected = 0.4 * (0.4 * w + 0.6 * w3[name]) + 0.6 * w6[name]
        assert (reference[f"model.{name}"] - expected).abs().max() < 1e-6, name
        assert (w6[name] - w3[name]).abs().max() > 1e-4, name


def test_every_rank_writes_its_share_of_a_checkpoint(sharded):
    folder = sharded[2] / "saved/checkpoint-4"
    names = {path.name for path in folder.rglob("*.safetensors")}
    kinds = ("model", "optimizer", "reference")
    shares = {f"{kind}-0000{i}-of-00002.safetensors" for kind in kinds for i in (1, 2)}
    assert names == shares | {"state.safetensors"}
    sizes = [(folder / f"model-0000{i}-of-00002.safetensors").stat().st_size for i in (1, 2)]
    assert min(sizes) > 0.3 * max(sizes)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == trained(folder).keys()
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in trained(folder).values())
    recorded = json.loads((folder / "fasttr/state.json").read_text())["files"]
    assert {path for path in recorded if path.endswith(".safetensors")} == {
        str(path.relative_to(folder)) for path in folder.rglob("*.safetensors")
    }


def test_a_checkpoint_that_is_written_meanwhile_holds_its_own_step(sharded):
    """Not what the run has become while its files were written."""
    behind, saved = sharded[2] / "behind", sharded[2] / "saved"
    assert checkpoint_names(behind) == [f"checkpoint-{step}" for step in (2, 4, 6, 7)]
    for path in (saved / "checkpoint-4").rglob("*.safetensors"):
        same = behind / "checkpoint-4" / path.relative_to(saved / "checkpoint-4")
        mine, theirs = load_file(same), load_file(path)
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs), path.name
    read_state(behind / "checkpoint-6")  # every file is as it was recorded
    assert not list(behind.glob(".*.tmp"))


@pytest.mark.parametrize("name", ["soft", "bf16", "tied, recomputed"])
def test_transformers_reads_the_folder_of_a_divided_run(one, sharded, name):
    expected = AutoModelForCausalLM.from_pretrained(one(name), dtype="auto")
    got = AutoModelForCausalLM.from_pretrained(sharded[2] / name, dtype="auto")
    assert got.dtype == expected.dtype
    if name != "bf16":
        ids = torch.arange(12)[None]
        assert (got(ids).logits - expected(ids).logits).abs().max() < 1e-4
    assert placeless(got.config) == placeless(expected.config)
    assert got.generation_config.to_dict() == expected.generation_config.to_dict()


def placeless(config):
    return {key: value for key, value in config.to_dict().items() if key != "_name_or_path"}


# what is sent


def test_a_move_sends_nothing_and_a_step_gathers_each_layer_twice(sharded):
    """Of 2 layers, an embedding and a head, which have a group each; the backward of the last two
    reads no weight."""
    found = json.loads((sharded[2] / "resumed/counts.json").read_text())
    assert found["move"] == found["exchange"] == {}
    assert found["score"] == {"allgather": 4}
    assert found["step"] == {"allgather": 6, "reduce_scatter": 4}


# what one rank alone sees


@pytest.fixture(scope="session")
def whole(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    run(models, folder, **RESUMED)
    return folder


def faulty(models, folder, fault):
    changes = divided(settings(models, folder / "run", **{**RESUMED, "save_steps": 2}))
    return launched(2, [changes], folder / "output", fault)


def assert_resumes(models, folder, whole):
    run(models, folder / "run", **RESUMED, resume_from_checkpoint=True)
    assert_same_weights(whole, folder / "run", 1e-4)


def test_a_rank_that_is_killed_inside_a_step_ends_the_others(models, tmp_path, whole):
    """They wait for it in a layer, not between steps."""
    ended = faulty(models, tmp_path, Fault(1, "error", calls=9))
    assert [rank.status for rank in ended] == [2, 1], ended
    last = ended[0].text.strip().splitlines()[-1]
    assert "another process of the run is gone" in last
    assert "Traceback" not in ended[0].text
    assert_resumes(models, tmp_path, whole)


def test_a_signal_while_the_reference_visits_saves_the_policy(models, tmp_path, whole):
    fault = Fault(1, "signal", "score", 12, signal.SIGTERM)
    ended = faulty(models, tmp_path, fault)
    assert [rank.status for rank in ended] == [143, 143], ended
    assert "stopped by a signal at step" in ended[0].text
    assert_resumes(models, tmp_path, whole)


def test_a_full_disk_of_a_rank_that_writes_weights_is_an_error_of_all(models, tmp_path, whole):
    ended = faulty(models, tmp_path, Fault(1, "file", calls=4))
    assert [rank.status for rank in ended] == [2, 2], ended
    assert all("No space left on device" in rank.text for rank in ended)
    assert "the last good checkpoint is" in ended[1].text
    assert not list((tmp_path / "run").glob(".checkpoint*"))
    assert_resumes(models, tmp_path, whole)


def test_what_cannot_be_done_on_rows_is_refused_on_all(models, tmp_path):
    changes = divided(settings(models, tmp_path / "run", optim="adafactor"))
    ended = launched(2, [changes], tmp_path / "output")
    assert [rank.status for rank in ended] == [2, 2], ended
    assert all("optim: got adafactor with shard_size above 1" in rank.text for rank in ended)
