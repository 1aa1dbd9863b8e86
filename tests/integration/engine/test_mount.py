# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Pulled images in the real kernel: what is mounted is what was in the archives, and nothing of a mount is
left behind.
"""

from __future__ import annotations

import contextlib
import decimal
import errno
import io
import os
import pathlib
import stat
import subprocess
import time
import sys
import tarfile
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from ansible_collections.composefs.oci.plugins.module_utils.formats import fsverity
from ansible_collections.composefs.oci.plugins.module_utils.host import mountcalls, mountinfo
from ansible_collections.composefs.oci.plugins.module_utils.operations import bootmount, mounting
from ansible_collections.composefs.oci.plugins.module_utils.errors import (
    Busy,
    FormatError,
    ImageNotFound,
    IncompatibleRepository,
    MountFailed,
)
from ansible_collections.composefs.oci.plugins.module_utils.operations.mounting import Wish
from ansible_collections.composefs.oci.plugins.module_utils.store.repository import Repository
from conftest import needed
from ociimage import Layout
from pulling import pull_one
from tarbytes import CHARDEV, DIRECTORY, member, small_tree, tar

FIRST, SECOND = small_tree(seed=1), small_tree(seed=2, files=5, prefix="usr/share/more")
ODD = tar(
    member("usr/", type=DIRECTORY, mode=0o750, uid=7, gid=8),
    member("usr/setuid", b"#!" * 100, mode=0o4755, uid=1, gid=2),
    member("usr/sticky/", type=DIRECTORY, mode=0o1777, gid=50),
    member("usr/zero", type=CHARDEV, device=(1, 5), mode=0o666),
    member("usr/old", b"before 1970", mtime=-86400),
    member("usr/marker", b"odd"),
)


@pytest.fixture(scope="session")
def layout(disk: pathlib.Path) -> Layout:
    """Two images that differ: ``one`` of two layers, ``two`` of one."""
    made = Layout(disk / "mountable")
    made.image([FIRST, SECOND], "one")
    made.image([ODD], "two")
    return made


@pytest.fixture
def pulled(layout: Layout, repository_path: pathlib.Path, skopeo: str) -> pathlib.Path:
    """A repository with both images, named like their tags."""
    for name in ("one", "two"):
        pull_one(repository_path, f"oci:{layout.path}:{name}", name)
    return repository_path


def clean(below: pathlib.Path) -> None:
    left = [mounted for mounted in mountinfo.mounts() if mounted.path.startswith(f"{os.path.realpath(below)}/")]
    for mounted in reversed(left):
        subprocess.run(["umount", "--lazy", mounted.path], check=False)


@pytest.fixture
def point(place: pathlib.Path, pulled: pathlib.Path) -> Iterator[pathlib.Path]:
    """A place to mount at; skipped where this kernel or this user cannot."""
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    path = place / "mount point"
    try:
        trial = place / "trial"
        try:
            with Repository.open(str(pulled)) as repository:
                mounting.ensure_mounted(repository, Wish("one", str(trial)))
        except MountFailed as error:
            pytest.skip(f"this kernel cannot mount composefs images: {error}")
        mounting.ensure_unmounted(str(trial))
        yield path
    finally:
        clean(place)


@pytest.fixture
def mounted(pulled: pathlib.Path, point: pathlib.Path) -> Callable[..., mounting.Outcome]:
    """``mounted("one", replace=True, ...)`` mounts at ``point``."""

    def ensure(image: str, check: bool = False, **wish: Any) -> mounting.Outcome:
        with Repository.open(str(pulled)) as repository:
            return mounting.ensure_mounted(repository, Wish(image, str(point), **wish), check)

    return ensure


Ensure = Callable[..., mounting.Outcome]


def expected(*archives: bytes) -> dict[str, tuple[tarfile.TarInfo, bytes | None]]:
    """The members of the layers by path, upper ones instead of lower ones, each with its content."""
    found: dict[str, tuple[tarfile.TarInfo, bytes | None]] = {}
    for archive in archives:
        with tarfile.open(fileobj=io.BytesIO(archive)) as opened:
            for entry in opened:
                reader = opened.extractfile(entry) if entry.isreg() else None
                found[entry.name.rstrip("/")] = (entry, reader.read() if reader else None)
    return found


def compare(point: pathlib.Path, *archives: bytes) -> None:
    wanted = expected(*archives)
    seen = {str(path.relative_to(point)) for path in point.rglob("*")}
    assert seen == set(wanted)
    for name, (entry, content) in wanted.items():
        path = point / name
        if entry.islnk():
            assert os.path.samefile(
                path,
                point / entry.linkname,
            ), name
            assert path.stat().st_nlink == 2
            continue
        has = path.lstat()
        kinds = {
            tarfile.REGTYPE: stat.S_IFREG,
            tarfile.DIRTYPE: stat.S_IFDIR,
            tarfile.SYMTYPE: stat.S_IFLNK,
            tarfile.CHRTYPE: stat.S_IFCHR,
            tarfile.FIFOTYPE: stat.S_IFIFO,
        }
        assert stat.S_IFMT(has.st_mode) == kinds[entry.type], name
        assert (stat.S_IMODE(has.st_mode), has.st_uid, has.st_gid) == (entry.mode, entry.uid, entry.gid), name
        exact = int(decimal.Decimal(entry.pax_headers.get("mtime", str(int(entry.mtime)))) * 10**9)
        if name != "run":  # what images keep there is dropped, and its time comes from /usr
            assert has.st_mtime_ns == exact, name
        if entry.issym():
            assert os.readlink(path) == entry.linkname
        if entry.ischr():
            assert (os.major(has.st_rdev), os.minor(has.st_rdev)) == (entry.devmajor, entry.devminor), name
        if content is not None:
            assert path.read_bytes() == content, name
        xattrs = {
            key[len("SCHILY.xattr.") :]: value
            for key, value in entry.pax_headers.items()
            if key.startswith("SCHILY.xattr.")
        }
        has_xattrs = {
            key: os.getxattr(path, key, follow_symlinks=False) for key in os.listxattr(path, follow_symlinks=False)
        }
        assert has_xattrs == {key: value.encode("utf-8", "surrogateescape") for key, value in xattrs.items()}, name


def ours() -> list[mountinfo.Mounted]:
    return mountinfo.composefs_mounts()


# ---- what is mounted is what was packed ------------------------------------------------------------------------------


@pytest.mark.parametrize(("image", "archives"), [("one", (FIRST, SECOND)), ("two", (ODD,))])
def test_every_file_is_as_in_the_archives(
    mounted: Ensure, point: pathlib.Path, image: str, archives: tuple[bytes, ...]
) -> None:
    outcome = mounted(image)
    assert outcome.changed and outcome.previous is None and outcome.target is not None
    compare(point, *archives)
    there = mountinfo.at(str(point))
    assert there is not None and there.read_only and (there.image_id, there.verity) == (outcome.target.image_id, False)
    with pytest.raises(OSError, match="Read-only") as refused:
        (point / "new").touch()
    assert refused.value.errno == errno.EROFS


@pytest.mark.parametrize("writable", [False, True])
def test_tools_that_stay_on_one_file_system_see_all_of_a_mount(
    mounted: Ensure, point: pathlib.Path, place: pathlib.Path, writable: bool
) -> None:
    """A directory and the files in it must not have different device numbers, for then these stop."""
    mounted("one", **({"upperdir": str(place / "upper"), "workdir": str(place / "work")} if writable else {}))
    if writable:
        (point / "new").mkdir()
        (point / "new" / "file").write_text("new")
    expected = sorted(os.path.join(where, name) for where, folders, files in os.walk(point) for name in folders + files)
    command = ["find", str(point), "-xdev", "-mindepth", "1", "-print0"]
    found = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.decode()
    assert sorted(found.split("\0")[:-1]) == expected
    listed = subprocess.run(["du", "-a", "-x", str(point)], check=True, stdout=subprocess.PIPE).stdout.splitlines()
    everything = subprocess.run(["du", "-a", str(point)], check=True, stdout=subprocess.PIPE).stdout.splitlines()
    assert listed == everything and len(listed) > 10
    command = ["tar", "--one-file-system", "-C", str(point), "-cf", "-", "."]
    packed = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        names = sorted(os.path.normpath(os.path.join(point, name)) for name in archive.getnames() if name != ".")
    assert names == expected


def test_a_second_run_changes_nothing_and_check_mode_mounts_nothing(mounted: Ensure, point: pathlib.Path) -> None:
    assert mounted("one", check=True).changed
    assert not point.exists() and mountinfo.at(str(point)) is None
    assert mounted("one").changed
    before = ours()
    assert (
        not mounted("one").changed
        and not mounted("one", check=True).changed
        and not mounted("one", replace=True).changed
    )
    assert ours() == before
    assert mounting.ensure_unmounted(str(point), check=True).changed and ours() == before
    assert mounting.ensure_unmounted(str(point)).changed
    assert not mounting.ensure_unmounted(str(point)).changed
    assert point.is_dir() and list(point.iterdir()) == []


def test_names_manifest_digests_and_image_ids_mean_the_same(
    pulled: pathlib.Path, point: pathlib.Path, mounted: Ensure
) -> None:
    with Repository.open(str(pulled)) as repository:
        digest = repository.tags()["one"]
        image = mounting.resolve(repository, "one").hex()
        for name in (digest, f"@{digest}", image):
            assert mounting.resolve(repository, name).hex() == image
    assert mounted(digest).changed
    assert not mounted(image).changed


def test_options_of_the_mount_are_compared(mounted: Ensure, point: pathlib.Path) -> None:
    chosen = ["noexec", "nodev", "nosuid", "noatime", "nosymfollow", "nodiratime"]
    mounted("one", options=chosen)
    assert set(chosen) <= mountinfo.at(str(point)).options  # type: ignore[union-attr]
    assert not mounted("one", options=[*reversed(chosen), "ro"]).changed
    assert not mounted("one", options=["noexec", *chosen[3:]]).changed, "two of them need no words"
    with pytest.raises(Busy, match="noexec on instead of off"):
        mounted("one", options=chosen[1:])
    with pytest.raises(Busy, match="nodev on instead of off"):
        mounted("one", options=["noexec", *chosen[2:]], dev=True)
    assert mounted("one", options=["strictatime"], replace=True).changed
    assert not mounted("one", options=["strictatime"]).changed
    assert len(ours()) == 1


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_another_image_is_not_covered_by_mounted(mounted: Ensure, point: pathlib.Path) -> None:
    first = mounted("one").target
    assert first is not None
    with pytest.raises(Busy, match=first.image_id):
        mounted("two")
    assert len(ours()) == 1


def test_a_foreign_file_system_is_left_alone(mounted: Ensure, point: pathlib.Path) -> None:
    point.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "some", str(point)], check=True)
    for replace in (False, True):
        with pytest.raises(Busy, match="tmpfs from some"):
            mounted("one", replace=replace)
    assert not mounting.ensure_unmounted(str(point)).changed
    subprocess.run(["umount", str(point)], check=True)
    mounted("one")
    subprocess.run(["mount", "-t", "tmpfs", "above", str(point)], check=True)
    with pytest.raises(Busy, match="hidden below another mount"):
        mounting.ensure_unmounted(str(point))


def test_file_systems_within_keep_a_mount(mounted: Ensure, point: pathlib.Path) -> None:
    mounted("one")
    subprocess.run(["mount", "-t", "tmpfs", "within", str(point / "etc")], check=True)
    with pytest.raises(Busy, match="/etc"):
        mounted("two", replace=True)
    with pytest.raises(Busy, match="/etc"):
        mounting.ensure_unmounted(str(point))


def test_a_mount_in_use_stays(mounted: Ensure, point: pathlib.Path) -> None:
    mounted("one")
    with open(point / "usr/bin/tool", "rb"), pytest.raises(Busy, match="in use"):
        mounting.ensure_unmounted(str(point))
    assert len(ours()) == 1
    assert mounting.ensure_unmounted(str(point)).changed


def test_a_damaged_image_is_not_mounted(mounted: Ensure, pulled: pathlib.Path, point: pathlib.Path) -> None:
    with Repository.open(str(pulled)) as repository:
        path = pulled / "objects" / fsverity.object_path(mounting.resolve(repository, "one"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    for check in (True, False):
        with pytest.raises(FormatError, match="damaged"):
            mounted("one", check=check)
    assert ours() == []


def test_an_object_that_is_no_listed_image_is_not_mounted(mounted: Ensure, pulled: pathlib.Path) -> None:
    with Repository.open(str(pulled), write=True) as repository:
        listed = mounting.resolve(repository, "one")
        stray = repository.objects.put(b"no image")
    with pytest.raises(ImageNotFound):
        mounted(stray.hex())
    (pulled / "images" / listed.hex()).unlink()
    for name in ("one", listed.hex()):
        with pytest.raises(ImageNotFound):
            mounted(name)


def test_a_listed_object_that_is_no_image_is_refused_by_the_kernel(
    mounted: Ensure, pulled: pathlib.Path, point: pathlib.Path
) -> None:
    with Repository.open(str(pulled), write=True) as repository:
        stray = repository.objects.put(b"no image" * 1000)
        repository.link_image(stray)
    with pytest.raises(MountFailed, match="creating the erofs.*no EROFS image"):
        mounted(stray.hex())


def test_verity_that_is_required_is_refused_before_anything_is_mounted(mounted: Ensure, point: pathlib.Path) -> None:
    with pytest.raises(IncompatibleRepository, match="fs-verity"):
        mounted("one", verity=mounting.REQUIRED)
    assert not point.exists()


def test_a_mount_must_not_hide_its_repository(pulled: pathlib.Path, point: pathlib.Path) -> None:
    with Repository.open(str(pulled)) as repository:
        for path in (pulled, pulled.parent, pulled / "objects"):
            with pytest.raises(MountFailed, match="hide"):
                mounting.ensure_mounted(repository, Wish("one", str(path)))


# ---- what a mount gives to the users of the host ---------------------------------------------------------------------

NOBODY = 65534


def as_nobody(point: pathlib.Path) -> dict[str, Any]:
    """What a local user gets out of the image's device node and its setuid program: the error of opening the one, or
    None, and the effective user of the other.
    """
    directory = os.open(point, os.O_PATH)
    try:
        script = f"""
import os, subprocess
os.setgroups([])
os.setresgid({NOBODY}, {NOBODY}, {NOBODY})
os.setresuid({NOBODY}, {NOBODY}, {NOBODY})
try:
    os.read(os.open("usr/zero", os.O_RDONLY, dir_fd={directory}), 1)
    error = None
except OSError as refusal:
    error = refusal.errno
print(error, flush=True)
os.dup2(os.open("usr/id", os.O_PATH, dir_fd={directory}), 9)
os.execv("/proc/self/fd/9", ["id", "-u"])
"""
        done = subprocess.run(
            ["/usr/bin/python3", "-I", "-c", script],
            pass_fds=[directory],
            cwd="/",
            capture_output=True,
            text=True,
            check=True,
        )
    finally:
        os.close(directory)
    error, user = done.stdout.split()
    return {"device": None if error == "None" else int(error), "user": int(user)}


@pytest.fixture
def tempting(place: pathlib.Path, pulled: pathlib.Path) -> str:
    """An image with a device that everybody may read, and a setuid program of root's."""
    program = pathlib.Path("/usr/bin/id").read_bytes()
    made = Layout(place / "tempting")
    made.image(
        [
            tar(
                member("usr/", type=DIRECTORY, mode=0o755),
                member("usr/zero", type=CHARDEV, device=(1, 5), mode=0o666),
                member("usr/id", program, mode=0o4755),
            )
        ],
        "tempting",
    )
    pull_one(pulled, f"oci:{made.path}:tempting", "tempting")
    return "tempting"


HARMLESS = {"device": errno.EACCES, "user": NOBODY}


def test_device_nodes_and_setuid_programs_of_an_image_are_nothing_to_local_users(
    mounted: Ensure, point: pathlib.Path, place: pathlib.Path, tempting: str
) -> None:
    mounted(tempting)
    assert as_nobody(point) == HARMLESS
    mounted(tempting, replace=True, upperdir=str(place / "upper"), workdir=str(place / "work"))
    assert as_nobody(point) == HARMLESS, "nor where changes can be made"
    mounting.ensure_unmounted(str(point))
    mounted(tempting, dev=True)
    assert as_nobody(point) == {"device": None, "user": NOBODY}
    mounted(tempting, replace=True, suid=True)
    assert as_nobody(point) == {"device": errno.EACCES, "user": 0}
    mounted(tempting, replace=True, dev=True, suid=True)
    assert as_nobody(point) == {"device": None, "user": 0}


@pytest.mark.parametrize("old_kernel", [False, True])
def test_a_mount_that_lacks_protection_gets_it_while_it_is_in_use(
    mounted: Ensure,
    point: pathlib.Path,
    tempting: str,
    pulled: pathlib.Path,
    cfsctl: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
    old_kernel: bool,
) -> None:
    if old_kernel:
        really = mountcalls._Kernel.call

        def call(kernel: Any, step: str, number: int, *arguments: Any, context: int = -1) -> int:
            if number == mountcalls._MOUNT_SETATTR:
                raise mountcalls._KernelRefused(step, errno.ENOSYS, "")
            return really(kernel, step, number, *arguments, context=context)

        monkeypatch.setattr(mountcalls._Kernel, "call", call)
    point.mkdir()
    cfsctl("--repo", pulled, "oci", "mount", "--fuse", "no", tempting, point)
    assert as_nobody(point) == {"device": None, "user": 0}, "as cfsctl mounts"
    with open(point / "usr/id", "rb") as file:
        before = mountinfo.at(str(point))
        assert mounted(tempting, check=True).changed and mountinfo.at(str(point)) == before
        assert mounted(tempting).changed
        after = mountinfo.at(str(point))
        assert before is not None and after == before._replace(options=before.options | {"nodev", "nosuid"})
        assert file.read(4) == b"\x7fELF"
    assert as_nobody(point) == HARMLESS
    assert not mounted(tempting).changed


def assert_one_mount(point: pathlib.Path) -> None:
    """Nothing is mounted beside the image, and no helper of a mount is left. What other programs that run at the same
    time mount elsewhere is theirs, and helpers of theirs go within moments.
    """
    near = [mount.path for mount in mountinfo.mounts() if mount.path.startswith(f"{os.path.realpath(point.parent)}/")]
    assert near == [os.path.realpath(point)]
    end = time.monotonic() + 60
    while left := {
        *(mount.path for mount in mountinfo.mounts() if mount.path.startswith("/run/composefs-")),
        *(f"/run/{name}" for name in os.listdir("/run") if name.startswith("composefs-")),
    }:
        assert time.monotonic() < end, left
        time.sleep(0.1)


# ---- one image in the place of another -------------------------------------------------------------------------------


def test_at_no_moment_there_is_neither(mounted: Ensure, point: pathlib.Path) -> None:
    mounted("one")
    missing: list[OSError] = []
    looks = 0
    done = threading.Event()

    def look() -> None:
        nonlocal looks
        while not done.is_set():
            try:
                os.stat(point / "usr")
                looks += 1
            except OSError as error:
                missing.append(error)

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        for number in range(50):
            outcome = mounted("two" if number % 2 == 0 else "one", replace=True)
            assert outcome.changed and outcome.previous is not None and outcome.target is not None
            assert outcome.previous.image_id != outcome.target.image_id
            assert mountinfo.at(str(point)).image_id == outcome.target.image_id  # type: ignore[union-attr]
    finally:
        done.set()
        watcher.join()
    assert missing == [] and looks > 100
    assert_one_mount(point)
    compare(point, FIRST, SECOND)


def test_files_that_are_open_outlive_their_image(mounted: Ensure, point: pathlib.Path) -> None:
    mounted("two")
    with open(point / "usr/setuid", "rb") as file:
        mounted("one", replace=True)
        assert not (point / "usr/setuid").exists()
        assert file.read() == b"#!" * 100


def test_replacing_works_where_mounts_are_shared(mounted: Ensure, point: pathlib.Path, pulled: pathlib.Path) -> None:
    """As below systemd, which makes all mounts shared; a second name space must follow."""
    script = f"""
import os, subprocess, sys
import conftest
from ansible_collections.composefs.oci.plugins.module_utils.host import mountinfo
from ansible_collections.composefs.oci.plugins.module_utils.operations import mounting
from ansible_collections.composefs.oci.plugins.module_utils.store.repository import Repository
path = {str(point)!r}
with Repository.open({str(pulled)!r}) as repository:
    for image in ("one", "two", "one"):
        mounting.ensure_mounted(repository, mounting.Wish(image, path, replace=True))
        found = [mounted.image_id for mounted in mountinfo.composefs_mounts() if mounted.path == path]
        assert found == [mounting.resolve(repository, image).hex()], found
mounting.ensure_unmounted(path)
assert mountinfo.composefs_mounts() == []
"""
    here = pathlib.Path(__file__).parent
    command = ["unshare", "--mount", "--propagation", "shared", sys.executable, "-c", script]
    done = subprocess.run(
        command, cwd=here, env={**os.environ, "PYTHONPATH": str(here)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


# ---- places for changes ----------------------------------------------------------------------------------------------


def test_changes_go_to_the_upper_directory(mounted: Ensure, point: pathlib.Path, place: pathlib.Path) -> None:
    upper, work = place / "up,p=e\\r:x y", place / "wo,r=k\\:x y"
    there = {"upperdir": str(upper), "workdir": str(work)}
    assert mounted("one", **there).changed
    (point / "usr/bin/tool").write_bytes(b"changed")
    (point / "usr/lib/pipe").unlink()
    assert (upper / "usr/bin/tool").read_bytes() == b"changed"
    assert not mounted("one", **there).changed
    with pytest.raises(Busy, match="upperdir"):
        mounted("one")
    with pytest.raises(Busy, match="in use by the old one"):
        mounted("two", replace=True, **there)
    mounting.ensure_unmounted(str(point))
    assert mounted("one", options=["ro"], **there).changed
    assert (point / "usr/bin/tool").read_bytes() == b"changed" and not (point / "usr/lib/pipe").exists()
    assert not mounted("one", options=["ro"], **there).changed
    assert mounted("one", replace=True).changed
    assert (point / "usr/bin/tool").read_bytes() != b"changed"


def test_a_volatile_mount_is_recognised_and_its_remains_are_explained(
    mounted: Ensure, point: pathlib.Path, place: pathlib.Path
) -> None:
    there = {"upperdir": str(place / "upper"), "workdir": str(place / "work")}
    assert mounted("one", options=["volatile"], **there).changed
    assert not mounted("one", options=["volatile"], **there).changed
    mounting.ensure_unmounted(str(point))
    with pytest.raises(MountFailed, match="volatile"):
        mounted("one", **there)


# ---- older kernels, forced on this one -------------------------------------------------------------------------------


def refuse_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    def set_fd(_context: Any, key: str, _fd: int) -> None:
        raise mountcalls._KernelRefused(f"option {key}", errno.EBADF, "")

    monkeypatch.setattr(mountcalls._Context, "set_fd", set_fd)


def refuse_separate_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    string = mountcalls._Context.string

    def picky(context: Any, key: str, value: str) -> None:
        if key == "lowerdir+":
            raise mountcalls._KernelRefused(f"option {key}", errno.EINVAL, "")
        string(context, key, value)

    refuse_descriptors(monkeypatch)
    monkeypatch.setattr(mountcalls._Context, "string", picky)


def refuse_plain_files(monkeypatch: pytest.MonkeyPatch) -> None:
    really = mountcalls._erofs_from
    sources: list[str] = []

    def picky(kernel: Any, source: str) -> int:
        sources.append(source)
        if len(sources) % 2:
            raise mountcalls._KernelRefused("creating the erofs", errno.ENOTBLK, "")
        assert stat.S_ISBLK(os.stat(source).st_mode)
        return really(kernel, source)

    monkeypatch.setattr(mountcalls, "_erofs_from", picky)
    if not os.path.exists("/dev/loop-control"):
        pytest.skip("this machine has no loop devices")


@pytest.mark.parametrize("kernel", [refuse_descriptors, refuse_separate_layers, refuse_plain_files])
def test_older_kernels_get_it_in_other_words(
    mounted: Ensure, point: pathlib.Path, monkeypatch: pytest.MonkeyPatch, kernel: Callable[[pytest.MonkeyPatch], None]
) -> None:
    kernel(monkeypatch)
    assert mounted("one").changed
    compare(point, FIRST, SECOND)
    assert not mounted("one").changed
    assert mounted("two", replace=True).changed
    compare(point, ODD)
    assert_one_mount(point)
    mounting.ensure_unmounted(str(point))
    if kernel is refuse_plain_files:
        # A mount namespace that somebody makes at this moment has a copy of the mount until it has cleaned up.
        end = time.monotonic() + 60
        while str(point.parent) in loop_devices():
            assert time.monotonic() < end, "loop devices vanish with the mount"
            time.sleep(0.2)


def loop_devices() -> str:
    """The files behind all loop devices."""
    words = ["losetup", "--list", "--noheadings", "--output", "BACK-FILE"]
    return subprocess.run(words, stdout=subprocess.PIPE, text=True, check=False).stdout


# ---- cfsctl ----------------------------------------------------------------------------------------------------------


def test_cfsctl_mounts_what_was_pulled_here_and_its_mount_is_recognised(
    mounted: Ensure, pulled: pathlib.Path, point: pathlib.Path, cfsctl: Callable[..., str]
) -> None:
    point.mkdir()
    cfsctl("--repo", pulled, "oci", "mount", "--fuse", "no", "one", point)
    compare(point, FIRST, SECOND)
    assert mounted("one").changed, "it lacks nodev and nosuid"
    assert not mounted("one").changed
    assert mounted("two", replace=True).changed
    compare(point, ODD)
    assert mounting.ensure_unmounted(str(point)).changed


def test_what_cfsctl_pulled_is_mounted_here(
    layout: Layout, place: pathlib.Path, point: pathlib.Path, cfsctl: Callable[..., str]
) -> None:
    path = place / "theirs"
    cfsctl("--repo", path, "--insecure", "init", "--algorithm", "fsverity-sha512-12")
    cfsctl("--repo", path, "oci", "pull", f"oci:{layout.path}:one", "one")
    with Repository.open(str(path)) as repository:
        outcome = mounting.ensure_mounted(repository, Wish("one", str(point)))
    assert outcome.target is not None and len(outcome.target.image_id) == 128
    compare(point, FIRST, SECOND)


# ---- at boot ---------------------------------------------------------------------------------------------------------


def test_the_units_program_mounts_and_unmounts_by_itself(
    pulled: pathlib.Path, point: pathlib.Path, place: pathlib.Path
) -> None:
    program = place / "mount.pyz"
    program.write_bytes(bootmount.application())
    with Repository.open(str(pulled)) as repository:
        image = mounting.resolve(repository, "one").hex()

    def run(*words: object) -> subprocess.CompletedProcess[str]:
        # As a unit runs it: an isolated interpreter, no environment, another working directory.
        return subprocess.run(
            [sys.executable, "-I", str(program), *map(str, words)],
            cwd="/",
            env={},
            capture_output=True,
            text=True,
            check=False,
        )

    words = (
        "mount",
        "--repository",
        pulled,
        "--image",
        image,
        "--verity",
        "disabled",
        "--option",
        "nodev",
        "--",
        point,
    )
    for _time in range(2):
        assert run(*words).returncode == 0
        assert len(ours()) == 1
    compare(point, FIRST, SECOND)
    for _time in range(2):
        assert run("unmount", "--", point).returncode == 0
        assert ours() == []
    required = run("mount", "--repository", pulled, "--image", image, "--", point)
    assert required.returncode == 1 and required.stderr.startswith("incompatible_repository: ")
    missing = run("mount", "--repository", place / "nowhere", "--image", image, "--", point)
    assert (
        missing.returncode == 1
        and missing.stderr.startswith("not_a_repository: ")
        and "Traceback" not in missing.stderr
    )


def test_systemd_understands_the_unit(pulled: pathlib.Path, point: pathlib.Path, place: pathlib.Path) -> None:

    program = needed("systemd-analyze", "systemd")
    places = bootmount.Places(str(place / "units"), str(place / "library"), str(place / "not running"))
    strange = place / "a b%c\\d\"e'f$g;h"
    with Repository.open(str(pulled)) as repository:
        target = mounting.decide(repository, Wish("one", str(strange), options=["noexec"]))
    with contextlib.suppress(MountFailed):
        bootmount.ensure(target, str(pulled), lambda _words: (0, "", ""), places=places)
    unit = f"{places.units}/{bootmount.unit_name(target.path)}"
    done = subprocess.run([program, "verify", "--man=no", unit], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    escaped = subprocess.run(
        ["systemd-escape", "--path", target.path], stdout=subprocess.PIPE, text=True, check=True
    ).stdout.strip()
    assert bootmount.unit_name(target.path) == f"composefs-oci-{escaped}.service"
