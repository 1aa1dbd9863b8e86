# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# /// script
# dependencies = ["nox>=2026.2", "antsibull-nox>=1.10,<2"]
# ///

"""Checks in the form that contributors of collections know: ``nox``, ``nox --list``, ``nox -e lint``.

``dev/test`` runs the same sessions, in one environment that it has made (``nox --no-venv``), and everything else.
"""

from __future__ import annotations

import glob
import os
import pathlib
import shutil
import sys

import antsibull_nox
import nox

ROOT = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "dev"))

import environment

antsibull_nox.load_antsibull_nox_toml()

# Stands in for the bootstrap script that ansible-test fetches where its server cannot be reached.
GET_PIP = ROOT / "dev" / "get_pip.py"


def install(session: nox.Session) -> None:
    """Have the tools, unless whoever runs this has seen to that."""
    if session.virtualenv.is_sandboxed:
        session.install("-r", "dev/requirements-test.txt")


@nox.session
def mypy(session: nox.Session) -> None:
    """mypy in strict mode on the engine."""
    install(session)
    # From the copy's tree, so that files have the names under which they import each other.
    copy = environment.collection_copy(environment.VENV / "mypy")
    config, cache = ROOT / ".mypy.ini", environment.VENV / "mypy-cache"
    session.chdir(copy.parents[2])
    engine = "ansible_collections/composefs/oci/plugins/module_utils"
    session.run("mypy", "--config-file", str(config), "--cache-dir", str(cache), engine, external=True)


@nox.session
def docs(session: nox.Session) -> None:
    """antsibull-docs: modules, roles and pages are documented well, and their references lead somewhere."""
    install(session)
    references = ["--validate-collection-refs", "all", "--disallow-unknown-collection-refs"]
    session.run("antsibull-docs", "lint-collection-docs", "--plugin-docs", *references, ".", external=True)


@nox.session(name="ansible-lint")
def ansible_lint(session: nox.Session) -> None:
    """ansible-lint with the production profile."""
    install(session)
    session.run("ansible-lint", "--profile", "production", "--offline", "--strict", external=True)


@nox.session
def galaxy(session: nox.Session) -> None:
    """The collection builds, and galaxy-importer takes the archive without a warning."""
    install(session)
    work = environment.VENV / "galaxy"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    copy = environment.collection_copy(work)
    session.run("ansible-galaxy", "collection", "build", "--output-path", str(work), str(copy), external=True)
    session.chdir(work)
    env = {"GALAXY_IMPORTER_CONFIG": str(ROOT / "tests" / "galaxy-importer.cfg")}
    command = ["python", "-m", "galaxy_importer.main", *map(str, work.glob("composefs-oci-*.tar.gz"))]
    told = str(session.run(*command, env=env, external=True, silent=True))
    session.log(told)
    complaints = [line for line in told.splitlines() if line.startswith(("WARNING", "ERROR"))]
    if complaints:
        session.error(f"galaxy-importer is not content: {complaints[0]}")


@nox.session
def changelog(session: nox.Session) -> None:
    """antsibull-changelog lint."""
    install(session)
    session.run("antsibull-changelog", "lint", external=True)


@nox.session
def sanity(session: nox.Session) -> None:
    """ansible-test sanity on a copy of the collection, without a single ignore line, imports and syntax on every Python
    found. Arguments after ``--`` are handed on.
    """
    install(session)
    if glob.glob(str(ROOT / "tests" / "sanity" / "ignore*.txt")):
        session.error("there is a tests/sanity/ignore file; the aim is none")
    copy = environment.collection_copy(environment.VENV / "sanity")
    # ansible-test keeps its caches in the home directory; this one is inside the checkout.
    home = environment.VENV / "home"
    cache = home / ".ansible" / "test" / "cache"
    cache.mkdir(parents=True, exist_ok=True)
    for version in ("24_2", "25_2"):  # of pip, for ansible-core 2.18 and 2.19, and for those that follow
        script = cache / f"get_pip_{version}.py"
        if not script.exists():
            script.write_text(GET_PIP.read_text())
    # Named outright, or ansible-test would find the checkout around the copy, and that git ignores the copy.
    env = {"HOME": str(home), "ANSIBLE_TEST_CONTENT_ROOT": str(copy)}
    env["PIP_CACHE_DIR"] = os.environ.get("PIP_CACHE_DIR") or str(pathlib.Path.home() / ".cache" / "pip")
    env.update(dict.fromkeys(("ANSIBLE_CONFIG", "ANSIBLE_COLLECTIONS_PATH"), None))
    session.chdir(copy)
    command = ["ansible-test", "sanity", "--color", "no", "--requirements", *session.posargs]
    session.run(*command, env=env, external=True)
