"""A guest is started when its service answers: its image names the port."""

from __future__ import annotations

import time
from pathlib import Path

import msgspec
import pytest
from machine import Guests, make_tree, needs_uml

from stockade import machines
from stockade.errors import ServiceError
from stockade.records.image import Image, ImageStart
from stockade.vm import control, images, staging

PORT = 8088


def image_of(guests: Guests, tmp_path: Path, program: str) -> Image:
    needs_uml()
    tree = make_tree(tmp_path / "root", program=f"#!/bin/sh\n{program}\n")
    record = Image(
        name="ready", sha256="", size=0, mtime=0, origin="directory", source="busybox", ready_tcp=PORT,
        start=ImageStart(program="/program"),
    )  # fmt: skip
    if "ready" in images.names():
        images.remove("ready", [])
    return staging.image_of("ready", tree, record)


def test_start_returns_when_the_service_answers_not_before(guests: Guests, tmp_path: Path) -> None:
    image = image_of(guests, tmp_path, f"sleep 1; exec httpd -f -p {PORT} -h /srv")
    guests.create("late", image)
    begin = time.monotonic()
    guests.start("late").close()
    assert time.monotonic() - begin > 0.9
    status, _, _ = control.execute("late", ["/bin/sh", "-c", f"wget -q -O - http://127.0.0.1:{PORT}/"])
    assert status == 0


def test_service_that_never_answers_is_an_error_with_the_end_of_the_log_and_ends_the_guest(
    guests: Guests, tmp_path: Path
) -> None:
    image = image_of(guests, tmp_path, "echo no such configuration; exec sleep 1000")
    guests.create("mute", image)
    with pytest.raises(ServiceError, match=f"is to open port {PORT}, and has not within 1 s") as failure:
        machines.start_guest("mute", ready_s=1.0)
    assert "no such configuration" in failure.value.log
    assert failure.value.hint == "`stockade guest log mute` shows what it said"
    assert not control.is_running("mute")


def test_guest_that_ends_before_its_service_answers_says_so(guests: Guests, tmp_path: Path) -> None:
    image = image_of(guests, tmp_path, "exit 3")
    image = msgspec.structs.replace(image, start=msgspec.structs.replace(image.start, end=True))
    images.remove("ready", [])
    tree = tmp_path / "root"
    guests.create("short", staging.image_of("ready", tree, image))
    with pytest.raises(ServiceError, match="ended before it"):
        machines.start_guest("short", ready_s=20.0)


def test_nothing_is_waited_for_where_nobody_asks(guests: Guests, tmp_path: Path) -> None:
    image = image_of(guests, tmp_path, "exec sleep 1000")
    guests.create("careless", image)
    started = machines.start_guest("careless", await_service=False)
    guests.seen.note("careless")
    started.close()
    assert control.is_running("careless")
