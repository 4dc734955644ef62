from __future__ import annotations

import os
import random
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import linker_oracle
import pytest

from stockade.errors import ResolveError
from stockade.resolve import ldso
from stockade.resolve.host import Host

Compile = Callable[..., Path]
NEW, OLD = "-Wl,--enable-new-dtags", "-Wl,--disable-new-dtags"


def rpath(path: object, kind: str = OLD) -> tuple[str, str]:
    return kind, f"-Wl,-rpath,{path}"


def soname(name: str) -> str:
    return f"-Wl,-soname,{name}"


def answer(libraries: ldso.Libraries) -> linker_oracle.Answer:
    paths = [library.path for library in libraries.libraries]
    return linker_oracle.Answer(paths, [missing.name for missing in libraries.missing], "")


def check(program: Path, expected_in: str | None = None, **options: str) -> ldso.Libraries:
    """Compare with ld.so's own answer; `expected_in` must be among the paths, so that the case is what it claims."""
    environment = {"LD_LIBRARY_PATH": options["library_path"]} if "library_path" in options else {}
    directory = Path(options["directory"]) if "directory" in options else None
    own = ldso.closure(os.fspath(program), **options)
    theirs = linker_oracle.started(program, environment, directory=directory)
    if directory is not None:  # ld.so prints what it found through the working directory as relative
        paths = [path if path.startswith("/") else f"{directory}/{path}" for path in theirs.paths]
        theirs = theirs._replace(paths=paths)
    assert answer(own) == theirs
    if expected_in is not None:
        assert expected_in in theirs.paths
    return own


# every ELF file of the host


def differences(files: list[str]) -> list[str]:
    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(linker_oracle.listed, files))
    loader = ldso.Loader(Host())
    wrong = []
    for path, theirs in zip(files, answers, strict=True):
        if theirs.complaint or path.endswith(".debug"):
            continue
        own = loader.libraries(path)
        if own is None or answer(own) != theirs:
            wrong.append(f"{path}: {own} instead of {theirs}")
    return wrong


@pytest.mark.slow
def test_every_elf_file_of_the_host_has_the_libraries_that_its_linker_names() -> None:
    files = list(linker_oracle.elf_files("/usr", "/opt"))
    assert len(files) > 500
    assert differences(files) == []


def test_a_sample_of_the_hosts_elf_files_has_the_libraries_that_their_linker_names() -> None:
    files = list(linker_oracle.elf_files("/usr/sbin", "/usr/lib/x86_64-linux-gnu/security", "/usr/libexec"))
    assert len(files) > 50
    assert differences(random.Random(1).sample(files, 50)) == []


# the search rules, one by one


def test_rpath_of_the_object_is_searched_and_inherited_by_its_libraries(compile: Compile, tmp_path: Path) -> None:
    b = compile("deep/libb.so", soname("libb.so"))
    a = compile("lib/liba.so", soname("liba.so"), needs=(b,))
    program = compile("program", *rpath(f"{tmp_path}/lib:{tmp_path}/deep"), needs=(a,), main=True)
    found = check(program, str(b))
    assert {library.name: library.rule for library in found.libraries}["libb.so"] == f"RPATH of `{program}`"


def test_runpath_is_not_inherited(compile: Compile, tmp_path: Path) -> None:
    b = compile("deep/libb.so", soname("libb.so"))
    a = compile("lib/liba.so", soname("liba.so"), needs=(b,))
    program = compile("program", *rpath(f"{tmp_path}/lib:{tmp_path}/deep", NEW), needs=(a,), main=True)
    found = check(program, str(a))
    [missing] = found.missing
    assert (missing.name, missing.needed_by) == ("libb.so", str(a))
    assert missing.searched[-1] == "/usr/lib"


def test_an_objects_runpath_switches_off_the_rpath_of_its_loaders(compile: Compile, tmp_path: Path) -> None:
    b = compile("deep/libb.so", soname("libb.so"))
    a = compile("lib/liba.so", soname("liba.so"), *rpath("/nowhere", NEW), needs=(b,))
    program = compile("program", *rpath(f"{tmp_path}/lib:{tmp_path}/deep"), needs=(a,), main=True)
    assert [missing.name for missing in check(program).missing] == ["libb.so"]


def test_rpath_of_an_intermediate_loader_counts_beside_the_programs_runpath(compile: Compile, tmp_path: Path) -> None:
    c = compile("deeper/libc1.so", soname("libc1.so"))
    b = compile("deep/libb.so", soname("libb.so"), needs=(c,))
    a = compile("lib/liba.so", soname("liba.so"), *rpath(f"{tmp_path}/deep:{tmp_path}/deeper"), needs=(b,))
    program = compile("program", *rpath(tmp_path / "lib", NEW), needs=(a,), main=True)
    assert check(program, str(c)).missing == ()


def test_rpath_is_searched_before_and_runpath_after_ld_library_path(compile: Compile, tmp_path: Path) -> None:
    one = compile("one/liba.so", soname("liba.so"))
    two = compile("two/liba.so", soname("liba.so"))
    old = compile("old", *rpath(tmp_path / "one"), needs=(one,), main=True)
    new = compile("new", *rpath(tmp_path / "one", NEW), needs=(one,), main=True)
    check(old, str(one), library_path=str(two.parent))
    check(new, str(two), library_path=str(two.parent))


def test_ld_library_path_takes_semicolons_and_an_empty_entry_is_the_working_directory(
    compile: Compile, tmp_path: Path
) -> None:
    a = compile("here/liba.so", soname("liba.so"))
    program = compile("program", needs=(a,), main=True)
    check(program, str(a), library_path=f"/nowhere;{a.parent}")
    check(program, library_path="/nowhere:", directory=str(a.parent))
    found = ldso.closure(str(program), library_path="/nowhere:", directory=str(a.parent))
    assert found.missing == ()


@pytest.mark.parametrize("origin", ["$ORIGIN", "${ORIGIN}"])
@pytest.mark.parametrize("kind", [OLD, NEW])
def test_origin_is_the_directory_of_the_object(compile: Compile, origin: str, kind: str) -> None:
    b = compile("app/lib/libb.so", soname("libb.so"))
    a = compile("app/lib/liba.so", soname("liba.so"), *rpath(origin, kind), needs=(b,))
    program = compile("app/bin/program", *rpath(f"{origin}/../lib", kind), needs=(a,), main=True)
    assert check(program).missing == ()


def test_origin_of_a_program_started_through_a_symlink_is_that_of_its_target(compile: Compile, tmp_path: Path) -> None:
    a = compile("app/lib/liba.so", soname("liba.so"))
    program = compile("app/bin/program", *rpath("$ORIGIN/../lib", NEW), needs=(a,), main=True)
    link = tmp_path / "elsewhere" / "link"
    link.parent.mkdir()
    link.symlink_to(program)
    assert check(link).missing == ()


def test_origin_of_a_library_found_through_a_symlink_is_where_the_link_lies(compile: Compile, tmp_path: Path) -> None:
    b = compile("real/libb.so", soname("libb.so"))
    compile("links/libb.so", soname("libb.so"))
    a = compile("real/liba.so", soname("liba.so"), *rpath("$ORIGIN", NEW), needs=(b,))
    (tmp_path / "links/liba.so").symlink_to(a)
    program = compile("program", *rpath(tmp_path / "links", NEW), needs=(a,), main=True)
    check(program, str(tmp_path / "links/libb.so"))


def test_a_token_must_end_where_its_name_ends(compile: Compile, tmp_path: Path) -> None:
    a = compile("$ORIGINAL/liba.so", soname("liba.so"))
    program = compile("program", *rpath(f"{tmp_path}/$ORIGINAL", NEW), needs=(a,), main=True)
    assert check(program).missing == ()


def test_lib_and_platform_are_what_the_linker_has_built_in(compile: Compile, tmp_path: Path) -> None:
    a = compile("lib/x86_64-linux-gnu/liba.so", soname("liba.so"))
    platform = subprocess.run(
        [linker_oracle.LINKER, "--list-diagnostics"], capture_output=True, text=True, timeout=30, check=True
    ).stdout
    name = next(line for line in platform.splitlines() if line.startswith("dl_platform=")).split('"')[1]
    b = compile(f"for-{name}/libb.so", soname("libb.so"))
    program = compile(
        "program", *rpath(f"{tmp_path}/$LIB:{tmp_path}/for-${{PLATFORM}}", NEW), needs=(a, b), main=True
    )  # fmt: skip
    assert check(program).missing == ()


def test_needed_with_a_slash_is_a_path(compile: Compile, tmp_path: Path) -> None:
    a = compile("odd place/liba.so", soname(str(tmp_path / "odd place/liba.so")))
    program = compile("program", needs=(a,), main=True)
    found = check(program, str(a))
    assert found.libraries[0].rule == "path"


def test_origin_stands_in_needed_itself(compile: Compile) -> None:
    a = compile("app/lib/liba.so", soname("$ORIGIN/../lib/liba.so"))
    program = compile("app/bin/program", needs=(a,), main=True)
    assert check(program).missing == ()


def test_nodefaultlib_bars_cache_and_default_directories(compile: Compile) -> None:
    library = Path("/usr/lib/x86_64-linux-gnu/libz.so.1")
    if not library.exists():
        pytest.skip("needs zlib (package `zlib1g`)")
    a = compile("liba.so", soname("liba.so"), "-Wl,-z,nodefaultlib", needs=(library,))
    program = compile("program", *rpath(a.parent, NEW), needs=(a,), main=True)
    assert "libz.so.1" in [missing.name for missing in check(program).missing]


def test_one_file_under_two_names_is_loaded_once(compile: Compile, tmp_path: Path) -> None:
    """Neither name is its SONAME: ld.so knows the file by device and inode."""
    stubs = tuple(compile(f"stub/lib{name}.so", soname(f"lib{name}.so")) for name in ("one", "two"))
    real = compile("lib/libone.so", soname("libreal.so"))
    os.link(real, tmp_path / "lib/libtwo.so")
    program = compile("program", *rpath(real.parent), needs=stubs, main=True)
    assert check(program, str(real)).missing == ()


def test_a_soname_answers_for_a_library_found_by_another_name(compile: Compile, tmp_path: Path) -> None:
    """The second NEEDED is not searched for at all: a loaded object has that SONAME."""
    first = compile("one/libx.so", soname("libwanted.so"))
    stub = compile("stub/libx.so", soname("libx.so"))
    user = compile("one/libuser.so", soname("libuser.so"), needs=(first,))
    program = compile("program", *rpath(tmp_path / "one"), needs=(stub, user), main=True)
    assert check(program, str(first)).missing == ()


def test_a_library_of_another_class_is_passed_over(compile: Compile, tmp_path: Path) -> None:
    a = compile("right/liba.so", soname("liba.so"))
    wrong = tmp_path / "wrong/liba.so"
    wrong.parent.mkdir()
    data = bytearray(a.read_bytes())
    data[4] = 1
    wrong.write_bytes(data)
    foreign = tmp_path / "foreign/liba.so"
    foreign.parent.mkdir()
    data = bytearray(a.read_bytes())
    data[18:20] = (183).to_bytes(2, "little")
    foreign.write_bytes(data)
    program = compile(
        "program", *rpath(f"{wrong.parent}:{foreign.parent}:{a.parent}", NEW), needs=(a,), main=True
    )  # fmt: skip
    check(program, str(a))


def test_a_text_file_in_place_of_a_library_ends_the_search_as_it_does_for_the_linker(
    compile: Compile, tmp_path: Path
) -> None:
    a = compile("right/liba.so", soname("liba.so"))
    script = tmp_path / "first/liba.so"
    script.parent.mkdir()
    script.write_text("INPUT(right/liba.so) /* as the linkers of compilers read it */\n" * 4)
    program = compile("program", *rpath(f"{script.parent}:{a.parent}", NEW), needs=(a,), main=True)
    assert "invalid ELF header" in linker_oracle.started(program).complaint
    found = ldso.closure(str(program))
    assert [(missing.name, missing.reason) for missing in found.missing] == [
        ("liba.so", f"`{script}` is no ELF file")
    ]


def test_hardware_subdirectories_come_first(compile: Compile, tmp_path: Path) -> None:
    a = compile("lib/liba.so", soname("liba.so"))
    for name in ("glibc-hwcaps/x86-64-v2", "glibc-hwcaps/x86-64-v3", "tls", "x86_64"):
        (tmp_path / "lib" / name).mkdir(parents=True)
        shutil.copy(a, tmp_path / "lib" / name / "liba.so")
    program = compile("program", *rpath(a.parent, NEW), needs=(a,), main=True)
    found = check(program)
    assert found.libraries[0].path != str(a)
    shutil.rmtree(tmp_path / "lib/glibc-hwcaps")
    check(program)


def test_a_static_pie_needs_nothing(compile: Compile) -> None:
    program = compile("program", "-static-pie", main=True)
    found = ldso.closure(str(program))
    assert (found.interpreter, found.libraries, found.missing) == (None, (), ())


def test_a_library_in_a_cycle_is_loaded_once(compile: Compile, tmp_path: Path) -> None:
    stub = compile("libb.so", soname("libb.so"))
    a = compile("liba.so", soname("liba.so"), needs=(stub,))
    compile("libb.so", soname("libb.so"), needs=(a,))
    program = compile("program", *rpath(tmp_path), needs=(a,), main=True)
    assert check(program).missing == ()


def test_odd_names_are_followed(compile: Compile, tmp_path: Path) -> None:
    directory = os.fsdecode(b"sp ace;'\"\n\xff")
    a = compile(f"{directory}/liba.so", soname("liba.so"))
    program = compile(f"{directory}/program", *rpath("$ORIGIN", NEW), needs=(a,), main=True)
    found = ldso.closure(str(program))
    assert found.libraries[0].path == str(a)


def test_preloaded_libraries_come_first(compile: Compile, tmp_path: Path) -> None:
    a = compile("liba.so", soname("liba.so"))
    program = compile("program", main=True)
    loader = ldso.Loader(Host(), preload=(str(a),))
    own = loader.libraries(str(program))
    assert own is not None
    assert answer(own) == linker_oracle.started(program, {"LD_PRELOAD": str(a)})
    assert own.libraries[0].path == str(a)


def test_libraries_are_sought_inside_the_given_root(compile: Compile, tmp_path: Path) -> None:
    """Absolute symlinks of the other root stay in it."""
    program = compile("root/opt/program", main=True)
    root = tmp_path / "root"
    for directory in ("lib64", "usr/lib/x86_64-linux-gnu"):
        (root / directory).mkdir(parents=True)
    linker = root / "usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2"
    shutil.copy("/lib64/ld-linux-x86-64.so.2", linker)
    (root / "lib64/ld-linux-x86-64.so.2").symlink_to("/usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2")
    library = root / "usr/lib/x86_64-linux-gnu/libc-2.so"
    shutil.copy("/usr/lib/x86_64-linux-gnu/libc.so.6", library)
    (root / "usr/lib/x86_64-linux-gnu/libc.so.6").symlink_to("/usr/lib/x86_64-linux-gnu/libc-2.so")
    found = ldso.closure("/opt/program", str(root))
    assert program.exists()
    assert found.missing == ()
    assert {library.real for library in found.libraries} == {
        "/usr/lib/x86_64-linux-gnu/libc-2.so",
        "/usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2",
    }
    assert {library.name: library.rule for library in found.libraries} == {
        "libc.so.6": "default directory",
        "ld-linux-x86-64.so.2": "interpreter",
    }


def test_musl_programs_follow_musls_rules(compile: Compile, tmp_path: Path) -> None:
    musl = shutil.which("musl-gcc")
    linker = "/lib/ld-musl-x86_64.so.1"
    if musl is None or not os.path.exists(linker):
        pytest.skip("needs musl-gcc (package `musl-tools`)")
    b = compile("lib/libb.so", soname("libb.so"), with_=musl)
    a = compile("lib/liba.so", soname("liba.so"), needs=(b,), with_=musl)
    program = compile("bin/program", *rpath("$ORIGIN/../lib", NEW), needs=(a,), main=True, with_=musl)
    done = subprocess.run([linker, "--list", program], capture_output=True, text=True, timeout=30, check=True)
    theirs = [line.split(" => ")[1].rpartition(" (")[0] for line in done.stdout.splitlines() if " => " in line]
    own = ldso.closure(str(program))
    assert own.missing == ()
    assert sorted(os.path.realpath(path) for path in theirs) == sorted(
        {*(library.real for library in own.libraries)}
    )


def test_a_program_without_its_interpreter_is_one_clear_error(compile: Compile) -> None:
    program = compile("program", "-Wl,--dynamic-linker=/no/such/ld.so", main=True)
    with pytest.raises(ResolveError) as caught:
        ldso.closure(str(program))
    assert caught.value.message == (
        f"cannot run `{program}`: its interpreter `/no/such/ld.so` is missing or for another machine"
    )
    assert caught.value.hint


def test_a_program_that_is_not_there_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(ResolveError, match="no such file"):
        ldso.closure(str(tmp_path / "none"))
    with pytest.raises(ResolveError, match="a loop of symlinks"):
        ldso.closure(str(tmp_path / "loop"))
