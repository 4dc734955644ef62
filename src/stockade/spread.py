"""Share work out among threads, one for each processor. Knows nothing of the work."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

__all__ = ["spread"]

Item = TypeVar("Item")


def spread(items: Sequence[Item], worker: Callable[[Iterator[Item]], None]) -> None:
    """Run `worker` in this thread and in others, each with an iterator over a share of `items`, until all are taken.

    The items are taken in order; a worker gets its next one when it asks for it. It pays where workers mostly wait for
    system calls or hash, which release the interpreter's lock. The first exception of any worker, an interrupt of this
    thread too, keeps the others from taking further items, and is raised here when they have ended.
    """
    errors: list[BaseException] = []
    pending = iter(items)
    lock = threading.Lock()

    def share() -> Iterator[Item]:
        while not errors:
            with lock:
                try:
                    item = next(pending)
                except StopIteration:
                    return
            yield item

    def run() -> None:
        try:
            worker(share())
        except BaseException as error:
            errors.append(error)

    threads: list[threading.Thread] = []
    try:
        for _ in range(min(len(os.sched_getaffinity(0)), len(items)) - 1):
            thread = threading.Thread(target=run)
            try:
                thread.start()
            except RuntimeError:
                break  # a limit on processes allows no further thread: those that there are do all of it
            threads.append(thread)
        run()
        for thread in threads:
            thread.join()
    except BaseException as error:
        errors.append(error)
        for thread in threads:
            thread.join()
    if errors:
        raise errors[0]
