# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Several layers at once: who is tried again, who is not charged, who is believed, and that nothing stays behind."""

from __future__ import annotations

import _thread
import contextlib
import errno
import os
import pathlib
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from fake_source import REGISTRY, Events, FakeProxy, Layout, World
from ociimage import Layer, sha256

from ansible_collections.composefs.oci.plugins.module_utils.formats import fsverity
from ansible_collections.composefs.oci.plugins.module_utils.host import filesystem, processors
from ansible_collections.composefs.oci.plugins.module_utils.pull import fetch, layer
from ansible_collections.composefs.oci.plugins.module_utils.store import create
from ansible_collections.composefs.oci.plugins.module_utils.errors import (
    DigestMismatch,
    EngineError,
    ImageNotFound,
    IOFailed,
    NoSpace,
    OutOfMemory,
    ProxyFailed,
    RegistryUnreachable,
    Stalled,
)
from ansible_collections.composefs.oci.plugins.module_utils.pull.fetch import Fetcher, Job
from ansible_collections.composefs.oci.plugins.module_utils.pull.layer import LayerSpec
from ansible_collections.composefs.oci.plugins.module_utils.store.objects import ObjectStore
from ansible_collections.composefs.oci.plugins.module_utils.formats.reference import parse_reference
from ansible_collections.composefs.oci.plugins.module_utils.progress import DONE, STARTED, Progress
from ansible_collections.composefs.oci.plugins.module_utils.store.repository import Repository
from ansible_collections.composefs.oci.plugins.module_utils.source.skopeosource import SkopeoSource
from ansible_collections.composefs.oci.plugins.module_utils.source.source import Patient
from ansible_collections.composefs.oci.plugins.module_utils.source.options import ProxyOptions
from ansible_collections.composefs.oci.tests.support.tarbytes import member, tar

APP = parse_reference(REGISTRY + "app")
# Largest first, as they are fetched; random enough that their blobs keep the order.
TARS = [tar(member(f"file{number}", os.urandom(3000 * (4 - number)))) for number in range(4)]


@pytest.fixture
def repo(tmp_path: pathlib.Path) -> Iterator[Repository]:
    create.prepare(str(tmp_path / "repo"), fsverity.SHA256, "disabled")
    with Repository.open(str(tmp_path / "repo"), write=True) as found:
        assert found.objects
        yield found


@pytest.fixture
def world(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> World:
    layout = Layout(tmp_path / "layout")
    layout.image([layout.layer(one) for one in TARS], "app")
    return World(layout).install(monkeypatch)


class Fetch:
    """One fetch of the first layers of the image."""

    def __init__(
        self,
        world: World,
        repo: Repository,
        count: int = 4,
        *,
        parallel: int = 1,
        timeout: float = 60.0,
        retries: int = 2,
    ) -> None:
        self.world = world
        self.repo = repo
        self.events = Events()
        self.layers: list[Layer] = [world.layout.layer(one) for one in TARS[:count]]
        self.source = Patient(SkopeoSource(ProxyOptions()), retries, Progress(self.events))
        self.fetcher = Fetcher(repo, parallel, timeout, Progress(self.events))

    def digest(self, number: int) -> str:
        return str(self.layers[number].descriptor["digest"])

    def run(self, upward: bool = True) -> dict[str, Any]:
        jobs = []
        # The largest is the lowest one here; the others are given in the wrong order on purpose.
        for one in [*self.layers[:1], *reversed(self.layers[1:])] if upward else reversed(self.layers):
            spec = LayerSpec(one.descriptor["digest"], one.descriptor["size"], one.diff_id, "gzip")
            jobs.append(Job(f"oci-layer-{one.diff_id}", spec, self.source, APP))
        try:
            self.fetcher.run(jobs)
        finally:
            self.source.close()
            assert children() == [], "no process is left, living or dead"
            assert not [thread for thread in threading.enumerate() if "_lane" in thread.name]
        return self.fetcher.results

    def named(self) -> list[int]:
        return [number for number, one in enumerate(TARS) if self.repo.stream(f"oci-layer-{sha256(one)}")]


def children() -> list[str]:
    return [child for task in pathlib.Path("/proc/self/task").glob("*/children") for child in task.read_text().split()]


# --- what goes well
# --------------------------------------------------------------------------------------------------------------------


def test_the_lowest_layer_is_fetched_first_and_then_the_largest(world: World, repo: Repository) -> None:
    run = Fetch(world, repo)
    run.run(upward=False)
    assert world.fetched() == [run.digest(number) for number in (3, 0, 1, 2)]


@pytest.mark.parametrize("parallel", [1, 2, 9])
def test_layers_are_fetched_largest_first_named_and_trusted(world: World, repo: Repository, parallel: int) -> None:
    run = Fetch(world, repo, parallel=parallel)
    results = run.run()
    assert len(results) == 4 and run.named() == [0, 1, 2, 3]
    if parallel == 1:
        assert world.fetched() == [run.digest(number) for number in range(4)]
    for one in run.layers:
        stream = repo.stream(f"oci-layer-{one.diff_id}")
        assert (
            stream
            and stream.hex() == results[f"oci-layer-{one.diff_id}"].stream
            and repo.trusted(one.diff_id) == stream
        )
    assert {event.layer for event in run.events.of(DONE)} == {one.diff_id for one in run.layers}
    assert len(world.proxies) == 1, "one skopeo serves all lanes"


def test_a_name_is_given_after_the_barrier(world: World, repo: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    story: list[str] = []
    monkeypatch.setattr(filesystem, "sync", lambda fd: story.append("sync"))
    register = repo.register
    monkeypatch.setattr(repo, "register", lambda *arguments: story.append("name") or register(*arguments))
    Fetch(world, repo, 2).run()
    assert story == ["sync", "name", "sync", "name"]


def test_descriptors_are_as_before(world: World, repo: Repository) -> None:
    def descriptors() -> list[str]:
        # A store keeps the directories of its objects.
        return sorted(name for name in os.listdir("/proc/self/fd") if not os.path.isdir(f"/proc/self/fd/{name}"))

    before = descriptors()
    world.blobs[str(world.layout.layer(TARS[1]).descriptor["digest"])] = [b"short"]
    for _time in range(2):
        with contextlib.suppress(EngineError):
            Fetch(world, repo, parallel=2, timeout=0.5, retries=0).run()
    assert descriptors() == before


# --- two pulls at once
# ----------------------------------------------------------------------------------------------------------------------


def test_a_layer_that_another_pull_fetches_is_waited_for_and_not_fetched_again(world: World, repo: Repository) -> None:
    """The others come first meanwhile."""
    Fetch(world, repo, 1).run()
    name = f"oci-layer-{sha256(TARS[0])}"
    stream = repo.stream(name)
    assert stream is not None
    repo.unregister(name)
    fetch = Fetch(world, repo, 3)
    asked = world.fetched().count(fetch.digest(0))
    results: list[Any] = []
    with Repository.open(repo.path, write=True) as other:
        with other.lock(f"layer-{sha256(TARS[0])}", keep=False):
            thread = threading.Thread(target=lambda: results.append(fetch.run()))
            thread.start()
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline and len(repo.streams("oci-layer-")) < 2:
                time.sleep(0.02)
            time.sleep(0.2)
            assert thread.is_alive() and len(repo.streams("oci-layer-")) == 2
            other.register(name, stream)
        thread.join(60)
    assert len(results[0]) == 3 and results[0][name].fetched == 0 and results[0][name].stream == stream.hex()
    assert world.fetched().count(fetch.digest(0)) == asked
    said = [text for text in fetch.events.texts() if "another pull fetches" in text]
    assert len(said) == 1 and f"process {os.getpid()}" in said[0]
    assert os.listdir(f"{repo.path}/.composefs-oci/locks") == []


def test_a_pull_that_dies_frees_the_layer(world: World, repo: Repository) -> None:
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        with Repository.open(repo.path, write=True) as other, other.lock(f"layer-{sha256(TARS[0])}", keep=False):
            os.write(writer, b"x")
            time.sleep(60)
        os._exit(1)
    os.read(reader, 1)
    fetch = Fetch(world, repo, 1)
    timer = threading.Timer(0.5, lambda: (os.kill(pid, signal.SIGKILL), os.waitpid(pid, 0)))
    timer.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules[__name__], "children", list)
        (result,) = list(fetch.run().values())
    timer.join()
    assert result.fetched > 0


def test_nobody_waits_for_ever_for_a_layer(world: World, repo: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "LOCK_WAIT", 0.3)
    with Repository.open(repo.path, write=True) as other, other.lock(f"layer-{sha256(TARS[0])}"):
        (result,) = list(Fetch(world, repo, 1).run().values())
    assert result.fetched > 0


# --- what passes and what does not
# -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault",
    [
        RegistryUnreachable("skopeo says: 503."),
        Stalled("No answer."),
        ProxyFailed("skopeo was killed.", passing=True),
        "short",
    ],
    ids=["unreachable", "stalled", "killed", "silent"],
)
def test_a_passing_fault_is_tried_again_with_another_proxy(world: World, repo: Repository, fault: Any) -> None:
    silent = fault == "short"
    # A short timeout may also find somebody silent who is only slow to get a processor, and then there is a retry more.
    run = Fetch(world, repo, 2, timeout=2.0 if silent else 60.0, retries=5 if silent else 2)
    world.blobs[run.digest(0)] = [b"short" if silent else fault]
    assert len(run.run()) == 2
    retried = run.source.retried
    assert retried >= 1 if silent else retried == 1
    assert len(world.proxies) == retried + 1
    begun = len([event for event in run.events.of(STARTED) if event.layer == run.layers[0].diff_id])
    assert 2 <= begun <= retried + 1 if silent else begun == 1


def test_retries_come_to_an_end_and_what_is_whole_stays(world: World, repo: Repository) -> None:
    run = Fetch(world, repo, 3, retries=2)
    world.blobs[run.digest(1)] = [RegistryUnreachable("skopeo says: 503.")] * 3
    with pytest.raises(
        RegistryUnreachable, match=f"importing layer {run.layers[1].diff_id} of {APP.text}: skopeo says: 503"
    ):
        run.run()
    assert run.source.retried == 2 and run.named() == [0], "and no new layer was begun"


@pytest.mark.parametrize("error", [ImageNotFound("Unknown blob."), DigestMismatch("Of another size.")])
def test_a_lasting_fault_is_not_tried_again(world: World, repo: Repository, error: EngineError) -> None:
    run = Fetch(world, repo, 1)
    world.blobs[run.digest(0)] = [error]
    with pytest.raises(type(error)):
        run.run()
    assert run.source.retried == 0


def test_wrong_bytes_register_nothing_and_are_not_tried_again(world: World, repo: Repository) -> None:
    run = Fetch(world, repo, 1)
    blob = bytearray(world.layout.read(run.digest(0)))
    blob[100] ^= 1
    world.blobs[run.digest(0)] = [bytes(blob)]
    with pytest.raises(DigestMismatch, match="where the manifest says"):
        run.run()
    assert run.named() == [] and run.source.retried == 0


def test_after_an_error_the_layers_under_way_end_and_no_others_begin(world: World, repo: Repository) -> None:
    run = Fetch(world, repo, 4, parallel=2)

    def slow(proxy: FakeProxy) -> bytes:
        # Until the error of the other lane is known: how long that takes is up to the machine.
        end = time.monotonic() + 60
        while run.fetcher._failure is None and time.monotonic() < end:
            time.sleep(0.01)
        return world.layout.read(run.digest(1))

    def fail(proxy: FakeProxy) -> bytes:
        raise ImageNotFound("Unknown blob.")

    world.blobs[run.digest(0)] = [fail]
    world.blobs[run.digest(1)] = [slow]
    with pytest.raises(ImageNotFound):
        run.run()
    assert run.named() in ([1], []) and not {run.digest(2), run.digest(3)} & set(world.fetched())


def test_the_first_of_several_errors_is_the_one_that_is_told(world: World, repo: Repository) -> None:
    run = Fetch(world, repo, 2, parallel=2)

    def late(proxy: FakeProxy) -> bytes:
        time.sleep(0.3)
        raise DigestMismatch("The second.")

    world.blobs[run.digest(0)] = [late]
    world.blobs[run.digest(1)] = [ImageNotFound("The first.")]
    with pytest.raises((ImageNotFound, DigestMismatch)) as caught:
        run.run()
    assert run.fetcher._failure is caught.value


# --- two verdicts
# --------------------------------------------------------------------------------------------------------------------


def test_skopeos_no_counts_although_we_find_nothing_wrong(world: World, repo: Repository) -> None:
    run = Fetch(world, repo, 1)
    world.verdicts[run.digest(0)] = [
        DigestMismatch("skopeo says: corrupted blob.", "Try again.", doing="Fetching from docker://x")
    ]
    with pytest.raises(DigestMismatch, match=r": skopeo refuses the blob: skopeo says: corrupted blob\. Try again\.$"):
        run.run()
    assert run.named() == []


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        (OSError(errno.ENOMEM, "Cannot allocate memory"), EngineError),
        (MemoryError(), OutOfMemory),
        (RuntimeError("can't start new thread"), EngineError),
        (SystemExit(0), EngineError),
    ],
)
def test_a_verdict_that_fails_in_any_way_is_no_approval(
    world: World, repo: Repository, monkeypatch: pytest.MonkeyPatch, fault: BaseException, kind: type[EngineError]
) -> None:
    def fail(proxy: FakeProxy, pipeid: int, timeout: float | None = None) -> None:
        raise fault

    monkeypatch.setattr(FakeProxy, "finish_pipe", fail)
    run = Fetch(world, repo, 1)
    with pytest.raises(kind):
        run.run()
    assert run.named() == [] and run.source.retried == 0


def test_a_skopeo_that_dies_before_its_verdict_is_not_a_verdict(world: World, repo: Repository) -> None:
    run = Fetch(world, repo, 1)
    world.verdicts[run.digest(0)] = [
        ProxyFailed("skopeo was killed by signal 9.", "Run the task again.", doing="Fetching", passing=True)
    ]
    assert len(run.run()) == 1 and run.source.retried == 1


def test_a_transfer_that_breaks_off_is_explained_by_skopeo(
    world: World, repo: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It goes silent; skopeo is asked, tells why and lets go of the pipe."""
    monkeypatch.setattr(layer, "PROBE_AFTER", 0.0)
    run = Fetch(world, repo, 1, timeout=120.0, retries=0)
    world.blobs[run.digest(0)] = [world.layout.read(run.digest(0))[:500]]
    world.verdicts[run.digest(0)] = [
        DigestMismatch(
            "skopeo says: expected 9 bytes in blob, got 500.", "Try again.", doing="Fetching from docker://x"
        )
    ]
    start = time.monotonic()
    with pytest.raises(
        DigestMismatch,
        match=r"ended after 500 of \d+ bytes\. skopeo says: expected 9 bytes in blob, got 500\. Try again\.$",
    ):
        run.run()
    assert time.monotonic() - start < 100


def test_what_broke_a_transfer_may_be_gone_at_the_next_try(
    world: World, repo: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layer, "PROBE_AFTER", 0.0)
    run = Fetch(world, repo, 1)
    world.blobs[run.digest(0)] = [world.layout.read(run.digest(0))[:500]]
    world.verdicts[run.digest(0)] = [DigestMismatch("skopeo says: expected 9 bytes in blob, got 500.")]
    assert len(run.run()) == 1 and run.source.retried == 1


@pytest.mark.slow
def test_a_verdict_that_queues_behind_a_moving_transfer_is_waited_for(
    world: World, repo: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FinishPipe of a slow blob occupies skopeo; the verdict on another comes later than the timeout, and nobody is to
    blame.
    """
    run = Fetch(world, repo, 2, parallel=2, timeout=2.0, retries=0)
    real = FakeProxy.finish_pipe
    # As the messages of the other worker set it: it has always just moved, however slow this machine is.
    monkeypatch.setattr(
        Fetcher, "_moved", property(lambda _self: time.monotonic(), lambda _self, _moved: None), raising=False
    )

    def slow_first(proxy: FakeProxy, pipeid: int, timeout: float | None = None) -> None:
        if proxy._pipes[pipeid][0] == run.digest(0):
            time.sleep(3)
        real(proxy, pipeid, timeout)

    monkeypatch.setattr(FakeProxy, "finish_pipe", slow_first)
    assert len(run.run()) == 2 and run.source.retried == 0


@pytest.mark.slow
def test_a_verdict_that_never_comes_is_a_stall(world: World, repo: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Fetch(world, repo, 1, timeout=2.0, retries=0)
    let_go = threading.Event()
    monkeypatch.setattr(FakeProxy, "finish_pipe", lambda *arguments, **options: let_go.wait(60))
    try:
        with pytest.raises(Stalled, match="gave no verdict"):
            run.run()
    finally:
        let_go.set()


@pytest.mark.slow
def test_who_lost_his_proxy_on_anothers_account_is_not_charged(
    world: World, repo: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layer 0 is silent and has skopeo replaced; that costs layer 1, under way at the same time, no retry."""
    run = Fetch(world, repo, 2, parallel=2, timeout=3.0, retries=1)

    def taken_along(proxy: FakeProxy) -> bytes:
        deadline = time.monotonic() + 60
        while not proxy.dead and time.monotonic() < deadline:
            time.sleep(0.01)
        raise ProxyFailed("skopeo is gone, it was stopped.", passing=True)

    def fails_itself(proxy: FakeProxy) -> bytes:
        raise RegistryUnreachable("skopeo says: 503.")

    turns = [taken_along, fails_itself]
    real = FakeProxy.get_blob

    def get_blob(proxy: FakeProxy, image: int, digest: str, size: int) -> Any:
        # Beside the fake's own lock, which the waiting one would hold.
        return turns.pop(0)(proxy) if digest == run.digest(1) and turns else real(proxy, image, digest, size)

    world.blobs[run.digest(0)] = [b"short"]
    monkeypatch.setattr(FakeProxy, "get_blob", get_blob)
    assert len(run.run()) == 2 and not turns, "its one retry was left for its own fault"


# --- workers
# --------------------------------------------------------------------------------------------------------------------


def test_a_worker_that_is_killed_is_a_clear_error(world: World, repo: Repository) -> None:
    run = Fetch(world, repo, 1)

    def kill_the_worker(proxy: FakeProxy) -> bytes:
        for child in children():
            os.kill(int(child), signal.SIGKILL)
        return world.layout.read(run.digest(0))

    world.blobs[run.digest(0)] = [kill_the_worker]
    with pytest.raises(IOFailed, match="imports layers was killed.*memory"):
        run.run()
    assert run.named() == []


def test_an_error_of_the_store_comes_through_with_its_class(
    world: World, repo: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any) -> Any:
        raise OSError(28, "No space left on device")

    # Patched before the fork, so the worker has it too.
    monkeypatch.setattr(ObjectStore, "_draft", full)
    with pytest.raises(NoSpace, match="importing layer"):
        Fetch(world, repo, 1).run()


def test_a_bug_in_a_worker_is_told_without_secrets(
    world: World, repo: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bug(*arguments: Any) -> Any:
        raise KeyError("hunter2")

    monkeypatch.setattr(ObjectStore, "_draft", bug)
    with pytest.raises(EngineError, match="Internal error: KeyError at") as caught:
        Fetch(world, repo, 1).run()
    assert "hunter2" not in str(caught.value)


@pytest.mark.slow
def test_a_worker_goes_on_after_a_layer_that_failed(world: World, repo: Repository) -> None:
    run = Fetch(world, repo, 2, timeout=1.0, retries=6)
    world.blobs[run.digest(0)] = [b"", b"short"]
    assert len(run.run()) == 2 and run.source.retried >= 2


def test_an_interrupted_pull_leaves_no_process_and_does_not_hang(
    world: World, repo: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The user presses Ctrl-C while a layer is under way."""
    # A shell starts what runs in the background with this signal ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    run = Fetch(world, repo, 1, timeout=120.0)

    def interrupted(proxy: FakeProxy) -> bytes:
        threading.Timer(0.3, _thread.interrupt_main).start()
        return b"short"

    world.blobs[run.digest(0)] = [interrupted]
    start = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            run.run()
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - start < 60


def test_the_option_goes_before_what_is_found(world: World, repo: Repository) -> None:
    assert Fetcher(repo, 3, 1.0, Progress())._parallel == 3
    assert Fetcher(repo, 0, 1.0, Progress())._parallel == processors.usable()
