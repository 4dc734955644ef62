from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import pytest

from stockade import observe
from stockade.observe.exercise import client, perform, substitute
from stockade.records.exercise import Outcome
from stockade.records.spec import Exercise


def always(outcome: Outcome) -> Callable[[Sequence[str], bytes, float], Outcome]:
    return lambda command, text, timeout_s: outcome


@pytest.mark.parametrize(
    ("exercise", "outcome", "reason"),
    [
        (Exercise(command=("x",)), Outcome(status=0), ""),
        (Exercise(command=("x",)), Outcome(status=1), "it ended with status 1, not 0"),
        (Exercise(command=("x",), status=7), Outcome(status=7), ""),
        (Exercise(command=("x",), status=7), Outcome(status=0), "it ended with status 0, not 7"),
        (Exercise(command=("x",), refused=True), Outcome(status=255), ""),
        (Exercise(command=("x",), refused=True), Outcome(status=0), "it succeeded, and should have been refused"),
        (Exercise(command=("x",), refused=True, timeout_s=3), Outcome(status=None), "it did not end within 3 s"),
        (Exercise(command=("x",), stdout="^b$"), Outcome(status=0, stdout=b"a\nb\n"), ""),
        (Exercise(command=("x",), stdout="c"), Outcome(status=0, stdout=b"a\nb\n"), "its output does not match `c`"),
        (Exercise(command=("x",), stdout="c"), Outcome(status=0, stderr=b"c"), "its output does not match `c`"),
        (Exercise(command=("x",), timeout_s=0.5), Outcome(status=None), "it did not end within 0.5 s"),
    ],
)
def test_an_exercise_is_judged_by_status_output_and_refusal(exercise: Exercise, outcome: Outcome, reason: str) -> None:
    result = perform(exercise, always(outcome), {})
    assert result.reason == reason
    assert result.passed is (reason == "")


def test_secrets_are_filled_in_and_a_shells_own_variables_stay() -> None:
    given = {"secret:pass": "hunter2", "secret-file:key": "/run/k"}
    text = "${secret:pass} ${secret-file:key} ${HOME} ${x:-y} $STOCKADE_ROOT ${secret:unknown}"
    assert substitute(text, given) == "hunter2 /run/k ${HOME} ${x:-y} $STOCKADE_ROOT ${secret:unknown}"


def test_command_and_input_are_substituted() -> None:
    seen = []

    def run(command: Sequence[str], text: bytes, timeout_s: float) -> Outcome:
        seen.append((command, text, timeout_s))
        return Outcome(status=0)

    exercise = Exercise(command=("login", "${secret:p}"), input="${secret:p}\n", timeout_s=4)
    perform(exercise, run, {"secret:p": "s3"})
    assert seen == [(["login", "s3"], b"s3\n", 4)]


def test_input_reaches_a_client_and_both_outputs_come_back(view: observe.View) -> None:
    outcome = client(view)(["sh", "-c", "cat; echo wrong >&2; exit 3"], b"text\0", 10)
    assert outcome == Outcome(status=3, stdout=b"text\0", stderr=b"wrong\n")


def test_a_client_that_hangs_is_killed_with_its_whole_group(view: observe.View) -> None:
    began = time.monotonic()
    outcome = client(view)(["sh", "-c", "echo first; sleep 100 | sleep 100"], b"", 0.5)
    assert outcome.status is None and outcome.stdout == b"first\n"
    assert time.monotonic() - began < 5
    deadline = time.monotonic() + 5
    while len(view.processes()) > 1 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert [found["pid"] for found in view.processes()] == [1]


def test_a_client_ended_by_a_signal_has_the_shells_status(view: observe.View) -> None:
    assert client(view)(["sh", "-c", "kill -TERM $$"], b"", 10).status == 143


def test_a_flood_of_output_is_cut_and_does_not_block(view: observe.View) -> None:
    outcome = client(view)(["sh", "-c", "head -c 5000000 /dev/zero"], b"", 20)
    assert outcome.status == 0 and len(outcome.stdout) == 1 << 20


def test_input_that_nobody_reads_does_not_block(view: observe.View) -> None:
    assert client(view)(["true"], b"x" * 1_000_000, 10).status == 0


def test_what_a_client_leaves_in_the_background_keeps_nobody_waiting(view: observe.View) -> None:
    began = time.monotonic()
    assert client(view)(["sh", "-c", "sleep 60 & echo started"], b"", 30).stdout == b"started\n"
    assert time.monotonic() - began < 5


def test_a_client_has_a_clean_environment_with_the_place_of_the_services_root(view: observe.View) -> None:
    lines = client(view)(["env"], b"", 10).stdout.decode().splitlines()
    assert "STOCKADE_ROOT=/run/stockade/root" in lines
    assert {line.partition("=")[0] for line in lines} == {"PATH", "LANG", "HOME", "STOCKADE_ROOT"}
    assert client(view)(["cat", "/run/stockade/root/etc/hostname"], b"", 10).status == 0
