"""Settings of low-rank adapters, and what their folders hold."""

import json

import numpy as np
import torch
from safetensors.torch import load_file

ADAPTER = {"use_peft": True, "lora_r": 4, "lora_target_modules": "all-linear"}
# The last name is regarded as the end of a path; gate_proj is in every layer.
KINDS = {
    "plain": {"lora_target_modules": None},
    "all-linear": {},
    "one module": {"lora_target_modules": "down_proj"},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "embedding": {"lora_target_modules": ["embed_tokens", "q_proj"]},
    "modules_to_save": {"lora_target_modules": "q_proj", "lora_modules_to_save": ["lm_head"]},
    "parameters": {
        "lora_target_modules": ["q_proj"],
        "lora_target_parameters": ["gate_proj.weight"],
    },
}


def adapter_of(folder):
    return load_file(folder / "adapter_model.safetensors")


def products_of(folder) -> dict[str, np.ndarray]:
    """lora_alpha / r B A of every adapted weight of a peft folder, by the weight's name."""
    config = json.loads((folder / "adapter_config.json").read_text())
    weights = adapter_of(folder)
    found = {}
    for name, a in weights.items():
        if "lora_A" in name:
            b = weights[name.replace("lora_A", "lora_B")]
            weight = name.removeprefix("base_model.model.").replace(".lora_A", "")
            product = b.double().numpy() @ a.double().numpy()
            found[weight] = config["lora_alpha"] / config["r"] * product
    return found


def logits_of(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(40)[None] + 3, use_cache=False).logits


def assert_same_adapters(a, b):
    x, y = adapter_of(a), adapter_of(b)
    assert x.keys() == y.keys()
    assert all(torch.equal(x[name], y[name]) for name in x)
