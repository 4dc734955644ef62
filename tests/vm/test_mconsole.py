"""The management console: requests and replies as the kernel has them, and no answer that makes it hang or crash."""

from __future__ import annotations

import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from machine import Guests

from stockade.errors import StateError
from stockade.vm import control
from stockade.vm.mconsole import Console

MAGIC, VERSION = 0xCAFEBABE, 2
Answer = Callable[[str], list[bytes]]


def reply(text: str, *, error: int = 0, more: int = 0) -> bytes:
    """struct mconsole_reply of arch/um/include/shared/mconsole.h."""
    data = text.encode() + b"\0"
    return struct.pack("=III", error, more, len(data)) + data


class Kernel:
    """Answers one request as a kernel would, or would not."""

    def __init__(self, answer: Answer) -> None:
        self.seen: list[tuple[int, int, str]] = []
        self._answer = answer
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind("mconsole")
        self.socket.settimeout(10)
        self.thread = threading.Thread(target=self._serve)
        self.thread.start()

    def _serve(self) -> None:
        data, client = self.socket.recvfrom(65536)
        magic, version, length = struct.unpack_from("=III", data)
        command = data[12 : 12 + length].decode()
        self.seen.append((magic, version, command))
        assert len(data) == 12 + 512
        for part in self._answer(command):
            self.socket.sendto(part, client)

    def end(self) -> None:
        self.thread.join(10)
        self.socket.close()


@pytest.fixture
def ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Answer], tuple[Console, Kernel]]]:
    monkeypatch.chdir(tmp_path)
    made: list[tuple[Console, Kernel]] = []

    def begin(answer: Answer) -> tuple[Console, Kernel]:
        pair = Console("mconsole", "client"), Kernel(answer)
        made.append(pair)
        return pair

    yield begin
    for console, kernel in made:
        kernel.end()
        console.close()
    assert "client" not in os.listdir(tmp_path)


def test_a_request_has_the_kernels_form_and_its_reply_is_given_back(ask: Callable[..., tuple[Console, Kernel]]) -> None:
    console, kernel = ask(lambda command: [reply(f"OK {command}")])
    assert console.request("config ubd0") == "OK config ubd0"
    kernel.thread.join(5)
    assert kernel.seen == [(MAGIC, VERSION, "config ubd0")]


def test_a_reply_in_parts_is_put_together(ask: Callable[..., tuple[Console, Kernel]]) -> None:
    console, _ = ask(lambda _: [reply("one ", more=1), reply("two ", more=1), reply("three")])
    assert console.request("log").split() == ["one", "two", "three"]


def test_a_refusal_is_an_error_with_what_the_kernel_says(ask: Callable[..., tuple[Console, Kernel]]) -> None:
    console, _ = ask(lambda _: [reply("no such device", error=1)])
    with pytest.raises(StateError, match="refused `remove ubd7`: no such device"):
        console.request("remove ubd7")


def test_no_answer_is_a_timeout(ask: Callable[..., tuple[Console, Kernel]]) -> None:
    console, _ = ask(lambda _: [])
    with pytest.raises(TimeoutError, match="did not answer to `version`"):
        console.request("version", timeout_s=0.2)


def test_a_malformed_answer_is_an_error(ask: Callable[..., tuple[Console, Kernel]]) -> None:
    console, _ = ask(lambda _: [b"short"])
    with pytest.raises(StateError, match="malformed answer"):
        console.request("version")


def test_a_command_that_is_too_long_is_refused_before_it_is_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    console = Console("mconsole", "client")
    try:
        with pytest.raises(StateError, match="too long"):
            console.request("x" * 513)
    finally:
        console.close()


def test_a_console_that_is_not_there_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    console = Console("mconsole", "client")
    try:
        with pytest.raises(StateError, match="no management console"):
            console.request("version")
    finally:
        console.close()


@pytest.mark.parametrize("walls", (("vm",), ("jail", "vm")), ids=",".join)
def test_a_real_kernel_answers_through_its_keeper(guests: Guests, walls: tuple[str, ...]) -> None:
    name = guests.run("asked", walls=walls).name
    assert "Linux" in control.request(name, "mconsole", command="version")["answer"]
    assert "disk.cow" in control.request(name, "mconsole", command="config ubd0")["answer"]
    with pytest.raises(StateError, match="refused"):
        control.request(name, "mconsole", command="config nothing0")
