"""An ordinary user proves too: with a range of ids, and with the one id that everybody has."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from proving_jail import needs_root

UID, FIRST = 64123, 700_000
TESTS = Path(__file__).resolve().parent
SOURCE = TESTS.parents[1] / "src"

_BECOME = """
for name in passwd group subuid subgid; do mount --bind "$ETC/$name" "/etc/$name"; done
exec setpriv --reuid 64123 --regid 64123 --clear-groups "$@"
"""
_BUILD_AND_PROVE = """
import json, sys
from proving_jail import LIMITS, make_jail, outcomes
from stockade.assure.prove import prove
make_jail(limits=LIMITS, volume=True, size=64 << 20)
proof = prove("test")
print(json.dumps({
    "escaped": sorted(outcomes(proof.runs, "escaped")), "held": sorted(outcomes(proof.runs, "held")),
    "differences": [found.message for run in proof.runs for found in run.differences],
    "users": sorted({(run.user, run.uid) for run in proof.runs}),
    "untestable": {result.id: result.detail for run in proof.runs for result in run.of("not testable")},
    "skipped": [one.what for one in proof.skipped], "not_limited": [one.limit for one in proof.not_limited],
    "R3": next(result.outcome for run in proof.runs for result in run.results if result.id == "R3"),
}))
"""


@pytest.fixture
def place() -> Iterator[Path]:
    """A home that an ordinary user can reach: pytest's own directories are root's alone."""
    needs_root()
    directory = Path(tempfile.mkdtemp(prefix="stockade-user-"))
    try:
        directory.chmod(0o755)
        (directory / "home").mkdir()
        os.chown(directory / "home", UID, UID)
        yield directory
    finally:
        shutil.rmtree(directory)


def proof_of_user(place: Path, *, count: int) -> dict[str, object]:
    etc = place / "etc"
    etc.mkdir()
    account = f"walluser:x:{UID}:"
    for name, line in (("passwd", f"{account}{UID}::{place}/home:/bin/sh\n"), ("group", f"{account}\n")):
        (etc / name).write_text(Path("/etc", name).read_text() + line)
    for name in ("subuid", "subgid"):
        (etc / name).write_text(f"walluser:{FIRST}:{count}\n" if count else "")
    done = subprocess.run(
        ["unshare", "--mount", "--propagation", "private", "sh", "-euc", _BECOME, "sh", sys.executable, "-c",
         _BUILD_AND_PROVE],
        env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": f"{place}/home", "STOCKADE_HOME": f"{place}/home/s",
             "PYTHONPATH": f"{SOURCE}:{TESTS}", "PYTHONDONTWRITEBYTECODE": "1", "ETC": str(etc)},
        cwd=place / "home", capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    left = [path.name for path in (place / "home/s/state/jails/test").iterdir()]
    assert not [name for name in left if name.startswith(".prove-")]
    result: dict[str, object] = json.loads(done.stdout)
    return result


def test_nothing_escapes_a_users_jail_with_a_range_of_ids(place: Path) -> None:
    if shutil.which("newuidmap") is None:
        pytest.skip("`apt-get install uidmap`: ranges of ids need newuidmap")
    proof = proof_of_user(place, count=65536)
    assert (proof["escaped"], proof["differences"]) == ([], [])
    assert proof["users"] == [["root", FIRST], ["www", FIRST + 33]]
    held = proof["held"]
    assert isinstance(held, list)
    assert {"F1", "F19", "P1", "V1", "V2", "V6", "K16", "T4", "N1", "I1", "R1"} <= set(held)


def test_nothing_escapes_a_users_jail_with_one_id(place: Path) -> None:
    proof = proof_of_user(place, count=0)
    assert (proof["escaped"], proof["differences"]) == ([], [])
    assert proof["users"] == [["www", UID]]
    assert "root inside" in proof["skipped"]  # type: ignore[operator]
    assert proof["R3"] == "held"
    assert "size of the volume `/srv`" in proof["not_limited"]  # type: ignore[operator]


def test_a_call_that_the_kernel_does_not_have_is_not_counted_as_blocked(place: Path) -> None:
    from test_prove_chroot import LACKING

    lacking = [name for name in ("K7", "K8", "K11", "K12") if LACKING[name][1]()]
    if not lacking:
        pytest.skip("this kernel has every call of the catalogue")
    proof = proof_of_user(place, count=0)
    for name in lacking:
        assert name not in proof["held"]  # type: ignore[operator]
        assert "ENOSYS" in proof["untestable"][name]  # type: ignore[index]
