"""Where things lie."""

from pathlib import Path

ROOT = Path(__file__).parents[1]
# Data that is not part of the repository; the tests that read it are skipped where it is absent.
SHARED = ROOT.parent / "shared" / "data"
