"""What `bench.on_policy` times: steps on given completions, here and by TRL's own trainers.

Legend: B prompts, m completions of a prompt, N = B m completions, P pairs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fasttr.batch import PackedBatch, Tree
from fasttr.data.in_memory import ListTrees
from fasttr.losses.advantages import leave_one_out
from fasttr.losses.policy_gradient import PolicyLoss, TokenInputs
from fasttr.losses.reward import RewardObjective, reward_loss
from fasttr.models.load import ModelConfig, load_model, load_tokenizer
from fasttr.models.policy import policy_loss, token_logps
from fasttr.models.reward import load_reward_model, score_all
from fasttr.packing.plan import pack_rows

SEED = 0
BETA = 0.05  # of the KL in RLOO's reward
STANDS_FOR = {"grpo": "dapo", "rloo": "rloo"}  # TRL's trainer -> its default loss


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
    def m(self) -> int:
        return self.trees.completion_lengths.shape[1]

    @property
    def flat(self) -> list[tuple[np.ndarray, np.ndarray]]:
        return [(tree.prompt_ids, ids) for tree in self.trees for ids in tree.completions]

    def packs(self, budget: int) -> list[PackedBatch]:
        return pack_rows(self.trees, range(len(self.trees)), budget)


class Setting(NamedTuple):
    """What both sides are given."""

    folder: Path  # a causal language model
    problem: Problem
    device: torch.device
    budget: int  # tokens of a pack


class Side(NamedTuple):
    """A model whose gradients a step makes, or none, and the step; it returns a number to compare
    by."""

    model: nn.Module | None
    step: Callable[[], Any]


# -- reward models


def reward_sides(given: Setting) -> dict[str, Side]:
    """Forward and backward of pairs, here and in TRL's RewardTrainer."""
    ours = load_reward_model(ModelConfig(str(given.folder), device=given.device), SEED)
    problem = given.problem
    rows = np.arange(len(problem.trees))
    objective = RewardObjective(reward_loss(2)).of_rows(problem.trees, rows)

    def step() -> float:
        total = 0.0
        for host_batch in problem.packs(given.budget):
            batch = host_batch.to(given.device)
            out = ours(batch, objective.loss_fn(batch), normalizer=objective.normalizer)
            out.loss.backward()
            total += out.loss.detach()
        return total

    theirs = _trls_scorer(given, ours)
    theirs.train()
    chosen_first = [*problem.flat[0::2], *problem.flat[1::2]]
    ids, mask = _right_padded([np.concatenate(pair) for pair in chosen_first], given.device)
    trainer = _bare_reward_trainer(theirs)

    def trl_step() -> Tensor:
        loss = trainer.compute_loss(theirs, {"input_ids": ids, "attention_mask": mask})
        loss.backward()
        return loss.detach()

    return {"fasttr": Side(ours, step), "trl": Side(theirs, trl_step)}


def _trls_scorer(given: Setting, ours: Any) -> Any:
    """transformers' classifier with the weights of ours."""
    from transformers import AutoModelForSequenceClassification
    from transformers.utils import logging

    logging.set_verbosity_error()  # of the head that is new, and then replaced
    theirs = AutoModelForSequenceClassification.from_pretrained(
        given.folder, num_labels=1, dtype=torch.float32
    ).to(given.device)
    theirs.load_state_dict(ours.model.state_dict())
    return theirs


def _bare_reward_trainer(model: nn.Module) -> Any:
    """TRL's trainer without its data: what compute_loss reads, on one process."""
    import trl

    trainer = object.__new__(trl.RewardTrainer)
    trainer.model = model
    trainer.args = SimpleNamespace(center_rewards_coefficient=None)
    trainer.accelerator = SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x)
    trainer._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
    trainer._total_train_tokens = 0
    trainer._tp_size = 1
    return trainer


# -- policies


class _Ours:
    """A policy here, and its passes over a problem."""

    def __init__(self, given: Setting, loss_type: str):
        self.given = given
        self.model = load_model(ModelConfig(str(given.folder), device=given.device))
        self.loss = PolicyLoss(loss_type=loss_type)
        lengths = given.problem.trees.completion_lengths
        self.normalizer = self.loss.normalizer(lengths.size, int(lengths.sum()))

    def step(self, advantage: Tensor, old_logp: Sequence[Tensor] | None = None) -> float:
        """Forward and backward; `old_logp`: of each pack, None where they are as now."""
        total = 0.0
        problem, device = self.given.problem, self.given.device
        for number, host_batch in enumerate(problem.packs(self.given.budget)):
            batch = host_batch.to(device)
            places = (np.array(batch.rows)[:, None] * problem.m + np.arange(problem.m)).reshape(-1)
            old = None if old_logp is None else old_logp[number]
            keep = torch.ones(len(places), device=device)
            of_pack = advantage[places].to(device)

            def loss_fn(
                logp: Tensor,
                rows: slice,
                those: slice,
                old: Tensor | None = old,
                of_pack: Tensor = of_pack,
                keep: Tensor = keep,
                lengths: Tensor = batch.token_counts,
            ) -> Tensor:
                inputs = TokenInputs(
                    logp=logp,
                    old_logp=None if old is None else old[rows],
                    ref_logp=None,
                    advantage=of_pack[those],
                    lengths=lengths[those],
                    keep=keep[those],
                )
                return self.loss(inputs)

            out = policy_loss(self.model, batch, loss_fn, normalizer=self.normalizer, stats=True)
            out.loss.backward()
            total += out.loss.detach()
        return total

    def logps(self) -> list[Tensor]:
        """(R,) of each pack, without gradients."""
        packs = self.given.problem.packs(self.given.budget)
        return [token_logps(self.model, batch) for batch in packs]


class _Trls:
    """TRL's trainer around a policy; it never generates."""

    def __init__(self, given: Setting, kind: str):
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(given.folder, dtype=torch.float32)
        self.model.to(given.device).train()
        self.trainer = _trls_trainer(kind, self.model, given)
        self.inputs = _trls_inputs(given)
        if kind == "rloo":
            self.inputs["old_logps"] = self.sums(self.logps())

    def step(self) -> Tensor:
        loss = self.trainer._compute_loss(self.model, self.inputs)
        loss.backward()
        return loss.detach()

    @torch.no_grad()
    def logps(self) -> Tensor:
        """(N, longest) of completions."""
        ids = [self.inputs[f"{part}_ids"] for part in ("prompt", "completion")]
        masks = [self.inputs[f"{part}_mask"] for part in ("prompt", "completion")]
        found = self.trainer._get_per_token_logps_and_entropies(
            self.model, torch.cat(ids, dim=1), torch.cat(masks, dim=1), ids[1].shape[1]
        )
        return found[0]

    def sums(self, logp: Tensor) -> Tensor:
        """(N,)"""
        return (logp * self.inputs["completion_mask"]).sum(dim=1)


def policy_sides(given: Setting, kind: str) -> dict[str, Side]:
    """Forward and backward of a policy's loss: GRPO's (dapo, TRL's default) or RLOO's."""
    ours, theirs = _Ours(given, STANDS_FOR[kind]), _Trls(given, kind)
    advantage = given.problem.advantage
    return {
        "fasttr": Side(ours.model, lambda: ours.step(advantage)),
        "trl": Side(theirs.model, theirs.step),
    }


def scoring_sides(given: Setting) -> dict[str, Side]:
    """Log-probs of all completions without gradients, as for a reference."""
    ours, theirs = _Ours(given, "rloo"), _Trls(given, "rloo")

    def logps() -> float:
        return float(sum(logp.double().sum() for logp in ours.logps()))

    return {
        "fasttr": Side(None, logps),
        "trl": Side(None, lambda: float(theirs.sums(theirs.logps()).double().sum())),
    }


def update_sides(given: Setting) -> dict[str, Side]:
    """RLOO's whole update but for sampling and the optimizer: scores of a reward model, log-probs
    of policy and reference, advantages, forward and backward."""
    ours, theirs = _Ours(given, "rloo"), _Trls(given, "rloo")
    problem, m = given.problem, given.problem.m
    scorer = load_reward_model(ModelConfig(str(given.folder), device=given.device), SEED)
    scorer.requires_grad_(False)
    reference = load_model(ModelConfig(str(given.folder), device=given.device))
    of_reference = _Ours.__new__(_Ours)
    of_reference.given, of_reference.model = given, reference.requires_grad_(False)
    lengths = [batch.token_counts for batch in problem.packs(given.budget)]
    rows = [batch.rows for batch in problem.packs(given.budget)]

    def step() -> float:
        score_Bm = torch.from_numpy(score_all(scorer, problem.trees, given.budget))
        old, ref = ours.logps(), of_reference.logps()
        kl_Bm = torch.empty(score_Bm.shape)
        for x, y, of_pack, places in zip(old, ref, lengths, rows, strict=True):
            of_completions = torch.segment_reduce((x - y).cpu(), "sum", lengths=of_pack)
            kl_Bm[list(places)] = of_completions.view(-1, m)
        reward_N = (score_Bm - BETA * kl_Bm).reshape(-1)
        return ours.step(leave_one_out(reward_N, m), old)

    their_scorer = _trls_scorer(given, scorer).eval()
    their_reference = _Trls(given, "rloo")
    whole, mask = _right_padded([np.concatenate(pair) for pair in problem.flat], given.device)

    def trl_step() -> Tensor:
        with torch.no_grad():
            score_N = their_scorer(input_ids=whole, attention_mask=mask).logits[:, 0]
        old_logp, ref_logp = theirs.logps(), their_reference.logps()
        reward_N = score_N - BETA * theirs.sums(old_logp - ref_logp)
        theirs.inputs["old_logps"] = theirs.sums(old_logp)
        theirs.inputs["advantages"] = leave_one_out(reward_N, m)
        return theirs.step()

    return {"fasttr": Side(ours.model, step), "trl": Side(theirs.model, trl_step)}


def _trls_trainer(kind: str, model: Any, given: Setting) -> Any:
    import trl
    from datasets import Dataset

    completions = len(given.problem.flat)
    name = kind.upper()
    config = getattr(trl, f"{name}Config")(
        output_dir=str(given.folder / "trl"),
        use_cpu=given.device.type == "cpu",
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        per_device_train_batch_size=completions,
        num_generations=given.problem.m,
        beta=0.0,
    )
    trainer = getattr(trl, f"{name}Trainer")(
        model=model,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=config,
        train_dataset=Dataset.from_list([{"prompt": "a"}] * completions),
        processing_class=load_tokenizer(str(given.folder)),
    )
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def _trls_inputs(given: Setting) -> dict[str, Tensor]:
    prompts, completions = zip(*given.problem.flat, strict=True)
    # Prompts of one length need no padding on their left.
    prompt_ids, prompt_mask = _right_padded(prompts, given.device)
    completion_ids, completion_mask = _right_padded(completions, given.device)
    return {
        "prompt_ids": prompt_ids,
        "prompt_mask": prompt_mask,
        "completion_ids": completion_ids,
        "completion_mask": completion_mask,
        "advantages": given.problem.advantage.to(given.device),
        "num_items_in_batch": completion_mask.sum(),
    }


def _right_padded(rows: Sequence[np.ndarray], device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids padded with 0, a special token that is in no row, and a mask."""
    longest = max(map(len, rows))
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.from_numpy(row.astype(np.int64))
        mask[i, : len(row)] = 1
    return ids.to(device), mask.to(device)
