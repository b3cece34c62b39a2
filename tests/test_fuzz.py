"""Whatever the rows and the settings: a run trains, or it stops with one line; never a traceback, a
hang or a folder that is half written.

FASTTR_FUZZ_EXAMPLES=10000 draws that many cases from FASTTR_FUZZ_SEED (0) instead of the few fixed
ones.
"""

import contextlib
import gzip
import io
import json
import math
import os
import random
import signal
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from fasttr import TrainConfig, train
from fasttr.cli.train import parse_train
from fasttr.config.trl_table import TABLE
from fasttr.errors import FasttrError
from fasttr.losses import LOSSES
from fasttr.models.scratch import init_model

EXAMPLES = int(os.environ.get("FASTTR_FUZZ_EXAMPLES", "0"))
SEED = int(os.environ.get("FASTTR_FUZZ_SEED", "0"))
SECONDS = 60  # a tiny run takes a fraction of one: more is a hang
few = settings(
    max_examples=EXAMPLES or 40,
    derandomize=not EXAMPLES,
    deadline=None,
    database=None,
    print_blob=True,
    phases=[Phase.generate] if not EXAMPLES else [Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck),
)

ODD = [
    "",
    " ",
    "\n",
    "a",
    "ab",
    "the sky is blue",
    "\x00",
    "\ufeff",
    "\ud83d",
    "é\u0301",
    "שלום",
    "<|im_end|>",
    "<|bos|>",
    "\n\nHuman: a\n\nAssistant: b",
    "\n\nHuman: a\n\nAssistant: c",
    "x" * 300,
    "{{ 1/0 }}",
    "null",
    "\U0001f642\U0001f469\u200d\U0001f469\u200d\U0001f467",
]
TEXT = st.sampled_from(ODD) | st.text(max_size=12)
NUMBER = st.sampled_from(
    [0, 1, -1, 2, 0.5, -0.0, 1e-320, 1e30, 1e308, -1e308, 2**31, 2**63, 2**70, math.nan, math.inf]
)
ROLE = st.sampled_from(["user", "assistant", "assistant", "system", "tool", "", "x"])
PART = st.fixed_dictionaries({"type": st.just("text"), "text": TEXT})
MESSAGE = st.fixed_dictionaries({"role": ROLE, "content": TEXT})
ODD_MESSAGE = st.one_of(
    MESSAGE,
    st.fixed_dictionaries({"content": TEXT}),
    st.fixed_dictionaries({"role": ROLE}),
    st.fixed_dictionaries({"role": st.none() | NUMBER, "content": TEXT}),
    st.fixed_dictionaries(
        {"role": ROLE, "content": st.none() | NUMBER | st.lists(TEXT, max_size=2)}
    ),
    st.fixed_dictionaries({"role": ROLE, "content": st.just([{"type": "image", "text": None}])}),
    st.fixed_dictionaries({"role": ROLE, "content": st.lists(PART, max_size=2)}),
    TEXT,
)
MESSAGES = st.lists(MESSAGE, min_size=1, max_size=3)
ANSWERED = MESSAGES.map(lambda messages: [{"role": "user", "content": "a"}, *messages])
IDS = st.lists(st.integers(0, 259), max_size=6)
ANYTHING = st.one_of(
    st.none(),
    st.booleans(),
    NUMBER,
    TEXT,
    st.lists(ODD_MESSAGE, max_size=3),
    MESSAGES,
    IDS,
    st.lists(st.integers(-5, 2**40), max_size=3),
    st.dictionaries(TEXT, TEXT | NUMBER, max_size=2),
    st.lists(st.lists(TEXT, max_size=2), max_size=2),
)
COLUMNS = {
    "paired": {"prompt": TEXT, "chosen": TEXT, "rejected": TEXT},
    "implicit": {"chosen": TEXT, "rejected": TEXT},
    "messages": {"prompt": MESSAGES, "chosen": MESSAGES, "rejected": MESSAGES},
    "implicit messages": {"chosen": ANSWERED, "rejected": ANSWERED},
    "text and messages": {"prompt": TEXT, "chosen": MESSAGES, "rejected": MESSAGES},
    "unpaired": {"prompt": TEXT, "completion": TEXT, "label": st.booleans()},
    "unpaired messages": {"prompt": MESSAGES, "completion": MESSAGES, "label": st.booleans()},
    "ids": {"prompt_ids": IDS, "chosen_ids": IDS, "rejected_ids": IDS},
    "unpaired ids": {"prompt_ids": IDS, "completion_ids": IDS, "label": st.booleans()},
}
EXTRA = {
    "weight": NUMBER,
    "tools": ANYTHING,
    "chat_template_kwargs": ANYTHING,
    "score": NUMBER,
    "image": TEXT,
    "": TEXT,
    "label": ANYTHING,
    "completion": ANYTHING,
    "prompt": ANYTHING,
}


@st.composite
def tables(draw, wild: bool):
    """Rows of one format; when `wild`, columns are lost, added and filled with anything."""
    columns = dict(COLUMNS[draw(st.sampled_from(sorted(COLUMNS)))])
    if draw(st.booleans()):
        columns["weight"] = NUMBER if wild else st.sampled_from([0.0, 0.5, 1, 2])
    if wild:
        for name in draw(st.lists(st.sampled_from(sorted(EXTRA)), max_size=2)):
            columns[name] = EXTRA[name]
        for name in draw(st.lists(st.sampled_from(sorted(columns)), max_size=1)):
            columns[name] = columns[name] | ANYTHING if draw(st.booleans()) else ANYTHING
        if draw(st.integers(0, 9)) == 0:
            del columns[draw(st.sampled_from(sorted(columns)))]
    return draw(st.lists(st.fixed_dictionaries(columns), min_size=0 if wild else 1, max_size=6))


@st.composite
def files(draw):
    """A name and the bytes of a data file."""
    wild = draw(st.integers(0, 2)) == 0
    rows = draw(tables(wild))
    kind = draw(
        st.sampled_from(
            ["jsonl", "jsonl", "json", "jsonl.gz", "parquet"] + (["csv", "jsonl"] if wild else [])
        )
    )
    if kind == "parquet":
        import pyarrow
        import pyarrow.parquet

        with contextlib.suppress(
            pyarrow.ArrowException, OverflowError, UnicodeEncodeError, TypeError, ValueError
        ):
            buffer = io.BytesIO()
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), buffer)
            return "data.parquet", buffer.getvalue()
        kind = "jsonl"
    ascii_only = draw(st.booleans())
    text = "".join(json.dumps(row, ensure_ascii=ascii_only) + "\n" for row in rows)
    content = (json.dumps(rows) if kind == "json" else text).encode("utf-8", "surrogatepass")
    if wild and draw(st.integers(0, 9)) == 0:
        cut = draw(st.integers(0, len(content)))
        content = (
            content[:cut] + draw(st.binary(max_size=4)) + content[cut + draw(st.integers(0, 3)) :]
        )
    return f"data.{kind}", gzip.compress(content) if kind.endswith("gz") else content


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


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    for i, name in enumerate(("model", "other")):
        init_model(
            "llama",
            hidden_size=16,
            num_layers=1,
            num_heads=2,
            output_dir=folder / name,
            seed=i,
            max_position_embeddings=1024,
        )
    return folder


class Hang(BaseException):
    """No `except Exception` on the way may take it for an error of its own."""


@contextlib.contextmanager
def time_limit(seconds: int):
    def ring(*_):
        raise Hang(f"still running after {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def one_line_or_none(act) -> str | None:
    """What a FasttrError says, which must be one line; None when there is none. Any other exception
    goes through."""
    told = None
    try:
        act()
    except FasttrError as error:
        told = str(error)
    assert told is None or (0 < len(told) < 2000 and "\n" not in told), repr(told)
    return told


def check(model: Path, file: tuple[str, bytes], chosen: dict) -> bool:
    """Run one case; True when it trained. Raises on anything that breaks the property."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        data, out = Path(folder) / file[0], Path(folder) / "out"
        data.write_bytes(file[1])

        def placed(value):
            if isinstance(value, list):
                return [placed(item) for item in value]
            if isinstance(value, dict):
                return {key: placed(item) for key, item in value.items()}
            known = {
                "DATA": str(data),
                "MODEL": str(model / "model"),
                "OTHER": str(model / "other"),
            }
            return known.get(value, value) if isinstance(value, str) else value

        base = {
            "model_name_or_path": "MODEL",
            "dataset_name": "DATA",
            "eval_dataset_name": "DATA",
            "output_dir": str(out),
            "max_steps": 2,
            "train_batch_size": 2,
            "use_cpu": True,
            "disable_tqdm": True,
            "logging_steps": 1,
            "save_strategy": "no",
        }
        values = {key: placed(value) for key, value in (base | chosen).items()}
        with contextlib.chdir(folder), time_limit(SECONDS):
            told = one_line_or_none(lambda: train(TrainConfig(**values)))
        trained = told is None
        left = sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*"))
        assert not [
            path for path in left if path.endswith((".tmp", ".partial")) or "/.checkpoint" in path
        ], left
        for checkpoint in Path(folder).rglob("checkpoint-*"):
            assert (checkpoint / "fasttr" / "state.json").is_file(), left
            assert (checkpoint / "model.safetensors").is_file(), left
        if trained:
            written = Path(folder) / values["output_dir"]
            assert (written / "model.safetensors").is_file(), left
            lines = [
                json.loads(line) for line in (written / "metrics.jsonl").read_text().splitlines()
            ]
            numbers = {
                k: v
                for line in lines
                for k, v in line.items()
                if isinstance(v, float) and not math.isfinite(v)
            }
            assert not numbers, numbers
        else:
            assert not (out / "model.safetensors").exists(), left
        return trained


def test_a_run_trains_or_stops_with_one_line(model):
    trained = []

    @few
    @seed(SEED)
    @given(files(), configs())
    def cases(file, chosen):
        random.seed(0)
        trained.append(check(model, file, chosen))

    before = torch.are_deterministic_algorithms_enabled()
    cases()
    assert torch.are_deterministic_algorithms_enabled() == before
    assert 0.1 < sum(trained) / len(trained) < 0.9, "the cases are all of one kind"


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


def test_a_command_line_is_read_or_is_one_line():
    @settings(few, max_examples=max(EXAMPLES // 4, 60))
    @seed(SEED)
    @given(st.lists(st.tuples(KEYS, WORD, st.booleans()), max_size=4))
    def cases(pairs):
        words = ["--model_name_or_path=m", "--dataset_name=d"]
        for key, value, joined in pairs:
            words += [f"--{key}={value}"] if joined else [f"--{key}", value]
        one_line_or_none(lambda: parse_train(words))

    cases()
