"""SplitAdamW: equal bit for bit to AdamW typed in numpy, on a CPU and in the kernel; near torch's
own; every storage of weights and moments moves at small rates and resumes."""

from __future__ import annotations

import io
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from fasttr_kernels import SplitAdamW, clip_factor, multi_tensor_lerp_
from fasttr_kernels.rounding import join_halves, split_halves
from torch import nn

from tests.kernels.accuracy import DEVICE
from tests.kernels.adamw_states import (
    MOMENTS,
    OPTIONS,
    PATHS,
    WEIGHTS,
    everything,
    numbers,
    optimizer,
    parameters,
    params_of,
    same_bits,
    set_gradients,
    step,
)


class Numpy:
    """AdamW in fp32, each operation rounded, in the order that the class documents."""

    def __init__(self, params: list[np.ndarray]):
        self.p = [p.copy() for p in params]
        self.m = [np.zeros_like(p) for p in params]
        self.v = [np.zeros_like(p) for p in params]
        self.t = 0

    def step(self, grads: list[np.ndarray], clip: float) -> None:
        f = np.float32
        self.t += 1
        b1, b2 = OPTIONS["betas"]
        size = f(OPTIONS["lr"] / (1 - b1**self.t))
        inverse = f(1 / np.sqrt(1 - b2**self.t))
        decay = f(1 - OPTIONS["lr"] * OPTIONS["weight_decay"])
        for i, grad in enumerate(grads):
            g = grad * f(clip)
            p = self.p[i] * decay
            self.m[i] = self.m[i] * f(b1) + g * f(1 - b1)
            self.v[i] = self.v[i] * f(b2) + (g * f(1 - b2)) * g
            self.p[i] = p - (self.m[i] * size) / (np.sqrt(self.v[i]) * inverse + f(1e-8))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("gradient", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weights", ["split", "fp32"])
def test_equals_adamw_in_numpy_bit_for_bit(path: str, gradient: torch.dtype, weights: str) -> None:
    opt = optimizer(weights, "fp32")
    truth = Numpy([opt.master(p).cpu().numpy() for p in params_of(opt)])
    for i, clip in enumerate((1.0, 0.37, 0.5)):
        set_gradients(opt, 10 + i, gradient)
        truth.step([p.grad.float().cpu().numpy() for p in params_of(opt)], clip)
        step(opt, path, clip)
        for number, p in enumerate(params_of(opt)):
            assert np.array_equal(opt.master(p).cpu().numpy(), truth.p[number])
            assert np.array_equal(opt.state[p]["exp_avg"].cpu().numpy(), truth.m[number])
            assert np.array_equal(opt.state[p]["exp_avg_sq"].cpu().numpy(), truth.v[number])


@pytest.mark.parametrize(("weights", "moments"), itertools.product(WEIGHTS, MOMENTS))
def test_kernel_equals_the_torch_path_for_every_storage(weights: str, moments: str) -> None:
    by_torch, by_kernel = optimizer(weights, moments, seed=5), optimizer(weights, moments, seed=5)
    start = [x.clone() for x in everything(by_torch)]
    for i in range(2):
        for opt, path in ((by_torch, "torch"), (by_kernel, "triton")):
            set_gradients(opt, i, torch.bfloat16 if i else torch.float32)
            step(opt, path, clip=0.7)
    assert same_bits(everything(by_torch), everything(by_kernel))
    changed = [not same_bits([x], [y]) for x, y in zip(start, everything(by_torch), strict=True)]
    assert all(changed), "weights and every state took part"


@pytest.mark.parametrize("weights", ["split", "fp32"])
def test_stays_within_a_few_ulp_of_torchs_own_for_200_steps(weights: str) -> None:
    sizes = [3000]
    mine = parameters("fp32", sizes=sizes)
    theirs = [nn.Parameter(p.detach().clone()) for p in mine]
    peer = torch.optim.AdamW(theirs, fused=True, **OPTIONS)
    if weights == "split":
        opt = SplitAdamW.from_fp32(mine, **OPTIONS)
    else:
        opt = SplitAdamW(mine, **OPTIONS)
    start = theirs[0].detach().clone()
    for i in range(200):
        set_gradients(opt, i)
        theirs[0].grad = mine[0].grad.clone()
        opt.step()
        peer.step()
    got, want = opt.master(mine[0]), theirs[0].detach()
    ulp = torch.finfo(torch.float32).eps * 2 ** want.abs().clamp(min=0.02).log2().floor()
    assert ((got - want).abs() <= 16 * ulp).all()
    assert (want - start).abs().mean() > 1000 * ulp.max(), "there was a way to go"


@pytest.mark.parametrize(("weights", "moments"), itertools.product(WEIGHTS, MOMENTS))
def test_moves_at_a_small_rate(weights: str, moments: str) -> None:
    """20 steps at 1e-6: the way of exact AdamW, though a step is far below an ulp of bf16."""
    sizes = [1 << 14]
    options = {"lr": 1e-6, "weight_decay": 0.0}
    (start,) = (0.02 * x.bfloat16().float() for x in numbers(3, sizes))
    start = start.bfloat16().float()
    assert (start.abs() * 2**-9 > 1e-6).float().mean() > 0.9, "half an ulp is more than a step"
    exact = nn.Parameter(start.clone())
    peer = SplitAdamW([exact], **options)
    mine = nn.Parameter(start.bfloat16() if weights == "stochastic" else start.clone())
    if weights == "split":
        opt = SplitAdamW.from_fp32([mine], moments=moments, **options)
    else:
        opt = SplitAdamW([mine], moments=moments, split=False, **options)
    (unequal,) = (x.exp() for x in numbers(4, sizes))
    for i in range(20):
        g = unequal * (numbers(100 + i, sizes)[0] + 0.3)
        exact.grad = g
        mine.grad = g.to(mine.dtype)
        opt.step()
        peer.step()
    way = (opt.master(mine) - start).double()
    truth = (exact.detach() - start).double()
    assert 0.9 <= float(way @ truth / (truth @ truth)) <= 1.1


@pytest.mark.parametrize(("weights", "moments"), itertools.product(WEIGHTS, MOMENTS))
def test_resumes_bit_for_bit(weights: str, moments: str) -> None:
    whole = optimizer(weights, moments)
    for i in range(2):
        set_gradients(whole, i)
        whole.step()
    file = io.BytesIO()
    saved = {"weights": [p.detach() for p in params_of(whole)], "optimizer": whole.state_dict()}
    torch.save(saved, file)
    file.seek(0)
    back = torch.load(file)
    resumed = optimizer(weights, moments)
    for p, w in zip(params_of(resumed), back["weights"], strict=True):
        p.data.copy_(w)
    resumed.load_state_dict(back["optimizer"])
    assert same_bits(everything(resumed), everything(whole))
    for opt in (whole, resumed):
        set_gradients(opt, 7)
        opt.step()
    assert same_bits(everything(resumed), everything(whole))
    assert all(opt.state[p]["step"][0] == 3 for opt in (whole, resumed) for p in params_of(opt))


def test_a_state_of_another_kind_is_refused() -> None:
    saved = optimizer("split", "bf16").state_dict()
    other = optimizer("split", "int8")
    with pytest.raises(ValueError, match="moments and split"):
        other.load_state_dict(saved)
    assert other.param_groups[0]["moments"] == "int8", "nothing was changed"
    with pytest.raises(ValueError, match="state of parameter 0"):
        optimizer("split", "bf16").load_state_dict({**saved, "state": {}})


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("clip", [-1.0, float("nan")])
def test_a_step_with_a_negative_or_nan_factor_changes_nothing(path: str, clip: float) -> None:
    opt = optimizer("split", "fp32")
    set_gradients(opt, 0)
    for p in params_of(opt):
        p.grad.fill_(float("inf"))
    references = [(torch.zeros_like(opt.master(p)), None) for p in params_of(opt)]
    before = [x.clone() for x in everything(opt)]
    step(opt, path, clip, 0.5, references)
    assert same_bits(everything(opt), before)
    assert all((r == 0).all() for r, _ in references)
    set_gradients(opt, 0)
    step(opt, path, 1.0)
    assert all(opt.state[p]["step"][0] == 1 for p in params_of(opt)), "not counted either"


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("storage", ["split", "fp32"])
@pytest.mark.parametrize("alpha", [0.01, 0.6])
def test_references_move_with_the_bits_of_the_lerp(path: str, storage: str, alpha: float) -> None:
    opt = optimizer("split", "bf16")
    start = [0.5 * x.to(DEVICE) for x in numbers(9)]
    if storage == "split":
        followers = [split_halves(x.clone()) for x in start]
        apart = [split_halves(x.clone()) for x in start]
    else:
        followers = [(x.clone(), None) for x in start]
        apart = [(x.clone(), None) for x in start]
    set_gradients(opt, 1)
    step(opt, path, 1.0, alpha, followers)
    masters = [opt.master(p) for p in params_of(opt)]
    multi_tensor_lerp_([r for r, _ in apart], masters, alpha, remainders=[m for _, m in apart])
    for (r, low), (want, want_low) in zip(followers, apart, strict=True):
        assert same_bits([r], [want])
        assert low is None or same_bits([low], [want_low])
    moved = [join_halves(*f) if storage == "split" else f[0] for f in followers]
    assert all(not torch.equal(a, b) for a, b in zip(moved, start, strict=True))


def test_from_fp32_keeps_every_bit_and_leaves_other_groups_alone() -> None:
    matrices, norms = parameters("fp32", 1), parameters("fp32", 2)
    before = [p.detach().clone() for p in (*matrices, *norms)]
    groups = [{"params": matrices}, {"params": norms, "split": False, "weight_decay": 0.0}]
    opt = SplitAdamW.from_fp32(groups, lr=1e-3)
    assert same_bits([opt.master(p) for p in (*matrices, *norms)], before)
    assert {p.dtype for p in matrices} == {torch.bfloat16}
    assert {p.dtype for p in norms} == {torch.float32}
    for p, x in zip(matrices, before, strict=False):
        assert ((p.float() - x).abs() <= x.abs() * 2**-8).all(), "the model reads a rounded weight"
    assert [g["weight_decay"] for g in opt.param_groups] == [1e-2, 0.0]
    assert [p.dtype for p in parameters("fp32")] == [torch.float32] * 3


def test_sum_of_squares_and_the_factor_that_clips() -> None:
    from fasttr_kernels import adamw_triton

    opt = optimizer("split", "fp32")
    for dtype in (torch.float32, torch.bfloat16):
        set_gradients(opt, 0, dtype)
        grads = [p.grad for p in params_of(opt)]
        exact = sum(float(g.double().square().sum()) for g in grads)
        kernel = adamw_triton.squares([g.view(-1) for g in grads], DEVICE)
        for got in (opt.grad_squares(), kernel):
            assert got.dtype == torch.float64
            assert abs(float(got) - exact) <= 1e-6 * exact
        assert abs(float(kernel - opt.grad_squares())) <= 1e-13 * exact, "fp64 sums on both paths"
        want = min(1.0, 2.0 / (exact**0.5 + 1e-6))
        assert abs(float(clip_factor(opt.grad_squares(), 2.0)) - want) < 1e-6
        assert float(clip_factor(opt.grad_squares(), 1e9)) == 1.0
    params_of(opt)[1].grad[3] = float("nan")
    assert float(clip_factor(opt.grad_squares(), 2.0)) == -1.0


def test_a_parameter_without_gradient_and_a_schedule() -> None:
    opt = SplitAdamW(parameters("fp32"), **OPTIONS)
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda i: 0.0 if i else 1.0)
    set_gradients(opt, 0)
    first, *others = params_of(opt)
    first.grad = None
    before = [x.detach().clone() for x in (first, *others)]
    opt.step()
    assert torch.equal(first, before[0])
    assert opt.state[first]["step"][0] == 0
    assert all(not torch.equal(a, b) for a, b in zip(others, before[1:], strict=True))
    schedule.step()
    still = [p.detach().clone() for p in others]
    opt.step()
    assert all(torch.equal(a, b) for a, b in zip(others, still, strict=True)), "lr is 0 now"
    assert opt.state[others[0]]["step"][0] == 2


def test_a_model_trains_as_with_torchs_adamw() -> None:
    def train(make) -> list[float]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1)).to(DEVICE)
        opt = make(model.parameters())
        x = torch.randn(64, 8, device=DEVICE)
        losses = []
        for _ in range(50):
            opt.zero_grad()
            loss = (model(x) - x[:, :1].sin()).square().mean()
            loss.backward()
            opt.step()
            losses.append(loss.item())
        return losses

    mine = train(lambda p: SplitAdamW(p, lr=1e-2))
    peer = train(lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True))
    assert max(abs(a - b) for a, b in zip(mine, peer, strict=True)) < 1e-6
    assert mine[-1] < 0.3 * mine[0]


ONE = torch.zeros(4)
WRONG: dict[str, Any] = {
    "rate below 0": ({"lr": -1.0}, "lr"),
    "beta of 1": ({"betas": (0.9, 1.0)}, "betas"),
    "unknown moments": ({"moments": "fp8"}, "one of"),
    "seed below 0": ({"seed": -1}, "seed"),
    "half precision": ({"params": [ONE.half()]}, "bfloat16"),
    "gaps": ({"params": [torch.zeros(4, 4)[:, ::2]]}, "contiguous"),
    "two devices": ({"params": [ONE, torch.zeros(4, device="meta")]}, "one device"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_bad_arguments_are_refused_with_got_wanted_remedy(wrong: str) -> None:
    change, says = WRONG[wrong]
    with pytest.raises(ValueError, match=says) as error:
        SplitAdamW(**{"params": [ONE], **change})
    assert "got" in str(error.value)
    assert "wanted" in str(error.value)


def test_gradients_and_references_that_do_not_fit_are_refused() -> None:
    p = nn.Parameter(torch.zeros(4))
    opt = SplitAdamW([p])
    p.grad = torch.zeros(4).to_sparse()
    with pytest.raises(ValueError, match="gradient of parameter 0"):
        opt.step()
    p.grad = torch.zeros(4)
    for references, alpha, says in (
        ([], 0.5, "one for each parameter"),
        ([(torch.zeros(4).bfloat16(), None)], 0.5, "with its int16 remainder"),
        ([(torch.zeros(5), None)], 0.5, r"references\[0\]"),
        ([(torch.zeros(4), None)], 1.5, "alpha"),
    ):
        with pytest.raises(ValueError, match=says):
            opt.step(references=references, alpha=alpha)
    p.grad = None
    with pytest.raises(ValueError, match="gradients for all"):
        opt.step(references=[(torch.zeros(4), None)], alpha=0.5)
