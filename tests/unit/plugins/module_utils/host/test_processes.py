# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Work in a process of its own: what comes back, and what happens when it dies."""

from __future__ import annotations

import contextlib
import errno
import os
import pathlib
import select
import resource
import signal
import socket
import subprocess
import sys
import textwrap
import time
from typing import Any

import pytest

from ansible_collections.composefs.oci.plugins.module_utils import errors
from ansible_collections.composefs.oci.plugins.module_utils.host import processes
from ansible_collections.composefs.oci.plugins.module_utils.errors import (
    LimitReached,
    EngineError,
    InvalidLayer,
    IOFailed,
    NoSpace,
    OutOfMemory,
)


def children() -> list[str]:
    return [child for task in pathlib.Path("/proc/self/task").glob("*/children") for child in task.read_text().split()]


@pytest.mark.parametrize("value", [None, 0, "text", [{"1": "ab"}, {}], {"a": None}])
def test_the_value_comes_back(value: Any) -> None:
    assert processes.call("works", lambda: value) == value
    assert children() == []


def test_the_child_is_another_process() -> None:
    assert processes.call("works", os.getpid) != os.getpid()


def test_an_engine_error_comes_back_as_itself() -> None:
    def fail() -> None:
        raise InvalidLayer("The archive is cut off.", "Pull it again.")

    with pytest.raises(InvalidLayer) as caught:
        processes.call("works", fail)
    assert (caught.value.message, caught.value.hint) == ("The archive is cut off.", "Pull it again.")
    assert children() == []


def test_an_operating_system_error_gets_its_class() -> None:
    def fail() -> None:
        raise OSError(errno.ENOSPC, "full")

    with pytest.raises(NoSpace):
        processes.call("works", fail)


def test_an_operating_system_error_names_the_process_it_came_from() -> None:
    def fail() -> None:
        raise OSError(errno.EIO, "broken")

    with pytest.raises(IOFailed, match="^The process that makes the EROFS image: Input/output error") as caught:
        processes.call("makes the EROFS image", fail)
    assert "Storing objects" not in str(caught.value)


def test_lack_of_memory_says_what_helps() -> None:
    def fail() -> None:
        raise MemoryError

    with pytest.raises(OutOfMemory, match="not enough memory.*parallel"):
        processes.call("works", fail)


def test_a_bug_is_one_line_without_the_exceptions_words() -> None:
    def fail() -> None:
        raise ValueError("password=hunter2\nand more")

    with pytest.raises(EngineError) as caught:
        processes.call("works", fail)
    assert "ValueError" in str(caught.value) and "test_processes.py" in str(caught.value)
    assert "hunter2" not in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("end", [lambda: os.kill(os.getpid(), signal.SIGKILL), lambda: os._exit(0), sys.exit])
def test_a_child_that_ends_without_a_word_is_an_error(end: Any) -> None:
    with pytest.raises(EngineError):
        processes.call("makes the EROFS image", end)
    assert children() == []


def test_a_killed_child_says_what_it_was_for_and_where_to_look() -> None:
    with pytest.raises(IOFailed, match="that makes the EROFS image was killed.*memory"):
        processes.call("makes the EROFS image", lambda: os.kill(os.getpid(), signal.SIGKILL))


def test_a_message_of_any_length_gets_through_shortened() -> None:
    def fail() -> None:
        raise InvalidLayer("x" * 1_000_000, "y" * 1_000_000)

    with pytest.raises(InvalidLayer) as caught:
        processes.call("works", fail)
    assert 1000 < len(str(caught.value)) < processes.MAX_MESSAGE // 2


class FullOfHoles(NoSpace):
    """A subclass with a constructor of its own, which errors.py does not know."""

    def __init__(self, holes: int) -> None:
        super().__init__(f"There are {holes} holes.", "Mend them.")


@pytest.mark.parametrize("kind", sorted(errors.classes(), key=lambda kind: kind.__name__))
def test_every_class_crosses_whole(kind: type[EngineError]) -> None:
    def fail() -> None:
        error = kind.__new__(kind)
        EngineError.__init__(error, "message", "hint", doing="doing", said="said", passing=not kind.passing)
        raise error

    with pytest.raises(EngineError) as caught:
        processes.call("works", fail)
    back = caught.value
    assert back.__class__ is kind and back.code == kind.code
    assert (back.message, back.hint, back.doing, back.said) == ("message", "hint", "doing", "said")
    assert back.passing is not kind.passing


def test_a_class_that_is_not_known_here_comes_back_as_the_one_of_its_code() -> None:
    values = {**errors.to_values(NoSpace("full")), "kind": "Elsewhere"}
    assert errors.from_values(values).__class__ is NoSpace
    assert errors.from_values({**values, "code": "of_tomorrow"}).__class__ is EngineError


def test_a_child_says_nothing_on_the_modules_output(capfd: pytest.CaptureFixture[str]) -> None:
    def chatter() -> str:
        os.write(1, b"out")
        os.write(2, b"err")
        return "".join(os.readlink(f"/proc/self/fd/{fd}") for fd in (0, 1, 2))

    assert processes.call("works", chatter) == "/dev/null" * 3
    assert capfd.readouterr() == ("", "")


def test_no_descriptor_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    before = sorted(os.listdir("/proc/self/fd"))
    for function in (lambda: 1, lambda: os._exit(1)):
        with contextlib.suppress(EngineError):
            processes.call("works", function)
    assert sorted(os.listdir("/proc/self/fd")) == before


def script(body: str) -> list[str]:
    places = [str(pathlib.Path(__file__).resolve().parents[3]), *(path for path in sys.path if path)]
    engine = "ansible_collections.composefs.oci.plugins.module_utils"
    imports = f"from {engine} import module\nfrom {engine}.host import processes"
    return [
        sys.executable,
        "-c",
        f"import os, sys, time\nsys.path[:0] = {places!r}\nimport conftest\n{imports}\n" + textwrap.dedent(body),
    ]


def test_a_child_dies_with_its_parent(tmp_path: pathlib.Path) -> None:
    process = subprocess.Popen(
        script(
            """
            def work():
                with open(sys.argv[1], "w") as file:
                    file.write(str(os.getpid()))
                os.rename(sys.argv[1], sys.argv[1] + ".done")
                time.sleep(60)
            processes.call("works", work)
            """
        )
        + [str(tmp_path / "pid")]
    )
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "pid.done").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        child = int((tmp_path / "pid.done").read_text())
    finally:
        process.kill()
        process.wait()
    deadline = time.monotonic() + 50
    while time.monotonic() < deadline:
        try:
            if pathlib.Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                break
        except OSError:
            break
        time.sleep(0.02)
    else:
        raise AssertionError("the child outlived its parent")


def test_a_child_has_a_limit_of_memory_and_says_when_it_is_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    # The test's own process may be large already: what a child may have comes on top, and is most of it.
    monkeypatch.setattr(processes, "MEMORY_LIMIT", processes._data() + (64 << 20))
    assert processes.call("works", lambda: len(bytearray(32 << 20))) == 32 << 20

    def hungry() -> None:
        held = []
        while True:
            held.append(bytearray(1000))

    with pytest.raises(LimitReached, match=r"more memory than the \d+ MiB \(RLIMIT_DATA\)") as error:
        processes.call("makes something", hungry)
    assert "makes something" in str(error.value)
    assert resource.getrlimit(resource.RLIMIT_DATA)[0] == resource.RLIM_INFINITY


def test_a_lower_limit_of_the_user_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    def limited() -> int:
        resource.setrlimit(resource.RLIMIT_DATA, (512 << 20, resource.RLIM_INFINITY))
        return int(processes.call("works", lambda: resource.getrlimit(resource.RLIMIT_DATA)[0]))

    assert processes.call("limits", limited) == 512 << 20


@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (0, 1, 2)])
def test_standard_descriptors_that_are_closed_do_no_harm(tmp_path: pathlib.Path, closed: tuple[int, ...]) -> None:
    """The next file would get such a number, and a child that puts /dev/null there would lose it."""
    done = subprocess.run(
        script(
            f"""
            for fd in {closed!r}:
                os.close(fd)
            class Module:
                params, check_mode = {{}}, False
                def exit_json(self, **result):
                    with open(sys.argv[1], "w") as file:
                        file.write(str(result["value"]))
                def fail_json(self, **result):
                    with open(sys.argv[1], "w") as file:
                        file.write(str(result))
            def main(module):
                return {{"value": processes.call("works", lambda: 42)}}
            module.run_module(Module(), main)
            """
        )
        + [str(tmp_path / "result")],
        timeout=60,
        check=False,
    )
    assert done.returncode == 0 and (tmp_path / "result").read_text() == "42"


def test_a_child_gets_messages_and_descriptors_and_goes_when_it_is_asked(tmp_path: pathlib.Path) -> None:
    def work(connection: socket.socket) -> None:
        while True:
            message, fds, _flags, _address = socket.recv_fds(connection, 1000, 1)
            if not message:
                (tmp_path / "gone").touch()
                return
            if fds:
                os.write(fds[0], b"written by the child")
            processes.tell(connection, {"got": message.decode(), "fds": len(fds)})

    child = processes.Child("works", work)
    source, pipe = os.pipe()
    with pytest.raises(BlockingIOError):
        child.receive(socket.MSG_DONTWAIT)
    child.send([1])
    child.send({"a": None}, pipe)
    assert [child.receive(), child.receive()] == [{"got": "[1]", "fds": 0}, {"got": '{"a": null}', "fds": 1}]
    assert os.read(source, 100) == b"written by the child"
    child.close(grace=30)
    child.close()
    assert (tmp_path / "gone").exists() and children() == []
    os.close(source)
    os.close(pipe)


def test_a_task_that_did_not_hear_everything_still_answers() -> None:
    task = processes.Task("waits", lambda hear: hear())
    for value in range(20):
        task.tell(value)
    assert task.result() == 0
    assert children() == []


def test_a_task_looks_up_from_something_else_when_it_is_told_something() -> None:
    read, write = os.pipe()
    heard, tell = os.pipe()
    try:

        def work(hear: processes.Hear) -> list[object]:
            found = [hear(read)]
            os.read(read, 1)
            found.append(hear(read))
            os.write(tell, b"x")
            return [*found, hear(read), os.read(read, 1).decode()]

        os.write(write, b"a")
        task = processes.Task("waits", work)
        # Told only when the first byte was seen, so that the order is certain.
        while select.select([read], [], [], 0)[0]:
            time.sleep(0.01)
        task.tell("told")
        assert select.select([heard], [], [], 60)[0]
        os.write(write, b"b")
        assert task.result() == [None, "told", None, "b"]
    finally:
        for fd in (read, write, heard, tell):
            os.close(fd)


def test_a_child_that_is_gone_is_an_error_whoever_asks() -> None:
    child = processes.Child("imports layers", lambda connection: None)
    with pytest.raises(IOFailed, match="that imports layers was killed"):
        child.receive()
    with pytest.raises(IOFailed, match="that imports layers was killed"):
        child.send(1)
    child.close()
    assert children() == []


def test_a_child_that_was_forked_later_keeps_no_other_alive() -> None:
    # It inherits our end of the first one's connection, which therefore has to be shut, not only closed.
    first = processes.Child("works", lambda connection: connection.recv(1) and None)
    second = processes.Child("works", lambda connection: connection.recv(1) and None)
    start = time.monotonic()
    first.close(grace=60)
    assert time.monotonic() - start < 50
    second.close(grace=60)
    assert children() == []


def test_a_fork_that_fails_leaves_no_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    def fork() -> int:
        raise OSError(errno.EAGAIN, "no more processes")

    monkeypatch.setattr(os, "fork", fork)
    before = os.listdir("/proc/self/fd")
    with pytest.raises(OSError):
        processes.Child("works", lambda connection: None)
    assert os.listdir("/proc/self/fd") == before


def test_a_child_that_may_open_no_files_says_so_instead_of_vanishing() -> None:
    """It was told as a lack of memory: its parent heard nothing of it."""
    code = textwrap.dedent(
        """
        import os, resource, sys
        sys.path.insert(0, sys.argv[1])
        import conftest
        from ansible_collections.composefs.oci.plugins.module_utils.errors import LimitReached
        from ansible_collections.composefs.oci.plugins.module_utils.host import processes, workers

        # As many as the connections to children take, and none for a child to open.
        first = os.open(os.devnull, os.O_RDONLY)
        os.close(first)
        for more, begin in (
            (2, lambda: processes.call("works", lambda: 1)),
            (5, lambda: workers.spread("works", 2, lambda number, tell: None, print, 2)),
        ):
            try:
                resource.setrlimit(resource.RLIMIT_NOFILE, (first + more, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
                begin()
            except LimitReached as error:
                print(error.code)
        """
    )
    unit = str(pathlib.Path(__file__).resolve().parents[3])
    done = subprocess.run([sys.executable, "-c", code, unit], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["limit_reached"] * 2, done.stdout + done.stderr
