"""Imports go one way, and what needs torch alone imports with torch alone."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Each layer may import from the layers before it and from its own.
LAYERS = [
    {"errors", "trl_table"},
    {"batch"},
    {"losses", "packing", "plan", "unpaired", "tokens", "rows", "encode", "sources", "data", "mixture", "metrics",
     "optim", "generated", "scratch", "trackers", "environment", "plots"},
    {"attention", "logps", "model", "reference", "checkpoint", "perf", "generate", "sampling"},
    {"config", "config_checks", "cadence", "guards", "trl_keys", "run", "start", "evaluate", "scoring"},
    {"trainer", "compare"},
    {"demo", "pages"},
    {"cli", "eval_command"},
]  # fmt: skip
KERNELS = {"logps", "reference"}  # the two places where the fused ops are used


def imported(path: Path) -> set[str]:
    """Modules of fasttr and fasttr_kernels that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= (
                {f"{node.module}.{alias.name}" for alias in node.names} if node.module == "fasttr" else {node.module}
            )
    return {name for name in found if name.split(".")[0] in ("fasttr", "fasttr_kernels")}


def test_imports_follow_the_layers():
    layer = {name: i for i, names in enumerate(LAYERS) for name in names}
    files = [(path.relative_to(ROOT / "fasttr").parts[0].removesuffix(".py"), path)
             for path in (ROOT / "fasttr").rglob("*.py") if path != ROOT / "fasttr" / "__init__.py"]  # fmt: skip
    assert {name for name, _ in files} == layer.keys()
    for name, path in files:
        for target in imported(path):
            package, _, module = target.partition(".")
            if package == "fasttr_kernels":
                assert name in KERNELS, f"{name} imports {target}"
            else:
                assert layer[module.split(".")[0]] <= layer[name], f"{name} imports {target}"


def test_kernels_know_nothing_of_the_trainer():
    for path in (ROOT / "kernels").rglob("*.py"):
        assert not {name for name in imported(path) if name.startswith("fasttr.") or name == "fasttr"}, path


def test_the_kernels_folder_is_not_a_package():
    """A regular package named `kernels` in the working directory shadows the one that transformers imports."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.parametrize("module", ["fasttr_kernels", "fasttr.losses", "fasttr"])
def test_imports_with_torch_and_triton_alone(module):
    """Everything else that is installed is hidden from the child process."""
    code = f"""
import importlib.metadata, sys
allowed = {{"torch", "triton", "numpy", "torchgen", "functorch", "sympy", "mpmath", "networkx", "jinja2", "markupsafe",
           "filelock", "fsspec", "typing_extensions", "setuptools", "pkg_resources", "_distutils_hack", "fasttr",
           "fasttr_kernels", "nvidia", "cuda", "packaging"}}
names = importlib.metadata.packages_distributions()
class Hide:
    def find_spec(self, name, path=None, target=None):
        top = name.split(".")[0]
        if top in names and top not in allowed:
            raise ModuleNotFoundError(f"hidden: {{name}}")
sys.meta_path.insert(0, Hide())
try:
    import transformers
except ModuleNotFoundError as error:
    assert "hidden" in str(error)
else:
    raise SystemExit("transformers was not hidden")
import {module}
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT,
        env={"PYTHONPATH": ".:kernels", "PATH": "/usr/bin:/bin", "HOME": "/tmp"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
