"""`stockade audit` and `stockade explain CODE`, as a user starts them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from stockade.assure import audit
from stockade.cli import audit_page

Run = Callable[..., CompletedProcess[str]]

PAGE = Path(__file__).resolve().parents[2] / "docs" / "audit.md"


def test_page_of_rules_is_current() -> None:
    assert PAGE.read_text(encoding="utf-8") == audit_page.page(), (
        "a rule has changed: run `python -m stockade.cli.audit_page > docs/audit.md`"
    )


def test_directory_without_findings_is_0_and_one_with_is_1(stockade: Run, tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir(mode=0o755)
    (root / "link").symlink_to("root")
    done = stockade("audit", "--root", str(root), "--json")
    report = json.loads(done.stdout)
    assert done.returncode == 1
    assert report["report"] == "audit"
    assert report["version"] == 1
    assert "LINK-DANGLING" in report["counts"]
    (root / "link").unlink()
    if not (set(report["counts"]) - {"LINK-DANGLING"}):  # an ordinary user's directory is not root's
        assert stockade("audit", "--root", str(root)).returncode == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "takes a jail or a directory"),
        (("x", "--root", "/y"), "takes a jail or a directory"),
        (("x", "--fix"), "a jail is made from its spec"),
        (("x", "--user", "y"), "`--user` is for `--root`"),
    ],
)
def test_malformed_command_line_is_2_with_a_hint(stockade: Run, words: tuple[str, ...], message: str) -> None:
    done = stockade("audit", *words)
    assert done.returncode == 2
    assert message in done.stderr
    assert "hint: " in done.stderr


def test_unknown_user_and_directory_are_one_clear_error(stockade: Run, tmp_path: Path) -> None:
    done = stockade("audit", "--root", str(tmp_path), "--user", "somebody")
    assert (done.returncode, done.stdout) == (1, "")
    assert "has no user `somebody`" in done.stderr
    assert "there is no directory" in stockade("audit", "--root", str(tmp_path / "absent")).stderr


@pytest.mark.parametrize("code", audit.rules())
def test_every_rule_says_what_it_is_about_and_what_to_do(code: str) -> None:
    rule = audit.rules()[code]
    assert rule.title
    assert rule.remedy
    assert rule.source
    assert audit_page.page().count(f"| `{code}` |") == 1


def test_explain_tells_a_rule_and_suggests_the_nearest(stockade: Run) -> None:
    done = stockade("explain", "SETUID")
    assert done.returncode == 0
    assert audit.rules()["SETUID"].remedy in done.stdout
    report = json.loads(stockade("explain", "SETUID", "--json").stdout)
    assert (report["report"], report["code"], report["severity"]) == ("rule", "SETUID", "high")
    done = stockade("explain", "SETUIT")
    assert done.returncode == 1
    assert "did you mean `SETUID`?" in done.stderr
