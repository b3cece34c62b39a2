"""Weights that lie in shards on several devices, made whole for an op that reads them all."""

from __future__ import annotations

from typing import overload

from torch import Tensor

from fasttr.errors import FasttrError

REDUCTIONS = ("avg", "sum")


@overload
def whole(x: Tensor, reduce: str = ...) -> Tensor: ...
@overload
def whole(x: None, reduce: str = ...) -> None: ...
def whole(x: Tensor | None, reduce: str = "avg") -> Tensor | None:
    """A DTensor (a parameter under FSDP2, of `fully_shard`) gathered into a plain tensor; any other
    tensor as it is.

        loss(hidden, whole(lm_head.weight), labels, ref_logp)

    The ops read the head's weight outside the forward of its module, where FSDP2 has not unsharded
    it. The gradient goes back to the shards: each rank's own is averaged over the mesh (`avg`, as
    data-parallel training does) or added up (`sum`). Every rank must make the call. Dimensions of
    the mesh that replicate the tensor are reduced too. A module that is unsharded where the op runs
    (that of the root group, during its forward) needs no help.
    """
    if reduce not in REDUCTIONS:
        raise FasttrError(f"reduce: got {reduce!r}; wanted one of {', '.join(REDUCTIONS)}")
    if x is None or not hasattr(x, "full_tensor"):
        return x
    from torch.distributed.tensor import DTensor, Partial

    assert isinstance(x, DTensor)
    return x.full_tensor(grad_placements=[Partial(reduce)] * x.device_mesh.ndim)
