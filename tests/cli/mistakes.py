"""What people bring: good rows and a good model, and each of them wrong in one way."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

Rows = list[dict[str, Any]]

GOOD = [
    {"prompt": f"What is {i}?", "chosen": f" It is {i % 7}.", "rejected": f" No idea, {i % 5}."}
    for i in range(24)
]


def turns(question: str, answer: str, role: str = "assistant") -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": role, "content": answer}]


def renamed(names: dict[str, str]) -> Rows:
    return [{names[key]: value for key, value in row.items()} for row in GOOD]


def with_null(row: int) -> Rows:
    return [{**one, "chosen": None} if i == row else one for i, one in enumerate(GOOD)]


def unpaired(label: Callable[[int], Any]) -> Rows:
    return [
        {"prompt": row["prompt"], "completion": row["chosen"], "label": label(i)}
        for i, row in enumerate(GOOD)
    ]


def messages(role: str = "assistant") -> Rows:
    return [
        {side: turns(row["prompt"], row[side], role) for side in ("chosen", "rejected")}
        for row in GOOD
    ]


def sharegpt() -> Rows:
    return [
        {
            "conversations": [{"from": "human", "value": row["prompt"]}],
            "chosen": {"from": "gpt", "value": row["chosen"]},
            "rejected": {"from": "gpt", "value": row["rejected"]},
        }
        for row in GOOD
    ]


def transcripts() -> Rows:
    start = "\n\nHuman: {}\n\nAssistant:"
    return [
        {side: start.format(row["prompt"]) + row[side] for side in ("chosen", "rejected")}
        for row in GOOD
    ]


ROWS: dict[str, Rows] = {
    "good": GOOD,
    "other_names": renamed({"prompt": "question", "chosen": "good", "rejected": "bad"}),
    "other_case": renamed({"prompt": "Prompt", "chosen": "Chosen", "rejected": "Rejected"}),
    "hh": transcripts(),
    "null": with_null(20),
    "same": [{**row, "rejected": row["chosen"]} for row in GOOD],
    "odd_label": unpaired(lambda i: "good"),
    "text_label": unpaired(lambda i: "true"),
    "unpaired": unpaired(lambda i: i % 2 == 0),
    "one_class": unpaired(lambda i: True),
    "messages": messages(),
    "bot": messages("bot"),
    "sharegpt": sharegpt(),
}


def write_rows(folder: Path) -> None:
    for name, rows in ROWS.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text)
    (folder / "empty.jsonl").write_text("")
    lines = (folder / "good.jsonl").read_text().splitlines()
    (folder / "broken.jsonl").write_text("\n".join([*lines[:5], lines[5][:40], *lines[6:]]))
    quoted = [",".join(f'"{value}"' for value in row.values()) for row in GOOD]
    (folder / "good.csv").write_text("\n".join(["prompt,chosen,rejected", *quoted]) + "\n")
    lines = [";".join(row.values()) for row in [*GOOD, {"prompt": "a", "chosen": "b, c, d"}]]
    (folder / "semicolons.csv").write_text("\n".join(["prompt;chosen;rejected", *lines]) + "\n")
    (folder / "twice.yaml").write_text("beta: 0.1\nmax_steps: 1\nbeta: 0.2\n")
    (folder / "broken.yaml").write_text("beta: 0.1\n  max_steps: [1\n")
    (folder / "nested.yaml").write_text("model:\n  name: tiny\ntraining:\n  beta: 0.1\n")
    (folder / "prompts.txt").write_text("What is 3?\n")


def changed_json(file: Path, **changes: Any) -> None:
    content = json.loads(file.read_text())
    kept = {key: value for key, value in {**content, **changes}.items() if value is not None}
    file.write_text(json.dumps(kept))


def write_models(model: Path, folder: Path) -> None:
    """`tiny` is a good one."""

    def copy(name: str) -> Path:
        return Path(shutil.copytree(model, folder / name))

    copy("tiny")
    changed_json(copy("sees") / "config.json", model_type="vit")
    changed_json(copy("endless") / "tokenizer_config.json", eos_token=None)
    (folder / "endless" / "special_tokens_map.json").unlink(missing_ok=True)
    for name, template in (("untemplated", None), ("raising", "{{ raise_exception('no bots') }}")):
        made = copy(name)
        (made / "chat_template.jinja").unlink(missing_ok=True)
        changed_json(made / "tokenizer_config.json", chat_template=template)
    whole = (copy("truncated") / "model.safetensors").read_bytes()
    (folder / "truncated" / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    for file in copy("no_tokenizer").glob("*token*"):
        file.unlink()
    (copy("pickled") / "model.safetensors").rename(folder / "pickled" / "pytorch_model.bin")
    smaller_vocabulary(copy("small_vocabulary"))


def smaller_vocabulary(folder: Path, rows: int = 300) -> None:
    """A model of `rows` embeddings, now with fewer than its tokenizer has tokens."""
    changed_json(folder / "config.json", vocab_size=40)
    tensors = {
        name: tensor[:40].contiguous() if len(tensor) == rows else tensor
        for name, tensor in load_file(folder / "model.safetensors").items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
