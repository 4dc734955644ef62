"""A Debian system whose PID 1 is systemd, as a guest: it boots, is spoken with without a network, and ends cleanly."""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Iterator

import pytest
from conftest import image_file
from machine import Seen, free_port, until

from stockade import machines, places
from stockade.errors import StateError, UsageError
from stockade.records.guest import Guest
from stockade.records.image import Image
from stockade.records.publish import Published
from stockade.vm import control, debian, store
from stockade.vm.ext4 import FileSystem
from stockade.vm.start import stop

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture
def system(system_image: Image) -> Iterator[Guest]:
    """A guest of it behind the usual walls, stopped."""
    guest = store.create("system", system_image, memory=256 << 20)
    yield guest
    machines.discard(guest.name)


@pytest.fixture(scope="module")
def up(system_image: Image) -> Iterator[Guest]:
    """One that runs, shared by the tests that change nothing in it."""
    guest = store.create(
        "up", system_image, memory=256 << 20, network="publish",
        publish=(Published(address="127.0.0.1", port=free_port(), target=22),),
    )  # fmt: skip
    machines.start_guest(guest.name).close()
    yield guest
    machines.discard(guest.name)


def output(guest: Guest, *argv: str) -> str:
    """Standard output of a command in the guest, whatever its status."""
    return control.execute(guest.name, list(argv))[1].decode().strip()


def test_it_is_ready_when_systemd_is_and_stops_by_its_own_hand(system: Guest) -> None:
    started = machines.start_guest(system.name)
    started.close()
    seen = Seen()
    seen.note(system.name)
    assert output(system, "systemctl", "is-system-running") == "running"
    assert output(system, "cat", "/proc/1/comm") == "systemd"
    assert output(system, "systemctl", "--failed", "--no-legend") == ""
    assert output(system, "systemd-detect-virt") == "uml"
    assert output(system, "hostname") == system.name
    log = places.guest(system.name) / "console.log"
    # Units of the type idle, as that of the login is, are started last.
    assert until(lambda: f"{system.name} login:" in log.read_text(errors="replace"), seconds=60.0)
    assert stop(system.name)["cause"] == "halted"
    console = log.read_text(errors="replace")
    assert "Welcome to " in console
    assert "System Power Off" in console
    assert until(lambda: not seen.left()), seen.left()


def test_commands_have_streams_status_terminal_and_are_ended_with_their_client(up: Guest) -> None:
    assert control.execute(up.name, ["sh", "-c", "cat; echo oops >&2; exit 3"], input=b"typed") == (
        3, b"typed", b"oops\n",
    )  # fmt: skip
    assert control.execute(up.name, ["stty", "size"], terminal=(33, 99))[1].split() == [b"33", b"99"]
    with control.Session(up.name, ["sleep", "12345"]):
        assert until(lambda: "12345" in output(up, "pgrep", "-a", "sleep"))
    assert until(lambda: "12345" not in output(up, "pgrep", "-a", "sleep"))


def test_a_service_of_systemds_is_reached_at_the_published_port(up: Guest) -> None:
    """Its network was made before systemd, and the boot is complete: sshd listens."""
    with socket.create_connection(("127.0.0.1", up.publish[0].port), timeout=30) as connection:
        assert connection.makefile("rb").readline().startswith(b"SSH-2.0-OpenSSH")


def test_it_starts_again_when_it_is_told_to_from_within(system: Guest) -> None:
    machines.start_guest(system.name).close()
    first = output(system, "cat", "/proc/sys/kernel/random/boot_id")
    control.execute(system.name, ["systemctl", "--no-block", "reboot"])

    def rebooted() -> bool:
        with control.Session(system.name, ["cat", "/proc/sys/kernel/random/boot_id"]) as session:
            try:
                found = b"".join(data for _, data in session.read(2.0)).decode().strip()
            except TimeoutError:
                return False
        return found not in ("", first)

    assert until(rebooted, seconds=120.0)
    assert stop(system.name)["cause"] == "halted"


def test_image_holds_no_key_no_id_and_each_guest_makes_its_own(system_image: Image, up: Guest) -> None:
    with FileSystem(image_file(system_image)) as disk:
        assert disk.text("/etc/machine-id") == ""
        assert [path for path, _ in disk.walk() if "ssh_host_" in path] == []
    assert re.fullmatch("[0-9a-f]{32}", output(up, "cat", "/etc/machine-id"))
    assert output(up, "systemctl", "is-active", "ssh.service") == "active"
    assert "ssh_host_ed25519_key" in output(up, "ls", "/etc/ssh").split()


def test_commands_run_while_it_boots_and_none_of_them_can_say_that_it_is_up(system: Guest) -> None:
    said: list[float] = []

    def begin() -> None:
        started = machines.start_guest(system.name)
        said.append(started.seconds["ready"])
        started.close()

    starting = threading.Thread(target=begin)
    starting.start()
    try:
        assert until(lambda: control.is_running(system.name), seconds=60.0)
        send = "import socket; socket.socket(1, 2).sendto(b'READY=1', '\\0stockade/notices')"
        assert control.execute(system.name, ["python3", "-c", send])[0] == 0
        # What was sent is served in the order in which it came: the next command comes after it.
        assert control.execute(system.name, ["true"])[0] == 0
        ready = control.request(system.name, "status")["ready"]
        assert not ready or output(system, "systemctl", "is-system-running") == "running"
    finally:
        starting.join(240)
    assert said
    assert output(system, "systemctl", "is-system-running") == "running"


def test_no_module_can_be_loaded_and_hostfs_is_not_there(up: Guest) -> None:
    assert output(up, "cat", "/proc/sys/kernel/modules_disabled") == "1"
    systems = output(up, "cat", "/proc/filesystems").split()
    assert "overlay" in systems  # the image was made with this module
    assert "hostfs" not in systems


def test_a_recorded_guest_needs_the_first_process_of_stockade(system_image: Image) -> None:
    guest = store.create("recorded", system_image, record=True)
    try:
        with pytest.raises(StateError, match="cannot be recorded"):
            machines.start_guest(guest.name)
    finally:
        machines.discard(guest.name)


def test_an_init_that_is_not_known_is_refused_before_anything_is_fetched() -> None:
    with pytest.raises(UsageError) as caught:
        debian.image_of_debian("bookworm", "other", init="openrc")
    assert caught.value.hint == "there is `systemd`"
