"""What a person meets who has installed fasttr: the version, what is missing, and advice that
works."""

import re
import tomllib
from pathlib import Path

import pytest

import fasttr
from fasttr.cli import commands, main
from tests.runs import error_line

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_the_version_stands_in_one_place(capsys):
    place = ROOT / PROJECT["tool"]["hatch"]["version"]["path"]
    assert f'__version__ = "{fasttr.__version__}"' in place.read_text()
    assert PROJECT["project"]["dynamic"] == ["version"]
    assert "version" not in PROJECT["project"]
    main(["--version"])
    assert capsys.readouterr().out == f"fasttr {fasttr.__version__}\n"
    assert f"\nversion: {fasttr.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {fasttr.__version__}" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("package", ["torch", "matplotlib.pyplot"])
def test_a_missing_package_is_named_with_the_line_that_installs_it(capsys, monkeypatch, package):
    def fail(name):
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)

    monkeypatch.setattr(commands.importlib, "import_module", fail)
    top = package.split(".")[0]
    wanted = f"fasttr plot needs the package {top}; run pip install 'fasttr[train]'"
    assert error_line(capsys, ["plot", "x"]) == wanted


def test_a_module_of_ours_that_is_missing_is_a_fault_and_no_advice(monkeypatch):
    def fail(name):
        raise ModuleNotFoundError("No module named 'fasttr.gone'", name="fasttr.gone")

    monkeypatch.setattr(commands.importlib, "import_module", fail)
    with pytest.raises(ModuleNotFoundError, match="gone"):
        main(["plot", "x"])


def test_every_extra_that_a_message_names_exists():
    """`pip install 'fasttr[x]'` finds the installed fasttr, and needs no index that has it."""
    extras = set(PROJECT["project"]["optional-dependencies"])
    named = set()
    for path in [*(ROOT / "fasttr").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]:
        named |= set(re.findall(r"fasttr\[(\w+)\]", path.read_text()))
    assert {"train", "lora", "cuda"} <= named <= extras
