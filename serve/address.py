"""Where a server listens, and with how many threads: the same for gunicorn and for waitress."""

from __future__ import annotations

import socket
from dataclasses import dataclass

from llmc.errors import UserError
from llmc.serve.scheduler import Budget

SPARE_THREADS = 16


@dataclass(frozen=True, slots=True)
class Address:
    """Where to listen; port 0 takes any that is free."""

    host: str
    port: int

    def url(self, port: int) -> str:
        """With the port that was taken."""
        return f"http://{f'[{self.host}]' if ':' in self.host else self.host}:{port}"

    def check(self) -> None:
        """Raise UserError when it cannot be listened on."""
        self.bind().close()

    def bind(self) -> socket.socket:
        """A socket there, of the first family that the host has.

        Raises:
            UserError: It cannot be listened on.
        """
        try:
            family = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)[0][0]
            bound = socket.socket(family)
            try:
                bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                bound.bind((self.host, self.port))
            except BaseException:
                bound.close()
                raise
        except (OSError, OverflowError) as error:
            raise UserError(f"cannot listen on {self.host}:{self.port}: {error}; choose another with --port") from None
        return bound


def threads(budget: Budget) -> int:
    """One for each request that the engine takes, since a stream holds one, and some for /health.

    A server whose health check waits behind its streams is killed by its supervisor when it is only busy.
    """
    return budget.max_sequences + budget.max_queue + SPARE_THREADS
