"""llmc.commands.progress: where there is no terminal, a line now and then."""

from __future__ import annotations

import pytest

from llmc.commands import progress


def test_lines_come_at_intervals(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    now = 100.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    with progress.shown() as show:
        for done in range(1, 31):
            now += 1.0
            show("reading", done, 30)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == ["reading: 10 of 30", "reading: 20 of 30", "reading: 30 of 30"]


def test_short_work_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.shown() as show:
        show("reading", 1, 1)
    assert capsys.readouterr() == ("", "")
