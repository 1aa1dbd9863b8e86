# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import os
import pathlib
import stat as st
import time
import tracemalloc
from collections.abc import Iterable
from typing import Any, NamedTuple

import pytest
from ansible_collections.composefs.oci.plugins.module_utils.formats import fsverity
from ansible_collections.composefs.oci.plugins.module_utils.rootfs import dumpfile, erofswriter, filetree, merge
from ansible_collections.composefs.oci.plugins.module_utils.errors import InvalidLayer, TooLarge
from ansible_collections.composefs.oci.plugins.module_utils.rootfs.filetree import Directory, Leaf, Stat
from ansible_collections.composefs.oci.plugins.module_utils.formats.tarheader import Entry
from ansible_collections.composefs.oci.tests.support import layers
from ansible_collections.composefs.oci.tests.support.tarbytes import (
    BLOCKDEV,
    CHARDEV,
    DIRECTORY,
    FIFO,
    HARDLINK,
    SYMLINK,
    member,
    tar,
)
from hypothesis import given, settings
from hypothesis import strategies as hs

Item = tuple[Entry, Any]


class External(NamedTuple):
    digest: bytes


def item(
    path: str | bytes,
    kind: bytes = b"0",
    content: Any = b"",
    link: str | bytes = b"",
    size: int | None = None,
    **fields: Any,
) -> Item:
    raw, target = (text if isinstance(text, bytes) else text.encode() for text in (path, link))
    known = {
        "mode": 0o755 if kind == DIRECTORY else 0o644,
        "uid": 0,
        "gid": 0,
        "mtime": 0,
        "mtime_nsec": 0,
        "devmajor": 0,
        "devminor": 0,
        "xattrs": {},
    }
    known.update(fields)
    length = len(content or b"") if size is None else size
    return Entry(path=raw, type=kind, size=length, linkname=target, **known), content


def folder(path: str | bytes, **fields: Any) -> Item:
    return item(path, DIRECTORY, None, **fields)


USR = folder("usr/", mode=0o750, uid=3, gid=4, mtime=77, mtime_nsec=123456789)


def build(*layer_items: Iterable[Item], xattrs: str = "allowlist-only") -> Directory:
    return merge.build_tree(layer_items, xattrs).root


def paths(root: Directory) -> dict[str, Directory | Leaf]:
    return {path.decode("latin-1"): node for path, node in filetree.walk(root)}


def names(root: Directory) -> set[str]:
    return set(paths(root)) - {"/", "/usr"}


def refused(*layer_items: Iterable[Item]) -> str:
    with pytest.raises(InvalidLayer) as error:
        build(*layer_items)
    return str(error.value)


# --- entries
# --------------------------------------------------------------------------------------------------------------------


def test_every_kind_of_entry_becomes_its_inode() -> None:
    root = build(
        [
            USR,
            item("a", content=b"hi", mode=0o104755, uid=1, gid=2, mtime=-5, mtime_nsec=7),
            item("big", content=External(b"d" * 32), size=1000),
            item("old", b"\0", b"old"),
            item("contiguous", b"7", b""),
            item("l", b"2", None, "../any//where"),
            item("c", b"3", None, devmajor=1, devminor=3),
            item("b", b"4", None, devmajor=259, devminor=300000),
            item("p", b"6", None),
        ]
    )
    found = paths(root)
    assert found["/a"].stat == Stat(0o104755, 1, 2, -5, 7)
    kinds = {
        name: (node.kind, node.data, node.digest, node.size, node.rdev)
        for name, node in found.items()
        if isinstance(node, Leaf)
    }
    assert kinds == {
        "/a": (st.S_IFREG, b"hi", None, 2, 0),
        "/big": (st.S_IFREG, b"", b"d" * 32, 1000, 0),
        "/old": (st.S_IFREG, b"old", None, 3, 0),
        "/contiguous": (st.S_IFREG, b"", None, 0, 0),
        "/l": (st.S_IFLNK, b"../any//where", None, 13, 0),
        "/c": (st.S_IFCHR, b"", None, 0, os.makedev(1, 3)),
        "/b": (st.S_IFBLK, b"", None, 0, os.makedev(259, 300000)),
        "/p": (st.S_IFIFO, b"", None, 0, 0),
    }


def test_numbers_wrap_as_in_the_format() -> None:
    root = build([USR, item("a", uid=(1 << 32) + 5, gid=1 << 33, mtime=1 << 63)])
    assert paths(root)["/a"].stat == Stat(0o644, 5, 0, -(1 << 63))


def test_a_regular_file_whose_name_ends_with_a_slash_is_a_regular_file() -> None:
    assert isinstance(paths(build([USR, item("a/", content=b"x")]))["/a"], Leaf)


def test_volume_labels_are_ignored() -> None:
    assert names(build([USR, item("label", b"V", None), item("/", b"V", None)])) == set()


@pytest.mark.parametrize("kind", [b"S", b"D", b"M", b"A", b"\xff", b"9"])
def test_other_types_are_refused(kind: bytes) -> None:
    assert "type" in refused([USR, item("a", kind, None)])


def test_content_on_the_wrong_side_of_the_split_is_refused() -> None:
    assert "within the stream" in refused([USR, item("a", content=b"x" * 65)])
    assert "as an object" in refused([USR, item("a", content=External(b"d" * 32), size=64)])
    assert "has none" in refused([USR, item("a", content=None, size=5)])


# --- paths
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "name"),
    [
        *(
            ("a", "/a"),
            ("/a", "/a"),
            ("//a", "/a"),
            ("./a", "/a"),
            ("/./a", "/a"),
            ("a/", "/a"),
            ("a///", "/a"),
            ("a/.", "/a"),
            ("a/./.", "/a"),
            ("a//./", "/a"),
        ),
        *(
            ("usr//b", "/usr/b"),
            ("usr/./b", "/usr/b"),
            ("usr/b/.", "/usr/b"),
            ("./usr/b/", "/usr/b"),
            ("...", "/..."),
            ("usr/..b", "/usr/..b"),
        ),
    ],
)
def test_paths_are_normalised(path: str, name: str) -> None:
    assert names(build([USR, item(path)])) == {name}


@pytest.mark.parametrize("path", ["/", "./", ".", "//", "..", "/..", "a/..", "a/../", "../..", "a/../.", "/./."])
def test_a_final_double_dot_is_the_root(path: str) -> None:
    assert names(build([USR, folder(path, mode=0o700)])) == set()
    assert "root" in refused([USR, item(path)])
    assert "root" in refused([USR, item(path, b"2", None, "x")])


@pytest.mark.parametrize("path", ["../a", "a/../b", "usr/../usr/b", "./../b/."])
def test_a_double_dot_anywhere_else_is_refused(path: str) -> None:
    assert "'..'" in refused([USR, item(path)])


@pytest.mark.parametrize("kind", [b"0", b"3", b"6"])
def test_nothing_is_below_anything_but_a_directory_or_a_link_to_one(kind: bytes) -> None:
    for path in ("x/y", "x/y/z", "l/y", "l/y/z"):
        items = [USR, item("x", kind, b"" if kind == b"0" else None), item("l", b"2", None, "x"), item(path)]
        assert "not a directory" in refused(items)


# --- paths that meet symbolic links: what umoci 0.4.7 and podman 4.3 with its driver vfs make of the same layers
# --------------------------------------------------------------------------------------------------------------------


def link(path: str, target: str) -> Item:
    return item(path, b"2", None, target)


BIN = [USR, folder("usr/bin"), item("usr/bin/sh", content=b"sh"), link("bin", "usr/bin")]


@pytest.mark.parametrize(
    "lower, path, place",
    [
        ([], "bin/tool", "usr/bin/tool"),
        ([link("sbin", "bin")], "sbin/tool", "usr/bin/tool"),
        ([folder("var"), folder("run2"), link("var/run", "/run2")], "var/run/app.pid", "run2/app.pid"),
        ([folder("var"), link("var/run", "/new/run")], "var/run/app.pid", "new/run/app.pid"),
        ([link("up", "../../../..")], "up/x", "x"),
        ([link("up", "/../../etc")], "up/x", "etc/x"),
        ([link("d", "missing/../x")], "d/f", "x/f"),
        ([link("d", "usr/../new/deep")], "d/f", "new/deep/f"),
        ([folder("p"), folder("p/q"), link("q", "p/q"), link("r", "q/../new")], "r/f", "p/new/f"),
        ([link("d", "./usr//./bin/")], "d/a/b", "usr/bin/a/b"),
        ([link(f"l{n}", f"l{n + 1}") for n in range(40)] + [folder("l40")], "l0/x", "l40/x"),
    ],
)
def test_a_path_that_meets_a_symbolic_link_goes_where_the_link_leads(lower: list[Item], path: str, place: str) -> None:
    for layers_ in ([BIN + lower, [item(path, content=b"new")]], [BIN + lower + [item(path, content=b"new")]]):
        found = paths(build(*layers_))
        assert found["/" + place].data == b"new"
        assert isinstance(found["/bin"], Leaf)
        before = set(paths(build(BIN + lower)))
        above = {"/" + "/".join(place.split("/")[:n]) for n in range(1, place.count("/") + 1)}
        assert set(found) == before | above | {"/" + place}


@pytest.mark.parametrize(
    "lower", [[link("l", "l")], [link("l", "m"), link("m", "l")], [link(f"l{n}", f"l{n + 1}") for n in range(41)]]
)
def test_links_that_lead_in_a_circle_are_refused(lower: list[Item]) -> None:
    first = lower[0][0].path.decode()
    assert "in a circle" in refused(BIN + lower + [item(f"{first}/x")])
    assert "in a circle" in refused(BIN + lower, [item("h", b"1", None, f"{first}/x")])
    assert "in a circle" in refused(BIN + lower, [item(f"{first}/.wh.x")])


def test_whiteouts_hide_what_lies_where_links_lead() -> None:
    assert "/usr/bin/sh" not in paths(build(BIN, [item("bin/.wh.sh")]))
    found = paths(build(BIN, [item("bin/.wh..wh..opq"), item("bin/new")]))
    assert [path for path in found if path.startswith("/usr/bin/")] == ["/usr/bin/new"]
    assert names(build([USR, link("a", "/b"), item("a/.wh.a")])) == {"/a", "/b"}


def test_hardlinks_find_what_lies_where_links_lead() -> None:
    found = paths(build(BIN, [item("sh2", b"1", None, "bin/sh"), item("bin/sh3", b"1", None, "/bin/sh")]))
    assert found["/sh2"] is found["/usr/bin/sh"] is found["/usr/bin/sh3"]
    assert found["/sh2"].nlink == 3
    assert "does not exist" in refused(BIN, [link("d", "/nope"), item("t", b"1", None, "d/x")])


def test_the_last_component_is_never_followed() -> None:
    found = paths(build(BIN, [link("t", "usr/bin/sh"), item("t2", b"1", None, "t"), item("t", content=b"new")]))
    assert (found["/t"].data, found["/t2"].data, found["/usr/bin/sh"].data) == (b"new", b"usr/bin/sh", b"sh")
    found = paths(build(BIN, [folder("bin"), item("bin/tool")]))
    assert "/bin/tool" in found and "/usr/bin/tool" not in found


@pytest.mark.parametrize(
    "change",
    [
        [link("l", "b")],
        [item(".wh.l"), link("l", "b")],
        [item(".wh..wh..opq"), folder("b"), link("l", "b")],
        [item("l"), link("l", "b")],
    ],
)
def test_a_link_that_changed_leads_elsewhere_at_once(change: list[Item]) -> None:
    first = [USR, folder("a"), folder("b"), link("l", "a"), folder("l/d"), item("l/d/1"), item("l/1")]
    found = paths(build(first, [*change, item("l/2"), item("l/d/2")]))
    assert {"/b/2", "/b/d/2"} <= set(found)
    assert not {"/a/2", "/a/d/2"} & set(found)


def test_what_a_link_went_past_counts_as_soon_as_it_is_there() -> None:
    first = [USR, folder("a"), folder("b"), folder("b/c"), link("l", "gone/../x"), folder("l/d"), item("l/d/1")]
    found = paths(build([*first, link("gone", "b/c"), item("l/d/2")]))
    assert {"/x/d/1", "/b/x/d/2"} <= set(found)
    assert "not a directory" in refused([*first, item("gone"), item("l/d/2")])


def test_following_links_is_bounded_for_all_entries_together() -> None:
    builder = merge.TreeBuilder(max_link_steps=10_000)
    for entry, content in [USR, link("l", "./x/../" * 400 + "usr"), folder("d"), link("m", "l")]:
        builder.add(entry, content)
    with pytest.raises(InvalidLayer, match="takes too long"):
        for number in range(20):  # a link that comes and goes empties what was remembered
            for entry, content in (item(f"m/{number}"), link("d/t", "x"), item("d/.wh.t")):
                builder.add(entry, content)
    assert merge.MAX_LINK_STEPS >= 1 << 20


def test_a_link_does_not_lead_deeper_than_the_bound() -> None:
    builder = merge.TreeBuilder(max_depth=100)
    for entry, content in [USR, link("l", "y/" * 60), link("l2", "y/" * 40 + "../" * 40 + "usr")]:
        builder.add(entry, content)
    builder.add(*item("l2/a"))
    builder.add(*item("l/" + "z/" * 38 + "a"))
    with pytest.raises(InvalidLayer, match="directories deep"):
        builder.add(*item("l/" + "w/" * 45 + "a"))


def test_whiteouts_of_the_directory_itself_are_refused() -> None:
    """podman takes the first for the directory and the second for the one above it, and removes them."""
    for name in (".wh..", ".wh..."):
        assert "no file that it could hide" in refused([USR, folder("d"), item(f"d/{name}")])


def test_symlinks_without_a_target_are_refused() -> None:
    assert "has no target" in refused([USR, item("l", b"2", None, "")])


def test_missing_parents_are_made_alike_for_every_kind_of_entry() -> None:
    expected = Stat(0o755)
    for last in (
        item("a/b/c/x"),
        folder("a/b/c/x"),
        item("a/b/c/x", b"2", None, "y"),
        item("a/b/c/.wh.x"),
        item("a/b/c/.wh..wh..opq"),
    ):
        found = paths(build([USR, last]))
        assert [found[path].stat for path in ("/a", "/a/b", "/a/b/c")] == [expected] * 3
        assert names(build([USR, last])) <= {"/a", "/a/b", "/a/b/c", "/a/b/c/x"}


def test_a_directory_entry_that_comes_late_gives_a_made_parent_its_metadata() -> None:
    found = paths(build([USR, item("a/x"), folder("a", mode=0o1777, uid=9)]))
    assert found["/a"].stat == Stat(0o1777, 9)
    assert "/a/x" in found


def test_made_parents_share_nothing_that_changes() -> None:
    found = paths(build([USR, item("a/b/x"), folder("a/b", uid=9)]))
    assert (found["/a"].stat.uid, found["/a/b"].stat.uid) == (0, 9)


# --- merging
# --------------------------------------------------------------------------------------------------------------------


def test_a_directory_over_a_directory_replaces_all_metadata_and_keeps_children() -> None:
    capability = {b"security.capability": b"c"}
    found = paths(
        build(
            [USR, folder("d", mode=0o700, uid=5, mtime=9, xattrs=capability), item("d/x")], [folder("d", mode=0o1777)]
        )
    )
    assert found["/d"].stat == Stat(0o1777)
    assert "/d/x" in found


def test_a_directory_replaces_a_file_and_a_file_a_whole_directory() -> None:
    assert names(build([USR, item("a")], [folder("a"), item("a/b")])) == {"/a", "/a/b"}
    assert names(build([USR, folder("a"), folder("a/b"), item("a/b/c")], [item("a")])) == {"/a"}
    assert "not a directory" in refused([USR, folder("a"), folder("a/b")], [item("a"), item("a/b/c")])


def test_the_last_of_two_entries_in_one_layer_wins() -> None:
    assert paths(build([USR, item("a", content=b"1"), item("a", content=b"2")]))["/a"].data == b"2"


def test_whiteouts_remove_and_are_never_stored() -> None:
    lower = [USR, folder("d"), item("d/x"), item("d/y"), folder("d/z"), item("d/z/q"), item("d/keep")]
    upper = [item("d/.wh.x"), folder("d/.wh.y"), item("d/.wh.z", b"2", None, "t"), item("d/.wh.nothing")]
    assert names(build(lower, upper)) == {"/d", "/d/keep"}


def test_whiteouts_of_nothing_do_nothing() -> None:
    assert names(
        build([USR, item("a"), item(".wh."), item(".wh..wh.plnk"), item(".wh..wh.aufs"), item(".wh..wh..opq2")])
    ) == {"/a"}


def test_an_entry_after_the_whiteout_of_its_directory_starts_afresh() -> None:
    found = paths(build([USR, folder("d", uid=7), item("d/x")], [item(".wh.d"), item("d/y")]))
    assert set(found) == {"/", "/usr", "/d", "/d/y"}
    assert found["/d"].stat.uid == 0


def test_an_opaque_marker_removes_what_is_there_at_that_moment_even_of_its_own_layer() -> None:
    lower = [USR, folder("d"), item("d/old"), folder("d/sub"), item("d/sub/x")]
    assert names(build(lower, [item("d/before"), item("d/.wh..wh..opq"), item("d/after"), item("d/sub/y")])) == {
        "/d",
        "/d/after",
        "/d/sub",
        "/d/sub/y",
    }


def test_a_whiteout_cannot_be_a_directory() -> None:
    assert "whiteout" in refused([USR, item(".wh.d/x")])


def test_char_devices_0_0_of_an_archive_are_devices() -> None:
    found = paths(build([USR, item("w")], [item("w", b"3", None)]))["/w"]
    assert isinstance(found, Leaf) and (found.kind, found.rdev) == (st.S_IFCHR, 0)


# --- hardlinks
# --------------------------------------------------------------------------------------------------------------------


def test_a_hardlink_shares_the_inode_whatever_its_header_says() -> None:
    found = paths(
        build([USR, item("a", content=b"A", mode=0o755, uid=1)], [item("usr/b", b"1", None, "./a", mode=0o600, uid=9)])
    )
    assert found["/a"] is found["/usr/b"]
    assert (found["/a"].stat.uid, found["/a"].nlink) == (1, 2)


def test_links_are_counted_by_names_that_remain() -> None:
    links = [item(name, b"1", None, "a") for name in ("b", "c", "d")]
    found = paths(build([USR, item("a"), *links], [item(".wh.b"), item("a", content=b"new")]))
    assert found["/c"] is found["/d"] and found["/c"] is not found["/a"]
    assert (found["/c"].nlink, found["/a"].nlink, found["/a"].data) == (2, 1, b"new")


def test_a_hardlink_finds_its_target_in_the_tree_as_it_is_now() -> None:
    found = paths(
        build(
            [USR, item("a", content=b"1")],
            [item("a", content=b"2"), item("b", b"1", None, "/a/"), item("a", content=b"3")],
        )
    )
    assert (found["/b"].data, found["/a"].data) == (b"2", b"3")


def test_a_hardlink_to_itself_changes_nothing() -> None:
    found = paths(build([USR, item("a", content=b"1"), item("a", b"1", None, "a")]))
    assert (found["/a"].data, found["/a"].nlink) == (b"1", 1)


def test_a_hardlink_to_a_symlink_links_the_symlink() -> None:
    found = paths(build([USR, item("s", b"2", None, "usr"), item("t", b"1", None, "s")]))
    assert found["/t"] is found["/s"] and found["/t"].nlink == 2


@pytest.mark.parametrize(
    "target", ["gone", "no/where", "", "/", ".", "..", "usr/..", "usr", "usr/", "usr/../a", "a/b", "l/gone"]
)
def test_hardlinks_without_a_file_at_the_other_end_are_refused(target: str) -> None:
    first = [USR, item("a"), item("l", b"2", None, "usr"), item("usr/x")]
    assert "'h'" in refused([*first, item("h", b"1", None, target)])
    assert "'.wh.h'" in refused([*first, item(".wh.h", b"1", None, target)])


# --- limits
# --------------------------------------------------------------------------------------------------------------------


def test_names_longer_than_a_file_system_holds_are_refused() -> None:
    assert names(build([USR, item("n" * 255)])) == {"/" + "n" * 255}
    for bad in (item("n" * 256), item("n" * 256 + "/x"), folder("usr/" + "n" * 256 + "/"), item("x/" + "n" * 300)):
        assert "255" in refused([USR, bad])


def test_nul_bytes_are_refused() -> None:
    for bad in (item(b"a\0b"), item(b"a\0b/c"), folder(b"\0"), item("s", b"2", None, b"x\0y")):
        assert "NUL" in refused([USR, bad])


def test_symlink_targets_longer_than_an_image_holds_are_refused() -> None:
    assert paths(build([USR, item("s", b"2", None, "t" * 4095)]))["/s"].size == 4095
    assert "4095" in refused([USR, item("s", b"2", None, "t" * 4096)])


def test_device_numbers_out_of_range_are_refused() -> None:
    assert paths(build([USR, item("c", b"3", None, devmajor=4095, devminor=1048575)]))["/c"].rdev == os.makedev(
        4095, 1048575
    )
    for major, minor in ((4096, 0), (0, 1048576), (-1, 0)):
        assert "4095:1048575" in refused([USR, item("c", b"3", None, devmajor=major, devminor=minor)])
    build([USR, item("a", devmajor=4096), item("p", b"6", None, devmajor=5000)])


def test_extended_attributes_that_do_not_fit_an_image_are_refused() -> None:
    build([USR, item("a", xattrs={b"security.capability": b"x" * 65535, b"user." + b"n" * 250: b""})])
    for bad in (
        {b"security.capability": b"x" * 65536},
        {b"user." + b"n" * 251: b""},
        {b"user.%d" % number: b"" for number in range(200)},
    ):
        assert "attributes" in refused([USR, item("a", xattrs=bad)])
    assert "attributes" in refused([USR, item("a", xattrs={b"user.%d" % number: b"x" * 60000 for number in range(3)})])
    # What every image goes without may be as large as it likes.
    build([USR, item("a", xattrs={b"security.ima": b"x" * 70000})])


def test_ten_thousand_nested_directories_are_possible() -> None:
    items, path = [USR], ""
    for _unused in range(10_000):
        path += "d/"
        items.append(folder(path))
    items.append(item(path + "f", content=b"x"))
    started = time.process_time()
    root = build(items)
    deepest, node = max(filetree.walk(root), key=lambda found: len(found[0]))
    assert (len(deepest), node.data) == (20_002, b"x")
    assert time.process_time() - started < 5


def test_what_lies_deeper_than_the_bound_is_refused_without_making_it() -> None:
    assert "deep" in refused([USR, item("d/" * 500_000 + "x")])
    assert "deep" in refused([USR, item("h", b"1", None, "d/" * 500_000 + "x")])


def test_long_runs_of_dots_and_slashes_cost_no_more_than_their_length() -> None:
    started = time.process_time()
    assert names(
        build([USR, item(b"a" + b"/." * 500_000), item(b"b" + b"/" * 1_000_000), item(b"/." * 300_000 + b"/c")])
    ) == {"/a", "/b", "/c"}
    assert time.process_time() - started < 2


def test_directories_that_no_layer_sent_are_bounded() -> None:
    builder = merge.TreeBuilder(max_implied=100)
    builder.add(*item("a/" * 60 + "x"))
    with pytest.raises(InvalidLayer, match="more than 100"):
        builder.add(*item("b/" * 60 + "x"))


def test_inodes_are_bounded_by_what_is_there() -> None:
    builder = merge.TreeBuilder(max_inodes=1000)
    for number in range(20):
        for name in range(900):
            builder.add(*item(f"d/{name}"))
        if number < 19:
            builder.add(*item("d/.wh..wh..opq"))
    with pytest.raises(InvalidLayer, match="more than 1000"):
        for name in range(2000):
            builder.add(*item(f"e/{name}"))


def long_names(count: int) -> Iterable[Item]:
    return (item(f"{number:04}".ljust(255, "n")) for number in range(count))


def long_links(count: int) -> Iterable[Item]:
    return (link(str(number), f"{number:04}".ljust(4000, "t")) for number in range(count))


def short_names_and_then_long_links(count: int) -> Iterable[Item]:
    return (
        made
        for make in (lambda n: item(str(n)), lambda n: link(str(n), "t" * 4000))
        for made in map(make, range(count))
    )


def small_files(count: int) -> Iterable[Item]:
    return (item(f"{number:04}", content=b"c" * 64) for number in range(count))


def capabilities(count: int) -> Iterable[Item]:
    return (
        item(str(number), xattrs={b"security.capability": b"%04d" % number + b"c" * 3000}) for number in range(count)
    )


@pytest.mark.parametrize("make", [long_names, long_links, short_names_and_then_long_links, small_files, capabilities])
def test_what_an_image_says_has_a_budget_of_bytes(make: Any) -> None:
    """However it is spent: a blob of a few hundred kilobytes can unpack to gigabytes of any of these."""
    builder = merge.TreeBuilder(max_text=100_000, xattrs="allowlist-only")
    with pytest.raises(TooLarge, match="more than 100000 bytes together"):
        for entry, content in make(4000):
            builder.add(entry, content)
    held = sum(
        len(path.rpartition(b"/")[2])
        + (len(node.data) if isinstance(node, Leaf) else 0)
        + sum(map(len, (node.stat.xattrs or {}).values()))
        for path, node in filetree.walk(builder.root)
    )
    assert held < 130_000


def test_what_was_removed_or_replaced_does_not_count() -> None:
    builder = merge.TreeBuilder(max_text=100_000)
    for _round in range(20):
        for entry, content in [*long_links(10), *long_names(10)]:
            builder.add(entry, content)
        builder.add(*item(".wh..wh..opq"))
    for number in range(1000):
        builder.add(*link("other", f"{number:04}" * 1000))
    builder.add(*link("same", "t" * 4000))
    for number in range(1000):
        builder.add(*item(f"{number}", HARDLINK, None, "same"))


def test_attributes_that_no_image_keeps_need_no_memory() -> None:
    builder = merge.TreeBuilder(max_text=10_000, xattrs="allowlist-only")
    tracemalloc.start()
    try:
        for number in range(300):
            value = {b"user.a": b"%d" % number + b"v" * 60_000, b"trusted.x": b"v" * 60_000}
            builder.add(*item(str(number), xattrs=value))
        assert tracemalloc.get_traced_memory()[0] < 1 << 20
    finally:
        tracemalloc.stop()
    assert all(not node.stat.xattrs for _path, node in filetree.walk(builder.finish().root))
    with pytest.raises(ValueError):
        merge.TreeBuilder(xattrs="allowlist-only").finish("keep-user-xattrs")


def test_an_inode_needs_less_than_500_bytes() -> None:
    def entries() -> Iterable[Item]:
        for number in range(5000):
            if number % 20 == 0:
                yield folder(f"usr/d{number // 20}", mtime=number)
            yield item(
                f"usr/d{number // 20}/f{number}", content=External(number.to_bytes(32, "big")), size=100 + number
            )

    tracemalloc.start()
    kept = build([USR], entries())
    size = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert size < 5000 * 500 and len(kept.entries) == 1


# --- what every image gets
# --------------------------------------------------------------------------------------------------------------------


def test_the_root_takes_the_metadata_of_usr_and_nothing_of_its_own_entry() -> None:
    root = build(
        [
            folder("./", mode=0o700, uid=8),
            folder("usr/", mode=0o750, uid=3, mtime=77, mtime_nsec=5, xattrs={b"security.capability": b"c"}),
        ]
    )
    assert root.stat == Stat(0o750, 3, 0, 77, 5, {b"security.capability": b"c"})


def test_an_image_without_usr_gets_a_plain_root_and_a_plain_time_for_run() -> None:
    root = build(
        [
            folder("./", mode=0o700, uid=8, mtime=5),
            folder("run", mode=0o711, mtime=6, mtime_nsec=1),
            item("run/x"),
            item("hello"),
        ]
    )
    assert root.stat == Stat(0o755)
    assert root.entries[b"run"].stat == Stat(0o711)
    assert names(root) == {"/run", "/hello"}


@pytest.mark.parametrize("name", ["usr", "run"])
def test_usr_and_run_must_be_directories(name: str) -> None:
    other = [] if name == "usr" else [USR]
    assert f"/{name}" in refused([*other, item(name)])
    assert f"/{name}" in refused([*other, item(name, b"2", None, "var")])


def test_run_is_emptied_and_takes_the_time_of_usr_only() -> None:
    root = build(
        [
            USR,
            folder("run", mode=0o711, uid=6, mtime=5, xattrs={b"security.capability": b"c"}),
            folder("run/d"),
            item("run/d/x"),
        ]
    )
    assert root.entries[b"run"].stat == Stat(0o711, 6, 0, 77, 123456789, {b"security.capability": b"c"})
    assert names(root) == {"/run"}


def test_a_file_whose_other_name_was_in_run_has_one_link() -> None:
    found = paths(build([USR, item("run/a"), item("b", b"1", None, "run/a")]))
    assert found["/b"].nlink == 1


def test_extended_attributes_are_filtered() -> None:
    capability = {b"security.capability": b"\1\0=\n"}
    others = {b"security.selinux": b"s", b"trusted.x": b"t", b"system.posix_acl_access": b"a", b"userx": b""}
    everything = {**capability, **others, b"user.k": b"v"}
    items = [
        folder("usr", xattrs=everything),
        item("a", xattrs=everything),
        item("b", b"1", None, "a"),
        item("c", xattrs={b"user.only": b""}),
    ]
    found = paths(build(items))
    assert {path: node.stat.xattrs for path, node in found.items()} == {
        **dict.fromkeys(("/", "/usr", "/a", "/b"), capability),
        "/c": None,
    }
    found = paths(build(items, xattrs="keep-user-xattrs"))
    assert found["/a"].stat.xattrs == found["/"].stat.xattrs == {**capability, b"user.k": b"v"}
    assert found["/c"].stat.xattrs == {b"user.only": b""}


def test_equal_metadata_is_shared() -> None:
    found = paths(build([USR, *(item(f"f{number}", mtime=5) for number in range(9))]))
    assert len({id(found[f"/f{number}"].stat) for number in range(9)}) == 1


def test_an_unknown_filter_is_a_mistake_of_the_caller() -> None:
    with pytest.raises(ValueError):
        build([USR], xattrs="all")


# --- against a naive model
# --------------------------------------------------------------------------------------------------------------------

Model = dict[tuple[bytes, ...], list[Any]]


def naive(layer_items: list[list[Item]]) -> dict[bytes, tuple[Any, ...]] | None:
    """The same rules on a dictionary from path to [kind, value, metadata], where hardlinks share the list; None for a
    refused image.
    """
    model: Model = {}

    def below(path: tuple[bytes, ...]) -> list[tuple[bytes, ...]]:
        return [other for other in model if len(other) > len(path) and other[: len(path)] == path]

    def split(path: bytes) -> tuple[bytes, ...]:
        return tuple(part for part in path.split(b"/") if part not in (b"", b"."))

    def remove(path: tuple[bytes, ...]) -> None:
        for other in [path, *below(path)]:
            model.pop(other, None)

    def is_directory(path: tuple[bytes, ...]) -> bool:
        return not path or path in model and model[path][0] == DIRECTORY

    def real(path: tuple[bytes, ...]) -> tuple[bytes, ...] | None:
        """Where a path to a directory leads through links; None if it cannot."""
        where: tuple[bytes, ...] = ()
        rest = list(path)
        links = 0
        while rest:
            part = rest.pop(0)
            if part == b"..":
                where = where[:-1]
                continue
            here = (*where, part)
            if here in model and model[here][0] == SYMLINK:
                links += 1
                if links > 40:
                    return None
                target = model[here][1]
                where = () if target.startswith(b"/") else where
                rest = [*split(target), *rest]
            elif here in model and not is_directory(here):
                return None
            else:
                where = here
        return where

    for items in layer_items:
        for entry, content in items:
            path = split(entry.path)
            if not path or path[-1] == b"..":
                if entry.type != DIRECTORY:
                    return None
                continue
            if entry.type == HARDLINK:
                target = split(entry.linkname)
                above = real(target[:-1])
                if b".." in target or not target or above is None:
                    return None
                target = (*above, target[-1])
                if target not in model or is_directory(target):
                    return None
                value = model[target]
            else:
                value = [entry.type, entry.linkname if entry.type == SYMLINK else content, entry.mode, entry.mtime]
            if b".." in path:
                return None
            above = real(path[:-1])
            if above is None:
                return None
            path = (*above, path[-1])
            for depth in range(1, len(path)):
                parent = path[:depth]
                if parent not in model:
                    if parent[-1].startswith(b".wh."):
                        return None
                    model[parent] = [DIRECTORY, None, 0o755, 0]
                elif not is_directory(parent):
                    return None
            name = path[-1]
            if name == b".wh..wh..opq":
                for other in below(path[:-1]):
                    model.pop(other)
            elif name.startswith(b".wh."):
                remove((*path[:-1], name[4:]))
            elif is_directory(path) and entry.type == DIRECTORY:
                model[path] = value
            else:
                remove(path)
                model[path] = value
    return {
        b"/" + b"/".join(path): (*value, sum(other is value for other in model.values()))
        for path, value in model.items()
    }


WORDS = [b"a", b"b", b"c", b".", b"..", b".wh.a", b".wh.b", b".wh..wh..opq"]
PATHS = hs.lists(hs.sampled_from(WORDS[:3] * 4 + WORDS), min_size=1, max_size=4).map(b"/".join)


@hs.composite
def entries(draw: Any) -> Item:
    kind = draw(hs.sampled_from([b"0", b"0", DIRECTORY, DIRECTORY, DIRECTORY, HARDLINK, SYMLINK]))
    path = draw(PATHS)
    if draw(hs.booleans()):
        path = draw(hs.sampled_from([b"/", b"./", b"//"])) + path + draw(hs.sampled_from([b"", b"/", b"/."]))
    content = draw(hs.sampled_from([b"", b"1", b"2"])) if kind == b"0" else None
    link = draw(PATHS) if kind in (HARDLINK, SYMLINK) else b""
    if kind == SYMLINK and draw(hs.booleans()):
        link = draw(hs.sampled_from([b"/", b"../", b"/../"])) + link
    return item(path, kind, content, link, mode=draw(hs.integers(0, 3)), mtime=draw(hs.integers(0, 3)))


@pytest.mark.slow
@given(hs.lists(hs.lists(entries(), max_size=12), max_size=3))
@settings(max_examples=120, deadline=None)
def test_any_layers_give_what_the_naive_model_gives(layer_items: list[list[Item]]) -> None:
    expected = naive(layer_items)
    try:
        root = build(*layer_items)
    except InvalidLayer:
        assert expected is None
        return
    found = {}
    for path, node in filetree.walk(root):
        if isinstance(node, Directory):
            found[path] = (DIRECTORY, None, node.stat.mode, node.stat.mtime, 1)
        else:
            kind = SYMLINK if node.kind == st.S_IFLNK else b"0"
            found[path] = (kind, node.data, node.stat.mode, node.stat.mtime, node.nlink)
    found.pop(b"/")
    assert found == expected


# --- against cfsctl
# --------------------------------------------------------------------------------------------------------------------

CAPABILITY = {"security.capability": b"\1\0=\n", "user.k": b"v \n\\", "security.selinux": b"s"}
IMAGES: dict[str, list[list[bytes]]] = {
    "merge": [
        [
            member("d/", type=DIRECTORY, mode=0o700, uid=5),
            member("d/x", b"1"),
            member("e/", type=DIRECTORY),
            member("e/f"),
            member("f"),
        ],
        [
            member("d/", type=DIRECTORY, mode=0o1777),
            member("d/y"),
            member("e", b"now a file"),
            member("f/", type=DIRECTORY),
            member("f/g"),
        ],
    ],
    "whiteouts": [
        [
            member("d/", type=DIRECTORY),
            member("d/x"),
            member("d/z/", type=DIRECTORY),
            member("d/z/q"),
            member("w", type=CHARDEV),
        ],
        [
            member("d/.wh.x"),
            member("d/.wh.z"),
            member("d/.wh.gone"),
            member("d/.wh."),
            member("d/.wh..wh.plnk"),
            member("d/v", type=CHARDEV, device=(1, 3)),
        ],
    ],
    "opaque": [
        [member("d/", type=DIRECTORY), member("d/x")],
        [member("d/before"), member("d/.wh..wh..opq"), member("d/after")],
    ],
    "hardlinks": [
        [
            member("usr/a", b"A" * 200),
            member("usr/b", type=HARDLINK, linkname="usr/a", mode=0o600),
            member("s", type=SYMLINK, linkname="z"),
            member("r/", type=DIRECTORY),
        ],
        [
            member("c", type=HARDLINK, linkname="./usr//b"),
            member("usr/a", b"new"),
            member("t", type=HARDLINK, linkname="/s/"),
            member("c", type=HARDLINK, linkname="c"),
        ],
    ],
    "metadata": [
        [
            member("run/", type=DIRECTORY, mode=0o711, mtime=5),
            member("run/x"),
            member("./", type=DIRECTORY, mode=0o700),
            member("x", mode=0o104755, uid=3_000_000, pax={"mtime": "5.25", "uid": str((1 << 32) + 5)}),
            member("y", xattrs=CAPABILITY, mtime=-5),
            member("usr/", type=DIRECTORY, xattrs=CAPABILITY, pax={"mtime": "99.123456789"}),
        ]
    ],
    "names": [
        [
            *(
                member("/usr/./q"),
                member("usr//w"),
                member("usr/t/."),
                member("usr/k///", type=DIRECTORY),
                member("usr/..", type=DIRECTORY),
                member("//lead"),
            ),
            *(
                member(b"a\n\t\xff =\\b"),
                member("-"),
                member("usr/" + "n" * 255),
                member("l", type=SYMLINK, linkname="t" * 900),
            ),
            *(member("f", type=FIFO), member("b", type=BLOCKDEV, device=(259, 300_000))),
        ]
    ],
    "usr is a file": [[member("usr")]],
    "usr is a link": [[member("usr", type=SYMLINK, linkname="x")]],
    "run is a link": [[member("run", type=SYMLINK, linkname="x")]],
    "dots": [[member("usr/../a")]],
    "link to nothing": [[member("a", type=HARDLINK, linkname="z")]],
    "link to a directory": [[member("a", type=HARDLINK, linkname="usr")]],
    "link to the root": [[member("a", type=HARDLINK, linkname="usr/..")]],
    "whiteout linked to nothing": [[member(".wh.a", type=HARDLINK, linkname="z")]],
    "root is a file": [[member("./")]],
    "below a file": [[member("a"), member("a/b")]],
}


@pytest.mark.skipif(not layers.Cfsctl.available(), reason="cfsctl is not on the PATH")
@pytest.mark.parametrize("name", IMAGES)
def test_cfsctl_makes_the_same_tree_and_image(name: str, tmp_path: pathlib.Path) -> None:
    tars = [tar(*(layers.base() if number == 0 else []), *members) for number, members in enumerate(IMAGES[name])]
    cfsctl = layers.Cfsctl(tmp_path)
    cfsctl.pull(tars)
    for mode in merge.XATTR_MODES:
        theirs = cfsctl.ask("dump", "--xattrs", mode)
        if theirs is None:
            with pytest.raises(InvalidLayer):
                layers.tree(*tars, xattrs=mode)
            continue
        ours = layers.tree(*tars, xattrs=mode)
        assert dumpfile.dumpfile_bytes(ours.root) == theirs
        for version in (1, 2):
            image_id = (cfsctl.ask("compute-id", "--xattrs", mode, version=version) or b"").split()[-1].decode()
            assert (
                fsverity.digest(erofswriter.image_bytes(ours.root, version, fsverity.SHA256), fsverity.SHA256).hex()
                == image_id
            )
