"""Share work out among threads, one for each processor. Knows nothing of the work."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

__all__ = ["Aside", "spread"]

Item = TypeVar("Item")


class Aside(threading.Thread):
    """A thread that can be waited for again after an interrupt, which `join` before Python 3.13 takes for its end."""

    def __init__(self, target: Callable[..., None], *arguments: object) -> None:
        super().__init__(target=target, args=arguments)
        self._done = threading.Event()

    def run(self) -> None:
        try:
            super().run()
        finally:
            self._done.set()

    def join(self, timeout: float | None = None) -> None:
        self._done.wait(timeout)
        super().join(timeout)


def spread(items: Sequence[Item], worker: Callable[[Iterator[Item]], None]) -> None:
    """Run `worker` in this thread and in others, each with an iterator over a share of `items`, until all are taken.

    A worker gets its next one when it asks for it: this thread's and every other one from the front, the rest from
    the back. So with large items first few threads at a time do small ones, which need the interpreter's lock all
    the time; it pays where workers mostly wait for system calls or hash, which release it. The first exception of
    any worker, an interrupt of this thread too, keeps the others from taking further items, and is raised here when
    they have ended.
    """
    errors: list[BaseException] = []
    pending = deque(items)

    def share(take: Callable[[], Item]) -> Iterator[Item]:
        while not errors:
            try:
                item = take()
            except IndexError:
                return
            yield item

    def run(take: Callable[[], Item]) -> None:
        try:
            worker(share(take))
        except BaseException as error:
            errors.append(error)

    threads: list[Aside] = []
    try:
        for number in range(min(len(os.sched_getaffinity(0)), len(items)) - 1):
            thread = Aside(run, pending.popleft if number % 2 else pending.pop)
            try:
                thread.start()
            except RuntimeError:
                break  # a limit on processes allows no further thread: those that there are do all of it
            threads.append(thread)
        run(pending.popleft)
        for thread in threads:
            thread.join()
    except BaseException as error:
        errors.append(error)
        for thread in threads:
            thread.join()
    if errors:
        raise errors[0]
