"""Whether a model writes code that works: tasks in the form of HumanEval (Chen et al. 2021), run in a sandbox.

    {"task_id": "...", "prompt": "def f(x):\n    \"\"\"...\"\"\"\n", "entry_point": "f",
     "test": "def check(candidate):\n    assert candidate(1) == 2\n"}        one a line; other keys are left alone

A model continues the prompt; what it wrote ends where the next thing begins at the margin. prompt + completion + test +
`check(entry_point)` is one program, and the task is solved when it runs to its end. With one greedy completion a task,
the share of solved ones is pass@1.

Knows: tasks and programs. Does not know: who completes prompts, or how programs are kept from doing harm (sandbox.py).
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmc.config import Strict, parse
from llmc.errors import UserError
from llmc.evaluate.sandbox import Bounds, Outcome, run
from llmc.text import read

# Those of the paper's section 2.1 and the end of a block in Markdown, with which models that chat end their code.
STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint", "\n```")

MAX_TOKENS = 384


class Task(Strict):
    """One of them; fields are those of HumanEval's file."""

    task_id: str
    prompt: str
    entry_point: str
    test: str


@dataclass(frozen=True, slots=True)
class Solution:
    """What came of a task."""

    task: Task
    completion: str
    outcome: Outcome


def figures(solutions: Sequence[Solution]) -> dict[str, Any]:
    """Plain values, for a table or for JSON."""
    passed = sum(solution.outcome.passed for solution in solutions)
    return {
        "pass_at_1": passed / len(solutions),
        "tasks": [
            {"task_id": each.task.task_id, "passed": each.outcome.passed, "reason": each.outcome.reason}
            | {"completion": each.completion, "network": each.outcome.network}
            for each in solutions
        ],
    }


def tasks(path: Path) -> list[Task]:
    """The tasks of a JSON-lines file.

    Raises:
        UserError: It cannot be read, or a line is no task.
    """
    found = []
    for number, line in enumerate(read(path).splitlines(), 1):
        if line.strip():
            where = f"{path}, line {number}"
            try:
                values = json.loads(line)
                known = {key: values[key] for key in Task.model_fields if key in values}
            except (ValueError, TypeError) as error:
                raise UserError(f"{where} is no JSON object: {error}", param="tasks") from None
            found.append(parse(Task, known, where=where))
    if not found:
        raise UserError(f"{path} has no tasks", param="tasks")
    return found


def cut(completion: str) -> str:
    """A completion up to where the next thing begins."""
    return completion[: min((at for stop in STOPS if (at := completion.find(stop)) >= 0), default=None)]


def program(task: Task, completion: str) -> str:
    """What is run."""
    return f"{task.prompt}{cut(completion)}\n\n{task.test}\n\ncheck({task.entry_point})\n"


def solve(given: Sequence[Task], completions: Sequence[str], bounds: Bounds | None = None) -> list[Solution]:
    """Run what was written for each task, as many at a time as there are processors."""

    def work(pair: tuple[Task, str]) -> Solution:
        return Solution(pair[0], cut(pair[1]), run(program(*pair), bounds))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(work, zip(given, completions, strict=True)))
