# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""meta.json: bytes, effective image formats, features."""

from __future__ import annotations

import json
from typing import Any

import pytest
from ansible_collections.composefs.oci.plugins.module_utils.formats import fsverity
from ansible_collections.composefs.oci.plugins.module_utils.errors import FormatError, IncompatibleRepository
from ansible_collections.composefs.oci.plugins.module_utils.formats.metajson import Metadata
from hypothesis import given
from hypothesis import strategies as st

# As `cfsctl init` 0.9.4 writes it by default.
CFSCTL_DEFAULT = """{
  "version": 1,
  "algorithm": "fsverity-sha512-12",
  "features": {
    "compatible": [],
    "read-only-compatible": [
      "v1_erofs"
    ],
    "incompatible": []
  },
  "erofs_formats": {
    "default": 1
  }
}
"""
CFSCTL_SHA256_V2 = """{
  "version": 1,
  "algorithm": "fsverity-sha256-12",
  "features": {
    "compatible": [],
    "read-only-compatible": [],
    "incompatible": []
  },
  "erofs_formats": {
    "default": 2
  }
}
"""
WITH_EXTRA = """{
  "version": 1,
  "algorithm": "fsverity-sha256-12",
  "features": {
    "compatible": [],
    "read-only-compatible": [
      "v1_erofs"
    ],
    "incompatible": []
  },
  "erofs_formats": {
    "default": 1,
    "extra": [
      0,
      2
    ]
  }
}
"""


def document(**changes: Any) -> bytes:
    return json.dumps({**json.loads(CFSCTL_DEFAULT), **changes}).encode()


def test_a_new_repository_is_described_to_the_byte_as_by_cfsctl() -> None:
    assert Metadata.new(fsverity.SHA512).to_bytes() == CFSCTL_DEFAULT.encode()
    assert Metadata.new(fsverity.SHA256, 2).to_bytes() == CFSCTL_SHA256_V2.encode()
    assert (
        Metadata.new(fsverity.SHA512, 0).to_bytes()
        == CFSCTL_SHA256_V2.replace("256", "512").replace('"default": 2', '"default": 0').encode()
    )
    assert Metadata.new(fsverity.SHA256, 1, (2, 0, 2)).to_bytes() == WITH_EXTRA.encode()


@pytest.mark.parametrize("text", [CFSCTL_DEFAULT, CFSCTL_SHA256_V2, WITH_EXTRA])
def test_what_is_read_is_written_back_alike(text: str) -> None:
    assert Metadata.parse(text.encode()).to_bytes() == text.encode()


@pytest.mark.parametrize(
    ("formats", "flags", "effective"),
    [
        (None, [], (2,)),
        (None, ["v1_erofs"], (1,)),
        ({"default": 2}, [], (2,)),
        ({"default": 2}, ["v1_erofs"], (1,)),
        ({"default": 1}, ["v1_erofs"], (1,)),
        ({"default": 1}, [], (1,)),
        ({"default": 0}, [], (0,)),
        ({"default": 2, "extra": [1]}, ["v1_erofs"], (2, 1)),
        ({"default": 1, "extra": [2]}, ["v1_erofs"], (1, 2)),
        ({"default": 0, "extra": [2, 1, 0]}, [], (0, 1, 2)),
        ({"default": 2, "extra": []}, ["v1_erofs"], (1,)),
    ],
)
def test_effective_erofs_formats(formats: Any, flags: list[str], effective: tuple[int, ...]) -> None:
    found = json.loads(document(features={"read-only-compatible": flags}))
    found["erofs_formats"] = formats
    if formats is None:
        del found["erofs_formats"]
    assert Metadata.parse(json.dumps(found).encode()).erofs_formats == effective


def test_unknown_fields_and_missing_features_are_accepted() -> None:
    assert (
        Metadata.parse(b'{"version": 0, "algorithm": "fsverity-sha256-12", "later": {"x": 1}}').algorithm
        is fsverity.SHA256
    )


def test_unknown_incompatible_features_refuse_everything() -> None:
    metadata = Metadata.parse(document(features={"incompatible": ["zstd_objects"]}))
    with pytest.raises(IncompatibleRepository, match=r"not known: 'zstd_objects'.*update"):
        metadata.check_readable()
    with pytest.raises(IncompatibleRepository):
        metadata.check_writable()


def test_unknown_read_only_compatible_features_refuse_writing_only() -> None:
    metadata = Metadata.parse(
        document(features={"read-only-compatible": ["v1_erofs", "index"], "compatible": ["anything"]})
    )
    metadata.check_readable()
    with pytest.raises(IncompatibleRepository, match=r"can be read but not written.*'index'"):
        metadata.check_writable()


@pytest.mark.parametrize(
    "changes",
    [
        {"version": 2},
        {"algorithm": "fsverity-sha256-16"},
        {"algorithm": "fsverity-sha3-12"},
        {"erofs_formats": {"default": 3}},
    ],
    ids=str,
)
def test_what_a_newer_program_made_is_incompatible(changes: dict[str, Any]) -> None:
    with pytest.raises(IncompatibleRepository):
        Metadata.parse(document(**changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"version": None},
        {"version": True},
        {"version": -1},
        {"version": "1"},
        {"algorithm": 12},
        {"algorithm": "sha256"},
        {"features": []},
        {"features": {"incompatible": "x"}},
        {"features": {"compatible": [1]}},
        {"erofs_formats": []},
        {"erofs_formats": {}},
        {"erofs_formats": {"default": True}},
        {"erofs_formats": {"default": 1, "extra": 2}},
    ],
    ids=str,
)
def test_malformed_documents_are_damage(changes: dict[str, Any]) -> None:
    with pytest.raises(FormatError):
        Metadata.parse(document(**changes))


@given(st.binary(max_size=60))
def test_garbage_is_damage(raw: bytes) -> None:
    with pytest.raises(FormatError):
        Metadata.parse(raw)


def test_nesting_without_end_is_damage() -> None:
    with pytest.raises(FormatError):
        Metadata.parse(b"[" * 100_000)
