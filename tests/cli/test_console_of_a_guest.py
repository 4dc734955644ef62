"""The console of a guest in the foreground, with a keeper that is played."""

from __future__ import annotations

import socket

import pytest

from stockade.cli import behind
from stockade.errors import StateError
from stockade.vm import control


def test_whoever_reads_too_slowly_is_told_and_gets_what_comes_after(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    said = [b"one\n", b"two\n"]

    def connect(name: str) -> socket.socket:
        if not said:
            raise StateError(f"guest `{name}` is not running")
        ours, keepers = socket.socketpair()
        keepers.sendall(said.pop(0))
        keepers.close()  # as it lets go of one whose backlog is too long
        return ours

    monkeypatch.setattr(control, "connect", connect)
    monkeypatch.setattr(control, "ask", lambda *_: {})

    class Started:
        name = "guest"

        def wait(self) -> int:
            return 3

    assert behind._watch(Started()) == 3  # type: ignore[arg-type]
    seen = capfd.readouterr()
    assert seen.out == "one\ntwo\n"
    assert seen.err.count("left out") == 1
