"""Fifty-five mistakes that people make: each is told with its cause and its cure, in one line.

A case is a command line in a folder of good and wrong things (`mistakes.py`), and what the answer
must hold. GO is a run that would be good without the mistake.
"""

import re
import shlex
from pathlib import Path
from typing import NamedTuple

import pytest

from fasttr.cli import main
from tests.cli.mistakes import write_models, write_rows

GO = (
    "--model_name_or_path tiny --dataset_name good.jsonl --max_steps 2 --train_batch_size 4 "
    "--learning_rate 1e-3 --max_length 64 --logging_steps 1 --save_strategy no --use_cpu "
    "--bf16 false --disable_tqdm"
)


class Case(NamedTuple):
    command: str  # GO stands for its words; later flags win over them
    answer: str  # a pattern
    trains: bool = False  # it is a warning: the run goes on


CASES = [
    Case("trian", r"got command 'trian'.*did you mean 'train'"),
    Case("train", r"missing: model_name_or_path \(.*\); dataset_name \(.*--help"),
    Case("train GO --learning_rte 1e-5", r"unknown key 'learning_rte' \(did you mean 'learning_r"),
    Case("train GO --loss_type dpo", "loss_type: got 'dpo'; DPO is called sigmoid"),
    Case("train GO --dataset_name nope.jsonl", "nope.jsonl does not exist: give a .json"),
    Case("train GO --model_name_or_path tinny", "there is no folder 'tinny' here, and the hub"),
    Case("train GO --model_name_or_path some/model", "no folder 'some/model' here.*HF_HUB_OFFLINE"),
    Case(
        "train GO --dataset_name other_names.jsonl",
        "columns 'question', 'good', 'bad'; wanted .*columns: {chosen: good, rejected: bad}",
    ),
    Case(
        "train GO --ref_update sof",
        r"ref_update: got 'sof'; wanted one of none, soft, hard \(did you mean 'soft'",
    ),
    Case(
        "train GO --dataset_format hh-rlhf",
        r"dataset_format: got 'hh-rlhf'; wanted one of hh_rlhf \(did you mean 'hh_rlhf'",
    ),
    Case("train GO --dataset_name hh.jsonl", "dataset_format: hh_rlhf", trains=True),
    Case("train GO --dataset_name empty.jsonl", "empty.jsonl is empty: wanted at least one row"),
    Case("train GO --dataset_name broken.jsonl", "broken JSON at line 6: .*where the line ends"),
    Case("train GO --dataset_name null.jsonl", "row 20 .*chosen is null; wanted text or a list"),
    Case(
        "train GO --dataset_name same.jsonl",
        "none of 24 rows can be trained on .*24: chosen is identical to rejected",
    ),
    Case("kto GO --dataset_name odd_label.jsonl", "row 0 .*label is 'good'; wanted true or false"),
    Case(
        "train GO --loss_type sigmoid --dataset_name unpaired.jsonl",
        "got unpaired rows; wanted pairs .*fasttr kto",
    ),
    Case(
        "kto GO --dataset_name one_class.jsonl",
        r"WARNING: all 24 rows are desirable \(label true\)",
        trains=True,
    ),
    Case(
        "train GO --dataset_name bot.jsonl",
        "WARNING: 24 rows .* unknown role .*'bot'.*wanted .*assistant",
        trains=True,
    ),
    Case(
        "train GO --dataset_name other_case.jsonl",
        "columns: {prompt: Prompt, chosen: Chosen, rejected: Rejected}",
    ),
    Case("train GO --dataset_name sharegpt.jsonl", "read 24 rows .* kept 24", trains=True),
    Case("train GO --dataset_name good.csv", "read 24 rows of good.csv .* kept 24", trains=True),
    Case("train --config broken.yaml", "config: broken.yaml is not YAML: .*line 2"),
    Case(
        "train --config nested.yaml",
        "unknown key 'model': a file of settings is flat: write model_name_or_path",
    ),
    Case("train GO --use_peft --lora_r 0", "lora_r: got 0; wanted a whole number from 1"),
    Case(
        "train GO --lora_r 8",
        "lora_r: ignored: read only with use_peft: true",
        trains=True,
    ),
    Case(
        "train GO --ref_update soft",
        "WARNING: the reference will never move: ref_update_every is 512 and the run has 2 steps; "
        "lower ref_update_every",
        trains=True,
    ),
    Case("train GO --ref_update soft --ref_update_alpha 2", "got 2.*wanted a number from 0 to 1"),
    Case(
        "train GO --ref_update_alpha 0.7 --ref_update_every 1",
        "ref_update_alpha: got 0.7 without ref_update; write ref_update: soft",
    ),
    Case(
        "train GO --preset tr-soft --ref_update hard",
        "ref_update: got hard with preset tr-soft, which means soft; leave one",
    ),
    Case(
        "train GO --resume_from_checkpoint true",
        "holds no checkpoint yet; starting from the beginning",
        trains=True,
    ),
    Case(
        "train GO --output_dir saved --resume_from_checkpoint true --beta 0.5",
        "made with another configuration .*beta: 0.1 -> 0.5",
    ),
    Case(
        "train GO --output_dir saved",
        "saved already holds checkpoint-1; pass --resume_from_checkpoint .*--overwrite_output_dir",
    ),
    Case(
        "train GO --output_dir finished",
        "finished already holds metrics.jsonl; pass .*--overwrite_output_dir",
    ),
    Case("train GO --loss_type sigmoid,sft", r"a list is written \[sigmoid, sft\]"),
    Case(
        "train GO --model_name_or_path small_vocabulary",
        "the tokenizer knows ids up to 299, and the embedding of small_vocabulary has 40 rows; "
        "wanted .*: resize_embeddings true adds them",
    ),
    Case(
        "train GO --ref_model_name_or_path small_vocabulary",
        "ref_model_name_or_path: the tokenizer .* has 40 rows; wanted .*resize_embeddings true",
    ),
    Case(
        "train GO --model_name_or_path endless", "every completion must end with one: set eos_token"
    ),
    Case(
        "train GO --model_name_or_path untemplated --dataset_name messages.jsonl",
        "'untemplated' has no chat template: .*give rows of plain text",
    ),
    Case(
        "train GO --model_name_or_path raising --dataset_name messages.jsonl",
        r"row 0 .*chat template of the tokenizer 'raising' refuses the messages: .*no bots",
    ),
    Case(
        "train GO --model_name_or_path truncated --dataset_name null.jsonl",
        "cannot load truncated/model.safetensors: .*copy or download it again",
    ),
    Case("train GO --model_name_or_path sees", "got architecture 'vit', .*no causal.*wanted"),
    Case(
        "train GO --learning_rate 10 --max_steps 4",
        "WARNING: every gradient since .* is 0 .*learning_rate that is too high",
        trains=True,
    ),
    Case("train GO --learning_rate 0", "WARNING: learning_rate is 0: nothing will be", trains=True),
    Case(
        "train GO --lr_scheduler_type cosin --dataset_name null.jsonl",
        r"lr_scheduler_type: got 'cosin'; wanted one of .*did you mean 'cosine'",
    ),
    Case(
        "train GO --eval_strategy steps",
        "has no split 'test': it has 'train'; set .*eval_dataset_name or test_split_size",
    ),
    Case(
        "train GO --test_split_size 0.25 --eval_strategy steps --eval_steps 2",
        r"good.jsonl \(test\), kept 6",
        trains=True,
    ),
    Case(
        "eval --model_name_or_path tiny --eval_dataset_name good.jsonl --use_cpu --bf16 false",
        "read 24 rows of good.jsonl",
        trains=True,
    ),
    Case(
        "eval --model_name_or_path tiny --prompts prompts.txt",
        "samples_file: missing; samples need --prompts and --samples_file",
    ),
    Case("train GO --device cuda", "unknown key 'device': a run takes the GPU when there is one"),
    Case(
        "train GO --early_stopping_patience 3",
        "early_stopping_patience: got 3 with eval_strategy no; wanted steps or epoch",
    ),
    Case(
        "train GO --preset tr-soft --print_config=skip_default",
        r"(?s)beta: 0.05.*ref_update: soft.*ref_update_every: 64",
        trains=True,
    ),
    Case("train GO --num_processes 0", "num_processes: got 0; wanted a whole number from 1"),
    Case(
        "train GO --attn_implementation flash_attention_2", "attn_implementation: got flash_attent"
    ),
    Case("kto GO --train_batch_size 1", "got a group of 1 row with kto.*wanted 2"),
]

# Found later than the fifty-five.
MORE = [
    Case("train --config twice.yaml", "config: twice.yaml has beta in line 1 and in line 3; leave"),
    Case("train broken.yaml", "got 'broken.yaml' where a flag was wanted; write --config broken"),
    Case("train GO -beta 0.1", "got '-beta'; wanted a flag with two dashes: --beta"),
    Case("train GO --lr_scheduler cosine", "unknown key 'lr_scheduler' .did you mean 'lr_schedul"),
    Case("train GO --loss_type SIGMOID", "did you mean 'sigmoid'"),
    Case("train GO --preset soft", "got 'soft'; wanted one of .*did you mean 'tr-soft'"),
    Case("train GO --output_dir good.csv", "output_dir: good.csv is a file; wanted a folder"),
    Case("train GO --dataset_name ''", "dataset_name: got ''; wanted a name, or leave it out"),
    Case(
        "train GO --datasets '[{path: a}, {pth: b}]'",
        r"datasets\[1\]: unknown key 'pth'; wanted path",
    ),
    Case("kto GO --dataset_name text_label.jsonl", "label is 'true'; wanted true or false, not as"),
    Case("train GO --dataset_name semicolons.csv", "cannot be read: .*a comma between columns"),
    Case(
        "train GO --model_name_or_path no_tokenizer", "no tokenizer in 'no_tokenizer'; wanted its"
    ),
    Case(
        "train GO --eval_dataset_name nope.jsonl",
        "WARNING: eval_dataset_name: nothing is evaluated; write eval_strategy",
        trains=True,
    ),
    Case(
        "train GO --test_split_size 0.25 --eval_strategy steps --early_stopping_patience 1 "
        "--metric_for_best_model accuracy",
        "metric_for_best_model: got 'accuracy'; wanted loss, rewards/margins",
    ),
    Case("plan --model llama-3-8b --gpus 0", "gpus: got 0; wanted a whole number from 1"),
    Case("sweep dpo --beta 0.1,0.2 --output_dir s", "missing: model_name_or_path .*; dataset_name"),
    Case("report good.jsonl", "good.jsonl is no folder; wanted the output_dir of a run"),
    Case(
        "eval --model_name_or_path tiny --anchor tiny", "did you mean 'anchor_model_name_or_path'"
    ),
    Case(
        "eval --model_name_or_path tiny --prompts good.jsonl --judge len --use_cpu",
        "judge: got 'len', which is no folder here and no module:function",
    ),
]


@pytest.fixture(scope="module")
def folder(workspace, tmp_path_factory) -> Path:
    """Where the cases are run; `saved` is a run with a checkpoint, `finished` one without."""
    made = tmp_path_factory.mktemp("mistakes")
    write_rows(made)
    write_models(workspace / "model", made)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(made)
        saving = "--output_dir saved --save_strategy steps --save_steps 1 --max_steps 1"
        main(["train", *words_of(f"GO {saving}")])
        (made / "saved" / "model.safetensors").unlink()
        main(["train", *words_of("GO --output_dir finished --max_steps 1")])
    return made


def words_of(line: str) -> list[str]:
    return shlex.split(line.replace("GO", GO))


def test_there_are_fifty_five():
    assert len(CASES) == 55


@pytest.mark.parametrize("case", [*CASES, *MORE], ids=lambda case: case.command[:50])
def test_a_mistake_is_told_with_its_cure(case, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    words = words_of(case.command)
    if words[0] in ("train", "kto") and "--output_dir" not in words and len(words) > 3:
        words += ["--output_dir", str(tmp_path / "out")]
    try:
        main(words)
        status = 0
    except SystemExit as left:
        status = left.code
    said = capsys.readouterr()
    assert status in ((0, None) if case.trains else (2,)), said.err
    answer = said.out if case.trains else said.err
    assert re.search(case.answer, answer), answer
    if not case.trains:
        assert answer.count("\n") == 1
        assert not (tmp_path / "out").exists()
