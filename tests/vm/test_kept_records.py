"""The records of guests whose makers were killed: each is kept, and none in the place of another."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from conftest import NewGuest

from stockade import machines, places
from stockade.errors import StateError
from stockade.records.guest import Guest
from stockade.vm import record, store

NOBODY = (1 << 22, 1)  # a maker that is gone: no process has a pid that great (PID_MAX_LIMIT)


@pytest.fixture
def dead(new_guest: NewGuest, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Guest]]:
    """Two recorded guests of one jail, both of a dead maker, in a second that does not pass."""
    second = time.gmtime(1)
    monkeypatch.setattr(time, "gmtime", lambda *_: second)
    found = []
    for _ in range(2):
        guest = msgspec.structs.replace(new_guest(), jail="web", record=True, maker=NOBODY)
        store.save(guest)
        (places.guest(guest.name) / record.NAME).write_text(guest.name)
        found.append(guest)
    yield found
    for path in kept():
        path.unlink()


def kept() -> list[Path]:
    return sorted(places.records().glob("web-*.log"))


def test_records_of_guests_that_are_swept_in_the_same_second_are_all_kept(dead: list[Guest]) -> None:
    machines.sweep()
    assert not {guest.name for guest in dead} & set(store.names())
    assert sorted(path.read_text() for path in kept()) == sorted(guest.name for guest in dead)


def test_record_that_would_replace_another_stays_with_its_guest(dead: list[Guest]) -> None:
    first, second = dead
    path = machines.keep_record(first.name)
    assert path is not None
    other = path.with_name(path.name.replace(first.name, second.name))
    path.rename(other)
    with pytest.raises(StateError, match="is there already"):
        machines.keep_record(second.name)
    machines.sweep()
    assert second.name in store.names() and other.read_text() == first.name
    assert (places.guest(second.name) / record.NAME).read_text() == second.name
