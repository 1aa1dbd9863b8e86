# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A task that is watched: when it becomes a job, when it ends, and that nothing of it stays."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from ansible_collections.composefs.oci.plugins.module_utils.errors import EngineError, InvalidOption
from ansible_collections.composefs.oci.plugins.module_utils.host import watch
from ansible_collections.composefs.oci.plugins.module_utils.host.watch import Job, Life
from ansible_collections.composefs.oci.plugins.module_utils.progress import PLANNED, STARTED, Event


class Command:
    """A command on a host whose output is read, as Ansible reads that of a module."""

    def __init__(self, function: Callable[[], object]) -> None:
        self.output, theirs = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            try:
                os.close(self.output)
                os.dup2(theirs, 1)
                os.close(theirs)
                # What pytest captures is not what a module writes to.
                sys.stdout = os.fdopen(1, "w")
                try:
                    function()
                except SystemExit as end:
                    sys.stdout.flush()
                    os._exit(int(end.code or 0))
            finally:
                os._exit(99)
        os.close(theirs)

    def end(self) -> tuple[int, str]:
        """Exit code and output."""
        with os.fdopen(self.output, "rb") as file:
            text = file.read().decode()
        return os.WEXITSTATUS(os.waitpid(self.pid, 0)[1]), text

    def leave(self) -> None:
        os.close(self.output)
        os.waitpid(self.pid, 0)


@pytest.fixture
def token(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(watch, "PLACE", str(tmp_path))
    monkeypatch.setattr(watch, "LOOK", 0.05)
    monkeypatch.setattr(watch, "SHORT", 0.3)
    yield secrets.token_hex(16)
    # Nothing may outlive a test, whatever it found.
    for path in tmp_path.glob(watch.PREFIX + "*"):
        (path / "stop").touch()


def wait_for(condition: Callable[[], object], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def task(seconds: float, text: str = "the result", code: int = 0) -> Callable[[Life], None]:
    def main(life: Life) -> None:
        life.busy()
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(0.02)
        life.permit()
        print(text)
        sys.exit(code)

    return main


def long_task(cleaned: pathlib.Path) -> Callable[[Life], None]:
    """A task that is not over before it is ended, and then makes the file ``cleaned``."""

    def main(life: Life) -> None:
        try:
            task(60)(life)
        finally:
            cleaned.touch()

    return main


@pytest.mark.parametrize("code", [0, 1])
def test_a_short_task_ends_in_its_own_command_and_leaves_nothing(
    token: str, tmp_path: pathlib.Path, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "SHORT", 50)
    assert Command(lambda: watch.run(token, task(0, code=code))).end() == (code, "the result\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_without_a_watcher_or_a_place_to_meet_the_task_just_runs(token: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Command(lambda: watch.run("", task(0.4))).end() == (0, "the result\n")
    monkeypatch.setattr(watch, "PLACE", "/nowhere")
    assert Command(lambda: watch.run(token, task(0.4))).end() == (0, "the result\n")


@pytest.mark.slow
def test_a_long_task_becomes_a_job_whose_result_is_collected(token: str, tmp_path: pathlib.Path) -> None:
    directory = watch.directory_of(token)
    on = tmp_path / "on"

    def main(life: Life) -> None:
        life.busy()
        wait_for(on.exists)
        task(0)(life)

    code, said = Command(lambda: watch.run(token, main)).end()
    # Its command has ended, and the task goes on: it waits for what is made only now.
    assert code == 0 and json.loads(said) == {"changed": False, "composefs_job": directory}
    assert os.stat(directory).st_mode & 0o777 == 0o700
    on.touch()
    wait_for(lambda: os.path.exists(f"{directory}/result"))
    assert Command(lambda: watch.collect(directory)).end() == (0, "the result\n")
    assert list(tmp_path.iterdir()) == [on]


@pytest.mark.slow
def test_a_result_that_nobody_collects_goes_with_the_job(
    token: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = tmp_path / "done"

    def main(life: Life) -> None:
        life.busy()
        time.sleep(0.6)
        done.touch()
        # Only now, for a task that is slow to begin is not to be taken for one that nobody watches.
        monkeypatch.setattr(watch, "PATIENCE", 1.0)
        task(0)(life)

    Command(lambda: watch.run(token, main)).end()
    wait_for(lambda: list(tmp_path.iterdir()) == [done])


def test_a_job_that_is_told_to_stop_ends_at_once_and_cleans_up(token: str, tmp_path: pathlib.Path) -> None:
    cleaned = tmp_path / "cleaned"
    Command(lambda: watch.run(token, long_task(cleaned))).end()
    (pathlib.Path(watch.directory_of(token)) / "stop").touch()
    wait_for(lambda: list(tmp_path.iterdir()) == [cleaned], watch.PATIENCE / 3)


def test_a_job_ends_at_once_whose_command_nobody_listens_to(token: str, tmp_path: pathlib.Path) -> None:
    """A playbook was interrupted before the job had a directory: there was nothing to tell it in."""
    cleaned = tmp_path / "cleaned"
    begun = time.monotonic()
    Command(lambda: watch.run(token, long_task(cleaned))).leave()
    wait_for(lambda: list(tmp_path.iterdir()) == [cleaned])
    assert time.monotonic() - begun < watch.PATIENCE / 2


def test_a_job_whose_directory_goes_ends(token: str, tmp_path: pathlib.Path) -> None:
    pid = tmp_path / "pid"

    def main(life: Life) -> None:
        pid.write_text(str(os.getpid()))
        task(60)(life)

    Command(lambda: watch.run(token, main)).end()
    os.rename(watch.directory_of(token), tmp_path / "elsewhere")
    wait_for(lambda: not os.path.exists(f"/proc/{pid.read_text()}"), watch.PATIENCE / 3)


def test_a_job_dies_with_its_host_command_if_it_dies_early(token: str, tmp_path: pathlib.Path) -> None:
    def main(life: Life) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    code, said = Command(lambda: watch.run(token, main)).end()
    assert code == 1 and said == "" and list(tmp_path.iterdir()) == []


def test_a_plain_task_ends_when_nobody_reads_what_it_says(token: str, tmp_path: pathlib.Path) -> None:
    """That is how the end of an interrupted playbook arrives at a host: as a pipe that is closed."""
    command = Command(lambda: watch.run("", task(60)))
    time.sleep(0.2)
    begun = time.monotonic()
    command.leave()
    assert time.monotonic() - begun < 50


# --- signs of life
# -------------------------------------------------------------------------------------------------------------------


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def job(tmp_path: pathlib.Path, clock: Clock) -> Job:
    return Job(str(tmp_path), socket.socketpair()[0], clock)


def test_silence_is_counted_from_the_last_sign_by_a_clock_that_nobody_sets(
    job: Job, tmp_path: pathlib.Path, clock: Clock
) -> None:
    clock.now += 7
    assert job.silence() == 7
    sign = tmp_path / "sign"
    sign.touch()
    assert job.silence() == 0
    clock.now += 5
    os.utime(sign, (1, 1))  # the host's clock was set back: a sign all the same
    assert job.silence() == 0
    clock.now += 9
    assert job.silence() == 9


def test_names_wait_for_a_fresh_sign_and_work_goes_on_meanwhile(
    job: Job, tmp_path: pathlib.Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        job.look()  # as the timer does; it does not end the job yet
        clock.now += 1
        if len(slept) == 30:
            (tmp_path / "sign").touch()

    monkeypatch.setattr(watch.time, "sleep", sleep)
    clock.now += watch.FRESH + 1
    job.permit()
    assert len(slept) == 30
    job.permit()
    assert len(slept) == 30


def test_a_job_without_any_sign_ends_and_names_nothing(job: Job, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    def sleep(seconds: float) -> None:
        clock.now += 1

    monkeypatch.setattr(watch.time, "sleep", sleep)
    clock.now += watch.FRESH
    with pytest.raises(watch.Interrupted):
        job.permit()
    assert clock.now == pytest.approx(100 + watch.PATIENCE, abs=2)
    job.look()  # once only, or what cleans up would be interrupted too


def test_only_something_to_fetch_makes_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    told = []

    def busy(life: Life) -> None:
        told.append(life)

    monkeypatch.setattr(Life, "busy", busy)
    sink = watch.Announcer(Life())
    sink.event(Event(STARTED, "sha256:a"))
    assert told == []
    sink.event(Event(PLANNED, "sha256:a"))
    assert len(told) == 1
    sink.close()


# --- what others might ask for
# -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", ["", "../../../etc", "0" * 31, "0" * 33, "G" * 32])
def test_a_token_names_a_directory_and_nothing_else(bad: str) -> None:
    with pytest.raises(InvalidOption):
        watch.directory_of(bad)


@pytest.mark.parametrize("bad", ["/etc", "/tmp/x", "/tmp/composefs-oci-x/../../etc", "composefs-oci-x"])
def test_only_the_directory_of_a_job_is_collected(bad: str) -> None:
    with pytest.raises(InvalidOption):
        watch.collect(bad)


def test_a_directory_of_somebody_else_is_not_used(token: str, tmp_path: pathlib.Path) -> None:
    os.mkdir(watch.directory_of(token))
    assert Command(lambda: watch.run(token, task(0))).end() == (0, "the result\n")
    assert os.listdir(watch.directory_of(token)) == []


@contextlib.contextmanager
def filled(place: pathlib.Path, size: str, left: int) -> Iterator[None]:
    """A file system of its own at ``place``, of which no more than ``left`` bytes are free."""
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "full", str(place)], check=False)
    if mounted.returncode:
        pytest.skip("nothing can be mounted here")
    try:
        fill(place, left)
        yield
    finally:
        subprocess.run(["umount", str(place)], check=True)


def fill(place: pathlib.Path, left: int = 0) -> None:
    found = os.statvfs(place)
    with contextlib.suppress(OSError), open(place / "filler", "ab") as filler:
        filler.write(bytes(max(0, found.f_bavail * found.f_frsize - left)))


@pytest.mark.skipif(os.geteuid() != 0, reason="needs a file system of its own, which only root can mount")
def test_a_task_is_done_plainly_where_there_is_no_room_for_its_result(
    token: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The line is an extra: what it needs must not lose what the task has done."""
    place = tmp_path / "full"
    with filled(place, "2m", 100_000):
        monkeypatch.setattr(watch, "PLACE", str(place))
        assert Command(lambda: watch.run(token, task(0))).end() == (0, "the result\n")
        assert os.listdir(place) == ["filler"]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs a file system of its own, which only root can mount")
def test_a_result_arrives_where_the_place_fills_while_the_task_runs(
    token: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "filling"
    text = "x" * 500_000

    def work(life: Life) -> None:
        assert life.progress_file  # a job
        fill(place)
        task(0, text)(life)

    with filled(place, "4m", 4_000_000):
        monkeypatch.setattr(watch, "PLACE", str(place))
        assert Command(lambda: watch.run(token, work)).end() == (0, f"{text}\n")


def test_a_job_that_left_no_result_is_an_error(token: str) -> None:
    with pytest.raises(EngineError, match="without a result"):
        watch.collect(watch.directory_of(token))


@pytest.mark.skipif(os.geteuid() != 0, reason="needs other users, which only root can be")
@pytest.mark.parametrize("how", ["file", "FIFO", "link"])
def test_a_result_that_somebody_else_forged_is_not_collected(token: str, tmp_path: pathlib.Path, how: str) -> None:
    """When a job has ended and removed its directory, anybody can make one of that name."""
    place = pathlib.Path(watch.directory_of(token))
    made = tmp_path / "made" if how == "link" else place
    made.mkdir()
    if how == "FIFO":
        os.mkfifo(made / "result")
    else:
        (made / "result").write_text('{"changed": false, "msg": "all is well"}')
    if how == "link":
        place.symlink_to(made)
    os.chown(made, 12345, 12345)
    with pytest.raises(EngineError, match="without a result"):
        watch.collect(str(place))


def test_an_error_of_the_system_in_the_task_is_the_tasks_own(token: str) -> None:
    calls: list[Any] = []

    def main(life: Life) -> None:
        calls.append(life)
        print(len(calls))
        raise OSError(5, "Input/output error")

    code, said = Command(lambda: watch.run(token, main)).end()
    assert code != 0 and said == "", "and the task is not run a second time"
