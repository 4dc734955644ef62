from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stockade.build.links import Links
from stockade.errors import BuildError
from stockade.kernel.beneath import Root


def test_a_path_behind_links_has_one_name() -> None:
    links = Links({"/lib": "usr/lib", "/usr/lib/x.so": "x.so.1", "/bin": "/usr/bin", "/lib/y.so": "../lib/x.so"})
    assert links.place("/lib/x.so") == "/usr/lib/x.so"
    assert links.resolve("/lib/x.so") == "/usr/lib/x.so.1"
    assert links.resolve("/lib/y.so") == "/usr/lib/x.so.1"
    assert links.targets.keys() == {"/lib", "/bin", "/usr/lib/x.so", "/usr/lib/y.so"}


def test_dots_stop_at_the_root() -> None:
    links = Links({"/a": "../../../../etc"})
    assert links.resolve("/a/../../x") == "/x"
    assert links.resolve("/a/passwd") == "/etc/passwd"


def test_a_loop_is_an_error_that_names_the_path() -> None:
    links = Links({"/a": "b", "/b": "a"})
    with pytest.raises(BuildError, match="the symbolic links on `/a/x` form a loop"):
        links.resolve("/a/x")


def test_a_link_that_is_replaced_is_not_followed() -> None:
    links = Links({"/etc/resolv.conf": "/run/resolv.conf", "/e": "etc"}, replaced=["/e/resolv.conf"])
    assert links.resolve("/etc/resolv.conf") == "/etc/resolv.conf"


NAMES = st.sampled_from(["a", "b", "c"])
TARGETS = st.builds(
    lambda top, parts: top + "/".join(parts), st.sampled_from(["", "/", "../"]), st.lists(NAMES, min_size=1, max_size=3)
)
PATHS = st.lists(st.sampled_from(["a", "b", "c", ".."]), min_size=1, max_size=4)


@settings(max_examples=150, deadline=None)
@given(targets=st.dictionaries(NAMES, TARGETS, max_size=3), path=PATHS)
def test_following_agrees_with_the_kernel(
    targets: dict[str, str], path: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Every name that is no link is a directory, down to the depth that the paths can reach."""
    root = tmp_path_factory.mktemp("root")
    _fill(root, targets, depth=2)
    try:
        expected = _inside(root, "/" + "/".join(path))
    except OSError:
        return
    links = Links({f"/{name}": target for name, target in targets.items()})
    assert links.resolve("/" + "/".join(path)) == expected


def _fill(directory: Path, targets: dict[str, str], depth: int) -> None:
    for name in ("a", "b", "c"):
        if name in targets:
            (directory / name).symlink_to(targets[name])
        else:
            (directory / name).mkdir()
            if depth:
                _fill(directory / name, {}, depth - 1)


def _inside(root: Path, path: str) -> str:
    with Root.open(root) as opened:
        descriptor = opened.openat(path, os.O_PATH, follow=True)
        try:
            found = os.readlink(f"/proc/self/fd/{descriptor}")
        finally:
            os.close(descriptor)
    return found[len(str(root)) :] or "/"
