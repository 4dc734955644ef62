"""One command line imports what its verb needs; the table of verbs says what the modules register."""

from __future__ import annotations

import importlib

import pytest

from stockade.cli.parser import FAMILIES, Parser, build, verbs


@pytest.mark.parametrize("family", FAMILIES)
def test_table_of_verbs_is_what_a_family_registers(family: str) -> None:
    parser = Parser(prog="test")
    subparsers = parser.add_subparsers(parser_class=Parser)
    importlib.import_module(f"stockade.cli.{family}").register(subparsers)
    assert tuple(subparsers.choices) == FAMILIES[family]


@pytest.mark.parametrize("words", [["build", "sshd"], ["-v", "build", "sshd"], ["build", "--help"]])
def test_parser_of_a_command_line_has_its_verb_and_few_others(words: list[str]) -> None:
    assert set(verbs(build(words))) == set(FAMILIES["building"])


@pytest.mark.parametrize("words", [[], ["--help"], ["biuld", "sshd"]])
def test_parser_of_a_command_line_without_a_known_verb_has_them_all(words: list[str]) -> None:
    assert set(verbs(build(words))) == {verb for family in FAMILIES.values() for verb in family}
