"""docs/seccomp.md says what the tables say."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from stockade.kernel import presets
from stockade.kernel.seccomp import compile_filter

PAGE = (Path(__file__).parents[2] / "docs/seccomp.md").read_text()


def rows(heading: str) -> list[list[str]]:
    """Cells of the table below a heading, without backticks."""
    section = PAGE.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")][2:]
    return [[cell.strip().replace("`", "") for cell in line.strip("|").split("|")] for line in lines]


def test_every_group_is_listed_with_its_errno_its_first_preset_and_its_reason() -> None:
    def origin(group: presets.Group) -> str:
        if group.never:
            return "never"
        return next((name for name, preset in presets.presets().items() if group.name in preset.groups), "by add")

    assert rows("Groups") == [
        [group.name, origin(group), group.errno, group.about.replace("`", "")] for group in presets.groups().values()
    ]


def test_every_preset_is_listed_with_its_netlink_protocols() -> None:
    listed = {row[0]: row[3] for row in rows("Presets")}
    protocols = {name: ", ".join(preset.netlink) or "none" for name, preset in presets.presets().items()}
    assert listed == protocols | {"none": "all"}


def test_every_rule_about_arguments_is_listed_with_its_errno() -> None:
    listed = {(call, row[2]) for row in rows("Arguments") for call in re.findall(r"\b(?!with)[a-z]{4,}", row[0])}
    assert listed == {(call, rule.errno) for rule in presets.rules() for call in rule.calls}


def test_the_example_is_a_policy() -> None:
    example = PAGE.partition("```toml\n")[2].partition("```")[0]
    policy = tomllib.loads(example)["policy"]["syscalls"]
    assert compile_filter(policy["preset"], policy["add"], policy["remove"], architecture="x86_64")
