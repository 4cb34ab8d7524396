"""llmc.evaluate.code_tasks: tasks in HumanEval's form, completions, what becomes of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llmc.errors import UserError
from llmc.evaluate import code_tasks
from llmc.evaluate.code_tasks import Task, cut, program, solve

EXAMPLES = Path(__file__).parents[3] / "examples" / "code_tasks.jsonl"
DOUBLE = Task(
    task_id="t/0",
    prompt='def double(x):\n    """Twice x."""\n',
    entry_point="double",
    test="def check(candidate):\n    assert candidate(2) == 4\n    assert candidate(-1) == -2\n",
)


@pytest.mark.parametrize(
    ("completion", "passed"),
    [
        ("    return 2 * x\n", True),
        ("    return x + x\n\n\ndef other(:\n", True),  # what follows is not the function's
        ("    return x + x\n```\nThis doubles.", True),
        ("    y = x\n    if y:\n        return 2 * y\n    return 0\n", True),
        ("    return x * x\n", False),
        ("", False),
        ("    return 2 * x\n\nexit()\n", False),
        ("    while True: pass\n", False),
    ],
)
def test_solved_or_not(completion: str, passed: bool) -> None:
    (found,) = solve([DOUBLE], [completion], code_tasks.Bounds(seconds=3))
    assert found.outcome.passed is passed
    assert bool(found.outcome.reason) is not passed


def test_cut_is_at_the_first_stop() -> None:
    assert cut("    a\n\n# b\nclass C") == "    a\n"
    assert cut("    if a:\n        print(1)\n") == "    if a:\n        print(1)\n"
    assert program(DOUBLE, "    return 1\nprint(2)").count("print") == 0


def test_figures() -> None:
    solutions = solve([DOUBLE, DOUBLE], ["    return 2 * x\n", "    return 1\n"])
    figures = code_tasks.figures(solutions)
    assert figures["pass_at_1"] == 0.5
    assert [task["passed"] for task in figures["tasks"]] == [True, False]
    assert figures["tasks"][1]["reason"] == "AssertionError"


# By hand, so that the tests of the tasks are tested as well.
SOLUTIONS = {
    "count_vowels": "    return sum(c in 'aeiouAEIOU' for c in text)\n",
    "running_maximum": "    import itertools\n    return list(itertools.accumulate(values, max))\n",
    "is_leap_year": "    return year % 4 == 0 and (year % 100 != 0 or year % 400 == 0)\n",
    "fibonacci": "    a, b = 0, 1\n    for _ in range(n):\n        a, b = b, a + b\n    return a\n",
    "word_lengths": "    return {word: len(word) for word in sentence.split()}\n",
    "flatten": "    return [y for x in nested for y in (flatten(x) if isinstance(x, list) else [x])]\n",
    "roman": (
        "    parts = zip((1000, 900, 500, 400, 100, 90, 50, 40, 10, 9, 5, 4, 1),\n"
        "                'M CM D CD C XC L XL X IX V IV I'.split())\n"
        "    text = ''\n    for value, letters in parts:\n"
        "        text += number // value * letters\n        number %= value\n    return text\n"
    ),
    "balanced": (
        "    stack = []\n    for c in text:\n        if c in '([{':\n            stack.append(c)\n"
        "        elif c in ')]}':\n            if not stack or stack.pop() + c not in ('()', '[]', '{}'):\n"
        "                return False\n    return not stack\n"
    ),
    "run_length": "    import itertools\n    return [(c, len(list(g))) for c, g in itertools.groupby(text)]\n",
    "primes_below": "    return [n for n in range(2, limit) if all(n % d for d in range(2, int(n**0.5) + 1))]\n",
    "merge_intervals": (
        "    found = []\n    for a, b in sorted(intervals):\n        if found and a <= found[-1][1]:\n"
        "            found[-1] = (found[-1][0], max(b, found[-1][1]))\n"
        "        else:\n            found.append((a, b))\n"
        "    return found\n"
    ),
    "edit_distance": (
        "    row = list(range(len(b) + 1))\n    for i, x in enumerate(a, 1):\n        last, row[0] = row[0], i\n"
        "        for j, y in enumerate(b, 1):\n"
        "            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (x != y))\n    return row[-1]\n"
    ),
}


def test_the_tasks_that_come_along_can_be_solved() -> None:
    tasks = code_tasks.tasks(EXAMPLES)
    assert [task.entry_point for task in tasks] == list(SOLUTIONS)
    right = solve(tasks, list(SOLUTIONS.values()))
    assert [each.task.task_id for each in right if not each.outcome.passed] == []
    wrong = solve(tasks, ["    return None\n"] * len(tasks))
    assert [each.task.task_id for each in wrong if each.outcome.passed] == []


def test_other_keys_are_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "tasks.jsonl"
    path.write_text(json.dumps({**DOUBLE.model_dump(), "canonical_solution": "x"}) + "\n\n", encoding="utf-8")
    assert code_tasks.tasks(path) == [DOUBLE]


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "line 1"), ("[1]", "line 1"), ('{"task_id": "a"}', "prompt"), ("\n \n", "empty")],
)
def test_files_that_are_none(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "tasks.jsonl"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        code_tasks.tasks(path)
