# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What is mounted stays alive: real images, the real kernel, and the collector of cfsctl in between."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pathlib
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from ansible_collections.composefs.oci.plugins.module_utils.errors import EngineError, ImageNotFound
from ansible_collections.composefs.oci.plugins.module_utils.host import mountcalls, mountinfo
from ansible_collections.composefs.oci.plugins.module_utils.operations import (
    journal,
    mounting,
)
from ansible_collections.composefs.oci.plugins.module_utils.store.repository import Repository
from deploying import App, content


def test_what_is_mounted_outlives_a_pull_under_its_name_and_a_collection(app: App, cfsctl: Callable[..., str]) -> None:
    second = app.pull("v2")
    result = app.mount()
    assert result.keeps[0] == f"app@{second}" and result.keeps[1].startswith("images/refs/composefs-oci/")
    third = app.pull("v3")
    with open(app.point / "usr/data", "rb") as file:
        assert "Objects: " in cfsctl("--repo", app.repository, "gc")
        assert app.data() == content("v2") == file.read()
    assert app.tags() == {"app", f"app@{second}"}
    # The next version takes its place, and the old one stays for going back, through another collection.
    assert app.mount().changed and app.data() == content("v3")
    cfsctl("--repo", app.repository, "gc")
    assert app.mount(f"app@{second}").changed and app.data() == content("v2")
    assert app.tags() == {"app", f"app@{second}", f"app@{third}"}
    cfsctl("--repo", app.repository, "oci", "fsck")
    # What nobody goes back to any more goes.
    assert app.mount(f"app@{second}", keep_previous=0).changed
    assert app.tags() == {"app", f"app@{second}"} and len(app.links()) == 1
    app.unmount()
    assert app.tags() == {"app"} and app.links() == set() and not os.path.exists(app.places.library)
    cfsctl("--repo", app.repository, "gc")
    with pytest.raises(ImageNotFound):
        app.mount(second)


def test_a_pull_by_cfsctl_takes_nothing_from_what_is_mounted(app: App, cfsctl: Callable[..., str]) -> None:
    """It may lead the configuration to an EROFS image of another format, so that the pin alone keeps another image."""
    app.pull("v2")
    app.mount()
    cfsctl("--repo", app.repository, "oci", "pull", f"oci:{app.layout.path}:v2", "app")
    cfsctl("--repo", app.repository, "gc")
    assert app.data() == content("v2") and not app.mount().changed


def test_an_image_id_without_a_manifest_is_kept_by_its_link(app: App, cfsctl: Callable[..., str]) -> None:
    app.pull("v2")
    with Repository.open(str(app.repository), write=True) as repository:
        image = mounting.resolve(repository, "app").hex()
        repository.untag("app")
    result = app.mount(image)
    assert len(result.keeps) == 1 and (app.journal().name, app.journal().current.digest) == (None, None)
    cfsctl("--repo", app.repository, "gc")
    assert app.data() == content("v2") and not app.mount(image).changed
    app.unmount()
    cfsctl("--repo", app.repository, "gc")
    assert not os.path.exists(app.repository / "images" / image)


def test_a_name_that_only_looks_like_a_pin_stays_the_operators(app: App) -> None:
    digest = app.pull("v2")
    with Repository.open(str(app.repository), write=True) as repository:
        repository.tag(f"docker://registry.example.com/app@{digest}", digest)
        repository.tag(f"app@{digest}", digest)
    for name in ("app", f"docker://registry.example.com/app@{digest}"):
        app.mount(name)
        assert f"app@{digest}" in app.mount(name).keeps[0]
    app.unmount()
    assert app.tags() == {"app", f"app@{digest}", f"docker://registry.example.com/app@{digest}"}


def test_two_mounts_of_one_image_share_its_pin_until_the_last_goes(app: App, place: pathlib.Path) -> None:
    digest = app.pull("v2")
    app.mount()
    first, app.point = app.point, place / "other"
    app.mount()
    app.unmount()
    assert app.tags() == {"app", f"app@{digest}"}
    app.mount()
    app.point = first
    app.unmount()
    assert app.tags() == {"app", f"app@{digest}"} and len(app.links()) == 1
    app.point = place / "other"
    app.unmount()
    assert app.tags() == {"app"}


def test_a_mount_of_cfsctl_becomes_ours_when_it_is_asked_for(app: App, cfsctl: Callable[..., str]) -> None:
    digest = app.pull("v2")
    app.point.mkdir(exist_ok=True)
    cfsctl("--repo", app.repository, "oci", "mount", "--fuse", "no", "app", app.point)
    before = mountinfo.at(str(app.point))
    assert app.mount(check=True).changed
    result = app.mount(replace=False)
    after = mountinfo.at(str(app.point))
    assert result.changed and before is not None and after is not None and after.mount_id == before.mount_id
    assert result.keeps[0] == f"app@{digest}" and app.journal().current.digest == digest
    assert not app.mount(check=True).changed and not app.mount(replace=False).changed


def test_a_mount_of_another_boot_is_forgotten_with_all_it_kept(app: App, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = app.pull("v2")
    app.mount()
    third = app.pull("v3")
    subprocess.run(["umount", str(app.point)], check=True)
    monkeypatch.setattr(journal, "boot_id", lambda: "another")
    assert app.mount(check=True).changed
    assert app.tags() == {"app", f"app@{digest}"}, "check mode settles nothing"
    app.mount()
    assert app.tags() == {"app", f"app@{third}"} and len(app.links()) == 1
    assert app.journal().previous == () and app.journal().boot == "another"


def test_a_name_that_goes_while_its_image_is_mounted_is_warned_about(
    app: App, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("ansible.module_utils.basic")
    from ansible.module_utils import basic
    from ansible_collections.composefs.oci.plugins.modules import composefs_image, composefs_image_info
    from ansible_collections.composefs.oci.tests.support.moduleargs import arguments

    app.pull("v2")
    app.mount()
    warnings: list[str] = []

    def run(module: Any, **values: Any) -> Any:
        with (
            pytest.MonkeyPatch.context() as patch,
            arguments({"_ansible_remote_tmp": "/tmp", "repository": str(app.repository), "name": "app", **values}),
            pytest.raises(SystemExit),
        ):
            patch.setattr(basic.AnsibleModule, "warn", lambda _module, text, **_options: warnings.append(text))
            module.main()
        return json.loads(capsys.readouterr().out)

    assert run(composefs_image_info)["images"][0]["mounted_at"] == [os.path.realpath(app.point)]
    for check in (True, False):
        assert run(composefs_image, state="absent", _ansible_check_mode=check)["changed"]
        assert os.path.realpath(app.point) in warnings.pop() and not warnings
    assert app.data() == content("v2")


class Refusing:
    """A kernel that refuses the call of a number that is asked of it; ``steps`` are those that it was asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps: list[str] = []
        self.refused = -1
        call = mountcalls._Kernel.call

        def asked(kernel: mountcalls._Kernel, step: str, *words: Any, **options: Any) -> int:
            self.steps.append(step)
            if len(self.steps) == self.refused + 1:
                raise mountcalls._KernelRefused(step, errno.ENOSPC, "")
            return call(kernel, step, *words, **options)

        monkeypatch.setattr(mountcalls._Kernel, "call", asked)

    @contextlib.contextmanager
    def refusing(self, number: int) -> Iterator[None]:
        self.steps, self.refused = [], number
        yield
        self.refused = -1


def refusals(kernel: Refusing, app: App, activates: bool) -> Iterator[str]:
    """Mount, with one call of the kernel refused after the other, until none is; the name of each that was."""
    for number in range(100):
        try:
            with kernel.refusing(number):
                app.activate(confirm_within=0) if activates else app.mount()
        except EngineError as error:
            assert len(kernel.steps) > number, f"nothing was refused, and still: {error}"
            yield kernel.steps[number]
        else:
            break
    assert number == len(kernel.steps) > 8


def left(app: App) -> tuple[Any, ...]:
    """All that a mount leaves anywhere: names in the repository, files of the host, directories, mounts."""
    files = {
        str(path): path.read_bytes() if path.is_file() else None
        for place in (app.places.library, app.places.units)
        for path in sorted(pathlib.Path(place).rglob("*"))
        # The program for the boot stays for the next mount.
        if path.parent.name == "mounts" and path.suffix != ".lock"
    }
    there = [mounted.source for mounted in mountinfo.mounts() if mounted.path == os.path.realpath(app.point)]
    return app.tags(), app.links(), files, app.point.exists(), app.point.parent.exists(), there


@pytest.mark.parametrize("activates", [False, True], ids=["mount", "activate"])
def test_a_mount_that_the_kernel_refuses_leaves_nothing_behind(
    app: App, monkeypatch: pytest.MonkeyPatch, activates: bool
) -> None:
    app.point = app.point.parent / "deep" / "er"
    digest = app.pull("v2")
    before = left(app)
    kernel = Refusing(monkeypatch)
    for step in refusals(kernel, app, activates):
        assert left(app) == before, f"after refusing {step}"
    assert kernel.steps[-1].startswith("attaching")
    assert app.data() == content("v2") and f"app@{digest}" in app.tags()


@pytest.mark.parametrize("activates", [False, True], ids=["mount", "activate"])
def test_a_mount_in_the_place_of_another_that_the_kernel_refuses_changes_nothing(
    app: App, monkeypatch: pytest.MonkeyPatch, activates: bool
) -> None:
    app.pull("v1")
    app.mount()
    app.pull("v2")
    before = left(app)
    for step in refusals(Refusing(monkeypatch), app, activates):
        after = left(app)
        if activates:
            # The history tells that it was tried.
            assert app.journal().pending is None and app.journal().history[-1].result == "failed"
            before, after = (*before[:2], *before[3:]), (*after[:2], *after[3:])
        assert after == before, f"after refusing {step}"
        before = left(app)
        assert app.data() == content("v1")
    assert app.data() == content("v2") and len(left(app)[-1]) == 1
