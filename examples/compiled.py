"""The ops under torch.compile.

    python examples/compiled.py

`linear_logprob` is a registered operator: a step that uses it is one graph, from token ids to loss.
`linear_preference_loss` calls a Python function between the halves of its backward, so it splits
its step into two graphs, once; it needs a product less. `multi_tensor_lerp_` is registered too.
"""

import torch
import torch.nn.functional as F
from fasttr_kernels import linear_logprob, multi_tensor_lerp_
from torch import nn

VOCABULARY, WIDTH, PAIRS, LENGTH = 400, 32, 8, 6


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def logps(self, ids: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """(2 PAIRS,) log-probs of completions: chosen and rejected in turn."""
        hidden = torch.tanh(self.layer(self.embedding(ids)))
        rows = linear_logprob(hidden, self.head.weight, target)
        return rows.logp.view(-1, LENGTH).sum(1)


def dpo(model: Model, ids: torch.Tensor, target: torch.Tensor, ref: torch.Tensor) -> torch.Tensor:
    ratio = model.logps(ids, target) - ref
    return -F.logsigmoid(0.1 * (ratio[0::2] - ratio[1::2])).mean()


def move(references: list[torch.Tensor], policies: list[torch.Tensor]) -> None:
    multi_tensor_lerp_(references, policies, 0.6)


def main(steps: int = 20, backend: str = "inductor") -> list[float]:
    torch.manual_seed(0)
    policy, reference = Model(), Model()
    reference.load_state_dict(policy.state_dict())
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-2)
    ids = torch.randint(VOCABULARY, (2 * PAIRS * LENGTH,))
    target = torch.randint(VOCABULARY, ids.shape)
    # fullgraph: a break would be an error.
    loss_of = torch.compile(dpo, fullgraph=True, backend=backend)
    move_all = torch.compile(move, fullgraph=True, backend=backend)
    losses = []
    for step in range(steps):
        with torch.no_grad():
            ref = reference.logps(ids, target)
        loss = loss_of(policy, ids, target, ref)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        if (step + 1) % 10 == 0:
            move_all(list(reference.parameters()), list(policy.parameters()))
            print(f"step {step + 1}  loss {losses[-1]:.4f}  the reference has moved")
    return losses


if __name__ == "__main__":
    main()
