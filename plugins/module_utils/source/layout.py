# Copyright (c) composefs.oci contributors
# SPDX-License-Identifier: BSD-2-Clause

"""OCI layouts on this host, as a directory (``oci:``) or in an archive (``oci-archive:``), read without any program.

Follows the OCI image specification, "Image Layout". Blobs are read where they lie, so there is no pipe and no
unpacked copy, and only the importer hashes them. Every proof holds as for a registry: documents are checked against
their digests here, and layers against digest, size and diff_id where they are imported.
"""

from __future__ import annotations

import os
import stat
from typing import Protocol

from ..formats import indexes, ocidocuments
from ..host import machine
from ..errors import ImageNotFound, InvalidDocument, InvalidReference, UnsupportedMediaType, doing, from_os_error
from .archive import Archive
from ..formats.digests import digest_of
from ..formats.ocidocuments import MAX_CONFIG, MAX_MANIFEST, Descriptor, Manifest, Platform
from ..formats.reference import Reference
from .source import Facts, Resolved, Source, Transfer

_NAME = "org.opencontainers.image.ref.name"
_INDEXES = (ocidocuments.OCI_INDEX, ocidocuments.DOCKER_LIST)


class LayoutTransfer(Transfer):
    """A blob that lies in a file. The source has no verdict on it: our own proofs decide."""

    def verdict(self) -> None:
        return


class _Files(Protocol):
    """The files of a layout, by their names in it."""

    def read(self, name: str, limit: int) -> bytes:
        """The whole file."""

    def open(self, name: str) -> tuple[int, int]:
        """An fd that gives the file from its beginning, and the file's size."""


class _Directory:
    """The files of a layout that is a directory."""

    def __init__(self, fd: int, path: str) -> None:
        self.path = path
        self._fd = fd

    def open(self, name: str) -> tuple[int, int]:
        try:
            # A FIFO must not make us wait, and a device must not be read.
            fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=self._fd)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise ImageNotFound(
                f"There is no {name} in the layout {self.path}.", "Check the path; the layout may be incomplete."
            ) from error
        except OSError as error:
            raise from_os_error(error, f"Opening {name} in the layout {self.path}") from error
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            os.close(fd)
            raise InvalidDocument(f"{name} in the layout {self.path} is not a regular file.", "Copy the layout again.")
        return fd, found.st_size

    def read(self, name: str, limit: int) -> bytes:
        fd, size = self.open(name)
        with os.fdopen(fd, "rb") as file, doing(f"Reading {name} in the layout {self.path}"):
            data = file.read(limit + 1)
        if len(data) > limit:
            raise InvalidDocument(f"{name} in the layout {self.path} has {size} bytes; at most {limit} are taken.")
        return data


class LayoutSource(Source):
    """Layouts of one host; each is opened once."""

    name = "the layout"

    def __init__(self, platform: Platform | None, policy: str) -> None:
        """``policy``: how the policy for signatures was applied to what is read here."""
        self._platform = platform
        self._policy = policy
        self._opened: dict[tuple[str, str], tuple[int, _Files]] = {}

    def _files(self, reference: Reference) -> _Files:
        key = (reference.transport, reference.path)
        if key not in self._opened:
            archived = reference.transport == "oci-archive"
            try:
                fd = os.open(
                    reference.path, os.O_RDONLY | os.O_CLOEXEC | (os.O_NONBLOCK if archived else os.O_DIRECTORY)
                )
            except FileNotFoundError as error:
                raise ImageNotFound(f"There is no {reference.path} on this host.", "Check the path.") from error
            except NotADirectoryError as error:
                raise InvalidReference(
                    f"{reference.path} is not a directory.", "Write oci-archive: in front of an archive."
                ) from error
            except OSError as error:
                raise from_os_error(error, f"Opening {reference.path}") from error
            try:
                if archived and not stat.S_ISREG(os.fstat(fd).st_mode):
                    raise InvalidReference(f"{reference.path} is not a file.", "Write oci: in front of a directory.")
                with doing(f"Opening {reference.text}"):
                    files = Archive(fd, reference.path) if archived else _Directory(fd, reference.path)
            except BaseException:
                os.close(fd)
                raise
            self._opened[key] = (fd, files)
        return self._opened[key][1]

    def _blob(self, reference: Reference, descriptor: Descriptor, limit: int, what: str) -> bytes:
        """A document, proved against its descriptor."""
        if descriptor.size > limit:
            raise InvalidDocument(f"The {what} {descriptor.digest} has {descriptor.size} bytes; at most {limit} fit.")
        raw = self._files(reference).read(_blob_name(descriptor.digest), limit)
        with doing(f"Opening {reference.text}"):
            return indexes.proved(raw, descriptor, what)

    # -- the source

    def resolve(self, reference: Reference) -> Resolved:
        """See Source.resolve. ``index.json`` is the layout's table of contents, so its digest is not returned as that
        of an index; the digest of an index that it lists is.
        """
        raw = self._files(reference).read("index.json", MAX_MANIFEST)
        with doing(f"Opening {reference.text}"):
            entries = ocidocuments.parse_index(raw).manifests
            top = _named(reference, entries)
            wanted = self._platform or machine.own_platform()
            index_digest, platform = None, None
            if isinstance(top, tuple):
                chosen = indexes.among([indexes.Chosen(entry, entry.platform) for entry in top], wanted)
                top, platform = chosen
            if top.media_type in _INDEXES:
                index_digest = top.digest
                chosen = indexes.choose(
                    self._blob(reference, top, MAX_MANIFEST, "index"),
                    wanted,
                    lambda entry: self._blob(reference, entry, MAX_MANIFEST, "index"),
                )
                top, platform = chosen
            manifest = self._blob(reference, top, MAX_MANIFEST, "manifest")
            if ocidocuments.parse_manifest(manifest).media_type != ocidocuments.OCI_MANIFEST:
                raise UnsupportedMediaType(
                    f"The manifest {top.digest} is Docker's, which an OCI layout does not hold.",
                    "Make the layout again, for example with skopeo copy --format oci.",
                )
            return Resolved(reference, digest_of(manifest), manifest, index_digest, platform)

    def config(self, resolved: Resolved, manifest: Manifest) -> bytes:
        return self._blob(resolved.reference, manifest.config, MAX_CONFIG, "configuration")

    def transfer(self, reference: Reference, blob: Descriptor) -> LayoutTransfer:
        fd, size = self._files(reference).open(_blob_name(blob.digest))
        if size != blob.size:
            os.close(fd)
            raise indexes.mismatch(
                f"The blob {blob.digest} of {reference.original} has {size} bytes, the manifest says {blob.size}."
            )
        return LayoutTransfer(fd)

    def facts(self) -> Facts:
        return Facts(policy=self._policy)

    def close(self) -> None:
        while self._opened:
            os.close(self._opened.popitem()[1][0])


def _blob_name(digest: str) -> str:
    return "blobs/" + digest.replace(":", "/")


def _named(reference: Reference, entries: tuple[Descriptor, ...]) -> Descriptor | tuple[Descriptor, ...]:
    """What ``reference`` names in the table of contents: one entry, or several that are told apart by their
    platforms.
    """
    name = reference.name[len(reference.path) + 1 :]
    if name.startswith("@"):
        if not name[1:].isdigit() or len(name) > 6 or int(name[1:]) >= len(entries):
            raise ImageNotFound(
                f"{reference.text} has no image number {name[1:]!r:.20}.", f"There are {len(entries)}, from @0 on."
            )
        return entries[int(name[1:])]
    found = tuple(entry for entry in entries if not name or entry.annotations.get(_NAME) == name)
    if len({entry.digest for entry in found}) == 1:
        return found[0]
    names = sorted({entry.annotations[_NAME] for entry in entries if _NAME in entry.annotations})
    known = f"Its names are {', '.join(names)}."[:1000] if names else "None of its images has a name."
    if not found:
        raise ImageNotFound(
            f"There is no image {name!r:.200} in {reference.path}." if name else f"{reference.path} holds no image.",
            known,
        )
    if all(entry.platform is not None for entry in found) and (name or not names):
        return found
    raise InvalidReference(
        f"{reference.path} holds {len(found)} images.",
        f"Name one of them after the path, separated by a colon (or @ and its number). {known}",
    )
