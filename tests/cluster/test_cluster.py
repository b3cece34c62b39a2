"""`fasttr plan`: counts that can be checked by hand, and what it prints."""

from __future__ import annotations

import json

import pytest

from fasttr.cli import main
from fasttr.cluster.modes import estimate, modes, stage_of, traffic_of
from fasttr.cluster.rates import CARDS, Machine, measured
from fasttr.cluster.report import config_of
from fasttr.cluster.step import Model, Work, again, step_seconds, useful_operations
from fasttr.errors import FasttrError
from fasttr.memory.activations import Recompute
from fasttr.memory.choose import USABLE, Wishes, choose
from fasttr.memory.plan import Setup
from fasttr.memory.shapes import SHAPES
from fasttr.memory.sizes import sizes_of
from tests.runs import error_line

GB = 1e9
H100 = Machine.of("h100")


def sizes(name):
    return sizes_of(SHAPES[name].config(), bf16=True)


@pytest.mark.parametrize("name", ["llama-3-8b", "pythia-2.8b", "llama-3-70b", "llama-3.1-405b"])
def test_a_shape_and_what_is_counted_of_its_config_agree(name):
    """Two ways to the same numbers: arithmetic on the shape, and a model without storage."""
    counted, by_hand = Model.of_sizes(sizes(name)), Model.of(SHAPES[name])
    assert counted == by_hand
    billions = {"llama-3-8b": 8.03, "pythia-2.8b": 2.78, "llama-3-70b": 70.55}
    billions["llama-3.1-405b"] = 405.85
    assert counted.parameters / 1e9 == pytest.approx(billions[name], abs=0.01)


def test_traffic_of_a_full_shard_is_two_gathers_and_a_sum():
    """8B over 8 cards, two micro-steps: bf16 matrices, fp32 embedding, sums of gradients in fp32;
    one gather more to score."""
    held = sizes("llama-3-8b").parameters
    (full,) = [mode for mode in modes(8, 8) if mode.name == "full shard"]
    assert (full.shard, full.replicate) == (8, 1)
    lying = 2 * held.split + 4 * held.whole
    traffic = traffic_of(sizes("llama-3-8b"), full, packs=2, scores=False)
    expected = 2 * 7 / 8 * (2 * lying + 4 * held.all)
    assert traffic.overlapped == pytest.approx(expected)
    assert expected / GB == pytest.approx(2 * 7 / 8 * (2 * 17.11 + 32.12), rel=1e-3)
    assert traffic.at_end == 0
    scored = traffic_of(sizes("llama-3-8b"), full, packs=2, scores=True)
    assert scored.overlapped - traffic.overlapped == pytest.approx(2 * 7 / 8 * lying)


def test_replicas_send_their_sums_once_a_step_and_a_hybrid_less_of_them():
    held = sizes("llama-3-8b").parameters
    by_name = {mode.name: mode for mode in modes(16, 8)}
    whole = traffic_of(sizes("llama-3-8b"), by_name["data parallel"], packs=3, scores=True)
    assert whole.overlapped == 0
    assert whole.at_end == pytest.approx(2 * 15 / 16 * 4 * held.all)
    hybrid = traffic_of(sizes("llama-3-8b"), by_name["HSDP, a node a copy"], packs=3, scores=True)
    assert hybrid.at_end == pytest.approx(2 * 1 / 2 * 4 * held.all / 8)


def test_traffic_that_work_cannot_hide_is_waited_for():
    """The same step over a network a thousand times slower."""
    (full,) = [mode for mode in modes(16, 8) if mode.name == "full shard"]
    setup = Setup(
        sizes("llama-3-8b"), bf16=True, chunk_rows=4096, compiled=True, world=16, shard=16
    )
    memory = choose(setup, Wishes(longest=1024), USABLE * CARDS["h100"].memory)
    work = Work.of_pairs(512, 128, 256)
    fast = estimate(full, memory, work, H100._replace(network=350e9), gpus_per_node=8)
    slow = estimate(full, memory, work, H100._replace(network=45e6), gpus_per_node=8)
    assert fast.waiting < fast.seconds / 10
    in_network = slow.traffic.overlapped / 45e6
    assert slow.waiting == pytest.approx(in_network - slow.computing - slow.scoring)
    assert slow.mfu < fast.mfu < 0.7


def test_a_step_on_two_cards_takes_half_as_long_but_for_the_optimizer():
    setup = Setup(sizes("llama-3-8b"), bf16=True, chunk_rows=4096, compiled=True)
    memory = choose(setup, Wishes(longest=1024, tokens=8192), 140 * GB)
    work = Work.of_pairs(512, 128, 256)
    model = Model.of_sizes(setup.sizes)
    one = step_seconds(model, work, stage_of(memory), H100)
    two = step_seconds(model, work.over(2), stage_of(memory), H100)
    assert one.products == 2 * two.products
    assert one.sweep == two.sweep
    # 6 operations a weight and token, and the head on the rows that predict.
    useful = useful_operations(model, work)
    layers = 6 * SHAPES["llama-3-8b"].layer_weights * 32 * 512 * 640
    head = 6 * 128256 * 4096 * 512 * 512
    attended = 512 * (2 * 384 * 385 // 2 - 128 * 129 // 2)
    assert useful == pytest.approx(layers + head + 12 * attended * 4096 * 32)


def test_what_is_made_again_follows_the_budget():
    found = [again(Recompute(True, budget=budget)).products for budget in (1, 0.8, 0.4, 0.2, 0)]
    assert found == [0, 0, 0.27, 0.54, 0.73]
    assert again(Recompute(True, whole_layers=True)).products == 0.73
    assert again(Recompute(True, budget=0.6)).products == 0.27


def printed(capsys, *args) -> str:
    main(["plan", *args])
    return capsys.readouterr().out


def test_70b_on_64_cards_and_405b_on_512_fit_where_they_are_sharded(capsys):
    out = printed(
        capsys, "--model", "llama-3-70b", "--gpus", "64", "--train_batch_size", "512"
    ).splitlines()
    assert out[0] == "llama-3-70b, 70.55 billion parameters, on 64 x h100, 8 a machine"
    assert out[1].startswith("A model, not a measurement: 700 TFLOP/s")
    rows = {line.split("  ")[0]: line for line in out[5:]}
    assert "does not fit" in rows["data parallel"]
    assert "%" in rows["full shard"]
    out = printed(
        capsys, "--model", "llama-3.1-405b", "--gpus", "512", "--train_batch_size", "4096"
    )
    (full,) = [line for line in out.splitlines() if line.startswith("full shard")]
    assert "does not fit" not in full


def test_a_model_of_ones_own_is_read_from_its_config_and_an_unknown_one_refused(capsys, tmp_path):
    config_of("qwen2.5-0.5b").save_pretrained(tmp_path)
    from_folder = printed(capsys, "--model", str(tmp_path))
    from_file = printed(capsys, "--model", str(tmp_path / "config.json"))
    by_name = printed(capsys, "--model", "qwen2.5-0.5b")
    assert from_folder.splitlines()[1:] == from_file.splitlines()[1:] == by_name.splitlines()[1:]
    line = error_line(capsys, ["plan", "--model", "llama-3-80b"])
    assert line.startswith("model: got 'llama-3-80b'; wanted a folder, a config.json or one of")
    line = error_line(capsys, ["plan", "--model", "llama-3-8b", "--gpus", "12"])
    assert line.startswith("gpus: got 12 with 8 a machine; wanted whole machines")


def test_measured_rates_take_the_place_of_assumed_ones(capsys, tmp_path):
    figures = [{"what": "copy", "value": 4100.0}, {"what": "layer products, T 16384", "value": 350}]
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps({"parts": [{"part": "facts", "figures": figures}]}))
    found = measured(Machine.of("h200"), str(path))
    assert (found.memory, found.products) == (4.1e12, 3.5e14)
    assert found.attention == pytest.approx(Machine.of("h200").attention / 2)
    out = printed(capsys, "--model", "llama-3-8b", "--card", "h200", "--results", str(path))
    assert "350 TFLOP/s of products, 4.10 TB/s of memory (memory, products measured in" in out
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(FasttrError, match="results: cannot read the rates"):
        measured(H100, str(tmp_path / "other.json"))
