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

from ansible_collections.composefs.oci.plugins.module_utils.formats import digests, ocidocuments
from ansible_collections.composefs.oci.plugins.module_utils.source import skopeosource, source
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
    UnexpectedDigest,
)
from ansible_collections.composefs.oci.plugins.module_utils.formats.ocidocuments import Descriptor
from ansible_collections.composefs.oci.plugins.module_utils.formats.reference import parse_reference
from ansible_collections.composefs.oci.plugins.module_utils.progress import MESSAGE, Progress
from ansible_collections.composefs.oci.plugins.module_utils.source.skopeosource import SkopeoSource
from ansible_collections.composefs.oci.plugins.module_utils.source.source import Facts, Patient, Resolved
from ansible_collections.composefs.oci.plugins.module_utils.source.options import ProxyOptions
from ansible_collections.composefs.oci.tests.support.tarbytes import member, tar

APP = parse_reference(REGISTRY + "app")
OTHER = parse_reference(REGISTRY + "other")
INDEX = parse_reference(REGISTRY + "index")
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


def talk(retries: int = 2, sink: Events | None = None, platform: str = "") -> Patient:
    options = ProxyOptions(platform=ocidocuments.parse_platform(platform) if platform else None)
    return Patient(SkopeoSource(options), retries, Progress(sink))


def test_skopeo_is_started_when_it_is_needed_and_once(world: World) -> None:
    conversation = talk()
    assert world.proxies == [] and conversation.facts() == Facts()
    conversation.resolve(APP)
    conversation.resolve(APP)
    conversation.resolve(OTHER)
    assert len(world.proxies) == 1
    assert [what.partition("@")[0] for method, what in world.requests if method == "OpenImage"] == [
        REGISTRY + "app",
        REGISTRY + "other",
    ], "each image is opened once"
    assert conversation.facts() == Facts("1.2.3", "0.2.3", "accept_anything")
    conversation.close()
    assert world.proxies[0].closed


@pytest.mark.parametrize("error", [GONE, Stalled("No answer."), ProxyFailed("skopeo was killed.", passing=True)])
def test_after_a_passing_fault_another_skopeo_is_asked(world: World, error: EngineError) -> None:
    world.opening = [error]
    events = Events()
    conversation = talk(sink=events)
    assert conversation.resolve(APP).digest
    assert len(world.proxies) == 2 and world.proxies[0].dead and not world.proxies[1].dead
    assert conversation.retried == 1


def test_retries_come_to_an_end(world: World) -> None:
    world.opening = [GONE] * 10
    conversation = talk(retries=2)
    with pytest.raises(RegistryUnreachable):
        conversation.resolve(APP)
    assert len(world.opening) == 7 and conversation.retried == 2


@pytest.mark.parametrize("error", [ImageNotFound("No."), AuthFailed("No."), DigestMismatch("No."), ProxyFailed("No.")])
def test_what_will_not_pass_is_not_tried_again(world: World, error: EngineError) -> None:
    world.opening = [error]
    with pytest.raises(type(error)):
        talk().resolve(APP)
    assert len(world.proxies) == 1


def test_a_skopeo_that_does_not_start_is_no_proxy_to_keep(world: World) -> None:
    world.starting = [SkopeoMissing("There is none.")]
    conversation = talk()
    with pytest.raises(SkopeoMissing):
        conversation.resolve(APP)
    assert conversation.facts().protocol_version is None
    assert conversation.resolve(APP).digest, "the next question may find one"


def test_pauses_grow_up_to_a_limit_and_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(source.time, "sleep", slept.append)
    events = Events()
    for attempt in range(1, 10):
        source.pause(attempt, RegistryUnreachable(GONE.message), Progress(events))
    assert slept == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0, 30.0]
    assert [event.text for event in events.of(MESSAGE)][0] == f"{GONE.message} Trying again in 0.5 s."


def test_a_later_generation_is_not_killed_on_an_earlier_ones_account(world: World) -> None:
    conversation = talk()
    conversation.resolve(APP)
    conversation.renew(0)
    conversation.resolve(APP)
    conversation.renew(0)
    assert [proxy.dead for proxy in world.proxies] == [True, False] and conversation.source.generation == 1
    conversation.renew(1)
    assert world.proxies[1].dead


def test_skopeo_is_started_by_a_thread_that_lives_on(world: World) -> None:
    """Its death is tied to the thread that started it, and a lane ends when it has nothing more to do."""
    conversation = talk()
    conversation.resolve(APP)
    assert world.proxies[0].started_by == "MainThread"
    conversation.renew(0)
    thread = threading.Thread(target=conversation.resolve, args=(APP,), name="lane")
    thread.start()
    thread.join()
    assert world.proxies[1].started_by == "starter"
    assert any(thread.name == "starter" for thread in threading.enumerate())


def test_a_start_that_fails_in_another_thread_is_told_to_who_asked(world: World) -> None:
    world.starting = [SkopeoMissing("There is none.")]
    conversation, found = talk(), []

    def ask() -> None:
        try:
            conversation.resolve(APP)
        except EngineError as error:
            found.append(error.code)

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert found == ["skopeo_missing"]


def test_layers_come_from_the_manifest_except_from_a_container_storage(world: World) -> None:
    conversation = talk()
    resolved = conversation.resolve(APP)
    manifest = ocidocuments.parse_manifest(resolved.raw)
    assert conversation.layers(resolved, manifest) == list(manifest.layers)
    storage = Resolved(parse_reference("containers-storage:localhost/app"), resolved.digest, resolved.raw)
    tars = (Descriptor("application/vnd.oci.image.layer.v1.tar", "sha256:" + "a" * 64, 10240),)
    world.target = lambda reference: {}  # type: ignore[method-assign]
    proxy = world.proxies[0]
    proxy.layer_infos = lambda image: tars  # type: ignore[attr-defined]
    assert conversation.layers(storage, manifest) == list(tars)
    proxy.layer_infos = lambda image: tars * 2  # type: ignore[attr-defined]
    with pytest.raises(InvalidDocument, match="has 1 layers, and the container storage delivers 2"):
        conversation.layers(storage, manifest)


# --- what a reference means
# ------------------------------------------------------------------------------------------------------------------


def test_everything_after_the_first_answer_is_asked_by_digest(world: World) -> None:
    index = world.target(INDEX)["digest"]
    resolved = talk(platform="linux/arm64").resolve(INDEX)
    assert (resolved.index_digest, str(resolved.platform)) == (index, "linux/arm64")
    assert resolved.reference == INDEX.pinned(resolved.digest) and resolved.reference.original == INDEX.original
    assert [what for method, what in world.requests if method in ("Inspect", "OpenImage")] == [
        INDEX.text,
        resolved.reference.text,
    ]


def test_a_single_manifest_leads_through_no_index(world: World) -> None:
    resolved = talk().resolve(APP)
    assert (resolved.index_digest, resolved.platform) == (None, None)
    assert resolved.digest == digests.digest_of(resolved.raw) == world.target(APP)["digest"]


def test_a_reference_by_the_digest_of_an_index_is_looked_into(world: World) -> None:
    index = world.target(INDEX)["digest"]
    resolved = talk(platform="linux/arm64").resolve(INDEX.pinned(index))
    assert resolved.index_digest == index != resolved.digest


def test_local_sources_have_no_index_digest(world: World) -> None:
    world.target = lambda reference: {"digest": world.layout.image([b"\0" * 1024], "x")}  # type: ignore[method-assign]
    assert talk().resolve(parse_reference("dir:/somewhere")).index_digest is None
    assert "Inspect" not in [method for method, _what in world.requests]


def test_the_first_answer_is_asked_for_again_after_a_passing_fault(world: World) -> None:
    world.asking = [GONE, GONE]
    conversation = talk(retries=2)
    assert conversation.resolve(INDEX).index_digest and conversation.retried == 2


def test_a_reference_that_is_refused_is_not_asked_for_again(world: World) -> None:
    world.asking = [AuthFailed("Opening it: unauthorized.", "Log in.")]
    conversation = talk(retries=2)
    with pytest.raises(AuthFailed):
        conversation.resolve(APP)
    assert conversation.retried == 0 and not [one for one in world.requests if one[0] == "OpenImage"]


@pytest.fixture
def signatures(tmp_path: pathlib.Path) -> ProxyOptions:
    (tmp_path / "policy.json").write_text('{"default": [{"type": "reject"}]}')
    return ProxyOptions(policy=str(tmp_path / "policy.json"), platform=ocidocuments.parse_platform("linux/arm64"))


def test_a_signature_policy_judges_the_reference_as_it_is_written(world: World, signatures: ProxyOptions) -> None:
    resolved = Patient(SkopeoSource(signatures), 0, Progress(None)).resolve(INDEX)
    assert ("OpenImage", INDEX.text) in world.requests and resolved.reference == INDEX
    assert resolved.index_digest == world.target(INDEX)["digest"]


def test_a_tag_that_moves_under_a_signature_policy_is_looked_up_again(world: World, signatures: ProxyOptions) -> None:
    app, other = world.target(APP), world.target(OTHER)
    answers = [app, other, other, app]  # asked by inspect, OpenImage, GetManifest, and inspect again
    world.target = lambda reference: answers.pop(0) if len(answers) > 1 else answers[0]  # type: ignore[method-assign]
    conversation = Patient(SkopeoSource(signatures), 1, Progress(None))
    assert conversation.resolve(APP).digest == answers[0]["digest"] and conversation.retried == 1


def test_a_registry_that_contradicts_itself_under_a_signature_policy_is_refused(
    world: World, signatures: ProxyOptions
) -> None:
    app, other = world.target(APP), world.target(OTHER)
    answers = [app, other, other] * 2
    world.target = lambda reference: answers.pop(0)  # type: ignore[method-assign]
    with pytest.raises(UnexpectedDigest, match="a moment ago"):
        Patient(SkopeoSource(signatures), 1, Progress(None)).resolve(APP)


def test_closing_waits_for_the_open_question_but_not_for_long(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(skopeosource, "CLOSE_WAIT", 0.2)
    let_go = threading.Event()
    monkeypatch.setattr(skopeosource, "skopeo_version", lambda executable: str(let_go.wait(10)))
    conversation = talk()
    conversation.resolve(APP)
    conversation.close()
    let_go.set()


def test_a_question_for_the_version_that_fails_in_any_way_is_no_version(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(executable: Any) -> str:
        raise MemoryError

    monkeypatch.setattr(skopeosource, "skopeo_version", fail)
    conversation = talk()
    conversation.resolve(APP)
    assert conversation.facts() == Facts(None, "0.2.3", "accept_anything")
