"""What holds for every verb: where output goes, what errors look like, and exit statuses."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO

import pytest
from commandline import Run

from stockade.cli.parser import build, verbs

VERBS = sorted(verbs(build()))


def test_without_a_verb_the_help_goes_to_standard_error_and_the_status_is_2(stockade: Run) -> None:
    done = stockade()
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("usage: stockade ")


def test_help_goes_to_standard_output_and_lists_every_verb(stockade: Run) -> None:
    done = stockade("--help")
    assert done.returncode == 0
    assert done.stderr == ""
    listed = {line.split()[0] for line in done.stdout.splitlines() if line.startswith("    ") and line.split()}
    assert set(VERBS) <= listed


def test_version_is_that_of_the_package(stockade: Run) -> None:
    text = (Path(__file__).resolve().parents[2] / "pyproject.toml").read_text()
    version = next(line.split('"')[1] for line in text.splitlines() if line.startswith("version = "))
    done = stockade("--version")
    assert (done.returncode, done.stdout) == (0, f"stockade {version}\n")


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_every_verb_says_what_it_takes(stockade: Run, verb: str) -> None:
    done = stockade(verb, "--help")
    assert done.returncode == 0
    assert done.stdout.startswith(f"usage: stockade {verb} ")


@pytest.mark.parametrize(
    ("words", "message", "hint"),
    [
        (["biuld"], "unknown verb `biuld`, did you mean `build`?", "`stockade --help` lists the verbs"),
        (["zzzzzz"], "unknown verb `zzzzzz`", "`stockade --help` lists the verbs"),
        (["recipes", "--jsn"], "`stockade recipes` does not take `--jsn`", "did you mean `--json`?"),
        (["recipes", "x"], "`stockade recipes` does not take `x`", "`stockade recipes --help` shows what it takes"),
        (
            ["recipes", "--", "x"], "`stockade recipes` takes no command after `--`",
            "`stockade recipes --help` shows what it takes",
        ),
        (["--verbose"], "no verb is given", "`stockade --help` shows what it takes"),
        (["help"], "unknown verb `help`", "`stockade --help` lists the verbs"),
        (
            ["guest", "strat", "web"], "`stockade guest` has no verb `strat`, did you mean `start`?",
            "`stockade guest --help` lists the verbs",
        ),
        (["image", "zzzzzz"], "`stockade image` has no verb `zzzzzz`", "`stockade image --help` lists the verbs"),
        (
            ["contain", "--network", "egres", "--", "true"],
            "`--network` is `none`, `egress` or `host`, not `egres`, did you mean `egress`?",
            "`stockade contain --help` shows what it takes",
        ),
        (
            ["guest", "clone", "web", "--network", "nat"], "`--network` is `none`, not `nat`",
            "`stockade guest clone --help` shows what it takes",
        ),
        (
            ["completion", "fish"], "`SHELL` is `bash`, `zsh` or `tcsh`, not `fish`",
            "`stockade completion --help` shows what it takes",
        ),
        (
            ["rollback", "web", "last"], "`NUMBER` must be a whole number, not `last`",
            "`stockade rollback --help` shows what it takes",
        ),
        (
            ["contain", "--cpus", "two", "--", "true"], "`--cpus` must be a number, not `two`",
            "`stockade contain --help` shows what it takes",
        ),
        (
            ["run", "web", "ls", "/"], "`stockade run` does not take `ls`",
            "a command stands after `--`: `stockade run NAME [-- COMMAND ...]`",
        ),
        (
            ["contain", "ls"], "`stockade contain` does not take `ls`",
            "a command stands after `--`: `stockade contain -- COMMAND ...`",
        ),
        (
            ["contain"], "`stockade contain` needs a command",
            "put it after `--`: `stockade contain -- ls /`",
        ),
        (["new"], "the following arguments are required: NAME", "`stockade new --help` shows what it takes"),
    ],
)  # fmt: skip
def test_malformed_command_line_is_one_error_one_hint_and_status_2(
    stockade: Run, words: list[str], message: str, hint: str
) -> None:
    done = stockade(*words)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: {message}\nhint: {hint}\n"


def test_error_is_no_traceback_unless_asked_for_twice(stockade: Run) -> None:
    assert "Traceback" not in stockade("new", "X").stderr
    assert "Traceback" not in stockade("-v", "new", "X").stderr
    assert "Traceback" in stockade("-vv", "new", "X").stderr
    assert "Traceback" in stockade("new", "X", "-v", "-v").stderr


def test_options_after_the_two_dashes_are_the_childs(stockade: Run) -> None:
    assert "Traceback" not in stockade("new", "X", "--", "ls", "-vv").stderr


def test_error_of_the_system_is_a_sentence_with_the_file(stockade: Run, home: Path) -> None:
    home.mkdir()
    (home / "config").write_text("not a directory")
    done = stockade("new", "sshd")
    assert done.returncode == 1
    assert done.stderr == f"error: file exists: `{home}/config`\nhint: `-vv` shows where it happened\n"


def test_reader_that_goes_away_ends_the_program_without_a_word(command: list[str], environment: dict[str, str]) -> None:
    with subprocess.Popen(
        [*command, "completion", "bash"], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        child.stdout.close()
        assert child.wait(timeout=30) == 141
        assert child.stderr.read() == b""


def test_interrupt_ends_with_130_and_one_line(command: list[str], environment: dict[str, str], home: Path) -> None:
    fifo = home / "config" / "slow.toml"
    fifo.parent.mkdir(parents=True)
    os.mkfifo(fifo)
    # The tests may themselves run in the background, where a shell has the interrupt ignored.
    command = ["env", "--default-signal=INT", *command]
    with subprocess.Popen([*command, "build", str(fifo)], env=environment, stderr=subprocess.PIPE) as child:
        # It opens the spec and waits: once the other end is there, it is inside the verb.
        with opened_when_read(fifo):
            # One that comes right before read(2) begins is seen by Python when that ends: press the key again.
            end = time.monotonic() + 30
            while child.poll() is None and time.monotonic() < end:
                child.send_signal(signal.SIGINT)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(timeout=2)
            assert child.returncode == 130
        assert child.stderr is not None
        assert child.stderr.read().decode().splitlines()[-1] == "interrupted"


def test_an_interrupt_while_msgspec_is_imported_waits_until_it_is_whole(environment: dict[str, str]) -> None:
    """One that makes its initialisation miss the datetime module leaves a module that reads a null pointer."""
    code = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
def press(event, arguments):
    if event == "import" and arguments[0] == "msgspec._core":
        os.kill(os.getpid(), signal.SIGINT)
sys.addaudithook(press)
from stockade.cli import main
try:
    main(["recipes"])
except KeyboardInterrupt:
    print("msgspec.toml" in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=30, check=False
    )
    assert (done.stdout, done.stderr) == ("True\n", "")


def test_an_interrupt_that_the_caller_holds_back_stays_held_back(environment: dict[str, str]) -> None:
    code = """
import signal
signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT,))
from stockade.cli import main
main(["recipes", "--json"])
print(signal.pthread_sigmask(signal.SIG_BLOCK, ()) == {signal.SIGINT})
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=30, check=False
    )
    assert (done.stdout.splitlines()[-1:], done.stderr) == (["True"], "")


def opened_when_read(fifo: Path) -> IO[bytes]:
    """Open the writing end as soon as somebody has the reading one."""
    deadline = time.monotonic() + 20
    while True:
        try:
            return open(os.open(fifo, os.O_WRONLY | os.O_NONBLOCK), "wb")
        except OSError as error:
            if error.errno != errno.ENXIO or time.monotonic() > deadline:
                raise
            time.sleep(0.01)


@pytest.mark.parametrize("verb", [verb for verb, parser in verbs(build()).items() if "--json" in parser.options()])
def test_every_json_report_has_a_shipped_schema(verb: str) -> None:
    from stockade import schema

    known = {"explain": {"explain", "summary"}}.get(verb, {verb})
    assert known <= set(schema.DOCUMENTS)


def test_json_report_tells_its_name_and_version(stockade: Run) -> None:
    report = json.loads(stockade("recipes", "--json").stdout)
    assert (report["report"], report["version"]) == ("recipes", 1)


def test_work_on_a_terminal_is_announced_within_a_tenth_of_a_second_of_its_start(
    command: list[str], environment: dict[str, str]
) -> None:
    """Compared with the time to an error message, which is the interpreter's and the parser's start."""

    def first_output(*words: str) -> tuple[float, bytes]:
        parent, child = pty.openpty()
        started = time.monotonic()
        with subprocess.Popen(
            [*command, *words],
            env={**environment, "TERM": "xterm"},
            stdin=subprocess.DEVNULL,
            stdout=child,
            stderr=child,
        ) as process:
            os.close(child)
            assert select.select([parent], [], [], 30)[0]
            seconds = time.monotonic() - started
            said = os.read(parent, 4096)
            process.send_signal(signal.SIGINT)
            try:
                while os.read(parent, 4096):
                    pass
            except OSError:
                os.close(parent)
            process.wait(timeout=30)
        return seconds, said

    base = min(first_output("zzzz")[0] for _ in range(3))
    answers = [first_output("build", "basic") for _ in range(3)]
    assert min(seconds for seconds, _ in answers) - base < 0.1
    assert b"reading" in answers[0][1]
