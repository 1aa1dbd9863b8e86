# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The journal of a mount point: values and text, one commit, one lock."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import threading
from typing import Any

import pytest
from ansible_collections.composefs.oci.plugins.module_utils.errors import Busy, IncompatibleJournal
from ansible_collections.composefs.oci.plugins.module_utils.operations import journal
from ansible_collections.composefs.oci.plugins.module_utils.operations.journal import (
    Event,
    Image,
    Journal,
    Pending,
    Places,
    Settings,
)

ONE, TWO = "ab" * 32, "cd" * 32
DIGEST = "sha256:" + "12" * 32
TRIAL = Pending(
    TWO,
    DIGEST,
    ONE,
    "app-1",
    "anna@control",
    "2026-11-27T14:40:07Z",
    "2026-11-27T14:45:07Z",
    "boot",
    "0123456789abcdef",
)
FULL = Journal(
    "/srv/app",
    "app",
    "/var/lib/images",
    Settings("required", ("noexec",), persistent=True),
    Image(ONE, DIGEST, None, "docker://registry.example.com/app:1", "2026-11-27T14:40:07Z", "app-0"),
    (Image(TWO),),
    TRIAL,
    (Event("2026-11-27T14:40:07Z", "confirmed", TWO, ONE, DIGEST, "app-0", "anna@control", "", 4.9),),
    (f"app@{DIGEST}",),
)


@pytest.fixture
def places(tmp_path: pathlib.Path) -> Places:
    made = Places(str(tmp_path / "units"), str(tmp_path / "library"), str(tmp_path / "running"))
    journal.make_directories(made)
    return made


def test_what_is_written_is_read_again(places: Places) -> None:
    for value in (Journal("/srv/app"), FULL):
        journal.write(value, places)
        assert journal.read("/srv/app", places) == value
    assert journal.read("/srv/other", places) is None


def test_the_file_has_the_words_of_the_format(places: Places) -> None:
    journal.write(dataclasses.replace(FULL, pending=None), places)
    file = pathlib.Path(places.journals, "srv-app.json")
    values = json.loads(file.read_text())
    assert values["version"] == 1 and values["pending"] is None and file.stat().st_mode & 0o777 == 0o644
    assert set(values) == {
        *("version", "path", "name", "repository", "mount", "current", "previous", "pending", "history", "pins", "boot")
    }
    assert set(values["mount"]) == {
        *("verity", "opts", "dev", "suid", "bootable", "upperdir", "workdir", "persistent"),
    }
    assert set(values["current"]) == {"digest", "index_digest", "image_id", "ref", "since", "rollout"}
    assert set(values["history"][0]) >= {"time", "rollout", "who", "from", "to", "result", "reason", "seconds"}
    journal.write(FULL, places)
    pending = json.loads(file.read_text())["pending"]
    assert set(pending) >= {
        *("digest", "image_id", "from", "rollout", "who", "since", "deadline", "boot", "token"),
    }


def test_keys_that_are_not_known_are_kept_everywhere(places: Places) -> None:
    values = journal.to_values(FULL)
    for part in (
        values,
        values["mount"],
        values["current"],
        values["previous"][0],
        values["pending"],
        values["history"][0],
    ):
        part["later"] = {"a": [1]}
    read = journal.parse(json.dumps(values).encode(), "x")
    assert journal.to_values(read) == values
    moved = dataclasses.replace(read, current=read.previous[0])
    assert journal.to_values(moved)["current"]["later"] == {"a": [1]}


def test_a_newer_version_is_refused_but_not_at_boot(places: Places) -> None:
    raw = json.dumps({**journal.to_values(FULL), "version": 2}).encode()
    with pytest.raises(IncompatibleJournal, match="version 2"):
        journal.parse(raw, "x")
    pathlib.Path(places.journals, "srv-app.json").write_bytes(raw)
    found, complaint = journal.read_for_boot("/srv/app", places)
    assert found is not None and found.current == FULL.current and complaint == ""


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\0" * 100,
        b"[]",
        b"{}",
        b'{"version": 1}',
        b'{"version": 1, "path": 7}',
        b'{"version": 1, "path": "/a", "current": 7}',
        b'{"version": 1, "path": "/a", "current": {}}',
        b'{"version": 1, "path": "/a", "previous": [7]}',
        b'{"version": 1, "path": "/a", "pins": "app@x"}',
        b'{"version": 1, "path": "/a", "mount": {"dev": "yes"}}',
        b"[" * 100_000,
    ],
)
def test_what_is_no_journal_is_said_and_a_boot_takes_the_one_before(places: Places, raw: bytes) -> None:
    journal.write(FULL, places)
    journal.write(dataclasses.replace(FULL, pending=None), places)
    file = pathlib.Path(places.journals, "srv-app.json")
    file.write_bytes(raw)
    with pytest.raises(IncompatibleJournal, match="cannot be understood.*srv-app.json~"):
        journal.read("/srv/app", places)
    found, complaint = journal.read_for_boot("/srv/app", places)
    assert found == FULL and "srv-app.json~" in complaint
    with pytest.raises(IncompatibleJournal):
        journal.kept(places)


def test_each_commit_keeps_the_one_it_replaces_if_that_can_be_read(places: Places) -> None:
    first, second = Journal("/srv/app", "first"), Journal("/srv/app", "second")
    journal.write(first, places)
    assert not os.path.exists(f"{places.journals}/srv-app.json~")
    journal.write(second, places)
    before = pathlib.Path(places.journals, "srv-app.json~")
    assert journal.parse(before.read_bytes(), "x") == first
    pathlib.Path(places.journals, "srv-app.json").write_bytes(b"torn")
    journal.write(second, places)
    assert journal.parse(before.read_bytes(), "x") == first
    assert sorted(os.listdir(places.journals)) == ["srv-app.json", "srv-app.json~"]


def test_the_history_is_bounded(places: Places) -> None:
    found = Journal("/srv/app")
    for number in range(60):
        found = found.with_event(Event(str(number), "confirmed"))
    assert [event.time for event in found.history] == [str(number) for number in range(10, 60)]


def test_every_image_that_a_journal_relies_on_is_told(places: Places) -> None:
    third = "ef" * 32
    journal.write(
        dataclasses.replace(FULL, pending=dataclasses.replace(TRIAL, image_id=third, repository="/o")), places
    )
    assert {(kept.role, kept.repository, kept.image_id, kept.digest) for kept in journal.kept(places)} == {
        ("current", "/var/lib/images", ONE, DIGEST),
        ("previous", "/var/lib/images", TWO, None),
        ("pending", "/o", third, DIGEST),
    }


@pytest.mark.parametrize("path", ["/", "/srv/a b", "/srv/\udcff", "/" + "x/" * 400, "/srv/" + "ü" * 80])
def test_every_path_has_a_journal_of_its_own(places: Places, path: str) -> None:
    journal.write(Journal(path), places)
    assert journal.read(path, places) == Journal(path)
    assert len(f"{journal.stem(path)}.json.lock") < 250
    assert journal.stem(path) != journal.stem(f"{path}y")


def test_the_lock_excludes_and_goes_with_the_journal(places: Places) -> None:
    with journal.locked("/srv/app", places):
        with pytest.raises(Busy, match="Another task"), journal.locked("/srv/app", places, wait=0.05):
            pass
        with journal.locked("/srv/other", places):
            pass
        journal.write(Journal("/srv/app"), places)
    assert os.listdir(places.journals) and os.stat(f"{places.journals}/srv-app.json.lock").st_mode & 0o077 == 0
    with journal.locked("/srv/app", places):
        journal.remove("/srv/app", places)
    assert not os.path.exists(places.library)


def test_whoever_waited_for_a_lock_that_went_takes_a_new_one(places: Places) -> None:
    inside: list[int] = []
    worst: list[int] = []

    def use() -> None:
        for _time in range(40):
            with journal.locked("/srv/app", places):
                inside.append(1)
                worst.append(len(inside))
                inside.pop()

    threads = [threading.Thread(target=use) for _number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(worst) == 160 and max(worst) == 1


def test_everybody_may_read_whatever_the_umask_is(tmp_path: pathlib.Path) -> None:
    places = Places(library=str(tmp_path / "library"))
    old = os.umask(0o077)
    try:
        with journal.locked("/srv/app", places):
            journal.write(Journal("/srv/app"), places)
    finally:
        os.umask(old)
    modes: dict[str, Any] = {name: os.stat(name).st_mode & 0o777 for name in (places.library, places.journals)}
    assert set(modes.values()) == {0o755}
    assert os.stat(f"{places.journals}/srv-app.json").st_mode & 0o777 == 0o644
