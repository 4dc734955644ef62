from __future__ import annotations

import pytest
from samples import spec

from stockade.build import accounts
from stockade.build.layout import volume_name
from stockade.build.loader import Library
from stockade.build.operations import CopyFile, MakeDirectory, MakeSymlink, WriteFile
from stockade.build.plan import HostFacts, Plan, plan
from stockade.build.seeds import seeds
from stockade.elf import EM_X86_64
from stockade.elf.cache import FLAGS, Cache
from stockade.errors import BuildError, SpecError
from stockade.records.closure import Closure, Entry, Evidence, WorkDirectory
from stockade.records.spec import Directory, Files, Mount, Spec

HOST = accounts.HostAccounts(
    users=(
        accounts.User(name="root", uid=0, gid=0),
        accounts.User(name="www-data", uid=33, gid=33),
    ),
    groups=(accounts.Group(name="root", gid=0), accounts.Group(name="www-data", gid=33)),
)


def file(path: str, mode: int = 0o644, uid: int = 0, gid: int = 0) -> Entry:
    evidence = (Evidence(kind="access"),)
    return Entry(path=path, type="file", source=path, mode=mode, uid=uid, gid=gid, evidence=evidence)


def directory(path: str, mode: int = 0o755, uid: int = 0, gid: int = 0) -> Entry:
    return Entry(path=path, type="directory", mode=mode, uid=uid, gid=gid)


def link(path: str, target: str) -> Entry:
    return Entry(path=path, type="symlink", target=target)


def planned(closure: Closure, wanted: Spec | None = None, **facts: object) -> Plan:
    wanted = wanted or spec()
    files = accounts.sanitised(wanted, HOST, uids=(33,), gids=(33,), password_hashes={})
    return plan(closure, wanted, seeds(wanted, {}, files), files, host=HostFacts(**facts))  # type: ignore[arg-type]


def by_path(made: Plan) -> dict[str, object]:
    return {operation.path: operation for operation in made.operations}


def test_parents_come_before_what_they_hold() -> None:
    made = planned(Closure(entries=(file("/usr/lib/a/b"), file("/etc/x"), link("/lib", "usr/lib"))))
    seen: set[str] = set()
    for operation in made.operations:
        above = operation.path.rpartition("/")[0] or "/"
        assert operation.path == "/" or above in seen, operation.path
        seen.add(operation.path)


def test_one_file_reached_by_two_names_is_one_file_with_the_evidence_of_both() -> None:
    first = Entry(path="/lib/x", type="file", source="/lib/x", mode=0o644, evidence=(Evidence(kind="needed"),))
    second = Entry(path="/usr/lib/x", type="file", source="/usr/lib/x", mode=0o644, evidence=(Evidence(kind="access"),))
    made = planned(Closure(entries=(first, second, link("/lib", "usr/lib"))))
    copies = [(operation, node) for operation, node in zip(made.operations, made.nodes, strict=True) if node.source]
    assert [operation.path for operation, _ in copies] == ["/usr/lib/x"]
    assert [found.kind for found in copies[0][1].evidence] == ["access", "needed"]


def test_setuid_is_stripped_unless_the_spec_names_the_file() -> None:
    closure = Closure(entries=(file("/usr/bin/su", 0o4755), file("/usr/bin/sg", 0o2755, 0, 33)))
    stripped = by_path(planned(closure))
    kept = by_path(planned(closure, spec(files=Files(setuid=("/usr/bin/su",)))))
    assert [operation.mode for operation in stripped.values() if isinstance(operation, CopyFile)] == [0o555, 0o555]
    assert [operation.mode for operation in kept.values() if isinstance(operation, CopyFile)] == [0o555, 0o4555]


def test_a_mode_with_setuid_needs_the_files_name_in_setuid() -> None:
    with pytest.raises(SpecError, match=r"sets setuid or setgid, which `files.setuid` does not allow"):
        planned(Closure(), spec(files=Files(content={"/x": ""}, modes={"/x": "4755"})))


def test_the_spec_decides_mode_and_owner_of_a_copied_file() -> None:
    wanted = spec(files=Files(modes={"/lib/x": "0640"}, owners={"/usr/lib/x": "root:www-data"}))
    made = by_path(planned(Closure(entries=(file("/usr/lib/x"), link("/lib", "usr/lib"))), wanted))
    assert made["/usr/lib/x"] == CopyFile(path="/usr/lib/x", source="/usr/lib/x", mode=0o640, uid=0, gid=33)


def test_generated_content_replaces_a_copied_file_and_a_link() -> None:
    closure = Closure(entries=(file("/etc/a"), link("/etc/b", "a")))
    made = by_path(planned(closure, spec(files=Files(content={"/etc/a": "1", "/etc/b": "2"}))))
    assert made["/etc/a"] == WriteFile(path="/etc/a", content=b"1", mode=0o444)
    assert made["/etc/b"] == WriteFile(path="/etc/b", content=b"2", mode=0o444)


def test_content_behind_a_link_stands_where_the_link_leads() -> None:
    made = by_path(planned(Closure(entries=(link("/srv", "/data"),)), spec(files=Files(content={"/srv/x": "1"}))))
    assert made["/data/x"] == WriteFile(path="/data/x", content=b"1", mode=0o444)
    assert made["/srv"] == MakeSymlink(path="/srv", target="/data", mode=0o777)


@pytest.mark.parametrize("path", ["/etc/../../../x", "/../x", "//x", "/./x"])
def test_no_path_of_the_spec_leaves_the_root(path: str) -> None:
    made = by_path(planned(Closure(), spec(files=Files(content={path: "1"}))))
    assert made["/x"] == WriteFile(path="/x", content=b"1", mode=0o444)


def test_a_link_out_of_the_jail_is_reported() -> None:
    entries = (link("/etc/a", "/nowhere"), link("/etc/b", "../../../../etc/ok"), file("/etc/ok"))
    made = planned(Closure(entries=entries))
    assert made.unresolved == ("/etc/a",)


def test_a_link_that_loops_is_reported_and_stops_only_what_lies_behind_it() -> None:
    loop = (link("/etc/a", "b"), link("/etc/b", "a"))
    assert planned(Closure(entries=loop)).unresolved == ("/etc/a", "/etc/b")
    with pytest.raises(BuildError, match="the symbolic links on `/etc/a` form a loop"):
        planned(Closure(entries=(*loop, file("/etc/a/x"))))


def test_a_link_into_what_the_launch_makes_is_no_dangling_link() -> None:
    targets = {"/var/run": "/run", "/etc/mtab": "/proc/mounts", "/x": "/var/run/y", "/d": "/dev/null"}
    entries = tuple(link(path, target) for path, target in targets.items())
    assert planned(Closure(entries=entries)).unresolved == ()


def test_run_and_tmp_are_tmpfs() -> None:
    made = planned(Closure())
    assert [(found.path, found.mode, found.volume) for found in made.directories] == [
        ("/run", 0o755, ""),
        ("/tmp", 0o1777, ""),
    ]
    assert by_path(made)["/tmp"] == MakeDirectory(path="/tmp", mode=0o755)


def test_observed_directories_of_a_tmpfs_are_made_at_launch_not_in_the_root() -> None:
    observed = WorkDirectory(path="/var/run/www", mode=0o2750, uid=33, gid=33)
    made = planned(Closure(tmpfs=(observed,), entries=(link("/var/run", "/run"),)))
    assert [(found.path, found.mode, found.uid) for found in made.directories] == [
        ("/run", 0o755, 0),
        ("/run/www", 0o750, 33),
        ("/tmp", 0o1777, 0),
    ]
    assert "/run/www" not in by_path(made)


def test_a_file_that_a_tmpfs_would_hide_is_refused() -> None:
    closure = Closure(entries=(file("/tmp/prog", 0o755),), tmpfs=(WorkDirectory(path="/tmp", mode=0o1777),))
    with pytest.raises(BuildError) as caught:
        planned(closure)
    assert caught.value.message == "`/tmp/prog` is needed and would be hidden by the tmpfs on `/tmp`"
    assert by_path(planned(closure, spec(directories={"/tmp": Directory(kind="fixed")})))["/tmp/prog"]


def test_a_program_below_tmp_keeps_tmp_from_being_a_default_tmpfs() -> None:
    made = planned(Closure(entries=(file("/tmp/prog", 0o755),)))
    assert "/tmp/prog" in by_path(made)
    assert [found.path for found in made.directories] == ["/run"]


def test_generated_content_that_a_tmpfs_would_hide_is_refused() -> None:
    with pytest.raises(SpecError, match="would be hidden by the tmpfs on `/run/x`"):
        planned(Closure(), spec(files=Files(content={"/run/x/y": ""}), directories={"/run/x": Directory()}))


def test_a_link_to_a_file_below_run_becomes_that_file() -> None:
    entries = (link("/etc/resolv.conf", "../run/resolve/stub.conf"), file("/run/resolve/stub.conf"))
    made = by_path(planned(Closure(entries=entries, tmpfs=(WorkDirectory(path="/run"),))))
    expected = CopyFile(path="/etc/resolv.conf", source="/run/resolve/stub.conf", mode=0o444)
    assert made["/etc/resolv.conf"] == expected
    assert "/run/resolve/stub.conf" not in made


def test_observed_state_is_a_volume_whose_content_stays_writable() -> None:
    closure = Closure(
        entries=(file("/var/lib/www/db", 0o660, 33, 33), file("/var/lib/other", 0o664, 33, 33)),
        state=(
            WorkDirectory(path="/var/lib/www", mode=0o750, uid=33, gid=33),
            WorkDirectory(path="/var/lib/www/sub", mode=0o700, uid=33, gid=33),
        ),
    )
    made = planned(closure)
    volumes = [(found.path, found.volume) for found in made.directories if found.volume]
    assert volumes == [("/var/lib/www", "var-lib-www")]
    operations = by_path(made)
    assert operations["/var/lib/www"] == MakeDirectory(path="/var/lib/www", mode=0o750, uid=33, gid=33)
    assert operations["/var/lib/www/sub"] == MakeDirectory(path="/var/lib/www/sub", mode=0o700, uid=33, gid=33)
    assert operations["/var/lib/www/db"] == CopyFile(
        path="/var/lib/www/db", source="/var/lib/www/db", mode=0o660, uid=33, gid=33
    )
    assert operations["/var/lib/other"] == CopyFile(path="/var/lib/other", source="/var/lib/other", mode=0o444)


def test_the_specs_directory_wins_over_the_observed_one() -> None:
    wanted = spec(directories={"/var/www": Directory(kind="volume", volume="pages", owner="www-data", mode="0700")})
    made = planned(Closure(tmpfs=(WorkDirectory(path="/var/www"),)), wanted)
    found = next(found for found in made.directories if found.path == "/var/www")
    assert (found.volume, found.mode, found.uid) == ("pages", 0o700, 33)


def test_volumes_of_two_paths_never_share_a_name() -> None:
    long = "/" + "a" * 80
    paths = ["/var/lib/x", "/var/lib-x", "/var-lib/x", "/var/lib/X", "/var/lib/x-", "/ü", long, f"{long}a"]
    names = [volume_name(path) for path in paths]
    assert len(set(names)) == len(paths)
    assert names[0] == "var-lib-x"
    assert all(len(name) <= 63 for name in names)


def test_mount_points_are_made_as_their_source_is() -> None:
    wanted = spec(mounts=(Mount(source="/d", target="/in/d"), Mount(source="/f", target="/in/f")))
    made = by_path(planned(Closure(), wanted, mounts={"/d": "directory", "/f": "file"}))
    assert made["/in/d"] == MakeDirectory(path="/in/d", mode=0o755)
    assert made["/in/f"] == WriteFile(path="/in/f", content=b"", mode=0o444)


def test_proc_is_there_only_when_it_is_used() -> None:
    assert "/proc" not in by_path(planned(Closure()))
    assert planned(Closure(proc=True)).proc == "pid"
    assert planned(Closure(proc=True, proc_subset=False)).proc == "full"
    assert "/proc" in by_path(planned(Closure(proc=True)))


def test_a_path_below_a_file_is_refused() -> None:
    with pytest.raises(BuildError, match="`/etc/x/y` cannot be made: `/etc/x` is a file, not a directory"):
        planned(Closure(entries=(file("/etc/x"), file("/etc/x/y"))))


def test_an_owner_beyond_the_jails_ids_is_refused() -> None:
    with pytest.raises(BuildError, match="belongs to the id 33, and the jail has the ids 0 to 9"):
        planned(Closure(entries=(file("/x", 0o600, 33),)), id_count=10)


def test_with_a_single_id_everything_is_its_own() -> None:
    made = planned(Closure(entries=(file("/x", 0o600, 0),), tmpfs=(WorkDirectory(path="/run/y"),)), single=(33, 34))
    assert {(operation.uid, operation.gid) for operation in made.operations} == {(33, 34)}
    assert {(found.uid, found.gid) for found in made.directories} == {(33, 34)}


def test_every_operation_says_what_it_does() -> None:
    hostile = 'a\nb"c\udcff'
    made = planned(Closure(entries=(file(f"/{hostile}"),)))
    for operation in made.operations:
        assert operation.describe().isprintable() or "\n" in operation.path
        operation.describe().encode()


LOADER = file("/lib64/ld-linux-x86-64.so.2")


def cached(made: Plan, name: str) -> list[str]:
    """Where ld.so's cache of a plan has the library `name`, what it prefers first."""
    content = by_path(made)["/etc/ld.so.cache"].content  # type: ignore[attr-defined]
    return [entry.path for entry in Cache(content).entries(name)]


def libraries(**sonames: str | None) -> dict[str, Library]:
    return {path: Library(soname, FLAGS[EM_X86_64, 64]) for path, soname in sonames.items()}


def test_of_several_versions_without_a_link_the_newest_is_the_library() -> None:
    paths = [f"/usr/lib/libx.so.1.{number}" for number in (9, 10, 2)]
    known = libraries(**dict.fromkeys(paths, "libx.so.1"))
    closure = Closure(entries=(LOADER, *map(file, paths)))
    assert cached(planned(closure, libraries=known), "libx.so.1") == ["/usr/lib/libx.so.1.10"]
    linked = Closure(entries=(*closure.entries, link("/usr/lib/libx.so.1", "libx.so.1.9")))
    assert cached(planned(linked, libraries=known), "libx.so.1") == ["/usr/lib/libx.so.1"]


def test_a_file_with_a_librarys_name_does_not_stand_for_it() -> None:
    """ld.so asks for a SONAME: one file's name is not to hide the library that has it."""
    known = libraries(**{"/opt/a/libx.so.1": "liby.so.1", "/usr/lib/libx.so.1": "libx.so.1"})
    closure = Closure(entries=(LOADER, *map(file, known)))
    made = planned(closure, spec(files=Files(content={"/etc/ld.so.conf": "/opt/a\n"})), libraries=known)
    assert cached(made, "libx.so.1") == ["/usr/lib/libx.so.1"]
    assert cached(made, "liby.so.1") == ["/opt/a/libx.so.1"]


def test_the_compilers_link_to_a_library_is_found_by_its_name() -> None:
    known = libraries(**{"/usr/lib/libx.so.1": "libx.so.1"})
    closure = Closure(entries=(LOADER, file("/usr/lib/libx.so.1"), link("/usr/lib/libx.so", "libx.so.1")))
    assert cached(planned(closure, libraries=known), "libx.so") == ["/usr/lib/libx.so"]


def test_a_directory_that_holds_only_links_to_libraries_is_searched() -> None:
    known = libraries(**{"/opt/x-1.0/libx.so.1": "libx.so.1"})
    entries = (LOADER, file("/opt/x-1.0/libx.so.1"), link("/opt/lib/libx.so.1", "../x-1.0/libx.so.1"))
    made = planned(Closure(entries=entries), libraries=known, library_directories=("/opt/lib",))
    assert by_path(made)["/etc/ld.so.conf"].content == b"/opt/lib\n"  # type: ignore[attr-defined]
    assert cached(made, "libx.so.1") == ["/opt/lib/libx.so.1"]


@pytest.mark.parametrize(
    "content",
    [
        {"/etc/ld.so.conf": "  /opt/a b, c/ =libc6 # all of it is one name\n"},
        {"/etc/ld.so.conf": "include own.d/*.conf\n", "/etc/own.d/x.conf": "/opt/a b, c\n"},
    ],
)
def test_a_line_of_the_loaders_configuration_is_one_directory(content: dict[str, str]) -> None:
    known = libraries(**{"/opt/a b, c/libx.so.1": "libx.so.1"})
    closure = Closure(entries=(LOADER, *map(file, known)))
    made = planned(closure, spec(files=Files(content=content)), libraries=known)
    assert cached(made, "libx.so.1") == ["/opt/a b, c/libx.so.1"]


def test_wildcards_of_the_loaders_configuration_stay_in_their_directory() -> None:
    known = libraries(**{"/opt/a/libx.so.1": "libx.so.1"})
    closure = Closure(entries=(LOADER, *map(file, known)))
    content = {"/etc/ld.so.conf": "include ld.so.conf.d/*.conf\n", "/etc/ld.so.conf.d/off/x.conf": "/opt/a\n"}
    assert cached(planned(closure, spec(files=Files(content=content)), libraries=known), "libx.so.1") == []


def test_a_loaders_configuration_behind_a_link_is_the_one_that_counts() -> None:
    known = libraries(**{"/opt/a/libx.so.1": "libx.so.1"})
    closure = Closure(entries=(LOADER, *map(file, known)))
    own = Files(content={"/etc/own/ld.so.conf": "/opt/a\n"}, links={"/etc/ld.so.conf": "own/ld.so.conf"})
    made = planned(closure, spec(files=own), libraries=known)
    assert cached(made, "libx.so.1") == ["/opt/a/libx.so.1"]
    assert isinstance(by_path(made)["/etc/ld.so.conf"], MakeSymlink)
    assert by_path(made)["/etc/own/ld.so.conf"].content == b"/opt/a\n"  # type: ignore[attr-defined]
