"""A training loop of your own, from the parts of fasttr.

    python examples/own_loop.py

It is what `fasttr.train` does, without checkpoints, metrics and evaluation: score a window of steps
by the reference, train on it, move the reference.
"""

import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fasttr.losses import Sigmoid
from fasttr.models.scratch import init_model
from fasttr.parts import (
    DataConfig,
    LogpTable,
    MovingReference,
    Objective,
    Plan,
    Soft,
    encode_rows,
    fill_logps,
    give_back,
    pack_model,
)

ROWS = [
    {"prompt": f"Count from {n}:", "chosen": f" {n}, {n + 1}, {n + 2}", "rejected": f" {n}, {n}"}
    for n in range(24)
]


def train(model, tokenizer, rows, steps: int = 12) -> list[float]:
    """DPO with a reference that moves every 4 steps; the loss of every step."""
    trees = encode_rows(tokenizer, rows, DataConfig(max_length=256))
    plan = Plan(trees, train_batch_size=8, max_tokens_per_batch=1024, max_steps=steps)
    objective = Objective(Sigmoid(beta=0.1))
    policy = pack_model(model)
    reference = MovingReference(Soft(alpha=0.6, every=4), policy)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-3)
    losses = []
    for window in plan.windows(reference.schedule.every):
        ref_logps = LogpTable(rows=len(trees), completions=2)
        with reference.model() as scorer:
            for step in window:
                fill_logps(scorer, plan.packs(step), ref_logps)

        for step in window:
            of_step = objective.of_rows(trees, plan.rows(step))
            loss = 0.0
            for pack in plan.packs(step):
                out = policy(
                    pack, of_step.loss_fn(pack), ref_logps.get(pack.rows), of_step.normalizer
                )
                out.loss.backward()
                loss += float(out.loss.detach())
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss)
        reference.move()
    give_back(policy)
    return losses


def main() -> list[float]:
    folder = Path(tempfile.mkdtemp()) / "model"
    init_model("qwen3", hidden_size=32, num_layers=2, num_heads=2, output_dir=folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    losses = train(model, AutoTokenizer.from_pretrained(folder), ROWS)
    print("\n".join(f"step {step}  loss {loss:.4f}" for step, loss in enumerate(losses, 1)))
    return losses


if __name__ == "__main__":
    main()
