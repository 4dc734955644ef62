"""Run Python as an ordinary user who exists only in a private mount namespace. The host's /etc stays as it is."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

UID = 4000
FIRST = 300000
COUNT = 65536

_SETUP = """
set -e
mount --make-rprivate /
for name in passwd group subuid subgid; do mount --bind "$1/$name" "/etc/$name"; done
shift
exec setpriv --reuid 4000 --regid 4000 --clear-groups --inh-caps=-all "$@"
"""


@contextmanager
def home(*, ranges: bool) -> Iterator[Path]:
    """A directory of that user, with the files that stand for those of /etc in `etc`."""
    place = Path(tempfile.mkdtemp(prefix="stockade-user-"))
    try:
        etc = place / "etc"
        etc.mkdir()
        line = f"walluser:{FIRST}:{COUNT}\n" if ranges else ""
        for name, text in (
            ("passwd", Path("/etc/passwd").read_text() + f"walluser:x:{UID}:{UID}::{place}:/bin/sh\n"),
            ("group", Path("/etc/group").read_text() + f"walluser:x:{UID}:\n"),
            ("subuid", line),
            ("subgid", line),
        ):
            (etc / name).write_text(text)
        place.chmod(0o755)
        (place / "own").mkdir()
        os.chown(place / "own", UID, UID)
        yield place
    finally:
        shutil.rmtree(place)


def python(
    place: Path, code: str, *, under: Sequence[str] = (), timeout_s: float = 60
) -> subprocess.CompletedProcess[str]:
    """Run `code` as the user of `home`, with `conftest` and Stockade importable and STOCKADE_HOME in `own`.

    `under` is a command of root's that runs what stands behind it.
    """
    path = [str(Path(__file__).parent), *(entry for entry in sys.path if entry)]
    environment = {"PATH": os.environ["PATH"], "STOCKADE_HOME": f"{place}/own/home", "PYTHONPATH": ":".join(path)}
    return subprocess.run(
        [*under, "unshare", "--mount", "sh", "-c", _SETUP, "sh", str(place / "etc"), sys.executable, "-c", code],
        env=environment, capture_output=True, text=True, timeout=timeout_s, check=False,
    )  # fmt: skip
