"""`fasttr report`: what stands on the page of a run, and of several."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from fasttr.cli import main
from fasttr.errors import FasttrError
from fasttr.metrics.results import Results, write_results
from fasttr.report import html
from fasttr.report.numbers import differences, headline, verdict
from fasttr.report.page import report_page
from fasttr.report.record import differing_settings, read_records
from tests.runs import error_line, lines, run


@pytest.fixture(scope="module")
def runs(workspace, tmp_path_factory):
    """A run with a fixed and one with a soft reference, evaluated and sampled."""
    folder = tmp_path_factory.mktemp("report")
    for name, changes in {
        "none": {},
        "soft": {"ref_update": "soft", "ref_update_every": 2},
    }.items():
        run(
            workspace,
            folder / name,
            eval_strategy="steps",
            eval_steps=3,
            eval_on_start=True,
            eval_dataset_name=str(workspace / "test.jsonl"),
            log_completions=True,
            log_completions_tokens=4,
            num_completions_to_print=2,
            **changes,
        )
    return [folder / "none", folder / "soft"]


@pytest.fixture(scope="module")
def pages(runs):
    return {"one": report_page(read_records(runs[1:])), "both": report_page(read_records(runs))}


class Words(HTMLParser):
    """The text of a page, and the addresses that it would fetch."""

    def __init__(self, page: str):
        super().__init__()
        self.found: list[str] = []
        self.addresses: list[str] = []
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "img"):
            self.open.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.found.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.found).split())


@pytest.mark.parametrize("name", ["one", "both"])
def test_a_page_is_whole_and_fetches_nothing(pages, name):
    words = Words(pages[name])
    assert words.open == [], "every tag is closed"
    assert len(words.addresses) >= 5
    assert all(one.startswith("data:image/svg+xml;base64,") for one in words.addresses)
    assert "@import" not in pages[name]
    assert "url(" not in pages[name]


def test_a_run_s_page_says_what_it_was_made_of(pages, runs):
    text = Words(pages["one"]).text
    assert "read 24 rows of" in text
    assert "ref_update soft" in text
    assert "commit of fasttr" in text
    assert re.search(r"torch \d+\.\d+", text)
    assert "updates of the reference" in text
    samples = [line for line in lines(runs[1]) if line.get("event") == "completions"]
    assert samples[0]["completions"][0]["prompt"] in text
    assert "step 0 step 2 step 4 step 6" in text


def test_the_headline_is_the_last_evaluation_s(runs):
    (record,) = read_records(runs[1:])
    numbers = {label: number for number, label in headline(record)}
    last = [line for line in lines(runs[1]) if "eval_loss" in line][-1]
    share = last["eval_anchor/rewards/accuracies"]
    stderr = last["eval_anchor/rewards/accuracies_stderr"]
    assert numbers["held-out accuracy against the initial policy"] == (
        f"{share:.3f} ± {1.96 * stderr:.3f}" if stderr else f"{share:.3f}"
    )
    assert numbers["optimizer steps"] == "6 of 6"


def test_rows_of_an_evaluation_are_those_behind_its_means(runs):
    (record,) = read_records(runs[1:])
    accuracy, margin = record.results["accuracy"].values, record.results["margin"].values
    assert len(accuracy) == len(margin) == 10
    assert sum(accuracy) / 10 == pytest.approx(record.last("eval_anchor/rewards/accuracies"))
    assert sum(margin) / 10 == pytest.approx(record.last("eval_anchor/rewards/margins"), rel=1e-4)
    assert [value > 0 for value in margin] == [value == 1 for value in accuracy]


def test_several_runs_are_told_apart_by_what_differs(pages, runs):
    records = read_records(runs)
    assert differing_settings(records) == {
        "ref_update": ["none", "soft"],
        "ref_update_every": [512, 2],
    }
    text = Words(pages["both"]).text
    assert "ref_update none soft" in text
    assert "Difference to none, row by row" in text
    assert "10 rows" in text


def test_differences_are_paired_with_the_first_run(tmp_path, runs):
    records = read_records(runs)
    (_, own, nothing), (name, other, pairs) = differences(records, "margin")
    assert (nothing, name) == (None, "soft")
    assert pairs.mean == pytest.approx(other.mean - own.mean)
    of_rows = zip(*(record.results["margin"].values for record in records), strict=True)
    gaps = [soft - none for none, soft in of_rows]
    mean = sum(gaps) / 10
    spread = (sum((gap - mean) ** 2 for gap in gaps) / 9) ** 0.5
    assert pairs.stderr == pytest.approx(spread / 10**0.5)


def test_a_verdict_needs_an_interval_on_one_side():
    from fasttr.metrics.results import Estimate

    words = [verdict(Estimate(mean, 0.1, 50)) for mean in (0.25, 0.1, -0.3)]
    assert words == ["higher", "no difference shown", "lower"]


def test_results_of_another_kind_reach_the_page(runs, tmp_path):
    import shutil

    folder = shutil.copytree(runs[1], tmp_path / "run")
    write_results(
        folder, Results("judged", "win rate by a judge", "x", [1, 0, 1, 1], no_effect=0.5)
    )
    assert "win rate by a judge: 0.75 (" in Words(report_page(read_records([folder]))).text


def test_text_is_escaped_and_what_cannot_be_seen_is_shown():
    assert html.text("<b> & \x10\x1b[31m\nnext") == "&lt;b&gt; &amp; \\x10\\x1b[31m\nnext"


def test_the_command_writes_where_it_says(runs, tmp_path, capsys):
    main(["report", str(runs[0]), "--output_file", str(tmp_path / "page.html")])
    assert capsys.readouterr().out.strip() == str(tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")


def test_what_is_no_run_is_refused(tmp_path, capsys):
    assert "wanted one or more" in error_line(capsys, ["report", "--output_file", "x"])
    with pytest.raises(FasttrError, match="is no folder"):
        read_records([tmp_path / "nowhere"])
