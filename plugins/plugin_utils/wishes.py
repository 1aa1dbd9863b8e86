# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Whether the variables of a rollout can be meant. Values in, sentences out.

All is judged before anything moves, so what only fails on a host, in a wave, is judged here too where it can be seen.
Values come from YAML, from JSON and as the text of ``-e name=value``, so numbers and booleans may be text.
"""

from __future__ import annotations

import datetime
import math
import re
import urllib.parse
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any

from ansible_collections.composefs.oci.plugins.module_utils.errors import InvalidReference
from ansible_collections.composefs.oci.plugins.module_utils.formats.bounds import MAX_NAME
from ansible_collections.composefs.oci.plugins.module_utils.formats.digests import is_digest
from ansible_collections.composefs.oci.plugins.module_utils.formats.reference import parse_reference
from ansible_collections.composefs.oci.plugins.module_utils.formats.repolayout import encode_tag

NEEDS = ("rollout_ref", "rollout_name", "rollout_path")
DIGEST = re.compile(r"sha256:[0-9a-f]{64}\Z")
BOOLEANS = ("true", "false", "yes", "no", "on", "off", "1", "0")

WHOLE = {
    "rollout_confirm_within": 0,
    "rollout_stop_after": 1,
    "rollout_throttle": 1,
    "rollout_keep": 0,
    "rollout_health_retries": 1,
}
"""Variables that are whole numbers, and the least that each can be."""

CHOICES = {
    "rollout_pin": ("index", "manifest"),
    "rollout_verity": ("required", "preferred", "disabled"),
    "rollout_deltas": ("none", "auto"),
}
FLAGS = ("rollout_persistent", "rollout_adopt", "rollout_new", "rollout_prune")
LISTS = ("rollout_waves", "rollout_soak", "rollout_reload", "rollout_opts", "rollout_peers")
URLS = ("rollout_health_url", "rollout_peers")


def number_of(amount: int | str, total: int) -> int:
    """A number of hosts from a number or a percentage, which is rounded up so that ``1%`` is at least one host.

    Raises ValueError for anything else.
    """
    text = str(amount).strip()
    if not re.match(r"-?\d+(\.\d+)?%\Z|-?\d+\Z", text):
        raise ValueError("it is neither")
    if text.endswith("%"):
        share = float(text[:-1])
        if not 0 <= share <= 100:
            raise ValueError(f"{text} is no percentage from 0% to 100%")
        return math.ceil(total * share / 100 - 1e-9)
    number = int(text)
    if number < 0:
        raise ValueError(f"{text} is less than nothing")
    return number


def moment(text: str, now: datetime.datetime) -> datetime.datetime:
    """A point in time from ISO 8601, or from ``HH:MM`` in the time zone of ``now``: the next such moment.

    Raises ValueError.
    """
    short = re.match(r"(\d\d?):(\d\d)\Z", text.strip())
    if short:
        at = now.replace(hour=int(short[1]), minute=int(short[2]), second=0, microsecond=0)
        return at if at > now else at + datetime.timedelta(days=1)
    found = datetime.datetime.fromisoformat(text.strip().replace("Z", "+00:00").replace(" ", "T", 1))
    return found if found.tzinfo else found.replace(tzinfo=now.tzinfo)


def complaints(asked: Mapping[str, Any], known: Iterable[str], needs: Sequence[str] = NEEDS) -> list[str]:
    """What is wrong with the variables ``asked`` for, one sentence each; ``known`` are the names of all there are."""
    wrong: list[str] = []
    names = set(known)
    for name in sorted(set(asked) - names):
        near = sorted(names, key=lambda other: (-_common(name, other), other))[:1]
        wrong.append(f"There is no variable {name}; the nearest one is {near[0] if near else 'none'}.")
    wrong += [f"{name} has to be set." for name in needs if not asked.get(name)]
    # A variable that is empty is one that is not set, as it is in the role.
    given = {name: value for name, value in asked.items() if name in names and value is not None and value != ""}
    for judge in (_image, _place, _kinds, _amounts, _seconds, _health):
        wrong += judge(given)
    return wrong


def of_hosts(
    hosts: Mapping[str, Mapping[str, Any]],
    known: Sequence[str],
    internals: Iterable[str],
    inventory: Container[str],
    most: int = 5,
    shared: Mapping[str, Any] | None = None,
) -> list[str]:
    """What is wrong with the variables that ``hosts`` have of their own, each sentence with the hosts that it is about.
    ``inventory`` are the names of all hosts that there are, ``shared`` variables that are the same on all hosts of a
    rollout, for the controller speaks of them when it judges what hosts tell.
    """
    found: dict[str, list[str]] = {}
    ours = set(internals) - set(known)
    for host, variables in hosts.items():
        asked = {name: value for name, value in variables.items() if name not in ours}
        sentences = complaints(asked, known, ())
        seed = asked.get("rollout_seed")
        if seed and seed not in inventory:
            sentences.append(f"rollout_seed is {seed}, which is no host of the inventory.")
        for name, value in (shared or {}).items():
            if str(asked.get(name) or value) != str(value):
                sentences.append(
                    f"{name} is {asked[name]}, and {value} for the rollout, which has one for all of its hosts."
                )
        for sentence in sentences:
            found.setdefault(sentence, []).append(host)
    told = []
    for sentence, about in found.items():
        rest = f" and {len(about) - most} more" if len(about) > most else ""
        told.append(f"{sentence.rstrip('.')} (on {', '.join(about[:most])}{rest}).")
    return told


def _common(one: str, other: str) -> int:
    return next((at for at, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))


def _shown(value: Any) -> str:
    """A value as it is written in YAML."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)


def _is_clean(text: str) -> bool:
    """Whether a name can be shown, written into a line and put between others."""
    return text == text.strip() and text.isprintable()


def _image(given: Mapping[str, Any]) -> list[str]:
    wrong = []
    digest = str(given.get("rollout_digest", ""))
    if digest and not DIGEST.match(digest):
        wrong.append(f"rollout_digest has to be sha256: and 64 hexadecimal digits, not {digest!r}.")
    ref = str(given.get("rollout_ref", ""))
    if ref and not is_digest(ref):
        try:
            parse_reference(ref)
        except InvalidReference as error:
            wrong.append(f"rollout_ref is no reference: {error}")
    said = re.search(r"@(sha256:[0-9a-f]{64})\Z", ref)
    if said and DIGEST.match(digest) and said[1] != digest:
        wrong.append(f"rollout_ref says {said[1]} and rollout_digest says {digest}; leave one of them out.")
    name = str(given.get("rollout_name", ""))
    if name:
        pin = f"{name}@sha256:{'0' * 64}"
        if len(encode_tag(pin).encode("utf-8", "replace")) > MAX_NAME:
            wrong.append(
                f"rollout_name is too long: with the digest it may have {MAX_NAME} bytes, and / is three of them."
            )
        elif not _is_clean(name) or name.startswith("@") or "@sha256:" in name:
            wrong.append(f"rollout_name has to be a name without digest, breaks and spaces around it, not {name!r}.")
    identity = str(given.get("rollout_id", ""))
    if identity and not re.match(r"[A-Za-z0-9][A-Za-z0-9._+-]*\Z", identity):
        wrong.append(f"rollout_id names files: it has to be letters, digits, '.', '_', '+' and '-', not {identity!r}.")
    return wrong


def _place(given: Mapping[str, Any]) -> list[str]:
    wrong = []
    path = str(given.get("rollout_path", "/-"))
    steps = path.split("/")
    if steps[0] or "" in steps[1:] or {".", ".."} & set(steps) or not path.isprintable():
        wrong.append(
            f"rollout_path has to be the absolute path of something below /, without '..', '.' and '//' and without a "
            f"slash at its end, not {path!r}."
        )
    for name in ("rollout_repository", "rollout_auth_file"):
        if str(given.get(name, "/"))[0] not in "/~":
            wrong.append(f"{name} has to be an absolute path on the hosts, not {given[name]!r}.")
    return wrong


def _kinds(given: Mapping[str, Any]) -> list[str]:
    """What has to be a whole number, one of few words, yes or no, or a list."""
    wrong = []
    for name, least in WHOLE.items():
        value = given.get(name, least)
        if isinstance(value, bool) or not re.match(r"\d+\Z", str(value).strip()) or int(value) < least:
            wrong.append(f"{name} has to be a whole number from {least} on, not {_shown(value)}.")
    for name, words in CHOICES.items():
        if str(given.get(name, words[0])) not in words:
            wrong.append(f"{name} has to be {' or '.join(words)}, not {given[name]!r}.")
    for name in ("rollout_hosts", "rollout_canaries"):
        if not isinstance(given.get(name, ""), str):
            wrong.append(f"{name} has to be a pattern, such as 'edge:!lab' or 'a01,a02', not {_shown(given[name])}.")
    for name in FLAGS:
        if str(given.get(name, True)).strip().lower() not in BOOLEANS:
            wrong.append(f"{name} has to be true or false, not {_shown(given[name])}.")
    for name in LISTS:
        if not isinstance(given.get(name, []), (list, tuple)):
            said = _shown(given[name])
            wrong.append(f"{name} has to be a list, such as [{said}], not {said}.")
    if not wrong and not all(isinstance(word, str) and word for word in given.get("rollout_reload", ())):
        wrong.append(f"rollout_reload has to be a list of words, none of them empty, not {given['rollout_reload']!r}.")
    return wrong


def _amounts(given: Mapping[str, Any]) -> list[str]:
    wrong = []
    for name in ("rollout_waves", "rollout_max_failed", "rollout_max_absent", "rollout_max_unavailable"):
        value = given.get(name, 1)
        if name == "rollout_waves" and not isinstance(value, (list, tuple)):
            continue
        for amount in value if name == "rollout_waves" else [value]:
            try:
                if isinstance(amount, bool):
                    raise ValueError("it is neither")
                number = number_of(amount, 100)
                if not number and name in ("rollout_waves", "rollout_max_unavailable"):
                    raise ValueError("it must be more than 0")
            except (TypeError, ValueError) as error:
                wrong.append(f"{name} holds {_shown(amount)}, which is no number of hosts and no percentage: {error}.")
    if isinstance(given.get("rollout_waves"), (list, tuple)) and not given["rollout_waves"]:
        wrong.append("rollout_waves is empty; a rollout has at least one wave.")
    return wrong


def _seconds(given: Mapping[str, Any]) -> list[str]:
    wrong = []
    soak = given.get("rollout_soak", ())
    longest = 0.0
    for seconds in soak if isinstance(soak, (list, tuple)) else ():
        try:
            number = float(seconds)
        except (TypeError, ValueError):
            number = math.nan
        if isinstance(seconds, bool) or not 0 <= number < math.inf:
            wrong.append(f"rollout_soak holds {_shown(seconds)}; these have to be seconds, from 0 on.")
        else:
            longest = max(longest, number)
    try:
        within = int(given.get("rollout_confirm_within", 300))
    except (TypeError, ValueError):
        return wrong
    if within < 2 * longest + 60:
        wrong.append(
            f"rollout_confirm_within is {within} s, which is too short: with a soak of {longest:g} s it has to be "
            f"at least {2 * longest + 60:g} s, or hosts go back while they are still being judged."
        )
    if given.get("rollout_until"):
        try:
            moment(str(given["rollout_until"]), datetime.datetime.now(datetime.timezone.utc))
        except ValueError as error:
            wrong.append(f"rollout_until cannot be read: {error}.")
    return wrong


def _health(given: Mapping[str, Any]) -> list[str]:
    wrong = []
    words = given.get("rollout_health_command", "true")
    if isinstance(words, (list, tuple)):
        right = bool(words) and all(isinstance(word, str) for word in words) and bool(words[0].strip())
    else:
        right = isinstance(words, str) and bool(words.strip())
    if not right:
        wrong.append(
            f"rollout_health_command has to be a command, as one text or as a list of words, not {_shown(words)}; "
            "leave it out where nothing is to judge."
        )
    for name in URLS:
        value = given.get(name, ())
        for url in value if isinstance(value, (list, tuple)) else [value]:
            if "@" in str(url).partition("//")[2].partition("/")[0] and name == "rollout_peers":
                wrong.append("rollout_peers holds a URL with a user or a password, which peers are not asked with.")
            elif not _is_url(str(url)):
                wrong.append(f"{name} has to begin with http:// or https:// and name a host, not {str(url)!r}.")
    mirror = str(given.get("rollout_mirror", "host"))
    if not re.match(r"[^\s/:@]+(:\d{1,5})?\Z", mirror):
        wrong.append(f"rollout_mirror has to be host:port, not {mirror!r}.")
    return wrong


def _is_url(text: str) -> bool:
    if not _is_clean(text) or " " in text:
        return False
    try:
        parts = urllib.parse.urlsplit(text)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


def doubles(places: Mapping[str, str]) -> list[str]:
    """Which names of an inventory lead to one host, one sentence each. ``places`` are the hosts and what each says of
    its place; a host without one is as good as any other.

    Such a host would be judged as its own canary, and taken back under one name while the other is confirmed.
    """
    names: dict[str, list[str]] = {}
    for name, place in places.items():
        names.setdefault(place, []).append(name)
    return [
        f"{', '.join(same[:-1])} and {same[-1]} are one host: they lead to the same repository on the same running "
        "machine. Leave all of these names but one out, in the inventory, in rollout_hosts or with --limit."
        for place, same in names.items()
        if place and len(same) > 1
    ]


def ambiguous(names: Iterable[str], groups: Mapping[str, Sequence[str]]) -> list[str]:
    """Which names of hosts are names of groups with other hosts as well, one sentence each: where both are meant,
    Ansible takes the hosts of the group, which would be changed in a wave that they are not in.
    """
    return [
        f"{name} is a host of the inventory and a group with others, and where a wave names the host Ansible takes the "
        "group. Rename one of them."
        for name in names
        if name in groups and list(groups[name]) != [name]
    ]
