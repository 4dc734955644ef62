"""Snapshots: kept quickly, restored exactly, carried away and back, never half there."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import NewGuest, image_file
from guest_processes import keeper_of, wait_gone

from stockade import machines, places
from stockade.errors import NotFoundError, StateError
from stockade.records.guest import Guest
from stockade.records.image import Image
from stockade.vm import control, cow, snapshots, sparse, store
from stockade.vm.start import Started, stop

Start = Callable[[str], Started]


def shell(name: str, script: str) -> str:
    status, output, errors = control.execute(name, ["sh", "-c", script], timeout_s=20)
    assert status == 0, errors
    return output.decode()


def test_snapshot_of_a_running_guest_has_what_was_written_and_a_sound_file_system(
    running: Guest, image: Image, tmp_path: Path
) -> None:
    shell(running.name, "echo before > /root/state")
    kept = snapshots.create(running.name, "one")
    assert (kept.state, kept.consistent) == ("running", True)
    shell(running.name, "echo after > /root/state")
    whole = tmp_path / "whole"
    cow.merge(snapshots.directory(running.name, "one") / "disk.cow", image_file(image), whole)
    subprocess.run(["e2fsck", "-p", str(whole)], timeout=60, capture_output=True, check=False)
    done = subprocess.run(["e2fsck", "-fn", str(whole)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout
    text = subprocess.run(
        ["debugfs", "-R", "cat /root/state", str(whole)], capture_output=True, text=True, timeout=60, check=True
    ).stdout
    assert text == "before\n"


def test_guest_goes_on_after_its_snapshot_and_can_be_put_back(running: Guest, start: Start) -> None:
    shell(running.name, "echo one > /root/state; sleep 100 &")
    snapshots.create(running.name, "one")
    assert "sleep 100" in shell(running.name, "ps")
    shell(running.name, "echo two > /root/state; echo more > /root/more")
    with pytest.raises(StateError, match="one writer"):
        snapshots.restore(running.name, "one")
    stop(running.name)
    snapshots.restore(running.name, "one")
    start(running.name)
    assert shell(running.name, "cat /root/state; ls /root") == "one\nstate\n"


def test_snapshot_of_a_stopped_guest_is_its_disk(guest: Guest) -> None:
    kept = snapshots.create(guest.name, "still")
    assert kept.state == "stopped"
    assert kept.digest == sparse.digest(store.disk(guest.name))
    with pytest.raises(StateError, match="already"):
        snapshots.create(guest.name, "still")
    snapshots.remove(guest.name, "still")
    assert snapshots.names(guest.name) == []
    with pytest.raises(NotFoundError):
        snapshots.restore(guest.name, "still")


def test_clone_of_a_snapshot_has_a_disk_of_its_own(running: Guest, start: Start, new_guest: NewGuest) -> None:
    shell(running.name, "echo shared > /root/state")
    snapshots.create(running.name, "one")
    new_guest(name="copy-of-it")
    machines.discard("copy-of-it")
    snapshots.clone(running.name, "copy-of-it", snapshot="one")
    start("copy-of-it")
    shell("copy-of-it", "echo changed > /root/state")
    assert shell(running.name, "cat /root/state") == "shared\n"
    assert store.load("copy-of-it").network == "none"


def test_exported_snapshot_is_taken_in_again_elsewhere(running: Guest, start: Start, tmp_path: Path) -> None:
    shell(running.name, "echo carried > /root/state")
    snapshots.create(running.name, "one")
    digest = snapshots.export(running.name, "one", tmp_path / "one.tar.zst")
    assert digest == sparse.file_sha256(tmp_path / "one.tar.zst")
    try:
        taken = snapshots.import_(tmp_path / "one.tar.zst", "elsewhere", name="here")
        assert (taken.guest, taken.name) == ("elsewhere", "here")
        start("elsewhere")
        assert shell("elsewhere", "cat /root/state") == "carried\n"
    finally:
        machines.discard("elsewhere")


@pytest.mark.parametrize("damage", ["cut", "flip", "other"])
def test_damaged_archive_is_refused_and_leaves_nothing(running: Guest, tmp_path: Path, damage: str) -> None:
    snapshots.create(running.name, "one")
    archive = tmp_path / "one.tar.zst"
    snapshots.export(running.name, "one", archive)
    if damage == "cut":
        os.truncate(archive, archive.stat().st_size // 2)
    elif damage == "flip":
        data = bytearray(archive.read_bytes())
        data[len(data) // 2] ^= 0xFF
        archive.write_bytes(bytes(data))
    else:
        (tmp_path / "evil").write_text("x")
        subprocess.run(
            ["tar", "--zstd", "-cPf", str(archive), "--transform=s,.*/evil,../../evil,", str(tmp_path / "evil")],
            check=True, timeout=20,
        )  # fmt: skip
    with pytest.raises(StateError):
        snapshots.import_(archive, "elsewhere")
    assert not places.guest("elsewhere").exists()
    assert not list(places.guests().glob(".new-*"))


def test_damaged_snapshot_is_refused_and_the_disk_stays(running: Guest, start: Start) -> None:
    shell(running.name, "echo one > /root/state")
    snapshots.create(running.name, "one")
    stop(running.name)
    disk = snapshots.directory(running.name, "one") / "disk.cow"
    with open(disk, "r+b") as file:
        file.seek(cow.read(disk).data_start + 4096)
        file.write(b"damage")
    before = sparse.digest(store.disk(running.name))
    with pytest.raises(StateError, match="another digest"):
        snapshots.restore(running.name, "one")
    assert sparse.digest(store.disk(running.name)) == before
    start(running.name)


_HELD = """
import sys, time
from stockade.vm import snapshots, store
original = store.copy_disk
def slow(source, target, uid, gid):
    original(source, target, uid, gid)
    print("copied", flush=True)
    time.sleep(60)
store.copy_disk = slow
snapshots.create(sys.argv[1], "half")
"""


def test_killing_stockade_in_the_middle_of_a_snapshot_lets_the_guest_go_on_and_leaves_no_half_one(
    running: Guest,
) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", _HELD, running.name], stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert child.stdout is not None
    assert child.stdout.readline() == "copied\n"
    assert control.request(running.name, "status")["frozen"]
    os.kill(child.pid, signal.SIGKILL)
    child.wait(10)
    child.stdout.close()
    end = time.monotonic() + 5
    while control.request(running.name, "status")["frozen"] and time.monotonic() < end:
        time.sleep(0.01)
    assert shell(running.name, "echo goes on") == "goes on\n"
    assert snapshots.names(running.name) == []
    snapshots.create(running.name, "whole")
    assert not list(snapshots.directory(running.name).glob(".new-*"))


_RESTORING = """
import sys, time
from stockade.vm import snapshots, store
original = store.copy_disk
def slow(source, target, uid, gid):
    original(source, target, uid, gid)
    print("copied", flush=True)
    time.sleep(60)
store.copy_disk = slow
snapshots.restore(sys.argv[1], "one")
"""


def test_killing_stockade_in_the_middle_of_a_restore_leaves_the_old_disk_and_no_lock(
    running: Guest, start: Start
) -> None:
    snapshots.create(running.name, "one")
    shell(running.name, "echo newer > /root/state")
    stop(running.name)
    child = subprocess.Popen(
        [sys.executable, "-c", _RESTORING, running.name], stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert child.stdout is not None
    assert child.stdout.readline() == "copied\n"
    os.kill(child.pid, signal.SIGKILL)
    child.wait(10)
    child.stdout.close()
    start(running.name)
    assert shell(running.name, "cat /root/state") == "newer\n"
    stop(running.name)
    snapshots.restore(running.name, "one")
    start(running.name)
    assert shell(running.name, "ls /root") == ""


def test_killing_uml_while_it_is_held_is_an_error_and_loses_no_snapshot(running: Guest) -> None:
    snapshots.create(running.name, "one")
    pids = [*control.request(running.name, "status")["processes"], keeper_of(running.name)]
    with pytest.raises((StateError, OSError, TimeoutError)), snapshots.held(running):
        os.kill(pids[0], signal.SIGKILL)
        assert wait_gone(pids) == []
        control.request(running.name, "status")
    assert snapshots.names(running.name) == ["one"]
    snapshots.restore(running.name, "one")


def test_full_disk_of_the_host_is_an_error_and_the_snapshot_before_stays(guest: Guest, tmp_path: Path) -> None:
    """On a small file system, in a mount namespace of the child's own."""
    code = (
        "import errno, os, sys\n"
        "from pathlib import Path\n"
        "from stockade.vm import snapshots, store, sparse\n"
        "name = sys.argv[1]\n"
        "snapshots.create(name, 'one')\n"
        "with open(store.disk(name), 'r+b') as file:\n"
        "    file.seek(6 << 20); file.write(os.urandom(3 << 20))\n"
        "try:\n"
        "    snapshots.create(name, 'two')\n"
        "except OSError as error:\n"
        "    assert error.errno == errno.ENOSPC, error\n"
        "    print('no space')\n"
        "assert snapshots.names(name) == ['one']\n"
        "assert not list(snapshots.directory(name).glob('.new-*'))\n"
        "snapshots.checked(name, snapshots.load(name, 'one'))\n"
    )
    place = places.guest(guest.name)
    small = tmp_path / "small"
    small.mkdir()
    script = (
        'mount -t tmpfs -o size=5m none "$1"; cp -a --sparse=always "$2/guest.json" "$2/snapshots" "$1"; '
        'mkdir "$1/machine"; '
        'cp -a --sparse=always "$2/machine/disk.cow" "$1/machine"; : > "$1/machine/base"; '
        'mount --bind "$2/machine/base" "$1/machine/base"; mount --rbind "$1" "$2"; shift 2; exec "$@"'
    )
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-ec", script, "sh", str(small), str(place), sys.executable, "-c", code,
         guest.name],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}, capture_output=True, text=True,
        timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "no space\n"), done.stderr
