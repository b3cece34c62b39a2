"""Metrics of reward models by hand."""

from types import SimpleNamespace

import pytest
import torch

from fasttr.losses.reward import RewardLoss
from fasttr.metrics.ledger import RewardLedger


def test_metrics_of_ranked_completions_by_hand():
    """Two rows of three completions, the best first; three and two of their orders hold."""
    score = torch.tensor([[2.0, 0.5, -1.0], [0.2, 0.7, 0.1]])
    pack = SimpleNamespace(weights=torch.tensor([1.0, 0.25]))
    out = SimpleNamespace(score=score, loss=torch.tensor(0.625))
    ledger = RewardLedger(RewardLoss(completions=3), has_weights=True)

    total = ledger.merged(ledger.zeros(score.device), ledger.of_pack(out, None, pack))
    means = dict(zip(ledger.names, ledger.means(total)[0].tolist(), strict=True))

    assert ledger.metrics(means) == {
        "loss": 0.625,
        "mean_reward": pytest.approx((1.5 / 3 + 1.0 / 3) / 2),
        "accuracy": pytest.approx((1 + 2 / 3) / 2),
        "margin": pytest.approx((3.0 + 0.1) / 2),
        "min_reward": -1.0,
        "max_reward": 2.0,
        "weights/ess": pytest.approx(1.25**2 / 1.0625),
        "weights/max_share": pytest.approx(0.8),
    }
