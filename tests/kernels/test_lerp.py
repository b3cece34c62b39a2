"""multi_tensor_lerp_: exact ends, one rounding, split storage equal to fp32 storage, kernel equal
to the torch path."""

from __future__ import annotations

import itertools

import pytest
import torch
from fasttr_kernels import multi_tensor_lerp_
from fasttr_kernels.lerp import lerp_ref
from fasttr_kernels.lerp_torch import Item
from fasttr_kernels.rounding import join_halves, split_halves
from torch import Tensor, nn

from tests.kernels.accuracy import DEVICE, bare

BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
# One element, fewer than a block, many blocks and units, whole blocks, a matrix.
SHAPES = [(1,), (5,), (40007,), (8192,), (33, 77)]
ALPHAS = [0.01, 0.3, 0.5, 0.6]
PAIRS = list(itertools.product((BF16, FP32, FP64), repeat=2))


def tensors(dtype: torch.dtype, seed: int, shapes: list = SHAPES) -> list[Tensor]:
    make = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=make, dtype=FP64).to(DEVICE, dtype) for s in shapes]


def clone(xs: list[Tensor]) -> list[Tensor]:
    return [x.clone() for x in xs]


def kernel(
    refs: list[Tensor],
    pols: list[Tensor],
    alpha: float,
    rems: list[Tensor] | None = None,
    stochastic=False,
    seed: int = 0,
) -> None:
    """The Triton launch itself, interpreted where there is no GPU."""
    from fasttr_kernels.lerp_triton import launch

    rems_or_none = rems or [None] * len(refs)
    items = [
        Item(r.view(-1), p.view(-1), None if m is None else m.view(-1))
        for r, p, m in zip(refs, pols, rems_or_none, strict=True)
    ]
    launch(items, alpha, stochastic, seed)


def same_bits(a: list[Tensor], b: list[Tensor]) -> bool:
    ints = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return all(
        torch.equal(x.view(ints[x.itemsize]), y.view(ints[y.itemsize]))
        for x, y in zip(a, b, strict=True)
    )


@pytest.mark.parametrize(("ref", "pol"), PAIRS, ids=str)
@pytest.mark.parametrize("alpha", ALPHAS)
def test_one_rounding_of_the_exact_average(
    ref: torch.dtype, pol: torch.dtype, alpha: float
) -> None:
    refs, pols = tensors(ref, 1), tensors(pol, 2)
    exact = [
        r.double() + alpha * (p.double() - r.double()) for r, p in zip(refs, pols, strict=True)
    ]
    multi_tensor_lerp_(refs, pols, alpha)
    for got, want in zip(refs, exact, strict=True):
        wide = FP64 if FP64 in (ref, pol) else FP32
        # Half an ulp of the result for its one rounding, and the roundings of fp32 (fp64) on the
        # way.
        bound = want.abs() * torch.finfo(ref).eps / 2 + 4 * torch.finfo(wide).eps * (want.abs() + 8)
        assert ((got.double() - want).abs() <= bound).all()
        assert got.dtype == ref


@pytest.mark.parametrize(("ref", "pol"), PAIRS, ids=str)
@pytest.mark.parametrize("alpha", [*ALPHAS, 1.0])
def test_kernel_equals_the_torch_path(ref: torch.dtype, pol: torch.dtype, alpha: float) -> None:
    refs, pols = tensors(ref, 1), tensors(pol, 2)
    by_kernel, by_torch = clone(refs), [x.cpu() for x in refs]
    kernel(by_kernel, pols, alpha)
    multi_tensor_lerp_(by_torch, [x.cpu() for x in pols], alpha)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(by_kernel, by_torch, strict=True))


@pytest.mark.parametrize("dtype", [BF16, FP32, FP64], ids=str)
@pytest.mark.parametrize("alpha", [0.01, 0.3, 0.5, 0.6, 2**-10])
def test_bits_do_not_depend_on_where_blocks_threads_and_tensors_end(
    dtype: torch.dtype, alpha: float
) -> None:
    """A product, then a sum, each rounded, in this order, for every element wherever it lies."""
    wide = FP64 if dtype == FP64 else FP32
    ref, pol = tensors(dtype, 1, [(300_001,)]) + tensors(dtype, 2, [(300_001,)])
    r, p = ref.cpu().to(wide), pol.cpu().to(wide)
    near, rest = torch.tensor([alpha, 1 - alpha], dtype=FP64).to(wide)
    want = (r + near * (p - r) if alpha < 0.5 else p - rest * (p - r)).to(dtype)
    threads = torch.get_num_threads()
    for first, number in ((0, 1), (1, 2), (7, 2), (299_990, 1)):
        got = ref.clone()
        torch.set_num_threads(number)
        multi_tensor_lerp_([got[first:]], [pol[first:]], alpha)
        torch.set_num_threads(threads)
        assert torch.equal(got[first:].cpu(), want[first:]), (first, number)


@pytest.mark.parametrize("path", ["public", "kernel"])
@pytest.mark.parametrize("dtype", [BF16, FP32, FP64], ids=str)
def test_ends_are_bitwise(path: str, dtype: torch.dtype) -> None:
    refs, pols = tensors(dtype, 1), tensors(dtype, 2)
    refs[1][:3] = torch.tensor([-0.0, float("inf"), 1.0])
    pols[1][:3] = torch.tensor([-0.0, 1.0, float("-inf")])
    before = clone(refs)
    multi_tensor_lerp_(refs, pols, 0.0)
    assert same_bits(refs, before)
    (multi_tensor_lerp_ if path == "public" else kernel)(refs, pols, 1.0)
    assert same_bits(refs, pols)


@pytest.mark.parametrize("path", ["public", "kernel"])
@pytest.mark.parametrize("policy", [BF16, FP32, FP64], ids=str)
def test_split_reference_is_bitwise_the_fp32_lerp(path: str, policy: torch.dtype) -> None:
    high = tensors(BF16, 1)
    low = [torch.zeros_like(x, dtype=torch.int16) for x in high]
    whole = [x.float() for x in high]
    for step in range(4):
        pols, alpha = tensors(policy, 10 + step), ALPHAS[step]
        fp32_pols = [p.float() for p in pols]  # an fp32 average reads an fp32 policy
        if path == "public":
            multi_tensor_lerp_(high, pols, alpha, remainders=low)
            multi_tensor_lerp_(whole, fp32_pols, alpha)
        else:
            kernel(high, pols, alpha, low)
            kernel(whole, fp32_pols, alpha)
        assert same_bits([join_halves(h, m) for h, m in zip(high, low, strict=True)], whole)
    assert all(m.abs().max() > 0 for m in low if m.numel() > 1), "the low halves are used"
    for h, w in zip(high, whole, strict=True):
        assert ((h.double() - w.double()).abs() <= w.abs().double() * 2**-8).all(), (
            "the model sees the rounded average"
        )


def test_halves_are_exact_for_every_kind_of_number() -> None:
    bits = torch.randint(
        -(2**31), 2**31, (100_000,), generator=torch.Generator().manual_seed(0)
    ).to(torch.int32)
    value = bits.view(FP32)
    value = torch.cat(
        [value[~value.isnan()], torch.tensor([0.0, -0.0, 1e-45, 3.4e38, -3.4e38, 1.0039062])]
    )
    assert same_bits([join_halves(*split_halves(value))], [value])


def test_average_of_1000_updates_moves_in_split_storage_and_stands_still_in_bf16() -> None:
    alpha, steps = 0.01, 1000
    make = torch.Generator().manual_seed(0)
    start = (1 + torch.rand(256, generator=make)).to(BF16)
    policy = start.float() * (1 + 1e-3)
    plain, high, low = start.clone(), start.clone(), torch.zeros_like(start, dtype=torch.int16)
    exact, fp32 = start.double(), start.float()
    for _ in range(steps):
        multi_tensor_lerp_([plain, high, fp32], [policy] * 3, alpha, remainders=[None, low, None])
        exact += alpha * (policy.double() - exact)
    assert torch.equal(plain, start), "bf16 drops every increment"
    got = join_halves(high, low)
    assert same_bits([got], [fp32])
    ulp = torch.finfo(FP32).eps * 2 ** exact.log2().floor()
    assert ((got.double() - exact).abs() <= 64 * ulp).all()
    assert ((exact - start.double()).abs() > 1000 * ulp).all(), "there was something to follow"


@pytest.mark.parametrize("path", ["public", "kernel"])
def test_stochastic_rounding_is_unbiased_and_repeats_by_seed(path: str) -> None:
    n = 1 << 16

    def run(seed: int) -> Tensor:
        refs, pols = (
            [torch.ones(n, device=DEVICE, dtype=BF16)],
            [torch.full((n,), 1.001, device=DEVICE)],
        )
        if path == "public":
            multi_tensor_lerp_(refs, pols, 0.5, rounding="stochastic", seed=seed)
        else:
            kernel(refs, pols, 0.5, stochastic=True, seed=seed)
        return refs[0]

    first = run(3)
    odds = 0.0005 * 128  # of the neighbour 1 + 2^-7
    assert sorted(first.double().unique().tolist()) == [1.0, 1 + 2**-7]
    share = (first > 1).double().mean().item()
    assert abs(share - odds) < 5 * (odds * (1 - odds) / n) ** 0.5
    assert torch.equal(first, run(3))
    assert not torch.equal(first, run(4))
    halves = (first > 1).view(2, -1)
    assert not torch.equal(halves[0], halves[1]), "places do not share bits"


def test_stochastic_rounding_leaves_what_bf16_holds_and_what_is_not_finite() -> None:
    for step in (multi_tensor_lerp_, kernel):
        refs = [torch.tensor([1.0, -2.5, float("inf"), float("nan"), 0.0], device=DEVICE).to(BF16)]
        kw = {"stochastic": True} if step is kernel else {"rounding": "stochastic", "seed": 1}
        step(refs, clone(refs), 0.25, **kw)
        assert refs[0][:2].tolist() == [1.0, -2.5]
        assert refs[0][4] == 0
        assert not refs[0][2:4].isfinite().any()


def test_unseeded_stochastic_rounding_follows_torchs_generator() -> None:
    def run() -> Tensor:
        refs = [torch.ones(4096, device=DEVICE, dtype=BF16)]
        multi_tensor_lerp_(
            refs, [torch.full((4096,), 1.004, device=DEVICE)], 0.5, rounding="stochastic"
        )
        return refs[0]

    torch.manual_seed(5)
    first, second = run(), run()
    torch.manual_seed(5)
    assert torch.equal(first, run())
    assert not torch.equal(first, second)


def test_parameters_generators_and_a_backward_in_between() -> None:
    model, reference = nn.Linear(3, 3, device=DEVICE), nn.Linear(3, 3, device=DEVICE)
    want = [
        lerp_ref(r.detach(), p.detach(), 0.25)
        for r, p in zip(reference.parameters(), model.parameters(), strict=True)
    ]
    loss = (
        model(torch.ones(2, 3, device=DEVICE)) * reference(torch.ones(2, 3, device=DEVICE))
    ).sum()
    multi_tensor_lerp_(reference.parameters(), model.parameters(), 0.25)
    loss.backward()
    for r, w in zip(reference.parameters(), want, strict=True):
        torch.testing.assert_close(r.detach(), w)
        assert r.requires_grad


@pytest.mark.parametrize("layout", ["transposed alike", "transposed apart", "gaps"])
def test_any_layout(layout: str) -> None:
    ref, pol = torch.randn(6, 8, device=DEVICE), torch.randn(6, 8, device=DEVICE)
    if layout == "transposed alike":
        ref, pol = ref.t(), pol.t()
    elif layout == "transposed apart":
        pol = pol.t().contiguous().t()
    else:
        ref, pol = ref[:, ::2], pol[:, 1::2]
    want = lerp_ref(ref, pol, 0.25)
    multi_tensor_lerp_([ref], [pol], 0.25)
    torch.testing.assert_close(ref, want)


def test_unaligned_views_take_their_own_launch() -> None:
    whole, pol = torch.randn(4097, device=DEVICE), torch.randn(4096, device=DEVICE)
    first, want = whole[0].clone(), lerp_ref(whole[1:], pol, 0.25)
    assert whole[1:].data_ptr() % 16
    kernel([whole[1:]], [pol], 0.25)
    torch.testing.assert_close(whole[1:], want)
    assert whole[0] == first, "the neighbour stays"


def test_table_goes_to_a_gpu_without_waiting_for_it() -> None:
    from fasttr_kernels.bits_triton import to_device

    class Rows:
        def pin_memory(self):
            return self

        def to(self, device, non_blocking=False):
            return device.type, non_blocking

    assert to_device(Rows(), torch.device("cuda")) == ("cuda", True)
    rows = torch.zeros(2, 5)
    assert to_device(rows, torch.device("cpu")) is rows


def test_kernel_writes_nothing_beyond_the_end() -> None:
    for n in (1, 7, 2047, 2049):
        store = torch.full((n + 64,), 7.0, device=DEVICE)
        kernel([store[:n]], [torch.zeros(n, device=DEVICE)], 0.5)
        assert (store[:n] == 3.5).all()
        assert (store[n:] == 7.0).all()


def test_compiles_without_a_graph_break() -> None:
    refs, pols = tensors(FP32, 1), tensors(BF16, 2)
    want = [lerp_ref(r, p, 0.25) for r, p in zip(refs, pols, strict=True)]

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(refs: list[Tensor], pols: list[Tensor]) -> Tensor:
        multi_tensor_lerp_(refs, pols, 0.25)
        return refs[1] * 2

    doubled = step(refs, pols)
    for got, exact in zip(refs, want, strict=True):
        torch.testing.assert_close(got, exact)
    assert torch.equal(doubled, refs[1] * 2)


@pytest.mark.parametrize("storage", ["plain", "split"])
def test_the_op_keeps_the_rules_of_an_op(storage: str) -> None:
    """Its schema, what it says to change, its fake kernel and ahead-of-time dispatch."""
    refs, pols = tensors(FP32 if storage == "plain" else BF16, 1), tensors(FP32, 2)
    lows = [torch.zeros(r.shape if storage == "split" else 0, dtype=torch.int16) for r in refs]
    arguments = (refs, pols, [low.to(DEVICE) for low in lows], 0.25, False, 0)
    torch.library.opcheck(torch.ops.fasttr.multi_tensor_lerp_.default, arguments)


SHARDED = """
import torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from fasttr_kernels import linear_logprob, linear_preference_loss, multi_tensor_lerp_
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
mesh = init_device_mesh("cpu", (1,))
whole = (torch.zeros(4, 3), torch.ones(4, 3))
ref, pol = (torch.nn.Parameter(distribute_tensor(x, mesh, [Shard(0)])) for x in whole)
multi_tensor_lerp_([ref], [pol], 0.25)
print((ref.to_local() == 0.25).all().item())
def refusal(call):
    try:
        call()
    except ValueError as error:
        return str(error)
apart = distribute_tensor(whole[1], mesh, [Replicate()])
print(refusal(lambda: multi_tensor_lerp_([ref], [apart], 0.25)))
print(refusal(lambda: multi_tensor_lerp_([ref], [whole[1]], 0.25)))
hidden, target = torch.zeros(2, 3), torch.zeros(2).long()
print(refusal(lambda: linear_logprob(hidden, ref, target)))
print(refusal(lambda: linear_preference_loss(hidden, ref, target, lengths=[1, 1])))
dist.destroy_process_group()
"""


def test_sharded_tensors_are_updated_shard_by_shard_and_named_where_they_do_not_fit() -> None:
    done = bare("-c", SHARDED)
    right, apart, plain, logprob, loss = done.stdout.splitlines() or [done.stderr] * 5
    assert right == "True", done.stderr
    assert apart.startswith("policies[0]: got placements ((Replicate(),)")
    assert plain.startswith("policies[0]: got placements None")
    assert logprob.startswith("weight: got a DTensor with placements (Shard(dim=0),)")
    assert loss == logprob
    assert "unshard" in logprob


def test_no_tensors_and_empty_tensors() -> None:
    multi_tensor_lerp_([], [], 0.5)
    multi_tensor_lerp_([torch.zeros(0, 3, device=DEVICE)], [torch.zeros(0, 3, device=DEVICE)], 0.5)


@pytest.mark.skipif(DEVICE.type == "cpu", reason="needs two kinds of memory")
def test_offloaded_reference_is_updated_where_it_lies() -> None:
    ref, pol = torch.randn(5000), torch.randn(5000, device=DEVICE)
    want = lerp_ref(ref, pol.cpu(), 0.25)
    multi_tensor_lerp_([ref], [pol], 0.25)
    torch.testing.assert_close(ref, want)


ONE = torch.zeros(4)
WRONG = {
    "alpha above 1": (([ONE], [ONE], 1.5), {}, "alpha"),
    "alpha below 0": (([ONE], [ONE], -0.1), {}, "alpha"),
    "alpha that is no number": (([ONE], [ONE], float("nan")), {}, "alpha"),
    "alpha in a tensor": (([ONE], [ONE], torch.tensor(0.5)), {}, "host number"),
    "fewer policies": (([ONE, ONE], [ONE], 0.5), {}, "policies"),
    "another shape": (([ONE], [ONE[:3]], 0.5), {}, r"policies\[0\]"),
    "half precision": (([ONE.half()], [ONE], 0.5), {}, "bfloat16"),
    "integers": (([ONE], [ONE.long()], 0.5), {}, "bfloat16"),
    "unknown rounding": (([ONE], [ONE], 0.5), {"rounding": "up"}, "nearest"),
    "stochastic and split": (
        ([ONE.bfloat16()], [ONE], 0.5),
        {"rounding": "stochastic", "remainders": [ONE.short()]},
        "one of the two",
    ),
    "remainder of an fp32 reference": (
        ([ONE], [ONE], 0.5),
        {"remainders": [ONE.short()]},
        "bfloat16",
    ),
    "remainder that is not int16": (([ONE.bfloat16()], [ONE], 0.5), {"remainders": [ONE]}, "int16"),
    "remainder of another shape": (
        ([ONE.bfloat16()], [ONE], 0.5),
        {"remainders": [ONE[:2].short()]},
        "match",
    ),
    "fewer remainders": (([ONE.bfloat16()], [ONE], 0.5), {"remainders": []}, "remainders"),
    "seed below 0": (([ONE], [ONE], 0.5), {"seed": -1}, "seed"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_bad_arguments_are_refused_with_got_wanted_remedy(wrong: str) -> None:
    args, kw, says = WRONG[wrong]
    with pytest.raises(ValueError, match=says) as error:
        multi_tensor_lerp_(*args, **kw)
    assert "got" in str(error.value)
    assert "wanted" in str(error.value)
