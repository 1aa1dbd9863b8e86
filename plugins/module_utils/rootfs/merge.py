# Copyright (c) composefs.oci contributors
# SPDX-License-Identifier: BSD-2-Clause
"""Layers become one file tree: merges, whiteouts, hardlinks, and the changes every composefs image from OCI layers
gets.

The tree is the only input of the EROFS writer, so each rule here decides the image digest. The rules are those of
composefs-rs 0.9 (OCI image spec, layer section, "Applying Changesets", read literally). Where composefs-rs refuses an
image or writes a broken one, these hold:

* parent directories that no layer sent are made: 0755, root, mtime 0, no xattrs, whatever kind of entry needs them;
* a path that meets a symbolic link on its way goes where the link leads, within the image's root, as umoci and podman
  (storage driver vfs) have it: an absolute target starts at the root, ``..`` ends there, what is missing is made; the
  last component is never followed; more than 40 links are taken for a loop;
* an image without ``/usr`` gets a root directory of 0755, root, mtime 0;
* volume labels are ignored;
* names, symlink targets, xattrs and device numbers that an EROFS image cannot hold are refused.

The input is hostile until proven otherwise: nothing recurses, and depth, inodes and invented directories are bounded,
so time and memory stay in proportion to the bytes of the archive.
"""

from __future__ import annotations

import os
import stat as st
from collections.abc import Iterable
from typing import Any, NoReturn

from ..errors import InvalidLayer, TooLarge
from .filetree import Directory, FileSystem, Leaf, Node, Stat, count_links, directories
from ..formats.bounds import MAX_MAJOR, MAX_MINOR, MAX_NAME, MAX_SYMLINK, MAX_XATTR, THRESHOLD
from ..formats.tarheader import Entry, show

#: Names that an image may have: each takes some 400 bytes of memory here and more in the image writer. The largest
#: public images have 1.5 million.
MAX_INODES = 1 << 21
#: Bytes of names, link targets, inline contents and (twice) extended attributes that an image may have together. A few
#: hundred kilobytes of a blob can unpack to gigabytes of them; the largest public images have some 40 MB.
MAX_TEXT = 96 << 20
#: Directories that no layer sent: an archive can ask for two bytes each, so they get a bound of their own.
MAX_IMPLIED = 1 << 18
MAX_DEPTH = 1 << 14
#: Links that one path may meet: as many as the kernel follows.
MAX_LINKS = 40
#: Components of link targets that all paths of an image may be led through: a target of 4 KB is 2,000 of them, and
#: each entry could ask for 40 such targets.
MAX_LINK_STEPS = 1 << 24
#: Extended attributes of one inode, and their bytes: EROFS counts their size in units of 4 bytes, with 16 bits.
MAX_XATTRS = 128
MAX_XATTR_BYTES = 1 << 17

XATTR_MODES = ("allowlist-only", "keep-user-xattrs")
CAPABILITY = b"security.capability"

_DIRECTORY = b"5"
_HARDLINK = b"1"
_SYMLINK = b"2"
_LABEL = b"V"
_REGULAR = (b"0", b"\0", b"7")
_SPECIAL = {b"3": st.S_IFCHR, b"4": st.S_IFBLK, b"6": st.S_IFIFO}
_ODD_NAMES = frozenset((b"", b".", b".."))
_WHITEOUT = b".wh."
_OPAQUE = b".wh..wh..opq"
_NOT_WHITEOUTS = frozenset((b".", b".."))
_CACHED_BYTES = 1 << 23
_CACHED_STATS = 1 << 15


def _implied() -> Stat:
    return Stat(0o755)


class TreeBuilder:
    """Merges the entries of all layers, base layer first, into one tree. Every error is an InvalidLayer or TooLarge."""

    def __init__(
        self,
        *,
        max_inodes: int = MAX_INODES,
        max_implied: int = MAX_IMPLIED,
        max_depth: int = MAX_DEPTH,
        max_link_steps: int = MAX_LINK_STEPS,
        max_text: int = MAX_TEXT,
        xattrs: str | None = None,
    ) -> None:
        """``xattrs`` is what ``finish`` will keep, if that is known: then the rest takes no memory until there."""
        self._decided_xattrs = xattrs
        self._max_text = max_text
        self._text_left = max_text
        self.root = Directory(Stat())
        self._max_inodes = max_inodes
        self._max_depth = max_depth
        self._implied_left = max_implied
        self._max_implied = max_implied
        # Names that may still be added before the live ones are counted anew.
        self._names_left = max_inodes
        # Directories by the spelling that layers used for them, so that most entries find their parent with one
        # look-up. The map is wrong as soon as a directory goes away; then it is emptied.
        self._known: dict[bytes, Directory] = {}
        self._known_bytes = 0
        # Some known directory was found through a symbolic link: now a link that goes away empties the map, too.
        self._linked = False
        # On the way to one, ".." of a link undid a component that is missing so far. When it comes, the way may change.
        self._skipped = False
        self._link_steps_left = max_link_steps
        self._stats: dict[tuple[int, int, int, int, int], Stat] = {}
        self._xattrs: dict[tuple[tuple[bytes, bytes], ...], dict[bytes, bytes]] = {}
        self._user_xattrs = False

    def add(self, entry: Entry, content: Any = None) -> None:
        """Apply one tar entry. ``content`` of a regular file: None or bytes (inline), or an object with the raw
        ``digest`` of an external one.

        ``entry.path`` and ``entry.linkname`` are as in the archive. Raises InvalidLayer for what cannot be part of a
        file tree.
        """
        # Unpacking once is cheaper than looking the fields up by name.
        path, kind, mode, uid, gid, mtime, mtime_nsec, size, link, major, minor, xattrs = entry
        head, _unused, name = path.rpartition(b"/")
        if name in _ODD_NAMES:
            head, name = self._normalise(path)

        key = (mode, uid, gid, mtime, mtime_nsec)
        if xattrs:
            stat = self._new_stat(key, self._kept(path, xattrs))
            if stat.xattrs:
                self._text_left -= 2 * _size(stat.xattrs)
        else:
            found = self._stats.get(key)
            stat = found if found is not None else self._new_stat(key, None)

        node: Node
        if kind == b"0":
            node = self._regular(path, stat, size, content)
        elif kind == _DIRECTORY:
            if not name:
                self.root.stat = stat
                return
            node = Directory(stat)
        elif kind == _SYMLINK:
            if len(link) > MAX_SYMLINK:
                raise InvalidLayer(
                    f"Symlink {show(path)} has a target of {len(link)} bytes; a file system holds at most "
                    f"{MAX_SYMLINK}."
                )
            if not link or b"\0" in link:
                raise InvalidLayer(
                    f"The target of symlink {show(path)} contains a NUL byte."
                    if link
                    else f"Symlink {show(path)} has no target, which no file system can hold."
                )
            self._text_left -= len(link)
            node = Leaf(stat, st.S_IFLNK, link)
        elif kind == _HARDLINK:
            node = self._hardlinked(path, link)
        elif kind in _REGULAR:
            node = self._regular(path, stat, size, content)
        elif kind in _SPECIAL:
            if kind == b"6":
                node = Leaf(stat, st.S_IFIFO)
            elif 0 <= major <= MAX_MAJOR and 0 <= minor <= MAX_MINOR:
                node = Leaf(stat, _SPECIAL[kind], rdev=os.makedev(major, minor))
            else:
                raise InvalidLayer(
                    f"Device {show(path)} has the number {major}:{minor}; the largest possible one is "
                    f"{MAX_MAJOR}:{MAX_MINOR}."
                )
        elif kind == _LABEL:
            return
        else:
            raise InvalidLayer(
                f"Entry {show(path)} has the type {show(kind)}, which is no kind of file that an image can hold."
            )
        if not name:
            raise InvalidLayer(f"The root of the file system ({show(path)}) must be a directory.")

        parent = self._known.get(head)
        if parent is None:
            parent = self._parent(head, path)
        entries = parent.entries
        if name.startswith(_WHITEOUT):
            self._whiteout(entries, name, path)
            return
        if self._text_left < 0:
            self._recount()
        old = entries.get(name)
        if old is None:
            if len(name) > MAX_NAME or b"\0" in name:
                self._bad_name(name, path)
            if self._names_left <= 0:
                self._recount()
            self._names_left -= 1
            self._text_left -= len(name)
            entries[name] = node
            if kind == _DIRECTORY:
                self._remember(path.rstrip(b"/"), node)  # type: ignore[arg-type]
            elif self._skipped:
                self._forget()
        elif old.__class__ is Directory:
            if node.__class__ is Directory:
                # Children stay; all metadata comes from the newer entry.
                old.stat = node.stat
            else:
                entries[name] = node
                self._forget()
        else:
            entries[name] = node
            if self._linked and self._leads_on(old):
                self._forget()

    def finish(self, xattrs: str | None = None) -> FileSystem:
        """The tree as composefs writes it, with link counts. Ends the building: the builder must not be used
        afterwards.

        ``xattrs``: ``allowlist-only`` (the default) keeps security.capability alone, ``keep-user-xattrs`` also
        ``user.*``. The root gets the metadata of /usr, and /run is emptied: what a container engine puts there at run
        time must not change the digest. Raises InvalidLayer when /usr or /run is there but is no directory.
        """
        xattrs = xattrs or self._decided_xattrs or XATTR_MODES[0]
        if xattrs not in XATTR_MODES or self._decided_xattrs not in (None, xattrs):
            raise ValueError(f"xattrs is {xattrs!r}, must be {self._decided_xattrs or XATTR_MODES!r}")
        self._forget()
        self._stats.clear()
        if self._user_xattrs and xattrs == "allowlist-only":
            self._drop_user_xattrs()
        usr = subdirectory(self.root, b"usr")
        self.root.stat = usr.stat if usr is not None else _implied()
        run = subdirectory(self.root, b"run")
        if run is not None:
            empty(run, self.root.stat)
        count_links(self.root)
        return FileSystem(self.root)

    # -- entries ------------------------------------------------------------------------------------------------------

    def _regular(self, path: bytes, stat: Stat, size: int, content: Any) -> Leaf:
        if content is None:
            if size:
                raise InvalidLayer(f"File {show(path)} should have {size} bytes of content but has none.")
            return Leaf(stat)
        digest = getattr(content, "digest", None)
        if digest is None:
            content = bytes(content)
            if len(content) > THRESHOLD:
                raise InvalidLayer(
                    f"File {show(path)} of {len(content)} bytes is stored within the stream, not as an object.",
                    "Import the layer again.",
                )
            self._text_left -= len(content)
            return Leaf(stat, st.S_IFREG, content)
        if size <= THRESHOLD:
            raise InvalidLayer(
                f"File {show(path)} of {size} bytes is stored as an object, not within the stream.",
                "Import the layer again.",
            )
        return Leaf(stat, st.S_IFREG, b"", digest, size)

    def _hardlinked(self, path: bytes, link: bytes) -> Leaf:
        """The leaf that exists under ``link`` now; the metadata in the header of a hardlink means nothing."""
        head, name = self._normalise(link)
        if not name:
            raise InvalidLayer(f"Hardlink {show(path)} has the target {show(link)}, which names no file.")
        parent = self._known.get(head)
        if parent is None:
            parent = self._lookup(head, path)
        target = parent.entries.get(name) if parent is not None else None
        if target is None:
            raise InvalidLayer(
                f"Hardlink {show(path)} points to {show(link)}, which does not exist at this place of the layers."
            )
        if isinstance(target, Directory):
            raise InvalidLayer(f"Hardlink {show(path)} points to {show(link)}, which is a directory.")
        return target

    def _whiteout(self, entries: dict[bytes, Node], name: bytes, path: bytes) -> None:
        """Whatever its type, an entry of such a name only removes: one name, or (opaque) all names that are there at
        this moment.
        """
        if name == _OPAQUE:
            if any(self._leads_on(child) for child in entries.values()):
                self._forget()
            entries.clear()
            return
        hidden = name[len(_WHITEOUT) :]
        if hidden in _NOT_WHITEOUTS:
            # Other programs take this for the directory itself, or for the one above it.
            raise InvalidLayer(f"The whiteout {show(path)} names no file that it could hide.")
        if self._leads_on(entries.pop(hidden, None)):
            self._forget()

    def _leads_on(self, node: Node | None) -> bool:
        """Whether a directory that is known by its path may be known through ``node``."""
        return isinstance(node, Directory) or (node is not None and self._linked and node.kind == st.S_IFLNK)

    # -- metadata -----------------------------------------------------------------------------------------------------

    def _new_stat(self, key: tuple[int, int, int, int, int], xattrs: dict[bytes, bytes] | None) -> Stat:
        mode, uid, gid, mtime, mtime_nsec = key
        if not -(1 << 63) <= mtime < 1 << 63:
            # Base-256 fields can hold more than the 64 bits that count.
            mtime = ((mtime + (1 << 63)) & ((1 << 64) - 1)) - (1 << 63)
        stat = Stat(mode & 0xFFFFFFFF, uid & 0xFFFFFFFF, gid & 0xFFFFFFFF, mtime, mtime_nsec, xattrs)
        if xattrs is None:
            if len(self._stats) >= _CACHED_STATS:
                self._stats.clear()
            self._stats[key] = stat
        return stat

    def _kept(self, path: bytes, xattrs: dict[bytes, bytes]) -> dict[bytes, bytes] | None:
        """The attributes that some filter of finish() keeps; the rest takes no memory."""
        kept: list[tuple[bytes, bytes]] = []
        room = MAX_XATTR_BYTES
        for name in sorted(xattrs):
            if name != CAPABILITY:
                if not name.startswith(b"user.") or self._decided_xattrs == XATTR_MODES[0]:
                    continue
                self._user_xattrs = True
            value = xattrs[name]
            room -= len(name) + len(value)
            if len(value) > MAX_XATTR or len(name) > MAX_NAME or b"\0" in name or room < 0 or len(kept) == MAX_XATTRS:
                raise InvalidLayer(
                    f"The extended attributes of {show(path)} do not fit an image: {show(name)} has {len(value)} "
                    f"bytes. At most {MAX_XATTR}"
                    f" for a value, {MAX_NAME} for a name, {MAX_XATTRS} attributes and {MAX_XATTR_BYTES} bytes in all "
                    f"are possible."
                )
            kept.append((name, value))
        if not kept:
            return None
        key = tuple(kept)
        if len(self._xattrs) >= _CACHED_STATS:
            self._xattrs.clear()
        return self._xattrs.setdefault(key, dict(kept))

    def _drop_user_xattrs(self) -> None:
        for directory in directories(self.root):
            for node in (directory, *directory.entries.values()):
                xattrs = node.stat.xattrs
                if xattrs and (len(xattrs) > 1 or CAPABILITY not in xattrs):
                    node.stat = node.stat.replaced(
                        xattrs={CAPABILITY: xattrs[CAPABILITY]} if CAPABILITY in xattrs else None
                    )

    # -- paths --------------------------------------------------------------------------------------------------------

    @staticmethod
    def _normalise(path: bytes) -> tuple[bytes, bytes]:
        """Split into the parent (any spelling) and a real name; the name is empty for the root, which a final ``..``
        means too.
        """
        head, _unused, name = path.rstrip(b"/").rpartition(b"/")
        if name not in _ODD_NAMES:
            return head, name
        # Repeated slashes and "." components vanish. All at once: one by one would be quadratic.
        parts = [part for part in path.split(b"/") if part and part != b"."]
        if not parts or parts[-1] == b"..":
            return b"", b""
        return b"/".join(parts[:-1]), parts[-1]

    def _components(self, head: bytes, path: bytes) -> list[bytes]:
        parts = [part for part in head.split(b"/") if part and part != b"."]
        if b".." in parts:
            raise InvalidLayer(f"The path of entry {show(path)} contains '..'.")
        if len(parts) >= self._max_depth:
            self._too_deep(len(parts), path)
        return parts

    def _too_deep(self, depth: int, path: bytes) -> NoReturn:
        raise InvalidLayer(f"Entry {show(path)} lies {depth} directories deep; at most {self._max_depth} are possible.")

    def _lookup(self, head: bytes, path: bytes) -> Directory | None:
        """The directory under ``head``, None when there is nothing."""
        chain, missing = self._walk(head, path)
        if missing:
            return None
        self._remember(head, chain[-1])
        return chain[-1]

    def _parent(self, head: bytes, path: bytes) -> Directory:
        """The directory under ``head``, made with all its parents where no layer sent them."""
        chain, missing = self._walk(head, path)
        directory = chain[-1]
        stat: Stat | None = None
        for part in missing:
            if len(part) > MAX_NAME or b"\0" in part or part.startswith(_WHITEOUT):
                self._bad_name(part, path)
            if self._implied_left <= 0:
                raise InvalidLayer(
                    f"Entry {show(path)} lies in a directory that no layer contains, as do others: more than "
                    f"{self._max_implied} directories are missing.",
                    "Build the image with a tool that writes directories to its layers.",
                )
            if self._names_left <= 0 or self._text_left < 0:
                self._recount()
            self._implied_left -= 1
            self._names_left -= 1
            self._text_left -= len(part)
            stat = stat or _implied()
            child = directory.entries[part] = Directory(stat)
            directory = child
        self._remember(head, directory)
        return directory

    def _walk(self, head: bytes, path: bytes) -> tuple[list[Directory], list[bytes]]:
        """Follow ``head`` from the root: the directories on the way, the root first, and the names that are missing
        after the last.

        A symbolic link is replaced by what it leads to, which is never outside of the root. ``..`` of a link's
        target undoes the component before it, be that there or missing.
        """
        todo = self._components(head, path)
        todo.reverse()
        chain = [self.root]
        missing: list[bytes] = []
        links = 0
        while todo:
            part = todo.pop()
            if part == b"..":  # of a link: the path itself has none
                if missing:
                    missing.pop()
                    self._skipped = True
                elif len(chain) > 1:
                    chain.pop()
                continue
            child = None if missing else chain[-1].entries.get(part)
            if child is None:
                missing.append(part)
            elif isinstance(child, Directory):
                chain.append(child)
            elif child.kind == st.S_IFLNK:
                links += 1
                self._follow(child, links, part, path, chain, todo)
            else:
                self._not_a_directory(part, path)
            if len(chain) + len(missing) > self._max_depth:
                self._too_deep(len(chain) + len(missing), path)
        return chain, missing

    def _follow(
        self, link: Leaf, links: int, part: bytes, path: bytes, chain: list[Directory], todo: list[bytes]
    ) -> None:
        """Put the components of the link's target before what is still to do."""
        target = [part for part in link.data.split(b"/") if part and part != b"."]
        self._link_steps_left -= len(target) + 1
        if links > MAX_LINKS:
            raise InvalidLayer(
                f"Entry {show(path)} lies below {show(part)}, a symbolic link that leads through more than {MAX_LINKS} "
                "others, or in a circle."
            )
        if self._link_steps_left < 0:
            raise InvalidLayer(
                f"Entry {show(path)} lies below a symbolic link, as do others: following them all takes too long.",
                "Build the image with a tool that writes real paths to its layers.",
            )
        if link.data.startswith(b"/"):
            del chain[1:]
        todo.extend(reversed(target))
        self._linked = True

    def _remember(self, head: bytes, directory: Directory) -> None:
        self._known_bytes += len(head) + 100
        if self._known_bytes > _CACHED_BYTES:
            self._forget()
        self._known[head] = directory

    def _forget(self) -> None:
        if self._known:
            self._known.clear()
        self._known_bytes = 0

    # -- bounds and refusals ------------------------------------------------------------------------------------------

    def _recount(self) -> None:
        """Find how many names are really there, and how much text; layers also remove some."""
        live = text = 0
        counted: set[int] = set()
        for directory in directories(self.root):
            live += len(directory.entries)
            for name, node in directory.entries.items():
                text += len(name)
                if node.stat.xattrs:
                    text += 2 * _size(node.stat.xattrs)
                # A long text with many names takes memory once.
                if isinstance(node, Leaf) and node.data and (len(node.data) <= THRESHOLD or id(node) not in counted):
                    text += len(node.data)
                    if len(node.data) > THRESHOLD:
                        counted.add(id(node))
        if live >= self._max_inodes:
            raise InvalidLayer(f"The image has more than {self._max_inodes} files, directories and links.")
        if text >= self._max_text:
            raise TooLarge(
                f"The names, link targets, small files and extended attributes of the image have more than "
                f"{self._max_text} bytes together.",
                "The image is hostile or built in an unusual way; have it rebuilt with fewer or shorter ones.",
            )
        # Counting costs time in proportion to the tree, so it must not be needed for every entry of a tree that is
        # nearly full.
        self._names_left = max(self._max_inodes - live, self._max_inodes >> 3, 1)
        self._text_left = max(self._max_text - text, self._max_text >> 3, 1)

    @staticmethod
    def _not_a_directory(part: bytes, path: bytes) -> NoReturn:
        raise InvalidLayer(f"Entry {show(path)} lies below {show(part)}, which is not a directory.")

    @staticmethod
    def _bad_name(name: bytes, path: bytes) -> NoReturn:
        if len(name) > MAX_NAME:
            raise InvalidLayer(
                f"Entry {show(path)} has a name of {len(name)} bytes; a file system holds at most {MAX_NAME}."
            )
        if b"\0" in name:
            raise InvalidLayer(f"The path of entry {show(path)} contains a NUL byte.")
        raise InvalidLayer(f"Entry {show(path)} lies below the whiteout {show(name)}, which cannot be a directory.")


def _size(xattrs: dict[bytes, bytes]) -> int:
    return sum(len(name) + len(value) for name, value in xattrs.items())


def subdirectory(root: Directory, name: bytes) -> Directory | None:
    """The directory ``name`` of the root, None when there is none. Raises InvalidLayer when something else has that
    name.
    """
    node = root.entries.get(name)
    if node is None or isinstance(node, Directory):
        return node
    raise InvalidLayer(f"/{name.decode()} of the image is not a directory; composefs needs it to be one.")


def empty(directory: Directory, like: Stat) -> None:
    """Remove all children and take over the modification time, nanoseconds included, of ``like``."""
    directory.entries.clear()
    directory.stat = directory.stat.replaced(mtime=(like.mtime, like.mtime_nsec), xattrs=directory.stat.xattrs)


def build_tree(layers: Iterable[Iterable[tuple[Entry, Any]]], xattrs: str = "allowlist-only") -> FileSystem:
    """The tree of an image from the entries of its layers, in the order of the configuration's diff_ids (base
    first).
    """
    builder = TreeBuilder()
    add = builder.add
    for layer in layers:
        for entry, content in layer:
            add(entry, content)
    return builder.finish(xattrs)
