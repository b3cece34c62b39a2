"""`python -m bench.paper.ocrm_pool`: stages of a reward model and a policy on samples of a language
model, with exact steps of the policy.

A small model is fitted to the generated task, whose completions run past the asked length now and
then (`tail`). Its samples for each prompt are a pool, and a policy is a weight of each of them:
stage i multiplies it by exp(reward_i / beta), the exact answer of a KL-regularised step. So neither
the optimiser nor new samples stand between the reward model and what it leads to. Reward models
are linear: in two counts (`bag`: asked letters and others; it cannot know the asked length), or in
the SFT model's last hidden state (`probe`).

Written into DIR: table.md, verdict.md, results.json. A pool that was drawn is taken up again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from fasttr.batch import Tree
from fasttr.data.in_memory import ListTrees
from fasttr.losses.ratios import RatioSettings, pair_weights
from fasttr.models.load import ModelConfig, load_model, load_tokenizer
from fasttr.models.packed import PackedModel
from fasttr.packing.plan import sweep
from fasttr.rollouts.engine import TransformersEngine
from fasttr.rollouts.sampler import encode_prompts
from fasttr.toy.exact import ARMS, fit_linear
from fasttr.toy.start import supervised_start
from fasttr.toy.stats import Interval, interval, words
from fasttr.toy.task import NOISE, gold_reward, parse_prompt, prompts, sft_rows

REWARDS = ("bag", "probe")
POOL = "pool.npz"


@dataclass(frozen=True)
class Settings:
    seeds: int = 5
    stages: int = 10
    pairs: int = 2400
    prompts: int = 80
    samples: int = 240  # of a prompt
    beta: float = 3.0
    ridge: float = 1.0
    noise: float = NOISE
    tail: float = 0.15
    sft_steps: int = 400


class Pool(NamedTuple):
    """Samples of B prompts, S each."""

    gold: np.ndarray  # (B, S)
    features: dict[str, np.ndarray]  # reward's name -> (B, S, F)


class Run(NamedTuple):
    """One arm of one seed."""

    gold: list[float]  # of the SFT policy, then of each stage
    kl: list[float]  # nats a completion, to the SFT policy
    effective_size: float  # of the last stage's weights


def run(pool: Pool, reward: str, arm: str, seed: int, settings: Settings) -> Run:
    """As `fasttr.toy.exact.run`, on a pool."""
    features = pool.features[reward]
    B, S = pool.gold.shape
    start = np.full((B, S), -np.log(S))
    rng, later = np.random.default_rng(seed), np.random.default_rng([seed, 1])
    pairs = draw_pairs(rng, start, pool.gold, settings)
    policy, theta = start, None
    values, kl, size = [float(pool.gold.mean())], [0.0], float(len(pairs))
    for number in range(settings.stages):
        weights = np.ones(len(pairs))
        if arm in ("weighted", "shuffled"):
            rows = pairs[:, :1], pairs[:, 1:]
            found = pair_weights(policy[rows], start[rows], RatioSettings(min_ess=0.0))
            weights, size = found.weights, found.effective_size
        if arm == "shuffled":
            weights = later.permutation(weights)
        if arm == "fresh" and number > 0:
            pairs = draw_pairs(later, policy, pool.gold, settings)
        if theta is None or arm != "fixed":
            of_first, of_second = (features[pairs[:, 0], pairs[:, side]] for side in (1, 2))
            theta = fit_linear(of_first - of_second, weights, settings.ridge)
        unscaled = policy + features @ theta / settings.beta
        policy = unscaled - np.logaddexp.reduce(unscaled, axis=1, keepdims=True)
        share = np.exp(policy)
        values.append(float((share * pool.gold).sum(axis=1).mean()))
        kl.append(float((share * (policy - start)).sum(axis=1).mean()))
    return Run(values, kl, size)


def draw_pairs(
    rng: np.random.Generator, policy: np.ndarray, gold: np.ndarray, settings: Settings
) -> np.ndarray:
    """(P, 3) a prompt and two samples of a policy, the preferred one first."""
    B, S = policy.shape
    rows = rng.integers(B, size=settings.pairs)
    share = np.exp(policy)
    share /= share.sum(axis=1, keepdims=True)
    edges = share.cumsum(axis=1)
    drawn = np.stack(
        [(rng.random(len(rows))[:, None] > edges[rows]).sum(axis=1) for _ in range(2)], axis=1
    ).clip(max=S - 1)
    difference = gold[rows, drawn[:, 0]] - gold[rows, drawn[:, 1]]
    is_second = rng.random(len(rows)) > np.exp(-np.logaddexp(0, -difference / settings.noise))
    drawn[is_second] = drawn[is_second][:, ::-1]
    return np.concatenate([rows[:, None], drawn], axis=1)


def bag_of(prompt: str, text: str) -> tuple[int, int]:
    """Asked letters and others."""
    _, asked = parse_prompt(prompt)
    matches = sum(letter in asked for letter in text)
    return matches, len(text) - matches


def draw_pool(settings: Settings, out: Path) -> Pool:
    """Samples of an SFT model that is fitted first; both are kept in `out`."""
    path = out / POOL
    if path.is_file():
        kept = np.load(path)
        return Pool(kept["gold"], {name: kept[name] for name in REWARDS})
    model = load_model(ModelConfig(str(supervised(settings, out))))
    tokenizer = load_tokenizer(str(out / "sft"))
    asked = prompts(settings.prompts, 7, held_out=True)
    engine = TransformersEngine(
        model, tokenizer, max_new_tokens=40, temperature=1.0, prompts_at_once=1
    )
    rollout = engine.generate(encode_prompts(tokenizer, asked), settings.samples, 0)
    texts = [(p, t) for p, t in zip(np.repeat(asked, settings.samples), rollout.texts, strict=True)]
    shape = (settings.prompts, settings.samples)
    gold = np.array([gold_reward(str(p), t) for p, t in texts]).reshape(shape)
    bag = np.array([bag_of(str(p), t) for p, t in texts], dtype=np.float64).reshape(*shape, 2)
    probe = last_hidden(model, rollout.trees).reshape(*shape, -1)
    probe = (probe - probe.mean(axis=(0, 1))) / probe.std(axis=(0, 1))
    np.savez(path, gold=gold, bag=bag, probe=probe)
    return Pool(gold, {"bag": bag, "probe": probe})


@torch.no_grad()
def last_hidden(model: PackedModel, trees: ListTrees) -> np.ndarray:
    """(N, D) the hidden state at the last token of every completion."""
    one_by_one = ListTrees(
        [Tree(0, tree.prompt_ids, (ids,)) for tree in trees for ids in tree.completions]
    )
    found = np.empty((len(one_by_one), model.model.config.hidden_size))
    for batch in sweep(one_by_one, 4096):
        last = batch.attention.cu_q[1:].long() - 1
        found[list(batch.rows)] = model.hidden_states(batch)[last].numpy()
    return found


def supervised(settings: Settings, out: Path) -> Path:
    rows = sft_rows(4000, 0, tail=settings.tail)
    return supervised_start(out / "sft", rows, settings.sft_steps)


Found = dict[str, dict[str, list[Run]]]  # reward -> arm -> seeds


def study(pool: Pool, settings: Settings) -> Found:
    seeds = range(settings.seeds)
    return {
        reward: {arm: [run(pool, reward, arm, seed, settings) for seed in seeds] for arm in ARMS}
        for reward in pool.features
    }


def table(found: Found, settings: Settings) -> str:
    lines = [
        "| reward model | arm | gold at the end | best stage, by gold | KL at the end | effective "
        f"pairs of {settings.pairs} |",
        "|---|---|---|---|---|---|",
    ]
    for reward, arms in found.items():
        for arm, seeds in arms.items():
            size = f"{np.mean([one.effective_size for one in seeds]):.0f}"
            cells = [
                reward,
                arm,
                _spread([one.gold[-1] for one in seeds]),
                _spread([max(one.gold) for one in seeds]),
                _spread([one.kl[-1] for one in seeds]),
                size if arm in ("weighted", "shuffled") else "",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def verdict(found: Found) -> list[str]:
    """Sentences that the intervals over seeds allow."""
    lines = []
    for reward, arms in found.items():
        against = {
            "one reward model run on": [one.gold[-1] for one in arms["fixed"]],
            "the best stage of one reward model": [max(one.gold) for one in arms["fixed"]],
        }
        for arm in ("weighted", "shuffled", "fresh"):
            for name, values in against.items():
                said = words(
                    _paired([one.gold[-1] for one in arms[arm]], values),
                    f"more gold reward than {name}",
                    f"less gold reward than {name}",
                    f"no difference from {name} is shown",
                )
                lines.append(f"{reward}, {arm}: {said}")
    return lines


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.paper.ocrm_pool", description=__doc__.split("\n\n")[0]
    )
    defaults = Settings()
    for field in dataclasses.fields(Settings):
        default = getattr(defaults, field.name)
        parser.add_argument(f"--{field.name}", type=type(default), default=default)
    parser.add_argument("--out", type=Path, default=Path("runs/paper/ocrm_pool"))
    values = vars(parser.parse_args(argv))
    out: Path = values.pop("out")
    out.mkdir(parents=True, exist_ok=True)
    settings = Settings(**values)
    began = time.perf_counter()
    pool = draw_pool(settings, out)
    found = study(pool, settings)
    text = f"SFT policy: {pool.gold.mean():.3f}\n\n{table(found, settings)}\n"
    said = [f"- {line}" for line in verdict(found)]
    (out / "table.md").write_text(text)
    (out / "verdict.md").write_text("\n".join(said) + "\n")
    document = {"settings": dataclasses.asdict(settings), "runs": found}
    (out / "results.json").write_text(json.dumps(document, indent=1) + "\n")
    print(text + "\n" + "\n".join(said))
    print(f"{time.perf_counter() - began:.0f} s; all in {out}")


def _paired(values: list[float], others: list[float]) -> Interval:
    return interval(a - b for a, b in zip(values, others, strict=True))


def _spread(values: list[float]) -> str:
    return f"{np.mean(values):.3f} +- {np.std(values):.3f}"


if __name__ == "__main__":
    main()
