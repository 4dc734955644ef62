"""Layouts and plans by what the kernel's and systemd's documents say, on trees made for the test."""

from __future__ import annotations

from pathlib import Path

import pytest

from stockade.errors import SpecError
from stockade.kernel.cgroup_plan import plan
from stockade.kernel.cgroups import disk_of, entrance, layout
from stockade.records.policy import CgroupLayout, CgroupOperation, CgroupPlan, NotLimited, size_bytes
from stockade.records.spec import Limits

ALL = Limits(memory="256M", processes=64, cpus=1.5, cpu_weight=50, io_read="10M", io_write="5M")
FILES = ("memory.swap.max",)
CONTROLLERS = "cpuset cpu io memory hugetlb pids rdma misc"


def write(root: Path, path: str, text: str = "") -> None:
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def version_2(root: Path, *, systemd: bool) -> None:
    """A host with the unified hierarchy, as systemd or another init mounts it."""
    write(root, "proc/self/mountinfo", (
        "22 1 254:1 / / rw,relatime - ext4 /dev/vda1 rw\n"
        "30 24 0:26 / /sys/fs/cgroup rw,nosuid,nodev,noexec,relatime shared:9 - cgroup2 cgroup2 rw,nsdelegate\n"
    ))  # fmt: skip
    write(root, "proc/swaps", "Filename Type Size Used Priority\n/dev/vda2 partition 999 0 -2\n")
    write(root, "sys/fs/cgroup/cgroup.controllers", CONTROLLERS + "\n")
    write(root, "sys/fs/cgroup/cgroup.subtree_control", "")
    write(root, "sys/fs/cgroup/system.slice/memory.swap.max", "max\n")
    write(root, "sys/fs/cgroup/init.scope/memory.swap.max", "max\n")
    if systemd:
        write(root, "run/systemd/system/marker")


def writes(made: CgroupPlan) -> dict[str, str]:
    return {operation.path: operation.value for operation in made.make if operation.kind == "write"}


def test_root_on_version_2_with_systemd_gets_a_delegated_scope(tmp_path: Path) -> None:
    version_2(tmp_path, systemd=True)
    found = layout(root=str(tmp_path), uid=0)
    base = "/sys/fs/cgroup/system.slice"
    assert found == CgroupLayout(
        version=2, controllers=dict.fromkeys(["cpu", "io", "memory", "pids"], base), base=base, enable=True,
        manager="system", files=FILES, swap=True,
    )  # fmt: skip
    made = plan(ALL, found, "web", disk="8:0")
    scope = f"{base}/stockade-web.scope"
    assert made.wrapper == (
        "systemd-run", "--scope", "--quiet", "--collect", "--unit=stockade-web.scope", "--slice=system.slice",
        "--property=Delegate=yes", "--",
    )  # fmt: skip
    assert made.make == (
        # cgroup-v2.rst, "No Internal Process Constraint": the supervisor is in a leaf before controllers are enabled.
        CgroupOperation(kind="directory", path=f"{scope}/supervisor", kept=True),
        CgroupOperation(kind="write", path=f"{scope}/supervisor/cgroup.procs", value="0"),
        CgroupOperation(kind="write", path=f"{scope}/cgroup.subtree_control", value="+cpu +io +memory +pids"),
        CgroupOperation(kind="directory", path=f"{scope}/jail"),
        CgroupOperation(kind="write", path=f"{scope}/jail/memory.max", value="268435456"),
        CgroupOperation(kind="write", path=f"{scope}/jail/memory.swap.max", value="0"),
        CgroupOperation(kind="write", path=f"{scope}/jail/memory.oom.group", value="1"),
        CgroupOperation(kind="write", path=f"{scope}/jail/pids.max", value="65"),
        CgroupOperation(kind="write", path=f"{scope}/jail/cpu.max", value="150000 100000"),
        CgroupOperation(kind="write", path=f"{scope}/jail/cpu.weight", value="50"),
        CgroupOperation(kind="write", path=f"{scope}/jail/io.max", value="8:0 rbps=10485760 wbps=5242880"),
    )
    assert made.join == (f"{scope}/jail/cgroup.procs",)
    assert made.remove == (
        CgroupOperation(kind="kill", path=f"{scope}/jail/cgroup.kill", value="1"),
        CgroupOperation(kind="remove", path=f"{scope}/jail"),
    )
    assert set(made.directories.values()) == {f"{scope}/jail"}
    assert made.not_limited == ()


def test_an_ordinary_user_gets_a_scope_of_its_own_manager_with_what_is_delegated(tmp_path: Path) -> None:
    version_2(tmp_path, systemd=True)
    own = "sys/fs/cgroup/user.slice/user-1000.slice/user@1000.service"
    write(tmp_path, f"{own}/cgroup.controllers", "memory pids\n")
    write(tmp_path, f"{own}/app.slice/memory.swap.max", "max\n")
    write(tmp_path, "run/user/1000/systemd/private")
    made = plan(ALL, layout(root=str(tmp_path), uid=1000), "web", disk="8:0")
    scope = f"/{own}/app.slice/stockade-web.scope"
    assert made.wrapper[:2] == ("systemd-run", "--user")
    assert "--slice=app.slice" in made.wrapper
    assert writes(made) == {
        f"{scope}/supervisor/cgroup.procs": "0",
        f"{scope}/cgroup.subtree_control": "+memory +pids",
        f"{scope}/jail/memory.max": "268435456",
        f"{scope}/jail/memory.swap.max": "0",
        f"{scope}/jail/memory.oom.group": "1",
        f"{scope}/jail/pids.max": "65",
    }
    assert made.not_limited == (
        NotLimited(limit="cpus", reason="`user@.service` does not delegate the controller `cpu` to this user"),
        NotLimited(limit="cpu_weight", reason="`user@.service` does not delegate the controller `cpu` to this user"),
        NotLimited(limit="io_read", reason="`user@.service` does not delegate the controller `io` to this user"),
        NotLimited(limit="io_write", reason="`user@.service` does not delegate the controller `io` to this user"),
    )


def test_swap_is_limited_in_a_slice_that_systemd_has_yet_to_make(tmp_path: Path) -> None:
    """The user's `app.slice` comes with its first unit, and its controllers with the first that asks for them."""
    version_2(tmp_path, systemd=True)
    own = "sys/fs/cgroup/user.slice/user-1000.slice/user@1000.service"
    write(tmp_path, f"{own}/cgroup.controllers", "memory pids\n")
    write(tmp_path, "run/user/1000/systemd/private")
    for path in ("system.slice", "init.scope"):
        (tmp_path / "sys/fs/cgroup" / path / "memory.swap.max").unlink()
    assert layout(root=str(tmp_path), uid=1000).files == ()
    write(tmp_path, f"{own}/memory.swap.max", "max\n")
    found = layout(root=str(tmp_path), uid=1000)
    assert found.files == FILES
    assert plan(Limits(memory="64M"), found, "web").not_limited == ()


@pytest.mark.parametrize(
    ("session", "writable", "scoped"),
    [
        ("/user.slice/user-1000.slice/session-3.scope", "", True),
        ("/user.slice/user-1000.slice/user@1000.service/app.slice/terminal.scope", "", False),
        ("/user.slice/user-1000.slice/session-3.scope", "/user.slice/user-1000.slice", False),
    ],
)
def test_a_process_enters_a_jail_by_a_scope_of_the_user_where_no_common_ancestor_is_the_users(
    tmp_path: Path, session: str, writable: str, scoped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """cgroup-v2.rst, "Delegation Containment": who moves a process may write cgroup.procs of the common ancestor."""
    version_2(tmp_path, systemd=True)
    own = "/user.slice/user-1000.slice/user@1000.service"
    write(tmp_path, "run/user/1000/systemd/private")
    write(tmp_path, "proc/self/cgroup", f"0::{session}\n")
    delegated = {f"{tmp_path}/sys/fs/cgroup{place}/cgroup.procs" for place in (f"{own}/app.slice", writable) if place}
    monkeypatch.setattr("os.access", lambda path, _: str(path) in delegated)
    jail = f"/sys/fs/cgroup{own}/app.slice/stockade-web-1.scope/jail"
    found = entrance(jail, root=str(tmp_path), uid=1000)
    assert found == (
        ("systemd-run", "--user", "--scope", "--quiet", "--collect", "--slice=app.slice", "--") if scoped else ()
    )
    assert entrance(jail, root=str(tmp_path), uid=0) == ()


def test_version_1_and_a_user_without_a_manager_have_no_scope_to_enter_by(tmp_path: Path) -> None:
    version_1(tmp_path)
    assert entrance("/sys/fs/cgroup/memory/stockade-web", root=str(tmp_path), uid=1000) == ()
    version_2(tmp_path, systemd=True)
    write(tmp_path, "proc/self/cgroup", "0::/user.slice/user-1000.slice/session-3.scope\n")
    assert entrance("/sys/fs/cgroup/stockade-web/jail", root=str(tmp_path), uid=1000) == ()


def test_a_user_without_a_running_manager_is_told_so_for_every_limit(tmp_path: Path) -> None:
    version_2(tmp_path, systemd=True)
    found = layout(root=str(tmp_path), uid=1000)
    assert found.version == 0
    made = plan(Limits(memory="1G", cpus=1.0), found, "web")
    reason = "no systemd of user 1000 is running (`loginctl enable-linger` starts one)"
    assert made == CgroupPlan(
        not_limited=(NotLimited(limit="memory", reason=reason), NotLimited(limit="cpus", reason=reason))
    )


def test_root_without_systemd_makes_a_group_below_the_root_of_the_tree(tmp_path: Path) -> None:
    version_2(tmp_path, systemd=False)
    made = plan(Limits(memory="64M"), layout(root=str(tmp_path), uid=0), "web")
    top = "/sys/fs/cgroup"
    assert made.wrapper == ()
    assert made.make == (
        CgroupOperation(kind="write", path=f"{top}/cgroup.subtree_control", value="+memory +pids"),
        CgroupOperation(kind="directory", path=f"{top}/stockade-web"),
        CgroupOperation(kind="write", path=f"{top}/stockade-web/memory.max", value="67108864"),
        CgroupOperation(kind="write", path=f"{top}/stockade-web/memory.swap.max", value="0"),
        CgroupOperation(kind="write", path=f"{top}/stockade-web/memory.oom.group", value="1"),
    )


def test_below_a_group_that_has_processes_only_controllers_already_enabled_are_used(tmp_path: Path) -> None:
    version_2(tmp_path, systemd=False)
    write(tmp_path, "sys/fs/cgroup/cgroup.type", "domain\n")  # only the root cgroup has none
    write(tmp_path, "sys/fs/cgroup/cgroup.subtree_control", "pids\n")
    made = plan(Limits(memory="64M", processes=9), layout(root=str(tmp_path), uid=0), "web")
    assert writes(made) == {"/sys/fs/cgroup/stockade-web/pids.max": "10"}
    assert made.not_limited == (NotLimited(limit="memory", reason="the controller `memory` is not there"),)


def test_swap_that_is_not_counted_is_a_finding(tmp_path: Path) -> None:
    version_2(tmp_path, systemd=False)
    for name in ("system.slice", "init.scope"):
        (tmp_path / f"sys/fs/cgroup/{name}/memory.swap.max").unlink()
    made = plan(Limits(memory="64M"), layout(root=str(tmp_path), uid=0), "web")
    assert not any(path.endswith("swap.max") for path in writes(made))
    assert made.not_limited == (
        NotLimited(limit="memory", reason="swap is not counted: the kernel runs without swap accounting"),
    )


def version_1(root: Path) -> None:
    """A host as systemd mounts version 1: cpu and cpuacct together, version 2 beside it without controllers."""
    mounts = {name: name for name in ("memory", "pids", "cpu,cpuacct", "blkio")} | {"systemd": "name=systemd"}
    lines = [
        f"3{place} 30 0:3{place} / /sys/fs/cgroup/{directory} rw,nosuid shared:{place} - cgroup cgroup rw,{options}\n"
        for place, (directory, options) in enumerate(mounts.items())
    ]
    lines.append("40 30 0:40 / /sys/fs/cgroup/unified rw,nosuid shared:10 - cgroup2 cgroup2 rw\n")
    write(root, "proc/self/mountinfo", "".join(lines))
    for directory in mounts:
        (root / "sys/fs/cgroup" / directory).mkdir(parents=True)
    write(root, "sys/fs/cgroup/unified/cgroup.controllers", "hugetlb\n")
    write(root, "sys/fs/cgroup/memory/memory.memsw.limit_in_bytes", "9223372036854771712\n")


def test_version_1_has_a_directory_and_a_file_to_join_in_each_hierarchy(tmp_path: Path) -> None:
    version_1(tmp_path)
    made = plan(ALL, layout(root=str(tmp_path), uid=0), "web", disk="8:0")
    top = "/sys/fs/cgroup"
    assert [operation.path for operation in made.make if operation.kind == "directory"] == [
        f"{top}/{name}/stockade-web" for name in ("blkio", "cpu,cpuacct", "memory", "pids")
    ]
    assert list(writes(made).items()) == [
        (f"{top}/memory/stockade-web/memory.limit_in_bytes", "268435456"),
        # memory.rst: memsw may never be below the limit, so it comes second.
        (f"{top}/memory/stockade-web/memory.memsw.limit_in_bytes", "268435456"),
        (f"{top}/pids/stockade-web/pids.max", "65"),
        (f"{top}/cpu,cpuacct/stockade-web/cpu.cfs_period_us", "100000"),
        (f"{top}/cpu,cpuacct/stockade-web/cpu.cfs_quota_us", "150000"),
        (f"{top}/cpu,cpuacct/stockade-web/cpu.shares", "512"),
        (f"{top}/blkio/stockade-web/blkio.throttle.read_bps_device", "8:0 10485760"),
        (f"{top}/blkio/stockade-web/blkio.throttle.write_bps_device", "8:0 5242880"),
    ]
    assert made.join == tuple(
        f"{top}/{name}/stockade-web/cgroup.procs" for name in ("blkio", "cpu,cpuacct", "memory", "pids")
    )
    assert made.wrapper == ()


def test_a_controller_that_is_not_mounted_is_a_finding_and_not_an_error(tmp_path: Path) -> None:
    version_1(tmp_path)
    mounts = (tmp_path / "proc/self/mountinfo").read_text().splitlines(keepends=True)
    write(tmp_path, "proc/self/mountinfo", "".join(line for line in mounts if "pids" not in line))
    made = plan(Limits(processes=9, memory="64M"), layout(root=str(tmp_path), uid=0), "web")
    assert made.not_limited == (NotLimited(limit="processes", reason="the controller `pids` is not there"),)
    assert not any("pids" in operation.path for operation in made.make)


def test_io_limits_without_a_disk_are_a_finding(tmp_path: Path) -> None:
    version_2(tmp_path, systemd=False)
    made = plan(Limits(io_read="1M"), layout(root=str(tmp_path), uid=0), "web", disk=None)
    assert made.not_limited == (NotLimited(limit="io_read", reason="the jail's files are on no single disk"),)


def test_a_host_without_control_groups_says_so(tmp_path: Path) -> None:
    write(tmp_path, "proc/self/mountinfo", "22 1 254:1 / / rw,relatime - ext4 /dev/vda1 rw\n")
    assert layout(root=str(tmp_path), uid=0).reason == "no control group controller is mounted on this host"


def test_no_limit_and_no_accounting_is_an_empty_plan(tmp_path: Path) -> None:
    version_2(tmp_path, systemd=True)
    made = plan(Limits(open_files=9), layout(root=str(tmp_path), uid=0), "web", accounting=False)
    assert made == CgroupPlan(version=2)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (Limits(memory="0"), "`limits.memory` is `0`, and must be between 1M"),
        (Limits(memory="1000K"), "`limits.memory` is `1000K`, and must be between 1M"),
        (Limits(memory="99999999999999999T"), "`limits.memory` is `99999999999999999T`, and must be"),
        (Limits(cpus=0.001), "`limits.cpus` is `0.001`, and must be between 0.01"),
        (Limits(cpus=1e12), "`limits.cpus` is `1000000000000.0`, and must be"),
        (Limits(cpus=float("nan")), "`limits.cpus` is `nan`, and must be"),
        (Limits(processes=1 << 40), "`limits.processes` is `1099511627776`, more than"),
        (Limits(io_read="0"), "`limits.io_read` is `0`, which is no rate"),
        (Limits(io_write="99999999T"), "`limits.io_write` is `99999999T`, which is no rate"),
    ],
)
def test_an_absurd_limit_is_an_error(limits: Limits, message: str) -> None:
    with pytest.raises(SpecError) as caught:
        plan(limits, CgroupLayout(reason="none"), "web")
    assert caught.value.message.startswith(message)
    assert caught.value.hint


def test_the_least_share_of_a_cpu_is_what_the_kernel_takes(tmp_path: Path) -> None:
    version_2(tmp_path, systemd=False)
    made = plan(Limits(cpus=0.01), layout(root=str(tmp_path), uid=0), "web")
    assert writes(made)["/sys/fs/cgroup/stockade-web/cpu.max"] == "1000 100000"


@pytest.mark.parametrize(
    ("text", "size"), [("0", 0), ("512", 512), ("1K", 1024), ("3M", 3 << 20), ("2G", 2 << 30), ("1T", 1 << 40)]
)
def test_sizes_are_powers_of_1024(text: str, size: int) -> None:
    assert size_bytes(text) == size


def test_the_disk_of_a_partition_is_the_whole_disk(tmp_path: Path) -> None:
    import os

    number = os.stat(tmp_path).st_dev
    disk, partition = tmp_path / "sys/devices/vda", tmp_path / "sys/devices/vda/vda1"
    write(tmp_path, "sys/devices/vda/dev", "254:0\n")
    write(tmp_path, "sys/devices/vda/vda1/dev", "254:1\n")
    write(tmp_path, "sys/devices/vda/vda1/partition", "1\n")
    link = tmp_path / f"sys/dev/block/{os.major(number)}:{os.minor(number)}"
    link.parent.mkdir(parents=True)
    link.symlink_to(partition)
    assert disk_of(tmp_path, root=str(tmp_path)) == "254:0"
    link.unlink()
    link.symlink_to(disk)
    assert disk_of(tmp_path, root=str(tmp_path)) == "254:0"
    link.unlink()
    assert disk_of(tmp_path, root=str(tmp_path)) is None
