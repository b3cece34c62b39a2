"""How the tests start TRL's trainers and read what they logged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def trl_arguments(config: type, output_dir: Path, **changes: Any) -> Any:
    """fp32 on the CPU, a line of the log for every step, nothing saved."""
    return config(
        output_dir=str(output_dir),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        **changes,
    )


def trl_log(
    trainer: Any, after_step: Callable[[int, Any], None] | None = None
) -> list[dict[str, Any]]:
    """Train; what was logged of the steps. `after_step` is given each step's number and model."""
    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if after_step is not None:
                after_step(state.global_step, kwargs["model"])

    trainer.add_callback(Watch())
    trainer.train()
    return [line for line in trainer.state.log_history if "grad_norm" in line]


def trl_online(
    kind: str,
    model: Path,
    tokenizer: Path,
    output_dir: Path,
    reward_funcs: Sequence[Callable[..., Any]] = (),
    **options: Any,
) -> Any:
    """TRL's GRPOTrainer or RLOOTrainer around a model, in its first step; it never generates."""
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    common = {"per_device_train_batch_size": 12, "num_generations": 4}
    causal_lm = AutoModelForCausalLM.from_pretrained(model, attn_implementation="eager").train()
    made = getattr(trl, f"{kind}Trainer")(
        model=causal_lm,
        reward_funcs=list(reward_funcs) or _nothing,
        args=trl_arguments(getattr(trl, f"{kind}Config"), output_dir, **{**common, **options}),
        train_dataset=Dataset.from_list([{"prompt": "alpha"}] * 12),
        processing_class=AutoTokenizer.from_pretrained(tokenizer),
    )
    made.current_gradient_accumulation_steps = 1
    return made


def _nothing(completions: Sequence[Any], **_: Any) -> list[float]:
    return [0.0] * len(completions)
