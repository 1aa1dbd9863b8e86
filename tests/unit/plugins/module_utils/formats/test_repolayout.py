# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Names in a repository."""

from __future__ import annotations

import pytest
from ansible_collections.composefs.oci.plugins.module_utils.formats import repolayout
from ansible_collections.composefs.oci.plugins.module_utils.errors import InvalidReference
from hypothesis import given
from hypothesis import strategies as st


@pytest.mark.parametrize(
    ("name", "encoded"),
    [
        ("quay.io/x/y:1", "quay.io%2Fx%2Fy:1"),
        ("100%", "100%25"),
        ("a%2Fb", "a%252Fb"),
        ("../x", "..%2Fx"),
        ("a b@c*\n-é", "a b@c*\n-é"),
    ],
)
def test_tags_are_encoded_percent_first(name: str, encoded: str) -> None:
    assert repolayout.encode_tag(name) == encoded
    assert repolayout.decode_tag(encoded) == name
    repolayout.check_tag_name(name)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("%252F", "%2F"),
        ("%2f", "%2f"),
        ("a%2fb%2Fc", "a%2fb/c"),
        ("%", "%"),
        ("%2", "%2"),
        ("%%2F", "%/"),
        ("%41", "%41"),
        ("%25%2F25", "%/25"),
    ],
)
def test_tags_are_decoded_in_one_pass_and_upper_case_only(text: str, name: str) -> None:
    assert repolayout.decode_tag(text) == name


@given(st.text())
def test_decoding_undoes_encoding(name: str) -> None:
    assert repolayout.decode_tag(repolayout.encode_tag(name)) == name
    assert "/" not in repolayout.encode_tag(name)


@pytest.mark.parametrize("name", ["", ".", "..", "@x", "a\0b", "\udc80", "x" * 256, "/" * 86, "é" * 128])
def test_names_that_cannot_be_given_are_refused(name: str) -> None:
    with pytest.raises(InvalidReference):
        repolayout.check_tag_name(name)


@pytest.mark.parametrize("name", ["x" * 255, "/" * 85, "é" * 127, "a@b", "...", "-x"])
def test_names_up_to_255_encoded_bytes_are_accepted(name: str) -> None:
    repolayout.check_tag_name(name)


@pytest.mark.parametrize(
    ("name", "target", "text"),
    [
        ("images/HEX", "objects/xx/rest", "../objects/xx/rest"),
        ("images/refs/a/b", "images/HEX", "../../HEX"),
        ("streams/ID", "objects/xx/rest", "../objects/xx/rest"),
        ("streams/refs/oci/T", "streams/oci-manifest-D", "../../oci-manifest-D"),
        ("streams/refs/a", "streams/ID", "../ID"),
    ],
)
def test_link_texts_leave_out_the_common_directories(name: str, target: str, text: str) -> None:
    assert repolayout.link_text(name, target) == text


def test_only_the_last_component_of_a_tags_target_counts() -> None:
    digest = "sha256:" + "a" * 64
    assert repolayout.manifest_of_target(f"../../oci-manifest-{digest}") == digest
    assert repolayout.manifest_of_target(f"oci-manifest-{digest}") == digest
    for target in (
        "",
        "../../oci-manifest-sha256:x",
        f"../../oci-config-{digest}",
        f"../{digest}",
        f"oci-manifest-{digest}/",
    ):
        assert repolayout.manifest_of_target(target) is None
