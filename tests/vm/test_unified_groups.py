"""Jails on a host with control groups of version 2 and systemd: scopes, delegation and limits, with real effect.

The host is a guest, and what is seen from outside of a jail is read in the guest's own tree of groups.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import pytest
from machine import until
from nested import PLACE, USER, Host, needs_same_python, put_in

from stockade import machines
from stockade.records.image import Image
from stockade.vm import control, store

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SUITE, PYTHON = "bookworm", (3, 11)
GROUPS = "/sys/fs/cgroup"
SLICES = {"root": "/system.slice", USER: "/user.slice/user-1000.slice/user@1000.service/app.slice"}
SPEC = """\
stockade = 1
name = "work"
description = "waits, and does what it is told"
[service]
command = ["/bin/sleep", "100000"]
user = "guest"
restart = "on-failure"
[limits]
memory = "48M"
processes = 12
cpus = 0.3
cpu_weight = 50
io_write = "50M"
[files]
programs = ["cat", "sh", "sleep", "tail", "true"]
[[accounts]]
name = "guest"
uid = 2000
home = "/"
shell = "/bin/sh"
[[exercises]]
name = "a shell runs"
where = "inside"
command = ["sh", "-c", "echo works"]
stdout = "^works$"
"""
#: Each start leaves a process behind in the scope for a moment, and the kernel hands on no controller meanwhile.
STARTS = """\
from stockade import contain
for _ in range(12):
    contain.launch("work", detach=True).close()
    contain.stop("work", timeout_s=0.0)
"""
#: Processor time and time of a loop that wants all of a processor for two seconds.
LOOP = "import time; b, e = time.process_time(), time.monotonic() + 2\nwhile time.monotonic() < e: pass\n"


@pytest.fixture(scope="module")
def guest(system_image: Image) -> Iterator[str]:
    """A running guest with Stockade in it, and with a user whose systemd runs."""
    needs_same_python(SUITE, PYTHON)
    name = "host"
    store.create(name, system_image, memory=384 << 20)
    try:
        machines.start_guest(name).close()
        put_in(name)
        script = f"useradd -m -u 1000 {USER} && loginctl enable-linger {USER} && systemctl start user@1000.service"
        status, _, err = control.execute(name, ["sh", "-c", script])
        assert status == 0, err
        yield name
    finally:
        machines.discard(name)


@pytest.fixture(scope="module", params=["root", USER])
def host(guest: str, request: pytest.FixtureRequest) -> Host:
    """The host as root and as an ordinary user have it, each with the built jail `work`."""
    host = Host(guest, request.param)
    directory = "/etc/stockade" if host.user == "root" else "$HOME/.config/stockade"
    host(f"mkdir -p {directory} && cat > {directory}/work.toml <<'END'\n{SPEC}END\nstockade build work")
    return host


@pytest.fixture(scope="module")
def work(host: Host) -> Iterator[Host]:
    """The host while the jail `work` runs; nothing of it is left afterwards."""
    host("stockade start work")
    yield host
    host.run("stockade stop work", check=False)
    assert scopes(host) == []


def scopes(host: Host, name: str = "*") -> list[str]:
    """Scopes of the jail `name` that there are groups of after ten seconds; none as soon as there is none."""
    script = f"""
for i in $(seq 100); do
    found=$(find {GROUPS}{SLICES[host.user]} -maxdepth 1 -name 'stockade-{name}-*.scope')
    [ -n "$found" ] || exit 0
    sleep 0.1
done
echo "$found"
"""
    return host(script).split()


def jail(host: Host) -> dict[str, object]:
    """What `ps` tells of the jail that runs."""
    (found,) = json.loads(host("stockade ps --json"))["jails"]
    return dict(found)


def group_of(host: Host, pid: object) -> str:
    """The control group of a process of the guest, without `0::`."""
    return host(f"cat /proc/{pid}/cgroup").partition("0::")[2]


def setting(host: Host, group: str, file: str) -> str:
    """A file of a control group."""
    return host(f"cat {GROUPS}{group}/{file}")


def test_doctor_says_that_limits_are_kept_in_scopes(host: Host) -> None:
    report = json.loads(host.run("stockade doctor --json", check=False).out)
    (found,) = (feature for feature in report["host"]["features"] if feature["name"] == "cgroups")
    whose = "systemd's" if host.user == "root" else "this user's systemd"
    assert found["state"] == "present"
    assert found["seen"] == f"version 2, in scopes of {whose}, with memory, pids, cpu"


def test_a_jail_is_in_a_scope_of_its_own_with_its_limits_and_its_supervisor_beside_it(work: Host) -> None:
    running = jail(work)
    group = group_of(work, running["service_pid"])
    match = re.fullmatch(re.escape(SLICES[work.user]) + r"/(stockade-work-\d+\.scope)/jail", group)
    assert match, group
    assert group_of(work, running["pid"]) == group
    expected = {
        "memory.max": str(48 << 20), "memory.swap.max": "0", "memory.oom.group": "1", "pids.max": "13",
        "cpu.max": "30000 100000", "cpu.weight": "50",
    }  # fmt: skip
    assert {file: setting(work, group, file) for file in expected} == expected
    if work.user == "root":  # systemd delegates no io to users
        assert re.fullmatch(r"\d+:\d+ rbps=max wbps=52428800 riops=max wiops=max", setting(work, group, "io.max"))
    supervisor = setting(work, group.removesuffix("jail") + "supervisor", "cgroup.procs")
    assert work(f"cat /proc/{supervisor}/comm").endswith("warden")
    manager = "systemctl" if work.user == "root" else "XDG_RUNTIME_DIR=/run/user/1000 systemctl --user"
    assert work(f"{manager} is-active {match[1]}") == "active"


def test_figures_of_ps_are_those_of_the_group(work: Host) -> None:
    running = jail(work)
    group = group_of(work, running["service_pid"])
    assert running["processes"] == len(setting(work, group, "cgroup.procs").split())
    assert 0 < int(str(running["memory"])) <= int(setting(work, group, "memory.peak"))
    microseconds = int(setting(work, group, "cpu.stat").split()[1])
    assert 0 <= float(str(running["cpu_s"])) <= microseconds / 1e6 + 0.01


def test_a_command_that_enters_is_held_by_the_jails_limits(work: Host) -> None:
    group = group_of(work, jail(work)["service_pid"])
    script = """
stockade exec work -- sh -c 'sleep 1000 & wait' &
for i in $(seq 100); do
    pid=$(pgrep -f '^sleep 1000$') && break
    sleep 0.1
done
cat /proc/$pid/cgroup
stockade exec work -- sh -c 'for i in 1 2 3 4 5 6 7 8 9 10 11 12; do sleep 20 & done' || echo refused
kill $!
"""
    result = work.run(script)
    assert result.out.split() == [f"0::{group}", "refused"], result
    assert "fork" in result.err.lower()


def test_memory_past_the_limit_ends_the_jail_and_nothing_else_and_the_next_life_has_the_same(work: Host) -> None:
    first = jail(work)
    assert work.run("sleep 300 & other=$!; stockade exec work -- tail /dev/zero; s=$?; kill $other && exit $s",
                    check=False).status == 137  # fmt: skip
    assert until(lambda: jail(work)["restarts"] == int(str(first["restarts"])) + 1, seconds=60.0)
    assert until(lambda: jail(work)["service_pid"] not in (None, first["service_pid"]), seconds=60.0)
    group = group_of(work, jail(work)["service_pid"])
    assert setting(work, group, "memory.max") == str(48 << 20)
    assert until(lambda: len(setting(work, group, "cgroup.procs").split()) == 2)


def test_a_jail_without_its_supervisor_is_stopped_with_its_scope(work: Host) -> None:
    group = group_of(work, jail(work)["service_pid"])
    work(f"kill -9 $(cat {GROUPS}{group.removesuffix('jail')}supervisor/cgroup.procs)")
    assert until(lambda: jail(work)["supervised"] is False, seconds=60.0)
    assert group_of(work, jail(work)["service_pid"]) == group
    work("stockade stop work")
    assert scopes(work) == []
    work("stockade start work")


def test_a_jail_starts_every_time(work: Host) -> None:
    work("stockade stop work")
    work(f"PYTHONPATH={PLACE} python3 - <<'END'\n{STARTS}END")
    assert scopes(work) == []
    work("stockade start work")


@pytest.mark.parametrize(("limit", "status"), [("--processes 8", 2), ("--processes 40", 0)])
def test_processes_of_a_contained_command_are_counted(host: Host, limit: str, status: int) -> None:
    script = "for i in 1 2 3 4 5 6 7 8 9 10 11 12; do sleep 1000 & done"
    assert host.run(f"stockade contain {limit} -- sh -c '{script}'", check=False).status == status
    assert scopes(host, "contain") == []


def test_memory_of_a_contained_command_is_bounded(host: Host) -> None:
    allocate = "x = bytearray(24 << 20); print(len(x), flush=True); x = bytearray(96 << 20); print(len(x))"
    bounded = host.run(f"stockade contain --memory 40M -- python3 -c '{allocate}'", check=False)
    assert (bounded.status, bounded.out.split()) == (137, [str(24 << 20)])
    assert host(f"stockade contain --memory 200M -- python3 -c '{allocate}'").split() == [str(24 << 20), str(96 << 20)]


def test_processor_time_of_a_contained_command_is_held_back(host: Host) -> None:
    code = f"{LOOP}print(time.process_time() - b)"
    held = float(host(f"stockade contain --cpus 0.2 -- python3 -c '{code}'"))
    free = float(host(f"stockade contain -- python3 -c '{code}'"))
    # 0.4 are due. What this host takes away while the loop runs counts as the loop's: the guest's clock goes on.
    assert held < 1.0
    assert free > held + 0.4


def test_a_jail_that_was_started_without_a_session_is_seen_from_one(guest: str) -> None:
    """As by cron(8) or sudo(8), which tell no XDG_RUNTIME_DIR."""
    host = Host(guest, USER)
    host.run("stockade stop work", check=False)
    host("env -u XDG_RUNTIME_DIR -u DBUS_SESSION_BUS_ADDRESS sh -c "
         "'PYTHONPATH=/opt/stockade python3 -m stockade start work'")  # fmt: skip
    try:
        assert host('test -n "$XDG_RUNTIME_DIR"; stockade exec work -- sh -c "echo here"') == "here"
    finally:
        host("stockade stop work")
    assert scopes(host) == []
