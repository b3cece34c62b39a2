"""`python -m bench.paper.ocrm_lm`: off-policy-corrected reward models and what they are compared
with, on a small language model and the generated task, through `fasttr ocrm`'s own steps.

A model of two layers is fitted to the task, whose completions run past the asked length now and
then, and writes pairs; labels are Bradley-Terry on the gold reward. Policies are trained by RLOO,
the baselines by PPO, DPO and WPO; all are judged on the same held-out prompts. The reward model is
one of `--reward`: `bag`, a logistic fit on two counts (asked letters and others), which cannot know
the asked length; `probe`, the same on the SFT model's last hidden state; `full`, the fine-tuned
model of `fasttr reward`. A refit of the first two to the same pairs is the same fit, so the arm
`fixed` is also `unweighted` there.

Written into DIR: a folder a seed with all steps (a run that was stopped goes on), results.json,
table.md, verdict.md, ocrm-lm-REWARD.png. `--quick`: seconds, and no conclusions.
"""

from __future__ import annotations

import abc
import argparse
import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.paper.ocrm_lm_report import Found, plot, table, verdict
from bench.paper.ocrm_pool import Settings as PoolSettings
from bench.paper.ocrm_pool import bag_of, last_hidden, supervised
from fasttr.batch import Tree
from fasttr.config.ocrm_config import OcrmConfig, PolicyRun
from fasttr.data.in_memory import ListTrees
from fasttr.errors import FasttrError
from fasttr.rollouts.rewards import RewardInputs, RewardSource
from fasttr.rollouts.sampler import encode_prompts
from fasttr.toy.exact import fit_linear
from fasttr.toy.task import NOISE, prompts, write_jsonl
from fasttr.training.ocrm import run_ocrm
from fasttr.training.ocrm_steps import Steps
from fasttr.training.online import train_online
from fasttr.training.pair_rows import Row
from fasttr.training.stages import Step

THETA = "theta.npy"
RIDGE = 1e-3  # of the sum over pairs: it only keeps separable pairs finite
BASELINES = ["ppo-rlhf", "dpo", "wpo"]
ARMS = {
    "bag": ["fixed", "weighted", "shuffled", "fresh", "synthetic", "fixed@sft", "weighted@sft"],
    "probe": ["fixed", "weighted", "fresh"],
    "full": ["fixed", "unweighted", "weighted", "shuffled", "fresh"],
}


@dataclass(frozen=True)
class Settings:
    reward: str = "bag"
    seeds: int = 3  # some eight minutes of one core each
    stages: int = 8
    updates: int = 10  # rollouts of a stage
    rollout: int = 128  # completions of one
    pairs: int = 1500
    judged: int = 150  # prompts, two samples each
    beta: float = 3.0  # in units of the reward model's score
    sft_beta: float = 0.6  # where the reference stays at SFT, and of PPO-RLHF
    sft_steps: int = 400
    baselines: bool = True

    @property
    def arms(self) -> list[str]:
        return [*ARMS[self.reward], *(BASELINES if self.baselines else [])]


def same_bag(prompt: str, texts: Sequence[str]) -> list[tuple[int, int]]:
    """Samples of the task say the same when their counts of asked letters and of others do, in
    steps of eight and six."""
    bags = [bag_of(prompt, text) for text in texts]
    return [(asked // 8, others // 6) for asked, others in bags]


Features = Callable[[Sequence[str], Sequence[str], Sequence[Sequence[int]]], np.ndarray]


class LinearSteps(Steps, abc.ABC):
    """Reward models that are linear in features of a prompt and its completion."""

    def fit_reward(self, folder: Path, rows: list[Row], seed: int) -> dict[str, Any]:
        asked = [self._text(row["prompt_ids"]) for row in rows]
        chosen, rejected = (
            self.features(asked, [self._text(row[side]) for row in rows], [r[side] for r in rows])
            for side in ("chosen_ids", "rejected_ids")
        )
        weights = np.array([row["weight"] for row in rows])
        np.save(folder / THETA, fit_linear(chosen - rejected, weights, RIDGE))
        return {}

    def source(self, reward: Step) -> RewardSource:
        return _Linear(np.load(reward.folder / THETA), self.features)

    def follow(
        self, folder: Path, start: str, reference: str, reward: Step, seed: int, run: PolicyRun
    ) -> dict[str, Any]:
        own = self.config.policy(folder, start, reference, "given", seed, run)
        theta = np.load(reward.folder / THETA)

        def linear(prompts: Any, completions: Any, completion_ids: Any, **_: Any) -> list[float]:
            return (self.features(prompts, completions, completion_ids) @ theta).tolist()

        return train_online(own, reward_funcs=[linear]).metrics

    @abc.abstractmethod
    def features(
        self, asked: Sequence[str], texts: Sequence[str], ids: Sequence[Sequence[int]]
    ) -> np.ndarray:
        """(N, F)"""

    def _text(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)


class BagSteps(LinearSteps):
    def features(
        self, asked: Sequence[str], texts: Sequence[str], ids: Sequence[Sequence[int]]
    ) -> np.ndarray:
        return np.array([bag_of(*one) for one in zip(asked, texts, strict=True)], dtype=float)


class ProbeSteps(LinearSteps):
    def features(
        self, asked: Sequence[str], texts: Sequence[str], ids: Sequence[Sequence[int]]
    ) -> np.ndarray:
        of_prompts = encode_prompts(self.tokenizer, asked)
        trees = [
            Tree(0, prompt, (np.array(one, dtype=np.int32),))
            for prompt, one in zip(of_prompts, ids, strict=True)
        ]
        return last_hidden(self.load(None), ListTrees(trees))


class _Linear:
    def __init__(self, theta: np.ndarray, features: Features):
        self.name = "linear"
        self._theta = theta
        self._features = features

    def __call__(self, inputs: RewardInputs) -> np.ndarray:
        asked = [str(prompt) for prompt in inputs.repeated(inputs.prompts)]
        ids = [one.tolist() for tree in inputs.rollout.trees for one in tree.completions]
        return self._features(asked, inputs.rollout.texts, ids) @ self._theta


STEPS: dict[str, type[Steps]] = {"bag": BagSteps, "probe": ProbeSteps, "full": Steps}


def config_of(settings: Settings, sft: Path, out: Path, seed: int) -> OcrmConfig:
    """One seed: of pairs, labels, prompts, samples and reward models; the SFT model is the same."""
    write_jsonl([{"prompt": one} for one in prompts(3000, seed)], out / "prompts.jsonl")
    held_out = prompts(settings.judged, 10_000 + seed, held_out=True)
    write_jsonl([{"prompt": one} for one in held_out], out / "judge.jsonl")
    common = {"gradient_checkpointing": False, "bf16": False, "disable_tqdm": True}
    kept = {"save_strategy": "no", "logging_steps": settings.updates}
    return OcrmConfig(
        model_name_or_path=str(sft),
        dataset_name=str(out / "prompts.jsonl"),
        judge_dataset_name=str(out / "judge.jsonl"),
        arms=settings.arms,
        label_noise=NOISE,
        output_dir=str(out / "steps"),
        stages=settings.stages,
        updates_per_stage=settings.updates,
        pairs=settings.pairs,
        stop_ess=0,
        sft_beta=settings.sft_beta,
        cluster="bench.paper.ocrm_lm:same_bag",
        judge_controls=settings.reward != "full",
        seed=seed,
        use_cpu=True,
        rl={
            "train_batch_size": settings.rollout,
            "num_generations": 4,
            "beta": settings.beta,
            "learning_rate": 4e-4,
            "lr_scheduler_type": "constant",
            "normalize_advantages": True,
            "max_completion_length": 40,
            **common,
            **kept,
        },
        rm={
            "learning_rate": 1e-3,
            "lr_scheduler_type": "cosine",
            "train_batch_size": 32,
            "num_train_epochs": 2.0,
            **common,
            **kept,
        },
        ppo={"beta": settings.sft_beta, "num_iterations": 2},
        dpo={
            "learning_rate": 1e-4,
            "beta": 0.1,
            "train_batch_size": 32,
            "num_train_epochs": 2.0,
            **common,
            "save_strategy": "no",
        },
    )


def study(settings: Settings, out: Path) -> Found:
    """Every seed; what is there of an earlier call is kept."""
    sft = supervised(PoolSettings(sft_steps=settings.sft_steps), out)
    found: Found = {}
    for seed in range(settings.seeds):
        folder = out / f"{settings.reward}-seed-{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        config = config_of(settings, sft, folder, seed)
        for line in run_ocrm(config, STEPS[settings.reward]):
            found.setdefault(line["arm"], {}).setdefault(seed, []).append(line)
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.paper.ocrm_lm", description=__doc__.split("\n\n")[0]
    )
    defaults = Settings()
    for field in dataclasses.fields(Settings):
        if field.name != "baselines":
            default = getattr(defaults, field.name)
            parser.add_argument(f"--{field.name}", type=type(default), default=default)
    parser.add_argument("--no_baselines", action="store_true")
    parser.add_argument("--quick", action="store_true", help="seconds; shows that it runs")
    parser.add_argument("--out", type=Path, default=Path("runs/paper/ocrm_lm"))
    values = vars(parser.parse_args(argv))
    out, is_quick = values.pop("out"), values.pop("quick")
    settings = Settings(baselines=not values.pop("no_baselines"), **values)
    if settings.reward not in STEPS:
        raise FasttrError(f"reward: got {settings.reward!r}; wanted one of {', '.join(STEPS)}")
    if is_quick:
        small = {"seeds": 2, "stages": 2, "updates": 2, "rollout": 16, "pairs": 60}
        settings = dataclasses.replace(settings, **small, judged=10, sft_steps=20)
    began = time.perf_counter()
    found = study(settings, out)
    text, said = table(found), [f"- {line}" for line in verdict(found)]
    (out / f"table-{settings.reward}.md").write_text(text + "\n")
    (out / f"verdict-{settings.reward}.md").write_text("\n".join(said) + "\n")
    document = {"settings": dataclasses.asdict(settings), "lines": found}
    (out / f"results-{settings.reward}.json").write_text(json.dumps(document, indent=1) + "\n")
    plot(found, out / f"ocrm-lm-{settings.reward}.png")
    print(text + "\n\n" + "\n".join(said))
    print(f"{time.perf_counter() - began:.0f} s; all in {out}")


if __name__ == "__main__":
    main()
