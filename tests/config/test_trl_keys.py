"""Every key of TRL is classed, and each is taken, ignored with its reason or refused with its
advice."""

import dataclasses
import re

import pytest
import torch

from docs.tables import keys_table
from fasttr.config.train_config import TrainConfig
from fasttr.config.trl import translate
from fasttr.config.trl_table import KTO_DEFAULTS, LAUNCH, OLDER, SFT_DEFAULTS, TABLE
from fasttr.data.mixture import Part
from fasttr.errors import FasttrError


def their_fields() -> dict[str, dict]:
    """The fields of TRL's dataclasses with their defaults, by class."""
    from trl import DPOConfig, KTOConfig, ModelConfig, ScriptArguments, SFTConfig
    from trl.scripts.utils import DatasetMixtureConfig

    def default(field):
        return field.default_factory() if field.default is dataclasses.MISSING else field.default

    classes = (
        DPOConfig,
        KTOConfig,
        SFTConfig,
        ModelConfig,
        ScriptArguments,
        DatasetMixtureConfig,
    )
    return {
        cls.__name__: {field.name: default(field) for field in dataclasses.fields(cls)}
        for cls in classes
    }


def test_every_key_of_the_installed_trl_is_classed_with_its_default():
    theirs = their_fields()
    fields = {name for found in theirs.values() for name in found}
    assert fields - TABLE.keys() == set()
    extra = {key.name for key in [*LAUNCH, *OLDER]} | {"env"}
    assert TABLE.keys() - fields - extra == set()
    for cls, found in theirs.items():
        for name, default in found.items():
            own = {"KTOConfig": KTO_DEFAULTS, "SFTConfig": SFT_DEFAULTS}.get(cls, {})
            ours = own.get(name, TABLE[name].default)
            assert ours == default, (cls, name)
            assert isinstance(ours, bool) == isinstance(default, bool), (cls, name)


def test_the_parts_of_a_mixture_have_trls_keys():
    from trl.scripts.utils import DatasetConfig

    ours, theirs = (
        {f.name: f.default for f in dataclasses.fields(cls)} for cls in (Part, DatasetConfig)
    )
    assert ours == theirs


def test_every_kind_is_carried_out():
    fields = {field.name for field in dataclasses.fields(TrainConfig)}
    for key in TABLE.values():
        if key.kind == "honoured":
            assert key.name in fields | {"env"}, key
        if key.kind == "renamed":
            assert set(key.ours.split(", ")) <= fields, key
        if key.kind in ("ignored", "refused"):
            assert key.name not in fields, key
            assert key.note, key


@pytest.mark.parametrize("name", sorted(TABLE))
def test_a_default_of_trl_is_accepted_silently(name):
    for default in (TABLE[name].default, KTO_DEFAULTS.get(name, TABLE[name].default)):
        ours, notices = translate({"train_sampling_strategy": "random", name: default})
        assert notices == []
        assert "ref_update" not in ours or ours["ref_update"] == "none"


def other_value(name: str):
    """A value of the key's type that is not its default."""
    key = TABLE[name]
    kind = key.type.removesuffix("?")
    if kind == "bool":
        return not key.default
    made = {
        "int": 7,
        "float": 0.25,
        "str": "something",
        "names": ["something"],
        "dict": {"a": 1},
        "any": "something",
    }
    return made[kind]


@pytest.mark.parametrize(
    "name", sorted(key.name for key in TABLE.values() if key.kind == "refused")
)
def test_what_is_refused_gives_its_advice(name):
    with pytest.raises(FasttrError) as stopped:
        translate({name: other_value(name)})
    assert str(stopped.value).startswith(f"{name}: got ")
    assert str(stopped.value).endswith(TABLE[name].note)
    assert "\n" not in str(stopped.value)


@pytest.mark.parametrize(
    "name", sorted(key.name for key in TABLE.values() if key.kind == "ignored")
)
def test_what_is_ignored_says_so_once(name):
    ours, notices = translate({name: other_value(name)})
    assert ours == {}
    assert notices == [f"{name}: ignored: {TABLE[name].note}"]


def test_a_soft_update_with_all_of_the_policy_is_hard():
    ours, _ = translate(
        {"sync_ref_model": True, "ref_model_mixup_alpha": 1.0, "ref_model_sync_steps": "128"}
    )
    assert (ours["ref_update"], ours["ref_update_every"]) == ("hard", 128)
    _, notices = translate({"ref_model_sync_steps": 128})
    assert notices == ["ref_model_sync_steps: ignored: read only with sync_ref_model: true"]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"completion_only_loss": False}, "completion_only_loss: got false; a prompt is never"),
        ({"dataset_mixer": "x"}, "dataset_mixer: got 'x'; wanted a mapping of data sets to shares"),
        (
            {"dataset_mixer": {"d": 1}, "dataset_splits": ["dev"]},
            "dataset_splits: got 'dev'; wanted names with train or test in them",
        ),
        (
            {"dataset_mixer": {"d": 1}, "dataset_configs": ["a", "b"]},
            "dataset_configs: got 2 for 1 data sets",
        ),
        ({"columns": "good"}, "columns: got 'good'; wanted such as chosen=good rejected=bad"),
        ({"device": "cuda"}, "unknown key 'device': a run takes the GPU when there is one"),
        ({"ref_update_alpha": 0.7}, "ref_update_alpha: got 0.7 without ref_update"),
        ({"ref_update_every": 8}, "ref_update_every: got 8 without ref_update"),
        ({"max_steps": "1e3"}, "max_steps: got 1e3; wanted int"),
        ({"per_device_train_batch_size": 2.5}, "per_device_train_batch_size: got 2.5; wanted int"),
        (
            {"per_device_train_batch_size": 0},
            "per_device_train_batch_size: got 0; wanted a whole number from 1",
        ),
        ({"per_device_train_batch_size": 2, "train_batch_size": 4}, "leave one of them out"),
        (
            {"sync_ref_model": True, "ref_update": "none"},
            "sync_ref_model: got True beside ref_update none",
        ),
        ({"no_bf16": True}, "unknown key 'no_bf16': write bf16: false"),
        ({"per_device_train_batchsize": 4}, "did you mean 'per_device_train_batch_size'"),
        ({"sync_ref_modle": True}, "did you mean 'sync_ref_model'"),
        ({"use_cpu": "maybe"}, "use_cpu: got maybe; wanted bool"),
        (
            {"model_init_kwargs": {"device_map": "auto"}},
            "model_init_kwargs: got device_map: 'auto'",
        ),
        ({"model_init_kwargs": "text"}, "model_init_kwargs: got 'text'; wanted a mapping"),
        ({"mixed_precision": "fp16"}, "mixed_precision: got 'fp16'; use bf16"),
        ({"warmup_ratio": 2}, "warmup_ratio: got 2; wanted a share"),
        ({"num_machines": 8}, "num_machines: got 8; start torchrun on every machine"),
        ({"learning_rate": True}, "learning_rate: got True; wanted float"),
        (
            {"accelerator_config": {"split_batches": True}},
            "accelerator_config: got {'split_batches': True}",
        ),
    ],
)
def test_a_wrong_value_is_one_line(values, expected):
    with pytest.raises(FasttrError, match=re.escape(expected)):
        translate(values)


def test_spellings_of_nothing_are_accepted():
    empty = {
        "fsdp": "",
        "deepspeed": False,
        "fsdp_config": {},
        "accelerator_config": {"even_batches": True},
    }
    assert translate(empty) == ({}, [])


def test_all_refusals_of_a_file_are_said_at_once():
    values = {
        "load_in_8bit": True,
        "num_machines": 8,
        "max_steps": "many",
        "lerning_rate": 1,
        "beta": 0.1,
        "weight_decay": -1.0,
        "lr_scheduler_type": "cosin",
        "loss_type": "dpo",
    }
    with pytest.raises(FasttrError) as stopped:
        translate(values)
    told = str(stopped.value)
    assert told.startswith("7 settings cannot be taken: (1) ")
    for part in (
        "load_in_8bit: got True; 8 bits are not built",
        "num_machines: got 8; start torchrun on every machine",
        "max_steps: got many; wanted int",
        "unknown key 'lerning_rate' (did you mean 'learning_rate'?)",
        "weight_decay: got -1.0; wanted a number from 0",
        "lr_scheduler_type: got 'cosin'; wanted one of linear",
        "loss_type: got 'dpo'; DPO is called sigmoid",
    ):
        assert part in told
    assert "beta" not in told


def test_more_refusals_than_a_person_reads_are_counted():
    names = [key.name for key in TABLE.values() if key.kind == "refused"]
    with pytest.raises(FasttrError) as stopped:
        translate({name: other_value(name) for name in names})
    assert len(str(stopped.value)) < 2000
    assert re.search(r"\.\.\. and \d+ more$", str(stopped.value))


def test_ranges_and_contradictions_are_said_at_once_too():
    with pytest.raises(FasttrError, match=r"2 settings .* max_length: .* beta: "):
        TrainConfig(beta=0.0, max_length=1)
    with pytest.raises(FasttrError, match=r"2 settings .* ld_alpha: .* group_size: "):
        TrainConfig(loss_type="sft", ld_alpha=0.5, group_size=3)


def test_older_names_of_one_thing_are_renamed():
    values = {
        "no_cuda": True,
        "hub_model_revision": "v1",
        "preprocessing_num_workers": 3,
        "dataset_streaming": True,
        "torch_dtype": "auto",
        "use_flash_attention_2": True,
        "max_seq_length": 512,
    }
    assert translate(values) == (
        {
            "use_cpu": True,
            "hub_revision": "v1",
            "dataset_num_proc": 3,
            "streaming": True,
            "dtype": "auto",
            "attn_implementation": "flash_attention_2",
            "max_length": 512,
        },
        [],
    )


def test_entries_of_a_model_that_concern_speed_are_ignored_with_a_line():
    entries = {"use_kernels": True, "use_cache": False, "dtype": "bfloat16", "revision": "v2"}
    ours, notices = translate({"model_init_kwargs": entries})
    assert ours == {"dtype": "bfloat16", "model_revision": "v2"}
    assert [line.split(":")[1].strip() for line in notices] == ["use_kernels", "use_cache"]


def test_the_mixer_of_alignment_handbook_becomes_a_mixture():
    ours, _ = translate(
        {
            "dataset_mixer": {"a": 0.5, "b": 1.0},
            "dataset_splits": ["train_prefs", "test_prefs"],
            "dataset_configs": ["x", None],
        }
    )
    assert ours["dataset_mixture"] == {
        "datasets": [
            {"id": "a", "config": "x", "split": "train_prefs", "weight": 0.5},
            {"id": "b", "config": None, "split": "train_prefs", "weight": 1.0},
        ],
        "test_datasets": [
            {"id": "a", "config": "x", "split": "test_prefs"},
            {"id": "b", "config": None, "split": "test_prefs"},
        ],
        "seed": 42,
        "draws_rows": False,
    }


def test_accumulation_that_is_written_makes_micro_batches():
    ours, _ = translate({"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3})
    assert ours == {
        "train_batch_size": 12,
        "group_size": 4,
        "micro_batch_size": 4,
        "eval_group_size": 8,
    }
    ours, _ = translate({"per_device_train_batch_size": 4})
    assert ours == {"train_batch_size": 4, "group_size": 4, "eval_group_size": 8}


def test_the_table_for_readers_holds_every_key():
    table = keys_table()
    assert all(f"| `{name}` |" in table for name in TABLE)
    assert all(line.count("|") == 5 for line in table.splitlines() if line.startswith("|"))


@pytest.mark.parametrize(
    "given",
    [
        {"dtype": "bfloat16"},
        {"torch_dtype": "bfloat16"},
        {"model_init_kwargs": {"dtype": "bfloat16"}},
        {"model_init_kwargs": {"torch_dtype": "bfloat16"}},
    ],
)
def test_bfloat16_weights_have_four_names_and_compute_in_bf16(given):
    config = TrainConfig(**translate(given)[0])
    assert config.dtype == "bfloat16"
    assert config.computes_in_bf16(torch.device("cpu"))
    assert not config.optimizer().keeps_masters
    assert TrainConfig(**translate({"bf16": True})[0]).optimizer().keeps_masters
