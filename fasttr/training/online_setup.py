"""From a configuration to a run on rollouts that is ready: prompts, policy, reference and sources
of rewards read and announced, a checkpoint taken up."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fasttr.config.online_config import OnlineConfig
from fasttr.console import say
from fasttr.data.sources import read_rows
from fasttr.errors import FasttrError
from fasttr.losses.objective import Objective
from fasttr.memory.plan import NO_REFERENCE
from fasttr.metrics.online import OnlineLedger
from fasttr.metrics.sums import Averages
from fasttr.metrics.trackers import require_trackers
from fasttr.models.checks import check_ids
from fasttr.models.halves import add_remainders
from fasttr.models.load import ModelConfig, load_model
from fasttr.models.packed import PackedModel
from fasttr.models.vocabulary import rows_wanted
from fasttr.packing.ahead import PacksAhead
from fasttr.packing.tiers import SHARED
from fasttr.reference.logp_table import LogpTable
from fasttr.reference.resident import ResidentReference
from fasttr.rollouts.engine import TransformersEngine
from fasttr.rollouts.prompts import Prompts, RolloutPlan, with_room
from fasttr.rollouts.rewards import (
    GIVEN,
    FunctionReward,
    RewardSource,
    check_renders,
    reward_source,
)
from fasttr.training.checkpoints import Resume, check_resume, find_resume, take_up
from fasttr.training.critic import Critic, read_critic
from fasttr.training.experience import Collector
from fasttr.training.memory import Rows, plan_memory
from fasttr.training.run import Run
from fasttr.training.setup import Given, checked_tokenizer, compile_policy, prepare_torch


@dataclass
class OnlineRun(Run):
    """A run on rollouts; its rows are prompts."""

    collector: Any = None  # the Collector
    critic: Critic | None = None  # of ppo

    @property
    def critic_tensors(self) -> dict[str, torch.Tensor]:
        return {} if self.critic is None else self.critic.named_tensors()


def set_up(config: OnlineConfig, functions: Sequence[Any], rows: Any) -> OnlineRun:
    device = prepare_torch(config)
    require_trackers(config.report_to)
    resume = find_resume(config)
    source = str(resume.folder) if resume is not None else config.model_name_or_path
    tokenizer = checked_tokenizer(config, Given(), device, source)
    if resume is not None:
        config = config.as_planned_in(resume.state.facts["config"])
    config = dataclasses.replace(config, attention_tier=SHARED)
    config, memory = plan_memory(
        config,
        device,
        dataclasses.replace(config.model(device), name=str(source)).read(),
        Rows(longest=config.max_completion_length),
        reference=NO_REFERENCE._replace(is_resident=config.beta > 0, has_critic=config.is_ppo),
    )
    if device.type == "cuda":
        say("memory: reward models and the cache of what is drawn are not counted")
    # What can be refused without a model is refused first.
    plan = _plan(config, _prompts(config, tokenizer, device, rows))
    check_renders(config.reward_names, tokenizer, plan.trees.raw)
    embedding_rows = rows_wanted(tokenizer) if config.resize_embeddings else None
    loss: Any = config.policy_loss
    if resume is not None:
        trained_on: Any = plan
        check_resume(resume, config, loss, trained_on)
    of_policy = dataclasses.replace(
        config.model(device), compile=False, embedding_rows=embedding_rows
    )
    policy = _policy(of_policy, resume, plan.trees)
    sources = _sources(config, tokenizer, device, functions)
    reference = ResidentReference(config.schedule, _reference(config, device, embedding_rows))
    critic = None
    if config.is_ppo:
        saved = None if resume is None else resume.state.critic
        critic = read_critic(config, device, tokenizer, plan.total_steps, saved)
    optimizer = config.optimizer().optimizer(policy.model, policy.bf16)
    compile_policy(config, policy, memory)
    ledger = OnlineLedger([one.name for one in sources])
    budget = config.token_budget(device)
    engine = TransformersEngine(
        policy,
        tokenizer,
        max_new_tokens=config.max_completion_length,
        temperature=config.temperature,
        prompts_at_once=config.sampling_batch_size,
    )
    untyped: Any = plan, reference
    run = OnlineRun(
        config=config,
        device=device,
        tokenizer=tokenizer,
        objective=Objective(loss),
        ledger=ledger,
        trees=untyped[0].trees,
        plan=untyped[0],
        packs=PacksAhead(lambda step: [], 0),  # a rollout's packs are made when it is there
        policy=policy,
        reference=untyped[1],
        optimizer=optimizer,
        scheduler=config.optimizer().scheduler(optimizer, plan.total_steps),
        window_logps=LogpTable(0, config.num_generations),
        splits={},
        best=None,
        averages=Averages(torch.device("cpu"), ledger.names),
        total_loss=torch.zeros((), device=device),
        collector=Collector(config, plan, engine, sources, policy, reference, critic, budget),
        critic=critic,
    )
    _announce(run, plan)
    if resume is not None:
        take_up(run, resume)
        if critic is not None:
            critic.take_up(resume.state.critic, run.step)
        run.averages.sums = run.averages.sums.cpu()
    return run


def _policy(of_policy: ModelConfig, resume: Resume | None, prompts: Prompts) -> PackedModel:
    name = of_policy.name
    if resume is not None:
        of_policy = dataclasses.replace(of_policy, name=str(resume.folder), revision="main")
    policy = load_model(of_policy)
    if resume is not None:
        add_remainders(policy.model, resume.state.remainders)
    largest = max(int(ids.max()) for ids in prompts.ids)
    check_ids(policy, largest, "model_name_or_path", name)
    return policy


def _prompts(config: OnlineConfig, tokenizer: Any, device: torch.device, rows: Any) -> Prompts:
    name = config.dataset_name or "the rows"
    if rows is None:
        rows = read_rows(name, config=config.dataset_config, split=config.dataset_train_split)
    hf_config = config.model(device).read()
    return with_room(tokenizer, rows, name, hf_config, config.max_completion_length)


def _plan(config: OnlineConfig, prompts: Prompts) -> RolloutPlan:
    needed = config.prompts_per_step * config.steps_per_generation
    if len(prompts) < needed:
        raise FasttrError(
            f"train_batch_size: a rollout takes {needed} prompts, and there are {len(prompts)}; "
            "lower train_batch_size or raise num_generations"
        )
    return RolloutPlan(
        trees=prompts,
        prompts_per_step=config.prompts_per_step,
        steps_per_generation=config.steps_per_generation,
        num_iterations=config.num_iterations,
        total_steps=config.total_steps(len(prompts)),
        seed=config.seed if config.data_seed is None else config.data_seed,
        shuffle=config.shuffle_dataset,
    )


def _sources(
    config: OnlineConfig, tokenizer: Any, device: torch.device, functions: Sequence[Any]
) -> list[RewardSource]:
    model = dataclasses.replace(
        config.model(device, "a reward model"), key="reward_funcs", ld_alpha=None
    )
    names = [name for name in config.reward_names if name != GIVEN]
    budget = config.token_budget(device)
    sources: list[RewardSource] = [reward_source(name, model, tokenizer, budget) for name in names]
    sources += [FunctionReward(one, getattr(one, "__name__", "reward")) for one in functions]
    if not sources:
        raise FasttrError(f"reward_funcs: got {GIVEN}, and no function is given; wanted one")
    taken = [one.name for one in sources]
    if len(set(taken)) < len(taken):
        for number, one in enumerate(sources):
            one.name = f"{one.name}_{number}"
    return sources


def _reference(
    config: OnlineConfig, device: torch.device, embedding_rows: int | None
) -> PackedModel | None:
    if config.beta == 0:
        return None
    name = config.ref_model_name_or_path
    key = "ref_model_name_or_path" if name is not None else "model_name_or_path"
    wanted = config.model(device, name or config.model_name_or_path)
    return load_model(dataclasses.replace(wanted, key=key, embedding_rows=embedding_rows))


def _announce(run: OnlineRun, plan: RolloutPlan) -> None:
    config = run.config
    assert isinstance(config, OnlineConfig)
    completions = plan.prompts_per_rollout * config.num_generations
    say(
        f"{plan.total_steps} steps of {config.train_batch_size} completions; a rollout of "
        f"{completions} ({plan.prompts_per_rollout} prompts) feeds {plan.steps_per_rollout} steps"
    )
    sources = ", ".join(one.name for one in run.collector.sources)
    say(f"rewards: {sources}; loss {config.loss_type}, beta {config.beta:g}")
    if run.critic is not None:
        say(f"critic: from {config.value_source}, trained beside the policy")
    is_step = config.save_strategy == "steps" and config.save_steps >= 1
    if is_step and config.save_steps % plan.steps_per_rollout:
        say(
            f"save_steps: {config.save_steps:g} is no multiple of the {plan.steps_per_rollout} "
            "steps of a rollout: a checkpoint is written when its rollout is used up"
        )
