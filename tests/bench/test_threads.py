"""What torch reads when it is imported is set before, unless the user has set it: threads that
sleep while they wait, and a GPU's memory in segments that grow."""

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
print([os.environ[name] for name in ("OMP_WAIT_POLICY", "PYTORCH_ALLOC_CONF")])
"""
OURS = {"OMP_WAIT_POLICY": "passive", "PYTORCH_ALLOC_CONF": "expandable_segments:True"}
THEIRS = {"OMP_WAIT_POLICY": "active", "PYTORCH_ALLOC_CONF": "backend:native"}


@pytest.mark.parametrize("given", [{}, THEIRS], ids=["not set", "set"])
def test_the_command_line_decides_it_before_torch_is_there(given):
    env = {name: value for name, value in os.environ.items() if name not in OURS} | given
    done = subprocess.run(
        [sys.executable, "-c", SHOW],
        env=env | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.splitlines()[-1] == str(list((OURS | given).values())), done.stderr
