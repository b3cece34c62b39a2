"""The command `fasttr`."""

from fasttr.cli.commands import main

__all__ = ["main"]
