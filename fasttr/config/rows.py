"""The rows that a configuration names: read, tokenised, in the shape of its loss, and said."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

from fasttr.batch import TreeSource
from fasttr.config.train_config import TrainConfig
from fasttr.console import say
from fasttr.data.arrow import TreeSet
from fasttr.data.load import encode_rows, load_trees
from fasttr.data.mixture import parse_parts, read_mixture
from fasttr.data.unpaired import Unpaired
from fasttr.errors import FasttrError
from fasttr.losses import Loss


class RowReader:
    """Reads the splits of one configuration."""

    def __init__(self, config: TrainConfig, tokenizer: Any):
        self.config = config
        self.tokenizer = tokenizer
        self._mixture: dict[str, Any] | None = None
        if config.datasets:
            self._mixture = read_mixture(
                parse_parts(config.datasets),
                test_split_size=config.test_split_size,
                seed=config.seed,
            )

    def train(self, loss: Loss, given: Any = None) -> TreeSource:
        """The rows to train on; `given`: rows in memory, or trees, instead of named ones."""
        config = self.config
        if _is_tree_source(given):
            return given
        return self._read(config.dataset_name, config.dataset_train_split, loss, given)

    def evaluation(self, loss: Loss, given: Any = None) -> TreeSource:
        """The rows to evaluate on, of a file the only split it has."""
        if _is_tree_source(given):
            return given
        if given is not None:
            return self._read(None, "eval", loss, given)
        return self._named_for_evaluation(loss)

    def any_split(self, loss: Loss) -> TreeSet:
        """The rows to measure: those to evaluate on, or of a file without a test split all."""
        config = self.config
        if config.eval_dataset_name is None and self._mixture is not None:
            split = config.dataset_test_split if len(self._mixture) > 1 else "train"
            return self._read(None, split, loss)
        if config.eval_dataset_name is None and Path(str(config.dataset_name)).is_file():
            return self._read(config.dataset_name, "train", loss)
        return self._named_for_evaluation(loss)

    def _named_for_evaluation(self, loss: Loss) -> TreeSet:
        name, split = self.config.eval_dataset_name, self.config.dataset_test_split
        if name is None:
            return self._read(self.config.dataset_name, split, loss)
        split = "train" if Path(name).is_file() else split
        return self._read(name, split, loss, is_mixture=False)

    def _read(
        self,
        name: str | None,
        split: str,
        loss: Loss,
        given: Any = None,
        is_mixture: bool = True,
    ) -> TreeSet:
        _show_bars(not self.config.disable_tqdm and sys.stderr.isatty())
        mixture = self._mixture if is_mixture and given is None else None
        # Both sides of a pair are kept, unless the loss reads the chosen one alone.
        sides = 1 if loss.completions == 1 and not loss.unpaired else 2
        data = self.config.data("datasets" if mixture is not None else name, split, sides)
        if mixture is not None and split not in mixture:
            raise FasttrError(
                f"dataset_test_split: got {split!r}; a mixture has {', '.join(map(repr, mixture))}"
            )
        rows = mixture[split] if mixture is not None else given
        if rows is None:
            trees = load_trees(self.tokenizer, data)
        else:
            trees = encode_rows(self.tokenizer, rows, data)
        for line in trees.report.lines():
            say(line)
        return trees


def as_loss_reads(trees: TreeSource, loss: Loss, config: TrainConfig) -> TreeSource:
    """The rows in the shape of the loss: pairs, chosen sides, or unpaired rows with mismatches."""
    if loss.unpaired:
        block = None
        if loss.completions > 1:
            block = config.mismatch_size or config.group_rows(loss)
        labels = getattr(trees, "labels", None)
        return Unpaired(trees, labels=labels, block=block, max_length=config.max_length)
    if trees.completion_lengths.shape[1] < loss.completions:
        raise FasttrError(
            "dataset: got unpaired rows; wanted pairs (chosen, rejected) for "
            f"{' + '.join(config.loss_names)}"
        )
    return trees


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
