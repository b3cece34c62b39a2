"""Low-rank adapters (LoRA, arXiv:2106.09685) of a model whose own weights are frozen, through peft.

peft puts its layers into the transformers model in place: packing, shared prompts and the fused
head see the same model as before. With B = 0 at the start the adapted model is the base bit for
bit, so that a fixed reference is the base, scored by the policy itself before its first step.
"""

from __future__ import annotations

import copy
import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fasttr.errors import FasttrError, first_line, one_line
from fasttr.models.quantised import is_quantised

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_NAME = "default"  # peft's name of the only adapter


@dataclass(frozen=True)
class AdapterConfig:
    """peft's LoraConfig, as far as it is honoured here; dropout is 0 and B starts at 0."""

    r: int = 16
    alpha: int = 32
    target_modules: str | list[str] | None = None  # None: peft's choice for the architecture
    target_parameters: list[str] | None = None
    modules_to_save: list[str] | None = None
    use_rslora: bool = False
    use_dora: bool = False
    seed: int = 42  # of the random A


class Factors(NamedTuple):
    """The names of the two factors of an adapted weight's update, B A."""

    a: str
    b: str


class AdapterContent(NamedTuple):
    """An adapter apart from its model."""

    weights: dict[str, Tensor]
    config: Any  # peft's

    def write(self, folder: Path) -> None:
        from safetensors.torch import save_file

        content = {name: x.contiguous() for name, x in self.weights.items()}
        save_file(content, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        self.config.save_pretrained(str(folder))


class Adapter:
    """The adapter of one model: what is trained, saved and read in place of the model's weights."""

    def __init__(self, peft_model: Any):
        self.peft_model = peft_model

    def save(self, folder: Path) -> None:
        """Write a peft folder: adapter_model.safetensors and adapter_config.json."""
        self.content().write(folder)

    def content(self) -> AdapterContent:
        """What `save` writes, on the host: a copy of what the adapter is now."""
        from peft import get_peft_model_state_dict

        # What is saved must not depend on whether the hub can be asked about the base.
        found = get_peft_model_state_dict(
            self.peft_model, adapter_name=_NAME, save_embedding_layers=False
        )
        config = copy.copy(self.peft_model.peft_config[_NAME])
        config.inference_mode = True
        weights = {name: x.detach().to("cpu", copy=True) for name, x in found.items()}
        return AdapterContent(weights, config)

    def read(self, folder: Path) -> None:
        """Take up the weights that `save` wrote for the same settings."""
        from peft import set_peft_model_state_dict
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = folder / WEIGHTS_FILE
        try:
            weights = load_file(path)
            result = set_peft_model_state_dict(self.peft_model, weights, adapter_name=_NAME)
        except (OSError, SafetensorError, RuntimeError) as error:
            raise FasttrError(f"cannot read the adapter {path}: {one_line(error)}") from error
        missing = [name for name in result.missing_keys if ".lora_" in name]
        if missing or result.unexpected_keys:
            name = [*missing, *result.unexpected_keys][0]
            raise FasttrError(
                f"{path} is of another adapter: {name} differs; wanted the settings it was made "
                "with"
            )

    def merge(self) -> Any:
        """Add B A to the weights for good; returns the transformers model, plain again.

        All of it is bfloat16 where the frozen matrices were kept in it.
        """
        merged = self.peft_model.merge_and_unload()
        kinds = {parameter.dtype for parameter in merged.parameters()}
        return merged.to(torch.bfloat16) if torch.bfloat16 in kinds else merged


def add_adapter(model: Any, config: AdapterConfig, name: str, revision: str = "main") -> Adapter:
    """Freeze a transformers model and put an adapter into it; `name` of the base is saved with it.

    FasttrError when peft is missing, knows no modules of that name, or when the result could not be
    trained exactly: an adapter on the head, which is never called as a module, or a copy of a
    weight that embedding and head share.
    """
    peft = _peft()
    if hasattr(model, "peft_config"):
        raise FasttrError(
            "model: got one that carries an adapter already; merge it first (merge_and_unload)"
        )
    is_tied = _tied(model)
    # The random A follows from the seed alone, whatever was drawn before.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        try:
            with warnings.catch_warnings():
                # peft asks transformers for a property by its former name.
                warnings.simplefilter("ignore", FutureWarning)
                peft_model = peft.get_peft_model(model, _peft_config(peft, config))
        except (ValueError, TypeError, KeyError, NotImplementedError) as error:
            raise FasttrError(
                f"lora_target_modules: peft cannot adapt {name}: {first_line(error)}"
            ) from error
    saved_with = peft_model.peft_config[_NAME]
    saved_with.base_model_name_or_path = name
    saved_with.revision = None if revision == "main" else revision
    _check(model, is_tied)
    return Adapter(peft_model)


def factor_names(model: nn.Module) -> list[Factors]:
    """The trained factors of every adapted weight, under the names of `model`'s parameters."""
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    found = []
    for name in trained:
        parts = name.split(".")
        for a, b in (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B")):
            if a in parts:
                found.append(Factors(name, ".".join(b if part == a else part for part in parts)))
    return found


def store_frozen_in_bf16(model: Any) -> None:
    """Keep the matrices that bfloat16 products read anyway in that dtype: half their memory.

    Embeddings, norms and biases stay fp32, and so does a head that is the embedding.
    """
    embedding = model.get_input_embeddings().weight
    for module in model.modules():
        if not isinstance(module, nn.Linear) or module.weight is embedding:
            continue
        if not module.weight.requires_grad and not is_quantised(module.weight):
            module.weight.data = module.weight.data.to(torch.bfloat16)


def is_adapter(name: str) -> bool:
    """Whether a name is a folder that holds an adapter in place of a model."""
    folder = Path(name)
    return (folder / CONFIG_FILE).is_file() and not (folder / "config.json").is_file()


def base_of(name: str, key: str) -> tuple[str, str]:
    """Name and revision of the model that the adapter in folder `name` was made for."""
    path = Path(name) / CONFIG_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        base = content["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FasttrError(f"{key}: cannot read {path}: {one_line(error)}") from error
    if not base:
        raise FasttrError(f"{key}: {path} does not say which model its adapter is for")
    return base, content.get("revision") or "main"


def merge_folder(model: Any, folder: str, key: str) -> Any:
    """The transformers model with the adapter of a folder added to its weights."""
    peft = _peft()
    try:
        return peft.PeftModel.from_pretrained(model, folder).merge_and_unload()
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise FasttrError(
            f"{key}: cannot read the adapter {folder}: {first_line(error)}"
        ) from error


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise FasttrError(
            "use_peft: needs the package peft; run pip install 'fasttr[lora]'"
        ) from error
    return peft


def _peft_config(peft: Any, config: AdapterConfig) -> Any:
    return peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=config.r,
        lora_alpha=config.alpha,
        lora_dropout=0.0,
        target_modules=_targets(config.target_modules),
        target_parameters=_list_or_none(config.target_parameters),
        modules_to_save=_list_or_none(config.modules_to_save),
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
    )


def _targets(names: str | list[str] | None) -> str | list[str] | None:
    """peft reads a text as a pattern of whole paths: a plain name alone is a list of one."""
    if isinstance(names, list) and len(names) == 1:
        names = names[0]
    if isinstance(names, str):
        return [names] if names.isidentifier() else names
    return _list_or_none(names)


def _list_or_none(names: list[str] | None) -> list[str] | None:
    return list(names) if names else None


def _check(model: Any, is_tied: bool) -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if isinstance(head, BaseTunerLayer):
        raise FasttrError(
            "lora_target_modules: got the head, whose weight the fused head reads without calling "
            "it; leave it out, or name it in lora_modules_to_save"
        )
    touched = (BaseTunerLayer, ModulesToSaveWrapper)
    if is_tied and (isinstance(head, touched) or isinstance(embedding, touched)):
        raise FasttrError(
            "lora_target_modules, lora_modules_to_save: got the embedding or the head of a model "
            "where they are one weight, which peft would take apart; leave them out"
        )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise FasttrError("lora_target_modules: nothing is left to train; name other modules")


def _tied(model: Any) -> bool:
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight
