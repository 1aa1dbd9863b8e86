# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A web server over a repository that tells the truth until it is told how to lie.

``with LyingPeer(repository) as peer: peer.stream = …; peer.object = …`` – both are functions that get the handler and
the honest bytes and send an answer of their own.
"""

from __future__ import annotations

import gzip
import http.server
import os
import pathlib
import socketserver
import threading
from collections.abc import Callable
from typing import Any
from urllib.parse import unquote

Answer = Callable[["Handler", bytes], None]


class Handler(http.server.BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    # A header and a body in one packet: apart, each answer would wait for a delayed acknowledgement.
    wbufsize = -1
    server: LyingPeer

    def do_GET(self) -> None:
        """Answer as the server's ``stream`` or ``object`` says."""
        path = unquote(self.path).lstrip("/")
        with self.server.lock:
            self.server.requests.append(path)
            self.server.headers.append(dict(self.headers.items()))
        file = self.server.root / path
        if not file.is_file():
            self.send_error(404)
            return
        data = file.read_bytes()
        (self.server.stream if path.startswith("streams/") else self.server.object)(self, data)

    def log_message(self, format: str, *_arguments: object) -> None:  # noqa: A002 -- the name is the base class's
        """Say nothing."""

    def answer(self, body: bytes, status: int = 200, length: int | None = -1, **headers: str) -> None:
        """Send ``body`` with these headers (``_`` stands for ``-``); ``length`` None sends none, -1 the true one."""
        self.send_response(status)
        if length is not None:
            self.send_header("Content-Length", str(len(body) if length == -1 else length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()

    def chunked(self, pieces: Any, **headers: str) -> None:
        """Send ``pieces`` in chunks, however many there are."""
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        for piece in pieces:
            self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
        self.wfile.write(b"0\r\n\r\n")
        self.wfile.flush()

    def cut(self) -> None:
        """Break the connection."""
        self.wfile.flush()
        self.close_connection = True


def honest(handler: Handler, data: bytes) -> None:
    """What is there."""
    handler.answer(data)


def compressed(handler: Handler, data: bytes) -> None:
    """The same in gzip, of a length that is not told."""
    handler.chunked([gzip.compress(data)], Content_Encoding="gzip")


class LyingPeer(socketserver.ThreadingMixIn, http.server.HTTPServer):
    """Serves the repository at ``root``; ``url`` is where."""

    daemon_threads = True

    def __init__(self, root: str | os.PathLike[str]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.root = pathlib.Path(root)
        self.stream: Answer = honest
        self.object: Answer = honest
        self.requests: list[str] = []
        self.headers: list[dict[str, str]] = []
        self.lock = threading.Lock()
        self.over = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is no news."""

    def __enter__(self) -> LyingPeer:
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self.over.set()
        self.shutdown()
        self.server_close()
