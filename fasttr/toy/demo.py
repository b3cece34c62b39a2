"""The main job on a default that is part of the package: SFT, then DPO beside TR-DPO, on generated
preferences whose gold reward is known. No download, no GPU.

It repeats a setting of the study by factors (bench/paper/when) at that study's scale. The cell is
the one in which the study's code finds that arms are told apart best, by their KL: the SFT policy
wrote the pairs, and their two sides differ in their first letter. Of the three settings of DPO in
that cell it is the middle one, in label noise and in beta.

Stopped by Ctrl-C, the same command goes on with it.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fasttr.checkpoint.folder import list_checkpoints, step_of
from fasttr.config.train_config import TrainConfig
from fasttr.console import counted, duration, say
from fasttr.errors import FasttrError
from fasttr.files import write_json, write_text
from fasttr.metrics.plots import plot_comparison, plot_run
from fasttr.metrics.results import Results, write_results
from fasttr.models.load import ModelConfig, load_model, load_tokenizer
from fasttr.report.page import FILE as REPORT
from fasttr.report.page import write_report
from fasttr.settings import setting, whole
from fasttr.toy.demo_table import Arm, Reading, table, verdict
from fasttr.toy.judge import Judged, judge
from fasttr.toy.start import COMMON, going_on, supervised_start
from fasttr.toy.task import NOISE, gold_reward, prompts, sft_rows, write_jsonl
from fasttr.toy.writers import labelled_pairs, share_outside, writer_of
from fasttr.training.loop import train
from fasttr.training.stopping import Interrupted

# Of the study's references that move the youngest and the oldest: they trail the policy by 2.5 and
# 13.5 steps on average.
ARMS: dict[str, dict[str, Any]] = {
    "DPO": {"ref_update": "none"},
    "TR-DPO hard": {"ref_update": "hard", "ref_update_every": 6},
    "TR-DPO soft": {"ref_update": "soft", "ref_update_alpha": 0.6, "ref_update_every": 12},
}
WRITER, PART, BETA = "sft", "early", 0.3
WIDTH, SFT_ROWS, PAIRS, HELD_OUT_PAIRS, PROMPTS = 64, 4000, 600, 128, 256
EVALUATIONS = 4  # of each arm
JUDGED = "judged.json"  # of a run: what its checkpoints are worth
MARK = "demo.json"  # says that a folder is a demo's, and with which settings


@dataclass(frozen=True)
class DemoSettings:
    """Demo."""

    output_dir: str = setting(
        "runs/demo",
        None,
        "folder for data, models, metrics and pictures; the same settings go on with a demo in it, "
        "others replace it",
    )
    steps: int = setting(48, whole(1), "optimizer steps of each preference run")
    sft_steps: int = setting(250, whole(1), "optimizer steps of the supervised start")
    seeds: int = setting(
        5, whole(1), "runs of each arm, which differ in pairs, labels, order and samples"
    )
    seed: int = setting(0, None, "first of these seeds, and that of the SFT policy")

    @property
    def folder(self) -> Path:
        return Path(self.output_dir)

    @property
    def every(self) -> int:
        """Steps between evaluations."""
        return max(self.steps // EVALUATIONS, 1)


def demo(settings: DemoSettings) -> None:
    """Run it all and end in a table, a verdict, pictures and a report."""
    try:
        _demo(settings)
    except (Interrupted, KeyboardInterrupt):
        say("the same command goes on with the demo")
        raise


def _demo(settings: DemoSettings) -> None:
    began = time.perf_counter()
    out = _folder(settings)
    if not (out / "sft").exists():
        say(f"\n== SFT: {settings.sft_steps} steps on {SFT_ROWS:,} rows of the task")
    rows = sft_rows(SFT_ROWS, settings.seed)
    sft = supervised_start(out / "sft", rows, settings.sft_steps, width=WIDTH, seed=settings.seed)
    arms = [Arm(name, []) for name in ARMS]
    folders: dict[str, Path] = {}
    for seed in range(settings.seed, settings.seed + settings.seeds):
        data = _pairs(out, sft, seed)
        asked = prompts(PROMPTS, seed, held_out=True)
        start = judge(sft, sft, asked, seed)
        for arm in arms:
            folder = out / f"{arm.name.lower().replace(' ', '-')}-seed-{seed}"
            _train_arm(settings, arm.name, folder, data, seed)
            arm.readings.append(_judge_run(settings, folder, asked, start, seed))
            folders.setdefault(arm.name, folder)
            if seed == settings.seed:
                seconds = time.perf_counter() - began
                say(f"pictures: {plot_run(folder)[0].parent}, after {duration(seconds)}")
    pictures = plot_comparison(folders, out / "plots")
    text = "\n\n".join([table(arms), *verdict(arms)])
    write_text(out / "table.md", text + "\n")
    of_all = f"Over {counted(settings.seeds, 'seed')}:\n\n{text}\n\nBelow: the first seed's runs."
    report = write_report(list(folders.values()), out / REPORT, preface=of_all)
    say("\n" + text)
    _show_example(prompts(PROMPTS, settings.seed, held_out=True), arms)
    seconds = time.perf_counter() - began
    say(f"\npictures: {pictures[0].parent}; report: {report}; {duration(seconds)} in all")


def _folder(settings: DemoSettings) -> Path:
    """The folder of this demo, made or gone on with; that of another demo is replaced."""
    out = settings.folder
    mark = out / MARK
    if out.exists() and not mark.exists() and any(out.iterdir()):
        raise FasttrError(
            f"output_dir: {out} holds something that is not a demo; wanted a new or empty folder"
        )
    told = dataclasses.asdict(settings)
    if mark.exists() and json.loads(mark.read_text()) == told:
        say(f"going on with the demo in {out}")
        return out
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    write_json(mark, told)
    return out


def _pairs(out: Path, sft: Path, seed: int) -> dict[str, Path]:
    """Files of pairs to train on and of held-out ones: both sides are the SFT policy's."""
    found = {split: out / f"{split}-seed-{seed}.jsonl" for split in ("train", "test")}
    if all(path.exists() for path in found.values()):
        return found
    say(
        f"\n== pairs of seed {seed}: {PAIRS} and {HELD_OUT_PAIRS} held-out ones from the SFT policy"
    )
    writer = writer_of(WRITER, load_model(ModelConfig(str(sft))), load_tokenizer(str(sft)))
    own = 1000 * seed
    rows = labelled_pairs(writer, PART, NOISE, PAIRS, own, held_out=False)
    write_jsonl(rows, found["train"])
    rows = labelled_pairs(writer, PART, NOISE, HELD_OUT_PAIRS, own + 50, held_out=True)
    write_jsonl(rows, found["test"])
    return found


def _train_arm(
    settings: DemoSettings, name: str, folder: Path, data: dict[str, Path], seed: int
) -> None:
    if (folder / JUDGED).exists():
        return
    every = settings.every
    say(f"\n== {name}, seed {seed}: {settings.steps} steps")
    train(
        TrainConfig(
            model_name_or_path=str(settings.folder / "sft"),
            dataset_name=str(data["train"]),
            eval_dataset_name=str(data["test"]),
            output_dir=str(folder),
            max_steps=settings.steps,
            train_batch_size=16,
            learning_rate=2e-4,
            warmup_steps=5,
            lr_scheduler_type="constant_with_warmup",
            loss_type="sigmoid",
            beta=BETA,
            eval_strategy="steps",
            eval_steps=every,
            eval_on_start=True,
            save_strategy="steps",
            save_steps=every,
            logging_steps=max(every // 2, 1),
            seed=seed,
            **going_on(folder),
            **COMMON,
            **ARMS[name],
        )
    )


def _judge_run(
    settings: DemoSettings, folder: Path, asked: list[str], start: Judged, seed: int
) -> Reading:
    """Judge every checkpoint, once, and add what is found to the run's metrics. One that Ctrl-C
    left between two evaluations is none of them: a run that was stopped is judged as any other."""
    kept = folder / JUDGED
    if not kept.exists():
        judged = {0: start}
        for checkpoint in list_checkpoints(folder):
            step = step_of(checkpoint)
            assert step is not None
            if step % settings.every == 0 or step == settings.steps:
                judged[step] = judge(checkpoint, settings.folder / "sft", asked, seed)
        last = judged[max(judged)]
        rows = f"{len(asked)} held-out prompts, the first {asked[0]}"
        golds = [gold_reward(*pair) for pair in zip(asked, last.completions, strict=True)]
        _add_to_metrics(folder, judged)
        write_results(
            folder,
            Results("gold_reward", "gold reward of samples", rows, golds, max(judged)),
        )
        found = {
            "rows": [_row(step, asked, one) for step, one in judged.items()],
            "completions": last.completions,
        }
        write_json(kept, found)
    return Reading.of(folder, json.loads(kept.read_text()))


def _row(step: int, asked: list[str], judged: Judged) -> dict[str, float]:
    return {
        "step": step,
        "gold": judged.gold.value,
        "kl": judged.kl.value,
        "outside": share_outside(WRITER, asked, judged.completions),
        "length": judged.length,
    }


def _add_to_metrics(folder: Path, judged: dict[int, Judged]) -> None:
    with (folder / "metrics.jsonl").open("a") as file:
        for step, found in judged.items():
            line = {
                "step": step,
                "eval_gold_reward": found.gold.value,
                "eval_gold_reward_stderr": found.gold.stderr,
                "eval_kl_to_initial": found.kl.value,
                "eval_kl_to_initial_stderr": found.kl.stderr,
                "eval_length": found.length,
            }
            file.write(json.dumps(line) + "\n")


def _show_example(asked: list[str], arms: list[Arm]) -> None:
    """What the arms of the first seed answer to one prompt."""
    shown = {arm.name: arm.readings[0].completions for arm in arms}
    place = _telling(list(shown.values()))
    say(f"\nfor example, in the first seed: {asked[place]}")
    for name, completions in shown.items():
        say(f"  {name:12} {_visible(completions[place])}")


def _telling(of_arms: list[Sequence[str]]) -> int:
    """The first prompt that all arms answer in characters, and not alike; else the first."""
    for place, texts in enumerate(zip(*of_arms, strict=True)):
        if len(set(texts)) > 1 and all(text.isascii() and text.isprintable() for text in texts):
            return place
    return 0


def _visible(text: str) -> str:
    return "".join(one if one.isascii() and one.isprintable() else "?" for one in text)
