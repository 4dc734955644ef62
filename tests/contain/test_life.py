"""From the start to the end of a jail: signals, orphans, supervisors that die, and what is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import Builder, output
from processes import exists, until, wardens

from stockade import contain, places
from stockade.contain import runfiles
from stockade.errors import NotFoundError, StateError, UsageError, WallError

SLEEP = {"service": {"command": ["/bin/sleep", "100"]}}
PIECES = "for i in 1 2 3 4; do seq 1 1000; sleep 0.1; done; echo end; sleep 9"
TRAP = "trap 'echo caught; exit 7' TERM; echo ready; while :; do sleep 0.05; done"


def test_status_is_passed_on(jail: Builder) -> None:
    jail()
    assert output("test", "/bin/sh", "-c", "exit 3")[0] == 3
    assert output("test", "/bin/sh", "-c", "kill -USR1 $$")[0] == 128 + signal.SIGUSR1
    assert output("test", "/bin/true")[0] == 0


def test_streams_are_passed_through(jail: Builder) -> None:
    jail()
    with contain.launch(
        "test", argv=["/bin/sh", "-c", "cat; echo err >&2"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as running:  # fmt: skip
        assert running.stdin and running.stdout and running.stderr
        running.stdin.write(b"in")
        running.stdin.close()
        assert (running.stdout.read(), running.stderr.read(), running.wait(10)) == (b"in", b"err\n", 0)


@pytest.mark.parametrize("program", ["/bin/nothing", "nothing-on-the-path"])
def test_missing_program_is_127(jail: Builder, program: str) -> None:
    jail()
    with pytest.raises(WallError) as caught:
        output("test", program)
    assert caught.value.exit_code == 127
    assert str(caught.value) == (
        f"cannot execute `{program}`: it, its interpreter or its loader is not in the jail"
    )


def test_file_that_is_not_executable_is_126(jail: Builder) -> None:
    jail()
    with pytest.raises(WallError) as caught:
        output("test", "/etc/passwd")
    assert caught.value.exit_code == 126


def test_signals_reach_the_service(jail: Builder) -> None:
    jail()
    with contain.launch("test", argv=["/bin/sh", "-c", TRAP], stdout=subprocess.PIPE) as running:
        assert running.stdout is not None
        assert running.stdout.read(6) == b"ready\n"
        os.kill(running.supervisor_pid, signal.SIGTERM)
        assert running.wait(10) == 7
        assert running.stdout.read() == b"caught\n"


def test_orphans_are_reaped_and_do_not_outlive_the_service(jail: Builder) -> None:
    jail()
    script = "(sleep 0.1 &) ; (setsid sleep 100 &) ; sleep 0.5; ls -d /proc/[0-9]*; sleep 100"
    with contain.launch("test", argv=["/bin/sh", "-c", script], stdout=subprocess.PIPE) as running:
        assert running.stdout is not None
        init = running.init_pid
        seen = os.read(running.stdout.fileno(), 4096).split()
        # The first orphan is gone, not a zombie: PID 1, the shell, the second orphan.
        assert len(seen) == 3, seen
        children = Path(f"/proc/{init}/task/{init}/children").read_text().split()
        assert len(children) == 2
        running.stop(timeout_s=0.2)
        assert not any(exists(int(child)) for child in children)


def test_service_that_forks_lives_as_long_as_any_of_its_processes(jail: Builder) -> None:
    jail(spec={"service": {"command": ["/bin/sh", "-c", "sleep 100 & exit 0"], "forks": True}})
    with contain.launch("test") as running:
        assert until(lambda: not exists(running.pid))
        time.sleep(0.2)
        assert exists(running.init_pid)
        assert contain.find("test").pid == 0
        assert len(contain.find("test").processes()) == 2
        os.kill(running.init_pid, signal.SIGTERM)
        assert running.wait(10) == 0


def test_service_that_forks_and_fails_ends_the_jail(jail: Builder) -> None:
    jail(spec={"service": {"command": ["/bin/sh", "-c", "sleep 100 & exit 4"], "forks": True}})
    with contain.launch("test") as running:
        assert running.wait(10) == 4


def test_stop_kills_what_ignores_its_signal(jail: Builder) -> None:
    jail()
    with contain.launch("test", argv=["/bin/sh", "-c", "trap '' TERM; echo x; sleep 100"], stdout=-1) as running:
        assert running.stdout is not None
        running.stdout.read(2)
        begun = time.monotonic()
        assert running.stop(timeout_s=0.3) == 128 + signal.SIGKILL
        assert time.monotonic() - begun < 5
        assert not exists(running.init_pid)


def test_jail_ends_when_its_supervisor_is_killed(jail: Builder) -> None:
    jail()
    with contain.launch("test", argv=["/bin/sleep", "100"]) as running:
        os.kill(running.supervisor_pid, signal.SIGKILL)
        assert until(lambda: not exists(running.pid) and not exists(running.init_pid))
        with pytest.raises(WallError, match="the exit status is lost"):
            running.wait(5)


def test_jail_ends_when_its_starter_is_killed(jail: Builder) -> None:
    jail()
    code = (
        "import sys, time\nfrom stockade import contain\n"
        "running = contain.launch('test', argv=['/bin/sleep', '100'])\n"
        "print(running.pid, running.init_pid, running.supervisor_pid, flush=True)\ntime.sleep(100)\n"
    )
    starter = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert starter.stdout is not None
    pids = [int(pid) for pid in starter.stdout.readline().split()]
    starter.kill()
    starter.wait(10)
    starter.stdout.close()
    assert until(lambda: not any(exists(pid) for pid in pids))
    assert contain.running() == ()


def test_detached_jail_outlives_its_starter_and_is_found_and_stopped(jail: Builder) -> None:
    jail(spec={"service": {"command": ["/bin/sh", "-c", TRAP]}})
    code = "from stockade import contain\ncontain.launch('test', detach=True)\n"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)
    found = contain.find("test")
    assert [jail.instance for jail in contain.running()] == ["test"]
    assert exists(found.pid) and exists(found.init_pid) and exists(found.supervisor_pid)
    assert 0 <= found.uptime_s < 30
    assert until(lambda: b"ready\n" in b"".join(contain.logs("test")))
    assert contain.stop("test") == 7
    assert b"".join(contain.logs("test")) == b"ready\ncaught\n"
    assert not any(exists(pid) for pid in (found.pid, found.init_pid, found.supervisor_pid))
    assert list(places.run().iterdir()) == []
    with pytest.raises(NotFoundError, match="jail `test` is not running"):
        contain.stop("test")


def test_jail_whose_supervisor_was_killed_is_still_found_and_stopped(jail: Builder) -> None:
    jail(spec=SLEEP)
    running = contain.launch("test", detach=True)
    os.kill(running.supervisor_pid, signal.SIGKILL)
    assert until(lambda: not exists(running.supervisor_pid))
    found = contain.find("test")
    assert (found.pid, found.supervisor_pid) == (running.pid, 0)
    with pytest.raises(StateError, match="jail `test` is already running"):
        contain.launch("test", detach=True)
    contain.stop("test", timeout_s=1)
    assert not exists(running.init_pid)
    assert list(places.run().iterdir()) == []
    running.close()


def test_recycled_pid_is_not_taken_for_a_jail(jail: Builder) -> None:
    jail()
    runfiles.claim("test")
    place = runfiles.directory("test") / "state"
    own = runfiles.start_time(os.getpid())
    assert own is not None
    place.write_text(f"generation /x\nstarted 1\ninit {os.getpid()} {own + 1}\nservice {os.getpid()} {own + 1}\n")
    assert contain.running() == ()
    with pytest.raises(NotFoundError):
        contain.stop("test")
    place.parent.mkdir(exist_ok=True)
    place.write_text(f"generation /x\nstarted 1\ninit {os.getpid()} {own}\nservice {os.getpid()} {own}\n")
    assert [jail.init_pid for jail in contain.running()] == [os.getpid()]
    place.unlink()


def test_second_start_is_refused(jail: Builder) -> None:
    jail(spec=SLEEP)
    with contain.launch("test") as running:
        with pytest.raises(StateError) as caught:
            contain.launch("test")
        assert str(caught.value) == "jail `test` is already running"
        assert exists(running.pid)
    with contain.launch("test") as again:
        assert again.pid != running.pid


def test_of_two_starts_at_the_same_time_one_wins(jail: Builder) -> None:
    jail(spec=SLEEP)
    for _ in range(5):
        results: list[object] = []
        barrier = threading.Barrier(4)

        def start(results: list[object] = results, barrier: threading.Barrier = barrier) -> None:
            barrier.wait()
            try:
                results.append(contain.launch("test", detach=True))
            except StateError as error:
                results.append(error)

        threads = [threading.Thread(target=start) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        won = [result for result in results if isinstance(result, contain.Running)]
        assert (len(results), len(won)) == (4, 1)
        contain.stop("test", timeout_s=1)
        won[0].close()


def test_commands_run_beside_the_service(jail: Builder) -> None:
    jail(spec=SLEEP)
    with contain.launch("test"), contain.launch("test", argv=["/bin/sleep", "100"]) as second:
        assert [jail.instance for jail in contain.running()] == ["test", second.instance]
        assert second.instance.startswith("test@")
        assert contain.find(second.instance).pid == second.pid


@pytest.mark.parametrize("name", ["../test", "a/b", "..", "", "/", "Test", "a\nb", "-x"])
def test_names_that_lead_elsewhere_are_refused(home: Path, name: str) -> None:
    for function in (contain.launch, contain.find, contain.stop):
        with pytest.raises(UsageError, match="is no name for a jail"):
            function(name)


def test_jail_that_was_not_built_is_not_found(home: Path) -> None:
    with pytest.raises(NotFoundError) as caught:
        contain.launch("absent")
    assert str(caught.value) == "jail `absent` has not been built"
    assert caught.value.hint == "`stockade build absent` builds it"


def test_gate_stops_right_before_the_exec(jail: Builder) -> None:
    jail(spec={"service": {"command": ["/bin/sleep", "100"], "user": "www"}})
    with contain.launch("test", gate=True) as running:
        from processes import status

        assert os.readlink(f"/proc/{running.pid}/exe").startswith("/memfd:warden")
        assert status(running.pid)["NoNewPrivs"] == "1"
        assert status(running.pid)["CapEff"] == "0" * 16
        traced = subprocess.Popen(
            ["strace", "-q", "-e", "trace=execve", "-o", "/dev/null", "-p", str(running.pid)], stderr=subprocess.DEVNULL
        )
        assert until(lambda: status(running.pid)["TracerPid"] == str(traced.pid))
        running.release()
        assert os.readlink(f"/proc/{running.pid}/exe").endswith("/busybox")
        running.stop()
        assert traced.wait(10) is not None
        with pytest.raises(StateError, match="has no closed gate"):
            running.release()


def test_gate_that_closes_ends_the_launch(jail: Builder) -> None:
    jail(spec=SLEEP)
    running = contain.launch("test", gate=True)
    pids = (running.pid, running.init_pid, running.supervisor_pid)
    running.close()
    assert until(lambda: not any(exists(pid) for pid in pids))


def test_gated_program_that_is_missing_is_reported_after_the_gate(jail: Builder) -> None:
    jail(spec={"service": {"command": ["/bin/nothing"]}})
    with contain.launch("test", gate=True) as running, pytest.raises(WallError, match="cannot execute `/bin/nothing`"):
        running.release()


def test_log_takes_output_and_syslog_and_is_rotated(jail: Builder) -> None:
    from stockade.contain import wire
    from stockade.contain.starting import log_path

    jail(
        spec={"service": {"command": ["/bin/sh", "-c", f"echo out; echo err >&2; logger -t me hello; {PIECES}"]}},
        syslog=True,
    )
    small = wire.text(wire.LOG, str(log_path("test")), numbers=(4096, 2))
    contain.launch("test", detach=True).close()
    assert until(lambda: b"me: hello" in b"".join(contain.logs("test")))
    contain.stop("test", timeout_s=0.2)
    text = b"".join(contain.logs("test"))
    assert text.startswith(b"out\nerr\n")
    assert b"<" not in text, "the priority of syslog(3) stands in the log"
    log_path("test").unlink()
    with contain.launch("test", records=[small]):
        assert until(lambda: b"end\n" in b"".join(contain.logs("test", older=True)))
    sizes = {path.name: path.stat().st_size for path in log_path("test").parent.glob("log*")}
    assert set(sizes) == {"log", "log.1", "log.2"}
    assert all(oct(path.stat().st_mode)[-3:] == "600" for path in log_path("test").parent.glob("log*"))
    assert log_path("test").stat().st_size < 65536


def test_status_of_a_detached_jail_that_ended_is_kept(jail: Builder) -> None:
    from stockade.contain.registry import last_status

    jail(spec={"service": {"command": ["/bin/sh", "-c", "exit 5"]}})
    contain.launch("test", detach=True).close()
    assert until(lambda: last_status("test") == 5)
    assert contain.running() == ()
    contain.launch("test", detach=True).close()


def test_launches_leave_nothing_behind(jail: Builder) -> None:
    jail(spec={"service": {"command": ["/bin/true"]}})
    output("test", "/bin/true")

    def host() -> tuple[set[str], int, set[int], int]:
        return (
            set(os.listdir("/proc/self/fd")), len(Path("/proc/self/mountinfo").read_text().splitlines()), wardens(),
            len(list(places.run().iterdir())),
        )  # fmt: skip

    before = host()
    for number in range(200):
        with contain.launch("test", argv=["/bin/true"] if number % 2 else None) as running:
            assert running.wait(20) == 0
    assert host() == before


def test_launch_works_from_many_threads(jail: Builder) -> None:
    jail()
    results: list[tuple[int, str, str]] = []
    threads = [
        threading.Thread(target=lambda number=number: results.append(output("test", "/bin/echo", str(number))))
        for number in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(results) == [(0, f"{number}\n", "") for number in range(8)]


def test_failed_launch_leaves_nothing_behind(jail: Builder) -> None:
    generation = jail(spec=SLEEP)
    (generation / "rootfs/tmp").rmdir()
    before = set(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with pytest.raises(WallError, match=r"launch step `mount` failed on `/tmp` \(ENOENT\)"):
            contain.launch("test")
    assert set(os.listdir("/proc/self/fd")) == before
    assert wardens() == set()
    assert list(places.run().iterdir()) == []
