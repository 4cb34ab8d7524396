"""Who may import whom, as docs/design.md draws it: every import of every module is looked at."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("llmc", "converters", "builders", "trainers", "serve")

# From the bottom: a module imports from lower rows and from its own package, never sideways, never up.
LAYERS: list[set[str]] = [
    {"llmc", "llmc.errors"},
    {"llmc.log", "llmc.config", "llmc.need", "llmc.json_file", "llmc.template"},
    {"llmc.manifest", "llmc.spec", "llmc.tensors", "llmc.runtime"},
    {"llmc.names", "llmc.adapter", "llmc.engine", "llmc.verified", "llmc.rope", "llmc.alibi", "llmc.prefix"},
    {"llmc.recipe"},
    {"llmc.checkpoint", "llmc.quant.pack"},
    {"llmc.tokenizer", "llmc.rounding"},
    {"llmc.text", "llmc.sample_text", "llmc.prompt"},
    {"llmc.model"},
    {"llmc.layerwise", "llmc.modeling"},
    {"llmc.quant", "llmc.evaluate"},
    {"llmc.converters", "llmc.builders", "llmc.trainers", "llmc.serve"},
    {"llmc.commands"},
    {"llmc.cli"},
]

# Packages that are large, optional or slow to import, and the only places that may name them.
HEAVY = {
    "torch": {
        "llmc.rounding",
        "llmc.model",
        "llmc.layerwise",
        "llmc.modeling",
        "llmc.quant",
        "llmc.evaluate",
        "llmc.trainers",
        "llmc.converters.pickled",
        "llmc.serve.runners.caches",
    },
    "transformers": {"llmc.trainers", "llmc.converters.hf_tokenizer", "llmc.evaluate.modules", "llmc.modeling"},
    "accelerate": {"llmc.trainers"},
    "matplotlib": {"llmc.trainers.curves", "llmc.serve.bench.plot", "llmc.quant.picture"},
    "safetensors": set[str](),
    "onnx": {"llmc.builders"},
    "onnx_ir": {"llmc.builders"},
    "onnxruntime": {
        "llmc.serve.runners.caches",
        "llmc.serve.runners.ort",
        "llmc.serve.runners.ort_devices",
        "llmc.serve.runners.ort_states",
    },
    "modelopt": {"llmc.quant"},
    "tensorrt_llm": {"llmc.builders.trtllm", "llmc.serve.runners.trtllm"},
    "deepspeed": {"llmc.trainers.distributed", "llmc.converters.zero"},
    "gguf": {"llmc.converters"},
    "flask": {"llmc.serve.app", "llmc.serve.routes", "llmc.serve.server"},
    "prometheus_client": {"llmc.serve"},
    "gunicorn": {"llmc.serve"},
    "llguidance": {"llmc.serve.grammar"},
}

# These, and all that they import in turn, use the standard library and pydantic alone (the command also click).
PLAIN = {
    "llmc.spec",
    "llmc.names",
    "llmc.errors",
    "llmc.manifest",
    "llmc.cli",
    "llmc.serve.request",
    "llmc.serve.sequence",
    "llmc.serve.scheduler",
}
PLAIN_PACKAGES = {"pydantic", "click", "tomli"}


@dataclass(frozen=True)
class Import:
    """`module` names `target`, in `line`: by a statement, for type checking alone, or by asking `need` for it."""

    module: str
    target: str
    line: int
    how: str


def module_paths() -> dict[str, Path]:
    """Dotted name -> file, each once: the links in llmc/ are met where they lead."""
    found = {}
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            if folder == "llmc" and parts[1] in FOLDERS:
                continue
            name = ".".join(parts if folder == "llmc" else ("llmc", *parts)).removesuffix(".__init__")
            found[name] = path
    return found


MODULES = module_paths()


def imports(module: str, source: str) -> Iterator[Import]:
    """Every import statement and every `need("...")` of a module."""
    tree = ast.parse(source)
    for_types = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        how = "types" if node in for_types else "need" if isinstance(node, ast.Call) else "statement"
        for target in _targets(node):
            yield Import(module, target, getattr(node, "lineno", 0), how)


def _targets(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        prefix = "." * node.level + (node.module or "")
        for alias in node.names:
            whole = f"{prefix}.{alias.name}"
            yield whole if whole in MODULES else prefix
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "need" and node.args:
        first = node.args[0]
        if isinstance(first, ast.Constant) and isinstance(first.value, str):
            yield first.value


def layer(module: str) -> tuple[int, str] | None:
    """The row of a module and the entry that stands for it: the longest that begins its name."""
    places = [
        (len(entry), row, entry)
        for row, entries in enumerate(LAYERS)
        for entry in entries
        if module == entry or (entry != "llmc" and module.startswith(entry + "."))
    ]
    if not places:
        return None
    _, row, entry = max(places)
    return row, entry


def complaint(item: Import) -> str | None:
    """What is wrong with an import, None when nothing is."""
    top = item.target.partition(".")[0]
    if item.target.startswith("."):
        return "relative imports hide the layer: write llmc...."
    if top in FOLDERS[1:]:
        return f"write llmc.{item.target}"
    if top == "llmc":
        mine, theirs = layer(item.module), layer(item.target)
        if mine is None or theirs is None:
            return "this module stands in no layer: give it a place in LAYERS"
        if theirs[1] == mine[1] or theirs[0] < mine[0]:
            return None
        return f"{mine[1]} must not import {theirs[1]}"
    places = HEAVY.get(top)
    if places is None or item.how == "types" or any(f"{item.module}.".startswith(f"{place}.") for place in places):
        return None
    if item.module.startswith("llmc.commands.") and item.how == "need":
        return None  # so that a missing package is reported before the work begins
    return f"{top} may be imported only in {', '.join(sorted(places)) or 'the tests'}"


def everything() -> list[Import]:
    return [item for name, path in MODULES.items() for item in imports(name, path.read_text(encoding="utf-8"))]


def test_every_import_follows_an_arrow() -> None:
    found = everything()
    wrong = [f"{item.module}:{item.line}: {text}" for item in found if (text := complaint(item))]
    assert not wrong, "\n".join(wrong)
    files = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    links = [path for path in files if path.relative_to(ROOT).parts[:2] in {("llmc", name) for name in FOLDERS[1:]}]
    assert len(MODULES) == len(files) - len(links) >= 50
    assert len(found) > 300


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("llmc.converters.hf", "from llmc.trainers import pretrain"),
        ("llmc.converters.hf", "import converters.rules"),
        ("llmc.serve.engine", "def f():\n    import llmc.builders.ort"),
        ("llmc.serve.engine", "import torch"),
        ("llmc.trainers.pretrain", "from llmc import commands"),
        ("llmc.trainers.pretrain", "from ..serve import engine"),
        ("llmc.names", "from llmc import checkpoint"),
        ("llmc.quant.rtn", "from llmc.evaluate import perplexity"),
        ("llmc.builders.ort", "import onnxruntime"),
        ("llmc.builders.ort", "from llmc.need import need\nneed('torch')"),
        ("llmc.commands.serve", "import flask"),
        ("llmc.nowhere", "from llmc import errors"),
    ],
)
def test_a_wrong_arrow_is_seen(module: str, source: str) -> None:
    assert any(complaint(item) for item in imports(module, source))


def test_the_four_stages_are_links_to_the_folders() -> None:
    for name in FOLDERS[1:]:
        link = ROOT / "llmc" / name
        assert link.is_symlink()
        assert str(link.readlink()) == f"../{name}"


@pytest.mark.parametrize("module", sorted(PLAIN))
def test_plain_modules_need_nothing_installed_but_pydantic(module: str) -> None:
    """At import; what a function imports when it is called is its own affair."""
    seen: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        source = MODULES[name].read_text(encoding="utf-8")
        for node in ast.parse(source).body:
            for target in _targets(node):
                top = target.partition(".")[0]
                if top == "llmc":
                    waiting.append(target)
                else:
                    assert top in sys.stdlib_module_names | PLAIN_PACKAGES, f"{name} imports {target}"
    assert module in seen
