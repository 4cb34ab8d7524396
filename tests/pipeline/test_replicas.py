"""More than one server behind one address: the examples with nginx and with Ray Serve, run as a user runs them."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.client import HTTPConnection
from pathlib import Path

import openai
import psutil
import pytest

from llmc.builders import ort

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Callable[[str], Path]) -> Path:
    folder = tmp_path_factory.mktemp("replicas") / "engine"
    ort.build(tiny_checkpoint("qwen2"), folder)
    return folder


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextlib.contextmanager
def example(script: str, engine: Path, port: int) -> Iterator[subprocess.Popen[str]]:
    """The example's script until the block ends, then SIGINT; it must leave no process behind."""
    command = [sys.executable, str(EXAMPLES / script), str(engine), "--replicas", "2", "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        assert line.startswith(f"http://127.0.0.1:{port} in front of"), line
        yield process
    finally:
        children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.send_signal(signal.SIGINT)
        try:
            process.wait(60)
            _, left = psutil.wait_procs(children, timeout=30)
            assert not left, left
        finally:
            for each in (*children, process):
                with contextlib.suppress(psutil.NoSuchProcess):
                    each.kill()
            process.communicate()


def ask(port: int, max_tokens: int = 8) -> str:
    with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as client:
        pieces = client.completions.create(
            model="engine",
            prompt="the quick",
            max_tokens=max_tokens,
            temperature=0,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        return "".join(piece.choices[0].text for piece in pieces)


def together(act: Callable[[], object], count: int) -> list[BaseException]:
    """`act` on so many threads at once; what they raised."""
    raised: list[BaseException] = []

    def guarded() -> None:
        try:
            act()
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=guarded) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return raised


def metric(url: str, name: str) -> float:
    connection = HTTPConnection(url.removeprefix("http://"), timeout=10)
    connection.request("GET", "/metrics")
    lines = connection.getresponse().read().decode().splitlines()
    connection.close()
    return next(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))


def answers(url: str) -> bool:
    try:
        return metric(url, "llmc:num_requests_running") >= 0
    except ConnectionError:
        return False


def urls_of(process: subprocess.Popen[str]) -> dict[str, psutil.Process]:
    """Base URL -> gunicorn's master, of the replicas that a script has started."""
    masters = [each for each in psutil.Process(process.pid).children() if "serve" in each.cmdline()]
    found = {}
    for master in masters:
        listening = [c for c in master.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
        found[f"http://127.0.0.1:{listening[0].laddr.port}"] = master
    return found


NGINX = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")


@pytest.mark.skipif(NGINX is None, reason="nginx is not installed: sh scripts/programs.sh, as root")
def test_replicas_behind_nginx(engine: Path) -> None:
    port = free_port()
    with example("02_replicas/replicas.py", engine, port) as process:
        replicas = urls_of(process)
        assert len(replicas) == 2
        alone = ask(port)
        assert not together(lambda: ask(port, 32), 12)
        served = [metric(url, "llmc:generation_tokens_total") for url in replicas]
        assert min(served) > 0, "one replica did everything"

        # One drains: its streams are finished, and everything new goes to the other.
        cut: list[BaseException] = []
        streams = threading.Thread(target=lambda: cut.extend(together(lambda: ask(port, 100), 8)))
        streams.start()
        time.sleep(0.1)
        leaving, master = next(iter(replicas.items()))
        master.terminate()
        assert not together(lambda: ask(port), 12)
        streams.join()
        assert not cut
        deadline = time.monotonic() + 30
        while answers(leaving):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert [ask(port) for _ in range(4)] == [alone] * 4


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason='Ray is not installed: pip install ".[ray]"')
def test_ray_serve(engine: Path) -> None:
    port = free_port()
    with example("03_ray_serve/ray_serve.py", engine, port):
        alone = ask(port)
        assert alone
        texts: list[str] = []
        assert not together(lambda: texts.append(ask(port)), 12)
        assert texts == [alone] * 12

        # A client that leaves is noticed, and what he asked for is not computed.
        for _ in range(40):
            connection = HTTPConnection("127.0.0.1", port, timeout=30)
            body = b'{"prompt": "the", "max_tokens": 200, "ignore_eos": true, "stream": true}'
            connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
            connection.getresponse().read(10)
            connection.close()
        assert ask(port) == alone
        url = f"http://127.0.0.1:{port}"
        while any(metric(url, "llmc:num_requests_running") for _ in range(10)):
            time.sleep(0.1)
        # The proxy asks now this replica, now that one.
        computed = {metric(url, "llmc:generation_tokens_total") for _ in range(20)}
        assert sum(computed) < 40 * 200 / 2
        with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as client:
            with pytest.raises(openai.BadRequestError, match="max_tokens"):
                client.completions.create(model="engine", prompt="the", max_tokens=-1)
            assert client.models.list().data[0].id == "engine"
