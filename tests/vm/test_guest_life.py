"""From the start of a guest to its end, and what is left when its parts are killed."""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import MEMORY, NewGuest, image_file
from guest_processes import holders, keeper_of, of_guest, uids_of_kernels, wait_gone

from stockade import machines, places
from stockade.errors import StateError
from stockade.records.guest import Guest
from stockade.records.image import Image, ImageStart
from stockade.vm import control, images, manage, sparse, staging, store, transfer
from stockade.vm.consolelog import ConsoleLog
from stockade.vm.start import Started, stop

Start = Callable[[str], Started]


def shell(guest: Guest, script: str) -> tuple[int, str]:
    status, output, errors = control.execute(guest.name, ["sh", "-c", script], timeout_s=20)
    return status, (output + errors).decode("utf-8", "replace")


def test_guest_boots_runs_a_command_without_a_network_and_stops_cleanly(running: Guest) -> None:
    assert shell(running, "cat /proc/1/comm; ifconfig -a | grep -c Link") == (0, "init\n1\n")
    last = stop(running.name)
    assert last["cause"] == "halted"
    assert not control.is_running(running.name)
    assert holders(running.name) == []


def test_status_and_both_streams_of_a_command_come_out(running: Guest) -> None:
    status, output, errors = control.execute(running.name, ["sh", "-c", "echo out; echo err >&2; exit 7"])
    assert (status, output, errors) == (7, b"out\n", b"err\n")
    assert control.execute(running.name, ["sh", "-c", "kill -TERM $$"])[0] == 128 + signal.SIGTERM
    assert control.execute(running.name, ["/bin/missing"])[0] == 127
    assert control.execute(running.name, ["/etc/passwd"])[0] == 126


def test_command_that_has_ended_before_it_is_told_of_its_inputs_end_has_its_status(running: Guest) -> None:
    with control.Session(running.name, ["sh", "-c", "echo early; exit 3"]) as session:
        # The keeper has said all and closed: nothing more can be sent, and everything can be read.
        waiting = select.poll()
        waiting.register(session, select.POLLRDHUP)
        assert waiting.poll(20_000)
        session.write(b"late")
        session.end_input()
        output = b""
        while session.status is None:
            output += b"".join(data for _, data in session.read(20))
    assert (session.status, output) == (3, b"early\n")


def test_megabytes_of_input_and_output_pass_unchanged_in_both_directions_at_once(running: Guest) -> None:
    data = os.urandom(1 << 20)
    assert control.execute(running.name, ["cat"], input=data, timeout_s=30) == (0, data, b"")


def test_commands_run_beside_each_other_and_a_slow_reader_holds_up_nobody(running: Guest) -> None:
    with control.Session(running.name, ["yes"]) as flood:
        time.sleep(0.3)
        assert shell(running, "echo free") == (0, "free\n")
        assert flood.status is None
    # A client that goes away ends its command.
    end = time.monotonic() + 5
    while shell(running, "ps | grep -c '[y]es'")[0] == 0 and time.monotonic() < end:
        time.sleep(0.05)
    assert shell(running, "ps | grep -c '[y]es'") == (1, "0\n")


def test_command_with_a_terminal_has_one_of_the_given_size(running: Guest) -> None:
    with control.Session(running.name, ["sh", "-c", "tty; stty size"], terminal=(33, 101)) as session:
        text = b""
        while session.status is None:
            text += b"".join(data for _, data in session.read(10))
    assert text.split() == [b"/dev/pts/0", b"33", b"101"]


def test_memory_of_the_guest_is_what_was_asked_for_and_nothing_else_is_its_disk(running: Guest) -> None:
    _, text = shell(running, "grep MemTotal /proc/meminfo; cat /proc/partitions")
    total = int(text.split()[1]) << 10
    assert MEMORY * 0.7 < total <= MEMORY
    assert text.split()[-1] == "ubda"


def test_guest_has_no_hostfs_and_takes_no_module(running: Guest) -> None:
    status, text = shell(running, "mkdir /tmp/host; mount -t hostfs none /tmp/host -o /")
    assert status != 0, text
    assert "hostfs" not in shell(running, "cat /proc/filesystems")[1]
    assert shell(running, "cat /proc/sys/kernel/modules_disabled") == (0, "1\n")


def test_uml_runs_as_nobody_who_is_root(running: Guest) -> None:
    seen = 0
    for pid in control.request(running.name, "status")["processes"]:
        try:
            text = Path(f"/proc/{pid}/status").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue  # that of a command of the guest's which has ended meanwhile
        seen += 1
        lines = dict(line.split(":\t", 1) for line in text.splitlines() if ":\t" in line)
        assert set(lines["Uid"].split()) == {str(running.uid)} != {"0"}
        assert lines["CapEff"] == lines["CapPrm"] == "0" * 16
        assert lines["NoNewPrivs"] == "1"
    assert seen > 1


def test_started_guest_cannot_be_started_again_nor_removed(running: Guest) -> None:
    with pytest.raises(StateError, match="one writer"):
        machines.start_guest(running.name)
    with pytest.raises(StateError, match="one writer"):
        store.remove(running.name)
    assert shell(running, "echo here") == (0, "here\n")


def test_several_guests_of_one_image_write_to_their_own_disks_and_leave_the_image_alone(
    new_guest: NewGuest, start: Start, image: Image
) -> None:
    before = sparse.file_sha256(image_file(image))
    guests = [new_guest() for _ in range(3)]
    for guest in guests:
        start(guest.name)
    for guest in guests:
        assert shell(guest, f"echo {guest.name} > /root/who; sync") == (0, "")
    for guest in guests:
        assert shell(guest, "cat /root/who") == (0, f"{guest.name}\n")
        stop(guest.name)
    assert sparse.file_sha256(image_file(image)) == before == image.sha256


def test_what_was_written_is_there_after_a_clean_stop(running: Guest, start: Start) -> None:
    shell(running, "echo kept > /root/file")
    stop(running.name)
    start(running.name)
    assert shell(running, "cat /root/file") == (0, "kept\n")


def test_console_is_logged_and_can_be_watched_and_typed_on(running: Guest) -> None:
    with control.connect(running.name) as connection:
        control.ask(connection, "console")
        shell(running, "(read line; echo got $line) < /dev/console > /dev/console &")
        connection.settimeout(10)
        connection.sendall(b"hello\n")
        text = b""
        while b"got hello" not in text:
            text += connection.recv(4096)
    assert "got hello" in (places.guest(running.name) / "console.log").read_text()


def test_console_log_stays_bounded_however_much_is_said(running: Guest, tmp_path: Path) -> None:
    log = ConsoleLog(str(tmp_path / "log"), 10000)
    for number in range(1000):
        log.write(b"%099d\n" % number)
    log.close()
    assert sum(file.stat().st_size for file in tmp_path.glob("log*")) <= 20000
    assert (tmp_path / "log").read_bytes().endswith(b"999\n")
    control.execute(running.name, ["sh", "-c", "yes 0123456789 | head -c 300000 > /dev/console"])
    assert (places.guest(running.name) / "console.log").stat().st_size > 300000


def test_files_go_in_and_come_out_with_modes_and_links(running: Guest, tmp_path: Path) -> None:
    source = tmp_path / "in"
    (source / "sub").mkdir(parents=True)
    (source / "sub/run").write_bytes(os.urandom(70000))
    (source / "sub/run").chmod(0o755)
    assert transfer.push(running.name, source, "/root/in") == 1
    assert shell(running, "stat -c %a /root/in/sub/run; ln -s /etc/passwd /root/in/link") == (0, "755\n")
    assert transfer.pull(running.name, "/root/in", tmp_path / "out") == 1
    assert (tmp_path / "out/sub/run").read_bytes() == (source / "sub/run").read_bytes()
    assert os.readlink(tmp_path / "out/link") == "/etc/passwd"
    with pytest.raises(StateError, match="no such file"):
        transfer.pull(running.name, "/missing", tmp_path / "none")


def test_link_in_a_guest_does_not_lead_a_copy_out_of_its_target(running: Guest, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    shell(
        running,
        f"mkdir -p /root/t; ln -s {victim} /root/t/a; mkdir /root/t/b; echo x > /root/t/b/f; chmod 4755 /root/t/b/f",
    )
    transfer.pull(running.name, "/root/t", tmp_path / "out")
    assert list(victim.iterdir()) == []
    assert (tmp_path / "out/a").is_symlink()
    assert (tmp_path / "out/b/f").stat().st_mode & 0o7777 == 0o755


def test_guest_is_listed_with_the_memory_that_it_holds_and_its_disk(running: Guest) -> None:
    state = manage.state(running.name)
    assert state.state == "running"
    assert state.memory_used is not None
    assert 4 << 20 < state.memory_used < MEMORY + (32 << 20)
    assert 0 < state.disk < 1 << 20


@pytest.mark.parametrize("walls", [("vm",), ("jail", "vm")])
def test_killing_uml_leaves_no_process_and_no_lock(new_guest: NewGuest, start: Start, walls: tuple[str, ...]) -> None:
    guest = new_guest(walls=walls)
    start(guest.name)
    pids = [*of_guest(guest.name), keeper_of(guest.name)]
    os.kill(int(control.request(guest.name, "status")["pid"]), signal.SIGKILL)
    assert wait_gone(pids) == []
    assert holders(guest.name) == []
    start(guest.name)
    assert shell(guest, "echo again") == (0, "again\n")


@pytest.mark.parametrize("walls", [("vm",), ("jail", "vm")])
def test_killing_the_keeper_ends_the_guest_whole(new_guest: NewGuest, start: Start, walls: tuple[str, ...]) -> None:
    guest = new_guest(walls=walls, network="publish")
    start(guest.name)
    keeper = keeper_of(guest.name)
    pids = of_guest(guest.name)
    os.kill(keeper, signal.SIGKILL)
    assert wait_gone([keeper, *pids]) == []
    assert holders(guest.name) == []
    start(guest.name)


@pytest.mark.parametrize("which", [-1, -2])
def test_killing_a_helper_of_uml_leaves_a_guest_that_can_be_ended(running: Guest, which: int) -> None:
    # The processes that UML keeps for the guest's own come and go with them: take one that is still there.
    end = time.monotonic() + 10
    while True:
        pids = of_guest(running.name)
        try:
            os.kill(pids[which], signal.SIGKILL)
            break
        except ProcessLookupError:
            assert time.monotonic() < end
    if control.is_running(running.name):
        machines.discard(running.name)
    assert wait_gone(pids) == []


def test_guest_with_a_pid_1_of_its_own_boots_and_is_halted_when_that_does_not_heed(tree: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    staging.copy_tree(tree, root)
    (root / "sbin").mkdir()
    (root / "sbin/init").write_text("#!/bin/sh\ntrap '' INT\necho own init\nwhile true; do sleep 1; done\n")
    (root / "sbin/init").chmod(0o755)
    record = Image(name="stubborn", sha256="", size=0, mtime=0, origin="directory", start=ImageStart(init="/sbin/init"))
    image = staging.image_of("stubborn", root, record, with_init=False)
    guest = store.create("stubborn", image, memory=MEMORY, walls=("vm",))
    try:
        machines.start_guest(guest.name).close()
        pids = of_guest(guest.name)
        with pytest.raises(StateError, match="PID 1 of its own"):
            control.execute(guest.name, ["true"])
        assert stop(guest.name, timeout_s=0.3)["cause"] in ("halted", "killed")
        assert wait_gone(pids) == []
        assert "own init" in (places.guest(guest.name) / "console.log").read_text()
    finally:
        machines.discard(guest.name)
        images.remove("stubborn", [])


@pytest.mark.slow
def test_malloc_bomb_meets_the_guests_own_limit(running: Guest) -> None:
    pids = of_guest(running.name)
    status, _ = shell(running, "tail /dev/zero")
    assert status != 0
    assert shell(running, "echo alive") == (0, "alive\n")
    assert manage.held_memory(pids) < MEMORY + (48 << 20)


@pytest.mark.slow
def test_fork_bomb_ends_with_the_guest_and_not_the_host(running: Guest) -> None:
    with control.Session(running.name, ["sh", "-c", "f() { f | f & }; f; sleep 20"]):
        time.sleep(1.0)
        load = len(control.request(running.name, "status")["processes"])
        assert load < 2200
    last = stop(running.name, timeout_s=3)
    assert last["cause"] in ("halted", "killed", "failed")
    assert holders(running.name) == []


def test_full_disk_of_the_guest_is_its_own_affair(running: Guest) -> None:
    status, text = shell(running, "dd if=/dev/zero of=/root/fill bs=1M")
    assert status != 0
    assert "No space left" in text
    assert shell(running, "rm /root/fill; echo better") == (0, "better\n")


def test_kernel_is_listed_while_the_guest_runs_and_not_after_its_stop(running: Guest) -> None:
    assert uids_of_kernels(running.name) == {running.uid}
    stop(running.name)
    assert uids_of_kernels(running.name) == set()
