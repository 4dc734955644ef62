"""Write a first spec, with comments, from a command. Writes no file."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Sequence

import tomlkit

from stockade.errors import UsageError
from stockade.records.text import escape

__all__ = ["derive", "exercise_command", "new"]

_WORD = re.compile(r"[\w./+@%,~-]+")
_HERE = (".", "..")  # within a text these are a shell's command or an operator
_SHELL = re.compile(r"[|&;<>()$`*?\[\]{}~\n]|^\w+=")


def exercise_command(text: str) -> tuple[str, ...]:
    """Return the command that one `--exercise` text means: its words, or a shell's when it needs a shell.

    `UsageError` for a text whose quotes do not end.
    """
    if _SHELL.search(text):
        return ("sh", "-c", text)
    try:
        return tuple(shlex.split(text))
    except ValueError as error:
        reason = str(error)[:1].lower() + str(error)[1:]
        raise UsageError(
            f"the exercise `{text}` cannot be split into words: {reason}", hint="quote it as for a shell"
        ) from error


def new(
    name: str,
    command: Sequence[str],
    exercises: Sequence[Sequence[str]] = (),
    *,
    user: str = "root",
    description: str = "",
    tcp: int | None = None,
    forks: bool = False,
    listen: Sequence[str] = (),
    program: str = "",
) -> str:
    """Return the TOML text of a spec: what was given, and as comments what else can be said.

    `tcp` is the port whose opening shows that the service is ready, `listen` the sockets that it is given. `program` is
    the command's as the caller wrote it. A command with a word, or one with a text in which a word, names something in
    the caller's working directory is run there.
    """
    document = tomlkit.document()
    document.add(tomlkit.comment(f"What the jail `{name}` is for, and what it may do. Then: `stockade build {name}`."))
    document.add("stockade", tomlkit.item(1))
    document.add("name", tomlkit.item(name))
    if description:
        document.add("description", tomlkit.item(description))
    document.add(tomlkit.nl())

    service = tomlkit.table()
    service.add("command", _words(command))
    if user != "root":
        service.add("user", user)
    directory = _directory([*([program] if "/" in program else ()), *command[1:]])
    if directory:
        service.add("directory", directory)
    if forks:
        service.add("forks", True)
    if tcp is not None:
        ready = tomlkit.inline_table()
        ready.update({"tcp": tcp})
        service.add("ready", ready)
    _remarks(
        service,
        'user = "www-data"             # default: root of the jail, which is nobody outside',
        'ready = { tcp = 8080 }        # also: udp, unix = "/run/x.sock", file, command, log = "regular expression"',
        "forks = true                  # the command goes into the background by itself",
    )
    document.add("service", service)

    _section(
        document,
        "[files]                        # beyond what is observed",
        'include = ["/srv/www"]        # a path, a directory with all below it, or a glob',
        'programs = ["/bin/sh"]        # programs, with everything that they need',
    )
    _section(
        document,
        "[directories]                  # what the service may write to: everything else is read-only",
        f'"/var/lib/{name}" = {{ kind = "volume", owner = "root", size = "256M" }}   # outlives the jail',
        '"/run" = { kind = "tmpfs", size = "16M" }                   # empty at each start',
    )
    if listen:
        network = tomlkit.table()
        network.add("listen", _words(listen))
        document.add(tomlkit.nl())
        document.add("network", network)
    else:
        _section(
            document,
            "[network]",
            'mode = "none"                 # loopback only; also "host" and "private"',
            'listen = ["8080"]             # sockets that are opened outside and given to the service: LISTEN_FDS',
        )
    _section(document, "[limits]", 'memory = "256M"', "processes = 64")
    _section(document, "[policy]", 'capabilities = ["net_bind_service"]   # default: found by the build')

    if exercises:
        array = tomlkit.aot()
        for exercise in exercises:
            entry = tomlkit.table()
            entry.add("command", _words(exercise))
            array.append(entry)
        document.add(tomlkit.nl())
        document.add(
            tomlkit.comment("Each exercise is a command run as a client would; the jail works when all succeed.")
        )
        document.add("exercises", array)
    else:
        _section(
            document,
            "[[exercises]]                  # a command run as a client would: it must succeed inside as outside",
            'command = ["curl", "-sf", "http://127.0.0.1:8080/"]',
            'stdout = "<html"              # regular expression that its output must match',
        )
    return tomlkit.dumps(document)


def derive(recipe: str, name: str, exercises: Sequence[Sequence[str]] = ()) -> str:
    """Return the text of a recipe under another name and with more exercises; comments and layout stay."""
    document = tomlkit.parse(recipe)
    document["name"] = name
    if exercises:
        known = document.setdefault("exercises", tomlkit.aot())
        for exercise in exercises:
            entry = tomlkit.table()
            entry.add("command", _words(exercise))
            known.append(entry)
    return tomlkit.dumps(document)


def _directory(words: Sequence[str]) -> str:
    """The working directory, where one of `words`, what follows its `=` or a word in it is a path in it; "" else."""
    for word in words:
        within = (found for found in _WORD.findall(word) if found not in _HERE)
        for path in (word, word.partition("=")[2], *within):
            if path and not os.path.isabs(path) and "\0" not in path and os.path.lexists(path):
                directory = os.getcwd()
                return "" if directory == "/" else escape(directory)
    return ""


def _words(words: Sequence[str]) -> tomlkit.items.Array:
    array = tomlkit.array()
    array.extend(words)
    return array.multiline(len(words) > 1 and sum(map(len, words)) > 80)


def _remarks(table: tomlkit.items.Table, *lines: str) -> None:
    for line in lines:
        if not line.startswith(tuple(f"{key} =" for key in table)):
            table.add(tomlkit.comment(line))


def _section(document: tomlkit.TOMLDocument, *lines: str) -> None:
    document.add(tomlkit.nl())
    for line in lines:
        document.add(tomlkit.comment(line))
