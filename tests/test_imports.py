"""Imports go one way, and what needs torch alone imports with torch alone."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# A folder (or a file that lies in fasttr/ itself) imports what stands on a lower floor, and nothing
# else of fasttr.
FLOORS = [
    {"before_torch", "errors", "version"},
    {"batch", "console", "distributed", "environment", "files", "hub", "settings"},
    {"data", "losses", "optim", "packing"},
    {"metrics", "models"},
    {"integrations", "reference", "rollouts"},
    {"checkpoint", "memory", "parts"},
    {"cluster", "config"},
    {"evaluation"},
    {"training"},
    {"report"},
    {"toy"},
    {"cli"},
    {"__init__", "__main__"},
]
# The only folders that call the fused ops.
USERS_OF_KERNELS = {"integrations", "models", "optim", "reference"}


def module_name(path: Path, root: Path) -> str:
    """`fasttr.data.load` of fasttr/data/load.py, `fasttr.data` of fasttr/data/__init__.py."""
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def modules_of(root: Path, package: str) -> dict[str, Path]:
    return {module_name(path, root): path for path in sorted((root / package).rglob("*.py"))}


def imported(path: Path, known: set[str]) -> set[str]:
    """The modules of `known` that a file imports: at its top, in functions and under
    TYPE_CHECKING."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (inside & known) or {node.module}
    return found & known


def import_graph(root: Path, package: str) -> dict[str, set[str]]:
    modules = modules_of(root, package)
    return {name: imported(path, set(modules)) - {name} for name, path in modules.items()}


def circle_of(graph: dict[str, set[str]]) -> list[str] | None:
    """Some circle of a graph, or None."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return None


def room(module: str) -> str:
    """The folder under fasttr/ that a module lies in, or its own name."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def arrows_upward(graph: dict[str, set[str]]) -> list[str]:
    """Imports that do not lead to a lower floor."""
    floor = {name: number for number, names in enumerate(FLOORS) for name in names}
    return [
        f"{module} -> {target}"
        for module, targets in graph.items()
        for target in targets
        if room(module) != room(target) and floor[room(target)] >= floor[room(module)]
    ]


def test_every_room_stands_on_a_floor():
    rooms = {room(module) for module in modules_of(ROOT, "fasttr")}
    assert rooms == set().union(*FLOORS)


def test_imports_lead_to_lower_floors():
    assert arrows_upward(import_graph(ROOT, "fasttr")) == []


@pytest.mark.parametrize(
    ("root", "package"), [(ROOT, "fasttr"), (ROOT / "kernels", "fasttr_kernels"), (ROOT, "bench")]
)
def test_no_circle_of_imports_inside_a_folder_or_between_folders(root, package):
    graph = import_graph(root, package)
    assert len(graph) > 10
    assert circle_of(graph) is None


@pytest.mark.parametrize(
    "import_of_a",
    [
        "from pack import a",
        "import pack.a",
        "def f():\n    from pack.a import x",
        "if TYPE_CHECKING:\n    from pack.a import x",
    ],
)
def test_a_circle_that_is_put_in_is_found(tmp_path, import_of_a):
    (tmp_path / "pack").mkdir()
    (tmp_path / "pack" / "a.py").write_text("from pack import b\n")
    (tmp_path / "pack" / "b.py").write_text("x = 1\n")
    assert circle_of(import_graph(tmp_path, "pack")) is None
    (tmp_path / "pack" / "b.py").write_text(import_of_a + "\n")
    assert set(circle_of(import_graph(tmp_path, "pack"))) == {"pack.a", "pack.b"}


def test_an_arrow_upward_that_is_put_in_is_found():
    graph = {
        "fasttr.data.load": {"fasttr.training.loop"},
        "fasttr.training.loop": {"fasttr.data.load"},
    }
    assert arrows_upward(graph) == ["fasttr.data.load -> fasttr.training.loop"]


def test_few_folders_call_the_fused_ops():
    ops = set(modules_of(ROOT / "kernels", "fasttr_kernels"))
    users = {room(name) for name, path in modules_of(ROOT, "fasttr").items() if imported(path, ops)}
    assert users == USERS_OF_KERNELS


def test_kernels_know_nothing_of_the_trainer():
    modules = set(modules_of(ROOT, "fasttr"))
    for path in (ROOT / "kernels").rglob("*.py"):
        assert not imported(path, modules), path


def test_the_kernels_folder_is_not_a_package():
    """A regular package named `kernels` in the working directory shadows the one that transformers
    imports."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


def bare(code: str) -> subprocess.CompletedProcess[str]:
    """Another process that has imported nothing."""
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={"PYTHONPATH": ".:kernels", "PATH": "/usr/bin:/bin", "HOME": "/tmp"},
        check=False,
    )


def test_imports_with_torch_and_triton_alone():
    """Everything else that is installed is hidden from the child process."""
    code = """
import importlib.metadata, sys
allowed = {
    "torch", "triton", "numpy", "torchgen", "functorch", "sympy", "mpmath", "networkx", "jinja2",
    "markupsafe", "filelock", "fsspec", "typing_extensions", "setuptools", "pkg_resources",
    "_distutils_hack", "fasttr", "fasttr_kernels", "nvidia", "cuda", "packaging",
}
names = importlib.metadata.packages_distributions()
class Hide:
    def find_spec(self, name, path=None, target=None):
        top = name.split(".")[0]
        if top in names and top not in allowed:
            raise ModuleNotFoundError(f"hidden: {name}")
sys.meta_path.insert(0, Hide())
try:
    import transformers
except ModuleNotFoundError as error:
    assert "hidden" in str(error)
else:
    raise SystemExit("transformers was not hidden")
import fasttr_kernels
assert "fasttr" not in sys.modules
import fasttr.losses
import fasttr
import fasttr.integrations.liger, fasttr.integrations.torchtune
"""
    done = bare(code)
    assert done.returncode == 0, done.stderr


def test_reading_data_and_reporting_the_environment_import_nothing_heavy_by_themselves():
    code = """
import sys
import fasttr.data.load
from fasttr import environment
environment.report()
heavy = {"transformers", "datasets", "trl", "matplotlib", "liger_kernel"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
"""
    done = bare(code)
    assert done.returncode == 0, done.stderr
