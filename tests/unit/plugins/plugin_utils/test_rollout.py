# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What a rollout decides: its order, its gate, its report, from values alone."""

from __future__ import annotations

import datetime
import json
import pathlib
from typing import Any

import hypothesis
import pytest
from ansible_collections.composefs.oci.plugins.plugin_utils import rollout, wishes
from hypothesis import strategies as hs

ROOT = pathlib.Path(__file__).resolve().parents[4]
PATH, OLD, NEW = "/srv/app", "sha256:" + "a" * 64, "sha256:" + "b" * 64

NOTHING: dict[str, Any] = {"deployments": []}
BEFORE: dict[str, Any] = {"deployments": [{"path": PATH, "name": "app", "current": {"digest": OLD}, "pending": None}]}
FETCHED = {"changed": True, "digest": NEW, "stats": {"bytes_fetched": 1000}}
CHANGED, SAME = {"changed": True}, {"changed": False}
FAILED, UNREACHABLE = {"failed": True, "msg": "no", "error": "image_not_found"}, {"unreachable": True, "msg": "away"}

HOSTS: dict[str, dict[str, Any]] = {
    "confirmed": {
        "rollout_before": BEFORE,
        "rollout_fetched": FETCHED,
        "rollout_activated": CHANGED,
        "rollout_confirmed": CHANGED,
    },
    "current": {"rollout_before": {"deployments": [{"path": PATH, "current": {"digest": NEW}, "pending": None}]}},
    "reverted": {
        "rollout_before": BEFORE,
        "rollout_fetched": FETCHED,
        "rollout_activated": CHANGED,
        "rollout_reverted": CHANGED,
    },
    "failed": {"rollout_before": BEFORE, "rollout_fetched": FAILED},
    "lost": {
        "rollout_before": BEFORE,
        "rollout_fetched": FETCHED,
        "rollout_activated": CHANGED,
        "rollout_confirmed": UNREACHABLE,
    },
    "absent": {"rollout_before": UNREACHABLE},
    "untouched": {"rollout_before": BEFORE},
    "drifted": {
        "rollout_before": {
            "deployments": [
                {"path": PATH, "name": "app", "current": {"digest": OLD}, "pending": None, "state": "drifted"}
            ]
        }
    },
    "revert_failed": {
        "rollout_before": BEFORE,
        "rollout_fetched": FETCHED,
        "rollout_activated": CHANGED,
        "rollout_reverted": FAILED,
    },
    "staged": {"rollout_before": BEFORE, "rollout_fetched": FETCHED},
}


@pytest.mark.parametrize("state", sorted(HOSTS))
def test_each_state_is_told_from_what_was_registered(state: str) -> None:
    assert rollout.state_of(HOSTS[state], PATH, NEW) == state


def test_a_host_that_was_activated_and_never_heard_of_again_is_lost() -> None:
    assert rollout.state_of({"rollout_before": BEFORE, "rollout_activated": CHANGED}, PATH, NEW) == "lost"


def test_what_an_earlier_run_left_on_trial_is_not_done() -> None:
    """Activating it again changes nothing, and without a confirmation it goes back by itself."""
    left = {"rollout_before": BEFORE, "rollout_activated": {"changed": False, "state": "activated"}}
    done = {"rollout_before": BEFORE, "rollout_activated": {"changed": False, "state": "confirmed"}}
    confirmed = {**left, "rollout_confirmed": {"changed": True, "state": "confirmed"}}
    assert [rollout.state_of(host, PATH, NEW) for host in (left, done, confirmed)] == ["lost", "current", "confirmed"]
    told = [rollout.gate({"one": host}, ["one"], 2)["stop"] for host in (left, done, confirmed)]
    assert told == [True, False, False]


def test_an_activation_that_failed_before_it_changed_anything_is_a_failure_and_no_revert() -> None:
    host = {"rollout_before": BEFORE, "rollout_activated": FAILED, "rollout_reverted": SAME}
    assert rollout.state_of(host, PATH, NEW) == "failed"


def test_a_host_that_keeps_the_image_and_was_left_half_done_stops_the_rollout() -> None:
    """It may still be drained, and a rescued failure alone would end with success."""
    failure = {"failed": True, "error": "health", "msg": "Undrain: The balancer is away."}
    host = {**HOSTS["confirmed"], "rollout_failure": failure}
    assert rollout.state_of(host, PATH, NEW) == "failed"
    row = rollout.host_row("one", host, PATH, NEW, 1)
    assert row["after"] == NEW and row["error"]["message"] == failure["msg"]
    assert rollout.gate({"one": host, "two": HOSTS["staged"]}, ["one"], 2)["stop"]


def test_a_host_whose_current_image_waits_for_confirmation_is_not_current() -> None:
    waiting = {"deployments": [{"path": PATH, "current": {"digest": NEW}, "pending": {"digest": NEW}}]}
    assert rollout.state_of({"rollout_before": waiting}, PATH, NEW) == "untouched"


def test_the_manifest_of_an_index_counts_as_the_index() -> None:
    host = {
        "rollout_before": {"deployments": [{"path": PATH, "current": {"digest": OLD}, "pending": None}]},
        "rollout_planned": {"digest": OLD, "changed": True},
    }
    assert rollout.state_of(host, PATH, NEW) == "current"


# ---- order -----------------------------------------------------------------------------------------------------------


@hypothesis.given(
    number=hs.integers(1, 300),
    canaries=hs.integers(0, 10),
    waves=hs.lists(hs.one_of(hs.integers(1, 50), hs.integers(1, 100).map("{}%".format)), min_size=1, max_size=4),
    most=hs.integers(1, 50),
)
def test_every_host_is_in_one_wave_the_canaries_first_and_none_is_too_large(
    number: int, canaries: int, waves: list[Any], most: int
) -> None:
    hosts = [f"h{n}" for n in range(number)]
    first = hosts[: min(canaries, number)]
    serial = rollout.order(hosts, first, waves, most)
    assert sum(serial) == number and max(serial) <= most and min(serial) >= 1
    numbers = rollout.wave_numbers(hosts, serial)
    assert sorted(numbers) == sorted(hosts) and numbers[hosts[0]] == 1
    # Canaries share no wave with others.
    shared = {numbers[host] for host in (first or hosts[:1])} & {numbers[host] for host in hosts[len(first) or 1 :]}
    assert shared == set()


@pytest.mark.parametrize(("amount", "hosts"), [("10%", 2), ("1%", 1), ("100%", 20), (3, 3), ("7", 7), (0, 0)])
def test_percentages_are_rounded_up(amount: Any, hosts: int) -> None:
    assert wishes.number_of(amount, 20) == hosts


# ---- gate ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@hypothesis.given(data=hs.data(), number=hs.integers(2, 40), max_failed=hs.integers(0, 5))
def test_a_bad_image_never_reaches_more_than_canaries_what_may_fail_and_one_wave(
    data: hs.DataObject, number: int, max_failed: int
) -> None:
    """Whatever the hosts do, in whatever order: the gate is asked before each wave, as the play does it."""
    names = [f"h{n}" for n in range(number)]
    canaries = names[: data.draw(hs.integers(0, 3))]
    serial = rollout.order(names, canaries, data.draw(hs.lists(hs.integers(1, 10), min_size=1, max_size=3)), 10)
    hosts: dict[str, dict[str, Any]] = {name: {} for name in names}
    outcomes = (
        {"rollout_activated": CHANGED, "rollout_confirmed": CHANGED},
        {"rollout_activated": SAME},
        HOSTS["reverted"],
        HOSTS["lost"],
    )
    harmed, position, largest = 0, 0, 0
    for wave, size in enumerate(serial, 1):
        if rollout.gate(hosts, canaries or names[:1], wave, max_failed)["stop"]:
            break
        for name in names[position : position + size]:
            outcome = data.draw(hs.sampled_from(outcomes))
            harmed += outcome in outcomes[2:]
            hosts[name] = dict(outcome)
        position += size
        largest = max(largest, size)
    assert harmed <= max_failed + largest + len(canaries)


def test_a_canary_that_goes_back_stops_the_rollout_whatever_may_fail() -> None:
    hosts = {"one": HOSTS["reverted"], "two": {}}
    answer = rollout.gate(hosts, ["one"], 2, "100%")
    assert answer["stop"] and answer["kind"] == "halted" and "canary one" in answer["why"]


def test_no_wave_follows_canaries_that_nobody_heard_of() -> None:
    assert rollout.gate({"one": {}, "two": {}}, ["one"], 2)["why"] == "no canary has confirmed the image"


def test_canaries_that_have_the_image_already_are_good() -> None:
    assert not rollout.gate({"one": {"rollout_activated": SAME}, "two": {}}, ["one"], 2)["stop"]


def test_it_pauses_after_as_many_waves_as_asked_and_at_the_end_of_the_window() -> None:
    hosts = {"one": HOSTS["confirmed"], "two": {}}
    assert rollout.gate(hosts, ["one"], 2, stop_after=1)["kind"] == "paused"
    now = datetime.datetime(2026, 1, 2, 22, 58, tzinfo=datetime.timezone.utc)
    assert rollout.gate(hosts, ["one"], 2, until="23:00", confirm_within=300, now=now)["kind"] == "paused"
    assert not rollout.gate(hosts, ["one"], 2, until="23:30", confirm_within=300, now=now)["stop"]


# ---- report ----------------------------------------------------------------------------------------------------------

ABOUT = {"id": "app-1", "name": "app", "ref": "docker://a.example/app:1", "digest": NEW, "path": PATH}


def check(made: dict[str, Any]) -> None:
    jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed")
    jsonschema.validate(made, json.loads((ROOT / "roles/rollout/files/report.schema.json").read_text()))


def test_the_report_of_all_states_is_as_its_schema_says() -> None:
    made = rollout.report(HOSTS, ABOUT, {"confirmed": 1, "reverted": 2}, rollout.gate({}, [], 3))
    check(made)
    assert made["result"] == "halted" and made["totals"]["states"] == {state: 1 for state in rollout.STATES}
    assert [wave["confirmed"] for wave in made["waves"]] == [1, 0]
    assert rollout.table({**made, "digest": None})[0].startswith("app: "), "going back: every host has its own"
    lines = rollout.table(made)
    assert lines[0].startswith("app bbbbbbbbbbbb: halted") and lines[2].startswith("revert_failed: revert failed")


@pytest.mark.parametrize(
    ("names", "phase", "halted", "outcome"),
    [
        (["confirmed", "current"], "activate", {}, "complete"),
        (["untouched", "current"], "plan", {}, "planned"),
        (["failed"], "plan", {}, "halted"),
        (["staged"], "prefetch", {}, "staged"),
        (
            ["confirmed", "staged"],
            "activate",
            {"stop": True, "kind": "paused", "why": "w", "wave": 2, "failed": 0, "allowed": 0},
            "paused",
        ),
        (
            ["confirmed", "reverted"],
            "activate",
            {"stop": True, "kind": "paused", "why": "w", "wave": 2, "failed": 1, "allowed": 1},
            "halted",
        ),
        (["confirmed", "absent"], "activate", {}, "halted"),
    ],
)
def test_the_result_says_what_came_of_what_was_asked(
    names: list[str], phase: str, halted: dict[str, Any], outcome: str
) -> None:
    made = rollout.report({name: HOSTS[name] for name in names}, ABOUT, {}, halted, phase)
    check(made)
    assert made["result"] == outcome


def test_a_plan_counts_bytes_and_hosts() -> None:
    hosts = {"a": {"rollout_before": BEFORE, "rollout_planned": FETCHED}, "b": HOSTS["current"], "c": HOSTS["absent"]}
    assert rollout.plan(hosts, PATH, NEW)["totals"] == {
        "hosts": 3,
        "current": 1,
        "change": 1,
        "absent": 1,
        "failed": 0,
        "bytes": 1000,
        "least_free_bytes": None,
        "without_verity": 0,
        "before_versions": {"?": 2},
        "skopeo": {},
    }


def test_a_plan_tells_space_verity_and_versions_for_each_host_and_in_total() -> None:
    hosts = {
        name: {
            "rollout_before": BEFORE,
            "rollout_planned": {**FETCHED, "free_bytes": free, "verity": verity, "skopeo_version": "1.9.3"},
            "rollout_mounted": {"mounts": [{"path": PATH, "version": "1.3"}]},
        }
        for name, free, verity in (("a", 10, True), ("b", 5, False))
    }
    planned = rollout.plan(hosts, PATH, NEW)
    totals = planned["totals"]
    assert (totals["least_free_bytes"], totals["without_verity"]) == (5, 1)
    assert (totals["before_versions"], totals["skopeo"]) == ({"1.3": 2}, {"1.9.3": 2})
    assert rollout.comma_separated(planned["hosts"]).count("\n") == 3


def test_the_report_tells_when_waves_were_and_where_bytes_came_from() -> None:
    layers = [
        {"status": "new", "source": "delta", "bytes_to_fetch": 10},
        {"status": "new", "source": "registry", "bytes_to_fetch": 90},
        {"status": "present", "source": None, "bytes_to_fetch": 0},
    ]
    host = {
        "rollout_before": BEFORE,
        "rollout_fetched": {
            **FETCHED,
            "layers": layers,
            "stats": {"bytes_fetched": 100, "seconds": {"fetch": 1.0, "total": 1.44}},
        },
        "rollout_activated": {**CHANGED, "took": 0.31, "time": "2026-11-27T14:00:00Z"},
        "rollout_confirmed": {**CHANGED, "took": 0.2, "seconds": 5.0, "time": "2026-11-27T14:00:05Z"},
    }
    about = {**ABOUT, "started": "2026-11-27T13:59:00Z", "finished": "2026-11-27T14:01:00Z"}
    made = rollout.report({"a": host}, about, {"a": 1})
    check(made)
    (wave,) = made["waves"]
    assert (wave["started"], wave["finished"]) == ("2026-11-27T14:00:00Z", "2026-11-27T14:00:05Z")
    assert made["totals"]["bytes_by_source"] == {"delta": 10, "registry": 90} and made["totals"]["seconds"] == 120
    assert made["hosts"][0]["seconds"] == {"fetch": 1.4, "activate": 0.3, "trial": 5.0, "confirm": 0.2}


@pytest.mark.parametrize(
    ("variables", "places"),
    [
        ({}, {"origin": 93, "peer": 20, "local": 4}),
        ({"rollout_mirror": "seed:5000"}, {"mirror_or_origin": 93, "peer": 20, "local": 4}),
        (
            {"rollout_mirror": "seed:5000", "rollout_made_deltas": ["docker://a.example/app@sha256:1"]},
            {"mirror_or_origin": 90, "seed": 3, "peer": 20, "local": 4},
        ),
    ],
)
def test_the_report_says_where_bytes_came_from_as_far_as_that_is_known(
    variables: dict[str, Any], places: dict[str, int]
) -> None:
    """Of a host with a mirror nobody tells whether that or the origin answered; only what its seed made is the seed's."""
    ways = {"registry": 90, "delta": 3, "peer": 20, "oci": 4}
    layers = [{"status": "new", "source": way, "bytes_to_fetch": number} for way, number in ways.items()]
    fetched = {**FETCHED, "layers": layers, "stats": {"bytes_fetched": 117}}
    host = {"rollout_before": BEFORE, "rollout_fetched": fetched, **variables}
    made = rollout.report({"a": host, "b": host}, ABOUT, {}, None, "prefetch")
    check(made)
    assert made["hosts"][0]["bytes_by_place"] == places and made["hosts"][0]["mirror"] == variables.get(
        "rollout_mirror"
    )
    assert made["totals"]["bytes_by_place"] == {place: 2 * number for place, number in places.items()}
    assert sum(made["totals"]["bytes_by_place"].values()) == made["totals"]["bytes"]
    assert all(rollout.place_words(place) in rollout.table(made)[1] for place in places)


def test_what_failed_fetched_nothing_that_is_counted() -> None:
    made = rollout.report({"a": {**HOSTS["failed"], "rollout_mirror": "seed:5000"}}, ABOUT, {}, None, "prefetch")
    check(made)
    assert made["totals"]["bytes_by_place"] == {} and "fetched" not in rollout.table(made)[1]
    assert made["hosts"][0]["mirror"] == "seed:5000"


@pytest.mark.parametrize(
    ("number", "words"), [(0, "0 bytes"), (1023, "1023 bytes"), (1024, "1.0 KB"), (3 << 20, "3.0 MB"), (1 << 60, "TB")]
)
def test_sizes_are_told_in_units_that_people_read(number: int, words: str) -> None:
    assert words in rollout.size_words(number)


def _without_digest(choose: str, hosts: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The report of a playbook that asks for no image, from its order on."""
    pytest.importorskip("ansible.errors", reason="ansible-core is not installed for this Python", exc_type=ImportError)
    from ansible_collections.composefs.oci.plugins.filter import rollout as filters

    order = filters.rollout_order(list(hosts), hosts, PATH, "", choose=choose, image="app")
    made = filters.rollout_report(list(hosts), hosts, {**ABOUT, "digest": ""}, order)
    check(made)
    return made


def test_a_host_with_nothing_to_retire_is_as_it_should_be() -> None:
    retired = {"rollout_before": BEFORE, "rollout_activated": {"changed": True, "digest": None}}
    made = _without_digest("there", {"a": {**retired, "rollout_confirmed": CHANGED}, "b": {"rollout_before": NOTHING}})
    assert made["result"] == "complete" and [row["after"] for row in made["hosts"]] == [None, None]
    assert [row["state"] for row in made["hosts"]] == ["confirmed", "current"]
    away = _without_digest("there", {"a": {"rollout_before": UNREACHABLE}, "b": {"rollout_before": NOTHING}})
    assert [row["state"] for row in away["hosts"]] == ["absent", "current"]


def test_going_back_tells_what_hosts_have_then_and_which_had_nothing_to_go_back_to() -> None:
    before = {"deployments": [{**BEFORE["deployments"][0], "previous": [{"digest": NEW}]}]}
    back = {"rollout_before": before, "rollout_activated": {"changed": True, "digest": NEW}}
    made = _without_digest("back", {"a": {**back, "rollout_confirmed": CHANGED}, "b": {"rollout_before": BEFORE}})
    assert [row["state"] for row in made["hosts"]] == ["confirmed", "untouched"] and made["result"] == "halted"
    assert [row["after"] for row in made["hosts"]] == [NEW, OLD]
    assert rollout.table(made)[2:] == ["b: untouched (it has no image to go back to)"]


def test_where_going_back_failed_the_report_says_why_that_failed() -> None:
    host = {**HOSTS["revert_failed"], "rollout_failure": {"failed": True, "error": "health", "msg": "the URL"}}
    host["rollout_reverted"] = {"failed": True, "error": "busy", "msg": "in use"}
    (row,) = rollout.report({"a": host}, ABOUT, {"a": 1})["hosts"]
    assert (row["state"], row["reason"], row["error"]["code"]) == ("revert_failed", "in use", "busy")


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ({"changed": True, "state": "activated", "deadline": "2026-11-27T14:05:00Z"}, "on trial at /srv/app"),
        ({"changed": True, "state": "confirmed", "previous_digest": OLD}, "confirmed at /srv/app (was aaaaaaaaaaaa)"),
        ({"changed": True, "state": "reverted", "reason": "health"}, "bbbbbbbbbbbb is there again: health"),
        ({"changed": True, "state": "absent"}, "nothing is mounted at /srv/app any more"),
        ({"failed": True, "error": "reverted", "msg": "too late"}, "taken back at /srv/app: too late"),
    ],
)
def test_each_change_of_a_host_is_one_line_for_who_watches(found: dict[str, Any], words: str) -> None:
    line = rollout.change({"name": "app", "path": PATH, "digest": NEW, **found})
    assert words in line and "\n" not in line


def test_what_changed_nothing_has_no_line() -> None:
    assert rollout.change({"changed": False, "state": "activated"}) == ""
    assert rollout.change({"failed": True, "error": "busy", "changed": False}) == ""


def test_deltas_are_worth_making_from_what_at_least_two_hosts_have() -> None:
    hosts = {"a": HOSTS["untouched"], "b": HOSTS["staged"], "c": HOSTS["current"]}
    assert rollout.plan(hosts, PATH, NEW)["shared"] == [OLD]
    assert rollout.plan({"a": HOSTS["untouched"], "c": HOSTS["current"]}, PATH, NEW)["shared"] == []


def test_a_seed_keeps_what_its_hosts_have_and_had_and_is_left_alone_if_it_serves_others() -> None:
    third, fourth = "sha256:" + "c" * 64, "sha256:" + "d" * 64
    told = {"current": {"digest": OLD, "index_digest": third}, "previous": [{"digest": fourth, "index_digest": None}]}
    hosts = {"a": {"rollout_before": {"deployments": [told]}}, "b": HOSTS["untouched"], "c": HOSTS["current"]}
    sites = {"a": "s1", "b": "s1", "c": "s2", "x": ""}
    assert rollout.seeds(hosts, sites) == {"s1": sorted({OLD, third, fourth}), "s2": [NEW]}
    assert rollout.seeds(hosts, {**sites, "y": "s2"}) == {"s1": sorted({OLD, third, fourth})}


def test_the_digest_is_the_index_where_that_is_pinned() -> None:
    answer = {"digest": OLD, "registry_digest": OLD, "index_digest": NEW}
    assert [rollout.digest_of(answer, pin) for pin in ("index", "manifest")] == [NEW, OLD]
    assert rollout.digest_of({"digest": OLD, "index_digest": None}, "index") == OLD


def test_the_status_tells_what_hosts_have_and_what_it_costs() -> None:
    info = {
        "free_bytes": 7,
        "names": [{"name": "app", "own": 1, "shared": 2}, {"name": f"app@{OLD}", "own": 3, "shared": 4}],
    }
    hosts = {
        "a": {**HOSTS["drifted"], "rollout_repository_info": info},
        "b": HOSTS["absent"],
        "c": {"rollout_before": {"deployments": []}},
    }
    told = rollout.status(hosts)
    first, second, third = told["hosts"]
    assert (first["state"], first["drift"], first["free_bytes"]) == ("drifted", True, 7)
    assert (first["own_bytes"], first["shared_bytes"]) == (4, 6)
    assert (second["state"], second["error"], third["state"]) == ("absent", "unreachable", "none")
    assert rollout.comma_separated(told["hosts"]).splitlines()[0].startswith("host,site,state,name,path")


@pytest.mark.parametrize(
    ("findings", "error", "words"),
    [
        ({}, None, "ok"),
        ({"object_missing": 2, "bad_link": 1}, None, "1 x bad_link, 2 x object_missing"),
        ({"bad_link": 1}, {"code": "busy", "message": "Busy."}, "busy"),
    ],
)
def test_the_status_tells_how_a_host_looked_after_itself(findings: Any, error: Any, words: str) -> None:
    last = {"version": 1, "time": 9.0, "findings": findings, "error": error}
    hosts = {
        "a": {**HOSTS["drifted"], "rollout_repository_info": {"last_maintenance": last}},
        "b": {"rollout_before": {"deployments": []}, "rollout_repository_info": {"last_maintenance": last}},
        "c": {**HOSTS["drifted"], "rollout_repository_info": {"last_maintenance": None}},
    }
    rows = rollout.status(hosts)["hosts"]
    assert [(row["maintained"], row["maintenance"]) for row in rows] == [(9.0, words), (9.0, words), (None, None)]


def test_a_cell_that_a_spreadsheet_would_compute_is_text() -> None:
    for text in ("=1+1", "+1", "-1+1", "@A1", "\t=1", "\r=1", "\n=1"):
        assert f"'{text}" in rollout.comma_separated([{"host": text}])
        assert f"'{text}" in rollout.comma_separated([{"error": {"code": text}}])
    assert rollout.comma_separated([{"free_bytes": -1}]).splitlines() == ["free_bytes", "-1"]
