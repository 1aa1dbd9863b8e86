# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What the role rollout does that needs no fleet."""

from __future__ import annotations

import datetime
import json
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pytest
from conftest import PLAYBOOK

if TYPE_CHECKING:  # pytest gives the fixture
    from conftest import Site

JUDGE = """
- name: Judge
  ansible.builtin.include_role:
    name: composefs.oci.rollout
    tasks_from: health
"""


def test_a_command_that_judges_and_never_ends_is_a_verdict(site: Site) -> None:
    begun = time.monotonic()
    done = site.run(JUDGE, rollout_health_command="sleep 300", rollout_health_retries=1, rollout_confirm_within=2)
    assert done.returncode == 2 and "Run the command that judges" in done.stdout, done.stdout + done.stderr
    assert time.monotonic() - begun < 250, "it ended by its own limit"
    fine = site.run(JUDGE, rollout_health_command="true", rollout_confirm_within=60)
    assert fine.returncode == 0, fine.stdout + fine.stderr


OLD, NEW = "sha256:" + "a" * 64, "sha256:" + "b" * 64
STAND_IN = """\
#!/bin/sh
# A host: the module comes by standard input, and its name is near the beginning.
name=$(grep -a -o -m 1 'modules[./]composefs_[a-z_]*' | head -n 1)
cat > /dev/null
echo "${{name##*composefs_}}" >> {place}/asked
case $name in
*_deployment_info) cat {place}/info ;;
*_deployment)
    cp {place}/info-after {place}/info
    cat {place}/deployment
    if [ -e {place}/leaves ]; then mv {place}/leaves {place}/away; fi ;;
*_image) cat {place}/image ;;
*_mount_info) echo '{{"changed": false, "mounts": []}}' ;;
*_image_info) echo '{{"changed": false, "images": []}}' ;;
*) echo '{{"changed": false}}' ;;
esac
"""

CONNECTION = """\
# A connection to a host of this machine that can be out of reach, and that tells when it was closed.
import os

from ansible.errors import AnsibleConnectionFailure
from ansible.plugins.connection.local import DOCUMENTATION as LOCAL
from ansible.plugins.connection.local import Connection as Local

DOCUMENTATION = LOCAL.replace("name: local", "name: stand_in")


class Connection(Local):
    transport = "stand_in"

    def exec_command(self, *arguments, **words):
        with open(os.path.join({site!r}, self._play_context.remote_addr, "sent"), "ab") as file:
            file.write(words.get("in_data") or b"")
        if os.path.exists(os.path.join({site!r}, self._play_context.remote_addr, "away")):
            raise AnsibleConnectionFailure("It does not answer.")
        return super().exec_command(*arguments, **words)

    def reset(self):
        with open(os.path.join({site!r}, self._play_context.remote_addr, "asked"), "a") as file:
            file.write("reset_connection\\n")
"""


class Fleet:
    """Hosts that are stood in for by a shell script: what is tried is what the controller makes of their answers."""

    def __init__(self, site: Site, names: Sequence[str], connection: str = "local") -> None:
        self.site = site
        (site.directory / "connections").mkdir()
        (site.directory / "connections" / "stand_in.py").write_text(CONNECTION.format(site=str(site.directory)))
        self.reports = site.directory / "rollouts"
        lines = []
        for name in names:
            place = site.directory / name
            place.mkdir()
            for file, digest in (("info", OLD), ("info-after", NEW)):
                current = {"digest": digest, "index_digest": None, "image_id": "0" * 64, "ref": None}
                told = {"path": "/srv/app", "name": "app", "state": "current", "current": current, "pending": None}
                self.answer(name, file, deployments=[{**told, "previous": [], "mount": {}, "history": []}])
            image = {"digest": NEW, "registry_digest": NEW, "index_digest": None, "layers": [], "version": "1.4"}
            self.answer(name, "image", changed=True, verity=True, free_bytes=10**10, stats={}, **image)
            self.answer(name, "deployment", changed=True, state="activated", path="/srv/app", digest=NEW, took=0.3)
            script = place / "python"
            script.write_text(STAND_IN.format(place=place))
            script.chmod(0o755)
            lines.append(f"{name} ansible_connection={connection} ansible_python_interpreter={script}")
        (site.directory / "inventory").write_text("[edge]\n" + "\n".join(lines) + "\n")

    def answer(self, name: str, file: str, changed: bool = False, **told: Any) -> None:
        (self.site.directory / name / file).write_text(json.dumps({"changed": changed, **told}) + "\n")

    def asked(self, name: str) -> list[str]:
        """Which modules the host ran, without their prefix."""
        file = self.site.directory / name / "asked"
        return file.read_text().split() if file.exists() else []

    def leaves(self, name: str) -> None:
        """Let a host, which has the connection ``stand_in``, be out of reach once its image was changed."""
        (self.site.directory / name / "leaves").touch()

    def run(self, playbook: str, *words: str, **variables: Any) -> subprocess.CompletedProcess[str]:
        """Run a playbook of the collection, or one of the site."""
        given = {
            "rollout_ref": "docker://registry.example.com/app:1.4",
            "rollout_digest": NEW,
            "rollout_id": "app-one",
            "rollout_name": "app",
            "rollout_path": "/srv/app",
            "rollout_hosts": "edge",
            "rollout_waves": [1],
            "rollout_persistent": False,
            "rollout_soak": [0],
            "rollout_confirm_within": 60,
            "rollout_report_dir": str(self.reports),
            "rollout_become": False,
            **variables,
        }
        program = playbook if playbook.endswith(".yml") else f"composefs.oci.{playbook}"
        return subprocess.run(
            [str(PLAYBOOK), "-i", "inventory", program, "-e", json.dumps(given), *words],
            cwd=self.site.directory,
            env=self.site.environment(ANSIBLE_CONNECTION_PLUGINS=str(self.site.directory / "connections")),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )

    def earlier(self, *names: str) -> None:
        """Give hosts an image that they had before."""
        for name in names:
            told = json.loads((self.site.directory / name / "info").read_text())
            told["deployments"][0]["previous"] = [{"digest": NEW, "index_digest": None}]
            self.answer(name, "info", **told)

    def plan(self) -> dict[str, Any]:
        """The only plan."""
        (file,) = self.reports.glob("app-*.plan.json")
        return dict(json.loads(file.read_text()))

    def report(self) -> dict[str, Any]:
        """The only report that is not a plan."""
        (file,) = [path for path in self.reports.glob("app-*.json") if not path.name.endswith(".plan.json")]
        return dict(json.loads(file.read_text()))

    def states(self) -> dict[str, str]:
        return {row["host"]: row["state"] for row in self.report()["hosts"]}


@pytest.mark.parametrize("limit", ["two", "two,localhost"])
def test_a_limit_changes_its_hosts_and_no_others(site: Site, limit: str) -> None:
    """Plans, waves and reports are put together on localhost, whether or not the limit names it."""
    fleet = Fleet(site, ["one", "two", "three"])
    done = fleet.run("rollout", "--limit", limit, "--diff")
    assert done.returncode == 0 and fleet.states() == {"two": "confirmed"}, done.stdout
    assert fleet.report()["result"] == "complete" and fleet.plan()["rollout_plan"]["totals"]["hosts"] == 1
    assert fleet.asked("one") == fleet.asked("three") == []
    # Everything that is put together was done on the controller and asked of no host.
    assert set(fleet.asked("two")) <= {"deployment_info", "deployment", "image", "image_info", "mount_info", "prune"}


def test_a_limit_holds_for_going_back_and_for_looking_and_for_retiring(site: Site) -> None:
    fleet = Fleet(site, ["one", "two"])
    fleet.earlier("one", "two")
    assert fleet.run("status", "--limit", "two").returncode == 0
    assert [row["host"] for row in json.loads((fleet.reports / "status.json").read_text())["hosts"]] == ["two"]
    for playbook in ("rollback", "retire"):
        done = fleet.run(playbook, "--limit", "two", rollout_digest="", rollout_id=f"app-{playbook}")
        assert done.returncode == 0, done.stdout
        report = json.loads((fleet.reports / f"app-{playbook}.json").read_text())
        assert [(row["host"], row["state"]) for row in report["hosts"]] == [("two", "confirmed")], done.stdout
    assert fleet.asked("one") == []


def test_a_limit_stops_at_its_gate_and_tells_it(site: Site) -> None:
    """Waves under a limit: the first host is the canary, it fails, and the next one is not changed."""
    fleet = Fleet(site, ["one", "two", "three"])
    fleet.answer("two", "deployment", failed=True, error="image_not_found", msg="The image is not there.")
    done = fleet.run("rollout", "--limit", "two,three")
    assert done.returncode == 2 and "the canary two did not keep the image" in " ".join(done.stdout.split()), (
        done.stdout
    )
    # The host that is stood in for refuses to go back, too.
    assert fleet.states() == {"two": "revert_failed", "three": "staged"} and "deployment" not in fleet.asked("three")


def test_a_limit_whose_first_host_is_away_goes_on_with_the_others(site: Site) -> None:
    """The host that stands in for localhost is not asked for anything, so it need not be there."""
    fleet = Fleet(site, ["one", "two", "three"])
    with open(site.directory / "inventory", "a") as inventory:
        inventory.write("away ansible_connection=ssh ansible_host=127.0.0.1 ansible_port=1\n")
    done = fleet.run("rollout", "--limit", "away,two", rollout_hosts="away:edge", rollout_max_absent=1)
    assert fleet.states() == {"away": "absent", "two": "confirmed"} and done.returncode != 0, done.stdout
    assert fleet.asked("one") == fleet.asked("three") == []


@pytest.mark.parametrize("playbook", ["rollout", "rollback", "retire"])
def test_check_mode_goes_through_all_waves_and_ends_well(site: Site, playbook: str) -> None:
    fleet = Fleet(site, ["one", "two", "three"])
    fleet.earlier("one", "two", "three")
    # Hosts are judged, and given time, only where something changed.
    judged = {"rollout_health_command": "false", "rollout_soak": [600], "rollout_confirm_within": 1300}
    done = fleet.run(playbook, "--check", **judged)
    assert done.returncode == 0, done.stdout
    assert "Nothing was changed: this is what check mode foretells." in done.stdout and "3 confirmed" in done.stdout
    assert all("deployment" in fleet.asked(name) for name in ("one", "two", "three"))
    assert not [file for file in fleet.reports.glob("*") if ".plan." not in file.name]


def test_check_mode_needs_a_digest_where_no_host_can_ask_for_it_yet(site: Site) -> None:
    fleet = Fleet(site, ["one"])
    fleet.answer("one", "image", changed=True, digest=None, registry_digest=None, layers=None, stats={})
    (site.directory / "own.yml").write_text(IN_A_PLAY)
    for playbook in ("rollout", "own.yml"):
        done = fleet.run(playbook, "--check", rollout_digest="")
        assert done.returncode == 2 and "Nobody can tell yet what" in done.stdout, done.stdout
        assert "set rollout_digest" in done.stdout and "deployment" not in fleet.asked("one")
    assert fleet.run("rollout", "--check").returncode == 0


@pytest.mark.parametrize("playbook", ["rollout", "rollback", "status", "retire"])
def test_hosts_that_are_none_are_refused(site: Site, playbook: str) -> None:
    fleet = Fleet(site, ["one", "two"])
    for variables, words, told in (
        ({"rollout_hosts": "one"}, ["--limit", "two"], "The pattern one matches no host of the inventory (or --limit"),
        ({"rollout_hosts": "nobody"}, [], "The pattern nobody of rollout_hosts matches no host of the inventory"),
        ({"rollout_canaries": "canary"}, [], "The pattern canary of rollout_canaries matches no host of the inventory"),
    ):
        done = fleet.run(playbook, *words, **variables)
        assert done.returncode == 2 and told in " ".join(done.stdout.split()), done.stdout
    assert fleet.asked("one") == fleet.asked("two") == []


@pytest.mark.parametrize(
    ("variables", "told"),
    [
        ({"rollout_wave": ["10%"]}, "There is no variable rollout_wave; the nearest one is rollout_waves."),
        ({"rollout_waves": ["some"]}, "rollout_waves holds 'some', which is no number of hosts and no percentage"),
        ({"rollout_waves": "10%"}, "rollout_waves has to be a list, such as ['10%']"),
        ({"rollout_health_url": "localhost/health"}, "rollout_health_url has to begin with http:// or https://"),
        ({"rollout_health_command": []}, "rollout_health_command has to be a command"),
        ({"rollout_soak": [10], "rollout_confirm_within": 79}, "with a soak of 10 s it has to be at least 80 s"),
        ({"rollout_name": "n" * 200}, "with the digest it may have 255 bytes"),
        ({"rollout_digest": "sha256:abc"}, "rollout_digest has to be sha256: and 64 hexadecimal digits"),
        ({"rollout_path": "/"}, "rollout_path has to be the absolute path of something below /"),
        ({"rollout_tasks_before": "drain.yml"}, "drain.yml is no file on the controller; give its whole path."),
    ],
)
def test_what_cannot_be_meant_is_refused_before_any_host_is_asked(
    site: Site, variables: dict[str, Any], told: str
) -> None:
    fleet = Fleet(site, ["one"])
    (site.directory / "drain.yml").write_text("[]\n")
    done = fleet.run("rollout", **variables)
    assert done.returncode == 2 and told in " ".join(done.stdout.split()), done.stdout
    assert fleet.asked("one") == [] and not fleet.reports.exists()


def test_what_cannot_be_meant_of_a_group_is_refused_before_anything_moves(site: Site) -> None:
    fleet = Fleet(site, ["one", "two"])
    with open(site.directory / "inventory", "a") as inventory:
        inventory.write("[edge:vars]\nrollout_mirrors=seed:5000\nrollout_seed=nobody\n")
    for playbook in ("rollout", "rollback", "retire"):
        done = fleet.run(playbook)
        told = " ".join(done.stdout.split())
        assert (
            done.returncode == 2 and "no variable rollout_mirrors; the nearest one is rollout_mirror (on one," in told
        )
        assert "rollout_seed is nobody, which is no host of the inventory (on one, two)." in told, done.stdout
    assert set(fleet.asked("one")) <= {"deployment_info"}


@pytest.mark.parametrize("playbook", ["rollout", "rollback", "retire"])
def test_a_mount_point_that_is_not_the_same_on_all_hosts_is_refused(site: Site, playbook: str) -> None:
    fleet = Fleet(site, ["one", "two"])
    done = fleet.run(playbook, rollout_path="/srv/{{ inventory_hostname }}")
    told = " ".join(done.stdout.split())
    assert done.returncode == 2 and told.count("one for all of its hosts (on two)"), done.stdout
    assert set(fleet.asked("one")) <= {"deployment_info"}


@pytest.mark.parametrize("hosts", ["one,two", "one:two", "edge:!three"])
@pytest.mark.parametrize("playbook", ["rollout", "rollback", "status", "retire"])
def test_patterns_may_be_lists_with_commas_and_with_colons(site: Site, playbook: str, hosts: str) -> None:
    fleet = Fleet(site, ["one", "two", "three"])
    fleet.earlier("one", "two")
    done = fleet.run(playbook, "--check", rollout_hosts=hosts, rollout_canaries="two,nobody")
    assert done.returncode == 0, done.stdout
    assert fleet.asked("one") and fleet.asked("two") and fleet.asked("three") == []
    assert "Could not match supplied host pattern, ignoring: two" not in done.stdout


@pytest.mark.parametrize(
    ("place", "image", "told"),
    [
        ({"name": "other"}, {}, "its mount at /srv/app belongs to other (rollout_adopt: true takes it over)"),
        ({}, {"verity": False}, "its repository has no fs-verity (rollout_verity: disabled does without)"),
        (
            {},
            {"failed": True, "error": "image_not_found", "msg": "There is no such manifest."},
            f"no host can get docker://registry.example.com/app:1.4 with the digest {NEW}: There is no such manifest.",
        ),
    ],
)
def test_hosts_that_cannot_take_the_image_are_refused_before_anything_moves(
    site: Site, place: dict[str, Any], image: dict[str, Any], told: str
) -> None:
    fleet = Fleet(site, ["one"])
    info = json.loads((site.directory / "one" / "info").read_text())
    info["deployments"][0].update(place)
    fleet.answer("one", "info", **info)
    fleet.answer("one", "image", **{**json.loads((site.directory / "one" / "image").read_text()), **image})
    done = fleet.run("rollout")
    assert done.returncode == 2 and told in " ".join(done.stdout.split()), done.stdout
    assert set(fleet.asked("one")) <= {"deployment_info", "mount_info", "image"}, "the image in check mode, that is"
    assert fleet.asked("one").count("image") == 1


@pytest.mark.parametrize("words", [["rollout", "--tags", "prefetch,activate"], ["rollback"], ["retire"]])
def test_a_mount_of_another_image_is_left_alone_also_without_a_plan(site: Site, words: list[str]) -> None:
    fleet = Fleet(site, ["one", "two"])
    fleet.earlier("one", "two")
    info = json.loads((site.directory / "two" / "info").read_text())
    info["deployments"][0]["name"] = "other"
    fleet.answer("two", "info", **info)
    done = fleet.run(*words)
    told = "belong to other images than app (rollout_adopt: true takes them over): two (other)."
    assert done.returncode == 2 and told in " ".join(done.stdout.split()), done.stdout
    assert not any("deployment" in fleet.asked(name) for name in ("one", "two"))


def test_a_name_with_a_slash_is_kept_by_hosts_and_no_directory_of_the_controller(site: Site) -> None:
    fleet = Fleet(site, ["one"])
    done = fleet.run("rollout", "--tags", "plan", rollout_name="team/app", rollout_id="", rollout_adopt=True)
    assert done.returncode == 0, done.stdout
    (plan,) = fleet.reports.glob("team-app-*.plan.json")
    assert json.loads(plan.read_text())["rollout_name"] == "team/app"


def test_a_rollout_pauses_where_it_was_asked_to_and_the_same_command_goes_on(site: Site) -> None:
    fleet = Fleet(site, ["one", "two", "three"])
    first = fleet.run("rollout", rollout_stop_after=1)
    assert fleet.report()["result"] == "paused" and "1 waves are done, as asked" in first.stdout, first.stdout
    assert fleet.states() == {"one": "confirmed", "two": "staged", "three": "staged"}
    then = fleet.run("rollout")
    assert then.returncode == 0 and fleet.report()["result"] == "complete", then.stdout
    assert fleet.states() == {"one": "current", "two": "confirmed", "three": "confirmed"}


def test_no_wave_begins_that_the_window_could_not_hold(site: Site) -> None:
    fleet = Fleet(site, ["one", "two"])
    # Far enough that the window is still open when the waves come, and too near for one.
    soon = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(minutes=30)
    done = fleet.run("rollout", rollout_until=soon.isoformat(timespec="seconds"), rollout_confirm_within=3600)
    assert fleet.report()["result"] == "paused" and "the window ends at" in done.stdout, done.stdout
    assert fleet.states() == {"one": "staged", "two": "staged"}
    assert not any("deployment" in fleet.asked(name) for name in ("one", "two"))


def test_a_host_whose_disk_is_full_is_told_and_is_not_changed(site: Site) -> None:
    fleet = Fleet(site, ["one", "two", "three"])
    fleet.answer("two", "image", failed=True, error="no_space", msg="There is no space left for the image.")
    done = fleet.run("rollout", rollout_max_absent=1)
    assert fleet.states()["one"] == fleet.states()["three"] == "confirmed", done.stdout
    (row,) = [row for row in fleet.report()["hosts"] if row["host"] == "two"]
    assert row["error"]["code"] == "no_space" and "deployment" not in fleet.asked("two"), row


def test_a_tag_that_moves_between_plan_and_change_is_told_and_not_followed(site: Site) -> None:
    fleet = Fleet(site, ["one", "two"])
    by_tag = {"rollout_digest": "", "rollout_id": ""}
    assert fleet.run("rollout", "--tags", "plan", **by_tag).returncode == 0
    other = "sha256:" + "c" * 64
    for name in ("one", "two"):
        fleet.answer(name, "image", changed=True, verity=True, layers=[], stats={}, digest=other, registry_digest=other)
    told = " ".join(fleet.run("rollout", "--tags", "prefetch,activate", **by_tag).stdout.split())
    assert f"means {other} now" in told and f"goes on with {NEW}" in told, told
    assert fleet.report()["digest"] == NEW and fleet.states() == {"one": "confirmed", "two": "confirmed"}


def test_the_report_its_page_and_its_table_say_from_where_bytes_came(site: Site) -> None:
    fleet = Fleet(site, ["one", "two"])
    layer = {"digest": OLD, "diff_id": OLD, "size": 5 << 20, "status": "new", "bytes_to_fetch": 5 << 20}
    stats = {"bytes_fetched": 5 << 20}
    for name, source in (("one", "registry"), ("two", "peer")):
        image = {"digest": NEW, "registry_digest": NEW, "layers": [{**layer, "source": source}], "stats": stats}
        fleet.answer(name, "image", changed=True, verity=True, free_bytes=10**10, **image)
    done = fleet.run("rollout", "--tags", "prefetch")
    assert done.returncode == 0, done.stdout
    assert fleet.report()["totals"]["bytes_by_place"] == {"origin": 5 << 20, "peer": 5 << 20}
    assert "fetched 5.0 MB from the origin, 5.0 MB from peers" in " ".join(done.stdout.split()), done.stdout
    (page,) = fleet.reports.glob("app-*.html")
    assert "<dt>From the origin</dt><dd>5.00 MB to 1 hosts</dd>" in page.read_text()


@pytest.mark.parametrize("judges", [{}, {"rollout_health_command": "true"}, {"rollout_health_url": "http://localhost"}])
def test_waves_that_are_lost_as_a_whole_end_neither_the_gate_nor_the_report(site: Site, judges: dict[str, str]) -> None:
    """Ansible would begin the next wave after hosts that cannot be reached, and end the playbook after a lost one."""
    fleet = Fleet(site, ["one", "two"], "stand_in")
    fleet.leaves("one")
    done = fleet.run("rollout", **judges)
    assert done.returncode == 2 and "the canary one did not keep the image" in " ".join(done.stdout.split()), (
        done.stdout
    )
    assert fleet.states() == {"one": "lost", "two": "staged"} and "deployment" not in fleet.asked("two")


def test_hosts_are_told_of_the_deltas_that_their_seed_made(site: Site) -> None:
    fleet = Fleet(site, ["one"], "stand_in")
    made = "docker://seed:5000/app@sha256:" + "d" * 64
    with open(site.directory / "inventory", "a") as inventory:
        inventory.write(f"[edge:vars]\nrollout_seed=seed\n[seeds]\nseed rollout_made_deltas='{json.dumps([made])}'\n")
    for deltas in ("none", "auto"):
        done = fleet.run("rollout", "--tags", "prefetch", rollout_deltas=deltas)
        assert done.returncode == 0 and fleet.asked("one").count("image"), done.stdout
        assert (made.encode() in (site.directory / "one" / "sent").read_bytes()) == (deltas == "auto")


def test_an_image_is_confirmed_over_a_fresh_connection(site: Site) -> None:
    fleet = Fleet(site, ["one"], "stand_in")
    done = fleet.run("rollout")
    assert done.returncode == 0, done.stdout
    asked = fleet.asked("one")
    assert asked[asked.index("deployment") :][:3] == ["deployment", "reset_connection", "deployment"], asked


FAILING = "[{name: Undrain, ansible.builtin.fail: {msg: 'The balancer is away.'}}]\n"


@pytest.mark.parametrize("limit", [[], ["--limit", "edge"]])
def test_tasks_that_fail_after_a_host_went_back_keep_nobody_from_the_report(site: Site, limit: list[str]) -> None:
    fleet = Fleet(site, ["one", "two"])
    (site.directory / "after.yml").write_text(FAILING)
    (site.directory / "judge.yml").write_text(FAILING.replace("Undrain", "Judge"))
    done = fleet.run(
        "rollout",
        *limit,
        rollout_health_tasks=str(site.directory / "judge.yml"),
        rollout_tasks_after=str(site.directory / "after.yml"),
    )
    assert done.returncode == 2 and fleet.states() == {"one": "reverted", "two": "staged"}, done.stdout
    (row,) = [row for row in fleet.report()["hosts"] if row["host"] == "one"]
    assert "Undrain: The balancer is away." in row["error"]["message"], row


def test_tasks_that_fail_after_a_host_was_confirmed_stop_the_rollout_and_are_told(site: Site) -> None:
    """The host keeps the image, but somebody has to undrain it, and no other host may be drained like it."""
    fleet = Fleet(site, ["one", "two"])
    (site.directory / "after.yml").write_text(FAILING)
    done = fleet.run("rollout", rollout_tasks_after=str(site.directory / "after.yml"))
    assert done.returncode == 2 and fleet.states() == {"one": "failed", "two": "staged"}, done.stdout
    (row,) = [row for row in fleet.report()["hosts"] if row["host"] == "one"]
    assert row["after"] == NEW and "Undrain: The balancer is away." in row["error"]["message"], row


@pytest.mark.parametrize("limit", [[], ["--limit", "one"]])
def test_hosts_that_cannot_be_told_of_their_mirror_are_in_the_report(site: Site, limit: list[str]) -> None:
    fleet = Fleet(site, ["one"])
    done = fleet.run("rollout", *limit, rollout_mirror="seed:5000", rollout_site="no word")
    assert done.returncode == 2 and fleet.states() == {"one": "failed"}, done.stdout
    (row,) = fleet.report()["hosts"]
    assert row["error"]["message"].startswith("Check the variables of the mirror: "), row


IN_A_PLAY = """\
- name: Roll out
  hosts: edge
  serial: 1
  gather_facts: false
  roles:
    - role: composefs.oci.rollout
  tasks:
    - name: Go on
      ansible.builtin.debug:
        msg: "{{ inventory_hostname }} goes on with {{ rollout_run }} and {{ rollout_target }}"
"""


def test_the_role_in_a_play_resolves_once_whatever_the_batches(site: Site) -> None:
    """What runs once runs once for each batch, and a tag may move between two of them."""
    fleet = Fleet(site, ["one", "two"])
    other = "sha256:" + "c" * 64
    fleet.answer("two", "image", changed=True, verity=True, layers=[], stats={}, digest=other, registry_digest=other)
    (site.directory / "own.yml").write_text(IN_A_PLAY)
    done = fleet.run("own.yml", rollout_digest="", rollout_id="")
    went = sorted(set(re.findall(r"(one|two) goes on with (\S+) and (sha256:[bc]+)", done.stdout)))
    assert [host for host, _run, _digest in went] == ["one", "two"], done.stdout
    assert {digest for _host, _run, digest in went} == {NEW} and len({run for _host, run, _digest in went}) == 1, went


@pytest.mark.parametrize("moment", ["before", "after"])
def test_the_role_in_a_play_fails_for_a_host_that_is_out_of_reach(site: Site, moment: str) -> None:
    """Else the next batch would begin, for Ansible does not count what was told to be ignored."""
    fleet = Fleet(site, ["one", "two"], "stand_in")
    (site.directory / "own.yml").write_text(IN_A_PLAY)
    if moment == "after":
        fleet.leaves("one")
    else:
        (site.directory / "one" / "away").touch()
    done = fleet.run("own.yml")
    assert done.returncode == 2 and "one did not keep the image" in " ".join(done.stdout.split()), done.stdout
    assert fleet.asked("two") == [] and "goes on" not in done.stdout


def test_the_role_in_a_play_goes_on_with_the_play_where_a_host_has_the_image(site: Site) -> None:
    fleet = Fleet(site, ["one"])
    (site.directory / "own.yml").write_text(IN_A_PLAY)
    fleet.answer("one", "deployment", changed=False, state="confirmed", path="/srv/app", digest=NEW)
    done = fleet.run("own.yml")
    assert done.returncode == 0 and "one goes on with" in done.stdout, done.stdout
    assert fleet.asked("one").count("deployment") == 1


@pytest.mark.parametrize("strategy", ["free", "host_pinned"])
def test_waves_do_not_follow_another_strategy_of_the_configuration(site: Site, strategy: str) -> None:
    """Hosts that run ahead of each other would be judged by a gate that sees others half done."""
    fleet = Fleet(site, ["one", "two", "three"])
    with open(site.directory / "ansible.cfg", "w") as file:
        file.write(f"[defaults]\nstrategy = {strategy}\n")
    done = fleet.run("rollout", rollout_waves=[2])
    assert done.returncode == 0 and set(fleet.states().values()) == {"confirmed"}, done.stdout


def test_two_names_of_one_host_are_refused_before_anything_moves(site: Site) -> None:
    fleet = Fleet(site, ["one", "two", "three"])
    for name, place in (("one", "a1"), ("two", "b2"), ("three", "a1")):
        info = json.loads((site.directory / name / "info").read_text())
        fleet.answer(name, "info", **info, place=place)
    for playbook in ("rollout", "rollback", "retire"):
        done = fleet.run(playbook)
        assert done.returncode == 2 and "one and three are one host: they lead" in " ".join(done.stdout.split()), (
            done.stdout
        )
    assert {module for name in ("one", "two", "three") for module in fleet.asked(name)} == {"deployment_info"}
    done = fleet.run("rollout", "--limit", "one,two")
    assert done.returncode == 0 and fleet.states() == {"one": "confirmed", "two": "confirmed"}, done.stdout


def test_a_host_with_the_name_of_a_group_is_refused_before_anything_moves(site: Site) -> None:
    fleet = Fleet(site, ["one", "two", "three"])
    with open(site.directory / "inventory", "a") as inventory:
        inventory.write("[three]\none\ntwo\n")
    for playbook in ("rollout", "rollback", "retire"):
        done = fleet.run(playbook)
        assert done.returncode == 2 and "three is a host of the inventory and a group" in " ".join(
            done.stdout.split()
        ), done.stdout
    assert {module for name in ("one", "two", "three") for module in fleet.asked(name)} == {"deployment_info"}


def test_names_of_this_machine_are_one_host_where_their_repository_is_one(site: Site) -> None:
    fleet = Fleet(site, ["one", "two"])
    names = "".join(
        f"{name} ansible_connection=local ansible_python_interpreter={sys.executable} rollout_repository={place}\n"
        for name, place in (
            ("one", site.directory / "a"),
            ("two", site.directory / "a"),
            ("three", site.directory / "b"),
        )
    )
    (site.directory / "inventory").write_text(f"[edge]\n{names}")
    done = fleet.run("rollout", "--tags", "plan")
    told = " ".join(done.stdout.split())
    assert done.returncode == 2 and "one and two are one host" in told, done.stdout
    done = fleet.run("rollout", "--tags", "plan", "--limit", "one,three")
    assert "one host" not in done.stdout and "no host can get" in " ".join(done.stdout.split()), done.stdout


@pytest.mark.parametrize("limit", [[], ["--limit", "one,two"]])
def test_a_rollout_whose_hosts_all_fail_before_it_begins_ends_with_a_report(site: Site, limit: list[str]) -> None:
    fleet = Fleet(site, ["one", "two"], "stand_in")
    (site.directory / "one" / "away").touch()
    fleet.answer("two", "info", failed=True, error="io_error", msg="The disk does not answer.")
    for words in ([], ["--tags", "plan"]):
        done = fleet.run("rollout", *limit, *words, rollout_digest="")
        told = " ".join(done.stdout.split())
        assert done.returncode == 2 and "halted before wave 1: none of 2 hosts answers as it should" in told, (
            done.stdout
        )
        assert fleet.states() == {"one": "absent", "two": "failed"} and fleet.report()["result"] == "halted"
        for file in fleet.reports.glob("app-*"):
            file.unlink()
    assert fleet.asked("two") == ["deployment_info", "deployment_info"]


@pytest.mark.parametrize("text", ["- name: [Judge\n", "- name: Judge\n  community.none.such:\n"])
def test_a_file_of_tasks_that_cannot_be_read_is_refused_before_any_host_is_asked(site: Site, text: str) -> None:
    """Ansible ends a playbook there, and no rescue and no report would follow."""
    fleet = Fleet(site, ["one"])
    (site.directory / "judge.yml").write_text(text)
    done = fleet.run("rollout", rollout_health_tasks=str(site.directory / "judge.yml"))
    assert done.returncode not in (0, 2) and str(site.directory / "judge.yml") in done.stdout, done.stdout
    assert fleet.asked("one") == []
