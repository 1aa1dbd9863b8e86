# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import pathlib
import re
import stat as st
import time
from typing import Any

import pytest
from ansible_collections.composefs.oci.plugins.module_utils.rootfs import dumpfile, filetree, selinux
from ansible_collections.composefs.oci.plugins.module_utils.rootfs.lastmatch import Pattern
from ansible_collections.composefs.oci.plugins.module_utils.errors import InvalidLayer
from ansible_collections.composefs.oci.plugins.module_utils.rootfs.filetree import Directory, Leaf, Stat
from ansible_collections.composefs.oci.plugins.module_utils.rootfs.selinux import LABEL, Policy, Rule
from ansible_collections.composefs.oci.tests.support import layers
from ansible_collections.composefs.oci.tests.support.tarbytes import (
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

FILES = b"etc/selinux/targeted/contexts/files/"
CONFIG = b"SELINUX=enforcing\nSELINUXTYPE=targeted\n"


def policy_files(contexts: bytes | None, config: bytes | None = CONFIG, **others: bytes) -> list[bytes]:
    """The files of a policy: ``others`` are companions by the end of their names (local, homedirs, subs, subs_dist)."""
    folders = ("etc/", "etc/selinux/", "etc/selinux/targeted/", "etc/selinux/targeted/contexts/", FILES.decode())
    found = [member(name, type=DIRECTORY) for name in folders]
    if config is not None:
        found.append(member("etc/selinux/config", config))
    if contexts is not None:
        found.append(member(FILES + b"file_contexts", contexts))
    return [*found, *(member(FILES + b"file_contexts." + name.encode(), data) for name, data in others.items())]


def archive(contexts: bytes | None, *members: bytes, config: bytes | None = CONFIG, **others: bytes) -> bytes:
    return tar(*layers.base(), *policy_files(contexts, config, **others), *members)


def labels(
    contexts: bytes | None, *members: bytes, config: bytes | None = CONFIG, **others: bytes
) -> dict[str, str | None]:
    """The labels of what ``members`` added, and of the root."""
    root = layers.tree(archive(contexts, *members, config=config, **others), bootable=True).root
    ours = [
        path for path, _unused in filetree.walk(root) if not path.startswith((b"/usr", b"/boot", b"/sysroot", b"/etc"))
    ]
    found = dict(filetree.walk(root))
    return {path.decode(): label(found[path]) for path in ours}


def label(node: Directory | Leaf) -> str | None:
    value = (node.stat.xattrs or {}).get(LABEL)
    return None if value is None else value.decode()


def refused(*arguments: Any, **others: Any) -> str:
    with pytest.raises(InvalidLayer) as error:
        labels(*arguments, **others)
    return str(error.value)


# --- the policy
# --------------------------------------------------------------------------------------------------------------------


def test_an_image_without_a_policy_gets_no_labels() -> None:
    assert labels(b"/.* all\n", config=None) == {"/": None}
    assert labels(b"/.* all\n", config=b"") == {"/": None}
    assert labels(b"/.* all\n", config=b"SELINUX=enforcing\n") == {"/": None}
    for without in ([], [member("etc/", type=DIRECTORY)], [member("etc/selinux/", type=DIRECTORY)]):
        root = layers.tree(tar(*layers.base(), *without), bootable=True).root
        assert {label(node) for _unused, node in filetree.walk(root)} == {None}


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        *(
            (b"SELINUXTYPE=a\n", b"a"),
            (b"  selinuxtype =  a \r\n", b"a"),
            (b"#SELINUXTYPE=b\nSELINUXTYPE=a", b"a"),
            (b"SELINUXTYPE=a\nSELINUXTYPE=b\n", b"a"),
        ),
        *(
            (b"SELINUX=disabled\nSELINUXTYPE=a\n", b"a"),
            (b"", None),
            (b"SELINUXTYPE\n", None),
            (b"XSELINUXTYPE=a\n", None),
            (b"SELINUXTYPE=a\n\xff\n", b"a"),
        ),
        *((b"SELINUXTYPE=\n", b""), (b'SELINUXTYPE="a"\n', b'"a"'), (b"SELINUXTYPE=a # b\n", b"a # b")),
    ],
)
def test_the_first_selinuxtype_names_the_policy(config: bytes, kind: bytes | None) -> None:
    assert selinux.policy_type(config) == kind


def test_a_policy_that_is_named_must_be_there() -> None:
    assert "'gone'" in refused(b"/.* all\n", config=b"SELINUXTYPE=gone\n")
    assert "file_contexts" in refused(None)
    assert "missing" in refused(b"/.* all\n", config=b"SELINUXTYPE=\n")
    assert "'..'" in refused(b"/.* all\n", config=b"SELINUXTYPE=../selinux/targeted\n")


@pytest.mark.parametrize(
    "name", ["etc/selinux/config", FILES.decode() + "file_contexts", FILES.decode() + "file_contexts.local"]
)
def test_files_of_a_policy_must_be_regular(name: str) -> None:
    for odd in (member(name, type=SYMLINK, linkname="x"), member(name, type=DIRECTORY)):
        assert "regular" in refused(b"/.* all\n", odd)
    assert "not a directory" in refused(b"/.* all\n", member("etc", type=SYMLINK, linkname="usr"))


def test_the_policy_may_lie_in_objects() -> None:
    assert labels(b"#" * 100 + b"\n/.* all\n", config=b"#" * 100 + b"\n" + CONFIG) == {"/": "all"}


def test_a_policy_file_that_is_too_long_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selinux, "MAX_POLICY_FILE", 100)
    assert "at most 100" in refused(b"#" * 101)


def test_lines_have_a_type_or_none() -> None:
    parsed = list(
        selinux.parse_rules(b"# c o m m e n t\n\n  /a\t--  x:y:z \r\n  # c\n/b <<none>>\n/c -d l", b"file_contexts")
    )
    assert parsed == [
        Rule(Pattern(b"/a", b"-"), b"x:y:z"),
        Rule(Pattern(b"/b"), None),
        Rule(Pattern(b"/c", b"d"), b"l"),
    ]


@pytest.mark.parametrize("line", [b"/x", b"/x -- a b", b"/x -q a", b"/x a b", b"/x \xff", b"/x " + b"l" * 65536])
def test_damaged_lines_are_refused_with_their_number(line: bytes) -> None:
    assert "Line 2 " in refused(b"/.* all\n" + line + b"\n")


@pytest.mark.parametrize("line", [b"/x", b"/x /y /z", b"/x /\xff", b"/x /" + b"y" * 5000])
def test_damaged_aliases_are_refused(line: bytes) -> None:
    assert "Line 1 of file_contexts.subs " in refused(b"/.* all\n", subs=line)


def test_a_policy_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selinux, "_MAX_LINES", 10)
    assert "more than 10" in refused(b"/.* all\n" * 11)


# --- labels
# --------------------------------------------------------------------------------------------------------------------


def test_the_last_line_over_all_files_wins_not_the_most_specific() -> None:
    found = labels(
        b"/x literal\n/.* all\n",
        member("x"),
        member("y"),
        member("z"),
        local=b"/y local\n/z local\n",
        homedirs=b"/z home\n",
    )
    assert found == {"/": "all", "/x": "all", "/y": "local", "/z": "home"}


def test_types_of_files() -> None:
    kinds = b"".join(b"/x.* -%c %c\n" % (char, char) for char in b"-dlcbps")
    found = labels(
        b"/.* all\n" + kinds,
        *(
            member("x-"),
            member("xd/", type=DIRECTORY),
            member("xl", type=SYMLINK, linkname="x"),
            member("xp", type=FIFO),
            member("xc", type=CHARDEV),
        ),
    )
    assert found == {"/": "all", **{"/x" + char: char for char in "-dlpc"}}


def test_none_and_no_match_mean_no_label() -> None:
    assert labels(b"/.* all\n/x <<none>>\n", member("x")) == {"/": "all", "/x": None}
    assert labels(b"/x X\n", member("x"), member("y")) == {"/": None, "/x": "X", "/y": None}
    assert labels(b"\n# nothing\n", member("x")) == {"/": None, "/x": None}


def test_the_root_is_a_slash() -> None:
    assert labels(b"/.* all\n/ -d root\n") == {"/": "root"}


def test_labels_are_stored_without_a_final_nul_beside_other_attributes() -> None:
    root = layers.tree(
        archive(b"/.* all\n", member("x", xattrs={"security.capability": b"c", "security.selinux": b"old"})),
        bootable=True,
    ).root
    assert root.entries[b"x"].stat.xattrs == {b"security.capability": b"c", LABEL: b"all"}


def test_aliases_replace_a_whole_path_once_and_what_is_below() -> None:
    contexts = b"/.* all\n/x X\n/x/y XY\n/q/y QY\n"
    members = [
        part for name in ("x1", "x2", "x3", "x4") for part in (member(name + "/", type=DIRECTORY), member(name + "/y"))
    ]
    found = labels(
        contexts, *members, subs=b"/x1 /x\n# a comment line\n/x2 /x1\n/x3 /q\n/x4/y /q/y\n", subs_dist=b"/x3 /x\n"
    )
    assert found == {
        "/": "all",
        "/x1": "X",
        "/x1/y": "XY",
        "/x2": "all",
        "/x2/y": "all",
        "/x3": "X",
        "/x3/y": "XY",
        "/x4": "all",
        "/x4/y": "QY",
    }


def test_an_alias_below_an_alias() -> None:
    assert (
        labels(b"/.* all\n/q/y Q\n/z Z\n", member("x/", type=DIRECTORY), member("x/y"), subs=b"/x /q\n/q/y /z\n")[
            "/x/y"
        ]
        == "Z"
    )


def test_an_alias_for_the_root_or_with_a_final_slash() -> None:
    members = member("x/", type=DIRECTORY), member("x/y")
    assert labels(b"/.* all\n/y Y\n", *members, subs=b"/x /\n")["/x/y"] == "Y"
    assert labels(b"/.* all\n/q/y Y\n/q Q\n", *members, subs=b"/x /q/\n") == {"/": "all", "/x": "all", "/x/y": "Y"}


def test_a_newline_in_a_name_is_a_character_like_any_other() -> None:
    assert labels(b"/.* all\n/x.*z X\n", member(b"x\nz"))["/x\nz"] == "X"


def test_removing_labels_reaches_every_inode_once() -> None:
    stat = Stat(xattrs={LABEL: b"l", b"user.x": b"1"})
    leaf = Leaf(stat)
    root = Directory(stat, {b"a": leaf, b"b": leaf, b"d": Directory(stat)})
    selinux.remove_labels(root)
    assert [node.stat.xattrs for _unused, node in filetree.walk(root)] == [{b"user.x": b"1"}] * 4
    assert stat.xattrs == {LABEL: b"l", b"user.x": b"1"}


# --- hardlinks
# --------------------------------------------------------------------------------------------------------------------

LINKS = [
    member("x1", b"d"),
    *(member(name, type=HARDLINK, linkname="x1") for name in ("x2", "x3", "x4")),
    member("xa/", type=DIRECTORY),
]
LINKS.append(member("xa/5", type=HARDLINK, linkname="x1"))


def groups(contexts: bytes) -> list[tuple[str, str | None, int]]:
    """Names that share an inode, its label and its count of links."""
    shared: dict[int, list[Any]] = {}
    root = layers.tree(archive(contexts, *LINKS), bootable=True).root
    for path, node in filetree.walk(root):
        if isinstance(node, Leaf) and path.startswith(b"/x"):
            shared.setdefault(id(node), ["", label(node), node.nlink])[0] += path[-1:].decode()
    return [tuple(one) for one in shared.values()]


def test_equal_labels_keep_hardlinks_together() -> None:
    assert groups(b"/.* all\n") == [("12345", "all", 5)]


def test_a_name_with_another_label_becomes_an_inode_of_its_own() -> None:
    assert groups(b"/.* all\n/x2 B\n") == [("1345", "all", 4), ("2", "B", 1)]
    assert groups(b"/.* all\n/x2 B\n/x[34] C\n/xa/5 C\n") == [
        ("1", "all", 1),
        ("2", "B", 1),
        ("3", "C", 1),
        ("4", "C", 1),
        ("5", "C", 1),
    ]


def test_no_label_is_another_label() -> None:
    assert groups(b"/.* all\n/x1 <<none>>\n") == [("1", None, 1), *((name, "all", 1) for name in "2345")]
    assert groups(b"/.* all\n/x[24] <<none>>\n") == [("135", "all", 3), ("2", None, 1), ("4", None, 1)]


def test_the_first_name_depth_first_decides() -> None:
    members = [member("xa/", type=DIRECTORY), member("xb", b"d"), member("xa/5", type=HARDLINK, linkname="xb")]
    root = layers.tree(archive(b"/.* all\n/xa/5 A\n/xb B\n", *members), bootable=True).root
    found = dict(filetree.walk(root))
    assert (label(found[b"/xa/5"]), label(found[b"/xb"])) == ("A", "B")


# --- size
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_thousands_of_lines_and_ten_thousands_of_paths_take_moments() -> None:
    rules = [Rule(Pattern(b"/.*"), b"all")]
    rules += [
        Rule(Pattern(rb"/usr/(.*/)?d%d/.*\.so(\.[^/]*)*" % number, b"-"), b"so%d" % number) for number in range(40)
    ]
    rules += [
        Rule(Pattern(rb"/usr/s?bin/tool%d(-[0-9]+)?" % number, b"-"), b"tool%d" % number) for number in range(3000)
    ]
    leaf = Stat(0o644)
    folders = {
        b"d%d" % number: Directory(leaf, {b"lib%d.so.%d" % (one, one): Leaf(leaf) for one in range(100)})
        for number in range(100)
    }
    tools = Directory(leaf, {b"tool%d-%d" % (number, number): Leaf(leaf) for number in range(3000)})
    root = Directory(leaf, {b"usr": Directory(leaf, {**folders, b"bin": tools})})
    filetree.count_links(root)
    started = time.process_time()
    selinux.apply_policy(root, Policy(rules, {b"/usr/d7": b"/usr/d8"}))
    assert time.process_time() - started < 5
    found = dict(filetree.walk(root))
    assert (
        label(found[b"/usr/d5/lib9.so.9"]) == "so5"
        and label(found[b"/usr/d7/lib9.so.9"]) == "so8"
        and label(found[b"/usr/bin/tool77-77"]) == "tool77"
    )


@pytest.mark.slow
def test_deep_trees_need_neither_recursion_nor_much_memory() -> None:
    root = directory = Directory(Stat())
    for _unused in range(10_000):
        child = Directory(Stat())
        directory.entries[b"d"] = child
        directory = child
    selinux.apply_policy(root, Policy([Rule(Pattern(b"/(d/)*d"), b"D")], {b"/q": b"/r"}))
    assert label(directory) == "D"
    with pytest.raises(InvalidLayer, match="too long"):
        selinux.apply_policy(root, Policy([Rule(Pattern(b"/(?!x).*"), b"D")], {}))


# --- against a naive model
# --------------------------------------------------------------------------------------------------------------------

REGEXES = [
    b"/.*",
    b"/a(/.*)?",
    b"/a/b",
    b"/[ab]/c",
    b"/.*/c",
    b"(/.*)?b",
    b"/b/[^/]*",
    b"/a/(b|c)/.*",
    b"/(?!a).*",
    b"/a/b/.*",
    b"/",
    b"/c+",
]
RULES = hs.lists(
    hs.builds(lambda regex, kind, text: Rule(Pattern(regex, kind), text), hs.sampled_from(REGEXES), hs.sampled_from([b"", b"", b"-", b"d", b"l"]),
              hs.sampled_from([b"l1", b"l2", b"l3", None])),
    max_size=10,
)  # fmt: skip
ALIASES = hs.dictionaries(
    hs.sampled_from([b"/a", b"/b", b"/a/b", b"/c", b"/b/a"]),
    hs.sampled_from([b"/", b"/a", b"/b", b"/a/c", b"/zz"]),
    max_size=3,
)
NAMES = hs.sampled_from([b"a", b"b", b"c", b"cc"])


@hs.composite
def trees(draw: Any) -> Directory:
    leaves = [Leaf(Stat(mode=number), draw(hs.sampled_from([st.S_IFREG, st.S_IFLNK]))) for number in range(4)]

    def directory(depth: int) -> Directory:
        entries: dict[bytes, Any] = {}
        for name in draw(hs.lists(NAMES, max_size=4, unique=True)):
            entries[name] = directory(depth - 1) if depth and draw(hs.booleans()) else draw(hs.sampled_from(leaves))
        return Directory(Stat(), entries)

    root = directory(3)
    filetree.count_links(root)
    return root


def expected_labels(root: Directory, policy: Policy) -> dict[bytes, tuple[bytes | None, int]]:
    """Path to label and a number for the inode, by trying every line on every path."""
    compiled = [
        (
            re.compile(rb"\A(?:" + rule.pattern.regex + b")" + (rule.pattern.kind or b".") + rb"\Z", re.DOTALL),
            rule.label,
        )
        for rule in policy.rules
    ]
    found: dict[bytes, tuple[bytes | None, int]] = {}
    first: dict[int, bytes | None] = {}

    def visit(path: bytes, seen_as: bytes, node: Directory | Leaf) -> None:
        kind = b"d" if isinstance(node, Directory) else b"l" if node.kind == st.S_IFLNK else b"-"
        text = next((one for regex, one in reversed(compiled) if regex.match(seen_as + kind)), None)
        number = id(node)
        if isinstance(node, Leaf) and first.setdefault(id(node), text) != text:
            number = -len(found)
        found[path] = (text, number)
        for name, child in sorted(node.entries.items()) if isinstance(node, Directory) else ():
            below = seen_as.rstrip(b"/") + b"/" + name
            visit(path.rstrip(b"/") + b"/" + name, policy.aliases.get(below, below), child)

    visit(b"/", b"/", root)
    return found


@pytest.mark.slow
@given(trees(), hs.builds(Policy, RULES, ALIASES))
@settings(max_examples=150, deadline=None)
def test_any_tree_is_labelled_as_the_naive_model_does(root: Directory, policy: Policy) -> None:
    expected = expected_labels(root, policy)
    selinux.apply_policy(root, policy)
    found = dict(filetree.walk(root))
    assert {path: (node.stat.xattrs or {}).get(LABEL) for path, node in found.items()} == {
        path: text for path, (text, _unused) in expected.items()
    }
    numbers = [number for _unused, number in expected.values()]
    assert [list(map(id, found.values())).count(id(node)) for node in found.values()] == [
        numbers.count(number) for number in numbers
    ]
    assert all(
        node.nlink == list(map(id, found.values())).count(id(node)) for node in found.values() if isinstance(node, Leaf)
    )


# --- against cfsctl
# --------------------------------------------------------------------------------------------------------------------

X = [member(name) for name in ("xa", "xb", "x1", "x.", "x{", b"x\ny")]
POLICIES: dict[str, tuple[bytes, dict[str, Any]]] = {
    "dialect": (
        b"".join(
            b"%s L%d\n" % (regex, number)
            for number, regex in enumerate(
                *[
                    [
                        b"/.*",
                        rb"/x[[:digit:]]",
                        rb"/x\.",
                        rb"/x{",
                        rb"/x.y",
                        rb"/etc/(?!selinux).*",
                        rb"/etc(/.*)?/f[^/]*",
                        rb"/us{1}r$",
                        rb"/xb(|c)",
                        rb"/boo*+t",
                    ]
                ]
            )
        ),
        {},
    ),
    "files": (
        b"/.* all\n/x1 -- one\n/xa -d wrong\n",
        {"local": b"/xb <<none>>\n", "homedirs": b"/x. home\n", "subs": b"/xb /x1\n", "subs_dist": b"/usr /x1\n"},
    ),
    "nothing": (b"\n", {}),
    "no type": (b"/.* all\n", {"config": b"SELINUX=enforcing\n"}),
    "bad line": (b"/.* all\n/x\n", {}),
    "bad expression": (b"/x( all\n", {}),
    "missing": (b"/.* all\n", {"config": b"SELINUXTYPE=mls\n"}),
}


@pytest.mark.skipif(not layers.Cfsctl.available(), reason="cfsctl is not on the PATH")
@pytest.mark.parametrize("name", POLICIES)
def test_cfsctl_labels_alike(name: str, tmp_path: pathlib.Path) -> None:
    contexts, others = POLICIES[name]
    layer = archive(contexts, *X, *LINKS, **others)
    cfsctl = layers.Cfsctl(tmp_path)
    cfsctl.pull([layer])
    theirs = cfsctl.ask("dump", "--bootable")
    if theirs is None:
        with pytest.raises(InvalidLayer):
            layers.tree(layer, bootable=True)
    else:
        assert dumpfile.dumpfile_bytes(layers.tree(layer, bootable=True).root) == theirs
