"""`llmc inspect FOLDER`."""

from __future__ import annotations

import json
from pathlib import Path

import click


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the manifest itself.")
@click.option("--quick", is_flag=True, help="Do not read the files to compare their hashes.")
def command(folder: Path, as_json: bool, quick: bool) -> None:
    """Say what a folder is, where it came from, and whether every byte of it is still what was written."""
    from rich.console import Console
    from rich.table import Table

    from llmc import manifest as manifests
    from llmc import verified
    from llmc.commands import runners
    from llmc.commands.report import human

    found = manifests.read(folder)
    if not quick:
        manifests.verify(folder, found)
    if as_json:
        click.echo(found.to_json(), nl=False)
        return
    table = Table(title=f"{folder}: {found.kind}", title_justify="left", show_header=False, box=None)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    table.add_row("identity", manifests.sha256_of(folder / manifests.NAME))
    for line in manifests.lineage(found):
        table.add_row("made from", line)
    table.add_row("with", ", ".join(f"{name} {version}" for name, version in found.tools.items()))
    if found.kind in ("checkpoint", "engine") and (score := runners.spec_of(found.kind, folder).score):
        end = "" if score.pad is None else f" that is not {score.pad}"
        table.add_row("scoring head", f"{score.labels} labels, of the last token{end}")
    for section in (found.settings, found.notes):
        for name, value in section.items():
            table.add_row(name, value if isinstance(value, str) else json.dumps(value))
    for result in verified.read(folder):
        table.add_row("verified", verified.line(result))
    for name, entry in found.files.items():
        table.add_row("file", f"{name}  {human(entry.bytes)}  {entry.sha256[:12]}")
    table.add_row("whole", "not checked (--quick)" if quick else f"yes, {len(found.files)} files read and compared")
    Console().print(table)
