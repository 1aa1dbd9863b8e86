# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""composefs_delta through AnsibleModule, in this process; where deltas are pushed is made up."""

from __future__ import annotations

import json
import pathlib
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ansible.module_utils.basic", exc_type=ImportError)

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "module_utils"))

from fake_source import REGISTRY, Layout, World, pull_all

from ansible_collections.composefs.oci.plugins.module_utils.errors import AuthFailed, RegistryUnreachable, SkopeoMissing
from ansible_collections.composefs.oci.plugins.module_utils.formats import fsverity, ocidocuments
from ansible_collections.composefs.oci.plugins.module_utils.host import processes
from ansible_collections.composefs.oci.plugins.module_utils.pull import deltas, pull
from ansible_collections.composefs.oci.plugins.module_utils.source import push, source
from ansible_collections.composefs.oci.plugins.module_utils.store import create
from ansible_collections.composefs.oci.plugins.modules import composefs_delta
from ansible_collections.composefs.oci.tests.support.moduleargs import arguments
from ansible_collections.composefs.oci.tests.support.tarbytes import member, tar

OLD, NEW = tar(member("a", b"a" * 5000)), tar(member("b", b"a" * 5000))


PUSH = push.push


class Places:
    """Everything that skopeo could write to, as manifests by reference."""

    def __init__(self) -> None:
        self.held: dict[str, bytes] = {}
        self.pushed: list[str] = []
        self.options: list[Any] = []

    def manifest_at(self, options: Any, reference: Any) -> bytes | None:
        return self.held.get(reference.text)

    def push(self, options: Any, layout: Any, dest: Any, size: int) -> None:
        self.options.append(options)
        index = json.loads((pathlib.Path(layout.path) / "index.json").read_text())
        digest = index["manifests"][0]["digest"][7:]
        self.held[dest.text] = (pathlib.Path(layout.path) / "blobs/sha256" / digest).read_bytes()
        self.pushed.append(dest.text)


@pytest.fixture
def places(monkeypatch: pytest.MonkeyPatch) -> Places:
    places = Places()
    monkeypatch.setattr(push, "manifest_at", places.manifest_at)
    monkeypatch.setattr(push, "push", places.push)
    return places


@pytest.fixture
def digests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    layout = Layout(tmp_path / "layout")
    found = {"old": layout.image([OLD], "old"), "new": layout.image([NEW], "new")}
    monkeypatch.setattr(processes, "call", lambda what, function: function())
    create.prepare(str(tmp_path / "repo"), fsverity.SHA256, "disabled")
    World(layout).install(monkeypatch)
    pull_all(tmp_path / "repo", *(pull.Request(f"{REGISTRY}{name}", name) for name in found))
    return found


@pytest.fixture
def run(tmp_path: Path, digests: dict[str, str], places: Places, capsys: pytest.CaptureFixture[str]) -> Any:
    def task(*, check: bool = False, **values: Any) -> dict[str, Any]:
        values = {
            "repository": str(tmp_path / "repo"),
            "source": "old",
            "target": "new",
            "_ansible_remote_tmp": "/tmp",
            "_ansible_check_mode": check,
            **values,
        }
        with arguments(values), pytest.raises(SystemExit):
            composefs_delta.main()
        result: dict[str, Any] = json.loads(capsys.readouterr().out)
        return result

    return task


def test_a_delta_is_made_once_and_lies_beside_the_target(run: Any, places: Places, digests: dict[str, str]) -> None:
    first = run()
    place = f"{REGISTRY}new:{deltas.tag(digests['new'], digests['old'])}"
    assert first["changed"] and places.pushed == [place]
    assert first["ref"] == f"{REGISTRY}new@{first['digest']}"
    assert first["bytes"] == first["layers"][0]["bytes"] < 1000
    again = run()
    assert not again["changed"] and places.pushed == [place]
    for key in ("ref", "digest", "bytes", "layers"):
        assert again[key] == first[key]


def test_check_mode_looks_and_makes_nothing(run: Any, places: Places) -> None:
    told = run(check=True)
    assert told["changed"] and told["digest"] is None and told["bytes"] is None and places.pushed == []
    assert [layer["bytes"] for layer in told["layers"]] == [None]
    done = run()
    assert [layer["diff_id"] for layer in done["layers"]] == [layer["diff_id"] for layer in told["layers"]]
    assert not run(check=True)["changed"]


@pytest.mark.parametrize("digest", ["sha256:" + "5" * 64, None], ids=["known", "unknown"])
@pytest.mark.parametrize("place", ["repo", "nowhere"])
def test_check_mode_foretells_a_delta_of_images_that_are_still_to_come(
    run: Any, places: Places, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, digest: str | None
) -> None:
    repository = str(tmp_path / place)
    told = [
        {"repository": repository, "name": name, "digest": digest, "absent": False, "streams": None}
        for name in ("old", "newer")
    ]
    monkeypatch.setenv("COMPOSEFS_OCI_FORETOLD", json.dumps(told))
    nothing = dict.fromkeys(("digest", "bytes", "layers"))
    for names in ({}, {"source": "newer", "target": "old"}, {"target": "newer"}):
        found = run(check=True, repository=repository, dest="docker://registry.test/elsewhere:tag", **names)
        if place == "nowhere" and not names:
            assert found["error"] == "image_not_found"  # nobody foretold the target
            continue
        assert found["changed"] and {key: found[key] for key in nothing} == nothing
        assert found["ref"] == "docker://registry.test/elsewhere:tag"
    assert run(check=True, repository=repository, target="newer")["ref"] is None
    found = run(check=True, repository=repository, target="sha256:" + "6" * 64, source="old")
    assert found.get("ref") is None and places.pushed == []
    assert found["error"] == "image_not_found" if digest else found["changed"]


def test_check_mode_foretells_a_delta_before_there_is_skopeo(
    run: Any, monkeypatch: pytest.MonkeyPatch, hide_zstd: Any
) -> None:
    def missing(options: Any, reference: Any) -> None:
        raise SkopeoMissing("There is no 'skopeo' on this host.", "Install it.")

    monkeypatch.setattr(push, "manifest_at", missing)
    told = run(check=True)
    assert told["changed"] and told["digest"] is None and told["bytes"] is None and len(told["layers"]) == 1
    assert "There is no 'skopeo'" in str(told["warnings"])
    assert run()["error"] == "skopeo_missing"
    hide_zstd()
    told = run(check=True)
    assert told["changed"] and [told[key] for key in ("ref", "digest", "bytes", "layers")] == [None] * 4
    assert "zstd" in str(told["warnings"])
    assert run()["error"] == "missing_library"
    monkeypatch.setenv("COMPOSEFS_OCI_ASKS", "1")
    assert run(check=True)["error"] == "missing_library"


def test_what_lies_there_counts_only_with_this_source_and_target(
    run: Any, places: Places, digests: dict[str, str]
) -> None:
    dest = "docker://registry.test/elsewhere:tag"
    assert run(dest=dest, source=digests["new"], target=digests["old"])["changed"]
    assert run(dest=dest)["changed"] and not run(dest=dest)["changed"]
    places.held[dest] = b"{}"
    assert run(dest=dest)["changed"]


def test_another_level_makes_no_change(run: Any) -> None:
    run(level=3)
    assert not run(level=19)["changed"]


def test_auto_needs_a_reference_in_a_registry(run: Any, tmp_path: Path) -> None:
    for record in (tmp_path / "repo/.composefs-oci/names").iterdir():
        record.unlink()
    result = run()
    assert result["failed"] and result["error"] == "invalid_reference" and "dest" in result["msg"]


@pytest.mark.parametrize(
    "values, code",
    [
        ({"level": 0}, "invalid_option"),
        ({"timeout": 0}, "invalid_option"),
        ({"retries": -1}, "invalid_option"),
        ({"source": "new"}, "invalid_option"),
        ({"source": "nothing"}, "image_not_found"),
        ({"dest": "https://registry.test/x"}, "invalid_reference"),
        ({"dest": "docker://registry.test/x@sha256:" + "5" * 64}, "invalid_option"),
        ({"dest": "composefs:/srv/repository#delta"}, "invalid_option"),
        ({"dest": "docker-archive:/srv/delta.tar:x"}, "invalid_option"),
        ({"dest": "docker-daemon:delta:x"}, "invalid_option"),
        ({"dest": "containers-storage:localhost/delta"}, "invalid_option"),
    ],
)
@pytest.mark.parametrize("check", [False, True])
def test_what_cannot_be_is_refused(run: Any, places: Places, values: dict[str, Any], code: str, check: bool) -> None:
    result = run(check=check, **values)
    assert result["failed"] and result["error"] == code and places.pushed == []


@pytest.mark.parametrize("check", [False, True])
@pytest.mark.parametrize(
    "dest", ["docker://registry.test/app:1.5", "oci:/srv/layout:app", "oci-archive:/srv/app.tar", "dir:/srv/app"]
)
def test_no_image_gives_way_to_a_delta(run: Any, places: Places, dest: str, check: bool) -> None:
    descriptor = {"mediaType": ocidocuments.OCI_CONFIG, "digest": "sha256:" + "1" * 64, "size": 2}
    image = {"schemaVersion": 2, "mediaType": ocidocuments.OCI_MANIFEST, "config": descriptor, "layers": []}
    index = {"schemaVersion": 2, "mediaType": ocidocuments.OCI_INDEX, "manifests": []}
    for document in (image, index):
        places.held[dest] = json.dumps(document).encode()
        result = run(check=check, dest=dest)
        assert result["error"] == "invalid_option" and "another tag" in result["msg"] and places.pushed == []


@pytest.mark.parametrize("check", [False, True])
def test_an_archive_of_something_else_is_not_written_anew(
    run: Any, places: Places, tmp_path: Path, check: bool
) -> None:
    archive = tmp_path / "app.tar"
    assert run(check=check, dest=f"oci-archive:{archive}:update")["changed"]
    places.held.clear()
    places.pushed.clear()
    archive.write_bytes(b"an archive of app")
    result = run(check=check, dest=f"oci-archive:{archive}:update")
    assert result["error"] == "invalid_option" and "another file" in result["msg"] and places.pushed == []


def test_a_registry_that_refuses_is_told(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_arguments: Any) -> None:
        raise AuthFailed("Pushing: skopeo says: denied.", "Log in.")

    monkeypatch.setattr(push, "push", refuse)
    assert run()["error"] == "auth_failed"


@pytest.mark.parametrize("retries, tried", [(0, 1), (2, 2)])
def test_a_passing_fault_of_the_registry_is_met_by_pushing_again(
    run: Any, places: Places, monkeypatch: pytest.MonkeyPatch, retries: int, tried: int
) -> None:
    waited: list[int] = []
    monkeypatch.setattr(source, "pause", lambda attempt, _error, _progress: waited.append(attempt))
    real, tries = places.push, []

    def once_out_of_reach(*arguments: Any) -> None:
        tries.append(1)
        if len(tries) == 1:
            raise RegistryUnreachable("Pushing: skopeo says: connection refused.")
        real(*arguments)

    monkeypatch.setattr(push, "push", once_out_of_reach)
    result = run(retries=retries)
    assert len(tries) == tried and len(waited) == tried - 1
    assert result.get("error") == (None if retries else "registry_unreachable")
    if not retries:
        assert result["ref"].startswith(REGISTRY) and result["attempts"] == 1 and result["seconds"] >= 0


@pytest.mark.slow
@pytest.mark.parametrize("end", ["kill -9 $$", "exec sleep 60", "echo no space left on device >&2; exit 1"])
def test_nothing_stays_of_a_push_whose_skopeo_dies(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    place, seen = tmp_path / "temporary", tmp_path / "seen"
    place.mkdir()
    skopeo = tmp_path / "skopeo"
    skopeo.write_text(f'#!/bin/sh\necho half > "$TMPDIR/oci-half" && echo "$TMPDIR" > {seen}\n{end}\n')
    skopeo.chmod(0o755)
    monkeypatch.setenv("TMPDIR", str(place))
    monkeypatch.setattr(push, "push", PUSH)
    result = run(executable=str(skopeo), timeout=3, retries=0, dest=f"oci-archive:{tmp_path}/delta.tar")
    assert result["failed"] and result["error"] in ("proxy_failed", "stalled", "no_space"), result["msg"]
    assert list(place.iterdir()) == []
    if "sleep" not in end or seen.exists():  # a machine may be too slow for it to begin in time
        assert Path(seen.read_text().strip()).parent == place


def test_credentials_reach_skopeo_and_nothing_else(run: Any, places: Places) -> None:
    result = run(username="writer", password="se:cret w0rd")
    assert places.options[0].username == "writer" and places.options[0].password == "se:cret w0rd"
    del result["invocation"]
    assert "se:cret" not in json.dumps(result)


def test_credentials_in_a_reference_stand_nowhere(capsys: pytest.CaptureFixture[str]) -> None:
    values = {"source": "a", "target": "b", "dest": "docker://somebody:hunter2@h.example/x", "repository": "/nowhere"}
    with arguments({**values, "_ansible_remote_tmp": "/tmp"}), pytest.raises(SystemExit):
        composefs_delta.main()
    output = capsys.readouterr().out
    assert "hunter2" not in output and '"failed": true' in output
