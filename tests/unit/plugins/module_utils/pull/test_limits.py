# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""How much a pull may fetch, how slowly, and until when."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import pytest

from ansible_collections.composefs.oci.plugins.module_utils.errors import NoSpace, Stalled, TooLarge
from ansible_collections.composefs.oci.plugins.module_utils.pull import layer, limits
from ansible_collections.composefs.oci.plugins.module_utils.pull.layer import PipeSource
from ansible_collections.composefs.oci.plugins.module_utils.pull.limits import Budget, Limits, Tally


def nothing() -> int:
    return 0


def test_all_workers_of_a_fetch_share_one_budget() -> None:
    tally = Tally(3)
    first, second, third = (Budget(Limits(max_size=1000), tally, number) for number in range(3))
    first.count(400, 1, nothing)
    second.count(400, 1, nothing)
    third.count(200, 1, nothing)
    with pytest.raises(TooLarge, match="1000 bytes"):
        second.count(401, 1, nothing)


def test_the_count_crosses_the_border_of_processes() -> None:
    tally = Tally(2)
    pid = os.fork()
    if not pid:
        Budget(Limits(), tally, 1).count(700, 5, nothing)
        os._exit(0)
    os.waitpid(pid, 0)
    assert tally.sums() == (700, 5, 0)


def test_what_is_fetched_again_counts_once() -> None:
    budget = Budget(Limits(max_size=1000), Tally(1))
    for _attempt in range(5):
        budget.count(900, 1, nothing)
        budget.end(False)
    budget.count(900, 1, nothing)
    budget.end(True)
    with pytest.raises(TooLarge):
        budget.count(101, 1, nothing)


def test_members_are_bounded() -> None:
    budget = Budget(Limits(max_entries=10), Tally(1))
    budget.count(1, 10, nothing)
    with pytest.raises(TooLarge, match="more than 10 members"):
        budget.count(1, 11, nothing)


def test_without_a_size_only_what_needs_room_counts_against_the_free_space() -> None:
    budget = Budget(Limits(free=100 << 20), Tally(1))
    asked = []

    def spared() -> int:
        asked.append(1)
        return 900 << 20

    for size in range(0, 1000 << 20, 1 << 20):
        budget.count(size, 1, spared)
    assert 1 <= len(asked) <= 60, "it is asked for seldom"
    with pytest.raises(NoSpace, match="free"):
        for size in range(1000 << 20, 1200 << 20, 1 << 20):
            budget.count(size, 1, spared)
    with pytest.raises(NoSpace, match="free"):
        Budget(Limits(free=1000), Tally(1)).count(1001, 1, nothing)


def test_a_deadline_shortens_waits_and_ends_them() -> None:
    assert Limits().left(60) == 60
    assert Limits(deadline=time.monotonic() + 1000).left(60) == 60
    assert 5 < Limits(deadline=time.monotonic() + 50).left(60) <= 50
    with pytest.raises(Stalled, match="deadline") as error:
        Limits(deadline=time.monotonic() - 1).left(60)
    assert not error.value.passing


class Trickle:
    """A pipe from which ``size`` bytes come each ``seconds`` of a clock that runs while somebody waits."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, size: int, seconds: float) -> None:
        self.now = 0.0
        self.size, self.seconds = size, seconds
        self.readable, self.writable = os.pipe()
        monkeypatch.setattr(time, "monotonic", lambda: self.now)

    def poll(self, milliseconds: int) -> bool:
        self.now += min(self.seconds, milliseconds / 1000)
        os.write(self.writable, bytes(self.size))
        return True


@pytest.fixture
def trickle(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Trickle]:
    made = Trickle(monkeypatch, *request.param)
    yield made
    os.close(made.readable)
    os.close(made.writable)


def read_from(trickle: Trickle, given: Limits) -> PipeSource:
    source = PipeSource(trickle.readable, 100_000, 60, lambda done: None, lambda: None, given)
    source._poll = trickle  # type: ignore[assignment]
    while source.read(4096):
        pass
    return source


@pytest.mark.parametrize("trickle", [(1, 0.5), (100, 0.5), (500, 0.5)], indirect=True)
def test_what_comes_slower_than_the_least_rate_is_given_up(trickle: Trickle) -> None:
    with pytest.raises(Stalled, match="min_rate") as error:
        read_from(trickle, Limits())
    assert error.value.passing, "another try may find a better way"
    assert limits.RATE_WINDOW <= trickle.now < limits.RATE_WINDOW + 2


@pytest.mark.slow
@pytest.mark.parametrize("trickle", [(1, 0.5)], indirect=True)
def test_a_rate_of_none_waits_for_everything(trickle: Trickle) -> None:
    assert read_from(trickle, Limits(min_rate=0)).fetched == 100_000


@pytest.mark.parametrize("trickle", [(1000, 0.5)], indirect=True)
def test_what_is_fast_enough_is_not_given_up(trickle: Trickle) -> None:
    assert read_from(trickle, Limits()).fetched == 100_000


def test_the_time_that_is_spent_on_what_came_is_not_the_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    trickle = Trickle(monkeypatch, 100, 0.01)
    source = PipeSource(trickle.readable, 100_000, 60, lambda done: None, lambda: None, Limits())
    source._poll = trickle  # type: ignore[assignment]
    while source.read(4096):
        trickle.now += 100  # a slow disk
    assert source.fetched == 100_000


@pytest.mark.parametrize("trickle", [(1000, 0.5)], indirect=True)
def test_a_transfer_ends_with_the_deadline(trickle: Trickle) -> None:
    with pytest.raises(Stalled, match="deadline"):
        read_from(trickle, Limits(deadline=3.0))
    assert 3 <= trickle.now < 4


def test_an_import_without_a_budget_is_not_bounded() -> None:
    assert Limits(min_rate=0) == layer.UNLIMITED and limits.MAX_ENTRIES == 20_000_000
