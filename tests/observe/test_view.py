from __future__ import annotations

import hashlib
import os
import signal
import socket
import stat
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from stockade import observe
from stockade.errors import ObserveError, ServiceError
from stockade.observe.hostmounts import parse, visible
from stockade.observe.idmap import segments
from stockade.observe.reach import HOST_REACHING
from stockade.records.exercise import Outcome
from stockade.records.seed import Seed

Shell = Callable[..., Outcome]


def out(outcome: Outcome) -> str:
    assert outcome.status == 0, outcome
    return outcome.stdout.decode("utf-8", "surrogateescape").strip()


def host_state() -> tuple[str, str, set[str]]:
    """Digest of /etc, the mounts, and this program's own processes."""
    digest = hashlib.sha256()
    for path in sorted(Path("/etc").rglob("*")):
        status = path.lstat()
        digest.update(
            f"{path!s} {status.st_mode} {status.st_uid} {status.st_mtime_ns}".encode(errors="surrogateescape")
        )
    mounts = Path("/proc/self/mountinfo").read_text()
    children = set(Path(f"/proc/self/task/{threading.get_native_id()}/children").read_text().split())
    return digest.hexdigest(), mounts, children


def test_view_shows_the_hosts_files(sh: Shell) -> None:
    assert out(sh("cat /etc/os-release")) == Path("/etc/os-release").read_text().strip()
    assert out(sh("stat -c '%a %u %g' /etc/shadow /usr/bin/su /var/tmp")).split("\n") == [
        f"{stat.S_IMODE(status.st_mode):o} {status.st_uid} {status.st_gid}"
        for status in map(os.stat, ("/etc/shadow", "/usr/bin/su", "/var/tmp"))
    ]


def test_what_is_written_in_a_view_vanishes_and_the_host_is_unchanged(as_root: None) -> None:
    before = host_state()
    with observe.View.open(seeds=[Seed(path="/etc/passwd", content=b"gone", mode=0o644)]) as view:
        script = """
        echo x > /etc/hostname; rm -rf /etc/ssl /usr/bin/env; mkdir /etc/new; mv /usr/share/doc /usr/doc; kill -9 1
        """
        with view.spawn(["sh", "-c", script], environment={"PATH": "/usr/bin:/bin"}) as process:
            assert process.wait(20) == 0
        assert view.exists("/etc/new") and view.exists("/usr/doc/base-files") and not view.exists("/usr/bin/env")
    assert host_state() == before
    assert Path("/usr/bin/env").exists()


def test_every_mount_with_files_is_in_the_view(sh: Shell) -> None:
    for mount in visible(parse(Path("/proc/self/mountinfo").read_bytes())):
        status = os.stat(mount.point)
        assert out(sh(f"stat -c '%a %u %i' '{mount.point}'")).split()[:2] == [
            f"{stat.S_IMODE(status.st_mode):o}",
            str(status.st_uid),
        ]


def test_submount_is_shown_with_its_files_and_written_to_without_effect(tmp_path: Path, as_root: None) -> None:
    code = f"""
    import os, sys
    from stockade import observe
    from stockade.kernel.mount import MS_PRIVATE, MS_REC, mount
    from stockade.kernel.namespaces import CLONE_NEWNS, unshare
    unshare(CLONE_NEWNS)
    mount(None, "/", None, MS_REC | MS_PRIVATE)
    place = "/srv/with, colon: and\\\\backslash"
    mount("t", "/srv", "tmpfs")
    os.makedirs(place)
    mount("t", place, "tmpfs")
    open(place + "/file", "w").write("below")
    with observe.View.open() as view:
        out = os.open("{tmp_path}/out", os.O_CREAT | os.O_WRONLY)
        command = ["sh", "-c", 'cat "$0/file"; echo changed > "$0/file"; cat "$0/file"', place]
        with view.spawn(command, environment={{"PATH": "/bin"}}, stdout=out) as process:
            assert process.wait(10) == 0
    assert open(place + "/file").read() == "below"
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, timeout=30)
    assert (tmp_path / "out").read_text() == "belowchanged\n"


def test_private_dev_proc_sys_run_and_tmp(sh: Shell) -> None:
    assert set(out(sh("ls /dev")).split()) == {
        *("fd", "full", "log", "null", "ptmx", "pts", "random", "shm"),
        *("stderr", "stdin", "stdout", "tty", "urandom", "zero"),
    }
    assert out(sh("echo discarded > /dev/null; head -c 4 /dev/zero | wc -c")) == "4"
    assert out(sh("ls /tmp")) == ""
    assert out(sh("touch /sys/x 2>&1 || true")).endswith("Read-only file system")
    assert out(sh("find /run -type f -o -type s")) == "/run/stockade/trace/log"


def test_run_keeps_the_hosts_directories_with_owner_and_mode(sh: Shell) -> None:
    for entry in list(os.scandir("/run")):
        if entry.is_dir(follow_symlinks=False) and entry.name not in (
            "user",
            "stockade",
            "credentials",
            "netns",
            "snapd",
        ):
            status = entry.stat()
            wanted = f"{stat.S_IMODE(status.st_mode):o} {status.st_uid} {status.st_gid}"
            assert out(sh(f"stat -c '%a %u %g' '{entry.path}'")) == wanted
    assert out(sh("readlink -f /var/run")) == "/run"


def test_a_terminal_comes_from_the_views_own_devpts(sh: Shell) -> None:
    assert out(sh("script -qec tty /dev/null")).strip() == "/dev/pts/0"


def test_network_is_private_with_loopback_up(sh: Shell) -> None:
    assert out(sh("cat /proc/net/dev | tail -n +3 | cut -d: -f1")).split() == ["lo"]
    assert out(sh("cat /sys/class/net/lo/operstate")) == "unknown"
    serve = "import socket; s = socket.create_server(('127.0.0.1', 22))"
    code = f"{serve}; socket.create_connection(s.getsockname()); print('up')"
    assert out(sh(f'/usr/bin/python3 -c "{code}"')) == "up"


def test_an_ordinary_id_may_bind_a_low_port(view: observe.View) -> None:
    code = "import socket; socket.create_server(('127.0.0.1', 80))"
    with view.spawn(["/usr/bin/python3", "-c", code], environment={}, uid=1234, gid=1234) as process:
        assert process.wait(10) == 0


def test_syslog_of_a_service_comes_into_the_views_log(view: observe.View) -> None:
    with view.spawn(["logger", "-p", "auth.info", "a line for the log"], environment={"PATH": "/usr/bin"}) as process:
        assert process.wait(10) == 0
    deadline = time.monotonic() + 5
    while b"a line for the log" not in (said := os.pread(view.log, 4096, 0)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert b"a line for the log" in said and not said.startswith(b"<")


def test_seeds_are_written_with_mode_and_owner_through_the_views_links(view: observe.View, sh: Shell) -> None:
    view.seed(
        [
            Seed(path="/var/run/deep/er/file", content=b"\0\xff", mode=0o640, uid=33, gid=34),
            Seed(path="/srv/dir", type="directory", mode=0o2775, uid=12, gid=13),
            Seed(path="/etc/link", type="symlink", target="/nowhere"),
            Seed(path=os.fsdecode(b"/srv/\xffname"), content=b"x", mode=0o600),
        ]
    )
    assert out(sh("stat -c '%a %u %g %s' /run/deep/er/file /srv/dir")).split("\n")[0] == "640 33 34 2"
    assert out(sh("stat -c '%a %u %g' /srv/dir; readlink /etc/link; cat /srv/?name")) == "2775 12 13\n/nowhere\nx"


def test_a_seed_replaces_a_link_and_leaves_its_target(view: observe.View, sh: Shell) -> None:
    out(sh("ln -s /etc/hostname /srv/link"))
    view.seed([Seed(path="/srv/link", content=b"mine", mode=0o600)])
    assert out(sh("cat /srv/link; cat /etc/hostname")) == f"mine{Path('/etc/hostname').read_text().strip()}"


def test_a_seed_wins_over_a_file_that_is_a_mount_point(as_root: None) -> None:
    """/etc/hosts and the like in a container."""
    code = """
from stockade import observe
from stockade.kernel.mount import MS_BIND, MS_PRIVATE, MS_REC, mount
from stockade.kernel.namespaces import CLONE_NEWNS, unshare
from stockade.observe.exercise import client
from stockade.records.seed import Seed
unshare(CLONE_NEWNS)
mount(None, "/", None, MS_REC | MS_PRIVATE)
mount("/etc/hostname", "/etc/hostname", None, MS_BIND)
with observe.View.open(seeds=[Seed(path="/etc/hostname", content=b"seeded", mode=0o644)]) as view:
    print(client(view)(["cat", "/etc/hostname"], b"", 10).stdout.decode())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout, done.stderr) == ("seeded\n", "")


def test_ids_groups_umask_directory_and_environment_are_taken_on(view: observe.View) -> None:
    reader, writer = os.pipe()
    with view.spawn(
        ["sh", "-c", "id -u; id -g; id -G; umask; pwd; env"], environment={"PATH": "/usr/bin:/bin", "ONLY": "this one"},
        uid=1234, gid=55, groups=(7, 8), umask=0o027, directory="/usr/share", stdout=writer,
    ) as process:  # fmt: skip
        os.close(writer)
        assert process.wait(10) == 0
    with open(reader) as file:
        lines = file.read().splitlines()
    assert lines[:5] == ["1234", "55", "55 7 8", "0027", "/usr/share"]
    assert {line for line in lines[5:] if not line.startswith(("PWD=", "_="))} == {
        "PATH=/usr/bin:/bin",
        "ONLY=this one",
    }


def test_a_missing_program_is_a_service_error_that_says_where_was_searched(view: observe.View) -> None:
    with pytest.raises(ServiceError) as caught:
        view.spawn(["no-such-program"], environment={"PATH": "/usr/bin:/opt/none"})
    assert caught.value.message == "cannot run `no-such-program`: there is no such program"
    assert caught.value.hint == "searched in `/usr/bin:/opt/none`; give the whole path in `command`"


def test_signals_and_status_of_a_process(view: observe.View) -> None:
    environment = {"PATH": "/usr/bin:/bin"}
    with view.spawn(["sleep", "60"], environment=environment) as process:
        assert Path(f"/proc/{process.pid}/cmdline").read_bytes() == b"sleep\x0060\0" or process.wait(0.3) is None
        assert process.wait(0.05) is None
        process.kill(signal.SIGTERM)
        assert process.wait(5) == -signal.SIGTERM
    with view.spawn(["sh", "-c", "exit 7"], environment=environment) as process:
        assert process.wait(5) == 7


def test_gate_holds_the_program_back_until_it_is_opened(view: observe.View) -> None:
    reader, writer = os.pipe()
    with view.spawn(["touch", "/srv/after"], environment={"PATH": "/usr/bin:/bin"}, gate=reader) as process:
        os.close(reader)
        assert process.wait(0.2) is None and not view.exists("/srv/after")
        os.write(writer, b"g")
        assert process.wait(5) == 0 and view.exists("/srv/after")
    os.close(writer)


@pytest.mark.parametrize("count", [0, 1, 5, 32])
def test_a_process_has_the_descriptors_that_it_is_given_and_no_others(view: observe.View, count: int) -> None:
    """The view's own channel above all: whoever has it orders the first process about, which has every right."""
    code = (
        "import fcntl, os\nfor number in range(300):\n"
        " try: fcntl.fcntl(number, fcntl.F_GETFD); print(number)\n except OSError: pass\n"
        "print(os.environ.get('LISTEN_FDS'), os.environ.get('LISTEN_PID') in (None, str(os.getpid())))"
    )
    reader, writer = os.pipe()
    with socket.create_server(("127.0.0.1", 0)) as given, open(reader) as said:
        with view.spawn(
            ["/usr/bin/python3", "-c", code], environment={}, stdout=writer, sockets=[given.fileno()] * count
        ) as process:
            os.close(writer)
            assert process.wait(10) == 0
        assert said.read().split("\n")[:-1] == [*map(str, range(3 + count)), f"{count or None} True"]


def test_orphans_are_reaped(view: observe.View) -> None:
    with view.spawn(["sh", "-c", "(sleep 0.1 &) ; (true &)"], environment={"PATH": "/usr/bin:/bin"}) as process:
        assert process.wait(5) == 0
    deadline = time.monotonic() + 5
    while len(view.processes()) > 1 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert [found["pid"] for found in view.processes()] == [1]


def test_closing_a_view_ends_everything_in_it(as_root: None) -> None:
    with observe.View.open() as view:
        process = view.spawn(
            ["sh", "-c", "trap '' TERM HUP INT; setsid sleep 100 & sleep 100"], environment={"PATH": "/bin"}
        )
        first = view.pid
        while len(view.processes()) < 4:
            time.sleep(0.01)
    assert not Path(f"/proc/{first}").exists() and not Path(f"/proc/{process.pid}").exists()
    assert process.wait(5) == -signal.SIGKILL
    process.close()
    with pytest.raises(ObserveError):
        view.processes()


def test_views_open_from_many_threads_at_once(as_root: None) -> None:
    failures: list[BaseException] = []

    def work() -> None:
        try:
            with observe.View.open() as view, view.spawn(["true"], environment={"PATH": "/bin"}) as process:
                assert process.wait(20) == 0
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures


def test_a_view_leaves_no_descriptor_behind(as_root: None) -> None:
    with observe.View.open():
        pass
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with observe.View.open() as view, view.spawn(["true"], environment={"PATH": "/bin"}) as process:
            process.wait(10)
    assert len(os.listdir("/proc/self/fd")) == before


# The walls of the view. Each attempt is first seen to succeed with the capabilities kept.

CALL = """/usr/bin/python3 -c '
import ctypes, errno, os, sys
libc = ctypes.CDLL(None, use_errno=True)
result = {call}
code = 0 if result >= 0 else ctypes.get_errno()
sys.exit({{errno.EPERM: 1, errno.ENOSYS: 77}}.get(code, 0))'"""
"""Any errno but EPERM shows that the kernel went past the check of the capability."""

LOOPBACK = """/usr/bin/python3 -c '
import fcntl, socket, struct
fcntl.ioctl(socket.socket(socket.AF_INET, socket.SOCK_DGRAM), 0x8914, struct.pack("16sh22x", b"lo", 0x49))'"""

ATTEMPTS = {
    "sys_admin": "mount -t tmpfs none /mnt",
    "sys_admin, by unshare": "unshare -m true",
    "mknod": "mknod /srv/disk b 254 0",
    "sys_time": "/usr/bin/python3 -c 'import time; time.clock_settime(time.CLOCK_REALTIME, time.time())'",
    "linux_immutable": "touch /tmp/f && chattr +i /tmp/f && chattr -i /tmp/f",
    "net_admin": LOOPBACK,
    "sys_ptrace": '/usr/bin/python3 -c \'open("/proc/1/mem", "rb")\'',
    "syslog": CALL.format(call="libc.klogctl(6, None, 0)"),
    "sys_pacct": CALL.format(call="libc.acct(None)"),
    "sys_module": CALL.format(call='libc.delete_module(b"there is no such module", 2048)'),
    "sys_boot": CALL.format(call="libc.reboot(1)"),
    "dac_read_search": CALL.format(call='libc.open_by_handle_at(os.open("/", 0), b"\\10" + bytes(15), 0)'),
}


@pytest.mark.parametrize("capability", ATTEMPTS)
def test_service_cannot_reach_the_host_by(capability: str, sh: Shell) -> None:
    script = ATTEMPTS[capability]
    kept = sh(script, services=False)
    if kept.status == 77:
        pytest.skip(f"this kernel has no call that needs {capability}")
    assert kept.status == 0, f"the attempt proves nothing here: {kept}"
    assert sh(script).status != 0


def test_no_set_of_a_service_holds_a_capability_that_reaches_the_host(sh: Shell) -> None:
    from stockade.kernel.capabilities import mask, names

    for line in out(sh("grep ^Cap /proc/self/status")).splitlines():
        assert not set(names(int(line.split()[1], 16))) & set(HOST_REACHING), line
    everything = int(out(sh("grep ^CapBnd /proc/self/status", services=False)).split()[1], 16)
    assert mask(HOST_REACHING) & everything


def test_service_sees_no_process_of_the_host(sh: Shell) -> None:
    assert int(out(sh("ls -d /proc/[0-9]* | wc -l"))) < 8
    assert sh(f"kill -0 {os.getpid() + 100000}").status != 0
    assert str(os.getpid()) not in out(sh("ls -d /proc/[0-9]*")).split("/proc/")


def test_service_cannot_change_the_kernel_through_proc(sh: Shell) -> None:
    outcome = sh("echo core > /proc/sys/kernel/core_pattern")
    assert outcome.status != 0 and b"Read-only file system" in outcome.stderr


def test_service_cannot_make_the_read_only_parts_of_proc_writable(sh: Shell) -> None:
    assert sh("mount -o remount,rw,bind /proc/sys", services=False).status == 0
    assert sh("mount -o remount,rw,bind /proc/irq").status != 0


def test_an_abstract_socket_of_the_host_is_out_of_reach(sh: Shell) -> None:
    import socket

    name = f"stockade-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX) as canary:
        canary.bind("\0" + name)
        canary.listen()
        code = f'import socket; socket.socket(socket.AF_UNIX).connect("\\0{name}")'
        subprocess.run(["/usr/bin/python3", "-c", code], check=True, timeout=10)
        assert sh(f"/usr/bin/python3 -c '{code}'").status != 0


# Joining a running service.


def test_client_view_shares_the_network_and_shows_the_root_read_only(as_root: None) -> None:
    from stockade.observe.exercise import client

    serve = "import socket; s = socket.create_server(('127.0.0.1', 4711))"
    code = f"{serve}; print('up', flush=True); s.accept()[0].send(b'hello')"
    reader, writer = os.pipe()
    with (
        observe.View.open(seeds=[Seed(path="/srv/only-there", content=b"inside", mode=0o600)]) as jail,
        jail.spawn(["/usr/bin/python3", "-c", code], environment={}, stdout=writer) as service,
    ):
        assert os.read(reader, 3) == b"up\n"
        with observe.View.open(network_of=service.pid, service_root_of=service.pid) as view:
            run = client(view)
            script = """
            test ! -e /srv/only-there && cat "$STOCKADE_ROOT/srv/only-there" && ! touch "$STOCKADE_ROOT/srv/x" 2>&1
            /usr/bin/python3 -c 'import socket; print(socket.create_connection(("127.0.0.1", 4711)).recv(9))'
            """
            outcome = run(["sh", "-c", script], b"", 10)
            assert outcome.status == 0, outcome
            assert b"inside" in outcome.stdout and b"Read-only" in outcome.stdout and b"b'hello'" in outcome.stdout
            assert view.exists("/srv/only-there") and not view.exists("/srv/x")
            assert not view.exists("/etc/../../../srv/x")
    os.close(reader)
    os.close(writer)


def test_namespaces_of_a_process_that_has_ended_are_an_error(as_root: None) -> None:
    process = subprocess.Popen(["true"])
    process.wait()
    with pytest.raises(ObserveError) as caught:
        observe.View.open(network_of=process.pid)
    assert caught.value.message.startswith(f"cannot open the namespaces of process {process.pid}: ")


# The pure parts.


def test_mountinfo_escapes_and_optional_fields_are_read() -> None:
    text = (
        rb"27 1 254:0 / / rw,relatime - ext4 /dev/vda rw" + b"\n"
        rb"40 27 0:9 / /mnt/a\040b\134c rw,nosuid shared:1 master:2 - tmpfs none rw" + b"\n"
        rb"41 27 0:9 / /run/x rw - tmpfs none rw" + b"\n"
        rb"42 27 0:9 / /var/cg rw - cgroup2 none rw" + b"\n"
        rb"43 27 0:9 / /mnt/a\040b\134c ro - ext4 none rw" + b"\n"
    )
    found = visible(parse(text))
    assert [(mount.id, mount.point, mount.fstype) for mount in found] == [
        (27, "/", "ext4"), (43, "/mnt/a b\\c", "ext4"),
    ]  # fmt: skip
    assert found[1].flags == {"ro"}


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        (1000, [(0, 100000, 1000), (1000, 1000, 1), (1001, 101001, 64535)]),
        (70000, [(0, 100000, 65536), (70000, 70000, 1)]),
        (65535, [(0, 100000, 65535), (65535, 65535, 1)]),
    ],
)
def test_own_id_maps_to_itself_and_no_other_id_is_mapped_twice(own: int, expected: list[tuple[int, int, int]]) -> None:
    parts = segments(own, 100000, 65536)
    assert parts == expected
    outside = [number for _, first, count in parts for number in range(first, first + count)]
    assert len(outside) == len(set(outside))
