"""`llmc serve`'s engine and routes as a Ray Serve deployment: `python ray_serve.py ENGINE --replicas 2`.

    clients ──► Ray's proxy ──┬──► Replica: engine thread + Flask application
                              └──► Replica

Ray starts, watches and replaces the replicas, on as many machines as the cluster has; what they answer is what
`llmc serve` answers. On a cluster, ENGINE is a path that every node has.
"""

from __future__ import annotations

import argparse
import signal
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import ray
from a2wsgi import WSGIMiddleware
from ray import serve

from llmc import manifest
from llmc.serve.address import threads
from llmc.serve.app import create_app
from llmc.serve.opening import Settings, open_service


@serve.deployment(health_check_period_s=2, graceful_shutdown_timeout_s=60)
@serve.ingress()
class Replica:
    """One engine. Ray sends it requests once it is open, and none any more when it is to stop."""

    def __init__(self, engine: str, settings: dict[str, Any]) -> None:
        self.service = open_service(Path(engine), Settings(**settings))
        self.service.engine.start()

    def __serve_build_asgi_app__(self) -> Any:
        """Ray asks for it once the engine is open."""
        return Bridge(create_app(self.service), threads(self.service.engine.budget))

    def check_health(self) -> None:
        """Ray asks; whoever raises is replaced."""
        if not (health := self.service.engine.health).ok:
            raise RuntimeError(health.reason)

    def __del__(self) -> None:
        if hasattr(self, "service"):
            self.service.engine.close()


class Bridge:
    """Ray speaks ASGI, Flask WSGI. Between them it must be known when a client has left, or its tokens are computed
    for nobody: Ray then cancels the call, and the routes ask the function that they know from waitress.
    """

    def __init__(self, app: Any, threads: int) -> None:
        def noticing(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
            environ["waitress.client_disconnected"] = environ["asgi.scope"]["llmc.gone"].is_set
            answer: Iterable[bytes] = app(environ, start_response)
            return answer

        # A bounded queue of pieces would hold its thread for ever once nobody takes them.
        self.app = WSGIMiddleware(noticing, workers=threads, send_queue_size=0)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        gone = threading.Event()
        try:
            await self.app({**scope, "llmc.gone": gone}, receive, send)
        finally:
            gone.set()


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description="An engine as a Ray Serve deployment.")
    parser.add_argument("engine", type=Path)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each replica")
    parser.add_argument("--max-sequences", type=int, default=16, help="sequences at a time, of each replica")
    options = parser.parse_args()
    manifest.read(options.engine, "engine")
    settings = {"threads": options.threads, "max_sequences": options.max_sequences}

    # Joins the cluster of RAY_ADDRESS; without one, begins one here.
    ray.init(include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": options.port})
    deployment = Replica.options(
        num_replicas=options.replicas,
        ray_actor_options={"num_cpus": options.threads},
        # Beyond these the proxy holds requests back, until one of the replicas has room.
        max_ongoing_requests=2 * options.max_sequences,
    )
    # SIGTERM as Ctrl-C: what was begun is ended in order.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    serve.run(deployment.bind(str(options.engine.resolve()), settings), name="llmc")
    print(f"http://127.0.0.1:{options.port} in front of {options.replicas} replicas", flush=True)
    try:
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        serve.shutdown()


if __name__ == "__main__":
    main()
