# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What a rollout decides: who is tried in which wave, when to stop, and what happened. Values in, values out.

Nothing here knows Ansible: a host is a mapping of the variables that the tasks of the role registered for it
(``rollout_before``, ``rollout_planned``, ``rollout_fetched``, ``rollout_activated``, ``rollout_confirmed``,
``rollout_reverted``), each the result of one module, absent where the task did not run.
"""

from __future__ import annotations

import csv
import datetime
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ansible_collections.composefs.oci.plugins.plugin_utils.wishes import DIGEST, moment, number_of

Host = Mapping[str, Any]

CURRENT, CONFIRMED, REVERTED, FAILED, LOST = "current", "confirmed", "reverted", "failed", "lost"
ABSENT, UNTOUCHED, DRIFTED, REVERT_FAILED, STAGED = "absent", "untouched", "drifted", "revert_failed", "staged"
STATES = (REVERT_FAILED, LOST, FAILED, REVERTED, DRIFTED, ABSENT, UNTOUCHED, STAGED, CONFIRMED, CURRENT)
"""All states of a host; those that need a person first."""

GOOD = frozenset((CURRENT, CONFIRMED))
WAITING = frozenset((UNTOUCHED, STAGED))
IDLE = "rollout_idle"
"""What is said of a host on which there is nothing to go back to (``back``) or to retire (``there``)."""


def result(host: Host, name: str) -> Mapping[str, Any]:
    """What the task that registers ``name`` returned on ``host``; empty where it did not run or was skipped."""
    found = host.get(name)
    if not isinstance(found, Mapping) or found.get("skipped"):
        return {}
    return found


def succeeded(found: Mapping[str, Any]) -> bool:
    return bool(found) and not found.get("failed") and not found.get("unreachable")


# ---- hosts -----------------------------------------------------------------------------------------------------------


def deployment(host: Host, path: str, register: str = "rollout_before") -> Mapping[str, Any]:
    """The deployment at ``path`` as the host told it; empty if there is none."""
    for found in result(host, register).get("deployments") or ():
        if found.get("path") == path:
            return found
    return {}


def other_image(host: Host, path: str, name: str) -> str:
    """The image that the mount at ``path`` belongs to, if that is another one than ``name``; else empty."""
    found = str(deployment(host, path).get("name") or "")
    return found if name and found != name else ""


def digests_wanted(host: Host, digest: str) -> set[str]:
    """The digests by which ``host`` may know the image: the one asked for, and its platform's manifest in an index."""
    wanted = {digest}
    for register in ("rollout_planned", "rollout_fetched"):
        found = result(host, register)
        if succeeded(found):
            wanted |= {str(found[key]) for key in ("digest", "registry_digest") if found.get(key)}
    return wanted


def is_current(host: Host, path: str, digest: str) -> bool:
    """Whether the host had the image, confirmed and mounted, before anything was done."""
    found = deployment(host, path)
    current = found.get("current") or {}
    if found.get("pending") or found.get("state") not in (None, "current", "confirmed"):
        return False
    return bool({current.get("digest"), current.get("index_digest")} & digests_wanted(host, digest))


def is_on_trial(activated: Mapping[str, Any]) -> bool:
    """Whether the image waits for its confirmation after an activation: also one that an earlier run began, whose
    controller died, and which therefore changed nothing this time.
    """
    return bool(activated.get("changed")) or activated.get("state") == "activated"


def keeps_it(host: Host) -> bool:
    """Whether the image was confirmed in this run, and not taken back."""
    return succeeded(result(host, "rollout_confirmed")) and not result(host, "rollout_reverted")


def is_ready(host: Host) -> bool:
    """Whether the image lies on the host under its pin."""
    staged = result(host, "rollout_staged")
    return succeeded(result(host, "rollout_fetched")) or (succeeded(staged) and bool(staged.get("images")))


def state_of(host: Host, path: str, digest: str, looked: bool = True) -> str:
    """The state of one host. ``looked``: whether hosts were asked at all, so that silence means that it is away."""
    activated, confirmed = result(host, "rollout_activated"), result(host, "rollout_confirmed")
    reverted = result(host, "rollout_reverted")
    if reverted:
        if reverted.get("unreachable"):
            return LOST
        if reverted.get("failed"):
            return REVERT_FAILED
        # What failed before it changed anything had nothing to take back.
        return FAILED if activated.get("failed") and not reverted.get("changed") else REVERTED
    if confirmed:
        if confirmed.get("unreachable"):
            return LOST
        # What comes after the change may have failed, and then somebody has to see to the host.
        return CONFIRMED if succeeded(confirmed) and not result(host, "rollout_failure") else FAILED
    if activated:
        if activated.get("unreachable"):
            return LOST
        if activated.get("failed"):
            return FAILED
        return LOST if is_on_trial(activated) else CURRENT
    before = result(host, "rollout_before")
    if looked and (not before or before.get("unreachable")):
        return ABSENT
    for register in ("rollout_planned", "rollout_fetched"):
        found = result(host, register)
        if found.get("unreachable"):
            return ABSENT
        if found.get("failed"):
            return FAILED
    if before.get("failed"):
        return FAILED
    if is_current(host, path, digest):
        return CURRENT
    if host.get(IDLE) == "there":
        return CURRENT
    told = deployment(host, path).get("state")
    if told == "drifted":
        return DRIFTED
    if told == "revert_failed":
        return REVERT_FAILED
    return STAGED if is_ready(host) else UNTOUCHED


def kept_digests(host: Host) -> set[str]:
    """Every digest that a deployment of ``host`` may still need: what it has, had, and tries."""
    digests: set[str] = set()
    for found in result(host, "rollout_before").get("deployments") or ():
        for image in (found.get("current"), found.get("pending"), *(found.get("previous") or ())):
            digests |= {str((image or {}).get(key)) for key in ("digest", "index_digest")}
    return {digest for digest in digests if DIGEST.match(digest)}


def seeds(hosts: Mapping[str, Host], sites: Mapping[str, str]) -> dict[str, list[str]]:
    """The seeds that can be pruned after a rollout to ``hosts``, and the digests that each has to keep.

    ``sites`` are all hosts that there are and their seeds. A seed that serves a host which was not part of the rollout
    is left alone, for nobody asked that host what it needs.
    """
    keep: dict[str, set[str]] = {}
    for name, seed in sites.items():
        if seed:
            keep.setdefault(seed, set()).update(kept_digests(hosts.get(name, {})))
    served_elsewhere = {seed for name, seed in sites.items() if name not in hosts}
    return {seed: sorted(digests) for seed, digests in sorted(keep.items()) if seed not in served_elsewhere}


# ---- order and gate --------------------------------------------------------------------------------------------------


def order(
    hosts: Sequence[str],
    canaries: Sequence[str],
    waves: Sequence[int | str],
    max_unavailable: int | str,
) -> list[int]:
    """How many of ``hosts``, which are to be changed, are in each wave: the canaries first, then ``waves`` of the rest.

    No wave is larger than ``max_unavailable``, since a host whose timer runs must not wait for many others. Without
    canaries the first host is one.
    """
    if not hosts:
        return []
    first = len([host for host in hosts if host in set(canaries)]) or 1
    most = max(1, number_of(max_unavailable, len(hosts)))
    serial: list[int] = []

    def add(number: int) -> None:
        while number > 0:
            serial.append(min(number, most))
            number -= serial[-1]

    add(first)
    left = len(hosts) - first
    for position in range(len(hosts)):
        if left <= 0:
            break
        size = min(left, max(1, number_of(waves[min(position, len(waves) - 1)], len(hosts))))
        add(size)
        left -= size
    return serial


def wave_numbers(hosts: Sequence[str], serial: Sequence[int]) -> dict[str, int]:
    """The wave of each host, from 1."""
    numbers = [number for number, size in enumerate(serial, 1) for _unused in range(size)]
    return dict(zip(hosts, numbers))


def gate(
    hosts: Mapping[str, Host],
    canaries: Iterable[str],
    wave: int,
    max_failed: int | str = 0,
    stop_after: int | None = None,
    until: str = "",
    confirm_within: float = 300,
    now: datetime.datetime | None = None,
) -> dict[str, Any]:
    """Whether the rollout ends before ``wave`` (from 1), and why: ``{stop, kind, why, failed, allowed, wave}``.

    ``hosts`` are all hosts of the play with what they registered so far. A host counts as tried as soon as its
    activation has any result, also that it could not be reached, and as good if it confirmed or had nothing to change.
    """
    tried = {name: host for name, host in hosts.items() if result(host, "rollout_activated")}
    bad = [name for name, host in tried.items() if not _is_good(host)]
    first = [name for name in hosts if name in set(canaries)] or list(hosts)[:1]
    allowed = number_of(max_failed, len(hosts))
    answer: dict[str, Any] = {
        "stop": False,
        "kind": "",
        "why": "",
        "failed": len(bad),
        "allowed": allowed,
        "wave": wave,
    }

    def stop(kind: str, why: str) -> dict[str, Any]:
        return {**answer, "stop": True, "kind": kind, "why": why}

    bad_canaries = [name for name in bad if name in first]
    if bad_canaries:
        return stop("halted", f"the canary {', '.join(bad_canaries[:5])} did not keep the image")
    if len(bad) > allowed:
        return stop("halted", f"{len(bad)} hosts did not keep the image and {allowed} may: {', '.join(bad[:5])}")
    if wave > 1 and not any(name in tried and _is_good(tried[name]) for name in first):
        return stop("halted", "no canary has confirmed the image")
    if stop_after is not None and wave > stop_after:
        return stop("paused", f"{stop_after} waves are done, as asked; the same command goes on")
    if until:
        now = now or datetime.datetime.now(datetime.timezone.utc).astimezone()
        left = (moment(until, now) - now).total_seconds()
        if left < confirm_within:
            return stop("paused", f"the window ends at {until}, and a wave may take {confirm_within:g} s")
    return answer


def _is_good(host: Host) -> bool:
    activated = result(host, "rollout_activated")
    if succeeded(activated) and not is_on_trial(activated):
        return True
    return keeps_it(host) and not result(host, "rollout_failure")


# ---- the report ------------------------------------------------------------------------------------------------------

FORMAT = 1


def _error_of(host: Host) -> dict[str, str] | None:
    """The first thing that went wrong on a host, as code and message; None if nothing did. If going back
    failed, that is the error, for it is what a person has to mend.
    """
    back = result(host, "rollout_reverted")
    if back.get("failed") and not back.get("unreachable"):
        return {"code": str(back.get("error") or "failed"), "message": str(back.get("msg") or "")[:4096]}
    for register in ("rollout_before", "rollout_planned", "rollout_fetched", "rollout_activated", "rollout_failure"):
        found = result(host, register)
        if found.get("failed") or found.get("unreachable"):
            code = "unreachable" if found.get("unreachable") else str(found.get("error") or "failed")
            return {"code": code, "message": str(found.get("msg") or "")[:4096]}
    for register in ("rollout_confirmed", "rollout_reverted"):
        found = result(host, register)
        if found.get("failed") or found.get("unreachable"):
            code = "unreachable" if found.get("unreachable") else str(found.get("error") or "failed")
            return {"code": code, "message": str(found.get("msg") or "")[:4096]}
    return None


def change(found: Mapping[str, Any]) -> str:
    """What one task of a rollout did to a host, in a line for a person who watches; empty if it changed nothing."""
    if found.get("failed") and found.get("error") == "reverted":
        return f"taken back at {found.get('path')}: {found.get('msg')}"
    if not found.get("changed") or found.get("failed"):
        return ""
    name, path, state = str(found.get("name") or "image"), found.get("path"), str(found.get("state"))
    image = f"{name} {_short(found.get('digest'))}"
    if state == "activated":
        return f"{image} is on trial at {path}, to be confirmed until {found.get('deadline')}"
    if state == "confirmed":
        was = f" (was {_short(found.get('previous_digest'))})" if found.get("previous_digest") else ""
        return f"{image} is confirmed at {path}{was}"
    if state == "reverted":
        return f"taken back at {path}, {_short(found.get('digest'))} is there again: {found.get('reason')}"
    return f"nothing is mounted at {path} any more"


def _seconds(value: Any) -> float | None:
    return round(float(value), 1) if isinstance(value, (int, float)) else None


def _sources(fetched: Mapping[str, Any]) -> dict[str, int]:
    """How many bytes of layers came by which way: ``registry`` (the origin or a seed), ``delta``, ``peer``, or the
    transport of a local reference.
    """
    sources: dict[str, int] = {}
    for layer in fetched.get("layers") or ():
        if layer.get("status") == "new" and layer.get("source"):
            sources[layer["source"]] = sources.get(layer["source"], 0) + int(layer.get("bytes_to_fetch") or 0)
    return sources


ORIGIN, SEED, PEER, LOCAL, MIRROR_OR_ORIGIN = "origin", "seed", "peer", "local", "mirror_or_origin"
PLACES = (ORIGIN, SEED, PEER, LOCAL, MIRROR_OR_ORIGIN)
"""The places that bytes of layers come from, as far as they are known."""


def _places(host: Host, sources: Mapping[str, int]) -> dict[str, int]:
    """The bytes of ``sources`` by the place that they came from, each where it is known for certain.

    skopeo does not say whether a mirror answered or, since that did not have it, the origin. So on a host that was
    given a mirror it is one of the two, except for the deltas that its seed made, which lie nowhere else.
    """
    mirror, made = host.get("rollout_mirror"), host.get("rollout_made_deltas")
    places: dict[str, int] = {}
    for source, number in sources.items():
        if source in ("registry", "delta"):
            place = ORIGIN if not mirror else SEED if source == "delta" and made else MIRROR_OR_ORIGIN
        else:
            place = PEER if source == "peer" else LOCAL
        places[place] = places.get(place, 0) + number
    return places


def _sum(rows: Sequence[Mapping[str, Any]], key: str) -> dict[str, int]:
    """The sums of the numbers under ``key``, by their names."""
    names = sorted({name for row in rows for name in row[key]})
    return {name: sum(row[key].get(name, 0) for row in rows) for name in names}


def host_row(name: str, host: Host, path: str, digest: str, wave: int | None, looked: bool = True) -> dict[str, Any]:
    """One host of the report."""
    before = deployment(host, path)
    fetched = result(host, "rollout_fetched")
    ended = result(host, "rollout_reverted") or result(host, "rollout_confirmed")
    state = state_of(host, path, digest, looked)
    current = before.get("current") or {}
    error = _error_of(host)
    # Going back has a digest of its own for every host, and nothing is left of what was retired.
    after = digest or result(host, "rollout_activated").get("digest")
    if state not in GOOD and not keeps_it(host):
        after = current.get("digest")
    reason = "it has no image to go back to" if host.get(IDLE) == "back" and state in WAITING else ""
    if error and state not in GOOD:
        reason = error["message"].splitlines()[0][:200] if error["message"] else error["code"]
    sources = _sources(fetched) if succeeded(fetched) else {}
    return {
        "host": name,
        "site": str(host.get("rollout_site") or host.get("rollout_seed") or ""),
        "wave": wave,
        "state": state,
        "reason": reason,
        "before": current.get("digest"),
        "after": after,
        "bytes": int((fetched.get("stats") or {}).get("bytes_fetched") or 0) if succeeded(fetched) else 0,
        "bytes_by_source": sources,
        "bytes_by_place": _places(host, sources),
        "mirror": str(host.get("rollout_mirror") or "") or None,
        "seconds": {
            "fetch": _seconds(((fetched.get("stats") or {}).get("seconds") or {}).get("total")),
            "activate": _seconds(result(host, "rollout_activated").get("took")),
            "trial": _seconds(ended.get("seconds")),
            "confirm": _seconds(result(host, "rollout_confirmed").get("took")),
        },
        "activated": result(host, "rollout_activated").get("time"),
        "ended": ended.get("time"),
        "error": error if state not in GOOD else None,
    }


def report(
    hosts: Mapping[str, Host],
    about: Mapping[str, Any],
    waves: Mapping[str, int],
    halted: Mapping[str, Any] | None = None,
    phase: str = "activate",
) -> dict[str, Any]:
    """The report of a rollout. ``about`` has id, name, ref, digest, index_digest, path, controller, started, finished.

    ``result`` is ``planned`` and ``staged`` where no more was asked for and nothing failed, ``complete`` if every host
    is good, ``paused`` where it ended as asked, else ``halted``.
    """
    path, digest = str(about.get("path") or ""), str(about.get("digest") or "")
    rows = [host_row(name, host, path, digest, waves.get(name)) for name, host in hosts.items()]
    by_state = {state: sum(row["state"] == state for row in rows) for state in STATES}
    stopped = dict(halted or {})
    unhappy = [row for row in rows if row["state"] not in GOOD]
    harmed = [row for row in rows if row["state"] in (REVERT_FAILED, LOST, FAILED, REVERTED)]
    if phase == "plan":
        outcome = "halted" if harmed else "planned"
    elif phase in ("seed", "prefetch"):
        outcome = "halted" if harmed else "staged"
    elif not unhappy:
        outcome = "complete"
    elif stopped.get("kind") == "paused" and not harmed:
        outcome = "paused"
    else:
        outcome = "halted"
    return {
        "format": FORMAT,
        **{
            key: about.get(key)
            for key in ("id", "name", "ref", "digest", "index_digest", "path", "controller", "started", "finished")
        },
        "result": outcome,
        "halted": {key: stopped.get(key) for key in ("wave", "failed", "allowed", "why")}
        if stopped.get("stop")
        else None,
        "waves": _waves(rows, waves),
        "totals": {
            "hosts": len(rows),
            "states": {state: number for state, number in by_state.items() if number},
            "bytes": sum(row["bytes"] for row in rows),
            "bytes_by_source": _sum(rows, "bytes_by_source"),
            "bytes_by_place": _sum(rows, "bytes_by_place"),
            "seconds": _between(about.get("started"), about.get("finished")),
        },
        "hosts": rows,
    }


def _between(started: Any, finished: Any) -> float | None:
    """The seconds between two times in ISO 8601; None where one is missing."""
    try:
        first, last = (
            datetime.datetime.fromisoformat(str(text).replace("Z", "+00:00")) for text in (started, finished)
        )
    except ValueError:
        return None
    return (last - first).total_seconds()


def plan(hosts: Mapping[str, Host], path: str, digest: str) -> dict[str, Any]:
    """What a rollout would do: a row for each host, and totals. ``bytes`` are what the host would fetch. ``shared`` are
    the digests that at least two hosts to be changed have now: a delta from each of them is worth making.
    """
    rows = []
    for name, host in hosts.items():
        planned = result(host, "rollout_planned")
        state = state_of(host, path, digest)
        known = succeeded(planned)
        rows.append(
            {
                "host": name,
                "site": str(host.get("rollout_site") or host.get("rollout_seed") or ""),
                "state": "change" if state in (UNTOUCHED, STAGED, DRIFTED) else state,
                "before": (deployment(host, path).get("current") or {}).get("digest"),
                "before_version": next(
                    (mount.get("version") for mount in result(host, "rollout_mounted").get("mounts") or ()), None
                ),
                "version": planned.get("version"),
                "bytes": (planned.get("stats") or {}).get("bytes_fetched") if known else None,
                "free_bytes": planned.get("free_bytes"),
                "mirror": str(host.get("rollout_mirror") or "") or None,
                "verity": planned.get("verity"),
                "skopeo": planned.get("skopeo_version"),
                "error": _error_of(host),
            }
        )
    totals = {
        "hosts": len(rows),
        "current": sum(row["state"] == CURRENT for row in rows),
        "change": sum(row["state"] == "change" for row in rows),
        "absent": sum(row["state"] == ABSENT for row in rows),
        "failed": sum(row["state"] in (FAILED, REVERT_FAILED) for row in rows),
        "bytes": sum(row["bytes"] or 0 for row in rows),
        "least_free_bytes": min((row["free_bytes"] for row in rows if row["free_bytes"] is not None), default=None),
        "without_verity": sum(row["verity"] is False for row in rows),
        "before_versions": _counted(row["before_version"] for row in rows if row["before"]),
        "skopeo": _counted(row["skopeo"] for row in rows if row["skopeo"]),
    }
    before = [row["before"] for row in rows if row["before"] and row["state"] == "change"]
    shared = sorted(old for old in set(before) if before.count(old) >= 2)
    return {"hosts": rows, "totals": totals, "shared": shared}


def _counted(values: Iterable[Any]) -> dict[str, int]:
    found = [str(value or "?") for value in values]
    return {value: found.count(value) for value in sorted(set(found))}


def status(hosts: Mapping[str, Host], name: str = "", path: str = "") -> dict[str, Any]:
    """What each host has at each of its mount points, as the host tells it; of one image or mount point if asked."""
    rows: list[dict[str, Any]] = []
    for host_name, host in hosts.items():
        before = result(host, "rollout_before")
        if not succeeded(before):
            error = _error_of(host) or {"code": "unreachable", "message": ""}
            rows.append({**_nothing(host_name, host), "state": ABSENT, "error": error["code"]})
            continue
        mounts = {mount.get("path"): mount for mount in result(host, "rollout_mounted").get("mounts") or ()}
        information = result(host, "rollout_repository_info")
        mine = [
            found
            for found in before.get("deployments") or ()
            if (not name or found.get("name") == name) and (not path or found.get("path") == path)
        ]
        for found in mine:
            rows.append(_status_row(host_name, host, found, mounts.get(found.get("path")) or {}, information))
        if not mine:
            rows.append({**_nothing(host_name, host), "state": "none", **_maintenance(information)})
    states = {state: sum(row["state"] == state for row in rows) for state in sorted({row["state"] for row in rows})}
    return {"format": FORMAT, "hosts": rows, "totals": {"hosts": len(hosts), "states": states}}


STATUS = ("host", "site", "state", "name", "path", "version", "mounted", "next_boot", "previous", "staged", "pending")
STATUS += (
    "verity",
    "persistent",
    "unit_state",
    "drift",
    "own_bytes",
    "shared_bytes",
    "free_bytes",
    "last_result",
    "last_time",
    "maintained",
    "maintenance",
    "error",
)


def _nothing(name: str, host: Host) -> dict[str, Any]:
    site = str(host.get("rollout_site") or host.get("rollout_seed") or "")
    return {**dict.fromkeys(STATUS), "host": name, "site": site}


def _status_row(
    name: str, host: Host, found: Mapping[str, Any], mount: Mapping[str, Any], information: Mapping[str, Any]
) -> dict[str, Any]:
    current, pending = found.get("current") or {}, found.get("pending") or {}
    history = found.get("history") or []
    last = history[-1] if history else {}
    mounted = found.get("mounted_image_id")
    expected = pending.get("image_id") or current.get("image_id")
    staged = found.get("staged") or []
    return {
        **_nothing(name, host),
        **_maintenance(information),
        "state": found.get("state") or ("activated" if pending else CURRENT),
        "name": found.get("name"),
        "path": found.get("path"),
        "version": mount.get("version") or current.get("version"),
        "mounted": mount.get("digest") or (current.get("digest") if mounted == current.get("image_id") else mounted),
        "next_boot": current.get("digest") if (found.get("mount") or {}).get("persistent") else None,
        "previous": ", ".join(str(one.get("digest")) for one in found.get("previous") or ()) or None,
        "staged": ", ".join(str(one.get("digest") if isinstance(one, Mapping) else one) for one in staged) or None,
        "pending": pending.get("digest"),
        "verity": mount.get("verity", (found.get("mount") or {}).get("verity")),
        "persistent": (found.get("mount") or {}).get("persistent"),
        "unit_state": mount.get("unit_state"),
        "drift": bool(mounted and expected and mounted != expected) or found.get("state") == DRIFTED,
        "own_bytes": _bytes_of(information, found.get("name"), "own"),
        "shared_bytes": _bytes_of(information, found.get("name"), "shared"),
        "free_bytes": information.get("free_bytes"),
        "last_result": last.get("result"),
        "last_time": last.get("time"),
    }


def _maintenance(information: Mapping[str, Any]) -> dict[str, Any]:
    """When the host last looked after its repository, in seconds since the epoch, and what came of it; nothing if it
    never did.
    """
    last = information.get("last_maintenance") or {}
    if not last:
        return {}
    findings = ", ".join(f"{count} x {code}" for code, count in sorted((last.get("findings") or {}).items()))
    error = (last.get("error") or {}).get("code")
    return {"maintained": last.get("time"), "maintenance": error or findings or "ok"}


def _bytes_of(information: Mapping[str, Any], name: Any, kind: str) -> int | None:
    """The bytes of all images whose names begin with that of the deployment: the name itself, and its pins."""
    mine = [
        entry.get(kind)
        for entry in information.get("names") or ()
        if entry.get("name") == name or str(entry.get("name")).startswith(f"{name}@")
    ]
    return sum(mine) if mine and all(isinstance(one, int) for one in mine) else None


def comma_separated(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as CSV (RFC 4180), with the names of the columns first. A cell that a spreadsheet would take for a formula
    gets an apostrophe, for what hosts say is not to be computed.
    """
    out = io.StringIO()
    names = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.writer(out)
    writer.writerow(names)
    for row in rows:
        writer.writerow([_cell(row.get(name)) for name in names])
    return out.getvalue()


def _cell(value: Any) -> str:
    """The text of a cell; for an error it is the code."""
    if isinstance(value, Mapping):
        value = value.get("code")
    text = "" if value is None else str(value)
    computed = text[:1] in ("=", "+", "-", "@", "\t", "\r", "\n") and not isinstance(value, (int, float))
    return f"'{text}" if computed else text


def digest_of(answer: Mapping[str, Any], pin: str) -> str:
    """The digest that a rollout speaks of, from what a pull in check mode returned: the index where there is one and
    ``pin`` is ``index``, for that is what signatures cover, else the manifest as the registry knows it.
    """
    if pin == "index" and answer.get("index_digest"):
        return str(answer["index_digest"])
    return str(answer.get("registry_digest") or answer.get("digest") or "")


def _waves(rows: Sequence[Mapping[str, Any]], waves: Mapping[str, int]) -> list[dict[str, Any]]:
    answer = []
    for number in sorted(set(waves.values())):
        of_wave = [row for row in rows if row["wave"] == number]
        answer.append(
            {
                "number": number,
                "hosts": len(of_wave),
                "started": min((row["activated"] for row in of_wave if row["activated"]), default=None),
                "finished": max((row["ended"] for row in of_wave if row["ended"]), default=None),
                "confirmed": sum(row["state"] in GOOD for row in of_wave),
                "failed": sum(row["state"] in (LOST, FAILED, REVERTED, REVERT_FAILED) for row in of_wave),
            }
        )
    return answer


def table(made: Mapping[str, Any], most: int = 30) -> list[str]:
    """The report for a terminal: the totals, then the hosts that need a person."""
    states = made["totals"]["states"]
    lines = [
        # Going back has no digest: every host has its own.
        " ".join([str(made["name"]), *([_short(made["digest"])] if made["digest"] else [])])
        + f": {made['result']}"
        + (f" before wave {made['halted']['wave']}: {made['halted']['why']}" if made.get("halted") else ""),
        (", ".join(f"{number} {state.replace('_', ' ')}" for state, number in states.items()) or "no hosts")
        + _fetched(made["totals"]),
    ]
    rows = [row for row in made["hosts"] if row["state"] not in GOOD | WAITING or row["reason"]]
    rows.sort(key=lambda row: (STATES.index(row["state"]), row["host"]))
    for row in rows[:most]:
        why = f" ({row['reason']})" if row["reason"] else ""
        lines.append(f"{row['host']}: {row['state'].replace('_', ' ')}{why}")
    if len(rows) > most:
        lines.append(f"and {len(rows) - most} more hosts; the report has all of them")
    return lines


def _fetched(totals: Mapping[str, Any]) -> str:
    """How many bytes were fetched, and from where, for a terminal; nothing if none were."""
    places = totals["bytes_by_place"]
    told = [f"{size_words(places[place])} from {place_words(place)}" for place in PLACES if places.get(place)]
    return f"; fetched {', '.join(told)}" if told else ""


def place_words(place: str) -> str:
    """What a place is called where people read of it."""
    return {
        ORIGIN: "the origin",
        SEED: "seeds",
        PEER: "peers",
        LOCAL: "where the reference says",
        MIRROR_OR_ORIGIN: "a mirror or, where that lacked them, the origin",
    }[place]


def size_words(number: int) -> str:
    """Bytes for people, in units of 1024."""
    size, units = float(number), ["KB", "MB", "GB", "TB"]
    if size < 1024:
        return f"{number} bytes"
    while size >= 1024 and units:
        size, unit = size / 1024, units.pop(0)
    return f"{size:.1f} {unit}"


def _short(digest: Any) -> str:
    return str(digest or "").partition(":")[2][:12] or "?"
