from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stockade.build.permissions import Ownership, reduced_directory, reduced_file, state

MODES = st.integers(0, 0o7777)
IDS = st.integers(0, 65535)


def allowed(mode: int, uid: int, gid: int, *, as_uid: int, as_gid: int) -> int:
    """Read and execute bits that the kernel grants (path_resolution(7))."""
    if as_uid == uid:
        return mode >> 6 & 5
    return mode >> 3 & 5 if as_gid == gid else mode & 5


@given(MODES, IDS, IDS, IDS, IDS)
def test_nobody_but_root_gains_or_loses_the_right_to_a_file(
    mode: int, uid: int, gid: int, as_uid: int, as_gid: int
) -> None:
    as_uid, as_gid = as_uid or 1, as_gid or 1
    made = reduced_file(mode, uid, gid)
    assert allowed(*made, as_uid=as_uid, as_gid=as_gid) == allowed(mode, uid, gid, as_uid=as_uid, as_gid=as_gid)
    assert made.mode & 0o7222 == 0


@given(MODES, IDS, IDS, IDS, IDS)
def test_nobody_but_root_gains_or_loses_the_right_to_a_directory(
    mode: int, uid: int, gid: int, as_uid: int, as_gid: int
) -> None:
    as_uid, as_gid = as_uid or 1, as_gid or 1
    made = reduced_directory(mode, uid, gid)
    assert allowed(*made, as_uid=as_uid, as_gid=as_gid) == allowed(mode, uid, gid, as_uid=as_uid, as_gid=as_gid)
    assert made.mode & 0o7022 == 0
    assert made.uid == 0 or made.mode & 0o200 == 0


@pytest.mark.parametrize(
    ("mode", "uid", "gid", "expected"),
    [
        (0o644, 33, 33, Ownership(0o444, 0, 0)),
        (0o755, 0, 0, Ownership(0o555, 0, 0)),
        (0o640, 0, 42, Ownership(0o440, 0, 42)),
        (0o600, 33, 33, Ownership(0o400, 33, 0)),
        (0o4755, 0, 0, Ownership(0o555, 0, 0)),
        (0o2755, 0, 42, Ownership(0o555, 0, 0)),
        (0o666, 0, 0, Ownership(0o444, 0, 0)),
        (0o644, 1 << 20, 1 << 20, Ownership(0o444, 0, 0)),
    ],
)
def test_files_become_roots_as_far_as_they_still_work(mode: int, uid: int, gid: int, expected: Ownership) -> None:
    assert reduced_file(mode, uid, gid) == expected


def test_setuid_stays_only_where_it_is_allowed() -> None:
    assert reduced_file(0o4755, 0, 42, setuid=True) == Ownership(0o4555, 0, 42)


def test_directories_are_writable_by_root_alone() -> None:
    assert reduced_directory(0o1777, 0, 0) == Ownership(0o755, 0, 0)
    assert reduced_directory(0o2775, 0, 50) == Ownership(0o755, 0, 0)
    assert reduced_directory(0o750, 33, 4) == Ownership(0o550, 33, 4)


def test_state_stays_writable_for_its_owner() -> None:
    assert state(0o660, 33, 33, directory=False) == Ownership(0o660, 33, 33)
    assert state(0o777, 33, 33, directory=True) == Ownership(0o775, 33, 33)
    assert state(0o1777, 0, 0, directory=True) == Ownership(0o1777, 0, 0)
