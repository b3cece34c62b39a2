"""Settings that fit and that do not, and words of a command line, as hypothesis draws them."""

from __future__ import annotations

import math

from hypothesis import strategies as st

from fasttr import TrainConfig
from fasttr.config.trl_table import TABLE
from fasttr.losses import LOSSES
from tests.fuzz_rows import TEXT


def of(*values):
    return st.sampled_from(values)


# Valid values first; the invalid ones come last and are drawn less often.
GOOD = {
    "loss_type": of(None, *LOSSES, ["sigmoid", "sft"], ["hinge"]),
    "beta": of(0.1, 1.0, 1e-8, 100.0, 1e30),
    "label_smoothing": of(0.0, 0.0, 0.0, 0.1, 0.3),
    "loss_weights": of(None, None, None, [1.0, 0.5], [2.0]),
    "f_divergence_type": of(*["reverse_kl"] * 3, "forward_kl", "js_divergence", "alpha_divergence"),
    "f_alpha_divergence_coef": of(0.5, 1.0, -3.0, 40.0),
    "ld_alpha": of(None, None, 0.0, 0.5),
    "discopop_tau": of(0.05, 1.0, 1e-9),
    "simpo_gamma": of(0.5, 0.0, -1e9),
    "desirable_weight": of(1.0, 0.0, 1e9),
    "group_size": of(None, 1, 2),
    "max_length": of(None, 64, 7, 3),
    "max_dropped_fraction": of(1.0, 1.0, 0.5, 0.0),
    "max_boundary_mismatch": of(None, 1.0, 0.0),
    "weight_column": of(None, None, "weight"),
    "dataset_format": of(*[None] * 5, "hh_rlhf"),
    "train_batch_size": of(2, 1, 4, 100),
    "max_tokens_per_batch": of(512, 1, 16),
    "max_steps": of(1, 2),
    "learning_rate": of(1e-3, 0.0, 1e30),
    "lr_scheduler_type": of(
        "linear",
        "constant",
        "cosine",
        "polynomial",
        "inverse_sqrt",
        "cosine_with_min_lr",
        "warmup_stable_decay",
    ),
    "lr_scheduler_kwargs": of(
        None, None, {}, {}, {"num_cycles": 2}, {"min_lr": 1e-5}, {"lr_end": 1e-9}
    ),
    "warmup_steps": of(0, 1, 0.5, 1000),
    "weight_decay": of(0.0, 0.1, 1e30),
    "adam_epsilon": of(1e-8, 1e30),
    "max_grad_norm": of(1.0, 0.0, 1e-30),
    "ref_update": of("none", "soft", "hard"),
    "ref_update_alpha": of(0.6, 0.0, 1.0),
    "ref_update_every": of(1, 2, 512),
    "ref_model_name_or_path": of(None, "MODEL", "OTHER"),
    "eval_strategy": of("no", "steps", "epoch"),
    "eval_steps": of(None, 1),
    "eval_on_start": st.booleans(),
    "save_strategy": of("no", "steps", "epoch"),
    "save_steps": of(1, 2, 500),
    "save_total_limit": of(None, 1),
    "logging_steps": of(1, 2, 10),
    "train_sampling_strategy": of("random", "sequential"),
    "seed": of(0, 42, 2**31),
    "data_seed": of(None, 7),
    "bf16": of(None, False, True),
    "gradient_checkpointing": st.booleans(),
    "attn_implementation": of(None, "sdpa", "eager"),
    "resume_from_checkpoint": of(None, True),
    "truncation_mode": of("keep_start", "keep_end"),
    "max_prompt_length": of(None, None, 1, 4, 30),
    "max_completion_length": of(None, None, 1, 5),
    "drop_identical_sides": st.booleans(),
    "micro_batch_size": of(None, None, 1, 2),
    "use_weighting": of(False, False, True),
    "wpo_max_weight": of(None, None, 1.0, 1e-30),
    "columns": of(None, None, None, {"chosen": "good", "rejected": "bad", "prompt": "question"}),
    "streaming": of(False, False, True),
    "dataset_num_proc": of(None, None, None, 1),
    "optim": of("adamw_torch", "sgd", "rmsprop", "adagrad", "adafactor", "paged_adamw"),
    "optim_args": of(None, None, "momentum=0.5", ""),
    "dtype": of("float32", "bfloat16", "auto"),
    "chat_template": of(None, None, "{% for m in messages %}{{ m['content'] }}{% endfor %}"),
    "eos_token": of(None, None, "<|im_end|>"),
    "dataset_mixture": of(
        None,
        None,
        {"datasets": [{"id": "DATA"}], "test_split_size": 1},
        {"datasets": [{"id": "DATA", "weight": 0.5}, {"id": "DATA"}], "seed": 3},
    ),
    "test_split_size": of(None, None, 1, 0.5),
}
BAD = {
    "loss_type": of("hunge", [], ["kto", "sft"], ["sigmoid", "sigmoid"], ""),
    "beta": of(0.0, -1.0, math.nan, math.inf, 1e-320),
    "label_smoothing": of(0.5, 1.0, -0.1, 7.0, math.nan),
    "loss_weights": of([], [math.nan], [1.0, 2.0, 3.0], [-1.0, 1e308]),
    "f_divergence_type": of("", "kl"),
    "f_alpha_divergence_coef": of(math.nan, math.inf, 1e308, 0.0),
    "ld_alpha": of(1.5, -1.0, math.nan),
    "discopop_tau": of(0.0, -1.0, math.nan),
    "simpo_gamma": of(math.nan, math.inf, 1e308),
    "desirable_weight": of(-1.0, math.nan, math.inf),
    "group_size": of(0, 3, -2),
    "max_length": of(0, 1, -1, 2**40),
    "max_dropped_fraction": of(-1.0, math.nan),
    "max_boundary_mismatch": of(2.0, math.nan),
    "weight_column": of("score", "nope", "prompt", ""),
    "dataset_format": of("csv"),
    "train_batch_size": of(0, -1, 2**40),
    "max_tokens_per_batch": of(0, 2**70),
    "max_steps": of(0, -1, -2),
    "num_train_epochs": of(0.0, -1.0, math.nan, 0.01),
    "learning_rate": of(-1.0, math.nan, math.inf, 1e308),
    "lr_scheduler_type": of("", "greedy", "reduce_lr_on_plateau", "nope"),
    "lr_scheduler_kwargs": of(
        {"nope": 1},
        {"num_cycles": "x"},
        {"num_cycles": 0},
        {"power": "x"},
        {"lr_end": 1.0},
        {"num_warmup_steps": 3},
        {"min_lr": None},
    ),
    "warmup_steps": of(-1, math.nan, math.inf),
    "weight_decay": of(-1.0, math.nan, math.inf),
    "adam_beta1": of(1.0, -0.1, math.nan),
    "adam_beta2": of(1.0, math.nan),
    "adam_epsilon": of(0.0, math.nan, math.inf),
    "max_grad_norm": of(-1.0, math.nan, math.inf),
    "ref_update_alpha": of(1.5, math.nan),
    "ref_update_every": of(0, -1, 2**70),
    "ref_model_name_or_path": of("/nowhere", "", "nope/nope"),
    "model_name_or_path": of("/nowhere", "", ".", "a b"),
    "dataset_name": of("/nowhere.jsonl", "", "nope", "json", ".", "~nobody/x", "\x00", "a" * 5000),
    "dataset_config": of("x", ""),
    "dataset_train_split": of(
        "test", "", "train[", "train[:50%]", "train[9:]", "train[:0]", "all", "../x"
    ),
    "datasets": of(
        [],
        [{}],
        [{"path": "nope"}],
        [{"path": "DATA", "columns": ["x"]}],
        [{"path": "DATA", "fraction": 0}],
        [{"path": "json", "data_files": "DATA"}],
        [{"path": "DATA"}, {"path": "DATA", "fraction": 0.5}],
    ),
    "test_split_size": of(0.0, 1.0, 0.5, -1.0, math.nan, 1e9, math.inf),
    "eval_dataset_name": of("/nowhere.json", "", "nope"),
    "dataset_num_proc": of(0, -1),
    "eval_steps": of(0, -1),
    "save_steps": of(0),
    "save_total_limit": of(0, -1),
    "logging_steps": of(0),
    "seed": of(-1, 2**64, 2**70),
    "data_seed": of(-1, 2**64, 2**70),
    "dtype": of("float16", ""),
    "attn_implementation": of("varlen", "flash_attention_2", "", "nope"),
    "use_liger_kernel": of(True),
    "report_to": of("nope", "wandb", [], ["none", "tensorboard"]),
    "resume_from_checkpoint": of("/nowhere", "", "checkpoint-1", False),
    "truncation_mode": of("", "keep_middle"),
    "max_prompt_length": of(0, -1, 2**40),
    "max_completion_length": of(0, -3),
    "micro_batch_size": of(0, 3, -1),
    "wpo_max_weight": of(0.0, -1.0, math.nan),
    "columns": of(
        {}, {"chosen": "nope"}, {"chosen": "chosen"}, {"chosen": "prompt", "prompt": "x"}
    ),
    "optim": of("", "lion", "adamw_8bit"),
    "optim_args": of("momentum", "momentum=x", "lr=1", ",,=", "alpha=nan"),
    "chat_template": of("", "{{ x", "/nowhere.jinja", "{{ 1/0 }}", "{{ messages }}"),
    "eos_token": of("", "nope", "\x00"),
    "dataset_mixture": of(
        {},
        {"datasets": []},
        {"datasets": [{}]},
        {"datasets": [{"id": "nope"}]},
        {"datasets": [{"id": "DATA", "weight": 2.0}]},
        {"datasets": [{"id": "DATA", "columns": ["x"]}]},
        {"datasets": "DATA"},
        {"datasets": [{"id": "DATA"}], "test_split_size": math.nan},
        {"x": 1},
    ),
    "push_to_hub": of(True),
    "hub_strategy": of("", "x"),
    "load_best_model_at_end": of(True),
    "metric_for_best_model": of("", "nope", "rewards/margins"),
    "output_dir": of("\x00", "/dev/null", "/proc/x", "a" * 300),
}


@st.composite
def configs(draw):
    """A few settings off their defaults; in one case of three one of them may be anything."""
    chosen = {name: draw(GOOD[name]) for name in draw(st.lists(of(*GOOD), max_size=5, unique=True))}
    if draw(st.integers(0, 2)) == 0:
        name = draw(of(*BAD))
        chosen[name] = draw(BAD[name])
    return chosen


KEYS = of(*TrainConfig.__dataclass_fields__, *TABLE, "preset", "config", "nope")
WORD = TEXT | of(
    "none",
    "null",
    "true",
    "no",
    "1",
    "-1",
    "0.5",
    "1e400",
    "nan",
    "[",
    "[1,2]",
    "{}",
    "{a: 1}",
    "!!x",
    "*a",
    "[sigmoid, hinge]",
    "a: b",
    "--",
    "@",
)
