"""Train with a loss of your own: any function of the rows' log-probs.

    python examples/own_loss.py

The function sees summed log-probs (nats) of chosen and rejected completions under the policy and
the reference, and returns one number for each row. It never meets a logit: the fused head calls it
between the two halves of its backward.
"""

import tempfile
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor

import fasttr
from fasttr.losses import LossInputs
from fasttr.models.scratch import init_model

ROWS = [
    {"prompt": f"{a} and {b} make", "chosen": f" {a + b}.", "rejected": f" {a * b}."}
    for a in range(1, 6)
    for b in range(3, 8)
]


def focal_dpo(inputs: LossInputs) -> Tensor:
    """DPO that turns to the pairs which it has wrong: s(-h)^2 (-log s(h)), h = beta (u - v)."""
    u, v = inputs.chosen_logratio, inputs.rejected_logratio
    h = 0.1 * (u - v)
    return h.neg().sigmoid() ** 2 * -F.logsigmoid(h)


def main() -> fasttr.TrainResult:
    folder = Path(tempfile.mkdtemp())
    init_model(
        "llama",
        hidden_size=32,
        num_layers=2,
        num_heads=2,
        output_dir=folder / "model",
    )
    config = fasttr.TrainConfig(
        model_name_or_path=str(folder / "model"),
        output_dir=str(folder / "run"),
        ref_update="hard",
        ref_update_every=8,
        max_steps=16,
        learning_rate=3e-3,
        logging_steps=4,
        save_strategy="no",
        use_cpu=True,
    )
    return fasttr.train(config, train_dataset=ROWS, loss=focal_dpo)


if __name__ == "__main__":
    main()
