"""Rewards to advantages, and estimates of a KL: vectors in, vectors out, with torch alone.

A reward that is NaN was not given: it leaves every baseline and its advantage is 0.

Legend: N = B m completions, m of a prompt side by side; R tokens, completion after completion.
"""

from __future__ import annotations

import torch
from torch import Tensor

EPSILON = 1e-4  # beside a standard deviation, as in TRL


def leave_one_out(reward_N: Tensor, m: int, *, normalize: bool = False) -> Tensor:
    """(N,) reward minus the mean of the other rewards of its prompt (arXiv:2402.14740); with
    `normalize` of mean 0 and deviation 1 over those that have others."""
    reward_Bm = reward_N.view(-1, m)
    known_B1 = (~reward_Bm.isnan()).sum(dim=1, keepdim=True)
    others_Bm = (reward_Bm.nansum(dim=1, keepdim=True) - reward_Bm) / (known_B1 - 1)
    # The sum less a lone reward may leave a rounding: it is no other's.
    others_Bm = others_Bm.masked_fill(known_B1 < 2, torch.nan)
    found_N = (reward_Bm - others_Bm).view(-1)
    if normalize:
        found_N = (found_N - found_N.nanmean()) / (nan_std(found_N[None]) + EPSILON)
    return found_N.nan_to_num(nan=0.0)


def group_relative(reward_N: Tensor, m: int, scale: str = "group") -> Tensor:
    """(N,) reward minus the mean of its prompt, over the standard deviation of the prompt (`group`,
    arXiv:2402.03300), of all (`batch`), or over nothing (`none`, arXiv:2503.20783)."""
    reward_Bm = reward_N.view(-1, m)
    centred_Bm = reward_Bm - reward_Bm.nanmean(dim=1, keepdim=True)
    if scale == "group":
        centred_Bm = centred_Bm / (nan_std(reward_Bm)[:, None] + EPSILON)
    elif scale == "batch":
        centred_Bm = centred_Bm / (nan_std(reward_N[None]) + EPSILON)
    return centred_Bm.reshape(-1).nan_to_num(nan=0.0)


def nan_std(x_Bm: Tensor) -> Tensor:
    """(B,) standard deviation of each row with one degree of freedom less, NaN left out; 0 where
    fewer than two are known."""
    known_B = (~x_Bm.isnan()).sum(dim=1)
    centred_Bm = x_Bm - x_Bm.nanmean(dim=1, keepdim=True)
    variance_B = (centred_Bm**2).nansum(dim=1) / (known_B - 1).clamp(min=1)
    return variance_B.sqrt()


def share_without_spread(x_Bm: Tensor) -> float:
    """Share of the rows in which two or more are known, and all of them equal."""
    known_B = (~x_Bm.isnan()).sum(dim=1)
    return float(((known_B > 1) & (nan_std(x_Bm) < 1e-8)).double().mean())


def generalised(
    reward_R: Tensor, value_R: Tensor, lengths_N: Tensor, gamma: float, lam: float
) -> Tensor:
    """(R,) advantages of tokens (arXiv:1506.02438): sum_k (gamma lam)^k delta_{t+k} within a
    completion, delta_t = reward_t + gamma value_{t+1} - value_t, the value after its end 0."""
    is_token_NL = torch.arange(int(lengths_N.max()))[None] < lengths_N[:, None]
    reward_NL, value_NL = (
        x_R.new_zeros(is_token_NL.shape).masked_scatter(is_token_NL, x_R)
        for x_R in (reward_R, value_R)
    )
    after_NL = torch.cat([value_NL[:, 1:], torch.zeros_like(value_NL[:, :1])], dim=1)
    delta_NL = reward_NL + gamma * after_NL - value_NL
    advantage_NL = delta_NL.clone()
    for t in range(delta_NL.shape[1] - 2, -1, -1):
        # Behind a completion's end there are zeros alone.
        advantage_NL[:, t] += gamma * lam * advantage_NL[:, t + 1]
    return advantage_NL[is_token_NL]


def token_rewards(score_N: Tensor, penalty_R: Tensor, lengths_N: Tensor) -> Tensor:
    """(R,) what PPO takes as the reward of a token: minus its penalty, and at the last token of a
    completion its score as well."""
    reward_R = -penalty_R
    reward_R[lengths_N.cumsum(0) - 1] += score_N
    return reward_R


def whitened(x_R: Tensor, kept_R: Tensor, keeps_mean: bool = False) -> Tensor:
    """(R,) of deviation 1, and of mean 0 unless it is kept, over those that are kept (bool); 0
    where none is."""
    if not bool(kept_R.any()):
        return torch.zeros_like(x_R)
    known = x_R[kept_R]
    mean = known.mean()
    found = (x_R - mean) * torch.rsqrt(known.var(unbiased=False) + 1e-8)
    return found + mean if keeps_mean else found


def explained_variance(value_R: Tensor, target_R: Tensor) -> float:
    """1 - Var(target - value) / Var(target): 1 for a critic that is right, 0 for a constant."""
    return float(1 - (target_R - value_R).var() / target_R.var().clamp(min=1e-12))


def k1(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """log-ratio: unbiased for KL(policy || reference) on the policy's samples."""
    return logp - ref_logp


def k2(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """Half the squared log-ratio: right to second order."""
    return (logp - ref_logp) ** 2 / 2


def k3(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """exp(-k1) + k1 - 1: unbiased, and never negative."""
    difference = ref_logp - logp
    return difference.exp() - difference - 1


# What a reward is lowered by; all are averages of the policy's samples.
KL_ESTIMATORS = {"k1": k1, "k3": k3}
