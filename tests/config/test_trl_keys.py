"""Every key of TRL is classed, and each is taken, ignored with its reason or refused with its
advice."""

import dataclasses
import re

import pytest

from docs.tables import keys_table
from fasttr.config.train_config import TrainConfig
from fasttr.config.trl import translate
from fasttr.config.trl_table import KTO_DEFAULTS, LAUNCH, OLDER, TABLE
from fasttr.data.mixture import Part
from fasttr.errors import FasttrError


def their_fields() -> dict[str, dict]:
    """The fields of TRL's dataclasses with their defaults, by class."""
    from trl import DPOConfig, KTOConfig, ModelConfig, ScriptArguments
    from trl.scripts.utils import DatasetMixtureConfig

    def default(field):
        return field.default_factory() if field.default is dataclasses.MISSING else field.default

    classes = (DPOConfig, KTOConfig, ModelConfig, ScriptArguments, DatasetMixtureConfig)
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
            ours = (
                KTO_DEFAULTS.get(name, TABLE[name].default)
                if cls == "KTOConfig"
                else TABLE[name].default
            )
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
            assert key.name in fields | {"optim", "env"}, key
        if key.kind == "renamed":
            assert set(key.ours.split(", ")) <= fields, key
        if key.kind in ("ignored", "refused"):
            assert key.name not in fields
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
        ({"loss_type": "bco"}, "loss_type: got 'bco'; TRL 1.16 has no bco for unpaired rows"),
        (
            {"optim": "adafactor"},
            "optim: got 'adafactor'; wanted one of adamw_torch, adamw_torch_fused",
        ),
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
        ({"accelerate_config": "zero3"}, "accelerate_config: got 'zero3'; wanted single_gpu or"),
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


def test_kto_says_that_its_order_is_random():
    _, notices = translate({"loss_type": "kto"})
    assert any(line.startswith("train_sampling_strategy: absent, so random") for line in notices)
    assert translate({"loss_type": "kto", "train_sampling_strategy": "sequential"})[1] == []


def test_the_table_for_readers_holds_every_key():
    table = keys_table()
    assert all(f"| `{name}` |" in table for name in TABLE)
    assert all(line.count("|") == 5 for line in table.splitlines() if line.startswith("|"))
