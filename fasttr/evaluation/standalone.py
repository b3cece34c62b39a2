"""`fasttr eval`: any folder on any split, by itself or against a fixed anchor, every number with
its standard error.

The sums are those of the evaluation inside a run, so that the two agree; standard errors come from
the rows' own log-probs. An anchor does not move: unlike `eval_rewards/*` of a run with a moving
reference, values against the same anchor compare between runs and steps.

Legend: B rows, m completions a row.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fasttr.batch import PackedBatch, TreeSource
from fasttr.config.rows import RowReader, as_loss_reads
from fasttr.config.train_config import TrainConfig
from fasttr.console import Progress
from fasttr.environment import device_for
from fasttr.errors import FasttrError
from fasttr.evaluation.split import EvaluationSplit, evaluate
from fasttr.files import write_json
from fasttr.losses import BaseLoss, Loss, LossInputs
from fasttr.metrics.ledger import PreferenceLedger
from fasttr.metrics.sums import binomial_stderr
from fasttr.models.checks import check_ids
from fasttr.models.choice import Candidate, choose_tier
from fasttr.models.load import ModelConfig, load_model, load_tokenizer, tokenizer_of
from fasttr.models.packed import PackedModel
from fasttr.models.vocabulary import check_rows, check_same_tokens
from fasttr.packing.tiers import longest_sequence
from fasttr.reference.logp_table import LogpTable, fill_logps

ANCHOR_KEY = "anchor_model_name_or_path"


class Measured(NamedTuple):
    """What `fasttr eval` prints and writes."""

    model: str
    anchor: str | None
    dataset: str
    split: str
    rows: int
    settings: dict[str, Any]  # of the loss, where there is one
    metrics: dict[str, float]  # NAME and, where rows are independent, NAME_stderr

    def table(self) -> str:
        head = f"{self.model} on {self.rows} rows of {self.dataset} ({self.split})"
        if self.anchor:
            head += f", against {self.anchor}"
        names = [name for name in self.metrics if not name.endswith("_stderr")]
        width = max(map(len, names))
        lines = [head]
        for name in names:
            line = f"  {name:{width}}  {self.metrics[name]:12.5g}"
            error = self.metrics.get(f"{name}_stderr")
            lines.append(f"{line} +- {error:.2g}" if error else line)
        return "\n".join(lines)

    def write(self, path: str | Path) -> None:
        """The facts and metrics as one JSON object; NaN becomes null."""
        facts = self._asdict()
        finite = {k: v if math.isfinite(v) else None for k, v in self.metrics.items()}
        try:
            write_json(Path(path), {**facts, "metrics": finite})
        except OSError as error:
            raise FasttrError(f"output_file: cannot write {path}: {error}") from error


def measure(config: TrainConfig, anchor: str | None = None) -> Measured:
    """Log-probs of a split by the model of `config`, and by `anchor` (a folder or hub id).

    Of `config` the settings that say `in_eval` are read. Without an anchor and without a
    `loss_type` that needs none, there is no loss and there are no rewards: log-probs, and how often
    the chosen side has the higher one, as a sum and as a mean over tokens. Raises FasttrError as
    training does, and when the anchor's tokenizer is another one.
    """
    device = device_for(config.use_cpu)
    model = config.model(device)
    of_anchor = None
    if anchor is not None:
        of_anchor = dataclasses.replace(config.model(device, anchor), key=ANCHOR_KEY)
    candidates = _candidates(config, model, of_anchor)
    tokenizer = tokenizer_of(model)
    check_rows(model.read(), tokenizer, model.key, model.name)
    if of_anchor is not None:
        of_its_own = load_tokenizer(of_anchor.name, key=ANCHOR_KEY)
        check_same_tokens(tokenizer, of_its_own, ANCHOR_KEY, of_anchor.name)
        check_rows(of_anchor.read(), tokenizer, ANCHOR_KEY, of_anchor.name)
    rows = RowReader(config, tokenizer).any_split(config.loss)
    config, loss = _loss_of(config, rows, has_anchor=anchor is not None)
    trees = as_loss_reads(rows, loss, config)
    tier = choose_tier(config.attention_tier, candidates, longest_sequence(trees)).tier
    split = EvaluationSplit(trees, config.token_budget(device), config.group_rows(loss), tier)
    anchor_logps = None
    if of_anchor is not None:  # one model at a time
        anchor_logps = LogpTable(len(trees), loss.completions)
        with _Bar(config, "scoring by the anchor", trees) as bar:
            fill_logps(_loaded(of_anchor, tier, trees), bar.passing(split), anchor_logps)
        if loss.needs_reference:
            split = dataclasses.replace(split, ref_logps=anchor_logps)
    policy = _loaded(model, tier, trees).requires_grad_(False)
    logps = LogpTable(len(trees), loss.completions)
    with _Bar(config, "evaluating", trees) as bar:
        ledger = PreferenceLedger(loss)
        found = evaluate(policy, split, config.objective(loss), ledger, bar.after(logps))
    metrics = {name.removeprefix("eval_"): value for name, value in found.items()}
    if isinstance(loss, _NoLoss):
        metrics = {k: v for k, v in metrics.items() if "rewards/" not in k and k != "loss"}
    of_rows = _RowValues(trees, loss, config, logps, anchor_logps).by_metric()
    return Measured(
        model=model.name,
        anchor=anchor,
        dataset=rows.report.name,
        split=rows.report.split,
        rows=len(trees),
        settings=_said_of(config, loss),
        metrics=_with_errors(metrics, of_rows),
    )


@dataclass(frozen=True)
class _NoLoss(BaseLoss):
    """Log-probs alone are measured, of pairs or of unpaired rows."""

    needs_reference: ClassVar[bool] = False

    def __call__(self, inputs: LossInputs) -> Tensor:
        return torch.zeros_like(inputs.chosen_logp)


class _NoLossOfUnpaired(_NoLoss):
    completions: ClassVar[int] = 1
    unpaired: ClassVar[bool] = True


def _candidates(
    config: TrainConfig, model: ModelConfig, anchor: ModelConfig | None
) -> list[Candidate]:
    """The models, after what needs no data was refused."""
    if config.loss_type is not None and config.loss.needs_reference and anchor is None:
        raise FasttrError(
            f"{ANCHOR_KEY}: missing, and loss_type {' + '.join(config.loss_names)} compares with "
            "it; give the folder that training started from, or leave loss_type out for log-probs "
            "alone"
        )
    return [Candidate.named(one) for one in (model, anchor) if one is not None]


def _loaded(config: ModelConfig, tier: str, trees: TreeSource) -> PackedModel:
    """A model that has an embedding for every token of the rows."""
    model = load_model(dataclasses.replace(config, tier=tier, is_trained=False))
    check_ids(model, trees.largest_id, config.key, config.name)
    return model


def _loss_of(
    config: TrainConfig, rows: TreeSource, *, has_anchor: bool
) -> tuple[TrainConfig, Loss]:
    if config.loss_type is not None:
        return config, config.loss
    is_unpaired = rows.completion_lengths.shape[1] == 1
    name = "apo_zero_unpaired" if is_unpaired else "sigmoid"
    config = dataclasses.replace(config, loss_type=name)
    if has_anchor:
        return config, config.loss
    return config, _NoLossOfUnpaired() if is_unpaired else _NoLoss()


def _said_of(config: TrainConfig, loss: Loss) -> dict[str, Any]:
    if isinstance(loss, _NoLoss):
        return {}
    return {"loss_type": config.loss_type, "beta": config.beta}


class _Bar:
    """Progress over rows."""

    def __init__(self, config: TrainConfig, what: str, trees: TreeSource):
        self._bar = Progress(what, len(trees), "row", hides_bar=config.disable_tqdm)

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.__exit__(*error)

    def passing(self, split: EvaluationSplit) -> Any:
        for batch in split.packs():
            yield batch
            self._bar.update(len(batch.rows))

    def after(self, table: LogpTable) -> Callable[[PackedBatch, Any], None]:
        """Keep the log-probs of a pack and move on."""

        def keep(batch: PackedBatch, out: Any) -> None:
            table.put(batch.rows, out.logp)
            self._bar.update(len(batch.rows))

        return keep


class _RowValues:
    """A number for every row (or every row of a class) behind each mean with a standard error.

    Rewards are those of `fasttr.metrics.sums`: of log-ratios, or without a reference of mean
    log-probs of a token.
    """

    def __init__(
        self,
        trees: TreeSource,
        loss: Loss,
        config: TrainConfig,
        logps: LogpTable,
        anchor_logps: LogpTable | None,
    ):
        self.trees = trees
        self.loss = loss
        self.objective = config.objective(loss)
        self.logp_Bm = logps.values
        self.anchor_Bm = None if anchor_logps is None else anchor_logps.values

    def by_metric(self) -> dict[str, np.ndarray]:
        mean_Bm = self.logp_Bm / self.trees.completion_lengths[:, : self.logp_Bm.shape[1]]
        reward_Bm = self.loss.beta * mean_Bm
        values = self._of_sides("logps", self.logp_Bm)
        if self.anchor_Bm is not None:
            logratio_Bm = self.logp_Bm - self.anchor_Bm
            values |= self._of_sides("logratios", logratio_Bm)
            if self.loss.needs_reference:
                reward_Bm = self.loss.beta * logratio_Bm
        values |= self._of_sides("rewards", reward_Bm)
        if not self.loss.unpaired and self.logp_Bm.shape[1] == 2:
            values["logps/margins"] = self.logp_Bm[:, 0] - self.logp_Bm[:, 1]
            values["logps/accuracies"] = self.logp_Bm[:, 0] > self.logp_Bm[:, 1]
            values["logps/accuracies_per_token"] = mean_Bm[:, 0] > mean_Bm[:, 1]
            values["rewards/margins"] = reward_Bm[:, 0] - reward_Bm[:, 1]
            values["rewards/accuracies"] = reward_Bm[:, 0] > reward_Bm[:, 1]
        if not self.loss.coupled and not isinstance(self.loss, _NoLoss):
            values["loss"] = self._losses()
        return {name: rows for name, rows in values.items() if len(rows)}

    def _of_sides(self, name: str, values_Bm: np.ndarray) -> dict[str, np.ndarray]:
        if self.loss.unpaired:
            label_B = self.trees.labels  # type: ignore[attr-defined]
            sides = {"chosen": values_Bm[label_B, 0], "rejected": values_Bm[~label_B, 0]}
        else:
            columns = zip(("chosen", "rejected"), values_Bm.T, strict=False)
            sides = dict(columns)
        return {f"{name}/{side}": values for side, values in sides.items()}

    def _losses(self) -> np.ndarray:
        rows = np.arange(len(self.trees))
        trees = [self.trees[row] for row in rows.tolist()]
        step = self.objective.of_rows(self.trees, rows)
        means = step.chosen_tokens_means or dict.fromkeys(rows.tolist(), 1.0)
        m = self.logp_Bm.shape[1]
        counts_Bm = self.trees.completion_lengths[:, :m].astype(np.int64)
        inputs = LossInputs(
            logp=torch.from_numpy(self.logp_Bm).reshape(-1),
            ref_logp=None if self.anchor_Bm is None else torch.from_numpy(self.anchor_Bm).view(-1),
            token_counts=torch.from_numpy(counts_Bm).reshape(-1),
            completions=m,
            labels=torch.tensor([tree.label for tree in trees]),
            chosen_tokens_mean=torch.tensor([means[row] for row in rows.tolist()]),
        )
        weights_B = torch.tensor([tree.weight for tree in trees])
        return (weights_B * self.loss(inputs)).numpy()


def _with_errors(metrics: dict[str, float], of_rows: dict[str, np.ndarray]) -> dict[str, float]:
    """Each metric followed by its standard error, then those that `evaluate` does not report."""
    unreported = [
        name for name in of_rows if name not in metrics and not name.startswith("rewards/")
    ]
    out: dict[str, float] = {}
    for name in [*metrics, *unreported]:
        if name.endswith("_stderr"):
            continue
        values = of_rows.get(name)
        if name in metrics:
            out[name] = metrics[name]
        else:
            out[name] = float(np.mean(of_rows[name], dtype=np.float64))
        if values is not None and values.dtype == bool:
            out[f"{name}_stderr"] = binomial_stderr(out[name], len(values))
        elif values is not None and len(values) > 1:
            spread = float(np.std(values.astype(np.float64), ddof=1))
            out[f"{name}_stderr"] = spread / math.sqrt(len(values))
    return out
