# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""composefs_mount through AnsibleModule, in this process, with a stand-in for the kernel's mounts and for systemd."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ansible.module_utils.basic", exc_type=ImportError)

import yaml

from ansible_collections.composefs.oci.plugins.module_utils.formats import codecs
from ansible_collections.composefs.oci.plugins.module_utils.operations import mounting, bootmount, journal
from ansible_collections.composefs.oci.plugins.module_utils.errors import ReadOnly
from ansible_collections.composefs.oci.plugins.module_utils.store.repository import Repository
from ansible_collections.composefs.oci.plugins.modules import composefs_mount
from ansible_collections.composefs.oci.tests.support.moduleargs import arguments, require_shape
from ansible_collections.composefs.oci.tests.support.mounthost import Host, put

SHAPE = {
    "changed",
    "image_id",
    "previous_image_id",
    "path",
    "repository",
    "mounted",
    "verity",
    "unit",
    "name",
    "digest",
    "keeps",
}


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    return Host(tmp_path, monkeypatch)


@pytest.fixture
def run(host: Host, capsys: pytest.CaptureFixture[str]) -> Any:
    """``run(image=..., check=True)`` runs the module at the host's path and returns its result."""

    def task(check: bool = False, **values: Any) -> dict[str, Any]:
        values = {"path": host.path, "repository": host.repository, **values}
        with (
            arguments({"_ansible_remote_tmp": "/tmp", "_ansible_diff": True, "_ansible_check_mode": check, **values}),
            pytest.raises(SystemExit),
        ):
            composefs_mount.main()
        result: dict[str, Any] = json.loads(capsys.readouterr().out)
        require_shape(result, SHAPE)
        return result

    return task


def test_an_image_is_mounted_once(host: Host, run: Any) -> None:
    one = host.images[0]
    for check in (True, False):
        result = run(check, image=one)
        assert {key: result[key] for key in SHAPE} == {
            "changed": True,
            "image_id": one,
            "previous_image_id": None,
            "path": host.path,
            "repository": host.repository,
            "mounted": True,
            "verity": False,
            "unit": None,
            "name": None,
            "digest": None,
            "keeps": [f"images/refs/composefs-oci/{journal.stem(host.path)}/{one}"],
        }
        assert result["diff"]["before"]["mounted"] is None and result["diff"]["after"]["mounted"]["image_id"] == one
        assert bool(host.there) != check
    assert not {"state", "mode", "owner", "size"} & set(result), "nothing of the directory"
    again = run(image=one)
    assert not again["changed"] and again["previous_image_id"] == one == again["image_id"]
    assert again["diff"]["before"] == again["diff"]["after"]


def test_remounted_replaces_what_mounted_refuses(host: Host, run: Any) -> None:
    one, two = host.images
    run(image=one)
    refused = run(image=two)
    assert refused["failed"] and refused["error"] == "busy" and one in refused["msg"]
    assert (refused["changed"], refused["mounted"], refused["image_id"]) == (False, True, one)
    for check in (True, False):
        result = run(check, image=two, state="remounted")
        assert (result["changed"], result["previous_image_id"], result["image_id"]) == (True, one, two)
    assert not run(image=two, state="remounted")["changed"]


def test_a_mount_without_fs_verity_is_warned_about_once(host: Host, run: Any) -> None:
    for _time in range(2):
        run(image=host.images[0])
    run(state="unmounted")
    assert len(host.warnings) == 1 and "fs-verity" in host.warnings[0] and host.path in host.warnings[0]


@pytest.mark.slow
@pytest.mark.parametrize("check", [True, False])
def test_persistent_without_fs_verity_has_to_be_asked_for_in_words(host: Host, run: Any, check: bool) -> None:
    result = run(check, image=host.images[0], persistent=True)
    assert result["error"] == "verity_unsupported" and "verity: disabled" in result["msg"]
    assert host.there == {} and host.unit() is None
    for words in ("disabled", "preferred"):
        assert run(check, image=host.images[0], persistent=True, verity=words)["unit"]


def test_device_nodes_and_setuid_take_effect_only_where_asked_for(host: Host, run: Any) -> None:
    for values, options in (
        ({}, {"nodev", "nosuid"}),
        ({"dev": True}, {"nosuid"}),
        ({"dev": True, "suid": True}, set()),
    ):
        run(image=host.images[0], **values)
        assert host.there[host.path].options & {"nodev", "nosuid"} == options
        run(state="unmounted")


def test_an_option_that_is_null_is_not_written(host: Host, run: Any) -> None:
    assert run(image=host.images[0], opts=None, state=None, bootable=None, dev=None, keep_previous=None)["changed"]


def test_unmounting_needs_neither_image_nor_repository(host: Host, run: Any, tmp_path: Path) -> None:
    run(image=host.images[0])
    for check in (True, False):
        result = run(check, state="unmounted", repository=str(tmp_path / "nowhere"))
        assert (result["changed"], result["mounted"], result["image_id"], result["previous_image_id"]) == (
            True,
            False,
            None,
            host.images[0],
        )
        assert result["verity"] is None
    assert not run(state="unmounted")["changed"]
    assert os.path.isdir(host.path)


@pytest.mark.slow
def test_a_persistent_mount_has_a_unit_that_stays_unless_it_is_asked_away(host: Host, run: Any) -> None:
    one, two = host.images
    name = bootmount.unit_name(host.path)
    predicted = run(True, image=one, persistent=True, verity="disabled")
    assert predicted["unit"] == name and predicted["diff"]["after"]["unit"] and not os.path.exists(host.places.units)
    assert run(image=one, persistent=True, verity="disabled")["unit"] == name
    assert not run(image=one, persistent=True, verity="disabled")["changed"]
    text = host.unit()
    assert text and one not in text and f'"boot" "--library" "{host.places.library}" "--" "{host.path}"' in text
    # A task that says nothing of it leaves it, and moves what it brings back.
    result = run(image=two, state="remounted")
    assert result["changed"] and result["unit"] == name and host.unit() == text
    assert host.journal().current.image_id == two and host.journal().boot is None
    assert bootmount.persistent(host.places) == [bootmount.Persistent(name, host.path, host.repository, two)]
    assert not run(image=two)["changed"]
    result = run(True, image=two, persistent=False)
    assert result["changed"] and result["unit"] is None and host.unit()
    host.told.clear()
    assert run(image=two, persistent=False)["changed"] and host.unit() is None
    assert host.told == ["systemctl --no-ask-password daemon-reload"], "the mount stays"
    assert host.journal().boot is not None and os.path.exists(host.places.application)
    assert not run(image=two)["changed"]


def test_without_systemd_persistent_is_refused_before_mounting(
    host: Host, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.rmdir(host.places.running)
    really = os.path.exists
    monkeypatch.setattr(os.path, "exists", lambda path: not str(path).endswith("systemd/systemd") and really(path))
    for check in (True, False):
        result = run(check, image=host.images[0], persistent=True, verity="disabled")
        assert result["error"] == "mount_failed" and "systemd" in result["msg"] and host.there == {}
    assert sorted(os.listdir(f"{host.repository}/images")) == sorted(host.images), "nothing that would keep it"


@pytest.mark.parametrize("check", [True, False])
def test_an_unsafe_repository_is_never_mounted_from(host: Host, run: Any, check: bool) -> None:
    os.chmod(host.repository, 0o777)
    result = run(check, image=host.images[0])
    assert result["error"] == "unsafe_repository" and host.there == {}
    os.chmod(host.repository, 0o755)
    parent = os.path.dirname(host.repository)
    mode = os.stat(parent).st_mode & 0o777
    os.chmod(parent, 0o777)
    try:
        result = run(check, image=host.images[0], persistent=True, verity="disabled")
    finally:
        os.chmod(parent, mode)
    assert result["error"] == "unsafe_repository" and host.there == {} and host.unit() is None


def test_what_is_mounted_is_remembered_and_kept(host: Host, run: Any) -> None:
    one, two = host.images
    base = f"{host.repository}/images/refs/composefs-oci/{journal.stem(host.path)}"
    run(image=one)
    assert os.listdir(base) == [one] and os.readlink(f"{base}/{one}") == f"../../../{one}"
    first = host.journal()
    assert (first.name, first.current.digest, first.previous, first.pending) == (None, None, (), None)
    assert [event.result for event in first.history] == ["confirmed"] and "@" in first.history[0].who
    run(image=two, state="remounted")
    second = host.journal()
    assert sorted(os.listdir(base)) == sorted([one, two])
    assert (second.current.image_id, [image.image_id for image in second.previous]) == (two, [one])
    # Going back is a remount like any other.
    run(image=one, state="remounted")
    assert (host.journal().current.image_id, [image.image_id for image in host.journal().previous]) == (one, [two])
    assert run(image=one, keep_previous=0)["changed"] and os.listdir(base) == [one]
    assert not run(image=one, keep_previous=0)["changed"]
    run(state="unmounted")
    assert not os.path.exists(base) and not os.path.exists(host.places.library)


def on_trial(image: str, origin: str) -> journal.Pending:
    times = "2026-11-27T14:40:07Z", "2026-11-27T14:45:07Z"
    return journal.Pending(image, None, origin, "r-7", "anna@control", *times, journal.boot_id(), "t")


def test_a_mount_is_busy_while_an_image_is_on_trial(host: Host, run: Any) -> None:
    one, two = host.images
    run(image=one)
    found = host.journal()
    trial = on_trial(two, one)
    journal.write(dataclasses.replace(found, pending=trial), host.places)
    for values in ({"image": one}, {"image": two, "state": "remounted"}, {"state": "unmounted"}):
        for check in (True, False):
            result = run(check, **values)
            assert result["error"] == "busy"
            assert all(word in result["msg"] for word in ("r-7", "anna@control", "2026-11-27T14:45:07Z"))
    assert host.there[host.path].image_id == one


def test_a_journal_of_a_newer_version_is_left_alone(host: Host, run: Any) -> None:
    run(image=host.images[0])
    file = Path(journal.file_of(host.path, host.places))
    file.write_text(file.read_text().replace('"version": 1', '"version": 2'))
    before = file.read_bytes()
    for values in ({"image": host.images[1], "state": "remounted"}, {"state": "unmounted"}):
        result = run(**values)
        assert result["error"] == "incompatible_journal" and "version 2" in result["msg"]
    assert file.read_bytes() == before and host.there[host.path].image_id == host.images[0]


@pytest.mark.slow
def test_a_mount_of_version_0_1_0_is_taken_over_without_touching_it(host: Host, run: Any) -> None:
    one, _two = host.images
    run(image=one, persistent=True, verity="disabled")
    name = bootmount.unit_name(host.path)
    unit = Path(host.places.units, name)
    # As 0.1.0 left it: a unit that names the image, no journal, no link.
    unit.write_text(unit.read_text().replace('"boot" "--', f'"mount" "--image" "{one}" "--') + f"Image={one}\n")
    shutil.rmtree(host.places.journals)
    shutil.rmtree(f"{host.repository}/images/refs")
    assert bootmount.persistent(host.places)[0].image_id == one
    mounted = dict(host.there)
    assert run(image=one)["unit"] == name
    assert host.there == mounted and '"boot" "--' in unit.read_text() and host.journal().current.image_id == one
    assert os.path.exists(f"{host.repository}/images/refs/composefs-oci/{journal.stem(host.path)}/{one}")
    assert not run(image=one)["changed"]


def test_where_the_repository_cannot_be_written_the_mount_is_made_with_a_warning(
    host: Host, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_self: Repository) -> None:
        raise ReadOnly("It lies on a file system that is mounted read-only.")

    monkeypatch.setattr(Repository, "require_writable", refuse)
    result = run(image=host.images[0], verity="disabled")
    assert result["changed"] and result["keeps"] == [] and host.there[host.path].image_id == host.images[0]
    assert any("nothing keeps the mounted image" in warning for warning in host.warnings)
    assert not run(image=host.images[0])["changed"]


def test_unmounting_removes_the_unit_too(host: Host, run: Any) -> None:
    run(image=host.images[0], persistent=True, verity="disabled")
    host.there.clear()
    result = run(state="unmounted")
    assert result["changed"] and result["unit"] is None and host.unit() is None
    assert not run(state="unmounted")["changed"]


def test_what_is_in_the_way_is_named_as_people_know_it(host: Host, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = host.images
    run(image=one)
    known = journal.Journal(host.path, name="app", current=journal.Image(one, "sha256:" + "5c2e" * 16))
    monkeypatch.setattr(mounting.journal, "read", lambda path, *_places: known)
    refused = run(image=two, repository=host.repository)
    assert refused["error"] == "busy" and f"the image app (sha256:5c2e5c2e5c2e, id {one})" in refused["msg"]


def test_a_mount_that_fails_gets_no_unit(host: Host, run: Any) -> None:
    host.refuses = True
    result = run(image=host.images[0], persistent=True, verity="disabled")
    assert result["failed"] and result["error"] == "mount_failed" and not result["changed"] and host.there == {}
    assert host.unit() is None


def test_what_no_unit_can_hold_is_refused_before_mounting(host: Host, run: Any) -> None:
    result = run(image=host.images[0], persistent=True, verity="disabled", path=f"{host.path}\tx")
    assert result["failed"] and result["error"] == "mount_failed" and host.there == {}


@pytest.mark.parametrize(
    ("values", "error"),
    [
        ({"image": "missing"}, "image_not_found"),
        ({"image": "missing", "opts": ["bogus"]}, "invalid_mount_option"),
    ],
)
def test_failures_have_a_code(host: Host, run: Any, values: dict[str, Any], error: str) -> None:
    for check in (True, False):
        result = run(check, **values)
        assert result["failed"] and result["error"] == error and not result["changed"] and host.there == {}
        assert not {"image_id", "previous_image_id", "unit", "keeps"} & set(result), "facts only"


def test_without_a_repository_a_run_fails_and_check_mode_takes_it_for_foretold(host: Host, run: Any) -> None:
    values = {"image": "app", "repository": "/nowhere/at/all"}
    assert run(**values)["error"] == "not_a_repository"
    told = run(True, **values, persistent=True)
    assert (told["changed"], told["mounted"], told["name"]) == (True, True, "app")
    assert [told[key] for key in ("image_id", "digest", "verity", "keeps")] == [None] * 4
    assert told["unit"] == bootmount.unit_name(host.path) and any("no repository" in text for text in host.warnings)
    assert run(True, **values, opts=["bogus"])["error"] == "invalid_mount_option"
    assert host.there == {} and not os.path.exists("/nowhere")


def test_check_mode_refuses_what_no_image_can_be_mounted_with(
    host: Host, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The image will only be there when an earlier task has pulled it, but what is wrong with the rest is known."""
    monkeypatch.setenv(
        "COMPOSEFS_OCI_FORETOLD",
        json.dumps(
            [
                {
                    "repository": host.repository,
                    "name": "later",
                    "digest": "sha256:" + "5" * 64,
                    "absent": False,
                    "streams": [],
                }
            ]
        ),
    )
    assert run(True, image="later")["changed"]
    open_to_all = tmp_path / "theirs"
    open_to_all.mkdir()
    open_to_all.chmod(0o777)
    writable = {"upperdir": str(open_to_all / "upper"), "workdir": str(open_to_all / "work")}
    assert run(True, image="later", **writable)["error"] == "unsafe_repository"
    assert run(True, image="later", path=f"{host.repository}/objects")["error"] == "mount_failed"
    (tmp_path / "file").touch()
    assert run(True, image="later", path=str(tmp_path / "file"))["error"] == "mount_failed"
    assert run(True, image="later", persistent=True)["error"] == "verity_unsupported"
    run(image=host.images[0])
    trial = on_trial(host.images[1], host.images[0])
    journal.write(dataclasses.replace(host.journal(), pending=trial), host.places)
    assert run(True, image="later", state="remounted")["error"] == "busy"


def test_check_mode_tells_what_earlier_tasks_would_have_mounted(
    host: Host, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(image=host.images[0])
    told = {"path": host.path, "repository": host.repository, "name": "app", "digest": None, "keep_previous": 1}
    for image, absent in ((host.images[1], False), (None, False), (None, True)):
        found = {**told, "image_id": image, "absent": absent, "state": None}
        monkeypatch.setenv("COMPOSEFS_OCI_FORETOLD", json.dumps([found]))
        assert run(True, state="unmounted")["previous_image_id"] == image


def test_a_name_that_may_stay_as_it_is_does_not_make_check_mode_fail(
    host: Host, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there is no skopeo yet, a pull cannot tell whether it would move the name of an image that is mounted."""
    with Repository.open(host.repository, write=True) as repository:
        digest, other = (put(repository, image) for image in host.images)
        repository.tag("app", digest)
        repository.tag("other", other)
    assert run(image="app")["changed"]
    told = {"repository": host.repository, "name": "app", "digest": None, "absent": False, "streams": None}
    monkeypatch.setenv("COMPOSEFS_OCI_FORETOLD", json.dumps([told]))
    host.warnings.clear()
    found = run(True, image="app")
    assert (found["changed"], found["digest"]) == (False, digest)
    assert len(host.warnings) == 1 and "whether app would be another image" in host.warnings[0]
    found = run(True, image="app", state="remounted")
    assert found["changed"] and found["image_id"] is None and found["digest"] is None
    # What is surely another image is refused as ever, and so is one that is not there yet.
    for name in ("other", "new"):
        monkeypatch.setenv("COMPOSEFS_OCI_FORETOLD", json.dumps([{**told, "name": name}]))
        assert run(True, image=name)["error"] == "busy"


def test_verity_that_is_required_is_an_error_without_it(host: Host, run: Any) -> None:
    assert run(image=host.images[0], verity="required")["error"] == "incompatible_repository"


@pytest.mark.parametrize(
    "values", [{}, {"state": "remounted"}, {"image": "x", "upperdir": "/u"}, {"image": "x", "state": "absent"}]
)
def test_options_that_lack_their_partners_are_refused(host: Host, run: Any, values: dict[str, Any]) -> None:
    assert run(**values)["failed"] and host.there == {}


def test_the_documentation_has_the_options_and_return_values_of_the_code() -> None:
    options = yaml.safe_load(composefs_mount.DOCUMENTATION)["options"]
    keys = ("type", "default", "choices", "elements", "required")
    spec = {name: {key: option[key] for key in keys if key in option} for name, option in options.items()}
    assert spec == {name: option for name, option in composefs_mount.ARGUMENT_SPEC.items() if name != "repository"}
    assert set(yaml.safe_load(composefs_mount.RETURN)) | {"changed"} == SHAPE | {"error"}


def test_nothing_is_mounted_from_a_repository_that_others_can_change(host: Host, run: Any) -> None:
    os.chmod(host.repository, 0o777)
    result = run(image=host.images[0])
    assert result["failed"] and result["error"] == "unsafe_repository" and not host.there
    assert "unsafe_repository" not in composefs_mount.ARGUMENT_SPEC


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a link away")
def test_a_mount_point_behind_a_link_of_somebody_else_is_refused(host: Host, run: Any, tmp_path: Path) -> None:
    """Its owner would choose the directory that root mounts over."""
    victim = tmp_path / "victim"
    victim.mkdir()
    os.symlink(victim, host.path)
    os.lchown(host.path, 12345, 12345)
    result = run(image=host.images[0])
    assert result["error"] == "unsafe_repository" and "link app belongs to" in result["msg"] and not host.there
    os.lchown(host.path, 0, 0)
    assert run(image=host.images[0])["changed"]


@pytest.mark.parametrize("path", ["", "app", "./app"])
def test_a_mount_point_is_never_below_where_the_task_happens_to_run(host: Host, run: Any, path: str) -> None:
    for places in ({"path": path}, {"upperdir": path, "workdir": "/work"}, {"upperdir": "/upper", "workdir": path}):
        result = run(image=host.images[0], **places)
        assert result["error"] == "invalid_option" and "no absolute path" in result["msg"] and not host.there


def test_check_mode_foretells_a_mount_before_there_is_a_library_to_read_images(
    host: Host, run: Any, monkeypatch: pytest.MonkeyPatch, hide_zstd: Any
) -> None:
    with Repository.open(host.repository, write=True) as repository:
        name, other = (f"app@{put(repository, image)}" for image in host.images)
    real = codecs._module
    hide_zstd()
    assert run(image=name)["error"] == "missing_library"
    for state in ("mounted", "remounted"):
        told = run(True, image=name, state=state)
        assert told["changed"] and told["mounted"] and told["name"] == "app"
        assert (told["image_id"], told["verity"], told["keeps"]) == (None, None, None)
    assert "zstd" in host.warnings[-1] and host.there == {}
    monkeypatch.setattr(codecs, "_module", real)
    assert run(image=name)["changed"]
    hide_zstd()
    one = host.images[0]
    told = run(True, image=name)
    assert (told["changed"], told["image_id"], told["keeps"]) == (False, one, None)
    told = run(True, image=other, state="remounted")
    assert (told["changed"], told["image_id"], told["previous_image_id"]) == (True, None, one)
    assert "zstd" in host.warnings[-1] and host.there[host.path].image_id == one
    # A task that only asks, in a run that is not in check mode: nobody is going to install anything.
    monkeypatch.setenv("COMPOSEFS_OCI_ASKS", "1")
    assert run(True, image=name)["error"] == "missing_library"
