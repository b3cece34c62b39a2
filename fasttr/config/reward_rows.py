"""The rows of ranked completions that a configuration names: read, tokenised and said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fasttr.config.train_config import TrainConfig
from fasttr.console import say
from fasttr.data.load import DataConfig, encode_rows
from fasttr.data.mixture import parse_parts, read_mixture
from fasttr.data.ranked import RankedTrees, encode_ranked
from fasttr.data.sources import read_rows
from fasttr.errors import FasttrError


class RankedReader:
    """Reads the splits of one configuration."""

    def __init__(self, config: TrainConfig, tokenizer: Any):
        self.config = config
        self.tokenizer = tokenizer

    def train(self, given: Any = None) -> RankedTrees:
        """The rows to train on; `given`: rows in memory instead of named ones."""
        return self._read(self.config.dataset_name, self.config.dataset_train_split, given)

    def evaluation(self, given: Any = None) -> RankedTrees:
        """The rows to evaluate on, of a file the only split it has."""
        name, split = self.config.eval_dataset_name, self.config.dataset_test_split
        if given is not None or name is None:
            return self._read(self.config.dataset_name, split, given)
        return self._read(name, "train" if Path(name).is_file() else split, None, is_mixture=False)

    def any_split(self) -> RankedTrees:
        """The rows to measure: those to evaluate on, or of a file without a test split all."""
        config = self.config
        is_file = config.dataset_name is not None and Path(config.dataset_name).is_file()
        if config.eval_dataset_name is None and (is_file or config.datasets):
            return self._read(config.dataset_name, "train", None)
        return self.evaluation()

    def responses(self, name: str) -> Any:
        """Completions one by one, uncut: the chosen sides of pairs, or rows with a completion."""
        data = self._data(name, "train", max_length=None, sides=1)
        return encode_rows(self.tokenizer, read_rows(name, split="train"), data)

    def _read(
        self, name: str | None, split: str, given: Any, *, is_mixture: bool = True
    ) -> RankedTrees:
        config = self.config
        data = self._data(name or "the rows", split, config.max_length)
        if given is not None:
            rows = given
        elif is_mixture and config.datasets:
            splits = read_mixture(
                parse_parts(config.datasets),
                test_split_size=config.test_split_size,
                seed=config.seed,
            )
            if split not in splits:
                raise FasttrError(
                    f"dataset_test_split: got {split!r}; a mixture has "
                    f"{', '.join(map(repr, splits))}"
                )
            rows = splits[split]
        else:
            rows = read_rows(data.name, config=config.dataset_config, split=split)
        trees, lines = encode_ranked(self.tokenizer, rows, data)
        for line in lines:
            say(line)
        return trees

    def _data(self, name: str, split: str, max_length: int | None, sides: int = 2) -> DataConfig:
        config = self.config
        return DataConfig(
            name=name,
            config=config.dataset_config,
            split=split,
            dataset_format=config.dataset_format,
            max_length=max_length,
            columns=config.columns or {},
            drops_identical=config.drop_identical_sides,
            weight_column=config.weight_column if sides == 2 else None,
            sides=sides,
            max_dropped_fraction=config.max_dropped_fraction,
            num_proc=config.dataset_num_proc,
        )
