"""The average of adapters is that of their products, whatever the rank of its factors."""

import numpy as np
import pytest
import torch

from fasttr.reference.low_rank import Product, average_, widened

WIDTH_IN, WIDTH_OUT, RANK = 24, 20, 3


def random_product(seed: int, rank: int = RANK) -> Product:
    generator = torch.Generator().manual_seed(seed)
    return Product(
        torch.randn(rank, WIDTH_IN, generator=generator),
        torch.randn(WIDTH_OUT, rank, generator=generator),
    )


def dense(product: Product) -> np.ndarray:
    return product.b.double().numpy() @ product.a.double().numpy()


@pytest.mark.parametrize("bound", [15, 9])
def test_eight_moves_equal_the_average_of_the_dense_products(bound):
    """Every product lies in the span of the first three here, so that rank 9 is enough for all of
    them, while more than 15 columns stand side by side."""
    spanning = [random_product(seed) for seed in range(3)]
    reference = widened(spanning[0], bound)
    expected = dense(spanning[0])
    for step in range(8):
        policy = Product(spanning[step % 3].a * (1 + step), spanning[step % 3].b)
        assert average_(reference, policy, 0.4, tolerance=1e-6) <= 1e-6
        expected = 0.6 * expected + 0.4 * dense(policy)
    assert reference.a.shape == (bound, WIDTH_IN)
    error = np.linalg.norm(dense(reference) - expected) / np.linalg.norm(expected)
    assert error < 2e-6


def test_what_the_bound_of_the_rank_leaves_out_is_the_tail_of_the_singular_values():
    reference, policy = widened(random_product(0), 4), random_product(1)
    expected = 0.7 * dense(reference) + 0.3 * dense(policy)
    dropped = average_(reference, policy, 0.3, tolerance=1e-6)
    values = np.linalg.svd(expected, compute_uv=False)
    tail = np.sqrt((values[4:] ** 2).sum() / (values**2).sum())
    assert 0.01 < tail < 0.9
    assert dropped == pytest.approx(tail, rel=1e-5)
    missing = np.linalg.norm(dense(reference) - expected) / np.linalg.norm(expected)
    assert missing == pytest.approx(tail, rel=1e-4)


def test_a_tail_within_the_tolerance_lowers_the_rank():
    reference = widened(random_product(0), 5)
    small = Product(random_product(1).a, 1e-4 * random_product(1).b)
    dropped = average_(reference, small, 0.5, tolerance=1e-3)
    assert 0 < dropped <= 1e-3
    assert int((reference.a != 0).any(dim=1).sum()) == RANK


def test_all_of_the_policy_is_the_policy_and_none_of_it_the_reference():
    policy = random_product(1)
    for alpha, wanted in ((1.0, policy), (0.0, random_product(0))):
        reference = widened(random_product(0), RANK)
        assert average_(reference, policy, alpha, tolerance=1e-6) == 0.0
        np.testing.assert_array_equal(dense(reference), dense(wanted))


def test_the_start_of_an_adapter_takes_no_room():
    """B is zero there: the product is zero, whatever the random A."""
    start = Product(random_product(0).a, torch.zeros(WIDTH_OUT, RANK))
    reference = widened(start, RANK)
    policy = random_product(1)
    assert average_(reference, policy, 0.5, tolerance=1e-6) == 0.0
    np.testing.assert_allclose(dense(reference), 0.5 * dense(policy), rtol=1e-6)
