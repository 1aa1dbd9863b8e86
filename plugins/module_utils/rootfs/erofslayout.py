# Copyright (c) composefs.oci contributors
# SPDX-License-Identifier: BSD-2-Clause

"""Collect the inodes of an EROFS image from a tree: their order, their names and their xattrs; ``erofswriter`` then
gives them places.

Order, escaping of whiteouts and sharing of xattrs all show in the bytes and so in the name of the image: they are part
of the format.
"""

from __future__ import annotations

import stat as st
import struct
from array import array
from binascii import hexlify
from itertools import islice
from typing import TYPE_CHECKING, Any, NoReturn

from ..formats.bounds import MAX_MAJOR, MAX_MINOR, MAX_NAME, MAX_SYMLINK, MAX_XATTR
from ..formats.digests import ObjectDigest
from .erofs import (
    BLOCK,
    ESCAPED,
    KINDS,
    MAX_SHARED,
    MAX_XATTR_ICOUNT,
    MAX_XATTR_SUFFIX,
    METACOPY,
    OVERLAY,
    PREFIXES,
    REDIRECT,
    VERSIONS,
    XATTR_ENTRY,
    XATTR_HEADER,
    XI_TRUSTED,
    Entry,
    entry_bytes,
    epoch1_key,
    filter_bit,
)
from ..errors import InvalidLayer
from .filetree import Directory, Leaf, Stat, count_links

if TYPE_CHECKING:
    from ..formats.fsverity import Algorithm

_TYPES = {kind: number for number, kind in enumerate(KINDS)}

FORM_FOLDER, FORM_EXTERNAL, FORM_DATA, FORM_LINK, FORM_DEVICE, FORM_NOTHING = range(6)
"""What becomes of an inode; a finer division than its file type."""

# Xattrs that the format adds to an inode.
_MARK_WHITEOUT, _MARK_PARENT, _MARK_ROOT, _MARK_SPARSE = 1, 2, 4, 8


class Xattrs:
    """A distinct set of xattrs. Inodes whose sets are equal share one, so that its bytes are made once.

    An external file carries metacopy and redirect besides; they differ from file to file and are not in here, but
    ``parts`` are the entries before, between and after the two, as the order of the format has them.
    """

    __slots__ = ("parts", "count", "bits", "refs", "local", "shared", "content", "plain", "around")

    def __init__(self, parts: tuple[tuple[Entry, ...], tuple[Entry, ...], tuple[Entry, ...]]) -> None:
        self.parts = parts
        self.count = 0
        self.bits = 0
        for part in parts:
            for index, suffix, _value in part:
                self.bits |= filter_bit(index, suffix)
        self.refs = (b"", b"", b"")
        self.local = (b"", b"", b"")
        self.shared = 0
        self.content = 0  # bytes after the 12 of the header
        self.plain = b""  # the whole, for an inode without metacopy
        self.around: tuple[bytes, bytes, bytes] | None = None  # made when first needed, see Inodes.pointing()


class Folder:
    """A directory on its way to disk: ``names`` with ``.`` and ``..``, in order; the inode index of each stands in
    ``Inodes.children`` from ``first`` on.
    """

    __slots__ = ("stat", "names", "first", "parent", "name", "index", "nlink", "cuts", "size", "entries")

    def __init__(self, directory: Directory, parent: Folder | None, name: bytes, index: int) -> None:
        self.stat = directory.stat
        self.entries = directory.entries
        self.parent = self if parent is None else parent
        self.name = name
        self.index = index
        self.names: tuple[bytes, ...] = ()
        self.first = 0
        self.nlink = 2
        self.cuts: tuple[int, ...] = ()
        self.size = 0

    def path(self, name: bytes = b"") -> str:
        parts = [name] if name else []
        folder = self
        while folder.parent is not folder:
            parts.append(folder.name)
            folder = folder.parent
        return "/" + b"/".join(reversed(parts)).decode("utf-8", "backslashreplace")

    def list_names(self) -> None:
        """Fill ``names``, refusing what cannot be a directory entry, and decide where the blocks of the
        directory end.
        """
        entries = self.entries
        self.names = names = tuple(sorted([*entries, b".", b".."]))
        blob = b"\0".join(names)
        if (
            b"/" in blob
            or blob.count(b"\0") >= len(names)
            or not names[0]
            or max(map(len, names)) > MAX_NAME
            or b"." in entries
            or b".." in entries
        ):
            self._refuse_name()
        total = 12 * len(names) + len(blob) - len(names) + 1
        # Entries are packed into blocks greedily. What remains is stored behind the inode, unless it is more than half
        # a block.
        if total > BLOCK:
            cuts = []
            used = 0
            for at, name in enumerate(names):
                used += 12 + len(name)
                if used > BLOCK:
                    cuts.append(at)
                    used = 12 + len(name)
        else:
            cuts, used = [], total
        if used > BLOCK // 2:
            cuts.append(len(names))
            used = 0
        self.cuts = tuple(cuts)
        self.size = BLOCK * len(cuts) + used

    def _refuse_name(self) -> NoReturn:
        for name in self.entries:
            if not name or len(name) > MAX_NAME or b"/" in name or b"\0" in name or name in (b".", b".."):
                shown = name[:40].decode("utf-8", "backslashreplace") + ("…" if len(name) > 40 else "")
                raise InvalidLayer(
                    f"The directory {self.path()} holds the name {shown!r} ({len(name)} bytes), which no file system "
                    f"can store.",
                    "Rebuild the image without that file.",
                )
        raise AssertionError("a name was refused and not found")


class Inodes:
    """The inodes of one image, collected from a tree. ``nodes``, ``set_numbers`` (of ``sets``), ``forms`` and ``types``
    are indexed by inode, in the order of the image.

    Per inode only small values are kept, in arrays: an image has hundreds of thousands of inodes.
    """

    def __init__(self, root: Directory, version: int, algorithm: Algorithm) -> None:
        if version not in VERSIONS:
            raise ValueError(f"composefs knows no EROFS format {version!r}")
        self.version = version
        self.epoch1 = version < 2
        self.digest_size = size = algorithm.size
        self.nodes: list[Folder | Leaf] = []
        self.set_numbers = array("I")
        self.children = array("I")
        self.forms = bytearray()
        self.types = bytearray()
        self.folders: list[Folder] = []
        self.acl = False
        self.sets: list[Xattrs] = [Xattrs(((), (), ()))]
        self._sets_by_id: dict[int, int] = {}
        self._sets: dict[tuple[tuple[tuple[bytes, bytes], ...], int], int] = {}
        self.shared_digests: dict[ObjectDigest, tuple[int, int]] = {}
        self.shared: list[Entry] = []
        self.shared_size = 0
        # The constant bytes around the digest in metacopy and redirect.
        self.metacopy_head = struct.pack("<BBBB", 0, 4 + size, 0, algorithm.id)
        self.local_metacopy = XATTR_ENTRY.pack(len(METACOPY), XI_TRUSTED, 4 + size) + METACOPY + self.metacopy_head
        self.local_redirect = XATTR_ENTRY.pack(len(REDIRECT), XI_TRUSTED, 2 * size + 2) + REDIRECT + b"/"
        self.pointer_bits = filter_bit(XI_TRUSTED, METACOPY) | filter_bit(XI_TRUSTED, REDIRECT)
        self.pointer_size = len(self.local_metacopy) + size + len(self.local_redirect) + 2 * size + 1
        self.pointer_pad = bytes(-self.pointer_size % 4)
        self.pointer_size += len(self.pointer_pad)

        self._collect(root)
        self._share()

    def _collect(self, root: Directory) -> None:
        count_links(root)
        if self.epoch1:
            self._collect_breadth_first(self._with_stubs(root), root)
        else:
            self._collect_depth_first(root)
        self._sets_by_id.clear()
        # After sorting, equal digests stand side by side. A set of them all would take four times the memory.
        digests = sorted(node.digest for node in self.nodes if node.__class__ is Leaf and node.digest is not None)
        for digest, following in zip(digests, islice(digests, 1, None)):
            if digest == following:
                self.shared_digests[digest] = (0, 0)

    @staticmethod
    def _with_stubs(root: Directory) -> Directory:
        """The root with a whiteout for each directory of the object store that an old overlayfs would let shine
        through.
        """
        has = root.stat
        label = (has.xattrs or {}).get(b"security.selinux")
        stat = Stat(
            0o644, has.uid, has.gid, has.mtime, has.mtime_nsec, None if label is None else {b"security.selinux": label}
        )
        entries = {b"%02x" % number: Leaf(stat, st.S_IFCHR) for number in range(256)}
        return Directory(has, {**entries, **root.entries})

    def _add(self, node: Folder | Leaf, form: int, kind: int, marks: int) -> None:
        stat = node.stat
        if (stat.uid | stat.gid | stat.mtime_nsec) >> 32:
            raise InvalidLayer(
                f"An inode has an owner, group or nanosecond out of range: {stat!r}.", "Rebuild the image."
            )
        self.nodes.append(node)
        self.forms.append(form)
        self.types.append(_TYPES[kind])
        number = 0 if not marks and not stat.xattrs else self._set_of(stat.xattrs or None, marks)
        self.sets[number].count += 1
        self.set_numbers.append(number)

    def _add_folder(self, directory: Directory, parent: Folder | None, name: bytes) -> Folder:
        folder = Folder(directory, parent, name, len(self.nodes))
        folder.list_names()
        self._add(folder, FORM_FOLDER, st.S_IFDIR, _MARK_ROOT if self.epoch1 and parent is None else 0)
        self.folders.append(folder)
        return folder

    def _add_leaf(self, leaf: Leaf, folder: Folder, name: bytes) -> int:
        index = len(self.nodes)
        kind = leaf.kind
        marks = 0
        if kind == st.S_IFREG:
            digest = leaf.digest
            size = leaf.size
            if digest is not None:
                form = FORM_EXTERNAL
                if len(digest) != self.digest_size:
                    raise InvalidLayer(
                        f"{folder.path(name)} refers to an object by a digest of {len(digest)} bytes, not "
                        f"{self.digest_size}."
                    )
            elif size != len(leaf.data):
                form, marks = FORM_EXTERNAL, _MARK_SPARSE
                if leaf.data:
                    raise InvalidLayer(f"{folder.path(name)} has {len(leaf.data)} bytes and a size of {size}.")
            else:
                form = FORM_DATA if size else FORM_NOTHING
            if not 0 <= size <= 1 << 52:
                raise InvalidLayer(f"{folder.path(name)} has an impossible size: {size} bytes.")
        elif kind == st.S_IFLNK:
            form = FORM_LINK
            if len(leaf.data) > MAX_SYMLINK:
                raise InvalidLayer(
                    f"The symlink {folder.path(name)} has a target of {len(leaf.data)} bytes; Linux allows "
                    f"{MAX_SYMLINK}."
                )
        elif kind in (st.S_IFCHR, st.S_IFBLK):
            form = FORM_DEVICE
            if leaf.rdev >> 32:
                raise InvalidLayer(
                    f"The device {folder.path(name)} has a major or minor number that EROFS cannot hold (limits: "
                    f"{MAX_MAJOR}, {MAX_MINOR})."
                )
            if kind == st.S_IFCHR and not leaf.rdev:
                if leaf.nlink > 1:
                    raise InvalidLayer(
                        f"{folder.path(name)} is a whiteout (character device 0, 0) with hardlinks, which composefs "
                        f"cannot express."
                    )
                if self.epoch1 and not self._looks_like_stub(leaf, folder, name):
                    form, kind, marks = FORM_NOTHING, st.S_IFREG, _MARK_WHITEOUT
                    self._mark_parent(folder)
        elif kind in (st.S_IFIFO, st.S_IFSOCK):
            form = FORM_NOTHING
        else:
            raise InvalidLayer(f"{folder.path(name)} is of no known file type ({kind:#o}).")
        self._add(leaf, form, kind, marks)
        return index

    @staticmethod
    def _looks_like_stub(leaf: Leaf, folder: Folder, name: bytes) -> bool:
        # Only the looks decide: a user's whiteout that looks like a stub is left alone, as in composefs-rs.
        if folder.index or len(name) != 2 or name.strip(b"0123456789abcdef"):
            return False
        has, root = leaf.stat, folder.stat
        label = (root.xattrs or {}).get(b"security.selinux")
        return (has.mode, has.uid, has.gid, has.mtime, has.mtime_nsec, has.xattrs or {}) == (
            *(0o644, root.uid, root.gid, root.mtime, root.mtime_nsec),
            {} if label is None else {b"security.selinux": label},
        )

    def _mark_parent(self, folder: Folder) -> None:
        index = folder.index
        self.sets[self.set_numbers[index]].count -= 1
        marked = self._set_of(folder.stat.xattrs or None, _MARK_PARENT | (0 if index else _MARK_ROOT))
        self.set_numbers[index] = marked
        self.sets[marked].count += 1

    def _collect_breadth_first(self, root: Directory, original: Directory) -> None:
        """Epoch 1: numbers go level by level, in name order within a directory.

        A file of several names is numbered where a *depth-first* walk meets it first; its other names refer to that
        number.
        """
        first = _first_folders(original)
        numbers: dict[int, int] = {}
        later: list[tuple[int, Leaf]] = []
        children = self.children
        self._add_folder(root, None, b"")
        for folder in self.folders:  # grows while we go through it
            entries = folder.entries
            is_root = folder.index == 0
            folder.first = len(children)
            for name in folder.names:
                child = entries.get(name)
                if child is None:
                    number = folder.index if name == b"." else folder.parent.index
                elif isinstance(child, Directory):
                    number = self._add_folder(child, folder, name).index
                    folder.nlink += 1
                elif child.nlink == 1:
                    number = self._add_leaf(child, folder, name)
                elif first[id(child)] == (0 if is_root else id(entries)):
                    if id(child) not in numbers:
                        numbers[id(child)] = self._add_leaf(child, folder, name)
                    number = numbers[id(child)]
                else:
                    number = 0
                    later.append((len(children), child))
                children.append(number)
        for at, child in later:
            children[at] = numbers[id(child)]

    def _collect_depth_first(self, root: Directory) -> None:
        """Epoch 2: numbers go down into each directory at once; a file of several names is numbered at the first."""
        numbers: dict[int, int] = {}
        top = self._add_folder(root, None, b"")
        stack = [(top, iter(top.names), array("I"))]
        while stack:
            folder, names, children = stack[-1]
            entries = folder.entries
            for name in names:
                child = entries.get(name)
                if child is None:
                    children.append(folder.index if name == b"." else folder.parent.index)
                elif isinstance(child, Directory):
                    below = self._add_folder(child, folder, name)
                    folder.nlink += 1
                    children.append(below.index)
                    stack.append((below, iter(below.names), array("I")))
                    break
                elif child.nlink == 1:
                    children.append(self._add_leaf(child, folder, name))
                else:
                    if id(child) not in numbers:
                        numbers[id(child)] = self._add_leaf(child, folder, name)
                    children.append(numbers[id(child)])
            else:
                folder.first = len(self.children)
                self.children += children
                stack.pop()

    def _set_of(self, xattrs: dict[bytes, bytes] | None, marks: int) -> int:
        # Xattr dicts are frozen and mostly shared between inodes, so their identity is the quick way to the set, their
        # content the sure one.
        quick = id(xattrs) << 4 | marks
        found = self._sets_by_id.get(quick)
        if found is None:
            own = tuple(sorted(xattrs.items())) if xattrs else ()
            found = self._sets.get((own, marks))
            if found is None:
                found = self._sets[(own, marks)] = len(self.sets)
                self.sets.append(self._make_set(own, marks))
            self._sets_by_id[quick] = found
        return found

    def _make_set(self, own: tuple[tuple[bytes, bytes], ...], marks: int) -> Xattrs:
        full: list[tuple[bytes, bytes]] = []
        if marks & _MARK_SPARSE:
            full.append((OVERLAY + b"metacopy", b""))
        for name, value in own:
            full.append((ESCAPED + name[len(OVERLAY) :] if name.startswith(OVERLAY) else name, value))
        if marks & _MARK_WHITEOUT:
            full += [(ESCAPED + b"whiteout", b""), (b"user.overlay.whiteout", b"")]
        if marks & _MARK_PARENT:
            full += [(ESCAPED + b"whiteouts", b""), (b"user.overlay.whiteouts", b"")]
            if self.version == 1:
                full += [(ESCAPED + b"opaque", b"x"), (b"user.overlay.opaque", b"x")]
        if marks & _MARK_ROOT:
            full.append((OVERLAY + b"opaque", b"y"))
        if not self.epoch1:
            return Xattrs(((), (), tuple(self._entry(name, value) for name, value in full)))
        full.sort(key=lambda item: (item[0], len(item[1]), item[1]))
        parts: tuple[list[Entry], list[Entry], list[Entry]] = ([], [], [])
        for name, value in full:
            entry = self._entry(name, value)
            self.acl = self.acl or entry[0] in (2, 3)
            parts[(name > OVERLAY + b"metacopy") + (name > OVERLAY + b"redirect")].append(entry)
        return Xattrs((tuple(parts[0]), tuple(parts[1]), tuple(parts[2])))

    def _entry(self, name: bytes, value: bytes) -> Entry:
        for index in (6, 4, 3, 2, 1) if self.epoch1 else (6, 5, 4, 3, 2, 1):
            if name.startswith(PREFIXES[index]):
                break
        else:
            index = 0
        suffix = name[len(PREFIXES[index]) :]
        if not name or b"\0" in name or len(suffix) > MAX_XATTR_SUFFIX or len(value) > MAX_XATTR:
            shown = name[:60].decode("utf-8", "backslashreplace")
            raise InvalidLayer(
                f"The extended attribute {shown!r} (name {len(name)} bytes, value {len(value)} bytes) cannot be stored:"
                f" EROFS allows {MAX_XATTR_SUFFIX} and {MAX_XATTR} bytes."
            )
        return index, suffix, value

    def _share(self) -> None:
        """Move xattrs that occur more than once into the shared table; sizes are known after this, references
        are not.
        """
        counts: dict[Entry, int] = {}
        sets = self.sets[1:]
        for xattrs in sets:
            for part in xattrs.parts:
                for entry in part:
                    counts[entry] = counts.get(entry, 0) + xattrs.count
        self.shared = [entry for entry, count in counts.items() if count > 1]
        for digest in self.shared_digests:
            self.shared += self._pointer(digest)
        if self.epoch1:
            self.shared.sort(key=epoch1_key, reverse=True)
        else:
            self.shared.sort()
        self.shared_size = sum((4 + len(suffix) + len(value) + 3) & ~3 for _index, suffix, value in self.shared)
        for xattrs in sets:
            local = []
            for part in xattrs.parts:
                local.append(b"".join(entry_bytes(entry) for entry in part if counts[entry] < 2))
                xattrs.shared += sum(1 for entry in part if counts[entry] > 1)
            xattrs.local = (local[0], local[1], local[2])
            xattrs.content = 4 * xattrs.shared + sum(map(len, local))
            if xattrs.shared + 2 > MAX_SHARED or 4 + (xattrs.content + self.pointer_size) // 4 > MAX_XATTR_ICOUNT:
                raise InvalidLayer(
                    "A file has more extended attributes than an EROFS inode can hold.",
                    "Rebuild the image without them.",
                )

    def _pointer(self, digest: ObjectDigest) -> tuple[Entry, Entry]:
        text = hexlify(digest)
        return (XI_TRUSTED, METACOPY, self.metacopy_head + digest), (
            XI_TRUSTED,
            REDIRECT,
            b"/" + text[:2] + b"/" + text[2:],
        )

    def refer(self, inodes_end: int) -> None:
        """Give every set its references into the shared table, now that the place of the table is known."""
        at = inodes_end - (inodes_end // BLOCK * BLOCK if self.epoch1 else 0)
        place: dict[Entry, int] = {}
        for entry in self.shared:
            place[entry] = at // 4
            at += (4 + len(entry[1]) + len(entry[2]) + 3) & ~3
        for digest in self.shared_digests:
            metacopy, redirect = self._pointer(digest)
            self.shared_digests[digest] = (place[metacopy], place[redirect])
        for xattrs in self.sets[1:]:
            refs = []
            for part in xattrs.parts:
                numbers = [place[entry] for entry in part if entry in place]
                refs.append(struct.pack(f"<{len(numbers)}I", *numbers))
            xattrs.refs = (refs[0], refs[1], refs[2])
            xattrs.plain = b"".join((XATTR_HEADER.pack(~xattrs.bits & 0xFFFFFFFF, xattrs.shared), *refs, *xattrs.local))

    def pointing(self, xattrs: Xattrs, digest: ObjectDigest) -> bytes:
        """The xattrs of an external file: its set with metacopy and redirect in their places."""
        if digest in self.shared_digests:
            bits = ~(xattrs.bits | self.pointer_bits) & 0xFFFFFFFF
            refs = xattrs.refs
            metacopy, redirect = (number.to_bytes(4, "little") for number in self.shared_digests[digest])
            return b"".join(
                (
                    XATTR_HEADER.pack(bits, xattrs.shared + 2),
                    refs[0],
                    metacopy,
                    refs[1],
                    redirect,
                    refs[2],
                    *xattrs.local,
                )
            )
        text = hexlify(digest)
        before, between, after = xattrs.around or self._surround(xattrs)
        return b"".join((before, digest, between, text[:2], b"/", text[2:], after))

    def _surround(self, xattrs: Xattrs) -> tuple[bytes, bytes, bytes]:
        """What stands before, between and after the digest and the path of an external file with this set."""
        bits = ~(xattrs.bits | self.pointer_bits) & 0xFFFFFFFF
        before = b"".join((XATTR_HEADER.pack(bits, xattrs.shared), *xattrs.refs, xattrs.local[0], self.local_metacopy))
        xattrs.around = (before, xattrs.local[1] + self.local_redirect, self.pointer_pad + xattrs.local[2])
        return xattrs.around


def _first_folders(root: Directory) -> dict[int, int]:
    """For every leaf of several names (by id) the directory (id of its entries, 0 for the root) where a depth-first
    walk meets it first.
    """
    found: dict[int, int] = {}
    linked = 0
    stack: list[Any] = [root]
    while stack:
        for child in stack.pop().entries.values():
            if isinstance(child, Directory):
                stack.append(child)
            elif child.nlink > 1:
                linked += 1
    if not linked:
        return found
    where = 0
    stack = [(iter(sorted(root.entries)), root.entries, 0)]
    while stack:
        names, entries, where = stack[-1]
        for name in names:
            child = entries[name]
            if isinstance(child, Directory):
                stack.append((iter(sorted(child.entries)), child.entries, id(child.entries)))
                break
            if child.nlink > 1:
                found.setdefault(id(child), where)
        else:
            stack.pop()
    return found
