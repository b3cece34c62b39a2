"""What a checkpoint brings back, tensor by tensor, and how a broken one is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fasttr.checkpoint.state import apply, capture, read_state, weights_digest, write_state
from fasttr.errors import FasttrError
from fasttr.metrics.sums import Averages
from fasttr.optim.adamw import OptimizerConfig
from fasttr.reference.logp_table import LogpTable
from fasttr.reference.moving import MovingReference
from fasttr.reference.schedule import Soft
from tests.tiny import packed_tiny, perturb

CPU = torch.device("cpu")
FACTS = {"config": {"beta": 0.1}, "data": "digest"}
STEPS = 3


def fresh_run() -> SimpleNamespace:
    """A run as a checkpoint sees it, before any step."""
    policy = packed_tiny()
    config = OptimizerConfig(learning_rate=1e-2, warmup_steps=2)
    optimizer = config.optimizer(policy.model)
    return SimpleNamespace(
        step=0,
        window_scored=False,
        num_tokens=0,
        total_loss=torch.zeros(()),
        averages=Averages(CPU),
        device=CPU,
        policy=policy,
        reference=MovingReference(Soft(0.5, 2), policy),
        optimizer=optimizer,
        scheduler=config.scheduler(optimizer, 10),
        critic_tensors={},
        tables={name: LogpTable(6, 2) for name in ("scores", "eval_scores", "anchor")},
    )


def one_step(run: SimpleNamespace, unused: torch.Tensor | None = None) -> None:
    """Gradients that follow the random state and the step, and everything that a step moves on."""
    run.optimizer.zero_grad()
    for parameter in run.policy.parameters():
        if parameter is not unused:
            parameter.grad = torch.randn_like(parameter)
    run.optimizer.step()
    run.scheduler.step()
    run.step += 1
    run.num_tokens += 17
    run.window_scored = True
    run.total_loss += 0.25
    run.averages.add(torch.arange(len(run.averages.sums[0]), dtype=torch.float32)[None])
    for number, table in enumerate(run.tables.values()):
        table.put([run.step, 0], torch.randn(4) - number)
    if run.step == 2:
        run.reference.move()


def trained_run() -> SimpleNamespace:
    run = fresh_run()
    for _ in range(STEPS):
        one_step(run)
    return run


def taken_up(folder: Path, weights: dict[str, torch.Tensor]) -> SimpleNamespace:
    """Another run with the policy's weights of the first, and its saved state."""
    run = fresh_run()
    perturb(run.policy, 0.1)
    run.policy.load_state_dict(weights)
    apply(read_state(folder), run)
    return run


@pytest.fixture
def saved(tmp_path) -> Path:
    folder = tmp_path / "checkpoint-3"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    write_state(folder, capture(trained_run(), FACTS))
    return folder


def test_a_run_goes_on_from_its_state_bit_for_bit(tmp_path):
    torch.manual_seed(5)
    first = trained_run()
    folder = tmp_path / "checkpoint-3"
    folder.mkdir()
    write_state(folder, capture(first, FACTS))
    weights = {name: x.clone() for name, x in first.policy.state_dict().items()}
    random_state = torch.get_rng_state()
    torch.manual_seed(99)
    second = taken_up(folder, weights)
    assert torch.equal(torch.get_rng_state(), random_state)
    for name in ("step", "window_scored", "num_tokens"):
        assert getattr(second, name) == getattr(first, name), name
    assert second.reference.updates == first.reference.updates == 1
    assert torch.equal(second.total_loss, first.total_loss)
    assert torch.equal(second.averages.sums, first.averages.sums)
    assert second.scheduler.get_last_lr() == first.scheduler.get_last_lr()
    for name, table in first.tables.items():
        known = table.known_rows()
        assert len(known) == STEPS + 1
        assert second.tables[name].known_rows().tolist() == known.tolist()
        assert (second.tables[name].values[known] == table.values[known]).all()
    for name, weight in first.reference.weights.items():
        assert torch.equal(second.reference.weights[name], weight), name
    one_step(second)
    torch.set_rng_state(random_state)
    one_step(first)
    assert second.scheduler.get_last_lr() == first.scheduler.get_last_lr()
    for name, weight in first.policy.state_dict().items():
        assert torch.equal(second.policy.state_dict()[name], weight), name


def test_a_parameter_that_has_had_no_gradient_has_no_moments(tmp_path):
    """An expert that no token has met yet, or a layer that the loss does not reach."""
    first = fresh_run()
    unused = first.policy.model.model.layers[1].mlp.up_proj.weight
    one_step(first, unused)
    folder = tmp_path / "checkpoint-1"
    folder.mkdir()
    write_state(folder, capture(first, FACTS))
    weights = {name: x.clone() for name, x in first.policy.state_dict().items()}
    second = taken_up(folder, weights)
    random_state = torch.get_rng_state()
    one_step(first)
    torch.set_rng_state(random_state)
    one_step(second)
    for name, weight in first.policy.state_dict().items():
        assert torch.equal(second.policy.state_dict()[name], weight), name


def test_rows_that_the_checkpoint_does_not_know_stay_unknown(saved):
    run = taken_up(saved, fresh_run().policy.state_dict())
    assert run.tables["scores"].known_rows().tolist() == [0, 1, 2, 3]
    state = read_state(saved)
    del state.tensors["anchor.rows"]
    other = fresh_run()
    apply(state, other)
    assert len(other.tables["anchor"].known_rows()) == 0


@pytest.mark.parametrize(
    "name", ["fasttr/state.safetensors", "fasttr/optimizer.safetensors", "config.json"]
)
@pytest.mark.parametrize("damage", ["cut", "flipped", "gone"])
def test_a_damaged_file_is_named(saved, name, damage):
    path = saved / name
    content = path.read_bytes()
    if damage == "gone":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(content[:-1])
    else:
        place = len(content) * 3 // 4
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    words = "is damaged" if damage == "flipped" else "is incomplete"
    with pytest.raises(FasttrError, match=f"checkpoint-3 {words}: {name} .*earlier checkpoint"):
        read_state(saved)


BROKEN_FACTS = {
    "not JSON": b"{",
    "zeros": b"\x00" * 40,
    "not UTF-8": b'{"a": "\xff"}',
    "a list": b"[]",
    "without files": b'{"format": 1, "step": 3}',
    "files are a list": json.dumps(
        dict.fromkeys(["step", "updates", "window_scored", "num_tokens", "data"], 1)
        | {"format": 1, "files": [], "config": {}}
    ).encode(),
    "of another format": b'{"format": 99, "files": {}}',
}


@pytest.mark.parametrize("case", BROKEN_FACTS)
def test_a_broken_state_file_is_one_line(saved, case):
    (saved / "fasttr" / "state.json").write_bytes(BROKEN_FACTS[case])
    with pytest.raises(FasttrError, match=r"state\.json is broken: .*use an earlier") as raised:
        read_state(saved)
    assert "\n" not in str(raised.value)


def test_a_state_file_that_lacks_a_counter_says_which(saved):
    path = saved / "fasttr" / "state.json"
    facts = json.loads(path.read_text())
    path.write_text(json.dumps({key: x for key, x in facts.items() if key != "num_tokens"}))
    with pytest.raises(FasttrError, match="it lacks num_tokens"):
        read_state(saved)


def test_a_folder_without_a_state_and_no_folder_are_told_apart(saved, tmp_path):
    shutil.rmtree(saved / "fasttr")
    with pytest.raises(FasttrError, match=r"has no fasttr/state\.json"):
        read_state(saved)
    with pytest.raises(FasttrError, match="no folder"):
        read_state(tmp_path / "nowhere")


def test_the_digest_of_weights_follows_each_of_them():
    model = packed_tiny()
    before = weights_digest(model)
    assert weights_digest(packed_tiny()) == before
    with torch.no_grad():
        model.model.model.norm.weight[3] += 1e-3
    assert weights_digest(model) != before
    turned = packed_tiny()
    with torch.no_grad():
        turned.model.lm_head.weight[3] *= -1
    assert weights_digest(turned) != before
