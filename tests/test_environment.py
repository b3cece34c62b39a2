"""`fasttr env`: what it states, and that it needs torch alone."""

import json
import subprocess
from types import SimpleNamespace

import pytest
import torch

from fasttr import environment
from fasttr.errors import FasttrError


def test_environment_is_plain_json_and_names_torch():
    env = environment.environment()
    assert json.loads(json.dumps(env)) == env
    assert env["versions"]["torch"] == torch.__version__
    assert env["cpu_count"] >= 1
    assert len(env["devices"]) == torch.cuda.device_count()


def test_missing_packages_are_said_to_be_missing(monkeypatch):
    monkeypatch.setattr(environment, "version_of", lambda name: None)
    assert set(environment.environment()["versions"].values()) == {None}
    assert "not installed" in environment.report()


def machine(monkeypatch, capability=(9, 0), installed=(), modules=True, cuda="13.0", visible=True):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: visible)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    properties = SimpleNamespace(
        name="Some GPU", total_memory=80 * 2**30, major=capability[0], minor=capability[1]
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: properties)
    monkeypatch.setattr(
        environment, "version_of", lambda name: "1.0" if name in installed else None
    )
    found = {"torch.nn.attention.varlen": modules, **dict.fromkeys(installed, True)}
    monkeypatch.setattr(environment, "is_importable", lambda name: found.get(name, False))


def usable():
    backends = (
        environment.attention_backends() + environment.head_backends() + environment.model_kernels()
    )
    return {b.name for b in backends if b.usable}, {b.name: b.why for b in backends if not b.usable}


def test_everything_is_usable_on_a_recent_gpu_with_all_packages(monkeypatch):
    machine(monkeypatch, installed=("triton", "flash-attn", "liger-kernel"))
    names, why_not = usable()
    assert names == {"varlen", "flash_attention_2", "sdpa", "triton rows", "torch rows", "liger"}
    assert why_not == {}
    assert "Some GPU, 80 GiB, sm_90" in environment.report()


def test_what_is_not_installed_names_its_remedy(monkeypatch):
    machine(monkeypatch)
    names, why_not = usable()
    assert names == {"varlen", "sdpa", "torch rows"}
    assert "fasttr[flash]" in why_not["flash_attention_2"]
    assert "fasttr[cuda]" in why_not["liger"]
    assert "pip install triton" in why_not["triton rows"]


def test_an_old_torch_is_the_reason_for_a_missing_varlen(monkeypatch):
    machine(monkeypatch, modules=False, installed=("triton",))
    _, why_not = usable()
    assert "2.11" in why_not["varlen"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"cuda": None}, "without CUDA"),
        ({"visible": False}, "CUDA_VISIBLE_DEVICES"),
        ({"capability": (7, 5)}, "older than Ampere"),
    ],
)
def test_without_a_fit_gpu_the_torch_back_ends_remain_and_the_others_say_why(
    monkeypatch, changes, reason
):
    machine(monkeypatch, installed=("triton", "flash-attn", "liger-kernel"), **changes)
    names, why_not = usable()
    assert names == {"sdpa", "torch rows"}
    assert all(reason in why for why in why_not.values())


def test_a_run_takes_the_gpu_that_the_kernels_can_use(monkeypatch):
    machine(monkeypatch, installed=("triton",))
    assert environment.device_for(use_cpu=False).type == "cuda"
    assert environment.device_for(use_cpu=True).type == "cpu"
    machine(monkeypatch, installed=("triton",), visible=False)
    assert environment.device_for(use_cpu=False).type == "cpu"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"capability": (7, 5), "installed": ("triton",)}, "Some GPU is older than Ampere"),
        ({"installed": ()}, "triton is not installed: pip install triton"),
    ],
    ids=["old", "no triton"],
)
def test_a_gpu_that_they_cannot_use_stops_before_a_model_is_read(monkeypatch, changes, expected):
    machine(monkeypatch, **changes)
    with pytest.raises(FasttrError, match=f"^use_cpu: got false, and {expected}.*use_cpu true$"):
        environment.device_for(use_cpu=False)
    assert environment.device_for(use_cpu=True).type == "cpu"


def test_commit_is_that_of_the_checkout_and_none_outside(monkeypatch, tmp_path):
    def git(*args):
        identity = ("-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false")
        command = ["git", "-C", str(tmp_path), *identity, *args]
        return subprocess.run(command, capture_output=True, text=True, check=True)

    git("init", "-q")
    (tmp_path / "environment.py").write_text("")
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "environment.py"))
    assert (
        environment.environment()["git_commit"] is None
    )  # a repository that does not track us, as around a .venv
    git("add", "environment.py")
    git("commit", "-qm", "first")
    commit = git("rev-parse", "HEAD").stdout.strip()
    assert environment.environment()["git_commit"] == commit
    (tmp_path / "environment.py").write_text("changed")
    assert environment.environment()["git_commit"] == commit + "+"
