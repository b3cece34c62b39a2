"""The page of the ops: signatures and docstrings as they stand in the code."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
from types import ModuleType
from typing import Any

# Module -> names, in the order of the page.
OPS: dict[str, tuple[str, ...]] = {
    "fasttr_kernels": (
        "linear_preference_loss",
        "linear_policy_loss",
        "linear_logprob",
        "multi_tensor_lerp_",
        "SplitAdamW",
        "clip_factor",
        "from_padded",
        "halves",
        "PreferenceLoss",
        "Logprob",
    ),
    "fasttr.losses": ("LossInputs", "group_loss", "make_loss", "WeightedSum", "Wpo"),
    "fasttr.integrations": ("LinearPreferenceLoss", "LinearLossOutput", "whole"),
    "fasttr.integrations.liger": ("LigerFusedLinearDPOLoss", "LigerFusedLinearKTOLoss"),
    "fasttr.integrations.torchtune": ("BatchLogProbs",),
    "fasttr.integrations.callback": ("MoveReference",),
    "fasttr.integrations.trl": ("patch", "unpatch", "patched"),
}
HEADINGS = ("Args", "Returns", "Raises", "Memory", "Precision")


def ops_page() -> str:
    """Markdown of every op."""
    lines = [
        "# Ops and integrations",
        "",
        "Made from the code. Shapes stand in the signatures.",
        "",
    ]
    for module_name, names in OPS.items():
        module = importlib.import_module(module_name)
        lines += [f"## {module_name}", ""]
        for name in names:
            lines += _entry(module, name)
    return "\n".join(lines)


def _entry(module: ModuleType, name: str) -> list[str]:
    thing = getattr(module, name)
    lines = [f"### {name}", "", "```python", _signature(thing, name), "```", ""]
    lines += [_markdown(inspect.getdoc(thing) or ""), ""]
    if inspect.isclass(thing) and "forward" in vars(thing):
        lines += ["```python", _signature(thing.forward, "forward"), "```", ""]
        lines += [_markdown(inspect.getdoc(thing.forward) or ""), ""]
    return lines


def _signature(thing: Any, name: str) -> str:
    """The lines of the source up to the docstring: they hold the shapes."""
    if not inspect.isclass(thing):
        return _head(inspect.getsource(inspect.unwrap(thing)))
    if dataclasses.is_dataclass(thing) or issubclass(thing, tuple):
        return _fields(inspect.getsource(thing))
    return f"class {name}:\n{_head(inspect.getsource(thing.__init__))}"


def _fields(source: str) -> str:
    """A class of fields without its docstring and its methods."""
    source = re.sub(r'\n    """.*?"""\n', "\n", source, count=1, flags=re.DOTALL)
    return re.split(r"\n    (?:@|def )", source)[0].rstrip()


def _head(source: str) -> str:
    """A function's source up to the end of its signature, without decorators."""
    lines = source.splitlines()
    first = next(i for i, line in enumerate(lines) if line.lstrip().startswith("def "))
    kept = []
    for line in lines[first:]:
        kept.append(line)
        if line.split("#")[0].rstrip().endswith(":") and _closed(kept):
            break
    return "\n".join(kept)


def _closed(lines: list[str]) -> bool:
    text = "\n".join(line.split("#")[0] for line in lines)
    return text.count("(") == text.count(")")


def _markdown(doc: str) -> str:
    """A docstring with its sections as lists, and its indented code as code."""
    out: list[str] = []
    inside = False
    for line in doc.splitlines():
        heading = line.rstrip(":")
        if line.endswith(":") and heading in HEADINGS:
            out += [f"**{heading}**", ""]
            inside = True
        elif inside and re.match(r"    \S", line):
            out.append(re.sub(r"^    ([\w, ]+): ", r"- `\1`: ", line).replace("    ", "", 1))
        elif inside and line.startswith("        "):
            out.append("  " + line.strip())
        else:
            inside = inside and not line.strip()
            out.append(line)
    return "\n".join(out)
