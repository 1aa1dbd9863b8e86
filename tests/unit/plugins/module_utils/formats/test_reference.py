# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""References as people write them, and the names that images get by default."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ansible_collections.composefs.oci.plugins.module_utils.errors import InvalidReference
from ansible_collections.composefs.oci.plugins.module_utils.formats.reference import (
    MAX_REFERENCE,
    TRANSPORTS,
    default_name,
    other_names,
    parse_reference,
)

D = "sha256:" + "a" * 64
E = "sha256:" + "b" * 64


@pytest.mark.parametrize(
    ("text", "skopeo"),
    [
        ("quay.example/x/y:tag", "docker://quay.example/x/y:tag"),
        ("quay.example/x", "docker://quay.example/x"),
        ("localhost/x", "docker://localhost/x"),
        ("localhost:5000/x", "docker://localhost:5000/x"),
        ("registry:5000/x:1", "docker://registry:5000/x:1"),
        ("[::1]:5000/x:y", "docker://[::1]:5000/x:y"),
        ("docker://quay.example/x:y", "docker://quay.example/x:y"),
        ("registry:quay.example/x:y", "docker://quay.example/x:y"),
        ("docker://fedora:40", "docker://docker.io/library/fedora:40"),
        ("docker.io/alpine", "docker://docker.io/library/alpine"),
        ("index.docker.io/a/b", "docker://docker.io/a/b"),
        ("oci:/a/b:c", "oci:/a/b:c"),
        ("oci-archive:/a.tar", "oci-archive:/a.tar"),
        ("docker-archive:/a.tar:x/y:z", "docker-archive:/a.tar:x/y:z"),
        ("dir:/a:b", "dir:/a:b"),
        ("containers-storage:localhost/x:y", "containers-storage:localhost/x:y"),
        ("containers-storage:[vfs@/a+/b]localhost/x", "containers-storage:[vfs@/a+/b]localhost/x"),
        ("docker-daemon:x:y", "docker-daemon:x:y"),
    ],
)
def test_references_as_people_write_them(text, skopeo):
    reference = parse_reference(text)
    assert reference.text == skopeo
    assert reference.original == text


@pytest.mark.parametrize("prefix", ["", "docker://", "registry:"])
def test_the_digest_wins_over_the_tag(prefix):
    text = f"{prefix}quay.example/x/y:tag@{D}"
    reference = parse_reference(text)
    assert reference.text == f"docker://quay.example/x/y@{D}"
    assert (reference.original, reference.tag, reference.digest) == (text, "tag", D)


def test_a_leading_sha256_of_containers_storage_is_stripped():
    assert parse_reference("containers-storage:sha256:abc").text == "containers-storage:abc"
    assert parse_reference("containers-storage:[vfs@/a]sha256:abc").text == "containers-storage:[vfs@/a]sha256:abc"


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("", "HOST/NAME:TAG"),
        ("docker:quay.example/x", "docker://"),
        ("docker://", "HOST"),
        ("registry:", "HOST"),
        ("oci:", "PATH"),
        ("oci::tag", "PATH"),
        ("dir:", "PATH"),
        ("containers-storage:", "NAME"),
        ("containers-storage:sha256:", "NAME"),
        ("./x", "oci:PATH"),
        ("/x", "dir:PATH"),
        ("~/x", "dir:PATH"),
        ("dri:/x", "containers-storage:"),
        ("ostree:/x", "containers-storage:"),
        ("foo://x", "containers-storage:"),
        ("https://quay.example/x", "scheme"),
        ("fedora:40", "docker.io/library/fedora:40"),
        ("fedora", "docker.io/library/fedora"),
        ("a/b", "docker.io"),
        ("quay.example/X", "lower case"),
        ("quay.example/x:", "HOST"),
        ("quay.example/x:-a", "tag"),
        ("quay.example/x:" + "a" * 129, "tag"),
        ("quay.example/x@sha256:abc", "digest"),
        ("quay.example/x@sha512:" + "a" * 128, "digest"),
        ("quay.example/x@" + D.upper(), "digest"),
        ("quay.example/x y", "HOST"),
        ("quay.example/x\n", "HOST"),
        ("quay.example/x\u00a0", "HOST"),
        ("quay.example/\x1b[31mx", "HOST"),
        ("quay.example/\udcff", "HOST"),
        (" quay.example/x", "HOST"),
        ("quay.example/" + "a/" * 2100 + "a", "HOST"),
        ("quay.example/" + "a" * 250, "HOST"),
        ("oci:/" + "a" * 4096, "HOST"),
    ],
)
def test_what_is_no_reference_is_refused_with_a_way_out(text, hint):
    with pytest.raises(InvalidReference) as caught:
        parse_reference(text)
    assert hint in caught.value.hint
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1200


@pytest.mark.parametrize("text", ["-x", "--policy=/x", "docker://--policy", "docker://-x/y", "registry:--x"])
def test_an_option_is_no_reference(text):
    with pytest.raises(InvalidReference):
        parse_reference(text)


@pytest.mark.parametrize("text", ["oci:--policy", "dir:-x", "containers-storage:--x", "docker-daemon:-x"])
def test_what_looks_like_an_option_stays_behind_its_transport(text):
    assert not parse_reference(text).text.startswith("-")


@pytest.mark.parametrize(
    "text",
    [
        "user:s3cret@quay.example/x",
        "docker://user:s3cret@quay.example/x",
        "https://user:s3cret@quay.example/x",
        "foo://user:s3cret@quay.example/x",
        "/user:s3cret@quay.example/x",
        "user:s3cret@localhost:5000",
        "user:s3cret@p@quay.example/x",
        f"docker://user:s3cret@quay.example/x@{D}",
    ],
)
def test_a_password_in_a_reference_is_refused_and_not_repeated(text):
    with pytest.raises(InvalidReference) as caught:
        parse_reference(text)
    assert "s3cret" not in str(caught.value)


def test_a_reference_knows_its_registry_and_its_path():
    reference = parse_reference("quay.example:443/x/y:z")
    assert (reference.registry, reference.repository, reference.tag, reference.is_remote) == (
        "quay.example:443",
        "x/y",
        "z",
        True,
    )
    assert parse_reference("oci:/a/b:c").path == "/a/b"
    assert parse_reference("dir:/a:b").path == "/a:b"
    assert parse_reference("quay.example/x").path == ""


def test_pinning_names_what_a_tag_meant():
    assert parse_reference("quay.example/x:y").pinned(D).text == f"docker://quay.example/x@{D}"
    assert parse_reference("oci:/x:y").pinned(D).text == "oci:/x:y"


def test_the_longest_reference_fits_into_a_request_whatever_its_characters():
    for character in ("a", '"', "\\", "é", "漢", "🎉"):
        text = "oci:" + character * ((MAX_REFERENCE - 4) // len(character.encode()))
        request = json.dumps({"method": "OpenImage", "args": [parse_reference(text).text]}).encode()
        assert len(request) < 32768


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(st.text(max_size=60) | st.from_regex(r"[a-z-]{0,12}:?(//)?[a-zA-Z0-9:@/._\[\]-]{0,40}", fullmatch=True))
def test_any_text_is_a_reference_or_refused(text):
    try:
        reference = parse_reference(text)
    except InvalidReference:
        return
    assert reference.text.partition(":")[0] in TRANSPORTS
    assert reference.text.isprintable() and " " not in reference.text
    assert reference.text.count("@") <= 1 or not reference.is_remote
    assert parse_reference(reference.text).text == reference.text


@pytest.mark.parametrize(
    ("text", "name", "others"),
    [
        ("r.test/app:1", "docker://r.test/app:1", ("r.test/app:1",)),
        ("docker://r.test/app:1", "docker://r.test/app:1", ("r.test/app:1",)),
        ("registry:r.test/app", "docker://r.test/app", ("r.test/app",)),
        ("registry:5000/app", "docker://registry:5000/app", ("registry:5000/app",)),
        (
            f"r.test/app:1@sha256:{'a' * 64}",
            f"docker://r.test/app:1@sha256:{'a' * 64}",
            (f"r.test/app:1@sha256:{'a' * 64}",),
        ),
        ("docker://debian", "docker://debian", ("debian",)),
        ("oci:/srv/layout:1", "oci:/srv/layout:1", ()),
    ],
)
def test_the_default_name_has_the_transport(text: str, name: str, others: tuple[str, ...]) -> None:
    assert default_name(text) == name
    assert other_names(name) == others
    assert all(other_names(other) == (name,) for other in others if other != "debian")


def test_a_name_that_is_no_reference_has_no_other_form() -> None:
    assert other_names("app") == other_names("team/app") == other_names("") == ()
