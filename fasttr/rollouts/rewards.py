"""Where rewards come from: a folder with a reward model, a function, or the generated task's gold.

Legend: B prompts, m completions of a prompt, N = B m completions.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from fasttr.batch import Tree
from fasttr.data.in_memory import ListTrees
from fasttr.data.tokens import Messages, encode_texts
from fasttr.errors import FasttrError, one_line
from fasttr.models.load import ModelConfig, load_tokenizer
from fasttr.models.reward import (
    check_reward_folder,
    load_scorer,
    read_calibration,
    score_all,
)
from fasttr.rollouts.engine import Rollout

GOLD = "fasttr.toy.task:reward"  # what the word gold stands for
GIVEN = "given"  # functions that Python hands over, in place of a name
# Columns that a function is not given: of a reference answer, or what it gets of the rollout.
TAKEN = ("completion", "prompts", "completions", "completion_ids")


class RewardInputs(NamedTuple):
    """A rollout with what is known of its prompts."""

    prompts: Sequence[str | Messages]  # (B,) as they were read
    rollout: Rollout
    columns: Mapping[str, Sequence[Any]]  # name -> (B,) further columns of the data

    @property
    def m(self) -> int:
        return len(self.rollout.texts) // len(self.prompts)

    def repeated(self, values: Sequence[Any]) -> list[Any]:
        """(N,) each prompt's value at its completions."""
        return [value for value in values for _ in range(self.m)]


class RewardSource(Protocol):
    name: str

    def __call__(self, inputs: RewardInputs) -> np.ndarray:
        """(N,) fp64; NaN where no reward is given."""
        ...


class FunctionReward:
    """A function of TRL's signature: f(prompts, completions, completion_ids, **columns) -> list of
    numbers or None."""

    def __init__(self, function: Callable[..., Any], name: str):
        self._function = function
        self.name = name

    def __call__(self, inputs: RewardInputs) -> np.ndarray:
        texts = inputs.rollout.texts
        is_chat = not isinstance(inputs.prompts[0], str)
        completions: list[Any] = list(texts)
        if is_chat:
            completions = [[{"role": "assistant", "content": text}] for text in texts]
        ids = [c.tolist() for tree in inputs.rollout.trees for c in tree.completions]
        columns = {
            name: inputs.repeated(values)
            for name, values in inputs.columns.items()
            if name not in TAKEN
        }
        found = self._function(
            prompts=inputs.repeated(inputs.prompts),
            completions=completions,
            completion_ids=ids,
            **columns,
        )
        return self._checked(found, len(texts))

    def _checked(self, found: Any, wanted: int) -> np.ndarray:
        if not hasattr(found, "__len__") or len(found) != wanted:
            got = len(found) if hasattr(found, "__len__") else repr(found)[:40]
            raise FasttrError(
                f"reward_funcs: {self.name} returned {got} rewards; wanted {wanted}, one for each "
                "completion"
            )
        values = []
        for place, value in enumerate(found):
            try:
                number = math.nan if value is None else float(value)
            except (TypeError, ValueError) as error:
                raise FasttrError(
                    f"reward_funcs: {self.name} returned {value!r:.40} for completion {place}; "
                    "wanted a number or None"
                ) from error
            if math.isinf(number):
                raise FasttrError(
                    f"reward_funcs: {self.name} returned {number} for completion {place}; wanted a "
                    "finite number or None"
                )
            values.append(number)
        return np.array(values, dtype=np.float64)


class Closing(NamedTuple):
    """What a chat template writes behind the EOS of an answer. A reward model that was trained on
    conversations reads its score there."""

    eos: int | None
    ids: np.ndarray  # int32

    @staticmethod
    def of(tokenizer: Any, prompt: str | Messages) -> Closing:
        """Behind the answer to such a prompt; nothing behind that to a text."""
        rest = ""
        if not isinstance(prompt, str) and tokenizer.chat_template and tokenizer.eos_token:
            whole = _conversation(tokenizer, prompt, "an answer")
            _, eos, behind = whole.rpartition(tokenizer.eos_token)
            rest = behind if eos else ""
        (ids,) = encode_texts(tokenizer, [rest], add_special_tokens=False)
        return Closing(tokenizer.eos_token_id, ids)

    def behind(self, completion: np.ndarray) -> np.ndarray:
        """The completion as a conversation holds it, where it ended."""
        if completion[-1] != self.eos:
            return completion
        return np.concatenate([completion, self.ids])


class FolderReward:
    """A reward model. With the policy's tokenizer it scores the token ids as they were drawn, EOS
    included; with another one the text, as it was trained on text."""

    def __init__(self, model: ModelConfig, tokenizer: Any, budget: int):
        self.name = Path(model.name).name
        self._model = load_scorer(model)
        self._mean = read_calibration(model.name)
        self._budget = budget
        self._tokenizer = load_tokenizer(model.name, model.revision, model.key)
        self._reads_ids = self._tokenizer.get_vocab() == tokenizer.get_vocab()

    def __call__(self, inputs: RewardInputs) -> np.ndarray:
        trees = self._as_drawn(inputs) if self._reads_ids else self._as_its_own(inputs)
        scores = score_all(self._model, trees, self._budget).reshape(-1)
        return scores.astype(np.float64) - self._mean

    def _as_drawn(self, inputs: RewardInputs) -> ListTrees:
        closing = Closing.of(self._tokenizer, inputs.prompts[0])
        return ListTrees(
            [
                tree._replace(completions=tuple(map(closing.behind, tree.completions)))
                for tree in inputs.rollout.trees
            ]
        )

    def _as_its_own(self, inputs: RewardInputs) -> ListTrees:
        """Each completion with its prompt in the reward model's own tokens."""
        prompts = inputs.repeated(inputs.prompts)
        texts = [
            self._text(prompt, text, ended)
            for prompt, text, ended in zip(
                prompts, inputs.rollout.texts, inputs.rollout.finished, strict=True
            )
        ]
        is_chat = not isinstance(inputs.prompts[0], str)
        ids = encode_texts(self._tokenizer, texts, add_special_tokens=not is_chat)
        return ListTrees([Tree(row, one[:1], (one[1:],)) for row, one in enumerate(ids)])

    def _text(self, prompt: str | Messages, text: str, ended: bool) -> str:
        if isinstance(prompt, str):
            return prompt + text + (self._tokenizer.eos_token if ended else "")
        return _conversation(self._tokenizer, prompt, text)


def _conversation(tokenizer: Any, prompt: Messages, answer: str) -> str:
    """Messages with the answer to them, as a chat template writes them."""
    whole = [*prompt, {"role": "assistant", "content": answer}]
    try:
        return tokenizer.apply_chat_template(whole, tokenize=False)
    except Exception as error:  # a template is a program: it raises whatever it likes
        raise FasttrError(
            f"reward_funcs: a chat template refuses an answer to {prompt!r:.60}: {one_line(error)}"
        ) from error


def reward_source(name: str, model: ModelConfig, tokenizer: Any, budget: int) -> RewardSource:
    """The source of that name: a folder, `module:function` or a dotted path, or `gold`.

    `model`: how a folder is read; FasttrError for what is none of them.
    """
    if Path(name).is_dir():
        return FolderReward(dataclasses.replace(model, name=name), tokenizer, budget)
    return FunctionReward(load_function(GOLD if name == "gold" else name), name.split(":")[-1])


def check_source(name: str, key: str = "reward_funcs") -> None:
    """Raise FasttrError where no source has that name, or a folder holds no reward model; nothing
    large is read."""
    if Path(name).is_dir():
        check_reward_folder(name, key)
    elif name not in ("gold", GIVEN):
        load_function(name, key)


def check_renders(names: Sequence[str], tokenizer: Any, prompts: Sequence[str | Messages]) -> None:
    """Raise FasttrError where a folder's own tokenizer could not write the prompts' messages and an
    answer."""
    if isinstance(prompts[0], str):
        return
    for name in names:
        own = load_tokenizer(name, key="reward_funcs") if Path(name).is_dir() else tokenizer
        if own.get_vocab() != tokenizer.get_vocab() and not own.chat_template:
            raise FasttrError(
                f"reward_model_name_or_path: {name} has no chat template and the prompts are "
                "messages; wanted a reward model trained on conversations"
            )
        Closing.of(own, prompts[0])


def load_function(name: str, key: str = "reward_funcs") -> Callable[..., Any]:
    """The function that `module:function`, or `package.module.function`, names."""
    module, colon, function = name.partition(":")
    if not colon:
        module, _, function = name.rpartition(".")
    if not module or not function:
        raise FasttrError(
            f"{key}: got {name!r}, which is no folder here and no module:function; wanted a folder "
            "with a reward model, a function, or gold"
        )
    try:
        found = getattr(importlib.import_module(module), function, None)
    except Exception as error:  # a module runs code when it is imported
        raise FasttrError(f"{key}: cannot import {module!r}: {one_line(error)}") from error
    if not callable(found):
        raise FasttrError(f"{key}: {module!r} has no function {function!r}")
    return found
