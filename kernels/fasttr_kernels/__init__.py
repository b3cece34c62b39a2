"""Fused ops for preference alignment with a moving reference model. They need torch, and Triton on
a GPU."""

from fasttr_kernels.adamw import SplitAdamW, clip_factor
from fasttr_kernels.lerp import multi_tensor_lerp_
from fasttr_kernels.logprob import Logprob, linear_logprob
from fasttr_kernels.padded import from_padded, halves
from fasttr_kernels.policy import linear_policy_loss
from fasttr_kernels.preference import PreferenceLoss, linear_preference_loss

__all__ = [
    "Logprob",
    "PreferenceLoss",
    "SplitAdamW",
    "clip_factor",
    "from_padded",
    "halves",
    "linear_logprob",
    "linear_policy_loss",
    "linear_preference_loss",
    "multi_tensor_lerp_",
]
