"""llmc.evaluate.sandbox: what programs may do, and what they may not."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from llmc.evaluate.sandbox import Bounds, run

SMALL = Bounds(seconds=20, memory=256 << 20, file_size=1 << 16)


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("x = 1", ""),
        ("if __name__ == '__main__':\n    open('a.txt', 'w').write('x')", ""),
        ("print('noise\\n' * 100)", ""),
        ("assert 1 == 2, 'not so'", "AssertionError: not so"),
        ("def f(:", "SyntaxError"),
        ("raise SystemExit(0)", "ended early, with status 0"),
        ("import os\nos._exit(0)", "ended early, with status 0"),
        ("x = bytearray(1 << 30)", "MemoryError"),
        ("open('a.bin', 'wb').write(bytes(1 << 17))", "File too large"),
        ("import os\nos.fork()", "Resource temporarily unavailable"),
        ("import subprocess\nsubprocess.run(['ls'])", "Resource temporarily unavailable"),
        ("import threading\nthreading.Thread(target=print).start()", "can't start new thread"),
        ("import os\nos.kill(os.getpid(), 11)", "ended by SIGSEGV"),
        ("open('x' * 10)", "No such file"),
        ("assert not open(0).read()", ""),
    ],
)
def test_what_comes_of_a_program(program: str, reason: str) -> None:
    found = run(program, SMALL)
    assert reason in found.reason
    assert found.passed == (reason == "")


@pytest.mark.parametrize("program", ["while True: pass", "import time\ntime.sleep(60)"])
def test_takes_no_longer_than_it_may(program: str) -> None:
    began = time.monotonic()
    found = run(program, Bounds(seconds=1))
    assert (found.passed, found.reason) == (False, "timed out")
    assert time.monotonic() - began < 30


def test_has_no_network_where_it_says_so() -> None:
    found = run("import socket\nsocket.socket(socket.AF_INET, socket.SOCK_DGRAM).connect(('192.0.2.1', 9))\n", SMALL)
    assert found.network or found.reason == "OSError: [Errno 101] Network is unreachable"


def test_sees_neither_the_caller_s_environment_nor_its_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LLMC_SECRET", "1")
    (tmp_path / "json.py").write_text("raise ValueError('wrong json')", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    found = run("import os, json\nassert 'LLMC_SECRET' not in os.environ\nassert os.listdir() != []", SMALL)
    assert found.passed, found.reason


@pytest.mark.skipif(os.geteuid() != 0, reason="only root loses anything")
def test_is_not_root(tmp_path: Path) -> None:
    path = tmp_path / "mine"
    path.write_text("mine", encoding="utf-8")
    path.chmod(0o666)
    tmp_path.chmod(0o700)
    programs = [
        "import os\nassert os.getuid() != 0",
        f"open({str(path.parent / 'new')!r}, 'w')",
        "import os\nos.kill(1, 0)",
    ]
    passed = [run(program, SMALL) for program in programs]
    assert [each.passed for each in passed] == [True, False, False]
    assert "Permission denied" in passed[1].reason
    assert "not permitted" in passed[2].reason
