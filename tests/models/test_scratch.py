"""`fasttr init`: the folder it writes, the tokenizer in it, and what it refuses."""

import gzip
import json

import pytest
import torch

from fasttr.errors import FasttrError
from fasttr.models import scratch, scratch_tokenizer

TEXT = "Human: what is a good prior?\n\nAssistant: one that can be argued with.\n" * 40
UNICODE = "Héllo  wörld\n\n\t日本語 🎉 \u0000 \u200d don't <x> 12345\r\n e\u0301"
TINY = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "vocab_size": 300}


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def llama(text_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "llama"
    scratch.init_model("llama", **TINY, tokenizer_data=text_file, output_dir=folder)
    return folder


def load(folder):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("arch", scratch.ARCHS)
def test_every_architecture_loads_and_generates(arch, text_file, tmp_path):
    scratch.init_model(arch, **TINY, tokenizer_data=text_file, output_dir=tmp_path / "m")
    model, tokenizer = load(tmp_path / "m")
    assert model.dtype == torch.float32
    assert model.config.vocab_size == len(tokenizer) == 300
    assert tokenizer.decode(tokenizer(UNICODE)["input_ids"], skip_special_tokens=True) == UNICODE
    ids = tokenizer("Human:", return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=4, do_sample=False)
    assert out.shape[1] > ids["input_ids"].shape[1]
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    # logits neither dead nor wild: the loss of an untrained model is near that of a uniform guess
    loss = model(**ids, labels=ids["input_ids"]).loss
    assert abs(loss.item() - torch.log(torch.tensor(300.0)).item()) < 1.0


def test_same_seed_same_bytes_and_global_random_state_untouched(llama, text_file, tmp_path):
    before = torch.random.get_rng_state()
    scratch.init_model("llama", **TINY, tokenizer_data=text_file, output_dir=tmp_path / "same")
    scratch.init_model(
        "llama", **TINY, tokenizer_data=text_file, output_dir=tmp_path / "other", seed=1
    )
    assert torch.equal(before, torch.random.get_rng_state())
    names = sorted(p.name for p in llama.iterdir())
    assert names == sorted(p.name for p in (tmp_path / "same").iterdir())
    assert all((llama / n).read_bytes() == (tmp_path / "same" / n).read_bytes() for n in names)
    assert (llama / "model.safetensors").read_bytes() != (
        tmp_path / "other" / "model.safetensors"
    ).read_bytes()


def test_no_path_doubles_bos(llama):
    _, tokenizer = load(llama)
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    plain = tokenizer("hi")["input_ids"]
    chat = tokenizer.apply_chat_template(messages, return_dict=False)
    rendered = tokenizer(tokenizer.apply_chat_template(messages, tokenize=False))["input_ids"]
    assert plain[0] == tokenizer.bos_token_id
    assert [ids.count(tokenizer.bos_token_id) for ids in (plain, chat, rendered)] == [1, 0, 1]


def test_prompt_with_generation_header_is_a_prefix_of_the_chat_and_the_answer_ends_with_eos(llama):
    _, tokenizer = load(llama)
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": " yo"}]
    prompt = tokenizer.apply_chat_template(
        messages[:1], add_generation_prompt=True, return_dict=False
    )
    full = tokenizer.apply_chat_template(messages, return_dict=False)
    assert full[: len(prompt)] == prompt
    assert tokenizer.decode(full[len(prompt) :]) == " yo<|im_end|>\n"
    assert full[-2] == tokenizer.eos_token_id
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}) == 3


def test_byte_tokenizer_has_one_token_a_byte():
    tokenizer = scratch.byte_tokenizer()
    assert len(tokenizer) == 260
    ids = tokenizer(UNICODE, add_special_tokens=False)["input_ids"]
    assert len(ids) == len(UNICODE.encode())
    assert tokenizer.decode(ids) == UNICODE
    assert sorted(tokenizer.convert_tokens_to_ids(scratch.SPECIAL_TOKENS)) == [0, 1, 2, 3]


def test_without_data_the_folder_has_the_byte_tokenizer(tmp_path):
    scratch.init_model(
        "llama", hidden_size=32, num_layers=1, num_heads=2, output_dir=tmp_path / "m"
    )
    model, tokenizer = load(tmp_path / "m")
    assert model.config.vocab_size == len(tokenizer) == 260


def test_gemma3_has_a_full_and_a_sliding_layer_with_the_window_asked_for(tmp_path):
    scratch.init_model(
        "gemma3", **TINY, output_dir=tmp_path / "m", sliding_window=16, num_kv_heads=1
    )
    model, _ = load(tmp_path / "m")
    assert model.config.layer_types == ["sliding_attention", "full_attention"]
    assert (model.config.sliding_window, model.config.num_key_value_heads) == (16, 1)


@pytest.mark.parametrize("kind", ["text", "jsonl", "json array", "json lines", "gz", "parquet"])
def test_every_kind_of_file_gives_all_its_texts(kind, tmp_path):
    rows = [
        {"prompt": [{"role": "user", "content": "zebra"}], "n": 3, "chosen": "yak"},
        {"chosen": "ibex", "x": None},
    ]
    wanted = {"user", "zebra", "yak", "ibex"}
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    if kind == "text":
        (path := tmp_path / "a.txt").write_text("user\nzebra\nyak\nibex")
    elif kind == "json array":
        (path := tmp_path / "a.json").write_text(json.dumps(rows))
    elif kind == "gz":
        (path := tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    elif kind == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), path := tmp_path / "a.parquet")
    else:
        (path := tmp_path / ("a.jsonl" if kind == "jsonl" else "a.json")).write_text(lines)
    assert {text.strip() for text in scratch_tokenizer.read_texts(path)} == wanted


def test_trl_takes_a_dpo_step_on_plain_and_on_conversational_rows(llama, tmp_path):
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    plain = [
        {"prompt": f"What is {i}?", "chosen": f" It is {i}.", "rejected": f" no {i}"}
        for i in range(4)
    ]
    chat = [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            **{
                side: [{"role": "assistant", "content": row[side]}]
                for side in ("chosen", "rejected")
            },
        }
        for row in plain
    ]
    for rows, ending in ((plain, "<|im_end|>"), (chat, "<|im_end|>\n")):
        model, tokenizer = load(llama)
        args = DPOConfig(
            str(tmp_path),
            per_device_train_batch_size=4,
            max_steps=1,
            learning_rate=1e-3,
            report_to="none",
            use_cpu=True,
            bf16=False,
            save_strategy="no",
            disable_tqdm=True,
        )
        start = model.lm_head.weight.detach().clone()
        trainer = DPOTrainer(
            model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
        )
        assert trainer.train().training_loss == pytest.approx(0.693147, abs=1e-5)
        assert not torch.equal(start, model.lm_head.weight)
        batch = next(iter(trainer.get_train_dataloader()))
        ids = batch["input_ids"][0][batch["completion_mask"][0].bool()]
        assert tokenizer.decode(ids).endswith(ending)


BAD = {
    "unknown arch": ({"arch": "lama"}, r"did you mean 'llama'"),
    "heads": ({"hidden_size": 33}, "33 is not divisible by num_heads 2"),
    "kv heads": ({"num_heads": 4, "num_kv_heads": 3}, "not divisible by num_kv_heads"),
    "no kv heads": ({"arch": "gpt_neox", "num_kv_heads": 1}, "leave it out"),
    "odd head": ({"hidden_size": 30}, "multiple of 2"),
    "no window": ({"sliding_window": 8}, "has none"),
    "negative": ({"num_layers": 0}, "num_layers: got 0; wanted a whole number from 1"),
    "vocabulary": ({"vocab_size": 259}, "wanted 260 or more"),
    "missing file": ({"tokenizer_data": "no/such/file.txt"}, "does not exist"),
    "folder": ({"tokenizer_data": "."}, "is a folder"),
}


@pytest.mark.parametrize("case", BAD)
def test_mistakes_are_one_line_and_leave_nothing_behind(case, text_file, tmp_path):
    changes, message = BAD[case]
    arguments = {
        "arch": "llama",
        **TINY,
        "tokenizer_data": text_file,
        "output_dir": tmp_path / "m",
    } | changes
    with pytest.raises(FasttrError, match=message) as caught:
        scratch.init_model(**arguments)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.txt", b" \n", "holds no text"),
        ("a.jsonl", b'{"a": "b"}\n{"a": \n', "line 2: broken JSON"),
        ("a.json", b'{"a": "b"}\n{"a": \n', "line 2: broken JSON"),
        ("a.txt", b"\xff\xfe\x00", "cannot read"),
        ("a.jsonl.gz", b"not gzip", "cannot read"),
        ("a.parquet", b"not parquet", "cannot read"),
    ],
)
def test_broken_and_empty_files_are_named(name, data, message, tmp_path):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(FasttrError, match=message) as caught:
        scratch.train_tokenizer(tmp_path / name, 300)
    assert name in str(caught.value)


def test_a_folder_with_something_in_it_is_left_alone(llama, text_file):
    before = {p.name: p.read_bytes() for p in llama.iterdir()}
    with pytest.raises(FasttrError, match="not empty"):
        scratch.init_model("llama", **TINY, tokenizer_data=text_file, output_dir=llama)
    assert before == {p.name: p.read_bytes() for p in llama.iterdir()}


def test_a_failed_save_leaves_nothing_behind(tmp_path, monkeypatch):
    from transformers import PreTrainedTokenizerFast

    def full_disk(self, folder):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", full_disk)
    with pytest.raises(FasttrError, match="No space left"):
        scratch.init_model("llama", **TINY, output_dir=tmp_path / "m")
    assert list(tmp_path.iterdir()) == []
