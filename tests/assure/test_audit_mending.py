"""`--fix` takes rights away in a directory, and changes nothing else anywhere."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from audit_trees import PLAIN, Tree

from stockade.assure import audit

SOURCE = Path(__file__).resolve().parents[2] / "src"
Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    if os.geteuid() != 0:
        pytest.skip("needs root, to give files other owners")
    return Tree.new(tmp_path)


@pytest.fixture
def stockade(tmp_path: Path) -> Run:
    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "stockade", *words],
            env={"PYTHONPATH": str(SOURCE), "PATH": "/usr/bin:/bin", "STOCKADE_HOME": str(tmp_path / "home")},
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip

    return run


def mode(tree: Tree, path: str) -> int:
    return stat.S_IMODE(tree.path(path).lstat().st_mode)


def mended(tree: Tree) -> dict[str, str]:
    """Mend everything; why each path could not be, "" where it was."""
    _, proposals = audit.examine(tree.subject())
    return {change.path: change.failed for change in audit.mend(tree.root, proposals)}


def test_rights_are_taken_away_and_a_second_audit_finds_none(tree: Tree) -> None:
    tree.write("/usr/bin/su", "x", mode=0o4755)
    tree.write("/usr/bin/wall", "x", mode=0o2775)
    tree.write("/etc/x", "x", mode=0o666)
    tree.directory("/srv", mode=0o777)
    tree.write("/etc/shadow", "root:*:::::::\n", mode=0o644)
    tree.write("/usr/bin/ping", "x", mode=0o555)
    value = (0x02000001).to_bytes(4, "little") + (1 << 13).to_bytes(4, "little") + b"\0" * 12
    os.setxattr(tree.path("/usr/bin/ping"), "security.capability", value)
    assert set(mended(tree).values()) == {""}
    assert tree.audit().counts == {"NETWORK-TOOL": 1, "PRIVILEGE-TOOL": 1}
    assert [mode(tree, path) for path in ("/usr/bin/su", "/usr/bin/wall", "/etc/x", "/srv", "/etc/shadow")] == [
        0o755, 0o775, 0o644, 0o755, 0o640,
    ]  # fmt: skip
    assert tree.path("/etc/x").read_text() == "x"


def test_file_with_a_name_outside_of_the_tree_is_left_alone(tree: Tree, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_text("x")
    os.link(outside, tree.path("/usr/bin/su"))
    os.chmod(outside, 0o4777)
    assert mended(tree) == {}
    assert stat.S_IMODE(outside.stat().st_mode) == 0o4777


def test_file_that_is_another_one_by_now_is_left_alone(tree: Tree, tmp_path: Path) -> None:
    for path in ("/usr/bin/one", "/usr/bin/two"):
        tree.write(path, "x", mode=0o4755)
    outside = tmp_path / "outside"
    outside.write_text("x")
    outside.chmod(0o4755)
    _, proposals = audit.examine(tree.subject())
    tree.path("/usr/bin/one").unlink()
    tree.link("/usr/bin/one", "../../../outside")
    tree.path("/usr/bin/two").rename(tree.path("/usr/bin/old"))
    tree.write("/usr/bin/two", "x", mode=0o4755)
    result = {change.path: change.failed for change in audit.mend(tree.root, proposals)}
    assert result == dict.fromkeys(("/usr/bin/one", "/usr/bin/two"), "another file is there now")
    assert stat.S_IMODE(outside.stat().st_mode) == 0o4755


def test_accounts_go_only_when_the_user_of_the_service_is_named(tree: Tree) -> None:
    passwd = PLAIN + "games:x:5:60::/:/usr/sbin/nologin\nweb:x:33:33::/:/usr/sbin/nologin\n"
    group = "root:x:0:\ngames:x:60:\nweb:x:33:games,web\naudio:x:29:\n"
    tree.write("/etc/passwd", passwd, mode=0o644)
    tree.write("/etc/group", group)
    tree.write("/etc/shadow", "root:*:::::::\ngames:*:::::::\nweb:*:::::::\n", mode=0o400)
    assert mended(tree) == {}
    tree.user = audit.find_user(tree.root, "web")
    assert tree.user == 33
    assert set(mended(tree).values()) == {""}
    assert tree.path("/etc/passwd").read_text() == PLAIN + "web:x:33:33::/:/usr/sbin/nologin\n"
    assert tree.path("/etc/group").read_text() == "root:x:0:\nweb:x:33:web\n"
    assert tree.path("/etc/shadow").read_text() == "root:*:::::::\nweb:*:::::::\n"
    assert (mode(tree, "/etc/passwd"), mode(tree, "/etc/shadow")) == (0o644, 0o400)
    assert sorted(os.listdir(tree.path("/etc"))) == ["group", "passwd", "shadow"]
    assert tree.audit().counts == {}


def test_fix_lists_changes_and_makes_none_without_a_yes(tree: Tree, stockade: Run) -> None:
    tree.write("/usr/bin/x", "x", mode=0o4755)
    done = stockade("audit", "--root", str(tree.root), "--fix")
    assert done.returncode == 2
    assert "would mend SETUID: /usr/bin/x: take the mode bits 4000 away" in done.stderr
    assert "hint: add `--force`" in done.stderr
    assert mode(tree, "/usr/bin/x") == 0o4755


def test_fix_with_force_mends_and_reports_what_is_left(tree: Tree, stockade: Run) -> None:
    tree.write("/usr/bin/x", "x", mode=0o4755)
    done = stockade("audit", "--root", str(tree.root), "--fix", "--force", "--json")
    report = json.loads(done.stdout)
    assert (done.returncode, report["counts"]) == (0, {})
    assert [(change["path"], change["done"]) for change in report["mended"]] == [("/usr/bin/x", True)]
    assert mode(tree, "/usr/bin/x") == 0o755


def test_what_a_baseline_accepts_is_not_mended(tree: Tree, stockade: Run, tmp_path: Path) -> None:
    tree.write("/usr/bin/x", "x", mode=0o4755)
    baseline = tmp_path / "baseline.toml"
    baseline.write_text('[[accept]]\ncode = "SETUID"\npath = "/usr/bin/x"\nreason = "the service is a test"\n')
    done = stockade("audit", "--root", str(tree.root), "--baseline", str(baseline), "--fix", "--force")
    assert done.returncode == 0
    assert "accepted  SETUID: /usr/bin/x" in done.stdout
    assert "the service is a test" in done.stdout
    assert mode(tree, "/usr/bin/x") == 0o4755
