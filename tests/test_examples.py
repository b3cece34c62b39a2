"""Every example runs as it stands, in a process of its own settings, and does what it says."""

import importlib.util
import re
from pathlib import Path

import pytest

from tests.runs import LOG2

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name, **arguments):
    """What the example's `main` returns."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main(**arguments)


def test_every_example_is_run_here():
    named = {
        "compiled",
        "ops_in_plain_torch",
        "own_data_and_model",
        "own_loop",
        "own_loss",
        "trl_patched",
    }
    assert {path.stem for path in EXAMPLES.glob("*.py")} == named


def test_own_data_and_model(capsys):
    result = run("own_data_and_model")
    assert 2 <= result.steps < 40  # the callback ended it
    said = capsys.readouterr().out
    assert "read 32 rows" in said
    assert "Name a number that is larger than 10:" in said
    assert result.model.config._attn_implementation == "sdpa"


def test_own_loss(capsys):
    result = run("own_loss")
    assert result.steps == 16
    said = capsys.readouterr().out
    # Focal DPO at policy = reference: (1/2)^2 log 2, less what four steps gain.
    first = float(re.search(r"step  ?4/16 .*?loss ([0-9.]+)", said)[1])
    assert 0.12 < first < LOG2 / 4 + 1e-3


def test_own_loop_falls_within_each_window_and_restarts_where_the_reference_moves():
    losses = run("own_loop")
    assert losses[0] == pytest.approx(LOG2, abs=1e-6)
    for first in (0, 4, 8):
        assert losses[first + 3] < losses[first]
    assert losses[4] > losses[3]


def test_ops_in_plain_torch():
    losses = run("ops_in_plain_torch")
    assert losses[0] == pytest.approx(LOG2, abs=1e-6)
    assert losses[-1] < 0.1


def test_compiled_steps_are_one_graph_and_the_reference_moves(capsys):
    losses = run("compiled", backend="aot_eager")
    assert losses[0] == pytest.approx(LOG2, abs=1e-6)
    assert losses[9] < 0.2
    assert losses[10] > losses[9] + 0.1, "against a reference that has moved"
    assert capsys.readouterr().out.count("the reference has moved") == 2


def test_trl_patched():
    from fasttr.integrations.trl import unpatch

    try:
        log = run("trl_patched")
    finally:
        unpatch()
    assert [line["step"] for line in log] == [1, 2, 3, 4, 5, 6]
    assert log[0]["loss"] == pytest.approx(LOG2, abs=1e-6)
    assert log[2]["rewards/margins"] > log[0]["rewards/margins"]
