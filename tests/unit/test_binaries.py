# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What nobody can read says where it came from, and what pip installs is known by its digest."""

from __future__ import annotations

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
PLACES = ("benchmarks", "dev", "docs", "examples", "extensions", "playbooks", "plugins", "roles", "tests")
BINARY = (".tgz", ".gz", ".tar", ".zst", ".xz", ".bin", ".splitstream", ".img", ".whl", ".zip", ".pyz")
LISTS = ROOT / "roles/skopeo/files/pip"


def test_every_archive_is_in_a_readme_that_names_what_made_it() -> None:
    found = 0
    for path in (one for place in PLACES for one in (ROOT / place).rglob("*") if one.suffix in BINARY):
        if any(part.startswith(".") for part in path.relative_to(ROOT).parts):  # what tools keep for themselves
            continue
        found += 1
        readme = next(
            (above / "README.md" for above in (path.parent, path.parent.parent) if (above / "README.md").exists()), None
        )
        assert readme is not None, f"{path} says nowhere how it was made"
        told = {
            pattern: row
            for row in readme.read_text(encoding="utf-8").splitlines()
            if row.startswith("| `")
            for pattern in re.findall("`([^`]+)`", row.split("|")[1])
        }
        rows = [row for pattern, row in told.items() if path.relative_to(readme.parent).match(pattern)]
        assert rows, f"{readme} does not tell how {path.name} was made"
        makers = re.findall(r"`([\w./]+\.(?:py|sh))`", rows[0].split("|")[2]) + re.findall(
            r"`([\w./]+\.py)`", readme.read_text(encoding="utf-8")
        )
        places = (readme.parent, readme.parent.parent, ROOT)
        assert makers and any((place / makers[0]).exists() for place in places), f"{makers} of {path} are not there"
    assert found > 20


@pytest.mark.parametrize("name", ["zstandard", "jsonschema", "isal"])
def test_what_pip_installs_has_versions_and_digests(name: str) -> None:
    text = (LISTS / f"{name}.txt").read_text(encoding="ascii")
    entries = [entry.strip() for entry in re.split(r"\n(?=[a-z])", text)]
    assert any(entry.startswith(f"{name}==") for entry in entries)
    for entry in entries:
        assert re.match(r"[a-z-]+==[0-9.]+( ;[^\\]*)? \\\n", entry), entry[:80]
        assert re.findall(r"--hash=sha256:[0-9a-f]{64}", entry)
    assert "http" not in text, "an index is chosen by the host, not by us"


def test_the_role_lets_pip_install_nothing_else() -> None:
    tasks = (ROOT / "roles/skopeo/tasks/pip.yml").read_text(encoding="utf-8")
    assert tasks.count("ansible.builtin.pip:") == 1 and "extra_args: --require-hashes" in tasks
