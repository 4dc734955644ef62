"""A service that ends is started anew as its spec says: a whole new life, later and later, until `stop`."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import time
from pathlib import Path

import pytest
from conftest import Builder
from processes import exists, until, wardens

from stockade import contain, places
from stockade.contain import runfiles, wire
from stockade.errors import NotFoundError, StateError, WallError

# Milliseconds in place of seconds: first delay, longest, and a life after which the first comes again.
QUICK = (40, 160, 60_000)


def policy(restart: str, script: str, **service: object) -> dict[str, object]:
    return {"service": {"command": ["/bin/sh", "-c", script], "restart": restart, **service}}


def start(restart: str, numbers: tuple[int, int, int] = QUICK) -> contain.Running:
    """Start `test`, with quicker restarts than the compiled ones."""
    when = wire.RESTART_ALWAYS if restart == "always" else wire.RESTART_ON_FAILURE
    return contain.launch("test", detach=True, records=[wire.record(wire.RESTART, when, *numbers)])


def log() -> list[str]:
    try:
        return b"".join(contain.logs("test")).decode().splitlines()
    except NotFoundError:
        return []


def lives(word: str = "begun") -> int:
    return log().count(word)


def test_each_life_is_a_whole_new_launch(jail: Builder) -> None:
    jail(spec=policy("always", "echo begun; echo pid $$; ls /tmp; touch /tmp/left; sleep 0.05"))
    start("always").close()
    first = contain.find("test").init_pid
    assert until(lambda: lives() >= 4)
    assert until(lambda: contain.find("test").init_pid not in (0, first))
    assert contain.find("test").restarts >= 2
    contain.stop("test", timeout_s=0.5)
    text = "\n".join(log())
    assert "left" not in text.split(), "the tmpfs of the life before was still there"
    assert set(re.findall(r"^pid (\d+)$", text, re.MULTILINE)) == {"2"}, "the pid namespace was not new"


def test_failure_only_is_restarted_on_failure(jail: Builder) -> None:
    jail(spec=policy("on-failure", "echo begun; exit 0"))
    start("on-failure").close()
    assert until(lambda: contain.running() == ())
    assert [ended.status for ended in contain.ended()] == [0]
    assert (lives(), contain.ended()[0].restarts) == (1, 0)


def test_service_that_is_not_to_be_restarted_has_one_life(jail: Builder) -> None:
    jail(spec=policy("no", "echo begun; exit 3"))
    contain.launch("test", detach=True).close()
    assert until(lambda: contain.running() == () and contain.ended() != ())
    time.sleep(0.3)
    assert (lives(), contain.ended()[0].status) == (1, 3)


@pytest.mark.parametrize(("script", "cause"), [("exit 3", "exit 3"), ("kill -SEGV $$", "signal 11")])
def test_failure_is_restarted_and_the_log_says_why_and_when(jail: Builder, script: str, cause: str) -> None:
    jail(spec=policy("on-failure", f"printf begun; {script}"))
    start("on-failure").close()
    assert until(lambda: any("restart 2" in line for line in log()))
    contain.stop("test", timeout_s=0.5)
    said = [line for line in log() if "restart 1 in" in line]
    assert len(said) == 1
    pattern = rf"\d{{4}}-\d\d-\d\dT\d\d:\d\d:\d\dZ stockade: the service's life ended \({cause}\); restart 1 in 0.0 s"
    assert re.fullmatch(pattern, said[0]), said
    assert runfiles.read("test") is None


@pytest.mark.slow
def test_delay_doubles_up_to_the_longest_and_a_long_life_resets_it(jail: Builder) -> None:
    jail(spec=policy("always", "read up rest < /proc/uptime; echo up $up; exit 1"))
    start("always", (300, 1200, 60_000)).close()
    assert until(lambda: sum(line.startswith("up ") for line in log()) >= 5, seconds=15)
    contain.stop("test", timeout_s=0.5)
    times = [float(line.split()[1]) for line in log() if line.startswith("up ")]
    gaps = [round(later - earlier, 1) for earlier, later in zip(times, times[1:], strict=False)][:4]
    wanted = (0.3, 0.6, 1.2, 1.2)
    assert all(abs(gap - want) < 0.28 for gap, want in zip(gaps, wanted, strict=True)), gaps


def test_long_life_resets_the_delay(jail: Builder) -> None:
    jail(spec=policy("always", "sleep 0.3; exit 1"))
    start("always", (100, 60_000, 200)).close()
    assert until(lambda: any("restart 4" in line for line in log()), seconds=15)
    contain.stop("test", timeout_s=0.5)
    assert {line.rpartition(" in ")[2] for line in log() if re.search(r"restart \d", line)} == {"0.1 s"}


def test_compiled_policy_begins_with_a_second_and_ends_with_a_minute(jail: Builder) -> None:
    plan = (jail(spec=policy("on-failure", "exit 1")) / "plan").read_bytes()
    assert wire.record(wire.RESTART, wire.RESTART_ON_FAILURE, 1_000, 60_000, 60_000) in plan
    contain.launch("test", detach=True).close()
    assert until(lambda: any("restart 1 in 1.0 s" in line for line in log()))


def test_nothing_enters_a_jail_between_two_lives(jail: Builder) -> None:
    jail(spec=policy("always", "exit 1"))
    start("always", (60_000, 60_000, 60_000)).close()
    assert until(lambda: contain.find("test").state == "restarting")
    with pytest.raises(StateError, match="waits for its restart") as caught:
        contain.enter("test", ["/bin/true"])
    assert caught.value.hint is not None and "stockade run test" in caught.value.hint


def test_stop_between_two_lives_ends_the_jail_for_good(jail: Builder) -> None:
    jail(spec=policy("always", "echo begun; exit 1"))
    start("always", (60_000, 60_000, 60_000)).close()
    assert until(lambda: contain.find("test").state == "restarting")
    found = contain.find("test")
    assert (found.init_pid, found.pid, found.processes()) == (0, 0, ())
    assert exists(found.supervisor_pid)
    began = time.monotonic()
    assert contain.stop("test") == 1
    assert time.monotonic() - began < 3
    assert not exists(found.supervisor_pid)
    assert (contain.running(), contain.ended(), list(places.run().iterdir())) == ((), (), [])


def test_stop_of_a_running_life_is_the_last_word(jail: Builder) -> None:
    jail(spec=policy("always", "echo begun; exec sleep 100"))
    start("always").close()
    assert until(lambda: lives() == 1)
    supervisor = contain.find("test").supervisor_pid
    assert contain.stop("test") == 128 + signal.SIGTERM
    assert not exists(supervisor)
    time.sleep(0.3)
    assert (lives(), contain.running()) == (1, ())


def test_stop_at_any_moment_leaves_nothing(jail: Builder) -> None:
    jail(spec=policy("always", "exit 1"))
    for turn in range(12):
        running = start("always", (1, 1, 60_000))
        supervisor = running.supervisor_pid
        running.close()
        time.sleep(turn * 0.007)
        contain.stop("test", timeout_s=0.2)
        assert not exists(supervisor)
        assert list(places.run().iterdir()) == []


def test_terminated_supervisor_takes_its_jail_along_for_good(jail: Builder) -> None:
    jail(spec=policy("always", "echo begun; exec sleep 100"))
    start("always").close()
    assert until(lambda: lives() == 1)
    found = contain.find("test")
    os.kill(found.supervisor_pid, signal.SIGTERM)
    assert until(lambda: not exists(found.supervisor_pid) and not exists(found.init_pid))
    assert (lives(), contain.running()) == (1, ())


def test_killed_first_process_is_restarted(jail: Builder) -> None:
    jail(spec=policy("on-failure", "echo begun; exec sleep 100"))
    start("on-failure").close()
    assert until(lambda: lives() == 1)
    os.kill(contain.find("test").init_pid, signal.SIGKILL)
    assert until(lambda: lives() == 2)
    assert contain.find("test").restarts == 1


def test_second_start_is_refused_between_two_lives(jail: Builder) -> None:
    jail(spec=policy("always", "exit 1"))
    start("always", (60_000, 60_000, 60_000)).close()
    assert until(lambda: contain.find("test").state == "restarting")
    with pytest.raises(StateError, match="already running"):
        contain.launch("test", detach=True)


def test_published_port_stays_open_between_two_lives(jail: Builder) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    script = "echo begun; echo answer | nc -l -p 80; exit 1"
    network = {"mode": "private", "publish": [f"{port}:80"]}
    jail(spec=policy("always", script) | {"network": network})
    start("always", (200, 200, 60_000)).close()
    assert until(lambda: lives() == 1)
    for _ in range(3):
        answers = []
        for _ in range(50):
            # The first connection after a new start may come before the service listens.
            with (
                contextlib.suppress(ConnectionResetError),
                socket.create_connection(("127.0.0.1", port), timeout=10) as client,
            ):
                answers.append(client.recv(100))
            if answers and answers[-1]:
                break
            time.sleep(0.05)
        assert answers[-1] == b"answer\n"
    assert until(lambda: contain.find("test").restarts >= 3)
    assert contain.find("test").ports() == (f"{port}:80",)
    assert not contain.find("test").helper_lost


def test_failed_launch_of_a_further_life_is_tried_again(jail: Builder) -> None:
    generation = jail(spec=policy("always", "echo begun; sleep 0.2; exit 1"))
    start("always", (100, 200, 60_000)).close()
    assert until(lambda: lives() == 1)
    (generation / "rootfs").rename(generation / "aside")
    assert until(lambda: any("(failed 2 source: rootfs)" in line for line in log()))
    (generation / "aside").rename(generation / "rootfs")
    before = lives()
    assert until(lambda: lives() > before)


def test_failed_first_launch_is_an_error_and_no_life(jail: Builder) -> None:
    generation = jail(spec=policy("always", "exit 1"))
    (generation / "rootfs/tmp").rmdir()
    with pytest.raises(WallError, match="launch step `mount`"):
        start("always")
    assert wardens() == set()
    assert contain.running() == ()


def test_many_lives_leave_the_supervisor_as_it_was(jail: Builder) -> None:
    jail(spec=policy("always", "exit 1"))
    running = start("always", (1, 1, 60_000))
    supervisor = running.supervisor_pid
    assert until(lambda: contain.find("test").restarts > 3)

    def least() -> int:
        """What is open at the quietest of some moments: a launch opens a tree for each mount."""
        return min(len(os.listdir(f"/proc/{supervisor}/fd")) for _ in range(200))

    before = least()
    assert until(lambda: contain.find("test").restarts > 60, seconds=30)
    assert until(lambda: least() <= before), "descriptors are left by each life"
    assert (places.runtime("test") / "state").stat().st_size < 1500
    contain.stop("test", timeout_s=0.2)
    running.close()
    assert list(places.run().iterdir()) == []


def test_supervisor_that_restarts_costs_little_memory(jail: Builder) -> None:
    jail(spec=policy("always", "exec sleep 100"))
    start("always").close()
    found = contain.find("test")
    text = Path(f"/proc/{found.supervisor_pid}/smaps_rollup").read_text()
    init = Path(f"/proc/{found.init_pid}/smaps_rollup").read_text()
    share = sum(int(re.search(r"^Pss: +(\d+) kB", part, re.M)[1]) for part in (text, init))  # type: ignore[index]
    assert share <= 512, f"{share} KiB for the two processes of Stockade's own"
