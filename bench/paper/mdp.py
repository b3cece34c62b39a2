"""The toy of the TR paper's Figure 2 (arXiv:2404.09656, after arXiv:2406.02900): a tree of actions,
many seeds at once.

One start state, the same actions at every state, each leading to a child of its own: a completion
is a path to a leaf. There is no prompt, and the probability of every path is known exactly. The
seeds are a leading dimension of every weight, so that a step of all of them is one step of a
batched network; no operation mixes seeds.

The loss is one of `fasttr.losses`, the schedule one of `fasttr.reference`, and the reference a
`MovingReference`: the objects of the trainer, called in the trainer's order (score a window, train
on it, move).

Legend: S seeds, N nodes of a level, A actions, H hidden, L leaves, P pairs, n completions read by
the loss.
"""

from __future__ import annotations

import abc
import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fasttr.losses import Loss, LossInputs
from fasttr.reference.moving import MovingReference
from fasttr.reference.schedule import Schedule


@dataclass(frozen=True)
class Tree:
    """`actions` ** `depth` leaves; leaf i has the digits of i in base `actions` as its path, the
    first one leading."""

    depth: int = 3
    actions: int = 3

    @property
    def leaves(self) -> int:
        return self.actions**self.depth

    def shared_prefix(self, a: int, b: int) -> int:
        """How many leading actions two leaves have in common."""
        return next(
            (k for k in range(self.depth) if self._prefix(a, k + 1) != self._prefix(b, k + 1)),
            self.depth,
        )

    def _prefix(self, leaf: int, length: int) -> int:
        return leaf // self.actions ** (self.depth - length)


class TreePolicy(nn.Module, abc.ABC):
    """What both networks share: `leaf_logps`, and what a `MovingReference` asks for."""

    def __init__(self, tree: Tree):
        super().__init__()
        self.tree = tree

    shards = None  # every weight lies here

    def local_parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.named_parameters())

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @abc.abstractmethod
    def levels(self) -> list[Tensor]:
        """(S, N, A) logits of the states of each level."""

    def leaf_logps(self) -> Tensor:  # (S, L)
        logp = None
        for logits_SNA in self.levels():
            step = logits_SNA.log_softmax(-1)
            logp = (step if logp is None else logp.unsqueeze(-1) + step).flatten(1)
        assert logp is not None
        return logp


class Rnn(TreePolicy):
    """An Elman network over the path: h <- tanh(W x + U h + b), x a learned embedding of the start
    or of an action."""

    def __init__(self, tree: Tree, seeds: list[int], hidden: int = 16):
        super().__init__(tree)
        bound = hidden**-0.5
        shapes = {
            "W": (hidden, hidden),
            "U": (hidden, hidden),
            "b": (1, hidden),
            "V": (hidden, tree.actions),
            "c": (1, tree.actions),
        }

        def draw(seed: int) -> dict[str, Tensor]:
            rng = torch.Generator().manual_seed(
                seed
            )  # of its own: a seed's weights do not depend on the others
            out = {"x": torch.randn(1 + tree.actions, hidden, generator=rng)}
            return out | {
                k: (2 * torch.rand(*shape, generator=rng) - 1) * bound
                for k, shape in shapes.items()
            }

        drawn = [draw(seed) for seed in seeds]
        for name in drawn[0]:
            self.register_parameter(name, nn.Parameter(torch.stack([d[name] for d in drawn])))

    def levels(self) -> list[Tensor]:
        x = torch.bmm(self.x, self.W) + self.b  # (S, 1 + A, H)
        h = torch.tanh(x[:, :1])
        out = [torch.bmm(h, self.V) + self.c]
        for _ in range(self.tree.depth - 1):
            h = torch.tanh(torch.bmm(h, self.U).unsqueeze(2) + x[:, None, 1:]).flatten(1, 2)
            out.append(torch.bmm(h, self.V) + self.c)
        return out


class Tabular(TreePolicy):
    """Logits of its own at every state: nothing is shared between paths beyond their common
    states."""

    def __init__(self, tree: Tree, seeds: list[int], hidden: int = 0):
        super().__init__(tree)
        states = sum(tree.actions**level for level in range(tree.depth))
        drawn = [
            torch.randn(states, tree.actions, generator=torch.Generator().manual_seed(seed))
            for seed in seeds
        ]
        self.logits = nn.Parameter(torch.stack(drawn))

    def levels(self) -> list[Tensor]:
        return list(
            self.logits.split([self.tree.actions**level for level in range(self.tree.depth)], dim=1)
        )


NETWORKS: dict[str, type[Rnn] | type[Tabular]] = {"rnn": Rnn, "tabular": Tabular}


def draw_pairs(tree: Tree, seeds: list[int], pairs: int, shared: int | None) -> Tensor:
    """(S, P, 2) leaves (chosen, rejected), all different within a seed.

    shared: how many leading actions the two sides of a pair have in common, exactly; None draws any
    two leaves.
    """
    if pairs < 1 or (shared is not None and not 0 <= shared < tree.depth):
        raise ValueError(
            f"got {pairs} pairs that share {shared} actions; wanted 1 or more, and "
            f"0..{tree.depth - 1}"
        )
    return torch.tensor(
        [_draw_pairs(tree, np.random.default_rng([seed, 1]), pairs, shared) for seed in seeds]
    )


def _draw_pairs(
    tree: Tree, rng: np.random.Generator, pairs: int, shared: int | None
) -> list[list[int]]:
    for _ in range(1000):
        free, found = list(rng.permutation(tree.leaves).tolist()), list[list[int]]()
        while free and len(found) < pairs:
            chosen = free.pop()
            partner = next(
                (b for b in free if shared is None or tree.shared_prefix(chosen, b) == shared), None
            )
            if partner is None:
                break
            free.remove(partner)
            found.append([chosen, partner])
        if len(found) == pairs:
            return found
    raise ValueError(
        f"got {pairs} disjoint pairs that share {shared} actions; the tree of {tree.leaves} has no "
        "room"
    )


class Rows(NamedTuple):
    """The completions that a loss reads, as it reads them."""

    leaf: Tensor  # (S, n)
    tokens: Tensor  # (n,) the depth, for every path is that long
    per_row: int
    labels: Tensor | None  # (B,) of unpaired rows


def rows_of(tree: Tree, pairs: Tensor, loss: Loss) -> Rows:
    """Pairs as they are; for an unpaired loss taken apart as `fasttr.unpaired` does: all chosen,
    then all rejected, each with the completion of the row before it as its mismatched one."""
    if not loss.unpaired:
        leaf, labels = pairs.flatten(1), None
    else:
        own = torch.cat([pairs[..., 0], pairs[..., 1]], dim=1)
        labels = torch.arange(own.shape[1]) < pairs.shape[1]
        leaf = torch.stack([own, own.roll(1, dims=1)][: loss.completions], dim=-1).flatten(1)
    return Rows(leaf, torch.full((leaf.shape[1],), tree.depth), loss.completions, labels)


def seed_losses(loss: Loss, rows: Rows, logp: Tensor, ref_logp: Tensor) -> Tensor:
    """(S,) mean loss of each seed's rows, which are one group; logp, ref_logp (S, n)."""
    return torch.vmap(
        lambda p, r: loss(LossInputs(p, r, rows.tokens, rows.per_row, rows.labels)).mean()
    )(logp, ref_logp)


def fit(policy: TreePolicy, pairs: Tensor, steps: int, learning_rate: float) -> None:
    """Maximum likelihood on both sides of all pairs, full batch, Adam."""
    optimizer = torch.optim.Adam(policy.parameters(), lr=learning_rate)
    for _ in range(steps):
        optimizer.zero_grad()
        (-policy.leaf_logps().gather(1, pairs.flatten(1)).mean(1)).sum().backward()
        optimizer.step()


class History(NamedTuple):
    """(steps + 1, S) each, before the first step and after every one; probabilities by
    enumeration."""

    ood: np.ndarray  # of all paths in no pair
    chosen: np.ndarray  # of all chosen paths together
    rejected: np.ndarray
    kl: np.ndarray  # KL(policy || initial), nats


def align(
    initial: TreePolicy,
    pairs: Tensor,  # (S, P, 2)
    loss: Loss,
    schedule: Schedule,
    steps: int,
    learning_rate: float,
    watch: Callable[[int, TreePolicy, MovingReference], None] | None = None,
) -> History:
    """Train a copy of `initial`, full batch, Adam; the reference starts as `initial` and moves as
    `schedule` says.

    watch: called with (steps done, policy, reference) after every step, the reference's move
    included.
    """
    policy = copy.deepcopy(initial)
    reference = MovingReference(schedule, policy)
    rows = rows_of(policy.tree, pairs, loss)
    optimizer = torch.optim.Adam(policy.parameters(), lr=learning_rate)
    start_SL = initial.leaf_logps().detach()
    seen, ref_logp = list[Tensor](), None
    for step in range(steps):
        if ref_logp is None:
            with torch.no_grad(), reference.model() as model:
                ref_logp = model.leaf_logps().gather(1, rows.leaf)
            reference.window_scored()
        optimizer.zero_grad()
        logp_SL = policy.leaf_logps()
        # The sum over seeds: each has the gradient, and so the Adam steps, of a run of its own.
        seed_losses(loss, rows, logp_SL.gather(1, rows.leaf), ref_logp).sum().backward()
        seen.append(_measure(logp_SL.detach(), start_SL, pairs))
        optimizer.step()
        if schedule.every is not None and (step + 1) % schedule.every == 0:
            reference.move()
            ref_logp = None
        if watch is not None:
            watch(step + 1, policy, reference)
    seen.append(_measure(policy.leaf_logps().detach(), start_SL, pairs))
    return History(*torch.stack(seen, dim=1).numpy())


def _measure(logp_SL: Tensor, start_SL: Tensor, pairs: Tensor) -> Tensor:
    """(4, S) in the order of History."""
    p = logp_SL.double().exp()
    chosen, rejected = (p.gather(1, pairs[..., side]).sum(1) for side in (0, 1))
    kl = (p * (logp_SL - start_SL).double()).sum(1)
    return torch.stack([(1 - chosen - rejected).clamp(min=0), chosen, rejected, kl])
