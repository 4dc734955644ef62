"""Volumes, tmpfs, host paths, and what an ephemeral run leaves of them."""

from __future__ import annotations

import os
import shutil
import threading
from pathlib import Path

import pytest
from conftest import Builder, build, make_lock, output
from processes import until

from stockade import contain, places
from stockade.contain import volumes as making
from stockade.contain.ids import FIRST
from stockade.errors import WallError
from stockade.kernel import beneath
from stockade.records.lock import LockDirectory

TMPFS = (LockDirectory(path="/run", mode=0o755), LockDirectory(path="/tmp", mode=0o1777))
VOLUME = LockDirectory(path="/var/lib/data", mode=0o750, uid=33, gid=33, volume="data")
AS_WWW = {"service": {"command": ["/bin/sleep", "100"], "user": "www"}}


def test_volume_starts_with_what_the_rootfs_has_and_outlives_the_jail(jail: Builder) -> None:
    jail(spec=AS_WWW, directories=(*TMPFS, VOLUME))
    assert output("test", "/bin/sh", "-c", "cat /var/lib/data/seed; echo kept > /var/lib/data/new") == (
        0, "from the rootfs\n", "",
    )  # fmt: skip
    assert output("test", "/bin/cat", "/var/lib/data/new") == (0, "kept\n", "")


def test_first_launches_at_the_same_time_make_the_volume_once(jail: Builder) -> None:
    jail("other")  # skips where the fixture has a reason to
    generation = build("test", AS_WWW, make_lock(directories=(*TMPFS, VOLUME)), volumes=False)
    volumes = places.jail("test") / "volumes"
    assert not volumes.exists() and places.due(generation).exists()
    done: list[tuple[int, str, str]] = []
    script = "cat /var/lib/data/seed; echo $$ >> /var/lib/data/new"
    threads = [threading.Thread(target=lambda: done.append(output("test", "/bin/sh", "-c", script))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert done == [(0, "from the rootfs\n", "")] * 6
    assert len((volumes / "data/new").read_text().splitlines()) == 6
    assert os.listdir(volumes) == ["data"] and not places.due(generation).exists()


def test_volume_that_could_not_be_made_is_made_by_the_next_launch(jail: Builder) -> None:
    jail("other")
    generation = build("test", AS_WWW, make_lock(directories=(*TMPFS, VOLUME)), volumes=False)
    volumes = places.jail("test") / "volumes"
    volumes.write_text("in the way")
    with pytest.raises(OSError, match="data|volumes"):
        contain.launch("test", argv=["/bin/true"])
    assert places.due(generation).exists()
    volumes.unlink()
    assert output("test", "/bin/cat", "/var/lib/data/seed") == (0, "from the rootfs\n", "")


def test_what_a_kill_left_half_made_is_gone_after_the_next_launch(jail: Builder) -> None:
    """Also where the kill came when every volume had its name, and only what it was made of was still there."""
    jail("other")
    generation = build("test", AS_WWW, make_lock(directories=(*TMPFS, VOLUME)))
    volumes = places.jail("test") / "volumes"
    (volumes / ".new-0123/half").mkdir(parents=True)
    places.due(generation).write_text("33 33\n")
    assert output("test", "/bin/cat", "/var/lib/data/seed") == (0, "from the rootfs\n", "")
    assert os.listdir(volumes) == ["data"] and not places.due(generation).exists()


def test_volume_is_on_disk_before_it_has_its_name(jail: Builder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a power cut leaves it with empty files, and the next launch takes it for whole."""
    jail("other")
    build("test", AS_WWW, make_lock(directories=(*TMPFS, VOLUME)), volumes=False)
    volume = places.jail("test") / "volumes/data"
    written: list[tuple[bytes, bool]] = []
    syncfs = beneath.syncfs

    def seen(descriptor: int) -> None:
        within = os.open("seed", os.O_RDONLY, dir_fd=descriptor)
        written.append((os.read(within, 100), volume.exists()))
        os.close(within)
        syncfs(descriptor)

    monkeypatch.setattr(making, "syncfs", seen)
    assert output("test", "/bin/cat", "/var/lib/data/seed") == (0, "from the rootfs\n", "")
    assert written == [(b"from the rootfs\n", False)]


def test_volume_belongs_to_the_jails_ids_on_disk(jail: Builder) -> None:
    jail(spec=AS_WWW, directories=(*TMPFS, VOLUME))
    output("test", "/bin/touch", "/var/lib/data/new")
    volume = places.jail("test") / "volumes/data"
    assert (volume.stat().st_uid, volume.stat().st_mode & 0o7777) == (FIRST + 33, 0o750)
    assert (volume / "seed").stat().st_uid == FIRST
    assert (volume / "new").stat().st_uid == FIRST + 33
    assert volume.parent.stat().st_mode & 0o077 == 0


def test_setuid_file_left_in_a_volume_is_not_the_hosts_root(jail: Builder) -> None:
    jail(spec={"policy": {"capabilities": ["dac_override"]}}, directories=(*TMPFS, VOLUME))
    output("test", "/bin/sh", "-c", "cp /bin/busybox /var/lib/data/su && chmod 4755 /var/lib/data/su")
    left = (places.jail("test") / "volumes/data/su").stat()
    assert left.st_uid == FIRST


@pytest.mark.parametrize("target", ["/etc", "../../../../../../etc"])
def test_volume_replaced_by_a_symlink_is_refused(jail: Builder, target: str) -> None:
    jail(spec=AS_WWW, directories=(*TMPFS, VOLUME))
    volume = places.jail("test") / "volumes/data"
    shutil.rmtree(volume)
    volume.symlink_to(target)
    with pytest.raises(WallError, match=r"launch step `source` failed on `.*/volumes/data` \(ELOOP\)"):
        contain.launch("test")


def test_volume_swapped_for_a_symlink_all_the_time_never_shows_the_host(jail: Builder) -> None:
    jail(spec=AS_WWW, directories=(*TMPFS, VOLUME))
    volume = places.jail("test") / "volumes/data"
    (volume / "mark").write_text("volume\n")
    spare = volume.with_name("link")
    spare.symlink_to("/etc")
    ended = threading.Event()

    def swap() -> None:
        # renameat2(2) RENAME_EXCHANGE: at every moment there is one or the other.
        import ctypes

        libc = ctypes.CDLL(None, use_errno=True)
        while not ended.is_set():
            libc.renameat2(-100, os.fsencode(spare), -100, os.fsencode(volume), 2)

    thread = threading.Thread(target=swap)
    thread.start()
    seen = {"refused": 0, "volume": 0}
    try:
        for _ in range(60):
            try:
                code, out, err = output("test", "/bin/cat", "/var/lib/data/mark")
            except WallError as error:
                assert "(ELOOP)" in str(error)
                seen["refused"] += 1
            else:
                assert (code, out, err) == (0, "volume\n", "")
                seen["volume"] += 1
    finally:
        ended.set()
        thread.join(10)
    assert min(seen.values()) > 0, seen


def test_ephemeral_run_changes_no_volume(jail: Builder) -> None:
    jail(spec=AS_WWW, directories=(*TMPFS, VOLUME))
    volume = places.jail("test") / "volumes/data"
    script = "cat /var/lib/data/seed; echo gone > /var/lib/data/new; cat /var/lib/data/new"
    assert output("test", "/bin/sh", "-c", script, ephemeral=True) == (0, "from the rootfs\ngone\n", "")
    assert sorted(path.name for path in volume.iterdir()) == ["seed"]


def test_symlink_in_the_rootfs_leads_no_mount_out(jail: Builder) -> None:
    mount = {"source": "/usr/share", "target": "/escape"}
    generation = jail(spec=AS_WWW | {"mounts": [mount]}, directories=TMPFS)
    inside = (generation / "rootfs/etc").stat().st_ino
    assert inside != Path("/etc").stat().st_ino
    with contain.launch("test") as running:
        targets = [line.split()[4] for line in Path(f"/proc/{running.pid}/mountinfo").read_text().splitlines()]
        assert "/etc" in targets, "the link was not resolved inside the root"


def test_host_paths_are_mounted_read_only_unless_said_otherwise(jail: Builder, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    (shared / "file").write_text("host\n")
    shared.chmod(0o777)
    mounts = [{"source": str(shared), "target": "/mnt"}, {"source": str(shared), "target": "/home", "writable": True}]
    jail(spec={"mounts": mounts})
    assert output("test", "/bin/cat", "/mnt/file") == (0, "host\n", "")
    assert output("test", "/bin/touch", "/mnt/new")[0] != 0
    assert output("test", "/bin/touch", "/home/new") == (0, "", "")
    assert (shared / "new").stat().st_uid == FIRST
    mounted = output("test", "/bin/grep", " /home ", "/proc/mounts")[1]
    assert {"rw", "relatime"} <= set(mounted.split()[3].split(","))
    assert {"nosuid", "nodev"} <= set(mounted.split()[3].split(","))


def test_no_time_of_access_is_asked_for_where_none_can_be_kept(jail: Builder, tmp_path: Path) -> None:
    jail(spec={"mounts": [{"source": str(tmp_path), "target": "/mnt"}]})
    out = output("test", "/bin/cat", "/proc/mounts")[1].splitlines()
    options = {line.split()[1]: set(line.split()[3].split(",")) for line in out}
    for place in ("/", "/mnt"):
        assert {"ro", "nosuid", "nodev", "noatime"} <= options[place]


def test_tmpfs_has_its_size_inodes_owners_and_modes(jail: Builder) -> None:
    jail(
        spec=AS_WWW | {"directories": {"/tmp": {"mode": "1777", "size": "1M", "inodes": 20}}},
        directories=(*TMPFS, LockDirectory(path="/run/a/b", mode=0o710, uid=33, gid=44)),
    )
    out = output("test", "/bin/stat", "-c", "%n %a %u %g", "/tmp", "/run", "/run/a", "/run/a/b")[1].splitlines()
    assert out == ["/tmp 1777 0 0", "/run 755 0 0", "/run/a 755 0 0", "/run/a/b 710 33 44"]
    assert "No space left" in output("test", "/bin/dd", "if=/dev/zero", "of=/tmp/x", "bs=1M", "count=2")[2]
    assert "No space left" in output("test", "/bin/sh", "-c", "for i in $(seq 30); do touch /tmp/$i; done")[2]


def test_tmpfs_is_new_at_each_launch(jail: Builder) -> None:
    jail()
    assert output("test", "/bin/touch", "/tmp/x")[0] == 0
    assert output("test", "/bin/ls", "/tmp") == (0, "", "")


def test_nothing_of_the_jails_mounts_reaches_the_host(jail: Builder) -> None:
    before = Path("/proc/self/mountinfo").read_text()
    jail(spec=AS_WWW, directories=(*TMPFS, VOLUME))
    with contain.launch("test") as running:
        assert until(lambda: running.pid > 0)
        assert Path("/proc/self/mountinfo").read_text() == before
