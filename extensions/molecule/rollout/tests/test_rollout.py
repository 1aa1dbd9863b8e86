# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A rollout keeps its promises on real hosts. The tests build on each other, in the order of this file."""

from __future__ import annotations

import collections
import contextlib
import json
import os
import pathlib
import random
import re
import shlex
import signal
import subprocess
import time
from typing import Any

import lab as lab_program
import namespace
import pytest
import scenarios

LONG = bool(os.environ.get("COMPOSEFS_OCI_LONG"))
PATTERN = "hosts" if LONG else "few"
NAMES = [f"rollout-{site}{number:02}" for site in "ab" for number in range(1, 11 if LONG else 4)]
CANARIES = {"rollout-a01", "rollout-b01"}
WITHIN = 64
ROLLOUTS = scenarios.ephemeral() / "rollouts"


def blocks_of_the_guide(kind: str) -> list[str]:
    """The blocks of code of the guide "Rolling out to a fleet"."""
    found, inside = [], False
    for line in (pathlib.Path(__file__).resolve().parents[4] / "docs/docsite/rst/rollout.rst").read_text().splitlines():
        if line.startswith(".. code-block::"):
            inside = line.endswith(kind)
            if inside:
                found.append("")
        elif line and not line.startswith(" "):
            inside = False
        elif inside:
            found[-1] += line[4:] + "\n"
    return found


COMMANDS = [line for block in blocks_of_the_guide("console") for line in block.splitlines() if line]
"""Every command that the guide prints."""

(SETTINGS,) = [block for block in blocks_of_the_guide("yaml") if "# rollout.yml" in block]
tried: set[str] = set()


def as_in_the_guide(playbook: str, tags: str = "", **variables: Any) -> tuple[int, str]:
    """Run the command that the guide prints for this, with its file of variables, and with what is another one here."""
    (line,) = [
        line
        for line in COMMANDS
        if f" composefs.oci.{playbook}" in line and (f"--tags {tags}" in line if tags else "--tags" not in line)
    ]
    tried.add(line)
    file = scenarios.ephemeral() / "rollout.yml"
    file.write_text(SETTINGS)
    words = shlex.split(line)
    assert words[:4] == ["ansible-playbook", "-i", "inventory", f"composefs.oci.{playbook}"], line
    words = [f"@{file}" if word == "@rollout.yml" else word for word in words[4:]]
    words = [f"@{newest_plan()}" if word.startswith("@rollouts/") else word for word in words]
    # Namespace hosts have no service that could be asked or reloaded.
    return run(playbook, *words, rollout_health_url="", rollout_reload=[], **variables)


def newest_plan() -> pathlib.Path:
    return max(ROLLOUTS.glob("*.plan.json"), key=lambda path: path.stat().st_mtime_ns)


def start(playbook: str, *words: str, **variables: Any) -> subprocess.Popen[str]:
    """ansible-playbook on the hosts of this scenario, in a session of its own so that it can be killed as a whole."""
    environment = {**os.environ, "ANSIBLE_CONFIG": str(scenarios.ephemeral() / "ansible.cfg")}
    environment.pop("PYTEST_ADDOPTS", None)
    registry = scenarios.created()["registries"]["plain"]["address"]
    image = variables.pop("image", "app-1")
    given = {
        "rollout_hosts": PATTERN,
        "rollout_canaries": "canaries",
        "rollout_ref": f"docker://{registry}/{image}:latest",
        **variables,
    }
    command = ["ansible-playbook", "-i", os.environ["MOLECULE_INVENTORY_FILE"], f"composefs.oci.{playbook}"]
    log = open(scenarios.ephemeral() / f"{playbook}-{time.time():.0f}.log", "w+")  # noqa: SIM115 - read by run
    process = subprocess.Popen(
        [*command, *words, "-e", json.dumps(given)],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        start_new_session=True,
    )
    process.log = log  # type: ignore[attr-defined]
    return process


def run(playbook: str, *words: str, **variables: Any) -> tuple[int, str]:
    """The exit status and what was told."""
    process = start(playbook, *words, **variables)
    code = process.wait(900)
    process.log.seek(0)  # type: ignore[attr-defined]
    return code, process.log.read()  # type: ignore[attr-defined]


def newest() -> dict[str, Any]:
    """The report that was written last."""
    reports = [path for path in ROLLOUTS.glob("app-*.json") if not path.name.endswith(".plan.json")]
    return dict(json.loads(max(reports, key=lambda path: path.stat().st_mtime_ns).read_text()))


def states() -> dict[str, str]:
    return {row["host"]: row["state"] for row in newest()["hosts"]}


def ssh(name: str, words: str) -> str:
    import ground

    (instance,) = [one for one in scenarios.created()["instances"] if one["instance"] == name]
    return ground.run(*ground.ssh_command(instance["address"], instance["port"], words))


def versions() -> dict[str, str]:
    """What each host really has mounted: the version of the application in it."""
    return {name: ssh(name, "cat /srv/app/opt/app/version 2>/dev/null || echo none").strip() for name in NAMES}


def journals() -> dict[str, Any]:
    """As they lie on the disks of the hosts, whether or not one can log in there."""
    file = "var/lib/composefs-oci/deployments/srv-app.json"
    return {name: json.loads((namespace.directory_of(name) / file).read_text()) for name in NAMES}


def test_every_host_has_the_first_image() -> None:
    assert newest()["result"] == "complete" and set(states()) == set(NAMES)
    assert set(versions().values()) == {"1"}
    assert all(journal["pending"] is None for journal in journals().values())


def test_each_layer_left_the_origin_once_for_a_site() -> None:
    """A plan asks the origin for a manifest and a configuration per host; the layers go to the seeds alone."""
    log = (lab_program.services("rollout") / "plain" / "log").read_text()
    asked = collections.Counter(re.findall(r'"GET /v2/app-1/blobs/(sha256:[0-9a-f]{64}) HTTP', log))
    fetched = [asked[digest] for digest in scenarios.created()["images"]["app-1"]["layers"]]
    assert fetched and min(fetched) >= 1 and max(fetched) <= 2, asked


def test_the_same_command_again_changes_nothing() -> None:
    code, told = as_in_the_guide("rollout")
    assert code == 0 and "could not be pruned" not in told, told[-3000:]
    # In the short form the seeds serve hosts that are not part of the rollout, and are left alone.
    assert ("List what the seed has of the image" in told) is LONG
    assert set(states().values()) == {"current"}
    assert not [line for line in told.splitlines() if re.match(r"rollout-\S+ .*changed=[1-9]", line)], told[-3000:]


def test_a_plan_moves_nothing_and_counts_bytes() -> None:
    code, told = as_in_the_guide("rollout", "plan", image="app-2", rollout_new=True)
    assert code == 0, told[-3000:]
    plan = json.loads(newest_plan().read_text())
    rows = newest_plan().with_suffix(".csv").read_text().splitlines()
    assert rows[0].startswith("host,site,state") and len(rows) == len(NAMES) + 1
    assert plan["rollout_plan"]["totals"]["change"] == len(NAMES) and plan["rollout_plan"]["totals"]["bytes"] > 0
    assert set(versions().values()) == {"1"}


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"rollout_wave": ["10%"]}, "no variable rollout_wave"),
        ({"rollout_waves": ["some"]}, "no number of hosts"),
        ({"rollout_health_url": "localhost/health"}, "http://"),
        ({"rollout_confirm_within": 10}, "too short"),
        ({"rollout_hosts": "nobody", "rollout_canaries": ""}, "matches no host"),
        ({"rollout_name": "n" * 200}, "255 bytes"),
        ({"rollout_name": "other", "rollout_new": True}, "belongs to app (rollout_adopt: true takes it over)"),
        ({"rollout_verity": "required", "rollout_new": True}, "no fs-verity (rollout_verity: disabled does without)"),
        ({"rollout_persistent": True, "rollout_new": True}, "no systemd, so its mount cannot come back at boot"),
        ({"rollout_digest": f"sha256:{'0' * 64}"}, "no host can get"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_anything_moves(variables: dict[str, Any], words: str) -> None:
    before = journals()
    code, told = run("rollout", **variables)
    assert code != 0 and words in " ".join(told.split()), told[-3000:]
    assert journals() == before and "Activate the image" not in told


def test_a_bad_image_reaches_canaries_only_and_they_go_back() -> None:
    code, told = run("rollout", image="app-2", rollout_health_command="false", rollout_health_retries=1)
    assert code == 2, told[-3000:]
    assert {name for name, state in states().items() if state == "reverted"} == CANARIES
    assert {state for name, state in states().items() if name not in CANARIES} == {"staged"}
    assert set(versions().values()) == {"1"} and newest()["result"] == "halted"
    assert all(journal["pending"] is None for journal in journals().values())


def test_an_image_that_closes_sshd_is_noticed_and_the_hosts_open_it_again() -> None:
    """The connection that is open goes on; only a new one tells. Nobody can then log in to take the image back."""
    keys = "/root/.ssh/authorized_keys"
    close = f"if grep -q 2 /srv/app/opt/app/version; then mv {keys} {keys}.away; else mv {keys}.away {keys}; fi"
    code, told = run("rollout", image="app-2", rollout_new=True, rollout_reload=["sh", "-c", close])
    assert code in (2, 4), told[-3000:]
    assert {name for name, state in states().items() if state == "lost"} == CANARIES, told[-3000:]
    assert {state for name, state in states().items() if name not in CANARIES} == {"staged"}
    assert newest()["result"] == "halted"
    wait_until_settled()
    assert set(versions().values()) == {"1"}
    ended = [journals()[name]["history"][-1] for name in CANARIES]
    assert {(event["result"], event["reason"]) for event in ended} == {("reverted", "not confirmed in time")}


def kill(process: subprocess.Popen[str]) -> None:
    """What the death of a controller is: every process of it ends at once, also those with a session of their own."""
    found, ended = [process.pid], set()
    while found:
        pid = found.pop()
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGSTOP)
            found += map(int, pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
            ended.add(pid)
    for pid in ended:
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)
    process.wait()
    # A module that has begun on a host goes on for a moment, and what it began is on trial only then.
    time.sleep(10)


def wait_until_settled() -> None:
    """Until no host has an image on trial any more, which must be so when the window is over."""
    # What takes an image back when the window is over needs some seconds to start, on a busy machine more.
    deadline = time.monotonic() + WITHIN + 40
    while waiting := [name for name, journal in journals().items() if journal["pending"]]:
        assert time.monotonic() < deadline, waiting
        time.sleep(1)


def changing(process: subprocess.Popen[str]) -> None:
    """Wait until the first wave has begun."""
    log, begin = pathlib.Path(process.log.name), time.monotonic()  # type: ignore[attr-defined]
    while "TASK [composefs.oci.rollout : Activate the image]" not in log.read_text():
        assert process.poll() is None and time.monotonic() - begin < 600, log.read_text()[-3000:]
        time.sleep(0.2)


@pytest.fixture(scope="module")
def lengths() -> tuple[float, float]:
    """How many seconds a rollout takes until its waves begin, and how many they take."""
    if not LONG:
        return 0.0, 6.0
    # Both images are on all hosts then, so that what is killed are waves and not pulls.
    assert run("rollout", "--tags", "plan,seed,prefetch", image="app-2", rollout_new=True)[0] == 0
    begin = time.monotonic()
    process = start("rollout", "--tags", "activate", image="app-2", rollout_digest=digest_of("app-2"))
    changing(process)
    begun = time.monotonic()
    while any(one["pending"] or one["current"]["digest"] != digest_of("app-2") for one in journals().values()):
        assert time.monotonic() - begun < 900
        time.sleep(1)
    found = begun - begin, time.monotonic() - begun
    assert process.wait(900) == 0
    note(f"a rollout of {len(NAMES)} hosts: {found[0]:.0f} s until its waves, {found[1]:.0f} s for them")
    return found


def digest_of(image: str) -> str:
    return str(scenarios.created()["images"][image]["digest"])


def note(text: str) -> None:
    """Keep a figure for people, beside the logs."""
    with open(scenarios.ephemeral() / "figures", "a") as file:
        file.write(text + "\n")


@pytest.mark.parametrize("number", range(20 if LONG else 1))
def test_hosts_settle_by_themselves_when_the_controller_dies(number: int, lengths: tuple[float, float]) -> None:
    """Killed at a random moment, most of them within the waves, all hosts are confirmed or back when the window is
    over, and what is mounted is what the journal calls current.
    """
    image = ("app-1", "app-2")[number % 2] if LONG else "app-2"
    chance = random.Random(number)
    if LONG:
        process = start("rollout", "--tags", "activate", image=image, rollout_digest=digest_of(image))
    else:
        process = start("rollout", "--tags", "plan,prefetch,activate", image=image)
    if number % 5 == 4:
        moment = chance.uniform(0, lengths[0])
        time.sleep(moment)
        when = f"{moment:.1f} s after its start"
    else:
        changing(process)
        moment = chance.uniform(0, 0.6 * lengths[1])
        time.sleep(moment)
        when = f"{moment:.1f} s after its waves began"
    over = process.poll() is not None
    if not over:
        kill(process)
    died = time.monotonic()
    at_death = sum(bool(journal["pending"]) for journal in journals().values())
    wait_until_settled()
    settled = time.monotonic() - died
    found, mounted = journals(), versions()
    digests = {digest_of(f"app-{version}"): str(version) for version in (1, 2)}
    has = {name: digests[journal["current"]["digest"]] for name, journal in found.items()}
    assert mounted == has
    note(
        f"{'ended before the kill' if over else 'killed'} {when}: {at_death} on trial then, settled {settled:.0f} s "
        f"later, {sum(version == image[-1] for version in has.values())} of {len(has)} have {image}"
    )


def test_the_same_command_at_once_takes_up_what_a_dead_controller_left_on_trial() -> None:
    """An image that is on trial would go back when its window is over, so such a host is not done."""
    process = start("rollout", "--tags", "plan,prefetch,activate", image="app-2", rollout_health_command="sleep 600")
    begin = time.monotonic()
    while not any(journal["pending"] for journal in journals().values()):
        assert process.poll() is None and time.monotonic() - begin < 600, pathlib.Path(process.log.name).read_text()  # type: ignore[attr-defined]
        time.sleep(0.2)
    kill(process)
    trial = {name for name, journal in journals().items() if journal["pending"]}
    code, told = run("rollout", "--tags", "plan,prefetch,activate", image="app-2")
    assert code == 0, told[-3000:]
    assert newest()["result"] == "complete" and set(versions().values()) == {"2"}
    changed = {name for name, state in states().items() if state == "confirmed"}
    assert trial and trial <= changed and all(f"{name}: app " in told for name in changed), "each change is a line"
    assert [name for name, journal in journals().items() if journal["pending"]] == []


def test_a_host_that_is_away_is_absent_and_does_not_hold_up_the_rest() -> None:
    away = NAMES[-1]
    namespace.end(away)
    try:
        code, told = run("rollout", image="app-1", rollout_max_absent=1, rollout_new=True)
        assert code in (2, 4), told[-3000:]
        assert states()[away] == "absent" and {state for name, state in states().items() if name != away} == {
            "confirmed"
        }
    finally:
        namespace.start(away, "bookworm")
    # Fetched by day and activated in the window, by the plan that was approved.
    code, told = as_in_the_guide("rollout", "seed,prefetch", image="app-1")
    # It came back without its mount, which does not outlive a host here, and has the image all the same.
    assert code == 0 and states()[away] == "drifted", told[-3000:]
    code, told = as_in_the_guide("rollout", "activate", image="app-1")
    assert code == 0 and states()[away] == "confirmed", told[-3000:]
    waves = newest()["waves"]
    assert all(wave["started"] and wave["started"] <= wave["finished"] for wave in waves), waves


def test_rollback_takes_every_host_to_what_it_had() -> None:
    code, told = as_in_the_guide("rollback")
    assert code == 0, told[-3000:]
    assert set(versions().values()) == {"2"}


def test_the_status_is_told_by_the_hosts_alone() -> None:
    code, told = as_in_the_guide("status")
    assert code == 0, told[-3000:]
    rows = json.loads((ROLLOUTS / "status.json").read_text())["hosts"]
    assert {row["host"] for row in rows} == set(NAMES) and {row["name"] for row in rows} == {"app"}
    assert (ROLLOUTS / "status.csv").read_text().count("\n") >= len(NAMES) + 1


def test_hosts_of_a_site_take_the_delta_that_its_seed_made() -> None:
    code, told = run("rollout", "--tags", "plan,seed,prefetch", image="app-3", rollout_new=True, rollout_deltas="auto")
    assert code == 0 and "no delta" not in told, told[-3000:]
    made = newest()
    assert made["result"] == "staged" and made["totals"]["bytes_by_source"].get("delta", 0) > 0, made["totals"]
    seeds = {"rollout-a01", "rollout-b01"}
    fetched = {row["host"]: row["bytes_by_source"] for row in made["hosts"] if row["host"] not in seeds}
    assert all(set(sources) == {"delta"} and sources["delta"] < 50_000 for sources in fetched.values()), fetched


def test_check_mode_foretells_and_changes_nothing() -> None:
    code, told = run("rollout", "--check", image="app-1", rollout_new=True)
    assert code == 0 and "complete" in told, told[-3000:]
    assert f"{len(NAMES)} confirmed" in told, "every host of every wave is foretold"
    assert set(versions().values()) == {"2"}


def test_retire_leaves_nothing_mounted() -> None:
    code, told = run("retire")
    assert code == 0, told[-3000:]
    assert set(versions().values()) == {"none"}
    assert {
        ssh(name, "ls /var/lib/composefs-oci/deployments 2>/dev/null | grep -c 'json$' || true").strip()
        for name in NAMES
    } == {"0"}


def test_every_command_of_the_guide_was_run() -> None:
    assert set(COMMANDS) == tried
