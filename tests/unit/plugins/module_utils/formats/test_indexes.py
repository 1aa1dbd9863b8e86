# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Which manifest an index means for a platform."""

from __future__ import annotations

import json
from typing import Any

import pytest

from ansible_collections.composefs.oci.plugins.module_utils.errors import (
    DigestMismatch,
    InvalidDocument,
    PlatformNotFound,
)
from ansible_collections.composefs.oci.plugins.module_utils.formats import indexes
from ansible_collections.composefs.oci.plugins.module_utils.formats.digests import digest_of
from ansible_collections.composefs.oci.plugins.module_utils.formats.ocidocuments import (
    DOCKER_LIST,
    OCI_INDEX,
    OCI_MANIFEST,
    Descriptor,
    parse_platform,
)


class Documents:
    """Indexes by digest."""

    def __init__(self) -> None:
        self.raw: dict[str, bytes] = {}
        self.asked: list[str] = []

    def entry(self, name: str, platform: str = "") -> dict[str, Any]:
        raw = name.encode()
        made: dict[str, Any] = {"mediaType": OCI_MANIFEST, "digest": digest_of(raw), "size": len(raw)}
        if platform:
            made["platform"] = dict(zip(("os", "architecture", "variant"), platform.split("/")))
        return made

    def index(self, *entries: dict[str, Any], media_type: str = OCI_INDEX, **extra: Any) -> dict[str, Any]:
        raw = json.dumps({"schemaVersion": 2, "mediaType": media_type, "manifests": entries}).encode()
        self.raw[digest_of(raw)] = raw
        return {"mediaType": media_type, "digest": digest_of(raw), "size": len(raw), **extra}

    def read(self, descriptor: Descriptor) -> bytes:
        self.asked.append(descriptor.digest)
        return self.raw[descriptor.digest]

    def choose(self, top: dict[str, Any], platform: str) -> str:
        return indexes.choose(self.raw[top["digest"]], parse_platform(platform), self.read).descriptor.digest


@pytest.mark.parametrize(
    ("offered", "wanted", "chosen"),
    [
        (["linux/arm64", "linux/amd64"], "linux/amd64", 1),
        (["linux/arm/v6"], "linux/arm/v7", 0),
        (["linux/arm/v6", "linux/arm/v7"], "linux/arm/v7", 1),
        (["linux/arm/v5", "linux/arm", "linux/arm/v6"], "linux/arm/v7", 2),
        (["linux/arm"], "linux/arm/v7", 0),
        (["linux/arm64/v8"], "linux/arm64", 0),
        (["linux/arm64"], "linux/arm64/v8", 0),
        (["linux/amd64/v3", "linux/amd64"], "linux/amd64", 1),
        (["linux/amd64/v3", "linux/amd64/v2"], "linux/amd64", 1),
        (["unknown/unknown", "linux/amd64"], "linux/amd64", 1),
        (["", "linux/amd64"], "linux/amd64", 1),
        (["linux/arm64", ""], "linux/amd64", 1),
    ],
)
def test_the_best_that_fits_is_chosen(offered: list[str], wanted: str, chosen: int) -> None:
    documents = Documents()
    entries = [documents.entry(str(number), platform) for number, platform in enumerate(offered)]
    assert documents.choose(documents.index(*entries), wanted) == entries[chosen]["digest"]


@pytest.mark.parametrize(
    ("offered", "wanted"),
    [(["linux/arm/v7"], "linux/arm/v6"), (["linux/arm64"], "linux/amd64"), ([], "linux/amd64")],
)
def test_nothing_that_fits_is_told_with_what_there_is(offered: list[str], wanted: str) -> None:
    documents = Documents()
    top = documents.index(*(documents.entry(platform, platform) for platform in offered))
    with pytest.raises(PlatformNotFound) as caught:
        documents.choose(top, wanted)
    assert all(platform in caught.value.message for platform in offered)


@pytest.mark.parametrize("kind", [OCI_INDEX, DOCKER_LIST])
def test_the_platform_is_chosen_across_nested_indexes(kind: str) -> None:
    documents = Documents()
    six, seven = documents.entry("6", "linux/arm/v6"), documents.entry("7", "linux/arm/v7")
    top = documents.index(documents.index(six, media_type=kind), documents.index(seven, media_type=kind))
    assert documents.choose(top, "linux/arm/v7") == seven["digest"]


def test_an_index_for_another_platform_is_not_read() -> None:
    documents = Documents()
    inner = documents.index(documents.entry("s", ""), platform={"os": "linux", "architecture": "s390x"})
    here = documents.index(documents.entry("a", ""), platform={"os": "linux", "architecture": "amd64"})
    assert documents.choose(documents.index(inner, here), "linux/amd64") == documents.entry("a")["digest"]
    assert documents.asked == [here["digest"]]


def test_the_walk_has_an_end() -> None:
    documents = Documents()
    deep = documents.index(documents.entry("a", "linux/amd64"))
    for _level in range(indexes.MAX_DEPTH):
        deep = documents.index(deep)
    wide = documents.index(*[documents.index(documents.entry("a", "linux/amd64"))] * indexes.MAX_INDEXES)
    for top in (deep, wide):
        with pytest.raises(InvalidDocument, match="levels deep"):
            documents.choose(top, "linux/amd64")


def test_an_inner_index_is_proved() -> None:
    documents = Documents()
    inner = documents.index(documents.entry("a", "linux/amd64"))
    top = documents.index(inner)
    documents.raw[inner["digest"]] += b" "
    with pytest.raises(DigestMismatch):
        documents.choose(top, "linux/amd64")
