"""Follow `#!` lines as the kernel does, and through `env` as `env` does. Never runs anything."""

from __future__ import annotations

import os
import re
from typing import NamedTuple

from ..errors import ResolveError
from .host import Host

__all__ = ["DEFAULT_PATH", "Link", "chain", "find_program", "interpreters"]

DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_BUFFER = 256  # BINPRM_BUF_SIZE: the kernel looks no further into the file
_MAX_LEVELS = 5  # fs/exec.c, exec_binprm: `depth > 5` is ELOOP (its comment says 4; five scripts do run)
_LINE = re.compile(rb"#![ \t]*([^ \t\n\0]+)(?:[ \t]+([^\n\0]*?))?[ \t]*(?:[\n\0]|\Z)")
_ASSIGNMENT = re.compile(r"[A-Za-z_][A-Za-z0-9_]*=")


class Link(NamedTuple):
    """One step: `script` (canonical) is run by `interpreter` (as found), because of the text `line`."""

    script: str
    interpreter: str
    line: str


def find_program(host: Host, name: str, path: str = DEFAULT_PATH, *, directory: str = "/") -> str | None:
    """Where execvp(3) finds the executable `name`: itself with a slash in it, else in the directories of `path`."""
    if "/" in name:
        candidates = [name if name.startswith("/") else f"{directory.rstrip('/')}/{name}"]
    else:
        candidates = [f"{(part or directory).rstrip('/')}/{name}" for part in path.split(":")]
    for candidate in candidates:
        found = host.walk(candidate)
        if found.status is not None and found.is_file and found.status.st_mode & 0o111:
            return candidate
    return None


def chain(host: Host, program: str, *, path: str = DEFAULT_PATH, directory: str = "/") -> tuple[Link, ...]:
    """Every interpreter that running `program` leads to, in order; empty when it has no `#!` line.

    Raises ResolveError for a missing interpreter and for more levels than the kernel allows.
    """
    links: list[Link] = []
    levels = 0
    current = program
    while True:
        script = host.walk(current).path
        read = _read(host, script)
        if read is None:
            return tuple(links)
        interpreter, argument, line = read
        levels += 1
        if levels > _MAX_LEVELS:
            raise ResolveError(
                f"cannot run `{program}`: more than {_MAX_LEVELS} interpreters run one another, the last is `{script}`",
                hint="the kernel refuses this too; name a program that is no script in a `#!` line",
            )
        found = find_program(host, interpreter if "/" in interpreter else f"./{interpreter}", directory=directory)
        if found is None:
            raise _missing(host, script, interpreter, line)
        links.append(Link(script, found, line))
        current = found
        command = _env_command(argument) if interpreter.rpartition("/")[2] == "env" else None
        if command is not None:
            found = find_program(host, command, path, directory=directory)
            if found is None:
                raise _missing(host, script, command, line)
            links.append(Link(script, found, line))
            current = found


def interpreters(text: str) -> tuple[tuple[str, ...], str]:
    """The programs that the `#!` line of `text` names, and the line; none when there is no such line."""
    read = _parse(os.fsencode(text)[:_BUFFER])
    if read is None:
        return (), ""
    interpreter, argument, line = read
    command = _env_command(argument) if interpreter.rpartition("/")[2] == "env" else None
    return (interpreter,) if command is None else (interpreter, command), line


def _read(host: Host, script: str) -> tuple[str, str, str] | None:
    """Interpreter, argument and the whole line of a script; None when there is no `#!`."""
    data = host.data(script, limit=_BUFFER)
    return None if data is None else _parse(data)


def _parse(data: bytes) -> tuple[str, str, str] | None:
    """The same from the first bytes of a script (fs/binfmt_script.c)."""
    if not data.startswith(b"#!"):
        return None
    match = _LINE.match(data)
    if match is None or (match.end() == _BUFFER and match[2] is None and data[-1:] not in b"\n\0"):
        return None  # no interpreter, or its name is cut off: ENOEXEC
    line = data.split(b"\n", 1)[0].split(b"\0", 1)[0]
    return os.fsdecode(match[1]), os.fsdecode(match[2] or b""), os.fsdecode(line)


def _env_command(argument: str) -> str | None:
    """The command that `env` runs; without -S the kernel hands it everything as one argument."""
    if not argument:
        return None
    words = [argument]
    split = re.match(r"(?:-S|--split-string=|-[iv]*S|--split-string\s)\s*(.*)", argument)
    if split:
        import shlex

        try:
            words = shlex.split(split[1])
        except ValueError:
            return None
    for word in words:
        if not word.startswith("-") and not _ASSIGNMENT.match(word):
            return word
    return None


def _missing(host: Host, script: str, interpreter: str, line: str) -> ResolveError:
    if "\r" in line:
        hint = "the line ends in a carriage return; convert the script with `dos2unix`"
    elif "/" in interpreter and host.walk(interpreter).status is not None:
        hint = f"make `{interpreter}` an executable file"
    else:
        hint = f"install the package that brings `{interpreter.rstrip()}`, or correct the script's first line"
    return ResolveError(f"cannot run `{script}`: its interpreter `{interpreter}` is missing", hint=hint)
