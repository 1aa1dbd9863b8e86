# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import pathlib
import subprocess
import sys
import time

import pytest

HOSTS = pathlib.Path(__file__).resolve().parents[1] / "hosts"
# The first thread ends by itself (exit, not exit_group: 60 on x86-64, 93 on arm64), another one lives on.
TWO_THREADS = """
import ctypes, platform, sys, threading
threading.Thread(target=sys.stdin.read).start()
ctypes.CDLL(None).syscall(60 if platform.machine() == "x86_64" else 93, 0)
"""


def test_a_process_lives_as_long_as_any_of_its_threads(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A guest whose power is cut still has the locks of its disks until its last thread has ended."""
    monkeypatch.syspath_prepend(str(HOSTS))
    import ground

    with subprocess.Popen([sys.executable, "-c", TWO_THREADS], stdin=subprocess.PIPE) as process:
        ground.remember_process(tmp_path, process.pid)
        assert process.stdin is not None
        stat = pathlib.Path(f"/proc/{process.pid}/stat")
        end = time.monotonic() + 60
        while stat.read_text().rpartition(")")[2].split()[0] != "Z":
            assert time.monotonic() < end
            time.sleep(0.01)
        assert ground.process_of(tmp_path) == process.pid
        ground.end_process(tmp_path)
        assert ground.process_of(tmp_path) is None
