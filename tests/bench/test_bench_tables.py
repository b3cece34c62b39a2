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


def test_the_headline_s_ratio_is_paired_by_step_with_an_interval_from_five_on(tmp_path):
    """Warm-up left out; each step's share of scoring counts; the middle is a geometric mean."""

    def own(seconds, scoring=0.0):
        return {
            "step_seconds": [99.0, *seconds],
            "warm_up_steps": 1,
            "score_s_per_step": scoring,
            "move_s_per_step": 0.0,
        }

    # Ratios of 2 and 4 in turn, the second trainer's scoring included.
    ours = [0.5, 0.5, 0.5, 0.5, 0.5, 0.5]
    best = [2.0, 4.0, 2.0, 4.0, 2.0, 4.0]
    folder = tmp_path / "cpu" / "peers-some"
    folder.mkdir(parents=True)
    figures = {"pairs_per_second": 1.0, "peak_bytes": 2**30}
    for steps, wanted in ((6, "2.83x (1.90 to 4.21)"), (4, "2.83x")):
        detail = {
            "data": "runs/some/train.jsonl",
            "pairs_per_step": 8,
            "detail": {"trl-best": own(best[:steps]), "fasttr": own(ours[:steps], scoring=0.5)},
        }
        (folder / "peers_detail.json").write_text(json.dumps(detail))
        providers = {"fasttr": figures, "trl-best": figures}
        (folder / "peers.json").write_text(json.dumps({"providers": providers}))
        fasttr, trl = tables.tables_of("headline", tmp_path).splitlines()[2:]
        assert fasttr.split(" | ")[3] == wanted
        assert trl.split(" | ")[3] == "1.00x"
