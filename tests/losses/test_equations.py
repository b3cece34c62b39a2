"""Every loss is its equation, at points where no term vanishes."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from fasttr.losses import (
    LOSSES,
    DivergenceLoss,
    Kto,
    KtoPaired,
    LossInputs,
    Sft,
    Sigmoid,
    WeightedSum,
)
from tests.losses.equations import (
    ABOVE,
    ALPHA,
    BELOW,
    BETA,
    DESIRABLE,
    DIVERGENCES,
    EQUATIONS,
    SETTINGS,
    UNDESIRABLE,
    Point,
    kto_paired,
    s,
)

CASES = [
    pytest.param(name, kind, id=f"{name} {kind}")
    for name, cls in LOSSES.items()
    for kind in (DIVERGENCES if issubclass(cls, DivergenceLoss) else ["reverse_kl"])
]


def loss_of(name: str, **more):
    """The loss under the settings of the equations, as far as it reads them."""
    cls = LOSSES[name]
    read = {field.name for field in dataclasses.fields(cls)}
    return cls(**{key: value for key, value in {**SETTINGS, **more}.items() if key in read})


def inputs_of(point: Point, completions: int) -> LossInputs:
    """The point as a loss reads it, in fp64."""

    def rows(chosen: np.ndarray, rejected: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.stack([chosen, rejected], axis=1)[:, :completions].reshape(-1))

    return LossInputs(
        logp=rows(point.c, point.r),
        ref_logp=rows(point.c0, point.r0),
        token_counts=rows(point.n_c, point.n_r),
        completions=completions,
        labels=torch.from_numpy(point.is_desirable),
        chosen_tokens_mean=torch.from_numpy(point.mean_n_c),
        whole_logp=rows(point.whole_c, point.r),
    )


def test_every_loss_has_an_equation():
    assert EQUATIONS.keys() == LOSSES.keys()


@pytest.mark.parametrize("point", [ABOVE, BELOW], ids=["above", "below"])
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_a_loss_is_its_equation(name, kind, point):
    loss = loss_of(name, f_divergence_type=kind)
    got = loss(inputs_of(point, loss.completions)).numpy()
    want = EQUATIONS[name](point._replace(divergence=kind))
    assert len(set(want.tolist())) >= 3
    np.testing.assert_allclose(got, want, rtol=1e-10)


def test_a_sum_of_losses_has_its_weights():
    loss = WeightedSum((loss_of("sigmoid"), loss_of("bco_pair"), Sft()), (0.8, -0.3, 2.5))
    want = (
        0.8 * EQUATIONS["sigmoid"](ABOVE)
        - 0.3 * EQUATIONS["bco_pair"](ABOVE)
        + 2.5 * EQUATIONS["sft"](ABOVE)
    )
    np.testing.assert_allclose(loss(inputs_of(ABOVE, 2)).numpy(), want, rtol=1e-10)


def test_the_exponent_of_the_alpha_divergence_stops_at_80():
    loss = Sigmoid(f_divergence_type="alpha_divergence", f_alpha_divergence_coef=ALPHA)
    f = loss.f(torch.tensor([-1e4], dtype=torch.float64))
    assert f.item() == pytest.approx((np.exp(80) - 1) / (ALPHA - 1))
    straight = Sigmoid(f_divergence_type="alpha_divergence", f_alpha_divergence_coef=1.0)
    assert straight.f(torch.tensor([-3.5])).item() == -3.5


def test_ktos_estimate_is_without_a_gradient():
    inputs = inputs_of(ABOVE, 2)
    logp = inputs.logp.clone().requires_grad_()
    Kto(BETA, DESIRABLE, UNDESIRABLE)(inputs._replace(logp=logp)).sum().backward()
    own, mismatched = logp.grad[0::2].numpy(), logp.grad[1::2]
    share = s(BETA * (ABOVE.u - ABOVE.v.mean()))
    slope = np.where(ABOVE.is_desirable, -DESIRABLE, UNDESIRABLE) * BETA * share * (1 - share)
    np.testing.assert_allclose(own, slope, rtol=1e-12)
    assert mismatched.tolist() == [0.0] * 4


def test_the_estimates_of_paired_kto_carry_theirs():
    inputs = inputs_of(ABOVE, 2)
    logp = inputs.logp.clone().requires_grad_()
    KtoPaired(BETA)(inputs._replace(logp=logp)).sum().backward()
    width = 1e-6
    for row in range(4):
        nudge = np.zeros(4)
        nudge[row] = width
        up, down = (kto_paired(ABOVE._replace(r=ABOVE.r + x)).sum() for x in (nudge, -nudge))
        assert logp.grad[2 * row + 1].item() == pytest.approx((up - down) / (2 * width), rel=1e-6)
