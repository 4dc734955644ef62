"""What goes wrong, by the command line: one clear error with a hint, the jail of before, and nothing left behind."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from faultbench import LIMIT_S, NAME, SOURCE, SPEC, Bench, adopting, errors

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="views and jails with ids of their own are root's: run it as root"),
    pytest.mark.skipif(shutil.which("strace") is None, reason="not installed here: `apt-get install strace`"),
]


@pytest.fixture(scope="module", autouse=True)
def adopted() -> Iterator[None]:
    with adopting():
        yield


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    bench = Bench(tmp_path_factory.mktemp("home"))
    bench.write(SPEC)
    bench.good("build", NAME)
    bench.sound()
    return bench


@pytest.fixture
def bench(built: Bench) -> Iterator[Bench]:
    """The jail `fault`, built; the test may change its spec."""
    before = os.readlink(built.jail / "current")
    yield built
    built.write(SPEC)
    assert os.readlink(built.jail / "current") == before
    built.sound()


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """A directory that a view shows and a jail may have."""
    directory = Path(tempfile.mkdtemp(prefix="stockade-", dir="/srv"))
    directory.chmod(0o755)
    yield directory
    shutil.rmtree(directory)


def program(path: Path, content: bytes, mode: int = 0o755) -> str:
    path.write_bytes(content)
    path.chmod(mode)
    return str(path)


def hostile_elf(seed: int) -> bytes:
    """A real program, with a header that lies."""
    data = bytearray(Path("/bin/cat").read_bytes())
    chance = random.Random(seed)
    for _ in range(12):
        data[chance.randrange(0x10, 0x200)] = chance.randrange(256)
    return bytes(data)


def spec_of(command: str) -> str:
    return f'name = "{NAME}"\n[service]\ncommand = [{json.dumps(command)}]\n'


def faulty_programs(place: Path) -> dict[str, tuple[str, str, str]]:
    """What is wrong, the command that has it, and what the error says (with where to look in the hint)."""
    (place / "loop").unlink(missing_ok=True)
    (place / "loop").symlink_to(place / "loop")
    script = program(place / "script", b"#!/opt/none/interpreter -x\n")
    nested = program(place / "nested", f"#!{script}\n".encode())
    env = program(place / "env", b"#!/usr/bin/env no-such-interpreter\n")
    plain = program(place / "plain", b"text\n", 0o644)
    cut = program(place / "cut", Path("/bin/cat").read_bytes()[:3000])
    return {
        "missing": ("/opt/none/program", "the command `/opt/none/program` does not exist", "install the package"),
        "not on PATH": ("no-such-program", "the command `no-such-program` is on no directory of PATH", "give its path"),
        "a directory": ("/etc", "the command `/etc` is a directory", "name the program in it"),
        "a loop": (f"{place}/loop", f"the command `{place}/loop` is a loop of symlinks", "name the program itself"),
        "not executable": (plain, f"the command `{plain}` is not executable", f"`chmod +x {plain}`"),
        "no interpreter": (
            script, f"cannot run `{script}`: its interpreter `/opt/none/interpreter` is missing", "install the package",
        ),
        "no interpreter below": (
            nested, f"cannot run `{script}`: its interpreter `/opt/none/interpreter` is missing", "install the package",
        ),
        "no interpreter by env": (
            env, f"cannot run `{env}`: its interpreter `no-such-interpreter` is missing", "no-such-interpreter",
        ),
        "damaged ELF": (cut, f"cannot read the ELF file `{cut}`: its dynamic section ends beyond the file", "damaged"),
    }  # fmt: skip


FAULTS = (
    "missing", "not on PATH", "a directory", "a loop", "not executable", "no interpreter", "no interpreter below",
    "no interpreter by env", "damaged ELF",
)  # fmt: skip


@pytest.mark.parametrize("options", [(), ("--no-observe",)], ids=["observed", "unobserved"])
@pytest.mark.parametrize("fault", FAULTS)
def test_command_that_cannot_be_executed_is_named_with_the_cause(
    bench: Bench, place: Path, fault: str, options: tuple[str, ...]
) -> None:
    command, message, cure = faulty_programs(place)[fault]
    bench.write(spec_of(command))
    done = bench.run("build", NAME, *options)
    error, hint = errors(done)
    assert (done.returncode, done.stdout, error) == (1, "", message)
    assert cure in hint
    bench.clean()


@pytest.mark.parametrize("fault", FAULTS[:5])
def test_new_refuses_a_command_that_cannot_be_executed(bench: Bench, place: Path, fault: str) -> None:
    done = bench.run("new", "other", "--", faulty_programs(place)[fault][0])
    error, hint = errors(done)
    assert (done.returncode, done.stdout) == (1, "")
    assert faulty_programs(place)[fault][0] in error
    assert hint
    assert not (bench.home / "config/other.toml").exists()


def test_text_that_only_a_shell_would_run_is_told_its_first_line(bench: Bench, place: Path) -> None:
    text = program(place / "text", b"echo hello\n")
    bench.write(spec_of(text))
    done = bench.run("build", NAME)
    error, hint = errors(done)
    assert (done.returncode, done.stdout) == (1, "")
    assert error == f"cannot execute `{text}`: it is neither an ELF program nor a script that begins with `#!`"
    assert "`#!/bin/sh`" in hint


@pytest.mark.parametrize("seed", range(6))
def test_hostile_elf_is_one_error_that_names_it(bench: Bench, place: Path, seed: int) -> None:
    path = program(place / f"hostile-{seed}", hostile_elf(seed))
    bench.write(spec_of(path))
    done = bench.run("build", NAME)
    error, hint = errors(done)
    assert (done.returncode, done.stdout) == (1, "")
    assert path in error
    assert hint


NAMES = {
    "space": b"a name with  spaces",
    "quotes": b"it's \"quoted\" \\ and `ticked`",
    "newline": b"two\nlines",
    "not UTF-8": b"\xff\xfe caf\xe9",
    "begins with a dash": b"-rf",
    "unicode": "Zoë ☃".encode(),
}


def test_files_of_any_name_are_in_the_jail_and_explained(tmp_path: Path, place: Path) -> None:
    directory = os.fsencode(place) + b"/names"
    os.mkdir(directory)
    for kind, name in NAMES.items():
        Path(os.fsdecode(directory + b"/" + name)).write_text(f"{kind}\n")
    bench = Bench(tmp_path / "home")
    script = f'for name in "{place}"/names/*; do cat < "$name"; done'
    bench.write(f'name = "{NAME}"\n[service]\ncommand = ["/bin/sh", "-c", {json.dumps(script)}]\n')
    bench.good("build", NAME)
    assert sorted(bench.good("run", NAME).splitlines()) == sorted(NAMES)
    for name in NAMES.values():
        path = directory + b"/" + name
        text = bench.good("explain", NAME, path)
        first, second, *_ = text.splitlines()
        assert first.split("  file  ")[1].startswith("04")
        assert second.endswith("  access: read by /bin/sh")
        report = json.loads(bench.good("explain", NAME, path, "--json"))
        assert os.fsencode(_unescaped(report["path"])) == path
    bench.clean()


def _unescaped(text: str) -> str:
    from stockade.records.text import unescape

    return unescape(text)


def test_links_in_a_circle_that_a_program_meets_do_no_harm(tmp_path: Path, place: Path) -> None:
    (place / "one").symlink_to("two")
    (place / "two").symlink_to("one")
    (place / "self").symlink_to("self/below")
    bench = Bench(tmp_path / "home")
    script = f"cat {place}/one/file {place}/self {place}/two; cat /etc/motd"
    bench.write(SPEC.replace('"cat /etc/motd"', json.dumps(script), 1))
    bench.good("build", NAME)
    assert bench.run("run", NAME).stdout == "sound\n"
    bench.clean()


def test_included_links_in_a_circle_are_named(bench: Bench, place: Path) -> None:
    (place / "circle").symlink_to("circle")
    bench.write(SPEC.replace("[files]", f'[files]\ninclude = ["{place}/circle"]'))
    done = bench.run("build", NAME)
    assert done.returncode == 1
    assert errors(done) == (
        f"`{place}/circle` in `files.include` is a loop of symlinks", "mend the links, or name what they should lead to"
    )


MISTAKES = {
    "type": ('command = ["/bin/sh"', "command = [7", "`command` in `[service]`"),
    "key": ("[files]", "[filse]", "unknown key `filse`"),
    "key in a table": ("programs =", "programms =", "unknown key `programms` in `[files]`, did you mean `programs`?"),
    "syntax": ("[files]", "[files", "fault.toml:"),
    "text for a number": ("[files]", '[limits]\nprocesses = "many"\n[files]', "`processes` in `[limits]`"),
    "relative path": ("[files]", '[files]\ninclude = ["etc/x"]', "`include` in `[files]`"),
    "unknown capability": ("[files]", '[policy]\ncapabilities = ["chwon"]\n[files]', "did you mean `chown`?"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_in_a_spec_is_told_with_its_line(bench: Bench, mistake: str) -> None:
    right, wrong, said = MISTAKES[mistake]
    text = SPEC.replace(right, wrong, 1)
    bench.write(text)
    done = bench.run("build", NAME)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr
    [error] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    place = re.fullmatch(r"error: (.+?):(\d+)(?::\d+)?: .*", error)
    assert place is not None
    path, number = place.groups()
    assert path == str(bench.spec)
    assert any(part in text.splitlines()[int(number) - 1] for part in wrong.splitlines())
    assert said in error


def test_spec_that_is_no_text_is_refused_as_a_spec(bench: Bench) -> None:
    bench.spec.write_bytes(b'name = "fault\xff"\n')
    done = bench.run("build", NAME)
    assert done.returncode == 2
    error, hint = errors(done)
    assert str(bench.spec) in error
    assert hint


HANGING = {
    "client": 'command = ["sleep", "600"]\ntimeout_s = 1\n',
    "inside": 'command = ["sleep", "600"]\nwhere = "inside"\ntimeout_s = 1\n',
    "stubborn": 'command = ["sh", "-c", "trap \'\' TERM INT HUP; setsid sleep 600 & sleep 600"]\ntimeout_s = 1\n',
}


@pytest.mark.parametrize("kind", HANGING)
def test_exercise_that_hangs_is_ended_at_its_limit(bench: Bench, kind: str) -> None:
    service = 'command = ["/bin/sh", "-c", "sleep 600; cat /etc/motd"]'
    text = SPEC.partition("[[exercises]]")[0].replace('command = ["/bin/sh", "-c", "cat /etc/motd"]', service)
    bench.write(f'{text}[[exercises]]\nname = "hangs"\n{HANGING[kind]}')
    begin = time.monotonic()
    done = bench.run("build", NAME)
    assert time.monotonic() - begin < 20
    error, hint = errors(done)
    assert (done.returncode, done.stdout) == (1, "")
    assert error == "exercise `hangs` does not work outside a jail either: it did not end within 1 s"
    assert hint
    bench.clean()


def test_service_that_is_never_ready_is_told_with_its_own_words(bench: Bench) -> None:
    waiting = 'echo waiting for nothing; exec sleep 600"]\nready = { tcp = 9, timeout_s = 1 }'
    bench.write(SPEC.replace('cat /etc/motd"]', waiting, 1))
    done = bench.run("build", NAME)
    error, hint = errors(done)
    assert error == "the service was not ready within 1 s: waited until TCP port 9 is listened to"
    assert "`timeout_s`" in hint
    assert "  | waiting for nothing" in done.stderr.splitlines()
    bench.clean()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Bench]:
    """A home on a disk of 16 MB, seen in a mount namespace of its own."""
    home = tmp_path / "disk"
    home.mkdir()
    script = 'mount -t tmpfs -o size=16m,mode=0700 none "$1" && echo mounted && exec sleep 600'
    with subprocess.Popen(
        ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh", home], stdout=subprocess.PIPE,
        text=True,
    ) as holder:  # fmt: skip
        try:
            assert holder.stdout is not None and holder.stdout.readline() == "mounted\n"
            bench = Bench(home, under=["nsenter", f"--mount=/proc/{holder.pid}/ns/mnt", "--"])
            bench.disk = Path(f"/proc/{holder.pid}/root{home}")  # type: ignore[attr-defined]
            yield bench
        finally:
            holder.kill()


def on_small_disk(bench: Bench) -> Path:
    disk: Path = bench.disk  # type: ignore[attr-defined]
    return disk


def test_full_disk_fails_the_build_and_leaves_the_jail_as_it_was(small_disk: Bench, place: Path) -> None:
    disk = on_small_disk(small_disk)
    (disk / "config").mkdir()
    (disk / f"config/{NAME}.toml").write_text(SPEC)
    small_disk.good("build", NAME)
    (place / "large").write_bytes(os.urandom(20 << 20))
    (disk / f"config/{NAME}.toml").write_text(SPEC.replace("[files]", f'[files]\ninclude = ["{place}/large"]'))
    for _ in range(2):
        done = small_disk.run("build", NAME)
        error, hint = errors(done)
        assert (done.returncode, done.stdout) == (1, "")
        assert error == f"no space is left for the new root below `{small_disk.jail}`"
        assert hint == "free some and build again; the generation before is untouched"
        assert sorted(os.listdir(disk / f"state/jails/{NAME}/generations")) == ["0001"]
    assert small_disk.good("run", NAME) == "sound\n"


def test_disk_without_a_byte_left_is_one_error_for_every_verb(small_disk: Bench) -> None:
    disk = on_small_disk(small_disk)
    (disk / "config").mkdir()
    (disk / f"config/{NAME}.toml").write_text(SPEC)
    small_disk.good("build", NAME)
    with open(disk / "filler", "wb", buffering=0) as filler, contextlib.suppress(OSError):
        while True:
            filler.write(bytes(1 << 12))
    for status, *words in (
        (1, "build", NAME), (1, "build", "basic"), (1, "new", "other", "--", "/bin/sh"), (1, "start", NAME),
        (125, "run", NAME), (125, "run", NAME, "--", "true"),
    ):  # fmt: skip
        done = small_disk.run(*map(str, words))
        error, hint = errors(done)
        assert (done.returncode, done.stdout) == (status, "")
        assert error.startswith("no space ")
        assert hint.startswith("free some ")
    assert NAME in small_disk.good("list")
    (disk / "filler").unlink()
    assert small_disk.good("run", NAME) == "sound\n"
    assert os.listdir(disk / f"state/jails/{NAME}/generations") == ["0001"]


MOMENTS = (
    "reading the spec", "building `fault`", "making a view of the host", "starting `/bin/sh` outside",
    "exercise outside", "reading the trace", "resolving what it needs", "planning the root", "making ",
    "trying it inside", "making a view for the clients", "starting `/bin/sh` in its jail", "exercise inside",
    "finding the capabilities", "writing to disk",
)  # fmt: skip


def stopped_at(bench: Bench, moment: str, number: signal.Signals, *, group: bool) -> tuple[int, str]:
    """Send a signal to a build as soon as it says that it has come to `moment`: its status and what it said."""
    with bench.popen("build", NAME) as build:
        assert build.stderr is not None and build.stdout is not None
        said = ""
        for line in build.stderr:
            said += line
            if line.startswith(moment):
                break
        else:
            pytest.fail(f"the build never came to {moment!r}: {said}")
        if group:
            os.killpg(build.pid, number)
        else:
            build.send_signal(number)
        said += build.stderr.read()
        build.stdout.read()
        return build.wait(timeout=LIMIT_S), said


def kept(bench: Bench) -> None:
    """The first generation is current again, whether or not the build came to its end."""
    if os.readlink(bench.jail / "current") != "generations/0001":
        bench.good("rollback", NAME, "1")


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
def test_interrupt_at_any_moment_of_a_build_leaves_nothing(bench: Bench, moment: str) -> None:
    status, said = stopped_at(bench, moment, signal.SIGINT, group=True)
    assert "Traceback" not in said
    if status == 0:
        assert moment in ("finding the capabilities", "writing to disk")
    else:
        assert (status, said.splitlines()[-1]) == (130, "interrupted")
    bench.clean()
    kept(bench)


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
def test_build_killed_at_any_moment_is_swept_by_the_next_command(bench: Bench, moment: str) -> None:
    status, _ = stopped_at(bench, moment, signal.SIGKILL, group=False)
    assert status in (-signal.SIGKILL, 0)
    bench.good("list")
    bench.clean()
    kept(bench)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=["ctrl-c", "kill -9"])
def test_first_build_that_was_stopped_leaves_no_jail(tmp_path: Path, number: signal.Signals) -> None:
    bench = Bench(tmp_path / "home")
    bench.write(f"{SPEC}\n[secrets]\npass = {{ kind = \"password\", client = true }}\n")
    stopped_at(bench, "trying it inside", number, group=number == signal.SIGINT)
    assert bench.good("list") == ""
    assert os.listdir(bench.home / "state/jails") == []
    bench.clean()
    assert "new password `pass`: " in bench.good("build", NAME)


def test_secret_of_a_build_that_failed_is_shown_by_the_one_that_does_not(bench: Bench, tmp_path: Path) -> None:
    other = Bench(tmp_path / "home")
    secret = '\n[secrets]\npass = { kind = "password", client = true }\n'
    other.write(SPEC)
    other.good("build", NAME)
    other.write(SPEC.replace('command = ["cat", "/etc/motd"]', 'command = ["false"]') + secret)
    assert other.run("build", NAME).returncode == 1
    other.write(SPEC + secret)
    assert "new password `pass`: " in other.good("build", NAME)
    assert "new password" not in other.good("build", NAME)


@pytest.mark.slow
@pytest.mark.parametrize("delay_s", [0.02, 0.08, 0.12, 0.16, 0.2, 0.25, 0.3, 0.4, 0.5])
def test_interrupt_while_a_jail_starts_leaves_it_running_or_not_at_all(bench: Bench, delay_s: float) -> None:
    text = SPEC.replace('"cat /etc/motd"', '"cat /etc/motd; exec sleep 600"')
    home = Bench(bench.home)
    home.write(text.replace('name = "fault"', 'name = "stays"'))
    home.spec.rename(home.spec.with_name("stays.toml"))
    if not (home.home / "state/jails/stays").exists():
        home.good("build", "stays")
    with home.popen("start", "stays") as start:
        time.sleep(delay_s)
        os.killpg(start.pid, signal.SIGINT)
        _, said = start.communicate(timeout=LIMIT_S)
    # Python's own start can be interrupted, before anything of Stockade's is there.
    assert f'File "{SOURCE}/stockade/cli' not in said
    assert start.returncode in (0, 130, -signal.SIGINT) or "KeyboardInterrupt" in said
    running = json.loads(home.good("ps", "--json"))["jails"]
    if start.returncode == 0:
        assert [jail["name"] for jail in running] == ["stays"]
    if running:
        home.good("stop", "stays")
    home.clean()


def test_host_without_strace_is_told_the_package(bench: Bench, tmp_path: Path) -> None:
    for name in ("sh", "cat", "setpriv", "env"):
        found = shutil.which(name, path="/usr/sbin:/usr/bin")
        assert found is not None
        (tmp_path / name).symlink_to(found)
    done = bench.run("build", NAME, PATH=str(tmp_path))
    assert errors(done) == (
        "`strace` is not installed, and nothing can be observed without it",
        "install it: `apt-get install strace`",
    )
    bench.clean()


def test_host_whose_overlay_is_refused_is_told_why(bench: Bench) -> None:
    # The kernel stacks two file systems at most: a view on such a root would be the third.
    script = """
        set -e
        mount -t tmpfs none /mnt
        mkdir /mnt/u1 /mnt/w1 /mnt/m1 /mnt/u2 /mnt/w2 /mnt/m2
        mount -t overlay -o lowerdir=/,upperdir=/mnt/u1,workdir=/mnt/w1 none /mnt/m1
        mount -t overlay -o lowerdir=/mnt/m1,upperdir=/mnt/u2,workdir=/mnt/w2 none /mnt/m2
        for name in proc sys dev run tmp; do mount --rbind /$name /mnt/m2/$name; done
        cd /mnt/m2
        mkdir old
        pivot_root . old
        umount -l old
        exec "$@"
    """
    source = Path(__file__).resolve().parents[1]
    for needed in (source, Path(bench.command[2])):
        if Path("/tmp") not in needed.parents and os.stat(needed).st_dev != os.stat("/").st_dev:
            pytest.skip(f"`{needed}` is on a file system of its own, which this root would not have")
    nested = Bench(bench.home, under=["unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh"])
    done = nested.run("build", NAME)
    error, hint = errors(done)
    assert done.returncode == 1
    assert error.startswith("cannot make a view of the host: overlay")
    assert "lower layer of an overlay" in hint
