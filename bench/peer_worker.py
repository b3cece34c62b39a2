"""One provider of `bench peers` in a process of its own: the trainer's own entry point, run turn by
turn.

A turn ends where an optimizer step (or a sweep of the reference) ends; the worker then reports its
seconds and waits until it is its turn again, so that providers alternate on one machine. Between
two turns nothing runs, and what a trainer does between steps (reading, packing, logging, moving the
reference) falls into the next step's turn.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from bench.timing import process_peak_bytes, synchronize


class Turns:
    """The worker's end of the line to the process that gives turns."""

    def __init__(self, device: torch.device):
        # What trainers print goes to stderr: stdout carries the turns.
        self._out = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)
        self.device = device
        self.extra: dict[str, float] = {}
        self._part_began = 0.0
        self._began, self._worked = time.perf_counter(), time.process_time()

    def send(self, kind: str, **values: Any) -> None:
        self._out.write(json.dumps({"kind": kind, **values}) + "\n")

    def ready(self) -> None:
        """Set-up is over; the first turn comes."""
        self.send("ready")
        self._wait()

    def _wait(self) -> None:
        if not sys.stdin.readline():
            raise SystemExit("the coordinating process is gone")
        self.extra = {}
        self._began, self._worked = time.perf_counter(), time.process_time()
        self._part_began = self._began

    def end(self, kind: str) -> None:
        """A turn is over. `extra` holds seconds of named parts of it."""
        synchronize(self.device)
        seconds = time.perf_counter() - self._began
        worked = time.process_time() - self._worked
        peak = process_peak_bytes(self.device)
        self.send(kind, seconds=seconds, cpu_seconds=worked, parts=self.extra, peak_bytes=peak)
        self._wait()

    @contextmanager
    def part(self, name: str):
        self.end_part("")
        yield
        self.end_part(name)

    def end_part(self, name: str) -> None:
        """What ran since the turn or its last part began is the part `name` of it."""
        synchronize(self.device)
        now = time.perf_counter()
        if name:
            self.extra[name] = self.extra.get(name, 0.0) + now - self._part_began
        self._part_began = now


def run_fasttr(spec: dict[str, Any], turns: Turns) -> dict[str, Any]:
    """`fasttr.train` with turns around its steps, its sweeps of the reference and its moves."""
    from fasttr import TrainConfig, train
    from fasttr.models.load import load_tokenizer

    out = Path(spec["out"])
    tokenizer = load_tokenizer(spec["model"])
    began = time.perf_counter()
    trees = _trees(spec, tokenizer)
    tokenise_seconds = time.perf_counter() - began
    config = TrainConfig(
        model_name_or_path=spec["model"],
        output_dir=str(out),
        overwrite_output_dir=True,
        max_length=spec["max_length"],
        beta=spec["beta"],
        train_batch_size=spec["batch"],
        learning_rate=spec["learning_rate"],
        lr_scheduler_type="constant",
        max_steps=spec["steps"],
        seed=spec["seed"],
        adam_epsilon=spec["adam_epsilon"],
        bf16=spec["bf16"],
        use_cpu=spec["device"] == "cpu",
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
        **spec["settings"],
    )
    train(config, tokenizer=tokenizer, train_dataset=trees, callbacks=[_give_turns(turns)])
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "grad_norm" in line]
    return {"losses": losses, "tokenise_seconds": tokenise_seconds}


def _trees(spec: dict[str, Any], tokenizer: Any) -> Any:
    """The rows as fasttr reads them; in memory where the package `datasets` is missing."""
    if importlib.util.find_spec("datasets"):
        from fasttr.data.load import DataConfig, load_trees

        return load_trees(tokenizer, DataConfig(spec["data"], max_length=spec["max_length"]))
    from bench.pairs import read_file
    from fasttr.data.load import DataConfig, encode_rows

    rows = list(read_file(spec["data"]))
    return encode_rows(tokenizer, rows, DataConfig(spec["data"], max_length=spec["max_length"]))


def _give_turns(turns: Turns) -> Any:
    from fasttr import Callback

    class GiveTurns(Callback):
        def on_train_begin(self, run):
            turns.ready()

        def on_window(self, run, window):
            # A later window is scored between two steps: its turn is the next step's.
            if window.start == 0:
                turns.end("score")
            else:
                turns.end_part("score")

        def on_step(self, run, metrics):
            turns.end("step")

        def on_move(self, run):
            turns.end_part("move")

    return GiveTurns()


def run_trl(spec: dict[str, Any], turns: Turns) -> dict[str, Any]:
    """TRL's DPOTrainer with a turn that ends where its optimizer step ends, after its own
    callbacks."""
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer
    from trl.trainer.callbacks import SyncRefModelCallback

    tokenise: list[float] = []
    prepare = DPOTrainer._prepare_dataset

    def timed_prepare(self, *args, **kwargs):
        began = time.perf_counter()
        out = prepare(self, *args, **kwargs)
        tokenise.append(time.perf_counter() - began)
        return out

    DPOTrainer._prepare_dataset = timed_prepare
    sync = SyncRefModelCallback.sync_target_model

    def timed_sync(*args, **kwargs):
        with turns.part("move"):
            sync(*args, **kwargs)

    SyncRefModelCallback.sync_target_model = staticmethod(timed_sync)

    class GiveTurns(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            turns.ready()

        def on_step_end(self, *args, **kwargs):
            turns.end("step")

    began = time.perf_counter()
    rows = load_dataset("json", data_files=spec["data"], split="train")
    reading = time.perf_counter() - began
    model = AutoModelForCausalLM.from_pretrained(spec["model"], dtype=torch.float32)
    reference = AutoModelForCausalLM.from_pretrained(spec["model"], dtype=torch.float32).eval()
    settings = dict(spec["settings"])
    if settings.pop("patched", False):
        from fasttr.integrations.trl import patch

        patch()
    settings.setdefault(
        "gradient_accumulation_steps", spec["batch"] // settings["per_device_train_batch_size"]
    )
    config = DPOConfig(
        output_dir=spec["out"],
        max_length=spec["max_length"],
        beta=spec["beta"],
        learning_rate=spec["learning_rate"],
        lr_scheduler_type="constant",
        max_steps=spec["steps"],
        seed=spec["seed"],
        adam_epsilon=spec["adam_epsilon"],
        bf16=spec["bf16"],
        use_cpu=spec["device"] == "cpu",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=spec["device"] != "cpu",
        **settings,
    )
    trainer = DPOTrainer(
        model=model,
        ref_model=reference,
        args=config,
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(spec["model"]),
    )
    trainer.add_callback(
        GiveTurns()
    )  # after TRL's own, so that its moves of the reference belong to the step
    if len(trainer.train_dataset) != spec["rows"]:
        raise SystemExit(
            f"TRL kept {len(trainer.train_dataset)} of the {spec['rows']} rows that fasttr kept"
        )
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "grad_norm" in line]
    return {"losses": losses, "tokenise_seconds": reading + sum(tokenise)}


def main() -> None:
    spec = json.loads(sys.argv[1])
    device = torch.device(spec["device"])
    if spec["threads"]:
        torch.set_num_threads(spec["threads"])
    turns = Turns(device)
    found = {"fasttr": run_fasttr, "trl": run_trl}[spec["trainer"]](spec, turns)
    turns.send("done", **found)


if __name__ == "__main__":
    main()
