"""The launch plan: what a spec and a lock become, without starting anything."""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec
import pytest
from conftest import make_lock, make_rootfs

from stockade import contain
from stockade.errors import SpecError
from stockade.kernel import landlock
from stockade.records.launch import Bind, Filesystem, IdRange, LaunchPlan, LogSocket, MakeDirectory
from stockade.records.lock import LockDirectory, LockEntry
from stockade.records.spec import Spec

ROOT = IdRange(first=1879048192, first_gid=1879048192, count=65536, kind="root-range")
SINGLE = IdRange(first=1000, first_gid=1000, count=1, kind="single")
SUBID = IdRange(first=100000, first_gid=200000, count=65536, kind="subid")


@pytest.fixture
def generation(tmp_path: Path) -> Path:
    make_rootfs(tmp_path / "rootfs")
    return tmp_path


def compiled(
    generation: Path, spec: dict[str, object] | None = None, ids: IdRange = ROOT, **lock: object
) -> LaunchPlan:
    full = msgspec.convert({"name": "test", "service": {"command": ["/bin/true"]}} | (spec or {}), Spec)
    return contain.compile_plan(full, make_lock(**lock), generation=generation, volumes=Path("/volumes"), ids=ids)


def test_same_input_gives_the_same_bytes(generation: Path) -> None:
    assert contain.encode(compiled(generation)) == contain.encode(compiled(generation))


def test_user_and_groups_come_from_the_jails_own_files(generation: Path) -> None:
    plan = compiled(generation, {"service": {"command": ["/bin/true"], "user": "www", "groups": ["tty"]}})
    assert (plan.uid, plan.gid, plan.groups) == (33, 33, (5, 44))
    assert ("HOME", "/var/lib/data") in plan.environment


def test_passwd_that_is_a_link_out_of_the_root_is_read_inside(generation: Path) -> None:
    passwd = generation / "rootfs/etc/passwd"
    passwd.rename(generation / "rootfs/etc/real")
    passwd.symlink_to("/etc/real")
    assert compiled(generation, {"service": {"command": ["/bin/true"], "user": "www"}}).uid == 33


@pytest.mark.parametrize(
    ("service", "message"),
    [
        ({"user": "absent"}, "the jail has no user `absent`"),
        ({"user": "www", "group": "absent"}, "the jail has no group `absent`"),
        ({"user": "www", "groups": ["absent"]}, "the jail has no group `absent`"),
        ({"user": "99999"}, "the service's uid 99999 is not below the jail's 65536 ids"),
    ],
)
def test_unknown_accounts_are_errors(generation: Path, service: dict[str, object], message: str) -> None:
    with pytest.raises(SpecError) as caught:
        compiled(generation, {"service": {"command": ["/bin/true"]} | service})
    assert str(caught.value) == message
    assert caught.value.hint


def test_number_needs_no_account(generation: Path) -> None:
    plan = compiled(generation, {"service": {"command": ["/bin/true"], "user": "1234"}})
    assert (plan.uid, plan.gid) == (1234, 1234)


def test_volumes_are_never_idmapped_or_executable_by_setuid(generation: Path) -> None:
    directories = (LockDirectory(path="/var/lib/data", mode=0o755, volume="data"),)
    plan = compiled(generation, directories=directories)
    volume = next(step for step in plan.mounts if isinstance(step, Bind) and step.volume)
    assert (volume.source, volume.target, volume.own, volume.writable) == ("/volumes/data", "/var/lib/data", True, True)
    from stockade.contain import wire

    assert wire.text(wire.BIND, "/volumes/data", "/var/lib/data", numbers=(17, 2 | 4)) in contain.encode(plan)


def test_tmpfs_inside_a_tmpfs_is_a_directory_of_it(generation: Path) -> None:
    plan = compiled(generation, directories=(
        LockDirectory(path="/run/a/b", mode=0o700, uid=1, gid=2), LockDirectory(path="/run", mode=0o755),
    ))  # fmt: skip
    mounted = [step.target for step in plan.mounts if isinstance(step, Filesystem) and step.type == "tmpfs"]
    assert [path for path in mounted if path.startswith("/run")] == ["/run"]
    made = [(step.path, step.mode, step.uid) for step in plan.mounts if isinstance(step, MakeDirectory)]
    assert made[:3] == [("/run", 0o755, 0), ("/run/a", 0o755, 0), ("/run/a/b", 0o700, 1)]


def test_with_one_id_everything_made_is_the_services(generation: Path) -> None:
    plan = compiled(generation, {"service": {"command": ["/bin/true"], "user": "www"}}, SINGLE)
    assert {(step.uid, step.gid) for step in plan.mounts if isinstance(step, MakeDirectory)} == {(33, 33)}
    assert (plan.inside_uid, plan.inside_gid, plan.groups) == (33, 33, ())


def test_syslog_socket_is_the_locks_unless_the_spec_says_otherwise(generation: Path) -> None:
    def has_socket(spec: dict[str, object], **lock: object) -> bool:
        return any(isinstance(step, LogSocket) for step in compiled(generation, spec, **lock).mounts)

    service = {"command": ["/bin/true"]}
    assert not has_socket({})
    assert has_socket({}, syslog=True)
    assert has_socket({"service": service | {"syslog": True}})
    assert not has_socket({"service": service | {"syslog": False}}, syslog=True)


def test_capabilities_auto_are_the_locks(generation: Path) -> None:
    assert compiled(generation, capabilities=("kill",)).capabilities == 1 << 5
    assert compiled(generation, {"policy": {"capabilities": []}}, capabilities=("kill",)).capabilities == 0


def test_plain_chroot_of_root_is_refused(generation: Path) -> None:
    with pytest.raises(SpecError, match="gives root up, and the service is to run as root"):
        compiled(generation, {"walls": ["chroot"]})


def rights(plan: LaunchPlan) -> dict[str, int]:
    if plan.landlock is None:
        pytest.skip("this kernel has no Landlock")
    return {rule.path: rule.access for rule in plan.landlock.rules}


def test_places_with_files_to_serve_end_the_lookup_of_an_open(generation: Path) -> None:
    entries = (
        *make_lock().entries,
        LockEntry(path="/var/lib/data/page", type="file", mode=0o444),
        LockEntry(path="/etc/passwd", type="file", mode=0o444),
    )
    mounts = [
        {"source": "/usr", "target": "/mnt"}, {"source": "/bin/true", "target": "/home/program"},
        {"source": "/usr", "target": "/root", "writable": True},
    ]  # fmt: skip
    volume = (LockDirectory(path="/tmp", mode=0o1777), LockDirectory(path="/var/lib/data", mode=0o755, volume="data"))
    granted = rights(compiled(generation, {"mounts": mounts}, entries=entries, directories=volume, proc="full"))
    assert sorted(granted) == [
        "/", "/dev", "/dev/shm", "/home/program", "/mnt", "/proc", "/root", "/tmp", "/var", "/var/lib/data",
    ]  # fmt: skip
    asked = (landlock.READ_FILE | landlock.TRUNCATE) & granted["/tmp"]  # an older ABI knows no TRUNCATE
    for path, access in granted.items():
        assert path == "/" or access & asked == asked, path


def test_no_rule_grants_more_than_the_mount_at_its_place(generation: Path) -> None:
    mounts = [{"source": "/usr", "target": "/mnt"}, {"source": "/usr", "target": "/home", "writable": True}]
    entries = (*make_lock().entries, LockEntry(path="/var/page", type="file", mode=0o444))
    granted = rights(compiled(generation, {"mounts": mounts}, entries=entries))
    anywhere = landlock.READ_FILE | landlock.READ_DIR | landlock.EXECUTE
    assert granted["/"] == anywhere
    for path in ("/mnt", "/var"):  # read-only: EROFS comes before Landlock is asked for this right
        assert granted[path] & ~(anywhere | landlock.TRUNCATE) == 0
    for path in ("/home", "/tmp", "/run"):
        assert granted[path] & (landlock.MAKE_CHAR | landlock.MAKE_BLOCK | landlock.IOCTL_DEV) == 0


def test_read_only_trees_keep_no_time_of_access_where_that_can_be_said(generation: Path) -> None:
    from stockade.contain import wire

    spec: dict[str, object] = {
        "service": {"command": ["/bin/true"], "user": "www"}, "mounts": [{"source": "/usr", "target": "/mnt"}],
    }  # fmt: skip
    for ids, attributes in ((ROOT, 1 | 2 | 4 | 16), (SINGLE, 1 | 2 | 4), (SUBID, 1 | 2 | 4)):
        if ids is SUBID and shutil.which("newuidmap") is None:
            continue
        encoded = contain.encode(compiled(generation, spec, ids))
        assert wire.text(wire.BIND, "/usr", "/mnt", numbers=(wire.TREE_SUBMOUNTS, attributes)) in encoded


def test_dry_run_tells_every_step(generation: Path) -> None:
    lines = contain.describe(compiled(generation, {"hostname": "inside"}, SUBID, syslog=True))
    for line in (
        "map the ids 0 to 65535 to 100000 to 165535",
        "mount rootfs on / read-only",
        "make directory /run/www, mode 0750, owner 33:33",
        "mount device /dev/null on /dev/null, writable",
        "make the log socket /dev/log",
        "host name inside",
        "become uid 0, gid 0",
        "capabilities: none",
        "execute /bin/true",
    ):
        assert line in lines
