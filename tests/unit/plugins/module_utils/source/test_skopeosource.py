# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A conversation that outlives the skopeo it is held with."""

from __future__ import annotations

import pathlib
import sys
import threading
from typing import Any

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from fake_source import REGISTRY, Events, Layout, World

from ansible_collections.composefs.oci.plugins.module_utils.formats import oci
from ansible_collections.composefs.oci.plugins.module_utils.source import skopeosource
from ansible_collections.composefs.oci.plugins.module_utils.errors import (
    AuthFailed,
    DigestMismatch,
    EngineError,
    ImageNotFound,
    InvalidDocument,
    ProxyFailed,
    RegistryUnreachable,
    SkopeoMissing,
    Stalled,
)
from ansible_collections.composefs.oci.plugins.module_utils.formats.oci import Descriptor, parse_reference
from ansible_collections.composefs.oci.plugins.module_utils.progress import MESSAGE, Progress
from ansible_collections.composefs.oci.plugins.module_utils.source.skopeosource import Session, is_passing
from ansible_collections.composefs.oci.plugins.module_utils.source.skopeo import ProxyOptions, passing
from ansible_collections.composefs.oci.tests.support.tarbytes import member, tar

APP = parse_reference(REGISTRY + "app")
GONE = RegistryUnreachable("Opening it: skopeo says: connection refused.", "Check the network.")


@pytest.fixture
def world(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> World:
    layout = Layout(tmp_path / "layout")
    layout.image([tar(member("a", b"a" * 100))], "app")
    layout.image([tar(member("b", b"b" * 100))], "other")
    layout.multi_platform(
        {name: [tar(member("c", name.encode() * 20))] for name in ("linux/amd64", "linux/arm64")}, "index"
    )
    return World(layout).install(monkeypatch)


def talk(retries: int = 2, sink: Events | None = None) -> Session:
    return Session(ProxyOptions(), retries, Progress(sink))


def test_skopeo_is_started_when_it_is_needed_and_once(world: World) -> None:
    conversation = talk()
    assert world.proxies == [] and conversation.skopeo_version is None and conversation.protocol_version is None
    conversation.manifest(APP)
    conversation.manifest(APP)
    conversation.manifest(parse_reference(REGISTRY + "other"))
    assert len(world.proxies) == 1
    assert [what for method, what in world.requests if method == "OpenImage"] == [
        REGISTRY + "app",
        REGISTRY + "other",
    ], "each image is opened once"
    assert (conversation.skopeo_version, conversation.protocol_version) == ("1.2.3", "0.2.3")
    conversation.close()
    assert world.proxies[0].closed


@pytest.mark.parametrize("error", [GONE, Stalled("No answer."), passing(ProxyFailed("skopeo was killed."))])
def test_after_a_passing_fault_another_skopeo_is_asked(world: World, error: EngineError) -> None:
    world.opening = [error]
    events = Events()
    conversation = talk(sink=events)
    assert conversation.manifest(APP)[0]
    assert len(world.proxies) == 2 and world.proxies[0].dead and not world.proxies[1].dead
    assert conversation.retried == 1


def test_retries_come_to_an_end(world: World) -> None:
    world.opening = [GONE] * 10
    conversation = talk(retries=2)
    with pytest.raises(RegistryUnreachable):
        conversation.manifest(APP)
    assert len(world.opening) == 7 and conversation.retried == 2


@pytest.mark.parametrize("error", [ImageNotFound("No."), AuthFailed("No."), DigestMismatch("No."), ProxyFailed("No.")])
def test_what_will_not_pass_is_not_tried_again(world: World, error: EngineError) -> None:
    world.opening = [error]
    with pytest.raises(type(error)):
        talk().manifest(APP)
    assert len(world.proxies) == 1


def test_a_skopeo_that_does_not_start_is_no_proxy_to_keep(world: World) -> None:
    world.starting = [SkopeoMissing("There is none.")]
    conversation = talk()
    with pytest.raises(SkopeoMissing):
        conversation.manifest(APP)
    assert conversation.protocol_version is None
    assert conversation.manifest(APP)[0], "the next question may find one"


def test_pauses_grow_up_to_a_limit_and_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(skopeosource.time, "sleep", slept.append)
    events = Events()
    for attempt in range(1, 10):
        skopeosource.pause(attempt, GONE, Progress(events))
    assert slept == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0, 30.0]
    assert [event.text for event in events.of(MESSAGE)][0] == f"{GONE.message} Trying again in 0.5 s."


def test_a_later_generation_is_not_killed_on_an_earlier_ones_account(world: World) -> None:
    conversation = talk()
    conversation.manifest(APP)
    conversation.replace(0)
    conversation.manifest(APP)
    conversation.replace(0)
    assert [proxy.dead for proxy in world.proxies] == [True, False] and conversation.generation == 1
    conversation.replace(1)
    assert world.proxies[1].dead


def test_skopeo_is_started_by_whoever_may(world: World) -> None:
    """Its death is tied to the thread that started it."""
    conversation = talk()
    asked: list[Any] = []

    def in_main(function: Any) -> Any:
        asked.append(threading.current_thread().name)
        return function()

    conversation.in_main = in_main
    thread = threading.Thread(target=conversation.manifest, args=(APP,), name="lane")
    thread.start()
    thread.join()
    assert asked == ["lane"]


def test_layers_come_from_the_manifest_except_from_a_container_storage(world: World) -> None:
    conversation = talk()
    manifest = oci.parse_manifest(conversation.manifest(APP)[1])
    assert conversation.layer_sources(APP, manifest) == list(manifest.layers)
    storage = parse_reference("containers-storage:localhost/app")
    tars = (Descriptor("application/vnd.oci.image.layer.v1.tar", "sha256:" + "a" * 64, 10240),)
    world.target = lambda reference: {}  # type: ignore[method-assign]
    proxy = conversation.image(storage)[0]
    proxy.layer_infos = lambda image: tars  # type: ignore[method-assign]
    assert conversation.layer_sources(storage, manifest) == list(tars)
    proxy.layer_infos = lambda image: tars * 2  # type: ignore[method-assign]
    with pytest.raises(InvalidDocument, match="has 1 layers, and the container storage delivers 2"):
        conversation.layer_sources(storage, manifest)


# --- the digest of the index
# -----------------------------------------------------------------------------------------------------------------


def test_the_index_is_told_apart_from_the_manifest(world: World) -> None:
    conversation = talk()
    reference = parse_reference(REGISTRY + "index")
    answer = conversation.ask_index_digest(reference)
    assert answer(conversation.manifest(reference)[0]) == world.target(reference)["digest"]
    answer = conversation.ask_index_digest(APP)
    assert answer(conversation.manifest(APP)[0]) is None, "a reference to a manifest leads through no index"


def test_a_reference_by_digest_is_answered_without_asking(world: World) -> None:
    digest = "sha256:" + "a" * 64
    answer = talk().ask_index_digest(parse_reference(f"docker://registry.test/app@{digest}"))
    assert answer(digest) is None and answer("sha256:" + "b" * 64) == digest


def test_local_sources_have_no_index_digest(world: World) -> None:
    assert talk().ask_index_digest(parse_reference("oci:/somewhere"))("sha256:" + "b" * 64) is None


def test_the_index_is_asked_for_again_after_a_passing_fault(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(skopeosource, "pause", lambda attempt, error, progress: None)
    ask, failures = skopeosource.top_digest, [GONE, GONE]

    def fail_twice(options: Any, reference: Any) -> tuple[str, bytes]:
        if failures:
            raise failures.pop()
        return ask(options, reference)

    monkeypatch.setattr(skopeosource, "top_digest", fail_twice)
    conversation = talk(retries=2)
    reference = parse_reference(REGISTRY + "index")
    answer = conversation.ask_index_digest(reference)
    assert answer(conversation.manifest(reference)[0]) and conversation.retried == 2


def test_an_index_that_is_refused_is_not_asked_for_again(world: World) -> None:
    world.index_failure = AuthFailed("Opening it: unauthorized.", "Log in.")
    conversation = talk(retries=2)
    assert conversation.ask_index_digest(APP)("sha256:" + "b" * 64) is None and conversation.retried == 0


def test_an_index_that_cannot_be_asked_for_is_no_failure(world: World) -> None:
    world.index_failure = GONE
    assert talk().ask_index_digest(APP)("sha256:" + "b" * 64) is None


def test_closing_waits_for_open_questions_but_not_for_long(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(skopeosource, "CLOSE_WAIT", 0.2)
    let_go = threading.Event()
    monkeypatch.setattr(skopeosource, "top_digest", lambda options, reference: let_go.wait(10) and ("", b""))
    conversation = talk()
    conversation.ask_index_digest(APP)
    conversation.close()
    let_go.set()


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (GONE, True),
        (Stalled("x"), True),
        (passing(ProxyFailed("x")), True),
        (ProxyFailed("x"), False),
        (DigestMismatch("x"), False),
    ],
)
def test_what_may_pass(error: EngineError, passes: bool) -> None:
    assert is_passing(error) is passes
