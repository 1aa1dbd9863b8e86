# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Images on trial: real mounts, the real program, real timers, and death at any moment."""

from __future__ import annotations

import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import pytest
from ansible_collections.composefs.oci.plugins.module_utils.errors import (
    Busy,
    EngineError,
    ImageNotFound,
    Reverted,
)
from ansible_collections.composefs.oci.plugins.module_utils.host import deadman, mountinfo
from ansible_collections.composefs.oci.plugins.module_utils.operations import (
    deployment,
    journal,
    lastingmount,
    mounting,
    mountlisting,
)
from ansible_collections.composefs.oci.plugins.module_utils.store.repository import Repository
from deploying import App, content


def image_of(app: App, name: str) -> str:
    with Repository.open(str(app.repository)) as repository:
        return mounting.resolve(repository, name).hex()


def wait_for(what: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def waiting(app: App) -> int:
    return len(deadman.waiting(lastingmount.timer_name(os.path.realpath(app.point))))


def disarmed(app: App) -> bool:
    """Whether nothing waits for this host to go back, soon: who is told to end needs a moment for it."""
    deadline = time.monotonic() + 60
    while waiting(app) and time.monotonic() < deadline:
        time.sleep(0.02)
    return waiting(app) == 0


# ---- the usual way ---------------------------------------------------------------------------------------------------


def test_an_image_is_tried_confirmed_and_then_current(app: App) -> None:
    first, second = app.stage("v1"), app.stage("v2")
    app.activate(first, confirm_within=0)
    assert app.journal().current.digest == first and app.journal().pending is None and disarmed(app)
    before = app.journal()
    foretold = app.activate(second, rollout="r1", check=True)
    assert foretold.changed and app.journal() == before and app.data() == content("v1")
    result = app.activate(second, rollout="r1", who="anna@control")
    assert result.changed and app.data() == content("v2") and waiting(app) == 1
    found = app.journal()
    assert found.current.digest == first and found.pending.digest == second
    assert found.pending.origin == before.current.image_id
    assert not app.activate(second, rollout="r1").changed, "the same again"
    result = app.confirm(second, rollout="r1")
    assert result.changed and disarmed(app) and app.data() == content("v2")
    found = app.journal()
    assert (found.current.digest, found.current.rollout, found.pending) == (second, "r1", None)
    assert [image.digest for image in found.previous] == [first]
    assert (found.history[-1].result, found.history[-1].who, found.history[-1].digest) == (
        "confirmed",
        "anna@control",
        second,
    )
    assert not app.confirm(second, rollout="r1").changed and not app.activate(second, rollout="r2").changed
    with Repository.open(str(app.repository)) as repository:
        assert repository.tag_digest("app") == second
    # Back again needs nothing but what is there.
    assert app.activate(first, confirm_within=0).changed and app.data() == content("v1")
    assert app.tags() == {"app", f"app@{first}", f"app@{second}"}
    third = app.stage("v3")
    app.activate(third, confirm_within=0)
    assert app.tags() == {"app", f"app@{first}", f"app@{third}"} and len(app.links()) == 2
    app.unmount()
    assert app.tags() == {"app"} and app.links() == set() and not os.path.exists(app.places.library)


def test_what_nobody_confirms_is_taken_back_by_the_host(app: App) -> None:
    first, second = app.stage("v1"), app.stage("v2")
    app.activate(first, confirm_within=0)
    ran = app.point.parent / "ran"
    reload = ("/bin/sh", "-c", f"cat {app.point}/usr/data >> {ran}")
    # Long enough for this process to open a file meanwhile, whatever else the machine does.
    app.activate(second, confirm_within=10, rollout="r1", reload=reload)
    with open(app.point / "usr/data", "rb") as file:
        wait_for(lambda: app.journal().pending is None)
        assert file.read() == content("v2"), "who has files open keeps them"
    wait_for(lambda: ran.read_bytes() == content("v2") + content("v1") and len(app.links()) == 1)
    assert app.data() == content("v1")
    event = app.journal().history[-1]
    assert (event.result, event.reason, event.rollout) == ("reverted", "not confirmed in time", "r1")
    with pytest.raises(Reverted, match="not confirmed in time"):
        app.confirm(second, rollout="r1")


def test_where_nothing_was_nothing_is_again(app: App) -> None:
    first = app.stage("v1")
    app.activate(first, confirm_within=1)
    directory = os.open(app.point, os.O_RDONLY)
    try:
        wait_for(lambda: app.journal().pending is None)
        assert app.mounted() is None and app.journal().current is None
    finally:
        os.close(directory)
    assert app.activate(first, confirm_within=60).changed
    assert app.revert(reason="health", who="anna").changed and app.mounted() is None and disarmed(app)
    assert app.journal().history[-1].reason == "health"
    assert not app.revert().changed


def test_others_are_busy_and_are_told_who_and_until_when(app: App) -> None:
    first, second = app.stage("v1"), app.stage("v2")
    app.activate(first, rollout="r1", who="anna@control")
    deadline = app.journal().pending.deadline
    verbs: list[Callable[[], object]] = [
        lambda: app.activate(second, rollout="r2"),
        lambda: app.confirm(first, rollout="r2"),
        lambda: app.confirm(second),
        lambda: app.mount(first),
        app.unmount,
    ]
    for verb in verbs:
        with pytest.raises(Busy, match=f"r1 of anna@control .* until {deadline}"):
            verb()
    # A rescue after that, and a late timer, leave it alone.
    assert not app.revert(rollout="r2").changed
    assert deployment.revert(os.path.realpath(app.point), app.host, token="another") is None
    assert app.journal().pending is not None and app.data() == content("v1")


def test_a_trial_past_its_deadline_is_taken_back_by_the_next_verb(app: App) -> None:
    first, second, third = app.stage("v1"), app.stage("v2"), app.stage("v3")
    app.activate(first, confirm_within=0)
    app.activate(second, confirm_within=1, rollout="r1")
    deadman.disarm(lastingmount.timer_name(os.path.realpath(app.point)), app.host.run, False)
    time.sleep(2.1)
    app.activate(third, confirm_within=0, rollout="r2")
    assert [event.result for event in app.journal().history] == ["confirmed", "reverted", "confirmed"]
    assert app.data() == content("v3") and [image.digest for image in app.journal().previous] == [first]


def test_a_reboot_ends_a_trial(app: App, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = app.stage("v1"), app.stage("v2")
    app.activate(first, confirm_within=0)
    app.activate(second, rollout="r1")
    subprocess.run(["umount", str(app.point)], check=True)
    monkeypatch.setattr(journal, "boot_id", lambda: "another")
    with pytest.raises(Reverted, match="reboot"):
        app.confirm(second, rollout="r1")
    assert app.journal().history[-1].reason == "reboot" and app.journal().pending is None


def test_nothing_is_fetched(app: App) -> None:
    digest = "sha256:" + "0" * 64
    for check in (True, False):
        with pytest.raises(ImageNotFound, match="composefs_image: activating never does"):
            app.activate(digest, check=check)
    assert not os.path.exists(app.places.library) and app.mounted() is None


def test_a_service_that_does_not_come_up_is_not_left_with_the_new_image(app: App) -> None:
    first, second = app.stage("v1"), app.stage("v2")
    app.activate(first, confirm_within=0)
    with pytest.raises(Reverted, match="failed with status 3"):
        app.activate(second, rollout="r1", reload=("/bin/sh", "-c", f"grep -q v1 {app.point}/usr/data || exit 3"))
    assert app.data() == content("v1") and app.journal().pending is None and disarmed(app)
    assert app.journal().history[-1].result == "failed"


def test_a_reload_command_that_is_not_there_is_no_reason_to_stay(app: App) -> None:
    first, second = app.stage("v1"), app.stage("v2")
    app.activate(first, confirm_within=0)

    def run(_words: list[str]) -> tuple[int, str, str]:
        raise FileNotFoundError(2, "No such file or directory", "/nowhere")

    app.host = app.host._replace(run=run)
    with pytest.raises(Reverted, match="could not be run"):
        app.activate(second, reload=("/nowhere",))
    assert app.data() == content("v1") and app.journal().pending is None and disarmed(app)


def test_an_image_that_cannot_be_mounted_changes_nothing(app: App) -> None:
    first, second = app.stage("v1"), app.stage("v2")
    app.activate(first, confirm_within=0)
    image = image_of(app, f"app@{second}")
    path = app.repository / "objects" / image[:2] / image[2:]
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    with pytest.raises(EngineError, match="damaged"):
        app.activate(second)
    assert app.data() == content("v1") and app.journal().pending is None and disarmed(app)


def test_going_back_that_fails_is_said_and_the_new_image_stays_up(app: App, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = app.stage("v1"), app.stage("v2")
    app.activate(first, confirm_within=0)
    old = image_of(app, f"app@{first}")
    app.activate(second, rollout="r1")
    path = app.repository / "objects" / old[:2] / old[2:]
    whole = path.read_bytes()
    path.unlink()
    path.write_bytes(whole[:-1] + b"!")
    monkeypatch.setattr(deployment, "_PAUSE", 0.01)
    with pytest.raises(EngineError, match="Taking back the image on trial"):
        app.revert(rollout="r1")
    assert app.data() == content("v2") and app.journal().history[-1].result == "revert_failed"
    told = mountlisting.deployments(app.host)[0][0]
    assert told["state"] == "revert_failed" and told["pending"]["rollout"] == "r1"
    path.write_bytes(whole)
    assert app.revert(rollout="r1").changed and app.data() == content("v1")


# ---- what is told ----------------------------------------------------------------------------------------------------


def test_mounts_and_deployments_are_told(app: App, cfsctl: Callable[..., str]) -> None:
    first, second, third = app.stage("v1"), app.stage("v2"), app.stage("v3")
    app.activate(first, confirm_within=0)
    app.activate(second, rollout="r1")
    point = os.path.realpath(app.point)
    (told,), complaints = mountlisting.deployments(app.host, point)
    assert complaints == [] and told["state"] == "activated" and told["mounted_image_id"] == told["pending"]["image_id"]
    assert told["staged"] == [{"name": f"app@{third}", "digest": third}] and "token" not in told["pending"]
    (mount,), _complaints = mountlisting.mounts(app.host, point)
    assert {key: mount[key] for key in mount if key not in ("image_id", "keeps", "unit_state")} == {
        "path": point,
        "name": "app",
        "digest": second,
        "version": "v2",
        "verity": False,
        "writable": False,
        "persistent": False,
        "unit": None,
        "repository": os.path.realpath(app.repository),
    }
    assert [keeper.split("/")[0] for keeper in mount["keeps"]] == [f"app@{second}", "images"]
    app.confirm()
    assert mountlisting.deployments(app.host, point)[0][0]["state"] == "current"
    subprocess.run(["umount", point], check=True)
    assert mountlisting.deployments(app.host, point)[0][0]["state"] == "drifted"
    assert mountlisting.mounts(app.host, point)[0][0]["image_id"] is None
    other = app.point.parent / "other"
    other.mkdir()
    cfsctl("--repo", app.repository, "oci", "mount", "--fuse", "no", f"app@{third}", other)
    (foreign,), _complaints = mountlisting.mounts(app.host, str(other))
    assert (foreign["image_id"], foreign["unit"]) == (image_of(app, f"app@{third}"), None)
    assert mountinfo.showing({foreign["image_id"]}) == [os.path.realpath(other)]


# ---- at boot ---------------------------------------------------------------------------------------------------------


def run_program(app: App, *words: str, before: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """As a unit runs it: an isolated interpreter, no environment, another working directory."""
    command = [*before, sys.executable, "-I", app.places.application, *words, *app.places.words, "--", str(app.point)]
    return subprocess.run(command, cwd="/", env={}, capture_output=True, text=True, check=False)


def test_a_boot_mounts_what_the_journal_calls_current(app: App) -> None:
    first, second = app.stage("v1"), app.stage("v2")
    app.activate(first, confirm_within=0)
    app.activate(second, rollout="r1")
    assert run_program(app, "boot").returncode == 0 and app.data() == content("v2"), "a trial of this boot goes on"
    # The power goes while it is on trial.
    found = app.journal()
    earlier = journal.to_values(found)
    earlier["boot"] = None
    earlier["pending"]["boot"] = "an earlier one"
    journal.write(journal.parse(json.dumps(earlier).encode(), "x"), app.places)
    subprocess.run(["umount", str(app.point)], check=True)
    done = run_program(app, "boot")
    assert (done.returncode, done.stderr) == (0, "") and app.data() == content("v1")
    assert (app.journal().pending, app.journal().history[-1].reason) == (None, "reboot")
    assert run_program(app, "boot").returncode == 0


@pytest.mark.parametrize("damage", ["torn", "newer", "read-only"])
def test_a_boot_does_not_fail_because_of_the_journal(app: App, damage: str) -> None:
    first, second = app.stage("v1"), app.stage("v2")
    app.activate(first, confirm_within=0)
    app.activate(second, confirm_within=0)
    file = pathlib.Path(journal.file_of(os.path.realpath(app.point), app.places))
    subprocess.run(["umount", str(app.point)], check=True)
    wanted = content("v1" if damage == "torn" else "v2")
    if damage == "torn":
        file.write_bytes(b"\0" * 4096)
    elif damage == "newer":
        file.write_text(file.read_text().replace('"version": 1', '"version": 9'))
    else:
        file.write_text(file.read_text().replace(journal.boot_id(), "an earlier one"))
        subprocess.run(["mount", "--bind", app.places.library, app.places.library], check=True)
        subprocess.run(["mount", "-o", "remount,bind,ro", app.places.library], check=True)
    try:
        done = run_program(app, "boot")
    finally:
        if damage == "read-only":
            subprocess.run(["umount", app.places.library], check=True)
    assert done.returncode == 0 and app.data() == wanted, done.stderr
    assert ("warning: " in done.stderr) == (damage != "newer") and "Traceback" not in done.stderr
    if damage == "torn":
        assert app.journal().current.digest == first, "what was booted with is what counts now"
    elif damage == "newer":
        assert '"version": 9' in file.read_text()


def test_a_boot_without_any_journal_fails_in_one_line(app: App) -> None:
    app.activate(app.stage("v1"), confirm_within=60)
    subprocess.run(["umount", str(app.point)], check=True)
    journal.remove(os.path.realpath(app.point), app.places)
    done = run_program(app, "boot")
    assert done.returncode == 1 and done.stderr.startswith("mount_failed: There is no journal")


# ---- races and deaths ------------------------------------------------------------------------------------------------


SCRIPT = """
import sys
import conftest
from deploying import App
import pathlib
place, repository, verb, first, second, seconds = sys.argv[1:7]
app = App(pathlib.Path(place), pathlib.Path(repository), None)
sys.stdout.write("ready\\n"); sys.stdout.flush(); sys.stdin.readline()
if verb == "activate":
    app.activate(second, confirm_within=int(seconds), rollout="r")
elif verb == "confirm":
    app.confirm(second, rollout="r")
elif verb == "revert":
    app.revert(rollout="r")
elif verb == "mount":
    app.mount("app@" + second)
elif verb == "unmount":
    app.unmount()
"""


def start(
    app: App, verb: str, first: str, second: str, seconds: int = 900, before: tuple[str, ...] = ()
) -> subprocess.Popen[str]:
    """A process that is about to begin with the verb: it waits for a line."""
    here = pathlib.Path(__file__).parent
    words = [str(app.point.parent), str(app.repository), verb, first, second, str(seconds)]
    process = subprocess.Popen(
        [*before, sys.executable, "-c", SCRIPT, *words],
        cwd=here,
        env={**os.environ, "PYTHONPATH": str(here), "PYTHONDONTWRITEBYTECODE": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n", process.communicate()[1]
    return process


def go(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


class Pair(NamedTuple):
    """The digests of two versions, and the ids of their images."""

    first: str
    second: str
    old: str
    new: str


def judge_what_a_death_left(app: App, verb: str, pair: Pair, where: str) -> None:
    """The old mount, or the new one with a timer behind it or confirmed; and the same verb again finishes."""
    _first, second, old, new = pair
    found, mounted = app.journal(), app.mounted()
    state = f"{verb} {where}: {found}, {mounted}"
    if verb == "unmount":
        assert mounted in (old, None), state
    else:
        assert mounted in (old, new), state
        assert found is not None and found.current is not None, state
        if mounted == new and found.current.image_id != new and verb != "mount":
            assert found.pending is not None and waiting(app) == 1, state
        kept = app.links()
        assert mounted in kept and found.current.image_id in kept, state
    # The same again, to its end.
    if verb == "activate":
        if found.pending is not None and mounted == old:
            app.revert(rollout="r")
        app.activate(second, rollout="r")
        app.confirm(second)
        assert app.data() == content("v2")
    elif verb == "confirm":
        app.confirm(second, rollout="r")
        assert app.data() == content("v2") and app.journal().current.image_id == new and disarmed(app)
    elif verb == "revert":
        app.revert(rollout="r")
        assert app.data() == content("v1") and app.journal().pending is None
    elif verb == "mount":
        app.mount(f"app@{second}")
        assert app.data() == content("v2") and not app.mount(f"app@{second}").changed
    else:
        app.unmount()
        assert app.mounted() is None and app.links() == set() and not os.path.exists(app.places.journals)


def prepare(app: App, verb: str, number: object) -> Pair:
    """The first image is current; for verbs that end a trial the second one is on trial."""
    first, second = app.stage("v1"), app.stage("v2")
    pair = Pair(first, second, image_of(app, f"app@{first}"), image_of(app, f"app@{second}"))
    app.activate(first, confirm_within=0, rollout=f"base {number}")
    if verb in ("confirm", "revert"):
        app.activate(second, rollout="r", confirm_within=900)
    return pair


VERBS = ["activate", "confirm", "revert", "mount", "unmount"]


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_that_is_killed_at_any_moment_leaves_what_the_next_one_repairs(app: App, verb: str) -> None:
    chance = random.Random(verb)
    longest = 0.4
    for number in range(int(os.environ.get("COMPOSEFS_OCI_KILLS", "10"))):
        pair = prepare(app, verb, number)
        process = start(app, verb, pair.first, pair.second)
        begun = time.monotonic()
        go(process)
        time.sleep(chance.uniform(0, longest))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        if process.returncode == 0:
            longest = max(0.05, min(longest, time.monotonic() - begun))
        judge_what_a_death_left(app, verb, pair, str(number))
        app.clean()
        if verb != "unmount":
            app.unmount()


# Every call that changes something, or makes a process that does.
STEPS = ("mkdir", "mkdirat", "link", "linkat", "symlink", "symlinkat", "rename", "renameat", "renameat2", "unlink")
STEPS += ("unlinkat", "rmdir", "fsync", "fdatasync", "syncfs", "fchmod", "fchown", "ftruncate", "flock", "mount")
STEPS += ("umount2", "fsopen", "fsconfig", "fsmount", "open_tree", "move_mount", "mount_setattr", "fork", "vfork")
STEPS += ("clone", "clone3")
TRACED = ",".join(f"?{name}" for name in STEPS)


def steps_of(trace: pathlib.Path, after: str) -> list[tuple[str, int]]:
    """The calls of a trace from the line with ``after`` on, each with its number among those of its name."""
    counted: dict[str, int] = {}
    steps: list[tuple[str, int]] = []
    begun = not after
    for line in trace.read_text().splitlines():
        name = line.partition("(")[0]
        if name in STEPS:
            counted[name] = counted.get(name, 0) + 1
            if begun:
                steps.append((name, counted[name]))
        begun = begun or after in line
    return steps


def chosen(steps: list[tuple[str, int]], verb: str) -> list[tuple[str, int]]:
    """All steps if COMPOSEFS_OCI_STEPS says ``all``; else every eighth, another one for each verb."""
    assert len(steps) >= 10, steps
    return steps if os.environ.get("COMPOSEFS_OCI_STEPS") == "all" else steps[len(verb) % 8 :: 8]


def strace() -> str:
    found = shutil.which("strace")
    if not found:
        pytest.skip("strace is not installed, so no process can be killed at a chosen system call")
    return found


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_that_dies_at_a_system_call_leaves_what_the_next_one_repairs(
    app: App, verb: str, tmp_path: pathlib.Path
) -> None:
    tracer, trace = strace(), tmp_path / "trace"

    def attempt(number: object, *options: str) -> tuple[int, Pair]:
        pair = prepare(app, verb, number)
        process = start(app, verb, pair.first, pair.second, before=(tracer, "-qq", *options))
        go(process)
        process.communicate()
        return process.returncode, pair

    code, pair = attempt("traced", "-o", str(trace), "-e", f"trace={TRACED},write", "-e", "signal=none")
    assert code == 0
    judge_what_a_death_left(app, verb, pair, "to its end")
    for name, number in chosen(steps_of(trace, "ready"), verb):
        app.clean()
        if verb != "unmount":
            app.unmount()
        inject = f"inject={name}:signal=SIGKILL:when={number}"
        code, pair = attempt(f"{name} {number}", "-o", "/dev/null", "-e", f"trace={name}", "-e", inject)
        judge_what_a_death_left(app, verb, pair, f"at {name} {number}, status {code}")


@pytest.mark.parametrize("verb", ["boot", "timer"])
def test_the_program_that_dies_at_a_system_call_is_repaired_by_the_next(
    app: App, verb: str, tmp_path: pathlib.Path
) -> None:
    """A boot after a power cut in a trial, and the timer that takes an image back."""
    tracer, trace = strace(), tmp_path / "trace"

    def attempt(*options: str) -> tuple[int, str]:
        first, second = app.stage("v1"), app.stage("v2")
        app.activate(first, confirm_within=0)
        app.activate(second, rollout="r1")
        words = ["boot"]
        if verb == "timer":
            words = ["revert", "--token", app.journal().pending.token]
        else:
            earlier = journal.to_values(app.journal())
            earlier["boot"], earlier["pending"]["boot"] = None, "an earlier one"
            journal.write(journal.parse(json.dumps(earlier).encode(), "x"), app.places)
            subprocess.run(["umount", str(app.point)], check=True)
        return run_program(app, *words, before=(tracer, "-qq", *options)).returncode, words[-1]

    def judge(word: str, where: str) -> None:
        found, mounted = app.journal(), app.mounted()
        first, second = (image_of(app, f"app@{app.stage(version)}") for version in ("v1", "v2"))
        assert mounted in ((first, None) if verb == "boot" else (first, second)), where
        assert found.current.image_id == first and {first} <= app.links(), where
        if verb == "boot":
            assert run_program(app, "boot").returncode == 0, where
        else:
            # The next verb, for the timer does not come twice.
            app.revert(rollout="r1")
        assert app.data() == content("v1") and app.journal().pending is None, where

    code, word = attempt("-o", str(trace), "-e", f"trace={TRACED}", "-e", "signal=none")
    assert code == 0
    judge(word, "to its end")
    for name, number in chosen(steps_of(trace, ""), verb):
        app.clean()
        app.unmount()
        inject = f"inject={name}:signal=SIGKILL:when={number}"
        code, word = attempt("-o", "/dev/null", "-e", f"trace={name}", "-e", inject)
        judge(word, f"at {name} {number}, status {code}")


def test_of_confirming_and_reverting_at_once_one_wins_and_the_other_is_told(app: App) -> None:
    first, second = app.stage("v1"), app.stage("v2")
    new = image_of(app, f"app@{second}")
    won = {"confirmed": 0, "reverted": 0}
    for number in range(int(os.environ.get("COMPOSEFS_OCI_RACES", "8"))):
        app.stage("v2")
        app.activate(first, confirm_within=0, rollout=f"base {number}")
        app.activate(second, rollout="r")
        racers = [start(app, verb, first, second) for verb in ("confirm", "revert")]
        for process in racers if number % 2 else reversed(racers):
            go(process)
        said = [process.communicate() for process in racers]
        found, mounted = app.journal(), app.mounted()
        assert found.pending is None and found.current.image_id == mounted, said
        result = found.history[-1].result
        won[result] += 1
        assert (result == "confirmed") == (mounted == new)
        if result == "reverted":
            assert "Reverted" in said[0][1], "whoever confirms is told"
        else:
            assert racers[0].returncode == 0, said
        assert racers[1].returncode == 0, said
    assert sum(won.values()) >= 8
