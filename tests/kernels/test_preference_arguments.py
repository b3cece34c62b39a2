"""linear_preference_loss refuses what cannot be right, with got, wanted and remedy."""

from __future__ import annotations

import pytest
import torch
from fasttr_kernels import linear_preference_loss
from torch import Tensor, nn

from tests.kernels.accuracy import DEVICE, LENGTHS, Problem, dpo


class _Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.by = nn.Parameter(torch.ones((), device=DEVICE))

    def forward(self, logp: Tensor, ref_logp: Tensor | None, groups: slice) -> Tensor:
        return (self.by * logp).sum()


@pytest.mark.parametrize(
    ("loss_fn", "wanted"),
    [
        (_Scaled(), "without parameters"),
        (_Scaled().forward, "a function of logp and ref_logp"),
        (lambda logp, ref, groups: logp, "scalar"),
        (lambda logp, ref, groups: 1.0, "scalar"),
        (lambda logp, ref, groups: logp.sum().long(), "scalar"),
    ],
    ids=["module", "method with a parameter", "vector", "number", "integer"],
)
def test_loss_fn_that_cannot_be_right_is_refused(loss_fn, wanted: str) -> None:
    problem = Problem(LENGTHS)
    with pytest.raises(ValueError, match=wanted):
        linear_preference_loss(
            problem.hidden,
            problem.weight,
            *problem.arguments()[:3],
            loss_fn,
            ref_logp=None,
            normalizer=1,
        )


def test_loss_fn_that_ignores_the_log_probs_gives_zero_gradients(rows: str) -> None:
    problem = Problem(LENGTHS)
    out = linear_preference_loss(
        problem.hidden,
        problem.weight,
        *problem.arguments()[:3],
        lambda logp, ref, groups: torch.ones((), device=DEVICE),
        ref_logp=None,
        normalizer=2,
    )
    assert out.loss == 0.5
    assert all(g.abs().max() == 0 for g in torch.autograd.grad(out.loss, problem.leaves()))


WRONG = {
    "hidden of three dimensions": ({"hidden": torch.zeros(1, 6, 4)}, "hidden"),
    "weight of another width": ({"weight": torch.zeros(9, 5)}, "weight"),
    "half precision": (
        {"hidden": torch.zeros(6, 4).half(), "weight": torch.zeros(9, 4).half()},
        "bfloat16",
    ),
    "two dtypes": ({"weight": torch.zeros(9, 4).double()}, "autocast"),
    "too few targets": ({"target": torch.zeros(5).long()}, "target"),
    "targets that are not ids": ({"target": torch.zeros(6)}, "target"),
    "a target outside": ({"target": torch.full((6,), 9)}, "target"),
    "an ignored target": ({"target": torch.full((6,), -100)}, "scored rows"),
    "bias of another length": ({"bias": torch.zeros(8)}, "bias"),
    "rows not covered": ({"cu_completions": torch.tensor([0, 3, 5])}, "every row"),
    "rows from elsewhere": ({"cu_completions": torch.tensor([1, 3, 6])}, "every row"),
    "rows going back": ({"cu_completions": torch.tensor([0, 7, 6])}, "order"),
    "completions not covered": ({"cu_groups": torch.tensor([0, 1])}, "every completion"),
    "offsets that are floats": ({"cu_groups": torch.tensor([0.0, 2.0])}, "int64"),
    "offsets in a list": ({"cu_groups": [0, 2]}, "1-d tensor"),
    "a size of groups that does not divide": ({"cu_groups": 3}, "divides"),
    "neither offsets nor lengths": ({"cu_completions": None}, "lengths"),
    "both offsets and lengths": ({"lengths": [3, 3]}, "both"),
    "lengths that miss rows": ({"cu_completions": None, "lengths": [3, 2]}, "sum 6"),
    "lengths in a tensor": ({"cu_completions": None, "lengths": torch.tensor([3, 3])}, "host"),
    "a cast weight of another dtype": ({"cast_weight": torch.zeros(9, 4).double()}, "cast_weight"),
    "a buffer beside a frozen weight": ({"weight_grad": torch.zeros(9, 4)}, "frozen"),
    "a buffer of another shape": ({"weight_grad": torch.zeros(9, 5)}, "weight_grad"),
    "reference of another length": ({"ref_logp": torch.zeros(3)}, "ref_logp"),
    "normalizer 0": ({"normalizer": 0}, "normalizer"),
    "normalizer in a tensor": ({"normalizer": torch.tensor(2.0)}, "host number"),
    "no rows in a chunk": ({"chunk_rows": 0}, "chunk_rows"),
    "scale 0": ({"logit_scale": 0.0}, "logit_scale"),
    "a statistic that there is not": ({"loss_reads": ["perplexity"]}, "loss_reads"),
    "softcap below 0": ({"softcap": -1.0}, "softcap"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_bad_arguments_are_refused_with_got_wanted_remedy(wrong: str) -> None:
    good = {
        "hidden": torch.zeros(6, 4),
        "weight": torch.zeros(9, 4),
        "target": torch.zeros(6).long(),
        "cu_completions": torch.tensor([0, 3, 6]),
        "cu_groups": torch.tensor([0, 2]),
        "loss_fn": dpo,
        "ref_logp": None,
        "normalizer": 1,
    }
    linear_preference_loss(**good)
    change, says = WRONG[wrong]
    with pytest.raises(ValueError, match=says) as error:
        linear_preference_loss(**{**good, **change})
    assert "got" in str(error.value)
    assert "wanted" in str(error.value)


def test_autocast_to_half_precision_is_refused() -> None:
    problem = Problem(LENGTHS)
    with torch.autocast(DEVICE.type, torch.float16), pytest.raises(ValueError, match="bfloat16"):
        problem.loss()
