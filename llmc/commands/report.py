"""How commands say sizes. Not a command."""

from __future__ import annotations

from pathlib import Path


def human(size: float) -> str:
    """Bytes for people: 1.4 GB."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} GB"


def folder_size(folder: Path) -> str:
    """The size of all files in a folder, for people."""
    return human(sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()))
