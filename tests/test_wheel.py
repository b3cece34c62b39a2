"""What is built installs into an empty environment, and says there what is missing."""

import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import fasttr

ROOT = Path(__file__).parents[1]


def run(*command) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True)


def environment(folder: Path) -> Path:
    """The `bin` of an environment that holds pip alone."""
    venv.create(folder, with_pip=True)
    return folder / "bin"


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with the wheel and the source distribution of this checkout."""
    folder = tmp_path_factory.mktemp("built")
    tools = environment(folder / "tools")
    if run(tools / "pip", "install", "--quiet", "hatchling>=1.24").returncode:
        pytest.skip("pip cannot fetch hatchling here")
    done = subprocess.run(
        [tools / "python", "-m", "hatchling", "build", "-d", folder / "dist"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return folder / "dist"


def only(folder: Path, pattern: str) -> Path:
    (path,) = folder.glob(pattern)
    return path


@pytest.mark.slow
def test_both_hold_the_package_its_recipes_and_types(built):
    wheel = set(zipfile.ZipFile(only(built, "*.whl")).namelist())
    with tarfile.open(only(built, "*.tar.gz")) as archive:
        source = {name.partition("/")[2] for name in archive.getnames()}
    recipes = {f"fasttr/recipes/{p.name}" for p in (ROOT / "fasttr/recipes").glob("*.yaml")}
    assert recipes
    assert recipes | {"fasttr/py.typed", "fasttr_kernels/py.typed", "fasttr/cli/train.py"} <= wheel
    assert recipes | {"kernels/fasttr_kernels/lerp.py", "CHANGELOG.md", "LICENSE"} <= source
    assert not [name for name in wheel | source if name.startswith(("tests", "bench", ".venv"))]


@pytest.mark.slow
def test_the_wheel_in_an_empty_environment(built, tmp_path):
    bin = environment(tmp_path / "empty")
    done = run(bin / "pip", "install", "--quiet", "--no-deps", only(built, "*.whl"))
    assert done.returncode == 0, done.stderr
    assert run(bin / "fasttr", "--version").stdout == f"fasttr {fasttr.__version__}\n"
    usage = run(bin / "fasttr", "--help")
    assert usage.returncode == 0, usage.stderr
    assert "train" in usage.stdout
    output = ("--output_dir", "o")
    for command in (("train", *output), ("demo", *output), ("eval", *output), ("plot", "runs")):
        done = run(bin / "fasttr", *command)
        assert done.returncode == 2
        (line,) = done.stderr.splitlines()
        assert line.startswith("fasttr: error: ")
        assert "run pip install 'fasttr[train]'" in line
    # The advice is followed as far as this test may: pip knows the extra of what is installed.
    done = run(bin / "pip", "install", "--no-deps", "--dry-run", "fasttr[train]")
    assert done.returncode == 0, done.stderr
    assert "does not provide the extra" not in done.stderr


@pytest.mark.slow
def test_the_wheel_beside_what_it_needs(built, tmp_path):
    """The packages of this environment, and nothing of this checkout."""
    bin = environment(tmp_path / "beside")
    assert run(bin / "pip", "install", "--quiet", "--no-deps", only(built, "*.whl")).returncode == 0
    packages = Path(next(p for p in sys.path if (Path(p) / "torch").is_dir()))
    site = only(tmp_path / "beside/lib", "python3*") / "site-packages"
    (site / "beside.pth").write_text(f"{packages}\n")
    code = "import fasttr, fasttr_kernels, fasttr.integrations.liger; print(fasttr.__file__)"
    where = subprocess.run(
        [bin / "python", "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert str(site) in where.stdout, where.stderr
    flags = ["--arch", "llama", "--hidden_size", "32", "--num_layers", "1", "--num_heads", "2"]
    done = run(bin / "fasttr", "init", *flags, "--output_dir", tmp_path / "tiny")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "tiny/config.json").is_file()
    assert run(bin / "fasttr", "train", "--help").returncode == 0


@pytest.mark.slow
def test_the_source_distribution_installs_too(built, tmp_path):
    bin = environment(tmp_path / "source")
    done = run(bin / "pip", "install", "--quiet", "--no-deps", only(built, "*.tar.gz"))
    assert done.returncode == 0, done.stderr
    assert run(bin / "fasttr", "--version").stdout == f"fasttr {fasttr.__version__}\n"
