"""One home for all tests of guests, with a tiny image in it, and guests that end with their test."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from machine import Guests, leftovers, make_image, make_tree, needs_uml, until

from stockade.records.image import Image


@pytest.fixture(scope="session")
def guest_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stockade's home for the whole run: images and the jail around UML are made once."""
    return tmp_path_factory.mktemp("guests")


@pytest.fixture
def home(guest_home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The home, as this process has it during a test."""
    monkeypatch.setenv("STOCKADE_HOME", str(guest_home))
    return guest_home


@pytest.fixture
def empty_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of the test's own, with nothing in it."""
    monkeypatch.setenv("STOCKADE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture(scope="session")
def tiny_image(guest_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Image:
    """An image of busybox alone."""
    needs_uml()
    if os.geteuid() != 0:
        pytest.skip("run as root: its guests get ids of their own; an ordinary user's are in test_ordinary_guests.py")
    before = os.environ.get("STOCKADE_HOME")
    os.environ["STOCKADE_HOME"] = str(guest_home)
    try:
        return make_image("tiny", make_tree(tmp_path_factory.mktemp("tree") / "root"))
    finally:
        if before is None:
            del os.environ["STOCKADE_HOME"]
        else:
            os.environ["STOCKADE_HOME"] = before


@pytest.fixture
def guests(home: Path, tiny_image: Image) -> Iterator[Guests]:
    """Makes guests; after the test none of them, no process of theirs and nothing half made may be left."""
    made = Guests(tiny_image)
    try:
        yield made
    finally:
        made.end()
    assert until(lambda: not made.seen.left()), made.seen.left()
    assert leftovers() == []
