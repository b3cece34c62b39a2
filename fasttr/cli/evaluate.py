"""The command line of `fasttr eval`: the settings of a run that have a meaning here, and its own
beside them."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from fasttr.cli import arguments
from fasttr.config.trl import is_none, merge, translate
from fasttr.errors import FasttrError

# Flags that no run has: type, what it is.
OWN: dict[str, tuple[Any, str]] = {
    "anchor_model_name_or_path": (
        str,
        "fixed model that log-ratios are taken against, a folder or hub id",
    ),
    "output_file": (str, "also write the numbers as JSON"),
    "prompts": (str, "file of prompts to draw samples for: rows with a prompt, or lines of text"),
    "samples_file": (str, "JSON lines to write the samples to"),
    "max_new_tokens": (int, "most tokens of a sample (256)"),
    "temperature": (float, "of the samples; 0 takes the likeliest token (1)"),
    "num_samples": (int, "samples for each prompt (1)"),
    "sampling_batch_size": (int, "prompts drawn for at once (16)"),
    "sampling_seed": (int, "seed of the samples (42)"),
}
SAMPLING = tuple(name for name in OWN if name not in ("anchor_model_name_or_path", "output_file"))


def main(args: list[str]) -> None:
    """Measure a split, draw samples, or both. A file of settings may be that of a training run:
    what concerns training alone is passed over; as a flag it is a mistake."""
    from fasttr.config.train_config import TrainConfig
    from fasttr.evaluation.standalone import SETTINGS, measure, write_json

    parser = arguments.new_parser(
        "fasttr eval",
        "Score a split by a model, by itself or against a fixed anchor; with --prompts, draw "
        "samples.",
    )
    parser.add_argument(
        "--config", action="config", help="a flat YAML file whose keys are the flags, or a run's"
    )
    fields = {field.name for field in dataclasses.fields(TrainConfig)}
    parser.add_class_arguments(TrainConfig, skip=fields - set(SETTINGS))
    for name, (kind, text) in OWN.items():
        parser.add_argument(f"--{name}", type=kind | None, help=text)

    file, flags, rest = arguments.read_args(args)
    file.pop("env", None)
    given = merge(file, arguments.flag_values(flags))
    own = {key: given.pop(key) for key in list(given) if key in OWN}
    settings, _ = translate(given)
    training = [key for key in flags if key in fields and key not in SETTINGS]
    if training:
        raise FasttrError(
            f"{training[0]}: fasttr eval trains nothing and does not read it; leave it out"
        )
    settings = {key: value for key, value in settings.items() if key in SETTINGS}
    if settings.get("group_size") is not None:
        settings.setdefault("train_batch_size", settings["group_size"])
    plain = [
        f"--{key}={value if isinstance(value, str) else json.dumps(value)}"
        for key, value in {**settings, **own}.items()
        if not is_none(value)
    ]
    values = vars(arguments.parse(parser, plain + rest))
    values.pop("config")
    own = {key: values.pop(key) for key in OWN}
    sampling = {key: own[key] for key in SAMPLING if own[key] is not None}
    if sampling:
        _sample(sampling, values)
    if not sampling or values["dataset_name"] is not None:
        measured = measure(TrainConfig(**values), own["anchor_model_name_or_path"])
        print(measured.table())
        if own["output_file"] is not None:
            write_json(measured, own["output_file"])


def _sample(given: dict[str, Any], values: dict[str, Any]) -> None:
    from fasttr.rollouts.sampler import Sampling, sample_file

    for key in ("prompts", "samples_file"):
        if key not in given:
            raise FasttrError(
                f"{key}: missing; samples need --prompts and --samples_file (got "
                f"{', '.join(given)})"
            )
    if "sampling_seed" in given:
        given["seed"] = given.pop("sampling_seed")
    written = sample_file(
        values["model_name_or_path"],
        given["prompts"],
        given["samples_file"],
        sampling=Sampling(
            **{key: value for key, value in given.items() if key in Sampling._fields}
        ),
        batch_size=given.get("sampling_batch_size", 16),
        use_cpu=values["use_cpu"],
        bf16=values["bf16"],
        disable_tqdm=values["disable_tqdm"],
    )
    print(f"{written} samples in {given['samples_file']}")
