"""Operations of a pack by hand, and rates of training steps alone."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from fasttr import Callback, TrainConfig, train
from fasttr.metrics.throughput import FlopCount, Throughput, peak_flops
from fasttr.packing.layout import pack
from fasttr.packing.tiers import unshared
from tests.architectures import VOCAB
from tests.runs import settings, steps
from tests.tiny import random_trees, tiny_model

CPU = torch.device("cpu")
CUDA = torch.device("cuda")
# tiny_model("llama"): width 32, 4 heads of 8, 2 of keys and values, MLP 48, two layers.
ATTENTION = 32 * 32 + 2 * 32 * 16 + 32 * 32
MLP = 3 * 32 * 48
LAYERS = 2 * (ATTENTION + MLP + 2 * 32) + 32
HEAD = VOCAB * 32


class Clock:
    """Seconds that pass when told to."""

    def __init__(self):
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_operations_are_those_of_the_sizes():
    """6 a weight and token; 12 a layer, head and head width for each query with a key."""
    assert FlopCount.of(tiny_model("llama")) == (6 * LAYERS, 6 * HEAD, 12 * 2 * 4 * 8)


def test_a_tied_embedding_is_the_head_and_counts_once():
    tied = FlopCount.of(tiny_model("llama", tie_word_embeddings=True))
    assert tied == FlopCount.of(tiny_model("llama"))


def test_a_model_of_states_alone_has_no_attention():
    assert FlopCount.of(tiny_model("mamba2")).per_attended_pair == 0


def test_operations_of_a_pack_are_those_of_its_tokens_predicting_rows_and_pairs():
    """Prompt of 2 with completions of 3 and 1: segments of 5 queries on 5 keys and of 1 on 3."""
    count = FlopCount(per_token=1_000_000, per_predicting_row=1_000, per_attended_pair=1)
    attended = (1 + 2 + 3 + 4 + 5) + 3
    assert count.of_pack(pack(random_trees([(2, 3, 1)]))) == 6_004_000 + attended
    # Without a prompt nothing predicts the first token.
    assert count.of_pack(pack(random_trees([(0, 2)]))) == 2_001_000 + 3


def test_rates_are_those_of_the_time_within_steps():
    clock = Clock()
    throughput = Throughput(tiny_model("llama"), CPU, peak=1e6, clock=clock)
    batch = pack(random_trees([(2, 3, 1), (4, 2, 2)]))  # 6 and 8 tokens
    operations = FlopCount.of(tiny_model("llama")).of_pack(batch)
    for seconds in (3.0, 5.0):
        with throughput.step():
            throughput.add(batch, 2)
            clock.now += seconds
        clock.now += 1000.0
    found = throughput.read()
    assert found["perf/tokens_per_second"] == pytest.approx(2 * 14 / 8)
    assert found["perf/pairs_per_second"] == pytest.approx(4 / 8)
    assert found["perf/padding_fraction"] == 0.0
    assert found["perf/mfu"] == pytest.approx(2 * operations / 8 / 1e6)
    with throughput.step():
        throughput.add(batch, 2)
        clock.now += 7.0
    assert throughput.read()["perf/pairs_per_second"] == pytest.approx(2 / 7)


def test_padding_is_what_a_padded_row_has_beyond_its_tokens():
    throughput = Throughput(tiny_model("llama"), CPU, clock=Clock(), tier="padded")
    trees = [unshared(tree) for tree in random_trees([(2, 3, 1), (4, 2, 2)])]
    throughput.add(pack(trees), 2)  # sequences of 5, 3, 6 and 6 tokens in rows of 6
    assert throughput.read()["perf/padding_fraction"] == pytest.approx(4 / 24)


class Event:
    """What torch.cuda.Event does for us, on a clock of its own."""

    def __init__(self, clock: Clock):
        self.clock = clock
        self.is_read = False

    def record(self) -> None:
        self.at = self.clock.now

    def synchronize(self) -> None:
        self.is_read = True

    def elapsed_time(self, end: Event) -> float:
        assert end.is_read
        return 1000 * (end.at - self.at)


def test_on_cuda_the_devices_own_events_are_the_clock():
    device_clock = Clock()
    events = []

    def new_event() -> Event:
        events.append(Event(device_clock))
        return events[-1]

    def no_host_clock() -> float:
        raise AssertionError("the host runs ahead: its clock says nothing")

    throughput = Throughput(
        tiny_model("llama"), CUDA, peak=1e6, clock=no_host_clock, new_event=new_event
    )
    with throughput.step():
        throughput.add(pack(random_trees([(2, 3, 1)])), 1)
        device_clock.now += 4.0
    assert not events[-1].is_read
    events[-1].is_read = True
    assert throughput.read()["perf/pairs_per_second"] == pytest.approx(1 / 4)


def test_the_peak_of_a_device_is_its_data_sheets(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert peak_flops(CUDA) == 989e12
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA L4")
    assert peak_flops(CUDA) is None
    assert peak_flops(CPU) is None


class Delays(Callback):
    """Everything beside a step takes 1000 seconds."""

    def __init__(self, clock: Clock):
        self.clock = clock

    def _delay(self, *_: object) -> None:
        self.clock.now += 1000.0

    on_window = on_step = on_evaluate = on_move = on_save = _delay


def test_a_run_counts_the_time_and_the_rows_of_its_steps_alone(workspace, tmp_path, monkeypatch):
    """A step of four rows takes two seconds; scoring, evaluation, updates and saves the rest."""
    clock = Clock()
    monkeypatch.setattr("fasttr.metrics.throughput.time", SimpleNamespace(perf_counter=clock))
    values = settings(
        workspace,
        tmp_path,
        max_steps=4,
        max_tokens_per_batch=10_000,
        ref_update="hard",
        ref_update_every=2,
        eval_strategy="steps",
        eval_steps=1,
        eval_dataset_name=str(workspace / "test.jsonl"),
        save_strategy="steps",
        save_steps=2,
    )

    def loss(inputs):
        clock.now += 2.0 if inputs.logp.requires_grad else 500.0
        return inputs.chosen_logratio - inputs.rejected_logratio

    train(TrainConfig(**values), loss=loss, callbacks=[Delays(clock)])
    rates = [line["perf/pairs_per_second"] for line in steps(tmp_path)]
    assert rates == pytest.approx([4 / 2] * 4)
