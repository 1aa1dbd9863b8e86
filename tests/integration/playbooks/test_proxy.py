# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A registry that is reached through a proxy only, as `environment` of a task says."""

from __future__ import annotations

import http.client
import http.server
import pathlib
import socket
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "support"))

from conftest import Site
from registry import Registry

# Nobody but the proxy knows where that is; a proxy is never asked for loopback addresses.
NAME = "registry.invalid:5000"
PULL = """
- name: Repository
  composefs.oci.composefs_repository:
    repository: "{{ repository }}"
    verity: disabled
- name: Pull
  composefs.oci.composefs_image:
    repository: "{{ repository }}"
    ref: docker://registry.invalid:5000/app:1
    name: app
    validate_certs: false
    retries: 0
  environment: "{{ proxies }}"
"""


class Proxy(http.server.ThreadingHTTPServer):
    """A proxy that knows one registry, and remembers what it was asked for."""

    daemon_threads = True

    def __init__(self, address: str) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.registry = address
        self.asked: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(http.server.BaseHTTPRequestHandler):
    """Hands requests on; the registry speaks plain HTTP, so a tunnel for TLS leads nowhere."""

    server: Proxy
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.server.asked.append(f"{self.command} {self.path}")
        head, _slash, path = self.path.removeprefix("http://").partition("/")
        if head != NAME:
            self.send_error(502)
            return
        upstream = http.client.HTTPConnection(self.server.registry, timeout=30)
        upstream.putrequest(self.command, f"/{path}", skip_host=True, skip_accept_encoding=True)
        for key, value in self.headers.items():  # some come several times
            if key.lower() != "proxy-connection":
                upstream.putheader(key, value)
        upstream.endheaders()
        answer = upstream.getresponse()
        body = answer.read()
        self.send_response(answer.status)
        for key, value in answer.getheaders():
            if key.lower() not in ("connection", "transfer-encoding", "content-length"):
                self.send_header(key, value)
        length = answer.getheader("Content-Length") if self.command == "HEAD" else str(len(body))
        self.send_header("Content-Length", length or "0")
        self.end_headers()
        self.wfile.write(body)
        upstream.close()

    do_HEAD = do_GET

    def do_CONNECT(self) -> None:
        self.server.asked.append(f"CONNECT {self.path}")
        self.send_error(502)
        self.close_connection = True

    def log_message(self, *_arguments: Any) -> None:
        pass


@pytest.fixture
def proxy(registry: Registry) -> Iterator[Proxy]:
    server = Proxy(registry.address)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_pull_goes_through_the_proxy_that_environment_names(site: Site, proxy: Proxy, tmp_path: pathlib.Path) -> None:
    # Said outright, since skopeo tries TLS first where it may, and a tunnel is no plain request.
    configuration = tmp_path / "registries.conf"
    configuration.write_text(f'[[registry]]\nlocation = "{NAME}"\ninsecure = true\n')
    common = {"CONTAINERS_REGISTRIES_CONF": str(configuration)}
    done = site.run(PULL, proxies={**common, "http_proxy": proxy.url, "https_proxy": proxy.url})
    assert done.returncode == 0, done.stdout + done.stderr
    assert any(one.startswith(f"GET http://{NAME}/v2/app/blobs/") for one in proxy.asked)
    # Without it, or where no_proxy excepts the registry, the name means nothing here.
    before = len(proxy.asked)
    for proxies in ({}, {"http_proxy": proxy.url, "https_proxy": proxy.url, "no_proxy": "registry.invalid"}):
        done = site.run(PULL, proxies={**common, **proxies}, env={"ANSIBLE_CALLBACK_RESULT_FORMAT": "json"})
        assert done.returncode != 0 and '"error": "registry_unreachable"' in done.stdout, done.stdout
    assert len(proxy.asked) == before


def test_a_proxy_that_is_away_is_told_as_such(site: Site, registry: Registry) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{unused.getsockname()[1]}"
        done = site.run(
            PULL,
            proxies={"http_proxy": nobody, "https_proxy": nobody},
            env={"ANSIBLE_CALLBACK_RESULT_FORMAT": "json"},
        )
    assert done.returncode != 0 and '"error": "registry_unreachable"' in done.stdout, done.stdout
    assert "proxy" in done.stdout
