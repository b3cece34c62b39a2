"""fasttr: preference alignment with a moving reference model.

`fasttr.losses` and `fasttr_kernels` need torch alone; `train`, `TrainConfig`, `TrainResult` and
`Callback` need the extra `train`.
"""

from typing import TYPE_CHECKING, Any

from fasttr.version import __version__

if TYPE_CHECKING:
    from fasttr.config.train_config import TrainConfig
    from fasttr.training.callbacks import Callback
    from fasttr.training.loop import train
    from fasttr.training.whole_run import TrainResult

__all__ = ["Callback", "TrainConfig", "TrainResult", "__version__", "train"]

_HOMES = {
    "Callback": "fasttr.training.callbacks",
    "TrainConfig": "fasttr.config.train_config",
    "TrainResult": "fasttr.training.whole_run",
    "train": "fasttr.training.loop",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fasttr' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
