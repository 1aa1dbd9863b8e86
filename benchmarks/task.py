# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What an update costs as a task: the last layer of an image is new, then nothing is, beside ``cfsctl`` and ``ping``.

    task.py IMAGES NAME [--repeat 5]

IMAGES is what ``images.py`` made. Each turn pulls the image without its last layer into a fresh repository, and then
the whole image: once with ``cfsctl`` and once as a playbook of one task on this machine, turn by turn. A playbook that
only pings is measured beside them, and what the task costs over it is what counts: Ansible itself is not what is
compared. Time is wall time.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import time

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "tests/support")]

from ociimage import Layer, Layout
from run import Bench, measure

PLAY = """\
- hosts: all
  gather_facts: false
  tasks:
"""


def layers_of(place: pathlib.Path) -> list[Layer]:
    """The layers of the only image of a layout."""
    blobs = place / "blobs" / "sha256"
    (entry,) = json.loads((place / "index.json").read_text())["manifests"]
    manifest = json.loads((blobs / entry["digest"][7:]).read_text())
    config = json.loads((blobs / manifest["config"]["digest"][7:]).read_text())
    return [Layer(*pair) for pair in zip(manifest["layers"], config["rootfs"]["diff_ids"])]


def without_last(bench: Bench, name: str) -> str:
    """Push the image without its last layer; its reference."""
    whole = bench.options.images / name
    place = bench.work / "older"
    shutil.rmtree(place, ignore_errors=True)
    layout = Layout(place)
    layers = layers_of(whole)[:-1]
    for layer in layers:
        os.symlink(
            whole / "blobs" / "sha256" / layer.descriptor["digest"][7:], layout.blob_path(layer.descriptor["digest"])
        )
    layout.image(layers, "latest")
    bench.registry.push(str(place), f"{name}:older")
    return bench.registry.reference(f"{name}:older")


class Playbook:
    """Playbooks of one task, with the collection as it stands in this checkout."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.place = bench.work / "task"
        shutil.rmtree(self.place, ignore_errors=True)
        tree = self.place / "collections" / "ansible_collections" / "composefs"
        tree.mkdir(parents=True)
        (tree / "oci").symlink_to(HERE.parent)
        kept = {key: value for key, value in bench.environment.items() if not key.startswith("ANSIBLE_")}
        self.environment = {
            **kept,
            "ANSIBLE_COLLECTIONS_PATH": str(self.place / "collections"),
            "ANSIBLE_HOME": str(self.place / "home"),
            "ANSIBLE_PIPELINING": "1",
            "ANSIBLE_LOCALHOST_WARNING": "0",
            "LC_ALL": "C.UTF-8",
        }

    def run(self, *tasks: str) -> float:
        """Seconds that a playbook with these tasks (YAML in one line each) takes."""
        play = self.place / "play.yml"
        play.write_text(PLAY + "".join(f"    - {task}\n" for task in tasks))
        program = pathlib.Path(sys.executable).parent / "ansible-playbook"
        extra = f"ansible_connection=local ansible_python_interpreter={self.bench.options.python}"
        command = [str(program), "-i", "localhost,", "-e", extra, str(play)]
        begun = time.monotonic()
        done = subprocess.run(
            command,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        took = time.monotonic() - begun
        if done.returncode:
            raise SystemExit(f"{tasks}\n{done.stdout[-2000:]}")
        return took


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=pathlib.Path, help="directory of layouts, made by images.py")
    parser.add_argument("name", metavar="NAME")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--cfsctl", default="cfsctl")
    parser.add_argument("--skopeo", default="skopeo")
    parser.add_argument("--python", default=sys.executable, help="interpreter for the engine")
    parser.add_argument("--work", type=pathlib.Path, help="registry and repositories; default: bench/ of the cache")
    options = parser.parse_args()
    options.parallel = 0
    bench = Bench(options)
    found: dict[str, list[float]] = {
        "cfsctl": [],
        "task": [],
        "nothing to do": [],
        "twice": [],
        "ping": [],
        "ping twice": [],
    }
    try:
        bench.start()
        whole, older = bench.offer(options.name), without_last(bench, options.name)
        playbook = Playbook(bench)
        playbook.run("ping:")
        for turn in range(options.repeat):
            for tool in ("cfsctl", "task") if turn % 2 == 0 else ("task", "cfsctl"):
                repository = bench.fresh()
                subprocess.run(
                    bench.command("engine", repository, older),
                    env=bench.environment,
                    check=True,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                )
                os.sync()
                if tool == "cfsctl":
                    found[tool].append(
                        measure(bench.command(tool, repository, whole), bench.environment, bench.log).wall
                    )
                    continue
                asked = {"ref": whole, "name": "bench", "repository": str(repository), "validate_certs": False}
                task = f"composefs.oci.composefs_image: {json.dumps(asked)}"
                found["ping"].append(playbook.run("ping:"))
                found["ping twice"].append(playbook.run("ping:", "ping:"))
                found[tool].append(playbook.run(task))
                os.sync()
                found["nothing to do"].append(playbook.run(task))
                found["twice"].append(playbook.run(task, task))
            print(", ".join(f"{what} {values[-1]:.2f}" for what, values in found.items()), file=sys.stderr, flush=True)
    finally:
        bench.registry.stop()
        bench.clean()
    middle = {what: statistics.median(values) for what, values in found.items()}
    size = layers_of(options.images / options.name)[-1].descriptor["size"]
    print(
        f"{options.name}, its last layer ({size / 1e6:.0f} MB) new: task {middle['task'] - middle['ping']:.2f} s over "
        f"ping ({middle['ping']:.2f} s), cfsctl {middle['cfsctl']:.2f} s, ratio "
        f"{(middle['task'] - middle['ping']) / middle['cfsctl']:.2f}; nothing to do "
        f"{middle['nothing to do'] - middle['ping']:.2f} s over ping, and a second such task "
        f"{middle['twice'] - middle['nothing to do']:.2f} s where a second ping takes "
        f"{middle['ping twice'] - middle['ping']:.2f} s"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
