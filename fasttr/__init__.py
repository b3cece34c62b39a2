"""fasttr: preference alignment with a moving reference model.

`fasttr.losses` and `fasttr_kernels` need torch alone; `train` and `TrainConfig` need the extra `train`.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fasttr.config import TrainConfig
    from fasttr.trainer import TrainResult, train

__all__ = ["TrainConfig", "TrainResult", "train"]


def __getattr__(name: str) -> Any:
    if name == "TrainConfig":
        from fasttr.config import TrainConfig

        return TrainConfig
    if name in ("train", "TrainResult"):
        from fasttr import trainer

        return getattr(trainer, name)
    raise AttributeError(f"module 'fasttr' has no attribute {name!r}")
