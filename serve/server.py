"""gunicorn as a library: one worker process with threads, the engine in it, and an orderly end.

    llmc serve ──► gunicorn's master ──fork──► worker: engine thread + one thread a request

The master starts the worker again should it die. On SIGTERM the worker first drains: /ready and new requests answer
503 while what runs is finished, up to a limit; then it ends, with status 0. SIGINT (Ctrl-C) ends at once, and so does
a second SIGTERM.
"""

from __future__ import annotations

import itertools
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from flask import Flask
from gunicorn.app.base import BaseApplication
from gunicorn.glogging import Logger
from gunicorn.http.errors import LimitRequestHeaders, LimitRequestLine
from gunicorn.workers.gthread import ThreadWorker

from llmc.errors import LlmcError
from llmc.log import logger
from llmc.serve.address import Address, threads
from llmc.serve.app import create_app
from llmc.serve.engine import Engine
from llmc.serve.service import Service

# What gunicorn's master waits for the worker beyond the time that draining may take.
EXIT_SECONDS = 15
# gunicorn ends the master when a worker leaves with this.
LOAD_FAILED = 4


def serve(
    address: Address,
    load: Callable[[], Service],
    announce: Callable[[Service, str], None],
    *,
    drain_timeout: float = 60.0,
) -> None:
    """Serve until SIGTERM or SIGINT; leaves through SystemExit, with status 0 after an orderly end.

    Args:
        load: Opens the engine; called in the worker process, since runtimes with threads do not survive a fork.
        announce: Called with the service and its URL once requests are taken.
        drain_timeout: How long running requests may go on after SIGTERM.

    Raises:
        UserError: Nothing can listen at `address`.
    """
    address.check()
    _Application(address, load, drain_timeout, announce).run()


class _Application(BaseApplication):  # type: ignore[misc]
    """gunicorn's side of it; `load` gives the WSGI application."""

    def __init__(
        self,
        address: Address,
        load: Callable[[], Service],
        drain_timeout: float,
        announce: Callable[[Service, str], None],
    ) -> None:
        self.address = address
        self.load_service = load
        self.drain_timeout = drain_timeout
        self.announce = announce
        super().__init__()

    def load_config(self) -> None:
        """See gunicorn."""
        settings: dict[str, Any] = {
            "bind": self.address.url(self.address.port).removeprefix("http://"),
            "workers": 1,
            "worker_class": Worker,
            "worker_connections": 10_000,
            # The heartbeat of a worker that loads a large engine stops for long; /health tells what is stuck.
            "timeout": 0,
            "graceful_timeout": int(self.drain_timeout) + EXIT_SECONDS,
            "keepalive": 75,
            "accesslog": None,
            "errorlog": "-",
            "loglevel": "warning",
            "logger_class": _Log,
            "control_socket_disable": True,
            "proc_name": "llmc",
            "when_ready": _abort_on_second_sigterm,
        }
        for name, value in settings.items():
            if name in self.cfg.settings:
                self.cfg.set(name, value)

    def load(self) -> Flask:
        """Open the engine, in the worker."""
        try:
            service = self.load_service()
        except LlmcError as error:
            sys.stderr.write(f"llmc: {error}\n")
            sys.exit(LOAD_FAILED)
        service.engine.start()
        self.service = service
        return create_app(service)


def _abort_on_second_sigterm(master: Any) -> None:
    """gunicorn's master waits for its worker and looks at no signal meanwhile: so this one is handled at once."""
    seen = itertools.count()
    orderly = signal.getsignal(signal.SIGTERM)

    def handle(number: int, frame: Any) -> None:
        if next(seen):
            master.kill_workers(signal.SIGQUIT)
        elif callable(orderly):
            orderly(number, frame)

    signal.signal(signal.SIGTERM, handle)


class _Log(Logger):  # type: ignore[misc]
    """gunicorn's log without what llmc has said already, in its own words."""

    def error(self, msg: str, *args: Any, **kwargs: Any) -> None:
        """See Logger."""
        if not msg.startswith(("Worker (pid:%s) exited with code", "Shutting down: ", "Reason: ")):
            super().error(msg, *args, **kwargs)


class Worker(ThreadWorker):  # type: ignore[misc]
    """gunicorn's threaded worker, which drains before it stops and answers broken HTTP with JSON."""

    draining = False

    def load_wsgi(self) -> None:
        """Load the application, then make as many threads as its engine takes requests."""
        super().load_wsgi()
        self.tpool = ThreadPoolExecutor(threads(self.engine.budget))
        self.app.announce(self.app.service, self.app.address.url(self.sockets[0].getsockname()[1]))

    @property
    def engine(self) -> Engine:
        engine: Engine = self.app.service.engine
        return engine

    def run(self) -> None:
        """See ThreadWorker; the engine ends with it."""
        try:
            super().run()
        finally:
            self.engine.close(timeout=EXIT_SECONDS / 3)

    def handle_exit(self, sig: int, frame: Any) -> None:
        """SIGTERM: drain, still answering."""
        if self.draining:
            return
        self.draining = True
        # Not here: a signal handler must not take a lock that the interrupted thread may hold.
        threading.Thread(target=self._drain, name="llmc-drain", daemon=True).start()

    def handle_quit(self, sig: int, frame: Any) -> None:
        """SIGQUIT, or Ctrl-C: stop at once."""
        self.alive = False
        sys.exit(0)

    def _drain(self) -> None:
        done = self.engine.drain(self.app.drain_timeout)
        logger.info("drained" if done else "stopped requests that took too long")
        # The last events are with their threads; these write them and finish.
        deadline = time.monotonic() + 1.0
        while self.nr_conns > len(self.keepalived_conns) and time.monotonic() < deadline:
            time.sleep(0.02)
        self._stop()

    def _stop(self) -> None:
        self.alive = False
        self.method_queue.defer(lambda: None)

    def handle_error(self, req: Any, client: socket.socket, addr: Any, exc: Exception) -> None:
        """What is not HTTP is answered as every other mistake is: in JSON."""
        from llmc.serve.routes.errors import plain

        status = {LimitRequestLine: 414, LimitRequestHeaders: 431}.get(type(exc), 400)
        known = type(exc).__module__.startswith("gunicorn.")
        if not known:
            logger.error("a request failed outside of the application", exc_info=exc)
        body = plain(f"not a valid HTTP request: {exc}" if known else "the server failed", status if known else 500)
        head = (
            f"HTTP/1.1 {status if known else 500} Error\r\nConnection: close\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        try:
            client.sendall(head.encode() + body)
        except OSError:
            logger.debug("nobody was there to be told of %s", exc)
