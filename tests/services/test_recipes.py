"""Every recipe, unedited: built, started, and its exercises done again by real clients on the running jail."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from jailer import SYSTEM_PATH, Running, Stockade, failure, lacking

from stockade import specfile
from stockade.kernel import capabilities
from stockade.records.publish import parse
from stockade.records.spec import Exercise, Ready, Spec

pytestmark = pytest.mark.slow

SPECS = {name: specfile.load(specfile.recipe(name)) for name in specfile.recipes()}

PROGRAMS: dict[str, dict[str, str]] = {
    "apache2": {"apache2": "apache2", "curl": "curl", "openssl": "openssl"},
    "basic": {"bash": "bash", "strace": "strace"},
    "honeypot": {
        "inetutils-inetd": "inetutils-inetd", "telnetd": "inetutils-telnetd", "telnet": "telnet", "expect": "expect",
    },
    "named": {"named": "bind9", "dig": "bind9-dnsutils", "nsupdate": "bind9-dnsutils"},
    "nginx": {"nginx": "nginx-light", "curl": "curl", "openssl": "openssl"},
    "postfix": {"postfix": "postfix", "curl": "curl"},
    "sshd": {"sshd": "openssh-server", "ssh": "openssh-client", "sshpass": "sshpass"},
    "telnetd": {
        "inetutils-inetd": "inetutils-inetd", "telnetd": "inetutils-telnetd", "telnet": "telnet", "expect": "expect",
    },
    "vsftpd": {"vsftpd": "vsftpd", "curl": "curl", "lftp": "lftp"},
}  # fmt: skip

# Ids of a jail that root starts lie above those of the host's accounts and of its ordinary users' ranges.
FIRST_JAIL_ID = 1879048192

# Services that run as an account of their own from the start.
NEVER_ROOT = ("apache2", "named", "nginx")

# Recipes whose command serves clients; the others are for `run`.
MACHINES = {name: spec for name, spec in SPECS.items() if "vm" in spec.walls}
SERVICES = {name: spec for name, spec in SPECS.items() if spec.service.ready != Ready() and name not in MACHINES}
PROGRAMS_TO_RUN = {name: spec for name, spec in SPECS.items() if name not in SERVICES and name not in MACHINES}


class Jails:
    """Builds and starts each recipe once, when it is first asked for."""

    def __init__(self, stockade: Stockade) -> None:
        self.stockade = stockade
        self._built: dict[str, str] = {}
        self._running: dict[str, Running] = {}

    def built(self, name: str) -> Spec:
        """The spec of a recipe, whose jail has been built."""
        reason = lacking({**PROGRAMS[name], "nsenter": "util-linux"})
        if reason:
            pytest.skip(reason)
        if name not in self._built:
            done = self.stockade.run("build", name)
            self._built[name] = "" if done.returncode == 0 else f"{done.stdout}\n{done.stderr}"
        assert self._built[name] == ""
        return SPECS[name]

    def started(self, name: str) -> Running:
        """The jail of a recipe, which has been started."""
        spec = self.built(name)
        if name not in self._running:
            self.stockade.good("start", name)
            self._running[name] = Running(self.stockade, spec, self.stockade.running()[name])
        return self._running[name]

    def close(self) -> None:
        """Stop what still runs."""
        for name in self.stockade.running():
            self.stockade.good("stop", name)


@pytest.fixture(scope="module")
def jails(stockade: Stockade) -> Iterator[Jails]:
    made = Jails(stockade)
    yield made
    made.close()


@pytest.fixture
def jail(request: pytest.FixtureRequest, jails: Jails) -> Running:
    name: str = request.param
    return jails.started(name)


@pytest.fixture
def built(request: pytest.FixtureRequest, jails: Jails) -> Spec:
    name: str = request.param
    return jails.built(name)


def every_exercise(specs: Mapping[str, Spec]) -> Iterator[object]:
    for name, spec in specs.items():
        for exercise in spec.exercises:
            yield pytest.param(name, exercise, id=f"{name}: {exercise.name}")


@pytest.mark.parametrize(("jail", "exercise"), [*every_exercise(SERVICES)], indirect=["jail"])
def test_exercise_passes_on_the_started_jail(jail: Running, exercise: Exercise, tmp_path: Path) -> None:
    assert failure(exercise, jail.client(exercise, tmp_path)) == ""


@pytest.mark.parametrize(("built", "exercise"), [*every_exercise(PROGRAMS_TO_RUN)], indirect=["built"])
def test_exercise_passes_behind_the_walls(built: Spec, exercise: Exercise, stockade: Stockade) -> None:
    assert exercise.where == "inside"
    done = stockade.run("run", built.name, "--", *exercise.command, timeout_s=exercise.timeout_s, stdin=exercise.input)
    assert failure(exercise, done) == ""


@pytest.mark.parametrize("jail", SERVICES, indirect=True)
def test_no_process_of_a_jail_has_an_id_of_the_host(jail: Running) -> None:
    processes = jail.processes()
    assert jail.pid in processes
    for status in processes.values():
        ids = {int(number) for number in (*status["Uid"].split(), *status["Gid"].split(), *status["Groups"].split())}
        assert min(ids) >= FIRST_JAIL_ID, status


@pytest.mark.parametrize("jail", NEVER_ROOT, indirect=True)
def test_service_that_needs_no_root_has_none(jail: Running) -> None:
    services = {pid: status for pid, status in jail.processes().items() if pid != jail.pid}
    assert services
    names = {status["Name"] for status in services.values()}
    root = int(jail.processes()[jail.pid]["Uid"].split()[0])
    for status in services.values():
        assert int(status["Uid"].split()[0]) != root, names
        assert int(status["CapPrm"], 16) == 0, names


@pytest.mark.parametrize("jail", SERVICES, indirect=True)
def test_service_has_no_capability_beyond_its_policy(jail: Running) -> None:
    assert jail.spec.policy.capabilities != "auto"
    allowed = capabilities.mask(jail.spec.policy.capabilities)
    services = {pid: status for pid, status in jail.processes().items() if pid != jail.pid}
    assert services
    for status in services.values():
        assert int(status["CapBnd"], 16) & ~allowed == 0, status["Name"]
        assert status["NoNewPrivs"] == "1", status["Name"]


@pytest.mark.parametrize("jail", SERVICES, indirect=True)
def test_stopped_jail_leaves_nothing(jail: Running) -> None:
    jail.stockade.good("stop", jail.spec.name)
    assert jail.spec.name not in jail.stockade.running()
    assert jail.leftovers() == []


def test_started_honeypot_lets_in_at_its_published_port_and_keeps_what_was_typed(jails: Jails, tmp_path: Path) -> None:
    assert list(MACHINES) == ["honeypot"]
    spec, stockade = jails.built("honeypot"), jails.stockade
    (exercise,), (published,) = spec.exercises, map(parse, spec.network.publish)
    dialogue = (exercise.input or "").replace("telnet 127.0.0.1", f"telnet {published.address} {published.port}")
    stockade.good("start", "honeypot")
    try:
        environment = {"PATH": SYSTEM_PATH, "HOME": str(tmp_path), "LC_ALL": "C.UTF-8"}
        done = subprocess.run(
            exercise.command, env=environment, input=dialogue, capture_output=True, text=True, errors="surrogateescape",
            timeout=60, check=False,
        )  # fmt: skip
        assert failure(exercise, done) == ""
        assert "toor" in stockade.good("guest", "record", "--typed", "honeypot")
    finally:
        stockade.good("stop", "honeypot")
    assert "honeypot" not in stockade.running()


def test_each_recipe_shows_a_refusal() -> None:
    """A service that only ever says yes is not shown to work; a honeypot is there to say it."""

    def refuses(spec: Spec) -> bool:
        return any(exercise.refused or exercise.status or "refused" in exercise.name for exercise in spec.exercises)

    assert [name for name, spec in SPECS.items() if not refuses(spec)] == ["honeypot"]


def test_each_recipe_is_tested_with_the_packages_it_needs() -> None:
    assert sorted(PROGRAMS) == sorted(SPECS)


def test_no_two_recipes_publish_the_same_port() -> None:
    """All of them can run on one host at once."""
    places = [
        (published.address, published.port, published.protocol)
        for spec in SPECS.values()
        for published in map(parse, spec.network.publish)
    ]
    assert sorted(places) == sorted(set(places))
