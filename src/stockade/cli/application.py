"""Parse the command line, call the verb, and turn what it raises into messages and an exit status."""

from __future__ import annotations

import errno
import os
import sys

from stockade.cli import console
from stockade.cli.parser import build, parse
from stockade.errors import StockadeError, WallError

__all__ = ["launch_failed", "run"]

INTERRUPTED = 130  # 128 + SIGINT, as a shell reports it
BROKEN_PIPE = 141  # 128 + SIGPIPE
_PASSING = ("run", "exec", "shell", "contain")  # verbs that pass a command's status on
_FULL = (errno.ENOSPC, errno.EDQUOT)


def run(words: list[str]) -> int:
    """Carry out `words` and return the exit status."""
    verbose = _verbosity(words)
    _open_streams()
    try:
        status = _carry_out(words)
        sys.stdout.flush()
    except KeyboardInterrupt:
        console.note("interrupted")
        return INTERRUPTED
    except BrokenPipeError:
        # The reader went away. Python flushes standard output once more at exit: give it somewhere to go.
        _divert_output()
        return BROKEN_PIPE
    except StockadeError as error:
        if verbose > 1:
            raise
        console.fail(error)
        return _own_failure(words) if isinstance(error, WallError) and not _passes(words) else error.exit_code
    except OSError as error:
        if verbose > 1:
            raise
        try:
            sys.stdout.flush()
        except OSError:
            _divert_output()  # it failed there, and would again before the message
            error.filename = "standard output"
        console.fail(StockadeError(_system(error), hint=_cure(error)))
        return _own_failure(words)
    except Exception as error:
        if verbose > 1:
            raise
        console.fail(
            StockadeError(f"a fault of Stockade's own: {type(error).__name__}: {error}", hint="report what `-vv` shows")
        )
        return _own_failure(words)
    return status


def _open_streams() -> None:
    """Have each standard stream that the caller closed lead to /dev/null: no file that is opened may take its place."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115


def _divert_output() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def launch_failed(line: str) -> int:
    """Explain the warden's report of a launch step that failed, in the warden's place."""
    from stockade.contain.failures import wall_error

    error = wall_error(line.removeprefix("failed "))
    console.fail(error)
    return error.exit_code


def _carry_out(words: list[str]) -> int:
    parser = build(words)
    if not words:
        parser.print_help(sys.stderr)
        return 2
    try:
        arguments = parse(parser, words)
    except SystemExit:  # argparse's end after `--help`
        return 0
    status = arguments.verb(arguments)
    return 0 if status is None else int(status)


def _verbosity(words: list[str]) -> int:
    """Count -v before the child's command, before anything can go wrong."""
    own = words[: words.index("--")] if "--" in words else words
    return sum(len(word) - 1 for word in own if word.startswith("-v") and set(word[1:]) == {"v"})


def _own_failure(words: list[str]) -> int:
    """The status of an unforeseen failure, which must not look like one of a command's."""
    return WallError.exit_code if _passes(words) else 1


def _passes(words: list[str]) -> bool:
    return next((word for word in words if not word.startswith("-")), "") in _PASSING


def _cure(error: OSError) -> str:
    from stockade import places

    where = f"`{places.configuration()}`, `{places.state()}` and `{places.run()}`"
    if error.errno in _FULL:
        return f"free some space on the file systems of {where}"
    if error.errno == errno.EROFS:
        return f"mount the file systems of {where} writable, or set `$STOCKADE_HOME` to another directory"
    return "`-vv` shows where it happened"


def _system(error: OSError) -> str:
    """Put an error of the system into one sentence."""
    reason = (error.strerror or str(error)).lower()
    if error.filename is None:
        return reason
    return f"{reason}: `{os.fsdecode(error.filename)}`"
