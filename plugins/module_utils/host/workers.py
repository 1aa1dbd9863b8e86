# Copyright (c) composefs.oci contributors
# SPDX-License-Identifier: BSD-2-Clause

"""Many tasks of one kind, spread over several processes: a process that is done with one takes the next.

Also how a process makes itself less important than others.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import struct
from collections.abc import Callable, Iterator
from typing import Any

from . import processes
from ..errors import from_values, to_values

# ioprio_set(2) has no wrapper in the C library, and another number on every kind of machine.
_IOPRIO_SET = {
    "x86_64": 251,
    "i686": 289,
    "aarch64": 30,
    "riscv64": 30,
    "loongarch64": 30,
    "armv7l": 314,
    "ppc64le": 273,
    "s390x": 282,
}
IO_CLASSES = {"best-effort": (2, 7), "idle": (3, 0)}
"""Names of classes of input and output, and class and level of each for the kernel: always the lowest level."""


def yield_to_others(nice: int | None, io_class: str | None) -> None:
    """Lower the priority of this process for good: by ``nice`` (0 to 19), and for input and output to a class of
    IO_CLASSES. Where the number of the kernel's call is not known here, the class stays.
    """
    if nice:
        os.nice(nice)
    number = _IOPRIO_SET.get(os.uname().machine)
    if io_class and number is not None:
        kind, level = IO_CLASSES[io_class]
        try:
            import ctypes
        except ImportError:
            return  # a Python built without it
        ctypes.CDLL(None).syscall(number, 1, 0, kind << 13 | level)


def spread(
    what: str,
    tasks: int,
    work: Callable[[int, Callable[[Any], None]], None],
    take: Callable[[Any], None],
    count: int,
) -> None:
    """Have ``work(number, tell)`` done for every number below ``tasks`` by ``count`` processes.

    What a worker passes to ``tell`` (small values that JSON knows) arrives in ``take`` in this process, in no order.
    The first error of a worker ends all of them and is raised here; ``what`` is what they do, such as ``checks
    objects``. With one process, or one task, the work is done in this process.
    """
    with begin(what, tasks, work, count) as finish:
        finish(take)


@contextlib.contextmanager
def begin(
    what: str, tasks: int, work: Callable[[int, Callable[[Any], None]], None], count: int
) -> Iterator[Callable[[Callable[[Any], None]], None]]:
    """The same while this process does something else. The block gets a function ``finish(take)``, which returns when
    the work is done. Until it is called, a worker that has told a few hundred things waits. Workers end with the block.

    With one process, or one task, the work is done in this process, and only when ``finish`` is called.
    """

    def alone(take: Callable[[Any], None]) -> None:
        for number in range(tasks):
            work(number, take)

    def listen(take: Callable[[Any], None]) -> None:
        with selectors.DefaultSelector() as selector:
            for worker in workers:
                selector.register(worker.connection, selectors.EVENT_READ, worker)
            running = len(workers)
            while running:
                for key, _events in selector.select():
                    message = key.data.receive()
                    if "error" in message:
                        raise from_values(message["error"])
                    if "value" in message:
                        take(message["value"])
                    else:
                        selector.unregister(key.fileobj)
                        running -= 1

    if min(count, tasks) <= 1:
        yield alone
        return
    workers: list[processes.Child] = []

    def leave() -> None:
        for worker in workers:
            worker.connection.close()

    # The pipe holds nothing but the number of the next task: the worker that takes it out puts the one after it in.
    numbers = os.pipe()
    try:
        os.write(numbers[1], _NUMBER.pack(0))
        for _worker in range(min(count, tasks)):
            workers.append(
                processes.Child(what, lambda connection: _serve(what, work, tasks, numbers, connection), leave)
            )
        yield listen
    finally:
        for fd in numbers:
            os.close(fd)
        for worker in workers:
            worker.close()


_NUMBER = struct.Struct("=Q")


def _serve(
    what: str,
    work: Callable[[int, Callable[[Any], None]], None],
    tasks: int,
    numbers: tuple[int, int],
    connection: socket.socket,
) -> None:
    def tell(value: Any) -> None:
        processes.tell(connection, {"value": value})

    try:
        while True:
            (number,) = _NUMBER.unpack(os.read(numbers[0], _NUMBER.size))
            os.write(numbers[1], _NUMBER.pack(min(number + 1, tasks)))
            if number == tasks:
                break
            work(number, tell)
        processes.tell(connection, {"done": True})
    except BaseException as error:
        processes.tell(connection, {"error": to_values(processes.explain(error, f"The process that {what}"))})
