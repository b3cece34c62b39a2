"""Row functions in Triton: what happens to a chunk of logits between the products, on a GPU.

Legend: C rows of a chunk, V vocabulary, D hidden size.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from fasttr_kernels import logits_triton, products
from fasttr_kernels.head import Head, RowLogps

# Rows of the buffers start on 256 bytes and are padded to whole 16-byte words, so loads are wide at
# any vocabulary.
PITCH = 64
STEP_ROWS = 512
# Few programs, so that nearly all of a launch that has nothing to do is over at once.
SCALE_PROGRAMS = 1024
SCALE_BLOCK = 4096
SCALE_WARPS = 8


class Workspace:
    """The buffers of a chunk, made once for a call of chunks with at most `rows` rows: fp32 (fp64)
    logits, and dZ in the dtype of the products where that is another.

    A bf16 dZ never shares storage with fp32 logits: its stores would land on logits that other
    warps have yet to read. Calls ask for few sizes (multiples of `STEP_ROWS` up to `chunk_rows`),
    so that the allocator can hand the blocks of one call to the next.
    """

    def __init__(self, rows: int, chunk_rows: int, head: Head, stats: bool, grads: bool):
        vocab = head.weight.shape[0]
        compute = head.weight.dtype
        wide = products.wide(compute)
        device = head.weight.device
        pitch = -(-vocab // PITCH) * PITCH
        rows = min(chunk_rows, -(-rows // STEP_ROWS) * STEP_ROWS)
        self.logits = torch.empty(rows, pitch, dtype=wide, device=device)[:, :vocab]
        self.dz = self.logits
        if grads and compute != wide:
            self.dz = torch.empty(rows, pitch, dtype=compute, device=device)[:, :vocab]


def row_logps(
    hidden_CD: Tensor, head: Head, target_C: Tensor, work: Workspace, out: RowLogps
) -> None:
    """Log-prob of each row's target, and the statistics that `out` holds, in the same sweep. A
    target outside 0..V-1 gives NaN."""
    z_CV = work.logits[: hidden_CD.shape[0]]
    products.logits(hidden_CD, head.weight, z_CV)
    logps_of_products(z_CV, head, target_C, out)


def logps_of_products(z_CV: Tensor, head: Head, target_C: Tensor, out: RowLogps) -> None:
    """The launch of `row_logps`; z_CV are raw products in a buffer whose pitch is a multiple of
    `PITCH`."""
    rows, vocab = z_CV.shape
    # A search for the fastest configuration tells calls apart by the dtypes of their arguments.
    # With something in place of every statistic, calls with and without them share what was found,
    # and so the order of their sums.
    correct = out.correct
    if correct is None:
        correct = torch.empty(0, dtype=torch.bool, device=z_CV.device)
    with torch.cuda.device_of(z_CV):
        logits_triton.logp_kernel[(rows,)](
            z_CV,
            head.bias,
            target_C.contiguous(),
            out.logp,
            out.top,
            out.total,
            out.logp if out.entropy is None else out.entropy,
            correct,
            out.logp if out.mean is None else out.mean,
            out.logp if out.log_sum_squares is None else out.log_sum_squares,
            vocab,
            z_CV.stride(0),
            SCALE=head.logit_scale,
            SOFTCAP=head.softcap,
            STATS=out.entropy is not None,
            SQUARES=out.log_sum_squares is not None,
            # Every product is rounded, so that statistics cannot change how the rest is contracted.
            enable_fp_fusion=False,
        )


def refill(hidden_CD: Tensor, head: Head, logps: RowLogps, work: Workspace) -> None:
    """Put a chunk's logits back for `logit_grad` after another chunk has used the buffer."""
    products.logits(hidden_CD, head.weight, work.logits[: hidden_CD.shape[0]])


def logit_grad(
    logps: RowLogps,
    head: Head,
    target_C: Tensor,
    on_target_C: Tensor,
    on_softmax_C: Tensor,
    work: Workspace,
    on_entropy_C: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """dZ = on_target onehot - p (on_softmax + on_entropy (z - top)), chained to the raw products.
    It has no factor per row left to apply."""
    rows = target_C.shape[0]
    z_CV, dz_CV = work.logits[:rows], work.dz[:rows]
    vocab = z_CV.shape[1]
    with torch.cuda.device_of(z_CV):
        logits_triton.logit_grad_kernel[lambda meta: (rows, triton.cdiv(vocab, meta["BLOCK_V"]))](
            z_CV,
            head.bias,
            target_C.contiguous(),
            logps.top,
            logps.total,
            on_target_C.contiguous(),
            on_softmax_C.contiguous(),
            None if on_entropy_C is None else on_entropy_C.contiguous(),
            dz_CV,
            vocab,
            z_CV.stride(0),
            dz_CV.stride(0),
            SCALE=head.logit_scale,
            SOFTCAP=head.softcap,
            enable_fp_fusion=False,
        )
    return dz_CV, None


def scale_(x: Tensor, by: Tensor) -> None:
    """x <- by x, not touched where `by` is 1: the device looks, and nothing waits for it."""
    programs = min(SCALE_PROGRAMS, triton.cdiv(x.numel(), SCALE_BLOCK))
    if programs:
        with torch.cuda.device_of(x):
            logits_triton.scale_kernel[(programs,)](
                x, by, x.numel(), BLOCK=SCALE_BLOCK, num_warps=SCALE_WARPS
            )
