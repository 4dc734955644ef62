"""The one tree of exceptions: each says what failed and carries a hint and an exit code."""

from __future__ import annotations


class StockadeError(Exception):
    """Base of every error that Stockade raises on purpose.

    `message` says what failed, on what and why; `hint` says what to do about it. The command
    line prints both and exits with `exit_code`.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(StockadeError):
    """The command line or an API call was malformed."""

    exit_code = 2


class SpecError(StockadeError):
    """A spec does not say what a spec can say; the message holds the place and the cure."""

    exit_code = 2


class NotFoundError(StockadeError):
    """A jail, recipe, spec or generation of that name does not exist."""


class HostError(StockadeError):
    """The host lacks something that is needed: a program, a kernel feature, a right."""


class ElfError(StockadeError):
    """A file claims to be ELF and is damaged, truncated or hostile."""


class ResolveError(StockadeError):
    """Something that the closure needs cannot be found or followed."""


class ObserveError(StockadeError):
    """Observation itself failed: the view, the tracer or the trace."""


class ServiceError(StockadeError):
    """The observed service failed, ended early or never became ready. `log` holds its output."""

    def __init__(self, message: str, *, hint: str | None = None, log: str = "") -> None:
        super().__init__(message, hint=hint)
        self.log = log


class ExerciseError(ServiceError):
    """An exercise did not pass."""


class BuildError(StockadeError):
    """The rootfs could not be made. The generation before it is untouched."""


class StateError(StockadeError):
    """A jail is not in the state that the call needs: running, stopped, built."""


class ProgramError(StockadeError):
    """A fault of the program behind the walls, never of the walls. `status` is its exit status."""

    def __init__(self, message: str, *, hint: str | None = None, status: int | None = None) -> None:
        super().__init__(message, hint=hint)
        self.status = status


class ProgramTimeoutError(ProgramError):
    """The program did not end in its time, and was ended. `stdout` and `stderr` are what it had written until then."""

    def __init__(self, message: str, *, hint: str | None = None, stdout: bytes = b"", stderr: bytes = b"") -> None:
        super().__init__(message, hint=hint)
        self.stdout = stdout
        self.stderr = stderr


class WallError(StockadeError):
    """A fault of the walls, never of the program behind them: a launch step failed."""

    exit_code = 125
