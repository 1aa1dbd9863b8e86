# Copyright (c) composefs.oci contributors
# SPDX-License-Identifier: BSD-2-Clause

"""A composefs repository: its description, lock, streams, images and tags (composefs repository format, as written by
cfsctl 0.9).

Objects are the business of ``objects``, and what streams contain that of ``splitstream`` and ``imagestreams``. The
caller decides in which order things become durable, with ``importing`` (the mark), ``sync`` (the barrier), ``register``
and ``tag``: objects, the stream's own object, the barrier, ``streams/<id>``, and refs last.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

from ..formats.repolayout import StreamName
from ..formats.digests import ObjectDigest, StreamDigest
from ..formats import digests, fsverity, repolayout
from ..host import beneath, files, filesystem, locks
from . import marks
from ..errors import (
    DigestMismatch,
    EngineError,
    FormatError,
    ImageNotFound,
    IncompatibleRepository,
    InvalidReference,
    NotARepository,
    UnsafeRepository,
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
LOCK_WAIT = marks.LOCK_WAIT
_TRUSTED = f"{marks.DIRECTORY}/trusted"
MAX_DEPTH = 64
"""Directories that may lie within each other below those of names."""
_TEMPORARY_LINK = ".symlink-"

_UNKNOWN = "unknown-"


class Foreseen(NamedTuple):
    """What will be in a repository when earlier tasks of a run in check mode have done what they foretold: the manifest
    that a name will mean, ``unknown`` where that cannot be known yet, None if it will be gone; and streams, by
    ``short``, that will be fetched, ``complete`` if those are all.
    """

    names: Mapping[str, str | None] = {}
    streams: frozenset[str] = frozenset()
    complete: bool = True

    @staticmethod
    def unknown(name: str) -> str:
        """What stands for the manifest of ``name`` where nobody could be asked about it, and for no other's."""
        import hashlib  # late: outside of check mode nothing needs it here

        return _UNKNOWN + hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()

    @staticmethod
    def known(digest: str | None) -> str | None:
        """``digest`` as it can be told: None if it only stands for one that is not known."""
        return None if digest is None or digest.startswith(_UNKNOWN) else digest

    @property
    def certain(self) -> bool:
        """Whether every manifest that will be there is known."""
        return all(digest is None or self.known(digest) is not None for digest in self.names.values())

    def brings(self, digest: str) -> bool:
        """Whether the manifest ``digest`` is, or may be, one that a name will mean."""
        return digest in self.names.values() or not self.certain

    @staticmethod
    def short(stream: str) -> str:
        """A stream's name without most of its digest."""
        return stream[:-48]


class Described(NamedTuple):
    """What a repository says of itself: ``meta.json``, and whether that is sealed."""

    metadata: Metadata
    secure: bool


class Repository:
    """An open repository and its lock. Use as a context manager, or ``close``.

    Everyone holds the lock shared, readers and writers alike; only a collection of garbage holds it alone. So an object
    that was written or found here does not vanish before it has a name.
    """

    def __init__(self, root: beneath.Root, metadata: Metadata, secure: bool) -> None:
        """For ``open``. ``root`` is the repository's directory, locked; ``close`` closes it. Whatever lies below is
        opened through it.
        """
        self.root = root
        self.path = root.path
        # What check mode foresees; nothing else ever sets it.
        self.foreseen = Foreseen()
        # Whose file system counts for free space, if this repository stands in for one that is not there yet.
        self.place = ""
        self.metadata = metadata
        self.secure = secure
        self.algorithm = metadata.algorithm
        self._writable = False
        self._objects_fd = -1
        self._objects: ObjectStore | None = None
        self._mark: marks.ImportMark | None = None

    @classmethod
    def open(
        cls,
        path: str,
        *,
        write: bool = False,
        wait: float = LOCK_WAIT,
        unsafe: str = beneath.REFUSE,
        described: Described | None = None,
    ) -> Repository:
        """Open the repository at ``path``, waiting up to ``wait`` seconds for its lock (Busy then).

        NotARepository if there is none, IncompatibleRepository if it needs what is not known here, UnsafeRepository if
        somebody else than root and the caller owns it or can write to it, unless ``unsafe`` is ACCEPT. With ``write``
        also ReadOnly or PermissionDenied; without it, ``require_writable`` asks later. Creates nothing. ``described``:
        what a repository without ``meta.json`` is taken for, in check mode.
        """
        path = os.path.abspath(path)
        try:
            root = beneath.open_root(path, unsafe == beneath.ACCEPT)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise NotARepository(f"There is no composefs repository at {path}.", _MAKE) from error
        except OSError as error:
            raise from_os_error(error, f"Opening the repository {path}") from error
        try:
            with doing(f"Opening the repository {path}"):
                root.require_safe()
                _lock(root.fd, locks.SHARED, wait)
                try:
                    metadata, secure = read_metadata(root)
                except NotARepository:
                    if described is None:
                        raise
                    metadata, secure = described
                metadata.check_readable()
            repository = cls(root, metadata, secure)
            if write:
                repository.require_writable()
            return repository
        except BaseException:
            root.close()
            raise

    @property
    def fd(self) -> int:
        """The repository's own directory, open for reading."""
        return self.root.fd

    def close(self) -> None:
        """Let go of the lock and everything else; an import that was not ended stays marked as unfinished."""
        if self._mark is not None:
            self._mark.abandon()
            self._mark = None
        if self._objects is not None:
            self._objects.close()
            self._objects = None
        if self._objects_fd >= 0:
            os.close(self._objects_fd)
            self._objects_fd = -1
        # The directory is closed, not unlocked: workers that still run hold the same lock, which must last as long as
        # they do.
        self.root.close()

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
                _lock(self.fd, locks.EXCLUSIVE, wait)
            except BaseException:
                _lock(self.fd, locks.SHARED, wait)
                raise
        try:
            yield
        finally:
            _lock(self.fd, locks.SHARED, wait)

    @contextlib.contextmanager
    def lock(
        self,
        name: str,
        wait: float = LOCK_WAIT,
        tell: Callable[[str], None] | None = None,
        keep: bool = True,
    ) -> Iterator[bool]:
        """Hold the lock ``name`` of this repository for the duration of a ``with``: ``publish``, ``layer-<diff_id>``.

        It binds programs of this collection only. Busy, with the holders, after ``wait`` seconds; ``tell`` is called
        with the holders when there is something to wait for, and the value tells whether there was. A holder that dies
        frees it. ``keep``: the file stays for the next.
        """
        self.require_writable()
        with doing(f"Locking {self.path}/{marks.LOCKS}/{name}"):
            directory = self.root.open_directory(marks.LOCKS, os.O_PATH, make=True)
        try:
            with locks.lock_file(directory, name, wait, f"The lock {name} of {self.path} was taken", tell, keep) as had:
                yield had
        finally:
            os.close(directory)

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
                    self._objects_fd = self.root.open_directory("objects", os.O_PATH, make=self._writable)
            except EngineError as error:
                if self._writable or not isinstance(error.__cause__, FileNotFoundError):
                    raise
            # No object's name exists in the repository's own directory, so that stands for the empty store.
            dirfd = self._objects_fd if self._objects_fd >= 0 else self.fd
            self._objects = ObjectStore(self.root, dirfd, self.algorithm, verity=self.secure, try_verity=True)
            self._objects.hash_first = bool(self.streams())
        return self._objects

    def sync(self) -> None:
        """The barrier: returns when everything written so far is durable. NoSpace or IOFailed if the kernel failed to
        write.
        """
        filesystem.sync(self.fd)
        if self._objects_fd >= 0 and os.fstat(self._objects_fd).st_dev != os.fstat(self.fd).st_dev:
            with doing(f"Opening {self.path}/objects"):
                fd = self.root.open_directory("objects")
            try:
                filesystem.sync(fd)
            finally:
                os.close(fd)

    def begin_import(self) -> marks.Recovery:
        """Before the first object is stored: repair what a power cut left, then mark this import as begun. See
        ``marks``.
        """
        self.require_writable()
        if self._mark is not None:
            return marks.Recovery()
        if self.secure:
            # Without marks nobody knows who else is importing, but no import takes as long as a day.
            return marks.Recovery(litter=marks.tidy(self.root, time.time() - marks.DAY))
        found = marks.recover(self.root, self.objects)
        self._mark = marks.ImportMark(self.root)
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
            # The first failure is the one to report. If the barrier fails as well, the mark stays, which is right.
            with contextlib.suppress(EngineError):
                self.end_import()
            raise
        self.end_import()

    # --- streams and images
    # ------------------------------------------------------------------------------------------------------------------

    def stream(self, name: StreamName) -> StreamDigest | None:
        """The digest of the object behind ``streams/<name>``, or None. Whether the object exists is not checked."""
        digest = self._object_behind(f"streams/{name}")
        return None if digest is None else StreamDigest(digest)

    def streams(self, prefix: str = "") -> list[StreamName]:
        """The names in ``streams/`` that begin with ``prefix``, sorted."""
        return sorted(StreamName(name) for name in self._list("streams") if name.startswith(prefix) and name != "refs")

    @contextlib.contextmanager
    def open_object_stream(self, digest: StreamDigest, expect: bytes | None = None) -> Iterator[Splitstream]:
        """The splitstream in the object ``digest``, for the duration of a ``with``. FormatError if it is not one or not
        of the type ``expect``.
        """
        from ..formats.splitstream import Splitstream

        with os.fdopen(self.objects.open(digest), "rb") as file:
            with doing(f"Reading the splitstream {digest.hex()}"):
                stream = Splitstream.open(file, self.algorithm, expect)
            yield stream

    def register(self, name: StreamName, digest: StreamDigest) -> bool:
        """Make ``streams/<name>`` lead to the object ``digest``; True if it did not before. The caller has synced what
        it leads to.
        """
        repolayout.check_file_name(name, name, "stream name")
        if name == "refs":
            raise InvalidReference("A stream cannot be named refs.", "Choose another name.")
        return self._link(f"streams/{name}", f"objects/{fsverity.object_path(digest)}")

    def unregister(self, name: StreamName) -> bool:
        """Remove ``streams/<name>``; False if it was not there. The objects stay until a collection."""
        return self._unlink(f"streams/{name}")

    def image(self, digest: ObjectDigest) -> bool:
        """Whether ``images/<hex>`` exists and leads to the object ``digest``."""
        return self._object_behind(f"images/{digest.hex()}") == digest

    def link_image(self, digest: ObjectDigest) -> bool:
        """Make ``images/<hex>`` for the EROFS image in the object ``digest``, so that it may be mounted; True if it was
        not there.
        """
        return self._link(f"images/{digest.hex()}", f"objects/{fsverity.object_path(digest)}")

    def image_refs(self, prefix: str) -> dict[str, ObjectDigest]:
        """The links below ``images/refs/<prefix>``, name (from there) to image digest; those that lead elsewhere are
        left out.
        """
        base = f"{repolayout.IMAGE_REFS}/{prefix}"
        found: dict[str, ObjectDigest] = {}
        for path, target in self._walk(base):
            with contextlib.suppress(FormatError):
                name = target.rsplit("/", 1)[-1]
                found[path[len(base) + 1 :]] = fsverity.parse_hex(name, self.algorithm)
        return found

    def link_image_ref(self, name: str, digest: ObjectDigest) -> bool:
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
        with contextlib.suppress(OSError, EngineError), self.root.parent(os.path.dirname(path)) as (directory, last):
            os.rmdir(last, dir_fd=directory)
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
        for path, target in self._walk(repolayout.TAGS):
            digest = repolayout.manifest_of_target(target)
            name = repolayout.decode_tag(path[len(repolayout.TAGS) + 1 :])
            # A name with a slash may also lie in a directory, put there by hand; the encoded form is the one that tools
            # write.
            if digest is not None and (name not in found or "/" not in path[len(repolayout.TAGS) + 1 :]):
                found[name] = digest
        for name, digest in self.foreseen.names.items():
            found.pop(name, None)
            if digest is not None:
                found[name] = digest
        return dict(sorted(found.items()))

    def tag_digest(self, name: str) -> str | None:
        """The digest of the manifest that ``name`` means, or None."""
        if name in self.foreseen.names:
            return self.foreseen.names[name]
        return repolayout.manifest_of_target(self._readlink(_tag_path(name)) or "")

    def tag_time(self, name: str, manifest_digest: str) -> float:
        """When ``name`` was made to mean that manifest, in seconds since the epoch; now, if it does not."""
        if self.tag_digest(name) == manifest_digest:
            with contextlib.suppress(OSError), self.root.parent(_tag_path(name)) as (fd, last):
                return os.stat(last, dir_fd=fd, follow_symlinks=False).st_mtime
        return time.time()

    def tag(self, name: str, manifest_digest: str) -> str | None:
        """Make ``name`` mean the stored manifest ``sha256:<hex>``; the digest it meant before. ImageNotFound if that is
        not stored.
        """
        repolayout.check_tag_name(name)
        stream = repolayout.manifest_stream(manifest_digest)
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

    def trusted(self, diff_id: str) -> StreamDigest | None:
        """The stream object whose tar was once proven to have the digest ``diff_id``, or None.

        A proof counts only if root or the caller made it, in directories that nobody else can write to: whoever may
        rename there can give a proof another name.
        """
        if not digests.is_oci_digest(diff_id):
            return None
        try:
            with doing(f"Reading {self.path}/{_TRUSTED}"), self.root.directory(_TRUSTED, os.O_PATH, strict=True) as fd:
                text = self._own_link(fd, diff_id)
        except UnsafeRepository:
            if self.root.accept:
                return None
            raise
        except EngineError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                return None
            raise
        try:
            return StreamDigest(fsverity.parse_hex(text, self.algorithm)) if text is not None else None
        except FormatError:
            return None

    def trust(self, diff_id: str, digest: StreamDigest) -> None:
        """Remember such a proof. It only spares hashing again, so where this user may not write it is not kept."""
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
            if self.place:
                with files.opened_directory(self.place) as fd:
                    return filesystem.free_space(fd)
            return filesystem.free_space(self.fd)

    def filesystem(self) -> str:
        """The type of the file system, for example ``ext4``."""
        return filesystem.type_of(self.fd)

    # --- how
    # ----------------------------------------------------------------------------------------------------------------

    def _object_behind(self, path: str) -> ObjectDigest | None:
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
            with self.root.parent(path) as (fd, name):
                return os.readlink(name, dir_fd=fd)
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno == errno.EINVAL:
                raise FormatError(f"{self.path}/{path} is not a symbolic link.", _DAMAGED) from error
            if error.errno == errno.ENAMETOOLONG:
                return None
            raise from_os_error(error, f"Reading {self.path}/{path}") from error

    def _own_link(self, dir_fd: int, name: str) -> str | None:
        """The text of a symbolic link that root or the caller made, None if there is none. OSError passes."""
        try:
            fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=dir_fd)
        except FileNotFoundError:
            return None
        try:
            # One fd for both looks: between two opens, another link could take the name.
            found = os.fstat(fd)
            return os.readlink("", dir_fd=fd) if stat.S_ISLNK(found.st_mode) and self.root.is_ours(found) else None
        finally:
            os.close(fd)

    def _list(self, path: str) -> list[str]:
        with doing(f"Listing {self.path}/{path}"):
            return [name for name in self.root.list(path) if _is_text(name)]

    def _walk(self, path: str, depth: int = MAX_DEPTH) -> Iterator[tuple[str, str]]:
        """Every symbolic link below the directory ``path``, relative to the repository, and its text; anything else but
        directories is passed over. FormatError if these lie more than ``depth`` deep.
        """
        if not depth:
            raise too_deep(f"{self.path}/{path}")
        try:
            with doing(f"Listing {self.path}/{path}"), self.root.directory(path) as fd:
                names = sorted(name for name in os.listdir(fd) if _is_text(name))
                found = [(f"{path}/{name}", _text_of_link(fd, name)) for name in names]
        except EngineError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                return
            raise
        for inner, text in found:
            if text is None:
                yield from self._walk(inner, depth - 1)
            elif text:
                yield inner, text

    def _link(self, name: str, target: str) -> bool:
        return self._symlink(name, repolayout.link_text(name, target))

    def _symlink(self, name: str, text: str) -> bool:
        """Make the symbolic link ``name`` with exactly this text, replacing another in one step; True if anything
        changed.

        A name is never missing for a moment: where something is there already, the new link is made under a temporary
        name in the repository's own directory and renamed over it. ``host/files`` makes files only: a link cannot be
        made without a name.
        """
        self.require_writable()
        if self._readlink(name) == text:
            return False
        with doing(f"Linking {self.path}/{name}"), self.root.parent(name, make=True) as (directory, last):
            try:
                os.symlink(text, last, dir_fd=directory)
                return True
            except FileExistsError:
                temporary = files.temporary_name(_TEMPORARY_LINK)
                os.symlink(text, temporary, dir_fd=self.fd)
            try:
                os.rename(temporary, last, src_dir_fd=self.fd, dst_dir_fd=directory)
            except BaseException:
                os.unlink(temporary, dir_fd=self.fd)
                raise
        return True

    def _unlink(self, name: str) -> bool:
        self.require_writable()
        if self._readlink(name) is None:
            return False
        with doing(f"Removing {self.path}/{name}"), self.root.parent(name) as (directory, last):
            try:
                os.unlink(last, dir_fd=directory)
            except FileNotFoundError:
                return False
        return True


def default_path() -> str:
    """Where ``cfsctl`` without further options has its repository: the system's for root, else one in the
    user's home.
    """
    return SYSTEM_PATH if os.geteuid() == 0 else os.path.expanduser(USER_PATH)


def too_deep(path: str) -> FormatError:
    """The error for directories that no tool makes so deep; each level costs an open file and a part of the stack."""
    return FormatError(
        f"{path[:200]}... is deeper than the {MAX_DEPTH} directories that names may have.",
        "Find out who put it there, then remove it.",
    )


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
    why = "garbage is being collected" if kind == locks.SHARED else "it is in use"
    locks.acquire(fd, kind, wait, f"The repository stayed locked ({why})")


def _text_of_link(fd: int, name: str) -> str | None:
    """The text of a link, None for a directory, empty for anything else and for what is gone. OSError passes."""
    try:
        return os.readlink(name, dir_fd=fd)
    except FileNotFoundError:
        return ""
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    try:
        return None if stat.S_ISDIR(os.stat(name, dir_fd=fd, follow_symlinks=False).st_mode) else ""
    except FileNotFoundError:
        return ""


def read_metadata(root: beneath.Root) -> tuple[Metadata, bool]:
    """meta.json, and whether it is sealed: that alone makes a repository secure, there is no field for it."""
    path = root.path
    try:
        file = root.open_file(NAME)
    except FileNotFoundError:
        if "objects" in os.listdir(root.fd):
            raise NotARepository(
                f"{path} has objects but no {NAME}: it was made by a program older than composefs-rs 0.7.",
                "The module composefs_repository upgrades it, and so does any cfsctl command that writes.",
            ) from None
        raise NotARepository(f"{path} is no composefs repository: it has no {NAME}.", _MAKE) from None
    try:
        raw = files.read_all(file, MAX_SIZE, NAME)
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
