"""What a spec generates counts as the jail's own files do; records of the host's never come in."""

from __future__ import annotations

import os

import pytest
from little_world import World, did, entry, paths, spec, trace, work

from stockade.errors import ResolveError
from stockade.records.spec import Directory, Files, Service
from stockade.resolve import gaps, resolve

MULTIARCH = "/usr/lib/x86_64-linux-gnu"
TRUE = Service(command=("/bin/true",))


def test_an_nsswitch_of_the_spec_decides_which_modules_come_in() -> None:
    read = trace(did("read", "/etc/nsswitch.conf"))
    given = Files(content={"/etc/nsswitch.conf": "passwd: files compat\n"})
    closure = resolve(read, spec(service=TRUE, files=given))
    modules = {os.path.basename(path) for path in paths(closure) if "/libnss_" in path}
    assert modules == {"libnss_compat.so.2"}


def test_a_pam_stack_of_the_spec_decides_which_modules_come_in() -> None:
    read = trace(did("read", "/etc/pam.d/sshd"), did("read", "/etc/pam.d/other"))
    content = {"/etc/pam.d/sshd": "auth required pam_time.so\n", "/etc/pam.d/other": "auth required pam_deny.so\n"}
    closure = resolve(read, spec(service=TRUE, files=Files(content=content)))
    modules = {os.path.basename(path) for path in paths(closure) if path.startswith(f"{MULTIARCH}/security/")}
    assert modules == {"pam_time.so", "pam_deny.so"}
    assert "/etc/security/time.conf" in paths(closure)
    assert "/etc/pam.d/common-auth" not in paths(closure)


def test_a_library_of_pam_without_its_use_brings_no_stack() -> None:
    login = Service(command=("/usr/bin/login",))
    assert not any(path.startswith("/etc/pam.d/") for path in paths(resolve(trace(), spec(service=login))))
    assert "/etc/pam.d/login" in paths(resolve(None, spec(service=login)))


@pytest.mark.parametrize(
    ("line", "programs"),
    [("#!/bin/sh", {"/usr/bin/dash"}), ("#! /usr/bin/env bash", {"/usr/bin/env", "/usr/bin/bash"})],
)
def test_a_generated_script_brings_its_interpreter(line: str, programs: set[str]) -> None:
    given = Files(content={"/usr/lib/cgi-bin/hello": f"{line}\necho hello\n"})
    closure = resolve(trace(), spec(service=TRUE, files=given))
    assert programs <= paths(closure)
    (program, *_) = programs
    assert {found.because for found in entry(closure, program).evidence} == {"/usr/lib/cgi-bin/hello"}


def test_a_generated_script_without_its_interpreter_is_one_clear_error(world: World) -> None:
    world.file("/usr/bin/service", mode=0o755)
    with pytest.raises(ResolveError) as caught:
        world.resolve(None, spec(files=Files(content={"/srv/hello": "#!/opt/none\n"})))
    assert caught.value.message == "the interpreter `/opt/none` does not exist"


def test_records_of_logins_never_come_in(world: World) -> None:
    """wtmp(5) and lastlog are written where they are there, and never made: their absence is no need."""
    world.file("/var/log/wtmp", "who was here, and when")
    wrote = trace(did("write", "/var/log/wtmp"))
    failed = trace(did("write", "/var/log/wtmp", "ENOENT"), where="inside")
    fixed = spec(directories={"/var/log": Directory(kind="fixed")})
    for given, directories in ((spec(), {"/var/log"}), (fixed, set())):
        closure = world.resolve(wrote, given)
        assert set(work(closure.state)) == directories
        assert gaps(wrote, failed, closure, root=str(world.root)) == ()
        again = world.resolve(trace(), given, gaps=gaps(trace(), failed, world.resolve(trace()), root=str(world.root)))
        assert "/var/log/wtmp" not in paths(again)
