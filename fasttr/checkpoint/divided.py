"""Checkpoints of a model that is divided among processes: each writes a file of whole weights, so
that the folder is a Hugging Face folder like any other, and a file of its rows of the training
state. Every rank calls these functions."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from fasttr_kernels.rounding import split_halves
from torch import Tensor

from fasttr.checkpoint import folder as folders
from fasttr.checkpoint.pieces import write_pieces
from fasttr.checkpoint.state import STATE_DIR, RunState, Share, digests_of, write_facts
from fasttr.distributed.ranks import Ranks
from fasttr.models.load import own_config
from fasttr.models.packed import PackedModel
from fasttr.models.sharded import Shards

_INDEX = "model.safetensors.index.json"
_ONE_FILE = "100000GB"


def save_checkpoint(
    output_dir: Path, step: int, policy: PackedModel, tokenizer: Any, state: RunState | None
) -> Path:
    """Write `checkpoint-STEP`; without a state it holds the model alone. On failure of any rank the
    earlier ones stand untouched."""
    target = folders.folder_of(output_dir, step)
    shards = _shards_of(policy)
    with _opened(shards.ranks, folders.aside_for(target), target) as folder:
        _write_model(policy, tokenizer, folder)
        if state is not None:
            _write_state(folder, state, shards)
    return target


def save_final(output_dir: Path, policy: PackedModel, tokenizer: Any) -> None:
    """The trained model into `output_dir` itself, each file by a rename."""
    ranks = _shards_of(policy).ranks
    with _opened(ranks, folders.final_for(output_dir), output_dir) as folder:
        _write_model(policy, tokenizer, folder)


def _shards_of(policy: PackedModel) -> Shards:
    assert policy.shards is not None
    return policy.shards


@contextlib.contextmanager
def _opened(
    ranks: Ranks, aside: contextlib.AbstractContextManager[Path], target: Path
) -> Iterator[Path]:
    """A folder that the first rank opens and, once all have written, puts into its place."""
    with contextlib.ExitStack() as open_here, folders.disk_errors(target):
        folder = None
        with ranks.together():
            if ranks.is_first:
                folder = open_here.enter_context(aside)
        path = Path(ranks.gathered(str(folder))[0])
        yield path
        with ranks.together():
            open_here.close()


def _write_model(policy: PackedModel, tokenizer: Any, folder: Path) -> None:
    ranks = _shards_of(policy).ranks
    if policy.adapter is not None:
        with ranks.together():
            if ranks.is_first:
                policy.adapter.save(folder)
                tokenizer.save_pretrained(folder)
        return
    own = _whole_weights(policy)
    written: _Written | None = None
    with ranks.together():
        if own:
            written = _write_own(policy, own, folder)
    del own
    all_written = [one for one in ranks.gathered(written) if one is not None]
    with ranks.together():
        if ranks.is_first:
            _write_index(folder, all_written)
            tokenizer.save_pretrained(folder)


class _Written(NamedTuple):
    file: str
    names: list[str]
    size: int  # bytes of the tensors


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
            found[name] = _as_saved(value, policy.bf16).cpu()
    if ranks.shard == 0:
        own = dict(policy.model.named_parameters(remove_duplicate=False))
        state = policy.model.state_dict()
        found |= {name: x.cpu() for name, x in state.items() if name not in own}
    return found


def _as_saved(value: Tensor, bf16: bool) -> Tensor:
    """In the dtype of the folder: the upper halves of fp32 numbers where bf16 is computed in."""
    if bf16 and value.dtype == torch.float32:
        return split_halves(value.contiguous())[0]
    return value.clone()


def _write_own(policy: PackedModel, own: dict[str, Tensor], folder: Path) -> _Written:
    """One file of weights as transformers would write them; the first rank's config too."""
    from safetensors import safe_open

    ranks = _shards_of(policy).ranks
    path = folder / f"model-{ranks.shard + 1:05}-of-{ranks.shard_size:05}.safetensors"
    if ranks.is_first:
        _save_with_config(policy, own, path)
    else:
        _save_converted(policy.model, own, path)
    with safe_open(path, "pt") as file:
        names = list(file.keys())
    return _Written(path.name, names, sum(x.nbytes for x in own.values()))


def _save_with_config(policy: PackedModel, own: dict[str, Tensor], path: Path) -> None:
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    # transformers clears a folder of weights that it has not written, those of other ranks too.
    apart = path.parent / ".config"
    with own_config(policy.model):
        policy.model.save_pretrained(apart, state_dict=own, max_shard_size=_ONE_FILE)
    os.replace(apart / "model.safetensors", path)
    for other in apart.iterdir():
        os.replace(other, path.parent / other.name)
    apart.rmdir()
    if policy.bf16:
        _say_bf16(path.parent / "config.json")


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


def _write_index(folder: Path, written: list[_Written]) -> None:
    weight_map = {name: one.file for one in written for name in one.names}
    size = sum(one.size for one in written)
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_state(folder: Path, state: RunState, shards: Shards) -> None:
    from safetensors.torch import save_file

    ranks = shards.ranks
    inner = folder / STATE_DIR
    with ranks.together():
        if ranks.is_first:
            inner.mkdir()
    of_weights = {
        "optimizer": state.optimizer,
        "reference": state.reference,
        "remainders": state.remainders,
    }
    with ranks.together():
        if ranks.is_first_copy:
            for kind, tensors in of_weights.items():
                write_pieces(inner, kind, tensors, shards)
    with ranks.together():
        if ranks.is_first:
            save_file(_on_host(state.tensors), inner / "state.safetensors")
    # Every rank hashes some of the files.
    found: dict[str, dict[str, Any]] = {}
    with ranks.together():
        found = digests_of(folder, Share(ranks.rank, ranks.world))
    digests = {name: one for share in ranks.gathered(found) for name, one in share.items()}
    with ranks.together():
        if ranks.is_first:
            write_facts(folder, state, digests)


def _on_host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
