# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The engine from a shell: every verb, on a repository that is made and filled here."""

from __future__ import annotations

import importlib.util
import io
import json
import pathlib
import shutil
import sys
from types import ModuleType
from typing import Any

import pytest

from ansible_collections.composefs.oci.plugins.module_utils.progress import BYTES, DONE, SKIPPED, STARTED, Event
from ansible_collections.composefs.oci.tests.support.tarbytes import DIRECTORY, member, tar

ROOT = pathlib.Path(__file__).resolve().parents[2]
A = "sha256:" + "a" * 64
B = "sha256:" + "b" * 64


@pytest.fixture(scope="module")
def engine() -> ModuleType:
    spec = importlib.util.spec_from_file_location("run_engine", ROOT / "dev" / "run_engine.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_every_verb_works_on_a_repository(
    engine: ModuleType, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capfdbinary: Any
) -> None:
    if shutil.which("skopeo") is None:
        pytest.skip("skopeo is not installed")
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "support"))
    from ociimage import Layout

    layout = Layout(tmp_path / "layout")
    layout.image([tar(member("usr/", type=DIRECTORY), member("usr/file", b"x" * 300))], "app")
    repository = str(tmp_path / "repository")

    def run(*words: str, code: int = 0) -> bytes:
        monkeypatch.setattr(sys, "argv", ["dev/engine", "--repository", repository, *words])
        assert engine.main() == code
        sys.stdout.flush()
        written = capfdbinary.readouterr()
        return bytes(written.out if code == 0 else written.err)

    made = json.loads(run("init", "--algorithm", "sha256"))
    assert made == {"created": True, "verity": False, "algorithm": "fsverity-sha256-12"}
    (pulled,) = json.loads(run("pull", f"oci:{layout.path}:app", "app"))
    assert pulled["changed"]
    assert not json.loads(run("pull", "--check", f"oci:{layout.path}:app", "app"))[0]["changed"]
    (image,) = json.loads(run("list"))["images"]
    assert image["names"] == ["app"] and image["digest"] == pulled["digest"]
    assert json.loads(run("inspect", "app"))["manifest"]["digest"] == pulled["digest"]
    assert b"/usr/file 300 " in run("dump", "app")
    (root,) = [root for root in json.loads(run("graph"))["roots"] if root["kind"] == "tag"]
    assert root["name"] == "app" and root["reaches"] >= 3
    assert json.loads(run("check", "full"))["findings"] == []
    assert json.loads(run("prune", "--check"))["objects"] == 0
    assert run("inspect", "nothing", code=1).startswith(b"image_not_found: ")


def test_terminal_draws_a_line_a_layer_in_place(engine: ModuleType) -> None:
    stream = io.StringIO()
    sink = engine.TerminalSink(stream, interval=0)
    sink.event(Event(SKIPPED, A, 10, 10))
    sink.event(Event(STARTED, B, 0, 100))
    sink.event(Event(BYTES, B, 50, 100))
    sink.event(Event(DONE, B, 100, 100))
    last = stream.getvalue().rsplit("\x1b[2F", 1)[1]
    assert "aaaaaaaaaaaa  already present" in last
    assert "bbbbbbbbbbbb  [########################] 100 B of 100 B" in last and "done" in last
