"""Several processes of one command, started by torchrun or by another launcher."""

from __future__ import annotations

import os
import sys

from fasttr.errors import FasttrError

OF_A_MISTAKE = 2  # the exit status of a command that has printed its line


def speaks() -> bool:
    """Whether this process is the one of a launch that prints; alone it is."""
    return os.environ.get("RANK", "0") in ("", "0")


def needs_launch(num_processes: int | None) -> bool:
    """Whether the processes that are asked for have yet to be started.

    FasttrError when a launcher has started another number of them.
    """
    started = os.environ.get("WORLD_SIZE", "")
    if not started or num_processes is None:
        return not started and (num_processes or 1) > 1
    if started != str(num_processes):
        raise FasttrError(
            f"num_processes: got {num_processes} under a launcher that started {started}; leave it "
            "out"
        )
    return False


def is_of_one_process(error: FasttrError) -> bool:
    """Whether the process that prints may be unable to: another one has ended."""
    return type(error).__name__ == "PeerGone"


def launch(args: list[str], num_processes: int | None) -> None:
    """Become torchrun with that many processes of `fasttr ARGS` on this machine."""
    command = [sys.executable, "-m", "fasttr.cli.torchrun", "--standalone"]
    command += ["--nproc-per-node", str(num_processes), "-m", "fasttr", *args]
    sys.stdout.flush()
    os.execv(command[0], command)
