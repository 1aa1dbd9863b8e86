# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A repository that somebody else owns or can write to: real users, real links, real FIFOs."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import stat
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.composefs.oci.plugins.module_utils.errors import (
    Busy,
    EngineError,
    FormatError,
    NotARepository,
    UnsafeRepository,
)
from ansible_collections.composefs.oci.plugins.module_utils.formats import fsverity
from ansible_collections.composefs.oci.plugins.module_utils.host import beneath, locks
from ansible_collections.composefs.oci.plugins.module_utils.store import create, marks
from ansible_collections.composefs.oci.plugins.module_utils.store.repository import Repository

ATTACKER = 12345
MANIFEST = "sha256:" + "a" * 64
CONTENT = b"x" * 100
DIGEST = fsverity.digest(CONTENT, fsverity.SHA256)

root_only = pytest.mark.skipif(os.geteuid() != 0, reason="needs other users, which only root can be")


@pytest.fixture(autouse=True)
def nothing_hangs() -> Iterator[None]:
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(60)
    yield
    signal.alarm(0)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    with create.create(str(tmp_path / "repo"), fsverity.SHA256, "disabled") as repository:
        use(repository)
    return tmp_path / "repo"


def use(repository: Repository) -> None:
    """Everything that writes."""
    with repository.importing(), repository.lock("publish"):
        digest = repository.objects.put(CONTENT)
        repository.register("oci-manifest-" + MANIFEST, digest)
        repository.tag("app", MANIFEST)
        repository.link_image(digest)
        repository.trust(MANIFEST, digest)


def read(repository: Repository) -> None:
    """Everything that reads."""
    assert repository.objects.contains(DIGEST) and repository.objects.verify(DIGEST)
    assert repository.streams() and repository.tags() and repository.image(DIGEST)
    repository.trusted(MANIFEST)
    list(repository.objects.names())


def as_user(uid: int, work: Callable[[], Any]) -> str:
    """Call ``work`` as another user: the code of its error, ``fine``, or a traceback."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.setgroups([])
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
            work()
            os.write(writer, b"fine")
        except EngineError as error:
            os.write(writer, error.code.encode())
        except BaseException:
            os.write(writer, traceback.format_exc().encode())
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader, encoding="utf-8") as answer:
        said = answer.read()
    os.waitpid(pid, 0)
    return said


def tree(path: Path) -> dict[str, bytes | None]:
    return {str(one.relative_to(path)): one.read_bytes() if one.is_file() else None for one in path.rglob("*")}


# --- links
# --------------------------------------------------------------------------------------------------------------------

DIRECTORIES = [
    ".composefs-oci",
    ".composefs-oci/imports",
    ".composefs-oci/trusted",
    ".composefs-oci/locks",
    "objects",
    "objects/" + DIGEST.hex()[:2],
    "streams",
    "streams/refs",
    "streams/refs/oci",
    "images",
]


@pytest.mark.parametrize("accept", [False, True], ids=["own repository", "accepted one of somebody else"])
@pytest.mark.parametrize("directory", DIRECTORIES)
def test_a_planted_link_leads_nobody_elsewhere(path: Path, tmp_path: Path, directory: str, accept: bool) -> None:
    """The worst that was found: ``.composefs-oci/imports`` led to a directory, and the next pull removed every file
    there.
    """
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "precious").write_bytes(b"precious")
    (victim / "0123456789abcdef").write_text('{"boot_id": "another", "pid": 1, "started": 0}')
    for name in ("refs", "oci", DIGEST.hex()[:2], "imports", "locks", "trusted"):
        (victim / name).mkdir()
    before = tree(victim)
    shutil.rmtree(path / directory)
    (path / directory).symlink_to(victim)
    if accept:
        if os.geteuid():
            pytest.skip("only root can give a directory away")
        os.chown(path, ATTACKER, ATTACKER)
    for verb in (use, read):
        with Repository.open(str(path), unsafe="accept" if accept else "refuse") as repository:
            if verb is read and (directory == ".composefs-oci" or accept) and "composefs-oci" in directory:
                continue  # read with the proof not found, or not at all
            if verb is read and directory in (".composefs-oci/imports", ".composefs-oci/locks"):
                continue
            with pytest.raises(UnsafeRepository, match=f"{directory} is a symbolic link"):
                verb(repository)
    assert tree(victim) == before
    assert (path / directory).is_symlink()


def test_a_file_in_the_place_of_a_directory_is_damage(path: Path) -> None:
    shutil.rmtree(path / "streams")
    (path / "streams").write_bytes(b"")
    with Repository.open(str(path), write=True) as repository, pytest.raises(FormatError, match="not a directory"):
        repository.streams()


@root_only
def test_links_on_the_way_are_followed_if_root_or_the_caller_made_them(path: Path, tmp_path: Path) -> None:
    (tmp_path / "own").symlink_to(path)
    (tmp_path / "relative").symlink_to("repo/../repo")
    for name in ("own", "relative"):
        with Repository.open(str(tmp_path / name)) as repository:
            read(repository)
    (tmp_path / "foreign").symlink_to(path)
    os.lchown(tmp_path / "foreign", ATTACKER, ATTACKER)
    for unsafe in ("refuse", "accept"):
        with pytest.raises(UnsafeRepository, match="link foreign belongs to user 12345"):
            Repository.open(str(tmp_path / "foreign"), unsafe=unsafe)
        with pytest.raises(UnsafeRepository):
            create.prepare(str(tmp_path / "foreign"), fsverity.SHA256, "disabled")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(EngineError, match="Too many levels"):
        Repository.open(str(tmp_path / "loop"))
    (tmp_path / "dangling").symlink_to("nowhere")
    with pytest.raises(NotARepository):
        Repository.open(str(tmp_path / "dangling"))


# --- owners and modes
# --------------------------------------------------------------------------------------------------------------------


@root_only
@pytest.mark.parametrize("spoil", ["owner", "group", "world"])
def test_a_repository_that_others_can_change_is_refused_unless_that_is_accepted(path: Path, spoil: str) -> None:
    if spoil == "owner":
        os.chown(path, ATTACKER, 0)
    path.chmod({"owner": 0o700, "group": 0o770, "world": 0o707}[spoil])
    with pytest.raises(UnsafeRepository, match="belongs to user 12345" if spoil == "owner" else "can be written by"):
        Repository.open(str(path))
    with Repository.open(str(path), unsafe="accept") as repository:
        assert repository.root.fault
        use(repository)
        read(repository)


@root_only
@pytest.mark.parametrize("directory", DIRECTORIES)
def test_a_directory_inside_that_somebody_else_owns_is_refused(path: Path, directory: str) -> None:
    os.chown(path / directory, ATTACKER, 0)
    with Repository.open(str(path)) as repository, pytest.raises(UnsafeRepository, match=f"{directory} belongs to"):
        use(repository)


@pytest.mark.parametrize("directory", DIRECTORIES)
def test_the_mode_of_a_directory_inside_matters_only_where_others_get_that_far(path: Path, directory: str) -> None:
    """cfsctl under a umask of 002 makes them writable for the group."""
    (path / directory).chmod(0o775)
    with Repository.open(str(path)) as repository:
        use(repository)
    path.chmod(0o701)
    with Repository.open(str(path)) as repository:
        use(repository)
    path.chmod(0o710)
    with Repository.open(str(path)) as repository, pytest.raises(UnsafeRepository, match="written by others"):
        use(repository)


@root_only
def test_users_work_in_their_own_repositories_and_read_those_of_root(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    for above in tmp_path.parents:
        if above.stat().st_mode & 0o001 == 0:
            above.chmod(above.stat().st_mode | 0o011)
    (tmp_path / "home").mkdir()
    os.chown(tmp_path / "home", ATTACKER, ATTACKER)
    mine, roots = str(tmp_path / "home/repo"), str(tmp_path / "repo")
    with create.create(roots, fsverity.SHA256, "disabled") as repository:
        use(repository)
    os.chmod(roots, 0o755)

    def work() -> None:
        with create.create(mine, fsverity.SHA256, "disabled") as repository:
            use(repository)
            read(repository)
        with Repository.open(roots) as repository:
            read(repository)
            assert repository.trusted(MANIFEST) == DIGEST

    assert as_user(ATTACKER, work) == "fine"
    assert as_user(ATTACKER + 1, lambda: Repository.open(mine)) == "permission_denied"
    os.chmod(mine, 0o755)
    assert as_user(ATTACKER + 1, lambda: Repository.open(mine)) == "unsafe_repository"
    assert as_user(ATTACKER + 1, lambda: read(Repository.open(mine, unsafe="accept"))) == "fine"
    with pytest.raises(UnsafeRepository):
        Repository.open(mine)


@root_only
@pytest.mark.parametrize("whose", ["link", "directory", "repository and directory"])
def test_a_proof_counts_only_if_root_or_the_caller_made_it(path: Path, whose: str) -> None:
    proof = path / ".composefs-oci/trusted" / MANIFEST
    with Repository.open(str(path)) as repository:
        assert repository.trusted(MANIFEST) == DIGEST
    os.lchown(proof if whose == "link" else proof.parent, ATTACKER, ATTACKER)
    if whose.startswith("repository"):
        os.chown(path, ATTACKER, ATTACKER)
    with Repository.open(str(path), unsafe="accept") as repository:
        assert repository.trusted(MANIFEST) is None


# --- FIFOs, devices and locks
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["fifo", "device", "link"])
def test_what_is_not_a_regular_file_is_neither_followed_nor_waited_for(path: Path, kind: str) -> None:
    def plant(name: str) -> None:
        (path / name).unlink()
        if kind == "fifo":
            os.mkfifo(path / name)
        elif kind == "device":
            if os.geteuid():
                pytest.skip("only root can make devices")
            os.mknod(path / name, 0o020600, os.makedev(1, 5))  # /dev/zero never ends
        else:
            (path / name).symlink_to("/dev/zero")

    plant("objects/" + fsverity.object_path(DIGEST))
    with Repository.open(str(path), write=True) as repository:
        assert not repository.objects.contains(DIGEST) and not repository.objects.verify(DIGEST)
        with pytest.raises(FormatError, match="not a regular file"):
            repository.objects.open(DIGEST)
        with pytest.raises(FormatError, match="not a regular file"), repository.open_object_stream(DIGEST):
            pass
        assert repository.objects.put(CONTENT) == DIGEST
        assert repository.objects.verify(DIGEST), "it was replaced"
    plant(".composefs-oci/locks/publish")
    with (
        Repository.open(str(path), write=True) as repository,
        pytest.raises(FormatError, match="publish is not a regular file"),
        repository.lock("publish"),
    ):
        pass
    plant("meta.json")
    with pytest.raises(FormatError, match=r"meta\.json is not a regular file"):
        Repository.open(str(path))


def test_a_description_that_is_too_large_is_not_read(path: Path) -> None:
    with (path / "meta.json").open("r+b") as file:
        file.truncate(1 << 40)
    with pytest.raises(FormatError, match="larger than"):
        Repository.open(str(path))


def test_who_holds_a_lock_is_said_and_a_dead_holder_frees_it(path: Path) -> None:
    program = f"import fcntl, os, time; fcntl.flock(os.open({str(path)!r}, 0), 2); print('locked', flush=True); time.sleep(60)"
    command = [sys.executable, "-c", program, "--password", "hunter2", "--token=hunter2"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "locked\n"
        with pytest.raises(Busy, match=f"garbage is being collected.* held by process {holder.pid} .*python") as caught:
            Repository.open(str(path), wait=0.05)
        assert "hunter2" not in str(caught.value)
        holder.kill()
        holder.wait()
        with Repository.open(str(path), wait=5):
            pass


def test_a_lock_of_the_repository_excludes_and_its_holder_is_told(path: Path) -> None:
    told: list[str] = []
    with Repository.open(str(path), write=True) as one, Repository.open(str(path), write=True) as other:
        with one.lock("publish") as waited:
            assert not waited
            with (
                pytest.raises(Busy, match=f"publish .* held by process {os.getpid()}"),
                other.lock("publish", 0.5, told.append),
            ):
                pass
        assert len(told) == 1 and f"process {os.getpid()}" in told[0]
        with other.lock("publish"):
            pass
        with other.lock("layer-x", keep=False):
            assert (path / ".composefs-oci/locks/layer-x").stat().st_mode & 0o777 == 0o600
        assert not (path / ".composefs-oci/locks/layer-x").exists()


def test_a_lock_whose_file_goes_while_it_is_waited_for_is_asked_for_again(path: Path) -> None:
    """Whoever held it removes the file in the end; a lock on a file without a name would exclude nobody."""
    with Repository.open(str(path), write=True) as one, Repository.open(str(path), write=True) as other:
        first = one.lock("layer-x", keep=False)
        first.__enter__()
        real = locks.acquire

        def late(fd: int, *arguments: Any) -> None:
            if os.fstat(fd).st_nlink and not ended:
                ended.append(first.__exit__(None, None, None))
            real(fd, *arguments)

        ended: list[Any] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(locks, "acquire", late)
            with other.lock("layer-x", keep=False):
                assert (path / ".composefs-oci/locks/layer-x").exists()
                with pytest.raises(Busy), one.lock("layer-x", 0.05):
                    pass


# --- what it costs
# --------------------------------------------------------------------------------------------------------------------


def test_the_directories_of_objects_are_opened_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    real = beneath.Root.open_directory

    def count(self: beneath.Root, path: str, *arguments: Any, **options: Any) -> int:
        opened.append(path)
        return real(self, path, *arguments, **options)

    monkeypatch.setattr(beneath.Root, "open_directory", count)
    with Repository.open(str(path), write=True) as repository:
        for number in range(1000):
            repository.objects.put(b"%100d" % number)
        opened.clear()
        for number in range(1000):
            repository.objects.put(b"%100d" % number)
        assert opened == []
        assert repository.objects.stats.present == 1000


def test_a_store_that_may_open_few_files_lets_go_of_directories(path: Path) -> None:
    def work() -> None:
        import resource

        # What the test run itself has open does not count.
        for fd in range(3, 4096):
            with contextlib.suppress(OSError):
                if not stat.S_ISFIFO(os.fstat(fd).st_mode):
                    os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
        with Repository.open(str(path), write=True) as repository:
            for number in range(500):
                repository.objects.put(b"%100d" % number)
            assert repository.objects.stats.new == 500

    assert as_user(os.geteuid(), work) == "fine"


def test_recovery_removes_marks_and_nothing_else(path: Path) -> None:
    """Every name in there but a mark of this collection is somebody else's."""
    imports = path / marks.IMPORTS
    keep = ["precious", "0123456789abcdeF", "0123456789abcdef0", ".hidden"]
    for name in keep:
        (imports / name).write_text('{"boot_id": "another", "pid": 1, "started": 0}')
    (imports / "0123456789abcdef").write_text('{"boot_id": "another", "pid": 1, "started": 0}')
    with Repository.open(str(path), write=True) as repository, repository.importing() as found:
        assert found.marks == 1 and len(found.warnings) == 3
    assert sorted(os.listdir(imports)) == sorted(keep)
