# Copyright (c) composefs.oci contributors
# SPDX-License-Identifier: BSD-2-Clause

"""fs-verity: digests in user space, and the two ioctls that let the kernel seal and measure a file.

The format is the kernel's (Documentation/filesystems/fsverity.rst): a Merkle tree over 4096-byte blocks without salt,
whose root goes into a 256-byte descriptor; the digest is the hash of that descriptor. A repository uses one algorithm
for everything and names each object by this digest, which is never the plain hash of the content.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import struct
import time
from typing import Any, Callable, NamedTuple, Union

from ..errors import DigestMismatch, FormatError, IncompatibleRepository, VerityUnsupported
from .digests import ObjectDigest

Bytes = Union[bytes, bytearray, memoryview]

BLOCK = 4096

# Leaves are hashed in runs of this many bytes: long enough to amortise the bookkeeping, short enough that the list of a
# run's hashes stays small however much data one update() brings.
_RUN = 1 << 20


class Algorithm(NamedTuple):
    """One of the two hashes: its ``name``, the kernel's ``id``, the digest ``size`` in bytes, and the hashlib
    constructor ``new``.
    """

    name: str
    id: int
    size: int
    new: Callable[..., Any]
    pack_descriptor: Callable[..., bytes]  # (first eight bytes as an integer, data size, root hash) -> the 256 bytes
    descriptor_head: int

    @property
    def meta_name(self) -> str:
        """How ``meta.json`` spells it, for example ``fsverity-sha256-12`` (12 is the binary logarithm of the block
        size).
        """
        return f"fsverity-{self.name}-12"


def _algorithm(name: str, number: int, size: int, new: Callable[..., Any]) -> Algorithm:
    # version 1, hash algorithm, log2 of the block size, no salt, and a signature size that is always hashed as zero;
    # what follows the root hash (the rest of its field, the salt, reserved bytes) is zero.
    head = int.from_bytes(bytes((1, number, 12, 0, 0, 0, 0, 0)), "little")
    return Algorithm(name, number, size, new, struct.Struct(f"<QQ{size}s{240 - size}x").pack, head)


SHA256 = _algorithm("sha256", 1, 32, hashlib.sha256)
SHA512 = _algorithm("sha512", 2, 64, hashlib.sha512)
ALGORITHMS: dict[str, Algorithm] = {a.name: a for a in (SHA256, SHA512)}


def algorithm_from_meta(text: str) -> Algorithm:
    """The algorithm that ``meta.json`` spells as ``text`` (``fsverity-<hash>-<log2 of the block size>``, composefs
    repository format).

    FormatError if it is not of that form, IncompatibleRepository if composefs repositories do not have this
    hash or block size.
    """
    match = re.fullmatch(r"fsverity-(.*)-\+?([0-9]+)", text, re.DOTALL)
    if match is None:
        raise FormatError(
            f"meta.json names the algorithm {text[:100]!r}, which is not of the form fsverity-<hash>-<block size>.",
            "Restore the file.",
        )
    algorithm = ALGORITHMS.get(match[1])
    if algorithm is None or match[2].lstrip("0") != "12":
        raise IncompatibleRepository(
            f"The repository uses {text[:100]!r}; known are {', '.join(a.meta_name for a in ALGORITHMS.values())}.",
            "A newer release may know it.",
        )
    return algorithm


def digest(data: Bytes, algorithm: Algorithm) -> ObjectDigest:
    """The fs-verity digest (raw bytes) of ``data``, a whole file; a memoryview must be contiguous and of bytes."""
    size = len(data)
    new = algorithm.new
    if 0 < size <= BLOCK:
        # The hot path, once per small file of a layer: two hashes, one pad and one pack, nothing else. Padding by ljust
        # is cheaper than a second update().
        if not isinstance(data, bytes):
            data = bytes(data)
        root = new(data.ljust(BLOCK, b"\0")).digest()
        return new(algorithm.pack_descriptor(algorithm.descriptor_head, size, root)).digest()  # type: ignore[no-any-return]
    root = _hash_blocks(data, new) if size else bytes(algorithm.size)  # by definition; not the hash of an empty block
    while len(root) > algorithm.size:
        root = _hash_blocks(root, new)
    return new(algorithm.pack_descriptor(algorithm.descriptor_head, size, root)).digest()  # type: ignore[no-any-return]


def _hash_blocks(data: Bytes, new: Callable[..., Any]) -> bytes:
    """The hashes of the blocks of ``data``, one after the other; the last block is filled up with zeros."""
    with memoryview(data) as view:
        whole = len(view) // BLOCK * BLOCK
        hashes = [new(view[at : at + BLOCK]).digest() for at in range(0, whole, BLOCK)]
        if whole < len(view):
            hashes.append(new(bytes(view[whole:]).ljust(BLOCK, b"\0")).digest())
    return b"".join(hashes)


class Buffer:
    """Digests very many files, one after the other: each is read into ``room`` and digested there without a copy. The
    room is cut into blocks only once. ``size`` is a multiple of BLOCK.
    """

    __slots__ = ("_algorithm", "_blocks", "room")

    def __init__(self, algorithm: Algorithm, size: int = _RUN) -> None:
        self._algorithm = algorithm
        self.room = bytearray(size)
        with memoryview(self.room) as view:
            self._blocks = [view[at : at + BLOCK] for at in range(0, size, BLOCK)]

    def digest(self, size: int) -> ObjectDigest:
        """The digest of the first ``size`` bytes of the room, a whole file. What follows them is overwritten."""
        algorithm = self._algorithm
        new = algorithm.new
        blocks = -(-size // BLOCK)
        end = blocks * BLOCK
        if end != size:
            self.room[size:end] = bytes(end - size)
        if blocks == 1:
            root = new(self._blocks[0]).digest()
        else:
            root = b"".join([one.digest() for one in map(new, self._blocks[:blocks])]) or bytes(algorithm.size)
            while len(root) > algorithm.size:
                root = new(root.ljust(BLOCK, b"\0")).digest() if len(root) <= BLOCK else _hash_blocks(root, new)
        return new(algorithm.pack_descriptor(algorithm.descriptor_head, size, root)).digest()  # type: ignore[no-any-return]


class Hasher:
    """The fs-verity digest of a file that arrives in pieces, cut anywhere. It needs memory for one block per level
    of the tree, whatever the length.
    """

    __slots__ = ("_levels", "_tail", "algorithm", "length")

    def __init__(self, algorithm: Algorithm) -> None:
        self.algorithm = algorithm
        self.length = 0
        self._tail = bytearray()  # the beginning of the data block that is not complete yet
        # Level by level, the hashes that are not yet part of a hashed tree block. A block is only hashed once something
        # follows it in its level: a level that ends exactly full is the top, and another one above it would change the
        # digest. So each is 1 .. BLOCK bytes between updates.
        self._levels: list[bytearray] = []

    def update(self, data: Bytes) -> None:
        """Append ``data``; it is not kept beyond the call."""
        with memoryview(data) as view:
            size = len(view)
            self.length += size
            start = 0
            tail = self._tail
            if tail:
                start = min(BLOCK - len(tail), size)
                tail += view[:start]
                if len(tail) < BLOCK:
                    return
                _push(self._levels, 0, self.algorithm.new(tail).digest(), self.algorithm)
                tail.clear()
            end = start + (size - start) // BLOCK * BLOCK
            new = self.algorithm.new
            for run in range(start, end, _RUN):
                _push(self._levels, 0, _hash_blocks(view[run : min(run + _RUN, end)], new), self.algorithm)
            if end < size:
                tail += view[end:]

    def zeros(self, size: int) -> None:
        """Append ``size`` zero bytes, in a time that hardly grows with them: a hole may be larger than any disk."""
        if self._tail:
            filled = min(BLOCK - len(self._tail), size)
            self.update(bytes(filled))
            size -= filled
        blocks, rest = divmod(size, BLOCK)
        self.length += blocks * BLOCK
        _push_equal(self._levels, self.algorithm.new(bytes(BLOCK)).digest(), blocks, self.algorithm)
        self.update(bytes(rest))

    def digest(self) -> ObjectDigest:
        """The digest of everything so far; more may follow."""
        algorithm = self.algorithm
        new = algorithm.new
        if not self.length:
            root = bytes(algorithm.size)
        else:
            levels = [bytearray(level) for level in self._levels]
            if self._tail:
                _push(levels, 0, new(self._tail.ljust(BLOCK, b"\0")).digest(), algorithm)
            at = 0
            while at + 1 < len(levels) or len(levels[at]) > algorithm.size:
                _push(levels, at + 1, new(levels[at].ljust(BLOCK, b"\0")).digest(), algorithm)
                at += 1
            root = bytes(levels[at])
        return new(algorithm.pack_descriptor(algorithm.descriptor_head, self.length, root)).digest()  # type: ignore[no-any-return]


def _push(levels: list[bytearray], at: int, hashes: bytes, algorithm: Algorithm) -> None:
    """Append ``hashes`` to level ``at`` and hash each block of it that is now followed by something into the level
    above.
    """
    while hashes:
        if at == len(levels):
            levels.append(bytearray())
        level = levels[at]
        level += hashes
        if len(level) <= BLOCK:
            return
        end = (len(level) - 1) // BLOCK * BLOCK
        with memoryview(level) as view:
            hashes = _hash_blocks(view[:end], algorithm.new)
        del level[:end]
        at += 1


def _push_equal(levels: list[bytearray], one: bytes, count: int, algorithm: Algorithm) -> None:
    """Append ``count`` times the same hash to the lowest level; see _push()."""
    at = 0
    many = BLOCK // algorithm.size
    while count:
        if at == len(levels):
            levels.append(bytearray())
        # Enough hashes to fill the block that is begun, and one hash that follows it.
        few = min(count, many - len(levels[at]) // algorithm.size + 1)
        _push(levels, at, one * few, algorithm)
        # From here on all hashes of this level are alike, and so are those of its blocks in the level above.
        above, rest = divmod(count - few, many)
        levels[at] += one * rest
        one, count, at = algorithm.new(one * many).digest(), above, at + 1


# --- names
# --------------------------------------------------------------------------------------------------------------------


def object_path(digest: ObjectDigest) -> str:
    """Where below ``objects/`` the object with this digest lies: ``ab/cdef…``."""
    text = digest.hex()
    return f"{text[:2]}/{text[2:]}"


def parse_hex(text: str, algorithm: Algorithm) -> ObjectDigest:
    """The digest written as ``text``: exactly two hex digits a byte, either case; FormatError otherwise."""
    # bytes.fromhex alone would skip blanks between the digits.
    if len(text) != 2 * algorithm.size or not re.fullmatch("[0-9a-fA-F]+", text):
        raise FormatError(f"{text[:200]!r} is not a {algorithm.name} fs-verity digest in hex.", "Check the repository.")
    return ObjectDigest(bytes.fromhex(text))


def parse_object_path(text: str, algorithm: Algorithm) -> ObjectDigest:
    """The digest in an object's path name or link text, of which only the end (``ab/cdef…``) is looked at. FormatError
    if the end holds no digest.

    So ``../objects/ab/cdef…`` and ``objects/ab/cdef…`` mean the same (composefs repository format).
    """
    end = text[-(2 * algorithm.size + 1) :]
    if end[2:3] != "/":
        raise FormatError(
            f"{text[-200:]!r} does not end in the path name of a {algorithm.name} object.", "Check the repository."
        )
    return parse_hex(end[:2] + end[3:], algorithm)


# --- the kernel
# --------------------------------------------------------------------------------------------------------------------


def _request(read: bool, write: bool, number: int, size: int) -> int:
    """An ioctl number of type 'f', encoded as the running machine does it (asm/ioctl.h; a few architectures have their
    own).
    """
    other = os.uname().machine.startswith(("ppc", "mips", "sparc", "alpha"))
    direction = (2 * read + 4 * write) << 29 if other else (2 * read + write) << 30
    return direction | size << 16 | ord("f") << 8 | number


_ENABLE = _request(False, True, 133, 128)
_MEASURE = _request(True, True, 134, 4)  # the size is that of the header alone, whatever room for the digest follows it

# ETXTBSY mostly means that another thread forked while the file was open for writing and its child has not reached exec
# yet. That is soon over.
_BUSY_PAUSES = (0.001, 0.002, 0.004, 0.008, 0.016)


def enable(fd: int, algorithm: Algorithm) -> bool:
    """Seal the file behind ``fd`` (open read-only; nothing may have the file open for writing any more) with fs-verity.
    True when it is sealed.

    A file that is sealed already is left as it is, whatever its algorithm: measure it to know. VerityUnsupported if the
    file system or the kernel cannot do it; a file that stays open for writing elsewhere ends in OSError ETXTBSY after a
    few tries; other OSErrors pass.
    """
    argument = struct.pack("=IIII112x", 1, algorithm.id, BLOCK, 0)
    pauses = iter(_BUSY_PAUSES)
    while True:
        try:
            fcntl.ioctl(fd, _ENABLE, argument)
        except OSError as error:
            if error.errno == errno.EEXIST:
                return True
            if error.errno in _UNSUPPORTED or error.errno == errno.ENOPKG:
                raise _unsupported(algorithm) from error
            pause = next(pauses, None) if error.errno == errno.ETXTBSY else None
            if pause is None:
                raise
            time.sleep(pause)
        else:
            return True


def measure(fd: int, algorithm: Algorithm) -> ObjectDigest | None:
    """The digest that the kernel enforces on the file behind ``fd``, or None if it is not sealed.

    DigestMismatch if it is sealed with another algorithm, VerityUnsupported if the file system or the kernel knows no
    fs-verity; other OSErrors pass.
    """
    buffer = bytearray(struct.pack("=HH", algorithm.id, algorithm.size)) + bytes(algorithm.size)
    try:
        fcntl.ioctl(fd, _MEASURE, buffer, True)
    except OSError as error:
        if error.errno == errno.ENODATA:
            return None
        if error.errno in _UNSUPPORTED:
            raise _unsupported(algorithm) from error
        if error.errno == errno.EOVERFLOW:  # its digest is longer than the room given
            raise _other_algorithm(algorithm) from error
        raise
    number, size = struct.unpack_from("=HH", buffer)
    if (number, size) != (algorithm.id, algorithm.size):
        raise _other_algorithm(algorithm)
    return ObjectDigest(bytes(buffer[4:]))


_UNSUPPORTED = (errno.ENOTTY, errno.EOPNOTSUPP)


def _unsupported(algorithm: Algorithm) -> VerityUnsupported:
    return VerityUnsupported(
        f"The file system or the kernel does not support fs-verity with {algorithm.name}.",
        "Use btrfs, or ext4 or f2fs with the verity feature enabled (tune2fs -O verity), or a repository that does "
        "not require it.",
    )


def _other_algorithm(algorithm: Algorithm) -> DigestMismatch:
    return DigestMismatch(
        f"The file has an fs-verity digest, but not one of {algorithm.name}.",
        "It was put there by something else: remove it.",
    )
