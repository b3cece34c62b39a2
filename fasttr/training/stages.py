"""Steps as folders: what was made once, from the same inputs, is not made again.

A step's folder is called NAME-KEY, where the key is a digest of everything that the step reads:
settings, and the keys of the steps before it. So a changed setting makes anew exactly what depends
on it, runs that share steps share their folders, and a step that was killed is taken up where its
own checkpoints are.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fasttr.console import say
from fasttr.errors import FasttrError
from fasttr.files import FolderLock, write_json

DONE = "done.json"
_CONTENT = ("*.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json")


class Step(NamedTuple):
    """A step that is done."""

    name: str
    key: str
    folder: Path
    facts: dict[str, Any]  # what `make` returned


class Store:
    """The folder that holds the steps, for one process at a time."""

    def __init__(self, root: Path):
        self.root = root
        try:
            self._lock = FolderLock(root)
        except BlockingIOError as error:
            raise FasttrError(
                f"output_dir: another process is working in {root}; wait for it, or take another "
                "folder"
            ) from error
        except (OSError, ValueError) as error:
            raise FasttrError(f"output_dir: cannot write {str(root)!r}: {error}") from error

    def close(self) -> None:
        self._lock.release()

    def step(
        self,
        name: str,
        inputs: Mapping[str, Any],
        make: Callable[[Path], Mapping[str, Any] | None],
    ) -> Step:
        """The step of these inputs, made where it is not there.

        `make` writes into the folder that it is given, which may hold what an earlier attempt left,
        and returns JSON values. `inputs` are JSON values and steps.
        """
        key = key_of(name, inputs)
        folder = self.root / f"{name}-{key[:12]}"
        done = folder / DONE
        if done.is_file():
            told = json.loads(done.read_text(encoding="utf-8"))
            if told["key"] == key:
                return Step(name, key, folder, told["facts"])
        say(f"\n== {folder.name}")
        folder.mkdir(parents=True, exist_ok=True)
        facts = dict(make(folder) or {})
        write_json(done, {"key": key, "facts": facts, "inputs": _described(inputs)})
        return Step(name, key, folder, facts)


def key_of(name: str, inputs: Mapping[str, Any]) -> str:
    """A digest of a step's name and of everything that it reads."""
    told = json.dumps([name, _described(inputs)], sort_keys=True)
    return hashlib.blake2b(told.encode(), digest_size=16).hexdigest()


def seed_of(seed: int, name: str) -> int:
    """A seed of its own for everything random in the step of that name."""
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    sequence = np.random.SeedSequence([seed, int.from_bytes(digest, "little")])
    return int(sequence.generate_state(1)[0])


def model_digest(name: str) -> str:
    """A digest of the files of a model's folder; a hub id stands for itself."""
    folder = Path(name)
    if not folder.is_dir():
        return name
    digest = hashlib.blake2b(digest_size=16)
    for pattern in _CONTENT:
        for path in sorted(folder.glob(pattern)):
            digest.update(path.name.encode())
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "blake2b").digest())
    return digest.hexdigest()


def lasting(metrics: Mapping[str, float]) -> dict[str, float]:
    """What a step keeps of a run's metrics, its times left out."""
    timed = ("perf/", "memory/", "train_runtime", "train_pairs")
    return {
        name: value
        for name, value in metrics.items()
        if not name.startswith(timed) and np.isfinite(value)
    }


def _described(inputs: Mapping[str, Any]) -> dict[str, Any]:
    return {name: x.key if isinstance(x, Step) else x for name, x in inputs.items()}
