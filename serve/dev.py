"""The server of `llmc serve --dev`: waitress, in this process, with the same routes.

One process that starts at once, under a debugger or on systems without fork, and that ends at once: no supervisor, no
drain, and what a client that stopped reading has not taken is held in memory until the engine gives the request up.
serve/server.py is the one to put in front of users.
"""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Callable
from typing import Any

import waitress

from llmc.serve.address import Address, threads
from llmc.serve.app import create_app
from llmc.serve.routes.transport import SEND_BUFFER
from llmc.serve.service import Service


def serve(address: Address, load: Callable[[], Service], announce: Callable[[Service, str], None]) -> None:
    """Serve until SIGINT (Ctrl-C) or SIGTERM, which end what runs with an error; a second one kills.

    Args:
        load: Opens the engine.
        announce: Called with the service and its URL once requests are taken.

    Raises:
        UserError: Nothing can listen at `address`.
    """
    bound = address.bind()
    service = load()
    server: Any = waitress.create_server(
        create_app(service),
        sockets=[bound],
        threads=threads(service.engine.budget),
        # Else it looks at the socket of a running request for nothing but room to write.
        channel_request_lookahead=1,
        outbuf_high_watermark=SEND_BUFFER,
        ident=None,
    )
    server.adj.socket_options = [*server.adj.socket_options, (socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)]
    closing = threading.Thread(target=service.engine.close, name="llmc-close")

    def stop(*_: object) -> None:
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_DFL)
        # Not here: a signal handler must not take a lock. waitress waits for its requests, which end with the engine.
        closing.start()
        raise SystemExit

    service.engine.start()
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, stop)
    announce(service, address.url(bound.getsockname()[1]))
    try:
        server.run()
    finally:
        if closing.ident is None:
            closing.start()
        closing.join()
        server.close()
