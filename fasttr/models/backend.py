"""What an implementation of attention over segments is given and gives.

Legend: T packed rows, S gathered key rows, H heads, Hkv key heads, Dh and Dv head widths.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor


class Scores(NamedTuple):
    """How a score is made of a query and a key, and which keys a query sees."""

    scale: float
    window: int = 0  # tokens that a query sees, itself included; 0: all before it
    softcap: float = 0.0  # 0: none


class Offsets(NamedTuple):
    """Where segments begin and end."""

    cu_q: Tensor  # (segments + 1,) int32
    cu_k: Tensor  # (segments + 1,) int32
    on_host: Tensor  # (2, segments + 1) int32: both once more, where Python reads them

    def lengths(self) -> tuple[list[int], list[int]]:
        queries, keys = self.on_host.diff().tolist()
        return queries, keys

    def longest(self) -> tuple[int, int]:
        queries, keys = self.on_host.diff().amax(1).tolist()
        return queries, keys


class Backend(Protocol):
    """Causal attention within segments, queries and keys aligned at their ends.

    `backward` is given what `forward` returned, or an output and a log-sum-exp that more took part
    in (a sink): it derives probabilities from that log-sum-exp.
    """

    def forward(
        self,
        q: Tensor,  # (T, H, Dh)
        k: Tensor,  # (S, Hkv, Dh)
        v: Tensor,  # (S, Hkv, Dv)
        offsets: Offsets,
        scores: Scores,
    ) -> tuple[Tensor, Tensor]:  # (T, H, Dv), (H, T) fp32 or fp64
        ...

    def backward(
        self,
        grad: Tensor,  # (T, H, Dv)
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        offsets: Offsets,
        scores: Scores,
    ) -> tuple[Tensor, Tensor, Tensor]: ...
