# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Many tasks, spread over several processes: what arrives, and what a failure of one does to the others."""

from __future__ import annotations

import os
import pathlib
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest
from ansible_collections.composefs.oci.plugins.module_utils.errors import InvalidLayer, IOFailed, OutOfMemory
from ansible_collections.composefs.oci.plugins.module_utils.host import workers

Tell = Callable[[Any], None]


def children() -> list[str]:
    return [child for task in pathlib.Path("/proc/self/task").glob("*/children") for child in task.read_text().split()]


@pytest.mark.parametrize("count", [1, 3, 50])
def test_every_task_is_done_once_and_what_is_told_arrives(count: int) -> None:
    heard: list[list[int]] = []

    def work(number: int, tell: Tell) -> None:
        tell([number, 0])
        tell([number, 1])

    workers.spread("works", 20, work, heard.append, count)
    assert sorted(heard) == [[number, part] for number in range(20) for part in (0, 1)]
    assert children() == []


def test_the_tasks_are_done_by_other_processes_at_once(tmp_path: pathlib.Path) -> None:
    heard: set[int] = set()
    end = time.monotonic() + 60

    def work(_number: int, tell: Tell) -> None:
        (tmp_path / str(os.getpid())).touch()
        # Nobody goes on before two are at work: one of them may begin late.
        while len(list(tmp_path.iterdir())) < 2 and time.monotonic() < end:
            time.sleep(0.01)
        tell(os.getpid())

    workers.spread("works", 8, work, heard.add, 2)
    assert len(heard) == 2 and os.getpid() not in heard


def test_the_first_error_ends_all_and_is_raised_here() -> None:
    def work(number: int, _tell: Tell) -> None:
        if number == 1:
            raise InvalidLayer("The archive is cut off.", "Pull it again.")
        time.sleep(60)

    start = time.monotonic()
    with pytest.raises(InvalidLayer, match="cut off"):
        workers.spread("checks objects", 4, work, lambda _value: None, 2)
    assert time.monotonic() - start < 50 and children() == []


def test_a_worker_that_is_killed_is_an_error() -> None:
    def work(number: int, _tell: Tell) -> None:
        if number == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)

    with pytest.raises(IOFailed, match="that checks objects was killed"):
        workers.spread("checks objects", 4, work, lambda _value: None, 2)
    assert children() == []


def test_lack_of_memory_says_what_helps() -> None:
    def work(_number: int, _tell: Tell) -> None:
        raise MemoryError

    with pytest.raises(OutOfMemory, match="not enough memory"):
        workers.spread("checks objects", 4, work, lambda _value: None, 2)


def test_what_take_raises_ends_the_workers_too() -> None:
    def take(_value: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        workers.spread("works", 4, lambda number, tell: tell(number), take, 2)
    assert children() == []


def test_work_that_was_begun_goes_on_while_this_process_does_something_else(tmp_path: pathlib.Path) -> None:
    heard: list[int] = []

    def work(number: int, tell: Tell) -> None:
        (tmp_path / str(number)).touch()
        tell(number)

    with workers.begin("works", 5, work, 2) as finish:
        deadline = time.monotonic() + 60
        while len(list(tmp_path.iterdir())) < 5 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert len(list(tmp_path.iterdir())) == 5 and not heard
        finish(heard.append)
    assert sorted(heard) == [0, 1, 2, 3, 4] and children() == []


def test_work_that_nobody_waits_for_ends_with_the_block() -> None:
    with pytest.raises(KeyError), workers.begin("works", 5, lambda _number, _tell: time.sleep(600), 2):
        raise KeyError
    assert children() == []
