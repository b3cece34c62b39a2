"""The package as others meet it: imports with torch alone, compiles for GPUs, needs no memory of T
x V."""

from __future__ import annotations

import torch
from fasttr_kernels import linear_logprob, linear_preference_loss
from torch.profiler import ProfilerActivity, profile

from tests.kernels.accuracy import DEVICE, bare, dpo

STEP = """
import importlib.abc, sys
class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"triton", "fasttr", "transformers", "datasets", "trl"}:
            raise ImportError(f"{name} is not in this environment")
sys.meta_path.insert(0, Refuse())
import torch
state = torch.get_rng_state()
import fasttr_kernels as k
assert torch.equal(state, torch.get_rng_state())
assert not torch.cuda.is_initialized()
hidden, weight = torch.randn(6, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
dpo = lambda logp, ref, groups: -torch.nn.functional.logsigmoid(logp[0] - logp[1])
cu_completions, cu_groups = torch.tensor([0, 3, 6]), torch.tensor([0, 2])
out = k.linear_preference_loss(
    hidden, weight, torch.arange(6), cu_completions, cu_groups, dpo, ref_logp=None, normalizer=1
)
out.loss.backward()
assert "torch._dynamo" not in sys.modules
k.linear_logprob(hidden, weight, torch.arange(6)).logp.sum().backward()
k.multi_tensor_lerp_([torch.zeros(3)], [torch.ones(3)], 0.5)
assert weight.grad.abs().sum() > 0
assert not {"triton", "fasttr", "transformers"} & set(sys.modules)
print("fine")
"""


def test_imports_and_runs_with_torch_alone() -> None:
    done = bare("-c", STEP)
    assert done.stdout == "fine\n", done.stderr


def peak_bytes(step) -> int:
    """Most bytes alive at once above the start, by the device's allocator or by counting the CPU's
    allocations."""
    step()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
        start = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() - start
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    assert profiler.profiler is not None
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    alive = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        alive += event.nbytes()
        most = max(most, alive)
    return most


def test_peak_memory_has_no_term_in_rows_times_vocabulary() -> None:
    T, V, D, chunk = 4096, 8000, 32, 256
    hidden = torch.randn(T, D, device=DEVICE, requires_grad=True)
    weight = torch.randn(V, D, device=DEVICE, requires_grad=True)
    target = torch.randint(V, (T,), device=DEVICE)
    cu = torch.arange(0, T + 1, 64)

    def fused() -> None:
        hidden.grad = weight.grad = None
        out = linear_preference_loss(
            hidden,
            weight,
            target,
            cu,
            torch.arange(0, len(cu), 2),
            dpo,
            ref_logp=None,
            normalizer=32,
            chunk_rows=chunk,
            stats=True,
        )
        (3 * out.loss).backward()

    def plain() -> None:
        hidden.grad = weight.grad = None
        torch.nn.functional.linear(hidden, weight).log_softmax(-1).gather(
            1, target[:, None]
        ).sum().backward()

    pitch = -(-V // 64) * 64
    # The chunk's logits, dX and dW once, vectors of T, and 2 MiB for blocks of rows.
    bound = 4 * (chunk * pitch + D * (T + V) + 16 * T) + (2 << 20)
    assert bound < 4 * T * V / 4
    assert 4 * chunk * V < peak_bytes(fused) <= bound
    assert peak_bytes(plain) > 2 * 4 * T * V, "the counter sees the logits of the plain path"


def test_peak_memory_of_log_probs_is_that_of_one_chunk() -> None:
    T, V, D = 4096, 8000, 32
    hidden = torch.randn(T, D, device=DEVICE, requires_grad=True)
    weight = torch.randn(V, D, device=DEVICE, requires_grad=True)
    target = torch.randint(V, (T,), device=DEVICE)

    def step() -> None:
        hidden.grad = weight.grad = None
        linear_logprob(hidden, weight, target).logp.sum().backward()

    chunk = min(1024, T) if DEVICE.type == "cpu" else T
    bound = 4 * (chunk * V + 2 * D * (T + V) + 16 * T) + (2 << 20)
    assert peak_bytes(step) <= bound
