"""torchrun, which ends as the process that failed first, without a page of its own: that process
has said why."""

from __future__ import annotations

import logging
import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

from fasttr.cli.launch import OF_A_MISTAKE


def torchrun() -> None:
    """Run torchrun's own command line."""
    logging.disable(logging.CRITICAL)  # in this process, which only waits for the others
    try:
        main()
    except SignalException as stopped:
        sys.exit(128 + stopped.sigval)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode != OF_A_MISTAKE:
            print(
                f"fasttr: error: process {rank} ended with status {failure.exitcode}",
                file=sys.stderr,
            )
        sys.exit(failure.exitcode if failure.exitcode > 0 else 1)


if __name__ == "__main__":
    torchrun()
