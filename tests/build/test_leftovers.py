"""What failed and killed builds leave is found and removed; what lives or was built stays."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from stockade import places
from stockade.build.generations import Store
from stockade.build.leftovers import attempt, sweep
from stockade.errors import StateError

pytestmark = pytest.mark.usefixtures("home")


def commit(store: Store) -> None:
    with store.new() as building:
        (building.path / "lock.json").write_text("{}")
        building.commit()


def secret(store: Store) -> Path:
    (store.secrets / "key").mkdir(parents=True)
    return store.secrets / "key"


def test_first_build_that_fails_leaves_nothing_of_the_jail() -> None:
    store = Store("j")
    with pytest.raises(ZeroDivisionError), attempt(store):
        secret(store)
        raise ZeroDivisionError
    assert os.listdir(places.jails()) == []


def test_later_build_that_fails_leaves_the_jail_with_its_secrets() -> None:
    store = Store("j")
    with attempt(store):
        key = secret(store)
        commit(store)
    with pytest.raises(ZeroDivisionError), attempt(store):
        raise ZeroDivisionError
    assert store.generations() == (1,)
    assert key.is_dir()


def test_sweeping_takes_what_was_never_built_and_not_what_is_being_built() -> None:
    store, dead = Store("living"), Store("dead")
    secret(dead)
    (dead.directory / "generations/.building-1-x").mkdir(parents=True)
    with attempt(store):
        secret(store)
        sweep()
        assert os.listdir(places.jails()) == ["living"]
        with attempt(Store("living")):
            pass
        assert store.secrets.is_dir()
        commit(store)
    sweep()
    assert store.generations() == (1,)


def test_jail_that_keeps_volumes_is_not_swept() -> None:
    store = Store("j")
    store.volumes.mkdir(parents=True)
    sweep("j")
    assert store.volumes.is_dir()


def test_jail_that_is_being_built_cannot_be_removed() -> None:
    store = Store("j")
    commit(store)
    with attempt(store):
        with pytest.raises(StateError, match="jail `j` is being built or removed by another process"):
            Store("j").remove()
        assert store.generations() == (1,)
    Store("j").remove()
    assert os.listdir(places.jails()) == []


def test_what_is_no_jail_is_left_alone() -> None:
    (places.jails() / "Not A Name").mkdir(parents=True)
    sweep()
    assert os.listdir(places.jails()) == ["Not A Name"]
