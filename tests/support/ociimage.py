# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""OCI image layouts and Docker ``dir:`` images, honest ones and lying ones, made of tar streams, directories or Debian
packages.

From the command line::

    ociimage.py debian OUT_OCI_DIR [--layer "bash coreutils"]... [--encoding gzip|zstd|none] [--suite SUITE] [--tag
    latest] ociimage.py directory OUT_OCI_DIR DIR... [--encoding ...]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import pathlib
import platform
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any, NamedTuple

if __name__ == "__main__":
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))

from aptroot import AptRoot, Unavailable
from tarbytes import DIRECTORY, SYMLINK, member

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"
EMPTY = "application/vnd.oci.empty.v1+json"
LAYER = "application/vnd.oci.image.layer.v1.tar"
MEDIA_SUFFIX = {
    "none": "",
    "gzip": "+gzip",
    "gzip-multi": "+gzip",
    "estargz": "+gzip",
    "zstd": "+zstd",
    "zstd-frames": "+zstd",
    "zstd-skippable": "+zstd",
    "zstd-chunked": "+zstd",
}
"""What `encode` can make, and how the media type of such a layer ends."""
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_CONFIG = "application/vnd.docker.container.image.v1+json"
DOCKER_LAYER = "application/vnd.docker.image.rootfs.diff.tar.gzip"
CREATED = "2024-01-01T00:00:00Z"

Json = dict[str, Any]


def sha256(data: bytes) -> str:
    """``sha256:<hex>`` of ``data``."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


def architecture() -> str:
    """This machine as Go, and so OCI, names it."""
    machine = platform.machine()
    return {"x86_64": "amd64", "aarch64": "arm64", "armv7l": "arm", "i686": "386"}.get(machine, machine)


# ---- encodings -------------------------------------------------------------------------------------------------------


def gzip_member(data: bytes, level: int = 6, extra: bytes = b"") -> bytes:
    """One gzip member without name and time, so the same data gives the same bytes; ``extra`` is the FEXTRA field."""
    deflate = zlib.compressobj(level, zlib.DEFLATED, -15)
    head = (
        b"\x1f\x8b\x08"
        + (b"\x04" if extra else b"\0")
        + bytes(4)
        + b"\0\xff"
        + (struct.pack("<H", len(extra)) + extra if extra else b"")
    )
    return (
        head + deflate.compress(data) + deflate.flush() + struct.pack("<II", zlib.crc32(data), len(data) & 0xFFFFFFFF)
    )


def zstd_frame(data: bytes, level: int = 3) -> bytes:
    """One zstd frame, made by the zstd program."""
    if not shutil.which("zstd"):
        raise Unavailable("the zstd program is not installed")
    return subprocess.run(
        ["zstd", "-q", "-c", f"-{level}", "--no-check", "-T1"], input=data, stdout=subprocess.PIPE, check=True
    ).stdout


def skippable_frame(payload: bytes, number: int = 0) -> bytes:
    return struct.pack("<II", 0x184D2A50 + number, len(payload)) + payload


def _pieces(data: bytes, count: int) -> list[bytes]:
    step = max(1, -(-len(data) // count))
    return [data[start : start + step] for start in range(0, len(data), step)] or [b""]


def encode(tar: bytes, encoding: str = "gzip") -> bytes:
    """Compress a tar the way some tool in the wild does.

    gzip-multi: seven members, an empty one among them.  estargz: members and a footer member with an extra field.
    zstd-frames: five frames. zstd-skippable: skippable frames before, between and after.  zstd-chunked: frames, then
    two skippable ones that hold a table of contents and a footer; the caller cuts the tar's padding itself (see
    `Layout.chunked_layer`) to imitate old writers.
    """
    if encoding == "none":
        return tar
    if encoding == "gzip":
        return gzip_member(tar)
    if encoding == "gzip-multi":
        members = [gzip_member(piece) for piece in _pieces(tar, 6)]
        return b"".join([*members[:2], gzip_member(b""), *members[2:]])
    if encoding == "estargz":
        toc = 0
        out = b""
        for piece in _pieces(tar, 8):
            toc = len(out)
            out += gzip_member(piece)
        return out + gzip_member(b"", extra=b"SG" + struct.pack("<H", 22) + b"%016xSTARGZ" % toc)
    if encoding == "zstd":
        return zstd_frame(tar)
    if encoding == "zstd-frames":
        return b"".join(zstd_frame(piece) for piece in _pieces(tar, 5))
    if encoding == "zstd-skippable":
        frames = [zstd_frame(piece) for piece in _pieces(tar, 3)]
        return skippable_frame(b"before") + skippable_frame(b"between", 7).join(frames) + skippable_frame(b"", 15)
    if encoding == "zstd-chunked":
        content = b"".join(zstd_frame(piece) for piece in _pieces(tar, 4))
        listing = skippable_frame(zstd_frame(b'{"version":1,"entries":[]}'))
        return (
            content
            + listing
            + skippable_frame(struct.pack("<5Q", len(content) + 8, len(listing) - 8, 26, 1, 1) + b"GNUlInUx")
        )
    raise ValueError(f"unknown encoding {encoding}")


# ---- layouts ---------------------------------------------------------------------------------------------------------


class Layer(NamedTuple):
    """A layer that lies in a layout: its descriptor as it goes into the manifest, and the diff_id for the config."""

    descriptor: Json
    diff_id: str


class LayerSink:
    """File-like: takes a tar in pieces, compresses it outside this process and adds the blob to a layout; memory stays
    flat.
    """

    def __init__(self, layout: Layout, encoding: str = "gzip", level: int | None = None) -> None:
        self.layout, self.encoding = layout, encoding
        self.tar_hash = hashlib.sha256()
        self.tar_size = 0
        self.file = tempfile.NamedTemporaryFile(dir=layout.path / "blobs/sha256", prefix=".new-", delete=False)  # noqa: SIM115 -- closed in finish()
        self.process: subprocess.Popen[bytes] | None = None
        command = self._command(encoding, level)
        if command:
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=self.file)
            assert self.process.stdin is not None
            self.out: IO[bytes] = self.process.stdin
        else:
            self.out = self.file.file

    @staticmethod
    def _command(encoding: str, level: int | None) -> list[str]:
        if encoding == "none":
            return []
        if encoding == "gzip":
            return [shutil.which("pigz") or "gzip", "-n", "-c", f"-{level or 6}"]
        if encoding == "zstd":
            if not shutil.which("zstd"):
                raise Unavailable("the zstd program is not installed")
            return ["zstd", "-q", "-c", f"-{level or 3}"]
        raise ValueError(f"a streamed layer cannot be encoded as {encoding}")

    def write(self, data: bytes) -> int:
        self.tar_hash.update(data)
        self.tar_size += len(data)
        self.out.write(data)
        return len(data)

    def flush(self) -> None:
        """Nothing to do: the pipe is emptied by finish()."""

    def finish(self, **extra: Any) -> Layer:
        if self.process:
            self.out.close()
            if self.process.wait():
                raise RuntimeError(f"{self.process.args!r} failed")
        self.file.close()
        digest = self.layout.adopt(pathlib.Path(self.file.name))
        descriptor = {
            "mediaType": LAYER + MEDIA_SUFFIX[self.encoding],
            "digest": digest,
            "size": self.layout.blob_path(digest).stat().st_size,
            **extra,
        }
        return Layer(descriptor, "sha256:" + self.tar_hash.hexdigest())


class Layout:
    """An OCI image layout on disk.  Every method that makes a document takes overrides, so that a test can lie in one
    place and be true elsewhere.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = pathlib.Path(path)
        (self.path / "blobs/sha256").mkdir(parents=True, exist_ok=True)
        (self.path / "oci-layout").write_text('{"imageLayoutVersion":"1.0.0"}')
        if not (self.path / "index.json").exists():
            self._write_index([])

    def _write_index(self, manifests: list[Json]) -> None:
        temporary = self.path / ".index.json.new"
        temporary.write_text(json.dumps({"schemaVersion": 2, "mediaType": INDEX, "manifests": manifests}))
        temporary.replace(self.path / "index.json")

    def blob_path(self, digest: str) -> pathlib.Path:
        algorithm, _unused, value = digest.partition(":")
        return self.path / "blobs" / algorithm / value

    def blob(self, data: bytes, digest: str | None = None) -> str:
        """Store ``data`` under its digest, or under the one given (a lie)."""
        name = digest or sha256(data)
        path = self.blob_path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return name

    def adopt(self, path: pathlib.Path) -> str:
        """Take a file of the same file system as a blob; returns its digest."""
        value = hashlib.sha256()
        with open(path, "rb") as file:
            for piece in iter(lambda: file.read(1 << 20), b""):
                value.update(piece)
        digest = "sha256:" + value.hexdigest()
        path.chmod(0o644)
        path.replace(self.blob_path(digest))
        return digest

    def descriptor(self, media_type: str, data: bytes, **extra: Any) -> Json:
        """Store a blob and describe it; ``extra`` adds or overrides members (``size=``, ``digest=``, ``annotations=``,
        ...).
        """
        return {"mediaType": media_type, "digest": self.blob(data), "size": len(data), **extra}

    def layer(
        self,
        tar: bytes,
        encoding: str = "gzip",
        *,
        diff_id: str | None = None,
        media_type: str | None = None,
        **extra: Any,
    ) -> Layer:
        """A layer from a whole tar; ``diff_id`` and ``media_type`` override the truth."""
        descriptor = self.descriptor(media_type or LAYER + MEDIA_SUFFIX[encoding], encode(tar, encoding), **extra)
        return Layer(descriptor, diff_id or sha256(tar))

    def chunked_layer(self, tar: bytes, *, cut: int | None = None) -> Layer:
        """zstd:chunked as old writers made it: the zeros after the end marker are missing, yet the diff_id counts them.

        ``cut`` is the number of bytes that are left out (default: all zeros but the two blocks of the end marker).
        """
        if cut is None:
            cut = max(0, len(tar) - (-(-len(tar.rstrip(b"\0")) // 512) * 512 + 1024))
        return self.layer(tar[: len(tar) - cut], "zstd-chunked", diff_id=sha256(tar))

    def broken_layer(
        self, tar: bytes, encoding: str = "gzip", *, flip: int | None = None, cut: int = 0, append: bytes = b""
    ) -> Layer:
        """A layer whose blob is honest about its digest and size but does not decode to the tar (wrong inside, not in
        transit).
        """
        data = bytearray(encode(tar, encoding))
        if flip is not None:
            data[flip] ^= 0x40
        blob = bytes(data[: len(data) - cut]) + append
        return Layer(self.descriptor(LAYER + MEDIA_SUFFIX[encoding], blob), sha256(tar))

    def sink(self, encoding: str = "gzip", level: int | None = None) -> LayerSink:
        return LayerSink(self, encoding, level)

    def layer_from_directory(self, directory: str | os.PathLike[str], encoding: str = "gzip") -> Layer:
        sink = self.sink(encoding)
        write_directory_tar(pathlib.Path(directory), sink)
        return sink.finish()

    def config(self, layers: Sequence[Layer], *, labels: Mapping[str, str] | None = None, **overrides: Any) -> Json:
        """A container config for ``layers``; returns its descriptor."""
        document: Json = {
            "created": CREATED,
            "architecture": architecture(),
            "os": "linux",
            "config": {"Cmd": ["/bin/sh"], **({"Labels": dict(labels)} if labels else {})},
            "rootfs": {"type": "layers", "diff_ids": [layer.diff_id for layer in layers]},
            "history": [{"created": CREATED, "created_by": "test"} for _unused in layers],
            **overrides,
        }
        return self.descriptor(CONFIG, json.dumps(document).encode())

    def manifest(
        self, config: Json, layers: Sequence[Layer | Json], *, overrides: Mapping[str, Any] | None = None, **extra: Any
    ) -> Json:
        """A manifest; returns its descriptor.  ``overrides`` goes into the document, ``extra`` into the descriptor."""
        document: Json = {
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": config,
            "layers": [layer.descriptor if isinstance(layer, Layer) else layer for layer in layers],
            **(overrides or {}),
        }
        return self.descriptor(MANIFEST, json.dumps(document).encode(), **extra)

    def index(self, manifests: Sequence[Json], **extra: Any) -> Json:
        """A nested image index (several platforms); returns its descriptor."""
        return self.descriptor(
            INDEX, json.dumps({"schemaVersion": 2, "mediaType": INDEX, "manifests": list(manifests)}).encode(), **extra
        )

    def tag(self, descriptor: Json, name: str = "latest") -> str:
        """Enter ``descriptor`` into index.json under ``name`` (replacing what had it); returns its digest."""
        index = json.loads((self.path / "index.json").read_text())
        key = "org.opencontainers.image.ref.name"
        kept = [one for one in index["manifests"] if one.get("annotations", {}).get(key) != name]
        self._write_index([*kept, {**descriptor, "annotations": {**descriptor.get("annotations", {}), key: name}}])
        return str(descriptor["digest"])

    def image(self, tars: Sequence[bytes | Layer], name: str = "latest", encoding: str = "gzip", **config: Any) -> str:
        """The usual case in one call: layers, config, manifest, tag; returns the manifest digest."""
        layers = [tar if isinstance(tar, Layer) else self.layer(tar, encoding) for tar in tars]
        return self.tag(self.manifest(self.config(layers, **config), layers), name)

    def artifact(
        self, blobs: Sequence[tuple[str, bytes]], name: str = "latest", artifact_type: str = "application/x-test"
    ) -> str:
        """An artifact with the empty config, which all of them share; returns the manifest digest."""
        config = self.descriptor(EMPTY, b"{}")
        layers = [self.descriptor(media_type, data) for media_type, data in blobs]
        return self.tag(self.manifest(config, layers, overrides={"artifactType": artifact_type}), name)

    def multi_platform(self, tars: Mapping[str, Sequence[bytes]], name: str = "latest") -> tuple[str, dict[str, str]]:
        """An index over one image per platform (``linux/arm64/v8``); returns its digest and the manifest digest of each
        platform.
        """
        entries: list[Json] = []
        digests: dict[str, str] = {}
        for text, streams in tars.items():
            parts = text.split("/")
            described: Json = dict(zip(("os", "architecture", "variant"), parts))
            layers = [self.layer(tar) for tar in streams]
            descriptor = self.manifest(self.config(layers, **described), layers, platform=described)
            entries.append(descriptor)
            digests[text] = descriptor["digest"]
        return self.tag(self.index(entries), name), digests

    def read(self, digest: str) -> bytes:
        return self.blob_path(digest).read_bytes()


def docker_directory(path: str | os.PathLike[str], tars: Sequence[bytes], **config: Any) -> str:
    """A Docker schema2 image in skopeo's ``dir:`` layout; returns the digest of its (Docker) manifest."""
    base = pathlib.Path(path)
    base.mkdir(parents=True, exist_ok=True)
    (base / "version").write_text("Directory Transport Version: 1.1\n")

    def put(data: bytes, media_type: str) -> Json:
        digest = sha256(data)
        (base / digest.split(":")[1]).write_bytes(data)
        return {"mediaType": media_type, "size": len(data), "digest": digest}

    layers = [put(encode(tar, "gzip"), DOCKER_LAYER) for tar in tars]
    document = {
        # Docker's own spelling and order, which no OCI conversion keeps byte for byte.
        "architecture": architecture(),
        "config": {"Cmd": ["/bin/sh"], "Labels": None},
        "created": CREATED,
        "docker_version": "20.10.24",
        "history": [{"created": CREATED, "created_by": "test"} for _unused in tars],
        "os": "linux",
        "rootfs": {"type": "layers", "diff_ids": [sha256(tar) for tar in tars]},
        **config,
    }
    described = put(json.dumps(document, indent=1).encode(), DOCKER_CONFIG)
    manifest = json.dumps(
        {"schemaVersion": 2, "mediaType": DOCKER_MANIFEST, "config": described, "layers": layers}, indent=3
    ).encode()
    (base / "manifest.json").write_bytes(manifest)
    return sha256(manifest)


def write_directory_tar(directory: pathlib.Path, out: Any) -> None:
    """A deterministic tar of a directory: sorted, owned by root, times as they are in whole seconds."""
    with tarfile.open(fileobj=out, mode="w|", format=tarfile.PAX_FORMAT) as archive:

        def add(path: pathlib.Path, name: str) -> None:
            info = archive.gettarinfo(str(path), arcname=name)
            if info is None:  # a socket
                return
            info.uid = info.gid = 0
            info.uname = info.gname = ""
            info.mtime = int(info.mtime)
            if info.isreg():
                with open(path, "rb") as file:
                    archive.addfile(info, file)
            else:
                archive.addfile(info)
            if info.isdir():
                for child in sorted(path.iterdir(), key=lambda one: os.fsencode(one.name)):
                    add(child, f"{name}/{child.name}" if name else child.name)

        for child in sorted(directory.iterdir(), key=lambda one: os.fsencode(one.name)):
            add(child, child.name)


# ---- a real image ----------------------------------------------------------------------------------------------------

MERGED = ("bin", "sbin", "lib", "lib32", "lib64", "libx32")
SMALL_LAYERS = (
    "base-files base-passwd bash coreutils grep sed tar gzip findutils",
    "python3-minimal ca-certificates",
    "curl less",
)


def _merged(name: str) -> str:
    """``./bin/x`` and ``bin/x`` as ``usr/bin/x``: every current Debian has /bin as a link to /usr/bin."""
    name = name[2:] if name.startswith("./") else name
    return "usr/" + name if name.split("/", 1)[0] in MERGED else name


def _package_members(deb: pathlib.Path) -> Iterator[tuple[tarfile.TarInfo, IO[bytes] | None]]:
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(deb)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        with tarfile.open(fileobj=process.stdout, mode="r|", bufsize=1 << 18) as archive:
            for info in archive:
                yield info, archive.extractfile(info) if info.isreg() else None
        while process.stdout.read(1 << 18):
            pass
    if process.returncode:
        raise Unavailable(f"{deb.name} cannot be unpacked; remove it and try again")


def _status(debs: Sequence[pathlib.Path]) -> bytes:
    """What dpkg would have written down about these packages, so that ``dpkg -l`` in the image tells the truth."""
    paragraphs = []
    for deb in debs:
        control = subprocess.run(["dpkg-deb", "--field", str(deb)], check=True, stdout=subprocess.PIPE).stdout.rstrip(
            b"\n"
        )
        first, _unused, rest = control.partition(b"\n")
        paragraphs.append(first + b"\nStatus: install ok unpacked\n" + rest + b"\n")
    return b"\n".join(paragraphs)


def _write_packages(
    sink: LayerSink, debs: Sequence[pathlib.Path], *, base: bool, directories: set[str], status: bytes
) -> int:
    """Write the tar of one layer; returns its number of entries."""
    entries = 0
    newest = 0
    seen: set[str] = set()
    passwords: dict[str, bytes] = {}
    if base:
        # Parents first: not every reader makes directories that no entry names.
        for name in ("usr", *(f"usr/{name}" for name in MERGED)):
            directories.add(name)
            sink.write(member(name + "/", type=DIRECTORY))
        for name in MERGED:
            seen.add(name)
            sink.write(member(name, type=SYMLINK, linkname=f"usr/{name}"))
        entries += 2 * len(MERGED) + 1
    for deb in debs:
        for info, file in _package_members(deb):
            info.name = _merged(info.name.rstrip("/"))
            if info.name in ("", ".") or info.name in seen:
                continue
            if info.isdir():
                if info.name in directories:
                    continue
                directories.add(info.name)
            elif info.islnk():
                info.linkname = _merged(info.linkname)
            seen.add(info.name)
            info.pax_headers = {}
            newest = max(newest, int(info.mtime))
            sink.write(info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape"))
            entries += 1
            if file is None:
                continue
            keep = info.name.startswith("usr/share/base-passwd/")
            kept = b""
            for piece in iter(lambda source=file: source.read(1 << 20), b""):  # type: ignore[misc]
                sink.write(piece)
                kept += piece if keep else b""
            sink.write(bytes(-info.size % 512))
            if keep:
                passwords[info.name.rsplit("/", 1)[1].replace(".master", "")] = kept
    extra = [member(f"etc/{name}", data, mtime=newest) for name, data in sorted(passwords.items())]
    for parent in ("var", "var/lib", "var/lib/dpkg"):
        if parent not in directories:
            directories.add(parent)
            extra.append(member(parent + "/", type=DIRECTORY, mtime=newest))
    extra.append(member("var/lib/dpkg/status", status, mtime=newest))
    for data in extra:
        sink.write(data)
    sink.write(bytes(-(sink.tar_size + 1024) % 10240 + 1024))
    return entries + len(extra)


class Built(NamedTuple):
    digest: str
    entries: int
    tar_bytes: int
    blob_bytes: int


def debian_image(
    out: str | os.PathLike[str],
    layers: Sequence[str] = SMALL_LAYERS,
    *,
    encoding: str = "gzip",
    suite: str = "",
    tag: str = "latest",
    cache: pathlib.Path | None = None,
    labels: Mapping[str, str] | None = None,
    level: int | None = None,
) -> Built:
    """Build a real image from Debian's packages: each string of ``layers`` names packages, which bring what they depend
    on.

    No root, no chroot: the tars of the packages are joined, with /bin and friends merged into /usr.  Maintainer scripts
    are not run; the programs work. The same packages give the same image.  Raises `Unavailable` where there are no
    Debian packages.
    """
    root = AptRoot(suite, cache / "apt" if cache else None)
    packages: list[list[pathlib.Path]] = []
    taken: set[pathlib.Path] = set()
    wanted: list[str] = []
    for names in layers:
        wanted += names.split()
        packages.append([deb for deb in root.fetch(wanted) if deb not in taken])
        taken.update(packages[-1])
    # What went in tells whether it is there already; the last item is for changes of this function.
    parts = [[deb.name for deb in debs] for debs in packages]
    recipe = hashlib.sha256(
        json.dumps([parts, list(layers), encoding, level, root.suite, dict(labels or {}), 2]).encode()
    ).hexdigest()
    record = pathlib.Path(out) / f".built-{recipe[:16]}-{tag.replace('/', '_')}"
    if record.exists():
        return Built(*json.loads(record.read_text()))
    layout = Layout(out)
    written: list[Layer] = []
    directories: set[str] = set()
    entries = tar_bytes = 0
    below: list[pathlib.Path] = []
    for debs in packages:
        below += debs
        sink = layout.sink(encoding, level)
        entries += _write_packages(sink, debs, base=not written, directories=directories, status=_status(sorted(below)))
        tar_bytes += sink.tar_size
        written.append(sink.finish())
    every = {
        "org.opencontainers.image.title": "debian packages",
        "org.opencontainers.image.version": root.suite,
        **(labels or {}),
    }
    config = layout.config(
        written, labels=every, history=[{"created": CREATED, "created_by": f"packages {names}"} for names in layers]
    )
    digest = layout.tag(layout.manifest(config, written, overrides={"annotations": every}), tag)
    built = Built(digest, entries, tar_bytes, sum(int(layer.descriptor["size"]) for layer in written))
    record.write_text(json.dumps(built))
    return built


# ---- copies by skopeo ------------------------------------------------------------------------------------------------


def skopeo_copy(source: str, target: str, *options: str, executable: str = "skopeo") -> None:
    """``skopeo copy`` under a policy that accepts everything; raises RuntimeError with its words."""
    with tempfile.TemporaryDirectory() as directory:
        policy = pathlib.Path(directory) / "policy.json"
        policy.write_text('{"default":[{"type":"insecureAcceptAnything"}]}')
        command = [executable, "--policy", str(policy), "copy", "--quiet", *options, source, target]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"skopeo copy {source} {target}: {done.stdout.strip()}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    debian = commands.add_parser("debian", help="a small real image from Debian's packages")
    debian.add_argument("--layer", action="append", help="package names of one layer; repeat for more layers")
    debian.add_argument("--suite", default="", help="default: the machine's own")
    debian.add_argument("--cache", type=pathlib.Path, help="default: $COMPOSEFS_OCI_CACHE or .cache/ of the checkout")
    directory = commands.add_parser("directory", help="one layer from each directory")
    for command in (debian, directory):
        command.add_argument("out")
        command.add_argument("--encoding", default="gzip", choices=("gzip", "zstd", "none"))
        command.add_argument("--tag", default="latest")
    directory.add_argument("directories", nargs="+")
    options = parser.parse_args(arguments)
    try:
        if options.command == "debian":
            cache = options.cache.resolve() if options.cache else None
            built = debian_image(
                options.out,
                options.layer or SMALL_LAYERS,
                encoding=options.encoding,
                suite=options.suite,
                tag=options.tag,
                cache=cache,
            )
            print(
                f"{options.out}: {built.entries} entries, {built.tar_bytes / 2**20:.0f} MiB of tar, "
                f"{built.blob_bytes / 2**20:.0f} MiB of blobs",
                file=sys.stderr,
            )
            print(built.digest)
        else:
            layout = Layout(options.out)
            print(
                layout.image(
                    [layout.layer_from_directory(path, options.encoding) for path in options.directories], options.tag
                )
            )
    except Unavailable as error:
        print(f"not available: {error}", file=sys.stderr)
        return 77
    return 0


if __name__ == "__main__":
    sys.exit(main())
