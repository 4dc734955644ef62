"""The reference page is what the program says of itself."""

from __future__ import annotations

from pathlib import Path

from stockade.cli.parser import build, verbs
from stockade.cli.reference import page

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_reference_is_current() -> None:
    assert (DOCS / "reference.md").read_text(encoding="utf-8") == page(), (
        "a verb or a record has changed: run `python -m stockade.cli.reference > docs/reference.md`"
    )


def test_every_verb_and_every_option_is_documented() -> None:
    text = (DOCS / "reference.md").read_text(encoding="utf-8")
    for name, parser in verbs(build()).items():
        section = text.partition(f"### stockade {name}\n")[2].partition("\n### ")[0]
        assert section
        for option in parser.options():
            if option not in ("--help", "--verbose"):
                assert f"`{option}" in section


def test_option_that_takes_one_of_a_few_words_is_shown_with_them() -> None:
    assert "- `--network {none,egress,host}`: " in page()
    assert "None]" not in page()
