"""Which tier the models of a run share: their packs are the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from fasttr.models.checks import check_given, check_positions
from fasttr.models.load import ModelConfig
from fasttr.models.probe import Support, probe
from fasttr.packing.tiers import AUTO, PADDED, SHARED, TIERS


class Candidate(NamedTuple):
    """A model that will be loaded, and what the probe found of its architecture."""

    key: str  # the setting that names it
    name: str
    config: Any  # of transformers
    support: Support

    @classmethod
    def named(cls, model: ModelConfig) -> Candidate:
        config = model.read()
        support = probe(config, trust_remote_code=model.trust_remote_code)
        return cls(model.key, model.name, config, support).accepted()

    @classmethod
    def given(cls, model: Any) -> Candidate:
        check_given(model, "model")
        support = probe(model.config, type(model))
        return cls("model", "the given model", model.config, support).accepted()

    def accepted(self) -> Candidate:
        """FasttrError for an architecture that no tier can train."""
        self.support.require(PADDED, self.key, self.name)
        return self


class Choice(NamedTuple):
    tier: str
    reason: str


def choose_tier(asked: str, candidates: Sequence[Candidate], longest: int) -> Choice:
    """The cheapest tier that is exact for every candidate at sequences of `longest` tokens, or the
    one that is asked for. FasttrError where that is not exact."""
    for one in candidates:
        check_positions(one.config, longest, one.name)
    if asked != AUTO:
        for one in candidates:
            one.support.require(asked, one.key, one.name, longest)
        return Choice(asked, "asked for")
    worst = max(candidates, key=lambda one: TIERS.index(one.support.best(longest)))
    tier = worst.support.best(longest)
    if tier == SHARED:
        return Choice(tier, worst.support.tiers[SHARED].reason)
    return Choice(tier, f"a prompt cannot be shared: {worst.support.tiers[SHARED].reason}")
