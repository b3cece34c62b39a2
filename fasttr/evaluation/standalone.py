"""`fasttr eval`: any folder on any split, by itself or against a fixed anchor, every number with
its standard error.

The sums are those of the evaluation inside a run (`fasttr.evaluate`), so that the two agree;
standard errors come from the rows' own log-probs. An anchor does not move: unlike `eval_rewards/*`
of a run with a moving reference, values against the same anchor compare between runs and steps.

Legend: B rows, M completions a row.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from fasttr.batch import PackedBatch, TreeSource
from fasttr.config.train_config import TrainConfig
from fasttr.data.load import TreeSet
from fasttr.data.mixture import parse_parts, read_mixture
from fasttr.errors import FasttrError
from fasttr.losses import Loss, Scored, Weighted
from fasttr.metrics.sums import Averages, binomial_stderr
from fasttr.models.load import load_config, load_model, load_tokenizer
from fasttr.models.packed import PackedModel
from fasttr.packing.plan import Plan
from fasttr.reference.moving import ScoreTable
from fasttr.training import setup as runs
from fasttr.training.evaluate import evaluate, pack_split

# The settings of a run that have a meaning here; the rest are about training.
SETTINGS = (
    "model_name_or_path",
    "dataset_name",
    "datasets",
    "test_split_size",
    "eval_dataset_name",
    "seed",
    "dataset_config",
    "dataset_test_split",
    "dataset_format",
    "dataset_num_proc",
    "weight_column",
    "max_length",
    "max_dropped_fraction",
    "loss_type",
    "loss_weights",
    "beta",
    "label_smoothing",
    "f_divergence_type",
    "f_alpha_divergence_coef",
    "ld_alpha",
    "discopop_tau",
    "simpo_gamma",
    "desirable_weight",
    "undesirable_weight",
    "group_size",
    "train_batch_size",
    "max_tokens_per_batch",
    "bf16",
    "attn_implementation",
    "use_liger_kernel",
    "use_cpu",
    "disable_tqdm",
)


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
        head += f", against {self.anchor}" if self.anchor else ""
        names = [name for name in self.metrics if not name.endswith("_stderr")]
        width = max(map(len, names))
        lines = [head]
        for name in names:
            error = self.metrics.get(f"{name}_stderr")
            lines.append(
                f"  {name:{width}}  {self.metrics[name]:12.5g}"
                + (f" +- {error:.2g}" if error else "")
            )
        return "\n".join(lines)


@dataclass(frozen=True)
class _Unjudged(Loss):
    """No loss: log-probs alone are measured, of pairs or of unpaired rows."""

    needs_reference: ClassVar[bool] = False

    def __call__(self, scored: Scored) -> Tensor:
        return torch.zeros_like(scored.chosen)


class _UnjudgedRows(_Unjudged):
    completions: ClassVar[int] = 1
    unpaired: ClassVar[bool] = True


def measure(config: TrainConfig, anchor: str | None = None) -> Measured:
    """Score a split by the model of `config`, and by `anchor` (a folder or hub id) where there is
    one.

    Of `config` the settings in `SETTINGS` are read. Without an anchor and without a `loss_type`
    that needs none, there
    is no loss and there are no rewards: log-probs, and how often the chosen side has the higher
    one, as a sum and as a mean over tokens. Raises FasttrError as training does, and when the
    anchor's tokenizer is another one.
    """
    asked = config.loss_type is not None
    if asked and config.loss.needs_reference and anchor is None:
        raise FasttrError(
            f"anchor_model_name_or_path: missing, and loss_type {config.loss_name} compares with "
            "it; give the folder "
            "that training started from, or leave loss_type out for log-probs alone"
        )
    device = torch.device("cuda" if torch.cuda.is_available() and not config.use_cpu else "cpu")
    bf16 = config.bf16 if config.bf16 is not None else device.type == "cuda"
    for name in (config.model_name_or_path, *([anchor] if anchor else ())):
        load_config(name)
    tokenizer = load_tokenizer(config.model_name_or_path)
    if anchor is not None:
        _require_same_tokens(tokenizer, anchor)
    rows = _read(config, tokenizer)
    loss: Loss | Weighted | None = None
    if not asked:
        unpaired = rows.completion_lengths.shape[1] == 1
        config = dataclasses.replace(
            config, loss_type="apo_zero_unpaired" if unpaired else "sigmoid"
        )
        if anchor is None:
            loss = _UnjudgedRows() if unpaired else _Unjudged()
    trees = runs.as_loss_reads(rows, config)
    loss = config.loss if loss is None else loss
    options: dict[str, Any] = {
        "device": device,
        "bf16": bf16,
        "attn_implementation": config.attn_implementation,
        "max_length": config.max_length,
        "use_liger_kernel": bool(config.use_liger_kernel),
        "ld_alpha": config.ld_alpha,
    }
    plan = Plan(
        trees,
        config.train_batch_size,
        1.0,
        -1,
        config.seed,
        config.token_budget(device),
        group_rows=config.group_rows,
    )
    policy_scores, anchor_scores = (ScoreTable(len(trees), loss.completions) for _ in range(2))
    run = runs.Run(
        config=config,
        device=device,
        bf16=bf16,
        tokenizer=tokenizer,
        loss=loss,
        train_trees=trees,
        eval_trees=trees,
        plan=plan,
        policy=None,
        reference=None,
        optimizer=None,
        scheduler=None,
        scores=policy_scores,  # type: ignore[arg-type]
        eval_scores=anchor_scores if anchor is not None and loss.needs_reference else None,
        anchor=None,
        averages=Averages(device),
        total_loss=torch.zeros(()),
    )
    if anchor is not None:  # one model at a time
        _score(run, load_model(anchor, **options), anchor_scores)
    run.policy = load_model(config.model_name_or_path, **options).requires_grad_(False)
    metrics = evaluate(run, _progress(run, "Evaluating"), keep=policy_scores)
    if isinstance(loss, _Unjudged):
        metrics = {
            name: value
            for name, value in metrics.items()
            if "rewards/" not in name and name != "eval_loss"
        }
    of_rows = _row_values(
        run, policy_scores.values, anchor_scores.values if anchor is not None else None
    )
    return Measured(
        config.model_name_or_path,
        anchor,
        rows.report.name,
        rows.report.split,
        len(trees),
        {} if isinstance(loss, _Unjudged) else {"loss_type": config.loss_type, "beta": config.beta},
        _with_errors(
            {name.removeprefix("eval_"): value for name, value in metrics.items()}, of_rows
        ),
    )


def _read(config: TrainConfig, tokenizer: Any) -> TreeSet:
    """The split that a run with these settings evaluates on; of a file the only one it has."""
    name, split = config.eval_dataset_name or config.dataset_name, config.dataset_test_split
    if config.datasets and config.eval_dataset_name is None:
        parts = parse_parts(config.datasets)
        mixture = read_mixture(parts, test_split_size=config.test_split_size, seed=config.seed)
        return runs.load_rows(
            config, tokenizer, None, split if len(mixture) > 1 else "train", mixture
        )
    return runs.load_rows(
        config, tokenizer, name, "train" if Path(str(name)).is_file() else split, None
    )


def write_json(measured: Measured, path: str | Path) -> None:
    """The facts and metrics as one JSON object, written aside and renamed; NaN becomes null."""
    facts = measured._asdict()
    facts["metrics"] = {
        name: value if math.isfinite(value) else None for name, value in measured.metrics.items()
    }
    path = Path(path)
    aside = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        os.replace(aside, path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise FasttrError(f"output_file: cannot write {path}: {error}") from error


def _progress(run: runs.Run, what: str) -> Iterator[PackedBatch]:
    with tqdm(
        total=len(run.train_trees),
        desc=what,
        unit="row",
        leave=False,
        disable=run.config.disable_tqdm or None,
    ) as bar:
        for batch in pack_split(run):
            yield batch
            bar.update(len(batch.rows))


def _score(run: runs.Run, model: PackedModel, table: ScoreTable) -> None:
    for batch in _progress(run, "Scoring the anchor"):
        table.put(batch.rows, model.score(batch))


def _require_same_tokens(tokenizer: Any, anchor: str) -> None:
    other = load_tokenizer(anchor)
    if other.get_vocab() != tokenizer.get_vocab():
        raise FasttrError(
            f"anchor_model_name_or_path: {anchor} has another vocabulary, so its log-probs are of "
            "other tokens; wanted "
            "a model with the same tokenizer"
        )


def _row_values(
    run: runs.Run, logp_BM: np.ndarray, anchor_BM: np.ndarray | None
) -> dict[str, np.ndarray]:
    """A number for every row (or every row of a class) behind each mean whose standard error is
    known.

    Rewards are those of `fasttr.metrics`: of log-ratios, or without a reference of mean log-probs
    of a token.
    """
    trees: TreeSource = run.train_trees
    length_BM = trees.completion_lengths[:, : logp_BM.shape[1]]

    def sides(x_BM: np.ndarray) -> dict[str, np.ndarray]:
        if run.loss.unpaired:
            label_B = trees.labels  # type: ignore[attr-defined]
            return {"chosen": x_BM[label_B, 0], "rejected": x_BM[~label_B, 0]}
        return {name: x_BM[:, i] for i, name in enumerate(("chosen", "rejected")[: x_BM.shape[1]])}

    mean_BM = logp_BM / length_BM
    ratio_BM = None if anchor_BM is None else logp_BM - anchor_BM
    reward_BM = run.loss.beta * (
        ratio_BM if ratio_BM is not None and run.loss.needs_reference else mean_BM
    )
    values = {f"logps/{name}": x for name, x in sides(logp_BM).items()}
    values |= (
        {f"logratios/{name}": x for name, x in sides(ratio_BM).items()}
        if ratio_BM is not None
        else {}
    )
    values |= {f"rewards/{name}": x for name, x in sides(reward_BM).items()}
    if not run.loss.unpaired and logp_BM.shape[1] == 2:
        values["logps/margins"] = logp_BM[:, 0] - logp_BM[:, 1]
        values["logps/accuracies"] = logp_BM[:, 0] > logp_BM[:, 1]
        values["logps/accuracies_per_token"] = mean_BM[:, 0] > mean_BM[:, 1]
        values["rewards/margins"] = reward_BM[:, 0] - reward_BM[:, 1]
        values["rewards/accuracies"] = reward_BM[:, 0] > reward_BM[:, 1]
    if not run.loss.coupled and not isinstance(run.loss, _Unjudged):
        values["loss"] = _row_losses(run, logp_BM, anchor_BM)
    return {name: x for name, x in values.items() if len(x)}


def _row_losses(run: runs.Run, logp_BM: np.ndarray, anchor_BM: np.ndarray | None) -> np.ndarray:
    trees, rows = run.train_trees, np.arange(len(run.train_trees))
    means = run.chosen_tokens_means(trees, rows)
    m = logp_BM.shape[1]
    trees_B: Sequence[Any] = [trees[row] for row in rows.tolist()]
    scored = Scored(
        torch.from_numpy(logp_BM).reshape(-1),
        None if anchor_BM is None else torch.from_numpy(anchor_BM).reshape(-1),
        torch.from_numpy(trees.completion_lengths[:, :m].astype(np.int64)).reshape(-1),
        m,
        torch.tensor([tree.label for tree in trees_B]),
        torch.tensor([means[row] for row in rows.tolist()]),
    )
    return (torch.tensor([tree.weight for tree in trees_B]) * run.loss(scored)).numpy()


def _with_errors(metrics: dict[str, float], of_rows: dict[str, np.ndarray]) -> dict[str, float]:
    """Each metric followed by its standard error, then those that `evaluate` does not report."""
    out: dict[str, float] = {}
    for name in [
        *metrics,
        *(name for name in of_rows if name not in metrics and not name.startswith("rewards/")),
    ]:
        if name.endswith("_stderr"):
            continue
        values = of_rows.get(name)
        out[name] = (
            metrics[name] if name in metrics else float(np.mean(of_rows[name], dtype=np.float64))
        )
        if values is None:
            continue
        if values.dtype == bool:
            out[f"{name}_stderr"] = binomial_stderr(out[name], len(values))
        elif len(values) > 1:
            out[f"{name}_stderr"] = float(np.std(values.astype(np.float64), ddof=1)) / math.sqrt(
                len(values)
            )
    return out
