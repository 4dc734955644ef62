from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from little_world import World

from stockade.resolve.host import Host
from stockade.resolve.pattern import Patterns, find


@pytest.fixture
def linked(world: World) -> World:
    world.file("/usr/lib/file")
    world.link("/lib", "usr/lib")
    world.link("/usr/lib/up", "../..")
    world.link("/abs", "/usr/lib/file")
    world.link("/out", "/../../../../../../etc")
    world.link("/dangling", "none/x")
    world.link("/loop", "loop")
    world.link("/self", ".")
    return world


@pytest.mark.parametrize(
    ("path", "reached", "error"),
    [
        ("/lib/file", "/usr/lib/file", ""),
        ("/usr/lib/up/lib/./up/abs", "/usr/lib/file", ""),
        ("//usr//lib/../lib/file", "/usr/lib/file", ""),
        ("/lib/..", "/usr", ""),
        ("/../../usr", "/usr", ""),
        ("/", "/", ""),
        ("/none/x", "/none/x", "ENOENT"),
        ("/dangling", "/none/x", "ENOENT"),
        ("/usr/lib/file/x", "/usr/lib/file/x", "ENOTDIR"),
        ("/usr/lib/file/..", "/usr/lib/file/..", "ENOTDIR"),
        ("/abs/", "/usr/lib/file", "ENOTDIR"),
        ("/abs/.", "/usr/lib/file", "ENOTDIR"),
        ("/out/passwd", "/etc/passwd", "ENOENT"),
        ("/loop/x", "/loop", "ELOOP"),
        ("/" + "x" * 300, "/" + "x" * 300, "ENAMETOOLONG"),
        ("/nul\0byte", "/nul\0byte", "ENOENT"),
    ],
)
def test_paths_are_resolved_inside_the_root(linked: World, path: str, reached: str, error: str) -> None:
    found = Host(str(linked.root)).walk(path)
    assert (found.path, found.error) == (reached, error)
    assert (found.status is None) == bool(error)


def test_a_path_of_thousands_of_parts_ends(linked: World) -> None:
    found = Host(str(linked.root)).walk("/self" * 39 + "/usr" + "/lib/up/usr" * 1000)
    assert found.error == "ELOOP"


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from(["usr", "lib", "file", "self", "inner", "..", ".", "dangling", "none"]), max_size=8))
def test_a_path_leads_where_the_kernel_says_that_it_leads_inside_the_root(linked: World, parts: list[str]) -> None:
    """The kernel takes one name at a time, with `..` of the root being the root."""
    if not os.path.lexists(linked.outer("/usr/inner")):
        linked.link("/usr/inner", "../lib/../lib/./")
    found = Host(str(linked.root)).walk("/" + "/".join(parts))
    descriptor = os.open(linked.root, os.O_PATH)
    top = os.fstat(descriptor)
    try:
        for name in parts:
            here = os.fstat(descriptor)
            if name == ".." and (here.st_dev, here.st_ino) == (top.st_dev, top.st_ino):
                continue
            following = os.open(name, os.O_PATH, dir_fd=descriptor)
            os.close(descriptor)
            descriptor = following
        theirs = os.fstat(descriptor)
    except OSError:
        assert found.status is None
    else:
        assert found.status is not None
        assert (found.status.st_dev, found.status.st_ino) == (theirs.st_dev, theirs.st_ino)
    finally:
        os.close(descriptor)


@pytest.mark.parametrize(
    ("pattern", "path", "matches", "covers"),
    [
        ("/etc/*.conf", "/etc/a.conf", True, True),
        ("/etc/*.conf", "/etc/d/a.conf", False, False),
        ("/etc/**/a", "/etc/a", True, True),
        ("/etc/**/a", "/etc/b/c/a", True, True),
        ("/etc/**", "/etc/b/c", True, True),
        ("/etc/**", "/etc", False, False),
        ("/etc", "/etc/b", False, True),
        ("/etc/?", "/etc/b", True, True),
        ("/etc/?", "/etc/bb", False, False),
        ("/etc/[ab]", "/etc/b", True, True),
        ("/etc/[!ab]", "/etc/b", False, False),
        ("/etc/a.b", "/etc/axb", False, False),
        ("/etc/[x", "/etc/[x", True, True),
        ("/etc/[x]", "/etc/[x]", True, True),
        ("/etc/a*", "/etc/a\nb", True, True),
    ],
)
def test_patterns(pattern: str, path: str, matches: bool, covers: bool) -> None:
    patterns = Patterns([pattern])
    assert (patterns.matches(path), patterns.covers(path)) == (matches, covers)


def test_no_pattern_matches_nothing() -> None:
    assert not Patterns([]).covers("/")


def test_found_paths_are_sorted_and_links_are_not_entered_by_double_stars(world: World) -> None:
    world.files("/srv/b", "/srv/a", "/srv/d/c")
    world.link("/srv/d/back", "..")
    host = Host(str(world.root))
    assert list(find(host, "/srv/**")) == ["/srv/a", "/srv/b", "/srv/d", "/srv/d/back", "/srv/d/c"]
