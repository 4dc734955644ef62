from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import threading
from pathlib import Path

import msgspec
import pytest
from samples import Collector, closure_of_tree, no_package, spec

from stockade.build.generations import Store
from stockade.build.making import build, from_lock
from stockade.build.secrets import ensure
from stockade.build.verify import Difference, verify
from stockade.errors import BuildError, ServiceError, SpecError
from stockade.records.closure import Closure, Evidence
from stockade.records.generation import Generation
from stockade.records.lock import Lock
from stockade.records.spec import Account, Files, Mount, Policy, Secret, Spec
from stockade.records.text import escape

pytestmark = pytest.mark.usefixtures("home", "as_root")

HOSTILE = ["a space", "new\nline", "quote'\"", "semi;colon", "back\\slash", "bad\udcff\udc80byte", "-rf", "$(id)", "*"]


def made(closure: Closure, wanted: Spec | None = None, **given: object) -> Generation:
    wanted = wanted or spec()
    store = Store(wanted.name)
    secrets = ensure(wanted, store.secrets)
    fields: dict[str, object] = {"package_of": no_package, **given}
    return build(closure, wanted, store=store, secrets=secrets, **fields)  # type: ignore[arg-type]


def lock_bytes(generation: Generation) -> bytes:
    return (generation.path / "lock.json").read_bytes()


@pytest.fixture
def programs() -> Closure:
    collector = Collector()
    for program in ("/bin/bash", "/bin/ls", "/usr/bin/id", "/bin/true"):
        collector.add_program(program)
    return collector.closure()


def test_programs_run_in_the_new_root(programs: Closure) -> None:
    wanted = spec(accounts=(Account(name="guest", uid=2000),))
    rootfs = made(programs, wanted).rootfs
    done = subprocess.run(
        ["/usr/sbin/chroot", "--userspec=2000:2000", rootfs, "/bin/bash", "-c", "id -un; ls /"],
        env={"PATH": "/bin"}, capture_output=True, text=True, timeout=20, check=True,
    )  # fmt: skip
    assert done.stdout.split("\n")[0] == "guest"
    assert "usr" in done.stdout


def test_two_builds_give_the_same_lock_to_the_bit(programs: Closure) -> None:
    wanted = spec(
        files=Files(content={"/etc/p": "${secret:p}"}),
        accounts=(Account(name="guest", password="p"),),
        secrets={"p": Secret(kind="password"), "k": Secret(kind="ssh-key", path="/etc/k")},
    )
    first = made(programs, wanted)
    second = made(msgspec.structs.replace(programs, entries=programs.entries[::-1]), wanted)
    assert first.number != second.number
    assert lock_bytes(first) == lock_bytes(second)
    Store("sample").remove()
    elsewhere = made(programs, wanted)
    assert lock_bytes(elsewhere) == lock_bytes(first)
    lock = json.loads(lock_bytes(elsewhere))
    secret = [entry for entry in lock["entries"] if entry.get("secret")]
    assert {entry["path"] for entry in secret} == {"/etc/p", "/etc/k", "/etc/k.pub", "/etc/shadow"}
    assert not any("sha256" in entry or "size" in entry for entry in secret)


def test_every_entry_of_the_lock_has_evidence(programs: Closure) -> None:
    lock = made(programs).lock
    assert len(lock.entries) > 20
    assert [entry.path for entry in lock.entries if not entry.evidence] == []


def test_a_fresh_build_verifies(programs: Closure) -> None:
    generation = made(programs)
    assert verify(generation.rootfs, generation.lock) == ()


def test_verify_names_each_thing_that_was_tampered_with(programs: Closure) -> None:
    generation = made(programs)
    root = generation.rootfs
    (root / "usr/bin/id").chmod(0o755)
    with open(root / "usr/bin/true", "r+b") as file:
        file.seek(100)
        file.write(b"evil")
    os.chown(root / "etc/passwd", 12, 34)
    (root / "etc/extra").write_text("x")
    (root / "etc/group").unlink()
    (root / "bin").unlink()
    (root / "bin").symlink_to("/tmp")
    (root / "etc/ld.so.cache").unlink()
    (root / "etc/ld.so.cache").mkdir()
    os.mkfifo(root / "etc/fifo")
    found = {(difference.kind, difference.path) for difference in verify(root, generation.lock)}
    assert found == {
        ("mode", "/usr/bin/id"),
        ("digest", "/usr/bin/true"),
        ("owner", "/etc/passwd"),
        ("extra", "/etc/extra"),
        ("extra", "/etc/fifo"),
        ("missing", "/etc/group"),
        ("target", "/bin"),
        ("type", "/etc/ld.so.cache"),
    }


def test_verify_says_what_was_expected_and_what_is_there(programs: Closure) -> None:
    generation = made(programs)
    (generation.rootfs / "usr/bin/id").chmod(0o4755)
    assert verify(generation.rootfs, generation.lock) == (
        Difference(path="/usr/bin/id", kind="mode", expected="0555", found="4755"),
    )


def test_names_of_any_bytes_survive(tmp_path: Path) -> None:
    source = tmp_path / "source/data"
    source.mkdir(parents=True)
    for name in HOSTILE:
        (source / name).write_text(name, errors="surrogateescape")
        (source / f"{name}.d").mkdir()
        (source / f"{name}.link").symlink_to(name)
    generation = made(closure_of_tree(tmp_path / "source"))
    for name in HOSTILE:
        assert (generation.rootfs / "data" / name).read_text(errors="surrogateescape") == name
        assert os.readlink(generation.rootfs / "data" / f"{name}.link") == name
    assert verify(generation.rootfs, generation.lock) == ()
    paths = {entry.path for entry in generation.lock.entries}
    assert {escape(f"/data/{name}") for name in HOSTILE} <= paths
    assert verify(generation.rootfs, Store("sample").generation(generation.number).lock) == ()


def test_setuid_and_file_capabilities_are_stripped(tmp_path: Path) -> None:
    source = tmp_path / "source/bin"
    source.mkdir(parents=True)
    for name in ("suid", "caps"):
        shutil.copy("/bin/true", source / name)
        os.chmod(source / name, 0o4755 if name == "suid" else 0o755)
    # struct vfs_cap_data, revision 2, cap_net_raw permitted and effective (include/uapi/linux/capability.h)
    os.setxattr(source / "caps", "security.capability", bytes.fromhex("0100000200200000000000000000000000000000"))
    closure = closure_of_tree(tmp_path / "source")
    stripped = made(closure).rootfs / "bin"
    assert stripped.joinpath("suid").stat().st_mode & 0o7777 == 0o555
    assert "security.capability" not in os.listxattr(stripped / "caps")


def test_file_capabilities_stay_where_the_spec_says_so(tmp_path: Path) -> None:
    program = tmp_path / "caps"
    shutil.copy("/bin/true", program)
    os.setxattr(program, "security.capability", bytes.fromhex("0100000200200000000000000000000000000000"))
    collector = Collector()
    collector.add(str(program))
    generation = made(collector.closure(), spec(files=Files(setuid=(str(program),))))
    place = Path(f"{generation.rootfs}{program}")
    assert os.getxattr(place, "security.capability") == os.getxattr(program, "security.capability")
    os.removexattr(place, "security.capability")
    assert [difference.kind for difference in verify(generation.rootfs, generation.lock)] == ["capabilities"]


def test_nothing_is_linked_to_the_host_or_writable_by_others(programs: Closure) -> None:
    rootfs = made(programs).rootfs
    for above, directories, files in os.walk(rootfs):
        for name in (*directories, *files):
            status = os.lstat(f"{above}/{name}")
            if not os.path.islink(f"{above}/{name}"):
                assert status.st_mode & 0o7022 == 0, name
                assert (status.st_uid, status.st_gid) == (0, 0)
            if name in files:
                assert status.st_nlink == 1


def test_links_that_point_out_stay_inside(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "etc").mkdir(parents=True)
    (source / "etc/real").write_text("inside")
    (source / "etc/climb").symlink_to("../../../../../../etc/real")
    (source / "etc/host").symlink_to("/etc/shadow-that-is-not-in-the-jail")
    (source / "abs").symlink_to("/etc")
    wanted = spec(files=Files(content={"/abs/new": "x", "/abs/../../../../etc/other": "y"}))
    generation = made(closure_of_tree(source), wanted)
    assert (generation.rootfs / "etc/new").read_text() == "x"
    assert (generation.rootfs / "etc/other").read_text() == "y"
    assert generation.unresolved == ("/etc/host",)


def library(path: Path, *arguments: str) -> None:
    """Compile a shared library."""
    subprocess.run(["cc", "-shared", "-fPIC", "-x", "c", *arguments, "-o", path], timeout=60, check=True)


def beside_a_program(tree: Path) -> Closure:
    """What a dynamic program needs, and `tree`."""
    collector = Collector()
    collector.add_program("/bin/true")
    entries = (*collector.closure().entries, *closure_of_tree(tree).entries)
    return Closure(entries=tuple({entry.path: entry for entry in entries}.values()))


def listed(cache: Path) -> dict[str, str]:
    """Where ld.so finds each library by a cache, as ldconfig prints it."""
    command = ["ldconfig", "-p", "-C", cache]
    text = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    found: dict[str, str] = {}
    for name, path in re.findall(r"^\t(\S+) \([^)]*\) => (.+)$", text, re.MULTILINE):
        found.setdefault(name, path)
    return found


def test_the_loaders_cache_is_what_ldconfig_makes_of_the_root(programs: Closure, tmp_path: Path) -> None:
    rootfs = made(programs).rootfs
    theirs = tmp_path / "theirs"
    command = ["ldconfig", "-X", "-i", "-r", rootfs, "-C", "/theirs", "-f", "/etc/ld.so.conf"]
    subprocess.run(command, timeout=20, check=True)
    (rootfs / "theirs").rename(theirs)
    wanted = listed(theirs)
    ours = listed(rootfs / "etc/ld.so.cache")
    assert "libc.so.6" in wanted
    assert {name: ours.get(name) for name in wanted} == wanted
    assert all((rootfs / path.lstrip("/")).exists() for path in ours.values())


def test_directories_of_the_specs_own_loader_configuration_are_indexed(tmp_path: Path) -> None:
    for directory, name in (("opt/a", "libone.so.1"), ("opt/b", "libtwo.so.2"), ("opt/c", "libthree.so.3")):
        place = tmp_path / "source" / directory
        place.mkdir(parents=True)
        library(place / f"{name}.0", f"-Wl,-soname,{name}", "-nostdlib", "/dev/null")
        (place / name).symlink_to(f"{name}.0")
    content = {
        "/etc/ld.so.conf": "include ld.so.conf.d/*.conf\n/opt/b\n", "/etc/ld.so.conf.d/own.conf": "/opt/a # one\n",
    }  # fmt: skip
    rootfs = made(beside_a_program(tmp_path / "source"), spec(files=Files(content=content))).rootfs
    found = listed(rootfs / "etc/ld.so.cache")
    assert found["libone.so.1"] == "/opt/a/libone.so.1"
    assert found["libtwo.so.2"] == "/opt/b/libtwo.so.2"
    assert "libthree.so.3" not in found


def test_a_library_for_better_processors_is_indexed_as_such(tmp_path: Path) -> None:
    place = tmp_path / "source/usr/local/lib"
    (place / "glibc-hwcaps/x86-64-v2").mkdir(parents=True)
    (tmp_path / "f.c").write_text("int f(void) { return ANSWER; }\n")
    (tmp_path / "main.c").write_text("int f(void); int main(void) { return f(); }\n")
    for answer, directory in ((7, place), (42, place / "glibc-hwcaps/x86-64-v2")):
        library(directory / "libf.so.1", f"-DANSWER={answer}", "-Wl,-soname,libf.so.1", str(tmp_path / "f.c"))
    command = ["cc", "-o", tmp_path / "source/prog", "main.c", place / "libf.so.1"]
    subprocess.run(command, cwd=tmp_path, timeout=60, check=True)
    rootfs = made(beside_a_program(tmp_path / "source")).rootfs
    fits = "x86-64-v2 (supported" in subprocess.run(
        ["/lib64/ld-linux-x86-64.so.2", "--help"], capture_output=True, text=True, timeout=20, check=False
    ).stdout
    assert subprocess.run(["chroot", rootfs, "/prog"], timeout=20, check=False).returncode == (42 if fits else 7)


def test_one_processor_and_many_make_the_same_root(programs: Closure, monkeypatch: pytest.MonkeyPatch) -> None:
    generations = []
    for processors in (1, 8):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid, count=processors: set(range(count)))
        generations.append(made(programs))
        assert verify(generations[-1].rootfs, generations[-1].lock) == ()
    assert lock_bytes(generations[0]) == lock_bytes(generations[1])


def test_a_file_that_cannot_be_copied_ends_the_work_of_all_processors(
    programs: Closure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    gone = msgspec.structs.replace(programs.entries[-1], path="/gone", source=str(tmp_path / "gone"), type="file")
    with pytest.raises(BuildError, match="cannot copy .*/gone to /gone.*No such file"):
        made(msgspec.structs.replace(programs, entries=(*programs.entries, gone)))
    assert threading.active_count() == 1
    assert os.listdir(Store("sample").directory / "generations") == []


def test_a_library_in_a_directory_of_its_own_is_found_through_the_cache(tmp_path: Path) -> None:
    (tmp_path / "f.c").write_text("int f(void) { return 42; }\n")
    (tmp_path / "main.c").write_text("int f(void); int main(void) { return f(); }\n")
    private = Path("/usr/local/lib")
    library = tmp_path / "source/usr/local/lib/libstockadetest.so.1"
    library.parent.mkdir(parents=True)
    program = tmp_path / "source/prog"
    for command in (
        ["cc", "-shared", "-fPIC", "-Wl,-soname,libstockadetest.so.1", "-o", library, "f.c"],
        ["cc", "-o", program, "main.c", library],
    ):
        subprocess.run(command, cwd=tmp_path, timeout=60, check=True)
    collector = Collector()
    collector.add_program("/bin/true")
    own = closure_of_tree(tmp_path / "source")
    closure = Closure(entries=(*collector.closure().entries, *(entry for entry in own.entries if entry.type == "file")))
    rootfs = made(closure).rootfs
    assert f"{private}\n" in (rootfs / "etc/ld.so.conf").read_text()
    assert subprocess.run(["chroot", rootfs, "/prog"], timeout=20, check=False).returncode == 42


def test_a_root_without_dynamic_programs_has_no_cache(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source/data").write_text("x")
    rootfs = made(closure_of_tree(tmp_path / "source")).rootfs
    assert sorted(path.name for path in (rootfs / "etc").iterdir()) == ["group", "passwd", "shadow"]


def test_times_of_files_are_kept_to_the_second(programs: Closure) -> None:
    rootfs = made(programs).rootfs
    assert (rootfs / "usr/bin/id").stat().st_mtime == int(os.stat("/usr/bin/id").st_mtime)
    assert (rootfs / "usr/bin").stat().st_mtime == 0


def test_a_lock_made_elsewhere_gives_the_same_root(programs: Closure) -> None:
    wanted = spec(files=Files(content={"/etc/x": "x"}), accounts=(Account(name="guest"),))
    first = made(programs, wanted)
    lock = Store("sample").generation(first.number).lock
    again = from_lock(lock, wanted, store=Store("sample"), secrets={}, package_of=no_package)
    assert lock_bytes(again) == lock_bytes(first)


def test_a_lock_that_this_host_cannot_fulfil_names_the_packages(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "a").write_text("one")
    (source / "b").write_text("two")
    versions = {str(source / "a"): ("pkg", "1.0"), str(source / "b"): ("pkg", "1.0")}
    first = made(closure_of_tree(source), package_of=versions.get)
    (source / "a").write_text("another")
    versions[str(source / "a")] = ("pkg", "2.0")
    store = Store("sample")
    with pytest.raises(BuildError) as caught:
        from_lock(first.lock, spec(), store=store, secrets={}, package_of=versions.get)
    assert caught.value.message == "1 files of the lock differ on this host: `/a` (pkg 1.0; here pkg 2.0)"
    (source / "b").unlink()
    del versions[str(source / "b")]
    with pytest.raises(BuildError) as caught:
        from_lock(first.lock, spec(), store=store, secrets={}, package_of=versions.get)
    assert caught.value.message == "1 files of the lock are missing on this host: `/b` (pkg 1.0; here no package)"
    assert store.generations() == (1,)


def test_the_generation_keeps_spec_trace_and_what_finish_adds(programs: Closure) -> None:
    seen: list[set[str]] = []

    def finish(path: Path, _lock: object) -> None:
        seen.append(set(os.listdir(path)))
        (path / "plan").write_bytes(b"compiled")

    generation = made(programs, spec(description="d"), trace_json=b"{}", finish=finish)
    assert seen == [{"rootfs", "lock.json", "spec.json", "trace.json", "in-use"}]
    assert (generation.path / "plan").read_bytes() == b"compiled"
    assert (generation.path / "trace.json").read_bytes() == b"{}"
    kept = msgspec.json.decode((generation.path / "spec.json").read_bytes(), type=Spec)
    assert kept == spec(description="d")
    assert b'"stop_timeout_s": 10.0' in (generation.path / "spec.json").read_bytes()


def test_what_finish_raises_discards_the_generation(programs: Closure) -> None:
    made(programs)

    def finish(_path: Path, _lock: Lock) -> None:
        raise ServiceError("does not work inside")

    with pytest.raises(ServiceError):
        made(programs, finish=finish)
    assert os.listdir(Store("sample").directory / "generations") == ["0001"]


def test_found_capabilities_stand_in_the_lock_unless_the_spec_names_its_own(programs: Closure) -> None:
    found = made(programs, capabilities=("setuid", "chown")).lock.capabilities
    named = made(programs, spec(policy=Policy(capabilities=("kill",))), capabilities=("setuid",)).lock.capabilities
    assert (found, named) == (("chown", "setuid"), ("kill",))


def test_a_file_that_is_gone_is_named_with_a_hint(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source/gone").write_text("x")
    closure = closure_of_tree(tmp_path / "source")
    (tmp_path / "source/gone").unlink()
    with pytest.raises(BuildError) as caught:
        made(closure)
    assert caught.value.message.startswith(f"cannot copy {tmp_path}/source/gone to /gone")
    assert caught.value.message.endswith("No such file or directory")
    assert caught.value.hint == "the host changed since it was observed: build again"
    assert os.listdir(Store("sample").directory / "generations") == []


def test_a_mount_of_nothing_is_refused() -> None:
    with pytest.raises(SpecError, match=r"`/no/such/dir` in `\[\[mounts\]\]` does not exist on this host"):
        made(Closure(), spec(mounts=(Mount(source="/no/such/dir", target="/x"),)))


def test_a_device_that_the_host_lacks_is_refused_with_the_nearest() -> None:
    with pytest.raises(SpecError) as caught:
        made(Closure(), spec(policy=Policy(devices=("null", "urandon"))))
    assert caught.value.message == "device `urandon` in `[policy]` is not in /dev of this host"
    assert caught.value.hint == "did you mean `urandom`?"


def test_a_damaged_library_is_no_traceback(tmp_path: Path) -> None:
    library = tmp_path / "source/usr/local/lib/libbroken.so.1"
    library.parent.mkdir(parents=True)
    library.write_bytes(Path("/lib/x86_64-linux-gnu/libc.so.6").read_bytes()[:900] + b"\xff" * 5000)
    generation = made(beside_a_program(tmp_path / "source"))
    assert subprocess.run(["chroot", generation.rootfs, "/bin/true"], timeout=20, check=False).returncode == 0


def test_evidence_of_a_replaced_file_is_kept() -> None:
    collector = Collector()
    collector.add("/etc/passwd")
    lock = made(collector.closure()).lock
    evidence = next(entry.evidence for entry in lock.entries if entry.path == "/etc/passwd")
    assert evidence == (Evidence(kind="access"), Evidence(kind="generated", detail="accounts in use"))
