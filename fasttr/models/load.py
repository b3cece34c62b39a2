"""Reading and saving a causal language model whose attention is packed."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fasttr.console import say
from fasttr.data.tokens import adjust
from fasttr.distributed.ranks import ALONE, Ranks
from fasttr.errors import FasttrError, first_line
from fasttr.hub import go_offline_if_unreachable
from fasttr.models import attention, checks, liger, lora, quantised
from fasttr.models.compiled import compile_layers
from fasttr.models.empty import empty_model, files_of, make_room
from fasttr.models.halves import in_bf16, round_matrices
from fasttr.models.packed import HeadSpec, PackedModel
from fasttr.models.probe import probe
from fasttr.models.quantised import Quantisation
from fasttr.models.router import RouterLoss
from fasttr.models.sharded import Layout, divide
from fasttr.models.slices import FiniteOnly, InMemory, Source
from fasttr.models.vocabulary import add_rows
from fasttr.packing.tiers import SHARED


@dataclass(frozen=True)
class ModelConfig:
    """Which model to read and how it computes."""

    name: str  # hub id or folder
    revision: str = "main"
    device: torch.device = torch.device("cpu")
    bf16: bool = False  # compute in bfloat16; weights are read as fp32 either way
    is_trained: bool = True  # else its matrices are bf16 alone under bf16: half the memory
    attn_implementation: str | None = None  # None: what the device has
    gradient_checkpointing: bool = False
    offloads: bool = False  # what the layers leave for the backward goes to host memory
    use_liger_kernel: bool | None = False  # None: where CUDA and liger-kernel are
    max_length: int | None = None
    ld_alpha: float | None = None
    adapter: lora.AdapterConfig | None = None  # train this of it, and nothing else
    chat_template: str | None = None  # instead of the tokenizer's own
    eos_token: str | None = None
    compile: bool | None = False  # decoder layers; None: on a CUDA device
    tier: str = SHARED  # how tokens reach it; refused where the probe does not find it exact
    trust_remote_code: bool = False
    router_aux_loss_coef: float = 0.0  # 0: the router's loss is not computed
    embedding_rows: int | None = None  # the embedding grows to as many; None: as it is
    quantisation: Quantisation | None = None  # of the frozen matrices under an adapter
    ranks: Ranks = ALONE  # among which its weights may be divided
    layout: Layout = field(default_factory=Layout)  # of weights that are
    key: str = "model_name_or_path"  # the setting that names it, for errors

    def read(self) -> Any:
        """The transformers config of the folder or hub id."""
        return load_config(self.name, self.revision, self.key, self.trust_remote_code)


def load_model(config: ModelConfig) -> PackedModel:
    """Read fp32 weights and make them give log-probs of packed trees. Dropout is 0 everywhere.

    A folder with an adapter is read as its base with the adapter merged.
    """
    hf_config = config.read()
    checks.check_rope(hf_config, config.name, config.max_length)
    support = probe(hf_config, trust_remote_code=config.trust_remote_code)
    support.require(config.tier, config.key, config.name)
    original = copy.deepcopy(hf_config)
    for key in dropout_rates(hf_config):
        setattr(hf_config, key, 0.0)
    if config.ranks.is_sharded:
        return _load_divided(config, hf_config, original)
    model = _read_weights(config, hf_config)
    model.fasttr_config = original
    grow_embedding(model, config)
    checks.check_finite(model.named_parameters(), config.key, config.name)
    adapter = adapter_on(model, config)
    if config.bf16 and adapter is not None:
        lora.store_frozen_in_bf16(model)
    elif config.bf16 and not config.is_trained:
        round_matrices(model)
    if config.quantisation is None:
        model.to(config.device)
    return finish_packed(model.train(), config, adapter)


def grow_embedding(model: Any, config: ModelConfig) -> None:
    """Add the rows that are asked for; the model and the folder it is saved to say so."""
    if config.embedding_rows is not None and add_rows(model, config.embedding_rows):
        model.fasttr_config.get_text_config().vocab_size = config.embedding_rows
        say(f"resize_embeddings: {config.name} has {config.embedding_rows} rows now")


def _load_divided(config: ModelConfig, hf_config: Any, original: Any) -> PackedModel:
    """Every rank reads its own rows where the files are as the model wants them; else the whole
    model, of which it keeps its rows."""
    implementation = attention.register() if config.tier == SHARED else None
    model = empty_model(hf_config, implementation, config.trust_remote_code)
    source: Source | None = None
    # New rows are the mean of all; a magnitude of DoRA starts as the norm of a whole weight.
    needs_all = config.embedding_rows or (config.adapter and config.adapter.use_dora)
    if not lora.is_adapter(config.name) and not needs_all:
        source = files_of(config.name, config.revision, model, config.ranks)
    if source is None:
        with config.ranks.together():
            model = _read_weights(config, hf_config)
    elif config.adapter is not None:
        make_room(model)
    _take_generation_config(model, config)
    model.fasttr_config = original
    grow_embedding(model, config)
    adapter = adapter_on(model, config)
    model.train()
    if source is None:
        source = InMemory(model)
    elif adapter is not None:
        source = files_of(config.name, config.revision, model, config.ranks)
    return finish_packed(model, config, adapter, source)


def _take_generation_config(model: Any, config: ModelConfig) -> None:
    """That of the folder, which a model without values has not read."""
    from transformers import GenerationConfig

    with contextlib.suppress(OSError):  # a folder may have none
        model.generation_config = GenerationConfig.from_pretrained(
            config.name, revision=config.revision
        )


def adapter_on(model: Any, config: ModelConfig) -> lora.Adapter | None:
    """The adapter that is to be trained, now in the model; None where the model itself is."""
    if config.adapter is None:
        return None
    return lora.add_adapter(model, config.adapter, config.name, config.revision)


def finish_packed(
    model: Any,
    config: ModelConfig,
    adapter: lora.Adapter | None,
    source: Source | None = None,
) -> PackedModel:
    """A model whose attention is packed and whose weights are on their device, as a PackedModel;
    or divided among `config.ranks`, with the weights of `source`."""
    if config.use_liger_kernel and config.device.type != "cuda":
        raise FasttrError(
            f"use_liger_kernel: got true on {config.device.type}; Liger's kernels need CUDA: "
            "leave it out"
        )
    if config.tier != SHARED:
        model.set_attn_implementation(attention.own_attention(model, config.attn_implementation))
    if liger.is_wanted(config.use_liger_kernel, config.device, model.config.model_type):
        liger.patch(model)
    if config.gradient_checkpointing:
        checkpoint_activations(model, True)
    backend = attention.backend_for(config.attn_implementation, config.device, config.bf16)
    if config.tier == SHARED:
        attention.announce_slow(model.config, backend)
    packed = PackedModel(
        model,
        HeadSpec.of(model.config),
        backend,
        config.bf16,
        config.ld_alpha,
        tier=config.tier,
        router=RouterLoss(model, config.router_aux_loss_coef)
        if config.router_aux_loss_coef
        else None,
        adapter=adapter,
    )
    packed.offloads = config.offloads
    if source is not None:
        finite = FiniteOnly(source, config.key, config.name)
        packed.shards = divide(packed, finite, config.ranks, config.layout, config.device)
    checks.check_head(packed, config.key, config.name)
    checks.check_forward(packed, config.key, config.name)
    if packed.shards is not None:
        packed.shards.settle()
    compile_layers(packed, config.compile)
    return packed


def load_config(
    name: str,
    revision: str = "main",
    key: str = "model_name_or_path",
    trust_remote_code: bool = False,
) -> Any:
    """The transformers config of a folder or hub id, of a causal language model."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    if lora.is_adapter(name):
        name, revision = lora.base_of(name, key)
    if name.startswith(("/", ".", "~")) and not Path(name).is_dir():
        raise FasttrError(
            f"{key}: there is no folder {name}; wanted a Hugging Face folder or a hub id"
        )
    checks.check_no_adapter(Path(name), key)
    is_offline = not Path(name).is_dir() and go_offline_if_unreachable()
    try:
        config = AutoConfig.from_pretrained(
            name, revision=revision, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, AttributeError, TypeError, StrictDataclassError) as error:
        if is_offline and isinstance(error, OSError):
            raise FasttrError(
                f"{key}: there is no folder {name!r} here, and the hub does not answer or is not "
                "asked (HF_HUB_OFFLINE): check the name and the network"
            ) from error
        if "trust_remote_code" in str(error):
            raise FasttrError(
                f"{key}: {name} is code from its own repository, which is run with "
                "trust_remote_code true alone"
            ) from error
        raise FasttrError(f"{key}: cannot read {name!r}: {first_line(error)}") from error
    checks.check_not_quantised(config, key, name)
    checks.check_causal(config, key)
    return config


def check_loadable(config: ModelConfig) -> Any:
    """The model's config, once its weights are known to be there, as far as that can be seen
    without reading them."""
    content = config.read()
    folder = Path(config.name)
    checks.check_weight_files(folder, config.key)
    if folder.is_dir() and not lora.is_adapter(config.name):
        checks.check_tensors(content, folder, config.key, config.trust_remote_code)
    return content


def tokenizer_of(model: ModelConfig) -> Any:
    """The tokenizer of a model, with the template and the EOS that its configuration gives it."""
    tokenizer = load_tokenizer(model.name, model.revision, model.key, model.trust_remote_code)
    adjust(tokenizer, chat_template=model.chat_template, eos_token=model.eos_token)
    return tokenizer


def load_tokenizer(
    name: str,
    revision: str = "main",
    key: str = "model_name_or_path",
    trust_remote_code: bool = False,
) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            name, revision=revision, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # a broken tokenizer.json raises a bare Exception
        if "trust_remote_code" in str(error):
            raise FasttrError(
                f"{key}: the tokenizer of {name} is code from its own repository, which "
                "is run with trust_remote_code true alone"
            ) from error
        raise FasttrError(f"{key}: no tokenizer in {name!r}: {first_line(error)}") from error


def has_tokenizer(name: str) -> bool:
    """Whether a folder holds a tokenizer; a hub id is taken to have one."""
    return not Path(name).is_dir() or (Path(name) / "tokenizer_config.json").is_file()


def dropout_rates(owner: Any) -> list[str]:
    """The attributes of a config of transformers, or of a module, that set dropout above 0."""
    rates = {k: v for k, v in vars(owner).items() if "dropout" in k or "pdrop" in k}
    return [key for key, value in rates.items() if isinstance(value, float) and value > 0]


def save_model(packed: PackedModel, tokenizer: Any, folder: Path) -> None:
    """Write a Hugging Face folder: config, safetensors, tokenizer, chat template; or a peft folder,
    where an adapter is what was trained. A model's weights are bf16 where it computes in it, else
    fp32."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    if packed.adapter is not None:
        packed.adapter.save(folder)
    else:
        dtype = in_bf16(packed.model) if packed.bf16 else contextlib.nullcontext()
        with own_config(packed.model), dtype:
            packed.model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@contextlib.contextmanager
def own_config(model: Any) -> Iterator[None]:
    """Within, the model carries the config it came with, dropout included, as a folder must."""
    changed, model.config = model.config, model.fasttr_config
    try:
        yield
    finally:
        model.config = changed


def _read_weights(config: ModelConfig, hf_config: Any) -> Any:
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    name, revision = config.name, config.revision
    if lora.is_adapter(name):
        name, revision = lora.base_of(name, config.key)
    try:
        model, loaded = AutoModelForCausalLM.from_pretrained(
            name,
            config=hf_config,
            dtype=torch.float32,
            attn_implementation=attention.register() if config.tier == SHARED else None,
            use_safetensors=True,
            revision=revision,
            trust_remote_code=config.trust_remote_code,
            output_loading_info=True,
            **_held_as(config),
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        if "no file named model.safetensors" in str(error):
            raise FasttrError(
                f"{config.key}: {config.name} holds no safetensors weights, and pickled ones "
                "(pytorch_model.bin) can run code when they are read; convert them with "
                "save_pretrained"
            ) from error
        raise FasttrError(
            f"{config.key}: cannot load {config.name!r}: {first_line(error)}"
        ) from error
    missing = sorted(loaded["missing_keys"])
    if missing:
        raise FasttrError(
            f"{config.key}: {config.name} lacks {len(missing)} weights ({missing[0]} first), which "
            "would be random"
        )
    return model if name == config.name else lora.merge_folder(model, config.name, config.key)


def _held_as(config: ModelConfig) -> dict[str, Any]:
    if config.quantisation is None:
        return {}
    return quantised.arguments(config.quantisation, config.bf16, config.device)


def checkpoint_activations(model: Any, on: bool) -> None:
    """Recompute activations in the backward, or keep them; a model that cannot recompute says so
    and keeps them."""
    if on and not model.supports_gradient_checkpointing:
        say(f"gradient_checkpointing: off, since {type(model).__name__} has none")
        return
    # transformers renamed it: both names are tried, the newer first.
    is_new = hasattr(model, "activation_checkpointing_enable")
    name = "activation_checkpointing" if is_new else "gradient_checkpointing"
    if on:
        getattr(model, f"{name}_enable")({"use_reentrant": False})
    elif getattr(model, f"is_{name}"):
        getattr(model, f"{name}_disable")()
