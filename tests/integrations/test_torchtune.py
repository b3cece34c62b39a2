"""Log-probs for torchtune's recipes, from hidden states: those of its own function on logits."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fasttr.integrations.torchtune import BatchLogProbs


class Decoder(nn.Module):
    """As torchtune's: an output layer that can be left to the loss."""

    def __init__(self, output) -> None:
        super().__init__()
        self.table = nn.Embedding(17, 6, dtype=torch.float64)
        self.output = output
        self.skip_output_layer = False

    def forward(self, ids):
        hidden = self.table(ids).tanh()
        return hidden if self.skip_output_layer else self.output(hidden)


class Tied:
    """As torchtune's TiedLinear: no module, and no weight of its own."""

    def __init__(self, module: nn.Module) -> None:
        self.tied_module = module

    def __call__(self, x):
        return x @ self.tied_module.weight.t()


def decoder(kind: str) -> Decoder:
    torch.manual_seed(0)
    if kind == "linear":
        return Decoder(nn.Linear(6, 17, bias=True, dtype=torch.float64))
    model = Decoder(None)
    model.output = Tied(model.table)
    return model


@pytest.mark.parametrize("kind", ["linear", "tied"])
@pytest.mark.parametrize("average", [False, True])
def test_log_probs_and_gradients_are_those_of_the_logits(kind, average):
    model = decoder(kind)
    ids = torch.randint(17, (4, 8))
    labels = ids.clone()
    for row, (prompt, end) in enumerate([(2, 8), (3, 5), (1, 7), (6, 6)]):
        labels[row, :prompt] = -100
        labels[row, end:] = -100
    # From the equation: the sum over label positions of log softmax, one position earlier.
    table = model(ids)[:, :-1].log_softmax(-1)
    mask = labels[:, 1:] != -100
    token = table.gather(2, labels[:, 1:].clamp(min=0)[..., None])[..., 0]
    want = (token * mask).sum(1)
    want = want / mask.sum(1).clamp(min=1) if average else want
    leaves = list(model.parameters())
    by = torch.tensor([1.0, -2.0, 0.5, 1.0], dtype=torch.float64)
    want_grads = torch.autograd.grad((want * by).sum(), leaves)

    logps = BatchLogProbs()
    logps.set_model_output(model)
    assert not list(logps.parameters())
    got = logps(model(ids), labels, return_average_logprobs=average)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)
    assert (got[:3] < -0.5).all()
    assert got[3] == 0
    got_grads = torch.autograd.grad((got * by).sum(), leaves)
    for a, b in zip(got_grads, want_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


def test_a_call_before_the_model_and_labels_that_do_not_fit_are_refused():
    logps = BatchLogProbs()
    with pytest.raises(ValueError, match="set_model_output"):
        logps(torch.zeros(2, 3, 6), torch.zeros(2, 3).long())
    logps.set_model_output(decoder("linear"))
    with pytest.raises(ValueError, match=r"labels: got shape \(2, 4\); wanted \(2, 3\)"):
        logps(torch.zeros(2, 3, 6), torch.zeros(2, 4).long())
