"""Work that is shared out is done once, in order of taking, and ends with the first failure."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator

import pytest

from stockade.spread import spread


@pytest.fixture
def four_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3})


@pytest.mark.parametrize("count", [0, 1, 2, 1000])
def test_each_item_is_taken_once(count: int, four_processors: None) -> None:
    taken: list[int] = []

    def worker(share: Iterator[int]) -> None:
        taken.extend(share)

    spread(range(count), worker)
    assert sorted(taken) == list(range(count))


def test_as_many_work_at_a_time_as_there_are_processors(four_processors: None) -> None:
    together = threading.Barrier(4, timeout=30)

    def worker(share: Iterator[int]) -> None:
        for _ in share:
            together.wait()

    spread(range(4), worker)
    assert not together.broken


def test_a_failure_is_raised_and_keeps_the_others_from_going_on(four_processors: None) -> None:
    before = threading.active_count()
    failed = threading.Event()
    after: list[int] = []

    def worker(share: Iterator[int]) -> None:
        for item in share:
            if item == 0:
                failed.set()
                raise ValueError("the first")
            failed.wait(30)
            after.append(item)

    with pytest.raises(ValueError, match="the first"):
        spread(range(100_000), worker)
    assert len(after) < 100_000 - 1
    assert threading.active_count() == before


def test_where_no_thread_is_allowed_one_does_it_all(four_processors: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    taken: list[int] = []
    spread(range(100), taken.extend)
    assert taken == list(range(100))


def test_an_interrupt_ends_all_workers(four_processors: None) -> None:
    main = threading.main_thread()
    interrupted, before = threading.Event(), threading.active_count()

    def worker(share: Iterator[int]) -> None:
        for _ in share:
            if threading.current_thread() is main:
                interrupted.set()
                raise KeyboardInterrupt
            interrupted.wait(30)

    with pytest.raises(KeyboardInterrupt):
        spread(range(100_000), worker)
    assert threading.active_count() == before


def test_an_interrupt_of_the_wait_waits_for_all_workers_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    main = threading.main_thread()
    ended: list[str] = []
    both = threading.Barrier(2, timeout=30)

    def waits() -> bool:
        assert main.ident is not None
        frame = sys._current_frames()[main.ident]
        names = {frame.f_code.co_name for frame, _ in traceback.walk_stack(frame)}
        return frame.f_code.co_filename == threading.__file__ and "join" in names

    def worker(share: Iterator[int]) -> None:
        for _ in share:
            both.wait()
            if threading.current_thread() is main:
                continue
            deadline = time.monotonic() + 30
            while not waits() and time.monotonic() < deadline:
                time.sleep(0.001)
            signal.pthread_kill(main.ident or 0, signal.SIGINT)
            time.sleep(0.1)  # for a wait that would be too short: none passes for a long one
            ended.append("worker")

    with pytest.raises(KeyboardInterrupt):
        spread(range(2), worker)
    assert ended == ["worker"]
