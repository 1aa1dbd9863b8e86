# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import os
import pathlib
import random
import signal
import time
from collections.abc import Iterator

import pytest

from ansible_collections.composefs.oci.plugins.module_utils import errors
from ansible_collections.composefs.oci.plugins.module_utils.formats import fsverity
from ansible_collections.composefs.oci.plugins.module_utils.pull import smallobjects
from ansible_collections.composefs.oci.plugins.module_utils.host import beneath
from ansible_collections.composefs.oci.plugins.module_utils.store.objects import ObjectStore


@pytest.fixture
def objects(tmp_path: pathlib.Path) -> Iterator[ObjectStore]:
    (tmp_path / "objects").mkdir()
    fd = os.open(tmp_path / "objects", os.O_PATH | os.O_DIRECTORY)
    yield ObjectStore(beneath.Root(os.dup(fd), str(tmp_path)), fd, fsverity.SHA256, verity=False, try_verity=False)
    os.close(fd)


@pytest.fixture
def process(objects: ObjectStore) -> Iterator[smallobjects.Storer]:
    made = smallobjects.Storer(objects)
    yield made
    made.close()


def contents(count: int) -> list[bytes]:
    source = random.Random(count)
    return [source.randbytes(source.choice((65, 100, 4096, 4097, 70_000))) for _unused in range(count)]


def test_everything_is_stored_and_counted_when_finish_returns(
    objects: ObjectStore, process: smallobjects.Storer
) -> None:
    data = contents(700)
    digests = [process.put(memoryview(one)) for one in [*data, *data[:50]]]
    process.finish()
    assert digests[:700] == [fsverity.digest(one, fsverity.SHA256) for one in data]
    for digest, one in zip(digests, data):
        assert objects.read(digest, 1 << 20) == one
    stats = objects.stats
    assert (stats.new, stats.present) == (700, 50)
    assert stats.bytes_new == sum(map(len, data)) and stats.bytes_present == sum(map(len, data[:50]))


def test_one_content_larger_than_a_batch(objects: ObjectStore, process: smallobjects.Storer) -> None:
    data = os.urandom(3 * smallobjects.BATCH_BYTES + 7)
    digest = process.put(data)
    process.finish()
    assert objects.read(digest, 1 << 24) == data


@pytest.mark.parametrize("size", [65, smallobjects.BATCH_BYTES - 1, smallobjects.BATCH_BYTES, smallobjects.SLOT])
def test_slots_are_used_again_and_nothing_is_lost(
    objects: ObjectStore, process: smallobjects.Storer, size: int
) -> None:
    data = [bytes([number % 256]) + os.urandom(size - 1) for number in range(5 * smallobjects.SLOTS)]
    mixed = [part for one in data for part in (one, one[:70])]
    digests = [process.put(one) for one in mixed]
    process.finish()
    assert [objects.read(digest, 1 << 20) for digest in digests] == mixed


def test_layers_one_after_the_other_are_counted_each(objects: ObjectStore, process: smallobjects.Storer) -> None:
    for number in (1, 2, 3):
        process.put(b"x" * 100 * number)
        process.finish()
        assert objects.stats.new == number


def test_an_error_reaches_the_caller_and_the_next_layer_starts_clean(
    objects: ObjectStore, process: smallobjects.Storer, tmp_path: pathlib.Path
) -> None:
    (tmp_path / "objects").rename(tmp_path / "away")
    broken = contents(3)
    wrong = fsverity.object_path(fsverity.digest(broken[0], fsverity.SHA256))
    # Something that is no directory stands where the object's directory must be.
    (tmp_path / "away" / wrong[:2]).write_bytes(b"")
    for one in broken:
        process.put(one)
    with pytest.raises(errors.EngineError):
        process.finish()
    process.reset()
    (tmp_path / "away" / wrong[:2]).unlink()
    digest = process.put(broken[0])
    process.finish()
    assert objects.read(digest, 1 << 20) == broken[0]


@pytest.mark.slow
def test_an_error_is_told_before_the_end(
    objects: ObjectStore, process: smallobjects.Storer, tmp_path: pathlib.Path
) -> None:
    for first in range(256):
        (tmp_path / f"objects/{first:02x}").write_bytes(b"")
    with pytest.raises(errors.EngineError):
        for one in contents(20_000):
            process.put(one)


def test_reset_forgets_what_was_not_handed_over_and_the_error(
    objects: ObjectStore, process: smallobjects.Storer
) -> None:
    process.put(b"never handed over" * 10)
    process.reset()
    process.finish()
    assert objects.stats.new == 0


def test_a_killed_process_is_a_clear_error(process: smallobjects.Storer) -> None:
    os.kill(process._child.pid, signal.SIGKILL)
    time.sleep(0.05)
    with pytest.raises(errors.IOFailed, match="stores objects was killed"):
        for one in contents(2000):
            process.put(one)
        process.finish()


def test_the_direct_storer_does_the_same_in_this_process(objects: ObjectStore) -> None:
    direct = smallobjects.DirectStorer(objects)
    digest = direct.put(b"y" * 100)
    direct.finish()
    direct.reset()
    direct.close()
    assert objects.read(digest, 1000) == b"y" * 100 and objects.stats.new == 1
