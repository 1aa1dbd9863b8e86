# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What the pages below docs/formats say in numbers is what the engine does, and the rooms that they name exist."""

from __future__ import annotations

import pathlib
import re

import pytest
from ansible_collections.composefs.oci.plugins.module_utils.formats import (
    bounds,
    fsverity,
    metajson,
    ocidocuments,
    splitstream,
    tardiff,
)
from ansible_collections.composefs.oci.plugins.module_utils.operations import journal
from ansible_collections.composefs.oci.plugins.module_utils.pull import deltas
from ansible_collections.composefs.oci.plugins.module_utils.source import peer
from ansible_collections.composefs.oci.plugins.module_utils.rootfs import erofswriter, lastmatch, merge
from ansible_collections.composefs.oci.plugins.module_utils.rootfs.filetree import Directory, Stat

ROOT = pathlib.Path(__file__).resolve().parents[2]
PAGES = sorted((ROOT / "docs" / "formats").glob("*.md"))


def page(name: str) -> str:
    return " ".join((ROOT / "docs" / "formats" / f"{name}.md").read_text(encoding="utf-8").split())


def test_the_vectors_of_digests_are_right() -> None:
    for content in (b"", b"hello world"):
        assert f"`{fsverity.digest(content, fsverity.SHA256).hex()}`" in page("fsverity")


def test_the_known_images_are_right() -> None:
    for version in (1, 2):
        image = erofswriter.image_bytes(Directory(Stat(0o755)), version, fsverity.SHA256)
        assert f"format {version} `{fsverity.digest(image, fsverity.SHA256).hex()}`" in page("erofs")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("filesystem", f"{merge.MAX_INODES:,} names"),
        ("filesystem", f"{merge.MAX_IMPLIED:,} directories"),
        ("filesystem", f"{merge.MAX_DEPTH:,} levels"),
        ("filesystem", f"{merge.MAX_TEXT >> 20} MiB of names"),
        ("filesystem", f"More than {merge.MAX_LINKS} links"),
        ("filesystem", f"more than {merge.MAX_LINK_STEPS // 10**6} million components"),
        ("filesystem", f"within {lastmatch._MAX_SECONDS:g} seconds of processor time"),
        ("splitstream", f"of more than {bounds.THRESHOLD} bytes is an object"),
        ("splitstream", f"more than {bounds.MAX_SYMLINK} bytes"),
        ("splitstream", f"more than {bounds.MAX_NAME} bytes in a component"),
        ("splitstream", f"more than {bounds.MAX_XATTR:,} bytes"),
        ("repository", f"at most {metajson.MAX_SIZE >> 20} MiB, and anything malformed"),
        ("repository", f"{splitstream._MAX_OBJECT_TABLE >> 20} MiB of objects"),
        ("repository", f"{merge.MAX_TEXT >> 20} MiB of text"),
        ("deltas", f"`{deltas.ARTIFACT_TYPE}`"),
        ("deltas", f"`{ocidocuments.OCI_EMPTY}`"),
        ("deltas", f"at most {tardiff.MAX_PATH:,} bytes long"),
        ("deltas", f"at most {tardiff.MAX_BASE >> 20} MiB"),
        ("peers", f"at most {peer.STREAM_EXTRA >> 20} MiB and"),
        ("peers", f"at most {peer.TAR_LEAST >> 20} MiB or"),
    ],
)
def test_bounds_are_those_of_the_engine(name: str, words: str) -> None:
    assert words in page(name)


def test_the_page_of_deltas_has_every_operation_and_the_tag() -> None:
    for name in ("DATA", "OPEN", "COPY", "ADD", "SEEK", "DICT"):
        assert f"| {getattr(tardiff, name)} | `{name}` |" in page("deltas")
    made = deltas.tag("sha256:" + "a" * 64, "sha256:" + "b" * 64)
    assert made == f"sha256-{'a' * 64}.delta-{'b' * 24}" and "first 24 digits of the source" in page("deltas")


def test_the_page_of_journals_has_every_key() -> None:
    values = [
        journal.Journal("/srv/app", current=journal.Image(""), mount=journal.Settings()),
        journal.Event("", ""),
        journal.Pending("", None, None, None, "", "", "", "", ""),
    ]
    for value in values:
        for key in journal.to_values(value):
            assert f"`{key}`" in page("journal"), key


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_pages_name_rooms_and_pages_that_exist(path: pathlib.Path) -> None:
    text = path.read_text(encoding="utf-8")
    for room in re.findall(r"`((?:formats|rootfs|host|source|store|pull|operations)/(?:\w+\.py)?)`", text):
        assert (ROOT / "plugins" / "module_utils" / room).exists(), room
    for other in re.findall(r"\]\((\w+\.md)\)", text):
        assert (path.parent / other).exists(), other
