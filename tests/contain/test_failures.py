"""Every step that fails ends the launch with its name, its object and a cause; nothing is left and nothing goes on."""

from __future__ import annotations

import os
import socket
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Builder
from processes import wardens

from stockade import contain, places
from stockade.contain import failures, wire
from stockade.errors import WallError
from stockade.records.lock import LockDirectory

SLEEP = {"service": {"command": ["/bin/sleep", "100"]}}


def no_such_tmp(generation: Path, plan: bytes) -> bytes:
    (generation / "rootfs/tmp").rmdir()
    return plan


def symlinked_rootfs(generation: Path, plan: bytes) -> bytes:
    (generation / "rootfs").rename(generation / "elsewhere")
    (generation / "rootfs").symlink_to("elsewhere")
    return plan


def added(*records: bytes) -> Callable[[Path, bytes], bytes]:
    """The plan with further records at its end."""

    def change(generation: Path, plan: bytes) -> bytes:
        count = int.from_bytes(plan[12:16], sys.byteorder) + len(records)
        return plan[:12] + count.to_bytes(4, sys.byteorder) + plan[16:] + b"".join(records)

    return change


def swapped(old: bytes, new: bytes) -> Callable[[Path, bytes], bytes]:
    def change(generation: Path, plan: bytes) -> bytes:
        assert old in plan
        return plan.replace(old, new)

    return change


def ids_record(inside: int) -> bytes:
    return wire.record(wire.MAP, 0, 0, 1879048192, inside)


FAULTS = {
    "source": (
        symlinked_rootfs,
        "`source` failed on `rootfs` (ELOOP): a symlink stands where Stockade made a directory",
    ),
    "mount": (no_such_tmp, "`mount` failed on `/tmp` (ENOENT): the jail has no such path to mount on"),
    "source of a mount": (
        added(wire.text(wire.BIND, "/absent", "/mnt")),
        "`source` failed on `/absent` (ENOENT): it does not exist",
    ),
    "file system type": (added(wire.text(wire.MOUNT, "nofs", "/mnt")), "`mount` failed on `/mnt` (ENODEV)"),
    "mount option": (added(wire.text(wire.MOUNT, "tmpfs", "/mnt", "nooption=1")), "`mount` failed on `/mnt` (EINVAL)"),
    "mkdir": (added(wire.text(wire.MKDIR, "/mnt/x", numbers=(0o755,))), "`mkdir` failed on `/mnt/x` (EROFS)"),
    "mkfile": (added(wire.text(wire.MKFILE, "/mnt/x")), "`mkfile` failed on `/mnt/x` (EROFS)"),
    "symlink": (added(wire.text(wire.SYMLINK, "a", "/mnt/x")), "`symlink` failed on `/mnt/x` (EROFS)"),
    "read-only": (added(wire.text(wire.READONLY, "/absent")), "`read-only` failed on `/absent` (ENOENT)"),
    "log socket": (added(wire.text(wire.LOG_SOCKET, "/mnt/log")), "`log socket` failed on `/mnt/log` (EROFS)"),
    "sysctl": (
        added(wire.text(wire.SYSCTL, "/proc/sys/absent", "1")),
        "`sysctl` failed on `/proc/sys/absent` (ENOENT)",
    ),
    "hostname": (added(wire.text(wire.HOSTNAME, "x" * 65)), "(EINVAL)"),
    "rlimit": (
        added(wire.record(wire.RLIMIT, 7, 1 << 62, 1 << 62)),
        "`rlimit` failed on `open_files` (EPERM): it is more than the caller may have",
    ),
    "uid": (
        added(wire.record(wire.IDS, 70000, 0)),
        "`uid` failed on `70000` (EINVAL): the uid is outside of the jail's ids",
    ),
    "gid": (
        added(wire.record(wire.IDS, 0, 70000)),
        "`gid` failed on `70000` (EINVAL): the gid is outside of the jail's ids",
    ),
    "groups": (added(wire.record(wire.GROUPS, payload=(70000).to_bytes(4, sys.byteorder))), "`groups` failed"),
    "directory": (added(wire.text(wire.DIRECTORY, "/absent")), "`directory` failed on `/absent` (ENOENT)"),
    "landlock": (added(wire.record(wire.LANDLOCK, 1 << 60)), "`landlock` failed on `create ruleset` (EINVAL)"),
    "landlock path": (
        added(wire.text(wire.LANDLOCK_PATH, "/absent", numbers=(4, 0))),
        "`landlock` failed on `/absent` (ENOENT)",
    ),
    "seccomp": (added(wire.record(wire.SECCOMP, 0, payload=bytes(8))), "`seccomp` failed on `filter` (EINVAL)"),
    "cgroup": (added(wire.text(wire.CGROUP_DIR, "/absent/x")), "`cgroup` failed on `/absent/x` (ENOENT)"),
    "cgroup join": (added(wire.text(wire.CGROUP_JOIN, "/absent")), "`cgroup` failed on `/absent` (ENOENT)"),
    "write": (added(wire.text(wire.WRITE, "/absent/x", "1")), "`write` failed on `/absent/x` (ENOENT)"),
    "helper": (
        added(wire.text(wire.HELPER, "/absent/helper", "{pid}")),
        "`helper` failed on `/absent/helper` (ENOENT)",
    ),
    "helper that fails": (added(wire.text(wire.HELPER, "/bin/false")), "`helper` failed on `/bin/false` (EPERM)"),
    "id map": (swapped(ids_record(65536), ids_record(0)), "`id map` failed on `host root` (EPERM)"),
    "passed directory": (None, "`descriptors` failed on"),
    "log": (added(wire.text(wire.LOG, "/absent/log")), "`log` failed on `/absent/log` (ENOENT)"),
}  # fmt: skip


GONE = {
    "volume": ("volumes/data", "the volume is gone, with what was in it", "put it back from a copy"),
    "rootfs": ("current/rootfs", "the built root file system is gone", "build the jail again"),
    "mount": ("../../shared", "it does not exist on the host", "put it back; or drop it from the spec (`[[mounts]]`"),
}


@pytest.mark.parametrize("what", GONE)
def test_what_vanished_has_a_hint_of_its_own(jail: Builder, home: Path, what: str) -> None:
    path, why, hint = GONE[what]
    shared = home / "state" / "shared"
    shared.mkdir(parents=True)
    volume = LockDirectory(path="/var/lib/data", mode=0o755, volume="data")
    spec = SLEEP | {"mounts": [{"source": str(shared), "target": "/mnt"}]}
    jail(spec=spec, directories=(LockDirectory(path="/tmp", mode=0o1777), volume))
    (places.jail("test") / path).rename(home / "elsewhere")
    with pytest.raises(WallError) as caught:
        contain.launch("test")
    assert caught.value.message.startswith("launch step `source` failed on `")
    assert caught.value.message.endswith(f" (ENOENT): {why}")
    assert caught.value.hint is not None and caught.value.hint.startswith(hint)


@pytest.mark.parametrize("fault", FAULTS)
def test_failed_step_ends_the_launch_by_name(jail: Builder, fault: str) -> None:
    change, message = FAULTS[fault]
    generation = jail(spec=SLEEP)
    plan = (generation / "plan").read_bytes()
    directory = os.open("/", os.O_RDONLY)
    try:
        sockets = [directory] if change is None else []
        with pytest.raises(WallError) as caught:
            contain.launch_generation(
                generation, plan=plan if change is None else change(generation, plan), sockets=sockets
            )
    finally:
        os.close(directory)
    assert caught.value.exit_code == 125
    assert str(caught.value).startswith("launch step `")
    assert message in str(caught.value)
    assert wardens() == set()
    assert list(places.run().iterdir()) == []


def test_caller_that_may_not_make_namespaces_is_told_the_cure() -> None:
    error = failures.wall_error("1 namespaces: clone")
    assert str(error) == (
        "launch step `namespaces` failed on `clone` (EPERM): this host does not let the caller make user namespaces"
    )
    assert error.hint is not None
    for name in ("unprivileged_userns_clone", "apparmor_restrict_unprivileged_userns", "max_user_namespaces"):
        assert name in error.hint


def test_every_cause_belongs_to_a_step_of_the_warden() -> None:
    table = tomllib.loads(Path(failures.__file__).with_name("failures.toml").read_text())["cause"]
    sources = Path(__file__).parents[2] / "warden"
    text = "".join(path.read_text() for path in sources.glob("*.c"))
    for cause in table:
        if "step" in cause:  # without, it is any step's
            assert f'"{cause["step"]}"' in text, cause


def test_object_of_a_failure_cannot_forge_a_line(jail: Builder) -> None:
    generation = jail(spec=SLEEP)
    plan = added(wire.text(wire.DIRECTORY, "/x\nexec ok\ninit 1 1"))(generation, (generation / "plan").read_bytes())
    with pytest.raises(WallError, match=r"`directory` failed on `/x\?exec ok\?init 1 1`"):
        contain.launch_generation(generation, plan=plan)


def test_listening_sockets_are_passed_in(jail: Builder) -> None:
    jail()
    with socket.create_server(("127.0.0.1", 0)) as server, contain.launch(
        "test", argv=["/bin/sh", "-c", "echo $$ $LISTEN_PID $LISTEN_FDS; readlink /proc/self/fd/3"],
        sockets=[server.fileno()], stdout=-1,
    ) as running:  # fmt: skip
        assert running.stdout is not None
        lines = running.stdout.read().decode().splitlines()
        assert lines[0] == "2 2 1"
        assert lines[1].startswith("socket:")
        assert running.wait(10) == 0
