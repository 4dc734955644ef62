"""What the tests of real services share: Stockade with a home of its own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from jailer import Stockade


@pytest.fixture(scope="module")
def stockade(tmp_path_factory: pytest.TempPathFactory) -> Stockade:
    """The command line, keeping everything in a temporary directory."""
    if os.geteuid() != 0:
        pytest.skip("services with several accounts are driven by root: run the tests as root")
    home: Path = tmp_path_factory.mktemp("stockade")
    return Stockade(home)
