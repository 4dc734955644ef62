"""The direction of imports: leaves know nothing, a stage knows records and kernel, only the top composes."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1] / "src" / "stockade"

LEAVES = {"errors"}
ANYONE = {"errors", "places", "spread", "records", "kernel", "elf"}
MAY_IMPORT = {
    "errors": set(),
    "places": LEAVES,
    "spread": set(),
    "records": LEAVES,
    "kernel": LEAVES | {"records"},
    "elf": LEAVES,
    "specfile": ANYONE,
    "doctor": ANYONE | {"vm"},  # it names the kernels that guests would use
    "resolve": ANYONE,
    "observe": ANYONE,
    "policy": ANYONE,
    "build": ANYONE,
    "contain": ANYONE,
    # An audit reads ELF files, packages and traces as resolve does; a proof goes through the launch of a built jail.
    "assure": ANYONE | {"resolve", "build", "contain"},
    "vm": ANYONE | {"contain"},  # a guest is one more process behind walls
    "schema": ANYONE,
}
"""What each part may import of the others."""

COMPOSING = {
    "__init__", "__main__", "workflow", "rounds", "trial", "why", "narrowing", "contained", "containedroot", "api",
    "machines", "machineproof", "lifecycle", "cli",
}  # fmt: skip
"""What may import everything."""


def part(path: Path) -> str:
    """Return the part of Stockade that a module belongs to."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def modules() -> list[Path]:
    return sorted(path for path in ROOT.rglob("*.py"))


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Yield line and part of each import of Stockade's own, wherever it stands in the module."""
    package = ["stockade", *path.relative_to(ROOT).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{origin}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            first, *rest = name.split(".")
            if first == "stockade" and rest:
                yield node.lineno, rest[0]


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_module_imports_only_what_its_part_may(path: Path) -> None:
    own = part(path)
    if own in COMPOSING:
        return
    assert own in MAY_IMPORT, f"{own} is a new part: say in this test what it may import"
    wrong = [(line, name) for line, name in imports(path) if name != own and name not in MAY_IMPORT[own]]
    assert not wrong, f"{path} imports {wrong}"


def test_the_check_sees_relative_absolute_and_nested_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    module = tmp_path / "build" / "x.py"
    module.parent.mkdir()
    module.write_text("from ..resolve import a\nimport stockade.cli.b\ndef f():\n    from stockade import observe\n")
    assert list(imports(module)) == [(1, "resolve"), (2, "cli"), (4, "observe")]


def test_only_the_command_line_prints_or_exits() -> None:
    found = []
    for path in modules():
        if part(path) in {"cli", "__main__"}:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                if name in {"print", "exit", "quit", "sys.exit", "input"}:
                    found.append(f"{path.relative_to(ROOT)}:{node.lineno} {name}")
    assert not found


def test_way_to_the_launcher_loads_no_library() -> None:
    code = (
        "import sys, stockade.cli, stockade.contain.fast;print(*sorted(name.partition('.')[0] for name in sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], env={"PYTHONPATH": str(ROOT.parent)}, capture_output=True, text=True,
        timeout=30, check=True,
    )  # fmt: skip
    heavy = {
        "argparse",
        "typing",
        "re",
        "enum",
        "pathlib",
        "msgspec",
        "tomlkit",
        "rich",
        "shtab",
        "subprocess",
        "ctypes",
        "dataclasses",
        "inspect",
    }
    assert not heavy & set(done.stdout.split())


@pytest.mark.parametrize(
    ("module", "unused"),
    [
        ("stockade.workflow", "observe trial narrowing why policy"),
        ("stockade.specfile", "build contain resolve"),
        ("stockade.cli.building", "workflow build contain observe resolve"),
        ("stockade.contain.installing", "contain.network contain.spawn"),
    ],
)
def test_a_build_that_neither_observes_nor_tries_loads_no_more_than_it_needs(module: str, unused: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", f"import sys, {module};print(*sys.modules)"],
        env={"PYTHONPATH": str(ROOT.parent)}, capture_output=True, text=True, timeout=30, check=True,
    )  # fmt: skip
    loaded = set(done.stdout.split())
    assert not {f"stockade.{name}" for name in unused.split()} & loaded
    assert not {"subprocess", "tempfile", "shutil", "difflib", "json", "importlib.resources"} & loaded
