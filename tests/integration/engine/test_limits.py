# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Whatever a process may not have more of, in whichever module and wherever in it: one code, the limit with its value,
and how to raise it.

Every module runs with one more file, process or MiB after the other, until it does its work.
"""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from typing import Any

import pytest
from ansible_collections.composefs.oci.plugins.module_utils.formats import fsverity
from ansible_collections.composefs.oci.plugins.module_utils.operations import mounting
from ansible_collections.composefs.oci.plugins.module_utils.store import create
from ansible_collections.composefs.oci.plugins.module_utils.store.repository import Repository
from ociimage import Layout
from pulling import pull_one
from tarbytes import DIRECTORY, member, tar

pytest.importorskip("ansible.module_utils.basic")

NOBODY = 54321
# A process that has loaded all modules forks for each run, sets the limit in the child, and tells what came.
PROGRAM = textwrap.dedent(
    """
    import ctypes, importlib, json, os, resource, select, signal, sys, tempfile, time, traceback
    sys.path[:0] = json.loads(sys.argv[1])
    import conftest
    from ansible_collections.composefs.oci.tests.support.moduleargs import arguments
    from ansible_collections.composefs.oci.plugins.module_utils.operations import bootmount
    LIBC = ctypes.CDLL(None, use_errno=True)
    PLACE = "ansible_collections.composefs.oci.plugins.modules."
    NAMES = json.loads(sys.argv[2])
    MODULES = {name: importlib.import_module(PLACE + name) for name in NAMES}

    def limit(kind, more):
        if kind == "files":
            name, value = resource.RLIMIT_NOFILE, 3 + more
        elif kind == "processes":
            name, value = resource.RLIMIT_NPROC, 1 + more
        else:
            with open("/proc/self/statm") as file:
                value = int(file.read().split()[0]) * resource.getpagesize() + (more << 20)
            name = resource.RLIMIT_AS
        resource.setrlimit(name, (value, value))
        return value

    def become(uid):
        # Nothing but the right to read what this machine has in homes, such as its Python.
        os.setgroups([])
        os.setgid(uid)
        LIBC.prctl(8, 1, 0, 0, 0)  # PR_SET_KEEPCAPS
        os.setuid(uid)
        version, rights = 0x20080522, 1 << 2  # CAP_DAC_READ_SEARCH
        header = (ctypes.c_uint32 * 2)(version, 0)
        data = (ctypes.c_uint32 * 6)(rights, rights, rights, 0, 0, 0)
        if LIBC.capset(header, data) or LIBC.prctl(47, 2, 2, 0, 0):  # PR_CAP_AMBIENT_RAISE
            raise OSError(ctypes.get_errno(), "capset")

    def child(wish, out, err):
        os.setsid()
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        os.closerange(3, 256)
        if wish["uid"]:
            become(wish["uid"])
        else:
            # What it mounts vanishes with it.
            LIBC.unshare(0x20000)
            LIBC.mount(b"none", b"/", None, 0x44000, None)
        bootmount.HOST = bootmount.Places(*(f"{wish['place']}/host/{name}" for name in ("units", "library", "running")))
        with arguments(wish["args"]):
            limit(wish["kind"], wish["more"])
            MODULES[wish["module"]].main()

    for line in sys.stdin:
        wish = json.loads(line)
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            pid = os.fork()
            if not pid:
                try:
                    child(wish, out, err)
                except SystemExit:
                    pass
                except BaseException:
                    traceback.print_exc()
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(0)
            end = time.monotonic() + 120
            while not os.waitpid(pid, os.WNOHANG)[0]:
                if time.monotonic() > end:
                    os.killpg(pid, signal.SIGKILL)
                    err.write(b"it did not end")
                time.sleep(0.01)
            told = []
            for file in (out, err):
                file.seek(0)
                told.append(file.read().decode("utf-8", "replace"))
        print(json.dumps(told), flush=True)
    """
)
MODULES = (
    "composefs_check",
    "composefs_deployment",
    "composefs_deployment_info",
    "composefs_image",
    "composefs_image_info",
    "composefs_mount",
    "composefs_mount_info",
    "composefs_prune",
    "composefs_repository",
    "composefs_repository_info",
)


class Runner:
    """Runs modules with limits."""

    def __init__(self) -> None:
        paths = [str(pathlib.Path(__file__).parent), *filter(None, sys.path)]
        words = [sys.executable, "-c", PROGRAM, json.dumps(paths), json.dumps(MODULES)]
        # The locale C is the only one that needs no memory, and what is left of it differs between machines.
        env = {**os.environ, "LC_ALL": "C"}
        self._process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)

    def run(
        self, module: str, kind: str, more: int, uid: int, place: pathlib.Path, args: dict[str, Any]
    ) -> tuple[str, str]:
        """What a run printed and what it complained of."""
        assert self._process.stdin and self._process.stdout
        wish = {"module": module, "kind": kind, "more": more, "uid": uid, "place": str(place), "args": args}
        self._process.stdin.write(json.dumps(wish) + "\n")
        self._process.stdin.flush()
        out, err = json.loads(self._process.stdout.readline())
        return out, err

    def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait(60)


@pytest.fixture(scope="module")
def runner() -> Iterator[Runner]:
    if os.geteuid() != 0:
        pytest.skip("other users' limits are for root to set")
    made = Runner()
    yield made
    made.close()


STEPS = {
    # Ansible itself needs one.
    "files": [*range(1, 24), 28, 32, 40, 64],
    "processes": [*range(0, 10), 16],
    # With less it is chance whether Ansible's part or ours is the first to have none.
    "memory": [8, 16, 32, 48, 64, 96, 128, 192, 256, 512, 1024],
}
VERBS: dict[str, tuple[str, dict[str, Any]]] = {
    "make": ("composefs_repository", {"verity": "disabled"}),
    "pull": ("composefs_image", {"ref": "oci:{world}/layout:v2", "name": "app"}),
    "pull by skopeo": ("composefs_image", {"ref": "dir:{world}/dir", "name": "other", "retries": 0}),
    "remove": ("composefs_image", {"state": "absent", "name": "app"}),
    "prune": ("composefs_prune", {}),
    "check": ("composefs_check", {}),
    "repair": ("composefs_check", {"repair": True}),
    "images": ("composefs_image_info", {"disk_use": True}),
    "repository": ("composefs_repository_info", {}),
    "mount": ("composefs_mount", {"path": "{short}/m", "image": "app"}),
    "deployment": ("composefs_deployment", {"path": "{short}/m", "name": "app", "confirm_within": 0}),
    "mounts": ("composefs_mount_info", {}),
    "deployments": ("composefs_deployment_info", {}),
}
ROOTS = ("mount", "deployment", "mounts", "deployments")


def fault(out: str, err: str, kind: str) -> str:
    """What is wrong with what a module that met a limit said, else nothing; "done" if it did its work."""
    if kind == "memory" and "module = AnsibleModule(" in err:
        return ""  # Ansible's own part had not enough to begin with
    if err:
        return f"complains: {err[-1500:]}"
    try:
        result = json.loads(out)
    except ValueError:
        return f"says {out!r}"
    if not result.get("failed"):
        return "done"
    name = {"files": "RLIMIT_NOFILE is ", "processes": "RLIMIT_NPROC is ", "memory": "RLIMIT_AS is "}[kind]
    text = str(result["msg"])
    if result.get("error") != "limit_reached" or name not in text or "Raise the limit" not in text:
        return f"{result.get('error')}: {text[:600]}"
    return ""


@pytest.fixture(scope="module")
def world(disk: pathlib.Path, skopeo: str) -> pathlib.Path:
    """A directory with a layout, the same for skopeo alone, and a repository that has the first of two versions."""
    place = pathlib.Path(tempfile.mkdtemp(dir=disk))
    layout = Layout(place / "layout")
    for version in ("v1", "v2"):
        files = [member(f"usr/{number}-{version}", f"{number}{version}".encode() * 3000) for number in range(20)]
        layout.image([tar(member("usr/", type=DIRECTORY, mode=0o755), *files)], version)
    subprocess.run([skopeo, "copy", "--quiet", f"oci:{layout.path}:v2", f"dir:{place}/dir"], check=True)
    create.prepare(str(place / "repository"), fsverity.SHA256, create.DISABLED)
    for version, name in (("v1", "app"), ("v1", "old"), ("v2", "gone")):
        pull_one(place / "repository", f"oci:{layout.path}:{version}", name)
    with Repository.open(str(place / "repository"), write=True) as repository:
        repository.untag("gone")
    (place / "host").mkdir()
    return place


@pytest.mark.parametrize("kind", STEPS)
@pytest.mark.parametrize("verb", VERBS)
def test_a_limit_is_told_as_such_wherever_it_strikes(
    runner: Runner,
    world: pathlib.Path,
    place: pathlib.Path,
    tmp_path_factory: pytest.TempPathFactory,
    verb: str,
    kind: str,
) -> None:
    if kind == "processes" and verb in ROOTS:
        pytest.skip("this limit is none for root")
    uid = NOBODY if kind == "processes" else 0
    shutil.copytree(world, place / "world", symlinks=True)
    if verb == "repair":
        with Repository.open(str(place / "world/repository")) as repository:
            image = mounting.resolve(repository, "app").hex()
        os.truncate(place / "world/repository/objects" / image[:2] / image[2:], 1)
    if uid:
        for directory, _directories, names in os.walk(place):
            for name in ("", *names):
                os.chown(os.path.join(directory, name), uid, uid, follow_symlinks=False)
    base = place / "world"
    short = tmp_path_factory.mktemp("m")  # the name of a journal has the whole path in it
    module, options = VERBS[verb]
    args = {
        key: value.format(world=base, short=short) if isinstance(value, str) else value
        for key, value in options.items()
    }
    args |= {"_ansible_remote_tmp": str(place), "_ansible_tmpdir": str(place)}
    if verb not in ("mounts", "deployments"):
        args["repository"] = str(base / ("new" if verb == "make" else "repository"))
    faults = []
    for more in STEPS[kind]:
        found = fault(*runner.run(module, kind, more, uid, base, args), kind)
        if found == "done":
            break
        if found:
            faults.append(f"{more}: {found}")
    assert not faults, "\n".join(faults)
    assert found == "done", "even the last step was not enough"
