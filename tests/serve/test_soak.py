"""Two thousand requests, many of them cancelled or broken, at a real server: afterwards nothing is missing."""

from __future__ import annotations

import json
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest

from llmc.builders import ort
from llmc.engine import describe
from llmc.serve.local import serving
from llmc.serve.runners import GIB

REQUESTS = 2000
# Less than eight long sequences hold, so that some give up their places.
CACHE_TOKENS = 1024
CLIENTS = 16
# The allocators of Python and onnxruntime keep what they once had; a leak of 16 kB a request would show.
GROWTH = 32 << 20
# gunicorn's pool makes a thread whenever none is idle, up to its limit, and keeps it.
MORE_THREADS = 4

BROKEN: tuple[bytes, ...] = (
    b"{",
    b"[]",
    b"\xff\xfe",
    b'{"prompt": 7}',
    b'{"prompt": "a", "max_tokens": -1}',
    b'{"prompt": "a", "temperature": NaN}',
    b'{"prompt": "a", "n": 1000000}',
    b'{"prompt": "a", "guided_regex": "("}',
    b'{"prompt": "a", "logit_bias": {"99999999": 1}}',
    b'{"prompt": "' + b"a" * 200_000 + b'"}',
    b"[" * 100_000,
)


class Client:
    """One user's requests, each of a random kind, by a generator of its own."""

    def __init__(self, url: str, seed: int) -> None:
        where = urlsplit(url)
        assert where.hostname is not None
        self.host, self.port = where.hostname, where.port
        self.random = random.Random(seed)
        self.seen: Counter[str] = Counter()

    def body(self) -> bytes:
        choose = self.random
        values: dict[str, object] = {
            "prompt": "the quick brown fox " * choose.randint(1, 12),
            "max_tokens": choose.randint(1, 40),
            "temperature": choose.choice([0, 0, 1.0]),
            "stream": choose.random() < 0.5,
            "n": choose.choice([1, 1, 1, 2]),
            "ignore_eos": choose.random() < 0.5,
        }
        if choose.random() < 0.1:
            values["guided_regex"] = "[a-c]{1,8}"
        if choose.random() < 0.2:
            values["stop"] = ["a", "the"]
        return json.dumps(values).encode()

    def send(self, body: bytes) -> HTTPConnection:
        connection = HTTPConnection(self.host, self.port, timeout=120)
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        return connection

    def finish(self) -> None:
        connection = self.send(self.body())
        answer = connection.getresponse()
        text = answer.read()
        assert answer.status == 200, text
        assert b'"finish_reason"' in text.replace(b" ", b"")
        assert b'"error"' not in text, text
        connection.close()

    def leave(self) -> None:
        """Close, or reset, the connection at any time: queued, in a prompt, between tokens."""
        connection = self.send(self.body())
        time.sleep(self.random.random() * 0.1)
        if connection.sock is not None and self.random.random() < 0.5:
            connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()

    def complain(self) -> None:
        connection = self.send(self.random.choice(BROKEN))
        answer = connection.getresponse()
        text = answer.read()
        assert 400 <= answer.status < 500, (answer.status, text[:200])
        assert set(json.loads(text)) == {"error"}
        connection.close()

    def run(self, count: int) -> None:
        for _ in range(count):
            act = self.random.choices((self.finish, self.leave, self.complain), (5, 3, 2))[0]
            act()
            self.seen[act.__name__] += 1


def crowd(url: str, count: int, seed: int) -> Counter[str]:
    """`count` requests of CLIENTS at once; says how many of each kind were made."""
    clients = [Client(url, seed * CLIENTS + number) for number in range(CLIENTS)]
    failures: list[BaseException] = []

    def work(client: Client) -> None:
        try:
            client.run(count // CLIENTS)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(client,)) for client in clients]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return sum((client.seen for client in clients), Counter())


def gauges(url: str) -> dict[str, float]:
    connection = HTTPConnection(urlsplit(url).netloc, timeout=10)
    connection.request("GET", "/metrics")
    lines = connection.getresponse().read().decode().splitlines()
    connection.close()
    found = [line.rsplit(" ", 1) for line in lines if line.startswith("llmc:")]
    return {name.partition("{")[0]: float(value) for name, value in found}


def idle(url: str) -> None:
    """Wait until nothing runs or waits, and no cache is held."""
    deadline = time.monotonic() + 10
    names = ("llmc:num_requests_running", "llmc:num_requests_waiting", "llmc:kv_cache_usage_perc")
    while any((now := gauges(url))[name] for name in names):
        assert time.monotonic() < deadline, {name: now[name] for name in names}
        time.sleep(0.05)


def control(url: str) -> str:
    connection = HTTPConnection(urlsplit(url).netloc, timeout=60)
    body = json.dumps({"prompt": "the quick brown fox", "max_tokens": 24, "temperature": 0, "ignore_eos": True})
    connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
    text: str = json.loads(connection.getresponse().read())["choices"][0]["text"]
    connection.close()
    return text


def held(worker: psutil.Process, url: str) -> tuple[int, int]:
    """Threads and open files, once the server has closed the connections of those who left."""
    idle(url)
    time.sleep(1.5)
    return worker.num_threads(), worker.num_fds()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_nothing_is_missing_after_two_thousand_requests(tmp_path: Path, tiny_checkpoint: Callable[[str], Path]) -> None:
    ort.build(tiny_checkpoint("qwen2"), tmp_path / "engine")
    size = CACHE_TOKENS * describe(tmp_path / "engine").cache_token_bytes / GIB
    limits = ("--max-sequences", "8", "--kv-cache-gib", str(size), "--threads", "1")
    with serving(tmp_path / "engine", *limits) as url:
        answer = control(url)
        # gunicorn makes threads, and allocators take memory, as they are first needed.
        crowd(url, REQUESTS // 2, seed=1)
        master = next(each for each in psutil.Process().children() if "serve" in each.cmdline())
        (worker,) = master.children()
        threads, files = held(worker, url)
        memory = worker.memory_info().rss

        seen = crowd(url, REQUESTS, seed=2)

        assert min(seen.values()) > REQUESTS // 10, seen
        threads_now, files_now = held(worker, url)
        assert threads_now <= threads + MORE_THREADS
        assert files_now <= files
        assert worker.memory_info().rss - memory < GROWTH
        assert control(url) == answer
        assert gauges(url)["llmc:engine_failed_steps_total"] == 0
