from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from stockade.observe import Observation
from stockade.observe.parse import Recorded, parse
from stockade.records.trace import Access, Trace

PYTHON = "/usr/bin/python3"


def of(text: str, *, directory: str = "/home", base: str = "/", names: bool = False, root: int = 1) -> Trace:
    """Parse lines of the form `PID CALL`, in the order given."""
    lines = []
    for number, line in enumerate(text.strip().splitlines()):
        pid, _, call = line.strip().partition(" ")
        lines.append((f"{number:017}", int(pid), call + "\n"))
    return parse(lines, [Recorded("t", root, directory=directory)], base=base, names=names)


def brief(trace: Trace) -> list[tuple[str, str, str]]:
    return [(access.operation, access.path, access.error) for access in trace.accesses]


def start(text: str, **options: object) -> Trace:
    return of('1 execve("/bin/x", ["x"], 0x1 /* 1 var */) = 0\n' + text, **options)  # type: ignore[arg-type]


def rest(text: str, **options: object) -> list[tuple[str, str, str]]:
    return brief(start(text, **options))[1:]


# What really happens, captured from a run of each kind.

DEEDS = """
import os, socket, sys
os.chdir("/var/tmp")
os.mkdir("deeds", 0o750)
os.chdir("deeds")
names = b"with space", b'with "quotes"', b"new\\nline", b"semi;colon) = 3", b"latin-\\xe9"
for name in (*names, b"tab\\tback\\\\slash", b"<angle>"):
    os.close(os.open(name, os.O_CREAT | os.O_WRONLY, 0o640))
    os.stat(name)
os.open(b"<angle>", os.O_RDONLY)
os.rename(b"with space", "renamed")
os.symlink("target", "link"); os.readlink("link"); os.link("renamed", "hard")
os.truncate("renamed", 0); os.chmod("renamed", 0o600); os.chown("renamed", 33, -1)
directory = os.open("/usr", os.O_RDONLY)
os.stat("bin", dir_fd=directory); os.listdir(directory); os.fchdir(directory); os.stat("lib")
try: os.open("missing", os.O_RDONLY)
except FileNotFoundError: pass
os.mkfifo("/var/tmp/deeds/fifo", 0o622)
server = socket.socket(socket.AF_UNIX); server.bind("/var/tmp/deeds/sock"); server.listen()
socket.socket(socket.AF_UNIX).connect("/var/tmp/deeds/sock")
abstract = socket.socket(socket.AF_UNIX); abstract.bind("\\0abstract"); abstract.listen()
tcp = socket.socket(); tcp.bind(("127.0.0.1", 7777)); tcp.listen()
six = socket.socket(socket.AF_INET6); six.bind(("::1", 7778)); six.listen()
"""


@pytest.fixture(scope="module")
def deeds() -> Observation:
    if os.geteuid() != 0:
        pytest.skip("changes owners: run the tests as root")
    from stockade import observe
    from stockade.records.spec import Service, Spec

    spec = Spec(name="deeds", service=Service(command=(PYTHON, "-I", "-S", "-c", DEEDS)))
    observation = observe.outside(spec, seeds=(), substitutions={}, identity=observe.Identity())
    assert observation.status == 0, observation.log
    return observation


def found(observation: Observation, operation: str, path: str) -> Access:
    matches = [item for item in observation.trace.accesses if item.operation == operation and item.path == path]
    assert matches, f"no {operation} of {path!r}"
    return matches[0]


@pytest.mark.parametrize(
    "name",
    [
        "with space",
        'with "quotes"',
        "new\nline",
        "semi;colon) = 3",
        os.fsdecode(b"latin-\xe9"),
        "tab\tback\\slash",
        "<angle>",
    ],
)
def test_file_names_of_any_bytes_survive(deeds: Observation, name: str) -> None:
    assert found(deeds, "create", f"/var/tmp/deeds/{name}").mode == 0o640
    assert found(deeds, "stat", f"/var/tmp/deeds/{name}").error == ""


def test_each_deed_is_the_operation_that_it_was(deeds: Observation) -> None:
    here = "/var/tmp/deeds"
    assert found(deeds, "mkdir", here).mode == 0o750
    assert found(deeds, "chdir", here)
    assert found(deeds, "unlink", f"{here}/with space")
    assert found(deeds, "create", f"{here}/renamed")
    assert found(deeds, "create", f"{here}/link")
    assert found(deeds, "readlink", f"{here}/link")
    assert found(deeds, "create", f"{here}/hard")
    assert found(deeds, "truncate", f"{here}/renamed")
    assert found(deeds, "chmod", f"{here}/renamed").mode == 0o600
    owner = found(deeds, "chown", f"{here}/renamed")
    assert (owner.uid, owner.gid) == (33, -1)
    assert found(deeds, "mknod", f"{here}/fifo")
    assert found(deeds, "bind", f"{here}/sock")
    assert found(deeds, "connect", f"{here}/sock")
    assert found(deeds, "read", f"{here}/<angle>")


def test_paths_relative_to_a_descriptor_and_after_fchdir_are_absolute(deeds: Observation) -> None:
    assert found(deeds, "stat", "/usr/bin").error == ""
    assert found(deeds, "list", "/usr")
    assert found(deeds, "chdir", "/usr")
    assert found(deeds, "stat", "/usr/lib").error == ""
    assert found(deeds, "read", "/usr/missing").error == "ENOENT"


def test_sockets_of_each_family_are_recorded_with_their_address(deeds: Observation) -> None:
    listened = {(item.family, item.address, item.port) for item in deeds.trace.sockets if item.operation == "listen"}
    assert listened == {
        ("unix", "/var/tmp/deeds/sock", 0),
        ("unix", "@abstract", 0),
        ("inet", "127.0.0.1", 7777),
        ("inet6", "::1", 7778),
    }
    assert 33 in deeds.trace.uids


def test_what_set_the_service_up_is_not_in_its_trace(deeds: Observation) -> None:
    assert [item.program for item in deeds.trace.executions] == [PYTHON]
    assert deeds.trace.accesses[0] == Access(
        path=PYTHON, operation="exec", pid=deeds.trace.executions[0].pid, order=0
    )  # fmt: skip
    assert not any("setpriv" in item.path for item in deeds.trace.accesses)
    assert deeds.trace.executions[0].arguments[:3] == (PYTHON, "-I", "-S")


def test_a_thread_that_executes_a_program_is_followed(outside: Callable[..., Observation], as_root: None) -> None:
    code = (
        "import os, threading; threading.Thread(target=lambda: os.execv('/bin/cat', ['cat', '/etc/hostname'])).start()"
    )
    observation = outside(PYTHON, "-I", "-S", "-c", code)
    assert [item.program for item in observation.trace.executions] == [PYTHON, "/bin/cat"]
    assert found(observation, "read", "/etc/hostname")


def test_what_is_named_from_the_working_directory_is_marked() -> None:
    trace = start("""1 openat(AT_FDCWD</home>, "near", O_RDONLY) = -1 ENOENT (No such file or directory)
    1 openat(AT_FDCWD</home>, "/home/too", O_RDONLY) = -1 ENOENT (No such file or directory)
    1 openat(3</home>, "near", O_WRONLY) = -1 ENOENT (No such file or directory)
    1 newfstatat(AT_FDCWD</home>, "near", 0x1, 0) = -1 ENOENT (No such file or directory)
    1 newfstatat(3</home>, "too", 0x1, 0) = -1 ENOENT (No such file or directory)
    1 rename("near", "/home/far") = 0
    1 execve("./near", ["near"], 0x1 /* 1 var */) = -1 ENOENT (No such file or directory)""")
    assert [(access.operation, access.relative) for access in trace.accesses[1:]] == [
        ("read", True), ("read", False), ("write", False), ("stat", True), ("stat", False), ("unlink", True),
        ("create", False), ("exec", True),
    ]  # fmt: skip


def test_threads_share_their_current_directory_and_children_inherit_it(
    outside: Callable[..., Observation], as_root: None
) -> None:
    code = """
import os, threading
thread = threading.Thread(target=lambda: os.chdir("/usr/share")); thread.start(); thread.join()
os.access("doc", os.R_OK)
if os.fork() == 0:
    os.chdir("doc"); os.access("base-files", os.R_OK); os._exit(0)
os.wait()
os.access("man", os.R_OK)
"""
    observation = outside(PYTHON, "-I", "-S", "-c", code)
    looked = [item.path for item in observation.trace.accesses if item.operation == "stat" and "/share/" in item.path]
    assert looked == ["/usr/share/doc", "/usr/share/doc/base-files", "/usr/share/man"]


def test_a_chroot_of_the_services_own_is_undone(outside: Callable[..., Observation], as_root: None) -> None:
    code = """
import os
os.chroot("/usr"); os.stat("/games"); os.chdir("/share"); os.stat("doc"); os.stat("/../../bin/env")
os.open("bin", os.O_RDONLY, dir_fd=os.open("/", 0))
"""
    observation = outside(PYTHON, "-I", "-S", "-c", code)
    assert observation.status == 0, observation.log
    tail = [(item.operation, item.path) for item in observation.trace.accesses][-7:]
    assert tail == [
        ("chroot", "/usr"),
        ("stat", "/usr/games"),
        ("chdir", "/usr/share"),
        ("stat", "/usr/share/doc"),
        ("stat", "/usr/bin/env"),
        ("read", "/usr"),
        ("read", "/usr/bin"),
    ]


def test_ids_are_those_switched_to_and_given_files_to(outside: Callable[..., Observation], as_root: None) -> None:
    code = """
import os
os.setgroups([44, 45]); os.setresgid(33, 33, 33); os.setresuid(-1, 1234, -1)
try: os.setuid(99)
except PermissionError: pass
"""
    trace = outside(PYTHON, "-I", "-S", "-c", code).trace
    assert trace.uids == (1234,)
    assert trace.gids == (33, 44, 45)


def test_names_of_all_system_calls_are_there_on_request(outside: Callable[..., Observation], as_root: None) -> None:
    assert outside("cat", "/etc/hostname").trace.syscalls == ()
    observation = outside("cat", "/etc/hostname", syscalls=True)
    assert {"execve", "openat", "read", "write", "mmap", "close", "exit_group"} <= set(observation.trace.syscalls)
    assert found(observation, "read", "/etc/hostname")


# What is rare, as strace 6.1 wrote it.


@pytest.mark.parametrize("path", ["//etc/hostname", "///etc/hostname"])
def test_slashes_that_a_path_begins_with_are_one(path: str) -> None:
    assert rest(f'1 openat(AT_FDCWD</home>, "{path}", O_RDONLY) = 3<{path[-13:]}>') == [("read", "/etc/hostname", "")]


def test_an_interrupted_call_that_is_restarted_counts_once() -> None:
    assert (
        rest('1 connect(3<socket:[9]>, {sa_family=AF_UNIX, sun_path="/s"}, 5) = ? ERESTARTSYS (To be restarted)') == []
    )


def test_a_call_cut_short_by_death_is_left_out_and_named() -> None:
    trace = start('1 openat(AT_FDCWD</home>, "fifo", O_RDONLY <unfinished ...>', names=True)
    assert brief(trace)[1:] == []
    assert "openat" in trace.syscalls


def test_an_exec_begun_by_a_thread_ends_under_its_process() -> None:
    trace = start(
        """1 clone3({flags=CLONE_VM|CLONE_FS|CLONE_FILES|CLONE_THREAD, exit_signal=0}, 88) = 7
        7 execve("/bin/y", ["y"], 0x1 /* 1 var */ <pid changed to 1 ...>
        1 <... execve resumed>) = 0
        1 access("z", F_OK) = 0"""
    )
    assert [(item.pid, item.program) for item in trace.executions] == [(1, "/bin/x"), (1, "/bin/y")]
    assert brief(trace)[-1] == ("stat", "/home/z", "")


def test_a_child_has_the_number_that_the_tracer_gives_it() -> None:
    trace = start(
        """1 vfork() = 5 /* 500 in strace's PID NS */
        500 execve("tool", ["tool", "a b"], 0x1 /* 0 vars */) = 0"""
    )
    assert trace.executions[1].parent == 1
    assert trace.executions[1].program == "/home/tool"
    assert trace.executions[1].arguments == ("tool", "a b")


def test_failed_exec_is_an_access_and_no_execution() -> None:
    trace = start('1 execve("/opt/x", ["x"], 0x1 /* 0 vars */) = -1 ENOENT (No such file or directory)')
    assert brief(trace)[1:] == [("exec", "/opt/x", "ENOENT")]
    assert len(trace.executions) == 1


@pytest.mark.parametrize(
    ("flags", "operation"),
    [
        ("O_RDONLY|O_CLOEXEC", "read"),
        ("O_RDONLY|O_DIRECTORY", "read"),
        ("O_PATH|O_DIRECTORY", "stat"),
        ("O_WRONLY|O_APPEND", "write"),
        ("O_RDWR", "write"),
        ("O_WRONLY|O_TRUNC", "truncate"),
        ("O_RDWR|O_CREAT|O_TRUNC, 0644", "create"),
        ("O_RDWR|O_EXCL|O_DIRECTORY|O_TMPFILE, 0600", "create"),
    ],
)
def test_open_flags_decide_the_operation(flags: str, operation: str) -> None:
    assert rest(f'1 openat(AT_FDCWD</home>, "f", {flags}) = 3</home/f>') == [(operation, "/home/f", "")]


def test_openat2_says_its_flags_in_a_structure() -> None:
    text = '1 openat2(3</srv>, "f", {flags=O_WRONLY|O_CREAT, mode=0600, resolve=RESOLVE_BENEATH}, 24) = 4</srv/f>'
    access = start(text).accesses[1]
    assert (access.operation, access.path, access.mode) == ("create", "/srv/f", 0o600)


def test_a_message_queue_is_a_file_of_the_file_system_that_shows_it() -> None:
    assert rest('1 mq_open("q", O_RDWR|O_CREAT, 0600, NULL) = 3') == [("create", "/dev/mqueue/q", "")]
    assert rest('1 mq_open("q", O_RDONLY) = -1 ENOENT (No such file or directory)') == [
        ("write", "/dev/mqueue/q", "ENOENT")
    ]


def test_failed_rename_removes_and_makes_nothing() -> None:
    text = '1 renameat2(AT_FDCWD</home>, "a", AT_FDCWD</home>, "b", 0) = -1 EXDEV (Invalid cross-device link)'
    assert rest(text) == [("unlink", "/home/a", "EXDEV")]


def test_status_of_an_open_descriptor_is_no_access_to_a_path() -> None:
    assert rest('1 newfstatat(3</etc/x>, "", 0x7ffc, AT_EMPTY_PATH) = 0') == []


def test_descriptor_without_a_path_is_no_access() -> None:
    assert rest("1 fchmod(3<socket:[12]>, 0600) = 0") == []
    assert rest("1 fchown(4</memfd:x>(deleted), 1, 1) = 0") == []


def test_base_is_stripped_from_what_the_tracer_resolved_only() -> None:
    text = """1 openat(AT_FDCWD</jail/srv>, "f", O_RDONLY) = 3</jail/srv/f>
    1 openat(AT_FDCWD</jail/srv>, "/jail/g", O_RDONLY) = -1 ENOENT (No such file or directory)"""
    assert rest(text, base="/jail") == [("read", "/srv/f", ""), ("read", "/jail/g", "ENOENT")]


def test_looking_twice_is_recorded_once_and_changing_twice_is_recorded_twice() -> None:
    text = '1 access("a", F_OK) = 0\n1 access("a", F_OK) = 0\n1 unlink("b") = 0\n1 unlink("b") = 0'
    assert [item[0] for item in rest(text)] == ["stat", "unlink", "unlink"]


def test_a_hundred_thousand_lines_are_read_in_two_seconds(tmp_path: Path) -> None:
    call = (
        'openat(AT_FDCWD</usr/share>, "doc/package-{}/copyright", O_RDONLY|O_CLOEXEC) = 3</usr/share/doc/{}/copyright>'
    )
    lines = [("0", 1, 'execve("/bin/x", ["x"], 0x1 /* 1 var */) = 0\n')]
    lines += [(f"{number:017}", 1, call.format(number, number) + "\n") for number in range(100_000)]
    began = time.process_time()
    trace = parse(lines, [Recorded("t", 1)])
    assert len(trace.accesses) == 100_001
    assert time.process_time() - began < 2.0
