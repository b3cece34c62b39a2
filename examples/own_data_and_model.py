"""Train a loaded transformers model on rows in memory, and watch it.

    python examples/own_data_and_model.py

Nothing is downloaded: the model is a small random one, made here. It takes seconds on a CPU.
"""

import tempfile
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

import fasttr
from fasttr.models.scratch import init_model

ROWS = [
    {
        "prompt": f"Name a number that is larger than {n}:",
        "chosen": f" {n + 1} is larger.",
        "rejected": f" {n - 1} is the one.",
    }
    for n in range(10, 42)
]


class StopWhenSure(fasttr.Callback):
    """End the run when the policy prefers the chosen side by two nats."""

    def on_step(self, run, metrics):
        margin = metrics.read()["rewards/margins"] / run.loss.beta
        if margin > 2:
            run.ask("stop")


def main() -> fasttr.TrainResult:
    folder = Path(tempfile.mkdtemp())
    init_model("llama", hidden_size=32, num_layers=2, num_heads=2, output_dir=folder / "model")
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")

    config = fasttr.TrainConfig(
        output_dir=str(folder / "run"),
        ref_update="soft",
        ref_update_alpha=0.6,
        ref_update_every=4,
        max_steps=40,
        learning_rate=5e-4,
        logging_steps=2,
        save_strategy="no",
        use_cpu=True,
    )
    result = fasttr.train(
        config,
        model=model,
        tokenizer=tokenizer,
        train_dataset=ROWS,  # or a datasets.Dataset
        callbacks=[StopWhenSure()],
    )
    # The model was trained in place, and generates as any transformers model does.
    prompt = tokenizer(ROWS[0]["prompt"], return_tensors="pt")
    print(tokenizer.decode(model.generate(**prompt, max_new_tokens=12, do_sample=False)[0]))
    return result


if __name__ == "__main__":
    main()
