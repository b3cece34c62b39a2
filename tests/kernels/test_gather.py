"""The gather of keys and values and its ordered backward, by torch and by Triton."""

import pytest
import torch
from fasttr_kernels.gather import gather_keys, sum_over_readers

SOURCES = torch.tensor([0, 1, 2, 0, 1, 3, 0, 5, 5], dtype=torch.int32)
ROWS = 7  # rows 4 and 6 are read by nobody
READERS = [  # offsets and readers, by hand
    torch.tensor([0, 3, 5, 6, 7, 7, 9, 9], dtype=torch.int32),
    torch.tensor([0, 3, 6, 1, 4, 2, 5, 7, 8], dtype=torch.int32),
]


@pytest.fixture(params=["torch", "triton"])
def ops(request, poisoned):
    """Both functions, and memory that nobody writes reads as NaN."""
    if request.param == "torch":
        return gather_keys, sum_over_readers
    from fasttr_kernels import gather_triton

    return gather_triton.gather, gather_triton.sum_over_readers


def skip_where_interpreted(dtype):
    if dtype == torch.bfloat16 and not torch.cuda.is_available():
        pytest.skip("the interpreter stores fp32 to bf16 by truncation: compiled kernels only")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("widths", [(8, 8), (6, 130), (1500, 2)])
def test_rows_and_sums(ops, widths, dtype, request):
    if request.node.callspec.params["ops"] == "triton":
        skip_where_interpreted(dtype)
    gather, summed = ops
    generator = torch.Generator().manual_seed(0)
    # Heads first in memory, as attention layers have them.
    k, v = (torch.randn(2, ROWS, w, generator=generator).to(dtype).transpose(0, 1) for w in widths)
    got = gather(k, v, SOURCES)
    assert torch.equal(got[0], k[SOURCES.long()])
    assert torch.equal(got[1], v[SOURCES.long()])
    grads = [torch.randn(x.shape, generator=generator).to(dtype) for x in got]
    for total, grad in zip(summed(*grads, *READERS), grads, strict=True):
        want = torch.zeros(ROWS, *grad.shape[1:], dtype=torch.float64)
        want.index_add_(0, SOURCES, grad.double())
        exact = dtype == torch.float64
        torch.testing.assert_close(total, want.to(dtype), atol=1e-12 if exact else 1e-6, rtol=0)
        assert not total[[4, 6]].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torch_and_triton_agree_bit_for_bit(dtype):
    from fasttr_kernels import gather_triton

    skip_where_interpreted(dtype)
    generator = torch.Generator().manual_seed(1)
    dk = torch.randn(len(SOURCES), 2, 24, generator=generator).to(dtype)
    ours = sum_over_readers(dk, dk, *READERS)
    theirs = gather_triton.sum_over_readers(dk, dk, *READERS)
    assert torch.equal(ours[0], theirs[0])
    assert torch.equal(ours[1], theirs[1])


def test_columns_that_lie_apart_are_gathered_too(ops):
    k, v = torch.randn(2, ROWS, 2, 6)[..., ::2].unbind()
    got = ops[0](k, v, SOURCES)
    assert torch.equal(got[0], k[SOURCES.long()])
    assert torch.equal(got[1], v[SOURCES.long()])


def test_a_row_of_no_width_is_summed(ops):
    """How one tensor alone goes through the pair."""
    grad = torch.ones(len(SOURCES), 1, 5)
    total, nothing = ops[1](grad, grad[:, :, :0], *READERS)
    assert total[:, 0, 0].tolist() == [3, 2, 1, 1, 0, 2, 0]
    assert nothing.shape == (ROWS, 1, 0)
