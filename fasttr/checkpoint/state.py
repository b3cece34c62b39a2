"""What a run needs, beside the policy's weights, to go on exactly where it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fasttr.checkpoint.pieces import LocalTensors, SavedTensors
from fasttr.errors import FasttrError, one_line
from fasttr.metrics.sums import Averages
from fasttr.models.halves import remainders
from fasttr.models.packed import PackedModel
from fasttr.models.sharded import Shards
from fasttr.optim.adamw import schedule_state, take_up_schedule
from fasttr.optim.update import state_tensors, take_up_state
from fasttr.reference.logp_table import LogpTable
from fasttr.reference.moving import MovingReference

FORMAT = 2
# 1 had fp32 weights in its folder and no remainders.
READABLE = (1, FORMAT)
STATE_DIR = "fasttr"
_FACTS = "state.json"
_TENSOR_FILES = ("state", "optimizer", "reference", "remainders", "critic")
# What every state.json holds: `capture` writes the first four, the trainer config and data.
_WRITTEN = ("step", "updates", "window_scored", "num_tokens", "config", "data", "files")


class Share(NamedTuple):
    """Which files of a folder are this process's to look at."""

    number: int = 0
    of_how_many: int = 1

    def of(self, names: Iterable[str]) -> list[str]:
        return sorted(names)[self.number :: self.of_how_many]


ALL_FILES = Share()


class RunState(NamedTuple):
    """Everything beside the policy's weights."""

    facts: dict[str, Any]  # JSON: counters, configuration, fingerprints
    tensors: Mapping[str, Tensor]  # log-prob tables, metric sums, random state
    optimizer: Mapping[str, Tensor]  # NAME.KEY, such as NAME.exp_avg of AdamW
    reference: Mapping[str, Tensor]  # weights of a soft reference, else empty
    remainders: Mapping[str, Tensor]  # what bf16 weights of the folder leave out, else empty
    critic: Mapping[str, Tensor]  # a critic's weights and moments, else empty

    def of_rows(self, shards: Shards) -> RunState:
        """A state that was read, as the rows of a divided model that lie here see it."""
        return self._replace(
            optimizer=LocalTensors(self.optimizer, "optimizer", shards),
            reference=LocalTensors(self.reference, "reference", shards),
            remainders=LocalTensors(self.remainders, "remainders", shards),
        )


class Resumable(Protocol):
    """What a run shows of itself to be saved and taken up again."""

    step: int  # optimizer steps done
    window_scored: bool
    num_tokens: int
    total_loss: Tensor  # () over all steps
    averages: Averages  # since the last line of metrics

    @property
    def device(self) -> torch.device: ...
    @property
    def reference(self) -> MovingReference: ...
    @property
    def policy(self) -> PackedModel: ...
    @property
    def optimizer(self) -> torch.optim.Optimizer: ...
    @property
    def scheduler(self) -> Any: ...
    @property
    def critic_tensors(self) -> dict[str, Tensor]: ...
    @property
    def tables(self) -> Mapping[str, LogpTable]: ...


def capture(run: Resumable, facts: Mapping[str, Any]) -> RunState:
    """The state of a run; `facts` are JSON values to be kept with its own."""
    tensors = {
        "averages": run.averages.sums,
        "total_loss": run.total_loss,
        "rng": torch.get_rng_state(),
    }
    if run.device.type == "cuda":
        tensors["rng_cuda"] = torch.cuda.get_rng_state(run.device)
    for name, table in run.tables.items():
        rows = table.known_rows()
        if len(rows):
            tensors[f"{name}.rows"] = torch.from_numpy(rows)
            tensors[f"{name}.logp"] = torch.from_numpy(table.values[rows])
    own = {
        "step": run.step,
        "updates": run.reference.updates,
        "window_scored": run.window_scored,
        "num_tokens": run.num_tokens,
        "schedule": schedule_state(run.scheduler),
    }
    return RunState(
        facts={**own, **facts},
        tensors=tensors,
        optimizer=state_tensors(run.optimizer),
        reference=run.reference.named_tensors(),
        remainders=remainders(run.policy, run.optimizer),
        critic=run.critic_tensors,
    )


def apply(state: RunState, run: Resumable) -> None:
    """Take up a saved state; the policy's weights have been read from the same folder, and its
    remainders."""
    if run.policy.shards is not None:
        state = state.of_rows(run.policy.shards)
    facts, tensors = state.facts, state.tensors
    run.step = facts["step"]
    run.window_scored = facts["window_scored"]
    run.num_tokens = facts["num_tokens"]
    run.reference.updates = facts["updates"]
    run.averages.sums = tensors["averages"].to(run.device)
    run.total_loss = tensors["total_loss"].to(run.device)
    torch.set_rng_state(tensors["rng"])
    if run.device.type == "cuda" and "rng_cuda" in tensors:
        torch.cuda.set_rng_state(tensors["rng_cuda"], run.device)
    for name, table in run.tables.items():
        if f"{name}.rows" in tensors:
            table.values[tensors[f"{name}.rows"].numpy()] = tensors[f"{name}.logp"].numpy()
    run.reference.take_up(state.reference)
    take_up_state(run.optimizer, state.optimizer)
    take_up_schedule(run.scheduler, run.optimizer, run.step, facts.get("schedule"))


def write_state(folder: Path, state: RunState) -> None:
    """Write FOLDER/fasttr, with a digest of every file that FOLDER holds."""
    from safetensors.torch import save_file

    inner = folder / STATE_DIR
    inner.mkdir()
    _, *contents = state
    for name, tensors in zip(_TENSOR_FILES, contents, strict=True):
        if tensors:
            on_host = {key: x.detach().cpu().contiguous() for key, x in tensors.items()}
            save_file(on_host, inner / f"{name}.safetensors")
    found = [path for path in folder.rglob("*") if path.is_file()]
    write_facts(folder, state, digests_of(folder, found))


def write_facts(folder: Path, state: RunState, digests: Mapping[str, Any]) -> None:
    """Write state.json, which tells that FOLDER/fasttr is whole."""
    facts = {**state.facts, "format": FORMAT, "files": digests}
    (folder / STATE_DIR / _FACTS).write_text(json.dumps(facts, indent=1) + "\n")


def read_state(folder: Path, share: Share = ALL_FILES) -> RunState:
    """Check a checkpoint's state and open it, its tensors to be read when they are asked for;
    transformers reads the weights from the same folder.

    `share`: of the files, whose content this process checks.
    """
    facts = _read_facts(folder)
    _check_files(folder, facts["files"], share)
    parts = {name: SavedTensors(folder / STATE_DIR, name) for name in _TENSOR_FILES}
    return RunState(
        facts=facts,
        tensors=dict(parts["state"]),
        optimizer=parts["optimizer"],
        reference=parts["reference"],
        remainders=parts["remainders"],
        critic=parts["critic"],
    )


def weights_digest(model: PackedModel) -> str:
    """A digest of all parameters that is cheap for large models: names, shapes, sums of values and
    of magnitudes. Of a divided model every rank calls this."""
    sums = []
    for parameter in model.local_parameters().values():
        values = parameter.detach().double()
        sums += [float(values.sum()), float(values.abs().sum())]
    if model.shards is not None:
        # Rounded: the sums of other shards come in another order.
        sums = [float(f"{total:.9g}") for total in model.shards.ranks.totals(sums)]
    digest = hashlib.blake2b(digest_size=16)
    for i, (name, parameter) in enumerate(model.named_parameters()):
        of_one = (sums[2 * i], sums[2 * i + 1])
        digest.update(repr((name, tuple(parameter.shape), of_one)).encode())
    return digest.hexdigest()


def _read_facts(folder: Path) -> dict[str, Any]:
    path = folder / STATE_DIR / _FACTS
    if not folder.is_dir():
        raise FasttrError(
            f"resume_from_checkpoint: no folder {folder}; give true or a checkpoint-N folder"
        )
    if not path.is_file():
        raise FasttrError(
            f"resume_from_checkpoint: {folder} has no {STATE_DIR}/{_FACTS}, so it holds no "
            "reference, position or window; wanted a folder that fasttr saved"
        )
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        broken = _what_is_broken(facts)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        broken = one_line(error)
    if broken is not None:
        raise FasttrError(
            f"resume_from_checkpoint: {path} is broken: {broken}; use an earlier checkpoint"
        )
    return facts


def _what_is_broken(facts: Any) -> str | None:
    """Why the content of a state.json cannot be taken up, or None."""
    if not isinstance(facts, dict):
        return f"it holds {type(facts).__name__}, wanted an object"
    if facts.get("format") not in READABLE:
        return f"it has format {facts.get('format')}, wanted {FORMAT} or {READABLE[0]}"
    missing = [name for name in _WRITTEN if name not in facts]
    if missing:
        return f"it lacks {missing[0]}"
    is_listed = isinstance(facts["files"], dict) and isinstance(facts["config"], dict)
    return None if is_listed else "its files or its config are no object"


def _check_files(folder: Path, recorded: dict[str, Any], share: Share) -> None:
    """Raise FasttrError, naming the file, when one is missing, cut or changed."""
    for name, was in recorded.items():
        path = folder / name
        size = path.stat().st_size if path.is_file() else None
        wanted = was if isinstance(was, int) else was["bytes"]
        if size != wanted:
            raise FasttrError(
                f"resume_from_checkpoint: {folder} is incomplete: {name} has {size} bytes, wanted "
                f"{wanted}; use an earlier checkpoint"
            )
    digests = {
        name: recorded[name]["blake2b"]
        for name in share.of(recorded)
        if not isinstance(recorded[name], int)
    }
    found = _of_each(digests, lambda name: _digest(folder / name))
    changed = sorted(name for name, digest in digests.items() if found[name] != digest)
    if changed:
        raise FasttrError(
            f"resume_from_checkpoint: {folder} is damaged: {changed[0]} is not as it was written; "
            "use an earlier checkpoint"
        )


def digests_of(folder: Path, found: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """Size and digest of files in a folder, by their paths in it."""
    names = sorted(str(path.relative_to(folder)) for path in found)
    digests = _of_each(names, lambda name: _digest(folder / name))
    return {
        name: {"bytes": (folder / name).stat().st_size, "blake2b": digests[name]} for name in names
    }


def _of_each(names: Any, work: Any) -> dict[str, str]:
    """`work` of every name, side by side: hashing lets other threads run."""
    with ThreadPoolExecutor() as pool:
        return dict(zip(names, pool.map(work, names), strict=True))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
