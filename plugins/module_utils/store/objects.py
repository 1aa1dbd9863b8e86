# Copyright (c) composefs.oci contributors
# SPDX-License-Identifier: BSD-2-Clause

"""The object store: files below ``objects/`` that are named by the fs-verity digest of their content (composefs
repository format).

An object comes into being whole: it is written to a file without a name, sealed where fs-verity is at hand, and only
then linked. A reader or a writer in another process therefore sees it complete or not at all, and a full disk leaves
nothing behind. What is *durable* is another matter: nothing is synced here; the repository's barrier does that.

Each process has its own store on a shared fd of the directory; stores need no coordination, because a link that is
already there is simply someone else's copy of the same bytes.
"""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import os
import resource
import stat
from collections.abc import Callable, Iterable, Iterator

from ..formats import fsverity
from ..formats.digests import ObjectDigest
from ..host import beneath, files
from ..errors import Busy, DigestMismatch, FormatError, IOFailed, VerityUnsupported, from_os_error

TEMPORARY_PREFIX = files.OBJECT_PREFIX
FILE_MODE = 0o644
_COPY_TRIES = 3
_PIECE = 1 << 20
# What is only hashed is read into the same memory again and again, which stays in the processor's cache.
_ROOM = 1 << 18

# Not in fcntl. Where a file system, or two of them, cannot share blocks, one of these says so.
_FICLONE = 0x40049409
_NO_CLONE = (errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOTTY, errno.EPERM, errno.ETXTBSY, errno.ENOSYS)

_ABSENT, _PRESENT, _WRONG = range(3)
# Where fewer objects than this share are there already, nobody looks first: storing one in vain costs as much as seven
# looks.
_HARDLY_ANY = 1 / 16

# Damage on the disk itself, found while a file is opened or measured.
_DAMAGED = (errno.EIO, getattr(errno, "EUCLEAN", errno.EIO), errno.EBADMSG)


@dataclasses.dataclass
class ObjectStats:
    """What a store did: objects and bytes written, found already there, and written anew in the place of damaged ones
    (also counted as new).
    """

    new: int = 0
    present: int = 0
    bytes_new: int = 0
    bytes_present: int = 0
    replaced: int = 0

    def add(self, other: ObjectStats) -> None:
        """Add the counts of another store, for example one of a worker process."""
        self.new += other.new
        self.present += other.present
        self.bytes_new += other.bytes_new
        self.bytes_present += other.bytes_present
        self.replaced += other.replaced


class ObjectStore:
    """Objects of one repository. ``root`` is its directory and ``dirfd`` its ``objects/`` (O_PATH will do); both stay
    the caller's. The 256 directories in there are opened once, by the rules of ``beneath``, and kept: ``close``.

    ``verity``: every object must be sealed, and what is there already is measured by the kernel (a *secure*
    repository). Otherwise ``try_verity`` says whether sealing is tried and its lack accepted; the first refusal of the
    file system is remembered.

    ``hash_first`` matters to streamed objects of a secure repository only. The kernel computes their digest when it
    seals them, so hashing in user space too pays only where it spares writing out what is already there: switch it off
    for the first image of a repository.
    """

    def __init__(
        self, root: beneath.Root, dirfd: int, algorithm: fsverity.Algorithm, verity: bool, try_verity: bool
    ) -> None:
        self.dirfd = dirfd
        self._root = root
        self._directories = [-1] * 256
        self._kept = 0
        # Only a share of the files that this process may have open, for there is more to open than directories.
        self._keep = max(8, min(256, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4))
        self.algorithm = algorithm
        self.verity = verity
        self.hash_first = True
        self.suspects: set[ObjectDigest] = set()
        """Objects that a check found damaged: they are taken for present only if their content proves right."""
        self.stats = ObjectStats()
        self._seal = verity or try_verity
        self._tmpfile = True
        self._plain: bool | None = None
        # How many of the latest objects were there already: looking costs every object a sixth of what storing it does.
        self._share_present = 1.0

    def close(self) -> None:
        """Close the directories that were opened; they are opened again when they are needed."""
        for first, fd in enumerate(self._directories):
            if fd >= 0:
                os.close(fd)
                self._directories[first] = -1
        self._kept = 0

    # --- writing
    # ----------------------------------------------------------------------------------------------------------------

    def put(self, data: fsverity.Bytes, prove: bool = False) -> ObjectDigest:
        """Store ``data`` (bytes, or a contiguous view of bytes) unless it is there already; its fs-verity digest.

        The hot path of a pull, once per small file. An object that is there and right is left alone; a damaged one is
        replaced in one step. What is there without a seal is judged by its size, or, to ``prove`` it, by its content.
        NoSpace and other EngineErrors when the system refuses.
        """
        digest = fsverity.digest(data, self.algorithm)
        self.put_known(digest, data, prove)
        return digest

    def put_known(self, digest: ObjectDigest, data: fsverity.Bytes, prove: bool = False) -> None:
        """Like put(), for a caller who computed the digest of ``data`` already, perhaps in another thread."""
        size = len(data)
        if self._share_present < _HARDLY_ANY and not prove and not self._seal:
            state = _ABSENT  # most likely; making the name says if it is not
        else:
            try:
                state = self._state(digest, size)
            except OSError as error:
                raise from_os_error(error, f"Looking for object {digest.hex()}") from error
            if prove and state == _PRESENT and not self.verify(digest):
                state = _WRONG
        if state == _PRESENT:
            self._share_present += (1 - self._share_present) / 64
            self.stats.present += 1
            self.stats.bytes_present += size
            return
        draft = self._draft(os.O_WRONLY)
        try:
            written = os.write(draft.fd, data)
            if written != size:
                files.write_all(draft.fd, data, written)
            if self._seal:
                self._seal_draft(draft, digest)
            there = self._place(draft, digest, size, state)
            self._share_present += (there - self._share_present) / 64
        except OSError as error:
            raise from_os_error(error, f"Storing an object of {size} bytes") from error
        finally:
            draft.close()

    def writer(self) -> ObjectWriter:
        """Begin an object whose content comes in pieces; memory does not grow with it."""
        return ObjectWriter(self)

    def put_pieces(self, pieces: Iterable[fsverity.Bytes]) -> ObjectDigest:
        """Store what the pieces make together as one object, for splitstreams; its fs-verity digest.

        One that is there already is proved by its content: a stream may be written again because the one that is there
        turned out to be damaged.
        """
        output = self.writer()
        try:
            for piece in pieces:
                output.write(piece)
            return output.commit(prove=True)[0]
        except BaseException:
            output.abort()
            raise

    def link_in(self, fd: int, digest: ObjectDigest, size: int) -> bool:
        """Make the regular file ``fd``, whose content was proved to have ``digest``, an object by a hard link; False if
        that is impossible. EngineError when the system refuses otherwise.
        """
        try:
            if self._seal and self._measured(fd) != digest and self.verity:
                return False
            if self._state(digest, size) != _ABSENT:
                return False
            directory = self._directory(digest[0], make=True)
            draft = files.Draft(os.dup(fd), self.dirfd)
            try:
                draft.link(digest[1:].hex(), directory)
            finally:
                draft.close()
        except OSError as error:
            if error.errno in (errno.EXDEV, errno.EMLINK, errno.EPERM, errno.EEXIST, errno.ENOENT):
                return False
            raise from_os_error(error, f"Linking object {digest.hex()}") from error
        self.stats.new += 1
        self.stats.bytes_new += size
        return True

    # --- reading
    # ----------------------------------------------------------------------------------------------------------------

    def contains(self, digest: ObjectDigest, size: int | None = None) -> bool:
        """Whether the object is there, of ``size`` bytes if given, and sealed with its own digest where that is
        required.
        """
        try:
            return self._state(digest, size) == _PRESENT
        except OSError as error:
            raise from_os_error(error, f"Looking for object {digest.hex()}") from error

    def stat(self, digest: ObjectDigest) -> os.stat_result | None:
        """What the file system says of the object, None if it is not there. EngineError if that cannot be told."""
        try:
            directory = self._directory(digest[0])
            return os.stat(digest[1:].hex(), dir_fd=directory, follow_symlinks=False) if directory >= 0 else None
        except FileNotFoundError:
            return None
        except OSError as error:
            raise from_os_error(error, f"Looking at object {digest.hex()}") from error

    def remove(self, digest: ObjectDigest) -> bool:
        """Remove the object; False if it is not there. OSError passes."""
        directory = self._directory(digest[0])
        try:
            if directory >= 0:
                os.unlink(digest[1:].hex(), dir_fd=directory)
            return directory >= 0
        except FileNotFoundError:
            return False

    def open(self, digest: ObjectDigest) -> int:
        """A read-only fd of the object, the caller's to close.

        In a secure repository the kernel has vouched for the content, now and at every read. Elsewhere a seal is
        checked where there is one, but most objects have none: see ``verify``. FormatError if the object is missing or
        another one.
        """
        try:
            fd = self._open(digest)
        except FileNotFoundError as error:
            raise FormatError(f"Object {digest.hex()} is missing from the repository.", _REPAIR) from error
        except FormatError as error:
            raise FormatError(f"Object {digest.hex()} is not a regular file.", _REPAIR) from error
        except OSError as error:
            raise from_os_error(error, f"Opening object {digest.hex()}") from error
        try:
            if self._seal:
                measured = self._measured(fd)
                if measured is None and self.verity:
                    raise FormatError(
                        f"Object {digest.hex()} is not protected by fs-verity, which this repository requires.", _REPAIR
                    )
                if measured is not None and measured != digest:
                    raise FormatError(f"Object {digest.hex()} has the fs-verity digest {measured.hex()}.", _REPAIR)
        except BaseException as error:
            os.close(fd)
            if isinstance(error, OSError):
                raise from_os_error(error, f"Measuring object {digest.hex()}") from error
            if isinstance(error, DigestMismatch):
                raise FormatError(f"Object {digest.hex()}: {error.text}", _REPAIR) from error
            raise
        return fd

    def read(self, digest: ObjectDigest, limit: int) -> bytes:
        """The whole content of an object of at most ``limit`` bytes (FormatError if it is larger), proven to have the
        digest.

        For documents and other small things: without the kernel's seal the proof is a hash in user space.
        """
        fd = self.open(digest)
        try:
            parts = []
            left = limit + 1
            while left:
                part = os.read(fd, min(left, _PIECE))
                if not part:
                    break
                parts.append(part)
                left -= len(part)
        except OSError as error:
            raise from_os_error(error, f"Reading object {digest.hex()}") from error
        finally:
            os.close(fd)
        if not left:
            raise FormatError(f"Object {digest.hex()} is larger than the {limit} bytes that are allowed here.", _REPAIR)
        data = b"".join(parts)
        if not self.verity and fsverity.digest(data, self.algorithm) != digest:
            raise FormatError(f"The content of object {digest.hex()} does not have this digest.", _REPAIR)
        return data

    def verify(self, digest: ObjectDigest) -> bool:
        """Read the whole object and hash it in user space, whatever its seal says; False if it is missing or
        damaged.
        """
        try:
            fd = self._open(digest)
        except (FileNotFoundError, FormatError):
            return False
        except OSError as error:
            if error.errno in _DAMAGED:
                return False
            raise from_os_error(error, f"Opening object {digest.hex()}") from error
        try:
            return self._hash(fd) == digest
        except OSError as error:
            if error.errno in (*_DAMAGED, errno.EISDIR):
                return False
            raise from_os_error(error, f"Reading object {digest.hex()}") from error
        finally:
            os.close(fd)

    def names(self) -> Iterator[tuple[str, ObjectDigest | None]]:
        """Every entry of the 256 directories as ``(ab/cdef…, digest)``, directory by directory; the digest is None if
        the name is not that of an object.
        """
        for first in range(256):
            if self._directory(first) < 0:
                continue
            try:
                fd = self._root.open_directory(f"{first:02x}", under=(self.dirfd, "objects"))
                try:
                    entries = os.listdir(fd)
                finally:
                    os.close(fd)
            except FileNotFoundError:
                continue
            except OSError as error:
                raise from_os_error(error, f"Listing objects/{first:02x}") from error
            for entry in entries:
                name = f"{first:02x}/{entry}"
                try:
                    yield (
                        name,
                        fsverity.parse_object_path(name, self.algorithm)
                        if len(name) == 2 * self.algorithm.size + 1
                        else None,
                    )
                except FormatError:
                    yield name, None

    # --- how
    # ----------------------------------------------------------------------------------------------------------------

    def _directory(self, first: int, make: bool = False) -> int:
        """The fd (O_PATH) of one of the 256 directories, -1 if there is none; with ``make`` it is made.

        Kept open, so that no object pays for looking at its directory; UnsafeRepository and OSError the first time.
        """
        fd = self._directories[first]
        if fd < 0:
            if self._kept >= self._keep:
                self.close()
            try:
                fd = self._root.open_directory(f"{first:02x}", os.O_PATH, make=make, under=(self.dirfd, "objects"))
            except FileNotFoundError:
                if make:
                    raise
                return -1
            self._directories[first] = fd
            self._kept += 1
        return fd

    def _open(self, digest: ObjectDigest) -> int:
        """A read-only fd of the object's file. FormatError if something else is there; OSError passes."""
        directory = self._directory(digest[0])
        if directory < 0:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        return files.open_regular(directory, digest[1:].hex())

    def _state(self, digest: ObjectDigest, size: int | None) -> int:
        """Whether the object is absent, present, or there but wrong. OSError if that cannot be told."""
        state = self._seeming_state(digest, size)
        return _WRONG if state == _PRESENT and digest in self.suspects and not self.verify(digest) else state

    def _seeming_state(self, digest: ObjectDigest, size: int | None) -> int:
        directory = self._directories[digest[0]]
        if directory < 0:
            directory = self._directory(digest[0])
            if directory < 0:
                return _ABSENT
        try:
            found = os.stat(digest[1:].hex(), dir_fd=directory, follow_symlinks=False)
        except FileNotFoundError:
            return _ABSENT
        if not stat.S_ISREG(found.st_mode) or (size is not None and found.st_size != size):
            return _WRONG
        if not self._seal:
            return _PRESENT
        fd = -1
        try:
            fd = self._open(digest)
            measured = self._measured(fd)
        except (DigestMismatch, FormatError):
            return _WRONG
        except FileNotFoundError:
            return _ABSENT
        except OSError as error:
            if error.errno in _DAMAGED:
                return _WRONG
            raise
        finally:
            if fd >= 0:
                os.close(fd)
        if measured is None:
            return _WRONG if self.verity else _PRESENT
        return _PRESENT if measured == digest else _WRONG

    def _measured(self, fd: int) -> ObjectDigest | None:
        """The kernel's digest, or None without a seal; VerityUnsupported only where seals are required."""
        try:
            return fsverity.measure(fd, self.algorithm)
        except VerityUnsupported:
            if self.verity:
                raise
            self._seal = False
            return None

    def _hash(self, fd: int) -> ObjectDigest:
        """The digest of the file behind ``fd``, computed here. OSError passes."""
        return hash_file(fd, self.algorithm)[0]

    def _draft(self, access: int) -> files.Draft:
        """A new file for one object, open with ``access``; without a name wherever the file system can do that.

        Measured on ext4 (the commit has the figures): an unnamed file in ``objects/`` itself, linked into place when
        whole, costs no more than creating the final name at once and less than a temporary name and a rename; and it is
        the only one of them that a crash leaves no trace of.
        """
        try:
            if self._plain:
                # As files.draft() does it, without the call that sets the mode.
                return files.Draft(
                    os.open(".", os.O_TMPFILE | access | os.O_CLOEXEC, FILE_MODE, dir_fd=self.dirfd), self.dirfd
                )
            made = files.draft(self.dirfd, access, FILE_MODE, prefix=TEMPORARY_PREFIX, unnamed=self._tmpfile)
        except OSError as error:
            raise from_os_error(OSError(error.errno, error.strerror), "Creating an object") from error
        if made.name is not None:
            self._tmpfile = False
        elif self._plain is None:
            # The mode has to be set where a umask takes something from it. Most often none does, and a call less for
            # each object counts.
            self._plain = files.gets_mode(self.dirfd, FILE_MODE)
        return made

    def _seal_draft(self, draft: files.Draft, digest: ObjectDigest | None) -> ObjectDigest | None:
        """Seal the written file and have the kernel measure it: its digest, which must be ``digest`` if that is given.

        None where there is no fs-verity and none is required. OSError passes.
        """
        draft.reopen_read_only()
        try:
            for attempt in range(_COPY_TRIES + 1):
                try:
                    fsverity.enable(draft.fd, self.algorithm)
                    break
                except OSError as error:
                    if error.errno != errno.ETXTBSY:
                        raise
                    # Another process forked while the file was open for writing and keeps that fd, perhaps for long. A
                    # copy is a file that it knows nothing of. If it forks again in that very moment, another copy is
                    # made, but not for ever.
                    if attempt == _COPY_TRIES:
                        raise Busy(
                            "An object cannot be protected by fs-verity, because other processes hold each new file "
                            "open for writing.",
                            "Try again.",
                        ) from error
                    self._copy(draft)
            measured = fsverity.measure(draft.fd, self.algorithm)
        except VerityUnsupported:
            if self.verity:
                raise
            self._seal = False
            return None
        if measured is None or (digest is not None and measured != digest):
            raise DigestMismatch(
                f"The kernel measured {measured.hex() if measured else 'nothing'} where an object with digest "
                f"{digest.hex() if digest else '?'} was written.",
                "The memory or the disk of this host is not reliable.",
            )
        return measured

    def _copy(self, draft: files.Draft) -> None:
        """Put a copy of the file into the place of the draft, open read-only. OSError passes."""
        copy = self._draft(os.O_RDWR)
        try:
            offset = 0
            while True:
                data = os.pread(draft.fd, _PIECE, offset)
                if not data:
                    break
                files.write_all(copy.fd, data)
                offset += len(data)
            copy.reopen_read_only()
        except BaseException:
            copy.close()
            raise
        draft.fd, copy.fd = copy.fd, draft.fd
        draft.name, copy.name = copy.name, draft.name
        copy.close()  # which is the old file now

    def _place(self, draft: files.Draft, digest: ObjectDigest, size: int, state: int) -> bool:
        """Give the finished file its name; True if the object turned out to be there. OSError passes."""
        stats = self.stats
        first, name = digest[0], digest[1:].hex()
        for _attempt in range(8):
            directory = self._directories[first]
            if directory < 0:
                directory = self._directory(first, make=True)
            if state == _WRONG:
                draft.replace(name, directory, TEMPORARY_PREFIX)
                stats.replaced += 1
                break
            try:
                draft.link(name, directory)
                break
            except FileExistsError:
                state = self._state(digest, size)
                if state == _PRESENT:
                    stats.present += 1
                    stats.bytes_present += size
                    return True
            except FileNotFoundError:
                if not os.path.exists("/proc/self/fd"):
                    raise IOFailed("Objects are linked through /proc, which is not mounted.", "Mount it.") from None
                # The directory was removed, so what is kept is not the one that others see.
                self.close()
        else:
            raise Busy(
                f"Object {digest.hex()} appears and vanishes while it is being stored.",
                "Let one program at a time clean this repository.",
            )
        stats.new += 1
        stats.bytes_new += size
        return False


class ObjectWriter:
    """An object in the making, from ``ObjectStore.writer()``: any number of ``write``, then ``commit`` or ``abort``."""

    __slots__ = ("_draft", "_hasher", "_store", "size")

    def __init__(self, store: ObjectStore) -> None:
        self.size = 0
        self._store = store
        # Where the kernel seals the file it computes the digest as well. Where it turns out that it does not, the file
        # is read back once.
        self._hasher = (
            fsverity.Hasher(store.algorithm) if not store._seal or (store.verity and store.hash_first) else None
        )
        self._draft = store._draft(os.O_RDWR)

    def write(self, data: fsverity.Bytes) -> None:
        """Append ``data``. NoSpace and other EngineErrors when the system refuses."""
        try:
            written = os.write(self._draft.fd, data)
            if written != len(data):
                files.write_all(self._draft.fd, data, written)
        except OSError as error:
            raise from_os_error(error, f"Storing an object of {self.size} bytes and more") from error
        self.size += len(data)
        if self._hasher is not None:
            self._hasher.update(data)

    def clone(self, fd: int, seen: Callable[[bytes], None] | None = None) -> bool:
        """Take over the content of the regular file ``fd`` without copying it; False if the file systems cannot do
        that. Nothing may have been written before.

        Our own file is hashed, so it does not matter what happens to the other one. ``seen`` is given the content, too.
        """
        try:
            fcntl.ioctl(self._draft.fd, _FICLONE, fd)
        except OSError as error:
            if error.errno in _NO_CLONE:
                return False
            raise from_os_error(error, "Cloning an object") from error
        try:
            self.size = os.fstat(self._draft.fd).st_size
            offset = 0
            while (self._hasher is not None or seen is not None) and offset < self.size:
                data = os.pread(self._draft.fd, _PIECE, offset)
                if not data:
                    break
                offset += len(data)
                if self._hasher is not None:
                    self._hasher.update(data)
                if seen is not None:
                    seen(data)
        except OSError as error:
            raise from_os_error(error, "Reading a cloned object") from error
        return True

    def commit(self, prove: bool = False, expect: ObjectDigest | None = None) -> tuple[ObjectDigest, int]:
        """Make it an object: its fs-verity digest (raw bytes) and size in bytes. The writer is closed, also when this
        fails.

        An object that is there already is judged as by ``put``, with ``prove`` by its content. DigestMismatch, and no
        object, if it has another digest than ``expect``.
        """
        store, draft, size = self._store, self._draft, self.size
        try:
            digest = self._hasher.digest() if self._hasher is not None else None
            state = store._state(digest, size) if digest is not None else None
            if prove and digest is not None and state == _PRESENT and not store.verify(digest):
                state = _WRONG
            if state != _PRESENT:
                if store._seal:
                    digest = store._seal_draft(draft, digest) or digest
                if digest is None:
                    digest = store._hash(draft.fd)
                if state is None:
                    state = store._state(digest, size)
                    if prove and state == _PRESENT and not store.verify(digest):
                        state = _WRONG
            if digest is None:
                raise AssertionError("this must hold: digest is not None")
            if expect is not None and digest != expect:
                raise DigestMismatch(
                    f"What should be object {expect.hex()} has the fs-verity digest {digest.hex()}.",
                    "The source is damaged or was tampered with; nothing was registered.",
                )
            if state == _PRESENT:
                store.stats.present += 1
                store.stats.bytes_present += size
            else:
                store._place(draft, digest, size, state)
            return digest, size
        except OSError as error:
            raise from_os_error(error, f"Storing an object of {size} bytes") from error
        finally:
            draft.close()

    def abort(self) -> None:
        """Forget it; nothing stays behind. Does nothing after ``commit``."""
        self._draft.close()


def hash_file(fd: int, algorithm: fsverity.Algorithm, begun: fsverity.Hasher | None = None) -> tuple[ObjectDigest, int]:
    """The digest of the file behind ``fd``, computed here, and its bytes. If some of its first bytes were hashed
    already, ``begun`` is the hasher that has them. OSError passes.

    A hole is not read: it costs nothing to make one that takes years to read.
    """
    hasher = begun or fsverity.Hasher(algorithm)
    found = os.fstat(fd)
    sparse = found.st_blocks * 512 < found.st_size
    offset = hasher.length
    room = memoryview(bytearray(max(1, min(_ROOM, found.st_size - offset))))
    while True:
        if sparse:
            try:
                end = os.lseek(fd, offset, os.SEEK_DATA)
            except OSError as error:
                if error.errno not in (errno.ENXIO, errno.EINVAL):
                    raise
                # No data follows; or this file system knows no holes, and all of it is read.
                end = max(os.fstat(fd).st_size, offset) if error.errno == errno.ENXIO else offset
                sparse = error.errno == errno.ENXIO
            hasher.zeros(end - offset)
            offset = end
        length = os.preadv(fd, [room], offset)
        if not length:
            return hasher.digest(), offset
        hasher.update(room[:length])
        offset += length


_REPAIR = "Remove it and pull the images that use it again."
