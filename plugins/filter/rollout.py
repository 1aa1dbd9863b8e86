# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The filters of the role rollout: they take what they need out of the variables of hosts, and ask plugin_utils."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ansible.errors import AnsibleError, AnsibleFilterError

from ansible_collections.composefs.oci.plugins.plugin_utils import refusals, rollout, wishes

REGISTERED = (
    "rollout_before",
    "rollout_planned",
    "rollout_fetched",
    "rollout_staged",
    "rollout_activated",
    "rollout_confirmed",
    "rollout_reverted",
    "rollout_failure",
    "rollout_site",
    "rollout_seed",
    "rollout_mirror",
    "rollout_deltas",
    "rollout_mounted",
    "rollout_repository_info",
    "rollout_systemd",
)


def _hosts(hostvars: Mapping[str, Any], names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """What the role registered on each of ``names``; nothing else of a host is looked at, for that costs time."""
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        variables = hostvars[name]
        found[name] = {key: variables[key] for key in REGISTERED if key in variables}
    return found


def rollout_complaints(
    variables: Mapping[str, Any], known: Sequence[str], needs: Sequence[str] = wishes.NEEDS
) -> list[str]:
    """What is wrong with the variables of a rollout, one sentence each."""
    return wishes.complaints(variables, known, needs)


def rollout_host_complaints(
    names: Sequence[str],
    hostvars: Mapping[str, Any],
    known: Sequence[str],
    internals: Sequence[str],
    shared: Mapping[str, Any] | None = None,
) -> list[str]:
    """What is wrong with the variables of hosts, which names are one host, and which are a group as well, one sentence
    each.
    """
    told = {name: rollout.result(found, "rollout_before") for name, found in _hosts(hostvars, names).items()}
    double = wishes.doubles({name: str(found.get("place") or "") for name, found in told.items()})
    hosts: dict[str, dict[str, Any]] = {}
    for name in names:
        variables = hostvars[name]
        hosts[name] = {}
        for key in variables:
            if str(key).startswith("rollout_") and key not in internals:
                try:
                    value = variables[key]
                except AnsibleError:
                    # It needs what is known in the tasks only that use it.
                    continue
                if value is None or isinstance(value, (str, int, float, list)):
                    hosts[name][str(key)] = value
    groups = hostvars[names[0]]["groups"] if names else {}
    return wishes.of_hosts(hosts, known, internals, hostvars, shared=shared) + double + wishes.ambiguous(names, groups)


def rollout_order(
    names: Sequence[str],
    hostvars: Mapping[str, Any],
    path: str,
    digest: str,
    canaries: Sequence[str] = (),
    waves: Sequence[int | str] = ("100%",),
    max_unavailable: int | str = 5,
    max_absent: int | str = "10%",
    choose: str = "ready",
    image: str = "",
) -> dict[str, Any]:
    """Which hosts are changed in which wave, whether too many are away to begin, and where the mount belongs to another
    image than ``image``.

    ``choose`` takes the hosts that have the image and not yet mounted it (``ready``), that have one to go back to
    (``back``), or that have any at this mount point (``there``).
    """
    hosts = _hosts(hostvars, names)
    states = {name: rollout.state_of(host, path, digest) for name, host in hosts.items()}
    first = [name for name in names if name in set(canaries)]
    ordered = [*first, *(name for name in names if name not in set(first))]
    if choose != "ready":
        key = "previous" if choose == "back" else "path"
        ready = [name for name in ordered if rollout.deployment(hosts[name], path).get(key)]
    else:
        ready = [
            name
            for name in ordered
            if rollout.is_ready(hosts[name])
            and states[name] not in (rollout.CURRENT, rollout.ABSENT, rollout.FAILED)
            and not rollout.is_current(hosts[name], path, digest)
        ]
    serial = rollout.order(ready, first, waves, max_unavailable)
    absent = [name for name, state in states.items() if state == rollout.ABSENT]
    allowed = wishes.number_of(max_absent, len(names))
    why = ""
    if len(absent) > allowed:
        why = f"{len(absent)} hosts are out of reach and {allowed} may be: {', '.join(absent[:5])}"
    return {
        "ready": ready,
        "serial": serial or [1],
        "wave_of": rollout.wave_numbers(ready, serial),
        "absent": absent,
        "choose": choose,
        "idle": [
            name for name in ordered if choose != "ready" and name not in ready and states[name] in rollout.WAITING
        ],
        "others": [f"{name} ({other})" for name in ready if (other := rollout.other_image(hosts[name], path, image))],
        "stop": {"stop": bool(why), "kind": "halted", "why": why, "wave": 1, "failed": len(absent), "allowed": allowed},
    }


def rollout_gate(
    names: Sequence[str],
    hostvars: Mapping[str, Any],
    canaries: Sequence[str],
    wave: int,
    max_failed: int | str = 0,
    stop_after: int | str | None = None,
    until: str | None = None,
    confirm_within: float = 300,
) -> dict[str, Any]:
    """Whether the rollout stops before a wave, and why."""
    after = int(stop_after) if stop_after not in (None, "") else None
    hosts = _hosts(hostvars, names)
    try:
        return rollout.gate(hosts, canaries, int(wave), max_failed, after, until or "", float(confirm_within))
    except ValueError as error:
        raise AnsibleFilterError(f"rollout_gate: {error}") from error


def rollout_report(
    names: Sequence[str],
    hostvars: Mapping[str, Any],
    about: Mapping[str, Any],
    order: Mapping[str, Any] | None = None,
    phase: str = "activate",
    gate: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The report of a rollout."""
    hosts = _hosts(hostvars, names)
    order = order or {"ready": [], "wave_of": {}, "stop": {}}
    for name in order.get("idle") or ():
        hosts[name][rollout.IDLE] = order["choose"]
    halted = dict(order.get("stop") or {})
    tried = [name for name in order["ready"] if rollout.result(hosts.get(name, {}), "rollout_activated")]
    if phase == "activate" and not halted.get("stop") and len(tried) < len(order["ready"]):
        # The gate has no memory: asked again with what the hosts registered it gives the same answer.
        wave = max((order["wave_of"][name] for name in tried), default=0) + 1
        halted = rollout_gate(order["ready"], hostvars, wave=wave, **(gate or {"canaries": []}))
    for host in hosts.values():
        # What a seed made lies nowhere else, and its hosts are told of it by its digest.
        seed = host.get("rollout_seed")
        if host.get("rollout_deltas") == "auto" and seed and seed in hostvars:
            host["rollout_made_deltas"] = hostvars[seed].get("rollout_made_deltas")
    return rollout.report(hosts, about, order["wave_of"], halted, phase)


def rollout_plan(names: Sequence[str], hostvars: Mapping[str, Any], path: str, digest: str) -> dict[str, Any]:
    """What a rollout would do, for each host and in total."""
    return rollout.plan(_hosts(hostvars, names), path, digest)


def rollout_done(names: Sequence[str], hostvars: Mapping[str, Any], path: str, digest: str) -> list[str]:
    """The hosts that have the image, if all of ``names`` do; else none, for such a rollout may still go back."""
    states = {name: rollout.state_of(host, path, digest) for name, host in _hosts(hostvars, names).items()}
    return list(states) if all(state in rollout.GOOD for state in states.values()) else []


def rollout_seeds(names: Sequence[str], hostvars: Mapping[str, Any]) -> dict[str, list[str]]:
    """The seeds that can be pruned after a rollout that is complete on ``names``, and what each has to keep."""
    if not names:
        return {}
    sites = {name: str(hostvars[name].get("rollout_seed") or "") for name in hostvars}
    return rollout.seeds(_hosts(hostvars, names), sites)


def rollout_digest(answer: Mapping[str, Any], pin: str = "index") -> str:
    """The digest that a rollout speaks of, from what a pull in check mode returned."""
    return rollout.digest_of(answer, pin)


def rollout_refusals(
    names: Sequence[str], hostvars: Mapping[str, Any], path: str, name: str, verity: str, persistent: Any, adopt: Any
) -> list[str]:
    """Which hosts cannot take part, and why, one text for each."""
    found = []
    for host, told in _hosts(hostvars, names).items():
        own = {"verity": verity, "persistent": persistent, "adopt": adopt}
        # Hosts and groups may have variables of their own.
        own = {key: hostvars[host].get(f"rollout_{key}", value) for key, value in own.items()}
        reasons = refusals.refusals(told, {"path": path, "name": name, **own})
        if reasons:
            found.append(f"{host}: {', '.join(reasons)}")
    return found


def rollout_status(names: Sequence[str], hostvars: Mapping[str, Any], name: str = "", path: str = "") -> dict[str, Any]:
    """What hosts have now, from what they tell themselves."""
    return rollout.status(_hosts(hostvars, names), name, path)


def rollout_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as comma separated values with a line of names, for those who keep lists."""
    return rollout.comma_separated(rows)


def rollout_table(made: Mapping[str, Any]) -> list[str]:
    """The report as lines for a terminal."""
    return rollout.table(made)


class FilterModule:
    """The filters of the role rollout."""

    def filters(self) -> dict[str, Any]:
        return {
            "rollout_complaints": rollout_complaints,
            "rollout_digest": rollout_digest,
            "rollout_done": rollout_done,
            "rollout_gate": rollout_gate,
            "rollout_host_complaints": rollout_host_complaints,
            "rollout_order": rollout_order,
            "rollout_plan": rollout_plan,
            "rollout_refusals": rollout_refusals,
            "rollout_report": rollout_report,
            "rollout_seeds": rollout_seeds,
            "rollout_csv": rollout_csv,
            "rollout_status": rollout_status,
            "rollout_table": rollout_table,
        }
