"""One step on given completions beside TRL's own trainers: a reward model's, and a policy's with
GRPO's loss. Generation is not in it.

    python -m bench on_policy --shapes 256:64 --completions 8

A shape is the tokens of a prompt and the most of a completion, whose lengths lie between half of it
and all. Both sides hold the same weights and are given the same ids; a case is timed only where
losses and gradient norms agree.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from bench.harness import Benchmark, Case, Contender, add_common_arguments, compare
from bench.text import reasons, spread, titled
from fasttr.batch import PackedBatch, Tree
from fasttr.data.in_memory import ListTrees
from fasttr.losses.policy_gradient import PolicyLoss, TokenInputs
from fasttr.losses.reward import RewardObjective, reward_loss
from fasttr.models.load import ModelConfig, load_model, load_tokenizer
from fasttr.models.policy import policy_loss
from fasttr.models.reward import load_reward_model
from fasttr.models.scratch import init_model
from fasttr.packing.plan import pack_rows
from fasttr.toy.task import sft_rows, write_jsonl

AGREE = 1e-4  # relative, of loss and gradient norm: fp32 and another order of sums
SEED = 0


class Shape(NamedTuple):
    """Tokens of a prompt, and the most of a completion."""

    prompt: int
    completion: int

    @classmethod
    def parse(cls, text: str) -> Shape:
        prompt, _, completion = text.partition(":")
        return cls(int(prompt), int(completion))


class Problem(NamedTuple):
    """Completions of prompts, and what a policy's loss reads of them."""

    trees: ListTrees
    advantage: Tensor  # (N,)

    @classmethod
    def drawn(cls, shape: Shape, prompts: int, completions: int, vocab: int) -> Problem:
        rng = np.random.default_rng(SEED)
        trees = []
        for row in range(prompts):
            lengths = rng.integers(shape.completion // 2, shape.completion + 1, completions)
            pieces = [rng.integers(5, vocab, n).astype(np.int32) for n in (shape.prompt, *lengths)]
            trees.append(Tree(row, pieces[0], tuple(pieces[1:])))
        advantage = torch.from_numpy(rng.normal(size=prompts * completions)).float()
        return cls(ListTrees(trees), advantage)

    @property
    def flat(self) -> list[tuple[np.ndarray, np.ndarray]]:
        return [(tree.prompt_ids, ids) for tree in self.trees for ids in tree.completions]

    def packs(self, budget: int) -> list[PackedBatch]:
        return pack_rows(self.trees, range(len(self.trees)), budget)


class Outcome(NamedTuple):
    """What a step computed."""

    loss: float
    gradient_norm: float

    def agrees(self, other: Outcome) -> str:
        for name, mine, theirs in zip(self._fields, self, other, strict=True):
            if abs(mine - theirs) > AGREE * max(abs(theirs), 1e-3):
                return f"{name} {mine:.6g}, TRL's {theirs:.6g}"
        return ""


def outcome(model: nn.Module, step: Callable[[], Tensor | float]) -> Outcome:
    model.zero_grad(set_to_none=True)
    loss = float(step())
    norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    return Outcome(loss, float(norm))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common_arguments(parser, "runs/bench/on_policy", seconds=20)
    parser.add_argument("--shapes", default="512:53,256:64,64:64")
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--completions", type=int, default=8, help="of a prompt, for the policy")
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--budget", type=int, default=4096, help="tokens of a pack")


def cases(args: argparse.Namespace, device: torch.device) -> Iterator[Case]:
    with tempfile.TemporaryDirectory() as folder:
        model = _model(Path(folder), args)
        for text in args.shapes.split(","):
            shape = Shape.parse(text)
            for kind, make in (("reward", _reward_steps), ("policy", _policy_steps)):
                m = 2 if kind == "reward" else args.completions
                prompts = args.prompts * args.completions // m
                problem = Problem.drawn(shape, prompts, m, args.vocab)
                yield _case(kind, text, problem, make(model, problem, args, device), args, device)


def _case(
    kind: str,
    shape: str,
    problem: Problem,
    steps: dict[str, tuple[nn.Module, Callable[[], Any]]],
    args: argparse.Namespace,
    device: torch.device,
) -> Case:
    found = {name: outcome(*pair) for name, pair in steps.items()}
    contenders = {
        name: Contender(step, check=lambda name=name: found[name].agrees(found["trl"]))
        for name, (_, step) in steps.items()
    }
    compared = compare(contenders, device, seconds=args.seconds)
    lengths = [len(prompt) + len(ids) for prompt, ids in problem.flat]
    packed = int(problem.trees.prompt_lengths.sum() + problem.trees.completion_lengths.sum())
    return {
        "kind": kind,
        "shape": shape,
        "completions": len(lengths),
        "tokens_packed": packed,
        "tokens_padded": len(lengths) * max(lengths),
        "times": {name: times.as_dict() for name, times in compared.times.items()},
        **compared.reasons(),
    }


def _model(folder: Path, args: argparse.Namespace) -> Path:
    """A model of the size that is asked for, with a tokenizer that is never used."""
    write_jsonl(sft_rows(200, SEED), folder / "rows.jsonl")
    init_model(
        "llama",
        hidden_size=args.width,
        num_layers=args.layers,
        num_heads=4,
        vocab_size=args.vocab,
        tokenizer_data=str(folder / "rows.jsonl"),
        output_dir=str(folder / "model"),
        seed=SEED,
    )
    return folder / "model"


def _reward_steps(
    folder: Path, problem: Problem, args: argparse.Namespace, device: torch.device
) -> dict[str, tuple[nn.Module, Callable[[], Any]]]:
    """Forward and backward of pairs, here and in TRL's RewardTrainer."""
    from transformers import AutoModelForSequenceClassification
    from transformers.utils import logging

    logging.set_verbosity_error()  # of the head that is new, and then replaced
    ours = load_reward_model(ModelConfig(str(folder), device=device), SEED)
    rows = np.arange(len(problem.trees))
    objective = RewardObjective(reward_loss(2)).of_rows(problem.trees, rows)

    def step() -> float:
        total = 0.0
        for host_batch in problem.packs(args.budget):
            batch = host_batch.to(device)
            out = ours(batch, objective.loss_fn(batch), normalizer=objective.normalizer)
            out.loss.backward()
            total += out.loss.detach()
        return total

    # The folder's own padding token is not of the rows, and EOS neither.
    theirs = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=1, dtype=torch.float32
    ).to(device)
    theirs.load_state_dict(ours.model.state_dict())
    theirs.train()
    chosen_first = [*problem.flat[0::2], *problem.flat[1::2]]
    ids, mask = _right_padded(
        [np.concatenate(pair) for pair in chosen_first], theirs.config.pad_token_id, device
    )
    trainer = _bare("RewardTrainer", theirs, center_rewards_coefficient=None)

    def trl_step() -> Tensor:
        inputs = {"input_ids": ids, "attention_mask": mask}
        loss = trainer.compute_loss(theirs, inputs)
        loss.backward()
        return loss.detach()

    return {"fasttr": (ours, _cleared(ours, step)), "trl": (theirs, _cleared(theirs, trl_step))}


def _policy_steps(
    folder: Path, problem: Problem, args: argparse.Namespace, device: torch.device
) -> dict[str, tuple[nn.Module, Callable[[], Any]]]:
    """Forward and backward of GRPO's loss (dapo), here and in TRL's GRPOTrainer."""
    from transformers import AutoModelForCausalLM

    ours = load_model(ModelConfig(str(folder), device=device))
    loss = PolicyLoss()
    lengths = problem.trees.completion_lengths
    m = lengths.shape[1]
    normalizer = loss.normalizer(lengths.size, int(lengths.sum()))

    def step() -> float:
        total = 0.0
        for host_batch in problem.packs(args.budget):
            batch = host_batch.to(device)
            places = (np.array(batch.rows)[:, None] * m + np.arange(m)).reshape(-1)
            of_pack = TokenInputs(
                logp=torch.empty(0),
                old_logp=None,
                ref_logp=None,
                advantage=problem.advantage[places].to(device),
                lengths=batch.token_counts,
                keep=torch.ones(len(places), device=device),
            )

            def loss_fn(
                logp: Tensor, rows: slice, those: slice, inputs: TokenInputs = of_pack
            ) -> Tensor:
                some = inputs._replace(
                    logp=logp,
                    advantage=inputs.advantage[those],
                    lengths=inputs.lengths[those],
                    keep=inputs.keep[those],
                )
                return loss(some)

            out = policy_loss(ours, batch, loss_fn, normalizer=normalizer, stats=True)
            out.loss.backward()
            total += out.loss.detach()
        return total

    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).train()
    trainer = _grpo_trainer(theirs, folder, problem, lengths.size)
    inputs = _grpo_inputs(problem, device)

    def trl_step() -> Tensor:
        found = trainer._compute_loss(theirs, inputs)
        found.backward()
        return found.detach()

    return {"fasttr": (ours, _cleared(ours, step)), "trl": (theirs, _cleared(theirs, trl_step))}


def _cleared(model: nn.Module, step: Callable[[], Any]) -> Callable[[], Any]:
    """The step on gradients that are not there yet, as after an optimizer's."""

    def call() -> Any:
        model.zero_grad(set_to_none=True)
        return step()

    return call


def _bare(kind: str, model: nn.Module, **arguments: Any) -> Any:
    """A trainer of TRL without its data: what compute_loss reads, on one process."""
    from collections import defaultdict
    from types import SimpleNamespace

    import trl

    trainer = object.__new__(getattr(trl, kind))
    same = SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x)
    trainer.model = model
    trainer.args = SimpleNamespace(**arguments)
    trainer.accelerator = same
    trainer._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
    trainer._total_train_tokens = 0
    trainer._tp_size = 1
    return trainer


def _grpo_trainer(model: Any, folder: Path, problem: Problem, completions: int) -> Any:
    import trl
    from datasets import Dataset

    config = trl.GRPOConfig(
        output_dir=str(folder / "trl"),
        use_cpu=next(model.parameters()).device.type == "cpu",
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        per_device_train_batch_size=completions,
        num_generations=problem.trees.completion_lengths.shape[1],
    )
    trainer = trl.GRPOTrainer(
        model=model,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=config,
        train_dataset=Dataset.from_list([{"prompt": "a"}] * completions),
        processing_class=load_tokenizer(str(folder)),
    )
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def _grpo_inputs(problem: Problem, device: torch.device) -> dict[str, Tensor]:
    prompts, completions = zip(*problem.flat, strict=True)
    # Prompts of one length need no padding on their left.
    prompt_ids, prompt_mask = _right_padded(prompts, 0, device)
    completion_ids, completion_mask = _right_padded(completions, 0, device)
    return {
        "prompt_ids": prompt_ids,
        "prompt_mask": prompt_mask,
        "completion_ids": completion_ids,
        "completion_mask": completion_mask,
        "advantages": problem.advantage.to(device),
        "num_items_in_batch": completion_mask.sum(),
    }


def _right_padded(rows: Any, pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), pad)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.from_numpy(row.astype(np.int64))
        mask[i, : len(row)] = 1
    return ids.to(device), mask.to(device)


def table(case: Case) -> str:
    title = (
        f"{case['kind']} step, {case['shape']}: {case['completions']} completions, "
        f"{case['tokens_packed']} tokens packed, {case['tokens_padded']} padded"
    )
    columns = ("", "ms", "beside TRL")
    trl = case["times"].get("trl")
    rows = []
    for name, times in case["times"].items():
        faster = f"{trl['median_s'] / times['median_s']:.1f}x" if trl else ""
        rows.append([name, spread(times, 1e-3, 0), faster])
    return titled(title, columns, [*rows, *reasons(case, len(columns))])


BENCHMARK = Benchmark("on_policy", "Steps on given completions", cases, table)
