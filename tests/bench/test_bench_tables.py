"""Tables show the results that are kept, and say what was never measured."""

from __future__ import annotations

import json

import pytest

from bench import lerp, tables
from bench.harness import parsed

PAGES = {
    "README.md of bench": (tables.PAGES[0], [*tables.NAMES, "model", "gpu"]),
    "README.md": (tables.PAGES[1], ["headline"]),
}


@pytest.mark.parametrize(("page", "names"), PAGES.values(), ids=list(PAGES))
def test_the_tables_of_the_readmes_are_those_of_the_results(page, names):
    text = page.read_text()
    assert sorted(m[1] for m in tables.MARKED.findall(text)) == sorted(names)
    assert tables.regenerate(text, tables.RESULTS) == text, "run python -m bench tables"


def a_run(folder):
    given = ["--models", "tiny", "--cases", "fp32 <- fp32", "--seconds", "0.02", "--cpu"]
    lerp.BENCHMARK.run(parsed(lerp, *given, "--out", str(folder)))


def test_an_edited_table_is_found_and_a_gpu_that_never_ran_is_said(tmp_path):
    a_run(tmp_path / "cpu-2-core")
    text = tables.regenerate("<!-- bench:lerp -->\n<!-- /bench -->", tmp_path)
    assert "fp32 <- fp32" in text
    assert tables.NOT_MEASURED in text
    assert tables.regenerate(text.replace("fp32 <- fp32", "fp64"), tmp_path) == text


def test_results_are_kept_by_device_and_those_of_a_plan_too(tmp_path, monkeypatch):
    a_run(tmp_path / "run")
    content = json.loads((tmp_path / "run" / "lerp.json").read_text())
    on_gpu = {**content["environment"], "devices": [{"name": "NVIDIA H200"}], "command": "it"}
    part = {"part": "lerp", "environment": on_gpu, "files": {"lerp.json": content}}
    part["files"]["lerp.json"] = {**content, "environment": on_gpu}
    (tmp_path / "plan").mkdir()
    (tmp_path / "plan" / "gpu.jsonl").write_text(json.dumps(part) + "\n")
    monkeypatch.setattr(tables, "RESULTS", tmp_path / "results")
    kept = [*tables.keep(tmp_path / "run"), *tables.keep(tmp_path / "plan")]
    places = [str(path.relative_to(tmp_path / "results")) for path in kept]
    cores = content["environment"]["cpu_count"]
    assert places == [
        f"cpu-{cores}-core/lerp.json",
        "nvidia-h200/gpu.json",
        "nvidia-h200/lerp.json",
    ]
    assert tables.NOT_MEASURED not in tables.tables_of("lerp", tmp_path / "results")
