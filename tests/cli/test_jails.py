"""The life of a jail by the command line: build, run, start, look, stop, remove. With real jails."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from clihome import Home
from commandline import Run

from stockade.doctor import examine
from stockade.records import report as reports

SPEC = """
name = "box"

[service]
command = ["/bin/sh", "-c", "echo started; exec sleep 1000"]
ready = { log = "started" }

[files]
programs = ["sh", "sleep", "ls", "id"]
content = { "/etc/motd" = "hello\\n" }
modes = { "/etc/motd" = "0444" }

[secrets]
pass = { kind = "password", client = true }
"""

pytestmark = pytest.mark.skipif(
    bool(examine().missing),
    reason=f"this host lacks {', '.join(feature.name for feature in examine().missing)}: see `stockade doctor`",
)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    home = Home(tmp_path_factory.mktemp("home"))
    home.write("box", SPEC)
    first = home.good("build", "box", "--json")
    (home.directory / "first.json").write_text(first.stdout)
    yield home
    home.run("stop", "box", "--timeout", "0")
    home.run("rm", "--force", "box")


@pytest.fixture
def started(home: Home) -> Iterator[Home]:
    home.good("start", "box")
    yield home
    home.run("stop", "box", "--timeout", "0")


def test_build_reports_rounds_stages_size_and_where_the_new_secret_is_kept(home: Home) -> None:
    built = msgspec.json.decode((home.directory / "first.json").read_bytes(), type=reports.BuildReport)
    assert (built.name, built.generation) == ("box", 1)
    assert built.rounds[-1].added == ()
    assert {"observe", "resolve", "build", "verify"} <= set(built.stages)
    rootfs = home.directory / "state/jails/box/generations/0001/rootfs"
    files = [path for path in rootfs.rglob("*") if path.is_file() and not path.is_symlink()]
    assert built.files == len(files)
    assert built.bytes == sum(path.stat().st_size for path in files)
    [secret] = built.new_secrets
    assert Path(secret.kept).read_text().strip() == secret.value


def test_secret_is_shown_once_and_a_second_build_is_the_next_generation(home: Home) -> None:
    value = json.loads((home.directory / "first.json").read_text())["new_secrets"][0]["value"]
    done = home.good("build", "box")
    assert value not in done.stdout + done.stderr
    assert "box: generation 2, " in done.stdout
    assert done.stderr.splitlines()[-1] == "next: `stockade start box`; `stockade explain box` shows what is in it"
    status = home.good("rollback", "box")
    assert status.stdout == "box: generation 1 is current\n"
    report = msgspec.json.decode(home.good("status", "box", "--json").stdout, type=reports.StatusReport)
    assert [(line.number, line.current) for line in report.generations] == [(1, True), (2, False)]
    assert not report.spec_changed


def test_status_tells_when_the_spec_is_no_longer_what_was_built(home: Home) -> None:
    path = home.directory / "config" / "box.toml"
    path.write_text(SPEC.replace("hello", "good day"))
    try:
        assert "changed since the build" in home.good("status", "box").stdout
    finally:
        path.write_text(SPEC)


@pytest.mark.parametrize("options", [[], ["--no-terminal"]], ids=["straight", "parsed"])
@pytest.mark.parametrize(
    ("command", "status"),
    [
        (["sh", "-c", "exit 0"], 0),
        (["/bin/sh", "-c", "exit 7"], 7),
        (["sh", "-c", "kill -9 $$"], 137),
        (["sh", "-c", "kill -TERM $$"], 143),
        (["no-such-program"], 127),
        (["/no/such/program"], 127),
        (["/etc/motd"], 126),
    ],
)
def test_run_passes_the_status_of_the_command_on(
    home: Home, options: list[str], command: list[str], status: int
) -> None:
    done = home.run("run", "box", *options, "--", *command)
    assert done.returncode == status
    if status in (126, 127):
        assert done.stderr.startswith(f"error: cannot execute `{command[0]}`: ")
        assert "\nhint: " in done.stderr
    else:
        assert done.stderr == ""


@pytest.mark.parametrize("words", [["run", "bix", "--", "true"], ["run", "bix"], ["exec", "bix", "--", "true"]])
def test_failure_of_our_own_is_125_with_the_nearest_name(home: Home, words: list[str]) -> None:
    done = home.run(*words)
    assert (done.returncode, done.stdout) == (125, "")
    assert done.stderr.startswith("error: there is no jail `bix`, did you mean `box`?\nhint: ")


def test_run_passes_input_and_output_through_untouched(home: Home) -> None:
    data = bytes(range(256)) * 100
    done = subprocess.run(
        [*home.command, "run", "box", "--", "sh", "-c", "while read -r line; do echo $line; done; ls /etc/motd"],
        env=home.environment, input=b"one\ntwo\n", capture_output=True, timeout=60, check=True,
    )  # fmt: skip
    assert done.stdout == b"one\ntwo\n/etc/motd\n"
    assert data


def test_interrupt_reaches_the_command_that_runs_in_the_foreground(home: Home) -> None:
    script = "trap 'echo caught; exit 3' INT; echo ready; while :; do sleep 0.05; done"
    with subprocess.Popen(
        [*home.command, "run", "box", "--", "sh", "-c", script], env=home.environment, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        child.send_signal(signal.SIGINT)
        assert child.stdout.readline() == "caught\n"
        assert child.wait(timeout=30) == 3


def test_started_jail_is_listed_and_its_pid_is_a_process_of_its_own_namespace(started: Home) -> None:
    report = msgspec.json.decode(started.good("ps", "--json").stdout, type=reports.PsReport)
    [jail] = report.jails
    assert (jail.name, jail.instance, jail.generation) == ("box", "box", 1)
    assert os.readlink(f"/proc/{jail.pid}/ns/pid") != os.readlink("/proc/self/ns/pid")
    assert jail.processes >= 2
    [listed] = msgspec.json.decode(started.good("list", "--json").stdout, type=reports.ListReport).jails
    assert (listed.name, listed.running) == ("box", True)
    assert started.good("ps").stdout.splitlines()[1].split()[:2] == ["box", str(jail.pid)]


def test_second_start_and_removal_of_a_running_jail_are_refused_with_a_cure(started: Home) -> None:
    done = started.run("start", "box")
    assert done.returncode == 1
    assert "already running" in done.stderr or "runs already" in done.stderr
    assert "\nhint: " in done.stderr
    done = started.run("rm", "--force", "box")
    assert done.stderr == "error: jail `box` is running\nhint: `stockade stop box` first\n"


def test_exec_runs_beside_the_service_and_sees_the_jail_only(started: Home) -> None:
    done = started.run("exec", "box", "--", "sh", "-c", "ls /proc/1 >/dev/null 2>&1; ls /; exit 5")
    assert done.returncode == 5
    assert "etc" in done.stdout.split()
    assert not {"boot", "root", "home", "opt"} & set(done.stdout.split())


def test_logs_give_what_the_service_wrote(started: Home) -> None:
    assert started.good("logs", "box").stdout.splitlines()[-1] == "started"


def test_followed_log_ends_with_the_jail(started: Home) -> None:
    with subprocess.Popen(
        [*started.command, "logs", "--follow", "box"], env=started.environment, stdout=subprocess.PIPE, text=True
    ) as follower:
        assert follower.stdout is not None
        assert "started" in follower.stdout.readline()
        started.good("stop", "box")
        assert follower.wait(timeout=30) == 0


def test_stop_tells_the_status_and_leaves_nothing_running(home: Home) -> None:
    home.good("start", "box")
    [jail] = json.loads(home.good("ps", "--json").stdout)["jails"]
    done = home.good("stop", "box")
    assert done.stderr.startswith("box: stopped")
    assert not Path(f"/proc/{jail['pid']}").exists()
    assert json.loads(home.good("ps", "--json").stdout)["jails"] == []
    again = home.run("stop", "box")
    assert again.returncode == 1
    assert again.stderr.startswith("error: jail `box` is not running\nhint: ")


def test_one_of_two_commands_in_a_jail_is_entered_and_stopped_by_the_name_that_ps_shows(home: Home) -> None:
    words = [*home.command, "run", "box", "--", "sh", "-c", "echo started; exec sleep 100"]
    commands = [
        subprocess.Popen(words, env=home.environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
        for _ in range(2)
    ]  # fmt: skip
    try:
        for command in commands:
            assert command.stdout is not None
            assert command.stdout.readline() == b"started\n"
        names = [jail["instance"] for jail in json.loads(home.good("ps", "--json").stdout)["jails"]]
        unclear = home.run("stop", "box")
        assert (unclear.returncode, all(f"`{name}`" in unclear.stderr for name in names)) == (1, True)
        assert home.good("exec", names[0], "--", "sh", "-c", "echo hi").stdout == "hi\n"
        for name in names:
            assert home.good("stop", name).stderr.startswith(f"{name}: stopped")
        assert [command.wait(timeout=30) for command in commands] == [128 + signal.SIGTERM] * 2
    finally:
        for command in commands:
            command.kill()
            command.communicate(timeout=30)


def test_source_of_a_mount_that_is_gone_or_another_kind_is_named_and_only_run_ends_with_125(home: Home) -> None:
    source = home.directory / "shown"
    source.mkdir()
    (home.directory / "config" / "glass.toml").write_text(
        'name = "glass"\n[service]\ncommand = ["/bin/sh"]\n'
        f'[[mounts]]\nsource = "{source}"\ntarget = "/mnt/shown"\n'
    )
    home.good("build", "glass", "--no-observe", "--no-verify")
    source.rmdir()
    for cause, step in (("(ENOENT): it does not exist", f"`source` failed on `{source}`"),
                        ("(EINVAL): only a directory", "`mount` failed on `/mnt/shown`")):  # fmt: skip
        for verb, status in (("start", 1), ("run", 125)):
            done = home.run(verb, "glass")
            assert done.returncode == status
            assert done.stderr.startswith(f"error: launch step {step} {cause}")
            assert "\nhint: " in done.stderr
        source.touch()
    source.unlink()
    home.good("rm", "--force", "glass")


@pytest.mark.parametrize(("file", "text"), [("lock.json", None), ("lock.json", "{"), ("spec.json", "{")])
def test_jail_whose_generation_is_damaged_can_be_built_anew(home: Home, file: str, text: str | None) -> None:
    (home.directory / "config" / "hurt.toml").write_text(
        'name = "hurt"\n[service]\ncommand = ["/bin/sh"]\n[secrets]\nword = { kind = "password", client = true }\n'
    )
    build = ("build", "hurt", "--no-observe", "--no-verify")
    home.good(*build)
    damaged = home.directory / "state/jails/hurt/generations/0001" / file
    if text is None:
        damaged.unlink()
    else:
        damaged.write_text(text)
    home.good(*build)
    done = home.good("status", "hurt")
    assert "\n2 *  " in done.stdout
    assert done.stderr.startswith("generation 1 is of no use: ") == (file == "lock.json")
    home.good("rm", "--force", "hurt")


def test_service_that_ends_at_once_is_a_failed_start_with_its_last_words(home: Home) -> None:
    (home.directory / "config" / "brief.toml").write_text(
        'name = "brief"\n[service]\ncommand = ["/bin/sh", "-c", "echo cannot go on; exit 3"]\n'
        '[files]\nprograms = ["sh"]\n'
    )
    home.good("build", "brief", "--no-observe", "--no-verify")
    done = home.run("start", "brief")
    assert (done.returncode, done.stdout) == (1, "")
    assert "error: jail `brief` ended right after its start, with status 3\n" in done.stderr
    assert "cannot go on" in done.stderr
    home.good("rm", "--force", "brief")


def test_explain_gives_the_chain_from_a_library_to_what_asked_for_it(home: Home) -> None:
    report = msgspec.json.decode(
        home.good("explain", "box", "/lib/x86_64-linux-gnu/libc.so.6", "--json").stdout
        if os.uname().machine == "x86_64"
        else home.good("explain", "box", "/lib/aarch64-linux-gnu/libc.so.6", "--json").stdout,
        type=reports.ExplainReport,
    )
    assert report.package.startswith("libc6 ")
    assert report.chain[0].path.endswith("/libc.so.6")
    assert report.chain


def test_explain_a_path_that_is_not_there_is_an_error_that_says_so(home: Home) -> None:
    done = home.run("explain", "box", "/usr/bin/gcc")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: `/usr/bin/gcc` is not in the jail\nhint: ")


def test_summary_counts_what_is_there(home: Home) -> None:
    report = msgspec.json.decode(home.good("explain", "box", "--json").stdout, type=reports.SummaryReport)
    rootfs = home.directory / "state/jails/box/generations/0001/rootfs"
    found = list(rootfs.rglob("*"))
    assert report.symlinks == sum(path.is_symlink() for path in found)
    assert report.files == sum(path.is_file() and not path.is_symlink() for path in found)
    assert report.setuid == ()
    assert "root" in report.accounts
    assert home.good("explain", "box").stdout.startswith("box, generation 1\n")


def test_removal_needs_a_yes(home: Home) -> None:
    done = home.run("rm", "box")
    assert done.returncode == 2
    assert done.stderr == (
        "error: a yes is needed to remove `box` with secrets and volumes, and there is no terminal to ask on\n"
        "hint: add `--force`\n"
    )
    assert (home.directory / "state/jails/box").is_dir()


@pytest.mark.parametrize(("answer", "status"), [(b"n\n", 1), (b"\n", 1), (b"y\n", 0)])
def test_removal_asks_on_a_terminal(home: Home, answer: bytes, status: int) -> None:
    (home.directory / "state/jails/doomed/generations/0001").mkdir(parents=True, exist_ok=True)
    parent, child = pty.openpty()
    with subprocess.Popen(
        [*home.command, "rm", "doomed"], env=home.environment, stdin=child, stdout=child, stderr=child
    ) as process:
        os.close(child)
        asked = b""
        while b"[y/N]" not in asked:
            asked += os.read(parent, 4096)
        os.write(parent, answer)
        assert process.wait(timeout=30) == status
    os.close(parent)
    assert (home.directory / "state/jails/doomed").exists() == (status != 0)


def test_unknown_jail_is_told_with_the_verb_that_makes_it(stockade: Run) -> None:
    done = stockade("status", "sshd")
    assert done.returncode == 1
    assert done.stderr == "error: there is no jail `sshd`\nhint: `stockade build sshd` makes it\n"


def test_build_of_what_works_nowhere_says_so_and_leaves_no_jail_to_start(stockade: Run, tmp_path: Path) -> None:
    (tmp_path / "broken.toml").write_text(
        'name = "broken"\n[service]\ncommand = ["/bin/sh", "-c", "echo no configuration >&2; exit 3"]\n'
        "[service.ready]\ntcp = 12345\ntimeout_s = 2\n"
    )
    began = time.monotonic()
    done = stockade("build", "broken.toml")
    assert done.returncode == 1
    assert time.monotonic() - began < 30
    assert "no configuration" in done.stderr
    assert stockade("start", "broken").returncode == 1


@pytest.mark.parametrize("user", ["root", "nobody", "4321"])
def test_service_finds_the_same_environment_outside_and_inside(home: Home, user: str) -> None:
    path = home.directory / "config" / "variables.toml"
    text = f'name = "variables"\n[service]\nuser = "{user}"\nenvironment = {{ GIVEN = "so" }}\n'
    command = 'command = ["/bin/sh", "-c", "env; exit 3"]\n'
    path.write_text(f"{text}{command}ready = {{ tcp = 9 }}\n")
    failed = home.run("build", "variables")
    assert failed.returncode == 1
    outside = {line.removeprefix("  | ") for line in failed.stderr.splitlines() if line.startswith("  | ")}
    path.write_text(text + command)
    done = home.good("build", "variables")
    assert done.stderr.splitlines()[-1].startswith("next: `stockade run variables`; ")
    inside = set(home.run("run", "variables").stdout.splitlines())
    assert {"GIVEN=so", f"USER={user}"} <= inside or user.isdecimal()
    assert outside == inside
    home.good("rm", "--force", "variables")
