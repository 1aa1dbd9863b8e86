# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Peers with real web servers that know nothing but the repository's files: nginx, plain, compressing and with TLS, and
Python's own. Real file systems, real kills, a seed that is pruned while others take from it.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import tarfile
import textwrap
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from ansible_collections.composefs.oci.plugins.module_utils.errors import EngineError
from ansible_collections.composefs.oci.plugins.module_utils.formats import fsverity
from ansible_collections.composefs.oci.plugins.module_utils.operations import prune
from ansible_collections.composefs.oci.plugins.module_utils.progress import Progress
from ansible_collections.composefs.oci.plugins.module_utils.store import create
from ansible_collections.composefs.oci.plugins.module_utils.store.repository import Repository
from conftest import SmallFileSystem, needed
from ociimage import Layout
from ports import free_port
from pulling import options, pull_one
from registry import Registry, make_certificates
from tarbytes import END, member, small_tree

# A pull in a process of its own, which can be killed and whose memory can be told.
CLIENT = textwrap.dedent(
    """
    import json, pathlib, resource, sys
    sys.path[:0] = json.loads(sys.argv[1])
    import conftest
    from pulling import options, pull_one
    done = pull_one(pathlib.Path(sys.argv[2]), sys.argv[3], chosen=options(timeout=60.0, peers=(sys.argv[4],)))
    # What getrusage() tells of the process itself begins with the peak of the one that started it.
    with open("/proc/self/status") as file:
        own = next(int(line.split()[1]) for line in file if line.startswith("VmHWM:"))
    used = (own, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
    told = {"warnings": done["warnings"], "sources": [layer["source"] for layer in done["layers"]]}
    print(json.dumps({**told, "mebibytes": max(used) >> 10}))
    """
)


def client(repository: pathlib.Path, ref: str, url: str) -> subprocess.Popen[str]:
    """A pull that runs; it leads a group of processes of its own."""
    paths = [str(pathlib.Path(__file__).parent), *filter(None, sys.path)]
    command = [sys.executable, "-c", CLIENT, json.dumps(paths), str(repository), ref, url]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)


def outcome(process: subprocess.Popen[str]) -> dict[str, Any]:
    output, _unused = process.communicate(timeout=300)
    assert process.returncode == 0
    return dict(json.loads(output))


@contextlib.contextmanager
def nginx(root: pathlib.Path, place: pathlib.Path, extra: str = "", tls: pathlib.Path | None = None) -> Iterator[str]:
    program = needed("nginx", "nginx-light")
    port = free_port()
    paths = " ".join(
        f"{name}_temp_path {place}/{name};" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    user = "user root;" if os.geteuid() == 0 else ""
    listen = f"listen 127.0.0.1:{port}" + (
        f" ssl; ssl_certificate {tls}/server.crt; ssl_certificate_key {tls}/server.key" if tls else ""
    )
    (place / "nginx.conf").write_text(
        f"{user} daemon off; worker_processes 1; pid {place}/pid; error_log {place}/error.log;\n"
        f"events {{}}\nhttp {{ access_log off; {paths} {extra}\n"
        f"server {{ {listen}; root {root}; }} }}\n"
    )
    process = subprocess.Popen([program, "-p", str(place), "-c", str(place / "nginx.conf")])
    try:
        for _unused in range(1200):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.05)
        yield f"{'https' if tls else 'http'}://127.0.0.1:{port}"
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


def test_a_peer_with_tls_is_asked_only_if_its_certificate_is_accepted(
    registry: Registry,
    images: Layout,
    place: pathlib.Path,
    repository_path: pathlib.Path,
    new_repository: Callable[..., pathlib.Path],
) -> None:
    ref = registry.push(f"{images.path}:gzip", "peers:gzip")
    seed = new_repository(place / "seed")
    pull_one(seed, ref)
    make_certificates(place / "tls")
    with nginx(seed, place, tls=place / "tls") as url:
        refused = pull_one(new_repository(place / "other"), ref, "image", options(peers=(url,)))
        trusting = options(peers=(url,), peer_ca_file=str(place / "tls/ca.crt"))
        done = pull_one(repository_path, ref, "image", trusting)
    assert [layer["source"] for layer in refused["layers"]] == ["registry", "registry"]
    assert any("certificate" in warning for warning in refused["warnings"]), refused["warnings"]
    assert done["warnings"] == [] and [layer["source"] for layer in done["layers"]] == ["peer", "peer"]


@pytest.mark.skipif(sys.version_info < (3, 11), reason="http.server has no --protocol before Python 3.11")
def test_the_web_server_of_python_is_a_peer(
    registry: Registry,
    images: Layout,
    place: pathlib.Path,
    repository_path: pathlib.Path,
    new_repository: Callable[..., pathlib.Path],
) -> None:
    ref = registry.push(f"{images.path}:gzip", "peers:gzip")
    seed = new_repository(place / "seed")
    pull_one(seed, ref)
    words = ["-u", "-m", "http.server", "--protocol", "HTTP/1.1", "--bind", "127.0.0.1", "--directory", str(seed), "0"]
    server = subprocess.Popen([sys.executable, *words], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert server.stdout is not None
        # "Serving HTTP on 127.0.0.1 port 40123 (http://127.0.0.1:40123/) ..."
        url = server.stdout.readline().partition("(")[2].partition(")")[0]
        done = pull_one(repository_path, ref, "image", options(peers=(url,)))
    finally:
        server.terminate()
        server.wait()
        server.stdout.close()
    assert done["warnings"] == [] and [layer["source"] for layer in done["layers"]] == ["peer", "peer"]


def test_objects_of_a_peer_are_sealed_where_the_repository_wants_it(
    images: Layout, place: pathlib.Path, new_repository: Callable[..., pathlib.Path], small_fs: SmallFileSystem
) -> None:
    ref = f"oci:{images.path}:gzip"
    seed = new_repository(place / "seed")
    pull_one(seed, ref)
    path = small_fs("64M", "verity") / "repository"
    try:
        create.prepare(str(path), fsverity.SHA256, create.REQUIRED)
    except EngineError as error:
        pytest.skip(f"there is no fs-verity here: {error.text}")
    with nginx(seed, place) as url:
        done = pull_one(path, ref, "image", options(peers=(url,)))
    assert [layer["source"] for layer in done["layers"]] == ["peer", "peer"] and done["warnings"] == []
    with Repository.open(str(path)) as repository:
        for name, digest in repository.objects.names():
            assert digest is not None, name
            # In such a repository the kernel is asked at each opening.
            os.close(repository.objects.open(digest))


def test_memory_does_not_grow_with_an_object(
    place: pathlib.Path, repository_path: pathlib.Path, new_repository: Callable[..., pathlib.Path]
) -> None:
    layout = Layout(place / "layout")
    sink = layout.sink()
    large = tarfile.TarInfo("large")
    large.size = 150 << 20
    sink.write(large.tobuf())
    piece = random.Random(3).randbytes(1 << 20)
    for _unused in range(150):
        sink.write(piece)
    sink.write(member("small", b"s" * 100) + END)
    layout.image([sink.finish()])
    seed = new_repository(place / "seed")
    pull_one(seed, f"oci:{layout.path}:latest")
    with nginx(seed, place) as url:
        done = outcome(client(repository_path, f"oci:{layout.path}:latest", url))
    assert done["sources"] == ["peer"] and done["warnings"] == []
    assert done["mebibytes"] < 150, done


@pytest.fixture
def many(place: pathlib.Path) -> str:
    """An image of some hundred files; its reference."""
    layout = Layout(place / "many")
    layout.image([small_tree(files=400, seed=8), small_tree(files=100, seed=9, prefix="opt")])
    return f"oci:{layout.path}:latest"


def test_a_seed_can_be_pruned_while_others_take_from_it(
    many: str,
    place: pathlib.Path,
    new_repository: Callable[..., pathlib.Path],
    cfsctl: Callable[..., str],
) -> None:
    seed = new_repository(place / "seed")
    pull_one(seed, many)
    with nginx(seed, place) as url:
        hosts = [new_repository(place / f"host-{number}") for number in range(4)]
        clients = [client(host, many, url) for host in hosts]
        begun = time.monotonic()
        while not any(len(list(host.glob("objects/*/*"))) > 20 for host in hosts) and time.monotonic() - begun < 60:
            time.sleep(0.01)
        # Now that the first have begun, everything goes.
        with Repository.open(str(seed), write=True) as repository:
            pruned = prune.prune(
                repository, prune.Wish(remove=("image",), timeout=60.0), Progress(), look=lambda _r: []
            )
        assert pruned.changed
        done = [outcome(process) for process in clients]
    for one, host in zip(done, hosts):
        assert set(one["sources"]) <= {"peer", "oci"} and not [text for text in one["warnings"] if "lied" in text], one
        cfsctl("--repo", host, "fsck")


def test_a_pull_from_a_peer_that_is_killed_leaves_nothing_wrong(
    many: str,
    place: pathlib.Path,
    repository_path: pathlib.Path,
    new_repository: Callable[..., pathlib.Path],
    cfsctl: Callable[..., str],
) -> None:
    seed = new_repository(place / "seed")
    pull_one(seed, many)
    dice = random.Random(14)
    with nginx(seed, place) as url:
        for _unused in range(3):
            process = client(repository_path, many, url)
            some = dice.randrange(500)
            begun = time.monotonic()
            while process.poll() is None and time.monotonic() - begun < 60:
                if len(list(repository_path.glob("objects/*/*"))) > some:
                    break
                time.sleep(0.005)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            cfsctl("--repo", repository_path, "fsck")
        done = outcome(client(repository_path, many, url))
    assert set(done["sources"]) <= {"peer", None} and done["warnings"] == []
    cfsctl("--repo", repository_path, "fsck")
