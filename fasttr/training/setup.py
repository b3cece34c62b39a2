"""From a configuration to a run that is ready: rows and models read and announced, a checkpoint
taken up."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from fasttr.batch import TreeSource
from fasttr.config import rules
from fasttr.config.rows import RowReader, as_loss_reads, reads_a_stream
from fasttr.config.train_config import TrainConfig
from fasttr.console import say
from fasttr.data.tokens import adjust
from fasttr.distributed.ranks import ALONE, Ranks
from fasttr.environment import device_for
from fasttr.errors import FasttrError
from fasttr.evaluation.split import EvaluationSplit
from fasttr.losses import Loss, as_loss
from fasttr.memory.choose import Plan as MemoryPlan
from fasttr.memory.plan import NO_REFERENCE
from fasttr.metrics.ledger import PreferenceLedger
from fasttr.metrics.sums import Averages
from fasttr.metrics.trackers import require_trackers
from fasttr.models.checks import check_given
from fasttr.models.choice import Candidate, Choice, choose_tier
from fasttr.models.compiled import compile_layers
from fasttr.models.load import (
    ModelConfig,
    check_loadable,
    checkpoint_activations,
    dropout_rates,
    has_tokenizer,
    load_tokenizer,
)
from fasttr.models.packed import PackedModel
from fasttr.models.router import coefficient_of
from fasttr.models.vocabulary import check_rows, check_same_tokens
from fasttr.packing.ahead import PacksAhead
from fasttr.packing.plan import Plan
from fasttr.packing.tiers import longest_sequence
from fasttr.reference.logp_table import LogpTable
from fasttr.reference.moving import MovingReference
from fasttr.training.announce import (
    announce_plan,
    announce_settings,
    announce_tier,
)
from fasttr.training.best import Best, Patience
from fasttr.training.checkpoints import (
    check_resume,
    find_resume,
    first_unscored,
    take_up,
)
from fasttr.training.memory import Rows, plan_memory, unless_compiled
from fasttr.training.models import (
    check_ids_of_both,
    load_models,
    local_rows_of,
    named_reference,
)
from fasttr.training.run import Run


class Given(NamedTuple):
    """What Python hands to a run in place of names."""

    model: Any = None  # a loaded transformers model
    tokenizer: Any = None
    train_dataset: Any = None  # datasets.Dataset, a list of dicts, or a TreeSource
    eval_dataset: Any = None
    loss: Any = None  # a Loss, or any function of LossInputs


def setup(config: TrainConfig, given: Given, ranks: Ranks = ALONE) -> Run:
    """Read rows and models, say what was found, and take up a checkpoint when asked to.

    What can be refused without a row is refused first: tokenising takes long.
    """
    device = prepare_torch(config)
    require_trackers(config.report_to)
    if ranks.is_sharded:
        _require_divisible(config)
    config.optimizer().check_schedule()
    resume = ranks.first_alone(lambda: find_resume(config, ranks), of_each_machine=False)
    source = config.model_name_or_path
    if resume is not None and not config.use_peft:
        source = str(resume.folder)
    tokenizer = checked_tokenizer(config, given, device, source)
    if resume is not None:
        config = config.as_planned_in(resume.state.facts["config"])
    candidates = _candidates(config, given, device, source)
    coefficient = coefficient_of(candidates[0].config, config.router_aux_loss_coef)
    config = dataclasses.replace(config, router_aux_loss_coef=coefficient)
    reader = RowReader(config, tokenizer)
    if reads_a_stream(config, given.train_dataset):
        config = _in_order_of_the_stream(config)
    custom_loss = None if given.loss is None else as_loss(given.loss, config.beta)
    rows = ranks.first_alone(lambda: reader.train(custom_loss or config.loss, given.train_dataset))
    config, loss = _with_loss(config, custom_loss, rows)
    trees = as_loss_reads(rows, loss, config)
    eval_trees: dict[str, TreeSource] = {}
    if config.evaluates:
        eval_rows = ranks.first_alone(lambda: reader.evaluation(loss, given.eval_dataset))
        eval_trees = {name: as_loss_reads(one, loss, config) for name, one in eval_rows.items()}
    splits = [trees, *eval_trees.values()]
    choice = _tier(config, candidates, splits)
    config = dataclasses.replace(config, attention_tier=choice.tier)
    are_cut = not config.router_aux_loss_coef
    rows_of_packs = Rows.of(config, splits, config.group_rows(loss), are_cut=are_cut)
    config, memory = plan_memory(
        config,
        device,
        candidates[0].config,
        rows_of_packs,
        reference=None if loss.needs_reference else NO_REFERENCE,
        ranks=ranks,
        build=None if given.model is None else type(given.model)._from_config,
    )
    announce_tier(choice, trees, config)
    plan = config.plan(trees, loss, device)
    if resume is not None:
        check_resume(resume, config, loss, plan)
    scores_more = resume is not None and first_unscored(resume, config, plan) is not None
    _require_same(ranks, config, loss, plan)
    announce_plan(config, loss, plan, ranks)
    announce_settings(config, loss, trees)
    # Ranks that divide a model meet while it is loaded.
    with contextlib.nullcontext() if ranks.is_sharded else ranks.together():
        policy, initial = load_models(
            config, device, given.model, tokenizer, resume, ranks, scores_more
        )
    if policy.router is not None:
        policy.router.leaves_out_mismatched = loss.unpaired and loss.completions > 1
    check_ids_of_both(config, given.model, policy, initial, splits)
    if config.eos_token is not None:
        _end_with(policy, tokenizer)
    # What is trained of an adapted model is small, and fp32.
    splits_weights = policy.bf16 and policy.adapter is None
    optimizer = config.optimizer().optimizer(
        policy.model, bf16=splits_weights, rows=local_rows_of(policy)
    )
    # Not before: the optimizer decides which weights are bf16, and graphs are made for dtypes.
    compile_policy(config, policy, memory)
    run = Run(
        config=config,
        device=device,
        tokenizer=tokenizer,
        objective=config.objective(loss),
        ledger=PreferenceLedger(loss),
        trees=trees,
        plan=plan,
        packs=PacksAhead(functools.partial(plan.packs, ranks=ranks), plan.total_steps),
        policy=policy,
        reference=MovingReference(
            config.schedule,
            policy,
            initial,
            optimizer=optimizer,
            fits_beside=_rests_beside(config),
            bound=config.ref_rank_bound(),
        ),
        optimizer=optimizer,
        scheduler=config.optimizer().scheduler(optimizer, plan.total_steps),
        window_logps=LogpTable(len(trees), loss.completions),
        splits={
            name: EvaluationSplit.of(one, loss, plan, config.eval_group_size or config.group_size)
            for name, one in eval_trees.items()
        },
        best=Best.of(config),
        patience=Patience.of(config),
        averages=Averages(device),
        total_loss=torch.zeros((), device=device),
        ranks=ranks,
        memory=memory,
    )
    if resume is not None:
        take_up(run, resume)
    return run


def compile_policy(config: TrainConfig, policy: PackedModel, memory: MemoryPlan | None) -> None:
    """Compile its layers as the memory plan counts on it."""
    compiled = compile_layers(
        policy,
        config.compile,
        budget=config.activation_memory_budget,
        tokens=config.token_budget(policy.device),
    )
    if unless_compiled(config, memory, compiled):
        say("memory: whole layers are made again in the backward, since they are not compiled")
        checkpoint_activations(policy.model, True)


def _require_divisible(config: TrainConfig) -> None:
    """What cannot be done on rows of a weight is refused before a model is read."""
    config.optimizer().check_rows()
    for name in ("merge_adapter", "lora_target_parameters", "load_in_4bit", "log_completions"):
        if getattr(config, name):
            raise FasttrError(
                f"{name}: got {getattr(config, name)} with shard_size above 1; it needs whole "
                "weights: leave it out"
            )


def _require_same(ranks: Ranks, config: TrainConfig, loss: Loss, plan: Plan) -> None:
    """A plan that differs between ranks would have them wait for each other for ever."""
    if ranks.world > 1 and loss.coupled and loss.head_means:
        raise FasttrError(
            "use_weighting: got true with a loss that couples rows on several processes; wanted "
            "another loss, or one process"
        )
    bound = {name: getattr(config, name) for name in config.bound_on_resume()}
    ranks.same("the configuration", repr(bound))
    ranks.same("the rows", (plan.trees.fingerprint, plan.total_steps))


def prepare_torch(config: TrainConfig) -> torch.device:
    """The device of the run; seeds and switches that are global to the process."""
    device = device_for(config.use_cpu)
    if config.bf16 is None and device.type == "cpu":
        say("bf16: absent, and there is no GPU: computing in float32")
    torch.manual_seed(config.seed)
    if config.tf32 is not None:
        torch.backends.cuda.matmul.fp32_precision = "tf32" if config.tf32 else "ieee"
    if config.full_determinism:
        from transformers import enable_full_determinism

        enable_full_determinism(config.seed)
    return device


def checked_tokenizer(
    config: TrainConfig, given: Given, device: torch.device, source: str | None
) -> Any:
    """The tokenizer, after what cannot be trained has stopped: before any row is read."""
    if given.model is None:
        assert source is not None
        revision = config.model_revision if source == config.model_name_or_path else "main"
        model = dataclasses.replace(config.model(device), name=source, revision=revision)
        hf_config = check_loadable(model)
        key, name = model.key, source
        rates = dropout_rates(hf_config)
        if rates and not config.disable_dropout:
            raise FasttrError(
                f"disable_dropout: got false and the model has {', '.join(rates)}; it is off in "
                "both models: leave it out"
            )
        tokenizer = given.tokenizer or load_tokenizer(
            source, revision, trust_remote_code=config.trust_remote_code
        )
    else:
        if config.resize_embeddings:
            raise FasttrError(
                "resize_embeddings: got true with a model that is in memory; call its "
                "resize_token_embeddings, and leave it out"
            )
        check_given(given.model, "model")
        hf_config, key, name = given.model.config, "model", "the given model"
        tokenizer = given.tokenizer or _tokenizer_of(given.model, config)
    adjust(tokenizer, chat_template=config.chat_template, eos_token=config.eos_token)
    if not config.resize_embeddings:
        check_rows(hf_config, tokenizer, key, name)
    if config.ref_model_name_or_path is not None:
        _check_reference(config, named_reference(config, device), tokenizer)
    return tokenizer


def _check_reference(config: TrainConfig, reference: ModelConfig, tokenizer: Any) -> None:
    """That a named first reference reads the tokens of the policy, and gives them log-probs."""
    hf_config = check_loadable(reference)
    if has_tokenizer(reference.name):
        own = load_tokenizer(
            reference.name, key=reference.key, trust_remote_code=config.trust_remote_code
        )
        check_same_tokens(tokenizer, own, reference.key, reference.name)
    if not config.resize_embeddings:
        check_rows(hf_config, tokenizer, reference.key, reference.name)


def _tokenizer_of(model: Any, config: TrainConfig) -> Any:
    name = config.model_name_or_path or model.config.name_or_path
    if not name:
        raise FasttrError(
            "tokenizer: missing beside the model, which does not say where it came from; give one"
        )
    return load_tokenizer(name, key="tokenizer")


def _in_order_of_the_stream(config: TrainConfig) -> TrainConfig:
    if config.train_sampling_strategy == "random":
        say("train_sampling_strategy: rows of a stream are taken in their order, as in TRL")
    return dataclasses.replace(config, train_sampling_strategy="sequential")


def _end_with(policy: PackedModel, tokenizer: Any) -> None:
    """Let the saved model end with the tokenizer's EOS, in its config and when it generates."""
    model = policy.model
    eos = tokenizer.eos_token_id
    model.fasttr_config.eos_token_id = eos
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    model.generation_config.eos_token_id = [eos, *(end for end in ends if end != eos)]


def _candidates(
    config: TrainConfig, given: Given, device: torch.device, source: str | None
) -> list[Candidate]:
    """The models that the packs of a run go through."""
    if given.model is not None:
        candidates = [Candidate.given(given.model)]
    else:
        revision = config.model_revision if source == config.model_name_or_path else "main"
        policy = dataclasses.replace(config.model(device), name=str(source), revision=revision)
        candidates = [Candidate.named(policy)]
    if config.ref_model_name_or_path is not None:
        candidates.append(Candidate.named(named_reference(config, device)))
    return candidates


def _tier(config: TrainConfig, candidates: list[Candidate], splits: list[TreeSource]) -> Choice:
    """A tier that is exact for the longest row."""
    longest = max(longest_sequence(trees) for trees in splits)
    return choose_tier(config.attention_tier, candidates, longest)


def _rests_beside(config: TrainConfig) -> Callable[[PackedModel], bool] | None:
    """Where a soft reference rests, as a setting or the memory plan says."""
    if config.ref_on_host is None:
        return None
    return lambda _: not config.ref_on_host


def _with_loss(
    config: TrainConfig, custom: Loss | None, rows: TreeSource
) -> tuple[TrainConfig, Loss]:
    """The loss of the run; that of the rows where neither a name nor an object was given."""
    if custom is not None:
        rules.check_loss(config, custom, "the given loss")
        return config, custom
    if config.loss_type is None:
        is_unpaired = rows.completion_lengths.shape[1] == 1
        config = dataclasses.replace(config, loss_type="kto" if is_unpaired else "sigmoid")
        say(f"loss_type: absent; the rows mean {config.loss_type}")
    return config, config.loss
