# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What a prune in check mode foretells after tasks that only foretold what they would do."""

from __future__ import annotations

import dataclasses
import pathlib
import sys
from collections.abc import Iterator, Sequence

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from filled_repository import copy_of, fill, make_layout

from ansible_collections.composefs.oci.plugins.module_utils.operations import (
    deployment,
    foreseen,
    journal,
    keepers,
    listing,
    prune,
)
from ansible_collections.composefs.oci.plugins.module_utils.operations.foreseen import Ahead, Mount
from ansible_collections.composefs.oci.plugins.module_utils.operations.journal import Image, Journal, Places
from ansible_collections.composefs.oci.plugins.module_utils.progress import Progress
from ansible_collections.composefs.oci.plugins.module_utils.store.repository import Repository

SOMEBODY = "sha256:" + "0" * 64


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[pathlib.Path]:
    base = tmp_path_factory.mktemp("filled")
    fill(base / "repo", make_layout(base / "layout"))
    yield base / "repo"


class Site:
    """A repository, and journals of a host."""

    def __init__(self, filled: pathlib.Path, tmp_path: pathlib.Path) -> None:
        self.path = copy_of(filled, tmp_path / "repo")
        self.places = Places(str(tmp_path / "units"), str(tmp_path / "library"), str(tmp_path / "running"))
        with Repository.open(str(self.path)) as repository:
            found = {name: listing.list_images(repository, name)[0][0] for name in "abc"}
        self.images = {name: Image(one["image_id"], one["digest"]) for name, one in found.items()}

    def digest(self, name: str) -> str:
        return str(self.images[name].digest)

    def have(self, *kept: str) -> None:
        """Have the journal of /srv/app keep the images of these names, the first one mounted, by pins and links; all
        other names but ``app`` go.
        """
        pins = tuple(f"app@{self.digest(name)}" for name in kept)
        with Repository.open(str(self.path), write=True) as repository:
            for pin, name in zip(pins, kept):
                repository.tag(pin, self.digest(name))
                repository.link_image_ref(
                    f"composefs-oci/srv-app/{self.images[name].image_id}", bytes.fromhex(self.images[name].image_id)
                )
            for tag in set(repository.tags()) - {*pins, "app"}:
                repository.untag(tag)
            for link in repository.image_refs("composefs-oci/srv-app"):
                if link not in {self.images[name].image_id for name in kept}:
                    repository.unlink_image_ref(f"composefs-oci/srv-app/{link}")
        current, *previous = [self.images[name] for name in kept] or [None]
        if current is None:
            journal.remove("/srv/app", self.places)
            return
        with journal.locked("/srv/app", self.places):
            journal.write(
                Journal(
                    "/srv/app",
                    name="app",
                    repository=str(self.path),
                    current=current,
                    previous=tuple(one for one in previous if one),
                    pins=pins,
                    boot=journal.boot_id(),
                ),
                self.places,
            )

    def look(self, repository: Repository) -> list[keepers.Keeper]:
        return [one for one in keepers.keepers(repository, self.places) if one.kind == keepers.JOURNAL]

    def prune(self, check: bool, ahead: Ahead | None = None) -> prune.Pruned:
        with Repository.open(str(self.path), write=not check) as repository:
            return prune.prune(repository, prune.Wish(), Progress(), check, self.look, lambda _ended: None, ahead)

    def ahead(self, mounts: Sequence[Mount] = (), **names: str | None) -> Ahead:
        return Ahead(names, mounts, self.places)


@pytest.fixture
def site(filled: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    monkeypatch.setattr(deployment, "shown", lambda _path: "x")
    return Site(filled, tmp_path)


def test_a_name_that_will_move_lets_go_of_what_it_meant(site: Site) -> None:
    with Repository.open(str(site.path), write=True) as repository:
        repository.tag("app", site.digest("a"))
        for name in ("a", "artifact"):
            repository.untag(name)
    foretold = site.prune(True, site.ahead(app=site.digest("c")))
    assert foretold.changed and foretold.certain and f"oci-manifest-{site.digest('a')}" in foretold.streams
    with Repository.open(str(site.path), write=True) as repository:
        repository.tag("app", site.digest("c"))
    assert site.prune(True) == foretold


@pytest.mark.parametrize("keep_previous", [0, 1, 2])
def test_a_mount_that_will_move_lets_go_of_what_it_keeps_no_longer(site: Site, keep_previous: int) -> None:
    with Repository.open(str(site.path), write=True) as repository:
        repository.tag("app", site.digest("c"))
    site.have("b", "a")
    image = site.images["c"]
    mount = Mount("/srv/app", "app", image.digest, image.image_id, keep_previous)
    foretold = site.prune(True, site.ahead([mount]))
    goes = {name for name in "abc" if f"oci-manifest-{site.digest(name)}" in foretold.streams}
    assert goes == {0: {"a", "b"}, 1: {"a"}, 2: set()}[keep_previous]
    site.have(*["c", "b", "a"][: keep_previous + 1])
    assert dataclasses.asdict(site.prune(True)) == dataclasses.asdict(foretold)


def test_what_will_be_unmounted_keeps_nothing(site: Site) -> None:
    with Repository.open(str(site.path), write=True) as repository:
        repository.tag("app", site.digest("c"))
    site.have("b", "a")
    unit = keepers.Keeper(keepers.UNIT, "composefs-oci-srv-app.service", frozenset([site.images["b"].image_id]))
    mounted = keepers.Keeper(keepers.MOUNT, "/srv/app", frozenset([site.images["b"].image_id]))
    more = [unit, mounted]
    look = site.look
    site.look = lambda repository: [*more, *look(repository)]  # type: ignore[method-assign]
    foretold = site.prune(True, site.ahead([Mount("/srv/app", absent=True)]))
    assert site.images["b"].image_id in foretold.images
    more.clear()
    site.have()
    assert dataclasses.asdict(site.prune(True)) == dataclasses.asdict(foretold)


def test_what_is_still_to_come_may_share_with_what_goes(site: Site) -> None:
    with Repository.open(str(site.path), write=True) as repository:
        repository.tag("app", site.digest("a"))
        repository.untag("a")
    foretold = site.prune(True, site.ahead(app=SOMEBODY))
    assert foretold.changed and not foretold.certain
    assert foreseen.Ahead({"gone": None}).certain(prune.Graph.read(Repository.open(str(site.path))))


def test_a_name_that_is_still_to_come_goes_if_it_is_asked_for(site: Site) -> None:
    ahead = site.ahead(later=SOMEBODY, tomorrow="", stays=SOMEBODY)
    with Repository.open(str(site.path)) as repository:
        wish = prune.Wish(remove=["later", "tomorrow", "nothing"])
        pruned = prune.prune(repository, wish, Progress(), True, site.look, lambda _ended: None, ahead)
        assert {"later", "tomorrow"} <= set(pruned.names) and "stays" not in pruned.names
        assert pruned.changed and not pruned.certain
        # It is the newest one, and what an earlier task would mount is held.
        young = prune.Wish(remove=["later"], older_than=60.0)
        assert "later" not in prune.prune(repository, young, Progress(), True, site.look, ahead=ahead).names
        mount = Mount("/srv/app", "later", SOMEBODY)
        wish = prune.Wish(remove=["later*", "stays"])
        pruned = prune.prune(
            repository, wish, Progress(), True, site.look, ahead=dataclasses.replace(ahead, mounts=[mount])
        )
        assert pruned.held == ["later", f"later@{SOMEBODY}", "stays"]
