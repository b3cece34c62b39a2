"""How rows are cut: beside their prompt, on the left, and each part by itself."""

from __future__ import annotations

from types import SimpleNamespace

import datasets
import pytest

from fasttr import TrainConfig
from fasttr.data.load import DataConfig, encode_rows
from fasttr.errors import FasttrError
from fasttr.packing.layout import pack
from tests.data.rows import decoded
from tests.data.tokenizers import make_tokenizer
from tests.runs import settings

PAIR = {"prompt": "abcdefgh", "chosen": "CDE", "rejected": "RSTUVW"}


def test_a_prompt_keeps_its_last_tokens_and_a_completion_its_first(load, tokenizer):
    """As TRL had it from 0.12 to 0.28. A byte is a token, and EOS is one."""
    trees = load([PAIR], max_prompt_length=3, max_completion_length=4)
    assert decoded(tokenizer, trees) == [("fgh", "CDE</s>", "RSTU")]
    assert "cut the first tokens of 1 prompts" in str(trees.report)
    trees = load([PAIR], max_prompt_length=3, max_length=6)
    assert decoded(tokenizer, trees) == [("fgh", "CDE", "RST")]
    trees = load([PAIR], max_prompt_length=8)
    assert decoded(tokenizer, trees) == [("abcdefgh", "CDE</s>", "RSTUVW</s>")]
    assert "cut the first" not in str(trees.report)


def trl_sides(tokenizer, rows, max_length):
    """Prompt and completion of each side as TRL's collator leaves them with keep_end."""
    from trl.trainer.dpo_trainer import DataCollatorForPreference, DPOTrainer

    args = SimpleNamespace(dataset_num_proc=None, max_length=max_length, truncation_mode="keep_end")
    prepared = DPOTrainer._prepare_dataset(
        SimpleNamespace(_tokenizer=tokenizer), rows, tokenizer, args, "train"
    )
    collate = DataCollatorForPreference(
        pad_token_id=tokenizer.pad_token_id, max_length=max_length, truncation_mode="keep_end"
    )
    sides = []
    for row in prepared:
        batch = collate.torch_call([row])
        for place in range(2):
            real = batch["attention_mask"][place].bool()
            ids, mask = batch["input_ids"][place][real], batch["completion_mask"][place][real]
            sides.append((ids[mask == 0].tolist(), ids[mask == 1].tolist()))
    return sides


@pytest.mark.parametrize("max_length", [4, 9, 12, 60])
def test_sides_that_keep_their_end_are_trls(max_length):
    tokenizer = make_tokenizer()
    rows = [
        {"prompt": "The sky is", "chosen": " blue", "rejected": " black, the sky is warm today."},
        {"prompt": "The sky is warm today.", "chosen": " blue", "rejected": " warm"},
        {"prompt": "a", "chosen": " The sun is warm, is warm, is warm", "rejected": " b"},
    ]
    trees = encode_rows(tokenizer, rows, DataConfig("rows", max_length=max_length, keeps_end=True))
    ours = []
    for tree in trees:
        skips = tree.prompt_skips or (0, 0)
        for skip, ids in zip(skips, tree.completions, strict=True):
            ours.append((tree.prompt_ids[skip:].tolist(), ids.tolist()))
    assert ours == trl_sides(tokenizer, datasets.Dataset.from_list(rows), max_length)
    unequal = [tree.prompt_skips is not None for tree in trees]
    assert any(unequal) == (max_length < 60)


def test_a_tree_whose_sides_see_different_prompts_is_taken_apart(load):
    """Its prompt is there twice, each as long as its side sees it."""
    (tree,) = load([PAIR], max_length=10, keeps_end=True)
    assert tree.prompt_skips == (0, 3)  # 2 of the chosen side's 12 tokens go, 5 of the other's 15
    batch = pack([tree])
    text = bytes(b"cdefgh" + b"CDE") + b"fgh" + b"RSTUVW"
    assert len(batch.input_ids) == len(text) + 2  # EOS, twice
    assert batch.position_ids.tolist() == [*range(10), *range(10)]
    assert batch.token_counts.tolist() == [4, 7]


def test_settings_that_leave_no_room_are_refused(workspace, tmp_path):
    values = settings(workspace, tmp_path, max_prompt_length=64)
    with pytest.raises(
        FasttrError, match=r"max_prompt_length: got 64, which leaves no room in max"
    ):
        TrainConfig(**values)
    with pytest.raises(FasttrError, match="truncation_mode: got keep_end with loss_type kto"):
        TrainConfig(**settings(workspace, tmp_path, truncation_mode="keep_end", loss_type="kto"))
