"""The classes of Liger's names beside Liger's own: loss, every other result, gradients."""

from __future__ import annotations

import inspect

import pytest
import torch

from fasttr.errors import FasttrError
from fasttr.integrations import liger as ours

theirs = pytest.importorskip("liger_kernel.chunked_loss")

V, D, S, N = 11, 5, 7, 6


def batch():
    make = torch.Generator().manual_seed(3)
    normal = lambda *size: torch.randn(*size, generator=make, dtype=torch.float64)  # noqa: E731
    target = torch.randint(V, (N, S), generator=make)
    for row, (first, end) in enumerate([(1, 7), (3, 6), (2, 4), (0, 5), (4, 7), (2, 7)]):
        target[row, :first] = -100
        target[row, end:] = -100
    return {
        "_input": normal(N, S, D).requires_grad_(),
        "lin_weight": normal(V, D).requires_grad_(),
        "target": target,
        "bias": normal(V).requires_grad_(),
        "ref_input": normal(N, S, D),
        "ref_weight": normal(V, D),
        "ref_bias": normal(V),
    }


def results(module, arguments):
    """(loss, *aux, dX, dW, db)"""
    loss, aux = module(**arguments)
    leaves = [arguments[name] for name in ("_input", "lin_weight", "bias")]
    return [loss.detach(), *(x.detach() for x in aux), *torch.autograd.grad(loss, leaves)]


def assert_as_liger(name, settings, **more):
    arguments = {**batch(), **more}
    got = results(getattr(ours, name)(**settings), arguments)
    # Liger sums its loss and its means in fp32 whatever the inputs are.
    want = results(getattr(theirs, name)(**settings, compiled=False), arguments)
    assert len(got) == len(want)
    for number, (a, b) in enumerate(zip(got, want, strict=True)):
        torch.testing.assert_close(
            a.double(), b.double(), rtol=2e-6, atol=2e-6, msg=lambda m, i=number: f"result {i}: {m}"
        )
    assert got[0].abs() > 1e-3


DPO = {
    "as it comes": {},
    "without a reference": {"use_ref_model": False},
    "means over tokens": {"average_log_prob": True},
    "with the likelihood of chosen": {"compute_nll_loss": True, "alpha": 0.7},
    "hinge": {"loss_type": "hinge"},
    "robust": {"loss_type": "robust", "label_smoothing": 0.2},
    "exo_pair": {"loss_type": "exo_pair", "label_smoothing": 0.1},
    "nca_pair": {"loss_type": "nca_pair"},
    "bco_pair": {"loss_type": "bco_pair"},
    "sppo_hard": {"loss_type": "sppo_hard"},
    "apo_zero": {"loss_type": "apo_zero"},
    "apo_down": {"loss_type": "apo_down"},
    "discopop": {"loss_type": "discopop", "discopop_tau": 0.4},
}


@pytest.mark.parametrize("case", DPO)
def test_dpo_gives_what_liger_gives(case):
    assert_as_liger("LigerFusedLinearDPOLoss", {"beta": 0.3, **DPO[case]})


@pytest.mark.parametrize(
    "settings",
    [{"use_ref_model": True}, {}, {"use_ref_model": True, "average_log_prob": True}],
    ids=["with a reference", "without", "means over tokens"],
)
@pytest.mark.parametrize("kl", [None, torch.tensor(0.4, dtype=torch.float64)], ids=["no kl", "kl"])
def test_kto_gives_what_liger_gives(settings, kl):
    verdicts = torch.tensor([True, False, False, True, True, False])
    assert_as_liger(
        "LigerFusedLinearKTOLoss", {"beta": 0.3, **settings}, preference_labels=verdicts, kl=kl
    )


@pytest.mark.parametrize("name", ["LigerFusedLinearDPOLoss", "LigerFusedLinearKTOLoss"])
def test_signatures_are_those_of_liger(name):
    for method in ("__init__", "forward"):
        mine, liger = (
            [
                (p.name, p.default)
                for p in inspect.signature(
                    getattr(getattr(module, name), method)
                ).parameters.values()
            ]
            for module in (ours, theirs)
        )
        assert mine == liger


def test_a_loss_that_liger_refuses_is_there():
    """IPO, whose means are over tokens, typed again."""
    arguments = batch()
    loss, (chosen, rejected, *_) = ours.LigerFusedLinearDPOLoss(beta=0.3, loss_type="ipo")(
        **arguments
    )
    module = ours.LigerFusedLinearDPOLoss(use_ref_model=False)
    reference = {**arguments, "_input": arguments["ref_input"], "bias": arguments["ref_bias"]}
    reference["lin_weight"] = arguments["ref_weight"]
    _, (ref_chosen, ref_rejected, *_) = module(**reference)
    counts = (arguments["target"] != -100).sum(1)
    margin = (chosen - ref_chosen) / counts[:3] - (rejected - ref_rejected) / counts[3:]
    torch.testing.assert_close(loss, ((margin - 1 / 0.6) ** 2).mean())


def test_what_cannot_be_done_is_refused_by_name():
    with pytest.raises(FasttrError, match="loss_type: got 'kto'; wanted one of sigmoid, "):
        ours.LigerFusedLinearDPOLoss(loss_type="kto")
    arguments = {**batch(), "ref_input": None}
    with pytest.raises(FasttrError, match="ref_input, ref_weight: got none"):
        ours.LigerFusedLinearDPOLoss()(**arguments)
    with pytest.raises(FasttrError, match="preference_labels: got none"):
        ours.LigerFusedLinearKTOLoss()(**batch())
