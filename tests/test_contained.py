"""`stockade contain`: one command behind the walls, tried as a user would, by root and by an ordinary user."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from stockade.kernel.cgroups import layout

SOURCE = Path(__file__).resolve().parents[1] / "src"
ORDINARY = 31337
Contain = Callable[..., subprocess.CompletedProcess[str]]

# What a process knows of itself, as JSON; run inside.
STATE = """
import json, os
fields = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(json.dumps({
    "uid": os.getuid(), "groups": os.getgroups(), "uid_map": open("/proc/self/uid_map").read().split(),
    "capabilities": [fields[name].strip() for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")],
    "no_new_privs": fields["NoNewPrivs"].strip(), "seccomp": fields["Seccomp"].strip(),
    "descriptors": sorted(int(name) for name in os.listdir("/proc/self/fd"))[:-1],
    "pids": sorted(int(name) for name in os.listdir("/proc") if name.isdecimal()),
    "interfaces": sorted(os.listdir("/sys/class/net")) if os.path.isdir("/sys/class/net") else None,
    "environment": dict(os.environ), "home": os.listdir(os.environ["HOME"]),
}))
"""


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """A directory that an ordinary user can reach: those of pytest are the tester's alone."""
    with tempfile.TemporaryDirectory(prefix="contained-", dir="/tmp") as made:
        os.chmod(made, 0o755)
        yield Path(made)


@pytest.fixture(params=["root", "ordinary user"])
def contain(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Contain]:
    """Runs `stockade contain ARGUMENTS` as root or as an ordinary user, in a Stockade home of the test's own."""
    ordinary = request.param == "ordinary user"
    if os.geteuid() != 0:
        if not ordinary:
            pytest.skip("run as root")
        prefix: list[str] = []
    else:
        prefix = ["setpriv", f"--reuid={ORDINARY}", f"--regid={ORDINARY}", "--clear-groups"] if ordinary else []
    home = tmp_path / "stockade"
    home.mkdir()
    if ordinary and os.geteuid() == 0:
        os.chown(home, ORDINARY, ORDINARY)
    environment = {"PATH": os.environ["PATH"], "STOCKADE_HOME": str(home), "PYTHONPATH": str(SOURCE)}

    def run(*arguments: str, cwd: str = "/", data: str = "") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*prefix, sys.executable, "-m", "stockade", "contain", *arguments],
            input=data, capture_output=True, text=True, timeout=60, env=environment, cwd=cwd, check=False,
        )  # fmt: skip

    run.home = home  # type: ignore[attr-defined]
    run.prefix = prefix  # type: ignore[attr-defined]
    run.environment = environment  # type: ignore[attr-defined]
    run.ordinary = ordinary  # type: ignore[attr-defined]
    yield run
    left = list((home / "run").glob("contain@*")) if (home / "run").exists() else []
    assert left == []


def seen(contain: Contain, *arguments: str) -> dict[str, object]:
    done = contain(*arguments, "--", "/usr/bin/python3", "-c", STATE)
    assert done.returncode == 0, done.stderr
    result: dict[str, object] = json.loads(done.stdout)
    return result


def test_the_command_has_no_rights_and_sees_only_itself(contain: Contain) -> None:
    state = seen(contain)
    assert state["uid"] != 0
    assert state["groups"] == [] or state["groups"] == [state["uid"]]
    assert state["uid_map"] == [str(state["uid"]), state["uid_map"][1], "1"]  # type: ignore[index]
    assert state["uid_map"][1] != "0"  # type: ignore[index]
    assert state["capabilities"] == ["0000000000000000"] * 5
    assert (state["no_new_privs"], state["seccomp"]) == ("1", "2")
    assert state["descriptors"] == [0, 1, 2]
    assert state["pids"] == [1, 2]
    assert state["home"] == []


def test_the_environment_of_the_caller_stays_outside(contain: Contain, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_SECRET", "of the caller")
    environment = seen(contain, "--env", "GIVEN=yes")["environment"]
    assert "A_SECRET" not in environment  # type: ignore[operator]
    assert environment["GIVEN"] == "yes"  # type: ignore[index]


@pytest.mark.parametrize(
    "path", ["/etc/shadow", "/root", "/home", "/var/log", "/etc/ssh", "/boot", "/sys/kernel", "/dev/sda", "/dev/mem"]
)
def test_what_was_not_named_is_not_there(contain: Contain, path: str) -> None:
    assert contain("--", "test", "!", "-e", path).returncode == 0


def test_usr_and_etc_cannot_be_written(contain: Contain) -> None:
    paths = "/usr/x /etc/x /x /bin/x /proc/sys/kernel/hostname /dev/x"
    script = f"for path in {paths}; do (: > $path) 2>/dev/null && exit 9; done"
    assert contain("--", "sh", "-c", f"{script}; exit 0").returncode == 0


def test_a_read_path_can_be_read_and_not_written(contain: Contain, tmp_path: Path) -> None:
    folder = tmp_path / "read me"
    folder.mkdir()
    (folder / "file").write_text("content")
    os.chmod(folder, 0o777)
    done = contain("--read", str(folder), "--", "sh", "-c", 'cat "$0/file"; echo x > "$0/new"', str(folder))
    assert done.stdout == "content"
    assert done.returncode != 0 and "Read-only file system" in done.stderr
    assert not (folder / "new").exists()


TRUNCATE = "import os, sys; os.truncate(sys.argv[1], 0)"


def test_what_may_only_be_read_is_not_truncated(contain: Contain, tmp_path: Path) -> None:
    """The owner and the mode would let it be; Landlock grants that right, so that it is the mount that refuses."""
    file = tmp_path / "folder/file"
    file.parent.mkdir()
    file.write_text("content")
    if os.geteuid() == 0:
        for path in (file.parent, file):
            os.chown(path, ORDINARY, ORDINARY)
    os.chmod(file, 0o666)
    done = contain("--read", str(file.parent), "--", "/usr/bin/python3", "-c", TRUNCATE, str(file))
    assert done.returncode == 1 and "Read-only file system" in done.stderr
    assert file.read_text() == "content"
    done = contain("--write", str(file.parent), "--", "/usr/bin/python3", "-c", TRUNCATE, str(file))
    assert (done.returncode, file.read_text()) == (0, ""), done.stderr


def test_a_written_path_keeps_what_was_written_for_its_owner(contain: Contain, tmp_path: Path) -> None:
    folder = tmp_path / "write me"
    folder.mkdir()
    if os.geteuid() == 0:
        os.chown(folder, ORDINARY, ORDINARY)
    done = contain("--write", str(folder), "--", "sh", "-c", 'echo kept > new; chmod u+s new; pwd', cwd=str(folder))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(folder)  # the caller's directory, as it can be seen
    assert (folder / "new").read_text() == "kept\n"
    assert (folder / "new").stat().st_uid == (ORDINARY if os.geteuid() == 0 else os.geteuid())


def test_a_file_and_a_path_below_another_can_be_named(contain: Contain, tmp_path: Path) -> None:
    outer, inner = tmp_path / "outer", tmp_path / "outer" / "inner"
    inner.mkdir(parents=True)
    single = tmp_path / "single"
    single.write_text("one file")
    if os.geteuid() == 0:
        os.chown(inner, ORDINARY, ORDINARY)
    script = f"cat {single}; : > {inner}/made; : > {outer}/refused"
    done = contain("--read", str(single), "--read", str(outer), "--write", str(inner), "--", "sh", "-c", script)
    assert done.stdout == "one file"
    assert sorted(path.name for path in outer.rglob("*")) == ["inner", "made"]


def test_home_and_tmp_are_its_own_and_vanish(contain: Contain) -> None:
    assert contain("--", "sh", "-c", "echo x > ~/left; echo x > /tmp/left; ls ~ /tmp").returncode == 0
    done = contain("--", "sh", "-c", "ls -A ~; ls -A /tmp | grep -v home")
    assert done.stdout == ""


def test_status_input_and_output_are_passed_on(contain: Contain) -> None:
    done = contain("--", "sh", "-c", "cat; echo out; echo err >&2; exit 7", data="in ")
    assert (done.returncode, done.stdout, done.stderr) == (7, "in out\n", "err\n")


def test_a_signal_gives_128_and_its_number(contain: Contain) -> None:
    assert contain("--", "sh", "-c", "kill -TERM $$").returncode == 143


def test_nothing_on_the_hosts_loopback_is_reached(contain: Contain) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        script = "import socket, sys; socket.create_connection(('127.0.0.1', int(sys.argv[1])), 2)"
        assert contain("--network", "host", "--", "/usr/bin/python3", "-c", script, port).returncode == 0
        assert contain("--", "/usr/bin/python3", "-c", script, port).returncode != 0


def test_a_tmpfs_has_its_size(contain: Contain) -> None:
    done = contain("--tmpfs", "1M", "--", "sh", "-c", "head -c 2000000 /dev/zero > /tmp/big")
    assert done.returncode != 0 and "No space left on device" in done.stderr


@pytest.mark.parametrize("option", [("--memory", "64M"), ("--cpus", "0.5")])
def test_a_limit_that_nothing_keeps_is_refused(contain: Contain, option: tuple[str, str]) -> None:
    if not contain.ordinary or layout().version == 2:  # type: ignore[attr-defined]
        pytest.skip("where control groups of version 2 are, they may have been delegated")
    done = contain(*option, "--", "true")
    assert done.returncode == 125
    assert done.stderr.startswith(f"error: `{option[0].removeprefix('--')}` cannot be limited here: ")


def test_a_memory_limit_ends_only_the_command(contain: Contain) -> None:
    script = "x = bytearray(200 << 20); x[::4096] = b'x' * len(x[::4096])"
    done = contain("--memory", "400M", "--", "/usr/bin/python3", "-c", script)
    if done.returncode == 125 and "cannot be limited here" in done.stderr:
        pytest.skip("an ordinary user needs delegated control groups: log in through systemd")
    assert done.returncode == 0
    done = contain("--memory", "64M", "--", "/usr/bin/python3", "-c", script)
    assert done.returncode == 137
    said = "the kernel killed 1 of the jail's processes for want of memory (its limit, or the host's)"
    assert done.stderr == f"note: {said}\n"


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ((), 2, "error: `stockade contain` needs a command\n"),
        (("--read", "/", "--", "true"), 125, "error: `/` cannot be opened up\n"),
        (("--read", "/proc/1", "--", "true"), 125, "error: `/proc/1` cannot be opened up\n"),
        (("--read", "", "--", "true"), 125, "error: a path to open up is empty\n"),
        (("true",), 2, "error: `stockade contain` does not take `true`\nhint: a command stands after `--`: "),
        (("env",), 2, "error: `stockade contain` does not take `env`\nhint: a command stands after `--`: "),
        (("--directory", "/usr/x", "--", "true"), 125, "error: launch step `directory` failed on `/usr/x` (ENOENT)"),
        (("--write", "/nonexistent", "--", "true"), 125, "error: `/nonexistent` does not exist\n"),
        (("--memory", "lots", "--", "true"), 2, "error: `--memory lots` is no size\n"),
        (("--memory", "0", "--", "true"), 2, "error: `--memory 0` is no size\n"),
        (("--memory", "-1", "--", "true"), 2, "error: `--memory -1` is no size\n"),
        (("--processes", "0", "--", "true"), 2, "error: `--processes 0` leaves nothing\n"),
        (("--cpus", "-2", "--", "true"), 2, "error: `--cpus -2.0` leaves nothing\n"),
        (("--", "/nonexistent"), 127, "error: cannot execute `/nonexistent`"),
        (("--", "/etc/passwd"), 126, "error: cannot execute `/etc/passwd`"),
        (("--network", "lan", "--", "true"), 2, "error: "),
    ],
)  # fmt: skip
def test_bad_input_is_told(contain: Contain, arguments: tuple[str, ...], status: int, message: str) -> None:
    done = contain(*arguments)
    assert done.returncode == status
    assert done.stderr.startswith(message)
    assert "Traceback" not in done.stderr


def test_root_writes_nowhere_as_root(contain: Contain, tmp_path: Path) -> None:
    if contain.ordinary:  # type: ignore[attr-defined]
        pytest.skip("about root")
    done = contain("--write", str(tmp_path), "--", "true")
    assert (done.returncode, done.stderr.splitlines()[0]) == (
        125, f"error: `{tmp_path}` belongs to root, and no process behind the walls is root of the host",
    )  # fmt: skip


def test_a_link_to_what_cannot_be_opened_up_is_refused(contain: Contain, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/etc")
    done = contain("--read", f"{tmp_path}/link", "--", "true")
    assert (done.returncode, done.stderr.splitlines()[0]) == (
        125, f"error: `{tmp_path}/link` leads to `/etc`, which cannot be opened up",
    )  # fmt: skip


def test_what_cannot_be_reached_is_not_said_to_be_missing(contain: Contain, tmp_path: Path) -> None:
    if not contain.ordinary or os.geteuid() != 0:  # type: ignore[attr-defined]
        pytest.skip("about a directory of somebody else's")
    (tmp_path / "closed/inner").mkdir(parents=True)
    os.chmod(tmp_path / "closed", 0o700)
    done = contain("--read", f"{tmp_path}/closed/inner", "--", "true")
    assert (done.returncode, done.stderr.splitlines()[0]) == (
        125, f"error: `{tmp_path}/closed/inner` cannot be opened up: permission denied",
    )  # fmt: skip


def test_a_script_without_a_first_line_is_told_as_such(contain: Contain, tmp_path: Path) -> None:
    (tmp_path / "script").write_text("echo x\n")
    os.chmod(tmp_path / "script", 0o755)
    done = contain("--read", str(tmp_path), "--", f"{tmp_path}/script")
    assert done.returncode == 126
    assert done.stderr.splitlines()[1].startswith("hint: a script needs a first line such as `#!/bin/sh`")


def test_a_link_is_followed_anew_each_time(contain: Contain, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
        (tmp_path / "current").unlink(missing_ok=True)
        (tmp_path / "current").symlink_to(name)
        assert contain("--read", f"{tmp_path}/current", "--", "cat", f"{tmp_path}/current/file").stdout == name


def test_what_is_copied_of_etc_is_what_stands_there_now(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("changes a file of /etc, in a mount namespace of its own")
    (tmp_path / "hosts").write_text("127.0.0.1 changed\n")
    command = f"{sys.executable} -m stockade contain -- cat /etc/hosts"
    script = f"mount --make-rprivate / && {command} && mount --bind {tmp_path}/hosts /etc/hosts && {command}"
    environment = {"PATH": os.environ["PATH"], "STOCKADE_HOME": f"{tmp_path}/home", "PYTHONPATH": str(SOURCE)}
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script],
        capture_output=True, text=True, timeout=60, env=environment, check=False,
    )  # fmt: skip
    assert done.stdout == Path("/etc/hosts").read_text() + "127.0.0.1 changed\n", done.stderr


@pytest.mark.parametrize("path", ["/bin/sh", "/etc/passwd", "/etc/hosts", "/etc/nsswitch.conf"])
def test_what_is_there_anyway_can_be_named(contain: Contain, path: str) -> None:
    done = contain("--read", path, "--", "cmp", path, path)
    assert (done.returncode, done.stderr) == (0, "")


def test_all_of_tmp_can_be_named(contain: Contain, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("content")
    done = contain("--read", "/tmp", "--", "sh", "-c", f"cat {tmp_path}/file; echo x > ~/x && cat ~/x")
    assert (done.stdout, done.stderr) == ("contentx\n", "")


def test_a_name_need_not_be_utf_8(contain: Contain, tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path) + b"/\xff\n"
    os.mkdir(folder)
    done = contain("--read", os.fsdecode(folder), "--", "test", "-d", os.fsdecode(folder))
    assert (done.returncode, done.stderr) == (0, "")


def test_relative_names_mean_the_callers(contain: Contain, tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner/file").write_text("content")
    done = contain("--read", "inner/file", "--", "cat", "inner/file", cwd=str(tmp_path))
    assert (done.stdout, done.stderr) == ("content", "")
    done = contain("--read", ".", "--directory", "inner", "--", "cat", "file", cwd=str(tmp_path))
    assert (done.stdout, done.stderr) == ("content", "")


def test_a_working_directory_that_was_removed_is_no_obstacle(contain: Contain, tmp_path: Path) -> None:
    arguments = [*contain.prefix, sys.executable, "-m", "stockade", "contain"]  # type: ignore[attr-defined]
    for rest, expected in (
        (["--", "echo", "fine"], ("fine\n", "")),
        (["--read", "x", "--", "true"], ("", "error: `x` is nowhere: the working directory has been removed")),
    ):
        gone = tmp_path / "gone"
        gone.mkdir()
        done = subprocess.run(
            ["sh", "-c", 'cd "$0" && rmdir "$0" && exec "$@"', str(gone), *arguments, *rest],
            capture_output=True, text=True, timeout=60, check=False, env=contain.environment,  # type: ignore[attr-defined]
        )  # fmt: skip
        assert (done.stdout, done.stderr.partition("\n")[0]) == expected


@pytest.mark.parametrize("account", ["daemon", "bin", "www-data"])
def test_a_home_among_the_hosts_programs_is_none(contain: Contain, tmp_path: Path, account: str) -> None:
    """Debian gives such accounts homes like /bin."""
    if contain.ordinary:  # type: ignore[attr-defined]
        pytest.skip("about what root's choice of a written path makes of the command")
    folder = tmp_path / "folder"
    folder.mkdir()
    shutil.chown(folder, account)
    done = contain("--write", str(folder), "--", "sh", "-c", "id -un; echo x > ~/x && cat ~/x && ls /bin/cat")
    assert (done.stdout, done.stderr) == (f"{account}\nx\n/bin/cat\n", "")


@pytest.mark.parametrize(
    ("maps", "expected"),
    [
        ("0 0 1", (125, "error: the caller is root of a user namespace that has no id for the command but root's own")),
        ("0 300000 65536", (0, "65534 65534")),
    ],
)
def test_root_of_a_user_namespace_that_lacks_most_ids(tmp_path: Path, maps: str, expected: tuple[int, str]) -> None:
    """As in a rootless container: without host ids from 1879048192 up."""
    if os.geteuid() != 0:
        pytest.skip("run as root: maps ids")
    (tmp_path / "home").mkdir()
    os.chown(tmp_path / "home", int(maps.split()[1]), int(maps.split()[1]))
    environment = {"PATH": os.environ["PATH"], "STOCKADE_HOME": f"{tmp_path}/home", "PYTHONPATH": str(SOURCE)}
    with subprocess.Popen(
        ["unshare", "--user", "sh", "-c", "echo made; read word"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdin is not None and holder.stdout is not None and holder.stdout.readline() == b"made\n"
        for kind in ("uid", "gid"):
            Path(f"/proc/{holder.pid}/{kind}_map").write_text(maps)
        done = subprocess.run(
            ["nsenter", "--user", f"--target={holder.pid}", "--setuid=0", "--setgid=0",
             "unshare", "--mount", "--pid", "--fork", "--mount-proc",
             sys.executable, "-m", "stockade", "contain", "--", "sh", "-c", "echo $(id -u) $(id -g)"],
            capture_output=True, text=True, timeout=60, env=environment, check=False,
        )  # fmt: skip
        holder.stdin.close()
    assert (done.returncode, (done.stdout or done.stderr).splitlines()[0]) == expected, done.stderr
