"""Every metric of a run: what it means, its unit, and when it appears. Data alone.

REFERENCE.md shows this table; a test holds the lines of real runs to it. An evaluation has the
metrics of a step under `eval_`.
"""

from __future__ import annotations

from typing import NamedTuple


class Metric(NamedTuple):
    name: str
    meaning: str
    unit: str
    when: str


_PAIRS = "losses of pairs, and of unpaired rows (desirable for chosen, undesirable for rejected)"
_REFERENCE = "losses with a reference"
_REWARD = "reward models"
_WEIGHTED = "reward models with weight_column"
_LINE = "every line of metrics"

METRICS = (
    Metric("loss", "mean loss of the rows", "of the loss", "always"),
    Metric("grad_norm", "norm of the gradient before clipping, of that step", "", _LINE),
    Metric("learning_rate", "rate that the step used", "", _LINE),
    Metric("epoch", "passes over the data so far", "epochs", _LINE),
    Metric(
        "num_tokens", "tokens seen so far, the prompt counted once a completion", "tokens", _LINE
    ),
    Metric("logps/chosen", "mean summed log-prob of chosen completions", "nats", "always"),
    Metric("logps/rejected", "mean summed log-prob of rejected completions", "nats", _PAIRS),
    Metric(
        "rewards/chosen",
        "mean of beta times the log-ratio to the reference; without a reference beta times the "
        "mean log-prob of a token",
        "nats",
        _PAIRS,
    ),
    Metric("rewards/rejected", "the same of rejected completions", "nats", _PAIRS),
    Metric("rewards/margins", "chosen minus rejected reward", "nats", _PAIRS),
    Metric(
        "rewards/accuracies",
        "share of pairs whose chosen side has the higher reward; a tie counts as wrong, so it is 0 "
        "where policy and reference are equal",
        "share",
        "losses of pairs",
    ),
    Metric(
        "kl",
        "KTO's estimate of KL(policy || reference) from mismatched completions, at least 0",
        "nats",
        "kto; 0 with apo_zero_unpaired",
    ),
    Metric("logits/chosen", "mean logit over the vocabulary, at chosen tokens", "", "always"),
    Metric("logits/rejected", "the same at rejected tokens", "", _PAIRS),
    Metric(
        "aux_loss",
        "the loss that keeps experts equally busy, before its coefficient",
        "",
        "a mixture of experts whose router_aux_loss_coef is not 0",
    ),
    Metric("entropy", "mean entropy of the policy at completion tokens", "nats", "always"),
    Metric(
        "mean_token_accuracy",
        "share of chosen tokens that the policy finds likeliest",
        "share",
        "losses of pairs, and sft",
    ),
    Metric("ref/updates", "how often the reference has moved", "updates", _REFERENCE),
    Metric(
        "ref/age_steps", "optimizer steps since the reference's window began", "steps", _REFERENCE
    ),
    Metric(
        "ref/distance",
        "mean absolute log-ratio of a completion under policy and reference",
        "nats",
        _REFERENCE,
    ),
    Metric(
        "perf/tokens_per_second", "packed tokens of training steps a second of them", "1/s", _LINE
    ),
    Metric("perf/pairs_per_second", "rows of training steps a second of them", "1/s", _LINE),
    Metric(
        "perf/padding_fraction", "share of computed positions that hold no token", "share", _LINE
    ),
    Metric(
        "perf/mfu",
        "operations of forward and backward, without recomputation and without the reference's "
        "scoring, over the device's bfloat16 peak",
        "share",
        "every line of metrics on a GPU whose peak is known",
    ),
    Metric(
        "memory/peak_gib",
        "most memory so far: of the allocator on CUDA, of the process on a CPU",
        "GiB",
        _LINE,
    ),
    Metric(
        "eval_rewards/accuracies_stderr", "standard error of that share", "share", "losses of pairs"
    ),
    Metric(
        "eval_anchor/logratios/chosen",
        "mean log-ratio of chosen completions to the initial policy, which does not move",
        "nats",
        _REFERENCE,
    ),
    Metric(
        "eval_anchor/logratios/rejected", "the same of rejected completions", "nats", _REFERENCE
    ),
    Metric(
        "eval_anchor/rewards/margins", "beta times the difference of the two", "nats", _REFERENCE
    ),
    Metric(
        "eval_anchor/rewards/margins_stderr",
        "standard error of that margin",
        "nats",
        "losses of pairs with a reference",
    ),
    Metric(
        "eval_anchor/rewards/accuracies",
        "share of pairs whose chosen side gained more on the initial policy",
        "share",
        "losses of pairs with a reference",
    ),
    Metric(
        "eval_anchor/rewards/accuracies_stderr",
        "standard error of that share",
        "share",
        "losses of pairs with a reference",
    ),
    Metric(
        "train_loss", "mean of the step losses of the whole run", "of the loss", "the last line"
    ),
    Metric("train_runtime", "seconds since training began or went on", "s", "the last line"),
    Metric(
        "train_pairs_per_second",
        "rows a second of that time, scoring, evaluation and saving included",
        "1/s",
        "the last line",
    ),
)
# Of runs with log_completions.
SAMPLE_METRICS = (
    Metric(
        "completions",
        "prompt, completion, tokens and finished of each sample, in a line with event completions",
        "",
        "log_completions",
    ),
    Metric("completions/mean_length", "mean length of the samples", "tokens", "log_completions"),
    Metric("completions/clipped_ratio", "share that did not end", "share", "log_completions"),
)
# Of runs on reward models, beside those that every run has.
REWARD_METRICS = (
    Metric("mean_reward", "mean score of the completions", "of the reward", _REWARD),
    Metric("min_reward", "lowest score of a completion in the step", "of the reward", _REWARD),
    Metric("max_reward", "highest score of a completion in the step", "of the reward", _REWARD),
    Metric(
        "accuracy",
        "share of pairs of a row's completions that the scores put in order; a tie counts as wrong",
        "share",
        _REWARD,
    ),
    Metric("margin", "best minus worst completion's score", "of the reward", _REWARD),
    Metric(
        "weights/ess",
        "effective number of rows of the step: square of the sum of the weights over the sum of "
        "their squares",
        "rows",
        _WEIGHTED,
    ),
    Metric("weights/max_share", "largest weight over their sum", "share", _WEIGHTED),
    Metric("eval_accuracy_stderr", "standard error of that share", "share", _REWARD),
)
_CLIP = "losses with a clip range"
_LENGTH = "of the completions of a rollout"
_PPO = "ppo"
# Of runs on rollouts; NAME is that of a source of rewards.
ONLINE_METRICS = (
    Metric("reward", "mean of the weighted rewards of a rollout", "of the reward", "always"),
    Metric("reward_std", "their standard deviation", "of the reward", "always"),
    Metric("frac_reward_zero_std", "share of prompts whose rewards are equal", "share", "always"),
    Metric("rewards/NAME/mean", "mean of one source", "of the reward", "always"),
    Metric("rewards/NAME/std", "its standard deviation", "of the reward", "always"),
    Metric(
        "kl",
        "estimate of KL(policy || reference) a token: the log-ratio with rloo and ppo, else k3",
        "nats",
        "beta above 0",
    ),
    Metric("entropy", "mean entropy of the policy at completion tokens", "nats", "always"),
    Metric("clip_ratio/low_mean", "share of tokens clipped from below", "share", _CLIP),
    Metric("clip_ratio/low_min", "least such share of a completion", "share", _CLIP),
    Metric("clip_ratio/high_mean", "share of tokens clipped from above", "share", _CLIP),
    Metric("clip_ratio/high_max", "largest such share of a completion", "share", _CLIP),
    Metric("clip_ratio/region_mean", "share of tokens clipped", "share", _CLIP),
    Metric("completions/mean_length", "mean length " + _LENGTH, "tokens", "always"),
    Metric("completions/min_length", "least length " + _LENGTH, "tokens", "always"),
    Metric("completions/max_length", "largest length " + _LENGTH, "tokens", "always"),
    Metric("completions/clipped_ratio", "share that did not end", "share", "always"),
    Metric("completions/mean_terminated_length", "mean length of those that ended", "tokens", ""),
    Metric("completions/min_terminated_length", "least length of those that ended", "tokens", ""),
    Metric("completions/max_terminated_length", "largest length of those that ended", "tokens", ""),
    Metric("value", "mean value that the critic gave a rollout's tokens", "of the reward", _PPO),
    Metric("value_loss", "the critic's loss a token, before vf_coef", "squared reward", _PPO),
    Metric("value_clip_ratio", "share of tokens where the value's clip decides", "share", _PPO),
    Metric(
        "explained_variance",
        "1 - Var(target - value) / Var(target) over a rollout's tokens: 1 is a perfect critic, 0 "
        "one that is constant",
        "share",
        _PPO,
    ),
    Metric("kl_coef", "factor of the KL in the reward", "of the reward a nat", _PPO),
    Metric("perf/generation_share", "share of the time spent on rollouts", "share", _LINE),
)
NAMES = frozenset(metric.name for metric in METRICS)
ALL_NAMES = NAMES | {metric.name for metric in (*SAMPLE_METRICS, *REWARD_METRICS, *ONLINE_METRICS)}


def is_known(name: str) -> bool:
    """Whether a key of metrics.jsonl is in a table; that of an evaluation has `eval_` before it, or
    `eval_NAME_` with the name of its set."""
    if name.startswith("rewards/") and name.endswith(("/mean", "/std")):
        name = f"rewards/NAME/{name.rpartition('/')[2]}"
    base = name.removeprefix("eval_")
    parts = base.split("_")
    of_a_set = ["_".join(parts[i:]) for i in range(len(parts))] if base != name else []
    known = ALL_NAMES
    return name in known or any(one in known or f"eval_{one}" in known for one in of_a_set)
