# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What an image says is bounded: bytes of memory and of disk, and seconds."""

from __future__ import annotations

import json
import pathlib
import random
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from ansible_collections.composefs.oci.plugins.module_utils import errors
from faultproxy import FaultProxy, Rule
from ociimage import Layout
from pulling import names, options, pull_one
from registry import Registry
from tarbytes import DIRECTORY, END, SYMLINK, member, tar

NAME = "bounds:image"
PULL = textwrap.dedent(
    """
    import json, pathlib, resource, sys
    sys.path[:0] = json.loads(sys.argv[1])
    import conftest
    from pulling import options, pull_one
    from ansible_collections.composefs.oci.plugins.module_utils import errors
    answer = {"error": None}
    try:
        pull_one(pathlib.Path(sys.argv[2]), sys.argv[3], chosen=options(timeout=60.0))
    except errors.EngineError as error:
        answer["error"] = error.code
    # What getrusage() tells of the process itself begins with the peak of the one that started it.
    with open("/proc/self/status") as file:
        own = next(int(line.split()[1]) for line in file if line.startswith("VmHWM:"))
    used = (own, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
    print(json.dumps({**answer, "mebibytes": max(used) >> 10}))
    """
)


def peak(repository: pathlib.Path, ref: str) -> dict[str, Any]:
    """Pull in a process of its own: the error's code and the largest memory that one of its processes had."""
    paths = [str(pathlib.Path(__file__).parent), *filter(None, sys.path)]
    command = [sys.executable, "-c", PULL, json.dumps(paths), str(repository), ref]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    answer = json.loads(done.stdout)
    assert isinstance(answer, dict)
    return answer


def links() -> Iterator[bytes]:
    for number in range(120_000):
        yield member(f"l{number}", type=SYMLINK, linkname=b"%08d" % number + b"x" * 4080)


def attributes() -> Iterator[bytes]:
    for number in range(4000):
        yield member(f"f{number}", xattrs={"user.a": b"%08d" % number + b"x" * 60_000, "user.b": b"y" * 60_000})


def capabilities() -> Iterator[bytes]:
    for number in range(8000):
        yield member(f"f{number}", xattrs={"security.capability": b"%08d" % number + b"x" * 60_000})


@pytest.mark.parametrize(("members", "error"), [(links, "too_large"), (attributes, None), (capabilities, "too_large")])
def test_a_small_blob_does_not_take_the_memory_of_a_host(
    members: Callable[[], Iterator[bytes]],
    error: str | None,
    disk: pathlib.Path,
    tmp_path: pathlib.Path,
    repository_path: pathlib.Path,
) -> None:
    layout = Layout(tmp_path / "layout")
    sink = layout.sink("zstd", 9)
    sink.write(member("usr/", type=DIRECTORY))
    batch = bytearray()
    for one in members():
        batch += one
        if len(batch) > 1 << 20:
            sink.write(bytes(batch))
            batch.clear()
    sink.write(bytes(batch) + END)
    layout.image([sink.finish()])
    found = peak(repository_path, f"oci:{layout.path}:latest")
    assert found["error"] == error
    assert found["mebibytes"] < 400, found


@pytest.fixture(scope="module")
def image(disk: pathlib.Path, registry: Registry) -> dict[str, Any]:
    """An image of one layer of a megabyte; its manifest."""
    layout = Layout(disk / "bounded")
    digest = layout.image([tar(member("usr/large", random.Random(7).randbytes(1_000_000)))])
    registry.push(f"{layout.path}:latest", NAME)
    manifest = json.loads(layout.read(digest))
    assert isinstance(manifest, dict)
    return manifest


def test_a_source_that_trickles_is_given_up(
    image: dict[str, Any], faults: FaultProxy, repository_path: pathlib.Path
) -> None:
    faults.add(Rule(str(image["layers"][0]["digest"]), rate=200))
    start = time.monotonic()
    with pytest.raises(errors.Stalled, match="min_rate"):
        pull_one(repository_path, faults.reference(NAME), chosen=options(timeout=20.0))
    assert 25 < time.monotonic() - start < 200
    assert names(repository_path) == set()


def test_a_deadline_ends_a_pull_whatever_the_reason(
    image: dict[str, Any], faults: FaultProxy, repository_path: pathlib.Path
) -> None:
    for rule in (
        Rule(str(image["layers"][0]["digest"]), rate=20_000),
        Rule(str(image["layers"][0]["digest"]), stall=1000),
        Rule("/manifests/", delay=60),
        Rule(str(image["layers"][0]["digest"]), status=503),
    ):
        faults.clear()
        faults.add(rule)
        start = time.monotonic()
        with pytest.raises(errors.EngineError):
            pull_one(repository_path, faults.reference(NAME), chosen=options(deadline=4, timeout=60.0, retries=20))
        assert time.monotonic() - start < 40, rule
        assert names(repository_path) == set()
    faults.clear()
    assert pull_one(repository_path, faults.reference(NAME), chosen=options(deadline=100))["changed"]


def test_what_unpacks_to_more_than_allowed_is_named_nowhere(
    image: dict[str, Any], faults: FaultProxy, repository_path: pathlib.Path
) -> None:
    with pytest.raises(errors.TooLarge, match="max_size"):
        pull_one(repository_path, faults.reference(NAME), chosen=options(max_size=900_000))
    assert names(repository_path) == set() and not (repository_path / "objects").exists()
