"""Where the values of a model come from, read by rows: the files of a folder, or a whole model in
memory. A process that holds some rows of every matrix reads no others."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from fasttr.errors import FasttrError

# What peft puts into the name of a weight that it has wrapped.
_WRAPPED = re.compile(r"\.(base_layer|original_module|modules_to_save\.default)(?=\.)")


class Source(Protocol):
    """Rows of tensors by the name of a parameter."""

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) on the host, in the dtype that they are kept in."""
        ...


class InMemory:
    """The values of a whole model."""

    def __init__(self, model: nn.Module):
        self._values = {name: p.data for name, p in named(model)}

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        return self._values[name][start:stop]


class InFiles:
    """The safetensors of a folder."""

    def __init__(self, folder: Path):
        from safetensors import safe_open

        self._file_of: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118  # a file of safetensors is no mapping
                    self._file_of[name] = path
                    self.shapes[name] = tuple(file.get_slice(name).get_shape())

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        from safetensors import safe_open

        with safe_open(self._file_of[name], "pt") as file:
            found: Tensor = file.get_slice(name)[start:stop]
        return found


class ByAlias:
    """Files of a model, some of whose parameters have several names: a head that is the embedding,
    or weights that peft has wrapped."""

    def __init__(self, files: InFiles, model: nn.Module):
        self._files = files
        self._stored_as: dict[str, str] = {}
        for names in aliases(model):
            stored = _stored(names, files.shapes)
            if stored is not None:
                self._stored_as.update(dict.fromkeys(names, stored))
        self.missing = [
            name
            for name, p in named(model)
            if ".lora_" not in name and not self._holds(name, tuple(p.shape))
        ]

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        return self._files.rows(self._stored_as[name], start, stop)

    def _holds(self, name: str, shape: tuple[int, ...]) -> bool:
        stored = self._stored_as.get(name)
        return stored is not None and self._files.shapes[stored] == shape


class FiniteOnly:
    """Another source, of which NaN and infinities are refused with a FasttrError under the setting
    `key`."""

    def __init__(self, source: Source, key: str, name: str):
        self._source, self._key, self._name = source, key, name

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        found = self._source.rows(name, start, stop)
        if not bool(torch.isfinite(found).all()):
            raise FasttrError(
                f"{self._key}: {self._name} holds NaN or infinity in {name}; wanted finite weights"
            )
        return found


def named(model: nn.Module) -> Iterable[tuple[str, nn.Parameter]]:
    """All parameters under all of their names."""
    return model.named_parameters(remove_duplicate=False)


def aliases(model: nn.Module) -> list[list[str]]:
    """The names of each parameter."""
    found: dict[nn.Parameter, list[str]] = {}
    for name, p in named(model):
        found.setdefault(p, []).append(name)
    return list(found.values())


def _stored(names: Iterable[str], shapes: Mapping[str, object]) -> str | None:
    """The first of a parameter's names that files have."""
    plain = [_WRAPPED.sub("", name) for name in names]
    return next((name for name in plain if name in shapes), None)


def whole(source: Source, name: str, shape: torch.Size) -> Tensor:
    """All of a tensor."""
    return source.rows(name, 0, shape[0])
