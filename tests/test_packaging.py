"""The package as it is installed: source distribution, wheel, and the `stockade` that a user starts."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LACKING = [program for program in ("make", "cc") if shutil.which(program) is None]

pytestmark = pytest.mark.skipif(
    bool(LACKING), reason=f"building the package needs {' and '.join(LACKING)}: `apt-get install make gcc libc6-dev`"
)


def run(*command: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command, cwd=cwd, env={**os.environ, **environment}, stdin=subprocess.DEVNULL, capture_output=True, text=True,
        timeout=180, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution, made from a copy of this tree and unpacked."""
    pytest.importorskip("hatchling", reason="needs hatchling: `pip install hatchling`")
    work = tmp_path_factory.mktemp("package")
    ignored = shutil.ignore_patterns(".*", "__pycache__", "dist", "_warden")
    shutil.copytree(ROOT, work / "tree", ignore=ignored)
    run(sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", work / "dist", cwd=work / "tree")
    [archive] = (work / "dist").glob("*.tar.gz")
    (work / "sdist").mkdir()
    run("tar", "-xzf", archive, cwd=work / "sdist")
    [directory] = (work / "sdist").iterdir()
    return directory


@pytest.fixture(scope="module")
def wheel(unpacked: Path) -> Path:
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", unpacked / "dist", cwd=unpacked)
    [found] = (unpacked / "dist").glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new environment with the wheel in it, which borrows the libraries of the one that runs the tests."""
    environment = tmp_path_factory.mktemp("environment")
    venv.create(environment, with_pip=True)
    run(environment / "bin" / "pip", "install", "--quiet", "--no-deps", "--no-index", wheel, cwd=environment)
    [packages] = (environment / "lib").glob("python3*/site-packages")
    borrowed = [path for path in sys.path if path.endswith("-packages") and os.path.isdir(path)]
    (packages / "borrowed.pth").write_text("\n".join(borrowed) + "\n")
    return environment


def test_source_distribution_carries_the_warden_and_no_program(unpacked: Path) -> None:
    assert (unpacked / "warden" / "main.c").is_file()
    assert (unpacked / "LICENSE").is_file()
    assert not (unpacked / "src" / "stockade" / "_warden" / "warden").exists()


def test_wheel_is_for_this_machine_and_any_python(wheel: Path) -> None:
    assert wheel.name.endswith(f"-py3-none-linux_{os.uname().machine}.whl")


def test_wheel_holds_the_warden_as_a_static_executable(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        warden = archive.getinfo("stockade/_warden/warden")
        program = archive.read(warden)
    assert program[:4] == b"\x7fELF"
    assert warden.external_attr >> 16 & 0o111 == 0o111
    # A dynamic program names its loader in a PT_INTERP segment.
    assert b"ld-linux" not in program
    assert b"ld-musl" not in program


def test_wheel_holds_every_recipe_schema_and_table(unpacked: Path, wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
    for path in (unpacked / "src").rglob("*"):
        if path.is_file() and path.suffix in (".toml", ".json", ".txt", ".py"):
            assert str(path.relative_to(unpacked / "src")) in held


def test_installed_command_starts_and_finds_its_recipes(installed: Path, tmp_path: Path) -> None:
    command = installed / "bin" / "stockade"
    assert run(command, "--version", cwd=tmp_path).stdout.startswith("stockade ")
    assert "sshd" in run(command, "recipes", cwd=tmp_path, STOCKADE_HOME=str(tmp_path)).stdout


def test_installed_command_names_its_files_without_a_way_back(installed: Path, tmp_path: Path) -> None:
    done = run(installed / "bin" / "stockade", "recipes", "--json", cwd=tmp_path, STOCKADE_HOME=str(tmp_path))
    assert "/../" not in done.stdout


@pytest.mark.parametrize("target", ["absolute", "relative"])
def test_installed_command_starts_through_a_link_as_pipx_makes_it(installed: Path, tmp_path: Path, target: str) -> None:
    command = installed / "bin" / "stockade"
    link = tmp_path / "stockade"
    link.symlink_to(command if target == "absolute" else os.path.relpath(command, tmp_path))
    again = tmp_path / "again"
    again.symlink_to("stockade")
    assert run(again, "--version", cwd=tmp_path).stdout.startswith("stockade ")
    assert run("sh", "-c", "PATH=$PWD:$PATH; stockade --version", cwd=tmp_path).stdout.startswith("stockade ")


def test_site_is_not_loaded_where_the_environment_has_all(tmp_path: Path) -> None:
    """`installed` has what it needs from a `.pth` file, which only `site` reads; here it lies in the environment."""
    start = ROOT / "src" / "stockade" / "__main__.py"
    command = (sys.executable, "-I", "-S", "-X", "importtime", start, "recipes")
    done = run(*command, cwd=tmp_path, STOCKADE_HOME=str(tmp_path))
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "msgspec" in imported and "site" not in imported


def test_packages_from_beside_the_environment_are_found_where_it_shares_them(tmp_path: Path) -> None:
    """As pip leaves it where the system has rich already: msgspec inside, rich outside, which only `site` finds."""
    environment = tmp_path / "environment"
    venv.create(environment, system_site_packages=True, symlinks=True)
    [packages] = (environment / "lib").glob("python3*/site-packages")
    borrowed = [path for path in sys.path if path.endswith("-packages") and os.path.isdir(path)]
    (packages / "borrowed.pth").write_text("\n".join(borrowed) + "\n")
    [inside] = [path for path in borrowed if os.path.isdir(f"{path}/msgspec")]
    (packages / "msgspec").symlink_to(f"{inside}/msgspec")
    start = ROOT / "src" / "stockade" / "__main__.py"
    run(environment / "bin" / "python", "-I", "-S", start, "completion", "bash", cwd=tmp_path)


def test_installed_command_imports_nothing_of_the_callers(installed: Path, tmp_path: Path) -> None:
    """As root, a module in the current directory or on PYTHONPATH must not run."""
    for name in ("argparse", "msgspec", "stockade", "sitecustomize", "usercustomize"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('imported from the current directory')\n")
    command = installed / "bin" / "stockade"
    done = run(command, "recipes", cwd=tmp_path, PYTHONPATH=str(tmp_path), PYTHONSTARTUP=str(tmp_path / "stockade.py"))
    assert "sshd" in done.stdout


def test_launcher_script_does_not_load_site(installed: Path, tmp_path: Path) -> None:
    """Measured at the interpreter: the verb `run` is decided before `site` is imported."""
    program = tmp_path / "python"
    real = (installed / "bin" / "python").resolve()
    program.write_text(f'#!/bin/sh\necho "$@" >&2\nexec {real} "$@"\n')
    program.chmod(0o755)
    scripts = tmp_path / "environment" / "bin"
    scripts.mkdir(parents=True)
    shutil.copy(installed / "bin" / "stockade", scripts / "stockade")
    (scripts / "python").symlink_to(program)
    (tmp_path / "environment" / "lib").symlink_to(installed / "lib")
    command = [scripts / "stockade", "run", "none", "--", "true"]
    environment = {"PATH": "/usr/bin:/bin", "STOCKADE_HOME": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.stderr.startswith("-I -S ")


def test_package_names_no_registry() -> None:
    hosts = ["pypi.org", "pythonhosted.org", "deb.debian.org", "npmjs.org"]
    for path in [*ROOT.glob("*"), *(ROOT / "scripts").glob("*"), *(ROOT / "docs").glob("*"), *(ROOT / ".ci").glob("*")]:
        if path.is_file():
            text = path.read_text(encoding="utf-8")
            assert not [host for host in hosts if host in text], path
