"""What cards hold and do in a second: by their data sheets, and sustained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from fasttr.errors import FasttrError, one_line

MIB = 2**20


class Card(NamedTuple):
    """By NVIDIA's data sheet; bf16 without sparsity. Memory as nvidia-smi shows it."""

    products: float  # FLOP/s
    bandwidth: float  # bytes/s of memory
    memory: float  # bytes
    link: float  # bytes/s to the cards of the same machine, one way


CARDS = {
    "b200": Card(2250e12, 8.0e12, 183359 * MIB, 900e9),
    "h200": Card(989e12, 4.8e12, 143771 * MIB, 450e9),
    "h100": Card(989e12, 3.35e12, 81559 * MIB, 450e9),
    "a100-80gb": Card(312e12, 2.04e12, 81920 * MIB, 300e9),
    "l40s": Card(362e12, 0.864e12, 46068 * MIB, 32e9),
    "rtx-4090": Card(165e12, 1.008e12, 24564 * MIB, 32e9),
}
NETWORK = 400e9 / 8  # bytes/s a card between machines: 400 Gb/s InfiniBand


class Share(NamedTuple):
    """How much of a data sheet is assumed to be sustained."""

    products: float = 700 / 989  # large bf16 products
    bandwidth: float = 3.7 / 4.8
    attention: float = 250 / 989  # over short segments, of the rate of products
    link: float = 350 / 450
    network: float = 0.9


ASSUMED = Share()


class Machine(NamedTuple):
    """Rates that are sustained, a second."""

    name: str
    products: float  # operations of large bf16 products
    memory: float  # bytes
    attention: float  # operations of attention over short segments
    peak: float  # operations that MFU is a share of
    memory_bytes: float
    link: float = 350e9  # bytes to cards of the same machine
    network: float = 45e9  # bytes to other machines, a card
    source: str = "data sheet, shares assumed"

    @classmethod
    def of(cls, name: str, share: Share = ASSUMED) -> Machine:
        card = CARDS[name]
        return cls(
            name=name,
            products=card.products * share.products,
            memory=card.bandwidth * share.bandwidth,
            attention=card.products * share.attention,
            peak=card.products,
            memory_bytes=card.memory,
            link=card.link * share.link,
            network=NETWORK * share.network,
        )


# What `python -m bench gpu` calls its figures, and their units.
_MEASURED = {"copy": ("memory", 1e9), "layer products, T 16384": ("products", 1e12)}


def measured(machine: Machine, path: str) -> Machine:
    """The machine with the rates of a gpu.json that `python -m bench tables --keep` wrote."""
    try:
        parts = json.loads(Path(path).read_text(encoding="utf-8"))["parts"]
        facts = next(part for part in parts if part["part"] == "facts")
        found = {one["what"]: float(one["value"]) for one in facts["figures"]}
    except (OSError, ValueError, KeyError, TypeError, StopIteration) as error:
        raise FasttrError(
            f"results: cannot read the rates of {path}: {one_line(error)}; wanted the gpu.json of "
            "python -m bench tables --keep"
        ) from error
    rates: dict[str, Any] = {
        field: found[what] * unit for what, (field, unit) in _MEASURED.items() if what in found
    }
    if not rates:
        raise FasttrError(f"results: {path} has none of {', '.join(_MEASURED)}")
    source = f"{', '.join(rates)} measured in {path}"
    if "products" in rates:
        rates["attention"] = machine.attention * rates["products"] / machine.products
    return machine._replace(**rates, source=source)
