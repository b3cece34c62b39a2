"""`fasttr eval` as a command: a table, a file, samples, and one line for every mistake."""

from __future__ import annotations

import json

import pytest

from fasttr.cli import main
from tests.runs import error_line, evaluations, flags, read_rows, run, write_rows
from tests.tiny import write_pairs


def test_the_command_prints_a_table_and_writes_json(workspace, tmp_path, capsys):
    folder = tmp_path / "data"
    write_pairs(folder / "test.jsonl", 8, seed=4)
    write_pairs(folder / "validation.jsonl", 5, seed=5)
    common = {
        "model_name_or_path": workspace / "model",
        "dataset_name": folder,
        "use_cpu": True,
    }
    asked = {
        "dataset_test_split": "validation",
        "loss_type": "ipo",
        "beta": 0.5,
        "anchor_model_name_or_path": workspace / "reference",
        "output_file": tmp_path / "out" / "eval.json",
    }
    main(["eval", *flags(common | asked)])
    said = capsys.readouterr().out
    written = json.loads((tmp_path / "out" / "eval.json").read_text())
    assert (written["rows"], written["split"]) == (5, "validation")
    assert written["settings"] == {"loss_type": "ipo", "beta": 0.5}
    assert f"{written['metrics']['loss']:.5g}" in said

    def error(**more) -> str:
        return error_line(capsys, ["eval", *flags(common | more)])

    assert "no split 'dev'" in error(dataset_test_split="dev")
    assert "learning_rate: fasttr eval trains nothing" in error(learning_rate=1)
    assert "there is no folder" in error(anchor_model_name_or_path="/nowhere")
    alone = error_line(capsys, ["eval", *flags({"model_name_or_path": workspace / "model"})])
    assert "dataset_name: missing" in alone


def test_a_training_file_is_read_for_what_it_says_of_data_and_loss(workspace, tmp_path, capsys):
    """The split is the one that the run evaluates on, the mixture's too."""
    parts = [{"path": str(workspace / "train.jsonl")}, {"path": str(workspace / "test.jsonl")}]
    run(
        workspace,
        tmp_path / "run",
        dataset_name=None,
        datasets=parts,
        test_split_size=12,
        eval_strategy="steps",
        eval_steps=2,
        max_steps=2,
        save_strategy="steps",
        beta=0.7,
        loss_type="hinge",
    )
    (tmp_path / "run.yaml").write_text(
        f"""
model_name_or_path: x
datasets: {json.dumps(parts)}
test_split_size: 12
learning_rate: 1e-3
beta: 0.7
loss_type: hinge
max_steps: 2
max_length: 64
eval_strategy: steps
use_cpu: true
bf16: false
"""
    )
    folders = {
        "model_name_or_path": tmp_path / "run" / "checkpoint-2",
        "anchor_model_name_or_path": workspace / "model",
        "output_file": tmp_path / "e.json",
    }
    main(["eval", "--config", str(tmp_path / "run.yaml"), *flags(folders)])
    written = json.loads((tmp_path / "e.json").read_text())
    assert (written["rows"], written["dataset"], written["split"]) == (12, "datasets", "test")
    inside = evaluations(tmp_path / "run")[-1]["eval_loss"]
    assert written["metrics"]["loss"] == pytest.approx(inside, rel=1e-5)
    assert " +- " in capsys.readouterr().out


PROMPTS = {"text": "alpha beta?", "messages": [{"role": "user", "content": "gamma"}]}


@pytest.mark.parametrize("kind", PROMPTS)
def test_samples_are_written_for_every_prompt(workspace, tmp_path, capsys, kind):
    rows = [{"prompt": PROMPTS[kind], "id": number} for number in range(3)]
    values = {
        "model_name_or_path": workspace / "model",
        "prompts": write_rows(tmp_path / "prompts.jsonl", rows),
        "use_cpu": True,
        "samples_file": tmp_path / "samples.jsonl",
        "max_new_tokens": 6,
        "num_samples": 2,
        "temperature": 0.7,
        "sampling_batch_size": 2,
    }
    main(["eval", *flags(values)])
    found = read_rows(tmp_path / "samples.jsonl")
    assert [line["sample"] for line in found] == [0, 1] * 3
    for line in found:
        assert line["prompt"] == PROMPTS[kind]
        assert 1 <= line["tokens"] <= 6
        assert line["finished"] or line["tokens"] == 6
    assert f"6 samples in {tmp_path / 'samples.jsonl'}" in capsys.readouterr().out
    assert not list(tmp_path.glob("*.partial"))


def test_mistakes_with_prompts_are_one_line(workspace, tmp_path, capsys):
    model = ["eval", *flags({"model_name_or_path": workspace / "model", "use_cpu": True})]
    good = tmp_path / "good.txt"
    good.write_text("alpha\n")

    def error(path, **more) -> str:
        files = {"prompts": path, "samples_file": tmp_path / "out"}
        return error_line(capsys, [*model, *flags(files | more)])

    def data(*rows):
        return write_rows(tmp_path / "rows.jsonl", list(rows))

    assert "does not exist" in error(tmp_path / "nowhere.txt")
    assert "no column 'prompt'" in error(data({"text": "a"}))
    null = data({"prompt": "a"}, {"prompt": None})
    assert "row 1 (counted from 0): prompt is null" in error(null)
    assert "wanted text" in error(data({"prompt": 3}))
    assert "max_new_tokens: got 0" in error(good, max_new_tokens=0)
    assert "longer than the model's positions" in error(good, max_new_tokens=5000)
    assert "temperature: got -1" in error(good, temperature=-1)
    assert "num_samples" in error(good, temperature=0, num_samples=2)
    no_file = error_line(capsys, [*model, "--prompts", str(good)])
    assert "samples_file: missing" in no_file
    assert "prompts: missing" in error_line(capsys, [*model, "--max_new_tokens", "3"])
    good.write_text("\n \n")
    assert "holds no line" in error(good)
    assert not (tmp_path / "out").exists()
