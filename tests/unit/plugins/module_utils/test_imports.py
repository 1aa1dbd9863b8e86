# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A Python that lacks what a Python may lack: no module may end before it can say so."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import pytest
from ansible_collections.composefs.oci.plugins.module_utils import errors

COLLECTION = pathlib.Path(errors.__file__).resolve().parents[2]
# What CPython's own build leaves out where a library is not there, and what an image or an installation lacks.
OPTIONAL = [
    "_ctypes",
    "_hashlib",
    "_bz2",
    "_lzma",
    "_ssl",
    "_uuid",
    "_sqlite3",
    "zstandard",
    "isal",
    "jsonschema",
    "compression",
]

SCRIPT = """
import importlib, json, os, sys
lacking, base, rooms = json.loads(sys.argv[1])
for name in lacking:
    sys.modules[name] = None
for room in rooms:
    importlib.import_module("ansible_collections.composefs.oci.plugins." + room)
from ansible_collections.composefs.oci.plugins.module_utils import errors, module
from ansible_collections.composefs.oci.plugins.module_utils.formats import fsverity
from ansible_collections.composefs.oci.plugins.module_utils.host import mountcalls, processes
from ansible_collections.composefs.oci.plugins.module_utils.store import create

answers = {"child": processes.call("works", lambda: 42)}
with create.create(base + "/r", fsverity.SHA256, create.DISABLED) as repository:
    repository.sync()
    answers["tags"] = repository.tags()
try:
    mountcalls.detach(base)
except errors.EngineError as error:
    answers["mount"] = [error.code, str(error)]
print(json.dumps(answers))
"""


def rooms() -> list[str]:
    plugins = COLLECTION / "plugins"
    found = [*plugins.glob("module_utils/**/*.py"), *plugins.glob("modules/*.py")]
    return sorted(
        ".".join(path.relative_to(plugins).with_suffix("").parts)
        for path in found
        # What runs by itself at boot starts when it is imported.
        if path.stem not in ("__init__", "__main__")
    )


@pytest.mark.slow
@pytest.mark.parametrize("lacking", [*([name] for name in OPTIONAL), OPTIONAL], ids=lambda names: "+".join(names)[:20])
def test_what_a_python_may_lack_fails_only_where_it_is_needed(lacking: list[str], tmp_path: pathlib.Path) -> None:
    link = tmp_path / "path" / "ansible_collections" / "composefs" / "oci"
    link.parent.mkdir(parents=True)
    link.symlink_to(COLLECTION)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path / "path"), *filter(None, sys.path)])}
    script = [sys.executable, "-c", SCRIPT, json.dumps([lacking, str(tmp_path), rooms()])]
    done = subprocess.run(script, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout)
    assert answers["child"] == 42 and answers["tags"] == {}
    if "_ctypes" in lacking:
        assert answers["mount"][0] == "missing_library" and "ansible_python_interpreter" in answers["mount"][1]
