"""The reference of a run: which weights it has, and how they move.

A hard update needs no second model: right after it the reference is the policy, which therefore
scores the window itself. A fixed reference is needed once, ahead of the run. Only a soft one keeps
weights of its own: plain tensors, which the policy's own module borrows while a window is scored.
Where the policy's are bf16 so are they, with the other 16 bits of an fp32 number beside them.
They are those that are trained, since frozen ones are the policy's; of an adapter they are factors
of a higher rank (see `fasttr.reference.low_rank`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping

import torch
from fasttr_kernels import multi_tensor_lerp_
from fasttr_kernels.rounding import join_halves, split_halves
from torch import Tensor, nn

from fasttr.errors import FasttrError
from fasttr.models.lora import factor_names
from fasttr.models.packed import PackedModel
from fasttr.optim.update import Followers, MasterAdamW, parameters_of
from fasttr.reference.low_rank import Product, RankBound, average_, widened
from fasttr.reference.schedule import Schedule, Soft


class MovingReference:
    """The reference of a run under one schedule.

    Args:
        schedule: Fixed, Soft or Hard.
        policy: the model being trained.
        initial: another model that window 0 is scored with, or None for the policy as it is now.
            FasttrError when a soft reference could not become an average of it and the policy.
        optimizer: of the policy, where that is bf16: it holds the masters that a soft reference
            follows, and can move it in its own sweep.
        fits_beside: whether a soft reference stays on the policy's device between windows; else it
            rests in the host's memory.
        bound: of the rank of a soft reference whose policy is an adapter.
    """

    def __init__(
        self,
        schedule: Schedule,
        policy: PackedModel,
        initial: PackedModel | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        fits_beside: Callable[[PackedModel], bool] | None = None,
        bound: RankBound | None = None,
    ):
        self.schedule = schedule
        self.policy = policy
        self.optimizer = optimizer
        self.updates = 0
        self.weights: dict[str, Tensor] | None = None  # of a soft reference, by the policy's names
        self.remainders: dict[str, Tensor] = {}  # of those of them that are bf16
        self._initial = initial
        self._moved_already: set[str] = set()
        # Largest share of a weight's update that the newest move left out; None: it left out none.
        self.dropped: float | None = None
        self._bound = bound
        self._factors = factor_names(policy)
        self._in_products = {name for factors in self._factors for name in factors}
        if isinstance(schedule, Soft):
            whole = self._masters() if initial is None else _taken_from(initial, policy)
            self._rests_beside = schedule.every == 1 or (fits_beside or _fits_beside)(policy)
            self.weights = {}
            self._keep(whole)
            self._widen()
            self._initial = None

    @contextlib.contextmanager
    def model(self) -> Iterator[PackedModel]:
        """A model that is the reference while the block runs: only at a window's start."""
        if self.weights is not None:
            with self._lent(self.weights):
                yield self.policy
        elif self.updates == 0 and self._initial is not None:
            yield self._initial
        else:
            yield self.policy

    @property
    def is_the_policy(self) -> bool:
        """Whether the policy's own weights are the reference's: only at a window's start."""
        return self.weights is None and (self.updates > 0 or self._initial is None)

    @property
    def is_apart(self) -> bool:
        """Whether the first reference is a model of its own, and still here."""
        return self._initial is not None

    def window_scored(self) -> None:
        """The window's log-probs are in the table: a first reference of its own is let go."""
        self._initial = None

    @torch.no_grad()
    def move(self) -> None:
        """One update, by name. Under `Hard` the policy itself is the new reference."""
        self.updates += 1
        if self.weights is None or not isinstance(self.schedule, Soft):
            return
        alpha = self.schedule.alpha
        policy = self.policy.local_parameters()
        done = self._moved_already | self._in_products
        left = [name for name in self.weights if name not in done]
        beside = [name for name in left if self._rests_beside and name not in self.remainders]
        multi_tensor_lerp_(
            [self.weights[name] for name in beside], [policy[name].data for name in beside], alpha
        )
        for name in left:
            if name not in beside:
                self._move_alone(name, policy[name], alpha)
        self._move_products(policy, alpha)
        self._moved_already = set()
        if not self._rests_beside and self.policy.device.type == "cuda":
            # What went to the host is read there by checkpoints.
            torch.cuda.current_stream().synchronize()

    def followers(self) -> Followers | None:
        """The tensors of a soft reference, for a sweep of the optimizer that moves them along with
        the weights. Asked for right before it, with all gradients there; `move`, called after it,
        does the rest. None where they cannot be moved so."""
        if self.weights is None or not isinstance(self.schedule, Soft) or self._factors:
            return None
        if not (self._rests_beside and isinstance(self.optimizer, MasterAdamW)):
            return None
        name_of = {p: name for name, p in self.policy.local_parameters().items()}
        followed = [(p, name_of[p]) for p in parameters_of(self.optimizer)]
        if any(p.grad is None for p, _ in followed):
            return None
        self._moved_already = {name for _, name in followed}
        tensors = [(self.weights[name], self.remainders.get(name)) for _, name in followed]
        return Followers(tensors, self.schedule.alpha)

    def named_tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps of a soft reference: NAME, and NAME.remainder where it is
        bf16."""
        remainders = {f"{name}.remainder": x for name, x in self.remainders.items()}
        return {**(self.weights or {}), **remainders}

    @torch.no_grad()
    def take_up(self, saved: Mapping[str, Tensor]) -> None:
        """Go on from `named_tensors`, split or not."""
        for name, mine in (self.weights or {}).items():
            whole = saved[name].float()
            if f"{name}.remainder" in saved:
                whole = join_halves(saved[name], saved[f"{name}.remainder"])
            if name in self.remainders:
                high, low = split_halves(whole)
                mine.copy_(high)
                self.remainders[name].copy_(low)
            else:
                mine.copy_(whole)

    @torch.no_grad()
    def _keep(self, whole: Iterator[tuple[str, Tensor]]) -> None:
        """Each where it rests as soon as it is made: there may be no room for all of them here."""
        assert self.weights is not None
        policy = self.policy.local_parameters()
        at_home = _as_it_is if self._rests_beside else _on_host
        for name, values in whole:
            if policy[name].dtype == torch.bfloat16:
                high, low = split_halves(values.float())
                self.weights[name], self.remainders[name] = at_home(high), at_home(low)
            else:
                self.weights[name] = at_home(values)

    def _masters(self) -> Iterator[tuple[str, Tensor]]:
        """Copies of the policy's weights as its optimizer has them, one after the other."""
        for name, p in self.policy.local_parameters().items():
            if p.requires_grad:
                master = self._master(p)
                yield name, master.clone() if master.data_ptr() == p.data_ptr() else master

    def _master(self, p: nn.Parameter) -> Tensor:
        if p.dtype == torch.bfloat16 and isinstance(self.optimizer, MasterAdamW):
            return self.optimizer.master(p)
        return p.detach()

    def _move_alone(self, name: str, p: nn.Parameter, alpha: float) -> None:
        """One tensor, which may lie on the host: it visits the policy's device."""
        assert self.weights is not None
        homes = [self.weights[name]]
        if name in self.remainders:
            homes.append(self.remainders[name])
        visiting, *remainder = (
            x if self._rests_beside else x.to(p.device, copy=True, non_blocking=True) for x in homes
        )
        multi_tensor_lerp_([visiting], [self._master(p)], alpha, remainders=remainder or None)
        if not self._rests_beside:
            for home, moved in zip(homes, (visiting, *remainder), strict=True):
                home.copy_(moved, non_blocking=True)

    def _move_products(self, policy: Mapping[str, nn.Parameter], alpha: float) -> None:
        shares = []
        for a, b in self._factors:
            assert self.weights is not None
            assert self._bound is not None
            mine = Product(self.weights[a], self.weights[b])
            moved_to = Product(policy[a].data.to(mine.a.device), policy[b].data.to(mine.b.device))
            shares.append(average_(mine, moved_to, alpha, self._bound.tolerance))
        self.dropped = max(shares, default=None)

    def _widen(self) -> None:
        """Room for a rank beyond the policy's in the factors of an adapter."""
        if self._factors and self._bound is None:
            raise ValueError("MovingReference: got an adapter with a soft schedule and no bound")
        for a, b in self._factors:
            assert self.weights is not None
            assert self._bound is not None
            product = Product(self.weights[a], self.weights[b])
            self.weights[a], self.weights[b] = widened(product, self._bound.rank)

    @contextlib.contextmanager
    def _lent(self, weights: dict[str, Tensor]) -> Iterator[None]:
        """Within, the policy's module computes with these weights."""
        policy = self.policy.local_parameters()
        divided = set() if self.policy.shards is None else set(self.policy.shards.pieces)
        exchanged = [name for name in weights if name in divided]
        own = {name: policy[name].data for name in weights if name not in divided}
        self._exchange(exchanged, weights)
        try:
            for name in own:
                policy[name].data = weights[name].to(policy[name].device, non_blocking=True)
            yield
        finally:
            for name, data in own.items():
                policy[name].data = data
            self._exchange(exchanged, weights)

    @torch.no_grad()
    def _exchange(self, names: list[str], weights: dict[str, Tensor]) -> None:
        """Rows of a divided policy against those of `weights`: what is gathered for a layer is read
        from the memory of the rows themselves."""
        if not names:
            return
        self.policy.reshard()
        policy = self.policy.local_parameters()
        for name in names:
            own = policy[name].detach().clone()
            policy[name].copy_(weights[name], non_blocking=True)
            weights[name].copy_(own, non_blocking=True)


def _as_it_is(x: Tensor) -> Tensor:
    return x


def _on_host(x: Tensor) -> Tensor:
    """In memory that copies to and from a GPU run from while the host goes on."""
    return x.cpu().pin_memory() if x.is_cuda else x


def _taken_from(initial: PackedModel, policy: PackedModel) -> Iterator[tuple[str, Tensor]]:
    """The weights of another model, which must have the policy's names, shapes and buffers."""
    weights = {name: p.detach() for name, p in initial.local_parameters().items()}
    shapes = {name: tuple(x.shape) for name, x in initial.named_parameters()}
    wanted = {name: tuple(p.shape) for name, p in policy.named_parameters()}
    names = sorted(shapes.keys() | wanted.keys())
    differing = [name for name in names if shapes.get(name) != wanted.get(name)]
    if differing:
        name = differing[0]
        raise FasttrError(
            f"ref_model_name_or_path: got a model whose {name.removeprefix('model.')} has shape "
            f"{shapes.get(name, 'none')} with ref_update soft; wanted {wanted.get(name, 'none')} "
            "as in the policy, since the reference becomes an average of both"
        )
    buffers = dict(policy.named_buffers())
    for name, buffer in initial.named_buffers():
        if name not in buffers or not torch.equal(buffer, buffers[name]):
            raise FasttrError(
                f"ref_model_name_or_path: got a model whose {name.removeprefix('model.')} differs "
                "from the policy's with ref_update soft; wanted a model of one configuration, "
                "since the reference becomes an average of both"
            )
    return iter(weights.items())


def _fits_beside(policy: PackedModel) -> bool:
    """Whether a second copy of the weights in fp32, and twice its size for AdamW's state, leaves
    half the device free."""
    if policy.device.type != "cuda":
        return True
    size = sum(4 * p.numel() for p in policy.local_parameters().values() if p.requires_grad)
    free, _ = torch.cuda.mem_get_info(policy.device)
    return 4 * size < free / 2
