"""Programs that have no recipe: a spec from `stockade new`, never edited, then built and put to use."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from jailer import Running, Stockade, failure, lacking

from stockade import specfile

pytestmark = pytest.mark.slow


class Server(NamedTuple):
    """A program that serves clients. `exercise` is the client's command, `shows` a regular expression of its output."""

    command: tuple[str, ...]
    port: int
    exercise: str
    shows: str
    packages: dict[str, str]
    user: str = "root"


class Tool(NamedTuple):
    """A program that ends. `shows` is a regular expression of its output."""

    command: tuple[str, ...]
    shows: str
    packages: dict[str, str]


SERVERS = {
    "redis": Server(
        ("redis-server", "--port", "6379", "--save", "", "--dir", "/tmp"), 6379,
        "redis-cli set key value && redis-cli --raw get key | grep -x value", "value",
        {"redis-server": "redis-server", "redis-cli": "redis-tools"},
    ),
    "lighttpd": Server(
        ("lighttpd", "-D", "-f", "/etc/lighttpd/lighttpd.conf"), 80,
        "curl -sS --fail -o /dev/null -w '%{http_code} %{content_type}' http://127.0.0.1/", "200 text/html",
        {"lighttpd": "lighttpd", "curl": "curl"},
    ),
    "memcached": Server(
        ("memcached", "-u", "nobody", "-l", "127.0.0.1"), 11211,
        "printf 'set key 0 0 5\\r\\nvalue\\r\\nget key\\r\\nquit\\r\\n' | nc -w 5 127.0.0.1 11211 | grep -a value",
        "value", {"memcached": "memcached", "nc": "netcat-openbsd"},
    ),
    "python-http": Server(
        ("/usr/bin/python3", "-m", "http.server", "8000", "--directory", "/usr/share/common-licenses"), 8000,
        "curl -sS --fail http://127.0.0.1:8000/GPL-3 && curl -sS --fail http://127.0.0.1:8000/",
        "GNU GENERAL PUBLIC LICENSE(?s:.*)Directory listing", {"python3": "python3", "curl": "curl"}, user="nobody",
    ),
    "node-http": Server(
        (
            "node", "-e",
            "require('http').createServer((request, answer) => answer.end('node serves')).listen(8080, '127.0.0.1')",
        ), 8080,
        "curl -sS --fail http://127.0.0.1:8080/", "node serves", {"node": "nodejs", "curl": "curl"}, user="nobody",
    ),
    "rsync": Server(
        (
            "sh", "-c",
            r"printf 'use chroot = no\n[licenses]\npath = /usr/share/common-licenses\n' > /tmp/rsyncd.conf && "
            "exec rsync --daemon --no-detach --config=/tmp/rsyncd.conf --port=8730",
        ), 8730,
        "rsync --port 8730 rsync://127.0.0.1/licenses/ && "
        "rsync --port 8730 rsync://127.0.0.1/licenses/GPL-3 /tmp/copy.$$ && "
        "cmp /tmp/copy.$$ /usr/share/common-licenses/GPL-3 && rm /tmp/copy.$$",
        "GPL-3", {"rsync": "rsync", "cmp": "diffutils"},
    ),
    "dnsmasq": Server(
        ("dnsmasq", "-k", "-C", "/dev/null", "-p", "5353", "--no-resolv", "--address=/example.test/192.0.2.7"), 5353,
        "dig +short -p 5353 @127.0.0.1 www.example.test A", r"^192\.0\.2\.7$",
        {"dnsmasq": "dnsmasq-base", "dig": "bind9-dnsutils"},
    ),
}  # fmt: skip

TOOLS = {
    "perl": Tool(("perl", "-MPOSIX", "-MEncode", "-e", "print floor(3.7), length(encode('UTF-8', chr(233)))"), "^32$",
                 {"perl": "perl"}),
    "git": Tool(
        (
            "sh", "-c",
            "cd /tmp && git init -q work && cd work && echo text > file && git add file && "
            "git -c user.name=a -c user.email=a@example.test commit -q -m first && git log --format=%s --stat",
        ), r"^first\n(?s:.*)file \| 1 \+", {"git": "git"},
    ),
    "git-help": Tool(("git", "help", "-a"), "(?m)^ +cherry-pick ", {"git": "git"}),
    "gcc": Tool(
        (
            "sh", "-c",
            r"""cd /tmp && printf '#include <stdio.h>\n#include <math.h>\nint main(int c, char **v) """
            r"""{ return printf("%%.0f\\n", sqrt(c * 49.0)) < 0; }\n' > a.c && gcc -O2 -o a a.c -lm && ./a""",
        ), "^7$", {"gcc": "gcc"},
    ),
    "pipeline": Tool(
        (
            "sh", "-c",
            "printf 'b 2\\na 1\\nb 3\\n' | sort | "
            "awk '{s[$1] += $2} END {for (k in s) print k, s[k]}' | sort | tr a-z A-Z",
        ), "^A 1\nB 5$", {"awk": "mawk"},
    ),
    "java": Tool(("java", "--list-modules"), "(?m)^java.base@", {"java": "openjdk-17-jre-headless"}),
    "node": Tool(
        ("node", "-e", "console.log(require('crypto').createHash('sha256').update('a').digest('hex'))"),
        "^ca978112ca1bbdcafac231b39a23dc4da786eff8147c4e72b9807785afee48bb$", {"node": "nodejs"},
    ),
    "python": Tool(
        (
            "/usr/bin/python3", "-c",
            "import json, ssl, sqlite3, decimal; print(json.dumps({'sum': str(decimal.Decimal('1.1') + 2)}))",
        ), '^{"sum": "3.1"}$', {"python3": "python3"},
    ),
    "sqlite": Tool(
        ("sqlite3", ":memory:", "create table t (n); insert into t values (3), (4); select sum(n) from t;"), "^7$",
        {"sqlite3": "sqlite3"},
    ),
    "openssl": Tool(
        ("sh", "-c", "printf abc | openssl dgst -sha256 -r"), "^ba7816bf8f01cfea414140de5dae2223",
        {"openssl": "openssl"},
    ),
    "message-queue": Tool(
        (
            "/usr/bin/python3", "-c",
            "import ctypes, os; libc = ctypes.CDLL(None, use_errno=True); "
            "queue = libc.mq_open(b'/queue', os.O_CREAT | os.O_RDWR, 0o600, None); "
            "print(libc.mq_send(queue, b'text', 4, 0), os.strerror(ctypes.get_errno()))",
        ), "^0 Success$", {"python3": "python3"},
    ),
    # As svnadmin does: each directory is tried first, and those above it are made when that failed.
    "directories-from-below": Tool(
        (
            "sh", "-c",
            "cd /tmp && ! mkdir work/a/b 2>/dev/null && mkdir work && mkdir work/a && mkdir work/a/b && find work",
        ), "^work\nwork/a\nwork/a/b$", {"find": "findutils"},
    ),
    "made-script": Tool(
        (
            "/usr/bin/sh", "-c",
            r"""cd /tmp && printf '#!/bin/sh\nexec ./second\n' > first && """
            r"""printf '#!/usr/bin/env -S perl -w\nprint qq(made\n);' > second && chmod 700 first second && ./first""",
        ), "^made$", {"perl": "perl"},
    ),
    "time-zone": Tool(("env", "TZ=Asia/Tokyo", "date", "-d", "@0", "+%H %Z"), "^09 JST$", {"date": "coreutils"}),
}  # fmt: skip


def new(stockade: Stockade, name: str, *options: str, command: tuple[str, ...]) -> None:
    """Write the spec `name` and build its jail."""
    stockade.good("new", name, *options, "--", *command)
    stockade.good("build", name, timeout_s=240)


@pytest.fixture
def server(request: pytest.FixtureRequest, stockade: Stockade) -> Iterator[tuple[Server, Running]]:
    name: str = request.param
    given = SERVERS[name]
    reason = lacking({**given.packages, "nsenter": "util-linux"})
    if reason:
        pytest.skip(reason)
    options = ("--exercise", given.exercise, "--tcp", str(given.port), "--user", given.user)
    new(stockade, name, *options, command=given.command)
    stockade.good("start", name)
    running = Running(stockade, specfile.load(stockade.home / "config" / f"{name}.toml"), stockade.running()[name])
    yield given, running
    stockade.good("stop", name)
    assert running.leftovers() == []


@pytest.mark.parametrize("server", SERVERS, indirect=True)
def test_server_without_a_recipe_serves_from_its_jail(server: tuple[Server, Running], tmp_path: Path) -> None:
    given, running = server
    (exercise,) = running.spec.exercises
    done = running.client(exercise, tmp_path)
    assert failure(exercise, done) == ""
    assert re.search(given.shows, done.stdout.strip()), done.stdout


@pytest.mark.parametrize("name", TOOLS)
def test_program_without_a_recipe_runs_in_its_jail(name: str, stockade: Stockade) -> None:
    tool = TOOLS[name]
    reason = lacking(tool.packages)
    if reason:
        pytest.skip(reason)
    new(stockade, name, command=tool.command)
    done = stockade.run("run", name)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(tool.shows, done.stdout.strip()), done.stdout


def test_a_program_below_var_tmp_has_what_lies_beside_it(stockade: Stockade) -> None:
    """The rest of /var/tmp is the host's; the program's own directory is no tmpfs, which would hide it."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as place:
        os.chmod(place, 0o755)
        (Path(place) / "bin").mkdir()
        (Path(place) / "data").write_text("beside\n")
        program = Path(place) / "bin/tool"
        program.write_text('#!/bin/sh\nls /var/tmp >/dev/null; cat "${0%/bin/*}/data"\n')
        program.chmod(0o755)
        new(stockade, "beside", command=(str(program),))
        assert stockade.run("run", "beside").stdout == "beside\n"
