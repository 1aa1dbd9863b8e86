# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import errno
import os
import pathlib
import resource
import select
import signal
import subprocess

import pytest
from ansible_collections.composefs.oci.plugins.module_utils.errors import LimitReached
from ansible_collections.composefs.oci.plugins.module_utils.host import commands


def test_status_and_both_outputs_are_told() -> None:
    assert commands.run(["sh", "-c", "echo out; echo err >&2; exit 7"]) == (7, "out\n", "err\n")
    assert commands.run(["sh", "-c", "kill -9 $$"])[0] == -9


def test_a_command_reads_nothing() -> None:
    assert commands.run(["cat"]) == (0, "", "")


def test_statuses_of_what_cannot_run_are_those_of_a_shell(tmp_path: pathlib.Path) -> None:
    assert commands.run(["no-such-command-here"])[0] == 127
    assert commands.run([str(tmp_path)])[0] == 126


def test_a_script_may_open_its_output_anew() -> None:
    assert commands.run(["sh", "-c", "echo one; echo two > /dev/stderr; echo three"]) == (0, "one\nthree\n", "two\n")


def test_a_command_that_closes_its_output_and_never_ends_is_killed() -> None:
    assert commands.run(["sh", "-c", "exec > /dev/null 2>&1; sleep 600"], timeout=1)[0] == 124


def test_a_command_that_takes_too_long_is_killed_with_what_it_started(tmp_path: pathlib.Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    # A machine on which the shell has not even started by then gets more time.
    for seconds in (3, 60):
        status, _output, errors = commands.run(
            ["sh", "-c", f"exec 3>{fifo}; echo >&3; sleep 600; true"], timeout=seconds
        )
        assert (status, errors) == (124, f"sh did not end within {seconds} seconds")
        if os.read(reader, 1) == b"\n":
            break
    else:
        pytest.fail("the shell has not started")
    poll = select.poll()
    poll.register(reader, 0)
    assert poll.poll(30_000), "somebody still has the other end"
    os.close(reader)


def test_a_command_that_cannot_be_started_for_lack_of_something_says_what(monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(*_words: object, **_options: object) -> None:
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr(subprocess, "Popen", none_left)
    with pytest.raises(LimitReached, match="Starting 'true'"):
        commands.run(["true"])


def test_a_command_has_ended_although_what_it_left_behind_keeps_its_output_open() -> None:
    status, output, _errors = commands.run(["sh", "-c", "echo $$; sleep 600 & echo $!"], timeout=60)
    shell, left = output.split()
    os.kill(int(left), signal.SIGKILL)
    assert status == 0 and shell


@pytest.mark.slow
@pytest.mark.parametrize("ends", [True, False])
def test_endless_output_takes_no_memory(ends: bool) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    words = "yes some words | head -c 200000000; echo last" if ends else "yes some words"
    status, output, _errors = commands.run(["sh", "-c", words], timeout=120 if ends else 2)
    assert (status, output[-5:]) == ((0, "last\n") if ends else (124, ""))
    assert len(output) <= 1 << 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000, "kilobytes"


def test_a_command_that_cannot_run_says_why_in_words_and_not_in_those_of_python(tmp_path: pathlib.Path) -> None:
    plain = tmp_path / "plain"
    plain.write_text("nothing to run")
    assert commands.run(["/nowhere"]) == (127, "", "/nowhere: No such file or directory")
    assert commands.run([str(plain)]) == (126, "", f"{plain}: Permission denied")
