# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A proxy in front of a real registry that makes it misbehave, one request at a time and by rule.

    with FaultProxy(registry.address) as proxy:
        proxy.add(Rule(r"/blobs/sha256:abc", cut=1000, times=1))
        ... pull from proxy.address ...
        assert proxy.hits("/blobs/") == 2

Rules are tried in order; the first whose ``path`` is found in the request's path (and which has ``times`` left) acts.
Positions and counts are bytes of the body that is sent, from its first byte.
"""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import re
import socket
import socketserver
import threading
import time
from http.server import BaseHTTPRequestHandler
from types import TracebackType
from typing import Any

PIECE = 64 * 1024
ERRORS = {
    401: '{"errors":[{"code":"UNAUTHORIZED","message":"authentication required"}]}',
    403: '{"errors":[{"code":"DENIED","message":"requested access to the resource is denied"}]}',
    404: '{"errors":[{"code":"MANIFEST_UNKNOWN","message":"manifest unknown"}]}',
    429: '{"errors":[{"code":"TOOMANYREQUESTS","message":"too many requests"}]}',
}
"""What a registry says with these states."""


@dataclasses.dataclass
class Rule:
    """What happens to requests whose path matches ``path``; ``times`` requests (None: all), after the first ``skip``
    ones went through.
    """

    path: str
    times: int | None = None
    skip: int = 0
    methods: tuple[str, ...] = ("GET",)
    cut: int | None = None
    """Close the connection after this many bytes."""
    reset: bool = False
    """Close with a reset instead of an orderly end; what is still on its way may then be lost."""
    stall: int | None = None
    """Send this many bytes, then nothing, until the proxy stops, `FaultProxy.release` is called or the client goes."""
    flip: int | None = None
    """Change one bit of this byte."""
    shorten: int | None = None
    """Leave out the last bytes, and say so in Content-Length: a shorter but orderly answer."""
    content_length: int | None = None
    """Lie: add this to the real Content-Length; the body stays as it is and the connection is closed after it."""
    body: bytes | None = None
    """Answer with these bytes instead."""
    status: int | None = None
    """Answer with this status and an error document, do not ask the registry."""
    headers: dict[str, str] = dataclasses.field(default_factory=dict)
    """More headers of the answer; ``{"Retry-After": "1"}``."""
    delay: float = 0.0
    """Wait so many seconds before answering."""
    rate: float | None = None
    """Bytes per second at most."""
    used: int = 0
    """How many requests it has acted on."""


@dataclasses.dataclass
class Count:
    requests: int = 0
    bytes: int = 0


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, format: str, *arguments: Any) -> None:  # noqa: A002 -- the name in the base class
        """Silence: the proxy counts instead."""

    def do_GET(self) -> None:
        self.server.proxy.handle(self)

    do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_GET


class _Server(socketserver.ThreadingMixIn, socketserver.TCPServer):
    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64
    proxy: FaultProxy

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up are the daily bread of this server."""


class FaultProxy:
    """Threads; HTTP on both sides; one connection to the registry per request."""

    def __init__(self, upstream: str) -> None:
        host, _unused, port = upstream.rpartition(":")
        self.upstream = (host, int(port))
        self.rules: list[Rule] = []
        self.counts: dict[tuple[str, str], Count] = {}
        self.lock = threading.Lock()
        self.released = threading.Event()
        self.server = _Server(("127.0.0.1", 0), _Handler)
        self.server.proxy = self
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server.server_address[1]}"

    def reference(self, name: str) -> str:
        """``docker://127.0.0.1:PORT/NAME``."""
        return f"docker://{self.address}/{name}"

    def add(self, rule: Rule) -> Rule:
        with self.lock:
            self.rules.append(rule)
        return rule

    def clear(self) -> None:
        """Forget rules and counts, let stalled answers end."""
        self.release()
        with self.lock:
            self.rules.clear()
            self.counts.clear()
        self.released = threading.Event()

    def release(self) -> None:
        """Let every stalled answer end (by a closed connection)."""
        self.released.set()

    def hits(self, path: str, method: str = "GET") -> int:
        """How many requests had ``path`` (a regular expression) in their path."""
        with self.lock:
            return sum(
                count.requests
                for (verb, where), count in self.counts.items()
                if verb == method and re.search(path, where)
            )

    def sent(self, path: str) -> int:
        """How many bytes of bodies were sent in answer to GET requests for ``path``."""
        with self.lock:
            return sum(
                count.bytes for (verb, where), count in self.counts.items() if verb == "GET" and re.search(path, where)
            )

    def __enter__(self) -> FaultProxy:
        self.thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join(5)

    # -- one request, called from the handler's thread

    def _choose(self, method: str, path: str) -> tuple[Rule | None, Count]:
        with self.lock:
            count = self.counts.setdefault((method, path), Count())
            count.requests += 1
            for rule in self.rules:
                if method not in rule.methods or not re.search(rule.path, path):
                    continue
                if rule.skip > 0:
                    rule.skip -= 1
                    continue
                if rule.times is None or rule.used < rule.times:
                    rule.used += 1
                    return rule, count
        return None, count

    def handle(self, client: BaseHTTPRequestHandler) -> None:
        length = int(client.headers.get("Content-Length") or 0)
        body = client.rfile.read(length) if length else None
        rule, count = self._choose(client.command, client.path)
        if rule and rule.delay:
            self.released.wait(rule.delay)
        if rule and (rule.status is not None or rule.body is not None):
            data = (
                rule.body
                if rule.body is not None
                else ERRORS.get(rule.status or 200, '{"errors":[{"code":"UNKNOWN","message":"made to fail"}]}').encode()
            )
            self._answer(
                client, rule.status or 200, {"Content-Type": "application/json", **rule.headers}, data, rule, count
            )
            return
        connection = http.client.HTTPConnection(*self.upstream, timeout=60)
        with contextlib.closing(connection):
            try:
                connection.putrequest(client.command, client.path, skip_host=True, skip_accept_encoding=True)
                # One by one: skopeo sends a line of Accept for every type. Host stays too, so that the registry's
                # redirects lead back here.
                for key, value in client.headers.items():
                    if key.lower() != "connection":
                        connection.putheader(key, value)
                connection.putheader("Connection", "close")
                connection.endheaders(body)
                answer = connection.getresponse()
            except OSError as error:
                self._answer(client, 502, {}, str(error).encode(), None, count)
                return
            kept = {
                key: value
                for key, value in answer.getheaders()
                if key.lower() not in ("connection", "transfer-encoding")
            }
            if rule:
                kept.update(rule.headers)
            self._answer(client, answer.status, kept, answer, rule, count)

    def _answer(
        self,
        client: BaseHTTPRequestHandler,
        status: int,
        headers: dict[str, str],
        source: bytes | http.client.HTTPResponse,
        rule: Rule | None,
        count: Count,
    ) -> None:
        if isinstance(source, bytes):
            total: int | None = len(source)
        else:
            announced = source.headers.get("Content-Length")
            total = int(announced) if announced is not None else None
        told = total
        if rule and total is not None:
            if rule.shorten is not None:
                told = total = max(0, total - rule.shorten)
            if rule.content_length is not None:
                told = max(0, total + rule.content_length)
        for key in [key for key in headers if key.lower() == "content-length"]:
            del headers[key]
        if told is not None:
            headers["Content-Length"] = str(told)
        spoiled = rule is not None and (
            rule.cut is not None or rule.stall is not None or rule.content_length is not None
        )
        close = spoiled or told is None
        client.send_response_only(status)
        for key, value in headers.items():
            client.send_header(key, value)
        if close:
            client.send_header("Connection", "close")
            client.close_connection = True
        client.end_headers()
        if client.command != "HEAD" and status not in (204, 304):
            self._body(client, source, total, rule, count)

    def _body(
        self,
        client: BaseHTTPRequestHandler,
        source: bytes | http.client.HTTPResponse,
        total: int | None,
        rule: Rule | None,
        count: Count,
    ) -> None:
        sent = 0
        started = time.monotonic()
        end = total if total is not None else 1 << 62
        stop = end
        if rule:
            stop = min(end, *(limit for limit in (rule.cut, rule.stall) if limit is not None), end)
        piece_size = PIECE if not rule or not rule.rate else max(1, min(PIECE, int(rule.rate / 10)))
        while sent < stop:
            wanted = min(piece_size, stop - sent)
            piece = source[sent : sent + wanted] if isinstance(source, bytes) else source.read(wanted)
            if not piece:
                break
            if rule and rule.flip is not None and sent <= rule.flip < sent + len(piece):
                spot = rule.flip - sent
                piece = piece[:spot] + bytes([piece[spot] ^ 1]) + piece[spot + 1 :]
            try:
                client.wfile.write(piece)
            except OSError:
                client.close_connection = True
                return
            sent += len(piece)
            with self.lock:
                count.bytes += len(piece)
            if rule and rule.rate:
                ahead = sent / rule.rate - (time.monotonic() - started)
                if ahead > 0 and self.released.wait(ahead):
                    rule = dataclasses.replace(rule, rate=None)
        if rule and rule.stall is not None and sent == rule.stall:
            self._wait_for_client(client)
        if rule and rule.reset and rule.cut is not None and sent == rule.cut:
            client.wfile.flush()
            with contextlib.suppress(OSError):
                # SO_LINGER with zero seconds turns the close into a reset.
                client.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                client.connection.close()

    def _wait_for_client(self, client: BaseHTTPRequestHandler) -> None:
        """Say nothing until released or until the client has closed the connection."""
        client.connection.settimeout(0.1)
        while not self.released.is_set():
            try:
                if not client.connection.recv(1, socket.MSG_PEEK):
                    break
                time.sleep(0.1)
            except TimeoutError:
                continue
            except OSError as error:
                # Python 3.9 has its own class for a timeout, a child of OSError.
                if isinstance(error, socket.timeout):
                    continue
                break
        client.close_connection = True
