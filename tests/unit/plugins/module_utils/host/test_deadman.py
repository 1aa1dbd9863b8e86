# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The dead man's switch: a real detached shell, and the words that systemd is told."""

from __future__ import annotations

import contextlib
import os
import pathlib
import time

import pytest
from ansible_collections.composefs.oci.plugins.module_utils.errors import IOFailed
from ansible_collections.composefs.oci.plugins.module_utils.host import deadman


class Systemd:
    def __init__(self, status: int = 0) -> None:
        self.told: list[list[str]] = []
        self.status = status

    def __call__(self, words: list[str]) -> tuple[int, str, str]:
        self.told.append(words)
        return (self.status if words[0] == "systemd-run" else 5), "", "no such thing\n"


@pytest.fixture
def name() -> str:
    return f"composefs-oci-test-{os.getpid()}-{time.monotonic_ns()}"


def alive(group: int) -> list[str]:
    """The processes of a group that still run; one that ended may wait for whoever collects orphans."""
    found = []
    for entry in os.listdir("/proc"):
        with contextlib.suppress(OSError):
            if entry.isdigit():
                fields = pathlib.Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()
                if int(fields[2]) == group and fields[0] != "Z":
                    found.append(entry)
    return found


@pytest.mark.slow
def test_a_detached_shell_runs_the_command_later_and_holds_nothing(tmp_path: pathlib.Path, name: str) -> None:
    reader, writer = os.pipe()
    os.set_inheritable(writer, False)
    ran = tmp_path / "ran it"
    systemd = Systemd()
    deadman.arm(name, 600, ["touch", str(ran)], systemd, systemd=False)
    os.close(writer)
    assert os.read(reader, 1) == b"", "the shell has not the other end"
    os.close(reader)
    (group,) = deadman.waiting(name)
    pids = alive(group)
    assert pids
    for pid in pids:
        assert os.getsid(int(pid)) != os.getsid(0) and os.readlink(f"/proc/{pid}/cwd") == "/"
        assert {os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")} == {"/dev/null"}
    deadman.disarm(name, systemd, systemd=False)
    begun = time.monotonic()
    deadman.arm(name, 2, ["touch", str(ran)], systemd, systemd=False)
    assert not ran.exists() or time.monotonic() - begun >= 2
    end = begun + 60
    while not ran.exists():
        assert time.monotonic() < end
        time.sleep(0.05)
    assert time.monotonic() - begun >= 2 and systemd.told == []


def test_one_that_is_disarmed_does_not_run_and_leaves_no_process(tmp_path: pathlib.Path, name: str) -> None:
    deadman.arm(name, 600, ["touch", str(tmp_path / "ran")], Systemd(), systemd=False)
    deadman.arm(f"{name}-other", 600, ["true"], Systemd(), systemd=False)
    (group,) = deadman.waiting(name)
    deadman.disarm(name, Systemd(), systemd=False)
    end = time.monotonic() + 60
    while alive(group) and time.monotonic() < end:
        time.sleep(0.02)
    # Whoever ends the waiting without the shell has it run the command at once; where no process is left, none will.
    assert alive(group) == [] and not (tmp_path / "ran").exists()
    assert deadman.waiting(name) == set() and len(deadman.waiting(f"{name}-other")) == 1
    deadman.disarm(f"{name}-other", Systemd(), systemd=False)


def test_a_shell_and_its_child_that_is_not_yet_sleep_are_one(name: str) -> None:
    """For an instant both have the shell's command line; here two processes of one group keep it."""
    words = ["sh", "-c", deadman._SCRIPT, name, "600", "true"]
    first = os.fork()
    if first == 0:
        os.setsid()
        os.fork()
        os.execv("/bin/sh", words)
    end = time.monotonic() + 60
    while len(alive(first)) < 4 and time.monotonic() < end:
        time.sleep(0.02)
    assert len(alive(first)) == 4, "two shells, and the sleep of each"
    assert deadman.waiting(name) == {first}
    deadman.disarm(name, Systemd(), systemd=False)
    os.waitpid(first, 0)
    end = time.monotonic() + 60
    while alive(first) and time.monotonic() < end:
        time.sleep(0.02)
    assert alive(first) == []


def test_systemd_gets_a_timer_that_replaces_an_older_one() -> None:
    systemd = Systemd()
    deadman.arm("composefs-oci-revert-x", 300, ["/usr/bin/python3", "mount.pyz"], systemd, systemd=True)
    assert [words[2] for words in systemd.told[:2]] == ["stop", "reset-failed"]
    run = systemd.told[2]
    assert run[0] == "systemd-run" and run[-3:] == ["--", "/usr/bin/python3", "mount.pyz"]
    assert {"--on-active=300", "--timer-property=AccuracySec=1s", "--unit=composefs-oci-revert-x"} <= set(run)
    deadman.disarm("composefs-oci-revert-x", systemd, systemd=True)
    assert systemd.told[-1][-2:] == ["stop", "composefs-oci-revert-x.timer"]


def test_a_timer_that_cannot_be_had_is_said() -> None:
    with pytest.raises(IOFailed, match="systemd-run failed with 'no such thing'"):
        deadman.arm("x", 300, ["true"], Systemd(status=1), systemd=True)
