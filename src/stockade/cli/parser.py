"""The parser: what every verb has in common. The verbs register themselves, one module per family."""

from __future__ import annotations

import argparse
import importlib
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

from stockade.errors import UsageError

__all__ = ["Subparsers", "Verb", "add_verb", "build", "parse", "verbs"]

Verb = Callable[[argparse.Namespace], int | None]
Subparsers = Any  # argparse names its type only privately

PROGRAM = "stockade"
_COLUMNS = 80
_NEAR = 0.7  # least likeness, of 1, of a word that was meant
_NUMBERS = {int: "a whole number", float: "a number"}


class _Formatter(argparse.HelpFormatter):
    """argparse's, which imports all of shutil to learn how wide the terminal is."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, width=_width() - 2)


def _width() -> int:
    """Columns of the terminal, as shutil.get_terminal_size tells them."""
    columns = os.environ.get("COLUMNS", "")
    if columns.isdecimal() and int(columns) > 0:
        return int(columns)
    try:
        return os.get_terminal_size(1).columns or _COLUMNS
    except OSError:
        return _COLUMNS


class Parser(argparse.ArgumentParser):
    """An argument parser that raises instead of exiting, and suggests."""

    child = ""
    """How the usage shows the command after `--`."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **({"formatter_class": _Formatter} | keywords))

    def format_help(self) -> str:
        """Add the command after `--` to the usage, of which argparse knows nothing."""
        help_text = super().format_help()
        usage, _, rest = help_text.partition("\n\n")
        return f"{usage} {self.child}\n\n{rest}" if self.child else help_text

    def error(self, message: str) -> NoReturn:
        """Raise `UsageError` with the nearest option for an unknown one."""
        hint = f"`{self.prog} --help` shows what it takes"
        unknown = message.removeprefix("unrecognized arguments: ")
        if unknown != message:
            word = unknown.split()[0]
            message = f"`{self.prog}` does not take `{word}`"
            near = _nearest(word, self.options())
            if self.child and not word.startswith("-"):
                names = [str(action.metavar) for action in self._actions if not action.option_strings]
                hint = f"a command stands after `--`: `{' '.join([self.prog, *names, self.child])}`"
            elif near:
                hint = f"did you mean `{near}`?"
        raise UsageError(message, hint=hint)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Refuse a word that is none of the action's choices, and suggest the nearest."""
        if action.choices is None or value in action.choices:
            return
        choices = list(action.choices)
        near = _nearest(str(value), choices)
        meant = f", did you mean `{near}`?" if near else ""
        if isinstance(action, argparse._SubParsersAction):
            raise UsageError(
                f"`{self.prog}` has no verb `{value}`{meant}", hint=f"`{self.prog} --help` lists the verbs"
            )
        *others, last = (f"`{choice}`" for choice in choices)
        known = f"{', '.join(others)} or {last}" if others else last
        raise UsageError(
            f"`{_called(action)}` is {known}, not `{value}`{meant}",
            hint=f"`{self.prog} --help` shows what it takes",
        )

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        """Convert what was typed; argparse names the type as Python does."""
        try:
            return super()._get_value(action, arg_string)
        except argparse.ArgumentError:
            if action.type not in _NUMBERS:
                raise
            raise UsageError(
                f"`{_called(action)}` must be {_NUMBERS[action.type]}, not `{arg_string}`",
                hint=f"`{self.prog} --help` shows what it takes",
            ) from None

    def options(self) -> list[str]:
        """Return every long option."""
        return [option for action in self._actions for option in action.option_strings if option.startswith("--")]


def _called(action: argparse.Action) -> str:
    """What the help calls an action."""
    return action.option_strings[0] if action.option_strings else str(action.metavar)


#: Modules of this package and the verbs that each registers, in the order of the help. Only the module of the verb
#: that is called is imported: all of them take longer than most verbs do.
FAMILIES: dict[str, tuple[str, ...]] = {
    "drafts": ("new", "recipes"),
    "building": ("build",),
    "jails": ("list", "status", "rollback", "rm"),
    "running": ("run", "start", "stop", "ps", "logs", "exec", "shell"),
    "containing": ("contain",),
    "auditing": ("audit",),
    "proving": ("prove", "verify-certificate"),
    "explaining": ("explain",),
    "asking": ("why",),
    "images": ("image", "boot"),
    "guests": ("guest", "snapshot"),
    "hosts": ("doctor", "completion"),
}


def build(words: Sequence[str] | None = None) -> Parser:
    """Return the parser with every verb; with that of the command line `words` alone where it names one."""
    wanted = None if words is None else _first(words)
    families = [family for family, verbs in FAMILIES.items() if wanted in verbs]
    if not families and not (words and wanted is None and "--version" in words):
        families = list(FAMILIES)
    parser = Parser(
        prog=PROGRAM,
        description="Puts walls around a service: watches it work, builds the smallest root file system in which it "
        "still works, locks that down and runs it.",
        epilog="`stockade VERB --help` explains a verb. Start with `stockade recipes` or `stockade new`.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    parser.add_argument("-v", "--verbose", action="count", default=0, help="say more; twice shows tracebacks")
    # With `prog` argparse need not format a usage to learn it.
    subparsers = parser.add_subparsers(title="verbs", metavar="VERB", parser_class=Parser, prog=PROGRAM)
    for family in families:
        importlib.import_module(f"stockade.cli.{family}").register(subparsers)
    return parser


def _first(words: Sequence[str]) -> str | None:
    """Return the verb in a command line, or what stands in its place."""
    return next((word for word in words if not word.startswith("-")), None)


def add_verb(
    subparsers: Subparsers, name: str, verb: Verb, *, help: str, description: str = "", json: bool = False,
    command: str | None = None,
) -> Parser:  # fmt: skip
    """Add one verb and return its parser. `json` gives it `--json`; `command` names what follows `--`."""
    parser: Parser = subparsers.add_parser(
        name, help=help, description=description or f"{help[:1].upper()}{help[1:]}.", allow_abbrev=False
    )
    parser.set_defaults(verb=verb, parser=parser, command=[])
    parser.add_argument("-v", "--verbose", action="count", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    if json:
        parser.add_argument("--json", action="store_true", help="write the report as JSON")
    parser.child = command or ""
    return parser


def parse(parser: Parser, words: Sequence[str]) -> argparse.Namespace:
    """Parse `words`; what follows the first `--` becomes `command`, untouched."""
    own, child = list(words), None
    if "--" in own:
        place = own.index("--")
        own, child = own[:place], own[place + 1 :]
    known = verbs(parser)
    first = _first(own)
    if first is not None and first not in known:
        near = _nearest(first, known)
        raise UsageError(
            f"unknown verb `{first}`" + (f", did you mean `{near}`?" if near else ""),
            hint=f"`{PROGRAM} --help` lists the verbs",
        )
    if first is None and "--version" in own:
        return argparse.Namespace(verb=_version)
    arguments, rest = parser.parse_known_args(own)
    speaking: Parser = getattr(arguments, "parser", parser)
    if rest:
        speaking.error(f"unrecognized arguments: {' '.join(rest)}")
    if first is None:
        speaking.error("no verb is given")
    if child is not None:
        if not speaking.child:
            speaking.error(f"`{speaking.prog}` takes no command after `--`")
        arguments.command = child
    return arguments


def _nearest(word: str, known: Iterable[str]) -> str:
    """The known word that is nearest to one that is wrong, "" when none is near."""
    import difflib

    return next(iter(difflib.get_close_matches(word, list(known), n=1, cutoff=_NEAR)), "")


def verbs(parser: Parser) -> dict[str, Parser]:
    """Return the parser of each verb."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}


def _version(_: argparse.Namespace) -> None:
    from importlib.metadata import version

    from stockade.cli import console

    console.text(f"{PROGRAM} {version('stockade')}")
