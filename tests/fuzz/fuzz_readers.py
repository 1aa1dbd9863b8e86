# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Fuzz the readers of foreign bytes that are small enough to share a frame: whatever comes, the answer is a value or an
error of the engine, soon, and nothing stays open.

    python tests/fuzz/fuzz_readers.py tar|gzip|splitstream|documents|meta|proxy|messages [--seconds 60] [--seed N] [FILE ...]

``tar``: the splitter, fed in pieces, and its entries read back · ``gzip``: all libraries that are there, which must
agree · ``splitstream``: header, tables, names and chunks; with
valid zstd frames of damaged content, too · ``documents``: manifests, indexes, configurations, references and platforms
· ``meta``: meta.json · ``proxy``: packets of skopeo's image proxy with and without descriptors · ``messages``: errors in
the words of an image on their way from a child, states of progress, journals, records of names, marks.

FILEs are run once each, to look at what was found. With atheris installed it is guided by coverage; further options go
to libFuzzer.
"""

from __future__ import annotations

import array
import contextlib
import io
import json
import os
import pathlib
import random
import socket
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests" / "fuzz"), str(ROOT / "tests" / "unit")]

import fuzzing

__import__("conftest")  # makes the collection importable
from ansible_collections.composefs.oci.plugins.module_utils.errors import (
    EngineError,
    FormatError,
    from_values,
    to_values,
)
from ansible_collections.composefs.oci.plugins.module_utils.formats import (
    codecs,
    fsverity,
    indexes,
    ocidocuments,
    reference,
    splitstream,
    tar,
)
from ansible_collections.composefs.oci.plugins.module_utils.formats.metajson import Metadata
from ansible_collections.composefs.oci.plugins.module_utils.host import processes
from ansible_collections.composefs.oci.plugins.module_utils.operations import journal
from ansible_collections.composefs.oci.plugins.module_utils.progress import LINE_LIMIT, summary
from ansible_collections.composefs.oci.plugins.module_utils.source.imageproxy import ImageProxy
from ansible_collections.composefs.oci.plugins.module_utils.source.options import ProxyOptions
from ansible_collections.composefs.oci.plugins.module_utils.store import marks, namerecords
from ansible_collections.composefs.oci.tests.support.tarbytes import DIRECTORY, SYMLINK, gnu_member, member, small_tree
from ansible_collections.composefs.oci.tests.support.tarbytes import tar as archive

SECONDS_PER_INPUT = 5.0
DIGEST = "sha256:" + "a" * 64
BYTES = (b"\0", b"\xff", b"/", b"..", b"0", b"9", b"{", b"}", b"[", b"]", b'"', b":", b",", b"-1", b"1e999", b"null")


# --- tar
# --------------------------------------------------------------------------------------------------------------------


class Pieces:
    """A sink that keeps what a splitter says."""

    def __init__(self) -> None:
        self.chunks: list[Any] = []

    def inline(self, data: memoryview) -> None:
        self.chunks.append(bytes(data))

    def external(self, data: memoryview) -> None:
        self.chunks.append((bytes(data),))

    def begin(self, size: int) -> None:
        self.chunks.append((b"",))

    def content(self, data: memoryview) -> None:
        self.chunks[-1] = (self.chunks[-1][0] + bytes(data),)

    def end(self) -> None: ...


def split(data: bytes, step: int) -> list[Any]:
    pieces = Pieces()
    splitter = tar.Splitter(pieces)
    for at in range(0, len(data), step):
        splitter.feed(data[at : at + step])
    splitter.finish()
    assert b"".join(piece[0] if isinstance(piece, tuple) else piece for piece in pieces.chunks) == data
    return pieces.chunks


def run_tar(data: bytes) -> None:
    step = 1 + 97 * (data[0] if data else 0)
    try:
        whole = split(data, 1 << 20)
    except EngineError:
        whole = None
    try:
        cut = split(data, step)
    except EngineError:
        cut = None
    # How the bytes arrive makes no difference.
    assert (whole is None) == (cut is None)
    if whole is not None:
        entries = list(tar.EntryReader.entries(whole))
        assert [entry for entry, _content in entries] == [entry for entry, _content in tar.EntryReader.entries(cut)]
        for entry, content in entries:
            if isinstance(content, tuple):
                assert len(content[0]) == entry.size


def tars() -> list[bytes]:
    return [
        small_tree(files=3),
        archive(
            member("usr/", type=DIRECTORY),
            gnu_member(b"long/" * 40, b"c" * 100),
            gnu_member(b"link", type=SYMLINK, linkname=b"t" * 200),
            member("x", b"y" * 100, pax={"mtime": "1.5", "size": "100", "path": "p/" * 80}),
            member("cap", xattrs={"security.capability": bytes(20)}),
        ),
    ]


# --- gzip
# --------------------------------------------------------------------------------------------------------------------

GZIP = [name for name in codecs.GZIP_BACKENDS if codecs._gzip_library(name) is not None]


class Steps:
    """A source that returns so many bytes at a time."""

    def __init__(self, data: bytes, step: int) -> None:
        self.file = io.BytesIO(data)
        self.step = step

    def read(self, n: int) -> bytes:
        return self.file.read(min(n, self.step))


def run_gzip(data: bytes) -> None:
    """The first two bytes say how much is asked for and how much the source gives at a time."""
    if len(data) < 2:
        return
    size, step = 32 + data[0] ** 2 * 4, 1 + data[1] ** 2
    results: dict[str, bytes | None] = {}
    for backend in GZIP:
        decoder = codecs.open_decoder("gzip", Steps(data[2:], step), backend=backend)
        decoded = bytearray()
        try:
            while len(decoded) < 1 << 24 and (piece := decoder.read(size)):
                assert len(piece) <= size
                decoded += piece
            results[backend] = bytes(decoded[: 1 << 24])
        except EngineError:
            results[backend] = None
    # ISA-L does not mind Huffman codes that leave codes unused, and zlib refuses the whole member for them.
    assert len(set(results.values()) - {None}) <= 1, f"{GZIP} differ"
    assert results["zlib"] is None or None not in results.values(), f"of {GZIP} some refuse what zlib takes"
    assert results.get("isal") == results.get("libisal") or len(results.keys() & {"isal", "libisal"}) < 2


def gzips() -> list[bytes]:
    dice = random.Random(5)
    text = b"".join(b"%d lines of %d\n" % (dice.randrange(90), number) for number in range(4000))
    kinds = {(0, zlib.Z_DEFAULT_STRATEGY), (1, zlib.Z_FIXED), (6, zlib.Z_HUFFMAN_ONLY), (9, zlib.Z_RLE)}
    found = []
    for content in (text, text[:300], bytes(100_000), dice.randbytes(3000), b""):
        for level, strategy in sorted(kinds | {(6, zlib.Z_DEFAULT_STRATEGY)}):
            packer = zlib.compressobj(level, zlib.DEFLATED, 31, 8, strategy)
            half = len(content) // 2
            found.append(
                packer.compress(content[:half])
                + packer.flush(zlib.Z_FULL_FLUSH)
                + packer.compress(content[half:])
                + packer.flush()
            )
    found.append(b"".join(found[-9:]) + bytes(50))
    return [bytes((dice.randrange(256), dice.choice((0, 2, 20, 255)))) + blob for blob in found]


# --- splitstreams
# --------------------------------------------------------------------------------------------------------------------


def run_splitstream(data: bytes) -> None:
    """The first byte says whether the whole file follows, or what its frames hold."""
    if data[:1] == b"\0":
        raw = data[1:]
    else:
        # Valid frames, so that damage reaches what they hold.
        at = min(len(data), 1 + 2 * (data[1] if len(data) > 1 else 0))
        names, chunks = (frame(part) for part in (data[2:at], data[at:]))
        table = bytes(64)
        starts = [112, 112, 112, 176, 176 + len(names), 176 + len(names) + len(chunks), 176, 176 + len(names)]
        info = b"".join(number.to_bytes(8, "little") for number in starts) + b"ocilayer" + (200).to_bytes(8, "little")
        head = b"SplitStream" + bytes((0, 0, 0, 1, 12)) + (32).to_bytes(8, "little") + (112).to_bytes(8, "little")
        raw = head + info + table + names + chunks
    with contextlib.suppress(EngineError):
        stream = splitstream.Splitstream.open(io.BytesIO(raw), fsverity.SHA256)
        total = 0
        for chunk in stream.chunks():
            assert isinstance(chunk, (bytes, splitstream.ExternalRef))
            total += len(chunk) if isinstance(chunk, bytes) else 0
            assert total <= stream.size


def frame(content: bytes) -> bytes:
    compressor = codecs.zstd_compressor()
    return bytes(compressor.compress(content)) + bytes(compressor.flush())


def splitstreams() -> list[bytes]:
    writer = splitstream.Writer(fsverity.SHA256, splitstream.LAYER)
    writer.named_ref(DIGEST, bytes(32))
    for number in range(5):
        writer.inline(b"header" * 50)
        writer.external(bytes([number]) * 32, 1000)
    whole = b"".join(writer.finish())
    chunks = b"".join(number.to_bytes(8, "little", signed=True) + b"x" * -number for number in (-100,)) + bytes(8)
    return [b"\0" + whole, b"\1\0" + chunks, b"\1\5" + b"0:sha256:a\0" + chunks]


# --- documents
# --------------------------------------------------------------------------------------------------------------------

LAYER = {"mediaType": "application/vnd.oci.image.layer.v1.tar+gzip", "digest": DIGEST, "size": 5}
MANIFEST = {
    "schemaVersion": 2,
    "mediaType": "application/vnd.oci.image.manifest.v1+json",
    "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": DIGEST, "size": 5},
    "layers": [LAYER, LAYER],
    "annotations": {"a": "b"},
}
INDEX = {
    "schemaVersion": 2,
    "mediaType": "application/vnd.oci.image.index.v1+json",
    "manifests": [
        {
            **LAYER,
            "mediaType": MANIFEST["mediaType"],
            "platform": {"os": "linux", "architecture": "arm", "variant": "v7"},
        },
        {**LAYER, "mediaType": "application/vnd.oci.image.index.v1+json"},
    ],
}
CONFIG = {
    "os": "linux",
    "architecture": "amd64",
    "created": "2024-01-01T00:00:00Z",
    "rootfs": {"type": "layers", "diff_ids": [DIGEST, DIGEST]},
    "config": {"Labels": {"a": "b"}},
    "history": [{"empty_layer": True}],
}


def run_documents(data: bytes) -> None:
    manifest = config = None
    for parse in (ocidocuments.parse_manifest, ocidocuments.parse_index, ocidocuments.parse_config):
        with contextlib.suppress(EngineError):
            value = parse(data)
            manifest = value if isinstance(value, ocidocuments.Manifest) else manifest
            config = value if isinstance(value, ocidocuments.Config) else config
            assert str(value)
    with contextlib.suppress(EngineError):
        ocidocuments.is_index(data)
    with contextlib.suppress(EngineError):
        indexes.choose(data, ocidocuments.Platform("linux", "arm", "v7"), lambda _descriptor: data)
    if manifest is not None:
        with contextlib.suppress(EngineError):
            ocidocuments.pairs(manifest, config or ocidocuments.parse_config(json.dumps(CONFIG).encode()))
    text = data[:300].decode("utf-8", "surrogateescape")
    for parse_text in (reference.parse_reference, ocidocuments.parse_platform, reference.default_name):
        with contextlib.suppress(EngineError):
            parse_text(text)


def documents() -> list[bytes]:
    texts = [json.dumps(document).encode() for document in (MANIFEST, INDEX, CONFIG)]
    return [
        *texts,
        b"docker://user.example:5000/a/b:tag@" + DIGEST.encode(),
        b"oci:/some/path:tag",
        b"linux/arm/v7",
        b"containers-storage:[overlay@/x+/y]localhost/a",
    ]


# --- meta.json
# --------------------------------------------------------------------------------------------------------------------


def run_meta(data: bytes) -> None:
    with contextlib.suppress(EngineError):
        found = Metadata.parse(data)
        again = Metadata.parse(found.to_bytes())
        assert again.to_bytes() == found.to_bytes()
        assert found.erofs_formats
        for check in (found.check_readable, found.check_writable):
            with contextlib.suppress(EngineError):
                check()


def metas() -> list[bytes]:
    return [
        Metadata.new(fsverity.SHA256).to_bytes(),
        b'{"version": 1, "algorithm": "fsverity-sha512-12", "features": {"read-only-compatible": ["x"]}, '
        b'"erofs_formats": {"default": 2, "extra": [1]}}',
    ]


# --- replies of skopeo
# --------------------------------------------------------------------------------------------------------------------


class NoChild:
    """Stands for skopeo's process."""

    def wait(self, _seconds: float) -> int:
        return 1

    def words(self) -> str:
        return ""

    def kill(self) -> None: ...

    def close(self) -> None: ...


OPTIONS = ProxyOptions(executable=("skopeo",), timeout=0.05)
REMOTE = reference.parse_reference("docker://registry.example/a:b")


def run_proxy(data: bytes) -> None:
    """Packets are separated by a line feed; the first byte of each says how many descriptors it brings."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    before = len(os.listdir("/proc/self/fd"))
    proxy = ImageProxy(OPTIONS, REMOTE)
    proxy._socket, proxy._child, proxy.version = ours, NoChild(), (0, 2, 8)  # type: ignore[assignment]
    try:
        for packet in data.split(b"\n")[:12]:
            count = packet[0] % 4 if packet else 0
            fds = []
            for _number in range(count):
                readable, writable = os.pipe()
                os.write(writable, packet[1:200])
                os.close(writable)
                fds.append(readable)
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
            with contextlib.suppress(OSError):
                theirs.sendmsg([packet[1:60_000]], rights, socket.MSG_DONTWAIT)
            for fd in fds:
                os.close(fd)
        theirs.shutdown(socket.SHUT_WR)
        descriptor = ocidocuments.Descriptor("x", DIGEST, 5)
        calls: list[Callable[[], object]] = [
            proxy._initialize,
            proxy.open_image,
            lambda: proxy.get_manifest(1),
            lambda: proxy.layer_infos(1),
            lambda: proxy.read_blob(1, descriptor, 100),
            lambda: proxy.get_full_config(1),
        ]
        for call in calls:
            with contextlib.suppress(EngineError):
                call()
        with contextlib.suppress(EngineError):
            os.close(proxy.get_blob(1, DIGEST, 5).fd)
    finally:
        proxy.close()
        theirs.close()
    assert len(os.listdir("/proc/self/fd")) == before - 2, "something is left open"


def replies() -> list[bytes]:
    def reply(value: Any, pipe: int = 0, **more: Any) -> bytes:
        count = b"\1" if pipe else b"\0"
        return count + json.dumps({"success": True, "value": value, "pipeid": pipe, "error": "", **more}).encode()

    start = [reply("0.2.8"), reply(1)]
    failed = reply(None, success=False, error="reading manifest: name unknown", error_code="other")
    layers = [{"digest": DIGEST, "size": 5, "media_type": "x"}]
    return [
        b"\n".join([*start, reply(DIGEST, 7), reply(None), reply(layers, 8), reply(None), reply(5, 9), reply(None)]),
        b"\n".join([*start, failed]),
        b"\n".join([reply("0.2.3"), reply(1), reply(DIGEST, 3), reply(layers)]),
    ]


# --- between processes
# --------------------------------------------------------------------------------------------------------------------

STATE = {
    "done": 5,
    "total": 10,
    "rate": 3,
    "message": "Fetching",
    "finished": False,
    "images": ["app", "b"],
    "layers": [{"id": DIGEST, "state": "bytes", "done": 5, "total": 10}],
}
RECORD = {"ref": "docker://a.b/c", "manifest": DIGEST, "policy": "enforced", "since": "2026-11-27T14:40:07Z"}


def run_messages(data: bytes) -> None:
    """What a child tells its parent in the words of an image, and what one process leaves for another in a file."""
    text = data.decode("utf-8", "surrogateescape")
    error = FormatError(text, text * 3, doing=text * 9, said=text[::-1] * 20)
    message = json.dumps(to_values(error)).encode()
    assert len(message) <= processes.MAX_MESSAGE, "the other side would get a part of it"
    back = from_values(json.loads(message))
    assert back.__class__ is FormatError and str(back).isprintable() and str(from_values(to_values(back))) == str(back)
    with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError, RecursionError):
        line = summary(json.loads(data))
        assert line.isprintable() and len(line.encode("utf-8", "surrogatepass")) <= LINE_LIMIT
    with contextlib.suppress(EngineError):
        journal.parse(data, "a journal")
    with contextlib.suppress(ValueError, RecursionError):
        document = json.loads(data)
        found = namerecords._parse(document)
        assert found is None or found.manifest.startswith("sha256:")
    with tempfile.TemporaryFile() as file:
        file.write(data)
        file.flush()
        marks._read(file.fileno())


def messages() -> list[bytes]:
    kept = journal.Journal("/srv/app", current=journal.Image("ab" * 32, DIGEST, None, "docker://a.b/c", "x"))
    mark = {"boot_id": "x", "mount": "1", "pid": 1, "started": 1.5, "uptime": 2.5}
    texts = [json.dumps(value).encode() for value in (STATE, RECORD, mark, journal.to_values(kept))]
    return [*texts, "\x1b]0;owned\x07 \U0001f600 b\u00fcro \u202e".encode() * 20]


# --- the frame
# --------------------------------------------------------------------------------------------------------------------

TARGETS: dict[str, tuple[Callable[[bytes], None], Callable[[], list[bytes]]]] = {
    "tar": (run_tar, tars),
    "gzip": (run_gzip, gzips),
    "splitstream": (run_splitstream, splitstreams),
    "documents": (run_documents, documents),
    "meta": (run_meta, metas),
    "proxy": (run_proxy, replies),
    "messages": (run_messages, messages),
}


def damage(whole: bytes, other: bytes, dice: random.Random) -> bytes:
    data = bytearray(whole)
    for _change in range(dice.choice((1, 1, 2, 3, 8))):
        at = dice.randrange(len(data) + 1)
        how = dice.randrange(7)
        if how == 0 and at < len(data):
            data[at] ^= 1 << dice.randrange(8)
        elif how == 1:
            data[at : at + 1] = dice.choice(BYTES)
        elif how == 2:
            data[at:at] = dice.choice(BYTES) * dice.choice((1, 1, 2, 300))
        elif how == 3:
            data[at : at + 8] = dice.choice((0, 1, 0x7FFFFFFFFFFFFFFF, 1 << 63, len(data))).to_bytes(8, "little")
        elif how == 4:
            start, length = dice.randrange(len(other) + 1), dice.choice((4, 30, 512))
            data[at : at + dice.choice((0, length))] = other[start : start + length]
        elif how == 5:
            del data[at : at + dice.choice((1, 8, 512, len(data)))]
        else:
            data[at : at + 12] = b"%011o\0" % dice.choice((0, 64, 65, 512, 1 << 30, 0o77777777777))
    return bytes(data)


def attempt(run: Callable[[bytes], None], data: bytes) -> None:
    started = time.process_time()
    run(data)
    assert time.process_time() - started < SECONDS_PER_INPUT, "too slow"


def main() -> None:
    options, rest = fuzzing.parser(__doc__, sorted(TARGETS)).parse_known_args()
    run, corpus = TARGETS[options.target]
    inputs = corpus()
    for whole in inputs:
        attempt(run, whole)
    fuzzing.fuzz(
        options.target,
        lambda data: attempt(run, data),
        lambda dice: damage(dice.choice(inputs), dice.choice(inputs), dice),
        (options, rest),
    )


if __name__ == "__main__":
    main()
