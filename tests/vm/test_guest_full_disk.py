"""The host's disk fills up under a guest: it can be stopped, nothing that was kept is lost, and it recovers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from machine import needs_uml

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="run as root: the small disk is a mount of the test's own")

#: In a mount namespace of its own: the home is a tmpfs, in which a file takes most of the room.
SCENARIO = """
import errno, os, shutil, sys
from pathlib import Path
from machine import make_tree, shell
from stockade import machines
from stockade.records.image import Image
from stockade.vm import control, images, manage, snapshots, staging, store
from stockade.vm.start import stop

home, walls = Path(os.environ["STOCKADE_HOME"]), tuple(sys.argv[1].split(","))
machines.prepare(walls)
record = Image(name="roomy", sha256="", size=0, mtime=0, origin="directory")
image = staging.image_of("roomy", make_tree(home / "tree"), record, size=200 << 20)
store.create("full", image, memory=64 << 20, walls=walls)
machines.start_guest("full").close()
try:
    shell("full", "echo kept > /root/kept; sync")
    before = snapshots.create("full", "before")
    room = os.statvfs(home)
    with open(home / "ballast", "wb") as file:
        os.posix_fallocate(file.fileno(), 0, room.f_bavail * room.f_frsize - (8 << 20))
    assert manage.state("full").fault == ""
    shell("full", "dd if=/dev/urandom of=/root/fill bs=64k count=640; sync", timeout_s=60)

    # What the guest sees: an error, and a file system that nothing can spoil any more.
    status, _, text = control.execute("full", ["sh", "-c", "echo more > /root/more"])
    assert (status != 0, b"Read-only file system" in text) == (True, True), text
    assert shell("full", "cat /root/kept") == "kept\\n"
    # What its owner sees.
    assert manage.state("full").state == "running"
    assert "disk is full" in manage.state("full").fault
    # Nothing new can be kept, and nothing half made stays.
    for attempt in (lambda: snapshots.create("full", "second"), lambda: snapshots.clone("full", "other")):
        try:
            attempt()
        except OSError as error:
            assert error.errno == errno.ENOSPC, error
        else:
            raise AssertionError("there was room")
    assert snapshots.names("full") == ["before"] and store.names() == ["full"]
    assert not list(snapshots.directory("full").glob(".*")), os.listdir(snapshots.directory("full"))
    assert control.request("full", "status")["frozen"] is False
    last = stop("full")
    assert last["cause"] == "halted", last

    # With room again.
    (home / "ballast").unlink()
    snapshots.checked("full", snapshots.load("full", "before"))
    machines.start_guest("full").close()
    assert manage.state("full").fault == ""
    assert shell("full", "cat /root/kept; echo more > /root/more && sync && cat /root/more") == "kept\\nmore\\n"
    stop("full")
    snapshots.restore("full", "before")
    machines.start_guest("full").close()
    assert shell("full", "ls /root") == "kept\\n"
finally:
    machines.discard("full")
print("recovered")
"""


@pytest.mark.parametrize("walls", ["vm", "jail,vm"])
def test_guest_survives_the_hosts_full_disk_and_writes_again_once_there_is_room(tmp_path: Path, walls: str) -> None:
    needs_uml()
    home = tmp_path / "home"
    home.mkdir()
    mount = 'mount -t tmpfs -o size=96m,mode=0755 none "$1"; STOCKADE_HOME=$1; export STOCKADE_HOME; shift; exec "$@"'
    path = os.pathsep.join((*sys.path, os.fspath(Path(__file__).parent)))
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-ec", mount, "sh", home, sys.executable, "-c", SCENARIO, walls],
        env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "recovered\n"), done.stderr
