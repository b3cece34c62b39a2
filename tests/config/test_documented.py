"""The command lines and files that TRL's documentation and alignment-handbook give: each runs here
on a small model and a few rows, or stops and names only what needs quantised or sharded weights.
"""

import importlib.util
import json
import re
import shlex
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from fasttr.cli import main
from fasttr.cli.train import parse_train
from fasttr.errors import FasttrError
from tests.runs import steps

DOCUMENTED = yaml.safe_load(Path(__file__).with_name("documented.yaml").read_text())
NAMES = [f"{place}. {one['from']}" for place, one in enumerate(DOCUMENTED)]
HANDBOOKS_SPLITS = ("train_prefs", "test_prefs")
# What asks for a package that may not be here.
WAITS = {"load_in_4bit"} if importlib.util.find_spec("bitsandbytes") is None else set()
# Sizes and packages of the machines that the settings were written for.
SMALLER = {
    "num_processes": 1,
    "max_steps": 2,
    "eval_steps": 1,
    "dataset_num_proc": "none",
    "use_cpu": "true",
    "bf16": "false",
    "dtype": "float32",
    "attn_implementation": "none",
    "use_liger_kernel": "false",
    "optim": "adamw_torch",
    "push_to_hub": "false",
    "report_to": "none",
    "disable_tqdm": "true",
}


class Documented(NamedTuple):
    command: str
    words: list[str]
    file: dict[str, Any]

    @classmethod
    def of(cls, place: int) -> "Documented":
        one = DOCUMENTED[place]
        return cls(one["command"], shlex.split(one.get("words", "")), one.get("file", {}))

    def asks(self) -> set[str]:
        """The keys that it writes."""
        flags = {re.split("=", word[2:])[0] for word in self.words if word.startswith("--")}
        return flags | set(self.file)

    def line(self, folder: Path) -> list[str]:
        """Its words, with its file where it has one."""
        if not self.file:
            return self.words
        (folder / "run.yaml").write_text(yaml.safe_dump(self.file))
        return [*self.words, "--config", str(folder / "run.yaml")]


WAITING = [place for place in range(len(DOCUMENTED)) if Documented.of(place).asks() & WAITS]
RUNNING = [place for place in range(len(DOCUMENTED)) if place not in WAITING]
LOSSES = {"dpo": ["sigmoid"], "kto": ["kto"], "train": ["orpo"]}


def test_there_are_thirty_seven():
    sources = [one["from"].split()[0] for one in DOCUMENTED]
    assert (sources.count("trl"), sources.count("alignment-handbook")) == (25, 12)
    assert (len(RUNNING), len(WAITING)) == ((35, 2) if WAITS else (37, 0))


@pytest.mark.parametrize("place", RUNNING, ids=[NAMES[place] for place in RUNNING])
def test_what_can_be_done_is_read(place, tmp_path):
    documented = Documented.of(place)
    line = documented.line(tmp_path)
    if "8bit" in documented.file.get("optim", "") and importlib.util.find_spec("torchao") is None:
        with pytest.raises(FasttrError, match=r"^optim: adamw_bnb_8bit needs the package torchao"):
            parse_train(line, documented.command)
        line += ["--optim", "adamw_torch"]
    config = parse_train(line, documented.command)
    asked = documented.file.get("loss_type")
    assert config.loss_names == ([asked] if asked else LOSSES[documented.command])
    assert config.model_name_or_path == documented.file.get(
        "model_name_or_path", config.model_name_or_path
    )


@pytest.mark.parametrize("place", WAITING, ids=[NAMES[place] for place in WAITING])
def test_the_rest_names_only_quantised_and_sharded_weights(place, tmp_path):
    documented = Documented.of(place)
    with pytest.raises(FasttrError) as stopped:
        parse_train(documented.line(tmp_path), documented.command)
    named = re.findall(r"(?:^|\(\d+\) )(\w+): got", str(stopped.value))
    assert set(named) == documented.asks() & WAITS


def turns(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def conversations(rows: int) -> list[dict[str, Any]]:
    """Columns of UltraFeedback's binarised pairs: a text, and messages that repeat it."""
    return [
        {
            "prompt": f"What is {row}?",
            "chosen": turns(f"What is {row}?", f"It is {row % 7}."),
            "rejected": turns(f"What is {row}?", f"It may be {row % 5}, or so they say."),
            "chat_template_kwargs": {"enable_thinking": False},
        }
        for row in range(rows)
    ]


def transcripts(rows: int) -> list[dict[str, Any]]:
    """Raw transcripts as in Anthropic's HH set."""
    start = [f"\n\nHuman: What is {row}?\n\nAssistant:" for row in range(rows)]
    return [
        {"chosen": f"{text} It is {row % 7}.", "rejected": f"{text} No idea, {row % 5}."}
        for row, text in enumerate(start)
    ]


def verdicts(rows: int) -> list[dict[str, Any]]:
    """Unpaired conversations, two desirable ones for each undesirable one."""
    return [
        {
            "prompt": [{"role": "user", "content": f"What is {row}?"}],
            "completion": [{"role": "assistant", "content": f"It is {row % 7}."}],
            "label": row % 3 > 0,
        }
        for row in range(rows)
    ]


def stand_in(folder: Path, rows: list[dict[str, Any]], mixture: dict[str, Any]) -> str:
    """A data set with the configurations and splits that a mixture names, or train and test."""
    parts = mixture.get("datasets", [])
    wanted = {(part.get("config", "default"), part["split"]) for part in parts}
    wanted = wanted or {("default", split) for split in ("train", "test", *HANDBOOKS_SPLITS)}
    folder.mkdir()
    configs: dict[str, list[dict[str, str]]] = {}
    for number, (config, split) in enumerate(sorted(wanted)):
        name = f"part{number}.jsonl"
        configs.setdefault(config, []).append({"split": split, "path": name})
        text = "".join(json.dumps(row) + "\n" for row in rows[number : number + 24])
        (folder / name).write_text(text)
    described = {
        "configs": [
            {"config_name": config, "data_files": files, "default": config == "default"}
            for config, files in configs.items()
        ]
    }
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump(described)}---\n")
    return str(folder)


def placed(documented: Documented, data: str) -> Documented:
    """Every data set that it names is the stand-in."""
    file = json.loads(json.dumps(documented.file))
    for part in file.get("datasets", []):
        part["path"] = data
    for part in file.get("dataset_mixture", {}).get("datasets", []):
        part["id"] = data
    if "test_split_size" in file.get("dataset_mixture", {}):
        file["dataset_mixture"]["test_split_size"] = 4
    if "dataset_mixer" in file:
        file["dataset_mixer"] = {data: 1.0}
    words = list(documented.words)
    for place, word in enumerate(words):
        if word == "--dataset_name":
            words[place + 1] = data
    if "dataset_name" in file:
        file["dataset_name"] = data
    return documented._replace(file=file, words=words)


@pytest.mark.slow
@pytest.mark.parametrize("place", RUNNING, ids=[NAMES[place] for place in RUNNING])
def test_it_runs_on_a_small_model(place, workspace, tmp_path):
    documented = Documented.of(place)
    text = json.dumps([documented.words, documented.file])
    make_rows = transcripts if "hh-rlhf" in text else conversations
    rows = verdicts(32) if documented.command == "kto" else make_rows(32)
    mixture = documented.file.get("dataset_mixture", {})
    documented = placed(documented, stand_in(tmp_path / "data", rows, mixture))
    out = tmp_path / "out"
    changes = {**SMALLER, "model_name_or_path": workspace / "model", "output_dir": out}
    flags = [word for key, value in changes.items() for word in (f"--{key}", str(value))]
    main([documented.command, *documented.line(tmp_path), *flags])
    trains_adapter = "use_peft" in documented.asks()
    assert (out / ("adapter_" * trains_adapter + "model.safetensors")).is_file()
    losses = [line["loss"] for line in steps(out)]
    constant = {"kto": 0.5, "train": None, "dpo": 1.0 if "apo_zero" in text else 0.6931472}
    expected = constant[documented.command]
    assert expected is None or losses[0] == pytest.approx(expected, rel=1e-2)
