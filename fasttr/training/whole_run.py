"""A run from its set-up to its end: its processes, its folder, its log, and what is given back."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fasttr import files
from fasttr.config.train_config import TrainConfig
from fasttr.console import say, silent
from fasttr.distributed.ranks import Ranks, joined
from fasttr.errors import FasttrError
from fasttr.metrics.log import MetricsLog, NoLog
from fasttr.models.given import give_back
from fasttr.optim import update
from fasttr.training import checkpoints
from fasttr.training.callbacks import Callback, Callbacks
from fasttr.training.hub import hub_callbacks
from fasttr.training.run import Run
from fasttr.training.stopping import StopSignal


class TrainResult(NamedTuple):
    """What a finished run returns."""

    output_dir: Path
    steps: int
    metrics: dict[str, float]  # of the last line of training steps, and the totals
    model: Any  # the transformers model that was trained, in peft's with use_peft
    tokenizer: Any


def to_the_end(
    config: TrainConfig,
    set_up: Callable[[Ranks], Any],
    callbacks: Sequence[Callback],
    loop: Callable[..., Any],
    takes_ranks: bool = False,
) -> TrainResult:
    """Set a run up, alone in its folder, and train until it is over.

    `loop` makes of the run, its log, a stop signal and callbacks what has `all_steps`. FasttrError
    for several processes, or an adapter, where the run is not one that `takes_ranks`.
    """
    wanted = config.sharding()
    launched = joined(config.use_cpu, config.ddp_timeout, wanted.shard_size)
    with launched as ranks, silent(not ranks.is_first):
        if not takes_ranks:
            _require_plain(config, ranks)
        told = [*callbacks, *(hub_callbacks(config) if ranks.is_first else ())]
        return _to_the_end(config, set_up, Callbacks(told), loop, ranks)


def _to_the_end(
    config: TrainConfig,
    set_up: Callable[[Ranks], Any],
    callbacks: Callbacks,
    loop: Callable[..., Any],
    ranks: Ranks,
) -> TrainResult:
    with StopSignal() as stop, _alone_in(config, ranks):
        run = set_up(ranks)
        if checkpoints.is_finished(run):
            say(f"nothing to do: {run.output_dir} holds this run's end, step {run.step}")
            _give_back(run)
            return TrainResult(
                run.output_dir, run.step, {}, run.policy.trained_model, run.tokenizer
            )
        checkpoints.own_output_dir(run)
        log: MetricsLog | NoLog = NoLog()
        with ranks.together():
            if ranks.is_first:
                log = MetricsLog(
                    run.output_dir,
                    config.trackers(),
                    keep_until=run.step if run.is_resumed else None,
                    settings=run.config.as_dict(),
                )
        try:
            return loop(run, log, stop, callbacks).all_steps()
        finally:
            log.close()
            _give_back(run)


def _give_back(run: Run) -> None:
    """The model as it was found, with its trained weights in fp32; a divided one stays so."""
    if run.policy.shards is None:
        update.give_back(run.optimizer)
    give_back(run.policy)


def _require_plain(config: TrainConfig, ranks: Ranks) -> None:
    if ranks.world > 1:
        raise FasttrError(
            f"num_processes: got {ranks.world}; only runs on rows of preferences (fasttr train, "
            "dpo, kto, sft) have several processes: start one"
        )
    if config.use_peft:
        raise FasttrError(
            "use_peft: got true; only runs on rows of preferences (fasttr train, dpo, kto, sft) "
            "train an adapter: leave it out"
        )


@contextlib.contextmanager
def _alone_in(config: TrainConfig, ranks: Ranks) -> Iterator[None]:
    """No other run writes into the output folder while this one does."""
    lock = None
    with ranks.together():
        if ranks.is_first:
            lock = _lock(config)
    try:
        yield
    finally:
        if lock is not None:
            lock.release()


def _lock(config: TrainConfig) -> files.FolderLock:
    try:
        return files.FolderLock(config.output_folder)
    except BlockingIOError as error:
        raise FasttrError(
            f"output_dir: another run is writing into {config.output_dir}; wait for it, or take "
            "another folder"
        ) from error
    except FileExistsError as error:
        raise FasttrError(
            f"output_dir: {config.output_dir} is a file; wanted a folder, new or of this run"
        ) from error
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise FasttrError(f"output_dir: cannot write {config.output_dir!r}: {error}") from error
