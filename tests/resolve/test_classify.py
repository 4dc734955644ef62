"""The classification rules, each on a trace written by hand."""

from __future__ import annotations

import os

import msgspec
import pytest
from little_world import PROGRAM, World, advice, did, entry, paths, reasons, spec, trace, work

from stockade.records.closure import Evidence
from stockade.records.spec import Account, Directory, Files, Secret, Service
from stockade.records.trace import Execution, Socket
from stockade.resolve import resolve

# rule 1: what succeeded is needed, what failed is none


def test_what_was_read_is_needed_with_its_directories_and_says_who_read_it(world: World) -> None:
    world.file("/etc/app/app.conf", mode=0o640)
    closure = world.resolve(trace(did("read", "/etc/app/app.conf")))
    assert {"/etc", "/etc/app", "/etc/app/app.conf", PROGRAM} <= paths(closure)
    found = entry(closure, "/etc/app/app.conf")
    assert (found.type, found.mode, found.size) == ("file", 0o640, 1)
    assert found.source == str(world.outer("/etc/app/app.conf"))
    assert found.evidence == (Evidence(kind="access", detail=f"read by {PROGRAM}"),)
    assert entry(closure, "/etc/app").evidence == (Evidence(kind="parent", because="/etc/app/app.conf"),)


def test_what_is_absent_on_the_host_too_is_a_false_positive(world: World) -> None:
    closure = world.resolve(trace(did("read", "/etc/none", "ENOENT"), did("stat", f"{PROGRAM}/x", "ENOTDIR")))
    assert reasons(closure) == {"/etc/none": "absent on the host too", f"{PROGRAM}/x": "absent on the host too"}
    assert "/etc/none" not in paths(closure)


def test_what_was_refused_on_the_host_is_a_false_positive(world: World) -> None:
    world.file("/etc/secret.conf", mode=0o600)
    closure = world.resolve(trace(did("read", "/etc/secret.conf", "EACCES")))
    assert reasons(closure) == {"/etc/secret.conf": "refused on the host too"}


@pytest.mark.parametrize(("operation", "error"), [("readlink", "EINVAL"), ("mkdir", "EEXIST"), ("stat", "ENODATA")])
def test_an_error_that_only_an_existing_path_gives_is_a_need(world: World, operation: str, error: str) -> None:
    world.directory("/srv/data")
    assert "/srv/data" in paths(world.resolve(trace(did(operation, "/srv/data", error))))


# rule 2: searching is no need


def test_a_library_found_in_a_later_directory_leaves_only_false_positives_behind(world: World) -> None:
    world.file("/usr/lib/libx.so.1")
    closure = world.resolve(
        trace(did("read", "/opt/lib/libx.so.1", "ENOENT"), did("read", "/usr/lib/libx.so.1"))
    )
    assert reasons(closure) == {"/opt/lib/libx.so.1": "library found in another directory"}
    assert "/usr/lib/libx.so.1" in paths(closure)
    assert "/opt" not in paths(closure)


# rule 3: the kernel's trees and what is made anew


@pytest.mark.parametrize("path", ["/proc/self/fd", "/proc/17/stat", "/proc/thread-self/comm"])
def test_proc_of_processes_asks_for_a_proc_of_processes_only(world: World, path: str) -> None:
    closure = world.resolve(trace(did("read", path)))
    assert (closure.proc, closure.proc_subset) == (True, True)
    assert not any(name.startswith("/proc") for name in paths(closure))


def test_kernel_information_in_proc_asks_for_the_whole_of_it(world: World) -> None:
    closure = world.resolve(trace(did("read", "/proc/meminfo")))
    assert (closure.proc, closure.proc_subset) == (True, False)


def test_what_a_library_reads_in_proc_and_does_without_asks_for_none(world: World) -> None:
    closure = world.resolve(trace(did("read", "/proc/sys/kernel/ngroups_max"), did("read", "/proc/none", "ENOENT")))
    assert (closure.proc, closure.proc_subset) == (False, True)


def test_a_link_into_proc_is_recreated_and_not_followed(world: World) -> None:
    world.link("/etc/mounts", "../proc/self/mounts")
    closure = world.resolve(trace(did("read", "/etc/mounts")))
    assert entry(closure, "/etc/mounts").target == "../proc/self/mounts"
    assert closure.proc
    assert not any(name.startswith("/proc") for name in paths(closure))


def test_sys_is_never_copied(world: World) -> None:
    world.file("/sys/kernel/x")
    closure = world.resolve(trace(did("read", "/sys/kernel/x"), did("read", "/sys/devices/system/cpu/online")))
    assert reasons(closure) == {
        "/sys/devices/system/cpu/online": "kernel information that its reader does without"
    }
    assert ("sysfs", "/sys") in advice(closure)
    assert not any(name.startswith("/sys") for name in paths(closure))


def test_devices_are_listed_and_what_a_jail_has_anyway_is_not() -> None:
    used = [did("read", f"/dev/{name}") for name in ("null", "urandom", "ptmx", "pts/3", "stdin", "tty")]
    closure = resolve(trace(*used), spec(service=Service(command=("/bin/true",))))
    assert closure.devices == ("null", "urandom")


def test_a_message_queue_asks_for_the_file_system_that_shows_them(world: World) -> None:
    assert world.resolve(trace(did("create", "/dev/mqueue/queue"))).devices == ("mqueue",)
    assert world.resolve(trace(did("create", "/dev/mqueue/queue", "EACCES"))).devices == ()


def test_a_pid_file_in_run_gives_its_directory_and_not_its_content(world: World) -> None:
    world.directory("/run/app", mode=0o750)
    world.file("/run/app/app.pid")
    closure = world.resolve(trace(did("create", "/run/app/app.pid", mode=0o644)))
    assert work(closure.tmpfs) == {"/run/app": (0o750, 0, 0)}
    assert "/run" in paths(closure)
    assert not any(name.startswith("/run/") for name in paths(closure))


def test_var_run_is_run(world: World) -> None:
    world.directory("/run/app")
    world.link("/var/run", "/run")
    closure = world.resolve(trace(did("stat", "/var/run"), did("create", "/var/run/app/x")))
    assert list(work(closure.tmpfs)) == ["/run", "/run/app"]
    assert entry(closure, "/var/run").target == "/run"


@pytest.mark.parametrize(
    ("operation", "error"), [("create", ""), ("create", "ENOENT"), ("mkdir", ""), ("stat", "ENOENT")]
)
def test_a_link_to_a_directory_that_is_made_anew_is_recreated(world: World, operation: str, error: str) -> None:
    """The service asks for /var/run/app; the jail's own /run is a tmpfs, and /var is read-only."""
    world.directory("/run/app")
    world.link("/var/run", "../run")
    path = "/var/run/app" if operation == "stat" else "/var/run/app/x"
    closure = world.resolve(trace(did(operation, path, error)))
    assert "/run/app" in work(closure.tmpfs)
    assert entry(closure, "/var/run").target == "../run"


def test_a_link_to_state_is_recreated(world: World) -> None:
    world.directory("/srv/data/app")
    world.link("/var/lib/app", "/srv/data/app")
    closure = world.resolve(trace(did("create", "/var/lib/app/x")))
    assert list(work(closure.state)) == ["/srv/data/app"]
    assert entry(closure, "/var/lib/app").target == "/srv/data/app"


def test_a_directory_below_run_that_only_the_host_has_is_made(world: World) -> None:
    """The observed view has a /run of its own: sshd looks for /run/sshd and ends."""
    world.directory("/run/sshd", mode=0o711)
    closure = world.resolve(trace(did("stat", "/run/sshd", "ENOENT")))
    assert work(closure.tmpfs) == {"/run/sshd": (0o711, 0, 0)}


def test_a_file_read_in_run_is_not_copied_but_reported(world: World) -> None:
    world.file("/run/other/state")
    closure = world.resolve(trace(did("read", "/run/other/state")))
    assert ("runtime-file", "/run/other/state") in advice(closure)
    assert "/run/other/state" not in paths(closure)


def test_a_file_read_in_run_that_the_spec_names_is_copied_and_not_reported(world: World) -> None:
    world.file("/run/other/state")
    closure = world.resolve(trace(did("read", "/run/other/state")), spec(include=("/run/other/state",)))
    assert "/run/other/state" in paths(closure)
    assert not advice(closure)


def test_a_link_onto_a_tmpfs_brings_its_present_content(world: World) -> None:
    """resolv.conf of systemd-resolved."""
    world.file("/run/systemd/resolve/stub-resolv.conf", "nameserver 127.0.0.53\n")
    world.link("/etc/resolv.conf", "../run/systemd/resolve/stub-resolv.conf")
    closure = world.resolve(trace(did("read", "/etc/resolv.conf")))
    found = entry(closure, "/etc/resolv.conf")
    assert (found.type, found.size) == ("file", 22)
    assert found.source == str(world.outer("/run/systemd/resolve/stub-resolv.conf"))


def test_logs_are_state_without_their_content(world: World) -> None:
    world.file("/var/log/app/app.log")
    closure = world.resolve(trace(did("write", "/var/log/app/app.log"), did("read", "/var/log/app/app.log")))
    assert list(work(closure.state)) == ["/var/log/app"]
    assert "/var/log/app/app.log" not in paths(closure)


# rule 4: a state machine per file


def test_a_file_that_is_only_written_is_not_copied_and_its_directory_is_state(world: World) -> None:
    world.directory("/var/lib/app", mode=0o2770)
    world.file("/var/lib/app/out")
    closure = world.resolve(trace(did("create", "/var/lib/app/out"), did("read", "/var/lib/app/out")))
    assert work(closure.state) == {"/var/lib/app": (0o2770, 0, 0)}
    assert "/var/lib/app/out" not in paths(closure)
    assert "/var/lib/app" in paths(closure)


@pytest.mark.parametrize("first", ["read", "write"])
def test_a_file_that_had_to_be_there_before_it_was_written_is_copied_and_reported(world: World, first: str) -> None:
    world.file("/var/lib/app/db")
    closure = world.resolve(trace(did(first, "/var/lib/app/db"), did("truncate", "/var/lib/app/db")))
    assert "/var/lib/app/db" in paths(closure)
    assert ("state", "/var/lib/app/db") in advice(closure)
    assert list(work(closure.state)) == ["/var/lib/app"]


def test_a_name_that_is_made_anew_where_the_host_has_a_link_is_no_writing_to_what_the_link_leads_to(
    world: World,
) -> None:
    """Dovecot makes a link to its configuration in its directory below /run, where one that runs has it already."""
    world.files("/etc/app/app.conf", "/var/lib/app/x")
    world.link("/run/app/app.conf", "/etc/app/app.conf")
    world.link("/var/lib/app/now", "/etc/app/app.conf")
    closure = world.resolve(trace(
        did("read", "/etc/app/app.conf"), did("create", "/run/app/app.conf"), did("create", "/var/lib/app/now"),
    ))  # fmt: skip
    assert list(work(closure.state)) == ["/var/lib/app"]
    assert not advice(closure)
    assert "/var/lib/app/now" not in paths(closure)


def test_a_file_of_the_host_that_is_written_through_a_link_is_written_where_it_is(world: World) -> None:
    world.files("/srv/data/x")
    world.link("/var/lib/app/now", "/srv/data/x")
    closure = world.resolve(trace(did("create", "/var/lib/app/now", mode=0o644)))
    assert list(work(closure.state)) == ["/srv/data"]


def test_a_directory_that_the_service_made_has_the_mode_and_owner_that_it_gave(world: World) -> None:
    world.directory("/var/lib")
    closure = world.resolve(
        trace(
            did("mkdir", "/var/lib/app", mode=0o777),
            did("chown", "/var/lib/app", uid=33, gid=-1),
            did("mkdir", "/var/lib/app/inner", mode=0o700),
            did("create", "/var/lib/app/inner/x"),
        )
    )
    assert work(closure.state) == {"/var/lib/app": (0o755, 33, 0)}


def test_a_changed_directory_of_the_host_is_state_with_the_changes(world: World) -> None:
    world.directory("/var/spool/app")
    closure = world.resolve(
        trace(did("chmod", "/var/spool/app", mode=0o700), did("chown", "/var/spool/app", uid=5, gid=6))
    )
    assert work(closure.state) == {"/var/spool/app": (0o700, 5, 6)}


def test_a_directory_below_run_that_the_service_made_is_made_for_it(world: World) -> None:
    world.directory("/run")
    closure = world.resolve(trace(did("mkdir", "/run/app", mode=0o700), did("create", "/run/app/sock")))
    assert work(closure.tmpfs) == {"/run/app": (0o700, 0, 0)}


def test_a_temporary_directory_with_a_random_name_is_left_to_the_service(world: World) -> None:
    world.directory("/tmp", mode=0o1777)
    closure = world.resolve(
        trace(
            did("mkdir", "/tmp/app.Xy7", mode=0o700),
            did("create", "/tmp/app.Xy7/a"),
            did("unlink", "/tmp/app.Xy7/a"),
            did("unlink", "/tmp/app.Xy7"),
        )
    )
    assert work(closure.tmpfs) == {"/tmp": (0o1777, 0, 0)}


def test_writing_into_a_directory_of_the_system_is_reported_and_makes_no_volume_of_it(world: World) -> None:
    world.file("/etc/app.conf")
    closure = world.resolve(trace(did("create", "/etc/app.conf.new")))
    assert ("writes-fixed-directory", "/etc/app.conf.new") in advice(closure)
    assert closure.state == ()


def test_a_directory_that_the_spec_describes_is_left_to_the_spec(world: World) -> None:
    world.directory("/var/lib/app/sub")
    given = spec(
        directories={"/var/lib/app": Directory(kind="volume")},
        accounts=(Account(name="alice", home="/home/alice"),),
    )
    closure = world.resolve(trace(did("create", "/var/lib/app/sub/x"), did("create", "/home/alice/up")), given)
    assert closure.state == ()


# rule 5: a failed creation needs its directory


@pytest.mark.parametrize("operation", ["create", "bind"])
def test_a_failed_creation_needs_its_directory(world: World, operation: str) -> None:
    world.directory("/run")
    world.directory("/var/lib/app")
    closure = world.resolve(
        trace(did(operation, "/run/app/x", "ENOENT"), did(operation, "/var/lib/app/x", "EACCES"))
    )
    assert list(work(closure.tmpfs)) == ["/run/app"]
    assert list(work(closure.state)) == ["/var/lib/app"]


def test_a_directory_that_nobody_made_belongs_to_the_services_user(world: World) -> None:
    """systemd would have made it with RuntimeDirectory."""
    world.directory("/run")
    world.file("/etc/passwd", "root:x:0:0::/root:/bin/sh\nredis:x:105:108::/:/bin/sh\n")
    given = spec(service=Service(command=(PROGRAM,), user="redis"))
    closure = world.resolve(trace(did("create", "/run/redis/redis.pid", "ENOENT")), given)
    assert work(closure.tmpfs) == {"/run/redis": (0o755, 105, 108)}


# rule 6: other processes' sockets


def test_a_socket_of_another_process_is_reported_and_never_copied(world: World) -> None:
    world.directory("/run/dbus")
    closure = world.resolve(trace(did("connect", "/run/dbus/system_bus_socket")))
    [found] = [item for item in closure.advice if item.code == "socket"]
    assert found.path == "/run/dbus/system_bus_socket"
    assert "D-Bus" in found.message
    assert not any(name.startswith("/run/dbus") for name in paths(closure))


def test_a_refused_connection_is_a_false_positive(world: World) -> None:
    closure = world.resolve(trace(did("connect", "/var/run/nscd/socket", "ENOENT")))
    assert reasons(closure) == {"/var/run/nscd/socket": "a socket of another process"}


def test_a_socket_of_the_services_own_is_no_news(world: World) -> None:
    world.directory("/run/app")
    closure = world.resolve(trace(did("bind", "/run/app/s"), did("connect", "/run/app/s")))
    assert closure.advice == ()
    assert list(work(closure.tmpfs)) == ["/run/app"]


@pytest.mark.parametrize("error", ["", "ENOENT"])
def test_connecting_to_dev_log_asks_for_one(world: World, error: str) -> None:
    assert world.resolve(trace(did("connect", "/dev/log", error))).syslog
    socket = Socket(pid=7, operation="connect", family="unix", address="/dev/log", error=error)
    assert world.resolve(trace(sockets=(socket,))).syslog
    assert not world.resolve(trace()).syslog


# rule 7: programs


def test_an_executed_script_brings_its_interpreters(world: World) -> None:
    world.file("/bin/interpreter", "no elf", mode=0o755)
    world.file("/usr/bin/tool", "#!/bin/interpreter -x\n", mode=0o755)
    closure = world.resolve(trace(did("exec", "/usr/bin/tool")))
    [evidence] = entry(closure, "/bin/interpreter").evidence
    assert evidence == Evidence(kind="shebang", detail="#!/bin/interpreter -x", because="/usr/bin/tool")
    assert entry(closure, "/usr/bin/tool").evidence[0].detail == f"executed by {PROGRAM}"


def test_a_program_executed_below_a_tmpfs_comes_in_with_what_it_reads_beside_itself(world: World) -> None:
    program = world.file("/var/tmp/project/bin/tool", mode=0o755)
    data = world.file("/var/tmp/project/share/data")
    other = world.file("/var/tmp/other/state")
    for path in ("/var/tmp", "/var/tmp/project", "/var/tmp/project/share"):
        world.directory(path)
    looked = [did("stat", path) for path in ("/var/tmp", "/var/tmp/project", "/var/tmp/project/share")]
    seen = trace(did("exec", program), *looked, did("read", data), did("read", other))
    closure = world.resolve(msgspec.structs.replace(seen, executions=(Execution(pid=7, program=program),)))
    assert {program, data} <= set(paths(closure))
    assert other not in paths(closure)
    assert closure.tmpfs == ()


# rule 8: directories and symlinks


def test_an_entered_directory_is_made_with_its_mode(world: World) -> None:
    world.directory("/srv/www", mode=0o751)
    found = entry(world.resolve(trace(did("chdir", "/srv/www"))), "/srv/www")
    assert (found.type, found.mode) == ("directory", 0o751)


def test_every_symlink_on_a_path_is_recreated(world: World) -> None:
    world.file("/usr/lib/app/libx.so.1.2")
    world.link("/lib", "usr/lib")
    world.link("/usr/lib/app/libx.so.1", "libx.so.1.2")
    world.link("/etc/app/lib", "/lib/app")
    closure = world.resolve(trace(did("read", "/etc/app/lib/libx.so.1")))
    links = {item.path: item.target for item in closure.entries if item.type == "symlink"}
    assert links == {"/lib": "usr/lib", "/usr/lib/app/libx.so.1": "libx.so.1.2", "/etc/app/lib": "/lib/app"}
    assert entry(closure, "/usr/lib/app/libx.so.1.2").type == "file"
    assert entry(closure, "/lib").evidence == (Evidence(kind="symlink", because="/usr/lib/app/libx.so.1.2"),)


def test_a_dangling_link_that_was_read_is_recreated(world: World) -> None:
    world.link("/etc/app/current", "none")
    closure = world.resolve(trace(did("readlink", "/etc/app/current"), did("stat", "/etc/app/current", "ENOENT")))
    assert entry(closure, "/etc/app/current").target == "none"


def test_a_loop_of_symlinks_is_a_false_positive(world: World) -> None:
    world.link("/etc/a", "b")
    world.link("/etc/b", "a")
    closure = world.resolve(trace(did("read", "/etc/a", "ELOOP")))
    assert reasons(closure) == {"/etc/a": "a loop of symlinks"}


# rule 9: include directories


def test_a_listed_directory_of_which_all_of_one_suffix_was_opened_is_an_include_directory(world: World) -> None:
    world.files("/etc/app.d/a.conf", "/etc/app.d/b.conf", "/etc/app.d/README")
    closure = world.resolve(
        trace(did("list", "/etc/app.d"), did("read", "/etc/app.d/a.conf"), did("read", "/etc/app.d/b.conf"))
    )
    assert Evidence(
        kind="include", detail="every `*.conf` of the directory was opened", because="/etc/app.d"
    ) in entry(closure, "/etc/app.d/a.conf").evidence
    assert "/etc/app.d/README" not in paths(closure)


def test_of_a_listed_directory_of_which_a_part_was_opened_only_that_is_taken(world: World) -> None:
    world.files("/usr/lib/py/json.py", "/usr/lib/py/os.py", "/usr/lib/py/re.py")
    closure = world.resolve(trace(did("list", "/usr/lib/py"), did("read", "/usr/lib/py/json.py")))
    assert {name for name in paths(closure) if name.startswith("/usr/lib/py/")} == {"/usr/lib/py/json.py"}
    assert all(evidence.kind != "include" for evidence in entry(closure, "/usr/lib/py/json.py").evidence)


def test_left_out_files_of_an_include_directory_stay_out(world: World) -> None:
    world.files("/etc/ssh/ssh_host_rsa_key", "/etc/ssh/moduli")
    closure = world.resolve(
        trace(did("list", "/etc/ssh"), did("read", "/etc/ssh/ssh_host_rsa_key"), did("read", "/etc/ssh/moduli"))
    )
    assert "/etc/ssh/ssh_host_rsa_key" not in paths(closure)


# rule 10: looked at


def test_a_file_that_was_only_looked_at_is_copied(world: World) -> None:
    world.file("/usr/lib/py/x.py")
    found = entry(world.resolve(trace(did("stat", "/usr/lib/py/x.py"))), "/usr/lib/py/x.py")
    assert found.evidence[0].detail == f"looked at by {PROGRAM}"


# rule 12 and what the build makes


@pytest.mark.parametrize("path", ["/etc/passwd", "/etc/group", "/etc/shadow", "/etc/gshadow", "/etc/ld.so.conf"])
def test_what_the_build_makes_stays_out_and_its_directory_comes_in(world: World, path: str) -> None:
    world.file(path)
    closure = world.resolve(trace(did("read", path)))
    assert path not in paths(closure)
    assert "/etc" in paths(closure)
    assert reasons(closure)[path] == "left out: made by the build"


def test_generated_content_and_secrets_stay_out_and_their_directories_come_in(world: World) -> None:
    world.files("/etc/app/app.conf", "/etc/keys/key")
    world.directory("/srv/www")
    given = spec(
        files=Files(content={"/etc/app/app.conf": "generated", "/srv/www/index.html": "hello"}),
        secrets={"key": Secret(kind="ssh-key", path="/etc/keys/key")},
    )
    made = ("/etc/app/app.conf", "/etc/keys/key", "/etc/keys/key.pub", "/srv/www/index.html")
    used = [did("read", path) for path in made]
    closure = world.resolve(trace(*used), given)
    assert {"/etc/app", "/etc/keys", "/srv/www"} <= paths(closure)
    assert not {access.path for access in used} & paths(closure)


# rule 13: left out unless named

LEFT_OUT = [
    ("/usr/share/doc/app/README", "documentation"),
    ("/usr/share/man/man1/app.1.gz", "documentation"),
    ("/usr/share/info/app.info", "documentation"),
    ("/etc/fstab", "a table of the host's mounts"),
    ("/etc/mtab", "a table of the host's mounts"),
    ("/var/lib/app/app.pid", "a pid or lock file"),
    ("/var/lib/app/db.lock", "a pid or lock file"),
    ("/etc/ssh/ssh_host_ed25519_key", "a host key"),
    ("/etc/ssl/private/snakeoil.key", "a private key"),
    ("/etc/letsencrypt/live/x/privkey.pem", "a private key"),
    ("/etc/bind/rndc.key", "a private key"),
    ("/etc/krb5.keytab", "a private key"),
    ("/srv/www/.htpasswd", "password hashes"),
    ("/etc/shadow-", "password hashes"),
    ("/root/.bashrc", "in a home directory"),
    ("/home/alice/notes", "in a home directory"),
]


@pytest.mark.parametrize(("path", "reason"), LEFT_OUT)
def test_left_out_files_stay_out_with_the_reason(world: World, path: str, reason: str) -> None:
    world.file(path)
    closure = world.resolve(trace(did("read", path)))
    assert path not in paths(closure)
    assert reasons(closure) == {path: f"left out: {reason}"}


@pytest.mark.parametrize(("path", "reason"), LEFT_OUT)
def test_left_out_files_come_in_when_they_are_named(world: World, path: str, reason: str) -> None:
    del reason
    world.file(path)
    assert path in paths(world.resolve(trace(), spec(include=(path,))))


@pytest.mark.parametrize("kind", ["RSA PRIVATE KEY", "PRIVATE KEY", "OPENSSH PRIVATE KEY", "EC PRIVATE KEY"])
def test_a_private_key_is_known_by_its_content(world: World, kind: str) -> None:
    world.file("/srv/app/settings.txt", f"# mine\n-----BEGIN {kind}-----\nabc\n-----END {kind}-----\n")
    closure = world.resolve(trace(did("read", "/srv/app/settings.txt")))
    assert reasons(closure) == {"/srv/app/settings.txt": "left out: a private key"}


def test_a_named_directory_does_not_name_the_secrets_in_it(world: World) -> None:
    world.files("/etc/ssh/ssh_host_rsa_key", "/etc/ssh/moduli", "/usr/share/doc/app/README")
    closure = world.resolve(None, spec(include=("/etc/ssh", "/usr/share/doc/app")))
    assert {"/etc/ssh/moduli", "/usr/share/doc/app/README"} <= paths(closure)
    assert "/etc/ssh/ssh_host_rsa_key" not in paths(closure)


def test_a_service_that_lives_in_a_home_is_taken_and_the_rest_of_the_home_is_not(world: World) -> None:
    program = world.file("/home/alice/app/bin/serve", mode=0o755)
    world.files("/home/alice/app/lib/code", "/home/alice/.netrc", "/home/alice/notes")
    closure = world.resolve(
        trace(
            did("exec", program), did("read", "/home/alice/app/lib/code"), did("read", "/home/alice/notes"),
            did("read", "/home/alice/.netrc"), did("stat", "/home/alice"),
        ),
        spec(service=Service(command=(program,))),
    )  # fmt: skip
    assert {program, "/home/alice/app/lib/code", "/home/alice"} <= paths(closure)
    assert not {"/home/alice/notes", "/home/alice/.netrc"} & paths(closure)


def test_a_script_that_the_service_makes_brings_its_interpreters(world: World) -> None:
    world.file("/usr/bin/env", mode=0o755)
    world.file("/usr/bin/tool", "#!/usr/bin/other\n", mode=0o755)
    world.file("/usr/bin/other", mode=0o755)
    world.link("/bin", "usr/bin")
    made = (
        Execution(pid=2, program="/tmp/made", line="#!/bin/env -S tool --fast"),
        Execution(pid=2, program="/tmp/lost", line="#!/bin/absent"),
    )
    closure = world.resolve(msgspec.structs.replace(trace(did("exec", "/tmp/made")), executions=made))
    assert {"/bin", "/usr/bin/env", "/usr/bin/tool", "/usr/bin/other"} <= paths(closure)
    assert Evidence(kind="shebang", detail="`#!/bin/env -S tool --fast` of /tmp/made, which the service makes") in (
        entry(closure, "/usr/bin/tool").evidence
    )


@pytest.mark.parametrize(
    ("command", "directory"), [(("./serve",), "/home/alice"), (("/bin/sh", "serve"), "/home/alice"),
                               (("/bin/sh", "/home/alice/serve"), "/"), (("/home/alice/serve",), "/")],
)  # fmt: skip
def test_of_a_home_in_which_the_service_lies_what_is_hidden_stays_out(
    world: World, command: tuple[str, ...], directory: str
) -> None:
    world.file("/bin/sh", mode=0o755)
    world.file("/home/alice/serve", "#!/bin/sh\n", mode=0o755)
    world.files("/home/alice/data/page", "/home/alice/.config/tool", "/home/bob/notes")
    read = "/home/alice/serve", "/home/alice/data/page", "/home/alice/.config/tool", "/home/bob/notes"
    given = spec(service=Service(command=command, directory=directory))
    found = paths(world.resolve(trace(*(did("read", path) for path in read)), given))
    assert [path for path in read if path in found] == ["/home/alice/serve", "/home/alice/data/page"]


@pytest.mark.parametrize("word", ["/home/alice/tool", "tool", "--from=tool"])
def test_a_link_in_a_home_that_the_command_names_comes_with_what_it_leads_to(world: World, word: str) -> None:
    world.file("/srv/bin/tool", mode=0o755)
    world.link("/home/alice/tool", "/srv/bin/tool")
    given = spec(service=Service(command=("/srv/bin/tool", word), directory="/home/alice"))
    assert "/home/alice/tool" in paths(world.resolve(trace(did("read", "/home/alice/tool")), given))


@pytest.mark.parametrize("place", ["/home/alice", "/var/tmp"])
def test_a_virtual_environment_whose_interpreter_is_a_link_is_the_services(world: World, place: str) -> None:
    world.file("/usr/bin/python3", mode=0o755)
    world.link(f"{place}/venv/bin/python3", "/usr/bin/python3")
    module = world.file(f"{place}/venv/lib/module.py")
    other = world.file(f"{place}/notes")
    given = spec(service=Service(command=(f"{place}/venv/bin/python3",)))
    found = paths(world.resolve(trace(did("read", module), did("read", other)), given))
    assert (module in found, other in found) == (True, False)


@pytest.mark.parametrize("word", ["/tmp/x", "/tmp/x/in", "--from=/tmp/x"])
def test_of_the_hosts_tmp_nothing_is_taken_for_what_the_run_made_there(world: World, word: str) -> None:
    """The run had a /tmp of its own; anybody may have put a file or a link of the same name into the host's."""
    secret = world.file("/home/alice/.ssh/key")
    world.file("/tmp/x/in")
    world.link("/tmp/x/link", secret)
    given = spec(service=Service(command=(PROGRAM, word)))
    made = did("mkdir", "/tmp/x"), did("create", "/tmp/x/in", mode=0o600), did("create", "/tmp/x/link", mode=0o600)
    seen = trace(*made, *(did("read", f"/tmp/x/{name}") for name in ("in", "link")), did("exec", "/tmp/x/link"))
    for closure in (world.resolve(seen, given), world.resolve(trace(*seen.accesses[3:]), given)):
        assert not [path for path in paths(closure) if path.startswith(("/tmp/", "/home/"))]


def test_a_working_directory_below_run_is_made_at_each_start(world: World) -> None:
    world.directory("/run/app")
    given = spec(service=Service(command=(PROGRAM,), directory="/run/app"))
    closure = world.resolve(trace(did("chdir", "/run/app"), did("create", "/run/app.pid", mode=0o644)), given)
    assert "/run/app" in {found.path for found in closure.tmpfs}


def test_what_a_program_below_var_tmp_makes_beside_itself_does_not_hide_it(world: World) -> None:
    program = world.file("/var/tmp/project/main.py", mode=0o755)
    made = did("mkdir", "/var/tmp/project/__pycache__"), did("create", "/var/tmp/project/__pycache__/x", mode=0o644)
    seen = trace(did("exec", program), did("stat", "/var/tmp/project"), *made)
    closure = world.resolve(msgspec.structs.replace(seen, executions=(Execution(pid=7, program=program),)))
    assert program in paths(closure)
    assert [found.path for found in closure.state] == ["/var/tmp/project"]
    assert closure.tmpfs == ()


def test_the_observers_own_files_stay_out(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STOCKADE_HOME", "/srv/stockade")
    world.file("/srv/stockade/state/x")
    closure = world.resolve(trace(did("read", "/srv/stockade/state/x")))
    assert reasons(closure) == {"/srv/stockade/state/x": "left out: a file of Stockade's own"}


# rule 15: ids


def test_ids_that_were_used_are_kept(world: World) -> None:
    closure = world.resolve(trace(uids=(33, 0, 33), gids=(33, 5)))
    assert (closure.uids, closure.gids) == ((0, 33), (5, 33))


# names


@pytest.mark.parametrize("name", [b"a b", b"it's", b'"q"', b"new\nline", b"a;b", b"\xff\xfe", b"[x]", b"*", b"\\x00"])
def test_names_of_any_bytes_are_taken(world: World, name: bytes) -> None:
    path = world.file(f"/srv/{os.fsdecode(name)}")
    closure = world.resolve(trace(did("read", path)))
    assert path in paths(closure)
    assert path in paths(world.resolve(None, spec(include=(path,))))


def test_special_files_are_reported_and_never_copied(world: World) -> None:
    world.directory("/srv")
    os.mkfifo(world.outer("/srv/pipe"))
    closure = world.resolve(trace(did("read", "/srv/pipe")))
    assert ("special-file", "/srv/pipe") in advice(closure)
    assert "/srv/pipe" not in paths(closure)
