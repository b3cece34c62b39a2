"""Which tiers are exact for an architecture, found on a small random copy of its structure.

Hidden states and gradients of a few rows alone are compared with the same rows in each tier, in
fp64, where the routing of experts does not flip. What may differ follows from how far the model's
own padded forward is from rows alone.

Legend: R predicting rows, D hidden size.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fasttr.batch import Tree
from fasttr.errors import FasttrError, first_line
from fasttr.models import attention, small
from fasttr.models.checks import head_error
from fasttr.models.gather import gather_rows
from fasttr.models.packed import HeadSpec, PackedModel, decoder_of
from fasttr.packing.layout import pack
from fasttr.packing.tiers import PACKED, PADDED, SHARED, TIERS, unshared

# Prompt and completions of each tree: shared by two and three, shorter and longer than a window.
_SHAPES = ((11, 5, 9), (3, 1, 4), (13, 2, 1, 6))
_FLOOR = 1e-6  # relative: some layers compute in fp32 whatever they are given
_LARGEST_NOISE = 1e-5


class Exactness(NamedTuple):
    """Up to which length of a sequence a tier is exact, and what was seen."""

    limit: float  # tokens; infinity: any length; 0: never
    reason: str


class Support(NamedTuple):
    """What the probe found of each tier, or why there is none for the model."""

    tiers: dict[str, Exactness]
    refusal: str | None = None

    def best(self, longest: float = math.inf) -> str:
        """The first tier that is exact for sequences of `longest` tokens, or of any length."""
        return next(tier for tier in TIERS if longest <= self.tiers[tier].limit)

    def require(self, tier: str, key: str, name: str, longest: int = 1) -> None:
        """Raise FasttrError where `tier` is not exact for sequences of `longest` tokens."""
        if self.refusal is not None:
            raise FasttrError(f"{key}: {name} cannot be trained here: {self.refusal}")
        if longest > self.tiers[tier].limit:
            raise FasttrError(
                f"attention_tier: got {tier} with {name}, and {self.tiers[tier].reason}; wanted "
                f"{self.best(longest)}, or auto"
            )


def probe(config: Any, kind: Any = None, trust_remote_code: bool = False) -> Support:
    """What of `TIERS` is exact for the architecture of a transformers config.

    `kind` is the class of the model; by default the one that AutoModelForCausalLM takes, code from
    a repository only where `trust_remote_code` is true. Costs a second or two of one core; a config
    that was probed in this process costs nothing.
    """
    content = json.dumps(config.to_diff_dict(), sort_keys=True, default=str)
    key = (kind, content)
    if key not in FOUND:
        build = kind._from_config if kind is not None else _auto(trust_remote_code)
        FOUND[key] = _probe(config, build)
    return FOUND[key]


FOUND: dict[tuple[Any, str], Support] = {}


def _auto(trust_remote_code: bool) -> small.Build:
    from transformers import AutoModelForCausalLM

    return functools.partial(AutoModelForCausalLM.from_config, trust_remote_code=trust_remote_code)


def _probe(config: Any, build: small.Build) -> Support:
    with _quietly():
        trial = _trial(config, build, shrink_windows=True)
        if isinstance(trial, str):
            return _padded_alone(trial)
        if not trial.is_causal:
            return Support({}, "a token's hidden state depends on the tokens after it")
        if not trial.has_plain_head:
            return Support({}, "its head is not softcap(scale (W h + b))")
        found = {tier: trial.of(tier) for tier in TIERS}
        window = small.smallest_window(config)
        if window is not None and any(found[tier].limit == 0 for tier in (SHARED, PACKED)):
            wide = _trial(config, build, shrink_windows=False)
            for tier in (SHARED, PACKED):
                if found[tier].limit == 0 and not isinstance(wide, str):
                    found[tier] = _up_to(window, found[tier], wide.of(tier))
    found[PADDED] = found[PADDED]._replace(limit=math.inf)
    return Support(found)


def _up_to(window: int, shrunk: Exactness, wide: Exactness) -> Exactness:
    if wide.limit == 0:
        return shrunk
    return Exactness(float(window), f"beyond its window of {window} tokens, {shrunk.reason}")


def _padded_alone(reason: str) -> Support:
    untried = Exactness(0, f"no small copy could be tried: {reason}")
    return Support({SHARED: untried, PACKED: untried, PADDED: Exactness(math.inf, "")})


class _Measured(NamedTuple):
    hidden: Tensor  # (R, D)
    gradients: tuple[Tensor, ...]  # of every parameter


class _Trial:
    """A small model, and the rows that it is tried on."""

    def __init__(self, model: Any):
        self.model = model
        model.set_attn_implementation(attention.own_attention(model))
        self.decoder = decoder_of(model)
        self.apart = pack(_trees(apart=True))
        self.alone = self._measured(self._alone)
        self.noise = _difference(self.alone, self._measured(lambda: self._tier(PADDED)))

    @property
    def is_causal(self) -> bool:
        row = self.apart.input_ids[None, : len(_rows()[0])]
        with torch.no_grad():
            whole = self.decoder(input_ids=row, use_cache=False).last_hidden_state[0, :-1]
            part = self.decoder(input_ids=row[:, :-1], use_cache=False).last_hidden_state[0]
        return _relative(part, whole) <= 1e-5

    @property
    def has_plain_head(self) -> bool:
        packed = PackedModel(self.model, HeadSpec.of(self.model.config), tier=PADDED)
        return head_error(packed) <= 1e-5

    def of(self, tier: str) -> Exactness:
        name = self.model.config.model_type
        try:
            got = _difference(self.alone, self._measured(lambda: self._tier(tier)))
        except Exception as error:  # any code of transformers or of a repository runs here
            return Exactness(0, f"a small {name} fails: {first_line(error)}")
        allowed = _FLOOR + 10 * min(self.noise, _LARGEST_NOISE)
        seen = f"a small random {name} is off by {got:.0e}; {allowed:.0e} is allowed"
        return Exactness(math.inf if got <= allowed else 0, seen)

    def _measured(self, run: Callable[[], Tensor]) -> _Measured:
        hidden = run()
        generator = torch.Generator().manual_seed(1)
        weights = torch.randn(hidden.shape, generator=generator, dtype=hidden.dtype)
        parameters = [p for p in self.decoder.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(
            (hidden * weights).sum(), parameters, allow_unused=True, materialize_grads=True
        )
        return _Measured(hidden.detach(), gradients)

    def _alone(self) -> Tensor:
        """Predicting rows of each completion behind its prompt, one at a time."""
        hidden = []
        for row in _rows():
            ids = torch.from_numpy(row.astype(np.int64))[None]
            hidden.append(self.decoder(input_ids=ids, use_cache=False).last_hidden_state[0])
        return gather_rows(torch.cat(hidden), self.apart.predicting)

    def _tier(self, tier: str) -> Tensor:
        batch = pack(_trees(apart=False)) if tier == SHARED else self.apart
        own = self.model.config._attn_implementation
        self.model.set_attn_implementation(attention.register() if tier == SHARED else own)
        try:
            hidden = PackedModel(self.model, tier=tier).hidden_states(batch)
        finally:
            self.model.set_attn_implementation(own)
        return gather_rows(hidden, batch.predicting)


def _trial(config: Any, build: small.Build, shrink_windows: bool) -> _Trial | str:
    """The smallest copy that runs, or why none does."""
    reason = ""
    for make in small.small_models(config, shrink_windows, build):
        try:
            return _Trial(make())
        except Exception as error:  # numbers that do not shrink together fail in many ways
            reason = reason or first_line(error)
    return reason


def _trees(apart: bool) -> list[Tree]:
    generator = np.random.default_rng(0)
    trees = []
    for row, (prompt, *completions) in enumerate(_SHAPES):
        pieces = [
            generator.integers(2, small.VOCABULARY, n, dtype=np.int32)
            for n in (prompt, *completions)
        ]
        trees.append(Tree(row, pieces[0], tuple(pieces[1:])))
    if not apart:
        return trees
    return [unshared(Tree(t.row, t.prompt_ids, (c,))) for t in trees for c in t.completions]


def _rows() -> list[np.ndarray]:
    return [np.concatenate([t.prompt_ids, t.completions[0]]) for t in _trees(apart=True)]


def _difference(want: _Measured, got: _Measured) -> float:
    """The largest of the relative distances of hidden states and of each gradient.

    A gradient is taken relative to the largest one too: one that is 0 but for rounding is no sign.
    """
    largest = max(float(g.norm()) for g in want.gradients)
    distances = [_relative(got.hidden, want.hidden)]
    for g_got, g_want in zip(got.gradients, want.gradients, strict=True):
        scale = float(g_want.norm()) + 1e-3 * largest
        distances.append(float((g_got - g_want).norm()) / scale)
    worst = max(distances)
    return worst if worst == worst else math.inf


def _relative(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Random numbers, the default dtype and transformers' notices are as they were afterwards."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    dtype = torch.get_default_dtype()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        torch.set_default_dtype(dtype)
        logging.set_verbosity(verbosity)
