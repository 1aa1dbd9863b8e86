# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Faults on the way: a clear error within bounded time, nothing named that is not whole, and a next run that finishes
the work.
"""

from __future__ import annotations

import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from ansible_collections.composefs.oci.plugins.module_utils import errors
from ansible_collections.composefs.oci.plugins.module_utils.pull import pull
from ansible_collections.composefs.oci.plugins.module_utils.progress import MESSAGE
from ansible_collections.composefs.oci.plugins.module_utils.store.repository import Repository
from faultproxy import FaultProxy, Rule
from ociimage import Layout, sha256
from pulling import Recorder, layer_tar, names, options, pull_all, pull_one
from registry import Registry
from tarbytes import member, small_tree, tar

SMALL = small_tree(seed=11)
LARGE = tar(member("usr/large", random.Random(5).randbytes(3_000_000)))
NAME = "faults:image"


@pytest.fixture(scope="module")
def image(disk: pathlib.Path, registry: Registry) -> dict[str, Any]:
    """An image of a small and a large layer in the registry; its manifest."""
    layout = Layout(disk / "faulty")
    digest = layout.image([SMALL, LARGE])
    registry.push(f"{layout.path}:latest", NAME)
    manifest = json.loads(layout.read(digest))
    assert isinstance(manifest, dict)
    return manifest


def large(image: dict[str, Any]) -> str:
    return str(image["layers"][1]["digest"])


def nothing_but_the_small_layer(path: pathlib.Path) -> None:
    """No tag, manifest or configuration; what is named is whole."""
    assert {name.split(" -> ")[0] for name in names(path)} <= {f"streams/oci-layer-{sha256(SMALL)}"}
    if names(path):
        assert layer_tar(path, sha256(SMALL)) == SMALL


def finishes(path: pathlib.Path, faults: FaultProxy) -> None:
    """Without the fault the next run makes the image whole."""
    faults.clear()
    assert pull_one(path, faults.reference(NAME))["changed"]
    assert layer_tar(path, sha256(LARGE)) == LARGE and layer_tar(path, sha256(SMALL)) == SMALL
    assert not pull_one(path, faults.reference(NAME))["changed"]


# ---- transfers -------------------------------------------------------------------------------------------------------


def test_a_silent_transfer_is_given_up_after_the_timeout(
    image: dict[str, Any], faults: FaultProxy, repository_path: pathlib.Path
) -> None:
    faults.add(Rule(large(image), stall=500_000))
    start = time.monotonic()
    with pytest.raises(errors.Stalled, match="5 seconds"):
        pull_one(repository_path, faults.reference(NAME), chosen=options(timeout=5.0))
    assert time.monotonic() - start < 50
    nothing_but_the_small_layer(repository_path)
    finishes(repository_path, faults)


def test_a_silent_transfer_is_tried_again_with_a_new_proxy(
    image: dict[str, Any], faults: FaultProxy, repository_path: pathlib.Path
) -> None:
    faults.add(Rule(large(image), stall=500_000, times=1))
    recorder = Recorder()
    request = pull.Request(faults.reference(NAME), "image")
    # So short a timeout may also find skopeo silent when it only waits for a processor: hence more tries than one.
    (result,) = pull_all(repository_path, [request], options(timeout=4.0, retries=5), recorder)
    assert result["changed"] and result["stats"]["retries"] >= 1
    assert any("Trying again" in event.text for event in recorder.events if event.kind == MESSAGE)
    assert layer_tar(repository_path, sha256(LARGE)) == LARGE


def test_a_cut_connection_is_an_error_in_skopeos_words_and_tried_again(
    image: dict[str, Any], faults: FaultProxy, repository_path: pathlib.Path
) -> None:
    faults.add(Rule(large(image), cut=100_000))
    with pytest.raises(errors.EngineError) as caught:
        pull_one(repository_path, faults.reference(NAME), chosen=options(timeout=30.0))
    assert caught.value.code in (
        "registry_unreachable",
        "proxy_failed",
        "stalled",
        "digest_mismatch",
    ) and "skopeo says" in str(caught.value)
    nothing_but_the_small_layer(repository_path)
    faults.clear()
    faults.add(Rule(large(image), cut=100_000, times=1))
    assert pull_one(repository_path, faults.reference(NAME), chosen=options(timeout=30.0, retries=2))["changed"]


def test_wrong_bytes_register_nothing(image: dict[str, Any], faults: FaultProxy, repository_path: pathlib.Path) -> None:
    faults.add(Rule(large(image), flip=1_000_000))
    with pytest.raises(errors.DigestMismatch, match="where the manifest says " + large(image)):
        pull_one(repository_path, faults.reference(NAME))
    nothing_but_the_small_layer(repository_path)
    finishes(repository_path, faults)


def test_a_short_answer_registers_nothing(
    image: dict[str, Any], faults: FaultProxy, repository_path: pathlib.Path
) -> None:
    faults.add(Rule(large(image), shorten=1000))
    with pytest.raises(errors.EngineError) as caught:
        pull_one(repository_path, faults.reference(NAME))
    assert caught.value.code in ("digest_mismatch", "registry_unreachable")
    nothing_but_the_small_layer(repository_path)
    finishes(repository_path, faults)


@pytest.mark.parametrize("lie", [-100, 100])
def test_a_manifest_that_lies_about_a_size_registers_nothing(
    repository_path: pathlib.Path, place: pathlib.Path, lie: int
) -> None:
    layout = Layout(place / "layout")
    honest = layout.layer(LARGE)
    size = honest.descriptor["size"] + lie
    layout.image([layout.layer(LARGE, size=size)])
    start = time.monotonic()
    with pytest.raises(errors.EngineError) as caught:
        pull_one(repository_path, f"oci:{layout.path}:latest", chosen=options(timeout=120.0))
    assert caught.value.code in ("digest_mismatch", "registry_unreachable") and time.monotonic() - start < 100
    assert names(repository_path) == set()


def test_authentication_is_asked_for_and_the_code_says_so(
    image: dict[str, Any], faults: FaultProxy, repository_path: pathlib.Path
) -> None:
    faults.add(Rule("/manifests/", status=401, methods=("GET", "HEAD")))
    with pytest.raises(errors.AuthFailed):
        pull_one(repository_path, faults.reference(NAME), chosen=options(retries=3))


def test_a_passing_fault_of_the_registry_is_survived(
    image: dict[str, Any], faults: FaultProxy, repository_path: pathlib.Path
) -> None:
    faults.add(Rule("/manifests/", status=500, times=1, methods=("GET", "HEAD")))
    faults.add(Rule(large(image), status=500, times=1))
    result = pull_one(repository_path, faults.reference(NAME), chosen=options(retries=3))
    assert result["changed"] and result["stats"]["retries"] >= 2


def test_a_lasting_fault_of_the_registry_ends_after_the_retries(
    image: dict[str, Any], faults: FaultProxy, repository_path: pathlib.Path
) -> None:
    faults.add(Rule("/manifests/", status=503, methods=("GET", "HEAD")))
    with pytest.raises(errors.RegistryUnreachable):
        pull_one(repository_path, faults.reference(NAME), chosen=options(retries=1))


def test_one_failing_layer_leaves_the_other_for_the_next_run(
    image: dict[str, Any], faults: FaultProxy, repository_path: pathlib.Path
) -> None:
    # The failure comes when the other layer is on its way. Where skopeo was asked for the failing one first, it asks for
    # nothing else before that has its answer.
    faults.add(Rule(large(image), status=404, delay=100.0))
    small = str(image["layers"][0]["digest"])

    def release() -> None:
        end = time.monotonic() + 10
        while not faults.hits(small) and time.monotonic() < end:
            time.sleep(0.02)
        faults.release()

    thread = threading.Thread(target=release)
    thread.start()
    with pytest.raises(errors.EngineError):
        pull_one(repository_path, faults.reference(NAME), chosen=options(parallel=2, timeout=120.0))
    thread.join()
    assert layer_tar(repository_path, sha256(SMALL)) == SMALL
    faults.clear()
    result = pull_one(repository_path, faults.reference(NAME))
    assert [layer["status"] for layer in result["layers"]] == ["present", "new"]


# ---- secrets and certificates ----------------------------------------------------------------------------------------


def test_user_and_password_of_a_private_registry(
    private_registry: Registry, repository_path: pathlib.Path, image: dict[str, Any], disk: pathlib.Path
) -> None:
    private_registry.push(f"{disk / 'faulty'}:latest", "secret:1")
    reference = private_registry.reference("secret:1")
    right: dict[str, Any] = {
        "tls_verify": None,
        "cert_dir": str(private_registry.ca_directory),
        "username": private_registry.user,
        "password": private_registry.password,
    }
    for change, kind in (
        ({"password": "wrong pass"}, errors.AuthFailed),
        ({"username": None, "password": None}, errors.AuthFailed),
        ({"cert_dir": None}, errors.TlsFailed),
    ):
        with pytest.raises(kind) as caught:
            pull_one(repository_path, reference, chosen=options(proxy={**right, **change}))
        assert "wrong pass" not in str(caught.value)
    assert pull_one(repository_path, reference, chosen=options(proxy=right))["changed"]
    by_file = {
        "tls_verify": None,
        "cert_dir": str(private_registry.ca_directory),
        "auth_file": str(private_registry.auth_file()),
    }
    assert not pull_one(repository_path, reference, chosen=options(proxy=by_file))["changed"]
    # What the repository remembers of the image is where it came from, and nothing that opens the door there.
    remembered = [one.read_text() for one in (repository_path / ".composefs-oci").rglob("*") if one.is_file()]
    assert any(reference in text for text in remembered)
    assert not any(private_registry.password in text for text in remembered)


# ---- processes that die ----------------------------------------------------------------------------------------------


@pytest.fixture
def running(repository_path: pathlib.Path, tmp_path: pathlib.Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """``running(reference, prefix=[...], **options)`` pulls in a process of its own, as a module does."""
    script = tmp_path / "pull.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import json, sys
            sys.path[:0] = {[str(pathlib.Path(__file__).parent), *filter(None, sys.path)]!r}
            import conftest, pulling
            from ansible_collections.composefs.oci.plugins.module_utils.errors import EngineError
            reference, settings = json.loads(sys.argv[1])
            try:
                print(json.dumps(pulling.pull_one(__import__("pathlib").Path({str(repository_path)!r}), reference, chosen=pulling.options(**settings))))
            except EngineError as error:
                print(json.dumps({{"error": error.code, "msg": str(error)}}))
            """
        )
    )
    started: list[subprocess.Popen[str]] = []

    def start(reference: str, prefix: tuple[str, ...] = (), **settings: Any) -> subprocess.Popen[str]:
        command = [*prefix, sys.executable, str(script), json.dumps([reference, settings])]
        environment = {**os.environ, "PYTHONPATH": str(pathlib.Path(__file__).parent), "PYTHONDONTWRITEBYTECODE": "1"}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


def descendants(pid: int) -> dict[int, str]:
    """Process ids and command names of all descendants."""
    found: dict[int, str] = {}
    todo = [pid]
    while todo:
        current = todo.pop()
        for task in pathlib.Path(f"/proc/{current}/task").glob("*/children"):
            try:
                children = [int(child) for child in task.read_text().split()]
                found.update({child: pathlib.Path(f"/proc/{child}/comm").read_text().strip() for child in children})
            except OSError:
                continue
            todo += children
    return found


def wait_for(condition: Callable[[], Any], seconds: float = 60.0) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.02)
    raise AssertionError("it did not happen in time")


def test_skopeo_killed_in_the_middle_is_replaced(
    image: dict[str, Any],
    faults: FaultProxy,
    repository_path: pathlib.Path,
    running: Callable[..., subprocess.Popen[str]],
) -> None:
    rule = faults.add(Rule(large(image), stall=500_000, times=1))
    process = running(faults.reference(NAME), timeout=60.0, retries=2)
    wait_for(lambda: faults.sent(large(image)) >= 500_000)
    victim = wait_for(lambda: [pid for pid, name in descendants(process.pid).items() if name == "skopeo"])[0]
    os.kill(victim, signal.SIGKILL)
    output, complaints = process.communicate(timeout=180)
    assert rule.times is not None and json.loads(output)["changed"], complaints
    assert layer_tar(repository_path, sha256(LARGE)) == LARGE


def test_a_worker_killed_in_the_middle_is_a_clear_error(
    image: dict[str, Any],
    faults: FaultProxy,
    repository_path: pathlib.Path,
    running: Callable[..., subprocess.Popen[str]],
) -> None:
    faults.add(Rule(large(image), stall=500_000))
    process = running(faults.reference(NAME), timeout=60.0)
    wait_for(lambda: faults.sent(large(image)) >= 500_000)
    for pid in wait_for(lambda: [child for child, name in descendants(process.pid).items() if name != "skopeo"]):
        os.kill(pid, signal.SIGKILL)
    output, _unused = process.communicate(timeout=180)
    answer = json.loads(output)
    assert answer["error"] == "io_error" and "memory" in answer["msg"]
    finishes(repository_path, faults)


def test_no_process_outlives_a_killed_module(
    image: dict[str, Any],
    faults: FaultProxy,
    repository_path: pathlib.Path,
    running: Callable[..., subprocess.Popen[str]],
) -> None:
    faults.add(Rule(large(image), stall=500_000))
    process = running(faults.reference(NAME), timeout=60.0)
    wait_for(lambda: faults.sent(large(image)) >= 500_000)
    family = wait_for(lambda: len(found := list(descendants(process.pid))) >= 2 and found)
    process.kill()
    process.wait()

    def gone(pid: int) -> bool:
        try:
            return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
        except OSError:
            return True

    wait_for(lambda: all(gone(pid) for pid in family), 30)
    nothing_but_the_small_layer(repository_path)
    finishes(repository_path, faults)


@pytest.mark.parametrize("call", ["linkat", "symlinkat", "rename", "syncfs", "mkdirat"])
def test_killed_at_any_step_leaves_a_repository_that_the_next_run_finishes(
    image: dict[str, Any],
    registry: Registry,
    repository_path: pathlib.Path,
    running: Callable[..., subprocess.Popen[str]],
    call: str,
) -> None:
    strace = shutil.which("strace")
    if not strace:
        pytest.skip("strace is not installed, so no process can be killed at a chosen system call")
    names_of_call = {
        "rename": "?rename,?renameat,?renameat2",
        "linkat": "?link,?linkat",
        "symlinkat": "?symlink,?symlinkat",
        "mkdirat": "?mkdir,?mkdirat",
    }
    calls = names_of_call.get(call, call)
    reference = registry.reference(NAME)
    survived = False
    for number in [1, 2, 3, 5, 8, 13, 21]:
        inject = f"inject={calls}:signal=SIGKILL:when={number}"
        process = running(reference, (strace, "-f", "-qq", "-o", "/dev/null", "-e", f"trace={calls}", "-e", inject))
        output, _unused = process.communicate(timeout=300)
        survived = "error" not in json.loads(output or '{"error": "killed"}')
        with Repository.open(str(repository_path)) as repository:
            tags = repository.tags()
            for name in repository.streams("oci-layer-"):
                assert sha256(layer_tar(repository_path, name[len("oci-layer-") :])) == name[len("oci-layer-") :]
        # A name leads to a whole image or is not there, and a run that was killed after it gave the name has nothing
        # left to do.
        assert not tags or not pull_one(repository_path, reference, chosen=options(check=True))["changed"]
        if survived:
            break
    if not survived:
        assert pull_one(repository_path, reference)["digest"]
    assert not pull_one(repository_path, reference)["changed"]


# ---- places that cannot be written -----------------------------------------------------------------------------------


def test_too_little_space_is_seen_before_anything_is_fetched(
    image: dict[str, Any],
    faults: FaultProxy,
    small_fs: Callable[..., pathlib.Path],
    new_repository: Callable[..., pathlib.Path],
) -> None:
    path = new_repository(small_fs("1M", "tmpfs") / "repository")
    with pytest.raises(errors.NoSpace, match=r"need at least \d+ bytes .* has \d+ bytes"):
        pull_one(path, faults.reference(NAME))
    assert not faults.hits(large(image))


def test_a_disk_that_fills_up_ends_in_the_same_error_and_keeps_what_is_whole(
    repository_path: pathlib.Path,
    place: pathlib.Path,
    small_fs: Callable[..., pathlib.Path],
    new_repository: Callable[..., pathlib.Path],
) -> None:
    layout = Layout(place / "layout")
    layout.image([SMALL, tar(member("usr/zeros", bytes(40_000_000)))])
    path = new_repository(small_fs("16M") / "repository")
    with pytest.raises(errors.NoSpace):
        pull_one(path, f"oci:{layout.path}:latest", chosen=options(parallel=1))
    assert not any("manifest" in name or "refs" in name for name in names(path))


def test_no_inodes_left_is_no_space_too(
    image: dict[str, Any],
    faults: FaultProxy,
    small_fs: Callable[..., pathlib.Path],
    new_repository: Callable[..., pathlib.Path],
) -> None:
    path = new_repository(small_fs("32M", "inodes", 40) / "repository")
    with pytest.raises(errors.NoSpace):
        pull_one(path, faults.reference(NAME))
    assert not any("manifest" in name or "refs" in name for name in names(path))


def test_a_read_only_repository_says_so_and_can_still_be_asked(
    image: dict[str, Any],
    registry: Registry,
    small_fs: Callable[..., pathlib.Path],
    new_repository: Callable[..., pathlib.Path],
    read_only: Callable[[pathlib.Path], None],
) -> None:
    mount = small_fs("32M")
    path = new_repository(mount / "repository")
    pull_one(path, registry.reference(NAME))
    read_only(mount)
    assert not pull_one(path, registry.reference(NAME))["changed"]
    with pytest.raises(errors.ReadOnly):
        pull_one(path, registry.reference(NAME), "another")


def test_a_path_that_is_no_repository_says_what_to_do(place: pathlib.Path) -> None:
    with pytest.raises(errors.NotARepository, match="composefs_repository"):
        pull_one(place, "oci:/nowhere")


# ---- torn objects ----------------------------------------------------------------------------------------------------


def test_objects_torn_by_a_power_cut_are_found_and_replaced(
    image: dict[str, Any], registry: Registry, repository_path: pathlib.Path
) -> None:
    """The state after a power cut during an import: a mark of another boot, objects without their bytes, no names."""
    pull_one(repository_path, registry.reference(NAME))
    objects = [path for path in (repository_path / "objects").glob("*/*") if path.stat().st_size > 100]
    shutil.rmtree(repository_path / "streams")
    shutil.rmtree(repository_path / "images")
    marks = repository_path / ".composefs-oci/imports"
    marks.mkdir(parents=True, exist_ok=True)
    (marks / "0123456789abcdef").write_text(
        json.dumps({"boot_id": "another boot", "pid": 1, "started": time.time() - 60})
    )
    torn = objects[::3]
    for number, path in enumerate(torn):
        size = path.stat().st_size
        with open(path, "r+b") as file:
            file.truncate(0 if number % 2 else size - 1)
            if number % 3 == 0:
                file.truncate(size)
    pull_one(repository_path, registry.reference(NAME))
    assert layer_tar(repository_path, sha256(LARGE)) == LARGE and layer_tar(repository_path, sha256(SMALL)) == SMALL
    assert list(marks.iterdir()) == []
