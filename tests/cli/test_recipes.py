"""Recipes by name: listed, run, copied."""

from __future__ import annotations

import pytest

from fasttr.cli import main
from fasttr.cli.train import parse_train
from fasttr.config.recipes import recipe_command, recipe_names, recipe_text
from tests.places import ROOT
from tests.runs import error_line

NAME = "qwen2.5-0.5b-ultrafeedback-tr-soft"


def test_every_file_is_listed_with_what_it_is(capsys):
    main(["recipes"])
    said = capsys.readouterr().out.splitlines()
    files = sorted(path.stem for path in (ROOT / "fasttr" / "recipes").glob("*.yaml"))
    assert sorted(line.strip() for line in said if line.strip() in files) == files == recipe_names()
    assert max(map(len, said)) <= 80
    place = said.index(f"  {NAME}")
    assert "all weights, the soft update;" in said[place + 1]
    commands = [line.split()[1] for line in said[:place] if line.startswith("fasttr ")]
    assert commands == ["dpo"]


@pytest.mark.parametrize(
    ("name", "command"),
    [("qwen2.5-0.5b-kto", "kto"), ("pythia-2.8b-hh-sft", "sft"), ("pythia-2.8b-hh-dpo", "dpo")],
)
def test_the_command_that_is_named_takes_the_recipe(name, command):
    assert recipe_command(name) == command
    assert parse_train(["--recipe", name], command).loss_type in (command, "sigmoid")


def test_flags_and_files_win_over_a_recipe(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("beta: 0.3\nref_update_every: 9\n")
    words = ["--ref_update_every", "5", "--config", str(file), "--recipe", NAME]
    config = parse_train(words, "dpo")
    assert (config.ref_update, config.beta, config.ref_update_every) == ("soft", 0.3, 5)
    assert config.model_name_or_path == "Qwen/Qwen2.5-0.5B-Instruct"


def test_a_copy_is_the_file_itself(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main(["recipes", "copy", NAME])
    assert (tmp_path / f"{NAME}.yaml").read_text() == recipe_text(NAME)
    assert f"--config {NAME}.yaml" in capsys.readouterr().out
    assert "is there already" in error_line(capsys, ["recipes", "copy", NAME])
    main(["recipes", "copy", NAME, "other.yaml"])
    assert (tmp_path / "other.yaml").exists()


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["dpo", "--recipe", NAME[:-1]], f"recipe: got '{NAME[:-1]}' (did you mean '{NAME}'?)"),
        (["recipes", "copy"], "got copy; wanted nothing, or: copy NAME"),
        (["recipes", "copy", "nothing"], "recipe: got 'nothing'; fasttr recipes lists all"),
    ],
)
def test_mistakes_are_one_line(words, answer, capsys):
    assert error_line(capsys, words).startswith(answer)
