"""`fasttr init`: a small untrained model from nothing."""

from __future__ import annotations

from fasttr.cli.arguments import settings_of_command


def run(args: list[str]) -> None:
    from fasttr.models.scratch import ScratchSettings, init_model

    values = settings_of_command(
        "fasttr init",
        "Write a Hugging Face folder with random weights and a trained tokenizer.",
        ScratchSettings,
        args,
    )
    parameters = init_model(**values)
    print(f"wrote {values['output_dir']}: {values['arch']}, {parameters:,} random parameters")
