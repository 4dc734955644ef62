"""`new` and `recipes`: from a command or a recipe to a spec."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commandline import Run

from stockade import specfile


def test_new_from_a_command_writes_a_spec_that_loads_and_prints_its_path(stockade: Run, home: Path) -> None:
    done = stockade(
        "new", "web", "--exercise", "curl -sf http://127.0.0.1/", "--tcp", "80", "--", "sh", "-c", "sleep 9"
    )
    path = home / "config" / "web.toml"
    assert (done.returncode, done.stdout) == (0, f"{path}\n")
    assert done.stderr == "next: `stockade build web`, after a look at the file\n"
    spec = specfile.load(path)
    assert spec.service.command[0].endswith("/bin/sh")
    assert spec.service.command[1:] == ("-c", "sleep 9")
    assert spec.exercises[0].command == ("curl", "-sf", "http://127.0.0.1/")


def test_new_names_the_sockets_that_a_command_is_given_in_their_order(stockade: Run, home: Path) -> None:
    words = ["new", "web", "--listen", "8080", "--listen", "[::1]:53/udp", "--", "sleep", "9"]
    assert stockade(*words).returncode == 0
    assert specfile.load(home / "config" / "web.toml").network.listen == ("8080", "[::1]:53/udp")
    done = stockade("new", "other", "--listen", "web:80", "--", "sleep", "9")
    assert "`listen` in `[network]`: cannot read `web:80` as `[ADDRESS:]PORT[/tcp|/udp]`" in done.stderr
    assert done.returncode == 2 and not (home / "config" / "other.toml").exists()


def test_new_by_the_name_of_a_recipe_copies_it_byte_for_byte(stockade: Run, home: Path) -> None:
    assert stockade("new", "sshd").returncode == 0
    assert (home / "config" / "sshd.toml").read_bytes() == specfile.recipe("sshd").read_bytes()


def test_new_does_not_replace_a_spec_unless_forced(stockade: Run, home: Path) -> None:
    path = home / "config" / "web.toml"
    stockade("new", "web", "--", "true")
    before = path.read_bytes()
    done = stockade("new", "web", "--", "false")
    assert done.returncode == 1
    assert done.stderr == f"error: `{path}` is there already\nhint: `--force` replaces it\n"
    assert path.read_bytes() == before
    assert stockade("new", "web", "--force", "--", "false").returncode == 0
    assert specfile.load(path).service.command[0].endswith("/bin/false")
    assert [entry.name for entry in path.parent.iterdir()] == ["web.toml"]


def test_new_to_standard_output_leaves_no_file(stockade: Run, home: Path) -> None:
    done = stockade("new", "web", "--output", "-", "--", "true")
    assert specfile.loads(done.stdout, "standard output").name == "web"
    assert not home.exists()


@pytest.mark.parametrize(
    ("words", "status", "message", "hint"),
    [
        (
            ["new", "web", "--", "no-such-program"], 1, "there is no program `no-such-program`",
            "give its path, or install the package that brings it",
        ),
        (
            ["new", "web", "--", "/etc/passwd"], 1, "the command `/etc/passwd` is not executable",
            "`chmod +x /etc/passwd`, or name its interpreter",
        ),
        (
            ["new", "ssdh"], 1, "there is no recipe `ssdh`, did you mean `sshd`?",
            "`stockade recipes` lists them; for another program: `stockade new ssdh -- COMMAND`",
        ),
        (
            ["new", "../web", "--", "true"], 2, "`../web` cannot be the name of a jail",
            "a name has a-z, 0-9, `.`, `_` and `-`, begins with a letter or digit, and is 63 characters at most",
        ),
        (
            ["new", "web", "--exercise", "curl 'x", "--", "true"], 2,
            "the exercise `curl 'x` cannot be split into words: no closing quotation",
            "quote it as for a shell",
        ),
        (
            ["new", "web", "--recipe", "sshd", "--", "true"], 2,
            "a spec is made from a recipe or from a command, not from both", "leave one of them out",
        ),
        *(
            (
                ["new", "sshd", *words], 2, f"`{words[0]}` is about a command, and none was given",
                "`stockade new sshd … -- COMMAND`, or leave it out and edit the spec",
            )
            for words in (["--listen", "22"], ["--tcp", "22"], ["--user", "nobody"], ["--forks"])
        ),
    ],
)  # fmt: skip
def test_new_refuses_with_a_cure_and_leaves_no_file(
    stockade: Run, home: Path, words: list[str], status: int, message: str, hint: str
) -> None:
    done = stockade(*words)
    assert (done.returncode, done.stdout) == (status, "")
    assert done.stderr == f"error: {message}\nhint: {hint}\n"
    assert not home.exists()


def test_recipes_lists_each_with_its_description(stockade: Run) -> None:
    lines = stockade("recipes").stdout.splitlines()
    assert lines[0].split() == ["NAME", "EXERCISES", "DESCRIPTION"]
    assert [line.split()[0] for line in lines[1:]] == specfile.recipes()
    assert {"basic", "sshd", "vsftpd", "telnetd", "apache2", "nginx", "postfix", "named"} <= set(specfile.recipes())


def test_recipes_as_json_names_a_file_that_is_there(stockade: Run) -> None:
    for recipe in json.loads(stockade("recipes", "--json").stdout)["recipes"]:
        assert Path(recipe["path"]).is_file()
