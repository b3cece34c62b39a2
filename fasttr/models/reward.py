"""Reward models: a transformers model for sequence classification with one label, that scores every
completion of a pack.

The score is read at a completion's last token, whose row is known from the layout. transformers
searches for it instead, as the last token that is not padding: where padding is EOS, that is the
token before EOS. So a folder that is written here always has another padding token.

Legend: T packed tokens, N completions, D hidden size, S gathered key rows.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fasttr.batch import PackedBatch, Tree, TreeSource
from fasttr.console import say
from fasttr.errors import FasttrError, first_line
from fasttr.losses.reward import ScoreLossFn
from fasttr.models import attention, checks
from fasttr.models.load import (
    ModelConfig,
    checkpoint_activations,
    dropout_rates,
    grow_embedding,
    load_config,
    tokenizer_of,
)
from fasttr.models.packed import HeadWeight, PackedModel
from fasttr.models.probe import probe
from fasttr.packing.layout import pack
from fasttr.packing.plan import sweep
from fasttr.packing.tiers import SHARED

HEAD = "score.weight"
CLASSIFIER = "ForSequenceClassification"
CALIBRATION = "reward_calibration.json"  # beside the weights, which stay as they are


class RewardOutput(NamedTuple):
    loss: Tensor  # ()
    score: Tensor  # (N,) fp32, without gradient


class RewardModel(PackedModel):
    """Scores of packed trees.

    `ignored_id`: the score is read at the last token other than this one, as transformers reads a
    folder whose padding token is its EOS; None reads the last token.
    """

    ignored_id: int | None = None

    def forward(  # type: ignore[override]  # scores in place of log-probs
        self,
        batch: PackedBatch,
        loss_fn: ScoreLossFn | None = None,
        ref_logp: Tensor | None = None,
        normalizer: float = 1.0,
        stats: bool = False,
        **_: Any,
    ) -> RewardOutput:
        """Scores of a pack on this module's device; with `loss_fn` its share of the loss too.

        There is no reference and no vocabulary: what else a call of a packed model takes means
        nothing here.
        """
        with self.autocast():
            hidden_TD = self.hidden_states(batch)
        score_N = self._score(hidden_TD[self.last_rows(batch)])
        loss = score_N.new_zeros(()) if loss_fn is None else loss_fn(score_N) / normalizer
        return RewardOutput(loss, score_N.detach())

    @torch.no_grad()
    def scores(self, batch: PackedBatch) -> Tensor:
        """(N,) fp32, without gradients."""
        return self(batch.to(self.device)).score

    def logps(self, batch: PackedBatch) -> Tensor:
        raise TypeError("a reward model has no log-probs; wanted scores")

    def head_weight(self) -> HeadWeight:
        return HeadWeight(self.model.score.weight, None)

    def score_rows(self, hidden_TD: Tensor) -> Tensor:
        """(T,) fp32: the score at every row, as a critic reads it."""
        return self._score(hidden_TD)

    def last_rows(self, batch: PackedBatch) -> Tensor:
        """(N,) the packed row of each completion's last token."""
        layout = batch.attention
        if self.ignored_id is None:
            return layout.cu_q[1:].long() - 1
        # Prompt and completion of each segment lie side by side among its keys.
        sources_S = layout.keys.sources
        is_read_S = batch.input_ids[sources_S] != self.ignored_id
        place_S = torch.arange(len(sources_S), device=sources_S.device)
        last_read_S = torch.where(is_read_S, place_S, 0).cummax(0).values
        return sources_S[last_read_S[layout.cu_k[1:].long() - 1]].long()

    def _score(self, rows_D: Tensor) -> Tensor:
        """In fp32: D numbers a completion, and a sum that everything else depends on."""
        weight_1D = self.model.score.weight
        with torch.autocast(self.device.type, enabled=False):
            return (rows_D.float() @ weight_1D.float().T)[:, 0]


def scoring_model(config: Any) -> Any:
    """The model of a transformers config that gives one score, with random weights."""
    from transformers import AutoModelForSequenceClassification

    config.num_labels = 1
    return AutoModelForSequenceClassification.from_config(config)


def is_reward_folder(name: str, revision: str = "main", key: str = "model_name_or_path") -> bool:
    """Whether a folder or hub id holds a model for sequence classification."""
    return _has_head(load_config(name, revision, key))


def load_reward_model(config: ModelConfig, seed: int | None = None) -> RewardModel:
    """Read fp32 weights and make them score packed trees. Dropout is 0 everywhere.

    From a causal language model the backbone is taken, and a head drawn from `seed` (as TRL does:
    right before it is read); None refuses a folder without a head. FasttrError for a folder with
    several labels, with missing weights, or that no score could be made of.
    """
    hf_config = config.read()
    checks.check_rope(hf_config, config.name, config.max_length)
    support = probe(hf_config, trust_remote_code=config.trust_remote_code)
    support.require(SHARED, config.key, config.name)
    is_reward = _has_head(hf_config)
    _check_labels(hf_config, config.name, config.key, needs_head=seed is None)
    original = copy.deepcopy(hf_config)
    for name in dropout_rates(hf_config):
        setattr(hf_config, name, 0.0)
    if not is_reward:
        hf_config.num_labels = 1
        original.num_labels = 1
        torch.manual_seed(seed or 0)
    model = _read_weights(config, hf_config, has_head=is_reward)
    model.fasttr_config = original
    grow_embedding(model, config)
    # The folder that is written names another padding token: resumed, its row must go on learning.
    model.get_input_embeddings().padding_idx = None
    checks.check_finite(model.named_parameters(), config.key, config.name)
    model.to(config.device).train()
    if config.gradient_checkpointing:
        checkpoint_activations(model, True)
    backend = attention.backend_for(config.attn_implementation, config.device, config.bf16)
    attention.announce_slow(model.config, backend)
    packed = RewardModel(model, attention_backend=backend, bf16=config.bf16)
    packed.offloads = config.offloads
    _check_score(packed, config)
    return packed


def check_reward_folder(name: str, key: str) -> None:
    """Raise FasttrError where a folder's configuration and files are no reward model's."""
    _check_labels(load_config(name, key=key), name, key, needs_head=True)
    _check_safetensors(name, key)


def load_scorer(config: ModelConfig) -> RewardModel:
    """A trained reward model that scores as transformers would, frozen."""
    packed = load_reward_model(dataclasses.replace(config, gradient_checkpointing=False))
    pad, eos = packed.model.config.pad_token_id, packed.model.config.eos_token_id
    tokenizer = tokenizer_of(config)
    if pad is not None and pad in (eos, tokenizer.eos_token_id):
        packed.ignored_id = pad
        say(
            f"{config.name}: its padding token is its EOS, so the score is read at the last token "
            "before EOS, as transformers does"
        )
    return packed.requires_grad_(False).eval()


def read_calibration(folder: str | Path) -> float:
    """The mean score of responses that should score 0, or 0 where none was measured."""
    path = Path(folder) / CALIBRATION
    if not path.is_file():
        return 0.0
    try:
        return float(json.loads(path.read_text(encoding="utf-8"))["mean"])
    except (ValueError, KeyError, TypeError) as error:
        raise FasttrError(f"{path} is broken: {error}; run the calibration again") from error


def score_all(model: RewardModel, trees: TreeSource, budget: int) -> np.ndarray:
    """(n, m) fp32 scores of all rows, prompt by prompt."""
    m = trees.completion_lengths.shape[1]
    scores = np.empty((len(trees), m), dtype=np.float32)
    for batch in sweep(trees, budget):
        scores[list(batch.rows)] = model.scores(batch).cpu().numpy().reshape(-1, m)
    return scores


def choose_padding(tokenizer: Any, asked: str | None, used_ids: set[int]) -> None:
    """Give the tokenizer a padding token that is not EOS: the one that is asked for, its own, a
    special token that no row uses, or BOS. FasttrError where there is none of them."""
    vocabulary = tokenizer.get_vocab()
    if asked is not None:
        if asked not in vocabulary:
            raise FasttrError(
                f"pad_token: {asked!r} is no token of the tokenizer; wanted one of it"
            )
        if asked == tokenizer.eos_token:
            raise FasttrError(
                f"pad_token: got {asked!r}, the EOS token, behind which transformers would read "
                "the score; wanted another"
            )
        tokenizer.pad_token = asked
        return
    if tokenizer.pad_token is not None and tokenizer.pad_token != tokenizer.eos_token:
        return
    taken = {tokenizer.eos_token, tokenizer.bos_token}
    for token in tokenizer.all_special_tokens:
        if token not in taken and vocabulary[token] not in used_ids:
            tokenizer.pad_token = token
            return
    if tokenizer.bos_token is None or tokenizer.bos_token == tokenizer.eos_token:
        raise FasttrError(
            "pad_token: the tokenizer has no padding token but EOS, before which transformers "
            "would read the score; give pad_token, a token that no row ends with"
        )
    tokenizer.pad_token = tokenizer.bos_token


def set_padding(model: RewardModel, tokenizer: Any) -> None:
    """What the saved folder says of padding; nothing here reads it."""
    model.model.fasttr_config.pad_token_id = tokenizer.pad_token_id
    model.model.config.pad_token_id = tokenizer.pad_token_id


def _has_head(hf_config: Any) -> bool:
    return any(kind.endswith(CLASSIFIER) for kind in hf_config.architectures or ())


def _check_labels(hf_config: Any, name: str, key: str, *, needs_head: bool) -> None:
    if _has_head(hf_config) and hf_config.num_labels != 1:
        raise FasttrError(
            f"{key}: {name} has num_labels {hf_config.num_labels}; wanted 1, a score for each text"
        )
    if needs_head and not _has_head(hf_config):
        raise FasttrError(
            f"{key}: {name} is no reward model, its head would be random; wanted a folder that "
            "fasttr reward or TRL's RewardTrainer wrote"
        )


def _check_safetensors(name: str, key: str) -> None:
    if Path(name).is_dir() and not any(Path(name).glob("*.safetensors")):
        raise FasttrError(
            f"{key}: {name} holds no safetensors weights; convert them with save_pretrained"
        )


def _read_weights(config: ModelConfig, hf_config: Any, *, has_head: bool) -> Any:
    from safetensors import SafetensorError
    from transformers import AutoModelForSequenceClassification
    from transformers.utils import logging

    logging.disable_progress_bar()
    verbosity = logging.get_verbosity()
    _check_safetensors(config.name, config.key)
    try:
        if not has_head:
            # Its report says that there is a new head, which is what is wanted.
            logging.set_verbosity_error()
        model, loaded = AutoModelForSequenceClassification.from_pretrained(
            config.name,
            config=hf_config,
            dtype=torch.float32,
            attn_implementation=attention.register(),
            use_safetensors=True,
            revision=config.revision,
            trust_remote_code=config.trust_remote_code,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise FasttrError(
            f"{config.key}: cannot load {config.name!r} as a reward model: {first_line(error)}"
        ) from error
    finally:
        logging.set_verbosity(verbosity)
    missing = sorted(set(loaded["missing_keys"]) - (set() if has_head else {HEAD}))
    if missing:
        raise FasttrError(
            f"{config.key}: {config.name} lacks {len(missing)} weights ({missing[0]} first), which "
            "would be random"
        )
    of_language_model: tuple[str, ...] = () if has_head else ("lm_head", "embed_out")
    unexpected = [x for x in loaded["unexpected_keys"] if not x.startswith(of_language_model)]
    if unexpected or getattr(model.score, "bias", None) is not None:
        got = unexpected[0] if unexpected else "score.bias"
        raise FasttrError(
            f"{config.key}: {config.name} holds {got}, which no reward model here has; wanted a "
            "backbone with score.weight"
        )
    return model


@torch.no_grad()
def _check_score(packed: RewardModel, config: ModelConfig) -> None:
    """The score of eight tokens equals that of the model's own forward."""
    model = packed.model
    own_pad = model.config.pad_token_id
    ids = (torch.arange(8) + 3) % model.config.vocab_size
    tree = Tree(0, ids[:1].numpy(), (ids[1:].numpy(),))
    batch = pack([tree]).to(packed.device)
    # Without a padding token transformers reads the last row, as is done here.
    model.config.pad_token_id = None
    with packed.autocast():
        own = model(**packed.rows.inputs(batch)).logits.float()[0, 0]
    model.config.pad_token_id = own_pad
    score = packed.scores(batch)[0]
    allowed = 2e-2 if packed.bf16 else 1e-4
    if not float((score - own).abs()) <= allowed * (1 + float(own.abs())):
        raise FasttrError(
            f"{config.key}: the score of {config.name} is not W h: {float(score):.6g} against "
            f"{float(own):.6g} from the model's own forward"
        )
