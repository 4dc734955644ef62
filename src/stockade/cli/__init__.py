"""The command line. `stockade run NAME -- COMMAND` goes straight to the launcher, all else through the parser.

Nothing is imported here but what is used: a parser costs more than the launch of a jail.
"""

from __future__ import annotations

import gc
import os
import sys

__all__ = ["main"]

_LAUNCH_FAILED = "--launch-failed"
_OBJECTS = 100_000  # more of them than before: only then the collector of cycles runs


def main(words: list[str]) -> int:
    """Carry out the command line `words` (without the program's name) and return the exit status."""
    if len(words) > 3 and words[0] == "run" and words[2] == "--":
        from stockade.contain import fast

        # Returns only when it has not started anything: then the parser's `run` says why.
        start = os.path.join(os.path.dirname(os.path.dirname(__file__)), "__main__.py")
        fast.run(words[1], words[3:], on_failure=(sys.executable, "-I", start, _LAUNCH_FAILED))
    if sys.flags.no_site:
        _find_packages()
    # Most verbs end before there is garbage worth looking for.
    gc.set_threshold(_OBJECTS)
    _load_msgspec()
    from stockade.cli import application

    if words[:1] == [_LAUNCH_FAILED]:
        return application.launch_failed(words[1])
    return application.run(words)


def _load_msgspec() -> None:
    """Import msgspec with an interrupt held back: in the middle of its initialisation one was seen to crash Python."""
    import signal

    held = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT,))
    try:
        import msgspec  # noqa: F401
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)


def _find_packages() -> None:
    """Add to the path where the packages are that Stockade needs: beside itself, or in the interpreter's environment.

    `site` finds more, as what `.pth` files name, and takes a third of what the interpreter itself takes to start.
    """
    environment = os.path.dirname(os.path.dirname(sys.executable))
    library = f"{environment}/lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"
    for place in () if _is_shared(environment) else (sys.path[-1], library):
        if os.path.isdir(f"{place}/msgspec"):
            sys.path.append(place)
            return
    import site

    site.main()


def _is_shared(environment: str) -> bool:
    """Whether a virtual environment has some of its packages from the interpreter that it was made of."""
    try:
        with open(f"{environment}/pyvenv.cfg", "rb") as file:
            return b"include-system-site-packages=true" in b"".join(file.read().lower().split())
    except OSError:
        return False
