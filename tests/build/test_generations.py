from __future__ import annotations

import os
from pathlib import Path

import pytest

from stockade import places
from stockade.build.generations import Store
from stockade.build.leftovers import sweep_removed
from stockade.build.lock import encode
from stockade.errors import NotFoundError, StateError, UsageError
from stockade.records.lock import Lock, LockedSpec

LOCK = Lock(spec=LockedSpec(name="j", sha256="0"), architecture="x86_64")

pytestmark = pytest.mark.usefixtures("home")


def commit(store: Store, text: str = "") -> int:
    with store.new() as building:
        (building.path / "lock.json").write_bytes(encode(LOCK))
        (building.path / "rootfs").mkdir()
        (building.path / "rootfs/file").write_text(text)
        building.commit()
        return building.number


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", "A", ".hidden", "a\n", "a" * 64, "-a"])
def test_a_name_that_could_leave_the_directory_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="is no name for a jail"):
        Store(name)


def test_the_first_generation_is_one_and_current() -> None:
    store = Store("j")
    assert store.current() is None
    assert commit(store) == 1
    current = store.current()
    assert current is not None
    assert (current.number, current.rootfs) == (1, places.jail("j") / "generations/0001/rootfs")
    assert os.readlink(places.jail("j") / "current") == "generations/0001"


def test_what_a_jail_keeps_is_its_owners_alone() -> None:
    commit(Store("j"))
    assert places.jail("j").stat().st_mode & 0o777 == 0o700


def test_a_build_without_commit_leaves_nothing() -> None:
    store = Store("j")
    commit(store, "old")
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error), store.new() as building:
            (building.path / "rootfs").mkdir()
            raise error
    assert store.generations() == (1,)
    assert os.listdir(places.jail("j") / "generations") == ["0001"]
    assert (places.jail("j") / "current/rootfs/file").read_text() == "old"


def test_the_last_three_stay() -> None:
    store = Store("j")
    for _ in range(5):
        commit(store)
    assert store.generations() == (3, 4, 5)
    assert len(os.listdir(places.jail("j") / "generations")) == 3


def test_a_generation_in_use_stays_until_it_is_let_go() -> None:
    store = Store("j", keep=1)
    commit(store)
    with store.hold(1):
        commit(store)
        assert store.generations() == (1, 2)
        with pytest.raises(StateError, match="generation 1 of jail `j` is in use"):
            store.remove()
    assert store.prune(1) == (1,)
    assert store.generations() == (2,)


def test_rollback_goes_back_one_and_a_new_build_goes_past_all() -> None:
    store = Store("j")
    for text in "abc":
        commit(store, text)
    assert store.rollback().number == 2
    assert (places.jail("j") / "current/rootfs/file").read_text() == "b"
    assert store.rollback(3).number == 3
    store.rollback(1)
    with pytest.raises(NotFoundError, match="no generation before the current one"):
        store.rollback()
    assert commit(store) == 4
    assert store.current_number() == 4


def test_pruning_never_takes_the_current_generation() -> None:
    store = Store("j")
    for _ in range(3):
        commit(store)
    store.rollback(1)
    assert store.prune(1) == (2,)
    assert store.generations() == (1, 3)


def test_a_generation_that_is_not_there_is_named() -> None:
    store = Store("j")
    commit(store)
    with pytest.raises(NotFoundError) as caught:
        store.rollback(7)
    assert caught.value.message == "jail `j` has no generation 7"
    assert caught.value.hint == "there are: 1"


def test_two_builds_of_one_jail_do_not_collide() -> None:
    store = Store("j")
    commit(store)
    with store.new() as building:
        (building.path / "mark").touch()
        for attempt in (Store("j").new().__enter__, Store("j").rollback, Store("j").remove):
            with pytest.raises(StateError, match="is being built or removed by another process"):
                attempt()
        assert Store("j").sweep() == 0
        assert (building.path / "mark").exists()
        with Store("k").new():
            pass


def test_sweeping_removes_what_the_dead_left() -> None:
    store = Store("j")
    commit(store)
    generations = places.jail("j") / "generations"
    (generations / ".building-1-x/rootfs").mkdir(parents=True)
    (generations / ".removing-y/rootfs").mkdir(parents=True)
    (places.jail("j") / ".current-9").symlink_to("generations/0009")
    assert store.sweep() == 2
    assert os.listdir(generations) == ["0001"]
    assert sorted(os.listdir(places.jail("j"))) == ["current", "generations"]
    assert Store("never-built").sweep() == 0
    assert not places.jail("never-built").exists()


def test_removal_takes_everything_and_a_killed_one_is_finished_later(tmp_path: Path) -> None:
    store = Store("j")
    commit(store)
    (tmp_path / "kept").write_text("outside")
    store.volumes.mkdir()
    (store.volumes / "link").symlink_to(tmp_path)
    store.remove()
    assert os.listdir(places.jails()) == []
    assert (tmp_path / "kept").read_text() == "outside"
    (places.jails() / ".removing-k-0/secrets").mkdir(parents=True)
    assert sweep_removed(None) == 1
    assert os.listdir(places.jails()) == []
    with pytest.raises(NotFoundError, match="there is no jail `j`"):
        store.remove()


def test_a_damaged_lock_is_reported() -> None:
    store = Store("j")
    commit(store)
    (places.jail("j") / "generations/0001/lock.json").write_text("{")
    with pytest.raises(StateError, match="is damaged"):
        store.current()
