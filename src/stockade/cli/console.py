"""Write for people and for programs: reports to standard output, all else to standard error."""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from stockade.errors import StateError, StockadeError, UsageError

if TYPE_CHECKING:
    from rich.status import Status

__all__ = [
    "Progress",
    "confirm",
    "copy",
    "duration",
    "fail",
    "json_report",
    "listed",
    "nearest",
    "next_command",
    "note",
    "note_missed",
    "rows",
    "size",
    "text",
    "visible",
    "write",
]

#: What speaks to a terminal, or turns the order of what follows: C0 but tab and newline, DEL, C1, and bidi controls.
_CONTROL = {
    number: repr(chr(number))[1:-1]
    for number in (*range(9), *range(11, 32), *range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A))
}
_LEAST_ROOM = 16  # columns that words need to be folded into
_UNITS = ("B", "KB", "MB", "GB", "TB")


def text(line: str = "") -> None:
    """Write one line of a report. Bytes that are no text, and what would speak to the terminal, are written out."""
    print(_printable(line))


def note(line: str) -> None:
    """Write one line beside the report, after what was written to it."""
    sys.stdout.flush()
    print(_printable(line), file=sys.stderr, flush=True)


def note_missed() -> None:
    """Say that what a log shows next does not, or hardly, follow what it has shown."""
    note("note: the log was written faster than it was read: lines may be missing here")


def _printable(line: str) -> str:
    return line.translate(_CONTROL).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def visible(line: str) -> str:
    """`line` with every control character written out: names of files must not speak to the terminal."""
    return "".join(
        character if character.isprintable() or "\udc80" <= character <= "\udcff" else repr(character)[1:-1]
        for character in line
    )


def copy(pieces: Iterable[bytes]) -> None:
    """Write what a service or a guest has written: as it is, but to a terminal with control characters written out."""
    if not sys.stdout.isatty():
        for piece in pieces:
            write(piece)
    else:
        import codecs
        import itertools
        import re

        other = re.compile(r"[^\n\t -~]")
        decoder = codecs.getincrementaldecoder("utf-8")("backslashreplace")
        held = ""  # a carriage return, of which the next piece tells whether it ends a line
        for piece in itertools.chain(pieces, (b"",)):
            text = (held + decoder.decode(piece, final=not piece)).replace("\r\n", "\n")
            held = "\r" if piece and text.endswith("\r") else ""
            text = text.removesuffix(held)
            write(other.sub(lambda found: visible(found[0]), text).encode(sys.stdout.encoding, "backslashreplace"))


def write(data: bytes, *, error: bool = False) -> None:
    """Write all of `data` to standard output, or error, at once: also where the caller has made it not block."""
    file = sys.stderr if error else sys.stdout
    file.flush()
    descriptor = file.fileno()
    rest = memoryview(data)
    while rest:
        try:
            rest = rest[os.write(descriptor, rest) :]
        except BlockingIOError:
            select.select([], [descriptor], [])


def json_report(report: msgspec.Struct) -> None:
    """Write a report of `records.report` as JSON."""
    sys.stdout.write(msgspec.json.format(msgspec.json.encode(report), indent=2).decode() + "\n")


def rows(table: Iterable[Sequence[str]], *, heading: Sequence[str]) -> None:
    """Write a table with its columns aligned; without a terminal too, so that it can be cut by column.

    On a terminal that is too narrow the last column is folded between words.
    """
    lines = [list(heading), *map(list, table)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(heading) - 1)]
    room = _columns() - sum(width + 2 for width in widths)
    for *cells, last in lines:
        before = "".join(f"{cell.ljust(width)}  " for cell, width in zip(cells, widths, strict=True))
        for number, part in enumerate(_folded(last, room)):
            text(f"{' ' * len(before) if number else before}{part}".rstrip())


def _folded(words: str, room: int) -> list[str]:
    """Return `words` in lines of `room` columns; in one where that is too little for any."""
    if len(words) <= room or room < _LEAST_ROOM:
        return [words]
    import textwrap  # only for what does not fit

    return textwrap.wrap(words, room, break_long_words=False, break_on_hyphens=False)


def _columns() -> int:
    """Columns of the terminal that standard output is; more than any line has where it is none, or tells none."""
    return (os.get_terminal_size(sys.stdout.fileno()).columns if sys.stdout.isatty() else 0) or sys.maxsize


def size(count: int) -> str:
    """Write a count of bytes with a unit of 1000, three digits at most: `4.1 MB`."""
    value = float(count)
    for unit in _UNITS[:-1]:
        if value < 999.5:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} {_UNITS[-1]}"


def listed(title: str, items: Sequence[str]) -> None:
    """Write a title and what belongs to it, separated by commas: one line, on a terminal as many as it takes."""
    width = _columns()
    line = f"{title}:"
    for place, item in enumerate(items, 1):
        word = f"{item}," if place < len(items) else item
        if len(line) + 1 + len(word) > width:
            text(line)
            line = "   "
        line = f"{line} {word}"
    text(line)


def duration(seconds: float) -> str:
    """Write a time span with its two largest units: `3 h 12 min`."""
    minutes, whole = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    parts = [f"{count} {unit}" for count, unit in ((days, "d"), (hours, "h"), (minutes, "min"), (whole, "s")) if count]
    return " ".join(parts[:2]) or f"{seconds:.1f} s"


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ", did you mean `…`?" with the nearest known name, or "" when none is near."""
    import difflib  # only for a name that is wrong

    near = difflib.get_close_matches(name, list(known), n=1)
    return f", did you mean `{near[0]}`?" if near else ""


def next_command(line: str) -> None:
    """Name the command that usually follows."""
    note(f"next: {line}")


def fail(error: StockadeError) -> None:
    """Write an error and what to do about it."""
    first, *more = error.message.split("\n")
    note(f"error: {visible(first)}")
    for line in more:
        note(f"       {visible(line)}")
    log = getattr(error, "log", "")
    if log:
        note("the service's own output, its last lines:")
        for line in log.splitlines()[-20:]:
            note(f"  | {visible(line.expandtabs())}")
    if error.hint:
        first, *more = error.hint.split("\n")
        note(f"hint: {visible(first)}")
        for line in more:
            note(visible(line))


def confirm(question: str, *, force: bool) -> None:
    """Ask before something is destroyed. Raises `StateError` for a no, `UsageError` where nobody can be asked."""
    if force:
        return
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise UsageError(f"a yes is needed to {question}, and there is no terminal to ask on", hint="add `--force`")
    sys.stderr.write(f"{question}? [y/N] ")
    sys.stderr.flush()
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise StateError("nothing was changed", hint="answer `y`, or add `--force`")


class Progress:
    """Say what is being done: one changing line on a terminal, plain lines elsewhere."""

    def __init__(self) -> None:
        self._status: Status | None = None
        self._rich = sys.stderr.isatty() and os.environ.get("TERM", "dumb") != "dumb"

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.pause()

    def doing(self, what: str) -> None:
        """Say that `what` has begun."""
        if not self._rich:
            note(f"{what} …")
        elif self._status is None:
            # The first line does not wait for rich to be imported.
            sys.stderr.write(f"{what} …\r")
            sys.stderr.flush()
            from rich.console import Console

            self._status = Console(stderr=True, highlight=False).status(_escaped(what))
            self._status.start()
        else:
            self._status.update(_escaped(what))

    def done(self, line: str) -> None:
        """Write a line that stays."""
        if self._status is None:
            note(line)
        else:
            self._status.console.print(_escaped(line), soft_wrap=True)

    def pause(self) -> None:
        """Take the changing line away."""
        if self._status is not None:
            self._status.stop()
            self._status = None


def _escaped(line: str) -> Any:
    from rich.text import Text

    return Text(_printable(line))
