# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What older and newer kernels are asked, in which order, played by a stand-in; real mounts are the integration tests'
business.
"""

from __future__ import annotations

import errno
import fcntl
import os
import pathlib
import stat
import struct
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from ansible_collections.composefs.oci.plugins.module_utils.host import mountcalls, mountinfo
from ansible_collections.composefs.oci.plugins.module_utils.errors import (
    UnsafeRepository,
    Busy,
    EngineError,
    MountFailed,
    PermissionDenied,
)

ID = "ab" * 32
FSOPEN, FSCONFIG, FSMOUNT, MOVE_MOUNT, MOUNT_SETATTR = 430, 431, 432, 429, 442


class Kernel:
    """A kernel of some version. ``calls`` are the calls in short words; descriptors are of /dev/null."""

    version = (6, 18)
    deny = 0
    words = ""
    calls: list[str] = []

    def call(self, step: str, number: int, *arguments: Any, context: int = -1) -> int:
        result, said = 0, ""
        refuse = 0
        if number == FSOPEN:
            said = f"fsopen {arguments[0].decode()}"
            refuse = self.deny
            result = os.open(os.devnull, os.O_RDONLY)
            kinds[result] = arguments[0].decode()
        elif number == FSCONFIG:
            fd, command, key, value, aux = arguments
            name = key.decode() if key else ""
            text = "fd" if command == 5 else value.decode().replace(str(os.getpid()), "self") if value else ""
            said = {0: f"{name}", 1: f"{name}={text}", 5: f"{name}=fd", 6: f"create {kinds[fd]}"}[command]
            refuse = self.judge(kinds[fd], name, text, command)
        elif number == FSMOUNT:
            said = f"fsmount {kinds[arguments[0]]} {arguments[2]:#x}"
            result = os.open(os.devnull, os.O_RDONLY)
            kinds[result] = "mount"
        elif number == MOVE_MOUNT:
            place = os.fsdecode(arguments[3]) or os.readlink(f"/proc/self/fd/{arguments[2]}")
            assert bool(arguments[3]) != bool(arguments[4] & 0x40)
            said = f"attach {place} {arguments[4] & ~0x40:#x}".replace(str(os.getpid()), "self")
            refuse = errno.EINVAL if arguments[4] & 0x200 and self.version < (6, 5) else 0
        elif number == MOUNT_SETATTR:
            said = f"setattr {struct.unpack('=4Q', arguments[3])[0]:#x}"
            assert arguments[1:3] == (b"", 0x1000) and arguments[4] == 32
            refuse = self.deny or (errno.ENOSYS if self.version < (5, 12) else 0)
        self.calls.append(said)
        if refuse:
            if number == FSOPEN:
                os.close(result)
            raise mountcalls._KernelRefused(step, refuse, self.words)
        return result

    def judge(self, kind: str, key: str, value: str, command: int) -> int:
        if kind == "erofs":
            return errno.ENOTBLK if command == 6 and self.version < (6, 12) and not self.is_loop else 0
        if self.version < (6, 5):
            # Any string is taken and looked at when the overlay is made; a descriptor is not.
            self.given = {**({} if key == "source" else self.given), key: value}
            plain = set(self.given) <= {
                "source",
                "metacopy",
                "redirect_dir",
                "lowerdir",
                "",
            } and "::" not in self.given.get("lowerdir", "::")
            return errno.EOPNOTSUPP if command == 5 else errno.EINVAL if command == 6 and not plain else 0
        if key in ("lowerdir+", "datadir+"):
            if value == "fd":
                return 0 if self.version >= (6, 15) else errno.EBADF if self.version >= (6, 13) else errno.EINVAL
            return 0 if self.version >= (6, 7) else errno.EINVAL
        if key in ("upperdir", "workdir") and value == "fd":
            return 0 if self.version >= (6, 13) else errno.EINVAL
        if key == "verity":
            return 0 if self.version >= (6, 6) else errno.EINVAL
        return 0

    is_loop = False
    given: dict[str, str] = {}

    def remount(self, path: str, flags: int) -> None:
        assert path.startswith("/proc/self/fd/")
        self.calls.append(f"remount {flags:#x}")
        if self.deny:
            raise OSError(self.deny, os.strerror(self.deny), path)

    def umount(self, path: str, flags: int) -> None:
        self.calls.append(f"umount {os.path.realpath(path)} {flags}")
        if self.deny:
            raise OSError(self.deny, os.strerror(self.deny), path)


kinds: dict[int, str] = {}


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> Iterator[type[Kernel]]:
    """``kernel.version = (6, 12)`` chooses; the helper directory lies in a temporary one."""

    class Chosen(Kernel):
        calls: list[str] = []

    def loop(_image: int) -> int:
        Chosen.calls.append("loop device")
        Chosen.is_loop = True
        return os.open(os.devnull, os.O_RDONLY)

    helpers = tmp_path / "helpers"
    helpers.mkdir()
    make: Callable[..., str] = mountcalls.tempfile.mkdtemp
    monkeypatch.setattr(mountcalls, "_Kernel", Chosen)
    monkeypatch.setattr(mountcalls, "_loop_device", loop)
    monkeypatch.setattr(mountcalls.tempfile, "mkdtemp", lambda prefix, dir: make(prefix=prefix, dir=helpers))  # noqa: A006
    before = len(os.listdir("/proc/self/fd"))
    yield Chosen
    assert len(os.listdir("/proc/self/fd")) == before, "every descriptor is closed"
    assert list(helpers.iterdir()) == [], "no helper directory is left"


@pytest.fixture
def image(tmp_path: pathlib.Path) -> Iterator[int]:
    fd = os.open(tmp_path, os.O_RDONLY)
    yield fd
    os.close(fd)


def request(fd: int, **values: Any) -> mountcalls.Request:
    return mountcalls.Request(ID, fd, fd, values.pop("verity", False), **values)


HEAD = ["fsopen overlay", f"source=composefs:{ID}", "metacopy=on", "redirect_dir=on"]


def plain(calls: list[str], fd: int) -> list[str]:
    """The calls without what differs from run to run."""
    return [call.replace(f"/proc/self/fd/{fd}", "/proc/self/fd/IMAGE") for call in calls]


def test_a_new_kernel_gets_descriptors_and_nothing_is_attached_but_the_overlay(
    kernel: type[Kernel], image: int, tmp_path: pathlib.Path
) -> None:
    mountcalls.mount(request(image, verity=True), str(tmp_path))
    assert plain(kernel.calls, image) == [
        *["fsopen erofs", "ro", "source=/proc/self/fd/IMAGE", "create erofs", "fsmount erofs 0x1"],
        *HEAD,
        *["verity=require", "lowerdir+=fd", "datadir+=fd", "create overlay", "fsmount overlay 0x1"],
        f"attach {tmp_path} 0x4",
    ]


@pytest.mark.parametrize("version", [(6, 12), (6, 13)])
def test_before_6_15_the_image_is_attached_for_a_while(
    kernel: type[Kernel], image: int, tmp_path: pathlib.Path, version: tuple[int, int]
) -> None:
    kernel.version = version
    mountcalls.mount(request(image), str(tmp_path))
    calls = plain(kernel.calls, image)
    assert "loop device" not in calls
    attach = next(number for number, call in enumerate(calls) if call.startswith(f"attach {tmp_path}/helpers/"))
    rest = calls[attach + 1 :]
    assert calls[attach - 1] == "lowerdir+=fd", "tried with descriptors first"
    assert (
        rest[:4] == HEAD
        and rest[4].startswith("lowerdir+=/proc/self/fd/")
        and rest[5] == "datadir+=/proc/self/fd/IMAGE"
    )
    assert rest[6:8] == ["create overlay", "fsmount overlay 0x1"]
    assert rest[8].startswith(f"umount {tmp_path}/helpers/") and rest[8].endswith(" 10"), (
        "detached again, not following links"
    )
    assert rest[9:] == [f"attach {tmp_path} 0x4"]


def test_before_6_12_the_image_takes_a_loop_device(kernel: type[Kernel], image: int, tmp_path: pathlib.Path) -> None:
    kernel.version = (6, 7)
    mountcalls.mount(request(image), str(tmp_path))
    assert plain(kernel.calls, image)[:5] == [
        "fsopen erofs",
        "ro",
        "source=/proc/self/fd/IMAGE",
        "create erofs",
        "loop device",
    ]


def test_before_6_7_layers_are_one_string(kernel: type[Kernel], image: int, tmp_path: pathlib.Path) -> None:
    kernel.version = (6, 6)
    mountcalls.mount(request(image, verity=True), str(tmp_path))
    joined = [call for call in plain(kernel.calls, image) if call.startswith("lowerdir=")]
    assert (
        len(joined) == 1
        and joined[0].startswith("lowerdir=/proc/self/fd/")
        and joined[0].endswith("::/proc/self/fd/IMAGE")
    )


def test_each_attempt_gets_a_context_of_its_own(kernel: type[Kernel], image: int, tmp_path: pathlib.Path) -> None:
    kernel.version = (6, 6)
    mountcalls.mount(request(image), str(tmp_path))
    assert kernel.calls.count("fsopen overlay") == 3


def test_einval_everywhere_is_explained_with_the_kernels_words(
    kernel: type[Kernel], image: int, tmp_path: pathlib.Path
) -> None:
    kernel.version = (6, 1)
    kernel.words = "overlay: no data-only layers here"
    with pytest.raises(MountFailed, match="The kernel says: overlay: no data-only layers here.*before 6.5"):
        mountcalls.mount(request(image), str(tmp_path))
    assert not any(call.startswith(f"attach {tmp_path} ") for call in kernel.calls)


@pytest.fixture
def stubs(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Names in the root of the attached image that are whiteouts; as an image of format V1 has them, unless a test
    takes some away.
    """
    names = {f"{first:02x}" for first in range(256)}

    def lstat(path: str) -> Any:
        if os.path.basename(path) not in names:
            raise FileNotFoundError(errno.ENOENT, "none", path)
        return types.SimpleNamespace(st_mode=stat.S_IFCHR, st_rdev=0)

    monkeypatch.setattr(mountcalls, "os", types.SimpleNamespace(**{**vars(os), "lstat": lstat}))
    return names


def test_before_6_5_the_objects_are_an_ordinary_layer_under_an_image_that_hides_them(
    kernel: type[Kernel], image: int, tmp_path: pathlib.Path, stubs: set[str]
) -> None:
    kernel.version = (6, 1)
    mountcalls.mount(request(image), str(tmp_path))
    joined = [call for call in plain(kernel.calls, image) if call.startswith("lowerdir=")]
    assert [call.endswith("::/proc/self/fd/IMAGE") for call in joined] == [True, False] and joined[1].endswith(
        ":/proc/self/fd/IMAGE"
    )
    assert kernel.calls[-1] == f"attach {tmp_path} 0x4"


def test_before_6_5_an_image_that_would_show_the_objects_is_not_mounted(
    kernel: type[Kernel], image: int, tmp_path: pathlib.Path, stubs: set[str]
) -> None:
    kernel.version = (6, 1)
    stubs.discard("7f")
    with pytest.raises(MountFailed, match="before 6.5 only images of format V1"):
        mountcalls.mount(request(image), str(tmp_path))


def test_before_6_5_replacing_a_mount_says_what_to_do_instead(
    kernel: type[Kernel], image: int, tmp_path: pathlib.Path, stubs: set[str]
) -> None:
    kernel.version = (6, 1)
    with pytest.raises(
        MountFailed,
        match="attaching under the mount at .*before 6.5 cannot put a mount under another: unmount the old image first",
    ):
        mountcalls.replace(request(image), str(tmp_path))
    assert not any(call.startswith(f"umount {tmp_path} ") for call in kernel.calls), "the old mount stays"


def test_before_6_5_nothing_is_mounted_that_should_insist_on_verity(
    kernel: type[Kernel], image: int, tmp_path: pathlib.Path, stubs: set[str]
) -> None:
    kernel.version = (6, 1)
    with pytest.raises(MountFailed, match="before 6.6 cannot mount with verity"):
        mountcalls.mount(request(image, verity=True), str(tmp_path))


def test_verity_before_6_6_is_not_dropped_silently(kernel: type[Kernel], image: int, tmp_path: pathlib.Path) -> None:
    kernel.version = (6, 5)
    with pytest.raises(MountFailed, match="option verity.*before 6.6 cannot mount with verity"):
        mountcalls.mount(request(image, verity=True), str(tmp_path))


@pytest.mark.parametrize(
    ("number", "kind", "words"),
    [
        (errno.EPERM, PermissionDenied, "CAP_SYS_ADMIN"),
        (errno.ENODEV, MountFailed, "lacks EROFS or overlay"),
        (errno.ENOSYS, MountFailed, "older than 5.2"),
        (errno.EBUSY, Busy, "in use"),
        (errno.EIO, MountFailed, "Input/output error"),
    ],
)
def test_refusals_have_a_class_and_words(
    kernel: type[Kernel], image: int, tmp_path: pathlib.Path, number: int, kind: type[EngineError], words: str
) -> None:
    kernel.deny = number
    with pytest.raises(kind, match=words):
        mountcalls.mount(request(image), str(tmp_path))


def test_writable_mounts_name_their_directories_with_backslashes_doubled(
    kernel: type[Kernel], image: int, tmp_path: pathlib.Path
) -> None:
    kernel.version = (6, 12)  # later ones take descriptors
    upper, work = tmp_path / "u\\p", tmp_path / "w,k:"
    for directory in (upper, work):
        directory.mkdir()
    options = ["nodev", "strictatime", "volatile", "context=a:b"]
    mountcalls.mount(request(image, upperdir=str(upper), workdir=str(work), options=options), str(tmp_path))
    assert [call for call in kernel.calls if "kdir=/" in call or "rdir=/" in call][-2:] == [
        f"upperdir={tmp_path}/u\\\\p",
        f"workdir={tmp_path}/w,k:",
    ]
    assert "volatile" in kernel.calls and "context=a:b" in kernel.calls
    assert "fsmount overlay 0x24" in kernel.calls
    assert "nodev" not in kernel.calls, "an attribute of the mount is no setting of the overlay"


def test_ro_makes_a_mount_with_an_upper_directory_read_only(
    kernel: type[Kernel], image: int, tmp_path: pathlib.Path
) -> None:
    changes = {"upperdir": str(tmp_path / "u"), "workdir": str(tmp_path / "w")}
    for directory in changes.values():
        os.mkdir(directory)
    mountcalls.mount(request(image, **changes, options=["ro"]), str(tmp_path))
    assert "fsmount overlay 0x1" in kernel.calls
    assert [call for call in kernel.calls if "upperdir" in call or "workdir" in call] == ["upperdir=fd", "workdir=fd"]
    assert "xino=on" in kernel.calls, "or files have other device numbers than their directories"


def test_another_directory_for_changes_than_the_one_that_was_looked_at_is_not_mounted(
    kernel: type[Kernel], image: int, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Older kernels take paths, so what they will find there is compared with what was opened."""
    kernel.version = (6, 12)
    changes = {"upperdir": str(tmp_path / "u"), "workdir": str(tmp_path / "w")}
    for directory in (*changes.values(), tmp_path / "other"):
        os.mkdir(directory)
    real = mountcalls._mount_erofs

    def late(*arguments: Any) -> int:
        os.rename(tmp_path / "u", tmp_path / "gone")
        os.rename(tmp_path / "other", tmp_path / "u")
        return real(*arguments)

    monkeypatch.setattr(mountcalls, "_mount_erofs", late)
    with pytest.raises(MountFailed, match="Another directory has appeared"):
        mountcalls.mount(request(image, **changes), str(tmp_path))
    assert not any(call.startswith("attach") and "helpers" not in call for call in kernel.calls)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs other users")
@pytest.mark.parametrize("how", ["owner", "mode", "parent", "link"])
@pytest.mark.parametrize("key", ["upperdir", "workdir"])
def test_changes_go_to_no_directory_that_somebody_else_can_change(
    kernel: type[Kernel], image: int, tmp_path: pathlib.Path, how: str, key: str
) -> None:
    places = {name: tmp_path / "on" / name for name in ("upperdir", "workdir")}
    for place in places.values():
        place.mkdir(parents=True)
    if how == "owner":
        os.chown(places[key], 12345, 0)
    elif how == "mode":
        places[key].chmod(0o757)
    elif how == "parent":
        os.chown(tmp_path / "on", 12345, 0)
    else:
        places[key].rename(tmp_path / "elsewhere")
        places[key].symlink_to(tmp_path / "elsewhere")
        os.lchown(places[key], 12345, 12345)
    with pytest.raises(UnsafeRepository):
        mountcalls.mount(request(image, **{name: str(place) for name, place in places.items()}), str(tmp_path))
    assert kernel.calls == []


def test_a_replacement_goes_beneath_and_then_the_old_one_is_detached(
    kernel: type[Kernel], image: int, tmp_path: pathlib.Path
) -> None:
    mountcalls.replace(request(image), str(tmp_path))
    assert kernel.calls[-2:] == [f"attach {tmp_path} 0x204", f"umount {tmp_path} 10"]


def shown_at(path: pathlib.Path, *options: str, other: int = 0) -> mountinfo.Mounted:
    fd = os.open(path, os.O_PATH)
    number = mountinfo.mount_id(fd) + other
    os.close(fd)
    return mountinfo.Mounted(number, 0, str(path), "overlay", f"composefs:{ID}", frozenset(options), {})


@pytest.mark.parametrize(
    ("version", "options", "calls"),
    [
        ((6, 18), ("ro", "relatime"), ["setattr 0x6"]),
        ((5, 10), ("ro", "relatime", "noexec"), ["setattr 0x6", "remount 0x20102f"]),
        ((5, 10), ("rw",), ["setattr 0x6", "remount 0x1001026"]),
    ],
)
def test_protection_is_added_in_place_and_the_rest_stays(
    kernel: type[Kernel], tmp_path: pathlib.Path, version: tuple[int, int], options: tuple[str, ...], calls: list[str]
) -> None:
    kernel.version = version
    mountcalls.tighten(shown_at(tmp_path, *options), ("nodev", "nosuid"))
    assert kernel.calls == calls


def test_protection_that_cannot_be_added_is_said(kernel: type[Kernel], tmp_path: pathlib.Path) -> None:
    with pytest.raises(Busy, match="meanwhile"):
        mountcalls.tighten(shown_at(tmp_path, "ro", other=1), ("nodev",))
    assert kernel.calls == []
    kernel.deny = errno.EPERM
    with pytest.raises(PermissionDenied, match="Setting nodev at"):
        mountcalls.tighten(shown_at(tmp_path, "ro"), ("nodev",))
    kernel.deny = errno.EINVAL
    with pytest.raises(MountFailed, match="Invalid argument"):
        mountcalls.tighten(shown_at(tmp_path, "ro"), ("nodev",))


def test_a_link_that_appears_in_the_path_is_not_followed(
    kernel: type[Kernel], image: int, tmp_path: pathlib.Path
) -> None:
    """Who may write to a directory above the mount point could have root mount over any other directory."""
    (tmp_path / "victim/inner").mkdir(parents=True)
    (tmp_path / "link").symlink_to("victim")
    for path in ("link", "link/inner"):
        for verb in (mountcalls.mount, mountcalls.replace):
            with pytest.raises(UnsafeRepository, match="symbolic link link"):
                verb(request(image), str(tmp_path / path))
    with pytest.raises(UnsafeRepository):
        mountcalls.unmount(str(tmp_path / "link/inner"))
    assert not any(call.startswith(("attach", "umount")) and "helpers" not in call for call in kernel.calls)


@pytest.mark.parametrize(
    ("number", "kind", "words"),
    [
        (errno.EBUSY, Busy, "in use"),
        (errno.EPERM, PermissionDenied, "CAP_SYS_ADMIN"),
        (errno.EINVAL, MountFailed, "Invalid"),
    ],
)
def test_unmounting_that_fails_is_explained(
    kernel: type[Kernel], number: int, kind: type[EngineError], words: str
) -> None:
    kernel.deny = number
    with pytest.raises(kind, match=words):
        mountcalls.unmount("/srv/app")


def test_remains_of_a_volatile_mount_are_named(kernel: type[Kernel], image: int, tmp_path: pathlib.Path) -> None:
    kernel.version = (6, 1)
    (tmp_path / "work/incompat/volatile").mkdir(parents=True)
    (tmp_path / "u").mkdir()
    with pytest.raises(MountFailed, match="volatile"):
        mountcalls.mount(request(image, upperdir=str(tmp_path / "u"), workdir=str(tmp_path)), str(tmp_path))


# ---- loop devices ----------------------------------------------------------------------------------------------------


class LoopDevices:
    """Stands for fcntl.ioctl on loop devices, of which the first ones are taken by others in the last moment."""

    def __init__(self, answers: list[int]) -> None:
        self.answers = answers
        self.flags: list[int] = []

    def __call__(self, _fd: int, request: int, config: bytes = b"") -> int:
        if request == 0x4C82:
            return 7
        assert request == 0x4C0A and len(config) == 304
        assert struct.unpack_from("=I", config, 4) == (4096,)
        self.flags.append(struct.unpack_from("=I", config, 60)[0])
        number = self.answers.pop(0)
        if number:
            raise OSError(number, os.strerror(number))
        return 0


@pytest.fixture
def loops(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[int]], LoopDevices]:
    def choose(answers: list[int]) -> LoopDevices:
        devices = LoopDevices(answers)
        really = os.open
        monkeypatch.setattr(fcntl, "ioctl", devices)
        monkeypatch.setattr(
            os,
            "open",
            lambda path, flags, *rest, **named: really(
                os.devnull if str(path).startswith("/dev/loop") else path, flags, *rest, **named
            ),
        )
        return devices

    return choose


def test_a_loop_device_that_another_process_took_is_tried_again(
    loops: Callable[[list[int]], LoopDevices], image: int
) -> None:
    devices = loops([errno.EBUSY, errno.EBUSY, 0])
    os.close(mountcalls._loop_device(image))
    assert len(devices.flags) == 3 and all(flags & 5 == 5 for flags in devices.flags), (
        "read-only, and gone with the mount"
    )


def test_direct_input_is_given_up_where_the_file_system_cannot_do_it(
    loops: Callable[[list[int]], LoopDevices], image: int
) -> None:
    devices = loops([errno.EINVAL, 0])
    os.close(mountcalls._loop_device(image))
    assert [flags & 16 for flags in devices.flags] == [16, 0]


def test_other_failures_of_loop_devices_end_at_once(loops: Callable[[list[int]], LoopDevices], image: int) -> None:
    loops([errno.EIO])
    with pytest.raises(mountcalls._KernelRefused, match="loop device"):
        mountcalls._loop_device(image)
