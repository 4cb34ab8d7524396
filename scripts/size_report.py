"""Prints how long the files and functions of llmc are, and fails when too many are too long.

A function's length is from `def` to its last line, docstring included.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("llmc", "converters", "builders", "trainers", "serve")
MAX_FUNCTION, MAX_FILE, ALLOWED_SHARE = 60, 500, 0.04


def sources() -> list[Path]:
    """Every module, once: the links inside llmc/ are met where they lead."""
    links = {ROOT / "llmc" / name for name in FOLDERS}
    found = [path for name in FOLDERS for path in sorted((ROOT / name).rglob("*.py"))]
    return [path for path in found if not links & set(path.parents)]


def functions(path: Path) -> Iterator[tuple[str, int]]:
    """(name, lines) of every function of a file, nested ones too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, (node.end_lineno or node.lineno) - node.lineno + 1


def main() -> int:
    """Print the report; 0 when the sizes are within the allowance."""
    paths = sources()
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in paths}
    sizes = sorted((size, f"{path.relative_to(ROOT)}:{name}") for path in paths for name, size in functions(path))
    long_functions = [item for item in sizes if item[0] > MAX_FUNCTION]
    long_files = [path for path, count in lines.items() if count > MAX_FILE]
    share = len(long_functions) / max(1, len(sizes))

    table = Table("folder", "files", "lines", "functions", "median", "90 %", "longest", title="Sizes, in lines")
    for name in FOLDERS:
        here = [path for path in paths if path.relative_to(ROOT).parts[0] == name]
        own = sorted(size for path in here for _, size in functions(path))
        row = [own[len(own) // 2], own[len(own) * 9 // 10], own[-1]] if own else ["-", "-", "-"]
        table.add_row(name, *map(str, [len(here), sum(lines[path] for path in here), len(own), *row]))
    console = Console()
    console.print(table)
    for size, name in long_functions:
        console.print(f"over {MAX_FUNCTION} lines: {name} {size}", highlight=False)
    for path in long_files:
        console.print(f"over {MAX_FILE} lines: {path.relative_to(ROOT)} {lines[path]}", highlight=False)
    console.print(f"{len(paths)} files, {len(sizes)} functions, {share:.1%} over {MAX_FUNCTION} lines (at most 4 %)")
    return 1 if long_files or share > ALLOWED_SHARE else 0


if __name__ == "__main__":
    sys.exit(main())
