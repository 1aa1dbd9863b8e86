# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A password goes to the registry that it is for, and never across a network for everyone to read."""

from __future__ import annotations

import base64
import contextlib
import http.server
import json
import pathlib
import socketserver
import ssl
import threading
import time
from collections.abc import Iterator

import pytest

from ansible_collections.composefs.oci.plugins.module_utils import errors
from ansible_collections.composefs.oci.plugins.module_utils.pull import pull
from ansible_collections.composefs.oci.plugins.module_utils.source import realm
from ansible_collections.composefs.oci.plugins.module_utils.source.options import ProxyOptions
from pulling import options, pull_all, pull_one
from registry import make_certificates

USER, PASSWORD = "reader", "hunter2 and more"


class Server:
    """A server that asks everyone to log in, at ``realm`` if given, and remembers what it was sent."""

    def __init__(self, certificates: pathlib.Path | None, realm: str = "") -> None:
        self.sent: list[str] = []
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                server.sent.append(self.headers.get("Authorization") or "")
                body = b'{"token": "x"}'
                self.send_response(401 if realm else 200)
                if realm:
                    self.send_header("WWW-Authenticate", f'Bearer realm="{realm}",service="test"')
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            do_POST = do_GET

            def log_message(self, format: str, *arguments: object) -> None:  # noqa: A002 -- the name in the base class
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        if certificates is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificates / "server.crt", certificates / "server.key")
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()
        self.address = f"127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def certificates(place: pathlib.Path) -> pathlib.Path:
    make_certificates(place / "tls")
    (place / "trust").mkdir()
    (place / "trust/ca.crt").write_bytes((place / "tls/ca.crt").read_bytes())
    return place / "tls"


@pytest.fixture
def servers(certificates: pathlib.Path) -> Iterator[tuple[Server, Server]]:
    """A registry with TLS whose realm is plain HTTP, and the realm."""
    with contextlib.ExitStack() as stack:
        realm = Server(None)
        stack.callback(realm.close)
        registry = Server(certificates, f"http://{realm.address}/token")
        stack.callback(registry.close)
        yield registry, realm


@pytest.mark.parametrize("validate", [True, None])
def test_a_realm_over_plain_http_does_not_get_the_password(
    servers: tuple[Server, Server], place: pathlib.Path, repository_path: pathlib.Path, validate: bool | None
) -> None:
    registry, realm = servers
    proxy = {"tls_verify": validate, "cert_dir": str(place / "trust"), "username": USER, "password": PASSWORD}
    with pytest.raises(errors.TlsFailed, match="plain HTTP") as caught:
        pull_one(repository_path, f"docker://{registry.address}/x:1", chosen=options(proxy=proxy, retries=2))
    assert realm.sent == [] and not any(registry.sent)
    assert PASSWORD not in str(caught.value)


def test_the_password_of_an_auth_file_does_not_leave_either(
    servers: tuple[Server, Server], place: pathlib.Path, repository_path: pathlib.Path
) -> None:
    registry, realm = servers
    (place / "auth.json").write_text(json.dumps({"auths": {registry.address: {"auth": "eDp5"}}}))
    proxy = {"tls_verify": True, "cert_dir": str(place / "trust"), "auth_file": str(place / "auth.json")}
    with pytest.raises(errors.TlsFailed, match="plain HTTP"):
        pull_one(repository_path, f"docker://{registry.address}/x:1", chosen=options(proxy=proxy))
    assert realm.sent == []


def test_a_registry_that_never_ends_its_answer_does_not_hold_the_question_where_to_log_in(
    certificates: pathlib.Path, place: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each word comes in time: answers that are not final, without end."""
    monkeypatch.setattr(realm, "_LIMIT", 1.0)
    over = threading.Event()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates / "server.crt", certificates / "server.key")

    class Endless(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with contextlib.suppress(OSError), context.wrap_socket(self.request, server_side=True) as connection:
                while not over.wait(0.05):
                    connection.sendall(b"HTTP/1.1 100 Continue\r\nX: y\r\n\r\n")

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Endless) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        proxy = ProxyOptions(username=USER, password=PASSWORD, tls_verify=True, cert_dir=str(place / "trust"))
        started = time.monotonic()
        realm.check_realm(proxy, f"127.0.0.1:{server.server_address[1]}")
        assert time.monotonic() - started < 50
        over.set()
        server.shutdown()


def test_who_does_not_validate_certificates_may_log_in_anywhere(
    servers: tuple[Server, Server], repository_path: pathlib.Path
) -> None:
    registry, realm = servers
    proxy = {"tls_verify": False, "username": USER, "password": PASSWORD}
    with pytest.raises(errors.EngineError):
        pull_one(repository_path, f"docker://{registry.address}/x:1", chosen=options(proxy=proxy))
    assert any(realm.sent)


def test_a_registry_gets_no_password_of_another(certificates: pathlib.Path, repository_path: pathlib.Path) -> None:
    with contextlib.ExitStack() as stack:
        seen = []
        for _number in range(2):
            realm = Server(certificates)
            registry = Server(certificates, f"https://{realm.address}/token")
            stack.callback(realm.close)
            stack.callback(registry.close)
            seen.append((registry, realm))
        requests = [
            pull.Request(f"docker://{registry.address}/x:1", name, username=name, password=PASSWORD)
            for name, (registry, _realm) in zip("ab", seen)
        ]
        for request in (requests, requests[::-1]):
            with pytest.raises(errors.EngineError):
                pull_all(repository_path, request, options())
        for name, (registry, realm) in zip("ab", seen):
            own = "Basic " + base64.b64encode(f"{name}:{PASSWORD}".encode()).decode()
            assert {word for word in (*registry.sent, *realm.sent) if word.startswith("Basic")} <= {own}
            assert own in realm.sent
