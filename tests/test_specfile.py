"""Reading specs: what is accepted, and what each mistake is told, word for word."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some

from stockade import specfile
from stockade.errors import NotFoundError, SpecError, StockadeError
from stockade.records import publish
from stockade.specfile import rules

SERVICE = '[service]\ncommand = ["/usr/sbin/daemon"]\n'
MINIMAL = f'name = "web"\n{SERVICE}'


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("STOCKADE_HOME", str(tmp_path))
    (tmp_path / "config").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(text: str) -> tuple[str, str | None]:
    with pytest.raises(SpecError) as caught:
        specfile.loads(text, "web.toml")
    return caught.value.message, caught.value.hint


def with_service(*lines: str) -> str:
    return MINIMAL + "\n".join(lines) + "\n"


def test_least_spec_has_a_name_and_a_command() -> None:
    spec = specfile.loads(MINIMAL, "web.toml")
    assert (spec.name, spec.service.command, spec.walls) == ("web", ("/usr/sbin/daemon",), ("jail",))


@pytest.mark.parametrize("name", specfile.recipes())
def test_every_recipe_is_a_spec_of_its_own_name_with_exercises(name: str) -> None:
    spec = specfile.read(name)
    assert spec.name == name
    assert spec.description
    assert spec.exercises


def test_unknown_key_is_told_with_its_line_its_table_and_the_key_that_was_meant() -> None:
    message, hint = refused(with_service("[files]", "mout = 1"))
    assert message == "web.toml:5: unknown key `mout` in `[files]`, did you mean `mounts`?"
    assert hint == "`mounts` belongs in the top level, before the first table"


def test_key_in_the_wrong_table_is_told_where_it_belongs() -> None:
    assert refused(with_service('walls = ["jail"]')) == (
        "web.toml:4: unknown key `walls` in `[service]`", "`walls` belongs in the top level, before the first table"
    )


@pytest.mark.parametrize(
    ("header", "key"), [("[[mounts]]\nsource = '/a'\ntarget = '/b'", "readonly"), ("[service.ready]", "port")]
)
def test_key_of_another_table_is_suggested_only_where_it_is_very_near(header: str, key: str) -> None:
    message, hint = refused(with_service(header, f"{key} = 1"))
    assert message.partition(": ")[2].startswith(f"unknown key `{key}` in ")
    assert "did you mean" not in message
    assert hint is not None and " takes `" in hint


def test_key_of_the_same_table_is_suggested_before_one_of_another() -> None:
    message, hint = refused(with_service("[limits]", "mem = 1", "memry = 2"))
    assert message.splitlines() == [
        "web.toml:5: unknown key `mem` in `[limits]`, did you mean `memory`?",
        "web.toml:6: unknown key `memry` in `[limits]`, did you mean `memory`?",
    ]
    assert hint is None


def test_key_that_is_like_no_other_is_told_what_its_table_takes() -> None:
    message, hint = refused(with_service("[policy.syscalls]", "qqqqq = 1"))
    assert message == "web.toml:5: unknown key `qqqqq` in `[policy.syscalls]`"
    assert hint == "`[policy.syscalls]` takes `preset`, `add`, `remove`"


def test_every_mistake_of_a_spec_is_told_at_once_in_the_order_of_its_lines() -> None:
    message, hint = refused('name = "web"\n[service]\ncommand = "x"\nready = { tcp = "80" }\numask = 18\n')
    assert message.splitlines() == [
        'web.toml:3: `command` in `[service]` must be a list that is not empty, each item text in quotes, not `"x"` '
        '(for example `command = ["text"]`)',
        'web.toml:4: `tcp` in `[service.ready]` must be a whole number from 1 up to 65535, not `"80"` '
        "(for example `tcp = 1`)",
        'web.toml:5: `umask` in `[service]` must be an octal mode in quotes, not `18` (for example `umask = "0755"`)',
    ]
    assert hint is None


@pytest.mark.parametrize(
    ("lines", "message", "hint"),
    [
        (
            ["[files]", 'include = ["/etc/a", "etc/b"]'],
            'web.toml:5: item 2 of `include` in `[files]` must be an absolute path, not `"etc/b"`',
            'for example `"/srv/data"`',
        ),
        (
            ["[policy]", "capabilities = [7]"],
            "web.toml:5: item 1 of `capabilities` in `[policy]` must be text in quotes, not `7`",
            'for example `"text"`',
        ),
        (["[exercises]", 'command = ["true"]'], "web.toml:4: `exercises` must be a list of tables, not a table",
         "begin each with `[[exercises]]`"),
        (["[[accounts]]", 'name = "www"', "[mounts]"], "web.toml:6: `mounts` must be a list of tables, not a table",
         "begin each with `[[mounts]]`"),
    ],
)  # fmt: skip
def test_wrong_part_of_a_list_is_named(lines: list[str], message: str, hint: str) -> None:
    assert refused(with_service(*lines)) == (message, hint)


def test_low_port_of_a_socket_that_the_service_is_given_is_no_port_of_a_jail() -> None:
    network = '[network]\nmode = "host"\nlisten = ["127.0.0.1:22"]\n'
    assert specfile.loads(f"{MINIMAL}ready = {{ tcp = 22 }}\n{network}", "web.toml").network.listen == ("127.0.0.1:22",)


@pytest.mark.parametrize(("kind", "other"), [("tcp", "udp"), ("udp", "tcp")])
def test_low_port_of_the_other_protocol_than_that_of_a_given_socket_is_one_of_the_jail(kind: str, other: str) -> None:
    network = f'[network]\nmode = "host"\nlisten = ["53/{other}"]\n'
    specfile.loads(f"{MINIMAL}ready = {{ {other} = 53 }}\n{network}", "web.toml")
    message, _ = refused(f"{MINIMAL}ready = {{ {kind} = 53 }}\n{network}")
    assert message.startswith('web.toml:6: port 53 cannot be opened with `mode = "host"` in `[network]`: ')


def test_no_socket_is_given_to_a_service_in_a_guest() -> None:
    message, hint = refused(f'walls = ["jail", "vm"]\n{MINIMAL}[network]\nlisten = ["8080"]\n')
    assert message == (
        "web.toml:6: `listen` in `[network]` is not for a jail with a machine among its walls: "
        "no socket goes into a guest"
    )
    assert hint == "`publish` opens a port of this host that leads to one of the guest"


def test_example_of_a_key_is_its_default() -> None:
    assert refused(f'walls = "jail"\n{MINIMAL}')[1] == 'for example `walls = ["jail"]`'


def test_missing_service_is_told_with_lines_to_add() -> None:
    assert refused('name = "web"\n') == (
        "web.toml: missing key `service` in the spec",
        'add a table `[service]` with `command = ["/usr/sbin/daemon", "-f"]`',
    )


def test_line_of_a_mistake_in_the_second_table_of_an_array_is_that_tables() -> None:
    exercise = '[[exercises]]\ncommand = ["true"]\n'
    message, _ = refused(f'{MINIMAL}{exercise}{exercise}where = "insid"\n')
    assert message == (
        'web.toml:8: `where` in `[[exercises]]` number 2 must be "client" or "inside", not `"insid"`, '
        "did you mean `inside`?"
    )


def test_lines_inside_a_text_of_several_lines_are_not_taken_for_keys() -> None:
    content = '[files.content]\n"/etc/x" = """\n[limits]\nmemory = 1\n"""\n[limits]\nmemory = 5\n'
    message, _ = refused(MINIMAL + content)
    assert message.startswith("web.toml:10: `memory` in `[limits]` must be a size in quotes")


def test_text_that_is_not_toml_is_told_with_line_and_column() -> None:
    message, hint = refused('name = "web"\nwalls = \n')
    assert message == "web.toml:2:9: not TOML: invalid value"
    assert hint == 'a spec is TOML: `key = "text"` below `[table]`'


@pytest.mark.parametrize(
    ("lines", "hint"),
    [
        (['command = ["/bin/true"]'], "each key stands once in its table"),
        (["[limits]", "[limits]"], "each table stands once in a file"),
        (["ready = { tcp = 80,", "timeout_s = 3 }"], "an inline table `{ … }` is one line, with no comma at its end"),
        (["ready = { tcp = 80, }"], "an inline table `{ … }` is one line, with no comma at its end"),
    ],
)
def test_common_slip_in_toml_is_told_with_its_cure(lines: list[str], hint: str) -> None:
    message, said = refused(with_service(*lines))
    assert ": not TOML: " in message
    assert said == hint


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_mark_and_line_ends_of_windows_editors_are_no_mistake(home: Path, end: str) -> None:
    path = home / "config" / "web.toml"
    path.write_bytes(b"\xef\xbb\xbf" + MINIMAL.replace("\n", end).encode())
    assert specfile.read("web").name == "web"
    path.write_bytes(b"\xef\xbb\xbf" + with_service("usr = 1").replace("\n", end).encode())
    with pytest.raises(SpecError, match=r"web\.toml:4: unknown key `usr` in `\[service\]`"):
        specfile.read("web")


@pytest.mark.parametrize(
    ("lines", "message", "hint"),
    [
        (
            ["[network]", 'mode = "host"', "[service.ready]", "tcp = 22"],
            'web.toml:5: port 22 cannot be opened with `mode = "host"` in `[network]`: '
            "no port of the host below 1024 is a jail's to open",
            'publish it instead: `mode = "private"`, `publish = ["22:22"]`',
        ),
        (
            ["[network]", 'mode = "host"', 'publish = ["80:80"]'],
            'web.toml:6: `publish` in `[network]` needs `mode = "private"`, not `"host"`',
            'set `mode = "private"`',
        ),
        (
            ["[network]", 'mode = "host"', 'listen = ["23"]', "[service.ready]", "tcp = 22"],
            'web.toml:5: port 22 cannot be opened with `mode = "host"` in `[network]`: '
            "no port of the host below 1024 is a jail's to open",
            'publish it instead: `mode = "private"`, `publish = ["22:22"]`',
        ),
        (
            ["[network]", 'mode = "private"', 'publish = ["80:808080"]'],
            "web.toml:6: `publish` in `[network]`: port 808080 of `80:808080` is not between 1 and 65535",
            'the outer port comes first, for example `"127.0.0.1:2222:22"`',
        ),
        (
            ["[network]", 'mode = "private"', 'publish = ["80:1", "127.0.0.1:80:2", "80:3/udp"]'],
            "web.toml:6: `publish` in `[network]`: port 80/tcp of 127.0.0.1 is given 2 times",
            None,
        ),
        (
            ["[policy]", 'capabilities = ["net_bind_servce"]'],
            "web.toml:5: unknown capability `net_bind_servce` in `[policy]`, did you mean `net_bind_service`?",
            None,
        ),
        (
            ["[policy]", 'capabilities = ["CAP_CHOWN"]'],
            "web.toml:5: capability `CAP_CHOWN` in `[policy]` is written `chown`",
            None,
        ),
        (
            ["[policy.syscalls]", 'add = ["opanat"]'],
            "web.toml:5: unknown system call `opanat` in `[policy]`, did you mean `openat`?",
            None,
        ),
        (
            ["[policy]", 'devices = ["/dev/null"]'],
            "web.toml:5: device `/dev/null` in `[policy]` must be a name below /dev",
            "write `null`",
        ),
        (
            ["[limits]", 'memory = "0M"'],
            "web.toml:5: `memory` in `[limits]` must be above 0",
            "leave the key out for no limit",
        ),
        (
            ["[files]", 'include = ["/srv/../etc"]'],
            "web.toml:5: path `/srv/../etc` goes up with `..`: `include` in `[files]`",
            "write the path without `..`",
        ),
        (
            ["[files]", 'modes = { "/usr/bin/su" = "4755" }'],
            "web.toml:5: mode 4755 of `/usr/bin/su` is setuid or setgid",
            'a file keeps these bits only when named: `setuid = ["/usr/bin/su"]` in `[files]`',
        ),
        (
            ["[directories]", '"/proc/x" = {}'],
            "web.toml:5: `/proc/x` of `[directories]` lies where the launch makes /dev, /proc and /sys",
            "name devices in `[policy] devices`, and choose /proc by `[policy] proc`",
        ),
        (
            ["[directories]", '"/srv" = { kind = "fixed", size = "8M" }'],
            'web.toml:5: `size` in `[directories."/srv"]` is for a tmpfs or a volume, and this is a part of the '
            "read-only root",
            "leave it out: nothing is written there",
        ),
        (
            ["[directories]", '"/srv" = { kind = "volume", size = "4M" }'],
            'web.toml:5: `size` in `[directories."/srv"]` is `4M`, and a volume has between 8M and 8T',
            "leave it out for a volume without a limit",
        ),
        (
            ["[directories]", '"/srv" = { kind = "volume", inodes = 100 }'],
            'web.toml:5: `inodes` in `[directories."/srv"]` limits the files of a volume that has no `size`',
            'set both: `size = "256M"`',
        ),
        (
            ["[directories]", '"/srv" = { kind = "volume", size = "8M", inodes = 10000 }'],
            'web.toml:5: `inodes` in `[directories."/srv"]` is 10000, more than one for each 1024 bytes',
            "give the volume a larger `size`, or fewer `inodes`",
        ),
        (
            ["[[accounts]]", 'name = "ann"', "[[accounts]]", 'name = "ann"'],
            "web.toml: 2 `[[accounts]]` have the name `ann`",
            None,
        ),
        (
            ["[[accounts]]", 'name = "ann"', 'password = "hunter2"'],
            "web.toml:6: the password of account `ann` is `hunter2`, no secret of kind `password`",
            'a password never stands in a spec: add `NAME = { kind = "password" }` to `[secrets]`, '
            'and `password = "NAME"` to the account',
        ),
        (
            ["[secrets]", 'key = { kind = "random" }', "[[exercises]]", 'command = ["curl", "${secret:kay}"]'],
            "web.toml:7: unknown secret `kay` in `[exercises]`, did you mean `key`?",
            None,
        ),
        (
            ["[[exercises]]", 'command = ["true"]', 'stdout = "("'],
            "web.toml:6: `stdout` in `[[exercises]]` number 1 is no regular expression: "
            "missing ), unterminated subpattern at position 0",
            "a backslash before `. * + ? ( ) [ ] |` takes each as it is",
        ),
        (
            ["[service.environment]", '"A=B" = "c"'],
            "web.toml:4: `A=B` in `[service.environment]` cannot be the name of a variable",
            None,
        ),
    ],
)  # fmt: skip
def test_rule_tells_the_place_and_the_cure(lines: list[str], message: str, hint: str | None) -> None:
    assert refused(with_service(*lines)) == (message, hint)


def test_walls_are_one_of_the_five_combinations() -> None:
    for walls in rules.WALLS:
        specfile.loads(f"walls = {list(walls)}\n{MINIMAL}", "web.toml")
    message, hint = refused(f'walls = ["vm", "chroot"]\n{MINIMAL}')
    assert message == (
        'web.toml:1: `walls` must be `["jail"]`, `["vm"]`, `["jail", "vm"]`, `["jail", "vm", "jail"]` or `["chroot"]`'
    )
    assert hint == "the outermost wall comes first"


def test_signal_that_does_not_exist_is_refused_with_the_nearest() -> None:
    message, _ = refused(f'{MINIMAL}stop_signal = "SIGTRM"\n')
    assert message == "web.toml:4: unknown signal `SIGTRM` in `[service]`, did you mean `SIGTERM`?"


def test_nul_character_is_refused_where_the_kernel_would_cut() -> None:
    message, _ = refused('name = "web"\n[service]\ncommand = ["/bin/echo", "a\\u0000b"]\n')
    assert message == "web.toml:3: item 2 of `command` in `[service]` holds a NUL character"


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    some.recursive(
        some.none() | some.booleans() | some.integers() | some.floats(allow_nan=False) | some.text(max_size=8),
        lambda inner: (
            some.lists(inner, max_size=3)
            | some.dictionaries(some.sampled_from(["name", "service", "command", "files", "x"]), inner, max_size=3)
        ),
        max_leaves=12,
    )
)
@pytest.mark.slow
def test_no_value_of_any_type_anywhere_gives_anything_but_a_spec_error(value: object) -> None:
    import tomlkit

    for key in ("service", "files", "accounts", "directories", "secrets", "exercises", "walls", "policy", "name"):
        data = {"name": "web", "service": {"command": ["x"]}, key: value}
        try:
            text = tomlkit.dumps(data)
            tomllib.loads(text)
        except (TypeError, ValueError, tomllib.TOMLDecodeError):
            continue
        try:
            specfile.loads(text, "web.toml")
        except SpecError as error:
            assert error.message.startswith("web.toml")


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(some.binary(max_size=200))
def test_file_of_any_bytes_gives_a_spec_error(home: Path, data: bytes) -> None:
    (home / "x.toml").write_bytes(data)
    with pytest.raises(SpecError):
        specfile.load(home / "x.toml")


def test_name_means_the_owners_spec_before_the_recipe(home: Path) -> None:
    assert specfile.find("sshd") == specfile.recipe("sshd")
    own = home / "config" / "sshd.toml"
    own.write_text(MINIMAL.replace("web", "sshd"))
    assert specfile.find("sshd") == own


def test_argument_with_a_slash_or_the_suffix_is_a_file(home: Path) -> None:
    assert specfile.find("./sshd") == Path("./sshd")
    assert specfile.find("sshd.toml") == Path("sshd.toml")


def test_unknown_name_is_told_with_the_nearest_spec_or_recipe(home: Path) -> None:
    with pytest.raises(NotFoundError) as caught:
        specfile.find("ssdh")
    assert caught.value.message == f"no spec in `{home}/config` and no recipe is called `ssdh`"
    assert caught.value.hint == "did you mean `sshd`?"


def test_spec_in_the_current_directory_is_named_in_the_hint(home: Path) -> None:
    (home / "mine.toml").write_text(MINIMAL)
    with pytest.raises(NotFoundError) as caught:
        specfile.find("mine")
    assert caught.value.hint == "a spec in this directory is named with its suffix: `mine.toml`"


def test_spec_found_by_name_must_bear_that_name(home: Path) -> None:
    (home / "config" / "shop.toml").write_text(MINIMAL)
    with pytest.raises(SpecError, match='says `name = "web"`, and its file is called `shop.toml`'):
        specfile.read("shop")
    assert specfile.read(str(home / "config" / "shop.toml")).name == "web"


def test_file_that_is_absent_is_told_how_one_is_written_there(home: Path) -> None:
    with pytest.raises(NotFoundError) as caught:
        specfile.load(home / "x.toml")
    assert caught.value.hint == f"`stockade new x --output {home}/x.toml -- COMMAND` writes one"


@pytest.mark.parametrize("make", ["directory", "absent", "latin-1"])
def test_file_that_cannot_be_read_is_one_error_with_a_hint(home: Path, make: str) -> None:
    path = home / "x.toml"
    if make == "directory":
        path.mkdir()
    elif make == "latin-1":
        path.write_bytes('name = "é"'.encode("latin-1"))
    with pytest.raises(StockadeError) as caught:
        specfile.load(path)
    assert str(path) in caught.value.message
    assert caught.value.hint


def test_new_spec_says_what_was_given_and_its_comments_are_a_spec_too() -> None:
    exercises = [specfile.exercise_command("curl -sf http://127.0.0.1/"), specfile.exercise_command("curl x | grep y")]
    text = specfile.new("web", ["/usr/sbin/nginx", "-g", "daemon off;"], exercises, user="www-data", tcp=80, forks=True)
    spec = specfile.loads(text, "web.toml")
    assert spec.service.command == ("/usr/sbin/nginx", "-g", "daemon off;")
    assert (spec.service.user, spec.service.ready.tcp, spec.service.forks) == ("www-data", 80, True)
    assert spec.exercises[0].command == ("curl", "-sf", "http://127.0.0.1/")
    assert spec.exercises[1].command == ("sh", "-c", "curl x | grep y")


def test_every_commented_line_of_a_new_spec_is_valid_when_uncommented() -> None:
    text = specfile.new("web", ["/usr/sbin/daemon"])
    lines = [line.removeprefix("# ") for line in text.splitlines()[1:]]
    spec = specfile.loads("\n".join(lines), "web.toml")
    assert spec.limits.memory == "256M"
    assert spec.exercises


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    some.lists(some.text(some.characters(exclude_categories=["Cs"], exclude_characters="\0")), min_size=1, max_size=5)
)
def test_any_command_comes_back_from_a_new_spec_as_it_was(words: list[str]) -> None:
    assert list(specfile.loads(specfile.new("web", words), "web.toml").service.command) == words


@pytest.mark.parametrize(
    ("words", "there"),
    [
        (["server.rb"], True), (["-m", "conf/app.cfg"], True), (["--config=conf/app.cfg"], True), (["."], True),
        (["/server.rb"], False), (["absent.rb"], False), (["-m", "http.server"], False), ([], False),
        (["-c", "cp -r conf /tmp/a && cd /tmp"], True), (["-c", "exec <conf/app.cfg"], True),
        (["-c", "cat /conf absent"], False), (["-e", "load 'server.rb'"], True),
        (["-c", ". /etc/profile; exec sleep 9"], False), (["-c", "cd .. && exec sleep 9"], False),
        (["-c", ". conf/app.cfg"], True), (["--root=."], True), ([".."], True),
    ],
)  # fmt: skip
def test_a_command_that_names_something_in_the_working_directory_is_run_there(
    home: Path, words: list[str], there: bool
) -> None:
    (home / "conf").mkdir()
    for name in ("server.rb", "conf/app.cfg"):
        (home / name).touch()
    service = specfile.loads(specfile.new("web", ["/usr/bin/ruby", *words]), "web.toml").service
    assert service.directory == (str(home) if there else "/")


@pytest.mark.parametrize(
    ("program", "there"), [("./serve", True), ("bin/serve", True), ("serve", False), ("/usr/bin/serve", False)]
)
def test_a_program_named_by_its_place_in_the_working_directory_is_run_there(
    home: Path, program: str, there: bool
) -> None:
    (home / "bin").mkdir()
    for name in ("serve", "bin/serve"):
        (home / name).touch()
    service = specfile.loads(specfile.new("web", ["/usr/bin/serve"], program=program), "web.toml").service
    assert service.directory == (str(home) if there else "/")


def test_derived_recipe_keeps_its_comments_and_takes_the_new_name() -> None:
    recipe = specfile.recipe("sshd").read_text()
    text = specfile.derive(recipe, "shell", [("true",)])
    assert specfile.loads(text, "shell.toml").name == "shell"
    assert specfile.loads(text, "shell.toml").exercises[-1].command == ("true",)
    assert [line for line in recipe.splitlines() if line.startswith("#")] == [
        line for line in text.splitlines() if line.startswith("#")
    ]


@pytest.mark.parametrize("text", ["127.0.0.1:2222:22/tcp", "[::1]:53:5353/udp"])
def test_published_port_is_written_as_it_is_read(text: str) -> None:
    assert publish.written(publish.parse(text)) == text
