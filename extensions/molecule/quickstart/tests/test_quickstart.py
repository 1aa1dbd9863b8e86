# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Whoever follows README and quick start word for word gets what they promise."""

from __future__ import annotations

import csv
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys
from typing import Any, NamedTuple

import pytest
from composefs_testinfra import Repository
from scenarios import created, ephemeral, said

testinfra_hosts = ["ansible://hosts"]

PROJECT = pathlib.Path(os.environ["MOLECULE_PROJECT_DIRECTORY"])
# All that is not done as it is written, and why. What lies on the host and in the environment, so that the words need
# not change: converge.yml, and `environment` below.
REPLACED = {
    # There is no Galaxy here; the archive is what would be put there.
    "ansible-galaxy collection install composefs.oci": "ansible-galaxy collection install {archive}",
}
ELSEWHERE = {
    "dev/demo": "the part demo of dev/test",
    "dev/test": "whoever runs this",
}


class Block(NamedTuple):
    """A block of a page: its language, its text, and the file that it is to be saved as ("" for none)."""

    language: str
    text: str
    file: str


def blocks(page: str) -> list[Block]:
    """The blocks of code of a page, Markdown or reStructuredText, in their order."""
    lines = (PROJECT / page).read_text().splitlines()
    found, before = [], ""
    number = 0
    while number < len(lines):
        line = lines[number]
        number += 1
        begin = re.fullmatch(r"```(\w+)|\.\. code-block:: (\w+)", line)
        if not begin:
            before = line or before
            continue
        body = []
        if begin[1]:
            while lines[number] != "```":
                body.append(lines[number])
                number += 1
            number += 1
        else:
            while number < len(lines) and (not lines[number] or lines[number].startswith("    ")):
                body.append(lines[number][4:])
                number += 1
        name = re.search(r"`+([\w-]+\.(?:yml|ini))`+:$", before)
        text = "\n".join(body).strip("\n") + "\n"
        found.append(Block(begin[1] or begin[2], text, name[1] if name else ""))
        before = ""
    return found


def commands(block: Block) -> list[str]:
    """The lines of a block of commands, without the prompt of a shell."""
    return [line.removeprefix("$ ") for line in block.text.splitlines() if line]


def follow(page: str, directory: pathlib.Path, environment: dict[str, str], archive: pathlib.Path) -> str:
    """Save every file and run every command of a page in one shell; what was said."""
    script = ["set -e", "cd " + shlex.quote(str(directory))]
    for block in blocks(page):
        if block.language in ("yaml", "ini") and block.file:
            (directory / f".{block.file}").write_text(block.text)
            script.append(f"mv .{block.file} {block.file}")
        elif block.language == "console":
            for command in commands(block):
                if command not in ELSEWHERE and not any(command.startswith(f"{word} ") for word in ELSEWHERE):
                    script += [f"echo {shlex.quote('$ ' + command)}"]
                    script += [REPLACED.get(command, command).format(archive=archive)]
    done = said(["bash", "-c", "\n".join(script)], timeout=900, env=environment)
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def site() -> tuple[pathlib.Path, dict[str, str], pathlib.Path]:
    """A home for somebody new, the environment of a shell there, and the archive of the collection."""
    base = ephemeral() / "site"
    (base / "home").mkdir(parents=True)
    lab = created()
    host, address = lab["instances"][0], lab["registries"]["plain"]["address"]
    for image, tag in (("app-1", "1.4"), ("app-2", "1.5")):
        copy = ["skopeo", "copy", "--quiet", "--src-tls-verify=false", "--dest-tls-verify=false"]
        subprocess.run([*copy, f"docker://{address}/{image}:latest", f"docker://{address}/app:{tag}"], check=True)
    (base / "ssh").write_text(
        f"Host edge1.example.com\nHostName {host['address']}\nPort {host['port']}\nUser root\n"
        f"IdentityFile {host['identity_file']}\nStrictHostKeyChecking no\nUserKnownHostsFile /dev/null\n"
        "LogLevel ERROR\n"
    )
    # The Python that virtual environments are made from, without the environment that runs these tests.
    real = pathlib.Path(sys.base_prefix) / "bin"
    (base / "bin").mkdir()
    (base / "bin" / "python3").symlink_to(real / f"python{sys.version_info[0]}.{sys.version_info[1]}")
    kept = {name: value for name, value in os.environ.items() if name.startswith(("PIP_", "SSL_", "http", "no_proxy"))}
    environment = {
        **kept,
        "HOME": str(base / "home"),
        "PATH": f"{base / 'bin'}:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin",
        "LC_ALL": "C.UTF-8",
        "PIP_CACHE_DIR": os.environ.get("PIP_CACHE_DIR") or str(pathlib.Path.home() / ".cache" / "pip"),
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "PIP_ROOT_USER_ACTION": "ignore",
        # How the host of the pages is reached; root there has no sudo.
        "ANSIBLE_SSH_COMMON_ARGS": f"-F {base / 'ssh'}",
        "ANSIBLE_BECOME_METHOD": "su",
        "ANSIBLE_NOCOLOR": "1",
    }
    pip = pathlib.Path.home() / ".config/pip/pip.conf"
    if "PIP_CONFIG_FILE" not in environment and pip.exists():
        environment["PIP_CONFIG_FILE"] = str(pip)
    tree = next(pathlib.Path(os.environ["ANSIBLE_COLLECTIONS_PATH"]).glob("ansible_collections/composefs/oci"))
    subprocess.run(["ansible-galaxy", "collection", "build", "--output-path", str(base), str(tree)], check=True)
    (archive,) = base.glob("composefs-oci-*.tar.gz")
    return base, environment, archive


@pytest.fixture(scope="module")
def readme(site: tuple[pathlib.Path, dict[str, str], pathlib.Path]) -> str:
    base, environment, archive = site
    (base / "readme").mkdir()
    return follow("README.md", base / "readme", environment, archive)


def test_the_readme_works_as_it_is_written(readme: str, host: Any, lab: dict[str, Any]) -> None:
    repository = Repository(host, "/sysroot/composefs")
    assert repository.image("app").digest == lab["images"]["app-1"]["digest"] and repository.damage() == []
    assert host.file("/srv/app/opt/app/version").content_string == "1\n"
    assert f"msg: {lab['images']['app-1']['digest']}" in readme.replace('"', "")


@pytest.fixture(scope="module")
def quick(readme: str, site: tuple[pathlib.Path, dict[str, str], pathlib.Path], host: Any) -> str:
    base, environment, archive = site
    # As somebody who begins with this page.
    for words in ("umount /srv/app", "rm -rf /var/lib/composefs-oci", "find /srv/sysroot -mindepth 1 -delete"):
        assert host.run(words).rc == 0
    (base / "quick").mkdir()
    return follow("docs/docsite/rst/quick_start.rst", base / "quick", {**environment, "PIP_NO_INDEX": ""}, archive)


def test_the_quick_start_works_as_it_is_written(quick: str, host: Any, lab: dict[str, Any]) -> None:
    told = quick
    one, two = (lab["images"][name]["digest"] for name in ("app-1", "app-2"))
    assert f"{one} changed=True" in told and f"{two} changed=True" in told
    assert Repository(host, "/sysroot/composefs").image("app").digest == two
    assert host.file("/srv/app/opt/app/version").content_string == "2\n"
    assert host.file("/etc/systemd/system/composefs-oci-srv-app.service").exists
    assert set(Repository(host, "/var/lib/images").tags) == {"app", "docker://registry.example.com/app:1.4"}
    assert "'/srv/app'" in told or '"/srv/app"' in told


def test_the_reports_tell_what_is_there(
    quick: str, site: tuple[pathlib.Path, dict[str, str], pathlib.Path], host: Any, lab: dict[str, Any]
) -> None:
    base, environment, archive = site
    # In the directory and the virtual environment of the quick start.
    path = f"{base / 'home/ansible/bin'}:{environment['PATH']}"
    follow("docs/docsite/rst/reports.rst", base / "quick", {**environment, "PATH": path}, archive)
    (row,) = [row for row in csv.DictReader((base / "quick/images.csv").open()) if "app" in row["names"].split()]
    digest = lab["images"]["app-2"]["digest"]
    assert (row["host"], row["digest"], row["mounted_at"]) == ("edge1.example.com", digest, "/srv/app")
    assert int(row["size"]) > 0 and row["pulled_by"] == "docker://registry.example.com/app:1.5"
    (found,) = json.loads((base / "quick/hosts.json").read_text()).values()
    assert [(mount["path"], mount["digest"]) for mount in found["mounts"]] == [("/srv/app", digest)]
    assert (base / "quick/versions.txt").read_text().splitlines()[1].split()[:2] == ["edge1.example.com", "/srv/app"]
