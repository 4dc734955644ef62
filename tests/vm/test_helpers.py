"""What runs beside UML for its network: steps that wait are told from those that fail, and all of it ends."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from machine import alive

from stockade.vm.helpers import Helpers


@pytest.fixture
def helpers() -> Iterator[Helpers]:
    made = Helpers()
    yield made
    pids = made.pids()
    made.end()
    assert not [pid for pid in pids if alive(pid)]


def test_a_socket_that_is_bound_and_not_listened_on_yet_is_waited_for(helpers: Helpers, tmp_path: Path) -> None:
    path = str(tmp_path / "api")
    step = {"request": {"execute": "list"}, "api": path}
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
        server.bind(path)
        assert helpers.carry_out(step) is False
        server.listen(1)
        seen: list[object] = []

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                seen.append(json.loads(connection.recv(4096)))
                connection.sendall(b'{"return": {}}')

        thread = threading.Thread(target=answer)
        thread.start()
        assert helpers.carry_out(step) is True
        thread.join(10)
    assert seen == [{"execute": "list"}]


def test_a_helper_that_has_ended_is_an_error_with_what_it_said(helpers: Helpers, tmp_path: Path) -> None:
    helpers.carry_out({"start": ["sh", "-c", "echo why >&2; exit 3"]})
    with pytest.raises(RuntimeError, match="why"):
        while not helpers.carry_out({"await": str(tmp_path / "never")}):
            pass


def test_a_command_that_fails_is_an_error(helpers: Helpers) -> None:
    with pytest.raises(RuntimeError, match="`sh -c` failed: no such luck"):
        helpers.carry_out({"run": ["sh", "-c", "echo no such luck >&2; exit 1"]})


def test_every_helper_ends(helpers: Helpers) -> None:
    helpers.carry_out({"start": ["sleep", "100"]})
    helpers.carry_out({"start": ["sleep", "100"]})
    assert all(alive(pid) for pid in helpers.pids())
