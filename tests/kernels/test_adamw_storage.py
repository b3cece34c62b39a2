"""What SplitAdamW stores: bytes a parameter, rounding at random, moments in 8 bits."""

from __future__ import annotations

import pytest
import torch
from fasttr_kernels import SplitAdamW, adamw_torch
from fasttr_kernels.rounding import noise_of, philox
from torch import Tensor, nn

from tests.kernels.accuracy import DEVICE
from tests.kernels.adamw_states import (
    MOMENTS,
    OPTIONS,
    everything,
    numbers,
    parameters,
    same_bits,
    set_gradients,
    step,
)


@pytest.mark.parametrize("moments", MOMENTS)
def test_bytes_a_parameter(moments: str) -> None:
    """Weights and states of a model that lies nowhere; gradients come on top."""
    of_moments = {"fp32": 8, "bf16": 4, "int8": 2 + 8 / 128}[moments]
    for dtype, split, of_weights in (
        (torch.bfloat16, True, 4),
        (torch.bfloat16, False, 2),
        (torch.float32, True, 4),
    ):
        p = nn.Parameter(torch.empty(4096, 14336, dtype=dtype, device="meta"))
        opt = SplitAdamW([p], moments=moments, split=split)
        held = [p, *opt.state[p].values()]
        found = sum(x.numel() * x.element_size() for x in held) / p.numel()
        assert abs(found - of_weights - of_moments) < 1e-5


def test_random_bits_are_philox_and_differ_by_step_stream_tensor_and_seed() -> None:
    """The known answers of Random123's kat_vectors for philox4x32-10."""
    ones = 0xFFFFFFFF
    for words, key, answer in (
        ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ones,) * 4, 2**64 - 1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0A4093822,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ):
        got = philox(tuple(torch.tensor([w]) for w in words), key)
        assert tuple(int(x) for x in got) == answer
    draw = lambda *a: noise_of(*a, slice(0, 4000), DEVICE)[0]  # noqa: E731
    first = draw(1, 0, 0, 1)
    for other in ((2, 0, 0, 1), (1, 1, 0, 1), (1, 0, 1, 1), (1, 0, 0, 2)):
        assert (draw(*other) == first).float().mean() < 0.01
    assert torch.equal(
        noise_of(1, 0, 0, 1, slice(1024, 1100), DEVICE)[1],
        noise_of(1, 0, 0, 1, slice(0, 4000), DEVICE)[1][1024:1100],
    ), "a bit depends on its place alone"
    assert abs(float(first.float().mean()) - 32767.5) < 5 * 65536 / 12**0.5 / 4000**0.5


def test_stochastic_weights_and_moments_are_right_on_average() -> None:
    n = 1 << 16
    p = nn.Parameter(torch.ones(n, device=DEVICE, dtype=torch.bfloat16))
    opt = SplitAdamW([p], lr=1e-3, weight_decay=0.0, moments="bf16", split=False, eps=0.0)
    p.grad = torch.full_like(p, 0.3)
    opt.step()
    # m / sqrt(v) is 1 after one step, so that each weight should go down by lr: a fraction of the
    # 2^-8 between bf16 numbers below 1.
    share = (p < 1).double().mean().item()
    odds = 1e-3 * 256
    assert abs(share - odds) < 5 * (odds * (1 - odds) / n) ** 0.5
    g = float(torch.tensor(0.3).bfloat16())
    for name, want in (("exp_avg", 0.1 * g), ("exp_avg_sq", 0.001 * g * g)):
        values = opt.state[p][name].double()
        assert len(values.unique()) == 2
        assert abs(values.mean().item() / want - 1) < 5 * 2**-8 / n**0.5


def test_companded_moments_keep_two_digits_and_never_lose_a_second_moment() -> None:
    spread = (10 ** (6 * numbers(0, [4096])[0].clamp(-1.5, 1.5))).double()
    m, v = (spread.float() * numbers(1, [4096])[0].sign()), spread.float().square()
    moments = adamw_torch.Moments(
        torch.zeros(4096, dtype=torch.int8),
        torch.zeros(4096, dtype=torch.uint8),
        torch.zeros(32),
        torch.zeros(32),
    )
    adamw_torch.encode(moments, m, v)
    got_m, got_v = adamw_torch.decoded(moments)

    def root(x: Tensor, power: int) -> Tensor:
        groups = x.abs().double().view(-1, 128)
        return (groups / groups.amax(1, keepdim=True)) ** (1 / power)

    assert ((root(got_m, 4) - root(m, 4)).abs() <= 0.501 / 127).all()
    assert (got_m.sign() * m.sign() >= 0).all()
    assert (got_v > 0).all()
    least = root(v, 8) < 0.5 / 255
    assert ((root(got_v, 8) - root(v, 8)).abs() <= 0.501 / 255)[~least].all()
    assert least.any(), "some would have been 0"


def test_bits_of_8_bit_moments_do_not_depend_on_where_blocks_end(monkeypatch) -> None:
    found = []
    for block in (adamw_torch.BLOCK, 2 * adamw_torch.GROUP):
        monkeypatch.setattr(adamw_torch, "BLOCK", block)
        opt = SplitAdamW(parameters("fp32", sizes=[1000]), split=False, moments="int8", **OPTIONS)
        for i in range(3):
            set_gradients(opt, i)
            step(opt, "torch")
        found.append(everything(opt))
    assert same_bits(*found)
