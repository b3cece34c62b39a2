"""Data files of every format, and of none, as hypothesis draws them."""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import json
import math

from hypothesis import strategies as st

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
SAID_ONCE = st.fixed_dictionaries({"from": st.sampled_from(["human", "gpt", "x"]), "value": TEXT})
SAID = st.lists(SAID_ONCE, min_size=1, max_size=3)
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
    "unpaired by number": {
        "prompt": TEXT,
        "completion": TEXT,
        "label": st.sampled_from([0.0, 1.0]),
    },
    "completion alone": {"prompt": TEXT, "completion": TEXT},
    "conversation": {"messages": ANSWERED},
    "instruction": {"instruction": TEXT, "input": TEXT, "output": TEXT, "label": st.booleans()},
    "instructed pair": {"instruction": TEXT, "chosen": TEXT, "rejected": TEXT},
    "sharegpt": {"conversations": SAID, "chosen": SAID_ONCE, "rejected": SAID_ONCE},
    "other names": {"question": TEXT, "good": TEXT, "bad": TEXT},
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
    kind = draw(st.sampled_from(["jsonl", "jsonl", "json", "jsonl.gz", "parquet", "csv"]))
    if kind == "csv":
        return "data.csv", csv_text(rows)
    if kind == "parquet":
        content = parquet(rows)
        if content is not None:
            return "data.parquet", content
        kind = "jsonl"
    content = json_text(rows, kind, ascii_only=draw(st.booleans()))
    if wild and draw(st.integers(0, 9)) == 0:
        content = draw(torn(content))
    return f"data.{kind}", gzip.compress(content) if kind.endswith("gz") else content


def parquet(rows) -> bytes | None:
    """None for rows that no table can hold."""
    import pyarrow
    import pyarrow.parquet

    refusals = (pyarrow.ArrowException, OverflowError, UnicodeEncodeError, TypeError, ValueError)
    with contextlib.suppress(*refusals):
        buffer = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), buffer)
        return buffer.getvalue()
    return None


def csv_text(rows) -> bytes:
    file = io.StringIO()
    names = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(file, names)
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue().encode("utf-8", "surrogatepass")


def json_text(rows, kind: str, *, ascii_only: bool) -> bytes:
    lines = [json.dumps(row, ensure_ascii=ascii_only) + "\n" for row in rows]
    text = json.dumps(rows) if kind == "json" else "".join(lines)
    return text.encode("utf-8", "surrogatepass")


@st.composite
def torn(draw, content: bytes) -> bytes:
    """Some bytes put into the middle, and some lost there."""
    cut = draw(st.integers(0, len(content)))
    put_in = draw(st.binary(max_size=4))
    lost = draw(st.integers(0, 3))
    return content[:cut] + put_in + content[cut + lost :]
