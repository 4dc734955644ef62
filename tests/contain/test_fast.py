"""The short way from `stockade run NAME -- COMMAND` to the warden."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import Builder
from processes import exists, until

from stockade import contain, places
from stockade.contain import fast
from stockade.errors import WallError

SOURCE = str(Path(contain.__file__).parents[2])
START = f"import sys; sys.path.insert(0, {SOURCE!r})\nfrom stockade.contain import fast\n"


@pytest.fixture
def built(jail: Builder) -> Path:
    generation = jail()
    with contain.launch("test", argv=["/bin/true"]) as running:  # makes the runtime directory
        running.wait(20)
    return generation


def run(*argv: str, **options: object) -> subprocess.CompletedProcess[str]:
    code = f"{START}fast.run('test', {list(argv)!r}, on_failure={options.get('on_failure', ())!r})\nsys.exit(99)\n"
    return subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, timeout=30, check=False,
        input=str(options.get("input", "")),
    )  # fmt: skip


def test_command_runs_with_the_streams_and_the_status_passes(built: Path) -> None:
    result = run("/bin/sh", "-c", "cat; echo error >&2; exit 3", input="typed")
    assert (result.returncode, result.stdout, result.stderr) == (3, "typed", "error\n")
    assert run("/bin/sh", "-c", "kill -9 $$").returncode == 137
    assert list(places.run().iterdir()) == []


def test_it_imports_nothing_slow(built: Path) -> None:
    code = f"{START}print(' '.join(sorted(sys.modules)))"
    result = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, timeout=30, check=True
    )
    slow = {"typing", "re", "enum", "collections", "pathlib", "subprocess", "msgspec", "ctypes", "struct", "argparse"}
    assert slow & set(result.stdout.split()) == set()


def test_places_are_those_of_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    for variables in (
        {}, {"STOCKADE_HOME": "/x/y"}, {"STOCKADE_HOME": "relative"}, {"XDG_RUNTIME_DIR": "/run/user/1"},
        {"XDG_DATA_HOME": "/data"}, {"XDG_DATA_HOME": "relative", "XDG_RUNTIME_DIR": "relative"},
    ):  # fmt: skip
        for uid in (0, 1000):
            with monkeypatch.context() as context:
                for name in ("STOCKADE_HOME", "XDG_RUNTIME_DIR", "XDG_DATA_HOME"):
                    context.delenv(name, raising=False)
                for name, value in variables.items():
                    context.setenv(name, value)
                context.setattr(os, "geteuid", lambda uid=uid: uid)
                assert fast._place("state") == str(places.state())
                assert fast._place("run") == str(places.run())


@pytest.mark.parametrize("session", (True, False))
def test_runtime_directory_is_the_sessions_even_where_nothing_says_so(
    monkeypatch: pytest.MonkeyPatch, session: bool
) -> None:
    """As under su(1) and cron(8), whose jails a login session has to see."""
    for name in ("STOCKADE_HOME", "XDG_RUNTIME_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(os, "access", lambda path, mode: session and (path, mode) == ("/run/user/1000", os.W_OK))
    expected = "/run/user/1000/stockade" if session else "/tmp/stockade-1000/stockade"
    assert (str(places.run()), fast._place("run")) == (expected, expected)


@pytest.mark.parametrize("name", ["absent", "../test", "", "Test", ".test"])
def test_it_returns_where_there_is_something_to_explain(built: Path, name: str) -> None:
    fast.run(name, ["/bin/true"])
    fast.run("test", [])


def test_running_command_is_seen_and_stopped(built: Path) -> None:
    code = f"{START}fast.run('test', ['/bin/sleep', '100'])\nsys.exit(99)\n"
    process = subprocess.Popen([sys.executable, "-I", "-S", "-c", code], stdin=subprocess.DEVNULL)
    assert until(lambda: len(contain.running()) == 1)
    found = contain.find("test")
    assert found.supervisor_pid == process.pid
    assert until(lambda: contain.find("test").pid > 0)
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 143
    assert until(lambda: not exists(found.init_pid))


def test_failed_step_is_explained_by_whoever_is_named(built: Path) -> None:
    result = run("/bin/absent")
    assert (result.returncode, result.stderr) == (
        127, "error: launch step `exec` failed on `/bin/absent`: No such file or directory\n",
    )  # fmt: skip
    result = run("/bin/absent", on_failure=("/bin/echo", "explained:"))
    assert (result.returncode, result.stdout) == (0, "explained: failed 2 exec: /bin/absent\n")


def damages(plan: bytes) -> dict[str, bytes]:
    """Plans that no warden takes, each with a part left to read or none."""
    header = 16
    return {
        "empty": b"", "cut": plan[: len(plan) // 2], "other": b"#!/bin/sh\n" * 9, "longer": plan + bytes(8),
        "op": plan[:header] + b"\xff\xff" + plan[header + 2 :],
    }  # fmt: skip


@pytest.mark.parametrize("how", ["empty", "cut", "other", "longer", "op"])
def test_damaged_plan_is_explained_whoever_meets_it(built: Path, how: str) -> None:
    plan = built / "plan"
    plan.write_bytes(damages(plan.read_bytes())[how])
    result = run("/bin/true", on_failure=("/bin/echo",))
    assert (result.returncode, result.stderr) == (0, "")
    assert re.fullmatch(r"failed 22 plan: [a-z ]+\n", result.stdout)
    assert list(places.run().iterdir()) == []
    result = subprocess.run(
        [sys.executable, "-m", "stockade", "run", "test", "--", "/bin/true"], capture_output=True, text=True,
        timeout=30, check=False, env={**os.environ, "PYTHONPATH": SOURCE},
    )  # fmt: skip
    assert result.returncode == 125
    assert "hint: build the jail again with this version of Stockade" in result.stderr
    for detach in (False, True):
        with pytest.raises(WallError, match="step `plan` failed") as caught:
            contain.launch("test", argv=["/bin/true"], detach=detach)
        assert caught.value.hint == "build the jail again with this version of Stockade"
    assert contain.running() == ()


def test_it_starts_soon_after_the_interpreter(built: Path) -> None:
    """Ten times the target of the benchmark: only a gross regression is caught here."""
    begun = time.monotonic()
    assert run("/bin/true").returncode == 0
    assert time.monotonic() - begun < 1
