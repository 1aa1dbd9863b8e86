# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What real updates cost: whole layers, deltas, and peers without and with gzip.

    python3 benchmarks/updates.py WORK [--only NAME] [--rate MBIT] [--level N] [--write RESULT.md]

Builds pairs of images from Debian packages, with and without the suite of security fixes, below WORK (about 2 GB), and
updates a repository from one to the other in each way. Bytes are those that pulls report. Nothing here runs with the
tests; it needs apt, and nginx for the peers. With --rate, which needs root, images and deltas come from a registry and
objects from nginx through a loopback of its own that carries so many Mbit/s; otherwise images are local layouts.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import json
import pathlib
import random
import resource
import shutil
import socket
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
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
from ports import free_port
from registry import Registry
from tarbytes import DIRECTORY, END, member

BASE = (
    "base-files base-passwd bash coreutils dash debianutils findutils grep gzip hostname libc-bin login mount passwd "
    "perl-base sed tar util-linux apt openssl ca-certificates"
)
# What debootstrap installs: everything of the priorities required and important in bookworm.
SYSTEM = (
    "adduser apt apt-utils base-files base-passwd bash bsdutils coreutils cpio cron debconf debconf-i18n "
    "debian-archive-keyring debianutils diffutils dmidecode dpkg e2fsprogs fdisk findutils gpgv grep gzip hostname "
    "ifupdown init init-system-helpers iproute2 iputils-ping isc-dhcp-client isc-dhcp-common kmod less libc-bin "
    "libpam-modules libpam-runtime login logrotate mawk mount nano ncurses-base ncurses-bin netbase nftables passwd "
    "perl-base procps readline-common sed sensible-utils systemd systemd-sysv sysvinit-utils tar tasksel-data tzdata "
    "udev util-linux vim-common vim-tiny whiptail"
)
SERVICE = "python3 curl gnupg openssh-client"
# Name, layers of the older image, layers of the newer one, whether the newer one has the security fixes.
PAIRS = (
    ("base image rebuilt with security fixes", [BASE], [BASE], True),
    ("base and service rebuilt (both layers)", [BASE, SERVICE], [BASE, SERVICE], True),
    ("base system, as debootstrap installs it, rebuilt", [SYSTEM], [SYSTEM], True),
    ("kernel package, a later ABI", ["linux-image-6.1.0-47-amd64"], ["linux-image-6.1.0-50-amd64"], False),
    ("Java runtime (one file of 130 MB)", ["openjdk-17-jre-headless"], ["openjdk-17-jre-headless"], True),
)
BOTH = 1
PROGRAM = "usr/bin/python3.11"
PROXY = ProxyOptions(insecure_policy=True, unenforced_policy="ignore", tls_verify=False)
SPACE = "composefs-updates"


class Fixed(AptRoot):
    """The suite with its security fixes."""

    def _prepare(self) -> None:
        super()._prepare()
        path = self.directory / "etc/sources.list"
        line = path.read_text().strip()
        security = line.replace(f" {self.suite} main", f" {self.suite}-security main")
        security = security.replace("/debian ", "/debian-security ")
        path.write_text(f"{line}\n{security}\n")


def packages(work: pathlib.Path, number: int) -> ociimage.Layout:
    """Both images of a pair of package lists in one layout, as tags ``old`` and ``new``."""
    _name, old, new, fixed = PAIRS[number]
    layout = work / f"pair{number}"
    newer = (Fixed, "fixed") if fixed else (AptRoot, "plain")
    for tag, layers, (root, cache) in (("old", old, (AptRoot, "plain")), ("new", new, newer)):
        ociimage.AptRoot = root  # type: ignore[misc]
        ociimage.debian_image(layout, layers, tag=tag, cache=work / cache)
    return ociimage.Layout(layout)


def layers_of(layout: ociimage.Layout, tag: str) -> list[ociimage.Layer]:
    """The layers of one of its images."""
    index = json.loads((layout.path / "index.json").read_text())["manifests"]
    (digest,) = (one["digest"] for one in index if one["annotations"]["org.opencontainers.image.ref.name"] == tag)
    manifest = json.loads(layout.read(digest))
    config = json.loads(layout.read(manifest["config"]["digest"]))
    return [ociimage.Layer(*pair) for pair in zip(manifest["layers"], config["rootfs"]["diff_ids"])]


def one_of_two(work: pathlib.Path) -> ociimage.Layout:
    """A service that was rebuilt on the base that it had."""
    layout = packages(work, BOTH)
    layout.image(layers_of(layout, "old"), "one-old")
    layout.image([layers_of(layout, "old")[0], layers_of(layout, "new")[1]], "one-new")
    return layout


def nothing_new(work: pathlib.Path) -> ociimage.Layout:
    """A service that was rebuilt from the same packages a day later."""
    layout = packages(work, BOTH)
    base, service = layers_of(layout, "old")
    sink = layout.sink()
    blob = layout.blob_path(service.descriptor["digest"])
    with tarfile.open(blob, "r:gz") as old, tarfile.open(fileobj=sink, mode="w|", format=tarfile.GNU_FORMAT) as new:
        for one in old:
            one.mtime += 86400
            new.addfile(one, old.extractfile(one) if one.isreg() else None)
    layout.image([base, service], "same-old")
    layout.image([base, sink.finish()], "same-new")
    return layout


def one_program(work: pathlib.Path) -> ociimage.Layout:
    """A service in which one program of 7 MB was compiled anew."""
    layout = packages(work, BOTH)
    base, service = layers_of(layout, "old")
    newer = layout.blob_path(layers_of(layout, "new")[1].descriptor["digest"])
    with tarfile.open(newer, "r:gz") as archive:
        (program,) = (one for one in archive if one.name.removeprefix("./") == PROGRAM)
        content = archive.extractfile(program)
        compiled = content.read() if content else b""
    sink = layout.sink()
    blob = layout.blob_path(service.descriptor["digest"])
    with tarfile.open(blob, "r:gz") as old, tarfile.open(fileobj=sink, mode="w|", format=tarfile.GNU_FORMAT) as new:
        for one in old:
            if one.name.removeprefix("./") == PROGRAM:
                one.size = len(compiled)
                new.addfile(one, io.BytesIO(compiled))
            else:
                new.addfile(one, old.extractfile(one) if one.isreg() else None)
    layout.image([base, service], "program-old")
    layout.image([base, sink.finish()], "program-new")
    return layout


def tiny_files(work: pathlib.Path) -> ociimage.Layout:
    """100,000 files of some hundred bytes, of which one in a hundred changes."""
    layout = ociimage.Layout(work / "tiny")
    for tag in ("old", "new"):
        dice = random.Random(5)
        sink = layout.sink()
        for number in range(100_000):
            if number % 1000 == 0:
                sink.write(member(f"d{number // 1000}/", type=DIRECTORY))
            words = " ".join(f"{dice.randrange(1 << 16):x}" for _unused in range(dice.randrange(15, 60)))
            text = f"{tag if number % 100 == 7 else ''} {words}\n"
            sink.write(member(f"d{number // 1000}/f{number}", text.encode()))
        sink.write(END)
        layout.image([sink.finish()], tag)
    return layout


# Name, who makes the images, what their tags begin with.
ROWS: tuple[tuple[str, Callable[[pathlib.Path], ociimage.Layout], str], ...] = (
    *((pair[0], functools.partial(packages, number=number), "") for number, pair in enumerate(PAIRS)),
    ("service on it rebuilt with security fixes (1 of 2 layers)", one_of_two, "one-"),
    ("service rebuilt, nothing new (other times)", nothing_new, "same-"),
    ("one program of 7 MB in a layer", one_program, "program-"),
    ("1 % of 100,000 tiny files", tiny_files, ""),
)


@contextlib.contextmanager
def nginx(root: pathlib.Path, work: pathlib.Path, gzip: bool) -> Iterator[str]:
    """Serve a repository; its URL."""
    port = free_port()
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


@contextlib.contextmanager
def narrow(rate: int) -> Iterator[list[str]]:
    """A network name space whose loopback carries ``rate`` Mbit/s; the words that run a command in it."""
    subprocess.run(["ip", "netns", "add", SPACE], check=True)
    try:
        subprocess.run(["ip", "-n", SPACE, "link", "set", "lo", "up"], check=True)
        inside = ["ip", "netns", "exec", SPACE]
        shape = ["root", "tbf", "rate", f"{rate}mbit", "burst", "128k", "latency", "200ms"]
        subprocess.run([*inside, "tc", "qdisc", "add", "dev", "lo", *shape], check=True)
        yield inside
    finally:
        subprocess.run(["ip", "netns", "delete", SPACE], check=True)


def update(path: pathlib.Path, place: str, **options: Any) -> tuple[int, float, float]:
    """Pull the newer image into a fresh repository that has the older one: bytes, seconds, processor seconds. The tag
    is put behind ``place``.
    """
    shutil.rmtree(path, ignore_errors=True)
    create.prepare(str(path), fsverity.SHA256, create.DISABLED)
    figures = (0, 0.0, 0.0)
    for tag in ("old", "new"):
        chosen = pull.Options(proxy=PROXY, **(options if tag == "new" else {}))
        started, used = time.monotonic(), processor()
        with Repository.open(str(path)) as repository:
            (outcome,) = pull.pull_images(repository, [pull.Request(place + tag, "app")], chosen, Progress())
        if outcome.plan.warnings:
            print(outcome.plan.warnings, file=sys.stderr)
        figures = (outcome.stats.bytes_fetched or 0, time.monotonic() - started, processor() - used)
    return figures


def measure(work: pathlib.Path, number: int, registry: Registry | None, level: int | None) -> str:
    """One row of the table."""
    name, make, prefix = ROWS[number]
    place = f"oci:{make(work).path}:{prefix}"
    if registry is not None:
        for tag in ("old", "new"):
            registry.push(place + tag, f"row{number}:{tag}", "--preserve-digests")
        place = f"{registry.reference(f'row{number}')}:"
    seed = work / "seed"
    shutil.rmtree(seed, ignore_errors=True)
    create.prepare(str(seed), fsverity.SHA256, create.DISABLED)
    local = work / f"delta-{number}"
    shutil.rmtree(local, ignore_errors=True)
    dest = parse_reference(f"{place}update" if registry is not None else f"oci:{local}:update")
    with Repository.open(str(seed)) as repository:
        requests = [pull.Request(place + tag, tag) for tag in ("old", "new")]
        pull.pull_images(repository, requests, pull.Options(proxy=PROXY), Progress())
        old, new = makedelta.find(repository, "old"), makedelta.find(repository, "new")
        started = time.monotonic()
        makedelta.publish(repository, old, new, dest, PROXY, level, Progress())
        made = time.monotonic() - started
    found = {"layers": update(work / "host", place), "delta": update(work / "host", place, deltas=(dest.text,))}
    for way, gzip in (("peer", False), ("peer, gzip", True)):
        with nginx(seed, work, gzip) as url:
            found[way] = update(work / "host", place, peers=(url,))
    whole = found["layers"][0]
    cells = [f"{b / 1e6:.2f} MB ({100 * b / whole:.1f} %), {s:.1f} s, {p:.1f} s" for b, s, p in found.values()]
    return f"| {name} | " + " | ".join(cells) + f" | {made:.1f} s |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=pathlib.Path)
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--rate", type=int, default=0, metavar="MBIT", help="what the network carries")
    parser.add_argument("--level", type=int, help="of the compression of deltas; by size if not given")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--write", type=pathlib.Path, help="append the table to this file")
    options = parser.parse_args()
    work = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    numbers = [number for number, row in enumerate(ROWS) if options.only in row[0]]
    if options.rate and not options.inside:
        for number in numbers:
            ROWS[number][1](work)  # the way to the packages is as wide as ever
        with narrow(options.rate) as inside:
            sys.exit(subprocess.run([*inside, sys.executable, *sys.argv, "--inside"], check=False).returncode)
    lines = [
        "| update | layers: bytes, wall, processor | delta | peer | peer with gzip | making the delta |",
        "|---|---|---|---|---|---|",
    ]
    with Registry(work / "registry") if options.rate else contextlib.nullcontext() as registry:
        for number in numbers:
            lines.append(measure(work, number, registry, options.level))
            print(lines[-1], flush=True)
    text = "\n".join(lines) + "\n"
    if options.write:
        with options.write.open("a", encoding="utf-8") as file:
            file.write(text)


if __name__ == "__main__":
    main()
