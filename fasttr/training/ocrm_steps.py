"""The steps that stages are made of: pairs, log-probs, ratios, reward models, policies, judgements.

Each is a step of a `Store`: its key says all that it reads, so that arms share what they have in
common, and a run that was killed goes on where it was.

Legend: P pairs, B prompts, m samples of a prompt.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fasttr.config.ocrm_config import OcrmConfig, PolicyRun
from fasttr.console import say
from fasttr.data.sources import read_rows
from fasttr.environment import device_for
from fasttr.errors import FasttrError
from fasttr.evaluation.judge import (
    JudgeSettings,
    draw_rollout,
    judge,
    label_pairs,
    summed_logps,
)
from fasttr.losses.ratios import pair_weights
from fasttr.models.load import ModelConfig, load_config, load_model, load_tokenizer
from fasttr.models.packed import PackedModel
from fasttr.rollouts.confident import Cluster, confident_pair, same_text
from fasttr.rollouts.engine import Rollout
from fasttr.rollouts.prompts import Prompts, with_room
from fasttr.rollouts.rewards import (
    Closing,
    RewardInputs,
    RewardSource,
    load_function,
    reward_source,
)
from fasttr.training.loop import train
from fasttr.training.online import train_online
from fasttr.training.pair_rows import (
    Row,
    given_pairs,
    labelled_pairs,
    pair_row,
    read_pairs,
    read_trees,
    with_sides,
    write_pairs,
)
from fasttr.training.reward import train_reward
from fasttr.training.stages import Step, Store, lasting, model_digest, seed_of

LOGPS = "logps.npy"
WEIGHTS = "weights.npy"
GOLD = "gold.npy"  # of each prompt that was judged


class Steps:
    """What the steps of a run share. A subclass may fit other reward models: `fit_reward` writes
    one into a folder, `source` reads it."""

    def __init__(self, config: OcrmConfig, store: Store):
        self.config = config
        self.store = store
        self.device = device_for(config.use_cpu)
        run = PolicyRun(1)
        policy = config.policy(Path("p"), config.model_name_or_path, None, "gold", 0, run)
        self.budget = policy.token_budget(self.device)
        self.template = dataclasses.replace(policy.model(self.device), gradient_checkpointing=False)
        self.hf_config = load_config(config.model_name_or_path)
        self.tokenizer = load_tokenizer(config.model_name_or_path)
        self.sft = model_digest(config.model_name_or_path)
        self.prompts = self._prompts(config.dataset_name)
        self.held_out = self._prompts(config.judge_dataset_name)
        self._initial: PackedModel | None = None

    # -- reward models

    def fit_reward(self, folder: Path, rows: list[Row], seed: int) -> dict[str, Any]:
        """Fit a reward model with a fresh head to rows with a weight each, into `folder`."""
        return train_reward(self.config.reward(folder, seed), train_dataset=rows).metrics

    def source(self, reward: Step) -> RewardSource:
        """The rewards that a fitted model gives."""
        return reward_source(
            str(reward.folder), self._named(str(reward.folder)), self.tokenizer, self.budget
        )

    def reward(
        self,
        name: str,
        pairs: Step,
        ratios: Step | None = None,
        *,
        shuffled: bool = False,
        more: Step | None = None,
    ) -> Step:
        """A reward model fitted to pairs, and to those of `more`, from the SFT policy."""
        inputs = {
            "pairs": pairs,
            "ratios": ratios,
            "shuffled": shuffled,
            "more": more,
            "start": self.sft,
            "seed": self.config.seed,
            "settings": self.config.rm,
        }
        seed = seed_of(self.config.seed, name)

        def make(folder: Path) -> dict[str, Any]:
            rows = read_pairs(pairs.folder)
            weights = np.ones(len(rows))
            if ratios is not None:
                weights = np.load(ratios.folder / WEIGHTS)
            if shuffled:
                weights = np.random.default_rng(seed).permutation(weights)
            for row, weight in zip(rows, weights.tolist(), strict=True):
                row["weight"] = weight
            if more is not None:
                rows += [{**row, "weight": 1.0} for row in read_pairs(more.folder)]
            closing = Closing.of(self.tokenizer, self.prompts.raw[0])
            rows = [with_sides(row, closing.behind) for row in rows]
            return lasting(self.fit_reward(folder, rows, seed))

        return self.store.step(name, inputs, make)

    # -- data

    def pairs(self, name: str, policy: Step | None) -> Step:
        """Pairs that a policy wrote, labelled; those of the SFT policy may be given."""
        config = self.config
        if policy is None and config.pairs_dataset_name is not None:
            given = given_pairs(self.tokenizer, config.pairs_dataset_name, self.hf_config)

            def keep(folder: Path) -> dict[str, Any]:
                write_pairs(folder, given.rows)
                return {"pairs": len(given.rows)}

            return self.store.step(name, {"given": given.fingerprint, "writer": self.sft}, keep)
        per_prompt = config.pairs_per_prompt
        wanted = -(-config.pairs // per_prompt)
        if wanted > len(self.prompts):
            raise FasttrError(
                f"pairs: got {config.pairs}, {per_prompt} of a prompt, and there are "
                f"{len(self.prompts)} prompts; lower pairs or raise pairs_per_prompt"
            )
        inputs = {
            "writer": policy or self.sft,
            "prompts": self.prompts.fingerprint,
            "label": config.label,
            "noise": config.label_noise,
            "pairs": config.pairs,
            "per_prompt": per_prompt,
            "seed": config.seed,
            **config.sampling(config.pairs_temperature),
        }

        def make(folder: Path) -> dict[str, Any]:
            seed = seed_of(config.seed, name)
            rng = np.random.default_rng(seed)
            rollout, gold = self._drawn(policy, wanted, 2 * per_prompt, seed, rng)
            gold_P2 = gold.reshape(-1, 2)
            first, labelled = label_pairs(gold_P2[:, 0], gold_P2[:, 1], config.label_noise, rng)
            rows = labelled_pairs(rollout.trees, first, labelled)[: config.pairs]
            if not rows:
                raise FasttrError(f"label: {config.label} finds no difference in any pair")
            write_pairs(folder, rows)
            dropped = len(first) - len(rows)
            say(f"{len(rows)} pairs, {dropped} dropped: sides alike, no label, or too many")
            return {"pairs": len(rows), "dropped": dropped, "gold": float(np.nanmean(gold))}

        return self.store.step(name, inputs, make)

    def synthetic_pairs(self, policy: Step, reward: Step) -> Step:
        """Pairs of a policy's own samples, without a label, where most of them agree."""
        config = self.config
        inputs = {
            "policy": policy,
            "reward": reward,
            "prompts": self.prompts.fingerprint,
            "samples": config.synthetic_samples,
            "share": config.synthetic_share,
            "cluster": config.cluster,
            "pairs": config.pairs,
            "seed": config.seed,
            **config.sampling(None),
        }

        def make(folder: Path) -> dict[str, Any]:
            seed, m = seed_of(config.seed, "synthetic"), config.synthetic_samples
            rng = np.random.default_rng(seed)
            places = self._some_prompts(min(config.pairs, len(self.prompts)), rng)
            some = self.prompts.picked(places)
            rollout = draw_rollout(self.load(policy), self.tokenizer, some, self._drawing(m, seed))
            score_Bm = self.source(reward)(RewardInputs(some.raw, rollout, some.columns))
            cluster: Cluster = same_text
            if config.cluster is not None:
                cluster = load_function(config.cluster, "cluster")
            rows = []
            for number, score_m in enumerate(score_Bm.reshape(-1, m)):
                texts = rollout.texts[number * m : (number + 1) * m]
                labels = list(cluster(some.raw[number], texts))
                pair = confident_pair(labels, score_m, config.synthetic_share, rng)
                if pair is not None:
                    rows.append(pair_row(rollout.trees[number], *pair))
            write_pairs(folder, rows)
            say(f"{len(rows)} of {len(some)} prompts on which samples agree")
            return {"synthetic": len(rows), "asked": len(some)}

        return self.store.step("synthetic", inputs, make)

    def logps(self, name: str, pairs: Step, policy: Step | None) -> Step:
        """Summed log-probs (P, 2) of the pairs under a policy."""
        config = self.config
        inputs = {
            "pairs": pairs,
            "policy": policy or self.sft,
            "temperature": config.ratio_temperature,
            "tokens": config.ratio_tokens,
            "bf16": self.template.bf16,
        }

        def make(folder: Path) -> None:
            trees = read_trees(pairs.folder)
            found = summed_logps(
                self.load(policy),
                trees,
                self.budget,
                config.ratio_temperature,
                config.ratio_tokens,
            )
            np.save(folder / LOGPS, found)

        return self.store.step(name, inputs, make)

    def ratios(self, number: int, policy: Step, pairs: Step, q: Step) -> Step:
        """Weights of the pairs for a policy."""
        settings = self.config.ratios
        p = self.logps(f"p-{number}", pairs, policy)

        def make(folder: Path) -> dict[str, Any]:
            trees = read_trees(pairs.folder)
            found = pair_weights(
                np.load(p.folder / LOGPS),
                np.load(q.folder / LOGPS),
                settings,
                trees.completion_lengths,
            )
            np.save(folder / WEIGHTS, found.weights)
            say(f"weights: worth {found.effective_size:.0f} pairs, tau {found.tau:.3g}")
            return {
                "ess": found.effective_size,
                "tau": found.tau,
                "largest_share": found.largest_share,
                "length_correlation": found.length_correlation,
            }

        inputs = {"p": p, "q": q, "ratios": dataclasses.asdict(settings)}
        return self.store.step(f"ratios-{number}", inputs, make)

    # -- policies

    def policy(self, name: str, before: Step | None, reward: Step, run: PolicyRun) -> Step:
        """A policy that follows a reward model, from the one before or from SFT."""
        config = self.config
        start = self._model(before).name
        reference = start if run.resets else config.model_name_or_path
        inputs = {
            "start": before or self.sft,
            "reference": (before if run.resets else None) or self.sft,
            "reward": reward,
            "prompts": self.prompts.fingerprint,
            "rollouts": run.rollouts,
            "seed": config.seed,
            "settings": config.policy_settings(run),
        }

        def make(folder: Path) -> dict[str, Any]:
            seed = seed_of(config.seed, name)
            return lasting(self.follow(folder, start, reference, reward, seed, run))

        return self.store.step(name, inputs, make)

    def follow(
        self, folder: Path, start: str, reference: str, reward: Step, seed: int, run: PolicyRun
    ) -> dict[str, Any]:
        """Train a policy on a fitted reward model, into `folder`."""
        own = self.config.policy(folder, start, reference, str(reward.folder), seed, run)
        return train_online(own).metrics

    def preferences(self, pairs: Step, *, is_wpo: bool) -> Step:
        """DPO, or WPO, on the pairs."""
        config = self.config
        name = "wpo" if is_wpo else "dpo"
        inputs = {
            "pairs": pairs,
            "start": self.sft,
            "is_wpo": is_wpo,
            "seed": config.seed,
            "settings": config.dpo,
        }

        def make(folder: Path) -> dict[str, Any]:
            own = config.preferences(folder, seed_of(config.seed, "dpo"), is_wpo=is_wpo)
            return lasting(train(own, train_dataset=read_pairs(pairs.folder)).metrics)

        return self.store.step(name, inputs, make)

    # -- the judge

    def judged(self, name: str, policy: Step | None, rewards: Mapping[str, Step]) -> Step:
        """A policy's samples, and what reward models make of them."""
        config = self.config
        seed = seed_of(config.seed, "judge")
        settings = self._drawing(config.judge_samples, seed, config.judge_temperature)
        inputs = {
            "policy": policy or self.sft,
            "initial": self.sft,
            "prompts": self.held_out.fingerprint,
            "label": config.label,
            "settings": settings._asdict(),
            **{f"model {one}": step for one, step in rewards.items()},
        }

        def make(folder: Path) -> dict[str, Any]:
            found = judge(
                self.load(policy),
                self.load(None),
                self.tokenizer,
                self.held_out,
                self._gold(),
                settings,
                {one: self.source(step) for one, step in rewards.items()},
            )
            np.save(folder / GOLD, found.gold_B)
            return found.metrics

        return self.store.step(name, inputs, make)

    # -- what they read

    def load(self, policy: Step | None) -> PackedModel:
        """A policy; the SFT policy is read once."""
        if policy is not None:
            return load_model(self._model(policy))
        if self._initial is None:
            self._initial = load_model(self._model(None))
        return self._initial

    def _drawn(
        self, policy: Step | None, prompts: int, m: int, seed: int, rng: np.random.Generator
    ) -> tuple[Rollout, np.ndarray]:
        """m samples for each of so many prompts, and their gold rewards."""
        some = self.prompts.picked(self._some_prompts(prompts, rng))
        settings = self._drawing(m, seed, self.config.pairs_temperature)
        rollout = draw_rollout(self.load(policy), self.tokenizer, some, settings)
        return rollout, self._gold()(RewardInputs(some.raw, rollout, some.columns))

    def _some_prompts(self, number: int, rng: np.random.Generator) -> np.ndarray:
        return np.sort(rng.permutation(len(self.prompts))[:number])

    def _prompts(self, name: str) -> Prompts:
        rows = read_rows(name, split="train") if Path(name).exists() else read_rows(name)
        longest = self.config.sampling(None)["max_completion_length"]
        return with_room(self.tokenizer, rows, name, self.hf_config, longest)

    def _model(self, policy: Step | None) -> ModelConfig:
        if policy is None:
            return self._named(self.config.model_name_or_path)
        return self._named(str(policy.folder))

    def _named(self, name: str) -> ModelConfig:
        return dataclasses.replace(self.template, name=name)

    def _gold(self) -> RewardSource:
        return reward_source(
            self.config.label,
            dataclasses.replace(self.template, key="label"),
            self.tokenizer,
            self.budget,
        )

    def _drawing(self, samples: int, seed: int, temperature: float | None = None) -> JudgeSettings:
        return JudgeSettings(
            samples=samples,
            seed=seed,
            label_noise=self.config.label_noise,
            budget=self.budget,
            **self.config.sampling(temperature),
        )
