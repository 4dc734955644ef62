"""Sockets that a service is given while it is observed, and what they say of its start."""

from __future__ import annotations

import pytest

from stockade import observe
from stockade.errors import ExerciseError, HostError, ServiceError
from stockade.records.spec import Exercise, Network, Ready, Service, Spec

pytestmark = pytest.mark.usefixtures("as_root", "strace")


def outside(*listen: str, ready: Ready | None = None, exercises: tuple[Exercise, ...] = ()) -> observe.Observation:
    """A service that is given sockets and opens none of its own."""
    service = Service(command=("sleep", "100"), ready=ready or Ready())
    spec = Spec(name="given", service=service, network=Network(listen=listen), exercises=exercises)
    return observe.outside(spec, seeds=(), substitutions={}, identity=observe.Identity())


@pytest.mark.parametrize(
    ("listen", "ready", "waited"),
    [
        ("5353/udp", Ready(tcp=5353, timeout_s=0.5), "TCP port 5353 is listened to"),
        ("5353", Ready(udp=5353, timeout_s=0.5), "UDP port 5353 is bound"),
    ],
)
def test_a_port_of_the_other_protocol_than_that_of_a_given_socket_is_waited_for(
    listen: str, ready: Ready, waited: str
) -> None:
    with pytest.raises(ServiceError) as caught:
        outside(listen, ready=ready)
    assert caught.value.message == f"the service was not ready within 0.5 s: waited until {waited}"


@pytest.mark.parametrize("ready", [Ready(tcp=5353), Ready(udp=5353)])
def test_an_exercise_after_a_condition_that_tells_nothing_may_have_come_too_early(ready: Ready) -> None:
    exercises = (Exercise(command=("false",)),)
    with pytest.raises(ExerciseError) as caught:
        outside("5353", "5353/udp", ready=ready, exercises=exercises)
    assert (caught.value.hint or "").endswith("; if it came too early, set `ready` in `[service]`")


@pytest.mark.parametrize(
    ("listen", "reason", "hint"),
    [
        (
            ("127.0.0.1:81", "0.0.0.0:81"), "Address already in use",
            "see `listen` in `[network]`: two entries may clash",
        ),
        (("[fe80::1]:81",), "Invalid argument", None),
    ],
)  # fmt: skip
def test_a_socket_that_cannot_be_had_is_told_with_what_fits_its_reason(
    listen: tuple[str, ...], reason: str, hint: str | None
) -> None:
    with pytest.raises(HostError) as caught:
        outside(*listen)
    assert caught.value.message == f"cannot listen on `{listen[-1]}` where the exercises run: {reason}"
    assert caught.value.hint == hint
