"""A page about runs on disk that grows with them, on 127.0.0.1; `python -m resdiag.live.server`.

Whoever knows the token in the address may read the page, and nothing can be changed through it. A
request for another host's name is refused: a page elsewhere could be resolved to this machine.
"""

import contextlib
import hmac
import json
import os
import secrets
import shutil
import signal
import socket
import sys
import threading
import time
from functools import lru_cache
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from resdiag.errors import ResdiagError
from resdiag.live.runs import FollowedRuns, Seen
from resdiag.plots.drawing import draw
from resdiag.plots.figurefile import render
from resdiag.plots.kinds import KINDS
from resdiag.report.svg import refine

_POLL_S = 1.0
_PAGE = Path(__file__).with_name("page.html")
_HOSTS = ("127.0.0.1", "localhost")


class LiveServer(ThreadingHTTPServer):
    """Serves the runs below a folder.

    Args:
        root: The folder.
        token: What requests must carry.
        listening: A socket that listens already; None opens one on a free port.
        port: Of a new socket; 0 is any that is free.
    """

    daemon_threads = True

    def __init__(
        self, root: Path, token: str, listening: socket.socket | None = None, port: int = 0
    ) -> None:
        super().__init__(("127.0.0.1", port), _Handler, bind_and_activate=listening is None)
        if listening is not None:
            self.socket.close()
            self.socket = listening
            self.server_address = listening.getsockname()
        self.token, self._runs = token, FollowedRuns(root)
        self._lock, self._drawing = threading.Lock(), threading.Lock()

    @property
    def url(self) -> str:
        """The address of the page, with its token."""
        return f"http://127.0.0.1:{self.server_address[1]}/?token={self.token}"

    def look(self) -> tuple[int, list[Seen]]:
        """A number that grows with each change, and the runs."""
        with self._lock:
            runs = self._runs.look()
            return self._runs.version, runs

    def state(self) -> tuple[int, dict[str, Any]]:
        """What the page shows, as plain data."""
        version, runs = self.look()
        shown = [{"name": one.name, **one.snapshot.to_dict()} for one in runs]
        return version, {"version": version, "runs": shown, "kinds": [*KINDS]}

    def plot(self, name: str, kind: str) -> bytes:
        """A plot of one run as SVG; a plot of words where it cannot be drawn.

        Raises:
            KeyError: There is no such run.
        """
        _, runs = self.look()
        run = {one.name: one.run for one in runs}[name]
        with self._drawing:  # matplotlib's settings are the process's
            return _draw(kind, run)


class _Handler(BaseHTTPRequestHandler):
    server: LiveServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """Answer with the page, its data, its events or a plot."""
        parts = urlsplit(self.path)
        asked = {name: values[0] for name, values in parse_qs(parts.query).items()}
        host = self.headers.get("Host", "").rpartition(":")[0]
        if host not in _HOSTS or not hmac.compare_digest(
            asked.get("token", "").encode(), self.server.token.encode()
        ):
            self._send(HTTPStatus.FORBIDDEN, "text/plain", b"the address needs its token\n")
            return
        # a reader that left is no error of the server
        with contextlib.suppress(ConnectionError):
            if parts.path == "/":
                self._send(HTTPStatus.OK, "text/html; charset=utf-8", _PAGE.read_bytes())
            elif parts.path == "/events":
                self._stream()
            elif parts.path == "/plot":
                self._plot(asked.get("run", ""), asked.get("kind", ""))
            else:
                self._send(HTTPStatus.NOT_FOUND, "text/plain", b"no such page\n")

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: what a browser asks for is no news on the terminal of a training."""

    def _plot(self, run: str, kind: str) -> None:
        try:
            picture = self.server.plot(run, kind)
        except KeyError:
            self._send(HTTPStatus.NOT_FOUND, "text/plain", b"no such run\n")
            return
        except ResdiagError as error:
            text = error.message.encode()
            self._send(HTTPStatus.UNPROCESSABLE_ENTITY, "text/plain; charset=utf-8", text)
            return
        self._send(HTTPStatus.OK, "image/svg+xml", picture)

    def _stream(self) -> None:
        """Server-sent events: the state, and again whenever it has changed."""
        self._begin(HTTPStatus.OK, "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        told = -1
        while True:
            try:
                version, state = self.server.state()
            except ResdiagError as error:
                version, state = told + 1, {"error": error.message}
            if version != told:
                self.wfile.write(f"data: {json.dumps(state)}\n\n".encode())
                told = version
            else:
                self.wfile.write(b": still here\n\n")  # notices that the reader has left
            self.wfile.flush()
            time.sleep(_POLL_S)

    def _begin(self, status: HTTPStatus, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Cache-Control", "no-store")
        self.send_header("Referrer-Policy", "no-referrer")  # the token is in the address
        policy = "default-src 'none'; img-src 'self' blob: data:; connect-src 'self'; "
        policy += "style-src 'unsafe-inline'; script-src 'unsafe-inline'"
        self.send_header("Content-Security-Policy", policy)

    def _send(self, status: HTTPStatus, kind: str, body: bytes) -> None:
        self._begin(status, kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@lru_cache(maxsize=32)
def _draw(kind: str, run: Any) -> bytes:  # noqa: ANN401 - runs are equal if they are the same
    figure = draw(kind, run)
    title = str(figure.get_label())
    drawn = render(figure, "svg", letters=True)
    # with colours for light and for dark: a filter of the page would turn colour scales over
    return refine(drawn, prefix="f", title=title, description=title).encode()


def serve(root: Path, port: int = 0) -> LiveServer:
    """A server for the runs below a folder, with a token of its own; not started yet."""
    return LiveServer(root, secrets.token_urlsafe(16), port=port)


def _main() -> None:
    """Serve a folder on an inherited socket, until standard input ends, and remove the folder.

    The token comes on standard input. That ends with the training, however the training ends.
    """
    listening, folder = socket.socket(fileno=int(sys.argv[1])), Path(sys.argv[2])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is meant for the training
    server = LiveServer(folder, sys.stdin.readline().strip(), listening)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    sys.stdin.read()
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(0)  # a reader may wait for the end of its stream


if __name__ == "__main__":
    _main()
