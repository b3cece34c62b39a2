"""Metrics reach wandb and trackio (here stand-ins that note their calls) and none of them stops a
run."""

import sys
from types import ModuleType

import pytest

from fasttr import TrainConfig
from fasttr.errors import FasttrError
from fasttr.metrics.trackers import TrackerConfig, Trackers, require_trackers, tracker_names
from tests.runs import run, settings, steps


class Recorder(ModuleType):
    """Notes every call of init, log, define_metric and finish."""

    def __init__(self, name, failing=()):
        super().__init__(name)
        self.calls, self.failing = [], failing

    def __getattr__(self, attribute):
        if attribute not in ("init", "log", "define_metric", "finish"):
            raise AttributeError(attribute)

        def call(*args, **kwargs):
            self.calls.append((attribute, args, kwargs))
            if attribute in self.failing:
                raise RuntimeError(f"{attribute} is\nunwell")

        return call

    def of(self, attribute):
        return [(args, kwargs) for name, args, kwargs in self.calls if name == attribute]


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    monkeypatch.delenv("TRACKIO_PROJECT", raising=False)

    def install(name, **options):
        monkeypatch.setitem(sys.modules, name, recorder := Recorder(name, **options))
        return recorder

    return install


def test_a_run_reports_every_number_to_all_trackers(workspace, tmp_path, fake):
    wandb, trackio = fake("wandb"), fake("trackio")
    run(
        workspace,
        tmp_path,
        report_to=["wandb", "trackio", "tensorboard"],
        run_name="mine",
        project="ours",
        max_steps=3,
        eval_strategy="steps",
        eval_steps=3,
        eval_dataset_name=str(workspace / "test.jsonl"),
        ref_update="soft",
        ref_update_every=2,
    )
    for package in (wandb, trackio):
        ((_, asked),) = package.of("init")
        assert (asked["project"], asked["name"], asked["config"]["beta"]) == ("ours", "mine", 0.1)
        logged = [args[0] for args, _ in package.of("log")]
        at = {line["train/global_step"]: line for line in logged if "train/loss" in line}
        for line in steps(tmp_path):
            assert at[line["step"]]["train/loss"] == line["loss"]
            assert at[line["step"]]["train/rewards/margins"] == line["rewards/margins"]
        assert any("eval/loss" in line for line in logged)
        assert not any(isinstance(value, str) for line in logged for value in line.values())
        assert package.calls[-1][0] == "finish"
    assert wandb.of("init")[0][1]["dir"] == str(tmp_path)
    assert trackio.of("init")[0][1]["resume"] == "allow"
    assert [args for args, _ in wandb.of("define_metric")] == [("train/global_step",), ("*",)]
    assert list((tmp_path / "runs").glob("events.out.tfevents.*"))


def test_the_environment_names_the_project(tmp_path, fake, monkeypatch):
    wandb = fake("wandb")
    monkeypatch.setenv("WANDB_PROJECT", "theirs")
    Trackers(TrackerConfig("wandb"), tmp_path).close()
    assert wandb.of("init")[0][1]["project"] == "theirs"


def test_a_tracker_that_fails_is_left_out_and_told_once(tmp_path, fake, capsys):
    wandb, trackio = fake("wandb", failing=("log", "finish")), fake("trackio")
    trackers = Trackers(TrackerConfig(["wandb", "trackio"]), tmp_path)
    for step in range(3):
        trackers.log(step, {"loss": 1.0})
    trackers.close()
    assert len(wandb.of("log")) == 1
    assert len(trackio.of("log")) == 3
    assert (
        capsys.readouterr().out.count("wandb failed and is left out from here on (log is unwell)")
        == 1
    )


def test_a_tracker_that_cannot_start_is_one_line(tmp_path, fake):
    fake("wandb", failing=("init",))
    with pytest.raises(FasttrError, match="wandb could not start: init is unwell"):
        Trackers(TrackerConfig("wandb"), tmp_path)


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_missing_package_stops_before_anything_is_read(workspace, tmp_path, monkeypatch, name):
    monkeypatch.setitem(
        sys.modules, name, None
    )  # importing it raises, whether it is installed or not
    with pytest.raises(FasttrError, match=f"{name} is not installed; run pip install {name}"):
        run(workspace, tmp_path / "out", report_to=name, dataset_name="nowhere.jsonl")
    assert not (tmp_path / "out").exists()


def test_names_are_a_name_or_a_list(workspace, tmp_path):
    assert tracker_names("none") == tracker_names(["none"]) == []
    assert (
        tracker_names(["tensorboard", "tensorboard"])
        == tracker_names("tensorboard")
        == ["tensorboard"]
    )
    require_trackers("tensorboard")
    for wrong in ("pigeon", ["tensorboard", "none"]):
        with pytest.raises(FasttrError, match="report_to: got"):
            TrainConfig(**settings(workspace, tmp_path, report_to=wrong))
