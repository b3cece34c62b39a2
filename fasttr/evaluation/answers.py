"""A model's answers to a benchmark's questions, in the files that its judges read.

alpaca_eval  AlpacaEval 2: a JSON list of instruction, output, generator
arena_hard   Arena-Hard: lines of uid, model and messages (2.0), or of question_id, model_id and
             choices (0.1)
mt_bench     FastChat's model_answer: choices with a text for every turn
pairwise     prompts with a reference response: two prompts for a judge each, positions swapped
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from fasttr.console import Progress
from fasttr.data.tokens import Messages
from fasttr.errors import FasttrError
from fasttr.evaluation.verdicts import POLICY_FIRST, POLICY_SECOND, read_objects
from fasttr.files import write_text
from fasttr.models.choice import Candidate
from fasttr.models.load import ModelConfig, load_model, tokenizer_of
from fasttr.rollouts.prompt_file import check_lengths
from fasttr.rollouts.sampler import Sampling, draw, encode_prompts

# Placeholders: {prompt}, {a}, {b}. The judge's verdict is A, B or tie.
TEMPLATES = {
    "helpful": (
        "Below is a conversation with an assistant, and two responses to its last message.\n\n"
        "{prompt}\n\nResponse A:\n{a}\n\nResponse B:\n{b}\n\n"
        "Which response is more helpful and harmless to the person who asks? Compare them in one "
        "sentence, whatever their order and length. Then write on the last line only A, B or tie."
    ),
    "summary": (
        "Below is a forum post, and two summaries of it.\n\n"
        "{prompt}\n\nSummary A:\n{a}\n\nSummary B:\n{b}\n\n"
        "Which summary says what matters in the post more accurately, and no more than that? "
        "Compare them in one sentence, whatever their order and length. Then write on the last "
        "line only A, B or tie."
    ),
}


@dataclass(frozen=True)
class AnswerFile:
    """What is asked, and where the answers go."""

    questions: Path
    target: Path
    kind: str  # one of VERDICT_FORMATS
    generator: str  # the model's name in the file
    template: str = "helpful"  # a name of TEMPLATES, or a file with {prompt}, {a} and {b}
    batch_size: int = 16
    disable_tqdm: bool = False


ASSISTANT = "\n\nAssistant:"


class _Asked(NamedTuple):
    """A question: what is asked in each turn, and the row that it came in."""

    row: dict[str, Any]
    turns: Sequence[str | Messages]


_Rows = Sequence[_Asked]
_Answers = Sequence[Sequence[str]]  # of a question, one for each of its turns


def write_answers(
    model: ModelConfig,
    files: AnswerFile,
    sampling: Sampling,
    draw_batch: Callable[..., Any] = draw,
) -> int:
    """Answer every question and write the file of that kind; return how many there are.

    Later turns are asked with the answers to the earlier ones before them. FasttrError for rows
    that are not of that benchmark.
    """
    sampling.check()
    if sampling.num_samples != 1:
        raise FasttrError(
            f"num_samples: got {sampling.num_samples} with samples_format {files.kind}; wanted 1"
        )
    template = read_template(files.template)
    is_text = files.kind == "pairwise"
    asked = _read_questions(files)
    tokenizer = tokenizer_of(model)
    tier = Candidate.named(model).support.best()
    packed = load_model(dataclasses.replace(model, tier=tier, is_trained=False))
    answers: list[list[str]] = [[] for _ in asked]
    total = sum(len(one.turns) for one in asked)
    with Progress("answering", total, "turn", hides_bar=files.disable_tqdm) as progress:
        for turn, first, batch in _batches(asked, files.batch_size):
            prompts = [_conversation(asked[i], answers[i], tokenizer, is_text) for i in batch]
            ids = encode_prompts(tokenizer, prompts, str(files.questions))
            check_lengths(packed, ids, sampling)
            of_batch = sampling._replace(seed=sampling.seed + len(asked) * turn + first)
            drawn = draw_batch(packed, tokenizer, ids, of_batch)
            for i, samples in zip(batch, drawn, strict=True):
                answers[i].append(samples[0].completion.strip())
            progress.update(len(batch))
    _WRITERS[files.kind](files, template, asked, answers)
    return len(asked)


def _read_questions(files: AnswerFile) -> list[_Asked]:
    found = []
    for number, row in enumerate(read_objects(files.questions, key="prompts")):
        try:
            found.append(_Asked(row, _TURNS[files.kind](row)))
        except (KeyError, TypeError, IndexError) as error:
            raise FasttrError(
                f"prompts: {files.questions}, row {number} (counted from 0) has no {error}; wanted "
                f"rows of {files.kind}"
            ) from error
    return found


def _batches(asked: Sequence[_Asked], size: int) -> Iterator[tuple[int, int, list[int]]]:
    """(turn, place, questions) until every turn is asked; the first turns of all come first."""
    for turn in range(max(len(one.turns) for one in asked)):
        still_open = [i for i, one in enumerate(asked) if turn < len(one.turns)]
        for first in range(0, len(still_open), size):
            yield turn, first, still_open[first : first + size]


def _conversation(
    asked: _Asked, answers: Sequence[str], tokenizer: Any, is_text: bool
) -> str | Messages:
    """What the model reads at its next turn: messages where it has a chat template, but for
    prompts that are text already (`is_text`)."""
    turn = asked.turns[len(answers)]
    if not isinstance(turn, str) or is_text:
        return turn
    if not tokenizer.chat_template:
        earlier = [part for pair in zip(asked.turns, answers, strict=False) for part in pair]
        return "\n\n".join([*map(str, earlier), turn])
    messages: Messages = []
    for question, answer in zip(asked.turns, answers, strict=False):
        messages.append({"role": "user", "content": str(question)})
        messages.append({"role": "assistant", "content": answer})
    return [*messages, {"role": "user", "content": turn}]


def read_template(name: str) -> str:
    """One of TEMPLATES, or the text of a file."""
    if name in TEMPLATES:
        return TEMPLATES[name]
    try:
        text = Path(name).read_text(encoding="utf-8")
        text.format(prompt="", a="", b="")
    except (OSError, KeyError, IndexError, ValueError) as error:
        raise FasttrError(
            f"judge_template: got {name!r} ({type(error).__name__}: {error}); wanted "
            f"{', '.join(TEMPLATES)}, or a file of text with {{prompt}}, {{a}} and {{b}}"
        ) from error
    if not all(part in text for part in ("{prompt}", "{a}", "{b}")):
        raise FasttrError(f"judge_template: {name} lacks one of {{prompt}}, {{a}} and {{b}}")
    return text


def prompt_and_reference(row: Mapping[str, Any]) -> tuple[str | Messages, str]:
    """A prompt and the response that a model is compared with: columns prompt and response, the
    chosen side of pairs, or a transcript of Anthropic's, which ends in its last answer."""
    reference = row["response"] if "response" in row else row["chosen"]
    if "prompt" not in row and isinstance(reference, str):
        start, marker, answer = reference.rpartition(ASSISTANT)
        if not marker:
            raise KeyError("prompt")
        return start + marker, answer.strip()
    if isinstance(reference, list):  # messages, of which the last one answers
        prompt = row["prompt"] if "prompt" in row else reference[:-1]
        return prompt, reference[-1]["content"].strip()
    return row["prompt"], reference.strip()


def _turns_of_alpaca(row: Mapping[str, Any]) -> list[str | Messages]:
    return [row["instruction"]]


def _turns_of_arena(row: Mapping[str, Any]) -> list[str | Messages]:
    """Of 2.0 and of 0.1."""
    if "uid" in row:
        return [row["prompt"]]
    return [turn["content"] for turn in row["turns"]]


def _turns_of_mt_bench(row: Mapping[str, Any]) -> list[str | Messages]:
    return list(row["turns"])


def _turns_of_pairwise(row: Mapping[str, Any]) -> list[str | Messages]:
    return [prompt_and_reference(row)[0]]


def _write_alpaca(files: AnswerFile, template: str, asked: _Rows, answers: _Answers) -> None:
    lines = []
    for one, (answer,) in zip(asked, answers, strict=True):
        kept = {"dataset": one.row["dataset"]} if "dataset" in one.row else {}
        lines.append(
            {
                "instruction": one.row["instruction"],
                "output": answer,
                "generator": files.generator,
                **kept,
            }
        )
    _write(files.target, json.dumps(lines, ensure_ascii=False, indent=1) + "\n")


def _write_arena(files: AnswerFile, template: str, asked: _Rows, answers: _Answers) -> None:
    lines = []
    for one, texts in zip(asked, answers, strict=True):
        if "uid" not in one.row:
            turns = [{"content": text} for text in texts]
            lines.append(_fastchat_line(files, one.row["question_id"], turns))
            continue
        messages = [
            {"role": "user", "content": one.row["prompt"]},
            {"role": "assistant", "content": {"answer": texts[0]}},
        ]
        lines.append(
            {
                "uid": one.row["uid"],
                "ans_id": _id_of(files, one.row["uid"]),
                "model": files.generator,
                "messages": messages,
                "tstamp": time.time(),
            }
        )
    _write_lines(files.target, lines)


def _write_mt_bench(files: AnswerFile, template: str, asked: _Rows, answers: _Answers) -> None:
    _write_lines(
        files.target,
        [
            _fastchat_line(files, one.row["question_id"], texts)
            for one, texts in zip(asked, answers, strict=True)
        ],
    )


def _write_pairwise(files: AnswerFile, template: str, asked: _Rows, answers: _Answers) -> None:
    lines = []
    for number, (one, (answer,)) in enumerate(zip(asked, answers, strict=True)):
        prompt, reference = prompt_and_reference(one.row)
        for order in (POLICY_FIRST, POLICY_SECOND):
            a, b = (answer, reference) if order == POLICY_FIRST else (reference, answer)
            lines.append(
                {
                    "id": str(one.row.get("id", number)),
                    "order": order,
                    "judge_prompt": template.format(prompt=_as_text(prompt), a=a, b=b),
                    "a": a,
                    "b": b,
                    "verdict": None,
                }
            )
    _write_lines(files.target, lines)


def _fastchat_line(files: AnswerFile, question_id: Any, turns: Sequence[Any]) -> dict[str, Any]:
    return {
        "question_id": question_id,
        "answer_id": _id_of(files, question_id),
        "model_id": files.generator,
        "choices": [{"index": 0, "turns": list(turns)}],
        "tstamp": time.time(),
    }


def _id_of(files: AnswerFile, question_id: Any) -> str:
    """The same answer file has the same ids."""
    text = f"{files.generator}/{question_id}"
    return hashlib.blake2b(text.encode(), digest_size=11).hexdigest()


def _as_text(prompt: str | Messages) -> str:
    if isinstance(prompt, str):
        return prompt.strip()
    return "\n\n".join(f"{one['role']}: {one['content']}" for one in prompt)


def _write_lines(target: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    _write(target, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def _write(target: Path, text: str) -> None:
    try:
        write_text(target, text)
    except OSError as error:
        raise FasttrError(f"samples_file: cannot write {target}: {error}") from error


_TURNS: dict[str, Callable[[Mapping[str, Any]], list[str | Messages]]] = {
    "alpaca_eval": _turns_of_alpaca,
    "arena_hard": _turns_of_arena,
    "mt_bench": _turns_of_mt_bench,
    "pairwise": _turns_of_pairwise,
}
_WRITERS: dict[str, Callable[[AnswerFile, str, _Rows, _Answers], None]] = {
    "alpaca_eval": _write_alpaca,
    "arena_hard": _write_arena,
    "mt_bench": _write_mt_bench,
    "pairwise": _write_pairwise,
}
