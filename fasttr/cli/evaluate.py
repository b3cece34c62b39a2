"""`fasttr eval`: measure a split, draw samples for a file of prompts, or both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fasttr.cli import arguments
from fasttr.errors import FasttrError, did_you_mean
from fasttr.settings import check_ranges, settings_of

USAGE = "[--config FILE] [--SETTING VALUE ...]"
DESCRIPTION = (
    "Log-probs and rewards of a split by a model, by itself or against a fixed anchor; with "
    "--prompts, samples, also as benchmarks and their judges read them; with --verdicts, what a "
    "judge wrote. A file of settings (--config FILE) may be that of a training run: what "
    "concerns training alone is passed over; as a flag it is a mistake."
)


def run(args: list[str]) -> None:
    from fasttr.config import trl
    from fasttr.config.eval_config import EvalSettings, SamplingSettings
    from fasttr.config.train_config import TrainConfig

    of_run, own = settings_of(TrainConfig), settings_of(EvalSettings)
    read = {name: one for name, one in of_run.items() if one.in_eval}
    shown = [*own.values(), *read.values()]
    parser = arguments.settings_parser("fasttr eval", DESCRIPTION, shown, USAGE)
    words = arguments.read_words(args)
    if words.wants_help:
        parser.parse_args(["--help"])
    flags = arguments.flag_values(
        words.flags,
        known=[*of_run, *own],
        takes_list=trl.takes_list,
        stands_alone=lambda key: key not in own and trl.stands_alone(key),
    )
    _check_names(flags, of_run, read, own)
    words.file.pop("env", None)
    given = trl.merge(words.file, flags)
    of_eval = {name: given.pop(name) for name in list(given) if name in own}
    settings = {k: v for k, v in trl.translate(given)[0].items() if k in read}
    if settings.get("group_size") is not None:
        settings.setdefault("train_batch_size", settings["group_size"])
    values = arguments.typed(parser, {**settings, **_without_none(of_eval)})
    eval_settings = EvalSettings(**{name: values.pop(name) for name in own})
    check_ranges(eval_settings)
    if eval_settings.verdicts is not None:
        _read_verdicts(eval_settings)
        return
    config = TrainConfig(**values)
    if config.model_name_or_path is None:
        raise FasttrError(
            "model_name_or_path: missing; wanted the folder or hub id to measure; --help lists all"
        )
    asked_samples = [name for name in settings_of(SamplingSettings) if name in of_eval]
    if eval_settings.judge is not None:
        _judge(config, eval_settings)
    elif asked_samples:
        _sample(config, eval_settings, asked_samples)
    if not asked_samples or _names_rows(config):
        _measure(config, eval_settings)


def _check_names(flags: dict[str, Any], of_run: Any, read: Any, own: Any) -> None:
    for name in flags:
        if name in of_run and name not in read:
            raise FasttrError(
                f"{name}: fasttr eval trains nothing and does not read it; leave it out"
            )
        near = did_you_mean(name, own)
        if near and name not in own and name not in of_run:
            raise FasttrError(f"unknown key {name!r}{near}; --help lists all")


def _names_rows(config: Any) -> bool:
    named = (config.dataset_name, config.datasets, config.dataset_mixture, config.eval_dataset_name)
    return any(named)


def _without_none(values: dict[str, Any]) -> dict[str, Any]:
    from fasttr.config.trl_values import is_none

    return {name: None if is_none(value) else value for name, value in values.items()}


def _measured(config: Any, anchor: str | None) -> Any:
    from fasttr.evaluation.reward import measure_rewards
    from fasttr.evaluation.standalone import measure
    from fasttr.models.reward import is_reward_folder

    if not is_reward_folder(config.model_name_or_path):
        return measure(config, anchor)
    if anchor is not None or config.loss_type is not None:
        raise FasttrError(
            f"{config.model_name_or_path} is a reward model: its scores are compared with nothing; "
            "leave out anchor_model_name_or_path and loss_type"
        )
    return measure_rewards(config)


def _measure(config: Any, settings: Any) -> None:
    if not _names_rows(config):
        raise FasttrError(
            "dataset_name: missing; wanted the rows to measure: a file, a folder or a hub id"
        )
    measured = _measured(config, settings.anchor_model_name_or_path)
    print(measured.table())
    if settings.output_file is not None:
        measured.write(settings.output_file)


def _sample(config: Any, settings: Any, asked: list[str]) -> None:
    from fasttr.environment import device_for
    from fasttr.rollouts.prompt_file import PromptFile, sample_file

    for key in ("prompts", "samples_file"):
        if getattr(settings, key) is None:
            raise FasttrError(
                f"{key}: missing; samples need --prompts and --samples_file (got "
                f"{', '.join(asked)})"
            )
    model = config.model(device_for(config.use_cpu))
    if settings.samples_format != "lines":
        _answer(config, model, settings)
        return
    written = sample_file(
        model,
        PromptFile(
            Path(settings.prompts),
            Path(settings.samples_file),
            batch_size=settings.sampling_batch_size,
            disable_tqdm=config.disable_tqdm,
        ),
        _sampling(settings),
    )
    print(f"{written} samples in {settings.samples_file}")


def _sampling(settings: Any) -> Any:
    from fasttr.rollouts.sampler import Sampling

    return Sampling(
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        num_samples=settings.num_samples,
        seed=settings.sampling_seed,
    )


def _answer(config: Any, model: Any, settings: Any) -> None:
    """The questions of a benchmark, answered for its judge."""
    from fasttr.evaluation.answers import AnswerFile, write_answers

    name = settings.generator or Path(config.model_name_or_path).resolve().name
    files = AnswerFile(
        questions=Path(settings.prompts),
        target=Path(settings.samples_file),
        kind=settings.samples_format,
        generator=name,
        template=settings.judge_template,
        batch_size=settings.sampling_batch_size,
        disable_tqdm=config.disable_tqdm,
    )
    written = write_answers(model, files, _sampling(settings))
    print(f"answers to {written} questions in {settings.samples_file}")


def _judge(config: Any, settings: Any) -> None:
    from fasttr.environment import device_for
    from fasttr.evaluation.win_rate import win_rate

    if settings.prompts is None:
        raise FasttrError("prompts: missing; a judge needs a file of prompts with a response each")
    device = device_for(config.use_cpu)
    results = win_rate(
        config.model(device),
        settings.prompts,
        settings.judge,
        _sampling(settings),
        batch_size=settings.sampling_batch_size,
        budget=config.token_budget(device),
    )
    _tell([results], settings.results_dir)


def _read_verdicts(settings: Any) -> None:
    from fasttr.config.eval_config import JUDGED_FORMATS
    from fasttr.evaluation.verdicts import read_verdicts

    if settings.verdicts_format is None:
        raise FasttrError(f"verdicts_format: missing; wanted one of {', '.join(JUDGED_FORMATS)}")
    found = read_verdicts(settings.verdicts, settings.verdicts_format, settings.length_control_file)
    _tell(found, settings.results_dir)


def _tell(found: Any, results_dir: str | None) -> None:
    """Print what a judge said, and keep it with a run for its report."""
    from fasttr.metrics.results import estimate, write_results

    for results in found:
        mean = estimate(results.values)
        print(
            f"{results.title}: {mean.mean:.4g} (95 % interval {mean.low:.4g} to {mean.high:.4g}), "
            f"{mean.n} rows"
        )
        if results_dir is None:
            continue
        if not Path(results_dir).is_dir():
            raise FasttrError(f"results_dir: {results_dir} does not exist; wanted a run's folder")
        write_results(Path(results_dir), results)
