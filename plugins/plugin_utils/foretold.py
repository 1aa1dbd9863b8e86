# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What one task of a run in check mode foretells, for the tasks after it.

A pull in check mode moves no name, so a task that mounts the image would look at the old one and foretell that nothing
happens. The actions of modules that change something therefore leave facts: for each name that would move, for each
path where something else would be mounted, and for a repository that would be made, brought up to date or given away.
A task that says ``check_mode: true`` itself leaves none: it asks what would be, and nobody goes on to do it.
Every action of the collection hands these facts to its module. Nothing is written on the host. A fact counts only in
the run of ansible-playbook that it was made in, for facts may be cached beyond it.
"""

from __future__ import annotations

import hashlib
import json
import os
import typing as t

from ansible import context

PREFIX = "composefs_oci_foretold_"
VARIABLE = "COMPOSEFS_OCI_FORETOLD"
ASKS = "COMPOSEFS_OCI_ASKS"
# More images before a mount than any path ever has.
EVERYTHING = 1_000_000
# Characters of the variable; the kernel takes twice as many.
LONGEST = 64 * 1024
# Characters of the digest at the end of a stream's name that are left out: the rest tells streams apart.
_REST = 48


def run_id() -> str:
    """What tells this run of ansible-playbook from every other one: the process that all workers come from."""
    parent = os.getppid()
    try:
        with open(f"/proc/{parent}/stat", encoding="ascii", errors="replace") as file:
            started = file.read().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        started = ""
    return f"{parent}-{started}"


def _key(*words: str) -> str:
    return PREFIX + hashlib.sha256("\0".join(words).encode("utf-8", "surrogateescape")).hexdigest()[:16]


def facts_of(result: dict[str, t.Any], arguments: dict[str, t.Any]) -> dict[str, t.Any]:
    """The facts to leave for a result of composefs_image: one for each name that would change, so that the items of a
    loop do not replace those of one another.
    """
    facts: dict[str, t.Any] = {}
    several = result.get("images")
    asked = arguments.get("images") if several else [arguments]
    absent = arguments.get("state") == "absent"
    for number, image in enumerate(several or [result]):
        repository, name = image.get("repository") or result.get("repository"), image.get("name")
        if not repository or not name:
            continue
        before, digest = image.get("previous_digest"), image.get("digest")
        # The parts of an image that will be there are not fetched again; None if they are not known.
        parts = image.get("streams")
        streams = [] if absent else None if parts is None else [str(stream)[:-_REST] for stream in parts]
        changes = {} if before and digest == before else {name: absent}
        changes.update(dict.fromkeys(image.get("tags") or [], absent))
        wish = asked[number] if isinstance(asked, list) and number < len(asked) else None
        if isinstance(wish, dict) and wish.get("rename_from") and wish["rename_from"] != name:
            changes[str(wish["rename_from"])] = True
        for changed, gone in changes.items():
            facts[_key(repository, changed)] = {
                "run": run_id(),
                "repository": repository,
                "name": changed,
                "digest": None if gone else digest,
                "absent": gone,
                "streams": streams,
            }
            streams = []
    return facts


def facts_of_removal(result: dict[str, t.Any]) -> dict[str, t.Any]:
    """The facts to leave for a result of composefs_prune: the names that would be gone."""
    names = [{"name": name} for name in result.get("names") or []]
    return facts_of({**result, "images": names}, {"state": "absent"}) if names else {}


def fact_of_mount(result: dict[str, t.Any], arguments: dict[str, t.Any]) -> dict[str, t.Any]:
    """The fact to leave for a result of composefs_mount or composefs_deployment: what would be mounted at its path."""
    path, repository, state = result.get("path"), result.get("repository"), result.get("state")
    if not path or not repository:
        return {}
    try:
        keep_previous = int(arguments.get("keep_previous", 1))
    except (TypeError, ValueError):
        keep_previous = 1
    return {
        _key("mount", path): {
            "run": run_id(),
            "repository": repository,
            "path": path,
            "name": result.get("name"),
            "digest": result.get("digest"),
            # An index stands for the manifest of each of its platforms.
            "asked": arguments.get("digest"),
            "image_id": result.get("image_id"),
            # What is on trial replaces nothing yet.
            "keep_previous": EVERYTHING if state in ("activated", "reverted") else keep_previous,
            "absent": state == "absent" if state else not result.get("mounted"),
            "state": state,
        }
    }


def fact_of_repository(result: dict[str, t.Any], arguments: dict[str, t.Any]) -> dict[str, t.Any]:
    """The fact to leave for a result of composefs_repository: what it would have become."""
    path = result.get("path")
    if not path:
        return {}
    return {
        _key("repository", path): {
            "run": run_id(),
            "repository": path,
            "created": bool(result.get("created")),
            "upgraded": bool(result.get("upgraded")),
            "unsafe": bool(result.get("unsafe")),
            "algorithm": result.get("algorithm"),
            "secure": result.get("verity") == "required",
            "attributes": {key: str(arguments[key]) for key in ("owner", "group", "mode") if arguments.get(key)},
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
    if not found:
        return {}
    text = json.dumps(found)
    if len(text) > LONGEST:
        # Then some bytes are foretold twice, but names and mounts are right.
        text = json.dumps([{key: value for key, value in one.items() if key != "streams"} for one in found])
    return {VARIABLE: text}


def over(facts: dict[str, t.Any], task_vars: dict[str, t.Any] | None) -> dict[str, t.Any]:
    """Empty facts in the place of those that an earlier play of this run left in check mode, and that this task has
    made true or out of date.
    """
    known = (task_vars or {}).get("ansible_facts") or {}
    return {key: {} for key in facts if key in known}


def left(
    facts: t.Callable[[dict[str, t.Any]], dict[str, t.Any]],
    result: dict[str, t.Any],
    task: t.Any,
    task_vars: dict[str, t.Any] | None,
) -> dict[str, t.Any]:
    """The facts to leave for the result of a task: in check mode what it foretells, otherwise what takes back such
    facts of an earlier play. ``facts`` makes them of a result.
    """
    if not result.get("changed") or result.get("failed") or (task.check_mode and _asks(task)):
        return {}
    if not task.check_mode:
        return over(facts(result), task_vars)
    known = (task_vars or {}).get("ansible_facts") or {}
    return {key: _merged(known.get(key), fact) for key, fact in facts(result).items()}


def _asks(task: t.Any) -> bool:
    """Whether the task is in check mode by a word of its own and not because the run or the play is."""
    written = task.get_ds()
    return isinstance(written, dict) and written.get("check_mode") is not None


def _merged(before: t.Any, fact: dict[str, t.Any]) -> dict[str, t.Any]:
    """A fact with what an earlier task of the run foretold of the same repository, which is not undone by it."""
    if "created" not in fact or not isinstance(before, dict) or before.get("run") != fact["run"]:
        return fact
    both = {key: before.get(key) or fact[key] for key in ("created", "upgraded")}
    return {**fact, **both, "attributes": {**(before.get("attributes") or {}), **fact["attributes"]}}


def told(environment_of_task: t.Any, task: t.Any, task_vars: dict[str, t.Any] | None) -> list[t.Any]:
    """The environment of a task in check mode, as the task has it, and with what is foretold, or with the word that
    earlier tasks of the run were not in check mode, so that what is not there now does not come.
    """
    both = environment_of_task if isinstance(environment_of_task, list) else [environment_of_task]
    known = environment(task_vars or {})
    asks = {ASKS: "1"} if _asks(task) and not context.CLIARGS.get("check") else {}
    return [one for one in (*both, known, asks) if one]
