"""What a name that nothing has is told: the nearest that there is, and the command that lists them."""

from __future__ import annotations

from pathlib import Path

import pytest
from commandline import Run

from stockade.errors import NotFoundError
from stockade.vm import snapshots


def keep(home: Path, *records: str) -> None:
    """Have something in `home`, as far as its name goes."""
    for record in records:
        path = home / "state" / record
        path.parent.mkdir(parents=True)
        path.write_text("{}")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["guest", "log", "shpo"], "there is no guest `shpo`, did you mean `shop`?"),
        (["guest", "log", "zzz"], "there is no guest `zzz`"),
        (["image", "inspect", "shpo"], "there is no image `shpo`, did you mean `shop`?"),
        (["image", "rm", "shpo"], "there is no image `shpo`, did you mean `shop`?"),
    ],
)
def test_guest_or_image_that_is_not_there(stockade: Run, home: Path, words: list[str], message: str) -> None:
    keep(home, f"{words[0]}s/shop/{words[0]}.json")
    done = stockade(*words)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"error: {message}\nhint: `stockade {words[0]} list` shows what there is\n"


def test_snapshot_that_is_not_there(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STOCKADE_HOME", str(home))
    keep(home, "guests/shop/snapshots/good/snapshot.json")
    with pytest.raises(NotFoundError) as caught:
        snapshots.load("shop", "god")
    assert caught.value.message == "guest `shop` has no snapshot `god`, did you mean `good`?"
    assert caught.value.hint == "`stockade snapshot list shop` shows what there is"
