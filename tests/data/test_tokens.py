"""Token ids equal TRL's own, on real rows and on hard ones made by hand."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from fasttr.data.load import DataConfig, encode_rows
from fasttr.data.tokens import (
    Example,
    common_prefix_length,
    encode,
    encode_texts,
    split_at_boundary,
    tokenizer_fingerprint,
)
from fasttr.errors import FasttrError

SHARED = Path(__file__).parents[3] / "shared" / "data"

TEXTS = [
    "The sky is blue, the sky is black and the sun is warm today.",
    "Naïve café in Zürich: 東京は晴れ 👩‍👩‍👧 and 👍🏽 and 🇨🇭, ok?\n\nYes.  Two  spaces.",
    "user\nassistant\nsystem\nYou are a helpful assistant. <think> </think>",
]

TURN = "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
HEADER = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
TEMPLATES = {
    "ends_with_a_header": "{% for m in messages %}" + TURN + "{% endfor %}" + HEADER,
    "header_differs_from_the_turn": "{% for m in messages %}" + TURN + "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n\n</think>\n\n{% endif %}",
    "strips": "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] | trim }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}",
    "adds_a_system_turn": "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a "
    "helpful assistant."
    "<|im_end|>\n{% endif %}{% for m in messages %}" + TURN + "{% endfor %}" + HEADER,
    "no_header_no_end": "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}",
    "tools_and_kwargs": "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% "
    "endif %}"
    "{% for m in messages %}"
    + TURN
    + "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think> </think>{% endif %}{% "
    "endif %}",
}


def make_tokenizer(texts=TEXTS, *, vocab_size=400, adds_bos=False, template="ends_with_a_header"):
    """A byte-level BPE tokenizer with BOS, EOS, PAD and a chat template, trained on the texts."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = TEMPLATES.get(template, template)
    return tokenizer


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


TEXT_ROWS = {
    "plain": ("The sky is", " blue", " black"),
    "merge_across_the_boundary": ("The sk", "y is", "in"),
    "emoji_across_the_boundary": ("family: 👩‍", "👩‍👧 yes", "👍🏽"),
    "flag_and_combining": ("Zu", "̈rich 🇨", "̈ri 🇨🇭"),
    "one_side_a_prefix_of_the_other": ("The sun", " is", " is warm"),
    "empty_prompt": ("", "The sky", "The sun"),
    "empty_completion": ("The sky is", "", " blue"),
    "eos_already_in_the_text": ("The sky is", " blue</s>", " black</s> </s>"),
    "eos_ends_the_prompt": ("The sky is</s>", "</s>", " blue"),
    "bos_in_the_text": ("<s>The", "<s>", " sky"),
    "spaces": ("  ", "   two", " "),
    "cjk": ("東京", "は晴れ", "は雨"),
}


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


def say(role, content, **extra):
    return {"role": role, "content": content, **extra}


CONVERSATIONS = [
    ([say("user", "The sky?")], [say("assistant", "blue")], [say("assistant", "black")]),
    ([say("user", " The sky? ")], [say("assistant", " blue ")], [say("assistant", "blue")]),
    (
        [say("system", "Zürich"), say("user", "👩‍")],
        [say("assistant", "👩‍👧")],
        [say("assistant", "👍🏽")],
    ),
    (
        [say("user", "a"), say("assistant", "b"), say("user", "c")],
        [say("assistant", "d")],
        [say("assistant", "</s>")],
    ),
    (
        [say("user", "a"), say("assistant", "begun: ")],
        [say("assistant", "d")],
        [say("assistant", "e")],
    ),
    (
        [say("user", "a")],
        [say("assistant", "b"), say("user", "more"), say("assistant", "c")],
        [say("assistant", "b"), say("user", "less"), say("assistant", "")],
    ),
    ([say("user", "")], [say("assistant", "")], [say("assistant", "<|im_end|>")]),
]


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


@pytest.mark.parametrize("template", TEMPLATES)
def test_rendering_then_tokenising_equals_the_templates_own_ids(template):
    tokenizer = make_tokenizer(adds_bos=True, template=template)
    for prompt, chosen, _ in CONVERSATIONS:
        (row,) = encode(tokenizer, [Example(0, prompt, (chosen,))])
        wanted = tokenizer.apply_chat_template(prompt + chosen, tokenize=True, return_dict=True)[
            "input_ids"
        ]
        assert [*row.prompt_ids.tolist(), *row.completions[0].tolist()] == wanted


def test_a_tokenizer_with_its_own_template_method_is_asked_for_ids():
    class Own(PreTrainedTokenizerFast):
        def apply_chat_template(self, conversation, **options):
            assert options["tokenize"]
            return {"input_ids": [len(message["content"]) for message in conversation]}

    base = make_tokenizer()
    own = Own(tokenizer_object=base.backend_tokenizer, eos_token="</s>")
    own.chat_template = "its own"
    (row,) = encode(own, [Example(0, [say("user", "abc")], ([say("assistant", "abcde")],))])
    assert row.prompt_ids.tolist() == [3]
    assert row.completions[0].tolist() == [5]


def test_one_call_and_many_calls_give_the_same_ids(monkeypatch):
    tokenizer = make_tokenizer(adds_bos=True)
    texts = [*TEXTS, "", "a", *TEXTS]
    together = encode_texts(tokenizer, texts, add_special_tokens=True)
    monkeypatch.setattr("fasttr.data.tokens.MAX_CHARACTERS_PER_CALL", 10)
    apart = encode_texts(tokenizer, texts, add_special_tokens=True)
    assert [ids.tolist() for ids in together] == [ids.tolist() for ids in apart]
    assert [ids.tolist() for ids in apart] == [tokenizer(text)["input_ids"] for text in texts]


def test_the_boundary_is_the_smaller_of_both_sides():
    prompt, chosen, rejected = (
        np.array(ids, dtype=np.int32) for ids in ([1, 2, 3], [1, 2, 3, 4], [1, 9])
    )
    row = split_at_boundary(prompt, [chosen, rejected])
    assert row.prompt_ids.tolist() == [1]
    assert [ids.tolist() for ids in row.completions] == [[2, 3, 4], [9]]
    assert row.mismatch
    assert not split_at_boundary(prompt, [chosen]).mismatch
    assert common_prefix_length(prompt[:0], chosen) == 0


def test_refusals_are_one_line():
    tokenizer = make_tokenizer()
    chat = Example(7, [say("user", "a")], ([say("assistant", "b")],))
    tokenizer.chat_template = "{{ raise_exception('roles must\nalternate') }}"
    with pytest.raises(
        FasttrError, match=r"^row 7 .*: the chat template of .* refuses .*roles must alternate$"
    ):
        encode(tokenizer, [chat])
    tokenizer.chat_template = None
    with pytest.raises(
        FasttrError, match="has no chat template: use an instruction-tuned model's tokenizer"
    ):
        encode(tokenizer, [chat])
    with pytest.raises(FasttrError, match=r"row 7 .*: chat_template_kwargs holds truncation"):
        encode(make_tokenizer(), [chat._replace(template_kwargs={"truncation": True})])
    tokenizer.eos_token = None
    with pytest.raises(FasttrError, match="has no EOS token"):
        encode(tokenizer, [Example(0, "a", ("b",))])


def test_the_fingerprint_of_a_tokenizer_follows_what_decides_ids():
    tokenizer = make_tokenizer()
    before = tokenizer_fingerprint(tokenizer)
    tokenizer(
        ["a", "a b c"], padding=True, truncation=True, max_length=2
    )  # leaves its mark on the backend
    assert tokenizer_fingerprint(tokenizer) == before
    assert tokenizer_fingerprint(make_tokenizer()) == before
    assert tokenizer_fingerprint(make_tokenizer(adds_bos=True)) != before
    assert tokenizer_fingerprint(make_tokenizer(vocab_size=300)) != before
    tokenizer.chat_template += " "
    assert tokenizer_fingerprint(tokenizer) != before
