"""What a plan says of a step is what a step holds: the allocations of real steps on a CPU, phase by
phase."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from fasttr.memory.activations import Recompute
from fasttr.memory.plan import Bytes, Choices, Setup, bytes_of
from fasttr.memory.sizes import sizes_of
from fasttr.models.load import checkpoint_activations
from fasttr.models.packed import PackedModel, head_rows
from fasttr.optim.adamw import OptimizerConfig
from fasttr.optim.update import begin_step, update
from fasttr.packing.layout import pack
from tests.tiny import packed_tiny, random_trees, tiny_config

WIDE = {"hidden_size": 128, "intermediate_size": 448, "vocab_size": 600, "num_hidden_layers": 6}
SHAPES = [(90, 31, 44), (57, 62, 23), (120, 40, 44), (80, 60, 50), (30, 90, 99)]
MARK = "phase "


class Case(NamedTuple):
    arch: str
    packs: int = 2  # of a step
    bf16: bool = True
    whole_layers: bool = False  # made again in the backward


class Phase(NamedTuple):
    """Bytes beyond what lay there before the step."""

    begins: int
    most: int


CASES = [Case("llama"), Case("llama", packs=1), Case("llama", whole_layers=True)]
# Other forms of layers, a tied head, fp32.
MORE = [Case("gpt_neox"), Case("qwen3", packs=1), Case("llama", bf16=False)]
SLOW = [pytest.param(case, marks=pytest.mark.slow) for case in MORE]


@pytest.mark.parametrize("case", [*CASES, *SLOW], ids=str)
def test_a_step_holds_what_was_planned_in_each_of_its_phases(case):
    planned = plan_of(case)
    found = phases_of_a_step(case)
    still = sum(planned.still.values())
    for phase, wanted in (
        ("head", planned.phases["head"]),
        ("backward", max(planned.phases["layers"], planned.phases["embedding"])),
        ("update", planned.phases["update"]),
    ):
        assert wanted == pytest.approx(still + found[phase].most, rel=0.1), phase
    assert planned.gradients == pytest.approx(found["update"].begins, rel=1e-3)
    if not case.whole_layers:  # else it is little beside the hidden states at the end
        before = planned.gradients if case.packs > 1 else 0
        kept = found["head"].begins - before
        assert planned.activations == pytest.approx(kept, rel=0.05)


def plan_of(case: Case) -> Bytes:
    sizes = sizes_of(tiny_config(case.arch, **WIDE), bf16=case.bf16)
    setup = Setup(sizes, bf16=case.bf16, chunk_rows=head_rows(sizes.vocabulary, None))
    recompute = Recompute(compiled=False, whole_layers=case.whole_layers)
    tokens = sum(map(sum, SHAPES))
    return bytes_of(setup, Choices("fp32", recompute, tokens, False, adds_packs=case.packs > 1))


def phases_of_a_step(case: Case) -> dict[str, Phase]:
    """Of the last pack of a step, after another one that made what is made once."""
    policy = packed_tiny(case.arch, **WIDE)
    policy.bf16 = case.bf16
    optimizer = OptimizerConfig().optimizer(policy.model, bf16=case.bf16)
    if case.whole_layers:
        checkpoint_activations(policy.model, True)
    decoder = policy.model.base_model
    decoder.register_forward_hook(lambda *_: begin("head"))
    step(policy, optimizer, case)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as seen:
        step(policy, optimizer, case)
    assert seen.profiler is not None
    found: dict[str, Phase] = {}
    now, held = "before", 0
    for event in sorted(seen.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name().startswith(MARK):
            now = event.name().removeprefix(MARK)
            found[now] = Phase(held, held)
        elif event.name() == "[memory]" and now != "before":
            held += event.nbytes()
            found[now] = found[now]._replace(most=max(found[now].most, held))
    return found


def begin(phase: str) -> None:
    with record_function(MARK + phase):
        pass


def step(policy: PackedModel, optimizer: torch.optim.Optimizer, case: Case) -> None:
    batch = pack(random_trees(SHAPES))
    begin("gradients")
    begin_step(optimizer, case.packs)
    head = policy.head_weight().weight
    with policy.weights_still():
        for _ in range(case.packs):
            begin("forward")
            head_grad = head.grad if case.bf16 else None
            out = policy(batch, margins, normalizer=5.0, stats=True, head_grad=head_grad)
            begin("backward")
            out.loss.backward()
            loss = out.loss.detach()
            del out
    begin("update")
    update(optimizer, policy, loss=loss, max_grad_norm=1.0)
    begin("end")


def margins(logp: torch.Tensor, *_: object) -> torch.Tensor:
    return torch.nn.functional.softplus(logp[1::2] - logp[0::2]).sum()
