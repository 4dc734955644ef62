"""What a failed run outside is told about places that nobody had made."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from stockade.errors import ExerciseError, ServiceError
from stockade.observe import Observation, cures
from stockade.records.spec import Exercise, Ready, Service, Spec
from stockade.records.trace import Access, Operation, Trace

Outside = Callable[..., Observation]


def told(*accesses: tuple[Operation, str, str]) -> tuple[str, ...]:
    trace = Trace(
        where="outside",
        accesses=tuple(Access(operation=operation, path=path, error=error) for operation, path, error in accesses),
    )
    return cures(trace, Spec(name="x", service=Service(command=("x",), user="keeper")))


@pytest.mark.parametrize(
    ("operation", "path", "line"),
    [
        ("create", "/run/none-x/x.pid", '"/run/none-x" = { kind = "tmpfs", owner = "keeper" }'),
        ("bind", "/var/run/none-x/x.sock", '"/var/run/none-x" = { kind = "tmpfs", owner = "keeper" }'),
        ("mkdir", "/nonexistent/.x", '"/nonexistent" = { kind = "volume", owner = "keeper" }'),
    ],
)
def test_a_directory_that_is_not_there_is_told_with_the_line_that_makes_it(
    operation: Operation, path: str, line: str
) -> None:
    (said,) = told((operation, path, "ENOENT"))
    assert said.endswith(f"is not there: put `{line}` into `[directories]`")


def test_what_is_absent_where_it_is_only_looked_for_and_what_is_refused_is_not_told() -> None:
    assert told(
        ("read", "/run/none-x/x.conf", "ENOENT"), ("create", "/run/none-x/x", "EACCES"), ("create", "/etc/x", "ENOENT"),
    ) == ()  # fmt: skip


def test_a_directory_that_it_makes_itself_when_it_is_missing_is_not_told() -> None:
    missed = "mkdir", "/run/none-x/a", "ENOENT"
    assert told(missed, ("mkdir", "/run/none-x", ""), ("mkdir", "/run/none-x/a", "")) == ()


def test_a_tree_is_told_of_once() -> None:
    assert len(told(("mkdir", "/run/none-x/a", "ENOENT"), ("mkdir", "/run/none-x/a/b", "ENOENT"))) == 1


def test_names_that_are_not_in_the_root_directory_are_told_with_the_line_that_runs_it_elsewhere() -> None:
    found: list[tuple[Operation, str]] = [
        ("stat", "//none.d"), ("read", "/none-a"), ("exec", "/./none-b"), ("read", "/none-c"), ("read", "/.none"),
        ("read", "/etc"),
    ]  # fmt: skip
    trace = Trace(
        where="outside",
        accesses=tuple(
            Access(path=path, operation=operation, error="ENOENT", relative=True) for operation, path in found
        ),
    )
    assert cures(trace, Spec(name="x", service=Service(command=("x",)))) == (
        "`none-a`, `none-b`, `none-c` are not in `/`, where it is run: `directory` in `[service]` names another place",
    )
    assert cures(trace, Spec(name="x", service=Service(command=("x",), directory="/srv"))) == ()


def hint(outside: Outside, *command: str) -> str:
    """What is told of `command`, which never is ready."""
    with pytest.raises(ServiceError) as caught:
        outside(*command, ready=Ready(tcp=1))
    return caught.value.hint or ""


@pytest.mark.parametrize("script", ["ls /; exit 3", "mkdir /tmp/x; exit 3", "cat /none-a; exit 3"])
def test_what_a_program_names_absolutely_is_not_told(outside: Outside, script: str) -> None:
    """Those that label files look for `/selinux`."""
    assert "where it is run" not in hint(outside, "sh", "-c", script)


@pytest.mark.parametrize(
    "command",
    [
        ("cat", "none-a"), ("sh", "./none-a"), ("sh", "-c", "exec <none-a"), ("sh", "-c", "ls none-a; exit 3"),
        ("/usr/bin/python3", "none-a"), ("/usr/bin/python3", "-c", "open('none-a')"),
    ],
)  # fmt: skip
def test_what_a_program_names_from_its_directory_is_told(outside: Outside, command: tuple[str, ...]) -> None:
    said = "`none-a` is not in `/`, where it is run: `directory` in `[service]` names another place"
    assert said in hint(outside, *command)


def test_a_file_of_the_hosts_tmp_is_told_of_and_its_directories_are_not() -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:
        path = Path(directory) / "app.py"
        path.write_text("pass\n")
        said = told(("stat", str(path), "ENOENT"), ("stat", directory, "ENOENT"), ("read", f"{path}.none", "ENOENT"))
    assert said == (f"`{path}` is in the host's `/tmp`, of which a jail has one of its own: keep it elsewhere",)


def test_a_service_that_ends_for_want_of_its_directory_is_told_so(outside: Outside) -> None:
    with pytest.raises(ServiceError) as caught:
        outside("sh", "-c", "echo $$ >/run/none-x/x.pid", ready=Ready(tcp=1))
    assert caught.value.hint is not None
    assert caught.value.hint.startswith("its log says why; `/run/none-x`, in which it makes `x.pid`, is not there: ")


def test_an_exercise_that_fails_for_want_of_a_directory_is_told_so(outside: Outside) -> None:
    exercise = Exercise(command=("false",))
    with pytest.raises(ExerciseError) as caught:
        outside("sh", "-c", "echo $$ >/run/none-x/x.pid; sleep 100", exercises=(exercise,))
    assert caught.value.hint is not None
    assert "; `/run/none-x`, in which it makes `x.pid`, is not there: " in caught.value.hint
