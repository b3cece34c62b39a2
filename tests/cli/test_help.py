"""Help of each command: a sentence, range and group for every setting."""

import re

import pytest

from fasttr import TrainConfig
from fasttr.cli import main
from fasttr.cli.commands import COMMANDS
from fasttr.cluster.settings import PlanSettings
from fasttr.config.eval_config import EvalSettings
from fasttr.config.methods import METHODS
from fasttr.models.scratch import ScratchSettings
from fasttr.settings import settings_of
from fasttr.toy.demo import DemoSettings

COMMANDS_WITH_SETTINGS = {
    "train": TrainConfig,
    "eval": EvalSettings,
    "init": ScratchSettings,
    "plan": PlanSettings,
    "demo": DemoSettings,
}


def without_breaks(text: str) -> str:
    """Help is broken into lines, at hyphens too."""
    return "".join(text.split())


def help_of(capsys, command: str) -> str:
    """What `fasttr COMMAND --help` prints, without spaces and line breaks."""
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    return without_breaks(capsys.readouterr().out)


@pytest.mark.parametrize("command", COMMANDS_WITH_SETTINGS)
def test_help_shows_every_settings_sentence_range_and_group(capsys, command):
    shown = help_of(capsys, command)
    settings = settings_of(COMMANDS_WITH_SETTINGS[command])
    assert len(settings) >= 4
    for one in settings.values():
        assert len(one.help.split()) >= 2, one.name
        assert f"--{one.name}" in shown
        assert without_breaks(one.sentence) in shown, one.name
        assert without_breaks(f"{one.group}:") in shown
        for choice in one.range.choices if one.range else ():
            assert choice in one.sentence


@pytest.mark.parametrize("command", ["dpo", "kto", "sft"])
def test_help_of_a_word_of_trl_names_its_rows_its_losses_and_its_defaults(capsys, command):
    shown = help_of(capsys, command)
    method = METHODS[command]
    assert without_breaks(method.about) in shown
    assert without_breaks(f"; of {', '.join(method.losses)} (type:") in shown
    assert without_breaks(f"default: {method.defaults['loss_type']})") in shown


def test_help_of_eval_shows_the_settings_of_a_run_that_it_reads(capsys):
    shown = help_of(capsys, "eval")
    for name, one in settings_of(TrainConfig).items():
        is_shown = f"--{name}{name.upper()}" in shown or f"--{name}{{" in shown
        assert is_shown == one.in_eval, name


@pytest.mark.parametrize("command", ["plot", "env"])
def test_commands_without_settings_have_help_too(capsys, command):
    assert f"usage:fasttr{command}" in help_of(capsys, command)


def test_the_list_of_commands_fits_a_terminal(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    main(["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    for name, command in COMMANDS.items():
        assert any(re.match(f"  {name}  +{command.summary.split()[0]}", line) for line in lines)
