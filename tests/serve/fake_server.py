"""`python fake_server.py FOLDER OPTIONS`: the real server, gunicorn and all, around the toy model.

FOLDER gets the tiny tokenizer. OPTIONS is JSON: "runner", "engine" and "service" hold keyword arguments of these,
"drain_timeout" a number; with "broken" nothing can be loaded, and with "dev" the server is waitress. Prints one line of
JSON: "url", and the worker's "pid".
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import fake  # noqa: E402

from llmc import log  # noqa: E402
from llmc.errors import EngineError  # noqa: E402
from llmc.serve.address import Address  # noqa: E402
from llmc.serve.dev import serve as serve_here  # noqa: E402
from llmc.serve.engine import Engine  # noqa: E402
from llmc.serve.server import serve  # noqa: E402
from llmc.serve.service import Service  # noqa: E402


def main() -> None:
    log.configure("info")
    folder, options = Path(sys.argv[1]), json.loads(sys.argv[2])
    tokenizer = fake.tokenizer(folder)

    def load() -> Service:
        if options.get("broken"):
            raise EngineError("the engine in /nowhere cannot be opened")
        runner = fake.FakeRunner(**options.get("runner", {}))
        engine = Engine(runner, tokenizer, **options.get("engine", {}))
        return Service(engine, "toy", int(time.time()), **options.get("service", {}))

    def announce(service: Service, url: str) -> None:
        print(json.dumps({"url": url, "pid": os.getpid()}), flush=True)

    if options.get("dev"):
        serve_here(Address("127.0.0.1", 0), load, announce)
        return
    serve(Address("127.0.0.1", 0), load, announce, drain_timeout=options.get("drain_timeout", 30))


if __name__ == "__main__":
    main()
