"""Views and specs for tests that drive the real thing."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator

import pytest

from stockade import observe
from stockade.records.exercise import Outcome
from stockade.records.spec import Exercise, Ready, Service, Spec

PYTHON = "/usr/bin/python3"


@pytest.fixture
def as_root() -> None:
    if os.geteuid() != 0:
        pytest.skip("a view with real ids is root's: run the tests as root")


@pytest.fixture
def strace() -> None:
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed: `apt-get install strace`")


@pytest.fixture
def view(as_root: None) -> Iterator[observe.View]:
    with observe.View.open() as opened:
        yield opened


@pytest.fixture
def sh(view: observe.View) -> Callable[..., Outcome]:
    """Run a shell script in `view`, with the capabilities that reach the host when `services` is False."""
    from stockade.observe.exercise import CLIENT_ENVIRONMENT, communicate

    def run(script: str, *, services: bool = True) -> Outcome:
        return communicate(
            lambda stdin, stdout, stderr: view.spawn(
                ["sh", "-c", script], environment=CLIENT_ENVIRONMENT, stdin=stdin, stdout=stdout, stderr=stderr,
                services=services,
            ),
            b"",
            20.0,
        )  # fmt: skip

    return run


@pytest.fixture
def outside(strace: None) -> Callable[..., observe.Observation]:
    """Observe a command outside a jail, as the caller."""

    def run(
        *command: str, exercises: tuple[Exercise, ...] = (), ready: Ready | None = None, forks: bool = False,
        **options: object
    ) -> observe.Observation:
        service = Service(command=command, ready=ready or Ready(), forks=forks)
        spec = Spec(name="test", service=service, exercises=exercises)
        given = {
            "seeds": (),
            "substitutions": {},
            "identity": observe.Identity(os.geteuid(), os.getegid()),
            **options,
        }
        return observe.outside(spec, **given)  # type: ignore[arg-type]

    return run
