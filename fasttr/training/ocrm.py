"""`fasttr ocrm`: stages of a reward model and a policy that follows it.

    once:  pairs <- SFT policy; labels; q <- log-probs under it
    i = 1: reward_1 <- fit(pairs);  policy_1 <- train(from SFT, reference SFT, reward_1)
    i > 1: p <- log-probs under policy_{i-1};  w <- ratios(p, q)
           reward_i <- fit(pairs, w, from SFT);  policy_i <- train(from policy_{i-1}, reward_i)
    each:  judge(policy_i, reward_i)

Every line is a step of a `Store`, so arms share what they have in common, and a run that was killed
goes on where it was.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from fasttr.batch import Tree
from fasttr.config.ocrm_config import OcrmConfig
from fasttr.console import say
from fasttr.data.in_memory import ListTrees
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
from fasttr.evaluation.stage_table import table
from fasttr.files import write_json, write_text
from fasttr.losses.ratios import pair_weights
from fasttr.models.load import ModelConfig, load_config, load_model, load_tokenizer
from fasttr.rollouts.prompts import Prompts, encode
from fasttr.rollouts.rewards import RewardInputs, reward_source
from fasttr.training.online import train_online
from fasttr.training.reward import train_reward
from fasttr.training.stages import Step, Store, model_digest, seed_of

PAIRS = "pairs.jsonl"
LOGPS = "logps.npy"
WEIGHTS = "weights.npy"
RESULTS = "results.jsonl"


def run_ocrm(config: OcrmConfig) -> list[dict[str, Any]]:
    """All stages of all arms; returns their lines of results, which are also written.

    FasttrError as for the parts.
    """
    store = Store(Path(config.output_dir))
    try:
        return _Ocrm(config, store).all_arms()
    finally:
        store.close()


class _Ocrm:
    """What the steps of a run share."""

    def __init__(self, config: OcrmConfig, store: Store):
        self.config = config
        self.store = store
        self.device = device_for(config.use_cpu)
        policy = config.policy(Path("p"), config.model_name_or_path, None, "gold", 0)
        self.budget = policy.token_budget(self.device)
        self.template = dataclasses.replace(policy.model(self.device), gradient_checkpointing=False)
        load_config(config.model_name_or_path)
        self.tokenizer = load_tokenizer(config.model_name_or_path)
        self.sft = model_digest(config.model_name_or_path)
        self.prompts = self._prompts(config.dataset_name)
        self.held_out = self._prompts(config.judge_dataset_name)
        self.results: list[dict[str, Any]] = []

    def all_arms(self) -> list[dict[str, Any]]:
        if self.config.flattens_much:
            say(
                f"ratio_tau {self.config.ratios.tau:g}: weights flattened so much differ little "
                "from each other, so that a weighted arm is nearly an unweighted one"
            )
        pairs = self._pairs("pairs", None)
        q = self._logps("q", pairs, None)
        for arm in self.config.arms:
            self._arm(arm, pairs, q)
        self._write()
        return self.results

    def _arm(self, arm: str, pairs: Step, q: Step) -> None:
        policy: Step | None = None
        first = reward = self._reward("reward-1", pairs, None)
        self._judge(arm, 0, None, {"reward": reward}, {})
        for number in range(1, self.config.stages + 1):
            facts: dict[str, Any] = {}
            if number > 1 and arm in ("weighted", "shuffled"):
                assert policy is not None
                ratios = self._ratios(number, policy, pairs, q)
                facts = dict(ratios.facts)
                if self._ends(arm, number, facts):
                    return
                reward = self._reward(f"reward-{number}", pairs, ratios, shuffled=arm == "shuffled")
            elif number > 1 and arm == "unweighted":
                reward = self._reward(f"reward-{number}", pairs, None)
            elif number > 1 and arm == "fresh":
                reward = self._reward(
                    f"reward-{number}", self._pairs(f"pairs-{number}", policy), None
                )
            policy = self._policy(number, policy, reward)
            rewards = (
                {"reward": reward} if reward is first else {"reward": reward, "reward_1": first}
            )
            self._judge(arm, number, policy, rewards, facts)

    def _ends(self, arm: str, number: int, facts: dict[str, Any]) -> bool:
        if facts["ess"] >= self.config.stop_ess:
            return False
        say(
            f"{arm}: stops before stage {number}: its weights are worth {facts['ess']:.0f} pairs, "
            f"below stop_ess {self.config.stop_ess:g}"
        )
        return True

    # -- the steps

    def _pairs(self, name: str, policy: Step | None) -> Step:
        """Pairs that a policy wrote, labelled."""
        config = self.config
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
            **config.sampling(),
        }

        def make(folder: Path) -> dict[str, Any]:
            seed = seed_of(config.seed, name)
            rng = np.random.default_rng(seed)
            rows = np.sort(rng.permutation(len(self.prompts))[:wanted])
            some = _picked(self.prompts, rows)
            settings = self._judging(2 * per_prompt, seed)
            rollout = draw_rollout(self._model(policy), self.tokenizer, some, settings)
            gold = self._gold()(RewardInputs(some.raw, rollout, some.columns))
            gold_B2 = gold.reshape(-1, 2)
            first, labelled = label_pairs(gold_B2[:, 0], gold_B2[:, 1], config.label_noise, rng)
            lines = []
            for number, is_first in enumerate(first.tolist()):
                tree = rollout.trees[number // per_prompt]
                place = 2 * (number % per_prompt)
                a, b = (tree.completions[place + side].tolist() for side in (0, 1))
                if not labelled[number] or a == b:
                    continue
                chosen, rejected = (a, b) if is_first else (b, a)
                row = {
                    "prompt_ids": tree.prompt_ids.tolist(),
                    "chosen_ids": chosen,
                    "rejected_ids": rejected,
                }
                lines.append(json.dumps(row))
            lines = lines[: config.pairs]
            if not lines:
                raise FasttrError(f"label: {config.label} finds no difference in any pair")
            write_text(folder / PAIRS, "\n".join(lines) + "\n")
            dropped = len(first) - len(lines)
            say(f"{len(lines)} pairs, {dropped} dropped: both sides alike, or more than asked for")
            return {"pairs": len(lines), "dropped": dropped, "gold": float(gold.mean())}

        return self.store.step(name, inputs, make)

    def _logps(self, name: str, pairs: Step, policy: Step | None) -> Step:
        """Summed log-probs (P, 2) of the pairs under a policy."""
        config = self.config
        inputs = {
            "pairs": pairs,
            "policy": policy or self.sft,
            "temperature": config.ratio_temperature,
            "bf16": self.template.bf16,
        }

        def make(folder: Path) -> None:
            model = load_model(self._model(policy))
            trees = ListTrees([_tree(row) for row in _read(pairs)])
            found = summed_logps(model, trees, self.budget, config.ratio_temperature)
            np.save(folder / LOGPS, found)

        return self.store.step(name, inputs, make)

    def _ratios(self, number: int, policy: Step, pairs: Step, q: Step) -> Step:
        """Weights of the pairs for a policy."""
        settings = self.config.ratios
        p = self._logps(f"p-{number}", pairs, policy)

        def make(folder: Path) -> dict[str, Any]:
            trees = ListTrees([_tree(row) for row in _read(pairs)])
            found = pair_weights(
                np.load(p.folder / LOGPS),
                np.load(q.folder / LOGPS),
                settings,
                trees.completion_lengths,
            )
            np.save(folder / WEIGHTS, found.weights)
            facts = {
                "ess": found.effective_size,
                "tau": found.tau,
                "largest_share": found.largest_share,
                "length_correlation": found.length_correlation,
            }
            say(f"weights: worth {found.effective_size:.0f} pairs, tau {found.tau:.3g}")
            return facts

        inputs = {"p": p, "q": q, "ratios": dataclasses.asdict(settings)}
        return self.store.step(f"ratios-{number}", inputs, make)

    def _reward(
        self, name: str, pairs: Step, ratios: Step | None, *, shuffled: bool = False
    ) -> Step:
        """A reward model fitted to pairs from the SFT policy, with a fresh head."""
        inputs = {
            "pairs": pairs,
            "ratios": ratios,
            "shuffled": shuffled,
            "start": self.sft,
            "seed": self.config.seed,
            "settings": self.config.rm,
        }
        seed = seed_of(self.config.seed, name)

        def make(folder: Path) -> dict[str, Any]:
            rows = _read(pairs)
            weights = np.ones(len(rows))
            if ratios is not None:
                weights = np.load(ratios.folder / WEIGHTS)
            if shuffled:
                weights = np.random.default_rng(seed).permutation(weights)
            for row, weight in zip(rows, weights.tolist(), strict=True):
                row["weight"] = weight
            result = train_reward(self.config.reward(folder, seed), train_dataset=rows)
            return _finite(result.metrics)

        return self.store.step(name, inputs, make)

    def _policy(self, number: int, before: Step | None, reward: Step) -> Step:
        """The policy of a stage, from that of the stage before."""
        config = self.config
        name = f"policy-{number}"
        start = self._model(before).name
        reference = start if config.ref_reset else config.model_name_or_path
        inputs = {
            "start": before or self.sft,
            "reference": None if config.ref_reset else self.sft,
            "reward": reward,
            "prompts": self.prompts.fingerprint,
            "algorithm": config.algorithm,
            "updates": config.updates_per_stage,
            "seed": config.seed,
            "settings": config.rl,
        }

        def make(folder: Path) -> dict[str, Any]:
            own = config.policy(
                folder, start, reference, str(reward.folder), seed_of(config.seed, name)
            )
            return _finite(train_online(own).metrics)

        return self.store.step(name, inputs, make)

    def _judge(
        self,
        arm: str,
        number: int,
        policy: Step | None,
        rewards: dict[str, Step],
        facts: dict[str, Any],
    ) -> None:
        """Judge a stage's policy, and say and keep what was found."""
        config = self.config
        settings = self._judging(config.judge_samples, seed_of(config.seed, "judge"))
        inputs = {
            "policy": policy or self.sft,
            "initial": self.sft,
            "prompts": self.held_out.fingerprint,
            "label": config.label,
            "settings": settings._asdict(),
            **{f"model {name}": step for name, step in rewards.items()},
        }

        def make(folder: Path) -> dict[str, Any]:
            models = {name: self._named(str(step.folder)) for name, step in rewards.items()}
            return judge(
                self._model(policy),
                self._model(None),
                self.tokenizer,
                self.held_out,
                self._gold(),
                settings,
                models,
            )

        found = self.store.step(f"judge-{number}", inputs, make).facts
        self.results.append({"arm": arm, "stage": number, **found, **facts})
        self._write()
        say(
            f"{arm} stage {number}: gold {found['gold']:+.3f} +- {found['gold_stderr']:.3f}  "
            f"KL to SFT {found['kl']:.2f}  length {found['length']:.1f}  reward accuracy on its "
            f"own pairs {found['reward/accuracy']:.2f}"
        )

    # -- what the steps read

    def _prompts(self, name: str) -> Prompts:
        path = Path(name)
        split = "train"
        rows = read_rows(name, split=split) if path.exists() else read_rows(name)
        return encode(self.tokenizer, rows, name, None)[0]

    def _model(self, policy: Step | None) -> ModelConfig:
        if policy is None:
            return self._named(self.config.model_name_or_path)
        return self._named(str(policy.folder))

    def _named(self, name: str) -> ModelConfig:
        return dataclasses.replace(self.template, name=name)

    def _gold(self) -> Any:
        return reward_source(
            self.config.label,
            dataclasses.replace(self.template, key="label"),
            self.tokenizer,
            self.budget,
        )

    def _judging(self, samples: int, seed: int) -> JudgeSettings:
        return JudgeSettings(
            samples=samples,
            seed=seed,
            label_noise=self.config.label_noise,
            budget=self.budget,
            **self.config.sampling(),
        )

    def _write(self) -> None:
        out = Path(self.config.output_dir)
        write_text(out / RESULTS, "".join(json.dumps(line) + "\n" for line in self.results))
        write_text(out / "table.md", table(self.results) + "\n")
        write_json(out / "ocrm_config.json", dataclasses.asdict(self.config))


def _read(pairs: Step) -> list[dict[str, Any]]:
    lines = (pairs.folder / PAIRS).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def _tree(row: dict[str, Any]) -> Tree:
    prompt, chosen, rejected = (
        np.array(row[name], dtype=np.int32) for name in ("prompt_ids", "chosen_ids", "rejected_ids")
    )
    return Tree(0, prompt, (chosen, rejected))


def _picked(prompts: Prompts, rows: np.ndarray) -> Prompts:
    picked = rows.tolist()
    return dataclasses.replace(
        prompts,
        raw=[prompts.raw[row] for row in picked],
        ids=[prompts.ids[row] for row in picked],
        columns={name: [values[row] for row in picked] for name, values in prompts.columns.items()},
        positions=prompts.positions[rows],
    )


def _finite(metrics: dict[str, float]) -> dict[str, float]:
    """What a step keeps of a run's metrics, its times left out."""
    timed = ("perf/", "memory/", "train_runtime", "train_pairs")
    return {
        name: value
        for name, value in metrics.items()
        if not name.startswith(timed) and np.isfinite(value)
    }
