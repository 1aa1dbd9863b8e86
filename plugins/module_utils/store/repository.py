# Copyright (c) composefs.oci contributors
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause

"""A composefs repository: its description, lock, streams, images and tags (composefs repository format, as written by
cfsctl 0.9).

Objects are the business of ``objects``; what streams contain, that of ``splitstream`` and ``documents``. The order in
which things become durable is the caller's story, told with ``importing`` (the mark), ``sync`` (the barrier),
``register`` and ``tag``: objects, the stream's own object, the barrier, ``streams/<id>``, and refs last.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ..formats import digests, fsverity, repolayout
from ..host import files, filesystem
from . import marks
from ..errors import (
    Busy,
    DigestMismatch,
    EngineError,
    FormatError,
    ImageNotFound,
    IncompatibleRepository,
    InvalidReference,
    NotARepository,
    VerityUnsupported,
    doing,
    from_os_error,
)
from ..formats.metajson import MAX_SIZE, NAME, Metadata
from .objects import ObjectStore
from ..text import from_file_name

if TYPE_CHECKING:
    from ..formats.splitstream import Splitstream

SYSTEM_PATH = "/sysroot/composefs"
USER_PATH = "~/.var/lib/composefs"
LOCK_WAIT = 600.0
_TRUSTED = f"{marks.DIRECTORY}/trusted"
_TEMPORARY_LINK = ".symlink-"


class Repository:
    """An open repository and its lock. Use as a context manager, or ``close``.

    Everyone holds the lock shared, readers and writers alike; only a collection of garbage holds it alone. So an object
    that was written or found here does not vanish before it has a name.
    """

    def __init__(self, path: str, fd: int, metadata: Metadata, secure: bool) -> None:
        """For ``open``. ``fd``: the repository's directory, locked; taken over."""
        self.path = path
        self.metadata = metadata
        self.secure = secure
        self.algorithm = metadata.algorithm
        self.fd = fd
        self._writable = False
        self._objects_fd = -1
        self._objects: ObjectStore | None = None
        self._mark: marks.ImportMark | None = None

    @classmethod
    def open(cls, path: str, *, write: bool = False, wait: float = LOCK_WAIT) -> Repository:
        """Open the repository at ``path``, waiting up to ``wait`` seconds for its lock (Busy then).

        NotARepository if there is none, IncompatibleRepository if it needs what is not known here. With ``write`` also
        ReadOnly or PermissionDenied; without it, ``require_writable`` asks later. Creates nothing.
        """
        path = os.path.abspath(path)
        try:
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise NotARepository(f"There is no composefs repository at {path}.", _MAKE) from error
        except OSError as error:
            raise from_os_error(error, f"Opening the repository {path}") from error
        try:
            with doing(f"Opening the repository {path}"):
                _lock(fd, fcntl.LOCK_SH, wait)
                metadata, secure = _read_metadata(path, fd)
                metadata.check_readable()
            repository = cls(path, fd, metadata, secure)
            if write:
                repository.require_writable()
            return repository
        except BaseException:
            os.close(fd)
            raise

    def close(self) -> None:
        """Let go of the lock and everything else; an import that was not ended stays marked as unfinished."""
        if self._mark is not None:
            self._mark.abandon()
            self._mark = None
        if self._objects_fd >= 0:
            os.close(self._objects_fd)
            self._objects_fd = -1
            self._objects = None
        if self.fd >= 0:
            # Closing, not unlocking: workers that still run hold the same lock, and it must last as long as they.
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Repository:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def require_writable(self) -> None:
        """Raise ReadOnly, PermissionDenied or IncompatibleRepository unless this user may write here, and prepare for
        it.
        """
        if not self._writable:
            self.metadata.check_writable()
            filesystem.require_writable(self.fd, self.path)
            self._writable = True

    @contextlib.contextmanager
    def exclusive(self, wait: float = LOCK_WAIT) -> Iterator[None]:
        """Hold the lock alone, for a collection. The kernel gives up the shared lock first, so look at everything anew
        inside.
        """
        with doing(f"Locking the repository {self.path}"):
            try:
                _lock(self.fd, fcntl.LOCK_EX, wait)
            except BaseException:
                _lock(self.fd, fcntl.LOCK_SH, wait)
                raise
        try:
            yield
        finally:
            _lock(self.fd, fcntl.LOCK_SH, wait)

    # --- objects
    # ----------------------------------------------------------------------------------------------------------------

    @property
    def objects(self) -> ObjectStore:
        """The object store. Where nobody has stored anything yet, a reader gets an empty one and a writer makes the
        directory.
        """
        if self._objects is None or (self._writable and self._objects_fd < 0):
            try:
                with doing(f"Opening {self.path}/objects"):
                    if self._writable:
                        self._mkdir("objects")
                    self._objects_fd = os.open("objects", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self.fd)
            except EngineError as error:
                if self._writable or not isinstance(error.__cause__, FileNotFoundError):
                    raise
            # No object's name exists in the repository's own directory, so that stands for the empty store.
            dirfd = self._objects_fd if self._objects_fd >= 0 else self.fd
            self._objects = ObjectStore(dirfd, self.algorithm, verity=self.secure, try_verity=True)
            self._objects.hash_first = bool(self.streams())
        return self._objects

    def sync(self) -> None:
        """The barrier: returns when everything written so far is durable. NoSpace or IOFailed if the kernel failed to
        write.
        """
        filesystem.sync(self.fd)
        if self._objects_fd >= 0 and os.fstat(self._objects_fd).st_dev != os.fstat(self.fd).st_dev:
            with doing(f"Opening {self.path}/objects"):
                fd = os.open("objects", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self.fd)
            try:
                filesystem.sync(fd)
            finally:
                os.close(fd)

    def begin_import(self) -> marks.Recovery:
        """Before the first object is stored: repair what a power cut left, then mark this import as begun. See
        ``imports``.
        """
        self.require_writable()
        if self.secure or self._mark is not None:
            return marks.Recovery()
        found = marks.recover(self.fd, self.objects)
        self._mark = marks.ImportMark(self.fd)
        return found

    def end_import(self) -> None:
        """After the last object was stored and the last name made: one more barrier, and the import is not marked as
        unfinished any more.

        The barrier is for repositories without a mark, too: what the caller is about to report as done must outlive a
        power cut, names included.
        """
        self.sync()
        if self._mark is not None:
            with doing("Ending the import"):
                self._mark.remove()
            self._mark = None

    @contextlib.contextmanager
    def importing(self) -> Iterator[marks.Recovery]:
        """``begin_import`` and ``end_import`` around a block, also when the block fails: what it stored by then is
        whole.
        """
        found = self.begin_import()
        try:
            yield found
        except BaseException:
            # The failure is the news; a barrier that fails as well leaves the mark, which is right.
            with contextlib.suppress(EngineError):
                self.end_import()
            raise
        self.end_import()

    # --- streams and images
    # ------------------------------------------------------------------------------------------------------------------

    def stream(self, name: str) -> bytes | None:
        """The digest of the object behind ``streams/<name>``, or None. It is not looked at whether the object
        exists.
        """
        return self._object_behind(f"streams/{name}")

    def streams(self, prefix: str = "") -> list[str]:
        """The names in ``streams/`` that begin with ``prefix``, sorted."""
        return sorted(name for name in self._list("streams") if name.startswith(prefix) and name != "refs")

    def open_stream(self, name: str, expect: bytes | None = None) -> contextlib.AbstractContextManager[Splitstream]:
        """The stream ``name``, of content type ``expect`` if given; see ``open_object_stream``. FormatError if there is
        none.
        """
        digest = self.stream(name)
        if digest is None:
            raise FormatError(f"There is no stream {name} in the repository {self.path}.", "Pull the image again.")
        return self.open_object_stream(digest, expect)

    @contextlib.contextmanager
    def open_object_stream(self, digest: bytes, expect: bytes | None = None) -> Iterator[Splitstream]:
        """The splitstream in the object ``digest``, for the duration of a ``with``. FormatError if it is not one or not
        of the type ``expect``.
        """
        from ..formats.splitstream import Splitstream

        with os.fdopen(self.objects.open(digest), "rb") as file:
            with doing(f"Reading the splitstream {digest.hex()}"):
                stream = Splitstream.open(file, self.algorithm, expect)
            yield stream

    def register(self, name: str, digest: bytes) -> bool:
        """Make ``streams/<name>`` lead to the object ``digest``; True if it did not before. The caller has synced what
        it leads to.
        """
        repolayout.check_file_name(name, name, "stream name")
        if name == "refs":
            raise InvalidReference("A stream cannot be named refs.", "Choose another name.")
        return self._link(f"streams/{name}", f"objects/{fsverity.object_path(digest)}")

    def unregister(self, name: str) -> bool:
        """Remove ``streams/<name>``; False if it was not there. The objects stay until a collection."""
        return self._unlink(f"streams/{name}")

    def image(self, digest: bytes) -> bool:
        """Whether ``images/<hex>`` exists and leads to the object ``digest``."""
        return self._object_behind(f"images/{digest.hex()}") == digest

    def link_image(self, digest: bytes) -> bool:
        """Make ``images/<hex>`` for the EROFS image in the object ``digest``, so that it may be mounted; True if it was
        not there.
        """
        return self._link(f"images/{digest.hex()}", f"objects/{fsverity.object_path(digest)}")

    def image_refs(self, prefix: str) -> dict[str, bytes]:
        """The links below ``images/refs/<prefix>``, name (from there) to image digest; those that lead elsewhere are
        left out.
        """
        base = f"{repolayout.IMAGE_REFS}/{prefix}"
        found: dict[str, bytes] = {}
        for path in self._walk(base):
            with contextlib.suppress(FormatError):
                name = (self._readlink(path) or "").rsplit("/", 1)[-1]
                found[path[len(base) + 1 :]] = fsverity.parse_hex(name, self.algorithm)
        return found

    def link_image_ref(self, name: str, digest: bytes) -> bool:
        """Make ``images/refs/<name>`` lead to the image ``digest``, which every collector then keeps with all its
        objects; True if it did not before.

        The link must never dangle, or ``cfsctl gc`` stops: ImageNotFound if there is no such image.
        """
        if not self.image(digest):
            raise ImageNotFound(
                f"The repository {self.path} lists no EROFS image {digest.hex()}.", "Pull the image again."
            )
        return self._link(f"{repolayout.IMAGE_REFS}/{name}", f"images/{digest.hex()}")

    def unlink_image_ref(self, name: str) -> bool:
        """Remove ``images/refs/<name>``, and the directory it was the last in; False if it was not there."""
        path = f"{repolayout.IMAGE_REFS}/{name}"
        removed = self._unlink(path)
        with contextlib.suppress(OSError):
            os.rmdir(os.path.dirname(path), dir_fd=self.fd)
        return removed

    # --- tags
    # ----------------------------------------------------------------------------------------------------------------

    def check_tag_name(self, name: str) -> None:
        """Raise InvalidReference unless an image can get this name; ask before doing work for it."""
        repolayout.check_tag_name(name)

    def tags(self) -> dict[str, str]:
        """All tags, name to manifest digest (``sha256:<hex>``), sorted by name; also those whose manifest is gone (ask
        ``stream``).
        """
        found: dict[str, str] = {}
        for path in self._walk(repolayout.TAGS):
            digest = repolayout.manifest_of_target(self._readlink(path) or "")
            name = repolayout.decode_tag(path[len(repolayout.TAGS) + 1 :])
            # A name with a slash may also lie in a directory, put there by hand; the encoded form is the one that tools
            # write.
            if digest is not None and (name not in found or "/" not in path[len(repolayout.TAGS) + 1 :]):
                found[name] = digest
        return dict(sorted(found.items()))

    def tag_digest(self, name: str) -> str | None:
        """The digest of the manifest that ``name`` means, or None."""
        return repolayout.manifest_of_target(self._readlink(_tag_path(name)) or "")

    def tag_time(self, name: str, manifest_digest: str) -> float:
        """When ``name`` was made to mean that manifest, in seconds since the epoch; now, if it does not."""
        if self.tag_digest(name) == manifest_digest:
            with contextlib.suppress(OSError):
                return os.stat(_tag_path(name), dir_fd=self.fd, follow_symlinks=False).st_mtime
        return time.time()

    def tag(self, name: str, manifest_digest: str) -> str | None:
        """Make ``name`` mean the stored manifest ``sha256:<hex>``; the digest it meant before. ImageNotFound if that is
        not stored.
        """
        repolayout.check_tag_name(name)
        stream = repolayout.MANIFEST_PREFIX + manifest_digest
        if not digests.is_oci_digest(manifest_digest) or self.stream(stream) is None:
            raise ImageNotFound(
                f"There is no manifest {manifest_digest} in the repository {self.path}.", "Pull the image first."
            )
        previous = self.tag_digest(name)
        self._link(_tag_path(name), f"streams/{stream}")
        return previous

    def untag(self, name: str) -> bool:
        """Remove the tag; False if there is none. The image's data stays until a collection."""
        return self._unlink(_tag_path(name))

    # --- proofs
    # ----------------------------------------------------------------------------------------------------------------

    def trusted(self, diff_id: str) -> bytes | None:
        """The stream object whose tar was once proven to have the digest ``diff_id``, or None."""
        text = self._readlink(f"{_TRUSTED}/{diff_id}") if digests.is_oci_digest(diff_id) else None
        try:
            return fsverity.parse_hex(text, self.algorithm) if text is not None else None
        except FormatError:
            return None

    def trust(self, diff_id: str, digest: bytes) -> None:
        """Remember that proof. It only spares hashing again, so where this user may not write it is not kept."""
        try:
            self.require_writable()
        except EngineError:
            return
        if digests.is_oci_digest(diff_id) and self.trusted(diff_id) != digest:
            self._symlink(f"{_TRUSTED}/{diff_id}", digest.hex())

    # --- the place
    # ----------------------------------------------------------------------------------------------------------------

    def free_space(self) -> tuple[int, int | None]:
        """Free bytes, and free inodes or None where the file system does not count them."""
        with doing(f"Looking at the free space of {self.path}"):
            return filesystem.free_space(self.fd)

    def filesystem(self) -> str:
        """The type of the file system, for example ``ext4``."""
        return filesystem.type_of(self.fd)

    def supports_verity(self) -> bool:
        """Whether fs-verity works here, tried out on a file without a name. EngineError if no file can be made."""
        return filesystem.missing_ability(self.fd, self.algorithm) is None

    # --- how
    # ----------------------------------------------------------------------------------------------------------------

    def _object_behind(self, path: str) -> bytes | None:
        text = self._readlink(path)
        if text is None:
            return None
        if not text.startswith("../"):
            raise FormatError(
                f"{self.path}/{path} leads to {text[:200]!r}, which is not an object of this repository.", _DAMAGED
            )
        with doing(f"Reading {self.path}/{path}"):
            return fsverity.parse_object_path(text, self.algorithm)

    def _readlink(self, path: str) -> str | None:
        """The text of a symbolic link, None if there is nothing. FormatError if something else is there."""
        try:
            return os.readlink(path, dir_fd=self.fd)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            if error.errno == errno.EINVAL:
                raise FormatError(f"{self.path}/{path} is not a symbolic link.", _DAMAGED) from error
            if error.errno == errno.ENAMETOOLONG:
                return None
            raise from_os_error(error, f"Reading {self.path}/{path}") from error

    def _list(self, path: str) -> list[str]:
        try:
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self.fd)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise from_os_error(error, f"Listing {self.path}/{path}") from error
        try:
            return [name for name in os.listdir(fd) if _is_text(name)]
        finally:
            os.close(fd)

    def _walk(self, path: str) -> Iterator[str]:
        """Every symbolic link below the directory ``path``, relative to the repository; anything else but directories
        is passed over.
        """
        for name in sorted(self._list(path)):
            inner = f"{path}/{name}"
            try:
                os.readlink(inner, dir_fd=self.fd)
            except FileNotFoundError:
                continue
            except OSError:
                if os.path.isdir(f"/proc/self/fd/{self.fd}/{inner}"):
                    yield from self._walk(inner)
                continue
            yield inner

    def _link(self, name: str, target: str) -> bool:
        return self._symlink(name, repolayout.link_text(name, target))

    def _symlink(self, name: str, text: str) -> bool:
        """Make the symbolic link ``name`` with exactly this text, replacing another in one step; True if anything
        changed.

        A name is never missing for a moment: where something is there already, the new link is made under a temporary
        name in the repository's own directory and renamed over it.
        """
        self.require_writable()
        if self._readlink(name) == text:
            return False
        with doing(f"Linking {self.path}/{name}"):
            parents = name.split("/")[:-1]
            for depth in range(len(parents)):
                self._mkdir("/".join(parents[: depth + 1]))
            try:
                os.symlink(text, name, dir_fd=self.fd)
                return True
            except FileExistsError:
                temporary = _TEMPORARY_LINK + os.urandom(6).hex()
                os.symlink(text, temporary, dir_fd=self.fd)
            try:
                os.rename(temporary, name, src_dir_fd=self.fd, dst_dir_fd=self.fd)
            except BaseException:
                os.unlink(temporary, dir_fd=self.fd)
                raise
        return True

    def _unlink(self, name: str) -> bool:
        self.require_writable()
        if self._readlink(name) is None:
            return False
        with doing(f"Removing {self.path}/{name}"):
            try:
                os.unlink(name, dir_fd=self.fd)
            except FileNotFoundError:
                return False
        return True

    def _mkdir(self, path: str) -> None:
        files.make_directory(self.fd, path)


def default_path() -> str:
    """Where ``cfsctl`` without further options has its repository: the system's for root, else one in the
    user's home.
    """
    return SYSTEM_PATH if os.geteuid() == 0 else os.path.expanduser(USER_PATH)


_MAKE = "Make one with the module composefs_repository (or cfsctl init), or correct the path."
_DAMAGED = "Remove it and pull the image again."


def _tag_path(name: str) -> str:
    # Looking up and removing must also reach names that must not be given, such as those that other programs gave.
    encoded = repolayout.encode_tag(name)
    if encoded in ("", ".", "..") or "\0" in encoded or not _is_text(encoded):
        repolayout.check_file_name(name, from_file_name(encoded), "image name")
    return f"{repolayout.TAGS}/{encoded}"


def _is_text(name: str) -> bool:
    try:
        from_file_name(name).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _lock(fd: int, kind: int, wait: float) -> None:
    """flock the open directory, asking again for ``wait`` seconds; Busy after that."""
    deadline = time.monotonic() + wait
    pause = 0.01
    while True:
        try:
            fcntl.flock(fd, kind | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() >= deadline:
                who = "garbage is being collected" if kind == fcntl.LOCK_SH else "it is in use"
                raise Busy(f"The repository stayed locked for {wait:g} seconds: {who}.", "Try again later.") from None
        time.sleep(pause)
        pause = min(pause * 2, 0.5)


def _read_metadata(path: str, fd: int) -> tuple[Metadata, bool]:
    """meta.json, and whether it is sealed: that alone makes a repository secure, there is no field for it."""
    try:
        file = os.open(NAME, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=fd)
    except FileNotFoundError:
        if os.path.isdir(f"/proc/self/fd/{fd}/objects"):
            raise NotARepository(
                f"{path} has objects but no {NAME}: it was made by a program older than composefs-rs 0.7.",
                "The module composefs_repository upgrades it, and so does any cfsctl command that writes.",
            ) from None
        raise NotARepository(f"{path} is no composefs repository: it has no {NAME}.", _MAKE) from None
    try:
        raw = os.read(file, MAX_SIZE)
        metadata = Metadata.parse(raw)
        try:
            measured = fsverity.measure(file, metadata.algorithm)
        except VerityUnsupported:
            measured = None
        except DigestMismatch as error:
            raise IncompatibleRepository(
                f"{NAME} is sealed with another algorithm than {metadata.algorithm.name}, which it names.",
                "Restore it.",
            ) from error
    finally:
        os.close(file)
    if measured is not None and measured != fsverity.digest(raw, metadata.algorithm):
        raise FormatError(
            f"{NAME} is sealed with another fs-verity digest than its content has.", "Restore the repository."
        )
    return metadata, measured is not None
