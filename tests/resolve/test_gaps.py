from __future__ import annotations

import pytest
from little_world import World, did, entry, paths, spec, trace, work

from stockade.records.closure import Closure, Gap
from stockade.records.spec import Directory, Service, Spec
from stockade.records.trace import Access, Trace
from stockade.resolve import gaps, resolve


def inside(*accesses: Access) -> Trace:
    return trace(*accesses, where="inside")


def found(world: World, outer: Trace, inner: Trace, given: Spec | None = None) -> list[tuple[str, str]]:
    closure = world.resolve(outer, given)
    return [(gap.path, gap.reason) for gap in gaps(outer, inner, closure, root=str(world.root))]


def test_what_failed_inside_and_succeeded_outside_is_a_gap(world: World) -> None:
    """Outside it was read below a name that the rules did not follow; inside it is missing."""
    world.file("/srv/data")
    outer = trace(did("read", "/srv/data"))
    bare = Closure()
    assert gaps(outer, inside(did("read", "/srv/data", "ENOENT")), bare, root=str(world.root)) == (
        Gap(path="/srv/data", operation="read", error="ENOENT", reason="succeeded outside"),
    )


@pytest.mark.parametrize("error", ["ENOENT", "ENOTDIR", "EACCES"])
def test_what_failed_inside_and_exists_on_the_host_is_a_gap(world: World, error: str) -> None:
    world.file("/usr/lib/py/module.py")
    inner = inside(did("read", "/usr/lib/py/module.py", error))
    assert found(world, trace(), inner) == [("/usr/lib/py/module.py", "exists on the host")]


def test_what_failed_outside_too_or_is_nowhere_is_no_gap(world: World) -> None:
    world.file("/etc/refused")
    outer = trace(did("read", "/etc/refused", "EACCES"))
    inner = inside(did("read", "/etc/refused", "EACCES"), did("read", "/etc/none", "ENOENT"))
    assert found(world, outer, inner) == []


def test_other_errors_and_successes_are_no_gaps(world: World) -> None:
    world.file("/etc/x")
    inner = inside(did("read", "/etc/x", "EINTR"), did("read", "/etc/x"), did("unlink", "/etc/x", "ENOENT"))
    assert found(world, trace(), inner) == []


def test_kernel_trees_and_sockets_of_others_are_no_gaps(world: World) -> None:
    world.files("/proc/meminfo", "/sys/x", "/run/other/sock")
    inner = inside(
        did("read", "/proc/meminfo", "ENOENT"), did("read", "/sys/x", "ENOENT"),
        did("connect", "/run/other/sock", "ENOENT"), did("read", "/run/other/sock", "ENOENT"),
    )  # fmt: skip
    assert found(world, trace(did("connect", "/run/other/sock")), inner) == []


def test_what_is_left_out_is_no_gap(world: World) -> None:
    world.files("/etc/ssh/ssh_host_rsa_key", "/usr/share/doc/x/README", "/etc/passwd", "/srv/out/file")
    outer = trace(did("read", "/srv/out/file"), did("read", "/etc/passwd"))
    inner = inside(*(did("read", path, "ENOENT") for path in (
        "/etc/ssh/ssh_host_rsa_key", "/usr/share/doc/x/README", "/etc/passwd", "/srv/out/file")))  # fmt: skip
    assert found(world, outer, inner, spec(exclude=("/srv/out",))) == []


def test_a_write_refused_inside_is_a_gap_for_its_directory(world: World) -> None:
    world.directory("/var/lib/app")
    outer = trace(did("create", "/var/lib/app/x"))
    inner = inside(did("create", "/var/lib/app/x", "EROFS"))
    bare = Closure()
    [gap] = gaps(outer, inner, bare, root=str(world.root))
    closure = world.resolve(trace(), gaps=(gap,))
    assert list(work(closure.state)) == ["/var/lib/app"]
    assert closure.state[0].evidence[0].kind == "gap"
    assert gaps(outer, inner, closure, root=str(world.root)) == ()


def test_a_directory_that_is_made_at_the_second_try_is_no_gap_where_that_was_so_outside(world: World) -> None:
    deeds = did("mkdir", "/tmp/a/b", "ENOENT"), did("mkdir", "/tmp/a"), did("mkdir", "/tmp/a/b")
    assert found(world, trace(*deeds), inside(*deeds)) == []
    assert found(world, trace(*deeds[1:]), inside(*deeds)) == [("/tmp/a/b", "succeeded outside")]


def test_a_missing_device_is_a_gap_once() -> None:
    outer = trace()
    inner = inside(did("read", "/dev/urandom", "ENOENT"), did("read", "/dev/pts/0", "ENOENT"))
    closure = resolve(outer, spec(service=Service(command=("/bin/true",))))
    [gap] = gaps(outer, inner, closure)
    assert gap.path == "/dev/urandom"
    again = resolve(outer, spec(service=Service(command=("/bin/true",))), gaps=(gap,))
    assert again.devices == ("urandom",)
    assert gaps(outer, inner, again) == ()


def test_an_added_gap_has_its_evidence_and_what_it_needs(world: World) -> None:
    world.file("/bin/interpreter", mode=0o755)
    world.file("/usr/bin/helper", "#!/bin/interpreter\n", mode=0o755)
    gap = Gap(path="/usr/bin/helper", operation="exec", error="ENOENT", reason="exists on the host", round=2)
    closure = world.resolve(trace(), gaps=(gap,))
    [evidence] = entry(closure, "/usr/bin/helper").evidence
    assert (evidence.kind, evidence.detail) == ("gap", "round 2: exec failed with ENOENT, exists on the host")
    assert "/bin/interpreter" in paths(closure)


def test_an_added_library_brings_its_own_libraries() -> None:
    gap = Gap(path="/lib/x86_64-linux-gnu/security/pam_unix.so", operation="read", error="ENOENT", reason="x")
    closure = resolve(trace(), spec(service=Service(command=("/bin/true",))), gaps=(gap,))
    assert any(name.startswith("/usr/lib/x86_64-linux-gnu/libcrypt.so.1") for name in paths(closure))


def test_a_missing_directory_brings_those_below_it_that_are_asked_for_next(world: World) -> None:
    world.directory("/usr/local/lib/perl")
    world.directory("/usr/local/share")
    gap = Gap(path="/usr/local", operation="stat", error="ENOENT", reason="exists on the host")
    closure = world.resolve(trace(did("read", "/usr/local/lib/perl/none/x.pm", "ENOENT")), gaps=(gap,))
    assert {"/usr/local", "/usr/local/lib", "/usr/local/lib/perl"} <= paths(closure)
    assert "/usr/local/share" not in paths(closure)


FAILING = [
    did("read", "/srv/key.pem", "ENOENT"),
    did("read", "/srv/excluded/x", "ENOENT"),
    did("read", "/srv/plain", "ENOENT"),
    did("readlink", "/srv/link", "ENOENT"),
    did("read", "/srv/link", "ENOENT"),
    did("stat", "/srv/pipe-like", "ENOENT"),
    did("read", "/root/.profile", "ENOENT"),
    did("exec", "/usr/bin/broken", "ENOENT"),
    did("create", "/etc/app.new", "EROFS"),
    did("create", "/var/lib/given/x", "EACCES"),
    did("create", "/var/lib/app/sub/x", "ENOENT"),
    did("mkdir", "/run/app", "EACCES"),
    did("create", "/tmp/x", "EROFS"),
    did("write", "/var/lib/app/db", "ENOENT"),
    did("bind", "/run/app/deep/sock", "ENOENT"),
    did("read", "/run/app/file", "ENOENT"),
    did("chdir", "/run/app", "ENOENT"),
    did("read", "/var/log/app/log", "ENOENT"),
    did("create", "/var/log/app/log", "ENOENT"),
    did("read", "/srv/loop", "ENOENT"),
    did("read", "/etc/shadow", "EACCES"),
]


def test_rounds_come_to_an_end_whatever_keeps_failing(world: World) -> None:
    """The worst case: everything fails inside in every round, whatever was added."""
    world.file("/srv/key.pem", "-----BEGIN PRIVATE KEY-----\n")
    world.files("/srv/excluded/x", "/srv/plain", "/srv/pipe-like", "/root/.profile", "/var/lib/app/db", "/etc/shadow")
    world.files("/run/app/file", "/var/log/app/log", "/var/lib/given/y", "/var/lib/app/sub/y", "/etc/app", "/tmp/y")
    world.file("/usr/bin/broken", "#!/none\n", mode=0o755)
    world.link("/srv/link", "plain")
    world.link("/srv/loop", "loop")
    world.directory("/run/app/deep")
    given = spec(exclude=("/srv/excluded",), directories={"/var/lib/given": Directory(kind="volume")})
    outer = trace(*(did(access.operation, access.path) for access in FAILING))
    for start in (trace(), outer):
        known: tuple[Gap, ...] = ()
        for _ in range(4):
            closure = world.resolve(start, given, gaps=known)
            new = gaps(outer, inside(*FAILING), closure, root=str(world.root))
            if not new:
                break
            assert not set(new) & set(known), "a gap came back after it had been dealt with"
            known += new
        assert new == ()
        assert "/srv/plain" in paths(closure)
        assert "/srv/excluded/x" not in paths(closure)
