# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What real updates cost: whole layers, deltas, and peers without and with gzip.

    python3 benchmarks/updates.py WORK [--only NAME] [--write RESULT.md]

Builds pairs of images from Debian packages, with and without the suite of security fixes, below WORK (about 2 GB), and
updates a repository from one to the other in each way. Bytes are those that pulls report. Nothing here runs with the
tests; it needs apt, and nginx for the peers.
"""

from __future__ import annotations

import argparse
import contextlib
import pathlib
import resource
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests" / "support"), str(ROOT / "tests" / "unit")]

__import__("conftest")  # makes the collection importable
import ociimage
from ansible_collections.composefs.oci.plugins.module_utils.formats import fsverity
from ansible_collections.composefs.oci.plugins.module_utils.formats.reference import parse_reference
from ansible_collections.composefs.oci.plugins.module_utils.operations import makedelta
from ansible_collections.composefs.oci.plugins.module_utils.progress import Progress
from ansible_collections.composefs.oci.plugins.module_utils.pull import pull
from ansible_collections.composefs.oci.plugins.module_utils.source.options import ProxyOptions
from ansible_collections.composefs.oci.plugins.module_utils.store import create
from ansible_collections.composefs.oci.plugins.module_utils.store.repository import Repository
from aptroot import AptRoot

BASE = (
    "base-files base-passwd bash coreutils dash debianutils findutils grep gzip hostname libc-bin login mount passwd "
    "perl-base sed tar util-linux apt openssl ca-certificates"
)
SERVICE = "python3 curl gnupg openssh-client"
# Name, layers of the older image, layers of the newer one, whether the newer one has the security fixes.
PAIRS = (
    ("base image rebuilt with security fixes", [BASE], [BASE], True),
    ("base and service rebuilt (both layers)", [BASE, SERVICE], [BASE, SERVICE], True),
    ("kernel package, next ABI", ["linux-image-6.1.0-49-amd64"], ["linux-image-6.1.0-50-amd64"], False),
)
PROXY = ProxyOptions(insecure_policy=True, unenforced_policy="ignore")


class Fixed(AptRoot):
    """The suite with its security fixes."""

    def _prepare(self) -> None:
        super()._prepare()
        path = self.directory / "etc/sources.list"
        line = path.read_text().strip()
        security = line.replace(f" {self.suite} main", f" {self.suite}-security main")
        security = security.replace("/debian ", "/debian-security ")
        path.write_text(f"{line}\n{security}\n")


def build(work: pathlib.Path, number: int) -> ociimage.Layout:
    """Both images of a pair in one layout, as tags ``old`` and ``new``."""
    _name, old, new, fixed = PAIRS[number]
    layout = work / f"pair{number}"
    newer = (Fixed, "fixed") if fixed else (AptRoot, "plain")
    for tag, layers, (root, cache) in (("old", old, (AptRoot, "plain")), ("new", new, newer)):
        ociimage.AptRoot = root  # type: ignore[misc]
        ociimage.debian_image(layout, layers, tag=tag, cache=work / cache)
    return ociimage.Layout(layout)


@contextlib.contextmanager
def nginx(root: pathlib.Path, work: pathlib.Path, gzip: bool) -> Iterator[str]:
    """Serve a repository; its URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = work / f"nginx-{port}"
    place.mkdir()
    compress = "gzip on; gzip_comp_level 1; gzip_types *; gzip_min_length 100;" if gzip else ""
    (place / "conf").write_text(
        f"user root; daemon off; worker_processes 1; pid {place}/pid; error_log {place}/log;\n"
        "events {}\n"
        f"http {{ access_log off; client_body_temp_path {place}/b; proxy_temp_path {place}/p;\n"
        f" fastcgi_temp_path {place}/f; uwsgi_temp_path {place}/u; scgi_temp_path {place}/s; {compress}\n"
        f" server {{ listen 127.0.0.1:{port}; root {root}; }} }}\n"
    )
    program = subprocess.Popen([shutil.which("nginx") or "nginx", "-p", str(place), "-c", str(place / "conf")])
    try:
        for _unused in range(100):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}/"
    finally:
        program.terminate()
        program.wait()
        shutil.rmtree(place)


def processor() -> float:
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def update(path: pathlib.Path, layout: pathlib.Path, **options: Any) -> tuple[int, float, float]:
    """Pull the newer image into a fresh repository that has the older one: bytes, seconds, processor seconds."""
    shutil.rmtree(path, ignore_errors=True)
    create.prepare(str(path), fsverity.SHA256, create.DISABLED)
    figures = (0, 0.0, 0.0)
    for tag in ("old", "new"):
        chosen = pull.Options(proxy=PROXY, **(options if tag == "new" else {}))
        started, used = time.monotonic(), processor()
        with Repository.open(str(path)) as repository:
            (outcome,) = pull.pull_images(repository, [pull.Request(f"oci:{layout}:{tag}", "app")], chosen, Progress())
        if outcome.plan.warnings:
            print(outcome.plan.warnings, file=sys.stderr)
        figures = (outcome.stats.bytes_fetched or 0, time.monotonic() - started, processor() - used)
    return figures


def measure(work: pathlib.Path, number: int) -> str:
    """One row of the table."""
    layout = build(work, number).path
    seed = work / "seed"
    shutil.rmtree(seed, ignore_errors=True)
    create.prepare(str(seed), fsverity.SHA256, create.DISABLED)
    dest = parse_reference(f"oci:{work}/delta-{number}:update")
    shutil.rmtree(dest.path, ignore_errors=True)
    with Repository.open(str(seed)) as repository:
        requests = [pull.Request(f"oci:{layout}:{tag}", tag) for tag in ("old", "new")]
        pull.pull_images(repository, requests, pull.Options(proxy=PROXY), Progress())
        old, new = makedelta.find(repository, "old"), makedelta.find(repository, "new")
        started = time.monotonic()
        makedelta.publish(repository, old, new, dest, PROXY, 12, Progress())
        made = time.monotonic() - started
    found = {"layers": update(work / "host", layout), "delta": update(work / "host", layout, deltas=(dest.text,))}
    for name, gzip in (("peer", False), ("peer, gzip", True)):
        with nginx(seed, work, gzip) as url:
            found[name] = update(work / "host", layout, peers=(url,))
    whole = found["layers"][0]
    cells = [f"{b / 1e6:.2f} MB ({100 * b / whole:.1f} %), {s:.1f} s, {p:.1f} s" for b, s, p in found.values()]
    return f"| {PAIRS[number][0]} | " + " | ".join(cells) + f" | {made:.1f} s |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=pathlib.Path)
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--write", type=pathlib.Path, help="append the table to this file")
    options = parser.parse_args()
    work = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    lines = [
        "| update | layers: bytes, wall, processor | delta | peer | peer with gzip | making the delta |",
        "|---|---|---|---|---|---|",
    ]
    for number, pair in enumerate(PAIRS):
        if options.only in pair[0]:
            lines.append(measure(work, number))
            print(lines[-1], flush=True)
    text = "\n".join(lines) + "\n"
    if options.write:
        with options.write.open("a", encoding="utf-8") as file:
            file.write(text)


if __name__ == "__main__":
    main()
