"""What a service leaves in a volume cannot keep its jail from being removed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from stockade import places
from stockade.build.generations import Store
from stockade.build.leftovers import sweep


@pytest.mark.slow
def test_jail_whose_volume_is_deeper_than_any_path_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.geteuid() != 0:
        pytest.skip("run as root: an ordinary user's jails are removed within a range of ids")
    monkeypatch.setenv("STOCKADE_HOME", str(tmp_path))
    (places.jail("test") / "generations/0001").mkdir(parents=True)
    volume = places.jail("test") / "volumes/data"
    volume.mkdir(parents=True)
    at = os.open(volume, os.O_RDONLY)
    for _ in range(1200):
        os.mkdir("x", dir_fd=at)
        inner = os.open("x", os.O_RDONLY, dir_fd=at)
        os.close(at)
        at = inner
    os.close(at)
    Store("test").remove()
    sweep()
    assert os.listdir(places.jails()) == []
