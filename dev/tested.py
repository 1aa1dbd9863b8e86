# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What was tested on what: the record of runs (extensions/molecule/tested.json), and the tables that README and
documentation make of it.

``dev/molecule --record`` adds runs to the record and writes the tables anew; ``python3 dev/tested.py`` only does the
latter. A unit test holds the tables against the record.
"""

from __future__ import annotations

import json
import pathlib
import re
import subprocess
import time
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
RECORD = ROOT / "extensions" / "molecule" / "tested.json"
RELEASES = {"bookworm": "Debian 12", "trixie": "Debian 13", "forky": "Debian 14 (testing)"}
Entry = dict[str, Any]


def load() -> list[Entry]:
    return list(json.loads(RECORD.read_text())) if RECORD.exists() else []


def record(scenario: str, seconds: float, report: Entry, python: pathlib.Path, long: bool) -> None:
    """Add a run that went well, in the place of an earlier one of the same kind."""
    program = "import ansible.release, platform; print(ansible.release.__version__, platform.python_version())"
    ansible, controller = subprocess.run(
        [str(python), "-c", program], stdout=subprocess.PIPE, text=True, check=True
    ).stdout.split()
    hosts = sorted({_host(host) for host in report["hosts"]})
    entry = {"ansible": ansible, "controller": controller, "hosts": hosts, "scenario": scenario, "long": long}
    kept = [one for one in load() if _kind(one) != _kind(entry)]
    entry.update(tests=report["passed"], seconds=round(seconds), date=time.strftime("%Y-%m-%d"))
    entries = sorted(
        [*kept, entry], key=lambda one: (_numbers(one["ansible"]), one["hosts"], one["scenario"], one["long"])
    )
    RECORD.write_text(json.dumps(entries, indent=1) + "\n")
    write_tables()


def _host(host: Entry) -> str:
    kernel = f"Linux {host['kernel'].partition('-')[0].partition('+')[0]}, " if host["kernel"] else ""
    return f"{RELEASES[host['suite']]}: {kernel}Python {host['python']}, skopeo {host['skopeo']}"


def _kind(entry: Entry) -> tuple[Any, ...]:
    """What makes two runs the same: everything but the last parts of version numbers."""
    hosts = [re.sub(r"(\d+\.\d+)[.\d]*", r"\1", host) for host in entry["hosts"]]
    return (_series(entry["ansible"]), _series(entry["controller"]), *hosts, entry["scenario"], entry["long"])


def _series(version: str) -> str:
    return ".".join(version.split(".")[:2])


def _numbers(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", version)]


def rows(entries: list[Entry]) -> list[tuple[str, str, list[Entry]]]:
    """The runs by what they ran on: one row for each pair of a controller and a set of hosts."""
    found: dict[tuple[str, str], list[Entry]] = {}
    for entry in entries:
        found.setdefault((f"{entry['ansible']} on Python {entry['controller']}", "; ".join(entry["hosts"])), []).append(
            entry
        )
    return [(controller, hosts, runs) for (controller, hosts), runs in found.items()]


def readme_table(entries: list[Entry]) -> str:
    """The scenarios that passed, as Markdown; the tests of a scenario that ran in both forms count once."""
    lines = ["| ansible-core | hosts | scenarios that passed | tests |", "|---|---|---|---|"]
    for controller, hosts, runs in rows(entries):
        tests: dict[str, int] = {}
        for run in runs:
            tests[run["scenario"]] = max(run["tests"], tests.get(run["scenario"], 0))
        lines.append(
            f"| {controller} | {hosts} | {', '.join(f'`{name}`' for name in sorted(tests))} | {sum(tests.values())} |"
        )
    return "\n".join(lines)


def times_table(entries: list[Entry]) -> str:
    """How many tests each scenario has and how long it took, as reStructuredText."""
    lines = [
        ".. list-table::",
        "   :header-rows: 1",
        "",
        "   * - ansible-core",
        "     - Hosts",
        "     - Scenarios: tests, seconds",
    ]
    for controller, hosts, runs in rows(entries):
        told = [
            f"``{run['scenario']}``{' (long)' if run['long'] else ''}: {run['tests']}, {run['seconds']}" for run in runs
        ]
        lines += [f"   * - {controller}", f"     - {hosts}", f"     - {'; '.join(told)}"]
    return "\n".join(lines)


# File, the line before the table, the line after it, and what makes the table.
TABLES = (
    (ROOT / "README.md", "<!-- tested: begin -->", "<!-- tested: end -->", readme_table),
    (ROOT / "docs/docsite/rst/molecule.rst", ".. tested: begin", ".. tested: end", times_table),
)


def with_tables() -> dict[pathlib.Path, str]:
    """The files that have tables, with the tables that the record makes."""
    entries, texts = load(), {}
    for path, begin, end, table in TABLES:
        before, found, rest = path.read_text().partition(f"{begin}\n")
        _old, closed, after = rest.partition(f"{end}\n")
        if not found or not closed:
            raise ValueError(f"{path.name} has no place for the table, between {begin!r} and {end!r}")
        texts[path] = f"{before}{begin}\n\n{table(entries)}\n\n{end}\n{after}"
    return texts


def write_tables() -> None:
    for path, text in with_tables().items():
        path.write_text(text)


if __name__ == "__main__":
    write_tables()
