# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Which unit tests are near a change: those of the rooms that changed, and of the rooms and modules that import these.

Tests mirror what they test: ``plugins/module_utils/store/objects.py`` has ``tests/unit/plugins/module_utils/store/
test_objects.py``. What stands apart from that is in ELSEWHERE.
"""

from __future__ import annotations

import ast
import pathlib
import subprocess
from collections.abc import Iterable, Iterator

ROOT = pathlib.Path(__file__).resolve().parents[1]
PLUGINS = ROOT / "plugins"
PREFIX = "ansible_collections.composefs.oci.plugins."
# Where a change in a directory or file shows, besides in the tests that mirror it.
ELSEWHERE = {
    "dev/run_engine.py": "tests/unit/test_dev_engine.py",
    "dev/nearby.py": "tests/unit/test_nearby.py",
    "dev/tested.py": "tests/unit/test_tested.py",
    "docs/docsite/rst/errors.rst": "tests/unit/test_layering.py",
    "docs/formats/": "tests/unit/test_formats.py",
    "meta/": "tests/unit/test_layering.py",
    "plugins/": "tests/unit/test_layering.py",
    "roles/": "tests/unit/roles",
    "tests/hosts/broken.py": "tests/unit/test_broken.py",
}


def changed_files(base: str = "main") -> list[str]:
    """Paths of files that differ from where this branch left ``base``, or that git does not know yet."""

    def git(*words: str) -> list[str]:
        done = subprocess.run(["git", *words], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
        return done.stdout.splitlines()

    start = (git("merge-base", base, "HEAD") or ["HEAD"])[0]
    return sorted({*git("diff", "--name-only", start), *git("ls-files", "--others", "--exclude-standard")})


def tests(changed: Iterable[str], root: pathlib.Path = ROOT, importers: bool = True) -> list[str]:
    """The test files, or directories of them, for the paths that changed, and those of their direct ``importers``; all
    paths are relative to ``root``.
    """
    changed = list(changed)
    found = {path for path in changed if path.startswith("tests/unit/") and pathlib.Path(path).name.startswith("test_")}
    for path in changed:
        found.update(test for start, test in ELSEWHERE.items() if path.startswith(start))
    sources = [path for path in changed if path.startswith("plugins/") and path.endswith(".py")]
    if sources:
        known = direct_importers(root) if importers else {}
        for path in sources:
            for near in (path, *known.get(path, ())):
                mirrored = pathlib.PurePath("tests/unit") / pathlib.PurePath(near)
                found.add(str(mirrored.with_name(f"test_{mirrored.name}")))
                found.update(str(test.relative_to(root)) for test in variants(root, mirrored))
    return sorted(path for path in found if (root / path).exists())


def variants(root: pathlib.Path, mirrored: pathlib.PurePath) -> Iterator[pathlib.Path]:
    """Further test files of one room, as in test_imageproxy_skopeo.py."""
    yield from (root / mirrored.parent).glob(f"test_{mirrored.stem}_*.py")


def direct_importers(root: pathlib.Path) -> dict[str, list[str]]:
    """For each file below plugins/ those that import it, anywhere in their text."""
    result: dict[str, list[str]] = {}
    for path in sorted((root / "plugins").rglob("*.py")):
        here = str(path.relative_to(root))
        for name in sorted(set(imported(path, root))):
            result.setdefault(name, []).append(here)
    return result


def imported(path: pathlib.Path, root: pathlib.Path) -> Iterator[str]:
    """The files below plugins/ that the file at ``path`` imports."""
    package = list(path.relative_to(root / "plugins").with_suffix("").parts[:-1])
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom):
            continue
        module = node.module.split(".") if node.module else []
        if node.level:
            base = package[: len(package) - node.level + 1] + module
        elif (node.module or "").startswith(PREFIX):
            base = (node.module or "")[len(PREFIX) :].split(".")
        else:
            continue
        for parts in (base, *([*base, alias.name] for alias in node.names)):
            candidate = (root / "plugins").joinpath(*parts).with_suffix(".py")
            if candidate.is_file():
                yield str(candidate.relative_to(root))
