# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Pulls as a whole, from a source that is made up: accounts, order, errors, and what is left behind."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import shutil
import socket
import sys
import threading
import warnings
from typing import Any

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from fake_source import REGISTRY, Events, Layout, World, pull_all, settings
from ociimage import sha256

from ansible_collections.composefs.oci.plugins.module_utils.formats import fsverity
from ansible_collections.composefs.oci.plugins.module_utils.host import filesystem, processes, processors
from ansible_collections.composefs.oci.plugins.module_utils.pull import fetch, foretelling, pull
from ansible_collections.composefs.oci.plugins.module_utils.store import create, namerecords
from ansible_collections.composefs.oci.plugins.module_utils.errors import (
    AuthFailed,
    EngineError,
    ImageNotFound,
    InvalidReference,
    MissingLibrary,
    NoSpace,
    ReadOnly,
    RegistryUnreachable,
    Stalled,
)
from ansible_collections.composefs.oci.plugins.module_utils.progress import SKIPPED, Progress
from ansible_collections.composefs.oci.plugins.module_utils.pull.results import ImageResult
from ansible_collections.composefs.oci.plugins.module_utils.store.repository import Repository
from ansible_collections.composefs.oci.tests.support.tarbytes import DIRECTORY, member, tar

FIRST = tar(member("usr/", type=DIRECTORY), member("usr/one", b"1" * 300))
SECOND = tar(member("usr/two", b"2" * 3000), member("usr/three", b"3" * 200))
THIRD = tar(member("usr/four", b"4" * 500))
GONE = RegistryUnreachable(f"Opening {REGISTRY}app: skopeo says: connection refused.", "Check the network.")


@pytest.fixture
def world(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> World:
    layout = Layout(tmp_path / "layout")
    layout.image([FIRST, SECOND], "app")
    layout.image([FIRST, THIRD], "web")
    layout.image([FIRST, SECOND, FIRST], "twice")
    layout.image([], "scratch")
    layout.image([layout.layer(FIRST), layout.layer(b"", "none")], "empty")
    monkeypatch.setattr(processes, "call", lambda what, function: function())
    return World(layout).install(monkeypatch)


@pytest.fixture
def path(tmp_path: pathlib.Path) -> pathlib.Path:
    create.prepare(str(tmp_path / "repo"), fsverity.SHA256, "disabled")
    return tmp_path / "repo"


class ThreadWorker(fetch.Worker):
    """A worker that is a thread of this process."""

    def __init__(self, objects: Any, algorithm: Any, timeout: float, siblings: Any, sources: Any, budget: Any) -> None:
        self._what = "imports layers"
        self.connection, self._theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._thread = threading.Thread(
            target=fetch._serve, args=(self._theirs, objects, algorithm, timeout, sources, budget), daemon=True
        )
        self._thread.start()

    def close(self, grace: float = 0.0) -> None:
        self.connection.close()
        self._thread.join()
        self._theirs.close()


@pytest.fixture
def without_forks(monkeypatch: pytest.MonkeyPatch) -> None:
    """For what another process could not see, such as a kernel that is made up."""
    monkeypatch.setattr(fetch, "Worker", ThreadWorker)
    monkeypatch.setattr(processors, "usable", lambda: 1)


def app(tag: str = "app", name: str = "", **others: str) -> pull.Request:
    return pull.Request(REGISTRY + tag, name or tag, **others)


def size(world: World, archive: bytes) -> int:
    return int(world.layout.layer(archive).descriptor["size"])


# --- accounts
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("check", [True, False])
def test_a_layer_that_several_images_lack_is_fetched_and_counted_with_the_first(
    path: pathlib.Path, world: World, check: bool
) -> None:
    one, other = pull_all(path, app(), app("web"), check=check)
    assert one["stats"]["bytes_fetched"] == size(world, FIRST) + size(world, SECOND) and other["stats"][
        "bytes_fetched"
    ] == size(world, THIRD)
    assert [layer["bytes_to_fetch"] for layer in one["layers"]] == [size(world, FIRST), size(world, SECOND)]
    assert [layer["bytes_to_fetch"] for layer in other["layers"]] == [0, size(world, THIRD)]
    assert f"oci-layer-{sha256(FIRST)}" in one["streams"] and f"oci-layer-{sha256(FIRST)}" not in other["streams"]
    assert [layer["status"] for layer in other["layers"]] == ["new", "new"]
    assert len(world.fetched()) == (0 if check else 3)


@pytest.mark.parametrize("check", [True, False])
def test_a_layer_that_occurs_twice_is_fetched_once_and_counted_once(
    path: pathlib.Path, world: World, check: bool
) -> None:
    (done,) = pull_all(path, app("twice"), check=check)
    assert [layer["bytes_to_fetch"] for layer in done["layers"]] == [size(world, FIRST), size(world, SECOND), 0]
    assert done["stats"]["layers"] == 3 and done["stats"]["bytes_fetched"] == sum(
        layer["bytes_to_fetch"] for layer in done["layers"]
    )
    assert done["stats"]["layers_already_present"] == 0 and len(set(done["streams"])) == len(done["streams"]) == 4
    again = pull_all(path, app("twice"), check=check)[0]
    assert again["changed"] == check and again["stats"]["layers_already_present"] == (0 if check else 2)


def test_the_same_reference_under_two_names_is_one_image(path: pathlib.Path, world: World) -> None:
    one, other = pull_all(path, app(name="a"), app(name="b"))
    assert one["changed"] and other["changed"] and other["streams"] == [] and other["stats"]["bytes_fetched"] == 0
    assert one["digest"] == other["digest"] and one["image_id"] == other["image_id"]


def test_figures_add_up(path: pathlib.Path, world: World) -> None:
    (done,) = pull_all(path, app())
    stats = done["stats"]
    assert stats["objects_copied"] == 3 and stats["bytes_copied"] == 3500
    assert stats["bytes_copied"] + stats["bytes_inlined"] == len(FIRST) + len(SECOND)
    assert set(stats["seconds"]) == {"resolve", "fetch", "register", "total"} and stats["retries"] == 0
    assert set(pull_all(path, app())[0]["stats"]["seconds"]) == {"resolve", "total"}


def test_retries_are_counted(path: pathlib.Path, world: World) -> None:
    world.opening = [GONE]
    world.blobs[str(world.layout.layer(FIRST).descriptor["digest"])] = [GONE]
    assert pull_all(path, app(), parallel=1)[0]["stats"]["retries"] == 2


def test_every_result_has_the_same_shape(path: pathlib.Path, world: World) -> None:
    results = [
        pull_all(path, app(), check=True)[0],
        pull_all(path, app())[0],
        pull_all(path, app())[0],
        pull_all(path, app(), policy=pull.MISSING)[0],
    ]
    with Repository.open(str(path)) as repository:
        results += [pull.forget(repository, app(), check=check).result.values() for check in (True, False)]
        results += [foretelling.foretell(repository, app()).result.values(), ImageResult().values()]
    shapes = [(set(result) - {"warnings", "changed"}, set(result["stats"])) for result in results]
    assert all(shape == shapes[0] for shape in shapes)
    json.dumps(results)


# --- images of all kinds
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tag", ["scratch", "empty", "twice"])
def test_odd_images_are_pulled_and_come_to_rest(path: pathlib.Path, world: World, tag: str) -> None:
    (predicted,) = pull_all(path, app(tag), check=True)
    (done,) = pull_all(path, app(tag))
    assert predicted["streams"] == done["streams"] and done["image_id"]
    assert not pull_all(path, app(tag))[0]["changed"]


def test_secure_repositories_seal_everything(
    tmp_path: pathlib.Path, world: World, verity_kernel: Any, without_forks: None
) -> None:
    path = tmp_path / "secure"
    create.prepare(str(path), fsverity.SHA256, "required")
    (done,) = pull_all(path, app())
    assert done["image_id"] and not pull_all(path, app())[0]["changed"]
    objects = list((path / "objects").glob("*/*"))
    assert len(objects) > 5 and all(verity_kernel.is_sealed(str(one)) for one in objects if one.stat().st_size != 0)
    assert not (path / ".composefs-oci/imports").exists(), "what is sealed needs no marks of unfinished imports"


def test_an_unsealed_object_in_a_secure_repository_is_replaced(
    tmp_path: pathlib.Path, world: World, verity_kernel: Any, without_forks: None
) -> None:
    path = tmp_path / "secure"
    create.prepare(str(path), fsverity.SHA256, "required")
    (first,) = pull_all(path, app())
    victim = next(
        one for one in (path / "objects").glob("*/*") if one.read_bytes() == world.layout.read(first["digest"])
    )
    verity_kernel.sealed.pop((victim.stat().st_dev, victim.stat().st_ino))
    (done,) = pull_all(path, app())
    assert verity_kernel.is_sealed(str(victim)) and done["streams"] == ["oci-manifest-" + first["digest"]]
    assert not pull_all(path, app())[0]["changed"]


def test_a_repository_whose_objects_are_gone_is_filled_again(path: pathlib.Path, world: World) -> None:
    (first,) = pull_all(path, app())
    shutil.rmtree(path / "objects")
    (predicted,) = pull_all(path, app(), check=True)
    assert not (path / "objects").exists(), "check mode makes nothing"
    (done,) = pull_all(path, app())
    assert predicted["streams"] == done["streams"] == first["streams"] and done["image_id"] == first["image_id"]


# --- what is refused, and in which words
# -----------------------------------------------------------------------------------------------------


def test_a_missing_zstd_library_is_named_before_anything_is_asked(
    path: pathlib.Path, world: World, hide_zstd: Any
) -> None:
    hide_zstd()
    for check in (True, False):
        with pytest.raises(MissingLibrary, match=r"zstd library.*composefs\.oci\.skopeo"):
            pull_all(path, app(), check=check)
    assert world.proxies == [] and sorted(os.listdir(path)) == ["meta.json"]


def test_a_name_can_go_without_a_zstd_library(path: pathlib.Path, world: World, hide_zstd: Any) -> None:
    (done,) = pull_all(path, app())
    hide_zstd()
    with Repository.open(str(path)) as repository:
        assert pull.forget(repository, app(), check=False).result.previous_digest == done["digest"]
        assert repository.tags() == {}


@pytest.mark.parametrize(
    "reference",
    [
        "docker://user:hunter2@registry.test/app",
        "user:hunter2@registry.test/app:1",
        "https://user:hunter2@registry.test/app",
    ],
)
def test_a_password_in_a_reference_is_not_repeated(path: pathlib.Path, world: World, reference: str) -> None:
    with pytest.raises(InvalidReference) as caught:
        pull_all(path, pull.Request(reference, "x"))
    assert "hunter2" not in str(caught.value) and "hunter2" not in str(caught.value.__cause__)


def test_a_reference_is_named_once_in_an_error(path: pathlib.Path, world: World) -> None:
    with pytest.raises(ImageNotFound) as caught:
        pull_all(path, app("nowhere"))
    assert (
        str(caught.value)
        == f"Opening {REGISTRY}nowhere: skopeo says: reading manifest: manifest unknown. Check the name, the tag and the path."
    )


def test_an_error_that_does_not_name_the_reference_gets_it(path: pathlib.Path, world: World) -> None:
    world.opening = [AuthFailed("The user name is empty.", "Give both.")]
    with pytest.raises(AuthFailed) as caught:
        pull_all(path, app())
    assert str(caught.value) == f"Looking up {REGISTRY}app: The user name is empty. Give both."


def test_an_operating_system_error_while_looking_up_is_an_engine_error(
    path: pathlib.Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> Any:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(pull.planning, "look_up", fail)
    with pytest.raises(EngineError, match=f"Looking up {REGISTRY}app: Input/output error"):
        pull_all(path, app())


def test_the_same_name_twice_is_refused_before_anything_is_asked(path: pathlib.Path, world: World) -> None:
    with pytest.raises(InvalidReference, match="'x' is asked for twice"):
        pull_all(path, app(name="x"), app("web", "x"))
    assert world.proxies == []


@pytest.mark.parametrize("name", ["@x", "", ".", "..", "n" * 256, "a\0b", "\udcff"])
def test_names_that_cannot_be_are_refused_before_anything_is_asked(path: pathlib.Path, world: World, name: str) -> None:
    with pytest.raises(InvalidReference):
        pull_all(path, pull.Request(REGISTRY + "app", name))
    assert world.proxies == []


def test_too_little_space_is_seen_before_anything_is_fetched(
    path: pathlib.Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs = size(world, FIRST) + size(world, SECOND)
    monkeypatch.setattr(Repository, "free_space", lambda repository: (needs - 1, 10))
    with pytest.raises(NoSpace, match=rf"need at least {needs} bytes .*has {needs - 1} bytes"):
        pull_all(path, app())
    monkeypatch.setattr(Repository, "free_space", lambda repository: (needs, 3))
    with pytest.raises(NoSpace, match=r"need at least 4 inodes.*has 3 free"):
        pull_all(path, app())
    assert world.fetched() == []
    # As they are compressed they fit, and what they unpack to does not.
    monkeypatch.setattr(Repository, "free_space", lambda repository: (needs, None))
    with pytest.raises(NoSpace, match="were free"):
        pull_all(path, app())
    monkeypatch.setattr(Repository, "free_space", lambda repository: (1 << 30, None))
    assert pull_all(path, app())[0]["changed"]


def test_a_repository_that_cannot_be_written_is_refused_before_anything_is_fetched(
    path: pathlib.Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any) -> None:
        raise ReadOnly("The repository is on a read-only file system.")

    monkeypatch.setattr(filesystem, "require_writable", refuse)
    assert pull_all(path, app(), check=True)[0]["changed"]
    with pytest.raises(ReadOnly):
        pull_all(path, app())
    assert world.fetched() == []


# --- where a name came from
# --------------------------------------------------------------------------------------------------------------------


def records(path: pathlib.Path) -> dict[str, namerecords.NameRecord]:
    with Repository.open(str(path)) as repository:
        return namerecords.records(repository)


def test_missing_is_content_with_the_same_reference_only(path: pathlib.Path, world: World) -> None:
    (first,) = pull_all(path, app(name="x"))
    asked = len(world.requests)
    (same,) = pull_all(path, app(name="x"), policy=pull.MISSING)
    assert not same["changed"] and len(world.requests) == asked
    (bumped,) = pull_all(path, app("web", name="x"), policy=pull.MISSING)
    assert bumped["changed"] and bumped["digest"] != first["digest"] == bumped["previous_digest"]
    assert records(path)["x"].ref == REGISTRY + "web"


def test_missing_with_a_bumped_tag_of_the_same_image_remembers_it_and_changes_nothing(
    path: pathlib.Path, world: World
) -> None:
    world.layout.image([FIRST, SECOND], "app2")
    (first,) = pull_all(path, app(name="x"))
    (bumped,) = pull_all(path, app("app2", name="x"), policy=pull.MISSING, check=True)
    assert not bumped["changed"] and records(path)["x"].ref == REGISTRY + "app"
    (bumped,) = pull_all(path, app("app2", name="x"), policy=pull.MISSING)
    assert not bumped["changed"] and bumped["digest"] == first["digest"] and records(path)["x"].ref == REGISTRY + "app2"
    asked = len(world.requests)
    pull_all(path, app("app2", name="x"), policy=pull.MISSING)
    assert len(world.requests) == asked


def test_missing_is_content_with_any_name_that_has_no_record(path: pathlib.Path, world: World) -> None:
    (first,) = pull_all(path, app(name="x"))
    shutil.rmtree(path / ".composefs-oci/names")
    asked = len(world.requests)
    (again,) = pull_all(path, app("web", name="x"), policy=pull.MISSING)
    assert not again["changed"] and again["digest"] == first["digest"] and len(world.requests) == asked


@pytest.mark.parametrize("remembered", [True, False])
def test_a_digest_in_the_reference_counts_like_digest(path: pathlib.Path, world: World, remembered: bool) -> None:
    (web,) = pull_all(path, app("web"))
    (first,) = pull_all(path, app(name="x"))
    if not remembered:
        shutil.rmtree(path / ".composefs-oci/names")
    asked = len(world.requests)
    (same,) = pull_all(path, app(f"app@{first['digest']}", name="x"), policy=pull.MISSING)
    assert not same["changed"] and len(world.requests) == asked
    (other,) = pull_all(path, app(f"web@{web['digest']}", name="x"), policy=pull.MISSING)
    assert other["changed"] and other["digest"] == web["digest"]
    world.opening = [GONE] * 9
    world.index_failure = GONE
    with pytest.raises(RegistryUnreachable):
        pull_all(path, app(f"app@{first['digest']}", name="x"), policy=pull.NEWER)


def test_no_name_gets_a_record_in_check_mode_or_from_a_run_that_fails(
    path: pathlib.Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    pull_all(path, app(), check=True)
    world.blobs[str(world.layout.layer(SECOND).descriptor["digest"])] = [AuthFailed("denied")]
    with pytest.raises(AuthFailed):
        pull_all(path, app())
    assert records(path) == {} and not (path / ".composefs-oci/names").exists()


def test_an_older_default_name_is_moved(path: pathlib.Path, world: World) -> None:
    bare = REGISTRY[len("docker://") :] + "app"
    (first,) = pull_all(path, app(name=bare))
    request = app(name=REGISTRY + "app", former=(bare,))
    for check, policy in ((True, pull.ALWAYS), (True, pull.MISSING), (False, pull.MISSING)):
        (moved,) = pull_all(path, request, check=check, policy=policy)
        assert moved["changed"] and moved["digest"] == first["digest"] == moved["previous_digest"]
        assert moved["streams"] == []
    assert bare in moved["warnings"][0]
    assert list(records(path)) == [REGISTRY + "app"], "with its record"
    with Repository.open(str(path)) as repository:
        assert list(repository.tags()) == [REGISTRY + "app"]
    (again,) = pull_all(path, request)
    assert not again["changed"] and again["warnings"] == []


def test_a_name_of_both_forms_is_left_alone(path: pathlib.Path, world: World) -> None:
    bare = REGISTRY[len("docker://") :] + "app"
    pull_all(path, app("web", name=bare), app(name=REGISTRY + "app"))
    (again,) = pull_all(path, app(name=REGISTRY + "app", former=(bare,)))
    assert not again["changed"]
    with Repository.open(str(path)) as repository:
        assert sorted(repository.tags()) == [REGISTRY + "app", bare]


def test_a_name_goes_with_its_record(path: pathlib.Path, world: World) -> None:
    pull_all(path, app(name="x"))
    with Repository.open(str(path)) as repository:
        pull.forget(repository, pull.Request("", "x"), check=True)
        assert list(namerecords.records(repository)) == ["x"]
        assert pull.forget(repository, pull.Request("", "y", former=("x",)), check=False).changed
        assert namerecords.strays(repository) == [] and repository.tags() == {}


# --- what is said of an image, and what cannot be known
# --------------------------------------------------------------------------------------------------------------------


def test_an_image_says_what_it_is(path: pathlib.Path, world: World) -> None:
    world.layout.image([FIRST], "labelled", labels={"org.opencontainers.image.version": "1.4", "a": "b"}, variant="v8")
    world.layout.artifact([("text/plain", b"an artifact " * 30)], "artifact")
    for check in (True, False):
        image, artifact = pull_all(path, app("labelled"), app("artifact"), check=check)
        assert (image["kind"], image["version"], image["labels"]["a"]) == ("container", "1.4", "b")
        assert image["platform"].startswith("linux/") and image["created"]
        assert artifact["kind"] == "artifact" and artifact["version"] is artifact["platform"] is None


def test_check_mode_does_not_pretend_to_know_what_is_in_a_layer(path: pathlib.Path, world: World) -> None:
    unknown = ("objects_copied", "objects_already_present", "bytes_copied", "bytes_inlined")
    (predicted,) = pull_all(path, app(), check=True)
    assert [predicted["stats"][key] for key in unknown] == [None] * 4
    assert predicted["stats"]["bytes_fetched"] == size(world, FIRST) + size(world, SECOND)
    pull_all(path, app())
    (settled,) = pull_all(path, app(), check=True)
    assert [settled["stats"][key] for key in unknown] == [0] * 4, "there is no layer to import"
    one, other = pull_all(path, app("web", name="a"), app("web", name="b"), check=True)
    assert one["stats"]["objects_copied"] is None and other["stats"]["objects_copied"] == 0


def test_check_mode_foretells_a_full_disk(path: pathlib.Path, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Repository, "free_space", lambda repository: (10, None))
    with pytest.raises(NoSpace):
        pull_all(path, app(), check=True)
    monkeypatch.undo()


# --- a registry that is gone
# -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error", [GONE, Stalled(f"Opening {REGISTRY}app: no answer for 60 seconds.", "Raise the timeout.")]
)
def test_newer_leaves_what_is_there_with_a_warning(path: pathlib.Path, world: World, error: EngineError) -> None:
    (first,) = pull_all(path, app(name="x"))
    world.opening = [error] * 3
    (again,) = pull_all(path, app(name="x"), policy=pull.NEWER)
    assert not again["changed"] and again["digest"] == first["digest"]
    (warning,) = again["warnings"]
    assert error.message in warning and "'x' is left as it is" in warning
    assert world.opening == [], "after the retries"


def test_newer_needs_something_that_is_there_and_right(path: pathlib.Path, world: World) -> None:
    world.opening = [GONE] * 9
    with pytest.raises(RegistryUnreachable):
        pull_all(path, app(), policy=pull.NEWER)
    world.opening = []
    pull_all(path, app())
    world.opening = [GONE] * 9
    with pytest.raises(RegistryUnreachable):
        pull_all(path, app(digest="sha256:" + "0" * 64), policy=pull.NEWER)
    with pytest.raises(RegistryUnreachable):
        pull_all(path, app(platform="linux/s390x"), policy=pull.NEWER)


def test_newer_does_not_hide_that_an_image_is_gone_or_forbidden(path: pathlib.Path, world: World) -> None:
    pull_all(path, app())
    for error in (ImageNotFound("No."), AuthFailed("No.")):
        world.opening = [error]
        with pytest.raises(type(error)):
            pull_all(path, app(), policy=pull.NEWER)


# --- order and remains
# --------------------------------------------------------------------------------------------------------------------


def test_no_name_is_given_unless_every_image_is_stored(path: pathlib.Path, world: World) -> None:
    world.blobs[str(world.layout.layer(THIRD).descriptor["digest"])] = [ImageNotFound("Unknown blob.")]
    with pytest.raises(ImageNotFound):
        pull_all(path, app(), app("web"), parallel=1)
    with Repository.open(str(path)) as repository:
        assert repository.tags() == {}
    (done, _other) = pull_all(path, app(), app("web"))
    assert done["stats"]["bytes_fetched"] == 0, "what was whole was kept"


def test_one_skopeo_serves_all_images_of_a_registry(path: pathlib.Path, world: World) -> None:
    pull_all(path, app(), app("web"))
    assert len(world.proxies) == 1 and world.proxies[0].closed


def test_layers_that_are_there_are_told(path: pathlib.Path, world: World) -> None:
    pull_all(path, app())
    events = Events()
    pull_all(path, app("web"), sink=events)
    assert [event.layer for event in events.of(SKIPPED)] == [sha256(FIRST)]


def test_nothing_of_the_process_is_left_after_a_pull_or_a_failure(path: pathlib.Path, world: World) -> None:
    pull_all(path, app("scratch"))
    threads, descriptors = threading.active_count(), sorted(os.listdir("/proc/self/fd"))
    with contextlib.suppress(EngineError):
        world.blobs[str(world.layout.layer(SECOND).descriptor["digest"])] = [b"short"]
        pull_all(path, app(), timeout=0.5, retries=0)
    pull_all(path, app())
    with pytest.raises(ImageNotFound):
        pull_all(path, app("nowhere"))
    assert sorted(os.listdir("/proc/self/fd")) == descriptors and threading.active_count() <= threads + 1
    assert not [
        child for task in pathlib.Path("/proc/self/task").glob("*/children") for child in task.read_text().split()
    ]


def test_an_import_leaves_no_mark_behind_whatever_its_end(path: pathlib.Path, world: World) -> None:
    world.blobs[str(world.layout.layer(SECOND).descriptor["digest"])] = [ImageNotFound("Unknown blob.")]
    for _time in range(2):
        with contextlib.suppress(ImageNotFound):
            pull_all(path, app())
        assert list((path / ".composefs-oci/imports").iterdir()) == []


def test_no_warning_of_python_reaches_the_user(path: pathlib.Path, world: World) -> None:
    """Newer Pythons warn of forks beside threads; a module's output must stay clean."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.resetwarnings()
        warnings.simplefilter("default")
        pull_all(path, app())
    assert [
        str(one.message) for one in caught if not issubclass(one.category, (DeprecationWarning, ResourceWarning))
    ] == []


def test_a_sink_that_fails_does_not_fail_the_pull(path: pathlib.Path, world: World) -> None:
    class Broken(Events):
        def event(self, event: Any) -> None:
            raise OSError(28, "No space left on device")

    assert pull_all(path, app(), sink=Broken())[0]["changed"]


def test_pulling_nothing_is_nothing(path: pathlib.Path, world: World) -> None:
    with Repository.open(str(path)) as repository:
        assert pull.pull_images(repository, [], settings(), Progress()) == []
    assert world.proxies == []


# --- names that go
# --------------------------------------------------------------------------------------------------------------------


def test_forgetting_takes_the_name_only_and_once(path: pathlib.Path, world: World) -> None:
    (done,) = pull_all(path, app())
    before = sorted((path / "streams").iterdir())
    with Repository.open(str(path)) as repository:
        predicted = pull.forget(repository, pull.Request("", "app"), check=True)
        assert repository.tags()
        removed = pull.forget(repository, pull.Request("", "app"), check=False)
        again = pull.forget(repository, pull.Request("", "app"), check=False)
    assert predicted == removed and removed.changed and not again.changed
    assert removed.previous_layers == [layer["digest"] for layer in done["layers"]]
    told = removed.result.values()
    assert told["previous_digest"] == done["digest"] and told["digest"] is None
    for key in ("ref", "config_digest", "image_id", "kind", "platform", "version", "created", "labels", "policy"):
        assert told[key] == done[key], "what the name led to is known"
    assert again.result == ImageResult(name="app")
    assert sorted((path / "streams").iterdir()) == before
    (back,) = pull_all(path, app())
    assert back["changed"] and back["streams"] == [] and back["stats"]["bytes_fetched"] == 0
