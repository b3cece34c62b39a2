"""Which curves the pictures of `fasttr.metrics.plots` show, under which words, in which colours."""

from __future__ import annotations

from typing import NamedTuple

# Okabe and Ito's palette: told apart with every common kind of colour blindness, and by lightness
# in grey.
BLUE = "#0072B2"
VERMILION = "#D55E00"
GREEN = "#009E73"
ORANGE = "#E69F00"
PURPLE = "#CC79A7"
SKY = "#56B4E9"
BLACK = "#000000"


class Curve(NamedTuple):
    key: str
    label: str
    colour: str
    held_out: bool = False  # few points, drawn with markers and dashes
    stderr: str = ""  # key of its standard error


class Panel(NamedTuple):
    name: str  # of the file
    title: str
    unit: str
    curves: tuple[Curve, ...]
    level: float | None = None  # a value to compare with, drawn as a thin line
    level_label: str = ""
    restarts: bool = True  # at every move of the reference


RUN_PANELS = (
    Panel(
        "loss",
        "Loss",
        "loss",
        (Curve("loss", "train", BLUE), Curve("eval_loss", "held out", ORANGE, True)),
    ),
    Panel(
        "rewards",
        "Implicit rewards against the reference",
        "reward (nats)",
        (
            Curve("rewards/chosen", "chosen", BLUE),
            Curve("rewards/rejected", "rejected", VERMILION),
            Curve("rewards/margins", "margin", GREEN),
            Curve("eval_rewards/margins", "margin, held out", BLACK, True),
            Curve(
                "eval_anchor/rewards/margins",
                "margin, held out, against the initial policy",
                ORANGE,
                True,
                "eval_anchor/rewards/margins_stderr",
            ),
        ),
        0.0,
    ),
    Panel(
        "accuracies",
        "Pairs whose chosen completion has the higher reward",
        "share of pairs",
        (
            Curve("rewards/accuracies", "train, against the reference", BLUE),
            Curve(
                "eval_rewards/accuracies",
                "held out, against the reference",
                ORANGE,
                True,
                "eval_rewards/accuracies_stderr",
            ),
            Curve(
                "eval_anchor/rewards/accuracies",
                "held out, against the initial policy",
                GREEN,
                True,
                "eval_anchor/rewards/accuracies_stderr",
            ),
        ),
        0.5,
        "chance",
    ),
    Panel(
        "logps",
        "Log-probability of the completions under the policy",
        "log-probability (nats)",
        (
            Curve("logps/chosen", "chosen", BLUE),
            Curve("logps/rejected", "rejected", VERMILION),
            Curve("eval_logps/chosen", "chosen, held out", SKY, True),
            Curve("eval_logps/rejected", "rejected, held out", ORANGE, True),
        ),
        restarts=False,
    ),
    Panel(
        "gold_reward",
        "Gold reward of fresh samples",
        "gold reward",
        (
            Curve(
                "eval_gold_reward",
                "mean with standard error",
                GREEN,
                True,
                "eval_gold_reward_stderr",
            ),
        ),
    ),
    Panel(
        "initial_policy",
        "Log-ratio to the initial policy",
        "log-ratio (nats)",
        (
            Curve(
                "eval_kl_to_initial",
                "KL of fresh samples",
                PURPLE,
                True,
                "eval_kl_to_initial_stderr",
            ),
            Curve("eval_anchor/logratios/chosen", "chosen, held out", BLUE, True),
            Curve("eval_anchor/logratios/rejected", "rejected, held out", VERMILION, True),
        ),
        0.0,
    ),
)


class Compared(NamedTuple):
    """One panel of a comparison: the first of `keys` that any run has, over steps or over another
    metric."""

    name: str
    title: str
    unit: str
    keys: tuple[str, ...]
    over: str = "step"
    over_unit: str = "optimizer step"
    level: float | None = None  # a value to compare with, drawn as a thin line
    level_label: str = ""
    unless: str = ""  # a metric that says it better: not drawn where a run has it
    restarts: bool = False  # where the reference moves: not the same thing in two runs


COMPARISONS = (
    Compared("gold_reward", "Gold reward of fresh samples", "gold reward", ("eval_gold_reward",)),
    Compared(
        "gold_against_kl",
        "Gold reward against drift",
        "gold reward",
        ("eval_gold_reward",),
        "eval_kl_to_initial",
        "KL to the initial policy (nats)",
    ),
    Compared(
        "kl_to_initial", "Drift from the initial policy", "KL (nats)", ("eval_kl_to_initial",)
    ),
    Compared(
        "anchor_margins",
        "Held-out margin against the initial policy",
        "margin (nats)",
        ("eval_anchor/rewards/margins", "anchor/rewards/margins"),
    ),
    Compared(
        "accuracies",
        "Held-out accuracy against the initial policy",
        "share of pairs",
        ("eval_anchor/rewards/accuracies",),
        level=0.5,
        level_label="chance",
    ),
    Compared(
        "margins",
        "Training margin against the reference",
        "margin (nats)",
        ("rewards/margins",),
        restarts=True,
    ),
    Compared(
        "logps_chosen", "Log-probability of the chosen", "log-probability (nats)", ("logps/chosen",)
    ),
    Compared("loss", "Training loss", "loss", ("loss",), restarts=True),
    Compared(
        "reward_accuracies",
        "Held-out accuracy by the loss's own rewards",
        "share of pairs",
        ("eval_rewards/accuracies",),
        level=0.5,
        level_label="chance",
        unless="eval_anchor/rewards/accuracies",
    ),
)
