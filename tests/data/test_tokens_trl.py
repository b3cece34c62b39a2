"""Token ids equal TRL's own, on real rows and on hard ones made by hand."""

from __future__ import annotations

import random
from types import SimpleNamespace

import datasets
import pytest

from fasttr.data.load import DataConfig, encode_rows
from fasttr.data.tokens import tokenizer_fingerprint
from tests.data.tokenizers import CONVERSATIONS, TEMPLATES, TEXT_ROWS, make_tokenizer
from tests.places import SHARED


def trl_pairs(tokenizer, rows, max_length):
    """TRL's own (prompt ids, chosen ids, rejected ids): its preparation of the data set, then its
    collator's cut."""
    from trl.trainer.dpo_trainer import DataCollatorForPreference, DPOTrainer

    args = SimpleNamespace(
        dataset_num_proc=None, max_length=max_length, truncation_mode="keep_start"
    )
    prepared = DPOTrainer._prepare_dataset(
        SimpleNamespace(_tokenizer=tokenizer), rows, tokenizer, args, "train"
    )
    collate = DataCollatorForPreference(pad_token_id=tokenizer.pad_token_id, max_length=max_length)
    result = []
    for row in prepared:
        batch = collate.torch_call([row])
        sides = []
        for i in range(2):
            ids = batch["input_ids"][i][batch["attention_mask"][i].bool()]
            mask = batch["completion_mask"][i][batch["attention_mask"][i].bool()].bool()
            sides.append((ids[~mask].tolist(), ids[mask].tolist()))
        assert sides[0][0] == sides[1][0]
        result.append((sides[0][0], sides[0][1], sides[1][1]))
    return result


def our_rows(tokenizer, rows, max_length, **options):
    trees = encode_rows(tokenizer, rows, DataConfig("rows", max_length=max_length, **options))
    return [
        (tree.prompt_ids.tolist(), *(ids.tolist() for ids in tree.completions)) for tree in trees
    ], trees


def assert_equal_to_trl(tokenizer, rows, max_length=None, *, mismatches=None):
    rows = rows if isinstance(rows, datasets.Dataset) else datasets.Dataset.from_list(rows)
    wanted = trl_pairs(tokenizer, rows, max_length)
    ours, trees = our_rows(tokenizer, rows, max_length)
    wanted = [row for row in wanted if row[1] != row[2]]
    assert len(wanted) > 0
    assert ours == wanted
    if mismatches is not None:
        assert trees.report.boundary_mismatches == mismatches
    return trees


@pytest.fixture(autouse=True)
def _no_bars():
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def shared_rows(file, tmp_path, count):
    if not (SHARED / file).is_file():
        pytest.skip("the shared data is not here")
    rows = datasets.load_dataset(
        "json", data_files=str(SHARED / file), split="train", cache_dir=str(tmp_path)
    )
    return rows.select(range(min(count, len(rows))))


@pytest.mark.parametrize("max_length", [None, 128])
def test_hh_transcripts_without_a_format_equal_trl(tmp_path, max_length):
    rows = shared_rows("hh-rlhf/train.jsonl.gz", tmp_path, 400)
    tokenizer = make_tokenizer(rows["chosen"], vocab_size=2000)
    trees = assert_equal_to_trl(tokenizer, rows, max_length)
    assert trees.report.boundary_mismatches > 0
    assert (trees.report.truncated > 0) == (max_length is not None)


@pytest.mark.parametrize("template", TEMPLATES)
def test_conversations_equal_trl(tmp_path, template):
    rows = shared_rows("dpo-en/train.jsonl.gz", tmp_path, 60)
    tokenizer = make_tokenizer(
        [m["content"] for row in rows["chosen"] for m in row], vocab_size=1500, template=template
    )
    assert_equal_to_trl(tokenizer, rows, 256)


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("max_length", [None, 12])
def test_hard_text_rows_equal_trl(adds_bos, max_length):
    rows = [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in TEXT_ROWS.values()]
    trees = assert_equal_to_trl(make_tokenizer(adds_bos=adds_bos), rows, max_length)
    assert trees.report.boundary_mismatches > 0
    assert (trees.prompt_lengths == 0).any() == (not adds_bos)


def test_random_text_rows_equal_trl():
    pieces = [
        "The sky",
        " is",
        " ",
        "  ",
        "👩‍👩‍👧",
        "‍",
        "ü",
        "̈",
        "東京",
        "\n\n",
        "</s>",
        "<s>",
        "a",
        "<|im_",
        "end|>",
        "",
    ]
    draw = random.Random(0)
    text = lambda: "".join(draw.choices(pieces, k=draw.randint(0, 6)))  # noqa: E731
    rows = [{"prompt": text(), "chosen": text(), "rejected": text()} for _ in range(300)]
    trees = assert_equal_to_trl(make_tokenizer(adds_bos=True), rows, 20)
    assert trees.report.dropped
    assert trees.report.boundary_mismatches > 5


@pytest.mark.filterwarnings("ignore:This sequence already has </s>")
def test_a_tokenizer_in_python_that_ends_every_text_equals_trl():
    from transformers import ByT5Tokenizer

    tokenizer = ByT5Tokenizer()
    assert not tokenizer.is_fast
    rows = [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in TEXT_ROWS.values()]
    # The EOS added to a prompt parts from the whole text, except where the text itself goes on with
    # one.
    assert_equal_to_trl(tokenizer, rows, mismatches=len(rows) - 1)
    tokenizer.chat_template = TEMPLATES["ends_with_a_header"]
    assert_equal_to_trl(
        tokenizer, [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in CONVERSATIONS]
    )
    assert tokenizer_fingerprint(tokenizer) != tokenizer_fingerprint(ByT5Tokenizer())


def test_implicit_text_prompts_equal_trl():
    rows = [
        {"chosen": "the sky is blue", "rejected": "the sky is black"},
        {"chosen": "the sky is  blue", "rejected": "the sky is  red"},
        {"chosen": "the sky", "rejected": "the sky is red"},
        {"chosen": "the sky is red ", "rejected": "the sky is red"},
        {"chosen": "a b", "rejected": "c"},
        {"chosen": "👩‍👩‍👧", "rejected": "👩‍👧"},
        {"chosen": "x y", "rejected": "x z"},
    ]
    assert_equal_to_trl(make_tokenizer(), rows)
    assert_equal_to_trl(make_tokenizer(adds_bos=True), rows, 9)


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("template", TEMPLATES)
def test_hard_conversations_equal_trl(template, adds_bos):
    tokenizer = make_tokenizer(adds_bos=adds_bos, template=template)
    rows = [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in CONVERSATIONS]
    assert_equal_to_trl(tokenizer, rows)
    assert_equal_to_trl(tokenizer, rows, 30)
    assert_equal_to_trl(
        tokenizer, [{"chosen": p + c, "rejected": p + r} for p, c, r in CONVERSATIONS]
    )


TOOL = {"type": "function", "function": {"name": "sky", "description": "colour of the sky"}}


@pytest.mark.parametrize(
    "tools", [[TOOL], '[{"name": "sky"}]', "[]"], ids=["list", "json", "empty"]
)
def test_tools_and_template_kwargs_equal_trl(tools):
    prompt, chosen, rejected = CONVERSATIONS[0]
    rows = [
        {
            "prompt": prompt,
            "chosen": chosen,
            "rejected": rejected,
            "tools": tools,
            "chat_template_kwargs": kwargs,
        }
        for kwargs in ({"enable_thinking": False}, {"enable_thinking": True})
    ]
    tokenizer = make_tokenizer(template="tools_and_kwargs")
    trees = assert_equal_to_trl(tokenizer, rows)
    assert ("sky" in tokenizer.decode(trees[0].prompt_ids).split("The sky?")[0]) == (tools != "[]")
    assert (
        trees.report.boundary_mismatches == 1
    )  # of the row without thinking, whose header the turns do not repeat
    assert_equal_to_trl(
        tokenizer, [{key: row[key] for key in row if key != "chat_template_kwargs"} for row in rows]
    )


@pytest.mark.parametrize("kind", ["text", "messages"])
def test_unpaired_rows_equal_trl(kind):
    from trl.trainer.kto_trainer import KTOTrainer

    if kind == "text":
        rows = [{"prompt": p, "completion": c, "label": c < r} for p, c, r in TEXT_ROWS.values()]
    else:
        rows = [{"prompt": p, "completion": c, "label": len(p) == 1} for p, c, _ in CONVERSATIONS]
    rows = datasets.Dataset.from_list(rows)
    tokenizer = make_tokenizer(adds_bos=True)
    args = SimpleNamespace(dataset_num_proc=None, max_length=16)
    trainer = SimpleNamespace(_tokenizer=tokenizer, calculate_KL=False)
    wanted = KTOTrainer._prepare_dataset(trainer, rows, tokenizer, args, "eval")
    ours, trees = our_rows(tokenizer, rows, 16)
    assert ours == [
        (row["prompt_ids"], row["completion_ids"][: 16 - len(row["prompt_ids"])]) for row in wanted
    ]
    assert trees.labels.tolist() == wanted["label"]
    assert 0 < len(trees) <= len(rows)
