"""One run: a setting of the factors and an arm, trained through `fasttr.train` and measured on its
way."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
from torch import Tensor

import fasttr
from bench.paper.when.design import Setting
from fasttr.batch import Tree
from fasttr.config.train_config import TrainConfig
from fasttr.data.tokens import encode_texts
from fasttr.losses import LossInputs
from fasttr.losses.base import BaseLoss
from fasttr.models.load import ModelConfig, load_model, load_tokenizer
from fasttr.models.packed import PackedModel
from fasttr.rollouts.sampler import encode_prompts
from fasttr.toy.judge import Mean, judge_model, logps
from fasttr.toy.start import COMMON, supervised_start
from fasttr.toy.task import prompts, sft_rows
from fasttr.toy.writers import WRITERS, labelled_pairs, share_outside, writer_of
from fasttr.training.callbacks import Callback
from fasttr.training.run import Run
from fasttr.training.step import StepMetrics


@dataclass(frozen=True)
class LinearMargin(BaseLoss):
    """-beta (log p(chosen) - log p(rejected)): what DPO's gradient is, up to its scale, where the
    reference is the policy itself."""

    needs_reference: ClassVar[bool] = False

    def __call__(self, inputs: LossInputs) -> Tensor:
        return -self.beta * (inputs.chosen_logp - inputs.rejected_logp)


class Arm(NamedTuple):
    """What is done with the reference, or instead."""

    kind: str = "none"  # ref_update
    every: int = 1  # steps between updates
    beta_factor: float = 1.0
    rate_factor: float = 1.0
    loss: type[BaseLoss] | None = None  # instead of the setting's


ARMS = {
    "fixed": Arm(),
    "soft 3": Arm("soft", 3),
    "soft 12": Arm("soft", 12),
    "hard 6": Arm("hard", 6),
    "hard 24": Arm("hard", 24),
    "smaller beta": Arm(beta_factor=0.2),
    "faster": Arm(rate_factor=2.0),
    "linear": Arm(loss=LinearMargin),
}
MOVING = ("soft 3", "soft 12", "hard 6", "hard 24")
CONTROLS = ("smaller beta", "faster", "linear")


class Scale(NamedTuple):
    """How large everything is."""

    steps: int = 48
    every: int = 12  # steps between measurements
    samples: int = 256
    batch: int = 16
    rate: float = 2e-4
    alpha: float = 0.6
    pairs: int = 600
    held_pairs: int = 128
    width: int = 64
    sft_steps: int = 250
    sft_rows: int = 4000


class Held(NamedTuple):
    """Held-out pairs, P of them."""

    trees: list[Tree]  # chosen sides, then rejected ones
    initial: np.ndarray  # (2 P,) the initial policy's log-probs of them


class Context:
    """What all arms of a setting share: the initial policy, pairs, prompts, samples' seed."""

    def __init__(self, setting: Setting, sft: Path, seed: int, scale: Scale):
        self.setting = setting
        self.sft = sft
        self.seed = seed
        self.scale = scale
        self.tokenizer = load_tokenizer(str(sft))
        self.initial = load_model(ModelConfig(str(sft)))
        self.prompts = prompts(scale.samples, seed=seed, held_out=True)
        writer = writer_of(setting.writer, self.initial, self.tokenizer)
        own = 1000 * seed + 100 * WRITERS.index(setting.writer)
        part, noise = setting.part, setting.noise
        self.rows = labelled_pairs(writer, part, noise, scale.pairs, own, held_out=False)
        held = labelled_pairs(writer, part, noise, scale.held_pairs, own + 50, held_out=True)
        self.held = held_pairs(self.initial, self.tokenizer, held)
        self.start = self.measure(self.initial, step=0)

    def measure(self, policy: PackedModel, step: int) -> dict[str, float]:
        """A row of results: fresh samples, one a prompt, and the held-out pairs."""
        found = judge_model(policy, self.initial, self.tokenizer, self.prompts, self.seed)
        row = {
            "step": step,
            "gold": found.gold.value,
            "gold_stderr": found.gold.stderr,
            "kl": found.kl.value,
            "kl_stderr": found.kl.stderr,
            "outside": share_outside(self.setting.writer, self.prompts, found.completions),
            "length": found.length,
        }
        return row | of_held_pairs(logps(policy, self.held.trees), self.held)


def held_pairs(initial: PackedModel, tokenizer: Any, rows: Sequence[dict[str, Any]]) -> Held:
    ids = encode_prompts(tokenizer, [row["prompt"] for row in rows])
    trees = []
    for side in ("chosen", "rejected"):
        texts = encode_texts(tokenizer, [row[side] for row in rows], add_special_tokens=False)
        for prompt, text in zip(ids, texts, strict=True):
            ended = np.append(text, tokenizer.eos_token_id).astype(np.int32)
            trees.append(Tree(len(trees), prompt, (ended,)))
    return Held(trees, logps(initial, trees))


def of_held_pairs(policy_logps: np.ndarray, held: Held) -> dict[str, float]:
    """Log-ratios to the initial policy (nats a completion), the standard error of their margin, and
    the share of pairs in which that of the chosen side is the larger (equal ones count half)."""
    chosen, rejected = np.split(policy_logps - held.initial, 2)
    return {
        "margin_stderr": Mean.of(chosen - rejected).stderr,
        "chosen": float(chosen.mean()),
        "rejected": float(rejected.mean()),
        "accuracy": float(np.mean(chosen > rejected) + 0.5 * np.mean(chosen == rejected)),
    }


class Measure(Callback):
    """Rows of results along a run."""

    def __init__(self, context: Context):
        self.context = context
        self.rows = [context.start]

    def on_step(self, run: Run, metrics: StepMetrics) -> None:
        if run.step % self.context.scale.every == 0:
            self.rows.append(self.context.measure(run.policy, run.step))


def train_arm(context: Context, arm: Arm, folder: Path) -> list[dict[str, float]]:
    """Train and measure: a row for the initial policy and for every so many steps. Nothing stays
    in `folder`."""
    setting, scale = context.setting, context.scale
    beta = setting.beta * arm.beta_factor
    config = TrainConfig(
        model_name_or_path=str(context.sft),
        output_dir=str(folder),
        overwrite_output_dir=True,
        loss_type=setting.loss,
        beta=beta,
        ref_update=arm.kind,
        ref_update_every=arm.every,
        ref_update_alpha=scale.alpha,
        max_steps=scale.steps,
        train_batch_size=scale.batch,
        learning_rate=scale.rate * arm.rate_factor,
        warmup_steps=5,
        lr_scheduler_type="constant_with_warmup",
        save_strategy="no",
        logging_steps=scale.steps,
        seed=context.seed,
        disable_tqdm=True,
        **COMMON,
    )
    measure = Measure(context)
    loss = None if arm.loss is None else arm.loss(beta)
    fasttr.train(config, train_dataset=context.rows, loss=loss, callbacks=[measure])
    shutil.rmtree(folder)
    return measure.rows


def train_sft(folder: Path, seed: int, scale: Scale) -> None:
    """The initial policy of a seed, complete in `folder` or not there."""
    rows = sft_rows(scale.sft_rows, seed)
    width = scale.width
    supervised_start(folder, rows, scale.sft_steps, width=width, seed=seed, disable_tqdm=True)
