# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What nothing keeps goes, everything else stays, and check mode says so before."""

from __future__ import annotations

import functools
import json
import os
import pathlib
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as hs

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from filled_repository import TAGS, copy_of, fill, make_layout

from ansible_collections.composefs.oci.plugins.module_utils.errors import (
    Busy,
    FormatError,
    IncompatibleJournal,
    IOFailed,
)
from ansible_collections.composefs.oci.plugins.module_utils.formats import fsverity
from ansible_collections.composefs.oci.plugins.module_utils.operations import check, keepers, prune
from ansible_collections.composefs.oci.plugins.module_utils.operations.journal import Places, boot_id
from ansible_collections.composefs.oci.plugins.module_utils.operations.keepers import Keeper
from ansible_collections.composefs.oci.plugins.module_utils.operations.prune import Pruned, Wish
from ansible_collections.composefs.oci.plugins.module_utils.progress import Progress
from ansible_collections.composefs.oci.plugins.module_utils.store import graph, imagestreams
from ansible_collections.composefs.oci.plugins.module_utils.store.repository import Repository


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[pathlib.Path]:
    """A repository with three images, of which each shares a layer with the next, and an artifact. To be copied."""
    base = tmp_path_factory.mktemp("filled")
    fill(base / "repo", make_layout(base / "layout"))
    yield base / "repo"


@pytest.fixture
def path(filled: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    return copy_of(filled, tmp_path / "repo")


def run(
    path: pathlib.Path, wish: Wish | None = None, *, check: bool = False, need: list[Keeper] | None = None
) -> Pruned:
    with Repository.open(str(path)) as repository:
        return prune.prune(repository, wish or Wish(), Progress(), check, lambda _repository: list(need or []))


def objects(path: pathlib.Path) -> set[str]:
    return {f"{one.parent.name}/{one.name}" for one in (path / "objects").glob("??/*")}


def everything(path: pathlib.Path) -> set[tuple[str, str]]:
    return {
        (str(one.relative_to(path)), os.readlink(one) if one.is_symlink() else "file")
        for one in path.rglob("*")
        if one.is_symlink() or one.is_file()
    }


def kept_objects(path: pathlib.Path) -> set[str]:
    with Repository.open(str(path)) as repository:
        found = graph.Graph.read(repository)
        return {fsverity.object_path(digest) for root in found.roots for digest in found.reaches(root)}


def image_id(path: pathlib.Path, name: str) -> str:
    with Repository.open(str(path)) as repository:
        from ansible_collections.composefs.oci.plugins.module_utils.operations import listing

        return str(listing.list_images(repository, name)[0][0]["image_id"])


def test_a_repository_in_which_everything_has_a_name_stays_as_it_is(path: pathlib.Path) -> None:
    before = everything(path)
    result = run(path)
    assert not result.changed and everything(path) == before and result.problems == [] and result.bytes == 0
    assert set(result.by_name) == set(TAGS)


@pytest.mark.slow
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(gone=hs.sets(hs.sampled_from(TAGS)), by_pattern=hs.booleans(), mounted=hs.sets(hs.sampled_from(TAGS[:3])))
def test_exactly_what_no_root_reaches_goes_and_check_mode_says_so_before(
    filled: pathlib.Path,
    tmp_path_factory: pytest.TempPathFactory,
    gone: set[str],
    by_pattern: bool,
    mounted: set[str],
) -> None:
    path = copy_of(filled, tmp_path_factory.mktemp("model") / "repo")
    need = [Keeper("mount", f"/srv/{name}", frozenset([image_id(path, name)])) for name in mounted]
    with Repository.open(str(path), write=True) as repository:
        found = graph.Graph.read(repository)
        held = gone & mounted if by_pattern else set()
        roots = [root for root in found.roots if root.name not in gone - held] + keepers.roots(found, need)
        live = {fsverity.object_path(digest) for root in roots for digest in found.reaches(root)}
        if not by_pattern:
            for name in gone:
                repository.untag(name)
    wish = Wish(remove=sorted(gone)) if by_pattern else Wish()
    before = everything(path)
    foretold = run(path, wish, check=True, need=need)
    assert everything(path) == before
    sizes = {name: (path / "objects" / name).stat().st_size for name in objects(path)}
    result = run(path, wish, need=need)
    assert result == foretold
    assert objects(path) == live and result.objects == len(sizes) - len(live)
    assert result.bytes == sum(size for name, size in sizes.items() if name not in live)
    assert result.names == (sorted(gone - held) if by_pattern else []) and result.held == sorted(held)
    assert not run(path, wish, need=need).changed
    # No link leads to nothing.
    assert [
        str(one) for one in path.rglob("*") if one.is_symlink() and "trusted" not in one.parts and not one.exists()
    ] == []


def test_what_each_name_would_free_by_itself_is_what_it_then_frees(path: pathlib.Path, tmp_path: pathlib.Path) -> None:
    with Repository.open(str(path), write=True) as repository:
        repository.tag("again", repository.tag_digest("artifact") or "")
    foretold = run(path, check=True).by_name
    assert foretold["artifact"] == foretold["again"] == 0 < foretold["a"]
    for name in (*TAGS, "again"):
        alone = copy_of(path, tmp_path / name)
        assert run(alone, Wish(remove=[name])).bytes == foretold[name], name


def test_patterns_spare_the_newest_the_young_the_kept_and_what_bootc_owns(path: pathlib.Path) -> None:
    with Repository.open(str(path), write=True) as repository:
        digest = repository.tag_digest("a") or ""
        for age, name in enumerate(("app:4", "app:3", "app:2", "app:1", "localhost/bootc-x", "other")):
            repository.tag(name, digest)
            link = path / "streams/refs/oci" / name.replace("/", "%2F")
            os.utime(link, (time.time() - age * 86400,) * 2, follow_symlinks=False)

    def names(**wish: Any) -> list[str]:
        return run(path, Wish(**wish), check=True).names

    assert names(remove=["app:*"]) == ["app:1", "app:2", "app:3", "app:4"]
    assert names(remove=["app:*"], keep_last=2) == ["app:1", "app:2"]
    assert names(remove=["app:*"], older_than=2.5 * 86400) == ["app:1"]
    assert names(remove=["app:*"], keep=["*:1"]) == ["app:2", "app:3", "app:4"]
    assert names(remove=["app:*", "other"], keep_last=1) == ["app:1", "app:2", "app:3"]
    assert names(remove=["localhost/*"]) == []
    assert names() == []


def test_names_that_a_mount_or_a_journal_uses_are_held(path: pathlib.Path) -> None:
    with Repository.open(str(path)) as repository:
        digest = repository.tag_digest("b") or ""
    need = [
        Keeper("mount", "/srv/a", frozenset([image_id(path, "a")])),
        Keeper("journal", "/srv/b", manifests=frozenset([digest])),
        Keeper("journal", "/srv/c", names=frozenset(["artifact"])),
    ]
    result = run(path, Wish(remove=["*"]), need=need)
    assert result.names == ["c"] and result.held == ["a", "artifact", "b"]


def test_what_is_mounted_stays_whole_without_any_name(path: pathlib.Path) -> None:
    image = image_id(path, "a")
    with Repository.open(str(path), write=True) as repository:
        needed = graph.image_objects(repository, bytes.fromhex(image))
        for name in TAGS:
            repository.untag(name)
    run(path, need=[Keeper("mount", "/srv/a", frozenset([image, "0" * 64, "f" * 128]))])
    assert objects(path) == {fsverity.object_path(digest) for digest in {*needed, bytes.fromhex(image)}}
    assert os.listdir(path / "images") == [image] and os.listdir(path / "streams") == ["refs"]


def damage(path: pathlib.Path, digest: bytes, how: str) -> None:
    victim = path / "objects" / fsverity.object_path(digest)
    if how == "missing":
        victim.unlink()
    else:
        raw = bytearray(victim.read_bytes())
        raw[len(raw) // 2] ^= 1
        victim.write_bytes(raw)


@pytest.mark.parametrize("how", ["missing", "flipped"])
@pytest.mark.parametrize("what", ["layer", "config", "manifest", "image"])
def test_what_may_be_needed_and_cannot_be_read_stops_before_the_first_removal(
    path: pathlib.Path, what: str, how: str
) -> None:
    with Repository.open(str(path), write=True) as repository:
        manifest = repository.tag_digest("b") or ""
        document = imagestreams.read(repository, imagestreams.MANIFEST, manifest)
        assert document is not None
        config = next(digest for name, digest in document.refs.items() if name.startswith("config:"))
        layer = next(digest for name, digest in document.refs.items() if not name.startswith("config:"))
        repository.untag("artifact")
    image = bytes.fromhex(image_id(path, "b"))
    victim = {"layer": layer, "config": config, "manifest": document.stream, "image": image}[what]
    damage(path, victim, how)
    before = everything(path)
    for foretell in (True, False):
        with pytest.raises(FormatError, match=victim.hex()):
            run(path, check=foretell)
    assert everything(path) == before
    # Without the name it is provably not needed.
    result = run(path, Wish(remove=["b"]) if what != "layer" else Wish(remove=["a", "b", "c"]))
    assert result.changed and "b" in result.names
    assert objects(path) == kept_objects(path)


def test_dangling_references_and_stray_files_are_told_and_stay(path: pathlib.Path) -> None:
    for name in ("streams/stray", "streams/refs/stray", "images/stray", "objects/00/stray", "objects/00/" + "z" * 62):
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text("stray")
    (path / "streams/refs/old").symlink_to("../sha256:" + "0" * 64)
    with Repository.open(str(path), write=True) as repository:
        repository.untag("artifact")
    result = run(path)
    assert result.changed and sorted(result.problems) == [
        ("dangling_reference", "streams/refs/old"),
        ("stray_file", "images/stray"),
        ("stray_file", "objects/00/stray"),
        ("stray_file", "objects/00/" + "z" * 62),
        ("stray_file", "streams/refs/stray"),
        ("stray_file", "streams/stray"),
    ]
    assert all(os.path.lexists(path / problem.path) for problem in result.problems)


def test_leftovers_of_crashed_writers_and_of_repairs_go(path: pathlib.Path) -> None:
    (path / "objects/.tmp-object-abcdefghijkl").write_bytes(b"x" * 1000)
    (path / ".symlink-abcdefghijkl").symlink_to("x")
    for name in (".composefs-oci/imports/.0123456789abcdef", ".composefs-oci/damaged/thing"):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(b"y" * 10)
    with Repository.open(str(path), write=True) as repository:
        digest = repository.stream(repository.streams(imagestreams.LAYER)[0]) or b""
        raw = repository.objects.put(b"what a replaced layer had" * 9)
        repository.register(imagestreams.KEPT + raw.hex(), raw)
        repository.register(imagestreams.PENDING + "sha256:" + "1" * 64, digest)
    result = run(path)
    assert result.bytes_by_kind["leftovers"] == 1010 and result.bytes_by_kind["damaged"] == 10
    # A second name of a stream that is needed costs nothing and is no harm.
    assert result.streams == [imagestreams.KEPT + raw.hex()] and result.bytes_by_kind["streams"] == 225
    assert not any("tmp-object" in name or ".symlink" in name or "damaged/" in name for name, _text in everything(path))
    assert not run(path).changed


def test_a_repository_in_use_is_busy_and_tells_who_uses_it(path: pathlib.Path) -> None:
    with Repository.open(str(path), write=True) as repository:
        repository.untag("a")
    code = "import fcntl,os,sys;fd=os.open(sys.argv[1],0);fcntl.flock(fd,fcntl.LOCK_SH);print('ok',flush=True);input()"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout and other.stdout.readline() == b"ok\n"
        before = everything(path)
        with pytest.raises(Busy, match=rf"held by process {other.pid} \(python"):
            run(path, Wish(timeout=0.1))
        assert everything(path) == before and run(path, check=True).changed
        other.communicate(b"\n")
    assert run(path, Wish(timeout=5)).changed


def test_what_others_name_while_it_waits_stays(path: pathlib.Path) -> None:
    """Between the first look and the lock somebody gives the dead image a name again."""
    with Repository.open(str(path), write=True) as repository:
        digest = repository.tag_digest("a") or ""
        repository.untag("a")
        repository.untag("artifact")
    opened = Repository.open(str(path), write=True)
    threading.Timer(0.3, lambda: (opened.tag("back", digest), opened.close())).start()  # type: ignore[func-returns-value]
    result = run(path, Wish(timeout=60))
    assert result.changed and len(result.streams) == 3  # of the artifact: manifest, configuration, blob
    assert objects(path) == kept_objects(path)
    with Repository.open(str(path)) as repository:
        assert repository.tag_digest("back") == digest


class Killed(Exception):
    pass


@pytest.mark.parametrize("at", [0, 1, 2, 5, 9, 13, 17, 20])
def test_cut_off_at_any_removal_it_leaves_no_link_to_nothing_and_the_next_run_ends_it(
    path: pathlib.Path, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.unlink
    calls = []

    def unlink(*arguments: Any, **more: Any) -> None:
        if len(calls) == at:
            raise Killed
        calls.append(arguments)
        real(*arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", unlink)
        with pytest.raises(Killed):
            run(path, Wish(remove=["a", "artifact"]))
    dangling = [one for one in path.rglob("*") if one.is_symlink() and "trusted" not in one.parts and not one.exists()]
    assert dangling == []
    with Repository.open(str(path)) as repository:
        assert check.check(repository, check.Wish(check.OBJECTS, (), 1), Progress(), lambda _one: []).findings == []
    with Repository.open(str(path)) as repository:
        found = graph.Graph.read(repository, prove=True)
        for root in found.roots:
            assert all(repository.objects.verify(digest) for digest in found.reaches(root))
    run(path, Wish(remove=["a", "artifact"]))
    assert objects(path) == kept_objects(path)


def test_many_objects_are_removed_by_several_processes_and_the_same_ones_are(
    path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    alone = copy_of(path, tmp_path / "alone")
    expected = run(alone, Wish(remove=["a"]))
    told, real = os.pipe(), prune._remove_objects

    def removing(*arguments: Any) -> int:
        os.write(told[1], b"%d " % os.getpid())
        return real(*arguments)

    monkeypatch.setattr(prune, "_MANY", expected.objects)
    monkeypatch.setattr(prune.processors, "usable", lambda: 2)
    monkeypatch.setattr(prune, "_remove_objects", removing)
    assert run(path, Wish(remove=["a"])) == expected
    assert objects(path) == objects(alone) == kept_objects(path)
    assert str(os.getpid()).encode() not in os.read(told[0], 1 << 16).split()
    for fd in told:
        os.close(fd)


def test_what_one_of_several_processes_cannot_remove_is_told_and_the_next_run_removes_it(
    path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent, real = os.getpid(), os.unlink

    def unlink(*arguments: Any, **more: Any) -> None:
        if os.getpid() != parent:
            raise OSError(5, "Input/output error")
        real(*arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(prune, "_MANY", 1)
        patch.setattr(prune.processors, "usable", lambda: 2)
        patch.setattr(os, "unlink", unlink)
        with pytest.raises(IOFailed, match=r"objects/[0-9a-f]{2}/[0-9a-f]+: Input/output error"):
            run(path, Wish(remove=["a"]))
    assert run(path).changed
    assert objects(path) == kept_objects(path)


@pytest.mark.parametrize(
    "name", ["A" * 62, " " * 62, "ab" * 30 + "a ", " " + "ab" * 30 + " ", "\u0660" * 62, "a" * 61, "a" * 63, "g" * 62]
)
def test_a_name_that_is_nearly_that_of_an_object_is_a_stray_file(path: pathlib.Path, name: str) -> None:
    assert all(len(one) == 65 for one in objects(path))
    stray = next((path / "objects").glob("??")) / name
    stray.touch()
    result = run(path, Wish(remove=["a"]))
    assert [(one.code, one.path) for one in result.problems] == [("stray_file", str(stray.relative_to(path)))]
    assert stray.exists() and objects(path) == kept_objects(path) | {f"{stray.parent.name}/{name}"}


# --- what the host needs
# --------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def places(tmp_path: pathlib.Path) -> Places:
    for name in ("units", "library/deployments"):
        (tmp_path / name).mkdir(parents=True)
    return Places(str(tmp_path / "units"), str(tmp_path / "library"), str(tmp_path / "running"))


def look(path: pathlib.Path, places: Places) -> list[Keeper]:
    with Repository.open(str(path)) as repository:
        return [keeper for keeper in keepers.keepers(repository, places) if keeper.kind != keepers.MOUNT]


def journal(places: Places, name: str = "srv-app", **values: Any) -> pathlib.Path:
    path = pathlib.Path(places.library, "deployments", f"{name}.json")
    path.write_text(json.dumps({"version": 1, "path": "/srv/app", "name": "app", "pending": None, **values}))
    return path


def test_current_previous_and_pending_of_a_journal_are_kept(path: pathlib.Path, places: Places) -> None:
    with Repository.open(str(path), write=True) as repository:
        digests = {name: repository.tag_digest(name) or "" for name in TAGS}
        for name in TAGS:
            repository.untag(name)
    journal(
        places,
        repository=str(path),
        current={"digest": digests["a"], "image_id": image_of(path, digests["a"])},
        previous=[{"digest": digests["artifact"], "image_id": "0" * 64}],
        pending={
            **dict.fromkeys(("who", "since", "deadline", "token"), ""),
            **{"digest": digests["c"], "image_id": "1" * 64, "from": None, "rollout": None, "boot": boot_id()},
        },
        pins=["app@x"],
    )
    journal(places, "elsewhere", repository="/elsewhere", current={"digest": digests["b"], "image_id": "2" * 64})
    (pathlib.Path(places.library) / "deployments/srv-app.json~").write_text("an older one, and broken")
    need = look(path, places)
    assert [(keeper.place, sorted(keeper.names)) for keeper in need] == [("/srv/app", ["app", "app@x"])]
    run(path, need=need)
    with Repository.open(str(path)) as repository:
        left = {name[len(imagestreams.MANIFEST) :] for name in repository.streams(imagestreams.MANIFEST)}
    assert left == {digests["a"], digests["artifact"], digests["c"]}


TRIAL = {**dict.fromkeys(("who", "since", "deadline", "token"), ""), "from": None, "rollout": None}


def test_an_image_on_trial_is_kept_in_the_repository_that_it_lies_in(
    path: pathlib.Path, places: Places, tmp_path: pathlib.Path
) -> None:
    """What is current lies in one repository, and what is on trial comes from another."""
    elsewhere = copy_of(path, tmp_path / "elsewhere")
    with Repository.open(str(path)) as repository:
        digests = {name: repository.tag_digest(name) or "" for name in TAGS}
    current, trial = image_of(path, digests["a"]), image_of(path, digests["c"])
    journal(
        places,
        repository=str(elsewhere),
        current={"digest": digests["a"], "image_id": current},
        pending={
            **TRIAL,
            **{"digest": digests["c"], "image_id": trial, "from": current, "boot": boot_id()},
            **{"repository": str(path), "name": "trial"},
        },
    )
    here, there = look(path, places), look(elsewhere, places)
    assert [(one.images, one.manifests, one.names) for one in here] == [({trial}, {digests["c"]}, {"trial"})]
    assert [(one.images, one.manifests, one.names) for one in there] == [({current}, {digests["a"]}, {"app"})]
    assert run(path, Wish(remove=["*"]), need=here).held == ["c"]
    assert run(elsewhere, Wish(remove=["*"]), need=there).held == ["a"]


def test_what_a_mount_of_an_earlier_boot_left_goes_and_its_journal_with_it(path: pathlib.Path, places: Places) -> None:
    with Repository.open(str(path), write=True) as repository:
        digests = {name: repository.tag_digest(name) or "" for name in TAGS}
        images = {name: image_of(path, digests[name]) for name in ("a", "b", "c")}
        for pin in ("app@a", "app@b", "app@c", "shared"):
            repository.tag(pin, digests[pin[-1]] if pin != "shared" else digests["artifact"])
        for name in ("a", "b", "c"):
            repository.link_image_ref(f"composefs-oci/srv-{name}/{images[name]}", bytes.fromhex(images[name]))
            repository.untag(name)
        repository.untag("artifact")
    ended = journal(
        places,
        "srv-a",
        path="/srv/a",
        repository=str(path),
        boot="another",
        current={"digest": digests["a"], "image_id": images["a"]},
        pins=["app@a", "shared"],
    )
    here = journal(
        places,
        "srv-b",
        path="/srv/b",
        repository=str(path),
        boot=boot_id(),
        current={"digest": digests["b"], "image_id": images["b"]},
        pins=["app@b", "shared"],
    )
    tried = journal(
        places,
        "srv-c",
        path="/srv/c",
        repository=str(path),
        pending={**TRIAL, "digest": digests["c"], "image_id": images["c"], "boot": "another", "rollout": "r1"},
        pins=["app@c"],
    )
    for dry in (True, False):
        with Repository.open(str(path)) as repository:
            result = prune.prune(
                repository,
                Wish(),
                Progress(),
                dry,
                lambda repository: [one for one in keepers.keepers(repository, places) if one.kind != keepers.MOUNT],
                lambda found: keepers.settle(found, places),
            )
        assert result.names == ["app@a", "app@c"] and result.changed
        assert result.links == [f"images/refs/composefs-oci/srv-{name}/{images[name]}" for name in ("a", "c")]
        assert ended.exists() is dry
    with Repository.open(str(path)) as repository:
        assert set(repository.tags()) == {"app@b", "shared"}
        assert repository.image_refs("composefs-oci/srv-a") == repository.image_refs("composefs-oci/srv-c") == {}
        assert repository.image_refs("composefs-oci/srv-b") != {}
        left = {name[len(imagestreams.MANIFEST) :] for name in repository.streams(imagestreams.MANIFEST)}
    assert left == {digests["b"], digests["artifact"]}
    assert here.exists() and not pathlib.Path(places.library, "deployments/srv-a.json.lock").exists()
    # What became of a rollout is told for long.
    told = json.loads(tried.read_text())
    assert told["pending"] is None and [one["result"] for one in told["history"]] == ["reverted"] and not told["pins"]
    assert not run(path, need=look(path, places)).changed


def image_of(path: pathlib.Path, digest: str) -> str:
    from ansible_collections.composefs.oci.plugins.module_utils.operations import listing

    with Repository.open(str(path)) as repository:
        return str(listing.list_images(repository, digest=digest)[0][0]["image_id"])


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"version": 1}',
        '{"version": 1, "path": "/srv", "repository": "REPO", "current": 5}',
        '{"version": 2, "path": "/srv", "repository": "REPO"}',
    ],
)
def test_a_journal_that_cannot_be_understood_stops_everything(path: pathlib.Path, places: Places, text: str) -> None:
    journal(places).write_text(text.replace("REPO", str(path)))
    with pytest.raises(IncompatibleJournal, match=r"srv-app.json"):
        look(path, places)


def test_units_of_this_repository_are_kept(path: pathlib.Path, places: Places) -> None:
    for number, repository in enumerate((str(path), "/elsewhere")):
        pathlib.Path(places.units, f"composefs-oci-x{number}.service").write_text(
            f"[X-Composefs]\nPath=/srv/x{number}\nRepository={repository}\nImage={'a' * 64}\n"
        )
    assert [(keeper.place, keeper.images) for keeper in look(path, places)] == [
        ("composefs-oci-x0.service", frozenset(["a" * 64]))
    ]


def test_images_in_the_list_of_mounts_are_recognised_however_they_are_written() -> None:
    image = "ab" * 32
    for line in (
        f"36 35 0:50 / /srv ro - overlay composefs:{image} ro,lowerdir+=/x",
        f"36 35 7:0 / /srv ro - erofs /sysroot/composefs/images/{image} ro",
        f"36 35 7:0 / /srv ro - erofs /sysroot/composefs/objects/{image[:2]}/{image[2:]} ro",
    ):
        found = keepers._images_in(line)
        assert found == {image}
    assert keepers._images_in("36 35 0:50 / /a ro - overlay overlay lowerdir=/x/" + "c" * 65) == set()


def test_a_name_from_the_future_counts_as_young_only_where_age_is_asked_for(path: pathlib.Path) -> None:
    """As after a clock that was wrong."""
    os.utime(path / "streams/refs/oci/a", (time.time() + 1e6,) * 2, follow_symlinks=False)
    assert run(path, Wish(remove=["a"], older_than=10), check=True).names == []
    assert run(path, Wish(remove=["a"]), check=True).names == ["a"]


def test_of_names_of_one_instant_as_many_stay_as_are_asked_for(path: pathlib.Path) -> None:
    with Repository.open(str(path), write=True) as repository:
        digest = repository.tag_digest("a") or ""
        for name in ("e1", "e2", "e3"):
            repository.tag(name, digest)
            os.utime(path / f"streams/refs/oci/{name}", (1000, 1000), follow_symlinks=False)
    for count in range(4):
        assert len(run(path, Wish(remove=["e*"], keep_last=count), check=True).names) == 3 - count


def test_patterns_match_names_of_any_characters(path: pathlib.Path) -> None:
    names = ("x[1]", "x*", "a/b%2F", "new\nline", "büro", " sp ", "-dash")
    with Repository.open(str(path), write=True) as repository:
        for name in names:
            repository.tag(name, repository.tag_digest("a") or "")
    for pattern, name in zip(("x[[]1]", "x[*]", "*%2F", "new\n*", "b?ro", " *", "-*"), names):
        assert run(path, Wish(remove=[pattern]), check=True).names == [name]


def test_what_is_no_directory_of_objects_is_told_and_stays(path: pathlib.Path) -> None:
    missing = next(f"{first:02x}" for first in range(256) if not (path / f"objects/{first:02x}").exists())
    os.mkfifo(path / "objects" / missing)
    os.mkfifo(path / "streams/fifo")
    result = run(path, Wish(remove=["a"]))
    assert result.objects and {(one.code, one.path) for one in result.problems} == {
        ("stray_file", f"objects/{missing}"),
        ("stray_file", "streams/fifo"),
    }
    assert (path / "objects" / missing).exists() and not run(path).changed


def test_how_far_it_is_is_told_as_it_goes(path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(Progress, "message", lambda _self, text: said.append(text))
    moments = iter(range(100_000))
    monkeypatch.setattr(prune, "Countdown", functools.partial(prune.Countdown, clock=lambda: next(moments)))
    count = run(path, Wish(remove=["*"])).objects
    assert "Working out what is kept: 25%, 192 s left" in said and "Working out what is kept: 100%" in said
    removing = [text for text in said if text.startswith("Removing objects: ")]
    assert removing[-1] == f"Removing objects: {count} of {count}" and all(" s left" in text for text in removing[:-1])
