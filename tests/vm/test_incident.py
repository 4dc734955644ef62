"""After a break-in: what is kept, what is found, how soon the service is back."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import NewGuest
from guest_processes import of_guest, wait_gone
from machine import until

from stockade import machines, places
from stockade.errors import StateError
from stockade.records.guest import Guest
from stockade.vm import control, images, incident, manage, snapshots, store, trial
from stockade.vm.start import Started

Start = Callable[[str], Started]

BREAK_IN = """
echo 'evil:x:0:0::/:/bin/sh' >> /etc/passwd
cp /bin/busybox /var/su; chmod 4755 /var/su
rm /bin/uname
touch -r /srv/index.html /var/time; echo 'served by somebody' > /srv/index.html; touch -r /var/time /srv/index.html
echo secret-of-the-intruder > /tmp/in-memory; rm /var/time
mknod /root/disk b 98 0
"""


@pytest.fixture
def broken_into(running: Guest) -> Guest:
    """A guest with a good snapshot in which somebody has been since."""
    snapshots.create(running.name, "good", good=True)
    assert control.execute(running.name, ["sh", "-c", BREAK_IN])[0] == 0
    return running


def unpacked(archive: Path, target: Path) -> Path:
    target.mkdir()
    subprocess.run(["tar", "--zstd", "-xSf", str(archive), "-C", str(target)], check=True, timeout=60)
    return target


def test_evidence_holds_disk_memory_console_records_and_what_changed(broken_into: Guest, tmp_path: Path) -> None:
    incident.freeze(broken_into.name)
    archive = tmp_path / "evidence.tar.zst"
    manifest = incident.evidence(broken_into.name, archive)
    assert control.request(broken_into.name, "status")["frozen"], "it stays as it is"
    place = unpacked(archive, tmp_path / "out")
    written = json.loads((place / "manifest.json").read_bytes())
    names = {file["name"] for file in written["files"]}
    assert {"disk.cow", "memory", "kernel", "kernel.maps", "console.log", "guest.json", "image.json"} <= names
    for file in written["files"]:
        data = (place / file["name"]).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (file["bytes"], file["sha256"]), file["name"]
    assert b"secret-of-the-intruder" in (place / "memory").read_bytes()
    found = {change.path: change for change in manifest.changes}
    assert found["/var/su"].kind == "added"
    assert "setuid" in found["/var/su"].notes
    assert (found["/bin/uname"].kind, found["/etc/passwd"].kind) == ("removed", "changed")
    assert found["/srv/index.html"].kind == "changed", "its time was set back"
    assert "device" in found["/root/disk"].notes
    assert manifest.accounts == ("evil",)
    assert "/bin/busybox" not in found


@pytest.mark.parametrize("walls", [("vm",), ("jail", "vm")], ids=",".join)
def test_evidence_holds_the_data_of_the_guests_kernel_behind_any_walls(
    new_guest: NewGuest, start: Start, tmp_path: Path, walls: tuple[str, ...]
) -> None:
    name = new_guest(walls=walls).name
    start(name)
    incident.evidence(name, tmp_path / "evidence.tar.zst")
    place = unpacked(tmp_path / "evidence.tar.zst", tmp_path / "out")
    assert "linux.uml" in (place / "kernel.maps").read_text()
    assert f"stockade_hostname={name}".encode() in (place / "kernel").read_bytes(), "the command line that it keeps"


def test_frozen_guest_does_nothing_until_it_is_thawed(running: Guest) -> None:
    with control.Session(running.name, ["sh", "-c", "while true; do echo tick; sleep 0.05; done"]) as ticking:
        ticking.read(5)
        incident.freeze(running.name)
        with pytest.raises(TimeoutError):
            while True:
                ticking.read(0.5)
        with pytest.raises(StateError, match="frozen"):
            control.execute(running.name, ["true"])
        incident.thaw(running.name)
        assert any(b"tick" in data for _, data in ticking.read(5))


def test_service_is_back_from_the_good_snapshot_within_a_second_while_copies_are_studied(
    broken_into: Guest, start: Start
) -> None:
    incident.freeze(broken_into.name)
    copies = [guest.name for guest in incident.clones(broken_into.name, 3, prefix="study")]
    try:
        began = time.monotonic()
        incident.restore(broken_into.name, snapshots.latest_good(broken_into.name))
        start(broken_into.name)
        assert control.execute(broken_into.name, ["cat", "/srv/index.html"])[1] == b"served from a guest\n"
        assert time.monotonic() - began < 1.0
        assert control.execute(broken_into.name, ["ls", "/var/su"])[0] != 0
        for name in copies:
            assert store.load(name).network == "none"
            start(name)
            assert control.execute(name, ["ls", "/var/su"])[0] == 0
        control.execute(copies[0], ["rm", "/var/su"])
        assert control.execute(copies[1], ["ls", "/var/su"])[0] == 0
    finally:
        for name in copies:
            machines.discard(name)


def test_restore_without_a_snapshot_is_the_clean_image(broken_into: Guest, start: Start) -> None:
    incident.restore(broken_into.name)
    start(broken_into.name)
    assert control.execute(broken_into.name, ["cat", "/srv/index.html"])[1] == b"served from a guest\n"
    assert incident.changes_of(broken_into.name) == []


def test_evidence_is_never_overwritten_and_none_is_half_written(running: Guest, tmp_path: Path) -> None:
    archive = tmp_path / "evidence.tar.zst"
    archive.write_text("kept")
    with pytest.raises(FileExistsError):
        incident.evidence(running.name, archive, memory=False)
    assert archive.read_text() == "kept"
    assert not list(places.guest(running.name).glob(".evidence-*"))


def test_disk_that_was_made_unreadable_is_evidence_too(running: Guest, tmp_path: Path) -> None:
    control.execute(running.name, ["sh", "-c", "dd if=/dev/zero of=/dev/ubda bs=1k seek=1 count=1; sync"])
    manifest = incident.evidence(running.name, tmp_path / "evidence.tar.zst", memory=False)
    assert (manifest.compared, manifest.changes) == (False, ())
    assert "not-compared" in {file.name for file in manifest.files}


def test_trial_shows_what_changes_and_leaves_the_guest_alone(guest: Guest) -> None:
    report = trial.trial(
        guest.name, [["sh", "-c", "echo new > /srv/index.html; echo x > /srv/more"]],
        inside=[["grep", "-q", "new", "/srv/index.html"]], network="none",
    )  # fmt: skip
    assert (report.passed, report.committed) == (True, False)
    assert {(change.path, change.kind) for change in report.changes} == {
        ("/srv/index.html", "changed"), ("/srv/more", "added"),
    }  # fmt: skip
    assert incident.changes_of(guest.name) == []
    assert [name for name in store.names() if name.startswith(f"{guest.name}-trial")] == []


def test_trial_that_fails_is_not_kept_and_says_why(guest: Guest) -> None:
    report = trial.trial(guest.name, [["sh", "-c", "rm /srv/index.html"]], inside=[["cat", "/srv/index.html"]],
                         commit=True,
                         network="none")  # fmt: skip
    assert (report.passed, report.committed) == (False, False)
    assert report.exercises[0].status != 0
    assert "No such file" in report.exercises[0].output
    assert incident.changes_of(guest.name) == []


def test_trial_that_passed_can_be_kept_and_taken_back(guest: Guest, start: Start) -> None:
    report = trial.trial(guest.name, [["sh", "-c", "echo new > /srv/index.html"]], commit=True, network="none")
    assert report.committed
    start(guest.name)
    assert control.execute(guest.name, ["cat", "/srv/index.html"])[1] == b"new\n"
    (before,) = snapshots.names(guest.name)
    incident.restore(guest.name, before)
    start(guest.name)
    assert control.execute(guest.name, ["cat", "/srv/index.html"])[1] == b"served from a guest\n"


def test_exercise_of_a_trial_reaches_the_clones_own_published_port(new_guest: NewGuest) -> None:
    from stockade.records.publish import Published

    guest = new_guest(network="publish", publish=(Published(address="127.0.0.1", port=1, target=80),))
    report = trial.trial(
        guest.name, [["sh", "-c", "httpd -p 80 -h /srv"]], network="none",
        exercises=["curl -sS -f -m 5 http://127.0.0.1:$PORT_80/ | grep -q 'served from'"],
    )  # fmt: skip
    assert report.passed, report


@pytest.mark.parametrize("way", ["snapshot", "clean"])
def test_restore_puts_the_images_own_file_back_below_a_guest_whose_uml_was_taken_over(
    broken_into: Guest, start: Start, way: str
) -> None:
    base, image = store.machine(broken_into.name) / "base", images.file(broken_into.image)
    # What the user that runs UML can do in its directory: another base, that looks the same from outside.
    status = base.stat()
    forged = image.read_bytes().replace(b"served from a guest\n", b"served from a fake.\n")
    base.unlink()
    base.write_bytes(forged)
    os.utime(base, (status.st_mtime, status.st_mtime))
    incident.restore(broken_into.name, "good" if way == "snapshot" else "")
    assert os.path.samefile(base, image)
    start(broken_into.name)
    assert control.execute(broken_into.name, ["cat", "/srv/index.html"])[1] == b"served from a guest\n"


@pytest.mark.parametrize("planted", ["a link to another guest's disk", "a pipe"])
def test_disk_that_uml_replaced_is_never_followed(new_guest: NewGuest, tmp_path: Path, planted: str) -> None:
    victim, guest = new_guest(), new_guest()
    disk = store.disk(guest.name)
    disk.unlink()
    if planted == "a pipe":
        os.mkfifo(disk)
    else:
        disk.symlink_to(store.disk(victim.name))
    for attempt in (
        lambda: snapshots.create(guest.name, "one"),
        lambda: snapshots.clone(guest.name, "copy"),
        lambda: incident.evidence(guest.name, tmp_path / "evidence.tar.zst"),
        lambda: manage.flatten(guest.name, "flat"),
        lambda: machines.start_guest(guest.name),
    ):
        with pytest.raises(StateError, match="a link was put in its place|no file any more"):
            attempt()
    assert snapshots.names(guest.name) == []
    assert not (tmp_path / "evidence.tar.zst").exists()
    incident.restore(guest.name)
    machines.start_guest(guest.name).close()


def is_free(name: str) -> bool:
    """Whether nobody has the guest's lock."""
    try:
        with store.locked(name):
            return True
    except StateError:
        return False


def test_killed_trial_ends_its_clone_and_the_next_trial_removes_it(guest: Guest) -> None:
    code = (
        "import sys; from stockade.vm import trial\n"
        "trial.trial(sys.argv[1], [['sh', '-c', 'echo begun; sleep 100']], network='none', say=lambda text: "
        "print(text, flush=True))\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, guest.name], stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert child.stdout is not None
    while "running" not in child.stdout.readline():
        assert child.poll() is None
    (clone,) = (name for name in store.names() if name.startswith(f"{guest.name}-trial-"))
    processes = of_guest(clone)
    child.kill()
    child.wait(10)
    child.stdout.close()
    assert wait_gone(processes, 30) == []
    assert until(lambda: is_free(clone))
    assert trial.trial(guest.name, [["true"]], network="none").passed
    assert clone not in store.names()
