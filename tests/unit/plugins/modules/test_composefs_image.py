# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""composefs_image through AnsibleModule, in this process, with a source that is made up."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ansible.module_utils.basic", exc_type=ImportError)

import yaml
from ansible.module_utils import basic

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "module_utils"))

from fake_source import REGISTRY, Layout, World
from ociimage import sha256

from ansible_collections.composefs.oci.plugins.doc_fragments import registry as registry_fragment
from ansible_collections.composefs.oci.plugins.doc_fragments import repository as repository_fragment
from ansible_collections.composefs.oci.plugins.module_utils.formats import fsverity, ocischemas
from ansible_collections.composefs.oci.plugins.module_utils.host import processes
from ansible_collections.composefs.oci.plugins.module_utils.pull import pull
from ansible_collections.composefs.oci.plugins.module_utils.pull.results import ImageResult
from ansible_collections.composefs.oci.plugins.module_utils.store import create, namerecords
from ansible_collections.composefs.oci.plugins.module_utils.store.repository import Repository
from ansible_collections.composefs.oci.plugins.module_utils.errors import (
    AuthFailed,
    RegistryUnreachable,
    SkopeoMissing,
    SkopeoTooOld,
)
from ansible_collections.composefs.oci.plugins.modules import composefs_image
from ansible_collections.composefs.oci.tests.support.moduleargs import arguments
from ansible_collections.composefs.oci.tests.support.tarbytes import DIRECTORY, member, tar

PASSWORD = "se:cret w0rd"
FIRST = tar(member("usr/", type=DIRECTORY), member("usr/one", b"1" * 300))
SECOND = tar(member("usr/two", b"2" * 300))
IMAGE = set(ImageResult().values()) | {"repository"}
FAILURE = {"changed", "repository", "msg", "error", "failed", "attempts", "seconds"}
PLACE = {"verity", "free_bytes"}
SHAPE = IMAGE | PLACE | {"changed"}


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    layout = Layout(tmp_path / "layout")
    layout.image([FIRST, SECOND], "app")
    layout.image([FIRST], "base")
    monkeypatch.setattr(processes, "call", lambda what, function: function())
    return World(layout).install(monkeypatch)


@pytest.fixture
def repository(tmp_path: Path) -> str:
    create.prepare(str(tmp_path / "repo"), fsverity.SHA256, "disabled")
    return str(tmp_path / "repo")


@pytest.fixture
def run(world: World, repository: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    logged: list[str] = []
    warned: list[str] = []
    monkeypatch.setattr(basic.AnsibleModule, "log", lambda module, message, log_args=None: logged.append(message))
    # Every ansible-core returns them in a way of its own.
    monkeypatch.setattr(basic.AnsibleModule, "warn", lambda module, warning, **others: warned.append(warning))

    def task(*, check: bool = False, diff: bool = False, shape: bool = True, **values: Any) -> dict[str, Any]:
        values = {
            "repository": repository,
            "_ansible_remote_tmp": "/tmp",
            "_ansible_check_mode": check,
            "_ansible_diff": diff,
            **values,
        }
        with arguments(values), pytest.raises(SystemExit):
            composefs_image.main()
        output = capsys.readouterr().out
        assert PASSWORD not in output.replace(json.dumps({"password": PASSWORD})[1:-1], "") and PASSWORD not in "".join(
            logged
        )
        result: dict[str, Any] = json.loads(output)
        result["warnings"] = list(warned)
        warned.clear()
        if shape:
            told = set(result) - {"invocation", "diff", "warnings", "deprecations"}
            several = "images" in values
            if result.get("failed"):
                facts = {"images"} if several else {"name", "ref", "previous_digest"}
                assert FAILURE - {"repository"} <= told <= FAILURE | facts
                assert None not in result.values()
            else:
                extra = PLACE | {"images", "changed", "repository", "skopeo_version", "protocol_version"}
                assert told == (extra if several else SHAPE)
                for image in result.get("images", []):
                    assert set(image) == IMAGE
        return result

    return task


# --- what is returned
# --------------------------------------------------------------------------------------------------------------------


def test_an_image_is_pulled_once(run: Any, repository: str) -> None:
    first = run(ref=REGISTRY + "app", name="x")
    assert (
        first["changed"]
        and first["name"] == "x"
        and first["ref"] == REGISTRY + "app"
        and first["repository"] == repository
    )
    assert (
        first["previous_digest"] is None
        and first["image_id"]
        and first["skopeo_version"] == "1.2.3"
        and first["protocol_version"] == "0.2.3"
    )
    assert [layer["status"] for layer in first["layers"]] == ["new", "new"]
    second = run(ref=REGISTRY + "app", name="x")
    assert (
        not second["changed"]
        and second["streams"] == []
        and second["previous_digest"] == second["digest"] == first["digest"]
    )
    assert "diff" not in second


def test_the_name_is_the_reference_with_its_transport_unless_given(run: Any, repository: str) -> None:
    bare = REGISTRY[len("docker://") :] + "app"
    assert run(ref=bare)["name"] == REGISTRY + "app"
    for form in (bare, REGISTRY + "app", "registry:" + bare):
        assert not run(ref=form)["changed"]
    assert run(ref=bare, state="absent")["changed"] and not run(ref=REGISTRY + "app", state="absent")["changed"]
    # Given as a name, too, either form finds it.
    run(ref=bare)
    assert run(name=bare, state="absent")["changed"] and not run(name=REGISTRY + "app", state="absent")["changed"]
    run(ref=bare, name=bare)
    moved = run(ref=REGISTRY + "app")
    assert moved["changed"] and moved["name"] == REGISTRY + "app" and "is now" in moved["warnings"][0]
    assert moved["diff"]["before"]["name"] == bare and moved["diff"]["after"]["name"] == REGISTRY + "app"


def test_the_name_is_the_reference_unless_given(run: Any) -> None:
    assert run(ref=REGISTRY + "app")["name"] == REGISTRY + "app"
    assert not run(ref=REGISTRY + "app")["changed"]
    assert run(ref=REGISTRY + "app", state="absent")["changed"]


def test_the_shape_is_the_same_in_every_case(run: Any, world: World) -> None:
    """run() compares it each time."""
    run(ref=REGISTRY + "app", check=True)
    run(ref=REGISTRY + "nowhere")
    run(ref="docker:malformed")
    run(ref=REGISTRY + "app", timeout=0)
    run(ref=REGISTRY + "app", repository="/nonexistent")
    run(name="app")
    run(name="app", state="absent")
    run(name="app", state="absent", check=True)
    run(images=[{"ref": REGISTRY + "app"}, {"ref": REGISTRY + "base", "name": "b"}], check=True)
    run(images=[{"ref": REGISTRY + "app"}, {"ref": REGISTRY + "nowhere"}])
    run(images=[{"ref": REGISTRY + "app"}, {"ref": REGISTRY + "base", "name": "b"}])
    run(images=[{"name": "b"}], state="absent")
    run(images=[])
    run(ref=REGISTRY + "app", pull="missing")


def test_a_failure_tells_facts_only(run: Any, world: World, repository: str) -> None:
    first = run(ref=REGISTRY + "app", name="x")
    world.opening = [RegistryUnreachable("connection refused.", "Check the network.")] * 9
    failed = run(ref=REGISTRY + "app", name="x", retries=2)
    facts = {key: failed[key] for key in ("name", "ref", "repository", "previous_digest", "error", "attempts")}
    assert facts == {
        "name": "x",
        "ref": REGISTRY + "app",
        "repository": repository,
        "previous_digest": first["digest"],
        "error": "registry_unreachable",
        "attempts": 3,
    }
    assert failed["seconds"] > 0 and "It was tried 3 times in 0 s." in failed["msg"]
    new = run(images=[{"ref": REGISTRY + "app", "name": "x"}, {"ref": REGISTRY + "base", "name": "y"}], retries=0)
    assert new["images"] == [
        {"name": "x", "ref": REGISTRY + "app", "previous_digest": first["digest"]},
        {"name": "y", "ref": REGISTRY + "base"},
    ]


def test_what_check_mode_cannot_know_is_null(run: Any, world: World) -> None:
    world.starting = [SkopeoMissing("There is no skopeo.", "Install it.")] * 2
    foretold = run(ref=REGISTRY + "app", name="x", check=True)
    assert foretold["changed"] and foretold["name"] == "x"
    assert [foretold[key] for key in ("digest", "kind", "platform", "labels", "layers", "streams")] == [None] * 6
    figures = {key: value for key, value in foretold["stats"].items() if key not in ("retries", "seconds")}
    assert set(figures.values()) == {None}


def names_in(repository: str) -> dict[str, str]:
    with Repository.open(repository) as opened:
        return opened.tags()


def test_further_names_are_set_and_removed_in_the_same_task(run: Any, repository: str) -> None:
    foretold = run(ref=REGISTRY + "app", name="x", tags=["y", "team/z"], check=True)
    done = run(ref=REGISTRY + "app", name="x", tags=["y", "team/z"])
    assert foretold["changed"] and done["changed"] and done["tags"] == ["y", "team/z"]
    assert names_in(repository) == dict.fromkeys(["team/z", "x", "y"], done["digest"])
    with Repository.open(repository) as opened:
        assert {name: record.ref for name, record in namerecords.records(opened).items()} == dict.fromkeys(
            ["team/z", "x", "y"], REGISTRY + "app"
        )
    assert not run(ref=REGISTRY + "app", name="x", tags=["y"])["changed"]
    more = run(ref=REGISTRY + "app", name="x", tags=["new"], pull="missing")
    assert more["changed"] and more["streams"] == [] and "new" in names_in(repository)
    assert run(name="x", tags=["y", "gone"], state="absent")["changed"] and sorted(names_in(repository)) == [
        "new",
        "team/z",
    ]
    assert run(ref=REGISTRY + "app", name="x", tags=["x"])["error"] == "invalid_reference"


@pytest.mark.parametrize("by", ["digest", "name"])
def test_an_image_that_is_there_gets_another_name_without_network(
    run: Any, world: World, repository: str, by: str
) -> None:
    first = run(ref=REGISTRY + "app", name="x")
    asked = len(world.requests)
    ref = first["digest"] if by == "digest" else "x"
    assert run(ref=ref, name="y", check=True)["changed"] and "y" not in names_in(repository)
    again = run(ref=ref, name="y")
    assert again["changed"] and again["digest"] == first["digest"] and again["streams"] == []
    assert not run(ref=ref, name="y")["changed"] and len(world.requests) == asked
    with Repository.open(repository) as opened:
        record = namerecords.read(opened, "y")
        assert record is not None and record.ref == REGISTRY + "app"
    assert run(ref=ref, name="y", digest="sha256:" + "0" * 64)["error"] == "unexpected_digest"


def test_what_is_neither_a_reference_nor_there_is_refused(run: Any, repository: str) -> None:
    assert run(ref="nothing", name="y")["error"] == "invalid_reference"
    assert run(ref="sha256:" + "0" * 64, name="y")["error"] == "image_not_found"
    assert run(rename_from="nothing", name="y")["error"] == "image_not_found"
    assert run(ref="sha256:" + "0" * 64)["error"] == "invalid_reference", "which name?"


def test_a_name_is_changed(run: Any, world: World, repository: str) -> None:
    first = run(ref=REGISTRY + "app", name="old")
    run(ref=REGISTRY + "base", name="new")
    asked = len(world.requests)
    assert run(rename_from="old", name="new", check=True)["changed"] and len(names_in(repository)) == 2
    assert run(rename_from="old", name="new")["changed"]
    assert names_in(repository) == {"new": first["digest"]} and len(world.requests) == asked
    with Repository.open(repository) as opened:
        assert namerecords.records(opened)["new"].ref == REGISTRY + "app" and namerecords.strays(opened) == []
    assert not run(rename_from="old", name="new")["changed"]


def test_images_may_be_texts_and_differ(run: Any, repository: str) -> None:
    done = run(
        images=[REGISTRY + "base", {"ref": REGISTRY + "app", "name": "x", "erofs": False, "tags": ["y"]}], erofs=True
    )
    assert done["changed"], done
    one, other = done["images"]
    assert one["name"] == REGISTRY + "base" and one["image_id"]
    assert other["image_id"] is None and other["tags"] == ["y"]
    assert run(images=[REGISTRY + "base", ["nested"]], shape=False)["error"] == "invalid_option"


def test_what_is_returned_is_documented(run: Any) -> None:
    documented = yaml.safe_load(composefs_image.RETURN)
    assert set(documented) == (SHAPE - {"changed"}) | {"images", "error", "attempts", "seconds"}
    result = run(ref=REGISTRY + "app")
    assert set(documented["layers"]["contains"]) == set(result["layers"][0])
    assert set(documented["stats"]["contains"]) == set(result["stats"])


def test_documentation_and_argument_spec_say_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    found: dict[str, Any] = {}

    class Caught(Exception):
        pass

    def catch(*arguments: Any, **options: Any) -> Any:
        found.update(options)
        raise Caught

    monkeypatch.setattr(composefs_image, "AnsibleModule", catch)
    with pytest.raises(Caught):
        composefs_image.main()
    documented = yaml.safe_load(composefs_image.DOCUMENTATION)["options"]
    spec = found["argument_spec"]
    fragment = repository_fragment.ModuleDocFragment
    for text in (fragment.DOCUMENTATION, fragment.UNSAFE, registry_fragment.ModuleDocFragment.DOCUMENTATION):
        documented.update(yaml.safe_load(text)["options"])
    assert set(documented) == set(spec)
    for name, option in documented.items():
        for key in ("type", "choices", "default", "elements"):
            assert option.get(key) == spec[name].get(key), name
    assert set(documented["images"]["suboptions"]) == set(spec["images"]["options"])
    assert spec["password"]["no_log"] is True


def test_examples_are_tasks_that_the_module_accepts(world: World) -> None:
    for task in yaml.safe_load(composefs_image.EXAMPLES):
        values = dict(task["composefs.oci.composefs_image"])
        params = {**dict.fromkeys((*composefs_image.IMAGE, "images")), "state": "present", **values}
        params["images"] = [
            {**dict.fromkeys(composefs_image.IMAGE), **image} for image in params["images"] or []
        ] or None
        assert composefs_image.requests_of(params)


def test_null_takes_away_what_the_action_group_has_as_default(run: Any, world: World) -> None:
    """A task with credentials of its own could not say so otherwise."""
    own = {"auth_file": None, "username": "u", "password": PASSWORD}
    assert run(ref=REGISTRY + "app", retries=None, pull=None, deltas=None, **own)["changed"]
    assert world.proxies[-1].options.username == "u"
    assert run(images=[{"ref": REGISTRY + "base", "tags": None, **own}])["changed"]


# --- what is asked for
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"ref": "a.b/c", "images": []},
        {"name": "a", "images": []},
        {"digest": "sha256:" + "0" * 64, "images": []},
        {"platform": "linux/amd64", "images": []},
        {"ref": "a.b/c", "username": "u"},
        {"ref": "a.b/c", "password": PASSWORD},
        {"ref": "a.b/c", "username": "u", "password": PASSWORD, "auth_file": "/x"},
        {"ref": "a.b/c", "state": "latest"},
        {"ref": "a.b/c", "pull": "sometimes"},
        {"ref": "a.b/c", "unenforced_policy": "maybe"},
    ],
)
def test_options_that_do_not_go_together_are_refused(run: Any, world: World, wrong: dict[str, Any]) -> None:
    assert run(shape=False, **wrong)["failed"] and world.proxies == []


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"name": "app"}, "'app' has no reference"),
        ({"images": [{"name": "app"}]}, "'app' has no reference"),
        ({"images": [{"digest": "sha256:" + "0" * 64}]}, "neither a reference nor a name"),
        ({"ref": REGISTRY + "app", "digest": "sha256:XYZ"}, "64 hexadecimal digits"),
        ({"ref": REGISTRY + "app", "digest": "0" * 64}, "64 hexadecimal digits"),
        ({"ref": "app"}, "names neither a registry nor a transport"),
        ({"ref": "sha256:" + "0" * 64}, "Set 'name'"),
        ({"ref": REGISTRY + "app", "name": "@x"}, "Choose another name"),
        ({"images": [{"ref": REGISTRY + "app"}, {"ref": REGISTRY + "app"}]}, "is asked for twice"),
    ],
)
def test_requests_that_cannot_be_understood_say_what_to_write(
    run: Any, world: World, values: dict[str, Any], words: str
) -> None:
    result = run(**values)
    assert (
        result["failed"] and result["error"] == "invalid_reference" and words in result["msg"] and world.proxies == []
    )


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("timeout", 0),
        ("timeout", -1),
        ("retries", -1),
        ("parallel", 0),
        ("parallel", -3),
        ("min_rate", -1),
        ("deadline", 0),
    ],
)
def test_numbers_out_of_range_are_refused(run: Any, world: World, option: str, value: int) -> None:
    result = run(ref=REGISTRY + "app", **{option: value})
    assert (
        result["failed"]
        and f"The option {option} is {value}. It must be at least" in result["msg"]
        and world.proxies == []
    )


@pytest.mark.parametrize("text", ["10 QB", "much", "-1", "0", ""])
def test_sizes_that_are_none_are_refused(run: Any, world: World, text: str) -> None:
    result = run(ref=REGISTRY + "app", max_size=text)
    assert result["failed"] and result["error"] == "invalid_option" and "max_size" in result["msg"]
    assert world.proxies == []


@pytest.mark.parametrize("text, size", [("1", 1), ("10 GB", 10 << 30), ("5M", 5 << 20), (4096, 4096)])
def test_sizes_are_bytes_or_have_units(text: Any, size: int) -> None:
    assert composefs_image.size_of(str(text)) == size


def test_what_unpacks_to_more_than_the_task_allows_is_refused(run: Any, world: World) -> None:
    result = run(ref=REGISTRY + "app", max_size="1 KB")
    assert result["failed"] and result["error"] == "too_large" and "max_size" in result["msg"]
    assert run(ref=REGISTRY + "app", max_size="1 GB")["changed"]


def test_options_reach_skopeo(run: Any, world: World) -> None:
    run(
        ref=REGISTRY + "app",
        username="u",
        password=PASSWORD,
        validate_certs=False,
        ca_cert_dir="/certs",
        signature_policy="/policy.json",
        unenforced_policy="ignore",
        executable="/opt/skopeo",
        timeout=7,
        platform="linux/" + os.uname().machine,
    )
    options = world.proxies[0].options
    assert (options.username, options.password, options.tls_verify, options.cert_dir) == (
        "u",
        PASSWORD,
        False,
        "/certs",
    )
    assert (options.policy, options.unenforced_policy, options.executable, options.timeout) == (
        "/policy.json",
        "ignore",
        ("/opt/skopeo",),
        7,
    )
    assert options.platform.os == "linux" and PASSWORD not in repr(options)


def test_where_certificates_are_not_spoken_of_the_host_decides(run: Any, world: World) -> None:
    run(ref=REGISTRY + "app")
    assert world.proxies[0].options.tls_verify is None


# --- several images
# --------------------------------------------------------------------------------------------------------------------


def test_several_images_in_one_task(run: Any, repository: str) -> None:
    result = run(images=[{"ref": REGISTRY + "base", "name": "b"}, {"ref": REGISTRY + "app"}], diff=True)
    assert [image["name"] for image in result["images"]] == ["b", REGISTRY + "app"] and result["changed"]
    assert [image["repository"] for image in result["images"]] == [repository] * 2
    assert [side["after"]["name"] for side in result["diff"]] == ["b", REGISTRY + "app"]
    assert f"oci-layer-{sha256(FIRST)}" not in result["images"][1]["streams"]
    assert result["skopeo_version"] == "1.2.3"
    again = run(images=[{"ref": REGISTRY + "base", "name": "b"}, {"ref": REGISTRY + "app"}])
    assert not again["changed"] and len(again["images"]) == 2
    gone = run(images=[{"name": "b"}, {"ref": REGISTRY + "app"}, {"name": "never"}], state="absent")
    assert gone["changed"] and [bool(image["previous_digest"]) for image in gone["images"]] == [True, True, False]


def test_no_images_are_nothing_to_do(run: Any, world: World) -> None:
    result = run(images=[])
    assert not result["changed"] and result["images"] == [] and world.proxies == []


def test_a_digest_belongs_to_its_image(run: Any) -> None:
    digest = run(ref=REGISTRY + "app")["digest"]
    assert not run(images=[{"ref": REGISTRY + "app", "digest": digest}])["changed"]
    result = run(images=[{"ref": REGISTRY + "base", "digest": digest}])
    assert result["failed"] and result["error"] == "unexpected_digest"


# --- check mode and diff
# ---------------------------------------------------------------------------------------------------------------------


def tree(path: str) -> list[str]:
    return sorted(
        os.path.join(directory, name) for directory, folders, files in os.walk(path) for name in [*folders, *files]
    )


def test_check_mode_says_what_a_run_does_and_touches_nothing(run: Any, repository: str) -> None:
    before = tree(repository)
    predicted = run(ref=REGISTRY + "app", name="x", check=True, diff=True)
    assert tree(repository) == before
    done = run(ref=REGISTRY + "app", name="x", diff=True)
    for key in ("changed", "digest", "config_digest", "previous_digest", "streams", "layers", "diff"):
        assert predicted[key] == done[key], key
    assert (
        predicted["stats"]["bytes_fetched"]
        == done["stats"]["bytes_fetched"]
        == sum(layer["bytes_to_fetch"] for layer in done["layers"])
    )
    after = tree(repository)
    assert run(name="x", state="absent", check=True)["changed"] and tree(repository) == after


@pytest.mark.parametrize("check", [True, False])
def test_a_name_that_is_removed_tells_what_is_known_of_its_image(run: Any, world: World, check: bool) -> None:
    world.layout.image([FIRST], "told", labels={"org.opencontainers.image.version": "1.4"})
    there = run(ref=REGISTRY + "told", name="x")
    known = ("ref", "registry_digest", "config_digest", "image_id", "platform", "version", "labels", "created", "kind")
    gone = run(name="x", state="absent", check=check)
    assert gone["changed"] and gone["previous_digest"] == there["digest"] and gone["digest"] is None
    assert {key: gone[key] for key in known} == {key: there[key] for key in known}
    assert None not in [gone[key] for key in known] and gone["version"] == "1.4"


def test_diff_shows_name_digest_and_layers_before_and_after(run: Any) -> None:
    old = run(ref=REGISTRY + "base", name="x", diff=True)
    assert old["diff"]["before"] == {} and old["diff"]["before_header"] == "x"
    assert old["diff"]["after"] == {
        "name": "x",
        "digest": old["digest"],
        "layers": [layer["digest"] for layer in old["layers"]],
    }
    new = run(ref=REGISTRY + "app", name="x", diff=True)
    assert new["diff"]["before"] == old["diff"]["after"]
    assert len(new["diff"]["after"]["layers"]) == 2
    gone = run(name="x", state="absent", diff=True)
    assert gone["diff"]["before"] == new["diff"]["after"] and gone["diff"]["after"] == {}


def test_on_a_fresh_host_check_mode_foretells(run: Any, world: World, tmp_path: Path, hide_zstd: Any) -> None:
    result = run(ref=REGISTRY + "app", repository=str(tmp_path / "not yet"), check=True)
    assert result["changed"] and result["digest"] and "Check mode treats it as empty" in result["warnings"][0]
    world.starting = [SkopeoMissing("There is no skopeo.", "Install it.")] * 2
    result = run(ref=REGISTRY + "app", check=True)
    assert result["changed"] and result["digest"] is None and "There is no skopeo" in result["warnings"][0]
    hide_zstd()
    result = run(ref=REGISTRY + "app", check=True)
    assert result["changed"] and "composefs.oci.skopeo" in result["warnings"][0]
    result = run(ref=REGISTRY + "app")
    assert result["failed"] and result["error"] == "missing_library" and "composefs.oci.skopeo" in result["msg"]


def test_check_mode_fails_for_no_image_because_skopeo_is_still_to_be_installed(
    run: Any, world: World, repository: str, monkeypatch: pytest.MonkeyPatch, hide_zstd: Any
) -> None:
    first = run(ref=REGISTRY + "app", name="x")
    missing = SkopeoMissing("There is no skopeo.", "Install it.")
    world.starting = [missing] * 9

    def foretold(**values: Any) -> dict[str, Any]:
        return dict(run(**{"ref": REGISTRY + "app", "name": "x", "check": True, **values}))

    # What a tag means now is not known, so neither is whether the name moves; it is foretold as what would be more.
    told = foretold()
    assert told["changed"] and told["digest"] is None and told["previous_digest"] == first["digest"]
    (warning,) = told["warnings"]
    assert "There is no skopeo." in warning and "whether x would be another image" in warning
    # A digest, and a reference that is good enough for what is there, need nobody.
    for values in (
        {"digest": first["digest"]},
        {"pull": "missing"},
        {"digest": first["digest"], "ref": REGISTRY + "base"},
    ):
        told = foretold(**values)
        assert not told["changed"] and told["digest"] == first["digest"] and not told["warnings"]
    other = f"sha256:{'0' * 64}"
    assert foretold(digest=other)["changed"]

    world.starting = [missing] * 9
    several = [{"ref": REGISTRY + name, "name": name} for name in ("app", "base")]
    several += [{"ref": REGISTRY + "app", "name": "x", "digest": first["digest"]}, {"ref": "x", "name": "again"}]
    told = run(images=several, check=True)
    assert [image["digest"] for image in told["images"]] == [None, None, first["digest"], first["digest"]]
    assert told["changed"] and len(told["warnings"]) == 1 and "only that they would be pulled" in told["warnings"][0]

    world.starting = [missing]
    assert run(ref=REGISTRY + "app", name="x")["error"] == "skopeo_missing"
    # A task that only asks, in a run that is not in check mode: nobody is going to install anything.
    monkeypatch.setenv("COMPOSEFS_OCI_ASKS", "1")
    for name in ("x", "new"):
        world.starting = [missing]
        assert foretold(name=name)["error"] == "skopeo_missing"
    monkeypatch.delenv("COMPOSEFS_OCI_ASKS")
    # What is too old has to be replaced, which no task of the collection does.
    world.starting = [SkopeoTooOld("This skopeo is too old.", "Install another.")] * 2
    assert foretold()["error"] == "skopeo_too_old"
    world.starting = []

    hide_zstd()
    told = foretold()
    assert told["changed"] and told["digest"] is None and told["previous_digest"] == first["digest"]


# --- what fails
# --------------------------------------------------------------------------------------------------------------------


def test_a_path_without_a_repository_says_what_to_do_and_makes_none(run: Any, tmp_path: Path) -> None:
    result = run(ref=REGISTRY + "app", repository=str(tmp_path / "nothing"))
    assert result["failed"] and result["error"] == "not_a_repository" and "composefs_repository" in result["msg"]
    assert result["repository"] == str(tmp_path / "nothing") and not (tmp_path / "nothing").exists()


@pytest.mark.parametrize(
    "ref",
    [
        f"docker://user:{PASSWORD.replace(' ', '')}@registry.test/app",
        f"user:{PASSWORD.replace(' ', '')}@registry.test/app",
    ],
)
def test_a_password_in_a_reference_does_not_come_back(run: Any, world: World, ref: str) -> None:
    for values in ({"ref": ref}, {"images": [{"ref": ref}]}):
        result = run(**values)
        assert result["failed"] and result["error"] == "invalid_reference"
        result.pop("invocation", None)  # which repeats what the playbook itself says
        assert "cret" not in json.dumps(result)


def test_a_password_comes_back_in_no_result(run: Any, world: World) -> None:
    world.opening = [AuthFailed("Opening it: skopeo says: unauthorized.", "Give username and password.")]
    for _time in range(2):
        result = run(ref=REGISTRY + "app", username="u", password=PASSWORD)
        assert PASSWORD not in json.dumps(result)
    assert result["changed"]


def test_a_bug_is_one_line(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def bug(*arguments: Any) -> Any:
        raise RuntimeError(PASSWORD)

    monkeypatch.setattr(pull, "pull_images", bug)
    result = run(ref=REGISTRY + "app", password=PASSWORD, username="u")
    assert result["failed"] and result["error"] == "internal_error" and "RuntimeError" in result["msg"]


def test_newer_warns_when_the_registry_is_gone(run: Any, world: World) -> None:
    run(ref=REGISTRY + "app")
    world.opening = [RegistryUnreachable("Opening it: skopeo says: connection refused.")] * 9
    result = run(ref=REGISTRY + "app", pull="newer")
    assert not result["changed"] and "left as it is" in result["warnings"][0]
    assert run(ref=REGISTRY + "app")["error"] == "registry_unreachable"


def test_the_lack_of_jsonschema_is_told_once(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ocischemas, "available", lambda: False)
    result = run(images=[{"ref": REGISTRY + "app"}, {"ref": REGISTRY + "base"}])
    assert len(result["warnings"]) == 1 and "jsonschema" in result["warnings"][0]


# --- progress
# --------------------------------------------------------------------------------------------------------------------


def test_progress_is_written_where_it_is_asked_for(run: Any, tmp_path: Path) -> None:
    file = tmp_path / "progress.json"
    run(ref=REGISTRY + "app", progress_file=str(file))
    state = json.loads(file.read_text())
    assert (
        state["finished"]
        and state["done"] == state["total"] > 0
        and {layer["state"] for layer in state["layers"]} == {"done"}
    )


def test_progress_ends_when_the_task_fails(run: Any, tmp_path: Path) -> None:
    file = tmp_path / "progress.json"
    assert run(ref=REGISTRY + "nowhere", progress_file=str(file))["failed"]
    assert json.loads(file.read_text())["finished"]


def test_a_progress_file_that_cannot_be_written_does_no_harm(run: Any, tmp_path: Path) -> None:
    assert run(ref=REGISTRY + "app", progress_file=str(tmp_path / "no such directory/file"))["changed"]


@pytest.mark.slow
def test_deltas_are_looked_for_where_a_layer_is_missing_and_not_if_the_list_is_empty(run: Any, world: World) -> None:
    def asked() -> int:
        found = len([what for method, what in world.requests if method == "Inspect" and ".delta-" in what])
        world.requests.clear()
        return found

    run(ref=REGISTRY + "app", name="x")
    assert asked() == 0, "there is nothing to start from"
    for number, options in enumerate(({}, {"deltas": ["auto"]}, {"deltas": []})):
        world.layout.image([tar(member(f"usr/{number}", b"4" * 300))], "app")
        result = run(ref=REGISTRY + "app", name="x", **options)
        assert result["changed"] and result["warnings"] == []
        assert asked() == (1 if options != {"deltas": []} else 0)
        run(ref=REGISTRY + "app", name="x", **options)
        assert asked() == 0


def test_an_image_of_a_layout_may_be_named_by_its_number(run: Any, tmp_path: Path) -> None:
    place = tmp_path / "some@place"
    Layout(place).image([tar(member("usr/x", b"7" * 300))], "app")
    result = run(ref=f"oci:{place}:@0", name="x")
    assert result["changed"] and result["ref"] == f"oci:{place}:@0"


@pytest.mark.parametrize("value", [None, ["s3cret"], {"a": "s3cret"}, True])
def test_a_header_without_a_text_is_refused_and_not_shown(run: Any, value: Any) -> None:
    result = run(ref=REGISTRY + "app", peers=["http://127.0.0.1:1/"], peer_headers={"Authorization": value})
    assert result["error"] == "invalid_option" and "Authorization" in result["msg"]
    result.pop("invocation", None)
    assert "s3cret" not in json.dumps(result) and "None" not in result["msg"]


def test_a_text_among_the_images_that_is_no_reference_is_told_apart(run: Any) -> None:
    result = run(shape=False, images=[REGISTRY + "app", "old"])
    assert result["error"] == "invalid_option" and "Item 1 is neither a dictionary nor a reference" in result["msg"]


# --- secrets
# ----------------------------------------------------------------------------------------------------------------------


def told(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, **values: Any) -> str:
    """Everything that the module returns and logs, as text."""
    logged: list[str] = []
    monkeypatch.setattr(basic.AnsibleModule, "log", lambda module, message, log_args=None: logged.append(message))
    values = {"repository": "/nonexistent", "_ansible_remote_tmp": "/tmp", "_ansible_verbosity": 3, **values}
    with arguments(values), pytest.raises(SystemExit):
        composefs_image.main()
    output = capsys.readouterr()
    assert json.loads(output.out)["failed"] and "invocation" in output.out
    return output.out + output.err + "".join(map(str, logged))


@pytest.mark.parametrize(
    "images",
    [
        "ref=docker://h/x password=hunter2",
        ["ref=docker://h/x password=hunter2"],
        [{"ref": "docker://h/x", "passwd": "hunter2"}],
        [{"ref": "docker://h/x", "login": {"password": "hunter2"}}],
        [{"ref": ["docker://h/x", "hunter2"]}],
        {"ref": "docker://h/x", "password": "hunter2"},
        [[{"password": "hunter2"}]],
        [{"ref": "docker://h/x", "password": "hunter2"}],
    ],
)
def test_a_malformed_list_of_images_shows_nothing_of_it(
    images: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "hunter2" not in told(capsys, monkeypatch, images=images)


@pytest.mark.parametrize(
    "reference",
    [
        "docker://somebody:hunter2@h.example/x:1",
        "somebody:hunter2@h.example/x:1",
        "docker://somebody:hun@hunter2@h.example/x@sha256:" + "a" * 64,
        "oci:somebody:hunter2@h/x",
    ],
)
@pytest.mark.parametrize("several", [False, True])
def test_credentials_in_a_reference_are_refused_and_stand_nowhere(
    reference: str, several: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    values: Any = {"images": [{"ref": reference}]} if several else {"ref": reference}
    assert "hunter2" not in told(capsys, monkeypatch, **values)


def test_one_password_is_not_for_several_registries(run: Any) -> None:
    images = [{"ref": "docker://one.example/x"}, {"ref": "docker://two.example/x"}]
    result = run(images=images, username="u", password=PASSWORD)
    assert result["failed"] and result["error"] == "invalid_option"
    assert "one.example, two.example" in result["msg"] and "of its own" in result["msg"]


def test_each_registry_gets_the_password_that_is_meant_for_it(run: Any, world: World) -> None:
    images = [
        {"ref": REGISTRY + "app", "username": "one", "password": "first"},
        {"ref": REGISTRY + "base", "name": "x"},
        {"ref": REGISTRY + "base", "name": "y", "username": "two", "password": "second"},
    ]
    run(images=images, username="task", password="third")
    assert [(proxy.options.username, proxy.options.password) for proxy in world.proxies] == [
        ("one", "first"),
        ("task", "third"),
        ("two", "second"),
    ]


def test_an_image_may_have_a_file_with_credentials_of_its_own(run: Any, world: World) -> None:
    images = [
        {"ref": REGISTRY + "app", "auth_file": "/own.json"},
        {"ref": REGISTRY + "base", "name": "x"},
        {"ref": REGISTRY + "base", "name": "y", "username": "two", "password": "second"},
    ]
    run(images=images, auth_file="/task.json")
    assert [(proxy.options.username, proxy.options.auth_file) for proxy in world.proxies] == [
        (None, "/own.json"),
        (None, "/task.json"),
        ("two", None),
    ]
    both = {"ref": REGISTRY + "app", "auth_file": "/own.json", "username": "u", "password": PASSWORD}
    result = run(shape=False, images=[both])
    assert result["failed"] and "mutually exclusive" in result["msg"]
