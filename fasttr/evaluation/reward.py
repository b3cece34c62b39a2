"""`fasttr eval` of a reward model: how well its scores order the completions of a split, every
number with its standard error."""

from __future__ import annotations

import math

import numpy as np
import torch

from fasttr.config.reward_rows import RankedReader
from fasttr.config.train_config import TrainConfig
from fasttr.environment import device_for
from fasttr.evaluation.standalone import Measured
from fasttr.losses.reward import MARGIN, RewardInputs, accuracy, reward_loss
from fasttr.models.load import load_tokenizer
from fasttr.models.reward import load_scorer, score_all


def measure_rewards(config: TrainConfig) -> Measured:
    """Accuracy, loss, margin and scores of a split; of `config` what says `in_eval` is read.

    Rows count alike, whatever their weights. Raises FasttrError as training does.
    """
    device = device_for(config.use_cpu)
    model = config.model(device)
    tokenizer = load_tokenizer(model.name)
    trees = RankedReader(config, tokenizer).any_split()
    score_nm = score_all(load_scorer(model), trees, config.token_budget(device))
    margin = [trees[row].per_completion.get(MARGIN, [0.0])[0] for row in range(len(trees))]
    scores = torch.from_numpy(score_nm)
    m = scores.shape[1]
    margins = torch.tensor(margin) if m == 2 else None
    of_rows = {
        "loss": reward_loss(m)(RewardInputs(scores.reshape(-1), m, margins)),
        "accuracy": accuracy(scores),
        "margin": scores[:, 0] - scores[:, -1],
        "mean_reward": scores.mean(dim=1),
    }
    metrics: dict[str, float] = {}
    for name, values in of_rows.items():
        metrics[name] = float(values.double().mean())
        if len(values) > 1:
            metrics[f"{name}_stderr"] = float(values.double().std()) / math.sqrt(len(values))
    metrics["min_reward"] = float(np.min(score_nm))
    metrics["max_reward"] = float(np.max(score_nm))
    return Measured(
        model=model.name,
        anchor=None,
        dataset=str(config.eval_dataset_name or config.dataset_name or "datasets"),
        split=config.dataset_test_split,
        rows=len(trees),
        settings={},
        metrics=metrics,
    )
