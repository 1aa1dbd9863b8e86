# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What Molecule's create and destroy call: hosts, registries and images of one scenario.

    lab.py check FILE...     can the scenarios of these molecule.yml be run here? Exit code 77 and the reason if not
    lab.py clean FILE...     end what an interrupted run of these scenarios left
    lab.py create            reads {"scenario", "platforms", "lab"} as JSON from stdin, starts all of it, prints facts
    as JSON lab.py destroy           reads the same, ends all of it and removes its files

A platform has ``name``; ``kind``: namespace (default) or guest; ``suite``; ``flavour``: bare or ready (namespace),
isolated: true (namespace). ``lab`` has ``images`` (names, see images.py), ``registries`` (name: {tls, user, password,
filled: false for one without images, kept: false for
one that does not keep its blobs from run to run, access_log: true}),
``archives`` (transport:file to make, and the image to put there), ``programs`` that must be on the PATH, and
``unforetold`` (task: why check mode on a fresh host cannot foretell it).

Two variables of the environment change every host of a scenario, so that it can be tried on others than it names:
COMPOSEFS_OCI_SUITE is the Debian suite, COMPOSEFS_OCI_HOST_PYTHON an interpreter of this machine that namespace hosts
get beside their own.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import ground
import guests
import images
import namespace
import registry
from ground import Unavailable

SKIP = 77
SUITE = os.environ.get("COMPOSEFS_OCI_SUITE", "")
HOST_PYTHON = os.environ.get("COMPOSEFS_OCI_HOST_PYTHON", "")
Spec = dict[str, Any]


def check(platforms: list[Spec], lab: Spec) -> None:
    """`Unavailable` with the reason if the scenario cannot be run on this machine. Nothing is made."""
    kinds = {platform.get("kind", "namespace") for platform in platforms}
    if "namespace" in kinds:
        namespace.check()
    if "guest" in kinds:
        guests.check()
        if HOST_PYTHON:
            raise Unavailable("guests have no other Python than their own")
    if HOST_PYTHON:
        namespace.python_directories(HOST_PYTHON)
    ground.need("ssh", "ssh-keygen", why="logging in to test hosts")
    if lab.get("registries"):
        registry.find_registry()
        ground.need("skopeo", why="filling a registry")
    for program in lab.get("programs", []):
        ground.need(program, why="this scenario")


def start_host(platform: Spec) -> Spec:
    suite = SUITE or platform["suite"]
    if platform.get("kind", "namespace") == "guest":
        return guests.start(platform["name"], suite)
    return namespace.start(
        platform["name"], suite, platform.get("flavour", "ready"), platform.get("isolated", False), HOST_PYTHON
    )


def remove_host(platform: Spec) -> None:
    (guests if platform.get("kind", "namespace") == "guest" else namespace).remove(platform["name"])


def services(scenario: str) -> pathlib.Path:
    return ground.running(f"{scenario}-services")


def start_registries(scenario: str, lab: Spec) -> Spec:
    """Registries with the images in them; what a playbook has to know to use them."""
    result: Spec = {}
    for name, options in lab.get("registries", {}).items():
        filled = options.pop("filled", True)
        # The blobs stay from run to run: pushing what is there already takes no time.
        kept = options.pop("kept", filled)
        storage = {"storage": ground.state() / "registry"} if kept else {}
        server = registry.Registry(services(scenario) / name, **storage, **options).start()
        for image in lab.get("images", []) if filled else []:
            # As it is: skopeo would put a gzip layer that the registry knows in the place of the same one in zstd.
            server.push(images.source(image), f"{image}:latest", "--all", "--preserve-digests")
        result[name] = {
            "address": server.address,
            "guest_address": server.address.replace("127.0.0.1", "10.0.2.2"),
            **options,
        }
        if server.tls:
            result[name]["ca"] = (server.ca_directory / "ca.crt").read_text()
        if server.user:
            result[name]["auth_file"] = server.auth_file().read_text()
    return result


def lay_out_archives(scenario: str, lab: Spec) -> Spec:
    """Archives and directories of images, as somebody carries them to hosts that reach no registry."""
    base = services(scenario) / "files"
    base.mkdir(exist_ok=True)
    result: Spec = {"path": str(base)}
    for name, image in lab.get("archives", {}).items():
        transport, _unused, file = name.partition(":")
        tag = {"docker-archive": f":example.com/{image}:latest", "dir": ""}.get(transport, ":latest")
        registry.skopeo_copy(images.source(image), f"{transport}:{base / file}{tag}")
    # All in one file, for Ansible copies one file much faster than many.
    ground.run("tar", "-cf", f"{base}.tar", "-C", base.parent, base.name)
    return result


def describe(instances: list[Spec]) -> list[Spec]:
    """What runs on hosts: the release of Debian, the kernel if it is their own, the Python that runs the modules,
    skopeo ("" where there is none).
    """
    python = os.environ.get("COMPOSEFS_OCI_INTERPRETER") or "/usr/bin/python3"
    words = (
        f". /etc/os-release; echo $VERSION_CODENAME; uname -r; {python} -c 'import platform; "
        f"print(platform.python_version())'; skopeo --version || true"
    )
    described = []
    for host in instances:
        suite, kernel, version, *skopeo = ground.run(
            *ground.ssh_command(host["address"], host["port"], words), stderr=subprocess.DEVNULL
        ).splitlines()
        # Namespace hosts run on the kernel of the machine.
        kernel = "" if kernel == os.uname().release else kernel
        described.append(
            {"suite": suite, "kernel": kernel, "python": version, "skopeo": skopeo[0].split()[2] if skopeo else ""}
        )
    return described


def create(scenario: str, platforms: list[Spec], lab: Spec) -> Spec:
    check(platforms, lab)
    destroy(scenario, platforms, lab)  # what an interrupted run left
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        hosts = [pool.submit(start_host, platform) for platform in platforms]
        facts: Spec = {
            "registries": start_registries(scenario, lab),
            "files": lay_out_archives(scenario, lab) if lab.get("archives") else {},
        }
        facts["images"] = {
            name: images.facts(name) for name in {*lab.get("images", []), *lab.get("archives", {}).values()}
        }
        facts["instances"] = [host.result() for host in hosts]
    facts["unforetold"] = lab.get("unforetold", {})
    facts["hosts"] = {
        host["instance"]: described for host, described in zip(facts["instances"], describe(facts["instances"]))
    }
    return facts


def destroy(scenario: str, platforms: list[Spec], lab: Spec) -> None:
    for platform in platforms:
        remove_host(platform)
    for name in lab.get("registries", {}):
        program = ground.HERE.parent / "support/registry.py"
        subprocess.run([sys.executable, str(program), "stop", "--dir", str(services(scenario) / name)], check=False)
    ground.remove(services(scenario))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("check", "clean", "create", "destroy"))
    parser.add_argument("files", nargs="*", type=pathlib.Path)
    options = parser.parse_args()
    try:
        if options.command in ("check", "clean"):
            import yaml

            for file in options.files:
                document = yaml.safe_load(file.read_text())
                lab = document["provisioner"].get("inventory", {}).get("group_vars", {}).get("all", {}).get("lab", {})
                if options.command == "check":
                    check(document["platforms"], lab)
                else:
                    destroy(file.parent.name, document["platforms"], lab)
            return 0
        spec = json.load(sys.stdin)
        arguments = (spec["scenario"], spec["platforms"], spec.get("lab") or {})
        if options.command == "create":
            print(json.dumps(create(*arguments)))
        else:
            destroy(*arguments)
    except Unavailable as reason:
        print(f"cannot be run here: {reason}", file=sys.stderr)
        return SKIP
    return 0


if __name__ == "__main__":
    sys.exit(main())
