"""fasttr: preference alignment with a moving reference model.

`fasttr.losses` and `fasttr_kernels` need torch alone; `train` and `TrainConfig` need the extra
`train`.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fasttr.config.train_config import TrainConfig
    from fasttr.training.loop import TrainResult, train

__all__ = ["TrainConfig", "TrainResult", "train"]


def __getattr__(name: str) -> Any:
    if name == "TrainConfig":
        from fasttr.config.train_config import TrainConfig

        return TrainConfig
    if name in ("train", "TrainResult"):
        from fasttr.training import loop

        return getattr(loop, name)
    raise AttributeError(f"module 'fasttr' has no attribute {name!r}")
