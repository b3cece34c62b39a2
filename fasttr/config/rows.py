"""The rows that a configuration names: read, tokenised, in the shape of its loss, and said."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fasttr.batch import TreeSource
from fasttr.config.train_config import TrainConfig
from fasttr.console import say
from fasttr.data.arrow import TreeSet
from fasttr.data.load import encode_rows, is_stream
from fasttr.data.mixture import Part, parse_handbook, parse_parts, read_handbook, read_mixture
from fasttr.data.sources import read_rows
from fasttr.data.unpaired import Unpaired
from fasttr.errors import FasttrError
from fasttr.losses import Loss


class RowReader:
    """Reads the splits of one configuration."""

    def __init__(self, config: TrainConfig, tokenizer: Any):
        self.config = config
        self.tokenizer = tokenizer
        self._splits = _joint_splits(config)

    def train(self, loss: Loss, given: Any = None) -> TreeSource:
        """The rows to train on; `given`: rows in memory, or trees, instead of named ones."""
        if _is_tree_source(given):
            return given
        split = self.config.dataset_train_split
        if given is not None:
            split = "train"
        rows = self._named(split) if given is None else given
        most = _rows_of_the_run(self.config) if is_stream(rows) else None
        return self._encoded(rows, self._name_of(given), split, loss, most)

    def evaluation(self, loss: Loss, given: Any = None) -> dict[str, TreeSource]:
        """The rows to evaluate on, of a file the only split it has: by the name of their set, or
        under "" where there is one without a name."""
        if given is None:
            return {"": self._named_for_evaluation(loss)}
        sets = dict(given) if isinstance(given, Mapping) else {"": given}
        if not sets:
            raise FasttrError("eval_dataset: got an empty mapping; wanted rows under each name")
        return {
            name: rows
            if _is_tree_source(rows)
            else self._encoded(rows, "the rows", name or "eval", loss)
            for name, rows in sets.items()
        }

    def any_split(self, loss: Loss) -> TreeSet:
        """The rows to measure: those to evaluate on, or of a file without a test split all."""
        config = self.config
        has_own = config.eval_dataset_name is not None
        if not has_own and self._splits is not None:
            split = config.dataset_test_split if len(self._splits) > 1 else "train"
            return self._encoded(self._named(split), self._name_of(None), split, loss)
        if not has_own and Path(str(config.dataset_name)).is_file():
            return self._encoded(self._named("train"), self._name_of(None), "train", loss)
        return self._named_for_evaluation(loss)

    def _named_for_evaluation(self, loss: Loss) -> TreeSet:
        name, split = self.config.eval_dataset_name, self.config.dataset_test_split
        if name is None:
            return self._encoded(self._named(split), self._name_of(None), split, loss)
        split = "train" if Path(name).is_file() else split
        rows = read_rows(name, config=self.config.dataset_config, split=split)
        return self._encoded(rows, name, split, loss)

    def _name_of(self, given: Any) -> str:
        """What the rows are called where a person reads of them."""
        if given is not None:
            return "the rows"
        if self.config.dataset_mixture or self.config.datasets:
            return "datasets"
        return str(self.config.dataset_name)

    def _named(self, split: str) -> Any:
        """The rows of a split of the data set, or of the mixture, that the configuration names."""
        config = self.config
        if self._splits is None:
            return read_rows(
                str(config.dataset_name),
                config=config.dataset_config,
                split=split,
                streaming=config.streaming,
            )
        if split not in self._splits:
            raise FasttrError(
                f"dataset_test_split: got {split!r}; the data set has "
                f"{', '.join(map(repr, self._splits))}"
            )
        return self._splits[split]

    def _encoded(
        self, rows: Any, name: str, split: str, loss: Loss, most: int | None = None
    ) -> TreeSet:
        _show_bars(not self.config.disable_tqdm and sys.stderr.isatty())
        data = dataclasses.replace(self.config.data(loss, name, split), most_rows=most)
        trees = encode_rows(self.tokenizer, rows, data)
        for line in trees.report.lines():
            say(line)
        return trees


def as_loss_reads(trees: TreeSource, loss: Loss, config: TrainConfig) -> TreeSource:
    """The rows in the shape of the loss: pairs, chosen sides, or unpaired rows with mismatches."""
    if loss.unpaired and trees.completion_lengths.shape[1] > 2:
        raise FasttrError(
            f"train_dataset: got trees of {trees.completion_lengths.shape[1]} completions; wanted "
            "one with a label, or a pair that is taken apart"
        )
    if loss.unpaired:
        block = None
        if loss.completions > 1:
            block = config.mismatch_size or config.group_rows(loss)
        return Unpaired(
            trees,
            labels=getattr(trees, "labels", None),
            block=block,
            max_length=config.max_length,
            shares=config.dataset_num_proc or 1,
        )
    found = trees.completion_lengths.shape[1]
    if found < loss.completions:
        raise FasttrError(
            "dataset: got unpaired rows; wanted pairs (chosen, rejected) for "
            f"{' + '.join(config.loss_names)}; unpaired rows are for loss_type kto, as in fasttr "
            "kto"
        )
    if found > loss.completions:
        raise FasttrError(
            f"train_dataset: got trees of {found} completions; wanted {loss.completions}, which is "
            "what the loss reads: leave the others out"
        )
    return trees


def reads_a_stream(config: TrainConfig, given: Any) -> bool:
    """Whether the rows to train on come one after the other, so that they cannot be shuffled."""
    return is_stream(given) if given is not None else config.streaming


def _joint_splits(config: TrainConfig) -> dict[str, Any] | None:
    """The splits of a mixture, or of a data set whose test rows are drawn; None where a split is
    read by its name."""
    if config.dataset_mixture:
        return read_handbook(parse_handbook(config.dataset_mixture))
    parts = None
    if config.datasets:
        parts = parse_parts(config.datasets)
    elif config.test_split_size is not None and config.dataset_name is not None:
        split = config.dataset_train_split
        parts = [Part(config.dataset_name, config.dataset_config, split=split)]
    if parts is None:
        return None
    splits = read_mixture(
        parts,
        test_split_size=config.test_split_size,
        seed=config.seed,
        streaming=config.streaming,
    )
    return {config.dataset_train_split: splits.pop("train"), **splits}


def _rows_of_the_run(config: TrainConfig) -> int:
    """How many rows of a stream a run takes."""
    if config.max_steps < 1:
        raise FasttrError(
            "max_steps: missing with streaming; a stream's rows are not counted, so the number of "
            "steps must be given"
        )
    return config.max_steps * config.train_batch_size


def _is_tree_source(rows: Any) -> bool:
    return hasattr(rows, "completion_lengths")


def _show_bars(shown: bool) -> None:
    """The bars of `datasets`, whose tokenising runs under them."""
    if importlib.util.find_spec("datasets") is None:
        return
    from datasets.utils.logging import disable_progress_bar, enable_progress_bar

    if shown:
        enable_progress_bar()
    else:
        disable_progress_bar()
