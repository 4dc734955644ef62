from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from little_world import PROGRAM, World, advice, did, entry, paths, reasons, spec, trace

from stockade.errors import ElfError, ResolveError
from stockade.records.closure import Evidence
from stockade.records.spec import Account, Files, Service
from stockade.resolve import resolve

Compile = Callable[..., Path]


def command(*words: str, **environment: str) -> Service:
    return Service(command=words, environment=environment)


# without a trace


def test_a_program_of_the_host_is_resolved_without_running_it() -> None:
    closure = resolve(None, spec(service=command("sshd", "-D")))
    found = paths(closure)
    assert {"/usr/sbin/sshd", "/lib64", "/usr/lib/x86_64-linux-gnu/libc.so.6", "/etc/pam.d/sshd"} <= found
    assert entry(closure, "/usr/sbin/sshd").evidence == (Evidence(kind="spec", detail="the command"),)
    linker = os.path.realpath("/lib64/ld-linux-x86-64.so.2")
    assert Evidence(kind="interpreter", detail="PT_INTERP", because="/usr/sbin/sshd") in entry(closure, linker).evidence


def test_two_resolutions_are_equal() -> None:
    given = spec(service=command("sshd"), timezone=True)
    assert resolve(None, given) == resolve(None, given)


def test_a_jail_of_the_closure_holds_a_program_that_starts(tmp_path: Path) -> None:
    """The closure copied as it is, links as links, makes a root in which the program runs."""
    if os.geteuid() != 0:
        pytest.skip("needs root, for chroot")
    closure = resolve(None, spec(service=command("bash"), files=Files(programs=("ls", "env"))))
    for item in closure.entries:
        place = tmp_path / item.path.lstrip("/")
        if item.type == "directory":
            place.mkdir(exist_ok=True)
        elif item.type == "symlink":
            place.symlink_to(item.target or "")
        else:
            place.write_bytes(Path(item.source or "").read_bytes())
            place.chmod(item.mode)
    done = subprocess.run(
        ["chroot", tmp_path, "bash", "-c", "ls / && env"], capture_output=True, text=True, timeout=30,
        env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert "usr" in done.stdout.split()


def test_a_script_brings_its_interpreter_with_libraries(tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text("#!/usr/bin/env bash\n")
    script.chmod(0o755)
    found = paths(resolve(None, spec(service=command(str(script)))))
    assert {"/usr/bin/env", "/usr/bin/bash", os.path.realpath("/lib/x86_64-linux-gnu/libtinfo.so.6")} <= found


def test_ld_library_path_of_the_service_is_obeyed(compile: Compile, tmp_path: Path) -> None:
    library = compile("odd/liba.so", "-Wl,-soname,liba.so")
    program = compile("program", needs=(library,), main=True)
    with pytest.raises(ResolveError) as caught:
        resolve(None, spec(service=command(str(program))))
    assert caught.value.message == f"cannot run `{program}`: `{program}` needs `liba.so`: not found"
    assert "/usr/lib/x86_64-linux-gnu" in (caught.value.hint or "")
    closure = resolve(None, spec(service=command(str(program), LD_LIBRARY_PATH=str(library.parent))))
    assert str(library) in paths(closure)


def test_libraries_named_by_a_dlopen_note_come_in(compile: Compile, tmp_path: Path) -> None:
    """The note is made by the assembler, as systemd's macro makes it."""
    compile("libwanted.so", "-Wl,-soname,libwanted.so")
    wish = {"soname": ["libnone.so", "libwanted.so"], "feature": "wish", "priority": "recommended"}
    text = json.dumps([wish]).replace('"', '\\"')
    note = tmp_path / "note.s"
    note.write_text(
        '.section .note.dlopen,"a",%note\n.balign 4\n.long 1f-0f\n.long 3f-2f\n.long 0x407c0c0a\n'
        f'0: .asciz "FDO"\n1: .balign 4\n2: .asciz "{text}"\n3: .balign 4\n'
    )
    subprocess.run(["gcc", "-c", note, "-o", tmp_path / "note.o"], check=True, timeout=60)
    program = compile("program", f"-Wl,--enable-new-dtags,-rpath,{tmp_path}", needs=(tmp_path / "note.o",), main=True)
    closure = resolve(None, spec(service=command(str(program))))
    [evidence] = entry(closure, str(tmp_path / "libwanted.so")).evidence
    assert evidence == Evidence(kind="dlopen", detail="wish", because=str(program))


# what the spec names and is wrong


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/usr/bin/none", "the command `/usr/bin/none` does not exist"),
        ("/usr/bin", "the command `/usr/bin` is a directory"),
        ("/etc/plain", "the command `/etc/plain` is not executable"),
        ("/etc/loop", "the command `/etc/loop` is a loop of symlinks"),
        ("none", "the command `none` is on no directory of PATH"),
    ],
)
def test_a_command_that_cannot_run_is_one_clear_error_with_a_hint(world: World, name: str, message: str) -> None:
    world.file("/etc/plain")
    world.link("/etc/loop", "loop")
    with pytest.raises(ResolveError) as caught:
        world.resolve(None, spec(service=command(name)))
    assert caught.value.message == message
    assert caught.value.hint


def test_a_missing_program_of_the_spec_is_one_clear_error(world: World) -> None:
    with pytest.raises(ResolveError) as caught:
        world.resolve(None, spec(files=Files(programs=("frobnicate",))))
    assert caught.value.message == "the program `frobnicate` is on no directory of PATH"


def test_a_script_whose_interpreter_is_missing_is_one_clear_error(world: World) -> None:
    world.file("/usr/bin/tool", "#!/opt/none\n", mode=0o755)
    with pytest.raises(ResolveError) as caught:
        world.resolve(None, spec(service=command("/usr/bin/tool")))
    assert caught.value.message == "cannot run `/usr/bin/tool`: its interpreter `/opt/none` is missing"


def test_a_damaged_program_is_one_clear_error(world: World) -> None:
    world.file("/usr/bin/tool", b"\x7fELF\x02\x01\x01", mode=0o755)
    with pytest.raises(ElfError):
        world.resolve(None, spec(service=command("/usr/bin/tool")))


def test_a_missing_include_is_one_clear_error_and_an_empty_glob_is_none(world: World) -> None:
    with pytest.raises(ResolveError) as caught:
        world.resolve(None, spec(include=("/srv/none",)))
    assert caught.value.message == "`/srv/none` in `files.include` does not exist"
    assert "/srv" not in paths(world.resolve(None, spec(include=("/srv/*.none",))))


# what the spec names


def test_a_tree_comes_whole_with_what_its_links_lead_to(world: World) -> None:
    world.files("/srv/www/a/b/index.html", "/srv/www/.hidden", "/opt/shared/logo")
    world.link("/srv/www/logo", "/opt/shared/logo")
    world.link("/srv/www/up", "..")
    closure = world.resolve(None, spec(include=("/srv/www",)))
    wanted = {"/srv/www/a/b/index.html", "/srv/www/.hidden", "/srv/www/logo", "/srv/www/up", "/opt/shared/logo"}
    assert wanted <= paths(closure)
    detail = "`files.include` has /srv/www"
    assert Evidence(kind="spec", detail=detail) in entry(closure, "/srv/www/.hidden").evidence


def test_a_glob_takes_what_matches(world: World) -> None:
    world.files("/srv/a.conf", "/srv/b.txt", "/srv/deep/c.conf")
    found = paths(world.resolve(None, spec(include=("/srv/*.conf",))))
    assert {name for name in found if name.startswith("/srv/")} == {"/srv/a.conf"}
    found = paths(world.resolve(None, spec(include=("/srv/**/*.conf",))))
    assert {"/srv/a.conf", "/srv/deep/c.conf"} <= found
    assert "/srv/b.txt" not in found


@pytest.mark.parametrize("pattern", ["/srv/app/a.conf", "/srv/app", "/srv/*/a.*", "/srv/**/a.conf"])
def test_exclude_wins_over_evidence_and_over_include(world: World, pattern: str) -> None:
    world.file("/srv/app/a.conf")
    closure = world.resolve(
        trace(did("read", "/srv/app/a.conf")), spec(include=("/srv/app/a.conf",), exclude=(pattern,))
    )
    assert "/srv/app/a.conf" not in paths(closure)
    assert reasons(closure) == {"/srv/app/a.conf": "left out: excluded by the spec"}


def test_excluding_a_link_excludes_what_it_leads_to(world: World) -> None:
    world.file("/opt/a")
    world.link("/srv/a", "/opt/a")
    assert not {"/srv/a", "/opt/a"} & paths(world.resolve(trace(did("read", "/srv/a")), spec(exclude=("/srv/a",))))


def test_links_of_the_spec_are_made_whatever_the_host_has(world: World) -> None:
    world.file("/bin/busybox", mode=0o755)
    world.file("/bin/sh", "another", mode=0o755)
    closure = world.resolve(None, spec(files=Files(links={"/bin/sh": "busybox"})))
    found = entry(closure, "/bin/sh")
    assert (found.type, found.target, found.source) == ("symlink", "busybox", None)


def test_the_shell_of_an_account_comes_in(world: World) -> None:
    world.file("/bin/shell", mode=0o755)
    closure = world.resolve(None, spec(accounts=(Account(name="alice", shell="/bin/shell"),)))
    assert entry(closure, "/bin/shell").evidence == (Evidence(kind="account", detail="the shell of `alice`"),)


def test_an_included_file_that_is_damaged_elf_is_copied_and_reported(world: World) -> None:
    world.file("/srv/odd", b"\x7fELF\x02\x01\x01")
    closure = world.resolve(None, spec(include=("/srv/odd",)))
    assert "/srv/odd" in paths(closure)
    assert ("damaged-elf", "/srv/odd") in advice(closure)


def test_a_named_file_below_run_comes_in(world: World) -> None:
    world.file("/run/app/state")
    assert "/run/app/state" in paths(world.resolve(None, spec(include=("/run/app/state",))))


def test_absolute_links_of_another_root_stay_in_it(world: World) -> None:
    world.file("/usr/lib/thing")
    world.link("/etc/thing", "/usr/lib/thing")
    world.link("/etc/escape", "../../../../../../../../etc/hostname")
    closure = world.resolve(trace(did("read", "/etc/thing"), did("read", "/etc/escape", "ENOENT")))
    assert entry(closure, "/usr/lib/thing").source == str(world.outer("/usr/lib/thing"))
    assert "/etc/hostname" not in paths(closure)


def test_arguments_that_are_files_come_in_when_nothing_was_observed(world: World) -> None:
    world.file("/etc/app.conf")
    given = spec(service=command(PROGRAM, "-c", "/etc/app.conf"))
    assert "/etc/app.conf" in paths(world.resolve(None, given))
    assert "/etc/app.conf" not in paths(world.resolve(trace(), given))
