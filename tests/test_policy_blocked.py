"""Why was it blocked? Real programs behind the walls: each refusal is named with the line that lifts it, or final."""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import policyjail
import pytest
from policyjail import Home, python, spec

from stockade.policy.writable import handed_over
from stockade.records.lock import LockDirectory
from stockade.records.spec import Directory, Service, Spec
from stockade.records.trace import Access

pytestmark = pytest.mark.skipif(bool(policyjail.UNABLE), reason=policyjail.UNABLE)

#: A jail of a service that is root without any capability, with files of another user.
BOX = spec(
    "box", "",
    "[files]",
    'content = { "/srv/kept" = "kept\\n", "/etc/app.conf" = "a\\n" }',
    'owners = { "/srv/kept" = "keeper" }',
    'modes = { "/srv/kept" = "0400" }',
    "[[accounts]]",
    'name = "keeper"',
)  # fmt: skip
NO_CAPABILITY = "[policy]\ncapabilities = []\n"


class Curable(NamedTuple):
    """`code` fails in the jail for the reason `what`, by `error`, and works with `lines` of the table `table`."""

    code: str
    what: str
    error: str
    lines: tuple[str, ...]
    toml: str


CURABLE = {
    "raw-socket": Curable(
        "socket.socket(socket.AF_INET, socket.SOCK_RAW, 1)", "socket", "EPERM", ('capabilities = ["net_raw"]',),
        '[policy]\ncapabilities = ["net_raw"]',
    ),
    "packet-socket": Curable(
        "socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 3)", "socket of AF_PACKET", "EAFNOSUPPORT",
        ('add = ["socket:packet"]',),
        '[policy.syscalls]\nadd = ["socket:packet"]\n\n[policy]\ncapabilities = ["net_raw"]',
    ),
    "netlink": Curable(
        "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 16)", "socket of NETLINK_GENERIC", "EPROTONOSUPPORT",
        ('add = ["netlink:generic"]',), '[policy.syscalls]\nadd = ["netlink:generic"]',
    ),
    "numa": Curable(
        "call(239, 0, 0, 0, 0, 0)", "get_mempolicy", "EPERM", ('add = ["get_mempolicy"]',),
        '[policy.syscalls]\nadd = ["get_mempolicy"]',
    ),
    "chroot": Curable(
        "os.chroot('/tmp')", "chroot `/tmp`", "EPERM", ('capabilities = ["sys_chroot"]',),
        '[policy]\ncapabilities = ["sys_chroot"]',
    ),
    "setuid": Curable("os.setuid(5)", "setuid", "EPERM", ('capabilities = ["setuid"]',),
                      '[policy]\ncapabilities = ["setuid"]'),
    "setgroups": Curable("os.setgroups([5])", "setgroups", "EPERM", ('capabilities = ["setgid"]',),
                         '[policy]\ncapabilities = ["setgid"]'),
    "chown": Curable("os.chown('/tmp', 5, 5)", "chown `/tmp`", "EPERM", ('capabilities = ["chown"]',),
                     '[policy]\ncapabilities = ["chown"]'),
    "capset": Curable(
        "call(126, struct.pack('=II', 0x20080522, 0), struct.pack('=6I', 1 << 10, 1 << 10, 0, 0, 0, 0))",
        "capset to `net_bind_service`", "EPERM", ('capabilities = ["net_bind_service"]',),
        '[policy]\ncapabilities = ["net_bind_service"]',
    ),
    "mark": Curable(
        "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).setsockopt(socket.SOL_SOCKET, 36, 5)", "setsockopt", "EPERM",
        ('capabilities = ["net_admin"]',), '[policy]\ncapabilities = ["net_admin"]',
    ),
    "another-users-file": Curable(
        "open('/srv/kept').read()", "read `/srv/kept`", "EACCES", ('capabilities = ["dac_read_search"]',),
        '[policy]\ncapabilities = ["dac_read_search"]',
    ),
    "write-in-etc": Curable(
        "open('/etc/new.conf', 'w').write('b')", "create `/etc/new.conf`", "EROFS",
        ('"/etc" = { owner = "root", kind = "volume" }',),
        '[directories]\n"/etc" = { owner = "root", kind = "volume" }',
    ),
    "two-things": Curable(
        "os.setuid(os.chown('/tmp', 5, 5) or 5)", "chown `/tmp`", "EPERM", ('capabilities = ["chown"]',),
        '[policy]\ncapabilities = ["chown", "setuid"]',
    ),
}  # fmt: skip

#: Code that no line makes work: what is refused, by which errno, and words of the reason.
FINAL = {
    "ptrace": ("call(101, 0, 0, 0, 0)", "ptrace", "EPERM", "tracing another process"),
    "unshare": ("call(272, 0x10000000)", "unshare", "EPERM", "a namespace of its own"),
    "clone": ("call(56, 0x10000011, 0, 0, 0, 0)", "clone: a new namespace", "EPERM", "a namespace of its own"),
    "mount": ("call(165, 0, b'/tmp', b'tmpfs', 0, 0)", "mount `/tmp`", "EPERM", "mounting undoes"),
    "bpf": ("call(321, 0, 0, 0)", "bpf", "EPERM", "loads programs into the kernel"),
    "keyring": ("call(250, 0, 0, 0)", "keyctl", "EPERM", "keyrings are not separated"),
    "io_uring": ("call(425, 1, 0)", "io_uring_setup", "EPERM", "no system call filter sees"),
    "device-node": (
        "os.mknod('/tmp/null', 0o20666, os.makedev(1, 3))", "mknodat: a device node", "EPERM",
        "`devices` in `[policy]`",
    ),
    "vsock": ("socket.socket(40, socket.SOCK_STREAM)", "socket of family 40", "EAFNOSUPPORT", "not separated"),
    "type-into-terminal": ("fcntl.ioctl(0, 0x5412, b'a')", "ioctl: 0x5412", "EPERM", "TIOCSTI"),
    "personality": ("call(135, 0x40000)", "personality: 0x40000", "EPERM", "only the Linux personality"),
    "host-name": ("socket.sethostname('x')", "sethostname", "EPERM", "set `hostname` in the spec"),
    "clock": ("call(164, 0, 0)", "settimeofday", "EPERM", "`sys_time` over the whole host"),
    "real-time": (
        "os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(5))", "sched_setscheduler", "EPERM",
        "`sys_nice` over the whole host",
    ),
    "limits": (
        "limit = resource.getrlimit(resource.RLIMIT_NPROC)[1]\n"
        "resource.setrlimit(resource.RLIMIT_CORE, (0, 0))\nresource.setrlimit(resource.RLIMIT_CORE, (5, 5))",
        "prlimit64", "EPERM", "`[limits]`",
    ),
    "execute-shared-memory": (
        "open('/dev/shm/p', 'wb').write(b'#!/bin/x'); os.chmod('/dev/shm/p', 0o755); os.execv('/dev/shm/p', ['p'])",
        "exec `/dev/shm/p`", "EACCES", "`/tmp` is a place for that",
    ),
    "kernel-log": ("open('/dev/kmsg')", "the device `/dev/kmsg`", "ENOENT", "past every wall"),
}  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    home = Home(tmp_path_factory.mktemp("home"))
    home.build("box", BOX + NO_CAPABILITY)
    yield home
    home.output("rm", "--force", "box")


@pytest.mark.parametrize("case", CURABLE)
def test_what_was_refused_is_named_with_the_line_that_lifts_it(case: str, home: Home) -> None:
    given = CURABLE[case]
    report = home.why("box", python(given.code))
    assert (report["works"], report["works_with_lines"]) == (False, True), report
    found = {refusal["what"]: refusal for refusal in report["refusals"]}
    refusal = found[given.what]
    assert (refusal["error"], refusal["never"], refusal["confirmed"]) == (given.error, False, True)
    assert tuple(line["line"] for line in refusal["lines"]) == given.lines
    assert report["toml"] == given.toml


@pytest.mark.parametrize(
    "case",
    ["write-in-etc", *(pytest.param(case, marks=pytest.mark.slow) for case in ("numa", "two-things", "packet-socket"))],
)
def test_pasted_lines_make_it_work(case: str, home: Home, tmp_path: Path) -> None:
    given = CURABLE[case]
    other = Home(tmp_path)
    changed = given.toml if "capabilities" in given.toml else f"{given.toml}\n\n{NO_CAPABILITY}"
    other.build("box", f"{BOX}\n{changed}\n")
    assert home.run("run", "box", "--", *python(given.code)).returncode == 1
    assert other.output("run", "box", "--", *python(given.code + "\nprint('works')")) == "works\n"


@pytest.mark.parametrize("case", FINAL)
def test_what_is_never_allowed_is_named_with_the_reason(case: str, home: Home) -> None:
    code, what, error, reason = FINAL[case]
    report = home.why("box", python(code))
    assert not report["works"] and not report["works_with_lines"]
    [refusal] = report["refusals"]
    assert (refusal["what"], refusal["error"], refusal["never"], refusal["lines"]) == (what, error, True, [])
    assert reason in refusal["reason"]
    assert report["toml"] == ""


def test_a_command_that_meets_no_wall_is_said_to_work(home: Home) -> None:
    report = home.why("box", python("print(socket.socket().fileno() > 0)"))
    assert (report["works"], report["refusals"], report["runs"]) == (True, [], 1)


def test_a_program_that_the_jail_lacks_is_named_with_its_line(home: Home) -> None:
    report = home.why("box", python("os.execv('/usr/bin/id', ['id'])"))
    [refusal] = report["refusals"]
    assert (refusal["wall"], refusal["error"]) == ("missing", "ENOENT")
    assert report["toml"] == '[files]\ninclude = ["/usr/bin/id"]'


def test_what_proc_does_not_show_is_named_with_its_line(home: Home) -> None:
    report = home.why("box", python("open('/proc/meminfo').read()"))
    [refusal] = [found for found in report["refusals"] if found["path"].startswith("/proc/")]
    assert (refusal["what"], refusal["wall"], refusal["error"]) == ("read `/proc/meminfo`", "missing", "ENOENT")
    assert report["toml"] == '[policy]\nproc = "full"'


@pytest.mark.slow
def test_a_file_that_nobody_may_write_is_named_with_both_of_its_lines(home: Home, tmp_path: Path) -> None:
    command = python("open('/etc/app.conf', 'w').write('b')")
    report = home.why("box", command)
    assert [refusal["wall"] for refusal in report["refusals"]] == ["read-only", "files"]
    other = Home(tmp_path)
    text = BOX.replace("[files]\n", f"[files]\n{report['toml'].partition('[files]')[2].splitlines()[1]}\n", 1)
    # The spec has modes already: a line has all of them, so that it takes the place of the old one.
    text = "\n".join(line for line in text.splitlines() if line != 'modes = { "/srv/kept" = "0400" }')
    other.build("box", f'{text}\n[directories]\n"/etc" = {{ owner = "root", kind = "volume" }}\n{NO_CAPABILITY}')
    other.output("run", "box", "--", *command)


def test_a_way_out_that_is_not_there_is_named_with_its_lines(home: Home) -> None:
    report = home.why("box", python("socket.socket().connect(('192.0.2.1', 80))"))
    [refusal] = report["refusals"]
    assert (refusal["wall"], refusal["error"]) == ("network", "ENETUNREACH")
    assert report["toml"] == '[network]\nmode = "private"\negress = true'


def test_a_program_that_does_without_is_not_said_to_fail(home: Home) -> None:
    code = "try: os.setuid(5)\nexcept PermissionError: print('does without')"
    report = home.why("box", python(code))
    assert report["works"]
    assert [refusal["what"] for refusal in report["refusals"]] == ["setuid"]


def test_a_right_that_was_only_asked_for_is_told_and_not_offered(tmp_path: Path) -> None:
    home = Home(tmp_path)
    home.build("box", spec("box", "", 'user = "nobody"'))
    report = home.why("box", python("print(os.access('/etc/passwd', os.W_OK))"))
    [refusal] = report["refusals"]
    assert (report["works"], refusal["what"], refusal["error"]) == (True, "stat `/etc/passwd`", "EACCES")
    assert (report["toml"], refusal["never"], refusal["lines"]) == ("", False, [])
    assert "a right (access(2)) that its mode 0444 does not give `nobody`" in refusal["reason"]
    home.output("rm", "--force", "box")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    """Jails with directories of the host, owned by an id that is none of theirs, one writable and one not."""
    home = Home(tmp_path_factory.mktemp("shared"))
    mounts = []
    for name, writable in (("open", "true"), ("closed", "false")):
        place = tmp_path_factory.mktemp(name)
        (place / "file").write_text("kept")
        os.chown(place, 1234, 1234)
        place.chmod(0o755)
        mounts.append(f'[[mounts]]\nsource = "{place}"\ntarget = "/srv/{name}"\nwritable = {writable}')
    rest = (*mounts, '[directories]\n"/srv/roots" = { kind = "volume" }')
    home.build("all", spec("all", "", '[policy]\ncapabilities = ["dac_override", "dac_read_search"]', *rest))
    home.build("none", spec("none", "", NO_CAPABILITY, *rest))
    home.build("user", spec("user", "", 'user = "nobody"', *rest))
    yield home
    home.output("rm", "--force", "all", "none", "user")


NAMES = {
    "unlink": "os.unlink('/srv/{}/file')", "rename": "os.rename('/srv/{}/file', '/srv/{}/other')",
    "mkdir": "os.mkdir('/srv/{}/new')", "create": "open('/srv/{}/new', 'w')",
}  # fmt: skip


@pytest.mark.parametrize("jail", ["all", "none", "user"])
@pytest.mark.parametrize("call", NAMES)
def test_owners_and_modes_on_the_host_are_not_taken_for_a_wall(shared: Home, jail: str, call: str) -> None:
    report = shared.why(jail, python(NAMES[call].replace("{}", "open")))
    [refusal] = report["refusals"]
    assert (refusal["wall"], refusal["error"], refusal["lines"], report["toml"]) == ("files", "EACCES", [], "")
    assert "of the host, whose owners and modes do not let" in refusal["reason"]


@pytest.mark.parametrize("jail", ["all", "user"])
@pytest.mark.parametrize("call", NAMES)
def test_mount_that_is_read_only_is_named_with_what_opens_it(shared: Home, jail: str, call: str) -> None:
    report = shared.why(jail, python(NAMES[call].replace("{}", "closed")))
    [refusal] = report["refusals"]
    assert (refusal["wall"], refusal["error"], report["toml"]) == ("read-only", "EROFS", "")
    assert refusal["reason"] == "the mount `/srv/closed` is read-only: `writable = true` in its `[[mounts]]` opens it"


def test_directory_of_roots_is_offered_to_the_services_user(shared: Home) -> None:
    report = shared.why("user", python("open('/srv/roots/new', 'w')"))
    [refusal] = report["refusals"]
    assert (refusal["wall"], refusal["error"]) == ("files", "EACCES")
    offered = tomllib.loads(report["toml"])["directories"]["/srv/roots"]
    assert (offered["owner"], offered["kind"]) == ("nobody", "volume")


def test_directory_that_the_build_has_found_is_offered_with_the_mode_it_has() -> None:
    wanted = Spec(name="box", service=Service(command=("/bin/true",), user="nobody"))
    change = handed_over(
        Access(path="/srv/found/new", operation="create", error="EACCES"), wanted,
        LockDirectory(path="/srv/found", mode=0o2750, volume="found"),
    )  # fmt: skip
    assert change is not None
    assert change(wanted).directories == {"/srv/found": Directory(mode="2750", owner="nobody", kind="volume")}


def test_asking_why_leaves_the_jail_as_it_was(home: Home) -> None:
    kept = sorted((home.directory / "state" / "jails" / "box").rglob("*"))
    times = [(path, path.lstat().st_mtime_ns) for path in kept if path.is_file()]
    home.why("box", python("os.setuid(open('/etc/app.conf', 'w').fileno())"))
    assert sorted((home.directory / "state" / "jails" / "box").rglob("*")) == kept
    assert [(path, path.lstat().st_mtime_ns) for path, _ in times] == times
    assert home.output("ps", "--json").count('"instance"') == 0


HOST_ONLY = (
    "audit_write", "ipc_lock", "lease", "linux_immutable", "mknod", "sys_nice", "sys_resource", "sys_time",
    "sys_tty_config", "syslog",
)  # fmt: skip
ATTEMPTS = """
def refused(attempt):
    try: attempt()
    except OSError as error: return errno.errorcode[error.errno]
    except ValueError: return 'EPERM'  # as Python puts that of setrlimit(2)
    return ''
def lock():
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (0, 0))
    memory = ctypes.create_string_buffer(8192)
    call(149, memory, 8192)
def lease():
    descriptor = os.open('/srv/kept', os.O_RDONLY)
    fcntl.fcntl(descriptor, 1024, 0)
def immutable():
    descriptor = os.open('/tmp/file', os.O_RDWR | os.O_CREAT)
    flags = struct.unpack('l', fcntl.ioctl(descriptor, 0x80086601, b'\\0' * 8))[0]
    fcntl.ioctl(descriptor, 0x40086602, struct.pack('l', flags | 0x10))
def limit():
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (5, 5))
print(json.dumps({
    'nice': refused(lambda: os.setpriority(os.PRIO_PROCESS, 0, -5)),
    'schedule': refused(lambda: os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(5))),
    'io priority': refused(lambda: call(251, 1, 0, 1 << 13)),
    'lock memory': refused(lock),
    'limit': refused(limit),
    'clock': refused(lambda: call(227, 0, (ctypes.c_long * 2)(1, 1))),
    'hang up': refused(lambda: call(153)),
    'immutable': refused(immutable),
}))
"""


def test_capabilities_said_to_be_of_the_host_allow_nothing_in_a_jail(home: Home) -> None:
    """With every one of them given and no filter, the kernel still refuses: a jail's are of its own user namespace."""
    text = spec("host", "", "[policy]", f"capabilities = {json.dumps(HOST_ONLY)}", 'syscalls = { preset = "none" }')
    home.build("host", text)
    attempts = json.loads(home.output("run", "host", "--", *python(ATTEMPTS.replace("/srv/kept", "/etc/passwd"))))
    home.output("rm", "--force", "host")
    assert {name: error for name, error in attempts.items() if error not in ("EPERM", "EACCES", "ENOMEM")} == {}
