"""Tensors of a checkpoint by name: in one file that a process wrote alone, or in files of rows that
several wrote, and read by any number of them.

KIND.safetensors holds whole tensors. KIND-0000I-of-0000N.safetensors holds those of one process of
N: rows of a tensor, a part that goes with such rows (scales of groups), or a whole one that the
first process wrote for all. Which it is stands in the file's metadata.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fasttr.errors import FasttrError
from fasttr.models.sharded import Shards

_ROWS, _PARTS = "fasttr_rows", "fasttr_parts"


class _Held(NamedTuple):
    """What of a tensor is in one file."""

    path: Path
    start: int | None  # of its rows; None: the tensor is whole, or a part
    total: int  # rows of the whole tensor
    part: tuple[int, int] | None  # of how many


class SavedTensors(Mapping[str, Tensor]):
    """The tensors of one kind in a folder, read when they are asked for."""

    def __init__(self, folder: Path, kind: str):
        self._held: dict[str, list[_Held]] = {}
        alone = folder / f"{kind}.safetensors"
        paths = [alone] if alone.is_file() else sorted(folder.glob(f"{kind}-*-of-*.safetensors"))
        for path in paths:
            self._look_into(path)

    def __getitem__(self, name: str) -> Tensor:
        held = self._held[name]
        if held[0].part is not None:
            raise FasttrError(_other_number(held[0]))
        if held[0].start is None:
            return _read(held[0].path, name)
        return torch.cat([_read(one.path, name) for one in sorted(held, key=_start)])

    def __iter__(self) -> Iterator[str]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, name: object) -> bool:
        return name in self._held

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the whole tensor, or of a part."""
        held = self._held[name][0]
        with _opened(held.path) as file:
            found = tuple(file.get_slice(name).get_shape())
        return found if held.start is None else (held.total, *found[1:])

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop), wherever they are."""
        found: list[Tensor] = []
        for one in sorted(self._held[name], key=_start):
            with _opened(one.path) as file:
                content = file.get_slice(name)
                first = one.start or 0
                own = content.get_shape()[0]
                low, high = max(start - first, 0), min(stop - first, own)
                if low < high or (start == stop and not found):
                    found.append(content[low : max(high, low)])
        return torch.cat(found)

    def part(self, name: str, number: int, of: int) -> Tensor:
        """What process `number` of `of` wrote. FasttrError where there were others."""
        for one in self._held[name]:
            if one.part == (number, of):
                return _read(one.path, name)
        raise FasttrError(_other_number(self._held[name][0]))

    def _look_into(self, path: Path) -> None:
        with _opened(path) as file:
            told = file.metadata() or {}
            rows, parts = json.loads(told.get(_ROWS, "{}")), json.loads(told.get(_PARTS, "{}"))
            for name in file.keys():  # noqa: SIM118  # a file of safetensors is no mapping
                start, total = rows.get(name, (None, 0))
                part = tuple(parts[name]) if name in parts else None
                self._held.setdefault(name, []).append(_Held(path, start, total, part))


class LocalTensors(Mapping[str, Tensor]):
    """The same for the rows of a divided model that lie here."""

    def __init__(self, saved: Mapping[str, Tensor], kind: str, shards: Shards):
        assert isinstance(saved, SavedTensors)
        self._saved, self._kind, self._shards = saved, kind, shards

    def __getitem__(self, key: str) -> Tensor:
        name = parameter_of(self._kind, key)
        piece = self._shards.pieces.get(name)
        if piece is None or is_of_all(key, shape := self._saved.shape(key)):
            return self._saved[key]
        if shape == self._shards.shapes[name]:
            return self._saved.rows(key, piece.start, piece.stop)
        ranks = self._shards.ranks
        return self._saved.part(key, ranks.shard, ranks.shard_size)

    def __iter__(self) -> Iterator[str]:
        return iter(self._saved)

    def __len__(self) -> int:
        return len(self._saved)

    def __contains__(self, key: object) -> bool:
        return key in self._saved


def pieces_file(
    folder: Path, kind: str, tensors: Mapping[str, Tensor], shards: Shards
) -> list[Path]:
    """Write what this process has of them, as one of those that hold a copy together; the file, or
    nothing where it has nothing."""
    from safetensors.torch import save_file

    ranks = shards.ranks
    content: dict[str, Tensor] = {}
    rows: dict[str, tuple[int, int]] = {}
    parts: dict[str, tuple[int, int]] = {}
    for key, x in tensors.items():
        name = parameter_of(kind, key)
        piece = shards.pieces.get(name)
        if piece is None or is_of_all(key, tuple(x.shape)):
            if ranks.shard > 0:
                continue
        elif x.shape == shards.parameters[name].shape:
            rows[key] = (piece.start, piece.rows)
        else:
            parts[key] = (ranks.shard, ranks.shard_size)
        content[key] = x.detach().cpu().contiguous()
    if not content:
        return []
    path = folder / f"{kind}-{ranks.shard + 1:05}-of-{ranks.shard_size:05}.safetensors"
    told = {"format": "pt", _ROWS: json.dumps(rows), _PARTS: json.dumps(parts)}
    save_file(content, path, metadata=told)
    return [path]


def parameter_of(kind: str, key: str) -> str:
    """The parameter of a PackedModel that an entry belongs to."""
    if kind == "optimizer":
        return f"model.{key.rpartition('.')[0]}"
    return f"model.{key}" if kind == "remainders" else key.removesuffix(".remainder")


def is_of_all(key: str, shape: tuple[int, ...]) -> bool:
    """Whether an entry is the same for every row: a count of steps."""
    return not shape or key.endswith(".step")


def _other_number(held: _Held) -> str:
    _, count = held.part or (0, 1)
    wanted = f"shard_size {count}" if held.part else "one process"
    return (
        f"resume_from_checkpoint: {held.path.parent.parent} was written with {wanted}, and moments "
        "in groups (adam_moments int8, optimizers of 8 bits) stay as they were divided: resume "
        f"with {wanted}"
    )


def _start(held: _Held) -> int:
    return held.start or 0


def _opened(path: Path):  # type: ignore[no-untyped-def]  # safetensors has no type for it
    from safetensors import safe_open

    return safe_open(path, "pt")


def _read(path: Path, name: str) -> Tensor:
    with _opened(path) as file:
        found: Tensor = file.get_tensor(name)
    return found
