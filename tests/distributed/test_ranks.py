"""Several processes give the run of one: losses, gradients, weights, evaluations, whatever the
number of ranks and wherever one of them fails."""

import json
import signal

import pytest

from tests.distributed.cases import CASES, MOVING, assert_same_numbers, case_settings, trained
from tests.runs import evaluations, lines, run, same_weights, settings, steps, timeless
from tests.several import Fault, launched

# Those that are about what is in a step; others are about how weights lie.
OF_WEIGHTS = ("named reference", "tied, recomputed", "gradient", "experts", "experts adapter")
PLAIN = [name for name in CASES if name not in OF_WEIGHTS]
OF_RANKS = {
    2: PLAIN,
    3: ["soft", "kto", "ipo with ld_alpha", "fewer rows than ranks"],
}


@pytest.fixture(scope="session")
def several(workspace, tmp_path_factory):
    """The same runs by 2 and by 3 processes, a launch each."""
    folders = {}
    for world, names in OF_RANKS.items():
        folders[world] = tmp_path_factory.mktemp(f"ranks{world}")
        runs = [case_settings(workspace, folders[world], name) for name in names]
        ended = launched(world, runs, folders[world] / "output")
        assert [rank.status for rank in ended] == [0] * world, ended
        assert "done:" in ended[0].text
        assert all(rank.text == "" for rank in ended[1:])  # one speaks for all
    return folders


@pytest.mark.parametrize(
    ("world", "name"), [(world, name) for world, names in OF_RANKS.items() for name in names]
)
def test_several_ranks_give_the_run_of_one(one, several, world, name):
    assert_same_numbers(one(name), several[world] / name, name)
    assert len({line["loss"] for line in steps(several[world] / name)}) > 1


def test_the_cases_are_what_they_are_for(one):
    """The moving references move, the estimate of KTO is above 0, and evaluations are there."""
    updates = [line for line in lines(one("soft")) if line.get("event") == "reference_update"]
    assert len(updates) == 2
    assert max(line["kl"] for line in steps(one("kto"))) > 1e-3
    assert len(evaluations(one("soft"))) == 4
    assert len(evaluations(one("kto"))) == 2


def test_logratios_are_0_at_step_0_and_after_every_hard_update(several):
    distance = [line["ref/distance"] for line in steps(several[2] / "hard")]
    assert [d == 0.0 for d in distance] == [True, False] * 3


# resuming


RESUMED = {**MOVING, "save_strategy": "steps", "save_steps": 4, "max_steps": 7}


@pytest.fixture(scope="session")
def saved(workspace, tmp_path_factory):
    """Whole runs by one and by two processes, with a checkpoint in the middle of a window."""
    folder = tmp_path_factory.mktemp("saved")
    common = {"train_batch_size": 8, "max_tokens_per_batch": 100, **RESUMED}
    run(workspace, folder / "by 1", **common)
    ended = launched(2, [settings(workspace, folder / "by 2", **common)], folder / "output")
    assert [rank.status for rank in ended] == [0, 0], ended
    return folder


@pytest.mark.parametrize(("by", "on"), [(2, 2), (2, 1), (1, 2)])
def test_a_run_goes_on_with_any_number_of_ranks(workspace, tmp_path, saved, by, on):
    whole = saved / f"by {by}"
    common = {"train_batch_size": 8, "max_tokens_per_batch": 100, **RESUMED}
    common["resume_from_checkpoint"] = str(whole / "checkpoint-4")
    if on == 1:
        run(workspace, tmp_path / "run", **common)
    else:
        changes = settings(workspace, tmp_path / "run", **common)
        ended = launched(on, [changes], tmp_path / "output")
        assert [rank.status for rank in ended] == [0, 0], ended
    for expected, got in zip(steps(whole)[4:], steps(tmp_path / "run"), strict=True):
        assert got["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        if by == on:
            assert timeless(got) == timeless(expected)
    if by == on:
        assert same_weights(tmp_path / "run", whole)
    for key, value in trained(whole).items():
        assert (trained(tmp_path / "run")[key] - value).abs().max() < 1e-4, key


# what one rank alone sees


def faulty(workspace, folder, fault, **changes):
    common = {"train_batch_size": 8, "max_tokens_per_batch": 100, **RESUMED, "save_steps": 2}
    changed = settings(workspace, folder / "run", **{**common, **changes})
    return launched(2, [changed], folder / "output", fault)


def assert_goes_on(workspace, folder, saved):
    changes = {"train_batch_size": 8, "max_tokens_per_batch": 100, **RESUMED}
    run(workspace, folder / "run", **changes, resume_from_checkpoint=True)
    for key, value in trained(saved / "by 1").items():
        assert (trained(folder / "run")[key] - value).abs().max() < 1e-4, key


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_rank_saves_once_and_stops_all(workspace, tmp_path, saved, rank):
    fault = Fault(rank, "signal", "step", 3, signal.SIGTERM)
    ended = faulty(workspace, tmp_path, fault)
    assert [rank.status for rank in ended] == [143, 143], ended
    assert "stopped by a signal at step 3; saved" in ended[0].text
    state = json.loads((tmp_path / "run/checkpoint-3/fasttr/state.json").read_text())
    assert state["step"] == 3
    assert_goes_on(workspace, tmp_path, saved)


def test_a_signal_to_one_rank_while_the_reference_is_scored_stops_all(workspace, tmp_path, saved):
    fault = Fault(1, "signal", "score", 12, signal.SIGTERM)
    ended = faulty(workspace, tmp_path, fault, max_steps=7)
    assert [rank.status for rank in ended] == [143, 143], ended
    assert "stopped by a signal at step" in ended[0].text
    assert_goes_on(workspace, tmp_path, saved)


def test_a_step_that_is_not_finite_on_one_rank_stops_all_with_one_line(workspace, tmp_path):
    ended = faulty(workspace, tmp_path, Fault(1, "nan", calls=9))
    assert [rank.status for rank in ended] == [2, 2], ended
    last = [rank.text.strip().splitlines()[-1] for rank in ended]
    assert last[0] == last[1]
    assert "the loss or its gradient is not finite" in last[0]
    checkpoints = sorted((tmp_path / "run").glob("checkpoint-*"))
    assert checkpoints
    assert str(checkpoints[-1]) in last[0]


@pytest.mark.parametrize(
    "fault",
    [
        Fault(1, "signal", "step", 4, signal.SIGKILL),
        Fault(0, "signal", "step", 4, signal.SIGKILL),
        Fault(1, "error", calls=9),
    ],
    ids=["killed", "first killed", "error"],
)
def test_a_rank_that_ends_ends_the_others_with_one_line(workspace, tmp_path, saved, fault):
    ended = faulty(workspace, tmp_path, fault)
    other = ended[1 - fault.rank]
    assert other.status == 2, ended
    assert "Traceback" not in other.text
    assert "another process of the run is gone" in other.text.strip().splitlines()[-1]
    assert ended[fault.rank].status in (-signal.SIGKILL, 1)
    if fault.kind == "error":
        assert "RuntimeError: something is wrong with one rank" in ended[fault.rank].text
    assert list((tmp_path / "run").glob("checkpoint-*"))
    assert_goes_on(workspace, tmp_path, saved)


def test_a_full_disk_of_the_first_rank_is_an_error_of_all(workspace, tmp_path, saved):
    ended = faulty(workspace, tmp_path, Fault(0, "disk", calls=2))
    assert [rank.status for rank in ended] == [2, 2], ended
    assert all("No space left on device" in rank.text for rank in ended)
    assert_goes_on(workspace, tmp_path, saved)


def test_ranks_with_other_settings_are_refused_on_all(workspace, tmp_path):
    changed = settings(workspace, tmp_path / "run")
    ended = launched(2, [changed], tmp_path / "output", Fault(1, "settings"))
    assert [rank.status for rank in ended] == [2, 2], ended
    assert all("the configuration of rank 1 is not that of rank 0" in e.text for e in ended)
