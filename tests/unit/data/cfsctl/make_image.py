# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Write a small image with two plain layers as an OCI layout into the directory given: always the same bytes."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import sys


# By hand, for the bytes that tarfile writes differ between versions of Python.
FILE, HARDLINK, SYMLINK, DIRECTORY, LONG_NAME = b"0", b"1", b"2", b"5", b"L"


def _entry(name: bytes, kind: bytes, content: bytes = b"", target: bytes = b"") -> bytes:
    """One entry with its padding, in GNU format; a long name goes before it."""
    before = _entry(b"././@LongLink", LONG_NAME, name + b"\0") if len(name) > 100 else b""
    mode = b"0000755\0" if kind == DIRECTORY else b"0000644\0"
    fields = (
        name[:100],
        mode,
        b"0000000\0",
        b"0000000\0",
        b"%011o\0" % len(content),
        b"14524770400\0",
        b" " * 8,
        kind,
        target,
        b"ustar  \0",
    )
    header = struct.pack("100s8s8s8s12s12s8s1s100s8s247x", *fields)
    header = header[:148] + b"%06o\0 " % sum(header) + header[156:]
    return before + header + content + bytes(-len(content) % 512)


def _tar(entries: list[bytes]) -> bytes:
    archive = b"".join(entries) + bytes(1024)
    return archive + bytes(-len(archive) % 10240)


def layers() -> list[bytes]:
    """The tars: sizes around the threshold, one content twice, content of several blocks, and runs of small entries
    longer than a zstd block.
    """
    first = [
        _entry(b"usr/", DIRECTORY),
        _entry(b"usr/empty", FILE),
        _entry(b"usr/inline-1", FILE, b"x"),
        _entry(b"usr/inline-64", FILE, b"i" * 64),
        _entry(b"usr/external-65", FILE, b"e" * 65),
        _entry(b"usr/hard", HARDLINK, target=b"usr/external-65"),
        _entry(b"usr/again", FILE, b"e" * 65),
        _entry(b"usr/external-512", FILE, b"f" * 512),
        _entry(b"usr/blocks", FILE, bytes(i % 251 for i in range(10000))),
        _entry(b"usr/symlink", SYMLINK, target=b"blocks"),
        _entry(b"usr/" + b"long-" * 30 + b"name", FILE, b"g" * 4096),
    ]
    second = [_entry(b"usr/", DIRECTORY), _entry(b"usr/many/", DIRECTORY)]
    second += [_entry(b"usr/many/%x" % (i * i), FILE, b"%d" % i if i % 3 else b"") for i in range(250)]
    second += [_entry(b"usr/many/file-%d" % i, FILE, b"%d," % i * 100) for i in range(40)]
    return [_tar(first), _tar(second)]


def _digest(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def write_layout(path: str) -> None:
    """The OCI image layout; the tag is ``golden``."""
    os.makedirs(os.path.join(path, "blobs", "sha256"))

    def blob(data: bytes, media_type: str) -> dict[str, object]:
        with open(os.path.join(path, "blobs", "sha256", hashlib.sha256(data).hexdigest()), "wb") as out:
            out.write(data)
        return {"mediaType": f"application/vnd.oci.image.{media_type}", "digest": _digest(data), "size": len(data)}

    tars = layers()
    rootfs = {"type": "layers", "diff_ids": [_digest(tar) for tar in tars]}
    config = json.dumps(
        {"architecture": "amd64", "os": "linux", "config": {"Labels": {"golden": "yes"}}, "rootfs": rootfs}
    ).encode()
    manifest = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": blob(config, "config.v1+json"),
        "layers": [blob(tar, "layer.v1.tar") for tar in tars],
    }
    descriptor = blob(json.dumps(manifest).encode(), "manifest.v1+json")
    descriptor["annotations"] = {"org.opencontainers.image.ref.name": "golden"}
    for name, document in (
        ("oci-layout", {"imageLayoutVersion": "1.0.0"}),
        ("index.json", {"schemaVersion": 2, "manifests": [descriptor]}),
    ):
        with open(os.path.join(path, name), "w", encoding="ascii") as out:
            json.dump(document, out)


if __name__ == "__main__":
    write_layout(sys.argv[1])
