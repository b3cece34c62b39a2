"""What torch reads when it is imported is set before, unless the user has set it: threads that
spin shortly and then sleep while they wait, and a GPU's memory in segments that grow."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

SHOW = """
import os, sys
from fasttr.cli import main
main([])
assert "torch" not in sys.modules
names = "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "PYTORCH_ALLOC_CONF"
print([os.environ.get(name) for name in names])
"""
NAMES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "PYTORCH_ALLOC_CONF")
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
def test_the_command_line_decides_it_before_torch_is_there(given, wanted):
    env = {name: value for name, value in os.environ.items() if name not in NAMES} | given
    done = subprocess.run(
        [sys.executable, "-c", SHOW],
        env=env | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.splitlines()[-1] == str(wanted), done.stderr
