# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The tests run in their order: the last ones reboot the guest and spoil its disk."""

from __future__ import annotations

import hashlib
import os
import random
import re
from typing import Any

import guests
import pytest
from composefs_testinfra import Repository
from scenarios import Run, created

testinfra_hosts = ["ansible://hosts"]

GUEST = "verity-trixie"
REPOSITORIES = {"ext4": "sha512", "btrfs": "sha256"} if os.environ.get("COMPOSEFS_OCI_LONG") else {"ext4": "sha512"}
KERNEL = created()["hosts"][GUEST]["kernel"]
OLD_KERNEL = tuple(int(part) for part in KERNEL.split(".")[:2]) < (6, 6)
mounts = pytest.mark.skipif(OLD_KERNEL, reason=f"Linux {KERNEL} has no overlay that insists on fs-verity")


@pytest.fixture(params=REPOSITORIES)
def disk(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def bulk() -> list[bytes]:
    """The files data/201/0 and so on of the image, as they were made (tests/hosts/images.py)."""
    chance = random.Random(201)
    return [chance.randbytes(60_000) for _number in range(4)]


def object_of(host: Any, repository: str, content: bytes) -> str:
    """The path of the object that has just this content."""
    listing = host.run(f"find {repository}/objects -type f -size {len(content)}c -exec sha256sum {{}} +").stdout
    (path,) = [
        line.split()[1] for line in listing.splitlines() if line.split()[0] == hashlib.sha256(content).hexdigest()
    ]
    return str(path)


def test_every_object_is_measured_by_the_kernel(host: Any, disk: str, lab: dict[str, Any]) -> None:
    repository = Repository(host, f"/srv/{disk}/images")
    assert repository.damage() == []
    assert repository.exists and repository.protected and repository.algorithm == REPOSITORIES[disk]
    image = repository.image("small")
    assert image.digest == lab["images"]["small"]["digest"] and image.objects > 25


def test_the_tools_of_fs_verity_agree(host: Any, disk: str) -> None:
    algorithm = REPOSITORIES[disk]
    listing = host.run(
        f"cd /srv/{disk}/images && find objects -type f | head -5 | xargs fsverity measure"
    ).stdout.splitlines()
    assert len(listing) == 5
    for line in listing:
        measured, path = line.split()
        assert measured == f"{algorithm}:{path.replace('objects', '').replace('/', '')}"


@mounts
def test_the_image_is_mounted_and_the_kernel_insists_on_fs_verity(host: Any, disk: str) -> None:
    repository = Repository(host, f"/srv/{disk}/images")
    assert repository.mounted(f"/srv/from-{disk}") == repository.image("small").image_id
    assert "verity=require" in host.run(f"findmnt -n -o OPTIONS /srv/from-{disk}").stdout
    sums = host.run(f"cd /srv/from-{disk}/data/201 && sha256sum 0 1 2 3").stdout.split()[::2]
    assert sums == [hashlib.sha256(content).hexdigest() for content in bulk()]


if OLD_KERNEL:

    def test_without_fs_verity_an_old_kernel_mounts(host: Any) -> None:
        repository = Repository(host, "/srv/plain/open")
        assert repository.mounted("/srv/from-open") == repository.image("small").image_id
        assert host.run("ls /srv/from-open").stdout.split() == ["data", "etc", "run", "usr"], (
            "the directories of the objects do not show"
        )
        sums = host.run("cd /srv/from-open/data/201 && sha256sum 0 1 2 3").stdout.split()[::2]
        assert sums == [hashlib.sha256(content).hexdigest() for content in bulk()]

    def test_where_the_kernel_is_too_old_the_mount_says_so(host: Any, disk: str, name: str, played: list[Run]) -> None:
        result = played[0].of(name, f"Mount from {disk}")
        assert result["error"] == "mount_failed" and "6.6" in result["msg"] and "verity" in result["msg"]
        # Nothing of the attempt is left: no mount, no helper mount, no unit that would try again at every boot, no loop
        # device.
        assert Repository(host, f"/srv/{disk}/images").mounted(f"/srv/from-{disk}") is None
        assert (
            host.run(
                f"losetup -a | grep /srv/{disk}; find /etc/systemd/system -name '*from*'; ls -d /run/composefs-*"
            ).stdout
            == ""
        )


def test_objects_cannot_be_written(host: Any, disk: str) -> None:
    path = object_of(host, f"/srv/{disk}/images", bulk()[0])
    assert host.run(f"echo x >> {path}").rc != 0


def test_a_file_system_without_fs_verity_is_refused_at_preparation(host: Any, name: str, played: list[Run]) -> None:
    result = played[0].of(name, "Make a protected repository where there is no fs-verity")
    assert result["error"] == "verity_unsupported" and "fs-verity" in result["msg"]
    assert not host.file("/srv/plain/images").exists


def test_a_second_run_changes_nothing(name: str, played: list[Run]) -> None:
    assert [result["changed"] for _task, result in played[1].modules(name)] == [False] * 3 * (
        len(REPOSITORIES) + OLD_KERNEL
    )


@mounts
def test_the_persistent_mount_comes_back_after_a_reboot(host: Any) -> None:
    image_id = Repository(host, "/srv/ext4/images").image("small").image_id
    guests.shut_down(GUEST)
    guests.boot(GUEST)
    assert Repository(host, "/srv/ext4/images").mounted("/srv/from-ext4") == image_id
    if "btrfs" in REPOSITORIES:
        # That one was not to be persistent.
        assert Repository(host, "/srv/btrfs/images").mounted("/srv/from-btrfs") is None
    assert host.run("systemctl --failed --no-legend").stdout == ""
    assert host.run("sha256sum /srv/from-ext4/data/201/0").stdout.split()[0] == hashlib.sha256(bulk()[0]).hexdigest()


def test_a_byte_changed_on_the_raw_disk_is_refused_on_read(host: Any) -> None:
    repository = Repository(host, "/srv/ext4/images")
    assert repository.damage() == []
    # From the object to its second block on the disk.
    path = object_of(host, "/srv/ext4/images", bulk()[2])
    extents = host.run(f"filefrag -v -b4096 {path}").stdout
    block = int(re.search(r"^\s*0:\s+0\.\.\s*\d+:\s+(\d+)\.\.", extents, re.MULTILINE).group(1)) + 1  # type: ignore[union-attr]
    spoil = f"""python3 -c '
import os
disk = os.open("/dev/vdb", os.O_RDWR)
byte = os.pread(disk, 1, {block} * 4096 + 17)
os.pwrite(disk, bytes([byte[0] ^ 1]), {block} * 4096 + 17)
os.fsync(disk)'"""
    assert host.run(spoil).rc == 0
    host.run("sync; echo 3 > /proc/sys/vm/drop_caches")
    for file in [path] if OLD_KERNEL else [path, "/srv/from-ext4/data/201/2"]:
        read = host.run(f"cat {file} >/dev/null")
        assert read.rc != 0 and "Input/output error" in read.stderr
    # The other files of the image can be read, and the damage has a name.
    assert object_of(host, "/srv/ext4/images", bulk()[3])
    if not OLD_KERNEL:
        assert (
            host.run("sha256sum /srv/from-ext4/data/201/3").stdout.split()[0] == hashlib.sha256(bulk()[3]).hexdigest()
        )
    assert repository.fresh().damage() == [f"{path[len('/srv/ext4/images/') :]}: Input/output error"]
