"""What TRL's users write of processes and of sharding, in words of ours: accelerate's plans and
files, FSDP's and DeepSpeed's own keys.

DeepSpeed and FSDP1 are not used. Their stages say which weights lie where, and the values of a run
do not depend on that.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fasttr.distributed.launchers import PLANS, WHOLE, Sharding, of_file, of_fsdp, of_zero
from fasttr.errors import FasttrError, one_line

# TRL's own files start so many; a number of one's own wins.
PROCESSES = 8


class Launch(NamedTuple):
    """What some keys ask for; None where they do not say."""

    sharding: Sharding = WHOLE
    num_processes: int | None = None
    precision: str | None = None  # no, bf16, fp16 or fp8


def launch_of(given: Mapping[str, Any]) -> Launch:
    """Of TRL's keys that are there. FasttrError, naming the key, for what is not done."""
    plan = given.get("accelerate_config") or given.get("config_file")
    key = "accelerate_config" if given.get("accelerate_config") else "config_file"
    found = _of_plan(str(plan), key) if plan else Launch()
    for name, read in _KEYS.items():
        value = given.get(name)
        if value:
            found = found._replace(sharding=read(value, given))
    return found


def _of_plan(plan: str, key: str) -> Launch:
    """A plan of TRL's by its name, or a file of accelerate."""
    if plan in PLANS:
        several = None if plan == "single_gpu" else PROCESSES
        return Launch(PLANS[plan], several)
    path = Path(plan)
    if not path.is_file():
        raise FasttrError(
            f"{key}: got {plan!r}; wanted one of {', '.join(PLANS)}, or a file of accelerate"
        )
    content = _yaml_of(path, key)
    machines = content.get("num_machines", 1)
    if machines not in (1, None):
        raise FasttrError(f"{key}: got num_machines {machines} in {plan}; {_MACHINES}")
    # Without a distributed type accelerate starts one process, whatever the file says.
    is_one = str(content.get("distributed_type", "NO")).upper() == "NO"
    processes = None if is_one else content.get("num_processes")
    return Launch(
        of_file(content, key),
        processes if isinstance(processes, int) else None,
        str(content.get("mixed_precision", "no")),
    )


_MACHINES = "start torchrun on every machine"


def _yaml_of(path: Path, key: str) -> Mapping[str, Any]:
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise FasttrError(f"{key}: cannot read {path}: {one_line(error)}") from error
    if not isinstance(content, Mapping):
        raise FasttrError(f"{key}: {path} holds no settings of accelerate")
    return content


def _of_use_fsdp(value: Any, given: Mapping[str, Any]) -> Sharding:
    return PLANS["fsdp2"]


def _of_fsdp_key(value: Any, given: Mapping[str, Any]) -> Sharding:
    """`fsdp` of transformers: true, or words such as `full_shard auto_wrap`."""
    words = value if isinstance(value, list) else str(value).lower().split()
    words = [str(word) for word in words]
    strategies = [word for word in words if word not in ("auto_wrap", "offload")]
    return of_fsdp(strategies[0] if strategies else "full_shard", offloads="offload" in words)


def _of_fsdp_config(value: Any, given: Mapping[str, Any]) -> Sharding:
    """`fsdp_config` refines `fsdp`, without which transformers does not read it."""
    content = _json_of(value, "fsdp_config")
    plain = {str(key).removeprefix("fsdp_"): one for key, one in content.items()}
    if not given.get("fsdp"):
        return WHOLE
    if plain.get("offload_params") or plain.get("cpu_offload"):
        return of_fsdp("true", offloads=True)
    if plain.get("reshard_after_forward") is False:
        return of_fsdp("false", offloads=False)
    return _of_fsdp_key(given["fsdp"], given)


def _of_deepspeed(value: Any, given: Mapping[str, Any]) -> Sharding:
    """A configuration of DeepSpeed, of which its stage and its offloads are read."""
    content = _json_of(value, "deepspeed")
    zero = content.get("zero_optimization", {})
    offloads = [zero.get(f"offload_{what}", {}) for what in ("optimizer", "param")]
    devices = [str(one.get("device", "none")) for one in offloads]
    return of_zero(str(zero.get("stage", 0)), devices)


def _json_of(value: Any, key: str) -> Mapping[str, Any]:
    """A mapping, or the JSON file that holds it."""
    if isinstance(value, Mapping):
        return value
    try:
        content = json.loads(Path(str(value)).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FasttrError(f"{key}: cannot read {value!r}: {one_line(error)}") from error
    if not isinstance(content, Mapping):
        raise FasttrError(f"{key}: {value!r} holds no object")
    return content


# In the order in which later ones win.
_KEYS = {
    "use_fsdp": _of_use_fsdp,
    "fsdp": _of_fsdp_key,
    "fsdp_config": _of_fsdp_config,
    "deepspeed": _of_deepspeed,
}
