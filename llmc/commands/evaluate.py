"""`llmc evaluate MODEL... --text FILE --tasks FILE`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from llmc.commands import values

DEFAULT_WINDOW = 512
ROOM, SEQUENCES = 2048, 8  # for prompts of tasks and what follows them


@click.command()
@click.argument("models", metavar="MODEL...", nargs=-1, required=True)
@click.option("--text", metavar="FILE", type=click.Path(path_type=Path), help="UTF-8 text to read.")
@click.option(
    "--window", type=click.IntRange(min=3), help="Tokens read at a time. [default: 512, or what all models can hold]"
)
@click.option("--max-tokens", type=click.IntRange(min=2), help="Tokens of the text to read. [default: all]")
@click.option(
    "--tasks", "tasks_path", metavar="FILE", type=click.Path(path_type=Path), help="Code to write: see below."
)
@click.option("--json", "json_path", type=values.OutputFile(), help="Write the figures, too.")
def command(
    models: tuple[str, ...],
    text: Path | None,
    window: int | None,
    max_tokens: int | None,
    tasks_path: Path | None,
    json_path: Path | None,
) -> None:
    """Models side by side: perplexity on a text, and how many tasks they solve.

    Each MODEL is a Hugging Face folder, a checkpoint, an engine, or the http:// address of a running server; the first
    is the baseline. Engines and servers run as they are used, the others slowly, in PyTorch.

    --tasks is a file in HumanEval's form, a JSON object a line with task_id, prompt, entry_point and test. What a model
    writes is run, in a process without network, with little time and memory: enough against mistakes, not against
    malice.
    """
    from llmc import text as texts
    from llmc.commands import report, subjects
    from llmc.commands.progress import shown
    from llmc.evaluate import code_tasks
    from llmc.evaluate.agreement import compare

    if text is None and tasks_path is None:
        raise click.UsageError("give --text, --tasks or both")
    content = texts.read(text) if text else None
    tasks = code_tasks.tasks(tasks_path) if tasks_path else []
    longest = max(window or DEFAULT_WINDOW, ROOM if tasks else 0)
    rows: list[dict[str, Any]] = [{} for _ in models]
    with subjects.opened(models, longest, SEQUENCES if tasks else 1) as opened, shown() as progress:
        if content:
            room = [model.runner.limits.max_length for model in opened if model.runner]
            given = subjects.reading(opened, content, window or min(DEFAULT_WINDOW, *room), max_tokens)
            rows = [row.figures() for row in compare(given, lambda done, of: progress("reading", done, of))]
        for row, model in zip(rows, opened, strict=True) if tasks else ():
            prompts = [task.prompt for task in tasks]
            written = subjects.completions(model, prompts, code_tasks.MAX_TOKENS, code_tasks.STOPS)
            row |= {"folder": model.name, "kind": model.kind, "bytes": model.size}
            row |= code_tasks.figures(code_tasks.solve(tasks, written))
    report.evaluation(rows)
    if json_path:
        json_path.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
