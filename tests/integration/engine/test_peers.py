# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Peers with a real web server: nginx, without and with compression, that knows nothing but the repository's files."""

from __future__ import annotations

import contextlib
import os
import pathlib
import socket
import subprocess
import time
from collections.abc import Callable, Iterator

import pytest
from conftest import needed
from ociimage import Layout
from pulling import options, pull_one
from registry import Registry


@contextlib.contextmanager
def nginx(root: pathlib.Path, place: pathlib.Path, extra: str = "") -> Iterator[str]:
    program = needed("nginx", "nginx-light")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    paths = " ".join(
        f"{name}_temp_path {place}/{name};" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    user = "user root;" if os.geteuid() == 0 else ""
    (place / "nginx.conf").write_text(
        f"{user} daemon off; worker_processes 1; pid {place}/pid; error_log {place}/error.log;\n"
        f"events {{}}\nhttp {{ access_log off; {paths} {extra}\n"
        f"server {{ listen 127.0.0.1:{port}; root {root}; }} }}\n"
    )
    process = subprocess.Popen([program, "-p", str(place), "-c", str(place / "nginx.conf")])
    try:
        for _unused in range(200):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


@pytest.mark.parametrize("extra", ["", "gzip on; gzip_comp_level 1; gzip_types *;"], ids=["plain", "gzip"])
def test_nginx_over_a_repository_is_a_peer(
    registry: Registry,
    images: Layout,
    place: pathlib.Path,
    repository_path: pathlib.Path,
    new_repository: Callable[..., pathlib.Path],
    cfsctl: Callable[..., str],
    extra: str,
) -> None:
    ref = registry.push(f"{images.path}:gzip", "peers:gzip")
    seed = new_repository(place / "seed")
    there = pull_one(seed, ref)
    with nginx(seed, place, extra) as url:
        done = pull_one(repository_path, ref, "image", options(peers=(url,)))
    assert done["warnings"] == [] and [layer["source"] for layer in done["layers"]] == ["peer", "peer"]
    assert done["image_id"] == there["image_id"]
    assert done["stats"]["peers"][0]["layers"] == 2 and done["stats"]["peers"][0]["error"] is None
    cfsctl("--repo", repository_path, "fsck")
