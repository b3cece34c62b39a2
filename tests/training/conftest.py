"""Runs that several tests of training start from."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.killed import resumable
from tests.runs import run


@pytest.fixture(scope="session")
def whole(workspace, tmp_path_factory) -> dict[str, Path]:
    """The folder of an uninterrupted run for each kind of reference."""
    folder = tmp_path_factory.mktemp("whole")
    for ref_update in ("none", "soft", "hard"):
        run(workspace, folder / ref_update, **resumable(workspace, ref_update))
    return {name: folder / name for name in ("none", "soft", "hard")}
