"""A volume with a size: full inside, harmless outside, and gone from the host's devices with its jail."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
from functools import partial
from pathlib import Path

import msgspec
import pytest
from conftest import Builder, build, make_lock, make_rootfs, output
from processes import exists, until

from stockade import contain, places
from stockade.build.lock import encode as encode_lock
from stockade.cli import application
from stockade.contain import filesystem, limiting
from stockade.contain.ids import FIRST, for_jail
from stockade.errors import HostError, StateError, WallError
from stockade.kernel import loop
from stockade.records.lock import LockDirectory
from stockade.records.spec import Spec

MB = 1 << 20
TMPFS = (LockDirectory(path="/run", mode=0o755), LockDirectory(path="/tmp", mode=0o1777))
AS_WWW = {"service": {"command": ["/bin/sleep", "100"], "user": "www"}}


def volume(size: int = 16 * MB, inodes: int = 0) -> tuple[LockDirectory, ...]:
    data = LockDirectory(path="/var/lib/data", mode=0o750, uid=33, gid=33, volume="data", size=size, inodes=inodes)
    return (*TMPFS, data)


@pytest.fixture(autouse=True)
def _loop_devices(jail: Builder) -> None:
    reason = limiting.lacking(for_jail("test"))
    if reason:
        pytest.skip(f"{reason}: `stockade doctor` has the cure")


def image(name: str = "test") -> Path:
    return places.jail(name) / "volumes/data"


def attached(file: Path) -> list[str]:
    """Loop devices that the kernel keeps on `file`."""
    found = []
    for device in Path("/sys/block").glob("loop*"):
        try:
            backing = (device / "loop/backing_file").read_text().rstrip("\n").removesuffix(" (deleted)")
        except OSError:
            continue  # bound to nothing, or not any more
        if backing == os.path.realpath(file):
            found.append(device.name)
    return found


def rebuilt(directories: tuple[LockDirectory, ...], *, number: int = 2, spec: dict[str, object] | None = None) -> Path:
    """A further generation of the jail `test`, current, as a build makes it."""
    jail = places.jail("test")
    generation = jail / f"generations/{number:04}"
    make_rootfs(generation / "rootfs")
    full = msgspec.convert({"name": "test", "service": {"command": ["/bin/sh"]}} | (spec or AS_WWW), Spec)
    lock = make_lock(directories=directories)
    (generation / "lock.json").write_bytes(encode_lock(lock))
    (generation / "spec.json").write_bytes(msgspec.json.encode(full))
    contain.install(full, lock, generation=generation)
    (jail / "current").unlink()
    (jail / "current").symlink_to(f"generations/{number:04}")
    return generation


def shell(script: str, **options: object) -> str:
    """What a script in a jail of its own says, which must succeed."""
    status, out, err = output("test", "/bin/sh", "-ec", script, **options)
    assert (status, err) == (0, "")
    return out


def capacity(what: str) -> int:
    """Blocks or inodes that the volume has, as the jail sees it."""
    return int(shell(f"stat -f -c %{what} /var/lib/data"))


def room(path: Path) -> int:
    status = os.statvfs(path)
    return status.f_bavail * status.f_frsize


def leftovers() -> list[str]:
    return [path.name for path in image().parent.iterdir() if path.name != "data"]


def test_full_volume_is_full_for_its_jail_alone(jail: Builder) -> None:
    jail("other", AS_WWW, directories=volume())
    jail(spec=AS_WWW, directories=volume())
    before = room(image())
    status, _, err = output("test", "/bin/dd", "if=/dev/zero", "of=/var/lib/data/big", "bs=1M", "count=64")
    assert status != 0 and "No space left" in err
    again = output("test", "/bin/dd", "if=/dev/zero", "of=/var/lib/data/more", "bs=1M", "count=1")
    assert again[0] != 0 and "No space left" in again[2]
    assert image().stat().st_size == 16 * MB
    assert image().stat().st_blocks * 512 <= 16 * MB
    assert before - room(image()) < 64 * MB, "what the jail wrote went to the host's file system"
    assert output("other", "/bin/dd", "if=/dev/zero", "of=/var/lib/data/own", "bs=1M", "count=4")[0] == 0
    shell("rm /var/lib/data/big; echo room > /var/lib/data/more")
    assert shell("cat /var/lib/data/more") == "room\n"


def test_volume_takes_no_more_files_than_its_inodes(jail: Builder) -> None:
    jail(spec=AS_WWW, directories=volume(inodes=100))
    script = "i=0; while touch /var/lib/data/$i; do i=$((i+1)); done; echo $i"
    status, out, err = output("test", "/bin/sh", "-c", script)
    assert status == 0 and "No space left" in err
    # The seed is one already, and mke2fs fills the last block of inodes.
    assert 99 <= int(out) <= 99 + 32


def test_volume_starts_with_what_the_rootfs_has_and_outlives_the_jail(jail: Builder) -> None:
    jail(spec=AS_WWW, directories=volume())
    assert shell("ls -a /var/lib/data; stat -c '%a %u %g' /var/lib/data; stat -c %u /var/lib/data/seed") == (
        ".\n..\nseed\n750 33 33\n0\n"
    )
    shell("cat /var/lib/data/seed; echo kept > /var/lib/data/new")
    assert shell("cat /var/lib/data/seed /var/lib/data/new; stat -c %u /var/lib/data/new") == (
        "from the rootfs\nkept\n33\n"
    )
    assert (image().stat().st_uid, image().stat().st_mode & 0o7777) == (0, 0o600)
    assert leftovers() == []


def test_volume_honours_neither_setuid_nor_devices(jail: Builder) -> None:
    jail(spec=AS_WWW, directories=volume())
    options = shell("grep ' /var/lib/data ' /proc/mounts").split()[3].split(",")
    assert {"rw", "nosuid", "nodev"} <= set(options)


def test_only_the_jail_has_the_volume_mounted(jail: Builder) -> None:
    jail(spec=AS_WWW, directories=volume())
    before = Path("/proc/self/mountinfo").read_text()
    with contain.launch("test"):
        assert Path("/proc/self/mountinfo").read_text() == before
        assert len(attached(image())) == 1
    assert until(lambda: not attached(image()))


def test_runs_of_one_jail_share_the_volume_and_its_device(jail: Builder) -> None:
    jail(spec=AS_WWW, directories=volume())
    waits = "for i in $(seq 200); do test -e /var/lib/data/told && break; sleep 0.1; done; cat /var/lib/data/told"
    with contain.launch("test", argv=["/bin/sh", "-c", waits], stdout=subprocess.PIPE) as first:
        assert first.stdout is not None
        shell("echo from the second > /var/lib/data/.told; cd /var/lib/data; cp .told new; cat new")
        assert len(attached(image())) == 1
        shell("echo word > /var/lib/data/told")
        assert first.stdout.read() == b"word\n"
        assert first.wait(20) == 0
    assert until(lambda: not attached(image()))


def test_many_runs_at_once_never_attach_the_volume_twice(jail: Builder) -> None:
    jail(spec=AS_WWW, directories=volume())
    running = [contain.launch("test", argv=["/bin/sleep", "100"]) for _ in range(3)]
    starters = [
        subprocess.Popen([
            sys.executable, "-c",
            f"from stockade import contain\nfor turn in range(5):\n with contain.launch('test', argv=['/bin/sh', '-c', "
            f"'echo $0 > /var/lib/data/{number}', str(turn)]) as jail: assert jail.wait(30) == 0",
        ])
        for number in range(3)
    ]  # fmt: skip
    try:
        assert len(attached(image())) == 1
        assert [starter.wait(60) for starter in starters] == [0, 0, 0]
        assert len(attached(image())) == 1
    finally:
        for starter in starters:
            starter.kill()
        for one in running:
            one.close()
    assert shell("cat /var/lib/data/0 /var/lib/data/1 /var/lib/data/2") == "4\n4\n4\n"


@pytest.mark.parametrize("killed", ["supervisor_pid", "init_pid", "pid"])
@pytest.mark.parametrize("detach", [False, True])
def test_killed_jail_leaves_no_device_and_a_whole_volume(jail: Builder, killed: str, detach: bool) -> None:
    jail(spec=AS_WWW, directories=volume())
    script = "echo kept > /var/lib/data/kept; sync; i=0; while :; do echo $i > /var/lib/data/count; i=$((i+1)); done"
    running = contain.launch("test", argv=["/bin/sh", "-c", script], detach=detach)
    inside = Path(f"/proc/{running.pid}/root/var/lib/data/count")
    assert until(lambda: inside.exists() and inside.read_text() not in ("", "0\n"))
    pids = running.supervisor_pid, running.init_pid
    os.kill(getattr(running, killed), signal.SIGKILL)
    if killed == "supervisor_pid" and detach:
        contain.stop("test")  # without its supervisor it goes on
    assert until(lambda: not any(exists(pid) for pid in pids))
    running.close()
    assert until(lambda: not attached(image()))
    assert shell("cat /var/lib/data/kept; cat /var/lib/data/count > /tmp/count") == "kept\n"
    checked = subprocess.run(["e2fsck", "-fn", str(image())], capture_output=True, text=True, timeout=60, check=False)
    assert until(lambda: not attached(image())) and checked.returncode == 0, checked.stdout


def test_journal_of_a_host_that_went_down_is_replayed(jail: Builder, tmp_path: Path) -> None:
    jail(spec=AS_WWW, directories=volume())
    script = "echo kept > /var/lib/data/new; echo ready; sleep 100"
    with contain.launch("test", argv=["/bin/sh", "-c", script], stdout=subprocess.PIPE) as running:
        assert running.stdout is not None and running.stdout.readline() == b"ready\n"
        os.sync()
        # What is in the file now is what a power cut would leave.
        crashed = tmp_path / "crashed"
        crashed.write_bytes(image().read_bytes())
    header = subprocess.run(["dumpe2fs", "-h", str(crashed)], capture_output=True, text=True, timeout=60, check=True)
    assert "needs_recovery" in header.stdout
    assert until(lambda: not attached(image()))
    os.replace(crashed, image())
    assert shell("cat /var/lib/data/new") == "kept\n"


_FULL_HOST = """
import os, subprocess, sys
sys.path[:0] = sys.argv[1].split(":")
import conftest
import test_sized_volumes as t
from pathlib import Path
from stockade.contain import filesystem

home = os.environ["STOCKADE_HOME"]
os.mkdir(home)
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24M,mode=700", "none", home], check=True)
conftest.build("test", t.AS_WWW, conftest.make_lock(directories=t.volume(64 << 20)))
t.shell("echo kept > /var/lib/data/kept; sync")
full = conftest.output("test", "/bin/dd", "if=/dev/zero", "of=/var/lib/data/big", "bs=1M", "count=50", "conv=fsync")
assert full[0] != 0, full
subprocess.run(["mount", "-o", "remount,size=200M", "none", home], check=True)
assert t.shell("cat /var/lib/data/kept; echo more > /var/lib/data/more") == "kept\\n"
assert t.until(lambda: not t.attached(t.image()))
print(t.shell("cat /var/lib/data/more; sync"), end="")
print(filesystem.marked(t.image().parent))
"""


def test_full_host_costs_the_volume_nothing_that_was_written_out_before(jail: Builder, tmp_path: Path) -> None:
    path = f"{Path(__file__).parent}:{Path(contain.__file__).parents[2]}"
    done = subprocess.run(
        ["unshare", "--mount", "--propagation", "private", "--", sys.executable, "-c", _FULL_HOST, path],
        env={**os.environ, "STOCKADE_HOME": str(tmp_path / "small")}, capture_output=True, text=True, timeout=120,
        check=False,
    )  # fmt: skip
    assert done.stdout.splitlines() == ["more", "[]"], done.stderr


def test_volume_that_the_kernel_marked_as_damaged_is_mended_at_the_next_start(jail: Builder) -> None:
    jail(spec=AS_WWW, directories=volume())
    shell("echo kept > /var/lib/data/new")
    assert until(lambda: not attached(image()))
    # What the kernel writes after an error, and a link count that is wrong.
    commands = "set_super_value state 2\nset_inode_field /new links_count 7\n"
    subprocess.run(
        ["debugfs", "-w", "-f", "/dev/stdin", str(image())], input=commands, text=True, timeout=60, check=True
    )
    assert filesystem.marked(image().parent) == [image()]
    assert shell("cat /var/lib/data/new; stat -c %h /var/lib/data/new") == "kept\n1\n"
    assert filesystem.marked(image().parent) == []


def test_ephemeral_run_changes_no_volume(jail: Builder) -> None:
    jail(spec=AS_WWW, directories=volume())
    script = "cat /var/lib/data/seed; echo gone > /var/lib/data/new; cat /var/lib/data/new"
    assert shell(script, ephemeral=True) == "from the rootfs\ngone\n"
    assert shell("ls /var/lib/data") == "seed\n"


def test_entered_jail_has_the_volume(jail: Builder) -> None:
    jail(spec=AS_WWW, directories=volume())
    contain.launch("test", detach=True).close()
    with contain.enter("test", ["/bin/cat", "/var/lib/data/seed"], stdout=subprocess.PIPE) as entered:
        assert entered.stdout is not None and entered.stdout.read() == b"from the rootfs\n"
    contain.stop("test", timeout_s=0.2)
    assert until(lambda: not attached(image()))


def test_restarted_life_has_the_volume(jail: Builder) -> None:
    script = "echo life >> /var/lib/data/lives; exit 1"
    service = {"command": ["/bin/sh", "-c", script], "user": "www", "restart": "always"}
    jail(spec={"service": service}, directories=volume())
    contain.launch("test", detach=True).close()
    assert until(lambda: any(jail.restarts >= 2 for jail in contain.running()), seconds=20)
    contain.stop("test", timeout_s=0.2)
    assert shell("cat /var/lib/data/lives").splitlines()[:2] == ["life", "life"]


# ------------------------------------------------------------------------------------------- another size


def fill_directory() -> None:
    """What a jail may leave in a volume that is a directory: any name, link, owner and time, and a socket."""
    top = image()
    (top / "sub").mkdir()
    odd = os.fsencode(top / "sub") + b'/a \xff\n"name'
    Path(os.fsdecode(odd)).write_text("odd")
    (top / "private").write_text("secret")
    (top / "private").chmod(0o640)
    os.chown(top / "private", FIRST + 33, FIRST + 44)
    os.utime(top / "private", (1500000000, 1500000000))
    os.link(top / "private", top / "linked")
    (top / "link").symlink_to("/etc/passwd")
    os.setxattr(top / "private", "user.note", b"kept")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"/proc/self/fd/{os.open(top, os.O_RDONLY | os.O_CLOEXEC)}/s")


def test_directory_that_gets_a_size_keeps_all_that_it_holds(jail: Builder) -> None:
    jail(spec=AS_WWW, directories=volume(size=0))
    shell("echo kept > /var/lib/data/new")
    fill_directory()
    rebuilt(volume())
    assert stat.S_ISREG(image().stat().st_mode)
    assert leftovers() == []
    seen = shell(
        "cd /var/lib/data; cat seed new private sub/*; stat -c '%a %u %g %h %Y' private linked; readlink link; "
        "stat -c '%F' s; stat -c '%a %u' ."
    )
    assert seen == (
        "from the rootfs\nkept\nsecretodd640 33 44 2 1500000000\n640 33 44 2 1500000000\n/etc/passwd\nsocket\n750 33\n"
    )
    with contain.launch("test") as running:
        assert os.getxattr(f"/proc/{running.pid}/root/var/lib/data/private", "user.note") == b"kept"


def test_running_jail_gets_the_size_at_its_next_start(jail: Builder) -> None:
    jail(spec=AS_WWW, directories=volume(size=0))
    contain.launch("test", detach=True).close()
    rebuilt(volume())
    assert image().is_dir(), "the volume was changed under a running service"
    with pytest.raises(StateError, match="once nothing of it runs"):
        contain.launch("test", argv=["/bin/true"])
    os.kill(contain.find("test").supervisor_pid, signal.SIGKILL)
    with pytest.raises(StateError, match="once nothing of it runs"):
        contain.launch("test", argv=["/bin/true"])
    contain.stop("test", timeout_s=0.2)
    assert shell("cat /var/lib/data/seed") == "from the rootfs\n"
    assert image().is_file()
    assert output("test", "/bin/true")[0] == 0


def test_size_that_the_version_before_left_to_the_next_start_is_given(jail: Builder) -> None:
    """Its mark is empty, as its builds made the volumes themselves."""
    jail(spec=AS_WWW, directories=volume())
    contain.launch("test", detach=True).close()
    generation = rebuilt(volume(32 * MB))
    contain.stop("test", timeout_s=0.2)
    places.due(generation).unlink()
    (generation / "resize").touch()
    assert shell("cat /var/lib/data/seed") == "from the rootfs\n"
    assert image().stat().st_size == 32 * MB and not (generation / "resize").exists()


def test_rollback_to_a_generation_that_was_never_launched_keeps_a_volume_that_became_larger(jail: Builder) -> None:
    jail("other")
    build("test", AS_WWW, make_lock(directories=volume(16 * MB)), volumes=False)
    rebuilt(volume(32 * MB))
    shell("echo kept > /var/lib/data/new")
    (places.jail("test") / "current").unlink()
    (places.jail("test") / "current").symlink_to("generations/0001")
    assert shell("cat /var/lib/data/new") == "kept\n"
    assert image().stat().st_size == 32 * MB


def test_what_does_not_fit_is_refused_and_stays(jail: Builder) -> None:
    jail(spec=AS_WWW, directories=volume(size=0))
    shell("dd if=/dev/urandom of=/var/lib/data/big bs=1M count=20 2>/dev/null")
    with pytest.raises(StateError, match="does not fit into 16 MB: it has too many bytes"):
        rebuilt(volume())
    assert (image() / "big").stat().st_size == 20 * MB
    assert leftovers() == []
    for number in range(60):
        (image() / str(number)).touch()
    with pytest.raises(StateError, match="does not fit into 64 MB: it has too many files"):
        rebuilt(volume(64 * MB, inodes=40), number=3)
    assert leftovers() == []
    (places.jail("test") / "current").unlink()
    (places.jail("test") / "current").symlink_to("generations/0001")
    assert shell("ls /var/lib/data").count("\n") == 62


def test_larger_size_makes_the_volume_larger_and_keeps_it(jail: Builder) -> None:
    jail(spec=AS_WWW, directories=volume())
    shell("echo kept > /var/lib/data/new")
    small = capacity("b")
    rebuilt(volume(400 * MB))
    assert image().stat().st_size == 400 * MB
    assert capacity("b") > 20 * small
    assert shell("cat /var/lib/data/seed /var/lib/data/new") == "from the rootfs\nkept\n"
    assert leftovers() == []


def test_other_number_of_files_makes_the_volume_anew_and_keeps_it(jail: Builder) -> None:
    jail(spec=AS_WWW, directories=volume(inodes=100))
    shell("echo kept > /var/lib/data/new")
    rebuilt(volume(inodes=3000))
    assert 3000 <= capacity("c") <= 3050
    rebuilt(volume(600 * MB, inodes=200), number=3)
    assert 200 <= capacity("c") <= 400
    assert shell("cat /var/lib/data/seed /var/lib/data/new; stat -c '%a %u' /var/lib/data") == (
        "from the rootfs\nkept\n750 33\n"
    )
    assert leftovers() == []
    inode = image().stat().st_ino
    rebuilt(volume(600 * MB, inodes=200), number=4)
    assert image().stat().st_ino == inode, "what is right was made anew"


def test_smaller_size_is_refused(jail: Builder) -> None:
    jail(spec=AS_WWW, directories=volume(32 * MB))
    with pytest.raises(StateError, match="has 32 MB, and the spec gives it 16 MB") as caught:
        rebuilt(volume(16 * MB))
    assert "32M or more" in str(caught.value.hint)
    assert shell("cat /var/lib/data/seed") == "from the rootfs\n"


def test_generation_from_before_the_size_still_starts(jail: Builder) -> None:
    jail(spec=AS_WWW, directories=volume(size=0))
    rebuilt(volume())
    shell("echo kept > /var/lib/data/new")
    (places.jail("test") / "current").unlink()
    (places.jail("test") / "current").symlink_to("generations/0001")
    assert shell("cat /var/lib/data/new") == "kept\n"
    assert capacity("b") * 4096 < 16 * MB


def test_build_killed_while_it_gives_a_size_leaves_a_whole_volume(jail: Builder, tmp_path: Path) -> None:
    jail(spec=AS_WWW, directories=volume(size=0))
    shell("dd if=/dev/zero of=/var/lib/data/big bs=1M count=8 2>/dev/null")
    code = (
        "import os, sys; sys.path[:0] = sys.argv[1].split(':')\n"
        "import test_sized_volumes as t\n"
        "t.rebuilt(t.volume(), number=int(sys.argv[2]))\n"
    )
    path = f"{Path(__file__).parent}:{Path(contain.__file__).parents[2]}"

    def begun(builder: subprocess.Popen[bytes]) -> bool:
        return bool(leftovers()) or image().is_file() or builder.poll() is not None

    for number in range(2, 8):
        builder = subprocess.Popen([sys.executable, "-c", code, path, str(number)])
        assert until(partial(begun, builder), seconds=30)
        builder.kill()
        builder.wait(30)
        (places.jail("test") / "current").unlink(missing_ok=True)
        (places.jail("test") / "current").symlink_to("generations/0001")
        assert shell("cat /var/lib/data/seed; stat -c %s /var/lib/data/big") == f"from the rootfs\n{8 * MB}\n"
    rebuilt(volume(), number=9)
    assert shell("cat /var/lib/data/seed; stat -c %s /var/lib/data/big") == f"from the rootfs\n{8 * MB}\n"
    assert leftovers() == []


def test_mount_point_in_the_place_of_a_volume_is_refused_a_size(jail: Builder) -> None:
    jail(spec=AS_WWW, directories=volume(size=0))
    code = (
        "import os, sys; sys.path[:0] = sys.argv[1].split(':')\n"
        "import test_sized_volumes as t\n"
        "from stockade.errors import StateError\n"
        "os.system(f'mount --bind {t.image()} {t.image()}')\n"
        "try: t.rebuilt(t.volume())\n"
        "except StateError as error: print(error.message)\n"
    )
    path = f"{Path(__file__).parent}:{Path(contain.__file__).parents[2]}"
    done = subprocess.run(
        ["unshare", "--mount", "--propagation", "private", "--", sys.executable, "-c", code, path],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert "is a mount point, and the spec gives the volume `data` a size" in done.stdout, done.stderr


# ----------------------------------------------------------------------------------- what a host may lack


@pytest.mark.parametrize("target", ["/etc", "../../../../../../etc"])
def test_symlink_in_the_place_of_a_volume_is_never_followed(jail: Builder, target: str) -> None:
    jail(spec=AS_WWW, directories=volume())
    image().unlink()
    image().symlink_to(target)
    with pytest.raises(WallError, match=r"launch step `source` failed on `.*/volumes/data` \(ELOOP\)"):
        contain.launch("test")
    with pytest.raises(StateError, match="is neither a directory nor a file"):
        rebuilt(volume())
    assert image().is_symlink() and leftovers() == []


def test_directory_is_not_mounted_where_the_plan_wants_a_size(jail: Builder) -> None:
    jail(spec=AS_WWW, directories=volume())
    image().unlink()
    image().mkdir()
    with pytest.raises(WallError, match=r"launch step `volume` failed on `.*/volumes/data` \(EISDIR\)") as caught:
        contain.launch("test")
    assert "stockade build" in str(caught.value.hint)


def test_damaged_file_system_is_said_and_the_device_let_go(jail: Builder) -> None:
    jail(spec=AS_WWW, directories=volume())
    with open(image(), "r+b") as file:
        file.seek(1024)
        file.write(bytes(1024))
    with pytest.raises(WallError, match=r"launch step `volume` failed .* the file system in it is damaged"):
        contain.launch("test")
    assert until(lambda: not attached(image()))
    with pytest.raises(StateError, match="holds no ext4 file system"):
        rebuilt(volume())


def test_host_without_loop_devices_starts_the_jail_and_says_what_is_not_limited(
    jail: Builder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "_CONTROL", "/nonexistent")
    jail(spec=AS_WWW, directories=volume())
    assert image().is_dir()
    assert shell("cat /var/lib/data/seed") == "from the rootfs\n"
    (missing,) = limiting.not_limited(make_lock(directories=volume()), for_jail("test"))
    assert missing.limit == "size of the volume `/var/lib/data`"
    assert "no loop devices" in missing.reason and "modprobe loop" in missing.remedy


def test_start_says_what_the_spec_limits_and_this_host_does_not(
    jail: Builder, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(loop, "_CONTROL", "/nonexistent")
    jail(spec=AS_WWW, directories=volume())
    rebuilt(volume())
    assert application.run(["start", "test"]) == 0
    assert "not limited: size of the volume `/var/lib/data`: there are no loop devices" in capfd.readouterr().err
    contain.stop("test", timeout_s=0.2)
    rebuilt(volume(size=0), number=3)
    assert application.run(["start", "test"]) == 0
    assert "not limited" not in capfd.readouterr().err


def test_removed_jail_takes_its_volume_along(jail: Builder) -> None:
    jail(spec=AS_WWW, directories=volume())
    rebuilt(volume())
    shell("echo kept > /var/lib/data/new")
    assert application.run(["rm", "--force", "test"]) == 0
    assert not places.jail("test").exists()
    assert until(lambda: not attached(image()))


def test_loop_device_that_vanished_since_the_build_is_said(jail: Builder, tmp_path: Path) -> None:
    jail(spec=AS_WWW, directories=volume())
    code = "from stockade import contain; contain.launch('test')"
    done = subprocess.run(
        ["unshare", "--mount", "--propagation", "private", "--", "sh", "-c",
         'mount -t tmpfs none /dev && mknod -m 666 /dev/null c 1 3 && for n in zero full random urandom tty; do '
         'touch /dev/$n; done; exec "$0" -c "$1"', sys.executable, code],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert "launch step `loop device` failed on `/dev/loop-control` (ENOENT): it cannot be opened" in done.stderr


def test_host_without_mke2fs_says_what_to_install(jail: Builder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filesystem, "_PATH", "/nonexistent")
    with pytest.raises(HostError, match="`mke2fs` is not installed, and a volume with a size needs it") as caught:
        jail(spec=AS_WWW, directories=volume())
    assert caught.value.hint == "`apt-get install e2fsprogs`"


def test_full_disk_is_said_and_nothing_is_left(jail: Builder, tmp_path: Path) -> None:
    code = (
        "import errno, os, sys; sys.path[:0] = sys.argv[1].split(':')\n"
        "from pathlib import Path\n"
        "from stockade.contain import filesystem\n"
        "try: filesystem.make(Path(sys.argv[2]), Path(sys.argv[3], 'image'), size=64 << 20, inodes=0)\n"
        "except OSError as error: print(errno.errorcode[error.errno])\n"
    )
    tree, small = tmp_path / "tree", tmp_path / "small"
    tree.mkdir()
    small.mkdir()
    (tree / "big").write_bytes(os.urandom(8 * MB))
    done = subprocess.run(
        ["unshare", "--mount", "--propagation", "private", "--", "sh", "-c",
         'mount -t tmpfs -o size=4M none "$4" && exec "$0" -c "$1" "$2" "$3" "$4"', sys.executable, code,
         str(Path(contain.__file__).parents[2]), str(tree), str(small)],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.stdout == "ENOSPC\n", done.stderr
