# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A pull that somebody watches: what is shown, what an interrupt does, and that nothing stays behind."""

from __future__ import annotations

import contextlib
import glob
import json
import os
import pathlib
import pwd
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest
import zstandard
from faultproxy import FaultProxy, Rule
from ociimage import Layout, skopeo_copy
from registry import Registry

if TYPE_CHECKING:  # pytest gives the fixture
    from conftest import Site

PREPARE = """
- name: Make the repository
  composefs.oci.composefs_repository:
    path: "{{ repository }}"
    verity: disabled
"""
PULL = """
- name: Pull
  composefs.oci.composefs_image:
    ref: docker://{{ registry }}/app:1
    name: app
    repository: "{{ repository }}"
    validate_certs: false
  register: pulled
- name: Tell
  ansible.builtin.debug:
    msg: "changed={{ pulled.changed }} keys={{ pulled | list | sort | join(',') }}"
"""
ALWAYS = {"composefs_progress": "always"}
# Bytes a second at which the larger layer takes twenty seconds: a look at the job comes in time on any machine.
SHOWN = 80_000


def jobs() -> set[str]:
    return set(glob.glob("/tmp/composefs-oci-" + "[0-9a-f]" * 32))


def named(site: Site) -> bool:
    return (site.repository / "streams/refs/oci/app").is_symlink()


def pulling(site: Site) -> list[int]:
    """The processes that work for a pull into the repository of ``site``."""
    found = []
    for entry in pathlib.Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and any(
                str(site.repository) in os.readlink(link) for link in (entry / "fd").iterdir()
            ):
                found.append(int(entry.name))
    return found


def wait_for(what: str, condition: Callable[[], object], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds} s for {what}"
        time.sleep(0.05)


def wait_for_the_end(site: Site, before: set[str], seconds: float = 60) -> None:
    """Until nothing works for the pull any more, and what it had in temporary places is gone; ``before`` is what lay
    there already. Who puts things away does so last, when the pull itself has ended.
    """
    wait_for(
        "everything that pulled to end, and to leave nothing",
        lambda: (
            not pulling(site)
            and jobs() <= before
            and not any(files for _path, _dirs, files in os.walk(site.directory / "remote"))
        ),
        seconds,
    )


@pytest.fixture
def ready(site: Site) -> Site:
    done = site.run(PREPARE)
    assert done.returncode == 0, done.stdout + done.stderr
    return site


@pytest.fixture
def slow(faults: FaultProxy) -> Iterator[FaultProxy]:
    """A registry that needs half a minute and more for the larger layer: whatever is to end a pull comes before that, and
    a pull that is not ended gives the name while a test waits for its end.
    """
    faults.add(Rule("/blobs/", rate=30_000))
    yield faults
    faults.release()


def test_a_long_pull_shows_lines_that_count_from_the_plan_and_leaves_nothing(ready: Site, faults: FaultProxy) -> None:
    faults.add(Rule("/blobs/", rate=SHOWN))
    before = jobs()
    done = ready.run(PULL, registry=faults.address, **ALWAYS)
    assert done.returncode == 0, done.stdout + done.stderr
    assert named(ready) and "changed=True" in done.stdout
    # Lines come on standard error, so that what a program reads stays as it was.
    assert re.search(r"^localhost: app: \d+% of \d\.\d\d MiB, .* of 2 layers", done.stderr, re.MULTILINE), done.stderr
    assert "%" not in done.stdout
    wait_for_the_end(ready, before)


JSON_CALLBACK = """
import json

from ansible.plugins.callback import CallbackBase


class CallbackModule(CallbackBase):
    CALLBACK_VERSION, CALLBACK_TYPE, CALLBACK_NAME = 2.0, "stdout", "forprograms"
    results = []

    def v2_runner_on_ok(self, result):
        self.results.append(True)

    def v2_playbook_on_stats(self, stats):
        print(json.dumps({"ok": self.results}))
"""


def test_standard_output_is_for_programs_even_while_lines_are_shown(ready: Site, faults: FaultProxy) -> None:
    faults.add(Rule("/blobs/", rate=SHOWN))
    (ready.directory / "callbacks").mkdir()
    (ready.directory / "callbacks" / "forprograms.py").write_text(JSON_CALLBACK)
    env = {"ANSIBLE_CALLBACK_PLUGINS": str(ready.directory / "callbacks"), "ANSIBLE_STDOUT_CALLBACK": "forprograms"}
    done = ready.run(PULL, registry=faults.address, env=env, **ALWAYS)
    assert json.loads(done.stdout) == {"ok": [True, True]} and "%" in done.stderr


def test_a_watched_task_returns_what_an_unwatched_one_does(ready: Site, faults: FaultProxy) -> None:
    faults.add(Rule("/blobs/", rate=400_000))
    keys = {}
    for wish in ("never", "always"):
        ready.run("- ansible.builtin.command: rm -rf {{ repository }}")
        ready.run(PREPARE)
        done = ready.run(PULL, registry=faults.address, composefs_progress=wish)
        keys[wish] = re.findall(r"keys=([\w,]+)", done.stdout)
    assert keys["always"] == keys["never"] and "digest" in keys["always"][0]


def start(site: Site, registry: str, **variables: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        site.command(PULL, registry=registry, **variables),
        cwd=site.directory,
        env=site.environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("wish", ["always", "never"])
def test_an_interrupt_ends_the_pull_at_once(ready: Site, slow: FaultProxy, number: signal.Signals, wish: str) -> None:
    before = jobs()
    process = start(ready, slow.address, composefs_progress=wish)
    wait_for("the layer to be on its way", lambda: slow.sent("/blobs/") > 60_000)
    os.kill(process.pid, number)
    process.communicate(timeout=60)
    wait_for_the_end(ready, before)
    assert process.returncode != 0 and not named(ready)


def test_an_interrupt_before_the_job_is_one_ends_it_too(ready: Site, slow: FaultProxy) -> None:
    before = jobs()
    process = start(ready, slow.address, **ALWAYS)
    wait_for("the job to begin", lambda: jobs() - before)
    os.kill(process.pid, signal.SIGINT)
    process.communicate(timeout=60)
    wait_for_the_end(ready, before)
    assert not named(ready)


def test_a_playbook_that_was_killed_ends_the_pull_too(ready: Site, slow: FaultProxy) -> None:
    before = jobs()
    process = start(ready, slow.address, **ALWAYS)
    wait_for("the layer to be on its way", lambda: slow.sent("/blobs/") > 60_000)
    process.kill()
    wait_for_the_end(ready, before)
    process.communicate(timeout=60)
    assert not named(ready)


def test_the_next_run_after_an_interrupt_finishes(ready: Site, slow: FaultProxy) -> None:
    process = start(ready, slow.address, **ALWAYS)
    wait_for("the layer to be on its way", lambda: slow.sent("/blobs/") > 60_000)
    os.kill(process.pid, signal.SIGINT)
    process.communicate(timeout=60)
    slow.clear()
    done = ready.run(PULL, registry=slow.address, **ALWAYS)
    assert done.returncode == 0 and "changed=True" in done.stdout and named(ready)


def test_a_task_that_its_user_made_asynchronous_needs_nobody(ready: Site, faults: FaultProxy) -> None:
    faults.add(Rule("/blobs/", rate=400_000))
    pull = PULL.partition("  register")[0] + "  async: 60\n  poll: 0\n"
    done = ready.run(pull, registry=faults.address, **ALWAYS)
    assert done.returncode == 0, done.stdout + done.stderr
    wait_for("the name", lambda: named(ready))
    wait_for("everything that pulled to end", lambda: not pulling(ready))


@pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user needs root")
def test_a_user_without_a_home_pulls_with_a_line(ready: Site, faults: FaultProxy) -> None:
    faults.add(Rule("/blobs/", rate=SHOWN))
    nobody = pwd.getpwnam("nobody")
    if os.path.isdir(nobody.pw_dir):
        pytest.skip("nobody has a home here")
    if subprocess.run(["stat", "-f", "-c", "%T", "/var/tmp"], capture_output=True, check=True).stdout.count(b"overlay"):
        pytest.skip("/var/tmp is on an overlay file system, and nobody can write elsewhere")
    program = shutil.which("python3", path="/usr/bin:/bin") or sys.executable
    version = subprocess.run(
        [program, "-c", "import sys; print(sys.version_info[:2])"], capture_output=True, check=True
    )
    if version.stdout.decode().strip() != str(sys.version_info[:2]):
        pytest.skip("the system's own Python, which nobody can run, is another one than this")
    become = "  become: true\n  become_user: nobody\n  become_method: ansible.builtin.su\n  become_flags: -s /bin/sh\n"
    # Without a directory of its own for this, skopeo looks into one that may be another program's and closed.
    become += "  environment:\n    PYTHONPATH: '{{ repository | dirname }}'\n"
    become += "    XDG_RUNTIME_DIR: '{{ repository | dirname }}'\n"
    with tempfile.TemporaryDirectory(dir="/var/tmp") as theirs:
        os.chown(theirs, nobody.pw_uid, nobody.pw_gid)
        # This Python's library for the system's.
        shutil.copytree(pathlib.Path(zstandard.__file__).parent, f"{theirs}/zstandard")
        done = ready.run(
            PREPARE + become + PULL.replace("  register", become + "  register"),
            registry=faults.address,
            repository=f"{theirs}/repository",
            ansible_python_interpreter=program,
            # Their own is of the directory of the test, which nobody cannot enter.
            ansible_remote_tmp=f"{theirs}/.ansible",
            **ALWAYS,
        )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "app: " in done.stderr, "its line needs no home either"


def test_a_task_with_nothing_to_do_starts_no_job(ready: Site, registry: Registry) -> None:
    ready.run(PULL, registry=registry.address)
    commands = {}
    for wish in ("never", "always"):
        done = ready.run(PULL, "-vvv", registry=registry.address, composefs_progress=wish)
        assert "changed=False" in done.stdout and "%" not in done.stderr
        assert ": > sign" not in done.stdout, "nobody looks after it"
        commands[wish] = done.stdout.count("AnsiballZ") + done.stdout.count("EXEC")
    assert 0 < commands["never"] == commands["always"] <= 6, "one command for the module, and no more"


def test_an_archive_of_the_controller_is_copied_and_leaves_nothing(ready: Site, images: Layout) -> None:
    (ready.directory / "files").mkdir()
    skopeo_copy(f"oci:{images.path}:app", f"oci-archive:{ready.directory}/files/app.tar:app")
    tasks = """
- name: Import an archive of the controller
  composefs.oci.composefs_image:
    ref: oci-archive:app.tar:app
    name: app
    repository: "{{ repository }}"
    remote_src: false
"""
    for wish, changed in (("always", 1), ("never", 0)):
        done = ready.run(tasks, composefs_progress=wish)
        assert done.returncode == 0 and f"changed={changed}" in done.stdout, done.stdout + done.stderr
        assert not any(files for _path, _dirs, files in os.walk(ready.directory / "remote"))
    missing = ready.run(tasks.replace("app.tar", "nothing.tar"))
    assert missing.returncode != 0 and "image_not_found" in missing.stdout
