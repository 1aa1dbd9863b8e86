# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Fuzz what a peer answers: whatever it sends, it is over soon, memory stays flat, nothing but the engine's own errors
comes out, every object that was stored is what its name says, and a layer is accepted only if it is the right one.

    python tests/fuzz/fuzz_peer.py [--seconds 60] [--seed N] [FILE ...]

An input is a list of answers, each with its length before it (four bytes, little endian): the first for the
splitstream, the others, in turn, for the objects that are asked for. An answer is all that comes over the connection,
headers included. No network is used. With atheris installed it is guided by coverage (further options go to libFuzzer).
FILEs are run once each, to look at what was found.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import pathlib
import random
import resource
import shutil
import struct
import sys
import tempfile
import threading
import time
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests" / "fuzz"), str(ROOT / "tests" / "unit")]

import fuzzing

__import__("conftest")  # makes the collection importable
from ansible_collections.composefs.oci.plugins.module_utils.errors import EngineError
from ansible_collections.composefs.oci.plugins.module_utils.formats import fsverity, splitstream
from ansible_collections.composefs.oci.plugins.module_utils.formats.tar import Splitter
from ansible_collections.composefs.oci.plugins.module_utils.pull.layer import LayerSpec
from ansible_collections.composefs.oci.plugins.module_utils.pull.objectlayer import import_objects
from ansible_collections.composefs.oci.plugins.module_utils.source import peer
from ansible_collections.composefs.oci.plugins.module_utils.store import create
from ansible_collections.composefs.oci.plugins.module_utils.store.repository import Repository
from ansible_collections.composefs.oci.tests.support.layers import External, Objects
from ansible_collections.composefs.oci.tests.support.tarbytes import member, tar

ALGORITHM = fsverity.SHA256
SECONDS_PER_INPUT = 20.0
MEGABYTES = 400
EVERY = 200
"""Inputs after which a repository is judged and replaced."""

_dice = random.Random(4)
CONTENTS = [_dice.randbytes(size) for size in (65, 100, 4096, 70_000)] + [b"x" * 5000, _dice.randbytes((1 << 20) + 9)]
TAR = tar(*(member(f"f{number}", data) for number, data in enumerate(CONTENTS)), member("small", b"inline"))
DIFF_ID = "sha256:" + hashlib.sha256(TAR).hexdigest()


def layer() -> tuple[bytes, list[bytes]]:
    """The honest splitstream, and the honest objects in the order of their chunks."""
    objects = Objects(ALGORITHM)
    splitter = Splitter(objects)
    splitter.feed(TAR)
    splitter.finish()
    writer = splitstream.Writer(ALGORITHM, splitstream.LAYER)
    order = []
    for chunk in objects.chunks:
        if isinstance(chunk, External):
            content = objects.contents[chunk.digest]
            order.append(content)
            writer.external(chunk.digest, len(content))
        else:
            writer.inline(chunk)
    return b"".join(writer.finish()), order


STREAM, OBJECTS = layer()
NUMBER = {fsverity.object_path(fsverity.digest(data, ALGORITHM)): number for number, data in enumerate(OBJECTS)}


class _Bytes(io.RawIOBase):
    """What was answered and not read yet; its end where no more was."""

    def __init__(self) -> None:
        super().__init__()
        self.left = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self.left[: len(buffer)]
        self.left = self.left[len(data) :]
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        """Each answer gets a file of its own; what lies behind it stays."""


class _Socket:
    """A connection to the peer that gives ``answers``."""

    def __init__(self, answers: list[bytes]) -> None:
        self._answers = answers
        self._stream = _Bytes()
        self._request = b""

    def sendall(self, data: bytes) -> None:
        self._request += data
        while b"\r\n\r\n" in self._request:
            head, self._request = self._request.split(b"\r\n\r\n", 1)
            path = head.split(b" ")[1].decode()
            if "/objects/" in path:
                found = path.split("/objects/")[1]
                number = 1 + NUMBER.get(found, sum(found.encode()))
                number = number if number < len(self._answers) else 1 + number % max(1, len(self._answers) - 1)
            else:
                number = 0
            self._stream.left += self._answers[number] if number < len(self._answers) else b""

    def makefile(self, *_arguments: Any, **_options: Any) -> io.BufferedReader:
        return io.BufferedReader(self._stream)

    def shutdown(self, _how: int) -> None:
        self._stream.left = b""

    def close(self) -> None:
        pass


class Ground:
    """A repository for the inputs, replaced now and then; ``judge`` looks at all that was stored."""

    def __init__(self) -> None:
        self._count = 0
        self._stack = contextlib.ExitStack()
        self._new()

    def _new(self) -> None:
        self._stack.close()
        top = tempfile.mkdtemp(prefix="fuzz-peer-")
        self._stack.callback(shutil.rmtree, top)
        create.prepare(f"{top}/repo", ALGORITHM, "disabled")
        self.repository = self._stack.enter_context(Repository.open(f"{top}/repo"))

    def judge(self) -> None:
        objects = self.repository.objects
        for name, digest in objects.names():
            assert digest is not None and objects.verify(digest), f"objects/{name} is not what its name says"

    def next(self) -> Repository:
        self._count += 1
        if self._count % EVERY == 0:
            self.judge()
            self._new()
        return self.repository

    def close(self) -> None:
        self.judge()
        self._stack.close()


_grounds: list[Ground] = []


def run(data: bytes) -> None:
    """One input."""
    answers = []
    rest = memoryview(data)
    while len(rest) >= 4 and len(answers) < 64:
        (size,) = struct.unpack_from("<I", rest)
        answers.append(bytes(rest[4 : 4 + size]))
        rest = rest[4 + size :]
    if not _grounds:
        _grounds.append(Ground())
    objects = _grounds[0].next().objects
    # Nothing is there that would not be asked for.
    for content in OBJECTS:
        objects.remove(fsverity.digest(content, ALGORITHM))
    options = peer.PeerOptions(silence=5, slow=5)

    def connect() -> peer._Connection:
        connection = peer._Connection("http://peer/base", "the peer", None, options)
        connection._http.connect = lambda: setattr(connection._http, "sock", _Socket(answers))  # type: ignore[method-assign]
        return connection

    started = time.monotonic()
    bytes_before = objects.stats.bytes_new
    spec = LayerSpec("sha256:" + "0" * 64, 2_000_000, DIFF_ID, "gzip")
    try:
        offer = peer._PeerLayer(connect, DIFF_ID, ALGORITHM, spec.size, options)
        result = import_objects(offer, spec, objects, lambda done: None)
    except EngineError:
        pass
    else:
        assert result.tar_size == len(TAR), "another layer was accepted"
    assert objects.stats.bytes_new - bytes_before <= peer.TAR_LEAST + peer.STREAM_FACTOR * spec.size + (1 << 21)
    assert not [one for one in threading.enumerate() if one.name == "peer"], "a thread was left behind"
    assert time.monotonic() - started < SECONDS_PER_INPUT, "too slow"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10 < MEGABYTES, "memory grows"


def answer(body: bytes, dice: random.Random) -> bytes:
    """An honest answer, in one of the ways that are allowed."""
    how = dice.randrange(4)
    head = b"HTTP/1.1 200 OK\r\nServer: fuzz\r\n"
    if how == 0:
        packed = gzip.compress(body, 1)
        return head + b"Content-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(packed) + packed
    if how == 1:
        packed = gzip.compress(body, 1)
        middle = dice.randint(0, len(packed))
        chunks = b"".join(b"%x\r\n%s\r\n" % (len(one), one) for one in (packed[:middle], packed[middle:]) if one)
        return head + b"Content-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n"
    return head + b"Content-Length: %d\r\n\r\n" % len(body) + body


WORDS = (
    b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n",
    b"HTTP/1.1 302 Found\r\nLocation: http://elsewhere/\r\nContent-Length: 0\r\n\r\n",
    b"HTTP/1.1 100 Continue\r\n\r\n",
    b"HTTP/1.1 206 Partial Content\r\n",
    b"HTTP/1.0 200 OK\r\n",
    b"Content-Length: 9\r\n",
    b"Content-Length: -1\r\n",
    b"Content-Length: 99999999999999999999\r\n",
    b"Transfer-Encoding: chunked\r\n",
    b"Content-Encoding: gzip\r\n",
    b"Content-Encoding: br\r\n",
    b"Connection: close\r\n",
    b"ffffffffff\r\n",
    b"0\r\n\r\n",
    b"X: " + b"y" * 70_000 + b"\r\n",
    b"X: y\r\n" * 120,
    gzip.compress(bytes(4 << 20), 9),
)


def damage(data: bytes, dice: random.Random) -> bytes:
    out = bytearray(data)
    for _unused in range(dice.choice((1, 1, 1, 2, 4, 16))):
        # Where it matters most: in the headers, and at the beginning of the body.
        at = dice.randrange(1 + min(len(out), dice.choice((120, 400, 1 << 30))))
        how = dice.randrange(6)
        if how == 0 and at < len(out):
            out[at] ^= 1 << dice.randrange(8)
        elif how == 1:
            out[at : at + 1] = dice.choice((b"\0", b"\xff", b"\r", b"\n", b" ", b":"))
        elif how == 2:
            out[at:at] = dice.randbytes(dice.choice((1, 2, 9, 4000)))
        elif how == 3:
            out[at:at] = dice.choice(WORDS)
        elif how == 4:
            # Between two headers.
            at = out.find(b"\r\n", at) + 2
            out[at:at] = dice.choice(WORDS)
        else:
            del out[at : at + dice.choice((1, 2, 8, 1000, 1 << 30))]
    return bytes(out)


def composed(dice: random.Random) -> bytes:
    """An input: honest answers, some of them changed."""
    bodies = [STREAM, *OBJECTS]
    kind = dice.randrange(4)
    if kind == 0:
        # A splitstream that is damaged inside and sent as it is.
        bodies[0] = damage(STREAM, dice)
    elif kind == 1:
        number = dice.randrange(len(bodies))
        bodies[number] = dice.choice([*bodies, b"", damage(bodies[number], dice)])
    answers = [answer(body, dice) for body in bodies]
    if kind >= 2:
        for number in dice.sample(range(len(answers)), dice.choice((1, 1, 2, len(answers)))):
            answers[number] = damage(answers[number], dice)
    return b"".join(struct.pack("<I", len(one)) + one for one in answers)


def main() -> None:
    arguments = fuzzing.parser(__doc__).parse_known_args()
    # A fuzzer that refuses everything finds nothing: the honest answers must be accepted.
    honest = [answer(body, random.Random(1)) for body in (STREAM, *OBJECTS)]
    before = len(_grounds)
    run(b"".join(struct.pack("<I", len(one)) + one for one in honest))
    assert before == 0 and _grounds[0].repository.objects.contains(fsverity.digest(STREAM, ALGORITHM))
    try:
        fuzzing.fuzz("peer", run, composed, arguments, longest=2_000_000)
    finally:
        _grounds[0].close()


if __name__ == "__main__":
    main()
