"""Samples of a model: drawn in batches as one by one, and following their seeds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fasttr.errors import FasttrError
from fasttr.models.load import ModelConfig, load_model, load_tokenizer
from fasttr.rollouts.prompt_file import PromptFile, read_prompts, sample_file
from fasttr.rollouts.sampler import Sample, Sampling, draw, encode_prompts
from tests.runs import read_rows


@pytest.fixture(scope="module")
def model(workspace):
    return load_model(ModelConfig(str(workspace / "model")))


@pytest.fixture(scope="module")
def tokenizer(workspace):
    return load_tokenizer(str(workspace / "model"))


def samples_of(workspace, folder: Path, prompts: str, batch_size: int, seed: int) -> list[dict]:
    """The lines of a samples file for a text of prompts."""
    (folder / "prompts.txt").write_text(prompts)
    out = folder / f"samples-{batch_size}-{seed}.jsonl"
    files = PromptFile(folder / "prompts.txt", out, batch_size=batch_size, disable_tqdm=True)
    sample_file(ModelConfig(str(workspace / "model")), files, Sampling(8, seed=seed))
    return read_rows(out)


def texts_of(drawn: list[list[Sample]]) -> list[str]:
    return [sample.completion for samples in drawn for sample in samples]


def test_greedy_samples_are_those_of_each_prompt_alone(workspace, model, tokenizer):
    """Padding a batch changes nothing, and the model attends as before afterwards."""
    before = model.model.config._attn_implementation
    ids = encode_prompts(tokenizer, ["alpha?", "beta gamma delta epsilon zeta?", "eta theta?"])
    together = draw(model, tokenizer, ids, Sampling(12, temperature=0))
    plain = AutoModelForCausalLM.from_pretrained(workspace / "model")
    for prompt, (sample,) in zip(ids, together, strict=True):
        batch = torch.from_numpy(prompt.astype(np.int64))[None]
        alone = plain.generate(batch, do_sample=False, max_new_tokens=12)
        assert sample.ids.tolist() == alone[0, len(prompt) :].tolist()
    assert model.model.config._attn_implementation == before
    assert model.model.training


def test_samples_follow_the_seed_and_leave_the_callers_random_state(model, tokenizer):
    ids = encode_prompts(tokenizer, ["alpha", "beta"])
    torch.manual_seed(7)
    before = torch.get_rng_state()
    texts = []
    for seed in (1, 1, 2):
        texts.append(texts_of(draw(model, tokenizer, ids, Sampling(8, num_samples=2, seed=seed))))
    assert texts[0] == texts[1] != texts[2]
    assert texts[0][0] != texts[0][1]
    assert torch.equal(torch.get_rng_state(), before)


def test_a_sample_ends_with_the_token_that_ended_it_and_counts_it(model, tokenizer, monkeypatch):
    """The fourth token of a greedy sample becomes an end, of the model's own or of a list."""
    prompt = encode_prompts(tokenizer, ["alpha?"])
    ((whole,),) = draw(model, tokenizer, prompt, Sampling(8, temperature=0))
    assert (whole.tokens, whole.finished) == (8, False)
    end = int(whole.ids[3])
    first = whole.ids.tolist().index(end) + 1
    assert first < 8
    for ends in (end, [299, end]):
        monkeypatch.setattr(model.model.generation_config, "eos_token_id", ends)
        ((cut,),) = draw(model, tokenizer, prompt, Sampling(8, temperature=0))
        assert cut.ids.tolist() == whole.ids[:first].tolist()
        assert (cut.tokens, cut.finished) == (first, True)


def test_what_a_folder_says_of_sampling_is_not_read(model, tokenizer, monkeypatch):
    """A penalty of repetition would draw from another distribution than the model's."""
    prompts = encode_prompts(tokenizer, ["alpha?", "beta gamma?"])
    wanted = texts_of(draw(model, tokenizer, prompts, Sampling(12, seed=3)))
    folders = model.model.generation_config
    for name, value in {"repetition_penalty": 9.0, "min_p": 0.9, "min_new_tokens": 12}.items():
        monkeypatch.setattr(folders, name, value)
    assert texts_of(draw(model, tokenizer, prompts, Sampling(12, seed=3))) == wanted
    assert model.model.generation_config is folders


def test_the_colder_the_likelier(model, tokenizer):
    """Next to temperature 0 the likeliest token is drawn each time."""
    prompts = encode_prompts(tokenizer, ["alpha?", "beta gamma?"])
    greedy = texts_of(draw(model, tokenizer, prompts, Sampling(8, temperature=0)))
    assert texts_of(draw(model, tokenizer, prompts, Sampling(8, temperature=1e-4))) == greedy
    assert texts_of(draw(model, tokenizer, prompts, Sampling(8, temperature=1.0))) != greedy


def test_every_batch_has_a_seed_of_its_own(workspace, tmp_path):
    """The same prompt three times, a batch each: batch k draws from seed + k."""
    first = samples_of(workspace, tmp_path, "alpha\n" * 3, batch_size=1, seed=5)
    texts = [line["completion"] for line in first]
    assert len(set(texts)) == 3
    later = samples_of(workspace, tmp_path, "alpha\n" * 3, batch_size=1, seed=6)
    assert [line["completion"] for line in later][:2] == texts[1:]


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
    assert len(read_rows(tmp_path / "out.jsonl.partial")) == 2


def test_a_tokenizer_without_a_template_is_named(workspace):
    tokenizer = AutoTokenizer.from_pretrained(workspace / "model")
    tokenizer.chat_template = None
    with pytest.raises(FasttrError, match="no chat template"):
        encode_prompts(tokenizer, [[{"role": "user", "content": "a"}]])


def test_prompts_are_rows_or_lines(tmp_path):
    (tmp_path / "p.json").write_text('[{"prompt": "a"}, {"prompt": "b"}]')
    assert read_prompts(tmp_path / "p.json") == ["a", "b"]
    (tmp_path / "p.txt").write_text("\ufeffa\n\n  \nb \n")
    assert read_prompts(tmp_path / "p.txt") == ["a", "b "]
