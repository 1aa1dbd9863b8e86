# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Marks of unfinished imports: forged power cuts, killed owners, living owners."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from ansible_collections.composefs.oci.plugins.module_utils.formats import fsverity
from ansible_collections.composefs.oci.plugins.module_utils.host import filesystem
from ansible_collections.composefs.oci.plugins.module_utils.store import create, marks
from ansible_collections.composefs.oci.plugins.module_utils.errors import Busy, IOFailed
from ansible_collections.composefs.oci.plugins.module_utils.store.repository import Repository

OTHER_BOOT = "00000000-0000-0000-0000-000000000000"
HOUR = 3600.0
FORGED = "0123456789abcdef"


@pytest.fixture
def repository(tmp_path: Path) -> Iterator[Repository]:
    with create.create(str(tmp_path / "repo"), fsverity.SHA256, "disabled") as found:
        yield found


def marks_in(repository: Repository) -> list[str]:
    path = Path(repository.path, marks.IMPORTS)
    return sorted(os.listdir(path)) if path.exists() else []


def forge(repository: Repository, boot: str, started: float) -> None:
    path = Path(repository.path, marks.IMPORTS)
    path.mkdir(parents=True, exist_ok=True)
    (path / FORGED).write_text(json.dumps({"boot_id": boot, "pid": 1, "started": started}))


def tear(repository: Repository, digest: bytes, content: bytes | None = None) -> Path:
    path = Path(repository.path, "objects", fsverity.object_path(digest))
    path.write_bytes(bytes(path.stat().st_size) if content is None else content)
    return path


def test_an_import_is_marked_while_it_lasts(repository: Repository) -> None:
    assert repository.begin_import() == marks.Recovery()
    (name,) = marks_in(repository)
    document = json.loads(Path(repository.path, marks.IMPORTS, name).read_bytes())
    assert document["boot_id"] == marks.boot_id() and abs(document["started"] - time.time()) < 60
    repository.end_import()
    assert marks_in(repository) == []


def test_the_mark_is_durable_before_the_import_begins_and_goes_after_the_barrier(
    repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    story: list[str] = []
    real_fsync, real_unlink = os.fsync, os.unlink
    monkeypatch.setattr(
        os,
        "fsync",
        lambda fd: (
            story.append("fsync " + os.readlink(f"/proc/self/fd/{fd}").partition(repository.path)[2]),
            real_fsync(fd),
        )[1],
    )
    monkeypatch.setattr(filesystem, "sync", lambda fd: story.append("barrier"))
    monkeypatch.setattr(os, "unlink", lambda name, **kw: (story.append("unlink"), real_unlink(name, **kw))[1])
    with repository.importing():
        story.append("work")
    synced = story[: story.index("work")]
    assert synced[0].startswith("fsync /.composefs-oci/imports/"), "the mark itself, still without a name"
    assert synced[1:] == ["fsync /.composefs-oci/imports", "fsync /.composefs-oci", "fsync "]
    assert story[story.index("work") :] == ["work", "barrier", "unlink"]


def test_an_import_that_fails_ends_its_mark_after_a_barrier(
    repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(KeyError), repository.importing():
        raise KeyError
    assert marks_in(repository) == []

    def broken(fd: int) -> None:
        raise IOFailed("the disk is gone")

    monkeypatch.setattr(filesystem, "sync", broken)
    with pytest.raises(KeyError), repository.importing():
        raise KeyError
    assert len(marks_in(repository)) == 1, "no barrier, so what was written may be torn"


def test_after_a_power_cut_torn_objects_are_found_and_written_again(repository: Repository) -> None:
    good = repository.objects.put(b"good" * 100)
    empty, zeros, cut = (repository.objects.put(letter * 5000) for letter in (b"a", b"b", b"c"))
    forge(repository, OTHER_BOOT, time.time() - HOUR)
    tear(repository, empty, b"")
    tear(repository, zeros)
    tear(repository, cut, b"c" * 4096 + bytes(904))
    with repository.importing() as found:
        assert found == marks.Recovery(marks=1, checked=4, removed=3)
        assert repository.objects.contains(good)
        for letter, digest in ((b"a", empty), (b"b", zeros), (b"c", cut)):
            assert not repository.objects.contains(digest)
            assert repository.objects.put(letter * 5000) == digest
    assert marks_in(repository) == []
    assert all(repository.objects.verify(digest) for digest in (good, empty, zeros, cut))


def test_the_removals_are_durable_before_the_mark_goes(repository: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = repository.objects.put(b"a" * 5000)
    tear(repository, digest)
    forge(repository, OTHER_BOOT, time.time())
    story = []
    real = os.unlink
    monkeypatch.setattr(filesystem, "sync", lambda fd: story.append("barrier"))
    monkeypatch.setattr(os, "unlink", lambda name, **kw: (story.append(name), real(name, **kw))[1])
    marks.recover(repository.root, repository.objects)
    assert story == [fsverity.object_path(digest)[3:], "barrier", FORGED]


def test_a_failed_recovery_keeps_the_mark(repository: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    forge(repository, OTHER_BOOT, time.time())

    def broken(fd: int) -> None:
        raise IOFailed("the disk is gone")

    monkeypatch.setattr(filesystem, "sync", broken)
    with pytest.raises(IOFailed, match="unfinished imports"):
        repository.begin_import()
    assert marks_in(repository) == [FORGED]


def test_objects_up_to_a_day_older_than_the_mark_are_hashed(
    repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository.objects.put(b"old" * 100)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 30 * HOUR)
    forge(repository, OTHER_BOOT, now + 23 * HOUR)
    assert marks.recover(repository.root, repository.objects).checked == 1


def test_objects_older_than_that_are_not_read(repository: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    repository.objects.put(b"old" * 100)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 30 * HOUR)
    forge(repository, OTHER_BOOT, now + 25 * HOUR)
    assert marks.recover(repository.root, repository.objects) == marks.Recovery(marks=1, checked=0, removed=0)


def test_a_mark_from_the_future_means_that_everything_is_hashed(
    repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = repository.objects.put(b"a" * 5000)
    tear(repository, digest)
    forge(repository, OTHER_BOOT, time.time() + 1e9)
    assert marks.recover(repository.root, repository.objects) == marks.Recovery(1, 1, 1)


@pytest.mark.parametrize(
    "content",
    ["", "{}", "null", '{"boot_id": 1, "started": "x"}', "\x00" * 50],
    ids=["empty", "object", "null", "types", "zeros"],
)
def test_a_damaged_mark_means_that_everything_is_hashed(repository: Repository, content: str) -> None:
    digest = repository.objects.put(b"a" * 5000)
    tear(repository, digest)
    forge(repository, OTHER_BOOT, 0)
    Path(repository.path, marks.IMPORTS, FORGED).write_text(content)
    found = marks.recover(repository.root, repository.objects)
    assert found._replace(warnings=()) == marks.Recovery(1, 1, 1)
    assert marks_in(repository) == [f".damaged-{FORGED}"], "it is put aside and not removed: it may be precious"
    assert len(found.warnings) == 1 and FORGED in found.warnings[0]
    assert marks.recover(repository.root, repository.objects) == marks.Recovery()


def test_a_killed_import_of_this_boot_needs_a_barrier_and_no_hashing(
    repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    pid = os.fork()
    if pid == 0:
        with Repository.open(repository.path, write=True) as child:
            child.begin_import()
            child.objects.put(b"x" * 100)
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    assert len(marks_in(repository)) == 1
    barriers = []
    monkeypatch.setattr(filesystem, "sync", barriers.append)
    assert marks.recover(repository.root, repository.objects) == marks.Recovery(marks=1, checked=0, removed=0)
    assert len(barriers) == 1
    assert marks_in(repository) == []


def test_a_living_owner_is_left_alone_and_not_waited_for(repository: Repository) -> None:
    with Repository.open(repository.path, write=True) as other, other.importing():
        assert repository.begin_import() == marks.Recovery()
        assert len(marks_in(repository)) == 2
        repository.end_import()
        assert len(marks_in(repository)) == 1
    assert marks_in(repository) == []


def test_a_forked_worker_keeps_the_mark_alive(repository: Repository) -> None:
    reader, writer = os.pipe()
    other = Repository.open(repository.path, write=True)
    other.begin_import()
    pid = os.fork()
    if pid == 0:
        os.close(writer)
        os.read(reader, 1)
        os._exit(0)
    os.close(reader)
    other.close()
    try:
        assert repository.begin_import().marks == 0
    finally:
        os.close(writer)
        os.waitpid(pid, 0)
    repository.end_import()
    assert repository.begin_import().marks == 1


@contextlib.contextmanager
def beginning(repository: Repository) -> Iterator[list[marks.Recovery]]:
    """An import that begins in a thread and has to wait as long as the block lasts; what it found, after that."""
    done: list[marks.Recovery] = []
    with Repository.open(repository.path, write=True) as other:
        thread = threading.Thread(target=lambda: done.append(other.begin_import()))
        thread.start()
        thread.join(0.2)
        assert thread.is_alive() and not done
        yield done
        thread.join(60)
        assert len(done) == 1


def test_nobody_imports_while_someone_recovers(repository: Repository) -> None:
    forge(repository, OTHER_BOOT, time.time())
    lock = contextlib.ExitStack()
    lock.enter_context(repository.lock(marks.RECOVERY_LOCK))
    with beginning(repository) as done:
        os.unlink(Path(repository.path, marks.IMPORTS, FORGED))
        lock.close()
    assert done == [marks.Recovery()], "recovered by the other: nothing left to do"


def test_nobody_imports_while_version_0_1_0_recovers(repository: Repository) -> None:
    """It locks the mark of the other boot itself, as nobody does who imports since this one."""
    forge(repository, OTHER_BOOT, time.time())
    fd = os.open(Path(repository.path, marks.IMPORTS, FORGED), os.O_RDWR)
    fcntl.flock(fd, fcntl.LOCK_EX)
    with beginning(repository) as done:
        os.unlink(Path(repository.path, marks.IMPORTS, FORGED))
        os.close(fd)
    assert done == [marks.Recovery()]


def test_a_mark_of_another_boot_that_stays_locked_is_not_waited_for_for_ever(repository: Repository) -> None:
    forge(repository, OTHER_BOOT, time.time())
    fd = os.open(Path(repository.path, marks.IMPORTS, FORGED), os.O_RDWR)
    fcntl.flock(fd, fcntl.LOCK_EX)
    with pytest.raises(Busy, match=f"held by process {os.getpid()} "):
        marks.recover(repository.root, repository.objects, wait=0.1)
    os.close(fd)


# ---- one mount and the next ------------------------------------------------------------------------------------------


def killed_import(repository: Repository, content: bytes) -> bytes:
    """An import that stored ``content`` and was killed; the object's digest."""
    pid = os.fork()
    if pid == 0:
        with Repository.open(repository.path, write=True) as child:
            child.begin_import()
            child.objects.put(content)
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    return fsverity.digest(content, repository.algorithm)


@pytest.mark.parametrize("kernel", ["another mount", "one that cannot tell"])
def test_a_file_system_that_came_back_without_a_reboot_is_looked_through(
    repository: Repository, monkeypatch: pytest.MonkeyPatch, kernel: str
) -> None:
    if kernel == "one that cannot tell":
        monkeypatch.setattr(filesystem, "mount_id", lambda _fd: "")
    torn = killed_import(repository, b"x" * 5000)
    if kernel == "another mount":
        monkeypatch.setattr(filesystem, "mount_id", lambda _fd: "1")
    tear(repository, torn)
    assert marks.recover(repository.root, repository.objects) == marks.Recovery(marks=1, checked=1, removed=1)
    assert marks_in(repository) == []


def test_after_a_kill_only_what_is_younger_than_the_import_is_read(
    repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path(repository.path, "objects", fsverity.object_path(repository.objects.put(b"old" * 100)))
    now, uptime = time.time, time.clock_gettime
    monkeypatch.setattr(filesystem, "mount_id", lambda _fd: "")
    later = HOUR / 2
    monkeypatch.setattr(time, "time", lambda: now() + later)
    monkeypatch.setattr(time, "clock_gettime", lambda clock: uptime(clock) + later)
    repository.begin_import()
    repository._mark.abandon()  # type: ignore[union-attr]
    repository._mark = None
    assert marks.recover(repository.root, repository.objects) == marks.Recovery(marks=1, checked=0, removed=0)
    # Set back by an hour meanwhile: the clock does not tell what is younger any more.
    repository.begin_import()
    repository._mark.abandon()  # type: ignore[union-attr]
    repository._mark = None
    monkeypatch.setattr(time, "time", lambda: now() + later - HOUR)
    assert path.stat().st_ctime < now() + later
    monkeypatch.setattr(time, "time", lambda: now() + later + 10)
    monkeypatch.setattr(time, "clock_gettime", lambda clock: uptime(clock) + later + HOUR)
    assert marks.recover(repository.root, repository.objects).checked == 1


def test_the_number_of_a_mount_tells_it_from_others() -> None:
    numbers = []
    for path in ("/", "/proc"):
        fd = os.open(path, os.O_RDONLY)
        numbers += [filesystem.mount_id(fd), filesystem.mount_id(fd)]
        os.close(fd)
    if not numbers[0]:
        pytest.skip("this kernel is older than 6.8")
    assert numbers[0] == numbers[1] != numbers[2] == numbers[3]


# ---- what is no mark, and litter -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["file", "link", "fifo", "directory", "hard link", "large", "name", "user"])
def test_what_is_no_mark_is_left_alone_and_told_and_blocks_nobody(repository: Repository, kind: str) -> None:
    place = Path(repository.path, marks.IMPORTS)
    place.mkdir(parents=True)
    victim = Path(repository.path).parent / "victim"
    victim.write_text(json.dumps({"boot_id": OTHER_BOOT, "pid": 1, "started": 0}))
    path = place / ("precious.txt" if kind in ("file", "name") else FORGED)
    if kind in ("file", "name", "user", "large"):
        path.write_bytes(victim.read_bytes() + (b" " * 5000 if kind == "large" else b""))
        if kind == "user":
            if os.geteuid():
                pytest.skip("only root can give a file away")
            os.chown(path, 12345, 12345)
    elif kind == "link":
        path.symlink_to(victim)
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    else:
        path.hardlink_to(victim) if hasattr(path, "hardlink_to") else os.link(victim, path)
    with repository.importing() as found:
        assert (found.marks, found.removed) == (0, 0)
        assert len(found.warnings) == 1 and str(path) in found.warnings[0]
    assert os.path.lexists(path) and victim.exists()


def test_what_a_kill_left_unfinished_goes_when_nobody_can_be_at_work_on_it(repository: Repository) -> None:
    repository.objects.put(b"x" * 100)
    top = Path(repository.path)
    litter = [
        top / "objects/.tmp-object-0123456789ab",
        top / ".symlink-0123456789ab",
        top / ".tmp-meta.json-0123456789ab",
        top / marks.IMPORTS / ".0123456789ab",
    ]
    others = [top / "objects/.tmp-object-GHIJKLmnopqr", top / "objects/notes", top / ".tmp-object-0123456789ab"]
    (top / marks.IMPORTS).mkdir(parents=True)
    with Repository.open(repository.path, write=True) as living, living.importing():
        for path in (*litter, *others):
            if "symlink" in path.name:
                path.symlink_to("nowhere")
            else:
                path.write_bytes(b"x")
        with repository.importing() as found:
            assert found.litter == 0, "the import that lives may be at work on it"
    time.sleep(0.05)
    with repository.importing() as found:
        assert found == marks.Recovery(litter=4)
    assert not any(map(os.path.lexists, litter)) and all(path.exists() for path in others)


def test_closing_without_ending_leaves_the_mark(repository: Repository) -> None:
    other = Repository.open(repository.path, write=True)
    other.begin_import()
    other.close()
    assert len(marks_in(repository)) == 1


def test_marks_are_made_without_unnamed_files_too(repository: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def refuse(path: str, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(95, "no unnamed files")
        return real(path, flags, mode, dir_fd=dir_fd)

    monkeypatch.setattr(os, "open", refuse)
    repository.begin_import()
    assert len(marks_in(repository)) == 1
    repository.end_import()
    assert marks_in(repository) == []


def test_a_secure_repository_needs_no_marks(tmp_path: Path, verity_kernel: object) -> None:
    with create.create(str(tmp_path / "secure"), fsverity.SHA256, "required") as repository, repository.importing():
        assert marks_in(repository) == []


def test_what_a_secure_repository_was_given_outlives_a_power_cut_too(
    tmp_path: Path, verity_kernel: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found by cutting the power of a guest as soon as a pull was done: objects and streams were there, the name of the
    image was not.
    """
    with create.create(str(tmp_path / "secure"), fsverity.SHA256, "required") as repository:
        synced: list[bool] = []
        with repository.importing():
            monkeypatch.setattr(type(repository), "sync", lambda _self: synced.append(True))
        assert synced == [True]
