"""`fasttr ocrm`: stages of a reward model and a policy that follows it, in arms.

    once:  pairs <- SFT policy; labels; q <- log-probs under it
    i = 1: reward_1 <- fit(pairs);  policy_1 <- train(from SFT, reference SFT, reward_1)
    i > 1: p <- log-probs under policy_{i-1};  w <- ratios(p, q)
           reward_i <- fit(pairs, w, from SFT);  policy_i <- train(from policy_{i-1}, reward_i)
    each:  judge(policy_i, reward_i)

The baselines stand beside the last stage: PPO with as many episodes as all stages on the first
reward model, and DPO and WPO on the pairs themselves.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fasttr.config.ocrm_config import BASELINES, Arm, OcrmConfig, PolicyRun
from fasttr.console import say
from fasttr.evaluation.judge import paired
from fasttr.evaluation.stage_table import table
from fasttr.files import write_json, write_text
from fasttr.training.ocrm_steps import GOLD, Steps
from fasttr.training.stages import Step, Store

RESULTS = "results.jsonl"
CONFIG = "ocrm_config.json"


def run_ocrm(
    config: OcrmConfig, make_steps: Callable[[OcrmConfig, Store], Steps] = Steps
) -> list[dict[str, Any]]:
    """All stages of all arms; returns their lines of results, which are also written.

    `make_steps`: a subclass of `Steps` that fits other reward models. FasttrError as for the parts.
    """
    store = Store(Path(config.output_dir))
    try:
        announce_changes(config)
        return _Arms(config, make_steps(config, store)).all_of_them()
    finally:
        store.close()


@dataclass
class _Stage:
    """Where an arm is."""

    number: int = 0
    policy: Step | None = None
    reward: Step | None = None
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)  # of the ratios, or the like
    controls: dict[str, Step] = dataclasses.field(default_factory=dict)  # judged too
    episodes: int = 0  # completions drawn so far
    labels: int = 0  # pairs labelled so far


class _Arms:
    def __init__(self, config: OcrmConfig, steps: Steps):
        self.config = config
        self.steps = steps
        self.results: list[dict[str, Any]] = []
        self.judged: dict[tuple[str, int], Step] = {}  # by arm and stage

    def all_of_them(self) -> list[dict[str, Any]]:
        if self.config.flattens_much:
            say(
                f"ratio_tau {self.config.ratios.tau:g}: weights flattened so much differ little "
                "from each other, so that a weighted arm is nearly an unweighted one"
            )
        self.pairs = self.steps.pairs("pairs", None)
        self.first = self.steps.reward("reward-1", self.pairs)
        for arm in self.config.all_arms:
            if arm.update in BASELINES:
                self._baseline(arm)
            elif arm.update == "synthetic":
                self._synthetic(arm)
            else:
                self._stages(arm)
        self._write()
        return self.results

    # -- kinds of arms

    def _stages(self, arm: Arm) -> None:
        config, now = self.config, self._start()
        self._judge(arm, now)
        for number in range(1, config.stages + 1):
            now.number = number
            if number > 1 and not UPDATE[arm.update](self, arm, now):
                return
            self._follow(arm, now, f"policy-{number}", config.updates_per_stage)
            self._judge(arm, now)

    def _synthetic(self, arm: Arm) -> None:
        """RLP-SPG: the policy of the first stage gives pairs, and starts again from SFT."""
        config, now = self.config, self._start()
        self._judge(arm, now)
        now.number = 1
        self._follow(arm, now, "policy-1", config.updates_per_stage)
        self._judge(arm, now)
        if config.stages == 1:
            return
        assert now.policy is not None
        more = self.steps.synthetic_pairs(now.policy, self.first)
        now.facts = {"synthetic": more.facts["synthetic"]}
        now.reward = self.steps.reward("reward-2", self.pairs, more=more)
        now.policy, now.number = None, config.stages
        rest = (config.stages - 1) * config.updates_per_stage
        self._follow(arm, now, "policy-synthetic", rest)
        self._judge(arm, now)

    def _baseline(self, arm: Arm) -> None:
        config, now = self.config, self._start()
        now.number = config.stages
        if arm.update == "ppo-rlhf":
            run = PolicyRun(config.stages * config.updates_per_stage, of_ppo=True)
            now.policy = self.steps.policy("ppo-rlhf", None, self.first, run)
            now.episodes = config.episodes(run)
        else:
            now.policy = self.steps.preferences(self.pairs, is_wpo=arm.update == "wpo")
        self._judge(arm, now)

    # -- how a reward model is updated; False where the arm ends

    def _keep(self, arm: Arm, now: _Stage) -> bool:
        return True

    def _refit(self, arm: Arm, now: _Stage) -> bool:
        now.reward = self.steps.reward(f"reward-{now.number}", self.pairs)
        return True

    def _weigh(self, arm: Arm, now: _Stage) -> bool:
        config, number = self.config, now.number
        assert now.policy is not None
        q = self.steps.logps("q", self.pairs, None)
        ratios = self.steps.ratios(number, now.policy, self.pairs, q)
        now.facts = dict(ratios.facts)
        if now.facts["ess"] < config.stop_ess:
            say(
                f"{arm.name}: stops before stage {number}: its weights are worth "
                f"{now.facts['ess']:.0f} pairs, below stop_ess {config.stop_ess:g}"
            )
            return False
        name = f"reward-{number}"
        fits: dict[str, Callable[[], Step]] = {
            "weighted": lambda: self.steps.reward(name, self.pairs, ratios),
            "shuffled": lambda: self.steps.reward(name, self.pairs, ratios, shuffled=True),
            "unweighted": lambda: self.steps.reward(name, self.pairs),
        }
        now.reward = fits.pop(arm.update)()
        if config.judge_controls:
            now.controls = {control: fit() for control, fit in fits.items()}
        return True

    def _label_anew(self, arm: Arm, now: _Stage) -> bool:
        pairs = self.steps.pairs(f"pairs-{now.number}", now.policy)
        now.labels += pairs.facts["pairs"]
        now.reward = self.steps.reward(f"reward-{now.number}", pairs)
        return True

    # -- what they share

    def _start(self) -> _Stage:
        return _Stage(reward=self.first, labels=self.pairs.facts["pairs"])

    def _follow(self, arm: Arm, now: _Stage, name: str, rollouts: int) -> None:
        assert now.reward is not None
        run = PolicyRun(rollouts, arm.resets)
        now.policy = self.steps.policy(name, now.policy, now.reward, run)
        now.episodes += self.config.episodes(run)

    def _judge(self, arm: Arm, now: _Stage) -> None:
        """Judge a stage's policy, and say and keep what was found."""
        assert now.reward is not None
        rewards = {"reward": now.reward, **now.controls}
        if now.reward is not self.first:
            rewards["reward_1"] = self.first
        step = self.steps.judged(f"judge-{now.number}", now.policy, rewards)
        self.judged[arm.name, now.number] = step
        found = {
            "arm": arm.name,
            "stage": now.number,
            "episodes": now.episodes,
            "labels": now.labels,
            **step.facts,
            **now.facts,
            **self._against_first(arm, now.number, step),
        }
        self.results.append(found)
        self._write()
        say(
            f"{arm.name} stage {now.number}: gold {found['gold']:+.3f} +- "
            f"{found['gold_stderr']:.3f}  KL to SFT {found['kl']:.2f}  length "
            f"{found['length']:.1f}  reward accuracy on its own pairs "
            f"{found['reward/accuracy']:.2f}"
        )

    def _against_first(self, arm: Arm, number: int, step: Step) -> dict[str, float]:
        """How much more gold reward than the first arm's after as many stages, prompt by prompt."""
        first = self.config.arms[0]
        others = self.judged.get((first, number))
        if arm.name == first or others is None:
            return {}
        mine_B, others_B = (np.load(one.folder / GOLD) for one in (step, others))
        return paired("gold_difference", mine_B, others_B)

    def _write(self) -> None:
        out = Path(self.config.output_dir)
        write_text(out / RESULTS, "".join(json.dumps(line) + "\n" for line in self.results))
        write_text(out / "table.md", table(self.results) + "\n")
        write_json(out / CONFIG, dataclasses.asdict(self.config))


UPDATE: dict[str, Callable[[_Arms, Arm, _Stage], bool]] = {
    "fixed": _Arms._keep,
    "unweighted": _Arms._refit,
    "weighted": _Arms._weigh,
    "shuffled": _Arms._weigh,
    "fresh": _Arms._label_anew,
}


def announce_changes(config: OcrmConfig) -> None:
    """Name the keys in which a folder's last run was another one."""
    path = Path(config.output_dir) / CONFIG
    if not path.is_file():
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    now = json.loads(json.dumps(dataclasses.asdict(config)))
    changed = [name for name, value in now.items() if before.get(name) != value]
    if changed:
        say(
            f"output_dir: {config.output_dir} was made with another configuration "
            f"({', '.join(changed)}); the steps that read it are made anew, the others are kept"
        )
