# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The operator's flow. The tests build on each other, in the order of this file."""

from __future__ import annotations

import os
import pathlib
import shutil
from typing import Any

import namespace
import pytest
from composefs_testinfra import Repository
from scenarios import REPOSITORY, Run, created, differences, ephemeral, host_of, play, recorded, said

HOSTS = tuple(host["instance"] for host in created()["instances"])
CONVERGE = pathlib.Path(__file__).parents[1] / "converge.yml"
UNIT = "composefs-oci-srv-app.service"
CFSCTL = shutil.which("cfsctl")


def foretold_and_done(**variables: Any) -> Run:
    """Run the playbook in check mode and for good, and see that both tell the same; the second run."""
    foretold = play(CONVERGE, "--check", **variables)
    done = play(CONVERGE, **variables)
    assert differences(foretold, done) == []
    return done


def version(host: Any) -> str:
    """What is mounted, as the program that uses it sees it."""
    return str(host.run("cat /srv/app/opt/app/version").stdout.strip())


def collect(host: Any) -> None:
    """Have the repository collected by cfsctl, if this machine has it."""
    if CFSCTL is None:
        return
    path = ephemeral() / "cfsctl"
    if not path.exists():
        shutil.copy2(CFSCTL, path)
    done = said(
        [
            *("ansible", "--inventory", os.environ["MOLECULE_INVENTORY_FILE"], host.backend.host),
            *("-m", "ansible.builtin.copy", "-a", f"src={path} dest=/usr/local/bin/cfsctl mode=0755"),
        ]
    )
    assert done.returncode == 0, done.stdout
    done = host.run(f"cfsctl --repo {REPOSITORY} gc")
    assert done.rc == 0 and "Objects:" in done.stdout, done.stderr


each_host = pytest.mark.parametrize("name", HOSTS)


def test_the_first_version_is_mounted_and_services_know(lab: dict[str, Any]) -> None:
    for name in HOSTS:
        host = host_of(name)
        assert version(host) == "1" and host.file("/srv/restarts").content_string == "first\n"
        assert host.run(f"test -e /etc/systemd/system/{UNIT}").rc == 0
        pin = f"app@{lab['images']['app-1']['digest']}"
        assert set(Repository(host, REPOSITORY).tags) == {"app", pin}


@pytest.fixture(scope="module")
def fetched() -> None:
    """The next version is there, and not mounted."""
    digest = recorded()[1].of(HOSTS[0], "Pull")["digest"]
    done = foretold_and_done(operator_version="app-2", operator_image=digest, operator_step="fetched")
    for name in HOSTS:
        assert done.of(name, "Pull")["changed"] and not done.of(name, "Mount")["changed"]


@each_host
def test_what_is_mounted_outlives_the_next_pull_and_cfsctl_gc(fetched: None, name: str, lab: dict[str, Any]) -> None:
    host = host_of(name)
    opened = "exec 3< /srv/app/opt/app/program; "
    collected = f"cfsctl --repo {REPOSITORY} gc >/dev/null && " if CFSCTL else ""
    collect(host)
    assert host.run(f"sh -c '{opened}{collected}cat <&3 | wc -c'").stdout.strip() == "150000"
    assert version(host) == "1"
    repository = Repository(host, REPOSITORY)
    assert repository.image("app").digest == lab["images"]["app-2"]["digest"]
    assert repository.image(f"app@{lab['images']['app-1']['digest']}").damaged == []


@each_host
def test_the_unit_mounts_it_again_after_a_reboot(fetched: None, name: str) -> None:
    namespace.end(name)
    namespace.again(name)
    host = host_of(name)
    assert version(host) == ""
    start_unit(host)
    assert version(host) == "1"


def start_unit(host: Any) -> None:
    """Run what systemd would run at boot."""
    text = host.file(f"/etc/systemd/system/{UNIT}").content_string
    command = next(line.partition("=")[2] for line in text.splitlines() if line.startswith("ExecStart="))
    done = host.run(command)
    assert done.rc == 0, done.stderr


@pytest.fixture(scope="module")
def updated(fetched: None) -> Run:
    """The next version is mounted."""
    return foretold_and_done(operator_version="app-2", operator_step="second")


@each_host
def test_the_next_version_takes_its_place_as_foretold(updated: Run, name: str) -> None:
    host = host_of(name)
    assert updated.of(name, "Mount")["changed"] and version(host) == "2"
    assert host.file("/srv/restarts").content_string == "first\nsecond\n"
    namespace.end(name)
    namespace.again(name)
    start_unit(host)
    assert version(host) == "2"


def test_a_further_run_changes_nothing(updated: Run) -> None:
    done = foretold_and_done(operator_version="app-2", operator_step="third")
    assert [entry["task"] for entry in done.entries if entry["result"].get("changed")] == []


@pytest.fixture(scope="module")
def gone_back(updated: Run, lab: dict[str, Any]) -> Run:
    """The version before is mounted again, without the network."""
    for name in HOSTS:
        collect(host_of(name))
    return foretold_and_done(
        operator_version="app-2", operator_image=lab["images"]["app-1"]["digest"], operator_step="back"
    )


@each_host
def test_there_is_a_way_back_after_another_collection(gone_back: Run, name: str) -> None:
    host = host_of(name)
    assert gone_back.of(name, "Mount")["changed"] and version(host) == "1"
    assert host.file("/srv/restarts").content_string == "first\nsecond\nback\n"


@pytest.fixture(scope="module")
def ended(gone_back: Run) -> Run:
    """Nothing is mounted any more, and what nobody needs is gone."""
    return foretold_and_done(operator_version="app-2", operator_image="", operator_step="end")


@each_host
def test_what_is_unmounted_leaves_nothing_behind(ended: Run, name: str, lab: dict[str, Any]) -> None:
    host = host_of(name)
    repository = Repository(host, REPOSITORY)
    assert repository.mounted("/srv/app") is None
    assert ended.of(name, "Prune")["images"] and ended.of(name, "Prune")["bytes"] > 0
    assert set(repository.tags) == {"app"} and repository.damage() == []
    found = host.run("find /etc/systemd/system /var/lib/composefs-oci /srv/images/images/refs -name '*srv-app*'")
    assert found.stdout == ""
    collect(host)
    assert repository.fresh().image("app").digest == lab["images"]["app-2"]["digest"]


@pytest.mark.skipif(CFSCTL is None, reason="cfsctl is not on the PATH; nothing was collected in between")
def test_cfsctl_finds_nothing_wrong(ended: Run) -> None:
    for name in HOSTS:
        done = host_of(name).run(f"cfsctl --repo {REPOSITORY} oci fsck")
        assert done.rc == 0, done.stdout + done.stderr
