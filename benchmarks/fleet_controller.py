# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What a rollout costs the controller: processor per host, and memory, for an inventory of any size.

    python3 benchmarks/fleet_controller.py --hosts 1000 --case current
    python3 benchmarks/fleet_controller.py --hosts 200 --case change

Hosts are stood in for by a shell script that takes the place of their Python: it reads the module that Ansible sends,
sees which one it is, and gives an answer that was written before. So all that is measured is the controller's, but for
the script, whose own cost is measured beside it and told. ``current``: every host has the image. ``change``: every host
fetches, activates and confirms it.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import resource
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
OLD, NEW = "sha256:" + "a" * 64, "sha256:" + "b" * 64

SCRIPT = """\
#!/bin/sh
# A host: the module comes by standard input, and its name is near the beginning.
name=$(grep -a -o -m 1 'modules[./]composefs_[a-z_]*' | head -n 1)
cat > /dev/null
case $name in
*_deployment_info) cat {answers}/info ;;
*_deployment) cat {answers}/deployment ;;
*_image_info) cat {answers}/image_info ;;
*_image) cat {answers}/image ;;
*_mount_info) echo '{{"changed": false, "mounts": []}}' ;;
*) echo '{{"changed": false}}' ;;
esac
"""


def answers(place: pathlib.Path, changing: bool) -> None:
    """What hosts say, one file for each module."""
    current = {"digest": OLD if changing else NEW, "index_digest": None, "image_id": "0" * 64, "ref": None}
    told = {"path": "/srv/app", "name": "app", "state": "current", "current": current, "pending": None, "previous": []}
    layers = [{"digest": OLD, "diff_id": OLD, "size": 1000, "status": "new", "bytes_to_fetch": 1000} for _n in range(5)]
    image = {"changed": changing, "digest": NEW, "registry_digest": NEW, "index_digest": None, "layers": layers}
    image.update(version="1.4", verity=True, free_bytes=10**10, skopeo_version="1.18.0", stats={"bytes_fetched": 5000})
    for name, value in {
        "info": {"changed": False, "deployments": [{**told, "mount": {}, "history": []}]},
        "image": image,
        "image_info": {"changed": False, "images": [image]},
        "deployment": {"changed": changing, "state": "activated", "path": "/srv/app", "digest": NEW, "took": 0.3},
    }.items():
        (place / name).write_text(json.dumps(value) + "\n")


def spent() -> float:
    """Seconds of processor of all children that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def stand_in(script: pathlib.Path) -> float:
    """Seconds of processor of one answer."""
    module = b"import ansible_collections.composefs.oci.plugins.modules.composefs_image\n" + b"A" * 200_000
    before = spent()
    for _n in range(40):
        subprocess.run(["/bin/sh", "-c", str(script)], input=module, stdout=subprocess.DEVNULL, check=True)
    return (spent() - before) / 40


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, default=1000)
    parser.add_argument("--case", choices=("current", "change"), default="current")
    parser.add_argument("--forks", type=int, default=20)
    parser.add_argument("--tags", default="all", help="phases, as of the playbook")
    parser.add_argument("--keep", type=pathlib.Path, help="a directory for the report, instead of one that vanishes")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="composefs-oci-") as directory:
        place = pathlib.Path(directory)
        collections = place / "collections" / "ansible_collections" / "composefs"
        collections.mkdir(parents=True)
        (collections / "oci").symlink_to(ROOT)
        (place / "answers").mkdir()
        answers(place / "answers", options.case == "change")
        script = place / "host"
        script.write_text(SCRIPT.format(answers=place / "answers"))
        script.chmod(0o755)
        names = [f"host{number:05}" for number in range(options.hosts)]
        variables = f"ansible_connection=local ansible_python_interpreter={script}"
        (place / "inventory").write_text("[edge]\n" + "".join(f"{name} {variables}\n" for name in names))
        asked = {
            "rollout_ref": "docker://registry.invalid/app:1.4",
            "rollout_digest": NEW,
            "rollout_name": "app",
            "rollout_path": "/srv/app",
            "rollout_hosts": "edge",
            "rollout_persistent": False,
            "rollout_soak": [0],
            "rollout_confirm_within": 600,
            "rollout_max_unavailable": 100,
            "rollout_report_dir": str(options.keep or place / "rollouts"),
            "rollout_become": False,
        }
        env = {key: value for key, value in os.environ.items() if not key.startswith("ANSIBLE_")}
        env.update(
            ANSIBLE_COLLECTIONS_PATH=str(place / "collections"),
            ANSIBLE_HOME=str(place / "home"),
            ANSIBLE_FORKS=str(options.forks),
            ANSIBLE_PIPELINING="1",
            ANSIBLE_NOCOLOR="1",
            LC_ALL="C.UTF-8",
        )
        program = pathlib.Path(sys.executable).parent / "ansible-playbook"
        command = [str(program), "-i", str(place / "inventory"), "composefs.oci.rollout", "-e", json.dumps(asked)]
        each = stand_in(script)
        before, begun = spent(), time.monotonic()
        with open(place / "log", "w+") as log:
            code = subprocess.call([*command, "--tags", options.tags], env=env, stdout=log, stderr=log)
            seconds, processor = time.monotonic() - begun, spent() - before
            log.seek(0)
            told = log.read()
        if code:
            sys.stderr.write(told[-3000:])
            return code
        memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
        asked_hosts = sum(line.startswith(("ok: [host", "changed: [host")) for line in told.splitlines())
        own = processor - asked_hosts * each
        sys.stdout.write(
            f"{options.hosts} hosts, {options.case}, tags {options.tags}: {seconds:.0f} s, {processor:.0f} s of "
            f"processor, at most {asked_hosts * each:.0f} s of that for the stand-ins; {own / options.hosts:.2f} s of "
            f"processor for each host; {memory:.0f} MB in the largest process\n"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
