"""The folder of an unfinished run, `OUT.work`, beside the folder it will become.

    settings.json     the configuration and the sha256 of the text: only the same run may go on from here
    data/             tokenizer, tokens, held-out text; there only when whole
    checkpoint-N/     the Trainer's own: weights, optimizer, schedule, random state
    lock              held while a process trains

`OUT` itself appears only when the run is complete, and then this folder goes.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llmc.errors import UserError

_SETTINGS = "settings.json"
_STATE = "trainer_state.json"


def folder_of(output: Path) -> Path:
    """Where the unfinished run that will be `output` lies."""
    output = output.absolute()
    return output.with_name(f"{output.name}.work")


@contextlib.contextmanager
def opened(output: Path, settings: Mapping[str, Any], *, overwrite: bool) -> Iterator[Path]:
    """Yield the work folder of `output`, new or with what an earlier process left there.

    Args:
        settings: All that decides the result, as JSON values.
        overwrite: Throw away unfinished work of other settings.

    Raises:
        UserError: Another process is at it, or the unfinished work there has other settings.
    """
    work = folder_of(output)
    work.mkdir(parents=True, exist_ok=True)
    with (work / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"another llmc train is writing {output} (it holds {work / 'lock'})") from None
        difference = _difference(work / _SETTINGS, settings)
        if difference and not overwrite:
            raise UserError(
                f"{work} holds an unfinished run with other settings ({difference}): "
                "choose another output, or pass --overwrite to begin anew"
            )
        if difference:
            _empty(work)
        (work / _SETTINGS).write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
        yield work


def remove(work: Path) -> None:
    """Delete a work folder whose run is complete."""
    shutil.rmtree(work, ignore_errors=True)


def last_checkpoint(work: Path) -> Path | None:
    """The newest complete checkpoint. The Trainer writes its state file last, so one without it was cut short."""
    complete = [path.parent for path in work.glob(f"checkpoint-*/{_STATE}") if _is_json(path)]
    return max(complete, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return False
    return True


def _empty(work: Path) -> None:
    for path in work.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != "lock":
            path.unlink()


def _difference(path: Path, settings: Mapping[str, Any]) -> str | None:
    """What differs between the settings in `path` and these, in words; None when nothing does or there is no file."""
    try:
        met = _flat(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except ValueError:
        return f"{path.name} is unreadable"
    wanted = _flat(json.loads(json.dumps(settings)))
    for key in sorted(met.keys() | wanted.keys()):
        if met.get(key) != wanted.get(key):
            return f"{key} was {met.get(key)!r}, now {wanted.get(key)!r}"
    return None


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found
