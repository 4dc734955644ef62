from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import buildbench
import pytest


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A place of the test's own for everything that Stockade keeps."""
    monkeypatch.setenv("STOCKADE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def as_root() -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root, to give files other owners")


@pytest.fixture
def user() -> Iterator[buildbench.User]:
    """An ordinary user with 65536 subordinate ids."""
    for home in buildbench.home():
        yield buildbench.User(home, count=65536)


@pytest.fixture
def user_without_range() -> Iterator[buildbench.User]:
    """An ordinary user without subordinate ids."""
    for home in buildbench.home():
        yield buildbench.User(home, count=0)
