# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The engine does not become slower unnoticed: calls and processor time of fixed inputs.

The steps of the engine are bound by Python, so what they cost follows the number of calls that they make, and that
number is the same whatever else the machine does: a step that makes a tenth more of them is found. Later Pythons make
fewer, for they inline comprehensions.

What calls do not show (a copy of megabytes, a step that became quadratic within C) shows in processor time. Seconds
depend on the machine, so none are compared: each round does the engine's work and, right before and after it, a piece
of plain Python and the hash and the inflation of the same bytes; what counts is the quotient of their processor times
in the best of several rounds. Other work on the same processors takes the caches away from both, though not in equal
parts: the same code was 1.6 times the recorded value on a machine that did three things at once. So the margin of the
time is wide, and for a tenth there is ``benchmarks/run.py`` on a quiet machine.
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import random
import subprocess
import sys
import threading
import time
import types
import zlib
from collections.abc import Callable
from typing import Any

import pytest
from ansible_collections.composefs.oci.plugins.module_utils.formats import fsverity, tardiff
from ansible_collections.composefs.oci.plugins.module_utils.pull import makeimages
from ansible_collections.composefs.oci.plugins.module_utils.pull.layer import LayerSpec, import_layer
from ansible_collections.composefs.oci.plugins.module_utils.rootfs import erofswriter
from ansible_collections.composefs.oci.plugins.module_utils.store import create
from ansible_collections.composefs.oci.plugins.module_utils.store.repository import Repository
from ociimage import gzip_member, sha256
from tarbytes import DIRECTORY, member, tar

ROUNDS = 5
MARGIN = 3.0
RECORDED = {"import": 2.25, "tree": 0.79, "erofs": 0.83, "tar-diff": 0.49}
"""Quotients of processor time on Python 3.11 with ISA-L and zstandard 0.25."""

MARGIN_OF_CALLS = 1.1
RECORDED_CALLS = {"import": 107_000, "tree": 112_800, "erofs": 305_500, "tar-diff": 777}
"""Calls of Python and C functions, each step done once, on Python 3.11 with ISA-L and zstandard 0.25."""

FILES = 3000


def archive() -> bytes:
    """Small files as distributions have them, and some large ones."""
    dice = random.Random(20)
    words = [b"%x " % dice.randrange(1 << 30) for _unused in range(400)]
    parts = [member("usr/", type=DIRECTORY)]
    for number in range(FILES):
        if number % 30 == 0:
            parts.append(member(f"usr/d{number}/", type=DIRECTORY))
        text = b"".join(dice.choices(words, k=dice.randrange(5, 400)))
        parts.append(member(f"usr/d{number - number % 30}/f{number}", text))
    parts += [member(f"usr/large{number}", dice.randbytes(700_000)) for number in range(4)]
    return tar(*parts)


TAR = archive()
BLOB = gzip_member(TAR)


def measure(function: Callable[[], object]) -> float:
    begun = time.process_time()
    function()
    return time.process_time() - begun


def plain() -> None:
    """Work of the kind that the engine does, by nothing of the engine."""
    zlib.decompress(BLOB, 31)
    hashlib.sha256(TAR).digest()
    seen: dict[bytes, int] = {}
    for at in range(0, len(TAR) - 512, 512):
        block = TAR[at : at + 100].rstrip(b"\0")
        seen[block] = seen.get(block, 0) + len(block)
    assert seen


def quotient(function: Callable[[], object]) -> float:
    """Processor time of ``function`` in units of plain work: that of the best round."""
    found = []
    before = measure(plain)
    for _unused in range(ROUNDS):
        took = measure(function)
        after = measure(plain)
        found.append(took / ((before + after) / 2))
        before = after
    return min(found)


def calls(function: Callable[[], object]) -> int:
    """How many functions ``function`` calls, those of Python and those of C, in all threads of this process."""
    seen = 0

    def count(_frame: types.FrameType, event: str, _argument: object) -> None:
        nonlocal seen
        seen += event in ("call", "c_call")

    threading.setprofile(count)
    sys.setprofile(count)
    try:
        function()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    return seen


@pytest.fixture
def repository(tmp_path: pathlib.Path) -> Repository:
    create.prepare(str(tmp_path / "repository"), fsverity.SHA256, create.DISABLED)
    return Repository.open(str(tmp_path / "repository"))


class Hashing:
    """Small objects are hashed and stored nowhere."""

    def put(self, data: fsverity.Bytes) -> bytes:
        return fsverity.digest(data, fsverity.SHA256)

    def finish(self) -> None:
        """Nothing waits."""


def imported(repository: Repository, storer: Any = None) -> bytes:
    """Import the layer once; the digest of its stream."""
    source, sink = os.pipe()
    feeder = os.fork()
    if feeder == 0:
        try:
            os.close(source)
            at = 0
            while at < len(BLOB):
                at += os.write(sink, BLOB[at : at + 65536])
        finally:
            os._exit(0)
    os.close(sink)
    spec = LayerSpec(sha256(BLOB), len(BLOB), sha256(TAR), "gzip")
    objects, algorithm = repository.objects, repository.algorithm
    try:
        result = import_layer(
            source, spec, objects, algorithm, 60.0, lambda _n: None, lambda: None, lambda: None, storer
        )
    finally:
        os.waitpid(feeder, 0)
    return bytes.fromhex(result.stream)


def test_the_engine_is_as_fast_as_it_was(repository: Repository) -> None:
    stream = imported(repository)
    system = makeimages.build_tree(repository, [stream])
    program = bytearray()
    writer = tardiff.Writer(program.extend, 3)
    for at in range(0, len(TAR), 3000):
        writer.data(TAR[at : at + 3000])
    writer.finish()

    def apply() -> None:
        place = 0

        def read(n: int) -> bytes:
            nonlocal place
            data = bytes(program[place : place + n])
            place += len(data)
            return data

        sha = hashlib.sha256()
        for piece in tardiff.apply(read, lambda _path: None, len(TAR)):
            sha.update(piece)
        assert "sha256:" + sha.hexdigest() == sha256(TAR)

    steps: dict[str, Callable[[], object]] = {
        "import": lambda: imported(repository, Hashing()),
        "tree": lambda: makeimages.build_tree(repository, [stream]),
        "erofs": lambda: [
            erofswriter.write_image(system.root, 2, repository.algorithm, lambda _data: None) for _n in range(3)
        ],
        "tar-diff": apply,
    }
    counted = {what: calls(step) for what, step in steps.items()}
    assert all(count < MARGIN_OF_CALLS * RECORDED_CALLS[what] for what, count in counted.items()), counted
    timed = {what: quotient(step) for what, step in steps.items()}
    assert all(value < MARGIN * RECORDED[what] for what, value in timed.items()), timed


LOADED = """
import json, sys
sys.path.insert(0, sys.argv[1])
import run_engine
from ansible_collections.composefs.oci.plugins.module_utils.pull import pull
from ansible_collections.composefs.oci.plugins.module_utils.source import skopeosource
print(json.dumps(sorted(sys.modules)))
"""


def test_a_run_with_nothing_to_do_loads_nothing_that_it_does_not_need() -> None:
    """Modules reach a host as source in a zip file, so whatever is loaded is compiled there, in every run."""
    root = pathlib.Path(__file__).resolve().parents[3]
    command = [sys.executable, "-c", LOADED, str(root / "dev")]
    loaded = set(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout))
    engine = {name.partition("module_utils.")[2] for name in loaded if ".oci.plugins.module_utils." in name}
    assert {"pull.pull", "source.skopeosource"} <= engine
    heavy = {
        *("pull.fetch", "pull.layer", "pull.peers", "pull.deltas", "pull.makeimages", "pull.objectlayer"),
        *("rootfs.merge", "rootfs.erofswriter", "formats.tar", "formats.tardiff", "source.peer", "source.push"),
    }
    assert not engine & heavy
    assert not loaded & {"ssl", "http.client", "urllib.request", "email", "zstandard", "jsonschema", "isal"}
