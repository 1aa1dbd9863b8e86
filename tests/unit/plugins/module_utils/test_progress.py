# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import json
import os
import pathlib

import pytest

from ansible_collections.composefs.oci.plugins.module_utils import progress
from ansible_collections.composefs.oci.plugins.module_utils.progress import (
    BYTES,
    DONE,
    IMAGE,
    PLANNED,
    SKIPPED,
    STARTED,
    Event,
)

A = "sha256:" + "a" * 64
B = "sha256:" + "b" * 64


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_totals_leave_skipped_layers_out() -> None:
    board = progress.Board(Clock())
    board.take(Event(SKIPPED, A, 500, 500))
    board.take(Event(STARTED, B, 0, 1000))
    board.take(Event(BYTES, B, 250, 1000))
    assert board.totals() == (250, 1000)


def test_a_layer_that_is_tried_again_does_not_count_backwards() -> None:
    board = progress.Board(Clock())
    seen = []
    for event in (
        Event(STARTED, A, 0, 1000),
        Event(BYTES, A, 900, 1000),
        Event(STARTED, A, 0, 1000),
        Event(BYTES, A, 10, 1000),
        Event(BYTES, A, 950, 1000),
    ):
        board.take(event)
        seen.append(board.totals())
    assert seen == [(0, 1000), (900, 1000), (900, 1000), (900, 1000), (950, 1000)]


def test_layers_that_have_not_begun_count_from_the_beginning() -> None:
    clock = Clock()
    board = progress.Board(clock)
    board.take(Event(PLANNED, A, 0, 1000))
    board.take(Event(PLANNED, B, 0, 3000))
    assert board.totals() == (0, 4000) and board.rate() == 0
    clock.now += 60
    board.take(Event(STARTED, A, 0, 1000))
    clock.now += 2
    board.take(Event(BYTES, A, 800, 1000))
    assert board.totals() == (800, 4000) and board.rate() == 400, "waiting is not working"


def test_rate_is_bytes_a_second_since_the_first_layer_began() -> None:
    clock = Clock()
    board = progress.Board(clock)
    board.take(Event(STARTED, A, 0, 1000))
    clock.now += 4
    board.take(Event(BYTES, A, 800, 1000))
    assert board.rate() == 200


def test_file_is_whole_json_and_private_at_every_moment(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "progress.json"
    sink = progress.FileSink(str(path), interval=0)
    for event in (Event(STARTED, A, 0, 100), Event(BYTES, A, 50, 100)):
        sink.event(event)
        assert json.loads(path.read_text())["total"] == 100
    sink.event(Event(DONE, A, 100, 100))
    sink.close()
    state = json.loads(path.read_text())
    assert state["finished"] and state["done"] == 100
    assert state["layers"] == [{"id": A, "state": "done", "done": 100, "total": 100}]
    assert os.stat(path).st_mode & 0o777 == 0o600
    assert os.listdir(tmp_path) == ["progress.json"]


def test_bytes_between_two_intervals_are_not_written(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "progress.json"
    sink = progress.FileSink(str(path), interval=3600)
    sink.event(Event(STARTED, A, 0, 100))
    sink.event(Event(BYTES, A, 60, 100))
    assert json.loads(path.read_text())["done"] == 0


def test_summary_is_one_line_for_people() -> None:
    state = {
        "done": 50 << 20,
        "total": 200 << 20,
        "rate": 10 << 20,
        "message": "",
        "layers": [{"state": "done"}, {"state": "bytes"}, {"state": "skipped"}],
    }
    assert progress.summary(state) == "25% of 200.00 MiB, 10.00 MiB/s, 15 s left, 2 of 3 layers"


def test_summary_shows_the_message_where_nothing_is_fetched() -> None:
    assert (
        progress.summary({"done": 0, "total": 0, "rate": 0, "message": "Registering app", "layers": []})
        == "Registering app"
    )


def test_summary_names_the_image() -> None:
    state = {"done": 0, "total": 0, "rate": 0, "message": "Registering", "layers": [], "images": ["app"]}
    assert progress.summary(state) == "app: Registering"
    assert progress.summary({**state, "images": ["app", "web", "db"]}) == "app and 2 more: Registering"


def test_the_file_names_the_images(tmp_path: pathlib.Path) -> None:
    sink = progress.FileSink(str(tmp_path / "progress.json"), interval=0)
    sink.event(Event(IMAGE, text="app"))
    assert sink.state()["images"] == ["app"]


def test_every_sink_hears_everything_and_one_that_fails_does_not_silence_the_others() -> None:
    class Sink:
        def __init__(self, broken: bool) -> None:
            self.heard: list[str] = []
            self.broken = broken

        def event(self, event: Event) -> None:
            self.heard.append(event.text)
            if self.broken:
                raise OSError(28, "No space left on device")

        def close(self) -> None:
            self.heard.append("closed")

    broken, well = Sink(True), Sink(False)
    emit = progress.Progress(broken, None, well)
    emit.message("one")
    emit.message("two")
    emit.close()
    assert broken.heard == ["one"] and well.heard == ["one", "two", "closed"]


def test_a_failing_sink_is_silenced_and_the_pull_goes_on() -> None:
    class Broken:
        calls = 0

        def event(self, event: Event) -> None:
            self.calls += 1
            raise OSError(28, "No space left on device")

        def close(self) -> None:
            raise OSError(28, "No space left on device")

    broken = Broken()
    emit = progress.Progress(broken)
    emit.message("one")
    emit.message("two")
    emit.close()
    assert broken.calls == 1


def test_human_units() -> None:
    assert [progress.human(n) for n in (0, 1023, 1536, 3 << 20, 5 << 40)] == [
        "0 B",
        "1023 B",
        "1.50 KiB",
        "3.00 MiB",
        "5.00 TiB",
    ]


def test_links_planted_beside_the_file_are_not_followed(tmp_path: pathlib.Path) -> None:
    """The file may lie where everybody may write."""
    victim = tmp_path / "victim"
    victim.write_text("precious")
    path = tmp_path / "progress.json"
    for name in ("progress.json", "progress.json.new"):
        (tmp_path / name).symlink_to(victim)
    sink = progress.FileSink(str(path), interval=0)
    sink.event(progress.Event(progress.MESSAGE, text="hello"))
    sink.close()
    assert victim.read_text() == "precious"
    assert not path.is_symlink() and path.stat().st_mode & 0o777 == 0o600
    assert json.loads(path.read_text())["finished"]
    assert sorted(os.listdir(tmp_path)) == ["progress.json", "progress.json.new", "victim"]


def test_a_full_disk_leaves_nothing_beside_the_file(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_arguments: object, **_options: object) -> None:
        raise OSError(28, "No space left on device")

    sink = progress.FileSink(str(tmp_path / "progress.json"), interval=0)
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        sink.event(progress.Event(progress.MESSAGE, text="hello"))
    assert os.listdir(tmp_path) == []


def test_a_countdown_tells_how_far_it_is_and_how_long_the_rest_takes() -> None:
    class Said:
        def __init__(self) -> None:
            self.texts: list[str] = []

        def event(self, event: progress.Event) -> None:
            self.texts.append(event.text)

        def close(self) -> None: ...

    clock = [0.0]
    said = Said()
    shared = progress.Countdown(progress.Progress(said), "Looking", 256, share=True, clock=lambda: clock[0])
    counted = progress.Countdown(progress.Progress(said), "Removing", 1000, clock=lambda: clock[0])
    for moment, done in ((0.4, 10), (0.6, 64), (0.7, 100), (10.0, 128), (10.1, 0), (10.2, 256)):
        clock[0] = moment
        shared.reached(done)
    assert said.texts == ["Looking: 25%, 1 s left", "Looking: 50%, 10 s left", "Looking: 100%"]
    said.texts.clear()
    for moment, done in ((20.0, 100), (20.1, 200), (21.0, 1000)):
        clock[0] = moment
        counted.reached(done)
    assert said.texts == ["Removing: 100 of 1000, 180 s left", "Removing: 1000 of 1000"]
    # More than was foreseen, as while somebody pulls.
    clock[0] = 30.0
    counted.reached(1001)
    assert said.texts[-1] == "Removing: 1001 of 1000"
