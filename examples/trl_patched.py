"""TRL's DPOTrainer with fasttr's head and reference update: one line more than a TRL script.

    python examples/trl_patched.py

The run is TR-DPO in TRL's own words (`sync_ref_model`). Nothing is downloaded: the model is a small
random one, made here. Needs trl 1.16 (`pip install trl==1.16.0`).
"""

import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

from fasttr.integrations.trl import patch
from fasttr.models.scratch import init_model

ROWS = [
    {"prompt": f"{n} is", "chosen": " odd." if n % 2 else " even.", "rejected": " a number."}
    for n in range(16)
]


def train(folder: Path) -> list[dict[str, float]]:
    """An ordinary TRL script; what it logs at each step."""
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    reference = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    trainer = DPOTrainer(
        model=model,
        ref_model=reference,
        args=DPOConfig(
            output_dir=str(folder / "run"),
            max_steps=6,
            learning_rate=1e-3,
            per_device_train_batch_size=4,
            sync_ref_model=True,
            ref_model_sync_steps=3,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            bf16=False,
        ),
        train_dataset=Dataset.from_list(ROWS),
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
    )
    trainer.train()
    return [line for line in trainer.state.log_history if "grad_norm" in line]


def main() -> list[dict[str, float]]:
    folder = Path(tempfile.mkdtemp())
    init_model("llama", hidden_size=32, num_layers=2, num_heads=2, output_dir=folder / "model")
    patch()  # the only line that a TRL script does not have
    return train(folder)


if __name__ == "__main__":
    main()
