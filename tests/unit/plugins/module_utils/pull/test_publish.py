# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What a pull says it would register is what it then registers, whatever state the repository is in."""

from __future__ import annotations

import itertools
import json
import os
import pathlib
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as hs

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from fake_source import REGISTRY, Events, Layout, World, pull_all
from ociimage import sha256

from ansible_collections.composefs.oci.plugins.module_utils.formats import fsverity, splitstream
from ansible_collections.composefs.oci.plugins.module_utils.host import processes
from ansible_collections.composefs.oci.plugins.module_utils.pull import publish, pull
from ansible_collections.composefs.oci.plugins.module_utils.store import create, imagestreams
from ansible_collections.composefs.oci.plugins.module_utils.store.repository import Repository
from ansible_collections.composefs.oci.tests.support.tarbytes import DIRECTORY, member, tar

FIRST = tar(member("usr/", type=DIRECTORY), member("usr/one", b"1" * 300))
SECOND = tar(member("usr/two", b"2" * 300))
OTHER = tar(member("usr/", type=DIRECTORY), member("usr/poison", b"3" * 300))


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Layout:
    """``app`` and ``twin`` (the same configuration, other blobs), ``artifact`` and ``artifact2``."""
    made = Layout(tmp_path_factory.mktemp("layout"))
    layers = [made.layer(FIRST), made.layer(SECOND)]
    config = made.config(layers)
    made.tag(made.manifest(config, layers), "app")
    made.tag(made.manifest(config, [made.layer(FIRST, "none"), made.layer(SECOND, "none")]), "twin")
    made.artifact([("text/plain", b"an artifact " * 30)], "artifact")
    made.artifact([("text/plain", b"another one " * 30)], "artifact2")
    return made


@pytest.fixture(scope="module")
def world(layout: Layout) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        # Making images in a process of its own is tested elsewhere; here it would only take time.
        patch.setattr(processes, "call", lambda what, function: function())
        yield World(layout).install(patch)


def new_repository(path: pathlib.Path) -> pathlib.Path:
    create.prepare(str(path), fsverity.SHA256, "disabled")
    return path


def request(tag: str = "app", name: str = "") -> pull.Request:
    return pull.Request(REGISTRY + tag, name or tag)


# --- the state of a repository, changed piece by piece
# ---------------------------------------------------------------------------------------


class State(NamedTuple):
    path: pathlib.Path
    layout: Layout
    tag: str

    def digest(self) -> str:
        index = json.loads((self.layout.path / "index.json").read_text())["manifests"]
        return str(
            next(
                entry["digest"]
                for entry in index
                if entry["annotations"]["org.opencontainers.image.ref.name"] == self.tag
            )
        )

    def config(self) -> str:
        return str(json.loads(self.layout.read(self.digest()))["config"]["digest"])

    def link(self, name: str) -> pathlib.Path:
        return self.path / "streams" / name

    def object(self, digest: bytes) -> pathlib.Path:
        return self.path / "objects" / fsverity.object_path(digest)

    def open(self) -> Repository:
        return Repository.open(str(self.path), write=True)

    def refs(self, kind: str, digest: str) -> dict[str, bytes]:
        with self.open() as repository:
            # Another damage may have met the document before.
            document = imagestreams.usable(repository, kind, digest)
            return document.refs if document else {}


def first_layer_gone(state: State) -> None:
    name = f"oci-layer-{sha256(FIRST)}"
    if os.path.lexists(state.link(name)):
        state.link(name).unlink()


def first_layer_object_gone(state: State) -> None:
    with state.open() as repository:
        digest = repository.stream(f"oci-layer-{sha256(FIRST)}")
    if digest and state.object(digest).exists():
        state.object(digest).unlink()


def first_layer_poisoned(state: State) -> None:
    """What cfsctl does for an image that lists this diff_id for another tar."""
    with state.open() as repository:
        writer = splitstream.Writer(repository.algorithm, splitstream.LAYER)
        writer.inline(OTHER)
        digest = repository.objects.put_pieces(writer.finish())
        repository.register(f"oci-layer-{sha256(FIRST)}", digest)


def first_layer_raw(state: State) -> None:
    """What an artifact leaves whose blob is this tar."""
    with state.open() as repository:
        writer = splitstream.Writer(repository.algorithm, splitstream.BLOB)
        writer.external(repository.objects.put(FIRST), len(FIRST))
        repository.register(f"oci-layer-{sha256(FIRST)}", repository.objects.put_pieces(writer.finish()))


def proofs_forgotten(state: State) -> None:
    for path in (state.path / ".composefs-oci/trusted").glob("*"):
        path.unlink()


def config_gone(state: State) -> None:
    if os.path.lexists(state.link(imagestreams.CONFIG + state.config())):
        state.link(imagestreams.CONFIG + state.config()).unlink()


def config_damaged(state: State) -> None:
    path = state.object(fsverity.digest(state.layout.read(state.config()), fsverity.SHA256))
    if path.exists():
        path.write_bytes(b"x" * path.stat().st_size)


def config_with_other_layers(state: State) -> None:
    """As if a layer's stream had been written anew with other bytes since."""
    refs = state.refs(imagestreams.CONFIG, state.config())
    if refs:
        with state.open() as repository:
            changed = {name: bytes(32) if name == sha256(FIRST) else digest for name, digest in refs.items()}
            repository.register(
                imagestreams.CONFIG + state.config(),
                imagestreams.store(repository, imagestreams.CONFIG, state.layout.read(state.config()), changed),
            )


def manifest_gone(state: State) -> None:
    if os.path.lexists(state.link(imagestreams.MANIFEST + state.digest())):
        state.link(imagestreams.MANIFEST + state.digest()).unlink()


def manifest_stale(state: State) -> None:
    """The manifest leads to a configuration that is not the one under its name, as after a crash of cfsctl."""
    refs = state.refs(imagestreams.MANIFEST, state.digest())
    if refs:
        with state.open() as repository:
            changed = {
                name: bytes(32) if name.startswith(imagestreams.CONFIG_REF) else digest for name, digest in refs.items()
            }
            repository.register(
                imagestreams.MANIFEST + state.digest(),
                imagestreams.store(repository, imagestreams.MANIFEST, state.layout.read(state.digest()), changed),
            )


def manifest_damaged(state: State) -> None:
    path = state.object(fsverity.digest(state.layout.read(state.digest()), fsverity.SHA256))
    if path.exists():
        path.write_bytes(b"x" * path.stat().st_size)


def tag_gone(state: State) -> None:
    with state.open() as repository:
        repository.untag(state.tag)


def image_object_gone(state: State) -> None:
    for name, digest in state.refs(imagestreams.CONFIG, state.config()).items():
        if imagestreams.is_image_ref(name) and state.object(digest).exists():
            state.object(digest).unlink()


def image_link_gone(state: State) -> None:
    for path in (state.path / "images").glob("*"):
        path.unlink()


def image_never_made(state: State) -> None:
    before = state.refs(imagestreams.CONFIG, state.config())
    refs = {name: digest for name, digest in before.items() if not imagestreams.is_image_ref(name)}
    # Without an image there is nothing to leave out, only an order of refs that no writer has.
    if refs and refs != before:
        with state.open() as repository:
            repository.register(
                imagestreams.CONFIG + state.config(),
                imagestreams.store(repository, imagestreams.CONFIG, state.layout.read(state.config()), refs),
            )


def pending_left(state: State) -> None:
    with state.open() as repository:
        stream = repository.stream(imagestreams.CONFIG + state.config())
        if stream:
            repository.register(imagestreams.PENDING + state.config(), stream)


Damage = Callable[[State], None]
DAMAGES: tuple[Damage, ...] = (
    first_layer_gone,
    first_layer_object_gone,
    first_layer_poisoned,
    first_layer_raw,
    proofs_forgotten,
    config_gone,
    config_with_other_layers,
    manifest_gone,
    manifest_stale,
    tag_gone,
    image_object_gone,
    image_link_gone,
    image_never_made,
    pending_left,
)
# What is noticed only by reading: the documents themselves, changed on the disk.
ROT: tuple[Damage, ...] = (config_damaged, manifest_damaged)


def everything(path: pathlib.Path) -> dict[str, Any]:
    """Every file and link of a repository."""
    found: dict[str, Any] = {}
    for directory, _directories, files in os.walk(path):
        for name in files:
            place = pathlib.Path(directory, name)
            found[str(place.relative_to(path))] = (
                os.readlink(place) if place.is_symlink() else (place.stat().st_ino, place.stat().st_mtime_ns)
            )
    return found


COMPARED = ("changed", "streams", "digest", "config_digest", "previous_digest", "layers")


def hold_to_its_word(state: State, **how: Any) -> dict[str, Any]:
    """Check mode touches nothing and says what a run then does; after that run nothing is left to do and all
    is whole.
    """
    before = everything(state.path)
    (predicted,) = pull_all(state.path, request(state.tag), check=True, **how)
    assert everything(state.path) == before, "check mode has touched something"
    (done,) = pull_all(state.path, request(state.tag), **how)
    for key in COMPARED:
        assert predicted[key] == done[key], key
    assert predicted["stats"]["bytes_fetched"] == done["stats"]["bytes_fetched"]
    after = everything(state.path)
    (again,) = pull_all(state.path, request(state.tag), **how)
    assert not again["changed"] and again["streams"] == []
    assert everything(state.path) == after, "a second run has touched something"
    whole(state, done, **how)
    return done


def whole(state: State, done: dict[str, Any], erofs: bool = True, bootable: bool = False) -> None:
    with state.open() as repository:
        manifest = imagestreams.read(repository, imagestreams.MANIFEST, state.digest())
        config = imagestreams.read(repository, imagestreams.CONFIG, state.config())
        assert manifest and config and repository.tag_digest(state.tag) == state.digest()
        assert manifest.refs[imagestreams.CONFIG_REF + state.config()] == config.stream
        assert repository.stream(imagestreams.PENDING + state.config()) is None
        for one in done["layers"]:
            stream = repository.stream(imagestreams.LAYER + one["diff_id"])
            assert stream == manifest.refs[one["diff_id"]] and repository.objects.verify(stream)
        if erofs and done["image_id"]:
            image = config.refs["composefs.image.v1"]
            assert image.hex() == done["image_id"] and repository.image(image) and repository.objects.verify(image)


@pytest.mark.parametrize("damage", [*DAMAGES, *ROT], ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("tag", ["app", "artifact"])
def test_prediction_equals_what_is_done_after_one_damage(
    tmp_path: pathlib.Path, world: World, tag: str, damage: Damage
) -> None:
    state = State(new_repository(tmp_path / "repo"), world.layout, tag)
    pull_all(state.path, request(tag))
    damage(state)
    hold_to_its_word(state)


@pytest.mark.slow
@pytest.mark.parametrize("erofs", [True, False])
def test_prediction_equals_what_is_done_after_two_damages(tmp_path: pathlib.Path, world: World, erofs: bool) -> None:
    for number, (one, other) in enumerate(itertools.combinations(DAMAGES, 2)):
        # A third of all pairs: the property test below draws from all of them.
        if number % 6 != (0 if erofs else 3):
            continue
        state = State(new_repository(tmp_path / f"repo{number}"), world.layout, "app")
        pull_all(state.path, request())
        one(state)
        other(state)
        try:
            hold_to_its_word(state, erofs=erofs)
        except AssertionError as error:
            raise AssertionError(f"after {one.__name__} and {other.__name__}: {error}") from error


@pytest.mark.slow
@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(
    earlier=hs.lists(hs.sampled_from(["app", "twin", "artifact", "artifact2"]), unique=True),
    damages=hs.lists(hs.sampled_from([*DAMAGES, *ROT]), max_size=4),
    tag=hs.sampled_from(["app", "twin", "artifact"]),
    erofs=hs.booleans(),
    before=hs.booleans(),
)
@example(earlier=["app"], damages=[config_damaged, image_object_gone], tag="app", erofs=False, before=True)
def test_prediction_equals_what_is_done_in_any_state(
    tmp_path_factory: pytest.TempPathFactory,
    world: World,
    earlier: list[str],
    damages: list[Damage],
    tag: str,
    erofs: bool,
    before: bool,
) -> None:
    state = State(new_repository(tmp_path_factory.mktemp("any") / "repo"), world.layout, tag)
    for one in earlier:
        pull_all(state.path, request(one), erofs=before)
    for damage in damages:
        damage(state)
    hold_to_its_word(state, erofs=erofs)


# --- what is made, and what is not
# -----------------------------------------------------------------------------------------------------------


def test_a_fresh_pull_registers_layers_then_configuration_then_manifest(tmp_path: pathlib.Path, world: World) -> None:
    state = State(new_repository(tmp_path / "repo"), world.layout, "app")
    done = hold_to_its_word(state)
    assert done["streams"] == [
        f"oci-layer-{sha256(FIRST)}",
        f"oci-layer-{sha256(SECOND)}",
        f"oci-config-{state.config()}",
        f"oci-manifest-{state.digest()}",
    ]


def test_an_image_that_vanished_comes_back_without_being_a_change(tmp_path: pathlib.Path, world: World) -> None:
    state = State(new_repository(tmp_path / "repo"), world.layout, "app")
    (first,) = pull_all(state.path, request())
    image_object_gone(state)
    image_link_gone(state)
    done = hold_to_its_word(state)
    assert not done["changed"] and done["image_id"] == first["image_id"]


def test_an_image_that_is_not_wanted_is_neither_made_nor_lost(tmp_path: pathlib.Path, world: World) -> None:
    state = State(new_repository(tmp_path / "repo"), world.layout, "app")
    (first,) = pull_all(state.path, request())
    image_object_gone(state)
    image_link_gone(state)
    config_before = state.refs(imagestreams.CONFIG, state.config())
    tag_gone(state)
    pull_all(state.path, request(), erofs=False)
    assert list((state.path / "images").glob("*")) == [], "no link to an image that is not there"
    assert state.refs(imagestreams.CONFIG, state.config()) == config_before
    (again,) = pull_all(state.path, request())
    assert again["image_id"] == first["image_id"] and list((state.path / "images").iterdir())


def test_images_of_a_layer_that_changed_are_made_anew(tmp_path: pathlib.Path, world: World) -> None:
    """Poisoned by cfsctl: the image that was made of the wrong layer must not survive the repair."""
    state = State(new_repository(tmp_path / "repo"), world.layout, "app")
    first_layer_poisoned(state)
    with state.open() as repository:
        poison = repository.stream(f"oci-layer-{sha256(FIRST)}")
        assert poison
        refs = {
            sha256(FIRST): poison,
            sha256(SECOND): bytes(32),
            "composefs.image.v1": repository.objects.put(b"an image of the poison" * 9),
        }
        stream = imagestreams.store(repository, imagestreams.CONFIG, state.layout.read(state.config()), refs)
        repository.register(imagestreams.CONFIG + state.config(), stream)
    done = hold_to_its_word(state)
    assert done["image_id"] != refs["composefs.image.v1"].hex()


def test_what_other_tools_wrote_into_the_configuration_stays(tmp_path: pathlib.Path, world: World) -> None:
    state = State(new_repository(tmp_path / "repo"), world.layout, "app")
    pull_all(state.path, request(), erofs=False)
    with state.open() as repository:
        boot = repository.objects.put(b"a boot image" * 20)
        refs = {
            **state.refs(imagestreams.CONFIG, state.config()),
            "composefs.image.boot.v1.xattrs=keep-user-xattrs": boot,
        }
        repository.register(
            imagestreams.CONFIG + state.config(),
            imagestreams.store(repository, imagestreams.CONFIG, state.layout.read(state.config()), refs),
        )
    hold_to_its_word(state)
    assert state.refs(imagestreams.CONFIG, state.config())["composefs.image.boot.v1.xattrs=keep-user-xattrs"] == boot


@pytest.mark.parametrize(
    ("formats", "keys"),
    [
        ((1,), {"composefs.image.v1"}),
        ((2,), {"composefs.image"}),
        ((1, 2), {"composefs.image.v1", "composefs.image"}),
        ((0,), {"composefs.image.v1"}),
    ],
)
def test_every_format_of_the_repository_is_made(
    tmp_path: pathlib.Path, world: World, monkeypatch: pytest.MonkeyPatch, formats: tuple[int, ...], keys: set[str]
) -> None:
    from ansible_collections.composefs.oci.plugins.module_utils.formats.metajson import Metadata

    monkeypatch.setattr(Metadata, "erofs_formats", formats)
    state = State(new_repository(tmp_path / "repo"), world.layout, "app")
    (done,) = pull_all(state.path, request())
    refs = state.refs(imagestreams.CONFIG, state.config())
    assert {name for name in refs if imagestreams.is_image_ref(name)} == keys
    assert done["image_id"] == refs[imagestreams.image_ref(formats[0])].hex()
    assert not pull_all(state.path, request())[0]["changed"]


def test_manifests_that_share_a_configuration_follow_it_and_are_named_in_the_result(
    tmp_path: pathlib.Path, world: World
) -> None:
    state = State(new_repository(tmp_path / "repo"), world.layout, "app")
    twin = State(state.path, world.layout, "twin")
    pull_all(state.path, request(), erofs=False)
    pull_all(state.path, request("twin"), erofs=False)
    done = hold_to_its_word(state)
    assert done["streams"] == [
        f"oci-config-{state.config()}",
        f"oci-manifest-{state.digest()}",
        f"oci-manifest-{twin.digest()}",
    ]
    assert not hold_to_its_word(twin)["changed"]


# --- two publishers
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def between(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Any]], None]:
    """Have something happen after a pull has planned and before it publishes."""

    def arrange(what: Callable[[], Any]) -> None:
        real = publish.publish

        def late(*arguments: Any, **options: Any) -> Any:
            monkeypatch.setattr(publish, "publish", real)
            what()
            return real(*arguments, **options)

        monkeypatch.setattr(publish, "publish", late)

    return arrange


@pytest.mark.parametrize("known", [False, True], ids=["new image", "known image"])
def test_an_image_that_another_pull_adds_meanwhile_stays(
    tmp_path: pathlib.Path, world: World, between: Any, known: bool
) -> None:
    """Both put their EROFS images into one configuration; the later one had read it before the other wrote."""
    state = State(new_repository(tmp_path / "repo"), world.layout, "app")
    if known:
        pull_all(state.path, request(), erofs=False)
        manifest_gone(state)
    between(lambda: pull_all(state.path, request(name="other")))
    pull_all(state.path, request(), erofs=False)
    refs = state.refs(imagestreams.CONFIG, state.config())
    with state.open() as repository:
        image = refs["composefs.image.v1"]
        assert repository.image(image) and repository.objects.verify(image)
    whole(state, pull_all(state.path, request())[0])


def test_an_image_that_another_program_makes_of_its_own_streams_stays(
    tmp_path: pathlib.Path, world: World, between: Any
) -> None:
    """cfsctl compresses otherwise: its streams of the same layers are other objects."""
    state = State(new_repository(tmp_path / "repo"), world.layout, "app")

    def like_cfsctl() -> None:
        with state.open() as repository:
            refs = {}
            for layer in (FIRST, SECOND):
                writer = splitstream.Writer(repository.algorithm, splitstream.LAYER)
                writer.inline(layer)
                refs[sha256(layer)] = repository.objects.put_pieces(writer.finish())
                repository.register(f"oci-layer-{sha256(layer)}", refs[sha256(layer)])
            refs["composefs.image.v1"] = repository.objects.put(b"an image that is not read here " * 99)
            repository.link_image(refs["composefs.image.v1"])
            made.update(refs)
            stream = imagestreams.store(repository, imagestreams.CONFIG, state.layout.read(state.config()), refs)
            repository.register(imagestreams.CONFIG + state.config(), stream)

    made: dict[str, bytes] = {}
    between(like_cfsctl)
    pull_all(state.path, request(), erofs=False)
    assert state.refs(imagestreams.CONFIG, state.config())["composefs.image.v1"] == made["composefs.image.v1"]


def test_what_another_program_publishes_in_the_last_moment_counts_too(
    tmp_path: pathlib.Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """cfsctl does not know the lock."""
    state = State(new_repository(tmp_path / "repo"), world.layout, "app")
    pull_all(state.path, request(), erofs=False)
    manifest_gone(state)
    real = publish._decide

    def late(repository: Repository, *arguments: Any) -> Any:
        decision = real(repository, *arguments)
        if len(rounds) < 2:
            rounds.append(len(rounds))
            refs = {**state.refs(imagestreams.CONFIG, state.config())}
            refs[f"composefs.image.boot.v1.{rounds[-1]}"] = repository.objects.put(b"an image %d" % rounds[-1])
            stream = imagestreams.store(repository, imagestreams.CONFIG, state.layout.read(state.config()), refs)
            repository.register(imagestreams.CONFIG + state.config(), stream)
        return decision

    rounds: list[int] = []
    monkeypatch.setattr(publish, "_decide", late)
    pull_all(state.path, request(), erofs=False)
    refs = state.refs(imagestreams.CONFIG, state.config())
    assert {"composefs.image.boot.v1.0", "composefs.image.boot.v1.1"} <= refs.keys()


def test_publishers_take_turns_and_say_so(tmp_path: pathlib.Path, world: World) -> None:
    state = State(new_repository(tmp_path / "repo"), world.layout, "app")
    events = Events()
    done: list[Any] = []
    with state.open() as repository, repository.lock("publish"):
        thread = threading.Thread(target=lambda: done.append(pull_all(state.path, request(), sink=events)))
        thread.start()
        deadline = time.monotonic() + 30
        while not any("Waiting for another pull" in text for text in events.texts()) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert repository.tags() == {} and repository.streams(imagestreams.MANIFEST) == []
    thread.join(30)
    assert len(done) == 1
    assert any(f"process {os.getpid()}" in text for text in events.texts())
    whole(state, done[0][0])


# --- images that are there in name only
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", ["empty", "zeros", "cut"])
def test_an_image_whose_object_is_torn_is_made_anew(tmp_path: pathlib.Path, world: World, content: str) -> None:
    state = State(new_repository(tmp_path / "repo"), world.layout, "app")
    (first,) = pull_all(state.path, request())
    path = state.object(bytes.fromhex(first["image_id"]))
    size = path.stat().st_size
    path.write_bytes({"empty": b"", "zeros": bytes(size), "cut": path.read_bytes()[:1024]}[content])
    done = hold_to_its_word(state)
    assert not done["changed"] and done["image_id"] == first["image_id"]
    assert path.stat().st_size == size


def test_images_is_what_the_module_says() -> None:
    assert publish.Images() == publish.Images(plain=True, bootable=False)
