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
NAMES = frozenset(metric.name for metric in METRICS)


def is_known(name: str) -> bool:
    """Whether a key of metrics.jsonl is in the table; that of an evaluation has `eval_` before it,
    or `eval_NAME_` with the name of its set."""
    base = name.removeprefix("eval_")
    parts = base.split("_")
    of_a_set = ["_".join(parts[i:]) for i in range(len(parts))] if base != name else []
    return name in NAMES or any(one in NAMES or f"eval_{one}" in NAMES for one in of_a_set)
