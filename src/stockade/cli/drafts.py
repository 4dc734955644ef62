"""The verbs before a build: new, recipes."""

from __future__ import annotations

import argparse
import os
import pwd
import re
import shutil
import tempfile
from pathlib import Path

from stockade import places, resolve, specfile
from stockade.cli import console
from stockade.cli.parser import Subparsers, add_verb
from stockade.errors import NotFoundError, StateError, UsageError
from stockade.records.report import Recipe, RecipesReport
from stockade.records.spec import Service, Spec

__all__ = ["register"]

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
_SYSTEM_PATH = "/usr/local/sbin:/usr/sbin:/sbin"
_OF_A_COMMAND = ("user", "tcp", "listen", "forks")


def register(subparsers: Subparsers) -> None:
    """Add the verbs to the parser."""
    parser = add_verb(
        subparsers, "new", new, command="[-- COMMAND ...]",
        help="write a spec, from a command or from a recipe",
        description="Write NAME.toml, with comments, for you to edit: from COMMAND, or else from the recipe RECIPE, "
        "or else from the recipe called NAME. A COMMAND with a word that names something in the caller's working "
        "directory, also within a shell's or an interpreter's text, is run there.",
    )  # fmt: skip
    parser.add_argument("name", metavar="NAME", help="name of the jail")
    parser.add_argument("--recipe", metavar="RECIPE", help="start from this recipe")
    parser.add_argument(
        "--exercise", metavar="COMMAND", action="append", default=[],
        help="a client's command that must succeed, as you would type it; may be given more than once",
    )  # fmt: skip
    parser.add_argument(
        "--user", metavar="USER",
        help="the account that runs COMMAND (default: root, or yours where you have no range of ids)",
    )  # fmt: skip
    parser.add_argument("--tcp", metavar="PORT", type=int, help="COMMAND is ready when this port is open")
    parser.add_argument(
        "--listen", metavar="[ADDRESS:]PORT", action="append", default=[],
        help="a socket that COMMAND is given (LISTEN_FDS) and does not open itself; may be given more than once",
    )  # fmt: skip
    parser.add_argument("--forks", action="store_true", help="COMMAND goes into the background by itself")
    parser.add_argument("--output", metavar="FILE", help="write to FILE; `-` is standard output")
    parser.add_argument("--force", action="store_true", help="replace a spec that is there")

    add_verb(subparsers, "recipes", recipes, json=True, help="list the specs that come with Stockade")


def new(arguments: argparse.Namespace) -> None:
    """Write a spec."""
    if not _NAME.fullmatch(arguments.name):
        raise UsageError(
            f"`{arguments.name}` cannot be the name of a jail",
            hint="a name has a-z, 0-9, `.`, `_` and `-`, begins with a letter or digit, and is 63 characters at most",
        )
    text = _from_command(arguments) if arguments.command else _from_recipe(arguments)
    specfile.loads(text, f"the new spec `{arguments.name}`")
    if arguments.output == "-":
        console.text(text.rstrip("\n"))
        return
    path = Path(arguments.output or places.configuration() / f"{arguments.name}.toml")
    _write(path, text, force=arguments.force)
    console.text(str(path))
    named = arguments.output or arguments.name
    console.next_command(f"`stockade build {named}`, after a look at the file")


def _from_command(arguments: argparse.Namespace) -> str:
    if arguments.recipe is not None:
        raise UsageError("a spec is made from a recipe or from a command, not from both", hint="leave one of them out")
    program, *rest = arguments.command
    found = shutil.which(program, path=f"{os.environ.get('PATH', os.defpath)}:{_SYSTEM_PATH}")
    if found is None:
        if "/" in program:
            resolve.require_command(Spec(name=arguments.name, service=Service(command=(os.path.abspath(program),))))
        raise NotFoundError(
            f"there is no program `{program}`", hint="give its path, or install the package that brings it"
        )
    return specfile.new(
        arguments.name,
        [os.path.abspath(found), *rest],
        [specfile.exercise_command(exercise) for exercise in arguments.exercise],
        user=arguments.user or _default_user(),
        tcp=arguments.tcp,
        forks=arguments.forks,
        listen=arguments.listen,
        program=program,
    )


def _default_user() -> str:
    """root, unless jails of the caller have one id only: nobody is root in there."""
    from stockade.kernel import userns

    if os.geteuid() == 0 or userns.subordinate() is not None:
        return "root"
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return str(os.geteuid())


def _from_recipe(arguments: argparse.Namespace) -> str:
    given = next((option for option in _OF_A_COMMAND if getattr(arguments, option)), None)
    if given is not None:
        raise UsageError(
            f"`--{given}` is about a command, and none was given",
            hint=f"`stockade new {arguments.name} … -- COMMAND`, or leave it out and edit the spec",
        )
    name = arguments.recipe or arguments.name
    if name not in specfile.recipes():
        raise NotFoundError(
            f"there is no recipe `{name}`{console.nearest(name, specfile.recipes())}",
            hint=f"`stockade recipes` lists them; for another program: `stockade new {arguments.name} -- COMMAND`",
        )
    return specfile.derive(
        specfile.recipe(name).read_text(encoding="utf-8"),
        arguments.name,
        [specfile.exercise_command(exercise) for exercise in arguments.exercise],
    )


def _write(path: Path, text: str, *, force: bool) -> None:
    """Write the file whole or not at all; one that is there is only replaced by force."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, scratch = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            os.fchmod(file.fileno(), 0o644)
        if force:
            os.replace(scratch, path)
        else:
            try:
                os.link(scratch, path)
            except FileExistsError as error:
                raise StateError(f"`{path}` is there already", hint="`--force` replaces it") from error
    finally:
        Path(scratch).unlink(missing_ok=True)


def recipes(arguments: argparse.Namespace) -> None:
    """List the recipes."""
    found = []
    for name in specfile.recipes():
        path = specfile.recipe(name)
        spec = specfile.load(path)
        found.append(
            Recipe(
                name=name, description=spec.description, walls=spec.walls, exercises=len(spec.exercises), path=str(path)
            )
        )
    if arguments.json:
        console.json_report(RecipesReport(recipes=tuple(found)))
        return
    console.rows(
        ((recipe.name, str(recipe.exercises), recipe.description) for recipe in found),
        heading=("NAME", "EXERCISES", "DESCRIPTION"),
    )
    console.next_command("`stockade build NAME`; `stockade new NAME` makes a copy to edit")
