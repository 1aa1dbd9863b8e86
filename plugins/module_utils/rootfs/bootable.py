# Copyright (c) composefs.oci contributors
# SPDX-License-Identifier: BSD-2-Clause
"""The tree of a bootable image: what composefs-rs 0.9.3 and newer make of a plain one.

Kernels and boot entries are looked for, and an image that has them damaged is refused; then /boot and /sysroot are
emptied, since other file systems are mounted there and the digest of the root must not depend on what is copied out of
them; then SELinux labels are set.
"""

from __future__ import annotations

import stat as st
import struct
from collections.abc import Iterator

from ..errors import InvalidLayer, NotBootable
from .filetree import Directory, FileSystem, Leaf, Node, ReadObject, count_links, find, find_directory, read_file
from .selinux import apply_policy, read_policy, remove_labels
from ..formats.tarheader import show
from .merge import empty

#: Boot loader entries are a few lines.
MAX_ENTRY = 1 << 20
#: An Android boot image or unified kernel is checked by its headers, but an object can only be read as a whole.
MAX_PAYLOAD = 1 << 29

_OTHER_IMAGE = "Pull it without bootable, or use an image made for booting."
_ENTRY_KEYS = (b"linux", b"initrd", b"efi")


def transform_for_boot(filesystem: FileSystem, read_object: ReadObject) -> None:
    """Turn a plain tree (of TreeBuilder.finish) into that of the bootable image, in place.

    ``read_object(digest, limit)`` returns the content of an external file: boot loader entries, aboot payloads and the
    SELinux policy are read. Raises InvalidLayer for boot files that are damaged and for a damaged policy,
    NotBootable when /boot or /sysroot is no directory.
    """
    root = filesystem.root
    # This comes first: boot files can be looked for only where these are directories.
    directories = [_required(root, name) for name in (b"boot", b"sysroot")]
    check_boot_resources(root, read_object)
    usr = find_directory(root, b"/usr")
    for directory in directories:
        empty(directory, usr.stat if usr is not None else root.stat)
    # A file outside of /boot that also had a name in it has one name less now. Hardlink labelling and the writer depend
    # on these counts.
    count_links(root)
    policy = read_policy(root, read_object)
    if policy is None:
        remove_labels(root)
    else:
        apply_policy(root, policy)


def _required(root: Directory, name: bytes) -> Directory:
    try:
        directory = find_directory(root, b"/" + name)
    except InvalidLayer as error:
        raise NotBootable(error.message, _OTHER_IMAGE) from error
    if directory is None:
        raise NotBootable(f"The image has no /{name.decode()}, which a bootable image needs.", _OTHER_IMAGE)
    return directory


def check_boot_resources(root: Directory, read_object: ReadObject) -> None:
    """Look at everything the image could be booted from. Raises InvalidLayer for what is damaged or contradictory."""
    payloads = _aboot_payloads(root, read_object)
    others = _loader_entries(root, read_object)
    others += _unified_kernels(find_directory(root, b"/boot/EFI/Linux"), b"/boot/EFI/Linux")
    others += _unified_kernels(find_directory(root, b"/boot/loader/addons"), b"/boot/loader/addons")
    others += _kernels(root)
    if len(payloads) > 1:
        raise InvalidLayer(
            f"The image has more than one aboot payload in /boot: {', '.join(show(name) for name in payloads[:4])}."
        )
    if payloads and others:
        raise InvalidLayer(
            f"The image has the aboot payload {show(payloads[0])} and {others} kernels or boot loader entries of "
            f"other kinds; only one kind is possible."
        )


def _is_file(node: Node | None) -> bool:
    return isinstance(node, Leaf) and node.kind == st.S_IFREG


def _loader_entries(root: Directory, read_object: ReadObject) -> int:
    """Type 1 entries (UAPI boot loader specification): every file that an entry names must be there."""
    folder = b"/boot/loader/entries"
    directory = find_directory(root, folder)
    count = 0
    for name, node in sorted((directory.entries if directory is not None else {}).items()):
        if not name.endswith(b".conf"):
            continue
        path = folder + b"/" + name
        text = read_file(node, path, read_object, MAX_ENTRY)
        try:
            text.decode()
        except UnicodeDecodeError:
            raise InvalidLayer(f"The boot loader entry {show(path)} of the image is not UTF-8 text.") from None
        for target in _named_files(text):
            found = find(root, target) if target.strip(b"/") else None
            if not _is_file(found):
                what = "does not exist in the image" if found is None else "is not a regular file"
                raise InvalidLayer(f"The boot loader entry {show(path)} names {show(target)}, which {what}.")
        count += 1
    return count


def _named_files(text: bytes) -> Iterator[bytes]:
    for line in text.split(b"\n"):
        for key in _ENTRY_KEYS:
            rest = line[len(key) :]
            if line.startswith(key) and rest[:1] in (b" ", b"\t"):
                yield rest.strip()


def _unified_kernels(directory: Directory | None, path: bytes) -> int:
    """Count the unified kernel images at any depth; add-ons to them are checked too but are no kernels."""
    count = 0
    stack = [] if directory is None else [directory]
    while stack:
        for name, node in stack.pop().entries.items():
            if isinstance(node, Directory):
                stack.append(node)
            elif name.endswith(b".efi"):
                if not _is_file(node):
                    raise InvalidLayer(f"{show(name)} below {show(path)} in the image is not a regular file.")
                count += not name.endswith(b".addon.efi")
    return count


def _kernels(root: Directory) -> int:
    folder = b"/usr/lib/modules"
    directory = find_directory(root, folder)
    count = 0
    for version, node in (directory.entries if directory is not None else {}).items():
        if not isinstance(node, Directory):
            continue
        count += _unified_kernels(node, folder + b"/" + version)
        if _is_file(node.entries.get(b"vmlinuz")):
            _check_version(version, folder + b"/" + version)
            count += 1
    return count


def _check_version(version: bytes, path: bytes) -> None:
    try:
        version.decode()
    except UnicodeDecodeError:
        raise InvalidLayer(f"The kernel version in {show(path)} of the image is not UTF-8 text.") from None


# -- aboot ------------------------------------------------------------------------------------------------------------


def _aboot_payloads(root: Directory, read_object: ReadObject) -> list[bytes]:
    """``aboot-<version>.img`` directly in /boot: what Android's boot loader takes, perhaps with
    ``vbmeta-<version>.img``.
    """
    directory = find_directory(root, b"/boot")
    entries = directory.entries if directory is not None else {}
    payloads: dict[bytes, bool] = {}
    tables: list[bytes] = []
    for name, node in sorted(entries.items()):
        for prefix in (b"aboot-", b"vbmeta-"):
            if not name.startswith(prefix) or not name.endswith(b".img"):
                continue
            path = b"/boot/" + name
            version = name[len(prefix) : -4]
            if not version:
                raise InvalidLayer(f"{show(path)} of the image has no kernel version in its name.")
            _check_version(version, path)
            if not isinstance(node, Leaf) or not _is_file(node):
                raise InvalidLayer(f"{show(path)} of the image is not a regular file.")
            if prefix == b"vbmeta-":
                tables.append(version)
            else:
                payloads[version] = _is_android(read_file(node, path, read_object, MAX_PAYLOAD), path)
    for version in tables:
        if not payloads.get(version):
            raise InvalidLayer(
                f"/boot/vbmeta-{version.decode()}.img of the image does not stand beside an Android boot image of "
                f"this version."
            )
    return [b"/boot/aboot-" + version + b".img" for version in payloads]


def _is_android(data: bytes, path: bytes) -> bool:
    """True for an Android boot image (header version 2), False for a PE file with a kernel and an initrd, InvalidLayer
    for anything else.
    """
    if data.startswith(b"ANDROID!"):
        if len(data) >= 1660:
            page_size, version = struct.unpack_from("<I", data, 36)[0], struct.unpack_from("<I", data, 40)[0]
            header_size = struct.unpack_from("<I", data, 1644)[0]
            if version == 2 and 1660 <= header_size <= page_size:
                return True
        raise InvalidLayer(f"{show(path)} of the image is not an Android boot image of header version 2.")
    if {b".linux", b".initrd"} <= _pe_sections(data):
        return False
    raise InvalidLayer(
        f"{show(path)} of the image is neither an Android boot image nor a unified kernel with .linux and .initrd."
    )


def _pe_sections(data: bytes) -> set[bytes]:
    """The names of a PE file's sections whose content is there; empty for other files (Microsoft PE format, COFF file
    header and section table).
    """
    if not data.startswith(b"MZ") or len(data) < 64:
        return set()
    (header,) = struct.unpack_from("<I", data, 60)
    if data[header : header + 4] != b"PE\0\0" or len(data) < header + 24:
        return set()
    (sections,) = struct.unpack_from("<H", data, header + 6)
    (optional,) = struct.unpack_from("<H", data, header + 20)
    table = header + 24 + optional
    names = set()
    for start in range(table, min(table + 40 * sections, len(data) - 39), 40):
        size, begin = struct.unpack_from("<II", data, start + 16)
        if begin + size <= len(data):
            names.add(data[start : start + 8].rstrip(b"\0"))
    return names
