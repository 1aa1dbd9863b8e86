# Copyright (c) composefs.oci contributors
# SPDX-License-Identifier: BSD-2-Clause
"""SELinux labels for a bootable image, from the policy that the image itself brings.

The labels that a booted system needs must be part of the measured image: nothing can label a read-only file system
later. The rules are those of composefs-rs 0.9, which decide the digest: the last matching line of file_contexts, .local
and .homedirs wins (no sorting by specificity), aliases of .subs and .subs_dist replace a whole path, labels are stored
without a final NUL.
"""

from __future__ import annotations

import stat as st
from collections.abc import Iterator
from typing import NamedTuple

from ..formats.bounds import MAX_SYMLINK, MAX_XATTR
from .lastmatch import LastMatch, Pattern, State
from ..errors import InvalidLayer
from .filetree import Directory, Leaf, ReadObject, Stat, count_links, directories, find_directory, read_file
from ..formats.tarheader import show

LABEL = b"security.selinux"

#: The file_contexts of a complete distribution has half a megabyte.
MAX_POLICY_FILE = 16 << 20
_MAX_CONFIG = 1 << 20
_MAX_LINES = 200_000
#: How long a path may be where expressions with look-around see it as a whole.
_MAX_PATH = 1 << 14

_NO_LABEL = b"<<none>>"
_KINDS = {
    st.S_IFREG: b"-",
    st.S_IFDIR: b"d",
    st.S_IFLNK: b"l",
    st.S_IFCHR: b"c",
    st.S_IFBLK: b"b",
    st.S_IFIFO: b"p",
    st.S_IFSOCK: b"s",
}
_TYPE_FIELDS = {b"-" + char: char for char in _KINDS.values()}
_SPEC_FILES = (b"file_contexts", b"file_contexts.local", b"file_contexts.homedirs")
_SUBS_FILES = (b"file_contexts.subs", b"file_contexts.subs_dist")


class Rule(NamedTuple):
    """One line of file_contexts; ``label`` is None where it says that there shall be none."""

    pattern: Pattern
    label: bytes | None


class Policy(NamedTuple):
    """What file_contexts and its companions say: rules in their order, and paths that stand for another one."""

    rules: list[Rule]
    aliases: dict[bytes, bytes]


# -- reading the policy -----------------------------------------------------------------------------------------------


def read_policy(root: Directory, read_object: ReadObject) -> Policy | None:
    """The policy of the image, None when it names none. Raises InvalidLayer for one that is damaged or incomplete."""
    selinux = find_directory(root, b"/etc/selinux")
    config = selinux.entries.get(b"config") if selinux is not None else None
    if selinux is None or config is None:
        return None
    kind = policy_type(read_file(config, b"/etc/selinux/config", read_object, _MAX_CONFIG))
    if kind is None:
        return None
    folder = kind + b"/contexts/files"
    files = find_directory(selinux, folder) if kind else None
    if files is None:
        raise InvalidLayer(
            f"/etc/selinux/config of the image names the policy {show(kind)}, which is not there: "
            f"{show(b'/etc/selinux/' + folder)} is missing."
        )

    def content(name: bytes) -> bytes | None:
        node = files.entries.get(name) if files is not None else None
        return (
            None
            if node is None
            else read_file(node, b"/etc/selinux/" + folder + b"/" + name, read_object, MAX_POLICY_FILE)
        )

    rules: list[Rule] = []
    for name in _SPEC_FILES:
        data = content(name)
        if data is not None:
            rules.extend(parse_rules(data, name))
        elif name == _SPEC_FILES[0]:
            raise InvalidLayer(f"The SELinux policy {show(kind)} of the image has no file_contexts.")
    aliases: dict[bytes, bytes] = {}
    for name in _SUBS_FILES:
        aliases.update(parse_aliases(content(name) or b"", name))
    if len(rules) + len(aliases) > _MAX_LINES:
        raise InvalidLayer(f"The SELinux policy {show(kind)} of the image has more than {_MAX_LINES} lines.")
    return Policy(rules, aliases)


def policy_type(config: bytes) -> bytes | None:
    """What SELINUXTYPE is in /etc/selinux/config, None when it is not there. The first one counts; whether SELinux is
    enabled does not matter.
    """
    for number, line in enumerate(config.split(b"\n"), 1):
        _check_text(line, "config", number)
        key, equals, value = line.partition(b"=")
        if equals and key.strip().upper() == b"SELINUXTYPE":
            return value.strip()
    return None


def parse_rules(data: bytes, name: bytes) -> Iterator[Rule]:
    """The lines ``regex [-type] context`` of a file_contexts file called ``name``."""
    for number, fields in _lines(data, name):
        if len(fields) == 2:
            kind = b""
        elif len(fields) == 3 and fields[1] in _TYPE_FIELDS:
            kind = _TYPE_FIELDS[fields[1]]
        else:
            raise InvalidLayer(
                f"Line {number} of {name.decode()} in the SELinux policy of the image is not 'regex [-type] context'."
            )
        label = fields[-1]
        if len(label) > MAX_XATTR:
            raise InvalidLayer(
                f"Line {number} of {name.decode()} in the SELinux policy of the image has a context of {len(label)} "
                f"bytes."
            )
        yield Rule(Pattern(fields[0], kind), None if label == _NO_LABEL else label)


def parse_aliases(data: bytes, name: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The lines ``alias original`` of a file_contexts.subs file called ``name``."""
    for number, fields in _lines(data, name):
        if len(fields) != 2:
            raise InvalidLayer(
                f"Line {number} of {name.decode()} in the SELinux policy of the image is not 'alias original'."
            )
        if max(map(len, fields)) > MAX_SYMLINK:
            raise InvalidLayer(
                f"Line {number} of {name.decode()} in the SELinux policy of the image has a path of more than "
                f"{MAX_SYMLINK} bytes."
            )
        yield fields[0], fields[1]


def _lines(data: bytes, name: bytes) -> Iterator[tuple[int, list[bytes]]]:
    for number, line in enumerate(data.split(b"\n"), 1):
        _check_text(line, name.decode(), number)
        fields = line.split()
        if fields and not fields[0].startswith(b"#"):
            yield number, fields


def _check_text(line: bytes, name: str, number: int) -> None:
    try:
        line.decode()
    except UnicodeDecodeError:
        raise InvalidLayer(f"Line {number} of {name} in the SELinux policy of the image is not UTF-8 text.") from None


# -- labelling --------------------------------------------------------------------------------------------------------


class _Relabeller:
    """The same metadata with another label, shared by all inodes that had the same before."""

    def __init__(self) -> None:
        # The original is kept beside its identity, which is only unique while it lives.
        self._known: dict[tuple[int, bytes | None], tuple[Stat, Stat]] = {}

    def __call__(self, stat: Stat, label: bytes | None) -> Stat:
        found = self._known.get((id(stat), label))
        if found is not None:
            return found[1]
        old = stat.xattrs or {}
        xattrs = {name: value for name, value in old.items() if name != LABEL}
        if label is not None:
            xattrs[LABEL] = label
        new = stat if xattrs == old else stat.replaced(xattrs=xattrs)
        if len(self._known) > 1 << 16:
            self._known.clear()
        self._known[id(stat), label] = (stat, new)
        return new


def remove_labels(root: Directory) -> None:
    """Take security.selinux from every inode."""
    relabel = _Relabeller()
    for directory in directories(root):
        directory.stat = relabel(directory.stat, None)
        for node in directory.entries.values():
            if node.__class__ is Leaf:
                node.stat = relabel(node.stat, None)


def apply_policy(root: Directory, policy: Policy) -> None:
    """Label every inode in place; link counts must be right before and are after.

    A directory is labelled first, then its children in the order of their names, each with all that is below it before
    the next. The order matters for hardlinks: the first name decides the label, and a name that must have another one
    becomes an inode of its own.
    """
    labels = [rule.label for rule in policy.rules]
    automaton = LastMatch([rule.pattern for rule in policy.rules])
    feed, best = automaton.feed, automaton.best
    aliases = policy.aliases
    relabel = _Relabeller()
    linked: dict[int, bytes | None] = {}
    split = False
    # Whole paths are needed to find aliases, so up to the length of the longest one, and for look-around. Longer paths
    # are not kept: they would need memory in proportion to the square of the depth.
    longest = _MAX_PATH if automaton.needs_path else max(map(len, aliases), default=0)

    def label_of(state: State, kind: bytes, path: bytes) -> bytes | None:
        found = best(state, kind, path)
        return labels[found] if found >= 0 else None

    root.stat = relabel(root.stat, label_of(feed(automaton.start, b"/"), b"d", b"/"))
    # Paths are as the policy sees them: below an alias as if below its original.
    stack: list[tuple[Directory, bytes | None, State, Iterator[bytes]]] = [
        (root, b"/", feed(automaton.start, b"/"), iter(sorted(root.entries)))
    ]
    while stack:
        directory, prefix, base, names = stack[-1]
        entries = directory.entries
        for name in names:
            node = entries[name]
            path = prefix + name if prefix is not None else b""
            if path in aliases:
                path = aliases[path]
                state = feed(automaton.start, path)
            else:
                state = feed(base, name)
            if isinstance(node, Directory):
                node.stat = relabel(node.stat, label_of(state, b"d", path))
                if not path.endswith(b"/"):
                    path += b"/"
                    state = feed(state, b"/")
                below = path if prefix is not None and len(path) <= longest else None
                if below is None and automaton.needs_path:
                    raise InvalidLayer(f"{show(path)} is too long a path for the SELinux policy of the image.")
                stack.append((node, below, state, iter(sorted(node.entries))))
                break
            label = label_of(state, _KINDS[node.kind], path)
            if node.nlink > 1:
                if id(node) in linked:
                    if linked[id(node)] != label:
                        entries[name] = node.clone(relabel(node.stat, label))
                        split = True
                    continue
                linked[id(node)] = label
            node.stat = relabel(node.stat, label)
        else:
            stack.pop()
    if split:
        count_links(root)
