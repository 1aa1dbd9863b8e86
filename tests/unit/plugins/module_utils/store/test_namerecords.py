# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Where names came from: what is written, when it counts, and what a crash or another program leaves of it."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import pytest

from ansible_collections.composefs.oci.plugins.module_utils.errors import ReadOnly
from ansible_collections.composefs.oci.plugins.module_utils.formats import fsverity, repolayout
from ansible_collections.composefs.oci.plugins.module_utils.host import filesystem
from ansible_collections.composefs.oci.plugins.module_utils.store import create, namerecords
from ansible_collections.composefs.oci.plugins.module_utils.store.namerecords import NameRecord
from ansible_collections.composefs.oci.plugins.module_utils.store.repository import Repository

OLD, NEW = (f"sha256:{digit * 64}" for digit in "ab")


@pytest.fixture
def repository(tmp_path: pathlib.Path) -> Iterator[Repository]:
    create.prepare(str(tmp_path / "repo"), fsverity.SHA256, "disabled")
    with Repository.open(str(tmp_path / "repo"), write=True) as opened:
        for digest in (OLD, NEW):
            opened.register(f"oci-manifest-{digest}", bytes(32))
        yield opened


def record(manifest: str = OLD, **others: Any) -> NameRecord:
    return NameRecord(**{"ref": "docker://r.test/app:1", "manifest": manifest, **others})


def file_of(repository: Repository, name: str) -> pathlib.Path:
    return pathlib.Path(repository.path, ".composefs-oci/names", f"{name.replace('%', '%25').replace('/', '%2F')}.json")


def give(repository: Repository, name: str, entry: NameRecord) -> None:
    namerecords.remember(repository, name, entry)
    repository.tag(name, entry.manifest)


@pytest.mark.parametrize("name", ["app", "docker://r.test/app:1", "50%", ".json", "büro", "n" * 250, "n" * 255])
def test_a_record_is_found_under_its_name(repository: Repository, name: str) -> None:
    give(repository, name, record(registry_digest=NEW, index_digest=None, policy="enforced"))
    found = namerecords.read(repository, name)
    assert found is not None and dataclasses.replace(found, since="") == record(registry_digest=NEW, policy="enforced")
    assert found.since.endswith("Z") and len(found.since) == 20
    assert namerecords.records(repository) == {name: found}


def test_the_file_is_what_its_readers_expect(repository: Repository) -> None:
    give(repository, "team/app", record(registry_digest=NEW, policy="ignored"))
    path = file_of(repository, "team/app")
    document = json.loads(path.read_text())
    assert {key: document[key] for key in ("ref", "manifest", "registry_digest", "policy")} == {
        "ref": "docker://r.test/app:1",
        "manifest": OLD,
        "registry_digest": NEW,
        "policy": "ignored",
    }
    assert set(document) == {"ref", "manifest", "registry_digest", "index_digest", "policy", "since"}
    assert path.stat().st_mode & 0o7777 == 0o644 and os.listdir(path.parent) == ["team%2Fapp.json"]


def test_a_record_counts_only_while_the_name_leads_to_its_manifest(repository: Repository) -> None:
    assert namerecords.read(repository, "app") is None
    give(repository, "app", record())
    repository.tag("app", NEW)  # as another program does, which knows nothing of records
    assert namerecords.read(repository, "app") is None
    repository.tag("app", OLD)
    assert namerecords.read(repository, "app") is not None
    repository.untag("app")
    assert namerecords.read(repository, "app") is None


def test_a_crash_between_record_and_tag_leaves_a_name_with_a_true_record(repository: Repository) -> None:
    give(repository, "app", record(OLD, ref="docker://r.test/app:1"))
    namerecords.remember(repository, "app", record(NEW, ref="docker://r.test/app:2"))
    before = namerecords.read(repository, "app")
    assert before is not None and before.ref == "docker://r.test/app:1"
    # The next run writes it again, and must not lose the one that is true.
    namerecords.remember(repository, "app", record(NEW, ref="docker://r.test/app:3"))
    assert namerecords.read(repository, "app") == before
    repository.tag("app", NEW)
    after = namerecords.read(repository, "app")
    assert after is not None and after.ref == "docker://r.test/app:3"


def test_the_time_is_that_of_the_name(repository: Repository) -> None:
    repository.tag("app", OLD)
    os.utime("streams/refs/oci/app", (1_700_000_000, 1_700_000_000), dir_fd=repository.fd, follow_symlinks=False)
    namerecords.remember(repository, "app", record())
    first = namerecords.read(repository, "app")
    assert first is not None and first.since == "2023-11-14T22:13:20Z"
    namerecords.remember(repository, "app", record(ref="docker://r.test/app:2"))
    second = namerecords.read(repository, "app")
    assert second is not None and second.since == first.since, "the same image, only its reference is another"
    namerecords.remember(repository, "app", record(NEW))
    repository.tag("app", NEW)
    third = namerecords.read(repository, "app")
    assert third is not None and third.since > first.since


def test_what_is_the_same_is_not_written_again(repository: Repository) -> None:
    give(repository, "app", record())
    before = file_of(repository, "app").stat().st_ino
    namerecords.remember(repository, "app", record())
    assert file_of(repository, "app").stat().st_ino == before


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"[" * 100_000,
        b"\xff",
        b'{"ref": 1, "manifest": "%s"}' % OLD.encode(),
        b'{"manifest": "%s"}' % OLD.encode(),
        b'{"ref": "docker://x", "manifest": "sha256:no"}',
        b'{"ref": "docker://x", "manifest": "%s", "policy": []}' % OLD.encode(),
    ],
)
def test_a_damaged_record_counts_as_none_and_is_replaced(repository: Repository, content: bytes) -> None:
    give(repository, "app", record())
    file_of(repository, "app").write_bytes(content)
    assert namerecords.read(repository, "app") is None
    namerecords.remember(repository, "app", record())
    assert namerecords.read(repository, "app") is not None


def test_a_link_in_the_place_of_a_record_is_not_followed(repository: Repository, tmp_path: pathlib.Path) -> None:
    give(repository, "app", record())
    path = file_of(repository, "app")
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    assert namerecords.read(repository, "app") is None
    namerecords.remember(repository, "app", record(ref="docker://r.test/app:2"))
    assert "app:1" in (tmp_path / "elsewhere").read_text() and not path.is_symlink()


def test_what_is_forgotten_is_gone(repository: Repository) -> None:
    namerecords.forget(repository, "never")
    give(repository, "app", record())
    give(repository, "web", record())
    repository.untag("app")
    assert namerecords.strays(repository) == ["app"]
    namerecords.forget(repository, "app")
    assert namerecords.strays(repository) == [] and os.listdir(file_of(repository, "app").parent) == ["web.json"]


def test_a_repository_without_records_has_none(repository: Repository) -> None:
    repository.tag("app", OLD)
    assert namerecords.records(repository) == {} and namerecords.strays(repository) == []
    assert not os.path.exists(f"{repository.path}/.composefs-oci/names")


def test_a_record_that_cannot_be_written_is_an_error(repository: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> None:
        raise ReadOnly("The repository is on a read-only file system.")

    monkeypatch.setattr(filesystem, "require_writable", refuse)
    with Repository.open(repository.path) as reader, pytest.raises(ReadOnly, match="Remembering where the name 'app'"):
        namerecords.remember(reader, "app", record())


def test_no_name_can_take_the_place_of_a_long_one() -> None:
    assert namerecords._file_name("n" * 255).startswith("%sha256-")
    assert not repolayout.encode_tag("%sha256-" + "0" * 64).startswith("%sha256-")


def test_a_default_name_is_found_with_and_without_its_transport(repository: Repository) -> None:
    repository.tag("docker://r.test/app:1", OLD)
    repository.tag("app", NEW)
    for asked in ("docker://r.test/app:1", "r.test/app:1"):
        assert namerecords.spelled(repository, asked) == "docker://r.test/app:1"
    assert namerecords.spelled(repository, "app") == "app"
    assert namerecords.spelled(repository, "r.test/app:2") == "r.test/app:2"
    repository.tag("r.test/app:1", NEW)
    assert namerecords.spelled(repository, "r.test/app:1") == "r.test/app:1", (
        "what is there as it is written comes first"
    )
