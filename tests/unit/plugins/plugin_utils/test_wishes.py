# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What of the variables of a rollout is refused before anything moves."""

from __future__ import annotations

import datetime
import pathlib
from typing import Any

import pytest
from ansible_collections.composefs.oci.plugins.plugin_utils import wishes

yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")

OLD, NEW = "sha256:" + "a" * 64, "sha256:" + "b" * 64
GOOD_ASKED = {"rollout_ref": "docker://a.example/app:1", "rollout_name": "app", "rollout_path": "/srv/app"}
ROLE = pathlib.Path(__file__).resolve().parents[4] / "roles/rollout"
KNOWN = yaml.safe_load((ROLE / "vars/main.yml").read_text(encoding="utf-8"))["rollout_variables"]


def test_the_variables_that_are_known_are_those_that_are_documented() -> None:
    specs = yaml.safe_load((ROLE / "meta/argument_specs.yml").read_text(encoding="utf-8"))["argument_specs"]["main"]
    assert sorted(KNOWN) == sorted(specs["options"])


def test_what_can_be_meant_is_accepted() -> None:
    assert wishes.complaints(GOOD_ASKED, KNOWN) == []


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"rollout_wave": ["10%"]}, "no variable rollout_wave; the nearest one is rollout_waves"),
        ({"rollout_name": ""}, "rollout_name has to be set"),
        ({"rollout_path": "srv/app"}, "absolute path"),
        ({"rollout_path": "/srv/../etc"}, "absolute path"),
        ({"rollout_waves": ["ten"]}, "'ten', which is no number"),
        ({"rollout_waves": []}, "at least one wave"),
        ({"rollout_waves": ["0%"]}, "more than 0"),
        ({"rollout_waves": ["150%"]}, "no percentage"),
        ({"rollout_soak": [200]}, "at least 460 s"),
        ({"rollout_soak": ["long"]}, "have to be seconds"),
        ({"rollout_digest": "sha256:abc"}, "64 hexadecimal digits"),
        ({"rollout_digest": "sha256:" + "A" * 64}, "64 hexadecimal digits"),
        ({"rollout_name": "n" * 200}, "255 bytes"),
        ({"rollout_name": "n/" * 60}, "255 bytes"),
        ({"rollout_name": f"app@sha256:{'a' * 64}"}, "without digest"),
        ({"rollout_name": "app\n"}, "without digest"),
        ({"rollout_name": "@app"}, "without digest"),
        ({"rollout_path": "/"}, "below /"),
        ({"rollout_path": "/srv/./app"}, "absolute path"),
        ({"rollout_path": "/srv//app"}, "absolute path"),
        ({"rollout_path": "/srv/app/"}, "slash at its end"),
        ({"rollout_path": "/srv/a\nb"}, "absolute path"),
        ({"rollout_waves": "10%"}, "has to be a list, such as ['10%']"),
        ({"rollout_waves": {"a": 1}}, "has to be a list"),
        ({"rollout_waves": [["10%"]]}, "no number of hosts"),
        ({"rollout_waves": [True]}, "no number of hosts"),
        ({"rollout_waves": [0]}, "more than 0"),
        ({"rollout_waves": [-1]}, "less than nothing"),
        ({"rollout_waves": [2.5]}, "no number of hosts"),
        ({"rollout_waves": ["-5%"]}, "no percentage"),
        ({"rollout_waves": ["nan%"]}, "no percentage"),
        ({"rollout_waves": [None]}, "no number of hosts"),
        ({"rollout_max_unavailable": 0}, "more than 0"),
        ({"rollout_max_failed": ["10%"]}, "no number of hosts"),
        ({"rollout_max_absent": "some"}, "no number of hosts"),
        ({"rollout_soak": 10}, "has to be a list, such as [10]"),
        ({"rollout_soak": [-1]}, "from 0 on"),
        ({"rollout_soak": ["nan"]}, "from 0 on"),
        ({"rollout_soak": ["inf"]}, "from 0 on"),
        ({"rollout_soak": [True]}, "from 0 on"),
        ({"rollout_confirm_within": "soon"}, "whole number from 0 on, not 'soon'"),
        ({"rollout_confirm_within": 90.5}, "whole number"),
        ({"rollout_confirm_within": 0}, "too short"),
        ({"rollout_stop_after": 0}, "whole number from 1 on, not 0"),
        ({"rollout_throttle": "0"}, "whole number from 1 on"),
        ({"rollout_keep": -1}, "whole number from 0 on"),
        ({"rollout_health_retries": "none"}, "whole number from 1 on"),
        ({"rollout_pin": "tag"}, "index or manifest, not 'tag'"),
        ({"rollout_verity": "require"}, "required or preferred or disabled"),
        ({"rollout_deltas": "always"}, "none or auto"),
        ({"rollout_persistent": "flase"}, "true or false"),
        ({"rollout_new": "please"}, "true or false"),
        ({"rollout_reload": "systemctl restart app"}, "has to be a list"),
        ({"rollout_reload": ["systemctl", ""]}, "none of them empty"),
        ({"rollout_reload": [{"command": "x"}]}, "a list of words"),
        ({"rollout_health_command": []}, "has to be a command"),
        ({"rollout_health_command": ["", "x"]}, "has to be a command"),
        ({"rollout_health_command": {"cmd": "x"}}, "has to be a command"),
        ({"rollout_health_command": "  "}, "has to be a command"),
        ({"rollout_health_url": "a.example/health"}, "http://"),
        ({"rollout_health_url": "ftp://a.example/health"}, "http://"),
        ({"rollout_health_url": "http://"}, "name a host"),
        ({"rollout_health_url": "http:///health"}, "name a host"),
        ({"rollout_health_url": "http://:80/health"}, "name a host"),
        ({"rollout_health_url": "http://a.example:port/"}, "name a host"),
        ({"rollout_health_url": "http://a.example/a b"}, "name a host"),
        ({"rollout_peers": "http://a.example"}, "has to be a list"),
        ({"rollout_peers": ["a.example"]}, "http://"),
        ({"rollout_hosts": ["one", "two"]}, "has to be a pattern"),
        ({"rollout_canaries": 1}, "has to be a pattern"),
        ({"rollout_peers": ["http://user:s3cret@a.example/"]}, "with a user or a password"),
        ({"rollout_ref": "docker://user:s3cret@a.example/app:1"}, "Credentials do not belong there"),
        ({"rollout_ref": "app"}, "names neither a registry nor a transport"),
        ({"rollout_ref": "docker://a.example/app:"}, "no valid tag"),
        ({"rollout_mirror": "http://seed:5000"}, "has to be host:port"),
        ({"rollout_mirror": "seed:port"}, "has to be host:port"),
        ({"rollout_until": "25:00"}, "cannot be read"),
        ({"rollout_id": "../app"}, "names files"),
        ({"rollout_id": "a/b"}, "names files"),
        ({"rollout_ref": "docker://a.example/app:1\n"}, "no reference"),
        ({"rollout_ref": f"docker://a.example/app@{OLD}", "rollout_digest": NEW}, "leave one of them out"),
        ({"rollout_repository": "images"}, "absolute path on the hosts"),
    ],
)
def test_what_cannot_be_meant_is_refused(changed: dict[str, Any], words: str) -> None:
    wrong = wishes.complaints({**GOOD_ASKED, **changed}, KNOWN)
    assert len(wrong) == 1 and words in wrong[0], wrong
    for noise in ("None", "True", "s3cret", "invalid literal"):
        assert noise not in wrong[0], wrong


def test_each_thing_that_is_wrong_is_told() -> None:
    asked = {**GOOD_ASKED, "rollout_health_url": "a.example/health", "rollout_until": "soon", "rollout_waves": []}
    wrong = wishes.complaints(asked, KNOWN)
    assert len(wrong) == 3 and all(sentence.endswith(".") for sentence in wrong), wrong


def test_what_comes_as_text_from_the_command_line_is_accepted() -> None:
    asked = {
        "rollout_confirm_within": "300",
        "rollout_stop_after": "2",
        "rollout_new": "true",
        "rollout_max_failed": "5%",
    }
    asked |= {"rollout_persistent": False, "rollout_prune": "no", "rollout_until": "04:30", "rollout_soak": ["2.5", 1]}
    assert wishes.complaints({**GOOD_ASKED, **asked}, KNOWN) == []


@pytest.mark.parametrize("name", ["team/app", "app:1.4", "docker://a.example/app:1", "äpp", "a b"])
def test_every_name_that_a_host_can_keep_is_accepted(name: str) -> None:
    assert wishes.complaints({**GOOD_ASKED, "rollout_name": name}, KNOWN) == []


def test_an_empty_variable_is_one_that_is_not_set() -> None:
    empty = {name: "" for name in KNOWN if name not in GOOD_ASKED}
    assert wishes.complaints({**GOOD_ASKED, **empty}, KNOWN) == []


def test_what_is_wrong_with_hosts_is_told_once_with_the_hosts_that_it_is_about() -> None:
    hosts = {
        f"h{number}": {"rollout_mirrors": "a:1", "rollout_before": {}, "rollout_seed": "h0"} for number in range(7)
    }
    hosts["other"] = {"rollout_confirm_within": 10, "rollout_seed": "nobody"}
    wrong = wishes.of_hosts(hosts, KNOWN, ["rollout_before"], hosts)
    assert wrong[0].startswith(
        "There is no variable rollout_mirrors; the nearest one is rollout_mirror (on h0, h1, h2,"
    )
    assert wrong[0].endswith("h4 and 2 more).") and len(wrong) == 3
    assert (
        "too short" in wrong[1] and wrong[2] == "rollout_seed is nobody, which is no host of the inventory (on other)."
    )


def test_one_rollout_has_one_name_and_one_mount_point() -> None:
    one = {"rollout_path": "/srv/app", "rollout_name": "app"}
    hosts = {"h1": dict(one), "h2": {}, "h3": {"rollout_path": ""}, "h4": {"rollout_path": "/opt/app"}}
    assert wishes.of_hosts(hosts, KNOWN, [], hosts, shared=one) == [
        "rollout_path is /opt/app, and /srv/app for the rollout, which has one for all of its hosts (on h4)."
    ]


def test_a_time_of_the_day_is_the_next_one() -> None:
    now = datetime.datetime(2026, 1, 2, 22, 0, tzinfo=datetime.timezone.utc)
    assert wishes.moment("04:30", now) == datetime.datetime(2026, 1, 3, 4, 30, tzinfo=datetime.timezone.utc)
    assert wishes.moment("23:00", now) == datetime.datetime(2026, 1, 2, 23, 0, tzinfo=datetime.timezone.utc)
    assert wishes.moment("2026-01-02T23:00:00Z", now).hour == 23


def test_names_that_are_one_host_are_told_together() -> None:
    assert wishes.doubles({"one": "", "two": "", "three": "a", "four": "b"}) == []
    (told,) = wishes.doubles({"one": "a", "two": "b", "three": "a", "four": "a"})
    assert told.startswith("one, three and four are one host: they lead to the same repository"), told
    assert "--limit" in told


def test_a_host_with_the_name_of_a_group_is_refused_unless_both_are_the_same() -> None:
    groups = {"all": ["web", "one", "two"], "web": ["one", "two"], "one": ["one"], "two": ["one", "two"], "empty": []}
    assert wishes.ambiguous(["one", "three"], groups) == []
    told = wishes.ambiguous(["web", "one", "two", "empty"], groups)
    assert [sentence.partition(" ")[0] for sentence in told] == ["web", "two", "empty"]
    assert "a group with others" in told[0] and "Rename" in told[0]
