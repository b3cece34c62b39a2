"""The moving average of low-rank updates, in product space.

The reference of an adapted model is its base plus B' A'. An update makes it
(1 - alpha) B' A' + alpha B A exactly by setting the factors side by side; averaging A and B apart
would be another matrix. Where the rank would pass its bound, the product is cut to its largest
singular values.

Legend: R bound of the rank, r rank of the policy's factors, n of both together, I and O widths.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class RankBound(NamedTuple):
    """How large the reference's factors may become, and how small a tail may be left out."""

    rank: int  # R
    tolerance: float = 1e-6  # share of the product's norm


class Product(NamedTuple):
    """Factors of an update of a weight; the scale of the layer multiplies both products alike."""

    a: Tensor  # (r, I)
    b: Tensor  # (O, r)


def widened(product: Product, rank: int) -> Product:
    """A copy of the same product with `rank` pairs of factors, those without a share all zero."""
    parts = _used(product)
    a = product.a.new_zeros(rank, product.a.shape[1])
    b = product.b.new_zeros(product.b.shape[0], rank)
    count = parts.a.shape[0]
    a[:count], b[:, :count] = parts.a, parts.b
    return Product(a, b)


@torch.no_grad()
def average_(reference: Product, policy: Product, alpha: float, tolerance: float) -> float:
    """reference <- alpha policy + (1 - alpha) reference, in place.

    Returns the norm of what was left out to stay within the reference's rank, as a share of the
    product's norm: at most `tolerance`, unless the bound of the rank is too low for that.
    """
    old, new = _used(reference), _used(policy)
    a_nI = torch.cat([old.a, new.a])
    b_On = torch.cat([(1 - alpha) * old.b, alpha * new.b], dim=1)
    both = _used(Product(a_nI, b_On))
    dropped, rank = 0.0, reference.a.shape[0]
    if both.a.shape[0] > rank:
        both, dropped = _cut(both, rank, tolerance)
    count = both.a.shape[0]
    reference.a.zero_()
    reference.b.zero_()
    reference.a[:count] = both.a
    reference.b[:, :count] = both.b
    return dropped


def _used(product: Product) -> Product:
    """Without the pairs of factors that contribute nothing."""
    has_share = (product.a != 0).any(dim=1) & (product.b != 0).any(dim=0)
    return Product(product.a[has_share], product.b[:, has_share])


def _cut(product: Product, rank: int, tolerance: float) -> tuple[Product, float]:
    """The nearest product of fewer factors, and the share of the norm that it lacks.

    Through the QR of both factors the singular values are those of a core of n x n.
    """
    q_On, r_b = torch.linalg.qr(product.b.double())
    q_In, r_a = torch.linalg.qr(product.a.double().t())
    u, values, v = torch.linalg.svd(r_b @ r_a.t())
    # tails[k]: norm of what is left out when k values are kept.
    tails = values.square().flip(0).cumsum(0).flip(0).sqrt()
    total = float(tails[0])
    is_small = tails <= tolerance * total
    needed = int((~is_small).sum())
    kept = min(needed, rank)
    share = float(tails[kept]) / total if kept < len(tails) and total > 0 else 0.0
    root = values[:kept].sqrt()
    a = (q_In @ v[:kept].t() * root).t().to(product.a.dtype)
    b = (q_On @ u[:, :kept] * root).to(product.b.dtype)
    return Product(a, b), share
