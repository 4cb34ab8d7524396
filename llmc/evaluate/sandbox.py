"""Run a program that nobody has read: in a process of its own, in an empty folder, with little of everything.

    memory, processor time, size of files    limits of the kernel (setrlimit), which the process sets before it begins
    processes and threads                    none beside it; what root starts becomes nobody first
    network                                  none, where the kernel gives the process a network of its own (unshare)
    wall-clock time                          killed from outside, with all that it began

That is enough against programs that are wrong, as those of language models are. It is not a wall against programs that
are meant to do harm: they read what any user of the machine can read.

Knows: processes. Does not know: where programs come from.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a program may use.

    Attributes:
        seconds: By the clock, and of processor time.
        memory: Bytes of address space.
        file_size: Bytes of each file that it writes.
    """

    seconds: int = 10
    memory: int = 1 << 30
    file_size: int = 1 << 20


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a program ended.

    Attributes:
        passed: It ran to its last line.
        reason: Else why not: the exception, "timed out", ...; empty when it passed.
        network: Whether it could have reached one.
    """

    passed: bool
    reason: str
    network: bool


# The other side. It is given to `python -I -c`, so that nothing of the caller's folder or environment is imported.
# A random word that is not said before the end proves the end: sys.exit(0) in the program does not.
_INSIDE = r"""
import ctypes, json, os, resource, sys
bounds, word = json.loads(sys.stdin.readline()), sys.stdin.readline()
answers = os.dup(1)
nowhere = os.open(os.devnull, os.O_RDWR)
os.dup2(nowhere, 0)
os.dup2(nowhere, 1)
NEW_USER, NEW_NET, NOBODY = 0x10000000, 0x40000000, 65534
libc = ctypes.CDLL(None)
alone = hasattr(libc, "unshare") and any(libc.unshare(flags) == 0 for flags in (NEW_NET, NEW_USER | NEW_NET))
if os.geteuid() == 0 and hasattr(libc, "capset"):
    # The kernel counts no processes of root, and lets root kill anybody. Of root's powers only reading stays (Python
    # itself may lie where nobody else reads): CAP_DAC_READ_SEARCH, 2, by capset(2) with prctl's PR_SET_KEEPCAPS, 8.
    os.chown(".", NOBODY, NOBODY)
    libc.prctl(8, 1, 0, 0, 0)
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    libc.capset((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)(4, 4, 0, 0, 0, 0))
limits = {"CPU": bounds["seconds"], "AS": bounds["memory"], "FSIZE": bounds["file_size"], "NOFILE": 64, "CORE": 0}
for name, most in {**limits, "NPROC": 0}.items():
    if hasattr(resource, "RLIMIT_" + name):  # some systems have fewer
        resource.setrlimit(getattr(resource, "RLIMIT_" + name), (most, most))
os.write(answers, b"alone\n" if alone else b"networked\n")
with open("program.py", encoding="utf-8") as file:
    code = compile(file.read(), "program.py", "exec")
del ctypes, file
exec(code, {"__name__": "__main__"})
os.write(answers, word.encode())
os._exit(0)
"""


def run(program: str, bounds: Bounds | None = None) -> Outcome:
    """Run a Python program to its end, or to that of its bounds; it reads nothing, and what it prints is lost."""
    bounds, word = bounds or Bounds(), secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="llmc-program-", ignore_cleanup_errors=True) as folder:
        Path(folder, "program.py").write_text(program, encoding="utf-8")
        complaints = Path(folder, "errors.txt")
        with complaints.open("wb") as errors:
            process = subprocess.Popen(
                [sys.executable, "-I", "-X", "utf8", "-c", _INSIDE],
                cwd=folder,
                env={"HOME": folder, "TMPDIR": folder, "PATH": os.defpath},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                start_new_session=True,
            )
            said, timed_out = _talk(process, f"{json.dumps(asdict(bounds))}\n{word}\n".encode(), bounds.seconds)
        lines = said.decode("utf-8", "replace").split()
        passed = lines[-1:] == [word] and not timed_out
        reason = "" if passed else "timed out" if timed_out else _reason(process.returncode, complaints)
        return Outcome(passed, reason, network="alone" not in lines)


def _talk(process: subprocess.Popen[bytes], text: bytes, seconds: int) -> tuple[bytes, bool]:
    """What a process says until it ends, or until its time is over and it is killed with all of its session."""
    timed_out = False
    try:
        process.communicate(text, timeout=seconds)
    except subprocess.TimeoutExpired:
        timed_out = True
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    return process.communicate()[0], timed_out


def _reason(status: int, complaints: Path) -> str:
    """The exception's line, or the signal that ended it."""
    if status < 0:
        return "timed out" if -status == signal.SIGXCPU else f"ended by {signal.Signals(-status).name}"
    text = complaints.read_bytes()[-2000:].decode("utf-8", "replace").strip()
    return text.splitlines()[-1][:200] if text else f"ended early, with status {status}"
