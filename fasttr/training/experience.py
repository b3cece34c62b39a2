"""From prompts to what a step of on-policy training reads: completions, rewards, advantages, and
the log-probs of the policy that drew them and of the reference.

Legend: B prompts, m completions of a prompt, N = B m completions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fasttr.batch import PackedBatch
from fasttr.config.online_config import OnlineConfig
from fasttr.console import say
from fasttr.errors import FasttrError
from fasttr.losses import advantages
from fasttr.losses.policy_gradient import TokenInputs
from fasttr.models.packed import PackedModel
from fasttr.models.policy import token_logps
from fasttr.packing.plan import pack_rows
from fasttr.reference.resident import ResidentReference
from fasttr.rollouts.engine import Engine, Rollout
from fasttr.rollouts.prompts import RolloutPlan
from fasttr.rollouts.rewards import RewardInputs, RewardSource
from fasttr.training.critic import Critic

UNREWARDED = 3  # rollouts in a row without any reward that stop a run

TokenLogps = list[Tensor]  # of each prompt's completions, one after the other, fp32 on the host
OfPack = Callable[[PackedBatch], Tensor]  # a pack on the host -> a number of each of its tokens


class Critique(NamedTuple):
    """What PPO makes of a rollout, token by token."""

    advantage: TokenLogps
    value: TokenLogps  # when it was drawn
    target: TokenLogps  # what values are trained towards
    kl: float  # to the reference, nats a completion


class Experience(NamedTuple):
    """A rollout with everything that its steps read."""

    rollout: Rollout
    advantage: Tensor  # (N,) fp32
    keep: Tensor  # (N,) fp32: 0 where a completion is left out of the loss
    old_logp: TokenLogps | None  # None where the policy that drew it is the one that is trained
    ref_logp: TokenLogps | None
    metrics: dict[str, float]
    critique: Critique | None = None  # of ppo, whose tokens have advantages of their own

    def inputs(
        self, batch: PackedBatch, logp: Tensor, rows: slice, completions: slice
    ) -> TokenInputs:
        """What a loss reads of whole completions of a pack; `logp` (t,) is theirs."""
        device = logp.device
        places = self._places(batch)[completions]
        lengths = torch.from_numpy(self.rollout.lengths[places].astype(np.int64))
        return TokenInputs(
            logp=logp,
            old_logp=_of_pack(self.old_logp, batch, rows, device),
            ref_logp=_of_pack(self.ref_logp, batch, rows, device),
            advantage=self._advantages(batch, places, rows, device),
            lengths=lengths.to(device),
            keep=self.keep[places].to(device),
        )

    def _advantages(
        self, batch: PackedBatch, places: np.ndarray, rows: slice, device: torch.device
    ) -> Tensor:
        if self.critique is None:
            return self.advantage[places].to(device)
        return _of_rows(self.critique.advantage, batch, rows, device)

    def of_critic(self, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        """(R,) values and targets of a pack's tokens, on its device."""
        assert self.critique is not None
        device = batch.target.device
        value, target = (
            _of_rows(numbers, batch, slice(None), device)
            for numbers in (self.critique.value, self.critique.target)
        )
        return value, target

    def kept_tokens(self, prompts: np.ndarray) -> int:
        """Tokens of the completions of some prompts that are not left out."""
        lengths = torch.from_numpy(self.rollout.trees.completion_lengths[prompts])
        return int((lengths * self.keep.view(len(self.rollout.trees), -1)[prompts]).sum())

    def _places(self, batch: PackedBatch) -> np.ndarray:
        """(n,) the place of each completion of a pack among those of the rollout."""
        m = self.rollout.trees.completion_lengths.shape[1]
        return (np.array(batch.rows)[:, None] * m + np.arange(m)).reshape(-1)


@dataclass
class Collector:
    """Draws, rewards and scores rollouts."""

    config: OnlineConfig
    plan: RolloutPlan
    engine: Engine
    sources: Sequence[RewardSource]
    policy: PackedModel
    reference: ResidentReference
    critic: Critic | None
    budget: int  # tokens of a pack
    unrewarded: int = 0  # rollouts in a row without a reward

    def collect(self, number: int) -> Experience:
        """Rollout `number`: a function of it, the seed and the weights."""
        config = self.config
        rows = self.plan.of_rollout(number)
        prompts = self.plan.trees
        seed = int(np.random.SeedSequence([config.seed, number]).generate_state(1)[0])
        self.engine.update(self.policy)
        rollout = self.engine.generate(
            [prompts.ids[row] for row in rows], config.num_generations, seed
        )
        inputs = RewardInputs(
            [prompts.raw[row] for row in rows],
            rollout,
            {name: [values[row] for row in rows] for name, values in prompts.columns.items()},
        )
        reward_NK = np.stack([source(inputs) for source in self.sources], axis=1)
        self._require_rewards(reward_NK, inputs)
        finished = torch.from_numpy(rollout.finished)
        masks = config.mask_truncated_completions
        keep = finished.float() if masks else torch.ones(len(finished))
        needs_old = self.plan.steps_per_rollout > 1 or config.rewards_closeness or config.is_ppo
        old_logp = self._scored(self.policy, rollout) if needs_old else None
        ref_logp = None
        if config.beta > 0:
            assert self.reference.model is not None
            ref_logp = self._scored(self.reference.model, rollout)
        return self._with_advantages(
            reward_NK, Experience(rollout, torch.empty(0), keep, old_logp, ref_logp, {})
        )

    def packs(self, rollout: Rollout, within: int) -> Iterator[PackedBatch]:
        """The packs of one of a rollout's steps: the same in every pass, and when it is scored."""
        yield from pack_rows(rollout.trees, self.plan.places(within), self.budget)

    def used_up(self, experience: Experience) -> None:
        """All steps of a rollout are done."""
        if self.critic is not None and experience.critique is not None:
            completions = len(experience.rollout.texts)
            self.critic.coefficient.follow(experience.critique.kl, completions)

    def _scored(self, model: PackedModel, rollout: Rollout) -> TokenLogps:
        return self._by_prompt(
            rollout, lambda batch: token_logps(model, batch, self.config.temperature)
        )

    def _by_prompt(self, rollout: Rollout, of_pack: OfPack) -> TokenLogps:
        """In the packs of the steps, so that the first ratio of a step is exactly 1."""
        found: list[Tensor] = [torch.empty(0)] * len(rollout.trees)
        for within in range(self.plan.steps_per_generation):
            for batch in self.packs(rollout, within):
                lengths = [int(rollout.trees.completion_lengths[row].sum()) for row in batch.rows]
                parts = of_pack(batch).cpu().split(lengths)
                for row, part in zip(batch.rows, parts, strict=True):
                    found[row] = part
        return found

    def _with_advantages(self, reward_NK: np.ndarray, experience: Experience) -> Experience:
        config, m = self.config, self.config.num_generations
        rollout = experience.rollout
        reward_N = self._summed(reward_NK, rollout)
        used_N = reward_N
        if config.reward_clip_range is not None:
            used_N = used_N.clamp(*config.reward_clip_range)
        metrics = _reward_metrics(reward_NK, reward_N, self.sources) | _length_metrics(rollout)
        if config.rewards_closeness:
            kl_N = _summed_log_ratio(experience) * experience.keep
            tokens = experience.kept_tokens(np.arange(len(rollout.trees)))
            metrics["kl"] = float(kl_N.sum()) / max(tokens, 1)
            if config.is_rloo:
                used_N = used_N - config.beta * kl_N
        if config.is_ppo:
            return self._with_critique(used_N, experience, metrics)
        if config.is_rloo:
            advantage_N = advantages.leave_one_out(used_N, m, normalize=config.normalize_advantages)
        else:
            advantage_N = advantages.group_relative(used_N, m, config.scale_rewards)
        over_all = config.scale_rewards == "batch" and not config.is_rloo
        compared = used_N[None] if over_all else used_N.view(-1, m)
        metrics["frac_reward_zero_std"] = advantages.share_without_spread(compared)
        return experience._replace(advantage=advantage_N.float(), metrics=metrics)

    def _with_critique(
        self, score_N: Tensor, experience: Experience, metrics: dict[str, float]
    ) -> Experience:
        """Advantages of tokens; a completion without a reward is left out of every mean."""
        config, critic = self.config, self.critic
        assert critic is not None
        assert experience.old_logp is not None
        rollout = experience.rollout
        keep_N = experience.keep * ~score_N.isnan()
        values = self._by_prompt(rollout, critic.frozen_values)
        lengths_N = torch.from_numpy(rollout.lengths.astype(np.int64))
        kept_R = keep_N.repeat_interleave(lengths_N) > 0
        value_R = torch.cat(values).double()
        kl_R = torch.zeros_like(value_R)
        if experience.ref_logp is not None:
            old, ref = torch.cat(experience.old_logp), torch.cat(experience.ref_logp)
            kl_R = advantages.KL_ESTIMATORS[config.kl_estimator](old.double(), ref.double())
        reward_R = advantages.token_rewards(
            score_N.nan_to_num(nan=0.0), critic.coefficient.value * kl_R, lengths_N
        )
        if config.whiten_rewards:
            reward_R = advantages.whitened(reward_R, kept_R, keeps_mean=True)
        advantage_R = advantages.generalised(reward_R, value_R, lengths_N, config.gamma, config.lam)
        target_R = advantage_R + value_R
        advantage_R = advantages.whitened(advantage_R, kept_R)
        kept = max(float(keep_N.sum()), 1.0)
        metrics["value"] = float(value_R[kept_R].mean())
        metrics["explained_variance"] = advantages.explained_variance(
            value_R[kept_R], target_R[kept_R]
        )
        metrics["kl_coef"] = critic.coefficient.value
        sizes = [len(part) for part in values]
        split_advantage, split_target = (
            list(x_R.float().split(sizes)) for x_R in (advantage_R, target_R)
        )
        critique = Critique(split_advantage, values, split_target, float(kl_R[kept_R].sum()) / kept)
        return experience._replace(keep=keep_N, metrics=metrics, critique=critique)

    def _summed(self, reward_NK: np.ndarray, rollout: Rollout) -> Tensor:
        """(N,) fp64 weighted sum of the sources that gave one; NaN where none did."""
        weights = np.array(self.config.reward_weights or [1.0] * len(self.sources))
        found = np.nansum(reward_NK * weights, axis=1)
        found[np.isnan(reward_NK).all(axis=1)] = np.nan
        if self.config.missing_eos_penalty is not None:
            found[~rollout.finished] -= self.config.missing_eos_penalty
        if self.config.missing_eos_score is not None:
            found[~rollout.finished] = self.config.missing_eos_score
        return torch.from_numpy(found)

    def _require_rewards(self, reward_NK: np.ndarray, inputs: RewardInputs) -> None:
        if not np.isnan(reward_NK).all():
            self.unrewarded = 0
            return
        self.unrewarded += 1
        first = f"{inputs.prompts[0]!r:.80}"
        told = f"no source gives any reward for a rollout; its first prompt is {first}"
        if self.unrewarded == UNREWARDED:
            raise FasttrError(f"reward_funcs: {told}, for {UNREWARDED} rollouts in a row")
        say(f"WARNING: {told}")


def _of_pack(
    logps: TokenLogps | None, batch: PackedBatch, rows: slice, device: torch.device
) -> Tensor | None:
    """(t,) of some predicting rows of a pack."""
    return None if logps is None else _of_rows(logps, batch, rows, device)


def _of_rows(numbers: TokenLogps, batch: PackedBatch, rows: slice, device: torch.device) -> Tensor:
    """(t,) likewise."""
    return torch.cat([numbers[row] for row in batch.rows])[rows].to(device)


def _summed_log_ratio(experience: Experience) -> Tensor:
    """(N,) fp64 log-ratio of policy and reference, summed over each completion."""
    assert experience.old_logp is not None
    assert experience.ref_logp is not None
    old, ref = torch.cat(experience.old_logp), torch.cat(experience.ref_logp)
    ratio = advantages.k1(old.double(), ref.double())
    lengths = torch.from_numpy(experience.rollout.lengths.astype(np.int64))
    return torch.segment_reduce(ratio, "sum", lengths=lengths, initial=0.0)


def _reward_metrics(
    reward_NK: np.ndarray, reward_N: Tensor, sources: Sequence[RewardSource]
) -> dict[str, float]:
    found = {
        "reward": float(reward_N.nanmean()),
        "reward_std": float(advantages.nan_std(reward_N[None])),
    }
    for source, column in zip(sources, torch.from_numpy(reward_NK).T, strict=True):
        found[f"rewards/{source.name}/mean"] = float(column.nanmean())
        found[f"rewards/{source.name}/std"] = float(advantages.nan_std(column[None]))
    return found


def _length_metrics(rollout: Rollout) -> dict[str, float]:
    """As TRL has them: terminated ones alone once more, 0 where there is none."""
    lengths, ended = rollout.lengths, rollout.lengths[rollout.finished]
    if len(ended) == 0:
        ended = np.zeros(1)
    return {
        "completions/mean_length": float(lengths.mean()),
        "completions/min_length": float(lengths.min()),
        "completions/max_length": float(lengths.max()),
        "completions/clipped_ratio": float(1 - rollout.finished.mean()),
        "completions/mean_terminated_length": float(ended.mean()),
        "completions/min_terminated_length": float(ended.min()),
        "completions/max_terminated_length": float(ended.max()),
    }
