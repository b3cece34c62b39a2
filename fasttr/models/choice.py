"""Which tier the models of a run share: their packs are the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from fasttr.models.load import ModelConfig
from fasttr.models.probe import Support, probe
from fasttr.packing.tiers import AUTO, PADDED, SHARED, TIERS


class Candidate(NamedTuple):
    """A model that will be loaded, and what the probe found of its architecture."""

    key: str  # the setting that names it
    name: str
    support: Support

    @classmethod
    def named(cls, config: ModelConfig) -> Candidate:
        support = probe(config.read(), trust_remote_code=config.trust_remote_code)
        return cls(config.key, config.name, support).accepted()

    @classmethod
    def given(cls, model: Any) -> Candidate:
        return cls("model", "the given model", probe(model.config, type(model))).accepted()

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
    if asked != AUTO:
        for one in candidates:
            one.support.require(asked, one.key, one.name, longest)
        return Choice(asked, "asked for")
    worst = max(candidates, key=lambda one: TIERS.index(one.support.best(longest)))
    tier = worst.support.best(longest)
    if tier == SHARED:
        return Choice(tier, worst.support.tiers[SHARED].reason)
    return Choice(tier, f"a prompt cannot be shared: {worst.support.tiers[SHARED].reason}")
