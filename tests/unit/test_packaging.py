"""What is shipped: the wheel, the sdist, and what a host that only serves needs."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("llmc", "converters", "builders", "trainers", "serve")

# What a serving host does not have: everything that setup.cfg's `serve` extra and the base do not bring.
ABSENT = ("torch", "transformers", "accelerate", "onnx", "onnx_ir", "gguf", "modelopt", "matplotlib", "safetensors")


def without(packages: tuple[str, ...], code: str) -> str:
    """Code before which some packages are as good as not installed, whatever asks for them."""
    return f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {packages!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
{code}
"""


def modules() -> set[str]:
    """Every module of the checkout as a path in a wheel."""
    found = set()
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT).parts
            if not (folder == "llmc" and parts[1] in FOLDERS):
                found.add("/".join(parts if folder == "llmc" else ("llmc", *parts)))
    return found


def test_every_folder_of_modules_is_a_package() -> None:
    """`packages = find:` passes over a folder without __init__.py, and its modules would not be shipped."""
    folders = {Path(name).parent for name in modules()}
    assert len(folders) >= 10
    for folder in folders:
        assert f"{folder.as_posix()}/__init__.py" in modules(), folder


def test_serving_needs_neither_torch_nor_transformers() -> None:
    serving = [
        name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for name in sorted(modules())
        if name.startswith("llmc/serve/") and "trtllm" not in name
    ]
    assert len(serving) >= 10
    names = [*serving, "llmc.commands.serve", "llmc.commands.generate", "llmc.commands.inspect", "llmc.prompt"]
    code = without(ABSENT, f"import importlib\nfor name in {names!r}:\n    importlib.import_module(name)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_from_a_model_to_an_answer_without_torch(tiny_source: Callable[[str], Path], tmp_path: Path) -> None:
    """Rounding to nearest needs numpy alone, so that the quick start of the README installs no PyTorch."""
    name = next(iter(tiny.TINY))
    lines = [
        ["convert", str(tiny_source(name)), "checkpoint"],
        ["quantize", "checkpoint", "int4", "--group-size", "32"],
        ["build-engine", "int4", "engine"],
        ["generate", "engine", "--prompt", "a", "--max-tokens", "4", "--ignore-eos"],
    ]
    for line in lines:
        absent = ("torch", "transformers", "modelopt", "accelerate")
        code = without(absent, f"from llmc.cli import main\nmain({line!r})")
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{line}: {done.stderr}"
    assert "4 tokens" in done.stderr


def test_a_command_whose_packages_are_missing_says_which_to_install(tmp_path: Path) -> None:
    config = tmp_path / "c.toml"
    config.write_text(
        'output = "run"\n[data]\npaths = ["x"]\n[tokenizer]\nvocab_size = 300\n[model]\nhidden_size = 8\n'
        "num_layers = 1\nnum_heads = 1\nintermediate_size = 8\nmax_positions = 8\n",
        encoding="utf-8",
    )
    code = without(ABSENT, f"from llmc.cli import main\nmain({['train', 'pretrain', str(config)]!r})")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 5
    assert done.stderr.startswith("llmc: ")
    assert 'pip install "llmc-toolkit[train]"' in done.stderr


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the sdist, built from a copy of what git would check out."""
    root = tmp_path_factory.mktemp("packaging")
    source, dist = root / "source", root / "dist"
    source.mkdir()
    dist.mkdir()
    skip = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, source / name)
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, source / folder, symlinks=True, ignore=skip)
    for kind in ("wheel", "sdist"):
        code = f"from setuptools.build_meta import build_{kind} as build; build({str(dist)!r})"
        done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    return dist


@pytest.mark.slow
def test_the_wheel_holds_llmc_and_nothing_else(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    shipped = {name for name in names if ".dist-info/" not in name}
    assert all(name.startswith("llmc/") for name in shipped)
    assert modules() <= shipped
    assert "llmc/py.typed" in shipped
    web = {f"llmc/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "serve" / "web").glob("*.*")}
    assert web - {"llmc/serve/web/__init__.py"} <= shipped


@pytest.mark.slow
def test_the_sdist_holds_the_modules_and_the_licence(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert modules() <= names
    assert {"setup.cfg", "pyproject.toml", "LICENSE", "README.md"} <= names


@pytest.mark.slow
def test_the_wheel_installs_and_answers(built: Path, tmp_path: Path) -> None:
    """Into an environment of its own; the dependencies are lent by the one that runs the tests."""
    (wheel,) = built.glob("*.whl")
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", "--no-index", wheel], check=True)
    lent = next(path for path in map(Path, sys.path) if path.name == "site-packages")
    (own,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    (own / "lent.pth").write_text(f"{lent}\n", encoding="utf-8")
    done = subprocess.run([tmp_path / "venv" / "bin" / "llmc", "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    code = "import llmc.serve as module; print(module.__file__)"
    where = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert Path(where.stdout.strip()).is_relative_to(own)
