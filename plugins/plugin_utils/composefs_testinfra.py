# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Look at composefs repositories on hosts from pytest-testinfra.

    from composefs_testinfra import Repository

    def test_application(host):
        repository = Repository(host, "/var/lib/images")
        image = repository.image("app")
        seen = (repository.protected, image.digest, image.damaged, repository.mounted("/srv/app"))
        # ... and then that seen is what it has to be

Nothing of the collection runs on the host: a small program that reads the repository's files by itself is sent there
through testinfra's connection, so a fault of the collection does not hide itself. It needs python3 on the host, and a
user who may read the repository.
"""

from __future__ import annotations

import base64
import json
import shlex
import zlib
from typing import Any

# Runs on the host, with nothing but Python's standard library (3.6 or later). It knows the file formats by itself.
PROGRAM = r'''
import errno, fcntl, hashlib, json, os, re, struct, sys

repository, wanted = json.loads(sys.argv[1])
os.chdir(repository)
out = {"exists": False, "tags": {}, "images": {}, "unfinished": 0, "objects": 0}

def finish():
    print(json.dumps(out))
    sys.exit(0)

try:
    raw = open("meta.json", "rb").read()
except OSError:
    finish()
out["exists"] = True
meta = json.loads(raw)
name = re.match("fsverity-(sha[0-9]+)-12$", meta["algorithm"]).group(1)
new, size, number = {"sha256": (hashlib.sha256, 32, 1), "sha512": (hashlib.sha512, 64, 2)}[name]
out["algorithm"] = name

def digest_of(path):
    """The fs-verity digest of a file: a Merkle tree over blocks of 4096 bytes, its root in a descriptor."""
    level, length = [], 0
    with open(path, "rb") as file:
        while True:
            block = file.read(4096)
            if not block:
                break
            length += len(block)
            level.append(new(block.ljust(4096, b"\0")).digest())
    while len(level) > 1:
        joined = b"".join(level)
        level = [new(joined[at:at + 4096].ljust(4096, b"\0")).digest() for at in range(0, len(joined), 4096)]
    root = (level[0] if level else bytes(size)).ljust(64, b"\0")
    return new(struct.pack("<BBBBIQ64s32s144s", 1, number, 12, 0, 0, length, root, b"", b"")).hexdigest()

def measured(path):
    """What the kernel measures: a digest, None if the file is not protected, False if the file system cannot tell."""
    buffer = bytearray(struct.pack("<HH", 0, 64) + bytes(64))
    fd = os.open(path, os.O_RDONLY)
    try:
        fcntl.ioctl(fd, 0xC0046686, buffer)
    except OSError as error:
        return None if error.errno == errno.ENODATA else False
    finally:
        os.close(fd)
    return bytes(buffer[4:4 + struct.unpack_from("<H", buffer, 2)[0]]).hex()

out["protected"] = bool(measured("meta.json"))

def object_of(link):
    """The object behind a link of the repository, in hexadecimal; None if it is no link, or does not lead to an object."""
    try:
        match = re.search("objects/([0-9a-f]{2})/([0-9a-f]+)$", os.readlink(link))
    except OSError:
        return None
    return match and match.group(1) + match.group(2)

def path_of(digest):
    return "objects/" + digest[:2] + "/" + digest[2:]

def references(digest):
    """The objects and streams that a splitstream names."""
    data = open(path_of(digest), "rb").read()
    if data[:11] == b"SplitStream":
        start, = struct.unpack_from("<Q", data, 16)
    elif data[18:29] == b"SplitStream":
        start, = struct.unpack_from("<Q", data, 0)
    else:
        return None
    streams, streams_end, objects, objects_end = struct.unpack_from("<4Q", data, start)
    cut = lambda begin, end: [data[at:at + size].hex() for at in range(begin, end, size)]
    return cut(streams, streams_end), cut(objects, objects_end)

def reachable(link):
    """Every object that a link leads to, in any number of steps."""
    first = object_of(link)
    if first is None:
        return None
    seen, todo = set(), [first]
    while todo:
        digest = todo.pop()
        if digest in seen:
            continue
        seen.add(digest)
        if not os.path.exists(path_of(digest)):
            continue
        found = references(digest)
        if found:
            todo += found[0]
            seen.update(found[1])
    return seen

verdicts = {}
def complaint(digest):
    """Why an object is not good; None if it is."""
    if digest not in verdicts:
        path = path_of(digest)
        try:
            if out["protected"] and measured(path) != digest:
                verdicts[digest] = "not measured so by the kernel"
            else:
                verdicts[digest] = None if digest_of(path) == digest else "has another content"
        except FileNotFoundError:
            verdicts[digest] = "missing"
        except OSError as error:
            verdicts[digest] = error.strerror
    return verdicts[digest]

tags = "streams/refs/oci"
for file in sorted(os.listdir(tags)) if os.path.isdir(tags) else []:
    target = os.readlink(tags + "/" + file).rsplit("/", 1)[-1]
    out["tags"][re.sub("%2F|%25", lambda m: "/" if m.group() == "%2F" else "%", file)] = target.replace("oci-manifest-", "", 1)
out["streams"] = sorted(entry for entry in os.listdir("streams") if entry != "refs") if os.path.isdir("streams") else []
out["erofs"] = sorted(entry for entry in os.listdir("images") if entry != "refs") if os.path.isdir("images") else []
imports = ".composefs-oci/imports"
out["unfinished"] = len(os.listdir(imports)) if os.path.isdir(imports) else 0
for directory, _, files in os.walk("objects"):
    out["objects"] += len(files)

def image_of(tag):
    """What there is to tell of the image with this name; None if there is none."""
    digest = out["tags"].get(tag)
    objects = reachable("streams/oci-manifest-" + digest) if digest else None
    if objects is None:
        return None
    damaged = [path_of(one) + ": " + complaint(one) for one in sorted(objects) if complaint(one)]
    ids = sorted(one for one in objects if os.path.lexists("images/" + one))
    return {"digest": digest, "objects": len(objects), "damaged": damaged, "image_ids": ids}

if wanted == "check":
    links = ["streams/" + entry for entry in out["streams"]] + ["images/" + entry for entry in out["erofs"]]
    damaged, every = [], set()
    for link in links:
        objects = reachable(link)
        if objects is None:
            damaged.append(link + ": leads nowhere")
            continue
        every |= objects
    for directory, _, files in os.walk("objects"):
        if out["protected"]:
            # In a protected repository nothing may lie around that the kernel does not vouch for.
            every.update(os.path.basename(directory) + file for file in files if re.match("[0-9a-f]+$", file))
    for digest in sorted(every):
        reason = complaint(digest)
        if reason:
            damaged.append(path_of(digest) + ": " + reason)
    for tag, digest in out["tags"].items():
        if not os.path.exists("streams/oci-manifest-" + digest):
            damaged.append("tag " + tag + ": its manifest is missing")
    out["damaged"] = damaged
    out["images"] = {tag: image_of(tag) for tag in out["tags"]}
elif wanted:
    out["images"] = {wanted: image_of(wanted)}
finish()
'''


class Image:
    """An image in a repository, by one of its names."""

    def __init__(self, name: str, found: dict[str, Any]) -> None:
        self.name = name
        self.digest: str = found["digest"]
        """The digest of its manifest, ``sha256:<hex>``."""
        self.image_ids: list[str] = found["image_ids"]
        """The ids (hex) of the EROFS images that were made of it and may be mounted."""
        self.objects: int = found["objects"]
        """How many objects it consists of."""
        self.damaged: list[str] = found["damaged"]
        """What is wrong with its objects, one line for each: content that does not match its digest, missing, not
        measured by the kernel.
        """

    @property
    def image_id(self) -> str | None:
        """The id of its EROFS image; None if it has none. AssertionError if it has several: look at `image_ids`
        then.
        """
        if len(self.image_ids) > 1:
            raise AssertionError(f"{self.name} has several EROFS images: {self.image_ids}")
        return self.image_ids[0] if self.image_ids else None


class Repository:
    """A composefs repository on a host of testinfra. What was read is remembered; `fresh` gives one that
    reads again.
    """

    def __init__(self, host: Any, path: str = "/sysroot/composefs") -> None:
        self.host, self.path = host, path
        self._known: dict[str, dict[str, Any]] = {}

    def fresh(self) -> Repository:
        return Repository(self.host, self.path)

    def _ask(self, wanted: str) -> dict[str, Any]:
        """Everything there is to know for ``wanted``: an image's name, "check" for all there is, "" for what needs no
        reading of objects.
        """
        # After a look at everything no other is needed, and what every answer has is taken from any of them.
        for known in ("check", wanted, *(self._known if not wanted else ())):
            if known in self._known:
                return self._known[known]
        return self._known.setdefault(wanted, self._run(wanted))

    def _run(self, wanted: str) -> dict[str, Any]:
        program = base64.b85encode(zlib.compress(PROGRAM.encode())).decode()
        loader = f"import base64,zlib;exec(zlib.decompress(base64.b85decode({program!r})))"
        done = self.host.run(
            f"cd {shlex.quote(self.path)} && python3 -c {shlex.quote(loader)} "
            f"{shlex.quote(json.dumps([self.path, wanted]))}"
        )
        if done.rc and not self.host.file(self.path).exists:
            return {"exists": False, "tags": {}, "images": {}}
        if done.rc:
            raise AssertionError(f"the repository {self.path} cannot be read: {done.stderr}")
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer

    @property
    def exists(self) -> bool:
        """Whether a repository is there."""
        return bool(self._ask("")["exists"])

    @property
    def algorithm(self) -> str:
        """``sha256`` or ``sha512``."""
        return str(self._ask("")["algorithm"])

    @property
    def protected(self) -> bool:
        """Whether the repository requires fs-verity, by what the kernel measures of it."""
        return bool(self._ask("")["protected"])

    @property
    def tags(self) -> dict[str, str]:
        """Names of images and the digests of their manifests."""
        return dict(self._ask("")["tags"])

    @property
    def streams(self) -> list[str]:
        """The names of all streams: manifests, configurations and layers."""
        return list(self._ask("")["streams"])

    @property
    def objects(self) -> int:
        """How many objects there are, named ones and others."""
        return int(self._ask("")["objects"])

    @property
    def unfinished(self) -> int:
        """How many pulls are marked as not finished."""
        return int(self._ask("")["unfinished"])

    def image(self, name: str) -> Image:
        """The image of that name, every one of its objects read and hashed; AssertionError if there is none."""
        found = self._ask(name)["images"].get(name)
        if not found:
            raise AssertionError(f"{self.path} has no image called {name}, but {', '.join(self.tags) or 'none at all'}")
        return Image(name, found)

    def damage(self) -> list[str]:
        """What is wrong with anything that has a name, one line for each fault; in a protected repository with any
        object. Reads all of it.

        That there is no repository is a fault, too. Whatever else is asked afterwards is answered from what was read.
        """
        found = self._ask("check")
        return list(found["damaged"]) if found["exists"] else [f"{self.path}: there is no repository"]

    def mounted(self, path: str) -> str | None:
        """The id of the image that is mounted at ``path``; None if none is."""
        done = self.host.run("cat /proc/self/mountinfo")
        if done.rc:
            raise AssertionError(done.stderr)
        for line in reversed(done.stdout.splitlines()):
            before, _unused, after = line.partition(" - ")
            kind, source = after.split(" ")[:2]
            if before.split(" ")[4] == path:
                return source[len("composefs:") :] if kind == "overlay" and source.startswith("composefs:") else None
        return None
