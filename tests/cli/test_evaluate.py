"""`fasttr eval`: the same numbers as inside a run, standard errors that are those of the rows, and
samples."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fasttr import TrainConfig
from fasttr.cli import main
from fasttr.errors import FasttrError
from fasttr.evaluation.standalone import measure
from fasttr.models.load import ModelConfig, load_model, load_tokenizer
from fasttr.rollouts.prompt_file import PromptFile, read_prompts, sample_file
from fasttr.rollouts.sampler import Sampling, draw, encode_prompts
from tests.cli.test_commands import one_line
from tests.conftest import write_pairs
from tests.runs import evaluations, run
from tests.tiny import alone_logps


def config(workspace, **changes) -> TrainConfig:
    values = {
        "model_name_or_path": str(workspace / "model"),
        "dataset_name": str(workspace / "test.jsonl"),
        "max_length": 64,
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "max_tokens_per_batch": 256,
    }
    return TrainConfig(**(values | changes))


@pytest.mark.parametrize(
    "loss_type", ["sigmoid", "ipo", ["sigmoid", "sft"], "kto_paired", "simpo", "kto", None]
)
def test_it_agrees_with_the_evaluation_inside_a_run(workspace, tmp_path, loss_type):
    """After training against the initial policy, the anchor is that policy."""
    run(
        workspace,
        tmp_path,
        loss_type=loss_type,
        eval_strategy="steps",
        eval_steps=3,
        max_steps=3,
        beta=0.3,
        eval_dataset_name=str(workspace / "test.jsonl"),
        save_strategy="steps",
        save_steps=3,
    )
    inside = evaluations(tmp_path)[-1]
    anchor = str(workspace / "model")
    settings = {
        "loss_type": loss_type,
        "beta": 0.3,
        "group_size": 4 if loss_type in ("kto", "kto_paired") else None,
    }
    found = measure(
        config(workspace, model_name_or_path=str(tmp_path / "checkpoint-3"), **settings), anchor
    ).metrics
    shared = [
        name for name in inside if name.startswith("eval_") and not name.startswith("eval_anchor/")
    ]
    assert "eval_loss" in shared
    for name in shared:
        assert found[name.removeprefix("eval_")] == pytest.approx(
            inside[name], rel=1e-5, abs=1e-6
        ), name
    for name in ("logratios/chosen", "logratios/rejected"):
        if f"eval_anchor/{name}" in inside:
            assert found[name] == pytest.approx(inside[f"eval_anchor/{name}"], abs=1e-5)


def test_standard_errors_are_those_of_the_rows(workspace):
    found = measure(config(workspace, loss_type="sigmoid", beta=0.2), str(workspace / "reference"))
    trees = list(_trees(workspace))
    logp, ref = (_alone(workspace / name, trees) for name in ("model", "reference"))
    n = len(trees)
    u, v = (logp - ref)[:, 0], (logp - ref)[:, 1]
    loss = np.log1p(np.exp(-0.2 * (u - v)))
    root = math.sqrt(n)
    expected = {
        "loss": (loss.mean(), loss.std(ddof=1) / root),
        "rewards/margins": (0.2 * (u - v).mean(), 0.2 * (u - v).std(ddof=1) / root),
        "rewards/accuracies": ((u > v).mean(), math.sqrt((u > v).mean() * (u < v).mean() / n)),
        "logratios/chosen": (u.mean(), u.std(ddof=1) / root),
        "logps/rejected": (logp[:, 1].mean(), logp[:, 1].std(ddof=1) / root),
        "logps/margins": (
            (logp[:, 0] - logp[:, 1]).mean(),
            (logp[:, 0] - logp[:, 1]).std(ddof=1) / root,
        ),
    }
    for name, (value, error) in expected.items():
        assert found.metrics[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
        assert found.metrics[f"{name}_stderr"] == pytest.approx(error, rel=1e-3, abs=1e-6), name
    assert found.rows == n == 10
    assert "loss " in found.table()
    assert " +- " in found.table()


def test_without_an_anchor_there_are_log_probs_alone(workspace):
    found = measure(config(workspace)).metrics
    assert "loss" not in found
    assert not [name for name in found if name.startswith(("rewards/", "logratios/", "ref/"))]
    trees = list(_trees(workspace))
    logp = _alone(workspace / "model", trees)
    lengths = np.array([[len(c) for c in tree.completions] for tree in trees])
    assert found["logps/accuracies"] == pytest.approx((logp[:, 0] > logp[:, 1]).mean())
    per_token = logp / lengths
    share = (per_token[:, 0] > per_token[:, 1]).mean()
    assert found["logps/accuracies_per_token"] == pytest.approx(share)
    assert found["logps/accuracies_per_token_stderr"] == pytest.approx(
        math.sqrt(share * (1 - share) / 10)
    )
    with pytest.raises(FasttrError, match="anchor_model_name_or_path: missing"):
        measure(config(workspace, loss_type="ipo"))


def test_a_model_against_itself_has_no_margin(workspace):
    found = measure(config(workspace, loss_type="sigmoid"), str(workspace / "model")).metrics
    assert found["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert found["rewards/margins"] == found["ref/distance"] == 0.0


def test_unpaired_rows_are_measured_by_class(workspace, tmp_path):
    rows = [json.loads(line) for line in (workspace / "test.jsonl").read_text().splitlines()]
    with (tmp_path / "unpaired.jsonl").open("w") as file:
        for i, row in enumerate(rows):
            side = "chosen" if i % 2 else "rejected"
            file.write(
                json.dumps({"prompt": row["prompt"], "completion": row[side], "label": bool(i % 2)})
                + "\n"
            )
    found = measure(config(workspace, dataset_name=str(tmp_path / "unpaired.jsonl"))).metrics
    assert {"logps/chosen", "logps/rejected", "logps/chosen_stderr"} <= found.keys()
    assert "loss" not in found
    assert "logps/accuracies" not in found
    found = measure(
        config(workspace, dataset_name=str(tmp_path / "unpaired.jsonl")),
        str(workspace / "reference"),
    )
    assert {
        "loss",
        "loss_stderr",
        "rewards/chosen",
        "rewards/rejected_stderr",
    } <= found.metrics.keys()


def test_another_tokenizer_is_refused(workspace, tmp_path):
    from fasttr.models.scratch import init_model

    init_model("llama", hidden_size=16, num_layers=1, num_heads=2, output_dir=tmp_path / "bytes")
    with pytest.raises(FasttrError, match="another vocabulary"):
        measure(config(workspace), str(tmp_path / "bytes"))


def test_the_command_prints_a_table_and_writes_json(workspace, tmp_path, capsys):
    folder = tmp_path / "data"
    folder.mkdir()
    write_pairs(folder / "test.jsonl", 8, seed=4)
    write_pairs(folder / "validation.jsonl", 5, seed=5)
    common = [
        "--model_name_or_path",
        str(workspace / "model"),
        "--dataset_name",
        str(folder),
        "--use_cpu=true",
    ]
    asked = ["--dataset_test_split", "validation", "--loss_type", "ipo", "--beta", "0.5"]
    anchor, out = (
        ["--anchor_model_name_or_path", str(workspace / "reference")],
        tmp_path / "out" / "eval.json",
    )
    main(["eval", *common, *asked, *anchor, "--output_file", str(out)])
    said = capsys.readouterr().out
    written = json.loads(out.read_text())
    assert (written["rows"], written["split"]) == (5, "validation")
    assert written["settings"] == {"loss_type": "ipo", "beta": 0.5}
    assert f"{written['metrics']['loss']:.5g}" in said
    assert not list(tmp_path.rglob("*.tmp"))
    assert "no split 'dev'" in one_line(capsys, ["eval", *common, "--dataset_test_split", "dev"])
    assert "learning_rate: fasttr eval trains nothing" in one_line(
        capsys, ["eval", *common, "--learning_rate", "1"]
    )
    assert "there is no folder" in one_line(
        capsys, ["eval", *common, "--anchor_model_name_or_path", "/nowhere"]
    )
    assert "dataset_name: missing" in one_line(capsys, ["eval", *common[:2]])


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
        f"model_name_or_path: x\ndatasets: {json.dumps(parts)}\ntest_split_size: "
        "12\nlearning_rate: 1e-3\nbeta: 0.7\n"
        "loss_type: hinge\nmax_steps: 2\nmax_length: 64\neval_strategy: steps\nuse_cpu: "
        "true\nbf16: false\n"
    )
    folders = ["--model_name_or_path", str(tmp_path / "run" / "checkpoint-2")]
    folders += [
        "--anchor_model_name_or_path",
        str(workspace / "model"),
        "--output_file",
        str(tmp_path / "e.json"),
    ]
    main(["eval", "--config", str(tmp_path / "run.yaml"), *folders])
    written = json.loads((tmp_path / "e.json").read_text())
    assert (written["rows"], written["dataset"], written["split"]) == (12, "datasets", "test")
    assert written["metrics"]["loss"] == pytest.approx(
        evaluations(tmp_path / "run")[-1]["eval_loss"], rel=1e-5
    )
    assert " +- " in capsys.readouterr().out


def test_samples_are_written_for_every_prompt(workspace, tmp_path, capsys):
    prompts = tmp_path / "prompts.jsonl"
    asked = ["alpha beta?", [{"role": "user", "content": "gamma"}]]
    for i, kind in enumerate(asked):
        prompts.write_text("".join(json.dumps({"prompt": kind, "id": n}) + "\n" for n in range(3)))
        out = tmp_path / f"samples{i}.jsonl"
        main(
            [
                "eval",
                "--model_name_or_path",
                str(workspace / "model"),
                "--prompts",
                str(prompts),
                "--use_cpu=true",
                "--samples_file",
                str(out),
                "--max_new_tokens",
                "6",
                "--num_samples",
                "2",
                "--temperature",
                "0.7",
                "--sampling_batch_size",
                "2",
            ]
        )
        lines = [json.loads(line) for line in out.read_text().splitlines()]
        assert [line["sample"] for line in lines] == [0, 1] * 3
        assert all(line["prompt"] == kind for line in lines)
        assert all(1 <= line["tokens"] <= 6 for line in lines)
        assert all(line["finished"] or line["tokens"] == 6 for line in lines)
        assert f"6 samples in {out}" in capsys.readouterr().out
    assert not list(tmp_path.glob("*.partial"))


def test_greedy_samples_are_those_of_each_prompt_alone(workspace):
    """Padding a batch changes nothing, and the model attends as before afterwards."""
    folder = str(workspace / "model")
    tokenizer, model = load_tokenizer(folder), load_model(ModelConfig(folder))
    before = model.model.config._attn_implementation
    ids = encode_prompts(tokenizer, ["alpha?", "beta gamma delta epsilon zeta?", "eta theta?"])
    together = draw(model, tokenizer, ids, Sampling(12, temperature=0))
    plain = AutoModelForCausalLM.from_pretrained(folder)
    for prompt, (sample,) in zip(ids, together, strict=True):
        alone = plain.generate(
            torch.from_numpy(prompt.astype(np.int64))[None], do_sample=False, max_new_tokens=12
        )
        assert sample.ids.tolist() == alone[0, len(prompt) :].tolist()
    assert model.model.config._attn_implementation == before
    assert model.model.training


def test_samples_follow_the_seed(workspace, tmp_path):
    (tmp_path / "prompts.txt").write_text("alpha\n\nbeta\n")
    texts = []
    for seed, name in ((1, "a"), (1, "b"), (2, "c")):
        torch.manual_seed(7)
        files = PromptFile(tmp_path / "prompts.txt", tmp_path / name, disable_tqdm=True)
        sample_file(ModelConfig(str(workspace / "model")), files, Sampling(8, seed=seed))
        texts.append((tmp_path / name).read_text())
    assert texts[0] == texts[1] != texts[2]


def test_what_was_drawn_before_a_stop_is_kept_aside(workspace, tmp_path):
    (tmp_path / "prompts.txt").write_text("alpha\nbeta\ngamma\n")
    (tmp_path / "out.jsonl").write_text("earlier\n")
    calls = []

    def stopped(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return draw(*args)

    files = PromptFile(
        tmp_path / "prompts.txt", tmp_path / "out.jsonl", batch_size=1, disable_tqdm=True
    )
    with pytest.raises(KeyboardInterrupt):
        sample_file(ModelConfig(str(workspace / "model")), files, Sampling(4), draw_batch=stopped)
    assert (tmp_path / "out.jsonl").read_text() == "earlier\n"
    assert len((tmp_path / "out.jsonl.partial").read_text().splitlines()) == 2


def test_mistakes_with_prompts_are_one_line(workspace, tmp_path, capsys):
    model = ["eval", "--model_name_or_path", str(workspace / "model"), "--use_cpu=true"]
    good = tmp_path / "good.txt"
    good.write_text("alpha\n")

    def error(path, *more) -> str:
        return one_line(
            capsys, [*model, "--prompts", str(path), "--samples_file", str(tmp_path / "out"), *more]
        )

    def data(*rows):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    assert "does not exist" in error(tmp_path / "nowhere.txt")
    assert "no column 'prompt'" in error(data({"text": "a"}))
    assert "row 1 (counted from 0): prompt is null" in error(
        data({"prompt": "a"}, {"prompt": None})
    )
    assert "wanted text" in error(data({"prompt": 3}))
    assert "max_new_tokens: got 0" in error(good, "--max_new_tokens", "0")
    assert "longer than the model's positions" in error(good, "--max_new_tokens", "5000")
    assert "temperature: got -1" in error(good, "--temperature", "-1")
    assert "num_samples" in error(good, "--temperature", "0", "--num_samples", "2")
    assert "samples_file: missing" in one_line(capsys, [*model, "--prompts", str(good)])
    assert "prompts: missing" in one_line(capsys, [*model, "--max_new_tokens", "3"])
    good.write_text("\n \n")
    assert "holds no line" in error(good)
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_without_a_template_is_named(workspace, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(workspace / "model", folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = None
    with pytest.raises(FasttrError, match="no chat template"):
        encode_prompts(tokenizer, [[{"role": "user", "content": "a"}]])
    (tmp_path / "p.json").write_text('[{"prompt": "a"}, {"prompt": "b"}]')
    assert read_prompts(tmp_path / "p.json") == ["a", "b"]


def _trees(workspace):
    from fasttr.data.load import DataConfig, load_trees

    return load_trees(
        load_tokenizer(str(workspace / "model")),
        DataConfig(str(workspace / "test.jsonl"), max_length=64),
    )


def _alone(folder, trees) -> np.ndarray:
    with torch.no_grad():
        logp = alone_logps(AutoModelForCausalLM.from_pretrained(folder), trees)
    return logp.view(-1, 2).double().numpy()
