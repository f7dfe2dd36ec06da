"""Work that several processes divide: the same answers in the same order, whatever happens."""

from __future__ import annotations

import json
import os
import sys
import threading

import pytest

from llmsize.cli import processes, run

FORKS = pytest.mark.skipif(sys.platform != "linux", reason="other systems work in turn")


@pytest.fixture(autouse=True)
def _three_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as it takes to divide, on a machine of one core, too."""
    monkeypatch.setattr(processes, "_cores", lambda: 3)


def test_all_items_are_worked_on_in_their_order() -> None:
    """Whoever takes an item, its answer comes at its place."""
    assert processes.divided(lambda n: n * n, range(1000)) == [n * n for n in range(1000)]


@FORKS
def test_several_processes_take_part() -> None:
    """While one waits for another at a barrier of files, both have taken an item."""
    reading, writing = os.pipe()

    def meet(item: int) -> int:
        if item:
            os.write(writing, b".")
        else:
            os.read(reading, 1)  # returns when the other item is worked on
        return os.getpid()

    assert len(set(processes.divided(meet, [0, 1]))) == 2


@FORKS
def test_what_a_lost_helper_had_taken_is_done() -> None:
    """A process that the system ends leaves no gap."""
    first = os.getpid()

    def work(item: int) -> int:
        if os.getpid() != first:
            os._exit(9)
        return item

    assert processes.divided(work, range(50)) == list(range(50))


def test_a_mistake_is_not_swallowed() -> None:
    """What fails in another process fails here, too."""
    with pytest.raises(ZeroDivisionError):
        processes.divided(lambda n: 1 // n, [1, 1, 1, 0, 1, 1])


def test_a_process_with_threads_is_not_copied() -> None:
    """Their locks would stay shut in the copy."""
    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    try:
        assert set(processes.divided(lambda _: os.getpid(), range(50))) == {os.getpid()}
    finally:
        done.set()
        thread.join()


def test_a_catalogue_is_the_same_in_turn(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The answer has the same bytes whether processes divide it or not."""
    words = ["fits", "--vram", "6GB", "--family", "qwen3", "--all", "--format", "json"]
    assert run(words) == 0
    divided = json.loads(capsys.readouterr().out)
    monkeypatch.setattr(processes, "_cores", lambda: 1)
    assert run(words) == 0
    assert json.loads(capsys.readouterr().out) == divided
