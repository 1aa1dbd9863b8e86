# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What one task of a run in check mode foretells, for the tasks after it.

A pull in check mode moves no name, so a task that mounts the image would look at the old one and foretell that nothing
happens. The action of composefs_image therefore leaves a fact for each name that it would move, and the actions of
modules that look at names hand these facts to them. Nothing is written on the host. A fact counts only in the run of
ansible-playbook that it was made in, for facts may be cached beyond it.
"""

from __future__ import annotations

import hashlib
import json
import os
import typing as t

PREFIX = "composefs_oci_foretold_"
VARIABLE = "COMPOSEFS_OCI_FORETOLD"


def run_id() -> str:
    """What tells this run of ansible-playbook from every other one: the process that all workers come from."""
    parent = os.getppid()
    try:
        with open(f"/proc/{parent}/stat", encoding="ascii", errors="replace") as file:
            started = file.read().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        started = ""
    return f"{parent}-{started}"


def facts_of(result: dict[str, t.Any], absent: bool) -> dict[str, t.Any]:
    """The facts to leave for a result of composefs_image: one for each name that would change, so that the items of a
    loop do not replace those of one another.
    """
    facts = {}
    for image in result.get("images") or [result]:
        repository, name = image.get("repository") or result.get("repository"), image.get("name")
        before = image.get("previous_digest")
        if not repository or not name or (before and image.get("digest") == before):
            continue
        key = hashlib.sha256(f"{repository}\0{name}".encode("utf-8", "surrogateescape")).hexdigest()[:16]
        facts[PREFIX + key] = {
            "run": run_id(),
            "repository": repository,
            "name": name,
            "digest": image.get("digest"),
            "absent": absent,
        }
    return facts


def fact_of_mount(result: dict[str, t.Any], arguments: dict[str, t.Any]) -> dict[str, t.Any]:
    """The fact to leave for a result of composefs_mount: what would be mounted at its path."""
    path, repository = result.get("path"), result.get("repository")
    if not path or not repository:
        return {}
    key = hashlib.sha256(f"mount\0{path}".encode("utf-8", "surrogateescape")).hexdigest()[:16]
    try:
        keep_previous = int(arguments.get("keep_previous", 1))
    except (TypeError, ValueError):
        keep_previous = 1
    return {
        PREFIX + key: {
            "run": run_id(),
            "repository": repository,
            "path": path,
            "name": result.get("name"),
            "digest": result.get("digest"),
            "image_id": result.get("image_id"),
            "keep_previous": keep_previous,
            "absent": not result.get("mounted"),
        }
    }


def environment(task_vars: dict[str, t.Any]) -> dict[str, str]:
    """The variable that tells a module in check mode what earlier tasks of this run foretold; empty if nothing."""
    facts = task_vars.get("ansible_facts") or {}
    own = run_id()
    found = [
        {key: value for key, value in fact.items() if key != "run"}
        for name, fact in sorted(facts.items())
        if isinstance(name, str) and name.startswith(PREFIX) and isinstance(fact, dict) and fact.get("run") == own
    ]
    return {VARIABLE: json.dumps(found)} if found else {}
