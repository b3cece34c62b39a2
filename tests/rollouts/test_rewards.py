"""Rewards of a folder: the scores of its model, on the ids that were drawn or on their text."""

import json
import shutil

import numpy as np
import pytest
import torch

from fasttr.config.online_config import OnlineConfig
from fasttr.config.reward_config import RewardConfig
from fasttr.errors import FasttrError
from fasttr.models.load import ModelConfig, load_tokenizer
from fasttr.models.reward import CALIBRATION
from fasttr.rollouts.engine import as_rollout
from fasttr.rollouts.rewards import (
    FunctionReward,
    RewardInputs,
    check_renders,
    check_source,
    reward_source,
)
from fasttr.rollouts.sampler import Sample
from fasttr.training.reward import train_reward
from tests.runs import settings

PROMPTS = ["alpha beta?", "gamma?"]
TEXTS = [[" delta", " epsilon zeta"], [" eta", " theta iota kappa"]]
ENDED = [[True, False], [True, True]]


@pytest.fixture(scope="module")
def folder(workspace, tmp_path_factory):
    folder = tmp_path_factory.mktemp("rewards") / "model"
    train_reward(RewardConfig(**settings(workspace, folder, max_steps=2)))
    return folder


def inputs_of(tokenizer, texts=TEXTS):
    """A rollout whose completions are these texts, with EOS where they ended."""
    prompts = [np.array(tokenizer(p)["input_ids"], dtype=np.int32) for p in PROMPTS]
    drawn = []
    for prompt, ids, of_prompt, ended in zip(PROMPTS, prompts, texts, ENDED, strict=True):
        samples = []
        for text, has_ended in zip(of_prompt, ended, strict=True):
            whole = tokenizer(prompt + text + (tokenizer.eos_token if has_ended else ""))
            own = np.array(whole["input_ids"][len(ids) :], dtype=np.int32)
            samples.append(Sample(text, len(own), has_ended, own))
        drawn.append(samples)
    return RewardInputs(PROMPTS, as_rollout(prompts, drawn), {})


def transformers_scores(folder):
    """Each whole text alone, EOS where it ended."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    scores = []
    for prompt, texts, ended in zip(PROMPTS, TEXTS, ENDED, strict=True):
        for text, has_ended in zip(texts, ended, strict=True):
            whole = prompt + text + (tokenizer.eos_token if has_ended else "")
            with torch.no_grad():
                batch = tokenizer(whole, return_tensors="pt")
                scores.append(float(model(**batch).logits[0, 0]))
    return np.array(scores)


def test_ids_are_scored_as_they_were_drawn_eos_included(folder):
    tokenizer = load_tokenizer(str(folder))
    source = reward_source(str(folder), ModelConfig(""), tokenizer, 1024)
    found = source(inputs_of(tokenizer))
    np.testing.assert_allclose(found, transformers_scores(folder), atol=1e-4)
    assert np.ptp(found) > 1e-3
    assert source.name == "model"


def test_an_answer_is_read_where_conversations_end(folder):
    """The template writes more behind the EOS, and the reward model was trained on all of it."""
    from transformers import AutoModelForSequenceClassification

    tokenizer = load_tokenizer(str(folder))
    prompt, answers = [{"role": "user", "content": "how many?"}], ["seven", "alpha beta"]
    ids = np.array(
        tokenizer.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"],
        dtype=np.int32,
    )
    drawn = []
    for text in answers:
        own = tokenizer(text + tokenizer.eos_token, add_special_tokens=False)["input_ids"]
        drawn.append(Sample(text, len(own), True, np.array(own, dtype=np.int32)))
    unfinished = drawn[0]._replace(finished=False, ids=drawn[0].ids[:-1])
    rollout = as_rollout([ids], [[*drawn, unfinished]])
    source = reward_source(str(folder), ModelConfig(""), tokenizer, 1024)
    found = source(RewardInputs([prompt], rollout, {}))

    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    wholes = [
        tokenizer.apply_chat_template([*prompt, {"role": "assistant", "content": text}])
        for text in answers
    ]
    rows = [whole["input_ids"] for whole in wholes] + [[*ids, *unfinished.ids]]
    assert rows[0][-1] != tokenizer.eos_token_id
    with torch.no_grad():
        wanted = [float(model(torch.tensor([row])).logits[0, 0]) for row in rows]
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    assert np.ptp(found) > 1e-3


def test_the_calibration_is_taken_off(folder):
    tokenizer = load_tokenizer(str(folder))
    plain = reward_source(str(folder), ModelConfig(""), tokenizer, 1024)(inputs_of(tokenizer))
    (folder / CALIBRATION).write_text(json.dumps({"mean": 0.75}))
    try:
        source = reward_source(str(folder), ModelConfig(""), tokenizer, 1024)
        np.testing.assert_allclose(source(inputs_of(tokenizer)), plain - 0.75, atol=1e-12)
    finally:
        (folder / CALIBRATION).unlink()


def test_with_another_tokenizer_the_text_is_scored(folder, workspace, tmp_path):
    """The policy's tokenizer knows other tokens, so its ids mean nothing to the reward model."""
    from fasttr.models.scratch import init_model

    init_model(
        "llama",
        hidden_size=32,
        num_layers=1,
        num_heads=4,
        vocab_size=270,
        tokenizer_data=str(workspace / "test.jsonl"),
        output_dir=str(tmp_path / "other"),
    )
    other = load_tokenizer(str(tmp_path / "other"))
    assert other.get_vocab() != load_tokenizer(str(folder)).get_vocab()
    source = reward_source(str(folder), ModelConfig(""), other, 1024)
    found = source(inputs_of(other))
    np.testing.assert_allclose(found, transformers_scores(folder), atol=1e-4)


def test_a_function_may_return_a_tensor_and_gets_no_column_of_its_own_names():
    seen = {}

    def score(prompts, completions, completion_ids, **columns):
        seen.update(columns)
        return torch.tensor([0.5, float("nan")])

    ids = np.array([1, 2], dtype=np.int32)
    samples = [[Sample(text, 2, True, ids) for text in ("a", "b")]]
    columns = {"completion": ["x"], "completion_ids": [[3]], "answer": ["y"]}
    found = FunctionReward(score, "score")(
        RewardInputs(["alpha"], as_rollout([ids], samples), columns)
    )
    assert found[0] == 0.5
    assert np.isnan(found[1])
    assert seen == {"answer": ["y", "y"]}


def test_gold_is_the_generated_tasks_reward(folder):
    from fasttr.toy.task import gold_reward

    prompts, texts = ["write 08 of abc:"], [["abcabc", "ddd"]]
    ids = np.array([1, 2], dtype=np.int32)
    samples = [[Sample(text, 2, True, ids) for text in texts[0]]]
    inputs = RewardInputs(prompts, as_rollout([ids], samples), {})
    source = reward_source("gold", ModelConfig(""), None, 1024)
    assert source(inputs).tolist() == [gold_reward(prompts[0], text) for text in texts[0]]
    assert source(inputs).tolist() == [0.75, 0.0]


def broken(folder, tmp_path, how):
    """A copy of a reward folder that is wrong in one way."""
    from safetensors.torch import load_file, save_file

    copy = tmp_path / how
    shutil.copytree(folder, copy)
    weights = copy / "model.safetensors"
    if how == "two labels":
        config = json.loads((copy / "config.json").read_text())
        config["id2label"] = {"0": "a", "1": "b"}
        config["label2id"] = {"a": 0, "b": 1}
        (copy / "config.json").write_text(json.dumps(config))
    elif how == "no weights":
        weights.unlink()
    elif how == "NaN":
        tensors = load_file(weights)
        tensors["score.weight"][0, 3] = float("nan")
        save_file(tensors, weights, metadata={"format": "pt"})
    return copy


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("two labels", "has num_labels 2; wanted 1, a score for each text"),
        ("no weights", "holds no safetensors weights; convert them with save_pretrained"),
    ],
)
def test_a_folder_that_cannot_score_is_refused_before_a_model_is_read(
    folder, tmp_path, workspace, how, told
):
    copy = broken(folder, tmp_path, how)
    values = settings(workspace, tmp_path / "run", reward_funcs=[str(copy)], max_length=None)
    with pytest.raises(FasttrError) as raised:
        OnlineConfig(**{**values, "train_batch_size": 8})
    assert str(raised.value) == f"reward_funcs: {copy} {told}"


def test_a_policy_is_no_reward_model(workspace):
    with pytest.raises(FasttrError, match=r"model is no reward model, its head would be random"):
        check_source(str(workspace / "model"))


def test_a_weight_that_is_no_number_is_named(folder, tmp_path):
    copy = broken(folder, tmp_path, "NaN")
    tokenizer = load_tokenizer(str(folder))
    with pytest.raises(FasttrError, match=r"score\.weight"):
        reward_source(str(copy), ModelConfig("", key="reward_funcs"), tokenizer, 1024)


def test_messages_need_a_template_of_the_reward_model(folder, tmp_path):
    """Only where its tokens are not the policy's, whose template wrote them."""
    bare = shutil.copytree(folder, tmp_path / "bare")
    (bare / "chat_template.jinja").unlink()
    policys = load_tokenizer(str(folder))
    messages = [[{"role": "user", "content": "how many?"}]]
    check_renders([str(bare)], policys, messages)
    policys.add_tokens(["<another>"])
    check_renders([str(folder)], policys, messages)
    check_renders([str(bare)], policys, ["how many?"])
    with pytest.raises(FasttrError, match="has no chat template and the prompts are messages"):
        check_renders([str(bare)], policys, messages)
    (bare / "chat_template.jinja").write_text("{{ raise_exception('no users') }}")
    with pytest.raises(FasttrError, match=r"a chat template refuses an answer to .*: no users"):
        check_renders([str(bare)], policys, messages)
