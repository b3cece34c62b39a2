"""`log_completions`: samples of the same prompts over a run, beside a training that they leave as
it is."""

from __future__ import annotations

import pytest

from fasttr.errors import FasttrError
from tests.runs import lines, run, same_weights, timeless, write_rows


def samples_of(folder) -> list[dict]:
    return [line for line in lines(folder) if line.get("event") == "completions"]


@pytest.fixture(scope="module")
def sampled(workspace, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sampled")
    return run(
        workspace,
        folder,
        log_completions=True,
        log_completions_steps=4,
        log_completions_tokens=5,
        num_completions_to_print=3,
        learning_rate=3e-2,
        ref_update="soft",
        ref_update_every=2,
    ).output_dir


def test_the_same_prompts_are_sampled_before_during_and_after(sampled):
    found = samples_of(sampled)
    assert [line["step"] for line in found] == [0, 4, 6]
    prompts = [[one["prompt"] for one in line["completions"]] for line in found]
    assert prompts[0] == prompts[1] == prompts[2]
    assert len(set(prompts[0])) == 3
    texts = [[one["completion"] for one in line["completions"]] for line in found]
    assert texts[0] != texts[2], "what was trained shows"


def test_lengths_are_those_of_the_samples(sampled):
    for line in samples_of(sampled):
        tokens = [one["tokens"] for one in line["completions"]]
        assert line["completions/mean_length"] == sum(tokens) / 3
        unfinished = sum(not one["finished"] for one in line["completions"])
        assert line["completions/clipped_ratio"] == pytest.approx(unfinished / 3)


def test_sampling_changes_nothing_of_the_training(sampled, workspace, tmp_path):
    plain = run(
        workspace, tmp_path, learning_rate=3e-2, ref_update="soft", ref_update_every=2
    ).output_dir
    assert same_weights(sampled, plain)
    trained = [timeless(line) for line in lines(sampled) if line.get("event") != "completions"]
    assert trained == [timeless(line) for line in lines(plain)]


def test_prompts_of_a_file(workspace, tmp_path):
    file = write_rows(tmp_path / "prompts.jsonl", [{"prompt": "alpha beta"}, {"prompt": "gamma"}])
    changes = {"log_completions": True, "log_completions_tokens": 3, "max_steps": 1}
    folder = run(
        workspace, tmp_path / "run", log_completions_prompts=str(file), **changes
    ).output_dir
    for line in samples_of(folder):
        assert [one["prompt"] for one in line["completions"]] == ["alpha beta", "gamma"]


def test_a_missing_file_of_prompts_is_one_line(workspace, tmp_path):
    with pytest.raises(FasttrError, match=r"log_completions_prompts: .* does not exist"):
        run(workspace, tmp_path, log_completions=True, log_completions_prompts="nowhere.jsonl")
