"""Whatever the rows and the settings: a run trains, or it stops with one line; never a traceback, a
hang or a folder that is half written.

FASTTR_FUZZ_EXAMPLES=10000 draws that many cases from FASTTR_FUZZ_SEED (0) instead of the few fixed
ones.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from fasttr import TrainConfig, train
from fasttr.cli.train import parse_train
from fasttr.errors import FasttrError
from fasttr.models.scratch import init_model
from tests.cli.mistakes import smaller_vocabulary
from tests.fuzz_rows import files
from tests.fuzz_settings import KEYS, WORD, configs
from tests.tiny import tiny_model

EXAMPLES = int(os.environ.get("FASTTR_FUZZ_EXAMPLES", "0"))
SEED = int(os.environ.get("FASTTR_FUZZ_SEED", "0"))
ARCHITECTURES = {"padded": "bloom", "experts": "mixtral"}
FINAL = ("model.safetensors", "adapter_model.safetensors")
SECONDS = 60  # a tiny run takes a fraction of one: more is a hang
few = settings(
    max_examples=EXAMPLES or 40,
    derandomize=not EXAMPLES,
    deadline=None,
    database=None,
    print_blob=True,
    phases=[Phase.generate] if not EXAMPLES else [Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz")
    for i, name in enumerate(("model", "other")):
        init_model(
            "llama",
            hidden_size=16,
            num_layers=1,
            num_heads=2,
            output_dir=folder / name,
            seed=i,
            max_position_embeddings=1024,
        )
    for name, arch in ARCHITECTURES.items():
        AutoTokenizer.from_pretrained(folder / "model").save_pretrained(folder / name)
        tiny_model(arch, vocab_size=260).save_pretrained(folder / name)
    shutil.copytree(folder / "model", folder / "cut")
    smaller_vocabulary(folder / "cut", 260)
    return folder


class Hang(BaseException):
    """No `except Exception` on the way may take it for an error of its own."""


@contextlib.contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    def ring(*_):
        raise Hang(f"still running after {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def one_line_or_none(act) -> str | None:
    """What a FasttrError says, which must be one line; None when there is none. Any other exception
    goes through."""
    told = None
    try:
        act()
    except FasttrError as error:
        told = str(error)
    assert told is None or (0 < len(told) < 2000 and "\n" not in told), repr(told)
    return told


def check(model: Path, file: tuple[str, bytes], chosen: dict[str, Any]) -> bool:
    """Run one case; True when it trained. Raises on anything that breaks the property."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        folder = Path(name)
        data = folder / file[0]
        data.write_bytes(file[1])
        values = case_settings(folder, model, data, chosen)
        with contextlib.chdir(folder), time_limit(SECONDS):
            told = one_line_or_none(lambda: train(TrainConfig(**values)))
        check_nothing_is_torn(folder, values.get("save_only_model", False))
        if told is None:
            check_run(folder / values["output_dir"])
        else:
            assert not any((folder / "out" / file).exists() for file in FINAL)
        return told is None


def case_settings(folder: Path, model: Path, data: Path, chosen: dict[str, Any]) -> dict[str, Any]:
    """A tiny run, with what was drawn over it; the words for places become places."""
    settings = {
        "model_name_or_path": "MODEL",
        "dataset_name": "DATA",
        "eval_dataset_name": "DATA",
        "output_dir": str(folder / "out"),
        "max_steps": 2,
        "train_batch_size": 2,
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_steps": 1,
        "save_strategy": "no",
        **chosen,
    }
    places = {name.upper(): str(model / name) for name in ("model", "other", "cut", *ARCHITECTURES)}
    places["DATA"] = str(data)
    return {key: placed(value, places) for key, value in settings.items()}


def placed(value: Any, places: dict[str, str]) -> Any:
    if isinstance(value, list):
        return [placed(item, places) for item in value]
    if isinstance(value, dict):
        return {key: placed(item, places) for key, item in value.items()}
    return places.get(value, value) if isinstance(value, str) else value


def check_nothing_is_torn(folder: Path, save_only_model: bool) -> None:
    left = sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
    for path in left:
        assert not path.endswith((".tmp", ".partial")), left
        assert "/.checkpoint" not in path, left
    for checkpoint in folder.rglob("checkpoint-*"):
        assert (checkpoint / "fasttr" / "state.json").is_file() != save_only_model, left
        assert any((checkpoint / file).is_file() for file in FINAL), left


def check_run(output_dir: Path) -> None:
    """A run that trained has a model, and no number of its log is not finite."""
    assert any((output_dir / file).is_file() for file in FINAL)
    for line in (output_dir / "metrics.jsonl").read_text().splitlines():
        numbers = [value for value in json.loads(line).values() if isinstance(value, float)]
        assert all(map(math.isfinite, numbers)), line


def test_a_run_trains_or_stops_with_one_line(model):
    trained = []

    @few
    @seed(SEED)
    @given(files(), configs())
    def cases(file, chosen):
        random.seed(0)
        trained.append(check(model, file, chosen))

    before = torch.are_deterministic_algorithms_enabled()
    cases()
    assert torch.are_deterministic_algorithms_enabled() == before
    assert 0.1 < sum(trained) / len(trained) < 0.9, "the cases are all of one kind"


def test_a_command_line_is_read_or_is_one_line():
    @settings(few, max_examples=max(EXAMPLES // 4, 60))
    @seed(SEED)
    @given(st.lists(st.tuples(KEYS, WORD, st.booleans()), max_size=4))
    def cases(pairs):
        words = ["--model_name_or_path=m", "--dataset_name=d"]
        for key, value, joined in pairs:
            words += [f"--{key}={value}"] if joined else [f"--{key}", value]
        one_line_or_none(lambda: parse_train(words))

    cases()
