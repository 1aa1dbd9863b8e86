# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import contextlib
import pathlib
import struct
from typing import Any

import pytest
from ansible_collections.composefs.oci.plugins.module_utils.formats import fsverity
from ansible_collections.composefs.oci.plugins.module_utils.rootfs import bootable, dumpfile, erofswriter, filetree
from ansible_collections.composefs.oci.plugins.module_utils.errors import InvalidLayer, NotBootable
from ansible_collections.composefs.oci.plugins.module_utils.rootfs.filetree import Directory, Leaf, Stat
from ansible_collections.composefs.oci.tests.support import layers
from ansible_collections.composefs.oci.tests.support.tarbytes import DIRECTORY, HARDLINK, SYMLINK, member, tar
from hypothesis import given, settings
from hypothesis import strategies as st

KERNEL = b"K" * 100
MODULES = "usr/lib/modules/6.1"


def image(*members: tuple[Any, ...], without: str = "") -> bytes:
    """A layer of (name, data or type [, link]) with all parents, apart from ``without``."""
    made: dict[bytes, bytes] = {
        name: member(name + b"/", type=DIRECTORY, mtime=77)
        for name in (b"usr", b"boot", b"sysroot")
        if name.decode() != without
    }
    for name, what, *link in members:
        raw = name if isinstance(name, bytes) else name.encode()
        parts = raw.split(b"/")
        for depth in range(1, len(parts)):
            parent = b"/".join(parts[:depth])
            made.setdefault(parent, member(parent + b"/", type=DIRECTORY))
        kind = what if what in (DIRECTORY, SYMLINK, HARDLINK) else b"0"
        made[raw] = member(raw, b"" if kind != b"0" else what, type=kind, linkname=link[0] if link else b"")
    return tar(*made.values())


def link(name: str) -> tuple[Any, ...]:
    return name, SYMLINK, "elsewhere"


def entry(text: bytes, *others: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    return [("boot/loader/entries/a.conf", text), *others]


def android(
    version: int = 2, header: int = 1660, page: int = 4096, size: int = 4096, magic: bytes = b"ANDROID!"
) -> bytes:
    data = bytearray(size)
    data[:8] = magic
    struct.pack_into("<II", data, 36, page, version)
    if size >= 1648:
        struct.pack_into("<I", data, 1644, header)
    return bytes(data)


def executable(
    sections: tuple[bytes, ...] = (b".linux", b".initrd"), optional: int = 240, end: int | None = None
) -> bytes:
    """A PE file with 512 bytes a section."""
    head = b"MZ".ljust(60, b"\0") + struct.pack("<I", 64)
    coff = b"PE\0\0" + struct.pack("<HHIIIHH", 0x8664, len(sections), 0, 0, 0, optional, 0x22)
    fields = bytearray(optional)
    if optional >= 112:
        struct.pack_into("<H", fields, 0, 0x20B)
        struct.pack_into("<I", fields, 108, 16)
    table = b"".join(
        struct.pack("<8sIIIIIIHHI", name, 512, 4096 * (number + 1), 512, 1024 + 512 * number, 0, 0, 0, 0, 0x40000040)
        for number, name in enumerate(sections)
    )
    return (head + coff + bytes(fields) + table).ljust(1024 + 512 * len(sections), b"\0")[:end]


def aboot(data: bytes, version: str = "6.1") -> tuple[Any, ...]:
    return f"boot/aboot-{version}.img", data


def vbmeta(version: str = "6.1") -> tuple[Any, ...]:
    return f"boot/vbmeta-{version}.img", b"v" * 100


GOOD: dict[str, list[tuple[Any, ...]]] = {
    "nothing": [],
    "entry without files": entry(b"title x\n"),
    "empty entry": entry(b""),
    "entry from the root": entry(b"linux /vm\n", ("vm", KERNEL)),
    "entry with the mount point": entry(b"linux /boot/vm\ninitrd /boot/i\n", ("boot/vm", KERNEL), ("boot/i", KERNEL)),
    "entry with a relative path": entry(b"linux vm\n", ("vm", KERNEL)),
    "entry with dots and slashes": entry(b"linux //boot/.//vm\n", ("boot/vm", KERNEL)),
    "entry with a space": entry(b"linux /boot/v m\n", ("boot/v m", KERNEL)),
    "entry with tabs": entry(b"efi\t \t/boot/vm\n", ("boot/vm", KERNEL)),
    "entry in an object": entry(b"#" * 100 + b"\nlinux /boot/vm\n", ("boot/vm", KERNEL)),
    "other keys": entry(
        b"devicetree /gone\nlinuxx /gone\nLINUX /gone\n#linux /gone\nlinux\n  linux /gone\nlinux\v/gone\n"
    ),
    "other names": [
        ("boot/loader/entries/a.txt", b"linux /gone\n"),
        ("boot/loader/entries/d/a.conf", b"linux /gone\n"),
    ],
    "unified kernel": [
        ("boot/EFI/Linux/a.efi", KERNEL),
        ("boot/EFI/Linux/d/b.efi", KERNEL),
        ("boot/EFI/Linux/a.addon.efi", KERNEL),
    ],
    "directory with the name of a kernel": [("boot/EFI/Linux/a.efi/x", b"")],
    "other files beside kernels": [link("boot/EFI/Linux/a.EFI"), link("boot/EFI/Linux/x")],
    "kernel": [(MODULES + "/vmlinuz", KERNEL), (MODULES + "/initramfs.img", KERNEL)],
    "odd kernels": [link(MODULES + "/vmlinuz"), (MODULES + "/initramfs.img", DIRECTORY), ("usr/lib/modules/file", b"")],
    "kernel linked": [link("usr/lib/modules/6.1")],
    "other version without kernel": [
        (b"usr/lib/modules/\xff/initramfs.img", KERNEL),
        (b"usr/lib/modules/\xff/a.efi", KERNEL),
    ],
    "aboot": [aboot(android())],
    "aboot with vbmeta": [aboot(android()), vbmeta()],
    "aboot of the smallest size": [aboot(android(size=1660))],
    "aboot with small pages": [aboot(android(page=2048, header=2048))],
    "aboot with odd pages": [aboot(android(page=3000))],
    "aboot in PE": [aboot(executable())],
    "aboot in PE with more": [aboot(executable((b".text", b".linux", b".osrel", b".initrd"), optional=0))],
    "aboot with an addon": [
        aboot(android()),
        ("boot/EFI/Linux/a.addon.efi", KERNEL),
        ("boot/loader/addons/b.addon.efi", KERNEL),
    ],
    "aboot with an initramfs": [aboot(android()), (MODULES + "/initramfs.img", KERNEL), link(MODULES + "/vmlinuz")],
    "names like aboot": [
        ("boot/aboot.img", b"x"),
        ("boot/aboot-1.imgx", b"x"),
        ("boot/vbmeta.img", b"x"),
        (MODULES + "/aboot.img", b"x"),
    ],
}
BAD: dict[str, list[tuple[Any, ...]]] = {
    "entry names a missing file": entry(b"linux /boot/gone\n"),
    "entry names two kernels of which one is missing": entry(
        b"linux /boot/vm\nlinux /boot/gone\n", ("boot/vm", KERNEL)
    ),
    "entry names a missing initrd": entry(b"linux /boot/vm\ninitrd /boot/gone\n", ("boot/vm", KERNEL)),
    "entry names two initrds in one line": entry(b"initrd /boot/i /boot/j\n", ("boot/i", KERNEL), ("boot/j", KERNEL)),
    "entry names a path from its file system": entry(b"linux /vm\n", ("boot/vm", KERNEL)),
    "entry names a link": entry(b"linux /boot/vm\n", link("boot/vm")),
    "entry names a directory": entry(b"linux /boot/vm\n", ("boot/vm", DIRECTORY)),
    "entry names the root": entry(b"linux /\n"),
    "entry names nothing": entry(b"linux \n"),
    "entry names something below a file": entry(b"linux /boot/vm/x\n", ("boot/vm", KERNEL)),
    "entry climbs": entry(b"linux /boot/../boot/vm\n", ("boot/vm", KERNEL)),
    "entry is no text": entry(b"title \xff\n"),
    "entry is a link": [link("boot/loader/entries/a.conf")],
    "entry is a directory": [("boot/loader/entries/a.conf", DIRECTORY)],
    "entry without a name": [("boot/loader/entries/.conf", b"linux /gone\n")],
    "entries are a link": [("boot/loader", DIRECTORY), link("boot/loader/entries")],
    "loader is a file": [("boot/loader", b"")],
    "unified kernel is a link": [link("boot/EFI/Linux/d/d/a.efi")],
    "unified kernel without a name is a link": [link("boot/EFI/Linux/.efi")],
    "addon is a link": [link("boot/EFI/Linux/a.efi.extra.d/a.addon.efi")],
    "global addon is a link": [link("boot/loader/addons/d/a.addon.efi")],
    "kernel among modules is a link": [link(MODULES + "/d/a.efi")],
    "directory of kernels is a link": [("boot/EFI", DIRECTORY), link("boot/EFI/Linux")],
    "modules are a link": [("usr/lib", DIRECTORY), link("usr/lib/modules")],
    "version is no text": [(b"usr/lib/modules/\xff/vmlinuz", KERNEL)],
    "aboot of version 1": [aboot(android(version=1))],
    "aboot of version 3": [aboot(android(version=3))],
    "aboot with a short header": [aboot(android(header=1659))],
    "aboot with a header beyond its page": [aboot(android(header=4097))],
    "aboot cut off": [aboot(android(size=1659))],
    "aboot with a magic only": [aboot(b"ANDROID!")],
    "aboot is empty": [aboot(b"")],
    "aboot is something else": [aboot(b"g" * 5000)],
    "aboot in PE without an initrd": [aboot(executable((b".linux",)))],
    "aboot in PE without a kernel": [aboot(executable((b".initrd", b".linuxx")))],
    "aboot in PE cut off": [aboot(executable(end=1500))],
    "aboot in PE cut off in the table": [aboot(executable(end=64 + 24 + 240 + 79))],
    "aboot is a link": [link("boot/aboot-6.1.img")],
    "aboot is a directory": [("boot/aboot-6.1.img", DIRECTORY)],
    "aboot without a version": [aboot(android(), "")],
    "aboot of a version that is no text": [(b"boot/aboot-\xff.img", android())],
    "two aboots": [aboot(android()), aboot(executable(), "6.2")],
    "vbmeta alone": [vbmeta()],
    "vbmeta of another version": [aboot(android()), vbmeta("6.2")],
    "vbmeta beside PE": [aboot(executable()), vbmeta()],
    "vbmeta is a link": [aboot(android()), link("boot/vbmeta-6.1.img")],
    "vbmeta without a version": [aboot(android()), vbmeta("")],
    "aboot with an entry": [aboot(android()), *entry(b"title x\n")],
    "aboot with a unified kernel": [aboot(android()), ("boot/EFI/Linux/a.efi", KERNEL)],
    "aboot with a kernel for a global addon": [aboot(android()), ("boot/loader/addons/a.efi", KERNEL)],
    "aboot with a unified kernel among modules": [aboot(android()), (MODULES + "/d/a.efi", KERNEL)],
    "aboot with a kernel": [aboot(executable()), (MODULES + "/vmlinuz", KERNEL)],
}


@pytest.mark.parametrize("name", GOOD)
def test_whole_boot_files_are_accepted(name: str) -> None:
    root = layers.tree(image(*GOOD[name]), bootable=True).root
    assert not any(path.startswith((b"/boot/", b"/sysroot/")) for path, _unused in filetree.walk(root))


@pytest.mark.parametrize("name", BAD)
def test_damaged_or_contradictory_boot_files_are_refused(name: str) -> None:
    layer = image(*BAD[name])
    with pytest.raises(InvalidLayer):
        layers.tree(layer, bootable=True)
    layers.tree(layer)


@pytest.mark.slow
@pytest.mark.skipif(not layers.Cfsctl.available(), reason="cfsctl is not on the PATH")
@pytest.mark.parametrize(("names", "good"), [(GOOD, True), (BAD, False)])
def test_cfsctl_agrees_on_boot_files(
    names: dict[str, list[tuple[Any, ...]]], good: bool, tmp_path: pathlib.Path
) -> None:
    cfsctl = layers.Cfsctl(tmp_path)
    for name, members in names.items():
        layer = image(*members)
        cfsctl.pull([layer])
        theirs = cfsctl.ask("dump", "--bootable")
        assert (theirs is not None) == good, name
        if theirs is not None:
            assert dumpfile.dumpfile_bytes(layers.tree(layer, bootable=True).root) == theirs, name


def test_spaces_and_a_return_after_a_path_are_no_part_of_it() -> None:
    layers.tree(image(*entry(b"linux /boot/vm \r\n", ("boot/vm", KERNEL))), bootable=True)


@pytest.mark.parametrize("name", ["boot", "sysroot"])
def test_boot_and_sysroot_must_be_directories(name: str) -> None:
    for layer in (image(without=name), image((name, b""), without=name), image(link(name), without=name)):
        with pytest.raises(NotBootable, match=f"/{name}"):
            layers.tree(layer, bootable=True)


def test_boot_and_sysroot_are_emptied_and_take_the_whole_time_of_usr() -> None:
    layer = tar(
        member("usr/", type=DIRECTORY, pax={"mtime": "77.123456789"}),
        member("boot/", type=DIRECTORY, mode=0o700, uid=5, pax={"mtime": "5.5"}),
        member("boot/x", b"x"),
        member("sysroot/", type=DIRECTORY, xattrs={"security.capability": b"c"}),
        member("sysroot/ostree/", type=DIRECTORY),
        member("y", type=HARDLINK, linkname="boot/x"),
    )
    root = layers.tree(layer, bootable=True).root
    assert [path for path, _unused in filetree.walk(root)] == [b"/", b"/boot", b"/sysroot", b"/usr", b"/y"]
    assert root.entries[b"boot"].stat == Stat(0o700, 5, 0, 77, 123456789)
    assert root.entries[b"sysroot"].stat == Stat(0o755, 0, 0, 77, 123456789, {b"security.capability": b"c"})
    assert root.entries[b"y"].nlink == 1


def test_the_plain_tree_keeps_its_boot_files() -> None:
    root = layers.tree(image(("boot/x", b"x"))).root
    assert b"/boot/x" in dict(filetree.walk(root))


def test_files_too_long_for_what_they_are_called_are_not_read() -> None:
    def read(digest: bytes, limit: int) -> bytes:
        raise AssertionError("read")

    for name, size in (("loader/entries/a.conf", bootable.MAX_ENTRY + 1), ("aboot-1.img", bootable.MAX_PAYLOAD + 1)):
        node: Directory | Leaf = Leaf(Stat(), digest=b"d" * 32, size=size)
        for part in reversed(f"boot/{name}".split("/")):
            node = Directory(Stat(), {part.encode(): node})
        assert isinstance(node, Directory)
        with pytest.raises(InvalidLayer, match="at most"):
            bootable.check_boot_resources(node, read)


@given(st.binary(max_size=300), st.integers(0, 400), st.binary(min_size=1, max_size=4))
@settings(max_examples=100, deadline=None)
def test_altered_executables_are_taken_or_refused_but_never_crash(tail: bytes, at: int, patch: bytes) -> None:
    data = executable()
    for payload in (
        data[:at] + patch + data[at + len(patch) :],
        b"MZ" + tail,
        data[:at],
        android()[:at] + patch + android()[at + len(patch) :],
    ):
        root = Directory(Stat(), {b"boot": Directory(Stat(), {b"aboot-1.img": Leaf(Stat(), data=payload)})})
        with contextlib.suppress(InvalidLayer):
            bootable.check_boot_resources(root, lambda digest, limit: b"")


@pytest.mark.skipif(not layers.Cfsctl.available(), reason="cfsctl is not on the PATH")
@pytest.mark.parametrize("algorithm", [fsverity.SHA256, fsverity.SHA512], ids=lambda algorithm: algorithm.name)
def test_cfsctl_gives_the_boot_image_the_same_digest(algorithm: fsverity.Algorithm, tmp_path: pathlib.Path) -> None:
    policy = (
        b"/.* system_u:object_r:default_t:s0\n/usr(/.*)? system_u:object_r:usr_t:s0\n/usr/s?bin/.* -- "
        b"system_u:object_r:bin_t:s0\n/run <<none>>\n"
    )
    files = "etc/selinux/targeted/contexts/files/file_contexts"
    layer = image(
        *(
            ("etc/selinux/config", b"SELINUXTYPE=targeted\n"),
            (files, policy),
            (files + ".subs", b"/opt /usr\n"),
            ("run/x", b""),
            ("opt/bin/x", KERNEL),
        ),
        *(
            (MODULES + "/vmlinuz", KERNEL),
            (MODULES + "/initramfs.img", b"I" * 5000),
            ("usr/bin/a", b"a"),
            ("etc/a", HARDLINK, "usr/bin/a"),
            link("usr/bin/l"),
        ),
    )
    cfsctl = layers.Cfsctl(tmp_path, algorithm.name)
    cfsctl.pull([layer])
    for version in (0, 1, 2):
        root = layers.tree(layer, bootable=True, algorithm=algorithm).root
        ours = fsverity.digest(erofswriter.image_bytes(root, version, algorithm), algorithm).hex()
        assert (cfsctl.ask("compute-id", "--bootable", version=version) or b"").split()[-1].decode() == ours
