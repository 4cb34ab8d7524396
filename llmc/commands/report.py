"""How commands say sizes and figures. Not a command."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any


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


def use(recipe: Any, out: Path) -> str:
    """The command that goes on with a quantized checkpoint."""
    if recipe.weights and recipe.weights.blocks:
        return f"llmc export {out} FOLDER --format modelopt"
    return f"llmc build-engine {out} ENGINE"


def evaluation(rows: list[dict[str, Any]]) -> None:
    """The table of `llmc evaluate`, from the figures that `--json` writes; columns without any figure are left out."""
    from rich.console import Console
    from rich.table import Table

    first = rows[0]
    last_parts = [row["folder"].rstrip("/").rpartition("/")[2] for row in rows]
    unambiguous = len(set(last_parts)) == len(rows) and "" not in last_parts

    def versus(row: dict[str, Any]) -> str:
        same = row.get("top1") is not None and row is not first
        return f"{row['perplexity'] / first['perplexity'] - 1:+.1%}" if same else ""

    def passed(row: dict[str, Any]) -> str:
        return f"{sum(task['passed'] for task in row['tasks'])} of {len(row['tasks'])} ({row['pass_at_1']:.0%})"

    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "size": lambda row: "" if row["bytes"] is None else human(row["bytes"]),
        "perplexity": lambda row: f"{row['perplexity']:.3f}" if "perplexity" in row else "",
        "vs first": versus,
        "KL": lambda row: "" if row.get("kl") is None else f"{row['kl']:.4f}",
        "top-1": lambda row: "" if row.get("top1") is None else f"{row['top1']:.1%}",
        "pass@1": lambda row: passed(row) if "tasks" in row else "",
        "tokens/s": lambda row: f"{row['tokens_per_second']:.0f}" if "tokens_per_second" in row else "",
    }
    title = f"{first['tokens']} predicted tokens; KL and top-1 against the first" if "perplexity" in first else None
    table = Table(title=title, box=None)
    table.add_column("model", overflow="fold", min_width=16)
    table.add_column("kind", no_wrap=True)
    cells = {name: [of(row) for row in rows] for name, of in columns.items()}
    kept = {name: column for name, column in cells.items() if any(column)}
    for heading in kept:
        table.add_column(heading, justify="right", no_wrap=True)
    for at, row in enumerate(rows):
        name = last_parts[at] if unambiguous else row["folder"]
        table.add_row(name, row["kind"], *(column[at] for column in kept.values()))
    # A narrow terminal breaks lines; rich would leave out the models' names.
    console = Console()
    Console(width=max(console.width, 120)).print(table)


def offline_bench(rows: list[dict[str, Any]]) -> None:
    """The table of `llmc bench ENGINE`."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None)
    for heading in ("what", "sequences", "tokens/s", "ms a step"):
        table.add_column(heading, justify="left" if heading == "what" else "right")
    for row in rows:
        speed = f"{row['tokens_per_second']:.1f}"
        table.add_row(row["what"], str(row["batch"]), speed, f"{row['step']:.1f}")
    Console().print(table)


def online_bench(rows: list[dict[str, Any]]) -> None:
    """The table of `llmc bench --url`; times in milliseconds."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="times in ms: p50 / p95 / p99", box=None)
    table.add_column("load", no_wrap=True)
    for heading in ("requests", "failed", "tokens/s", "first token", "between tokens", "whole answer"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        load = f"{row['concurrency']} clients" if row["concurrency"] else f"{row['rate']:g} a second"
        keys = ("time_to_first_token", "inter_token_latency", "request_latency")
        times = [" / ".join(f"{row[key][each]:.0f}" for each in ("p50", "p95", "p99") if row[key]) for key in keys]
        speed = f"{row['output_tokens_per_second']:.1f}"
        table.add_row(load, str(row["requests"]), str(row["failed"]), speed, *times)
    Console().print(table)


def quantization(out: Path, figures: Any) -> None:
    """The table of `llmc quantize`, from what llmc.quant.quantize gave."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{out}: {folder_size(out)}", box=None, show_header=False, title_justify="left")
    table.add_column("what", no_wrap=True)
    table.add_column("figures", overflow="fold")
    share = figures.bytes_after / figures.bytes_before
    table.add_row("tensors", f"{human(figures.bytes_before)} -> {human(figures.bytes_after)} ({share:.0%})")
    if figures.errors:
        table.add_row("bits", f"{figures.bits:.2f} for each parameter, scales and what is kept included")
        table.add_row("matrices", f"{_formats(figures)}; kept {len(figures.kept)}")
        table.add_row("bits by part", _by_part(figures.parts))
        worst = sorted(figures.errors, key=lambda name: -figures.errors[name])[:3]
        table.add_row("error", f"{figures.mean_error:.2%} on average, of {figures.error_kind}")
        table.add_row("worst", ", ".join(f"{name} {figures.errors[name]:.2%}" for name in worst))
    if activations := figures.recipe.activations:
        how = "a scale for each token" if activations.dynamic else "one scale, calibrated"
        on_cpu = "; computed in float32: the CPU multiplies no fp8" if activations.kind == "fp8" else ""
        table.add_row("activations", f"{activations.kind}, {how}{on_cpu}")
    if figures.recipe.kv_cache:
        form = figures.recipe.kv_cache
        each = {
            "channel": "for each channel",
            "head": "for each head",
            "dynamic": "for each token and head, as written",
        }
        reach = {"max": "the text's largest values", "average": "the mean of its windows' largest values"}
        observed = "" if form.scale == "dynamic" else f", from {reach[form.observer]}"
        table.add_row("KV cache", f"{form.kind}, a scale {each[form.scale]}{observed}")
    if figures.calibrated_on:
        table.add_row("calibrated on", figures.calibrated_on)
    if figures.verdict:
        found = figures.verdict
        table.add_row("judged on", f"{found.source}, {found.tokens} predicted tokens")
        table.add_row("perplexity", f"{found.original:.3f} -> {found.result:.3f} ({found.increase:+.2%})")
        table.add_row("KL, top-1", f"{found.kl:.4f} nats, {found.top1:.1%} the same first choice")
    else:
        table.add_row("perplexity", "not measured")
    table.add_row("took", f"{figures.seconds:.1f} s, {human(figures.peak_bytes)} at most")
    Console().print(table)


def _by_part(parts: dict[str, Any]) -> str:
    """`8: layers 0-2, 5, front; 4: layers 3, 4; kept: tail`: parts of the same bits together."""
    groups: dict[str, list[str]] = {}
    for part, widths in parts.items():
        said = " and ".join(str(width) if width else "kept" for width in widths)
        groups.setdefault(said, []).append(part)
    return "; ".join(f"{said}: {_ranges(members)}" for said, members in groups.items())


def _ranges(parts: list[str]) -> str:
    numbers = [int(part.removeprefix("layers.")) for part in parts if part.startswith("layers.")]
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] + 1 == number:
            runs[-1].append(number)
        else:
            runs.append([number])
    layers = ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
    others = [part for part in parts if not part.startswith("layers.")]
    return ", ".join([*([f"layer{'s' * (len(numbers) > 1)} {layers}"] if layers else []), *others])


def _formats(figures: Any) -> str:
    """How many matrices have which format."""
    counts: dict[str, int] = {}
    for name in figures.errors:
        form, inputs = figures.recipe.format_of(name), figures.recipe.inputs_of(name)
        text = f"in {form.bits} bits" if form.kind == "int" else f"in {form.kind}"
        text += f", groups of {form.group_size}" if form.group_size else ", one scale" if form.per_tensor else ", rows"
        text += ("" if form.symmetric else " with zero points") + (", inputs rounded" if inputs else "")
        counts[text] = counts.get(text, 0) + 1
    return ", ".join(f"{count} {text}" for text, count in counts.items())
