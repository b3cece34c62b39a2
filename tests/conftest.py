"""Without a GPU the Triton kernels of the tests run in Triton's interpreter, chosen before they are
decorated. Nothing is fetched, and what `datasets` caches goes into a folder that is thrown away."""

import gc
import os
import tempfile
from pathlib import Path

import pytest

from fasttr import before_torch

before_torch.prepare()
import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
torch.set_num_threads(1)  # the models are tiny: more threads only wait for each other
_cache = tempfile.TemporaryDirectory(prefix="fasttr-tests-")
os.environ["HF_DATASETS_CACHE"] = _cache.name


def pytest_collection_finish() -> None:
    """What was imported lives as long as the session: no later collection looks at it again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def workspace(tmp_path_factory) -> Path:
    return make_workspace(tmp_path_factory.mktemp("workspace"))


def make_workspace(folder: Path) -> Path:
    """A folder with a tiny model, a perturbed copy of it (`reference`), and files of pairs."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from fasttr.models.scratch import init_model
    from tests.tiny import perturb, write_pairs

    folder.mkdir(exist_ok=True)
    write_pairs(folder / "train.jsonl", 24, seed=0)
    write_pairs(folder / "test.jsonl", 10, seed=1)
    write_pairs(folder / "weighted.jsonl", 8, seed=2, weights=True)
    init_model(
        "llama",
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        vocab_size=300,
        tokenizer_data=folder / "train.jsonl",
        output_dir=folder / "model",
    )
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    # Weights large enough that rows differ: at 0.02 every log-prob is near log V.
    perturb(model, 0.2, seed=5)
    model.save_pretrained(folder / "model")
    perturb(model, 0.02, seed=6)
    model.save_pretrained(folder / "reference")
    AutoTokenizer.from_pretrained(folder / "model").save_pretrained(folder / "reference")
    return folder


@pytest.fixture(autouse=True)
def _restore_determinism():
    """`full_determinism` is global to the process."""
    yield
    torch.use_deterministic_algorithms(False)
