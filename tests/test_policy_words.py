"""What the lists of system calls in a spec may hold, and what is said of everything else."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from stockade.kernel import presets
from stockade.records.spec import Policy, Service, Spec, Syscalls
from stockade.specfile.problem import Problem
from stockade.specfile.rules import problems


def found(*, add: Sequence[str] = (), remove: Sequence[str] = (), preset: str = "default") -> list[Problem]:
    calls = Syscalls(preset=preset, add=tuple(add), remove=tuple(remove))  # type: ignore[arg-type]
    return list(problems(Spec(name="a", service=Service(command=("a",)), policy=Policy(syscalls=calls))))


def test_every_word_that_a_filter_can_be_made_of_is_a_word_of_a_spec() -> None:
    for word in presets.words(add=True):
        assert found(add=[word]) == [], word
    for word in presets.words(add=False):
        assert found(remove=[word]) == [], word


NEVER = [group for group in presets.groups().values() if group.never]


@pytest.mark.parametrize("group", NEVER, ids=lambda group: group.name)
def test_what_no_policy_can_hold_is_refused_with_its_reason(group: presets.Group) -> None:
    for word in (f"@{group.name}", group.calls[0]):
        [problem] = found(add=[word])
        assert problem.place == ("policy", "syscalls", "add")
        assert problem.message == f"`policy.syscalls.add` cannot hold `{word}`: {group.about}"
        assert problem.hint


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("settimofday", "unknown system call `settimofday` in `[policy]`, did you mean `settimeofday`?"),
        ("@ipcc", "unknown group of system calls `@ipcc` in `[policy]`, did you mean `@ipc`?"),
        ("socket:paket", "unknown socket family `socket:paket` in `[policy]`, did you mean `socket:packet`?"),
        ("netlink:rout", "unknown netlink protocol `netlink:rout` in `[policy]`, did you mean `netlink:route`?"),
        ("socket:vsock", "unknown socket family `socket:vsock` in `[policy]`"),
    ],
)
def test_a_word_that_does_not_exist_is_refused_with_the_nearest_one(word: str, message: str) -> None:
    [problem] = found(add=[word])
    assert problem.message.startswith(message)


def test_what_nothing_starts_without_cannot_be_removed() -> None:
    [problem] = found(remove=["execve"])
    assert problem.message == "`policy.syscalls.remove` cannot hold `execve`: without it no service can be started"


def test_a_word_is_not_both_added_and_removed() -> None:
    [problem] = found(add=["@numa"], remove=["@numa"])
    assert problem.message == "group of system calls `@numa` is both added and removed in `[policy]`"


def test_lists_beside_the_preset_that_filters_nothing_are_refused() -> None:
    [problem] = found(preset="none", add=["settimeofday"])
    assert "the preset `none` allows every system call" in problem.message
