# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Every verb on a repository in which somebody else has planted things: it neither follows, nor waits, nor goes on
for ever, nor crashes.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fake_source import REGISTRY, Layout, World, settings
from filled_repository import copy_of, fill, make_layout

from ansible_collections.composefs.oci.plugins.module_utils.errors import (
    Busy,
    EngineError,
    FormatError,
    InternalError,
    TooLarge,
    UnsafeRepository,
)
from ansible_collections.composefs.oci.plugins.module_utils.formats import fsverity, splitstream
from ansible_collections.composefs.oci.plugins.module_utils.host import beneath, filesystem, processes
from ansible_collections.composefs.oci.plugins.module_utils.operations import (
    check,
    dump,
    journal,
    listing,
    makedelta,
    mounting,
    overview,
    prune,
    repair,
)
from ansible_collections.composefs.oci.plugins.module_utils.progress import Progress
from ansible_collections.composefs.oci.plugins.module_utils.pull import pull
from ansible_collections.composefs.oci.plugins.module_utils.source.skopeo import ProxyOptions
from ansible_collections.composefs.oci.plugins.module_utils.store import create, marks, proofs
from ansible_collections.composefs.oci.plugins.module_utils.store.repository import Repository

ATTACKER = 12345
root_only = pytest.mark.skipif(os.geteuid() != 0, reason="needs other users, which only root can be")


@pytest.fixture(autouse=True)
def nothing_hangs() -> Iterator[None]:
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(120)
    yield
    signal.alarm(0)


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Layout]:
    """A repository with everything in it that anybody makes, to be copied; and the images."""
    base = tmp_path_factory.mktemp("hostile")
    layout = make_layout(base / "layout")
    fill(base / "repo", layout)
    with Repository.open(str(base / "repo"), write=True) as repository:
        with repository.lock("publish"):
            pass
        check.check(repository, check.Wish(), Progress(), lambda _repository: [])
        images, _complaints = listing.list_images(repository, "a")
        repository.link_image_ref("composefs-oci/srv-app/x", bytes.fromhex(images[0]["image_id"]))
        lost = repository.objects.put(b"lost" * 50)
    kept = base / "repo/.composefs-oci/damaged"
    kept.mkdir()
    (kept / f"{lost.hex()}.0123abcd").write_bytes(b"damaged")
    (base / "repo" / marks.IMPORTS / ("0" * 16)).write_text('{"boot_id": "another", "pid": 1, "started": 0}')
    return base / "repo", layout


def first(directory: str, pattern: str = "*") -> Callable[[Path], Path]:
    return lambda path: sorted(one for one in (path / directory).glob(pattern) if one.name != "refs")[0]


PLACES: dict[str, Callable[[Path], Path]] = {
    "meta.json": lambda path: path / "meta.json",
    "objects": lambda path: path / "objects",
    "directory of objects": first("objects"),
    "object": first("objects", "*/*"),
    "streams": lambda path: path / "streams",
    "layer": first("streams", "oci-layer-*"),
    "manifest": first("streams", "oci-manifest-*"),
    "configuration": first("streams", "oci-config-*"),
    "refs": lambda path: path / "streams/refs",
    "tags": lambda path: path / "streams/refs/oci",
    "tag": lambda path: path / "streams/refs/oci/a",
    "images": lambda path: path / "images",
    "image": first("images"),
    "image references": lambda path: path / "images/refs",
    "keepers": lambda path: path / "images/refs/composefs-oci",
    "ours": lambda path: path / ".composefs-oci",
    **{
        name: (lambda path, name=name: path / ".composefs-oci" / name)
        for name in (
            "imports",
            "locks",
            "trusted",
            "names",
            "checks",
            "damaged",
        )
    },
    "mark": lambda path: path / marks.IMPORTS / ("0" * 16),
    "lock": lambda path: path / ".composefs-oci/locks/publish",
    "lock of recovery": lambda path: path / ".composefs-oci/locks/recovery",
    "proof": first(".composefs-oci/trusted"),
    "record": lambda path: path / ".composefs-oci/names/a.json",
    "last check": lambda path: path / ".composefs-oci/checks/last.json",
    "damaged thing": first(".composefs-oci/damaged"),
}


def as_socket(place: Path) -> None:
    # The path of a socket is short, whatever the directory is called.
    here = os.open(place.parent, os.O_PATH)
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(f"/proc/self/fd/{here}/{place.name}"[:107])
    finally:
        os.close(here)


def as_depths(place: Path) -> None:
    fd = os.open(place.parent, os.O_RDONLY)
    name = place.name
    for _depth in range(1500):
        os.mkdir(name, dir_fd=fd)
        inner = os.open(name, os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd, name = inner, "d"
    os.close(fd)


def as_sparse(place: Path) -> None:
    with place.open("wb") as file:
        file.truncate(8 << 40)


PLANTS: dict[str, Callable[[Path, Path], None]] = {
    "link": lambda place, victim: place.symlink_to(victim),
    "link to an endless file": lambda place, _victim: place.symlink_to("/dev/zero"),
    "FIFO": lambda place, _victim: os.mkfifo(place),
    "socket": lambda place, _victim: as_socket(place),
    "device": lambda place, _victim: os.mknod(place, 0o020666, os.makedev(1, 5)),
    "depths": lambda place, _victim: as_depths(place),
    "sparse file": lambda place, _victim: as_sparse(place),
    "garbage": lambda place, _victim: place.write_bytes(b"\x1b]0;x\x07\xff" * 300) and None,
}


def verbs(path: Path, layout: Layout) -> dict[str, Callable[[], object]]:
    """What modules do with a repository, those that change it last."""

    def opened(work: Callable[[Repository], object], write: bool = False) -> Callable[[], object]:
        def verb() -> object:
            with Repository.open(str(path), write=write, wait=5, unsafe=beneath.ACCEPT) as repository:
                return work(repository)

        return verb

    def image(repository: Repository) -> str:
        return mounting.resolve(repository, "a").hex()

    def mount(repository: Repository) -> None:
        with mounting.open_image(repository, bytes.fromhex(image(repository))):
            pass

    def delta(repository: Repository) -> object:
        source, target = (makedelta.find(repository, name) for name in ("a", "b"))
        shutil.rmtree(path.parent / "delta", ignore_errors=True)
        return makedelta.make(repository, source, target, str(path.parent / "delta"), 1, Progress())

    def copied(repository: Repository) -> object:
        shutil.rmtree(path.parent / "copy", ignore_errors=True)
        create.prepare(str(path.parent / "copy"), fsverity.SHA256, create.DISABLED)
        with Repository.open(str(path.parent / "copy"), write=True) as other:
            options = pull.Options(proxy=ProxyOptions(insecure_policy=True), parallel=1)
            return pull.pull_images(other, [pull.Request(f"composefs:{path}#a", "a")], options, Progress())

    def write(repository: Repository) -> None:
        with repository.importing(), repository.lock("publish", 5):
            digest = repository.objects.put(b"new" * 99)
            repository.register("oci-layer-sha256:" + "e" * 64, digest)
            repository.trust("sha256:" + "e" * 64, digest)
            repository.tag("again", repository.tag_digest("b") or "")

    def again(repository: Repository) -> object:
        requests = [pull.Request(REGISTRY + name, name) for name in ("a", "b")]
        return pull.pull_images(repository, requests, settings(), Progress())

    means = repair.Means(str(layout.path), pull.Options(proxy=ProxyOptions(insecure_policy=True), parallel=1))

    def nobody(_repository: Repository) -> list[object]:
        return []

    levels = {
        f"check {level}": opened(
            lambda repository, level=level: check.check(
                repository, check.Wish(level, parallel=1), Progress(), nobody, remember=False
            )
        )
        for level in check.LEVELS
    }
    return {
        "list": opened(listing.list_images),
        "describe": opened(overview.describe),
        "dump": opened(lambda repository: dump.dump(repository, image(repository))),
        "mount": opened(mount),
        "delta": opened(delta),
        "copy": opened(copied),
        **levels,
        "prune foretold": opened(lambda one: prune.prune(one, prune.Wish(keep_last=1), Progress(), True, nobody)),
        "repair foretold": opened(
            lambda one: repair.repair(one, check.Wish(check.FULL, parallel=1), means, Progress(), True, nobody)
        ),
        "write": opened(write, True),
        "pull": opened(again, True),
        "check": opened(lambda one: check.check(one, check.Wish(), Progress(), nobody), True),
        "repair": opened(
            lambda one: repair.repair(one, check.Wish(check.FULL, parallel=1), means, Progress(), False, nobody), True
        ),
        "prune": opened(
            lambda one: prune.prune(one, prune.Wish(remove=["b"], timeout=5), Progress(), False, nobody), True
        ),
    }


def cases() -> Iterator[tuple[str, str]]:
    """Everything everywhere takes a minute of processor. Without being asked for that each place gets the two worst,
    and one of the others.
    """
    others = [plant for plant in PLANTS if plant not in ("link", "FIFO")]
    for number, place in enumerate(PLACES):
        for plant in PLANTS:
            if os.environ.get("COMPOSEFS_OCI_LONG") or plant not in others or plant == others[number % len(others)]:
                yield place, plant


@pytest.mark.slow
@pytest.mark.parametrize(("place", "plant"), list(cases()))
def test_whatever_is_planted_no_verb_follows_it_waits_for_it_or_crashes(
    filled: tuple[Path, Layout],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
    place: str,
    plant: str,
) -> None:
    if plant == "device" and os.geteuid():
        pytest.skip("only root can make devices")
    monkeypatch.setattr(processes, "call", lambda what, function, **_more: function())
    World(filled[1]).install(monkeypatch)
    path = copy_of(filled[0], tmp_path / "repo")
    victim = tmp_path / "victim"
    shutil.copytree(path, victim, symlinks=True)
    before = {one: os.lstat(one) for one in victim.rglob("*")}
    where = PLACES[place](path)
    if where.is_dir() and not where.is_symlink():
        shutil.rmtree(where)
    elif os.path.lexists(where):
        where.unlink()
    target = victim / where.relative_to(path)
    request.addfinalizer(lambda: subprocess.run(["rm", "-rf", str(path)], check=True))  # too deep for Python
    PLANTS[plant](where, target if target.exists() else victim)
    if os.geteuid() == 0:
        for one in (path, where):
            os.lchown(one, ATTACKER, ATTACKER)
    for name, verb in verbs(path, filled[1]).items():
        started = time.monotonic()
        try:
            verb()
        except EngineError as error:
            assert not isinstance(error, InternalError), f"{name}: {error}"
        taken = time.monotonic() - started
        assert taken < 60, f"{name} took {taken:.0f} s"
    after = {one: os.lstat(one) for one in victim.rglob("*")}
    assert after.keys() == before.keys()
    for one, found in after.items():
        was = before[one]
        assert (found.st_mtime_ns, found.st_size, found.st_ino, found.st_mode) == (
            was.st_mtime_ns,
            was.st_size,
            was.st_ino,
            was.st_mode,
        ), one


# --- what is bounded by what lies there
# --------------------------------------------------------------------------------------------------------------------


def unfinished(path: Path, objects: int, size: int) -> None:
    """The mark of a dead import of another boot, and large objects that are nearly all holes."""
    (path / marks.IMPORTS).mkdir(parents=True, exist_ok=True)
    (path / marks.IMPORTS / ("f" * 16)).write_text('{"boot_id": "another", "pid": 1, "started": 0}')
    for number in range(objects):
        place = path / f"objects/{number:02x}" / ("a" * 62)
        place.parent.mkdir(parents=True, exist_ok=True)
        with place.open("wb") as file:
            file.truncate(size)
            file.write(b"x")


def test_recovery_reads_no_holes(tmp_path: Path) -> None:
    path = tmp_path / "repo"
    create.prepare(str(path), fsverity.SHA256, create.DISABLED)
    unfinished(path, 50, 8 << 40)
    started = time.monotonic()
    with Repository.open(str(path), write=True) as repository, repository.importing() as found:
        assert (found.marks, found.checked, found.removed) == (1, 50, 50)
    assert time.monotonic() - started < 120


def test_recovery_does_not_read_more_than_the_disk_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where files share blocks, a few of these make any number of bytes."""
    path = tmp_path / "repo"
    create.prepare(str(path), fsverity.SHA256, create.DISABLED)
    unfinished(path, 3, 4096)
    monkeypatch.setattr(filesystem, "size", lambda _fd: 1024)
    claims = pytest.raises(TooLarge, match="more bytes than their file system holds")
    with claims, Repository.open(str(path), write=True) as repository:
        repository.begin_import()
    assert (path / marks.IMPORTS / ("f" * 16)).exists(), "nothing is settled"


def test_the_proof_of_a_layer_reads_no_more_than_the_layer_has(tmp_path: Path) -> None:
    path = tmp_path / "repo"
    create.prepare(str(path), fsverity.SHA256, create.DISABLED)
    with Repository.open(str(path), write=True) as repository:
        digest = repository.objects.put(b"x" * 5000)
        writer = splitstream.Writer(fsverity.SHA256, splitstream.LAYER)
        writer.external(digest, 5000)
        stream = repository.objects.put_pieces(writer.finish())
        with (path / "objects" / fsverity.object_path(digest)).open("r+b") as file:
            file.truncate(8 << 40)
        started = time.monotonic()
        with repository.open_object_stream(stream) as opened, pytest.raises(FormatError, match="longer than the 5000"):
            proofs.tar_sha256(opened, repository.objects)
    assert time.monotonic() - started < 60


# --- owners
# --------------------------------------------------------------------------------------------------------------------


@root_only
def test_a_check_does_not_rely_on_a_directory_of_somebody_else(filled: tuple[Path, Layout], tmp_path: Path) -> None:
    """He changes objects between the two looks of a check and of whoever relies on it."""
    path = copy_of(filled[0], tmp_path / "repo")
    os.chown(first("objects")(path), ATTACKER, ATTACKER)
    for level in (check.OBJECTS, check.FULL):
        for parallel in (1, 2):
            with Repository.open(str(path)) as repository, pytest.raises(UnsafeRepository, match="belongs to"):
                check.check(repository, check.Wish(level, parallel=parallel), Progress(), lambda _repository: [])


def test_a_task_that_waits_for_a_mount_says_who_holds_its_lock(tmp_path: Path) -> None:
    places = journal.Places(library=str(tmp_path / "library"))
    with (
        journal.locked("/srv/app", places),
        pytest.raises(Busy, match=rf"changing this mount .*held by process {os.getpid()}"),
        journal.locked("/srv/app", places, wait=0.2),
    ):
        pass


def test_a_lock_of_a_mount_that_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    places = journal.Places(library=str(tmp_path / "library"))
    with journal.locked("/srv/app", places):
        pass
    journal.make_directories(places)
    os.mkfifo(f"{journal.file_of('/srv/app', places)}.lock")
    with pytest.raises(FormatError, match="not a regular file"), journal.locked("/srv/app", places, wait=1):
        pass
