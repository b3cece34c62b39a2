"""The site: every link leads somewhere, every command of the tutorial runs, every op is there."""

from __future__ import annotations

import re
import runpy
import shlex
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import fasttr_kernels
import pytest
import yaml

import fasttr.integrations
from docs import pages
from docs.ops_page import OPS
from fasttr.cli import main
from tests.runs import read_rows

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site():
    return pages.site()


def test_no_link_leads_nowhere(site):
    assert pages.broken_links(site.pages, site.pictures) == []
    assert len(site.pictures) > 5
    # The first page and the guides link to each other: the checker has something to check.
    links = sum(len(pages.LINK.findall(text)) for text in site.pages.values())
    assert links > 60


def test_a_link_and_a_heading_that_are_missing_are_found(site):
    broken = {
        **site.pages,
        "faq.md": "[a](nowhere.md), [b](memory.md#no-such-heading), ![c](pictures/none.png)",
    }
    assert pages.broken_links(broken, site.pictures) == [
        "faq.md: picture pictures/none.png",
        "faq.md: nowhere.md",
        "faq.md: memory.md#no-such-heading (no such heading)",
    ]


def test_the_menu_has_every_page(site):
    def names(entry):
        if isinstance(entry, str):
            return [entry]
        values = entry if isinstance(entry, list) else list(entry.values())
        return [name for value in values for name in names(value)]

    menu = names(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    assert sorted(menu) == sorted(site.pages)


def test_every_section_of_the_reference_has_a_page():
    sections = re.findall(r"^## (.*)$", (ROOT / "REFERENCE.md").read_text(), re.MULTILINE)
    shown = [
        h for part in pages.PARTS.values() if part.page == "REFERENCE.md" for h in part.headings
    ]
    assert sorted(shown) == sorted(sections)
    named = {part.page for part in pages.PARTS.values()}
    assert named >= {path.name for path in ROOT.glob("*.md")}, (
        "a page of the repository is left out"
    )


def test_settings_metrics_and_losses_are_those_of_the_code(site):
    from fasttr.config.train_config import TrainConfig
    from fasttr.losses import LOSSES
    from fasttr.metrics.names import METRICS
    from fasttr.settings import settings_of

    for name, page in (
        *((one, "settings") for one in settings_of(TrainConfig)),
        *((one, "losses") for one in LOSSES),
        *((one.name, "metrics") for one in METRICS),
    ):
        assert f"`{name}`" in site.pages[f"reference/{page}.md"], name


def test_every_public_op_has_its_signature_and_its_words(site):
    assert set(fasttr_kernels.__all__) == set(OPS["fasttr_kernels"])
    assert set(fasttr.integrations.__all__) == set(OPS["fasttr.integrations"])
    text = site.pages["reference/ops.md"]
    for names in OPS.values():
        for name in names:
            part = text.split(f"\n### {name}\n", 1)[1].split("\n###", 1)[0]
            assert name in part.split("```")[1] or "def " in part, name
            assert len(part.split("```")[-1].split()) > 8, f"{name} has no docstring"
    assert "hidden: Tensor,  # (T, D)" in text


def test_guides_name_only_settings_and_metrics_that_exist(site):
    """Words of guides that look like a setting or a metric are one."""
    known = "\n".join(text for name, text in site.pages.items() if name.startswith("reference/"))
    own = ("choosing.md", "memory.md", "faq.md", "tutorial.md", "index.md")
    for name in own:
        for word in set(re.findall(r"`([a-z]+(?:_[a-z]+)+)(?:`|:)", site.pages[name])):
            assert word in known, f"{name}: {word}"


def blocks(kind: str) -> list[str]:
    text = (ROOT / "docs/site/tutorial.md").read_text()
    return re.findall(rf"^```{kind}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def test_the_tutorial_runs_as_it_stands(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (script,) = blocks("python")
    Path("make_pairs.py").write_text(script)
    runpy.run_path("make_pairs.py")
    commands = [line for block in blocks("sh") for line in block.splitlines()]
    assert len(commands) == 8
    for command in commands:
        program, *words = shlex.split(command)
        assert program == "fasttr"
        main(words)
    said = capsys.readouterr().out
    for line in re.findall(r"^    (\w.*)$", (ROOT / "docs/site/tutorial.md").read_text(), re.M):
        is_output = re.match(r"(wrote|read|attention_tier|reference:|\d+ steps)", line)
        # The probe's difference is a rounding error of the machine at hand.
        start = line.split(" (a small random")[0]
        assert is_output is None or start in said, line
    accuracy = read_rows(Path("runs/dpo/metrics.jsonl"))
    last = [line for line in accuracy if "eval_anchor/rewards/accuracies" in line][-1]
    assert 0.6 < last["eval_anchor/rewards/accuracies"] < 1.0
    assert read_rows(Path("runs/dpo/metrics.jsonl"))[-1]["step"] == 75
    assert list(Path("runs").rglob("*.png"))
    (page,) = Path("runs").rglob("*.html")
    assert "tr-dpo" in page.read_text()


@pytest.mark.slow
@pytest.mark.skipif(find_spec("mkdocs") is None, reason="mkdocs is in the extra docs: make docs")
def test_the_site_builds_without_a_warning(tmp_path):
    import subprocess

    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(tmp_path / "site")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "site/reference/ops/index.html").is_file()
    shutil.rmtree(tmp_path / "site")
