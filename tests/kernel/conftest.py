from __future__ import annotations

import ctypes

import libseccomp
import pytest


@pytest.fixture(scope="session")
def oracle() -> ctypes.CDLL:
    try:
        return libseccomp.load()
    except OSError:
        pytest.skip("libseccomp is not installed: `apt install libseccomp2`")
