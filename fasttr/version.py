"""The version in one place: the build, `fasttr --version` and `fasttr.__version__` read it."""

__version__ = "0.1.0"
