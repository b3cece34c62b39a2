"""Checkpoints of a model that is divided among processes: each writes a file of whole weights, so
that the folder is a Hugging Face folder like any other, and a file of its rows of the training
state. Every rank calls these functions."""

from __future__ import annotations

import contextlib
import copy
import json
import os
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from fasttr.checkpoint import folder as folders
from fasttr.checkpoint.pieces import pieces_file
from fasttr.checkpoint.state import STATE_DIR, RunState, digests_of, write_facts
from fasttr.distributed.ranks import Ranks
from fasttr.models.halves import as_saved
from fasttr.models.packed import PackedModel
from fasttr.models.sharded import Shards

_INDEX = "model.safetensors.index.json"
_ONE_FILE = "100000GB"


class Written(NamedTuple):
    """What one rank has put into a folder."""

    files: list[Path]
    weights: dict[str, str]  # the file of each weight
    size: int  # bytes of the weights
    digests: dict[str, dict[str, Any]]  # of the files, as state.json has them


class Writing:
    """A folder that every rank writes files of its own into. The first opens it and, once all are
    done, puts it into its place; on failure of any rank what is there stands untouched."""

    def __init__(
        self,
        target: Path,
        ranks: Ranks,
        aside: contextlib.AbstractContextManager[Path],
        state: RunState | None = None,
    ):
        self._target, self._ranks, self._state = target, ranks, state
        self._open = contextlib.ExitStack()
        self._done: Future[Written] = Future()
        path = None
        with folders.disk_errors(target), ranks.together():
            if ranks.is_first:
                path = self._open.enter_context(aside)
        self.folder = Path(ranks.gathered(str(path))[0])

    def start(self, work: Callable[[Path], Written], in_background: bool) -> None:
        """Do this rank's part, which waits for no other."""
        if in_background:
            worker = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
            self._done = worker.submit(work, self.folder)
            worker.shutdown(wait=False)
            return
        try:
            self._done.set_result(work(self.folder))
        except Exception as error:  # raised by `finish`, where the other ranks hear of it
            self._done.set_exception(error)

    @property
    def is_done(self) -> bool:
        """Whether this rank's part is written, or has failed."""
        return self._done.done()

    def finish(self) -> None:
        """Wait for all ranks and put the folder into its place. An error of one is one of all."""
        own: Written | None = None
        with folders.disk_errors(self._target), self._open:
            with self._ranks.together():
                own = self._done.result()
            assert own is not None
            all_written = self._ranks.gathered(own)
            with self._ranks.together():
                if self._ranks.is_first:
                    self._complete(all_written)
                    self._open.close()

    def _complete(self, written: list[Written]) -> None:
        digests = {name: one for of_rank in written for name, one in of_rank.digests.items()}
        weights = {name: file for of_rank in written for name, file in of_rank.weights.items()}
        if weights:
            index = self.folder / _INDEX
            size = sum(of_rank.size for of_rank in written)
            content = {
                "metadata": {"total_size": size},
                "weight_map": dict(sorted(weights.items())),
            }
            index.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
            digests |= digests_of(self.folder, [index])
        if self._state is not None:
            write_facts(self.folder, self._state, dict(sorted(digests.items())))


def begin_checkpoint(
    output_dir: Path,
    step: int,
    policy: PackedModel,
    tokenizer: Any,
    state: RunState | None,
    in_background: bool = False,
) -> Writing:
    """Begin `checkpoint-STEP`, which `Writing.finish` ends; without a state it holds the model
    alone. In the background too it holds what the run is now."""
    target = folders.folder_of(output_dir, step)
    shards = _shards_of(policy)
    kept = None if state is None else _on_host(state, copies=in_background)
    of_model = _model_writer(policy, tokenizer)
    writing = Writing(target, shards.ranks, folders.aside_for(target), kept)

    def work(folder: Path) -> Written:
        written = of_model(folder)
        if kept is not None:
            written.files.extend(_write_state(folder, kept, shards))
        return written._replace(digests=digests_of(folder, written.files))

    writing.start(work, in_background)
    return writing


def save_final(output_dir: Path, policy: PackedModel, tokenizer: Any) -> None:
    """The trained model into `output_dir` itself, each file by a rename."""
    of_model = _model_writer(policy, tokenizer)
    writing = Writing(output_dir, _shards_of(policy).ranks, folders.final_for(output_dir))
    writing.start(of_model, in_background=False)
    writing.finish()


def _shards_of(policy: PackedModel) -> Shards:
    assert policy.shards is not None
    return policy.shards


def _model_writer(policy: PackedModel, tokenizer: Any) -> Callable[[Path], Written]:
    """This rank's part of a model's folder, with the weights of now."""
    ranks = _shards_of(policy).ranks
    is_first = ranks.is_first
    if policy.adapter is not None:
        content = policy.adapter.content() if is_first else None
        own: dict[str, Tensor] = {}
    else:
        content, own = None, _whole_weights(policy)
    model = _with_own_config(policy.model)
    says_bf16 = policy.bf16

    def work(folder: Path) -> Written:
        # transformers clears a folder of weights that it has not written, those of other ranks too.
        apart = folder / f".rank-{ranks.rank}"
        apart.mkdir()
        found = Written(files=[], weights={}, size=0, digests={})
        if content is not None:
            content.write(apart)
        if own:
            found = _write_own(model, own, apart, ranks)
            if is_first and says_bf16:
                _say_bf16(apart / "config.json")
        if is_first:
            tokenizer.save_pretrained(apart)
        for path in sorted(apart.iterdir()):
            os.replace(path, folder / path.name)
            found.files.append(folder / path.name)
        apart.rmdir()
        return found

    return work


def _whole_weights(policy: PackedModel) -> dict[str, Tensor]:
    """The weights that are this rank's to write, on the host. They are gathered one by one: no rank
    ever holds more than its share and one weight."""
    shards = _shards_of(policy)
    ranks = shards.ranks
    if not ranks.is_first_copy:
        return {}
    found: dict[str, Tensor] = {}
    load = [0] * ranks.shard_size
    for name, p in policy.model.named_parameters():
        owner = load.index(min(load))
        load[owner] += p.numel()
        value = shards.gathered(f"model.{name}")
        if owner == ranks.shard:
            found[name] = as_saved(value, policy.bf16).cpu()
    if ranks.shard == 0:
        own = dict(policy.model.named_parameters(remove_duplicate=False))
        state = policy.model.state_dict()
        found |= {name: x.cpu() for name, x in state.items() if name not in own}
    return found


def _with_own_config(model: Any) -> Any:
    """The same model with the config it came with, dropout included, as a folder must; the model
    itself, which may compute meanwhile, keeps the other."""
    found = copy.copy(model)
    found.config = copy.deepcopy(model.fasttr_config)
    return found


def _write_own(model: Any, own: dict[str, Tensor], folder: Path, ranks: Ranks) -> Written:
    """One file of weights as transformers would write them; the first rank's config too."""
    from safetensors import safe_open

    path = folder / f"model-{ranks.shard + 1:05}-of-{ranks.shard_size:05}.safetensors"
    size = sum(x.nbytes for x in own.values())  # transformers empties the mapping
    if ranks.is_first:
        _save_with_config(model, own, path)
    else:
        _save_converted(model, own, path)
    with safe_open(path, "pt") as file:
        weights = {name: path.name for name in file.keys()}  # noqa: SIM118  # no mapping
    return Written(files=[], weights=weights, size=size, digests={})


def _save_with_config(model: Any, own: dict[str, Tensor], path: Path) -> None:
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    model.save_pretrained(path.parent, state_dict=own, max_shard_size=_ONE_FILE)
    os.replace(path.parent / "model.safetensors", path)


def _save_converted(model: Any, own: dict[str, Tensor], path: Path) -> None:
    """What `save_pretrained` writes, which it does on the first rank alone: experts, which are one
    tensor in memory, have one each in files."""
    from safetensors.torch import save_file
    from transformers.core_model_loading import revert_weight_conversion

    converted = revert_weight_conversion(model, own)
    content = {name: x.contiguous() for name, x in converted.items()}
    save_file(content, path, metadata={"format": "pt"})


def _say_bf16(path: Path) -> None:
    """transformers writes the dtype of the first parameter in memory, which is an fp32 one."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config["dtype"] = "bfloat16"
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _on_host(state: RunState, copies: bool) -> RunState:
    """A state whose tensors are on the host; `copies` of them do not change with the run."""

    def kept(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: x.detach().to("cpu", copy=copies) for name, x in tensors.items()}

    return state._replace(
        tensors=kept(state.tensors),
        optimizer=kept(state.optimizer),
        reference=kept(state.reference),
        remainders=kept(state.remainders),
    )


def _write_state(folder: Path, state: RunState, shards: Shards) -> list[Path]:
    """This rank's files of a state."""
    from safetensors.torch import save_file

    ranks = shards.ranks
    inner = folder / STATE_DIR
    inner.mkdir(exist_ok=True)
    found = []
    if ranks.is_first:
        found.append(inner / "state.safetensors")
        save_file({name: x.contiguous() for name, x in state.tensors.items()}, found[0])
    if ranks.is_first_copy:
        for kind in ("optimizer", "reference", "remainders"):
            found += pieces_file(inner, kind, getattr(state, kind), shards)
    return found
