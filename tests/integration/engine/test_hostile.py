# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Real pulls by root where somebody else has a hand in the repository, or where the file system itself goes down."""

from __future__ import annotations

import fcntl
import os
import pathlib
import shutil
import signal
import struct
import subprocess
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from ociimage import Layout, sha256
from pulling import Recorder, layer_tar, options, pull_one
from tarbytes import small_tree

from ansible_collections.composefs.oci.plugins.module_utils.errors import UnsafeRepository
from ansible_collections.composefs.oci.plugins.module_utils.formats import fsverity
from ansible_collections.composefs.oci.plugins.module_utils.host import beneath, filesystem
from ansible_collections.composefs.oci.plugins.module_utils.operations import listing
from ansible_collections.composefs.oci.plugins.module_utils.progress import Progress
from ansible_collections.composefs.oci.plugins.module_utils.pull import publish, pull
from ansible_collections.composefs.oci.plugins.module_utils.store import create, imagestreams
from ansible_collections.composefs.oci.plugins.module_utils.store.repository import Repository

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs other users and file systems of its own")

ATTACKER = 12345
LAYERS = [small_tree(files=30, seed=31), small_tree(files=12, seed=32, prefix="usr/share/more")]


@pytest.fixture(scope="session")
def layout(disk: pathlib.Path) -> Layout:
    made = Layout(disk / "hostile")
    made.image(LAYERS, "app")
    return made


def reference(layout: Layout) -> str:
    return f"oci:{layout.path}:app"


def pull_into(path: pathlib.Path, layout: Layout, unsafe: str) -> list[str]:
    """Pull as a task of root does; the warnings."""
    with Repository.open(str(path), unsafe=unsafe) as repository:
        request = pull.Request(reference(layout), "app")
        outcomes = pull.pull_images(repository, [request], options(), Progress(Recorder()))
        return [warning for outcome in outcomes for warning in outcome.plan.warnings]


def as_user(uid: int, work: Callable[[], Any]) -> str:
    """Call ``work`` as another user: ``fine`` or a traceback."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.setgroups([])
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
            work()
            os.write(writer, b"fine")
        except BaseException:
            os.write(writer, traceback.format_exc().encode())
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader, encoding="utf-8") as answer:
        said = answer.read()
    os.waitpid(pid, 0)
    return said


@pytest.mark.parametrize(
    "directory",
    [".composefs-oci", ".composefs-oci/imports", "objects", "objects/00", "streams", "streams/refs", "images"],
)
def test_a_pull_by_root_writes_and_removes_nothing_where_planted_links_lead(
    repository_path: pathlib.Path, place: pathlib.Path, layout: Layout, directory: str
) -> None:
    """The experiment of the audit: before, every file in the victim's directory was gone after the pull."""
    victim = place / "victim"
    victim.mkdir()
    for name in ("precious", "0123456789abcdef"):
        (victim / name).write_text("precious")
    (repository_path / directory).parent.mkdir(parents=True, exist_ok=True)
    if directory == "objects/00":
        for number in range(256):
            (repository_path / f"objects/{number:02x}").symlink_to(victim)
    else:
        (repository_path / directory).symlink_to(victim)
    for one in (repository_path, *repository_path.rglob("*")):
        os.lchown(one, ATTACKER, ATTACKER)
    for unsafe in (beneath.REFUSE, beneath.ACCEPT):
        with pytest.raises(UnsafeRepository):
            pull_into(repository_path, layout, unsafe)
        assert {path.name: path.read_text() for path in victim.iterdir()} == dict.fromkeys(
            ("precious", "0123456789abcdef"), "precious"
        )


def test_root_pulls_into_a_repository_of_somebody_else_only_where_that_is_accepted(
    repository_path: pathlib.Path, layout: Layout
) -> None:
    os.chown(repository_path, ATTACKER, ATTACKER)
    with pytest.raises(UnsafeRepository, match="belongs to user 12345"):
        pull_into(repository_path, layout, beneath.REFUSE)
    pull_into(repository_path, layout, beneath.ACCEPT)
    with Repository.open(str(repository_path), unsafe=beneath.ACCEPT) as repository:
        assert "app" in repository.tags()


def test_what_root_pulled_is_readable_as_the_mode_of_the_repository_says_under_any_umask(
    place: pathlib.Path, layout: Layout
) -> None:
    path = place / "shared"
    old = os.umask(0o077)
    try:
        create.prepare(str(path), fsverity.SHA256, create.DISABLED)
        os.chmod(path, 0o755)
        pull_one(path, reference(layout), "app")
    finally:
        os.umask(old)
    for above in path.parents:
        if above != above.parent and not above.stat().st_mode & 0o001:
            above.chmod(above.stat().st_mode | 0o001)

    def read() -> None:
        with Repository.open(str(path)) as repository:
            images, complaints = listing.list_images(repository)
            assert [image["names"] for image in images] == [["app"]] and complaints == []
            assert all(digest and repository.objects.verify(digest) for _name, digest in repository.objects.names())

    assert as_user(ATTACKER, read) == "fine"


def test_an_image_that_cfsctl_makes_meanwhile_stays(
    repository_path: pathlib.Path, layout: Layout, cfsctl: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """cfsctl pulls between our plan and our publishing; its EROFS image must outlive its own collector."""
    real = publish.publish

    def late(*arguments: Any, **how: Any) -> Any:
        monkeypatch.setattr(publish, "publish", real)
        cfsctl("--repo", repository_path, "oci", "pull", reference(layout), "theirs")
        return real(*arguments, **how)

    monkeypatch.setattr(publish, "publish", late)
    pull_one(repository_path, reference(layout), "ours", options(erofs=False))
    cfsctl("--repo", repository_path, "gc")
    with Repository.open(str(repository_path)) as repository:
        (image, *_others), complaints = listing.list_images(repository)
        assert complaints == [] and sorted(image["names"]) == ["ours", "theirs"]
        digest = bytes.fromhex(image["image_id"])
        assert repository.image(digest) and repository.objects.verify(digest)
    cfsctl("--repo", repository_path, "oci", "fsck")


# ---- a file system that goes down ------------------------------------------------------------------------------------


@pytest.fixture
def crashing(place: pathlib.Path) -> Iterator[tuple[pathlib.Path, Callable[[], None]]]:
    """An ext4, and what makes it lose all that is not on the disk and come back, without a reboot."""
    if not shutil.which("mkfs.ext4"):
        pytest.skip("mkfs.ext4 is not installed (Debian package e2fsprogs)")
    image, point = place / "disk", place / "point"
    point.mkdir()
    with image.open("wb") as file:
        file.truncate(64 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-F", str(image)], check=True)
    mount = ["mount", "-o", "loop,commit=300"]
    subprocess.run([*mount, str(image), str(point)], check=True)

    def crash() -> None:
        fd = os.open(point, os.O_RDONLY)
        try:
            fcntl.ioctl(fd, 0x8004587D, struct.pack("I", 2))  # EXT4_IOC_SHUTDOWN, without writing the journal
        finally:
            os.close(fd)
        subprocess.run(["umount", str(point)], check=True)
        # A mount namespace that somebody made meanwhile keeps the old one alive, and another mount of the same file would
        # be that one again. Nothing is written to it any more, so a copy is what the disk has.
        shutil.copyfile(image, f"{image}-after")
        subprocess.run([*mount, f"{image}-after", str(point)], check=True)

    yield point, crash
    subprocess.run(["umount", str(point)], check=True)


def test_a_file_system_that_comes_back_without_a_reboot_keeps_no_torn_objects(
    crashing: tuple[pathlib.Path, Callable[[], None]], layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    point, crash = crashing
    path = point / "repository"
    create.prepare(str(path), fsverity.SHA256, create.DISABLED)
    pid = os.fork()
    if pid == 0:
        # A pull that is killed after its objects have names and before the barrier.
        monkeypatch.setattr(imagestreams, "name_layer", lambda *_arguments: os.kill(os.getpid(), signal.SIGKILL))
        monkeypatch.setattr(filesystem, "sync", lambda _fd: None)
        with Repository.open(str(path), write=True) as repository, repository.importing():
            for number in range(500):
                repository.objects.put(b"%08d" % number * 1000)
            # Names come to the disk before contents do.
            for first in os.listdir(path / "objects"):
                fd = os.open(path / "objects" / first, os.O_RDONLY)
                os.fsync(fd)
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    crash()
    pull_one(path, reference(layout), "app")
    with Repository.open(str(path)) as repository:
        wrong = [
            name for name, digest in repository.objects.names() if not digest or not repository.objects.verify(digest)
        ]
    assert wrong == []
    assert os.listdir(path / ".composefs-oci/imports") == []
    assert layer_tar(path, sha256(LAYERS[0])) == LAYERS[0]
