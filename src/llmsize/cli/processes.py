"""Independent pieces of work, done by as many processes as there are cores to run them."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")

MOST = 8
"""Processes; each copies the memory that it writes to, and more are not worth that."""
TICKET = 2
"""Bytes of an item's number, which are written and read whole."""
TICKETS = 4096
"""Bytes that any pipe holds."""


def divided(work: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """`work` of every item, in their order: what JSON can say, texts, numbers and lists of them.

    The other processes are copies of this one, where the system has them. What one learns the
    others do not, so that `work` has to give the same whatever it has seen before.
    """
    processes = min(_cores(), MOST, len(items))
    if processes < 2 or len(items) * TICKET > TICKETS or not _may_fork():
        return list(map(work, items))
    tickets = _tickets(len(items))
    helpers = list(_helpers(processes - 1, lambda: _taken(work, items, tickets)))
    done = dict(_taken(work, items, tickets))
    os.close(tickets)
    for helper, answers in helpers:
        with os.fdopen(answers) as opened:
            done |= _received(opened.read())
        os.waitpid(helper, 0)
    # what a helper had taken and did not finish is done here, and fails here if it fails
    return [done[number] if number in done else work(item) for number, item in enumerate(items)]


def _cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else 1


def _may_fork() -> bool:
    """Whether a copy of this process can go on: not of one with threads, whose locks stay shut."""
    threads = sys.modules.get("threading")
    return threads is None or threads.active_count() == 1


def _tickets(count: int) -> int:
    """The end of a pipe from which whoever is free takes the number of the next item."""
    reading, writing = os.pipe()
    os.write(writing, b"".join(number.to_bytes(TICKET, "big") for number in range(count)))
    os.close(writing)
    return reading


def _taken(work: Callable[[T], R], items: Sequence[T], tickets: int) -> Iterator[tuple[int, R]]:
    """The items that this process gets to, by number."""
    while ticket := os.read(tickets, TICKET):
        number = int.from_bytes(ticket, "big")
        yield number, work(items[number])


def _helpers(count: int, share: Callable[[], Iterable[object]]) -> Iterator[tuple[int, int]]:
    """Processes that work beside this one, each with the end of a pipe that it answers on."""
    with suppress(OSError):  # no more of them are allowed
        for _ in range(count):
            reading, writing = os.pipe()
            helper = os.fork()
            if not helper:
                _answer(writing, share)
            os.close(writing)
            yield helper, reading


def _answer(writing: int, share: Callable[[], Iterable[object]]) -> None:
    """Do a share of the work, write it down, and end without a trace."""
    try:
        with os.fdopen(writing, "w") as answers:
            json.dump(list(share()), answers)
    finally:
        os._exit(0)


def _received(answers: str) -> dict[int, R]:
    """What a helper has done; nothing of one that was ended."""
    try:
        return dict(json.loads(answers))
    except ValueError:
        return {}
