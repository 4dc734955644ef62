from __future__ import annotations

import errno
import os
import subprocess
from pathlib import Path

import pytest

from stockade.errors import ResolveError
from stockade.resolve import shebang
from stockade.resolve.host import Host


def script(path: Path, line: str | bytes, body: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes((line.encode() if isinstance(line, str) else line) + b"\n" + body.encode())
    path.chmod(0o755)
    return path


def steps(script_: Path, **options: str) -> list[tuple[str, str]]:
    return [(link.script, link.interpreter) for link in shebang.chain(Host(), str(script_), **options)]


def test_a_program_that_is_no_script_has_no_chain() -> None:
    assert steps(Path("/bin/true")) == []


def test_the_interpreter_is_followed_whatever_blanks_stand_around_it(tmp_path: Path) -> None:
    path = script(tmp_path / "s", "#! \t /bin/sh \t -e  ")
    assert steps(path) == [(str(path), "/bin/sh")]


def test_a_script_may_be_interpreted_by_a_script_as_deep_as_the_kernel_allows(tmp_path: Path) -> None:
    """The kernel itself is the oracle: it runs the deepest chain that is followed, and refuses the next."""
    previous = "/bin/true"
    runs: list[bool] = []
    followed: list[bool] = []
    for level in range(1, 8):
        path = script(tmp_path / f"level{level}", f"#!{previous}")
        try:
            subprocess.run([path], check=True, timeout=10)
            runs.append(True)
        except OSError as error:
            assert error.errno == errno.ELOOP
            runs.append(False)
        try:
            followed.append(len(steps(path)) == level)
        except ResolveError:
            followed.append(False)
        previous = str(path)
    assert followed == runs
    assert True in runs
    assert False in runs


def test_too_many_levels_are_one_clear_error(tmp_path: Path) -> None:
    path = tmp_path / "itself"
    script(path, f"#!{path}")
    with pytest.raises(ResolveError) as caught:
        steps(path)
    assert "interpreters run one another" in caught.value.message
    assert caught.value.hint


def test_env_finds_its_command_on_path(tmp_path: Path) -> None:
    tool = script(tmp_path / "bin/tool", "#!/bin/sh")
    path = script(tmp_path / "s", "#!/usr/bin/env tool")
    assert steps(path, path=f"/nowhere:{tool.parent}") == [
        (str(path), "/usr/bin/env"),
        (str(path), str(tool)),
        (str(tool), "/bin/sh"),
    ]


@pytest.mark.parametrize("argument", ["-S sh -e", "-S A=b sh", "-S -i sh", "--split-string=sh -e", "-vS sh"])
def test_env_splits_its_argument_when_told_to(tmp_path: Path, argument: str) -> None:
    path = script(tmp_path / "s", f"#!/usr/bin/env {argument}")
    assert [interpreter.rpartition("/")[2] for _, interpreter in steps(path)] == ["env", "sh"]


@pytest.mark.parametrize(
    ("line", "interpreter", "hint"),
    [
        ("#!/no/such/python", "/no/such/python", "install the package that brings `/no/such/python`"),
        ("#!/usr/bin/env no-such-tool", "no-such-tool", "install the package that brings `no-such-tool`"),
        ("#!/bin/sh\r", "/bin/sh\r", "dos2unix"),
        ("#!/etc", "/etc", "make `/etc` an executable file"),
    ],
)
def test_a_missing_interpreter_is_one_clear_error_with_a_hint(
    tmp_path: Path, line: str, interpreter: str, hint: str
) -> None:
    path = script(tmp_path / "s", line)
    with pytest.raises(ResolveError) as caught:
        steps(path)
    assert caught.value.message == f"cannot run `{path}`: its interpreter `{interpreter}` is missing"
    assert hint in (caught.value.hint or "")


def test_a_line_beyond_the_kernels_buffer_is_no_interpreter(tmp_path: Path) -> None:
    path = script(tmp_path / "s", "#!/" + "x" * 400)
    with pytest.raises(OSError) as caught:
        subprocess.run([path], timeout=10)
    assert caught.value.errno == errno.ENOEXEC
    assert steps(path) == []


def test_names_of_any_bytes_are_followed(tmp_path: Path) -> None:
    interpreter = script(tmp_path / os.fsdecode(b"in\xff;'\""), "#!/bin/sh")
    path = script(tmp_path / "s", b"#!" + os.fsencode(interpreter))
    assert steps(path)[0] == (str(path), str(interpreter))


def test_a_script_found_through_a_symlink_is_named_by_its_own_path(tmp_path: Path) -> None:
    path = script(tmp_path / "real", "#!/bin/sh")
    link = tmp_path / "link"
    link.symlink_to(path)
    assert steps(link) == [(str(path), "/bin/sh")]
