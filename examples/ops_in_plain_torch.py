"""The fused ops in a plain PyTorch loop, without the trainer: torch (and Triton on a GPU) alone.

    python examples/ops_in_plain_torch.py

A bag of embeddings stands in for a model: what matters is the head. `linear_preference_loss` makes
log-probs, loss and gradients of a batch of pairs without their logits, and
`multi_tensor_lerp_` moves the reference.
"""

import copy

import torch
from fasttr_kernels import linear_preference_loss, multi_tensor_lerp_
from torch import nn

from fasttr.losses import Sigmoid, group_loss

VOCABULARY, WIDTH, PAIRS, LENGTH = 500, 32, 8, 6


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def hidden(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.embedding(ids))


def head_loss(model, ids, target, loss_fn, ref_logp):
    """Completions lie one after the other, chosen and rejected in turn; a pair is a group."""
    completions = torch.arange(0, len(target) + 1, LENGTH)
    pairs = torch.arange(0, 2 * PAIRS + 1, 2)
    return linear_preference_loss(
        model.hidden(ids),
        model.head.weight,
        target,
        completions,
        pairs,
        loss_fn,
        ref_logp=ref_logp,
        normalizer=PAIRS,
    )


def main(steps: int = 30) -> list[float]:
    torch.manual_seed(0)
    policy = Model()
    reference = copy.deepcopy(policy).requires_grad_(False)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-2)
    ids = torch.randint(VOCABULARY, (2 * PAIRS * LENGTH,))
    target = torch.randint(VOCABULARY, ids.shape)
    tokens = torch.full((2 * PAIRS,), LENGTH)
    loss_fn = group_loss(Sigmoid(beta=0.1), tokens, torch.ones(PAIRS))
    losses = []
    for step in range(steps):
        with torch.no_grad():
            ref_logp = head_loss(reference, ids, target, None, None).logp
        out = head_loss(policy, ids, target, loss_fn, ref_logp)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(out.loss.detach()))
        if (step + 1) % 10 == 0:
            multi_tensor_lerp_(reference.parameters(), policy.parameters(), 0.6)
            print(f"step {step + 1}  loss {losses[-1]:.4f}  the reference has moved")
    return losses


if __name__ == "__main__":
    main()
