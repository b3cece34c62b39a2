"""The models of a run: the policy as it starts or goes on, and a first reference of its own."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from fasttr.batch import TreeSource
from fasttr.config.train_config import TrainConfig
from fasttr.distributed.ranks import Ranks
from fasttr.models.checks import check_ids
from fasttr.models.given import pack_model, read_weights_into
from fasttr.models.halves import add_remainders, add_remainders_of_rows
from fasttr.models.load import (
    ModelConfig,
    load_model,
)
from fasttr.models.packed import PackedModel
from fasttr.models.vocabulary import rows_wanted
from fasttr.optim.adamw import LocalRows
from fasttr.training.announce import (
    announce_adapter,
)
from fasttr.training.checkpoints import (
    Resume,
)


def local_rows_of(policy: PackedModel) -> LocalRows | None:
    """What the optimizer of a divided model works on."""
    if policy.shards is None:
        return None
    plain = {name.removeprefix("model."): p for name, p in policy.local_parameters().items()}
    low = {name.removeprefix("model."): x for name, x in policy.shards.remainders.items()}
    policy.shards.remainders = {}
    return LocalRows(plain, low)


def load_models(
    config: TrainConfig,
    device: torch.device,
    given: Any,
    tokenizer: Any,
    resume: Resume | None,
    ranks: Ranks,
    scores_more: bool,
) -> tuple[PackedModel, PackedModel | None]:
    """The policy, and a first reference of its own where one is named and still needed.

    `given`: a model in memory, else None. `scores_more`: a fixed reference, which a checkpoint does
    not keep, has rows left to score.
    """
    rows = rows_wanted(tokenizer) if config.resize_embeddings else None
    wanted = dataclasses.replace(
        config.model(device),
        compile=False,
        embedding_rows=rows,
        ranks=ranks,
        layout=config.layout(device),
    )
    policy = _policy(wanted, given, resume)
    is_named = config.ref_model_name_or_path is not None
    is_needed = resume is None or config.ref_update == "soft"
    if not (is_named and is_needed) and not scores_more:
        return policy, None
    reference = dataclasses.replace(
        named_reference(config, device), embedding_rows=rows, ranks=ranks
    )
    # A soft one is taken apart into halves where the policy is.
    halves = wanted.layout.halves and config.ref_update != "soft"
    layout = wanted.layout._replace(halves=halves, keeps_remainders=False)
    return policy, load_model(dataclasses.replace(reference, layout=layout))


def named_reference(config: TrainConfig, device: torch.device) -> ModelConfig:
    name = config.ref_model_name_or_path or config.model_name_or_path
    model = config.model(device, name)
    if config.ref_model_name_or_path is None:
        model = dataclasses.replace(model, revision=config.model_revision)
    # A soft reference becomes an average of it, for which every bit counts.
    if config.ref_update == "soft":
        model = dataclasses.replace(model, compile=False)
    else:
        model = dataclasses.replace(model, is_trained=False)
    return dataclasses.replace(model, key="ref_model_name_or_path")


def check_ids_of_both(
    config: TrainConfig,
    given: Any,
    policy: PackedModel,
    initial: PackedModel | None,
    splits: list[TreeSource],
) -> None:
    """Both models have an embedding for every token that they will meet."""
    largest_id = max(trees.largest_id for trees in splits)
    if given is None:
        check_ids(policy, largest_id, "model_name_or_path", str(config.model_name_or_path))
    else:
        check_ids(policy, largest_id, "model", "the given model")
    if initial is not None:
        name = str(config.ref_model_name_or_path)
        check_ids(initial, largest_id, "ref_model_name_or_path", name)


def _policy(wanted: ModelConfig, model: Any, resume: Resume | None) -> PackedModel:
    """The given model, or the one that is named; with a checkpoint's weights where there is one."""
    if wanted.adapter is not None:
        policy = _packed(wanted, model)
        assert policy.adapter is not None
        if resume is not None:
            policy.adapter.read(resume.folder)
        announce_adapter(policy)
        return policy
    if model is None:
        if resume is not None:
            wanted = dataclasses.replace(wanted, name=str(resume.folder), revision="main")
    elif resume is not None:
        read_weights_into(model, resume.folder)
    packed = _packed(wanted, model)
    if resume is not None and packed.shards is not None:
        of_rows = resume.state.of_rows(packed.shards)
        add_remainders_of_rows(packed.shards, of_rows.remainders)
    elif resume is not None:
        add_remainders(packed.model, resume.state.remainders)
    return packed


def _packed(wanted: ModelConfig, model: Any) -> PackedModel:
    if model is None:
        return load_model(wanted)
    name = str(model.config.name_or_path) if wanted.adapter is not None else "the given model"
    return pack_model(model, dataclasses.replace(wanted, name=name, key="model"))
