"""Several `llmc serve` of one engine behind nginx: `python replicas.py ENGINE --port 8080 --replicas 2`.

    clients ──► nginx ──┬──► llmc serve (process 1)
                        └──► llmc serve (process 2)

SIGTERM or Ctrl-C stops nginx first, then each replica in its orderly way. On several machines the replicas are started
there by systemd, docker or Kubernetes, and of this file only nginx.conf.j2 is of use.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import jinja2

from llmc.errors import UserError
from llmc.serve.local import serving

TEMPLATE = Path(__file__).with_name("nginx.conf.j2")


@contextlib.contextmanager
def proxied(replicas: Sequence[str], port: int) -> Iterator[subprocess.Popen[bytes]]:
    """nginx on `port` in front of these base URLs, until the block ends.

    Raises:
        UserError: nginx is not installed, or does not start.
    """
    nginx = shutil.which("nginx", path="/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin:/opt/homebrew/bin")
    if nginx is None:
        raise UserError("nginx is not installed (Debian, Ubuntu: sudo apt-get install nginx-light)")
    with tempfile.TemporaryDirectory(prefix="llmc-nginx-") as folder:
        environment = jinja2.Environment(undefined=jinja2.StrictUndefined, autoescape=False)
        template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
        config = Path(folder) / "nginx.conf"
        config.write_text(template.render(folder=folder, replicas=replicas, port=port), encoding="utf-8")
        check = subprocess.run(
            [nginx, "-t", "-q", "-p", folder, "-c", config], capture_output=True, text=True, check=False
        )
        if check.returncode:
            raise UserError(f"nginx refuses its configuration: {check.stderr.strip()}")
        process = subprocess.Popen([nginx, "-p", folder, "-c", str(config)])
        try:
            yield process
        finally:
            # nginx's word for: let running requests finish.
            process.send_signal(signal.SIGQUIT)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description="Several `llmc serve` of one engine behind nginx.")
    parser.add_argument("engine", type=Path)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each replica")
    options = parser.parse_args()

    # SIGTERM as Ctrl-C: what was begun is ended in order.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.ExitStack() as stack:
        serve = ("--threads", str(options.threads), "--name", options.engine.resolve().name)
        urls = [stack.enter_context(serving(options.engine, *serve)) for _ in range(options.replicas)]
        proxy = stack.enter_context(proxied(urls, options.port))
        print(f"http://127.0.0.1:{options.port} in front of {' '.join(urls)}", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            proxy.wait()


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"replicas: {error}")
