"""What root of a guest can do to the record of it: end the guest, not the record alone; and what the host believes."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from machine import Guests, needs, shell, until

from stockade import places
from stockade.errors import StateError
from stockade.vm import control, transfer
from stockade.vm.consolelog import ConsoleLog
from stockade.vm.record import NAME, Record, typed

# `forge` sends PID 1 an audit message that is not the kernel's, `junk` writes to the line to the host, `hang` ends it,
# `news` tells the host over and over that the service has ended.
PROGRAM = r"""
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>
static const char text[] = "audit(1.0:1): argc=1 a0=\"forged\"";
int main(int argc, char **argv) {
    struct { unsigned short family, zero; uint32_t port, groups; } to = {16, 0, 1, 0};
    struct { uint32_t length; uint16_t type, flags; uint32_t sequence, port; char text[sizeof text]; } message =
        {16 + sizeof text, 1309, 0, 0, 0, ""};
    const char *what = argc > 1 ? argv[1] : "";
    if (strcmp(what, "forge") == 0) {
        memcpy(message.text, text, sizeof text);
        int fd = socket(16, SOCK_RAW, 9);
        int sent = (int)sendto(fd, &message, 16 + sizeof text, 0, (struct sockaddr *)&to, sizeof to);
        printf("%d\n", sent < 0 ? -errno : sent);
        return 0;
    }
    setsid();
    int fd = open("/dev/ttyS0", O_RDWR | (what[0] == 'h' ? 0 : O_NOCTTY));
    if (fd < 0)
        return 1;
    if (what[0] == 'n') {
        for (int i = 0; i < 20000; i++)
            if (write(fd, "\x15\0\0\0\0\0\0\x04\0\0\0\x07", 12) != 12)
                return 2;
        return 0;
    }
    if (what[0] == 'j')
        return write(fd, "\x18\x01 no frame at all", 18) != 18;
    return ioctl(fd, TIOCSCTTY, 1) != 0 || vhangup() != 0;
}
"""


def program(place: Path) -> Path:
    needs(("gcc", "gcc"))
    (place / "tamper.c").write_text(PROGRAM)
    subprocess.run(["gcc", "-static", "-O1", "-o", place / "tamper", place / "tamper.c"], check=True, timeout=60)
    return place / "tamper"


@pytest.fixture
def recorded(guests: Guests, tmp_path: Path) -> str:
    """A running guest that is recorded, with the program in it."""
    name = guests.run("tampered", record=True).name
    transfer.push(name, program(tmp_path), "/root/tamper")
    return name


def record_of(name: str) -> str:
    return (places.guest(name) / NAME).read_text()


def test_message_that_is_not_the_kernels_is_not_recorded(recorded: str) -> None:
    assert int(shell(recorded, "/root/tamper forge")) > 0, "PID 1 cannot be reached so"
    shell(recorded, "exec /bin/busybox echo afterwards")
    assert until(lambda: 'a2="afterwards"' in record_of(recorded))
    assert 'a0="forged"' not in record_of(recorded)


def test_guest_that_breaks_its_line_is_frozen_with_its_record(recorded: str) -> None:
    with control.Session(recorded, ["/root/tamper", "junk"]):
        assert until(lambda: bool(control.request(recorded, "status")["frozen"]), seconds=20)


def test_guest_that_hangs_its_line_up_ends_with_its_record(recorded: str) -> None:
    with control.Session(recorded, ["/root/tamper", "hang"]):
        assert until(lambda: not control.is_running(recorded), seconds=20)
    assert "step `record` failed on `/dev/ttyS0`" in (places.guest(recorded) / "console.log").read_text(
        errors="replace"
    )


def test_message_without_an_end_is_refused(tmp_path: Path) -> None:
    record = Record(str(tmp_path / "record.log"), 1 << 30)
    part = (1319).to_bytes(2, "big") + bytes(4000)
    with pytest.raises(ValueError, match="malformed"):
        for _ in range(1000):
            record.take(part, more=True)
    record.close()


def test_keys_that_no_kernel_told_are_passed_over(tmp_path: Path) -> None:
    line = 'type=TTY msg=audit(1.0:1): tty pid=7 uid=0 major=136 minor=0 comm="sh" data='
    (tmp_path / "log").write_text(f"{line}zz\n{line}\n{line}6C73\n")
    assert list(typed(tmp_path / "log")) == [("sh", b"ls")]


def test_console_log_goes_on_after_a_rotation_that_failed(tmp_path: Path) -> None:
    place = tmp_path / "guest"
    place.mkdir()
    log = ConsoleLog(str(place / "console.log"), 10)
    log.write(b"12345678\n")
    place.rename(tmp_path / "aside")
    log.write(b"lost\n")
    (tmp_path / "aside").rename(place)
    log.write(b"later\n")
    log.close()
    assert (place / "console.log").read_bytes().endswith(b"later\n")


def test_output_of_a_command_in_a_guest_does_not_fill_the_hosts_memory(
    guests: Guests, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "_KEPT_MOST", 100_000)
    name = guests.run("talks").name
    assert len(control.execute(name, ["/bin/busybox", "head", "-c", "100000", "/dev/zero"])[1]) == 100_000
    with pytest.raises(StateError, match="wrote more than"):
        control.execute(name, ["/bin/busybox", "yes"])


def test_guest_that_never_stops_saying_how_its_service_ended_does_not_stop_its_keeper(
    guests: Guests, tmp_path: Path
) -> None:
    name = guests.create("news").name
    started = guests.start(name)
    try:
        transfer.push(name, program(tmp_path), "/root/tamper")
        shell(name, "/root/tamper news")
        assert control.request(name, "status")["status"] == 7
    finally:
        control.request(name, "kill")
        started.close()
