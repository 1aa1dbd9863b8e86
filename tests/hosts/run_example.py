# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Run the example for users (examples/molecule-rollout) as a user would: a copy of it, on two hosts, with images from a
registry.

run_example.py test
"""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import ground
import lab
import report

EXAMPLE = ground.HERE.parents[1] / "examples/molecule-rollout"
PLATFORMS = [{"name": "example-bookworm", "suite": "bookworm"}, {"name": "example-trixie", "suite": "trixie"}]
LAB = {"images": ["app-1", "app-2"], "registries": {"plain": {}}}


def inventory(made: lab.Spec) -> lab.Spec:
    """What a user would write into inventory/hosts.yml (JSON is YAML)."""
    registry = made["registries"]["plain"]["address"]
    hosts = {
        host["instance"]: {
            "ansible_host": host["address"],
            "ansible_port": host["port"],
            "ansible_user": host["user"],
            "ansible_ssh_private_key_file": host["identity_file"],
            "ansible_ssh_common_args": " ".join(ground.SSH_OPTIONS),
            "ansible_python_interpreter": os.environ.get("COMPOSEFS_OCI_INTERPRETER") or "/usr/bin/python3",
        }
        for host in made["instances"]
    }
    images = [
        {"name": "app", "ref": f"docker://{registry}/app-1:latest", "digest": made["images"]["app-1"]["digest"]},
        {"name": "tools", "ref": f"docker://{registry}/app-2:latest"},
    ]
    variables = {
        # A repository must not lie on an overlay file system; in these hosts /srv and /var/lib do not.
        "rollout_repository": "/var/lib/images",
        "rollout_verity": "preferred",
        "rollout_validate_certs": False,
        "rollout_images": images,
        "rollout_mounts": {"app": "/srv/app", "tools": "/srv/tools"},
    }
    return {"edge": {"hosts": hosts, "vars": variables}}


def main() -> int:
    # An interruption, too, leads to the end of this function, where the hosts are removed.
    signal.signal(signal.SIGTERM, lambda signum, _frame: sys.exit(128 + signum))
    work = pathlib.Path(os.environ["MOLECULE_EPHEMERAL_DIRECTORY"])
    copy = work / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(EXAMPLE, copy)
    try:
        made = lab.create("example", PLATFORMS, LAB)
        file = work / "hosts.yml"
        file.write_text(json.dumps(inventory(made)))
        # The user's own environment: nothing of what dev/molecule sets for the scenarios of the collection but where
        # the collection is.
        env = {key: value for key, value in os.environ.items() if not key.startswith("MOLECULE_")}
        env.update(
            ROLLOUT_INVENTORY=str(file), MOLECULE_EPHEMERAL_DIRECTORY=str(work / "molecule"), ANSIBLE_PIPELINING="1"
        )
        # That plugin of pytest only counts; it brings nothing that the example's tests could lean on.
        env.update(PYTEST_PLUGINS="report", PYTHONPATH=str(ground.HERE))
        code = subprocess.run(
            ["molecule", sys.argv[1], "-s", "rollout"], cwd=copy, env=env, stdin=subprocess.DEVNULL, check=False
        ).returncode
        report.write(hosts=lab.describe(made["instances"]))
        return code
    finally:
        lab.destroy("example", PLATFORMS, LAB)


if __name__ == "__main__":
    sys.exit(main())
