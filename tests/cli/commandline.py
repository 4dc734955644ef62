"""The command line as a user starts it: types that its tests share."""

from __future__ import annotations

import subprocess
from collections.abc import Callable

Done = subprocess.CompletedProcess[str]
Run = Callable[..., Done]
