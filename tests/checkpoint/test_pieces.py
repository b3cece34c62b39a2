"""Tensors that several processes wrote in rows, read by any number of them."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from fasttr.checkpoint.pieces import LocalTensors, SavedTensors, pieces_file
from fasttr.distributed.ranks import Ranks
from fasttr.errors import FasttrError
from fasttr.models.sharded import Piece

WHOLE = torch.arange(15.0).view(5, 3)
NAME = "layer.weight"


def shards_of(rank: int, count: int):
    """What a model with one divided matrix and one norm shows of rank `rank` of `count`."""
    piece = Piece.of(5, rank, count)
    parameters = {
        f"model.{NAME}": WHOLE[piece.start : piece.stop],
        "model.norm.weight": torch.ones(3),
    }
    return SimpleNamespace(
        parameters=parameters,
        pieces={f"model.{NAME}": piece},
        shapes={f"model.{NAME}": (5, 3)},
        ranks=Ranks(rank, count, shard_size=count),
    )


def state_of(rank: int, count: int) -> dict[str, torch.Tensor]:
    """As an optimizer has it: moments by rows, their scales by groups, and a clock."""
    own = shards_of(rank, count).parameters[f"model.{NAME}"]
    return {
        f"{NAME}.exp_avg": own + 0.5,
        f"{NAME}.exp_avg_scale": torch.full((2,), float(rank)),
        f"{NAME}.step": torch.tensor([7.0, 0.1, 0.2]),
        "norm.weight.exp_avg": torch.full((3,), 9.0),
    }


@pytest.fixture
def by_two(tmp_path):
    for rank in range(2):
        (path,) = pieces_file(tmp_path, "optimizer", state_of(rank, 2), shards_of(rank, 2))
        assert path.name == f"optimizer-0000{rank + 1}-of-00002.safetensors"
    return SavedTensors(tmp_path, "optimizer")


def test_rows_of_two_processes_are_one_tensor(by_two):
    assert torch.equal(by_two[f"{NAME}.exp_avg"], WHOLE + 0.5)
    assert by_two.shape(f"{NAME}.exp_avg") == (5, 3)
    assert by_two[f"{NAME}.step"].tolist() == pytest.approx([7.0, 0.1, 0.2])
    assert by_two["norm.weight.exp_avg"].tolist() == [9.0] * 3
    assert len(by_two) == 4


@pytest.mark.parametrize("count", [2, 3, 4, 7])
def test_any_number_of_processes_reads_its_rows(by_two, count):
    """Of 5 rows the last of 7 processes have none."""
    found = []
    for rank in range(count):
        shards = shards_of(rank, count)
        local = LocalTensors(by_two, "optimizer", shards)
        found.append(local[f"{NAME}.exp_avg"])
        assert found[-1].shape == shards.parameters[f"model.{NAME}"].shape
        assert local[f"{NAME}.step"].tolist() == pytest.approx([7.0, 0.1, 0.2])
        assert local["norm.weight.exp_avg"].tolist() == [9.0] * 3
    assert torch.equal(torch.cat(found), WHOLE + 0.5)


def test_what_goes_with_rows_needs_the_same_division(by_two):
    key = f"{NAME}.exp_avg_scale"
    assert LocalTensors(by_two, "optimizer", shards_of(1, 2))[key].tolist() == [1.0, 1.0]
    with pytest.raises(FasttrError, match="was written with shard_size 2"):
        LocalTensors(by_two, "optimizer", shards_of(1, 3))[key]
    with pytest.raises(FasttrError, match="was written with shard_size 2"):
        by_two[key]


def test_a_file_of_one_process_is_read_in_rows(tmp_path):
    groups = {f"{NAME}.exp_avg": WHOLE, f"{NAME}.exp_avg_scale": torch.ones(4)}
    save_file(groups, tmp_path / "optimizer.safetensors")
    local = LocalTensors(SavedTensors(tmp_path, "optimizer"), "optimizer", shards_of(1, 2))
    assert torch.equal(local[f"{NAME}.exp_avg"], WHOLE[3:])
    with pytest.raises(FasttrError, match="was written with one process"):
        local[f"{NAME}.exp_avg_scale"]


def test_names_of_a_reference_and_of_remainders_lead_to_their_weights(tmp_path):
    reference = {f"model.{NAME}": WHOLE[:3], f"model.{NAME}.remainder": WHOLE[:3].short()}
    pieces_file(tmp_path, "reference", reference, shards_of(0, 2))
    pieces_file(tmp_path, "remainders", {NAME: WHOLE[:3].short()}, shards_of(0, 2))
    shards = shards_of(1, 4)  # rows 2 and 3, of which one was written
    for kind, key in (("reference", f"model.{NAME}.remainder"), ("remainders", NAME)):
        saved = SavedTensors(tmp_path, kind)
        assert torch.equal(LocalTensors(saved, kind, shards)[key], WHOLE[2:3].short())
