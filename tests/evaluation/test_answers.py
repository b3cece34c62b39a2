"""Files of answers for outside judges, in the formats that they read."""

from __future__ import annotations

import json
import re

import pytest

from fasttr.cli import main
from fasttr.errors import FasttrError
from fasttr.evaluation.answers import prompt_and_reference, read_template
from fasttr.metrics.results import read_results
from tests.runs import error_line, read_rows, write_rows

ALPACA = [{"instruction": f"alpha {i}", "output": "base", "dataset": "helpful"} for i in range(3)]
ARENA = [{"uid": f"u{i}", "category": "hard_prompt", "prompt": f"beta {i}"} for i in range(2)]
ARENA_OLD = [{"question_id": "q0", "turns": [{"content": "gamma"}]}]
MT_BENCH = [
    {"question_id": 81, "category": "writing", "turns": ["alpha beta", "and now delta"]},
    {"question_id": 82, "category": "math", "turns": ["gamma"]},
]
PAIRS = [
    {"prompt": "alpha?", "chosen": " the reference", "rejected": " no"},
    {
        "chosen": "\n\nHuman: beta?\n\nAssistant: said",
        "rejected": "\n\nHuman: beta?\n\nAssistant: no",
    },
]


@pytest.fixture
def answered(workspace, tmp_path, capsys):
    def answer(rows, kind, *more):
        questions = write_rows(tmp_path / "questions.jsonl", rows)
        target = tmp_path / "answers"
        main(
            [
                "eval", "--model_name_or_path", str(workspace / "model"), "--use_cpu",
                "--bf16", "false", "--disable_tqdm", "--prompts", str(questions),
                "--samples_file", str(target), "--samples_format", kind,
                "--max_new_tokens", "4", "--temperature", "0", *more,
            ]
        )  # fmt: skip
        assert "answers to" in capsys.readouterr().out
        return target

    return answer


def test_alpaca_eval_reads_a_list_of_instructions_and_outputs(answered):
    found = json.loads(answered(ALPACA, "alpaca_eval", "--generator", "mine").read_text())
    assert [one["instruction"] for one in found] == [row["instruction"] for row in ALPACA]
    assert {one["generator"] for one in found} == {"mine"}
    assert all(set(one) == {"instruction", "output", "generator", "dataset"} for one in found)
    assert any(one["output"] for one in found)


def test_arena_hard_reads_messages_by_uid_and_before_2_0_choices(answered):
    new = read_rows(answered(ARENA, "arena_hard"))
    assert [one["uid"] for one in new] == ["u0", "u1"]
    user, assistant = new[0]["messages"]
    assert (user["content"], assistant["role"]) == ("beta 0", "assistant")
    assert isinstance(assistant["content"]["answer"], str)
    assert {one["model"] for one in new} == {"model"}
    (old,) = read_rows(answered(ARENA_OLD, "arena_hard"))
    assert isinstance(old["choices"][0]["turns"][0]["content"], str)
    assert (old["question_id"], old["model_id"]) == ("q0", "model")


def test_mt_bench_has_an_answer_for_every_turn_and_the_second_knows_the_first(
    workspace, tmp_path, monkeypatch
):
    from fasttr.evaluation import answers
    from fasttr.models.load import ModelConfig
    from fasttr.rollouts.sampler import Sampling, draw

    seen = []

    def watched(packed, tokenizer, ids, sampling):
        seen.extend(tokenizer.decode(one, skip_special_tokens=True) for one in ids)
        return draw(packed, tokenizer, ids, sampling)

    files = answers.AnswerFile(
        write_rows(tmp_path / "q.jsonl", MT_BENCH), tmp_path / "a.jsonl", "mt_bench", "mine"
    )
    model = ModelConfig(str(workspace / "model"))
    assert answers.write_answers(model, files, Sampling(4, temperature=0.0), watched) == 2
    first, second = read_rows(tmp_path / "a.jsonl")
    assert [len(one["choices"][0]["turns"]) for one in (first, second)] == [2, 1]
    assert len(seen) == 3
    assert first["choices"][0]["turns"][0] in seen[2]
    assert re.search("alpha beta.*and now delta", seen[2], re.DOTALL)


def test_a_pairwise_judge_sees_both_orders(answered):
    lines = read_rows(answered(PAIRS, "pairwise", "--judge_template", "summary"))
    assert [(one["id"], one["order"]) for one in lines] == [
        ("0", "policy first"),
        ("0", "policy second"),
        ("1", "policy first"),
        ("1", "policy second"),
    ]
    assert (lines[0]["b"], lines[1]["a"]) == ("the reference", "the reference")
    assert lines[0]["a"] == lines[1]["b"]
    assert "Summary B:\nthe reference" in lines[0]["judge_prompt"]
    assert "Human: beta?" in lines[2]["judge_prompt"]
    assert "said" not in lines[2]["judge_prompt"].split("Summary A:")[0]


def test_what_a_model_is_compared_with():
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": " a "}]
    assert prompt_and_reference({"chosen": messages}) == (messages[:1], "a")
    assert prompt_and_reference({"prompt": "q", "response": " a"}) == ("q", "a")
    transcript = "\n\nHuman: q\n\nAssistant: a\n\nHuman: r\n\nAssistant: b"
    prompt, reference = prompt_and_reference({"chosen": transcript})
    assert (prompt.endswith("Human: r\n\nAssistant:"), reference) == (True, "b")


def test_a_template_of_one_s_own_needs_its_places(tmp_path):
    file = tmp_path / "template.txt"
    file.write_text("{prompt} / {a} / {b}")
    assert read_template(str(file)) == "{prompt} / {a} / {b}"
    file.write_text("{prompt} / {a}")
    with pytest.raises(FasttrError, match="lacks one of"):
        read_template(str(file))
    with pytest.raises(FasttrError, match="wanted helpful, summary, or a file"):
        read_template("nowhere")


def likes_alphas(prompts, completions, **_):
    return [text.count("a") for text in completions]


def test_a_function_judges_samples_against_the_responses(workspace, tmp_path, capsys):
    rows = [{"prompt": "alpha?", "response": "a" * n} for n in (0, 0, 500, 500, 500)]
    prompts = write_rows(tmp_path / "prompts.jsonl", rows)
    main(
        [
            "eval", "--model_name_or_path", str(workspace / "model"), "--use_cpu",
            "--bf16", "false", "--disable_tqdm", "--prompts", str(prompts), "--max_new_tokens", "3",
            "--temperature", "0", "--judge", f"{__name__}:likes_alphas",
            "--results_dir", str(tmp_path),
        ]
    )  # fmt: skip
    (results,) = read_results(tmp_path).values()
    assert results.values[2:] == [0, 0, 0]
    assert results.values[0] == results.values[1] in (0.5, 1.0)
    assert "by likes_alphas: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["--judge", "gold"], "prompts: missing; a judge needs a file of prompts"),
        (["--samples_format", "alpaca"], "samples_format: got 'alpaca'; wanted one of lines"),
        (["--verdicts", "x", "--verdicts_format", "other"], "verdicts_format: got 'other'"),
    ],
)
def test_mistakes_are_one_line(words, answer, workspace, capsys):
    model = ["--model_name_or_path", str(workspace / "model"), "--use_cpu", "--bf16", "false"]
    assert error_line(capsys, ["eval", *model, *words]).startswith(answer)
