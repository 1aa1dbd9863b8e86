# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The example for hosts that boot from images, with a stand-in for bootc that remembers what it was told."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:  # pytest gives the fixture
    from conftest import Site

EXAMPLE = pathlib.Path(__file__).resolve().parents[3] / "examples" / "bootc" / "activate.yml"
OLD, NEW = "sha256:" + "a" * 64, "sha256:" + "b" * 64
BOOTC = """#!/bin/sh
# One host a directory, by the variable that its inventory sets; a reboot is immediate.
echo "$*" >> "$HOST/told"
case $1 in
status) echo "{\\"status\\": {\\"booted\\": {\\"image\\": {\\"imageDigest\\": \\"$(cat "$HOST/booted")\\"}}}}" ;;
switch) cp "$HOST/booted" "$HOST/before"; echo "${2#*@}" > "$HOST/booted" ;;
rollback) cp "$HOST/before" "$HOST/booted" ;;
esac
"""


@pytest.mark.parametrize(("health", "has"), [("true", [NEW, NEW, NEW]), ("false", [OLD, NEW, OLD])])
def test_hosts_boot_the_image_in_waves_and_a_bad_one_reaches_the_first_only(
    site: Site, health: str, has: list[str]
) -> None:
    programs = site.directory / "bin"
    programs.mkdir()
    (programs / "bootc").write_text(BOOTC)
    (programs / "bootc").chmod(0o755)
    lines = []
    for name, booted in (("one", OLD), ("two", NEW), ("three", OLD)):
        place = site.directory / name
        place.mkdir()
        (place / "booted").write_text(f"{booted}\n")
        lines.append(f"{name} ansible_connection=local ansible_python_interpreter={sys.executable} place={place}")
    (site.directory / "inventory").write_text("\n".join(lines) + "\n")
    # The variable of each host reaches the stand-in through the environment of its tasks.
    play = site.directory / "activate.yml"
    text = EXAMPLE.read_text()
    play.write_text(
        text.replace("  gather_facts: false\n", '  gather_facts: false\n  environment: {HOST: "{{ place }}"}\n', 1)
    )
    variables = {
        "rollout_ref": "docker://registry.example.com/os:1.4",
        "rollout_digest": NEW,
        "bootc_reboot": False,
        "bootc_become": False,
        "bootc_health": health,
        "bootc_delay": 0,
    }
    command = [str(pathlib.Path(sys.executable).parent / "ansible-playbook"), "-i", "inventory", str(play)]
    done = subprocess.run(
        [*command, "-e", json.dumps(variables)],
        cwd=site.directory,
        env=site.environment(PATH=f"{programs}:{os.environ['PATH']}"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == (0 if health == "true" else 2), done.stdout + done.stderr
    assert [(site.directory / name / "booted").read_text().strip() for name in ("one", "two", "three")] == has
    told = [(site.directory / name / "told") for name in ("one", "two", "three")]
    switch = f"switch registry.example.com/os@{NEW}"
    if health == "true":
        assert told[0].read_text().splitlines() == ["status --json", switch, "status --json"]
        assert told[1].read_text().splitlines() == ["status --json"]
    else:
        assert told[0].read_text().splitlines()[-1] == "rollback"
        assert not told[2].exists(), "no wave followed"
        assert "These hosts went back: one." in done.stdout
