"""What torch reads when it is imported is set before, unless the user has set it: threads that
spin shortly and then sleep while they wait, and a GPU's memory in segments that grow."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

NAMES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "PYTORCH_ALLOC_CONF")
SHOW = f"""
print([os.environ.get(name) for name in {NAMES}])
assert "torch" not in sys.modules
"""
STARTS = {
    "fasttr": "import os, sys; from fasttr.cli import main; main([])",
    "bench": "import os, sys; from bench.__main__ import main\n"
    "try: main(['--help'])\nexcept SystemExit: pass",
}
SEGMENTS = "expandable_segments:True"


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({}, ["passive", "3000", SEGMENTS]),
        ({"OMP_WAIT_POLICY": "active"}, ["active", None, SEGMENTS]),
        ({"OMP_WAIT_POLICY": "passive"}, ["passive", None, SEGMENTS]),
        ({"GOMP_SPINCOUNT": "7"}, ["passive", "7", SEGMENTS]),
        ({"PYTORCH_ALLOC_CONF": "backend:native"}, ["passive", "3000", "backend:native"]),
    ],
    ids=["nothing set", "active", "asleep at once", "a count", "segments"],
)
@pytest.mark.parametrize("start", STARTS)
def test_the_command_lines_decide_it_before_torch_is_there(start, given, wanted):
    code = f"{STARTS[start]}\n{SHOW}"
    assert said([sys.executable, "-c", code], given) == str(wanted)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({}, "passive 3000"),
        ({"OMP_WAIT_POLICY": "active"}, "active"),
        ({"GOMP_SPINCOUNT": "7"}, "passive 7"),
    ],
    ids=["nothing set", "active", "a count"],
)
def test_make_hands_on_the_same(given, wanted):
    show = "shown: ; @echo $$OMP_WAIT_POLICY $$GOMP_SPINCOUNT"
    assert said(["make", "--no-print-directory", f"--eval={show}", "shown"], given) == wanted


def said(words, given):
    """The last line of a process in which only what is given is set."""
    env = {name: value for name, value in os.environ.items() if name not in NAMES} | given
    done = subprocess.run(
        words,
        env=env | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]
