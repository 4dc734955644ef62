"""What a process behind the walls is and has, seen from outside as root."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Builder, output
from processes import descriptors, status

from stockade import contain
from stockade.contain.ids import FIRST
from stockade.errors import WallError
from stockade.records.lock import LockDirectory

SYS_KEYCTL = {"x86_64": 250, "aarch64": 219}.get(os.uname().machine, 250)
SLEEP = {"service": {"command": ["/bin/sleep", "100"]}}


def test_jail_has_namespaces_of_its_own(jail: Builder) -> None:
    jail(spec=SLEEP)
    with contain.launch("test") as running:
        for kind in ("user", "mnt", "pid", "ipc", "uts", "net", "cgroup"):
            assert os.readlink(f"/proc/{running.pid}/ns/{kind}") != os.readlink(f"/proc/self/ns/{kind}"), kind


def test_host_network_shares_only_the_network(jail: Builder) -> None:
    jail(spec=SLEEP | {"network": {"mode": "host"}})
    with contain.launch("test") as running:
        assert os.readlink(f"/proc/{running.pid}/ns/net") == os.readlink("/proc/self/ns/net")
        assert os.readlink(f"/proc/{running.pid}/ns/user") != os.readlink("/proc/self/ns/user")


def test_no_id_of_the_jail_is_the_hosts_root(jail: Builder) -> None:
    jail(spec=SLEEP)
    with contain.launch("test") as running:
        for name in ("uid_map", "gid_map"):
            lines = Path(f"/proc/{running.pid}/{name}").read_text().splitlines()
            assert [line.split() for line in lines] == [["0", str(FIRST), "65536"]]
        assert status(running.pid)["Uid"].split() == [str(FIRST)] * 4
        assert status(running.init_pid)["Uid"].split() == [str(FIRST)] * 4


def test_plan_that_maps_host_root_is_refused(jail: Builder) -> None:
    from stockade.contain import wire

    generation = jail(spec=SLEEP)
    plan = (generation / "plan").read_bytes()
    evil = plan.replace(wire.record(wire.MAP, 0, 0, FIRST, 65536), wire.record(wire.MAP, 0, 0, 0, 65536))
    assert evil != plan
    with pytest.raises(WallError, match=r"launch step `id map` failed on `host root` \(EPERM\)"):
        contain.launch_generation(generation, plan=evil)


@pytest.mark.parametrize("user", ["root", "www"])
@pytest.mark.parametrize("capabilities", [(), ("setuid", "kill", "net_bind_service")])
def test_capabilities_are_exactly_the_policys(jail: Builder, user: str, capabilities: tuple[str, ...]) -> None:
    jail(
        spec={"service": {"command": ["/bin/sleep", "100"], "user": user}, "policy": {"capabilities": capabilities}}
    )
    from stockade.kernel.capabilities import format_mask, mask

    expected = format_mask(mask(capabilities))
    carried = expected if user != "root" else format_mask(0)
    with contain.launch("test") as running:
        seen = status(running.pid)
        sets = [seen[name] for name in ("CapBnd", "CapPrm", "CapEff", "CapInh", "CapAmb")]
        assert sets == [expected, expected, expected, carried, carried]
        assert seen["NoNewPrivs"] == "1"


def test_service_gets_its_users_ids_and_groups_and_no_other(jail: Builder) -> None:
    jail(spec={"service": {"command": ["/bin/sleep", "100"], "user": "www"}})
    with contain.launch("test") as running:
        seen = status(running.pid)
        assert seen["Uid"].split() == [str(FIRST + 33)] * 4
        assert seen["Gid"].split() == [str(FIRST + 33)] * 4
        assert seen["Groups"].split() == [str(FIRST + 44)]


def test_root_service_keeps_no_group_of_the_callers(jail: Builder) -> None:
    jail(spec=SLEEP)
    old = os.getgroups()
    os.setgroups([4, 27, 44])
    try:
        with contain.launch("test") as running:
            assert status(running.pid)["Groups"] == ""
            assert status(running.init_pid)["Groups"] == ""
    finally:
        os.setgroups(old)


def test_filter_and_landlock_are_in_force(jail: Builder) -> None:
    jail(spec=SLEEP, directories=(LockDirectory(path="/tmp", mode=0o1777), LockDirectory(path="/run", mode=0o755)))
    with contain.launch("test") as running:
        assert status(running.pid)["Seccomp"] == "2"
    code, _, err = output("test", "/bin/mknod", "/tmp/p", "p")
    assert code == 0, err
    code, _, err = output("test", "/bin/mount", "-t", "tmpfs", "x", "/tmp")
    assert code != 0


def test_landlock_alone_keeps_files_from_being_written(jail: Builder) -> None:
    """The same write on a tmpfs that the mounts leave writable, with and without the rule that allows it."""
    from stockade.contain import wire

    generation = jail(spec=SLEEP)
    plan = (generation / "plan").read_bytes()
    rule = re.search(wire.LANDLOCK_PATH.to_bytes(4, sys.byteorder) + rb"\x05\0\0\0.{32}/tmp\0", plan, re.DOTALL)
    assert rule is not None
    read_only = plan[: rule.start() + 8] + (1 << 2).to_bytes(8, sys.byteorder) + plan[rule.start() + 16 :]
    for bytes_, message in ((plan, b""), (read_only, b"touch: /tmp/x: Permission denied\n")):
        with contain.launch_generation(
            generation, plan=bytes_, argv=["/bin/touch", "/tmp/x"], stderr=subprocess.PIPE
        ) as running:
            assert running.stderr is not None
            assert running.stderr.read() == message


def test_root_file_system_is_read_only(jail: Builder) -> None:
    jail()
    for path in ("/new", "/etc/passwd", "/var/lib/data/seed"):
        code, _, err = output("test", "/bin/sh", "-c", f"echo x >> {path}")
        assert code != 0
        assert "Read-only file system" in err or "Permission denied" in err
    without = {"policy": {"landlock": False, "syscalls": {"preset": "none"}, "capabilities": ["dac_override"]}}
    jail("bare", spec=without)
    assert "Read-only file system" in output("bare", "/bin/touch", "/new")[2]


def test_jails_root_is_the_rootfs_and_nothing_above(jail: Builder) -> None:
    generation = jail()
    inside = (generation / "rootfs").stat()
    code, out, err = output("test", "/bin/stat", "-c", "%i", "/", "/..", "/../..")
    assert (code, err) == (0, "")
    assert out.split() == [str(inside.st_ino)] * 3
    code, _, err = output("test", "/bin/cat", "/escape/shadow")
    assert code != 0
    assert "No such file or directory" in err
    with contain.launch("test", argv=["/bin/sleep", "100"]) as running:
        mounts = Path(f"/proc/{running.pid}/mountinfo").read_text()
        root = [line for line in mounts.splitlines() if line.split()[4] == "/"]
        assert len(root) == 1, "the old root is still mounted"
        assert "ro,nosuid,nodev" in root[0].split()[5]


def test_every_mount_refuses_setuid_programs(jail: Builder) -> None:
    jail(spec=SLEEP)
    with contain.launch("test") as running:
        lines = [line.split() for line in Path(f"/proc/{running.pid}/mountinfo").read_text().splitlines()]
        assert [line[4] for line in lines if "nosuid" not in line[5]] == []
        devices = {line[4] for line in lines if "nodev" not in line[5]}
        assert devices and all(path.startswith(("/dev/", "/proc/")) for path in devices)


def test_service_inherits_no_descriptor(jail: Builder) -> None:
    jail()
    leaked = os.open("/etc", os.O_RDONLY)
    os.set_inheritable(leaked, True)
    try:
        with contain.launch("test", argv=["/bin/sleep", "100"], stdin=subprocess.DEVNULL) as running:
            assert set(descriptors(running.pid)) == {0, 1, 2}
            assert len(descriptors(running.init_pid)) == 1
            assert next(iter(descriptors(running.init_pid).values())).startswith("socket:")
    finally:
        os.close(leaked)


def test_directory_as_standard_input_is_refused(jail: Builder) -> None:
    jail()
    directory = os.open("/etc", os.O_RDONLY)
    try:
        with pytest.raises(WallError, match=r"launch step `descriptors` failed on `0` \(EISDIR\)"):
            contain.launch("test", argv=["/bin/true"], stdin=directory)
    finally:
        os.close(directory)


def test_closed_standard_streams_become_dev_null(jail: Builder) -> None:
    jail()
    code = (
        "import os\nfrom stockade import contain\n"
        "for number in range(3): os.close(number)\n"
        "with contain.launch('test', argv=['/bin/sleep', '100']) as running:\n"
        "    place = f'/proc/{running.pid}/fd/'\n"
        "    links = [os.readlink(place + name) for name in os.listdir(place)]\n"
        "os._exit(0 if links == ['/dev/null'] * 3 else 1)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=30, check=False).returncode == 0


def test_pid_1_is_the_warden_from_a_sealed_copy(jail: Builder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STOCKADE_TEST_CANARY", "host-secret")
    jail(spec=SLEEP)
    with contain.launch("test") as running:
        init = running.init_pid
        assert os.readlink(f"/proc/{init}/exe") == "/memfd:warden (deleted)"
        assert Path(f"/proc/{init}/environ").read_bytes() == b""
        assert Path(f"/proc/{init}/cmdline").read_bytes().rstrip(b"\0") == b"warden"
        assert status(init)["NSpid"].split()[-1] == "1"
        assert status(init)["CapEff"] == "0000000000000020", "only CAP_KILL"
        assert status(init)["CapBnd"] == "0000000000000000"
        assert status(init)["NoNewPrivs"] == "1"
        assert b"host-secret" not in Path(f"/proc/{running.pid}/environ").read_bytes()


def test_jail_root_reaches_nothing_of_pid_1(jail: Builder) -> None:
    jail(spec={"policy": {"capabilities": ["sys_ptrace", "dac_override"]}})
    for command in ("cat exe", "cat environ", "ls root/", "ls cwd/", "ls fd/", "cat mem", "cat maps"):
        verb, name = command.split()
        code, _, err = output("test", f"/bin/{verb}", f"/proc/1/{name}")
        assert code != 0, name
        assert "Permission denied" in err, (name, err)


def test_jail_sees_only_its_own_processes_and_host_name(jail: Builder) -> None:
    jail(spec={"hostname": "inside"})
    code, out, _ = output("test", "/bin/sh", "-c", "hostname; for p in /proc/[0-9]*; do echo ${p#/proc/}; done")
    lines = out.split()
    assert (code, lines[0]) == (0, "inside")
    assert set(map(int, lines[1:])) <= {1, 2, 3}


def test_no_further_namespaces_can_be_made(jail: Builder) -> None:
    jail(spec={"policy": {"syscalls": {"preset": "none"}}})
    with contain.launch("test", argv=["/bin/sleep", "100"]) as running:
        assert output("test", "/bin/cat", "/proc/sys/user/max_user_namespaces")[1] == "0\n"
        assert Path("/proc/sys/user/max_user_namespaces").read_text() != "0\n"
        assert running.pid > 0


KEYRING = """
#include <stdio.h>
#include <sys/syscall.h>
#include <unistd.h>
int main(void) {
    char text[256] = "";
    if (syscall(SYS_keyctl, 6 /* KEYCTL_DESCRIBE */, -3 /* session keyring */, text, sizeof text) < 0) perror("keyctl");
    puts(text);
    return 0;
}
"""


def test_session_keyring_is_not_the_callers(jail: Builder, tmp_path: Path) -> None:
    if shutil.which("gcc") is None:
        pytest.skip("`apt-get install gcc libc6-dev` compiles the program that asks for its keyring")
    generation = jail(spec={"policy": {"syscalls": {"preset": "none"}}})
    source = tmp_path / "keyring.c"
    source.write_text(KEYRING)
    program = generation / "rootfs/bin/keyring"
    subprocess.run(["gcc", "-static", "-o", str(program), str(source)], check=True, timeout=60)
    code = (
        "import ctypes, subprocess, sys\nfrom stockade import contain\n"
        f"ctypes.CDLL(None).syscall({SYS_KEYCTL}, 1, b'canary-keyring', 0, 0, 0)\n"  # KEYCTL_JOIN_SESSION_KEYRING
        "contain.launch('test', argv=['/bin/keyring']).wait(20)\n"
        f"subprocess.run([{str(program)!r}], timeout=20)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    inside, outside = result.stdout.splitlines()
    assert outside.endswith(";canary-keyring")
    assert inside.endswith(";_ses")


def test_devices_are_the_policys(jail: Builder) -> None:
    jail(spec={"policy": {"devices": ["null", "zero"]}})
    out = output("test", "/bin/ls", "/dev")[1].split()
    expected = ["fd", "null", "ptmx", "pts", "shm", "stderr", "stdin", "stdout", "tty", "zero"]
    assert sorted(out) == expected
    code, _, err = output("test", "/bin/sh", "-c", "echo x > /dev/null && head -c 4 /dev/zero | od -An -tx1")
    assert (code, err) == (0, "")


def test_dev_cannot_be_written(jail: Builder) -> None:
    jail(spec={"policy": {"landlock": False}})
    assert "Read-only file system" in output("test", "/bin/touch", "/dev/x")[2]
    assert output("test", "/bin/touch", "/dev/shm/x")[0] == 0


@pytest.mark.parametrize("name", ["sys/kernel/core_pattern", "sysrq-trigger", "irq/default_smp_affinity"])
def test_kernel_settings_cannot_be_written(jail: Builder, name: str) -> None:
    path = f"/proc/{name}"
    if not Path(path).exists():
        pytest.skip(f"this kernel has no {path}")
    jail(spec={"policy": {"landlock": False, "capabilities": ["dac_override"]}})
    code, _, err = output("test", "/bin/sh", "-c", f": >> {path}")
    assert code != 0
    assert "Read-only file system" in err or "Permission denied" in err


@pytest.mark.parametrize("name", ["keys", "timer_list", "kallsyms", "cmdline", "interrupts"])
def test_host_facts_in_proc_are_masked(jail: Builder, name: str) -> None:
    if not Path(f"/proc/{name}").exists():
        pytest.skip(f"this kernel has no /proc/{name}")
    jail()
    assert output("test", "/bin/cat", f"/proc/{name}")[:2] == (0, "")


def test_proc_of_processes_only(jail: Builder) -> None:
    jail(proc="pid")
    out = output("test", "/bin/ls", "/proc")[1].split()
    assert {name for name in out if not name.isdecimal()} == {"self", "thread-self"}


def test_loopback_is_up_and_low_ports_are_free_to_use(jail: Builder) -> None:
    jail(spec={"service": {"command": ["/bin/sh"], "user": "www"}})
    script = "(echo hello | nc -l -p 80 127.0.0.1) & sleep 0.3; nc 127.0.0.1 80 </dev/null"
    code, out, err = output("test", "/bin/sh", "-c", script)
    assert (code, out) == (0, "hello\n"), err


def test_limits_are_set(jail: Builder) -> None:
    jail(spec={"limits": {"open_files": 33, "file_size": "1M"}})
    assert output("test", "/bin/sh", "-c", "ulimit -n; ulimit -f")[1].split() == ["33", "2048"]


def test_umask_directory_and_environment_are_the_specs(jail: Builder) -> None:
    service = {
        "command": ["/bin/sh"], "umask": "0077", "directory": "/var/lib", "environment": {"A": "1", "B": "two words"},
    }  # fmt: skip
    jail(spec={"service": service})
    out = output("test", "/bin/sh", "-c", "umask; pwd; echo $A/$B/$C/$HOME", environment={"A": "3", "C": "4"})[1]
    assert out.splitlines() == ["0077", "/var/lib", "3/two words/4//root"]


def test_ignored_and_blocked_signals_do_not_reach_the_service(jail: Builder) -> None:
    import signal

    jail(spec=SLEEP)
    old = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
    try:
        with contain.launch("test") as running:
            assert int(status(running.pid)["SigIgn"], 16) == 0
            assert int(status(running.pid)["SigBlk"], 16) == 0
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR2})
        signal.signal(signal.SIGUSR1, old)


def test_plain_chroot_gives_root_up(jail: Builder) -> None:
    generation = jail(
        spec={"walls": ["chroot"], "service": {"command": ["/bin/sleep", "100"], "user": "www"}}
    )
    with contain.launch("test") as running:
        seen = status(running.pid)
        assert seen["Uid"].split() == ["33"] * 4
        assert seen["Gid"].split() == ["33"] * 4
        assert (seen["CapEff"], seen["CapBnd"], seen["NoNewPrivs"]) == ("0" * 16, "0" * 16, "1")
        assert Path(f"/proc/{running.pid}/root").stat().st_ino == (generation / "rootfs").stat().st_ino
        assert os.readlink(f"/proc/{running.pid}/ns/user") == os.readlink("/proc/self/ns/user")
