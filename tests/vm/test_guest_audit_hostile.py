"""What a guest's disk says can neither end an audit nor keep it busy for hours."""

from __future__ import annotations

import time

import pytest

from stockade.kernel.crypt import crypt
from stockade.vm import audit

DEARER = [
    "$6$rounds=999999999$salt$", "$5$rounds=999999999$salt$", "$2b$31$abcdefghijklmnopqrstuv", "$y$jXT$salt$",
    "$y$j9TZZ$salt$", "$7$zzzzzzzz$salt$", "$gy$jXT$salt$", "$sha1$4294967295$salt$", "$unknown$", "", "*", "x" * 4096,
]  # fmt: skip


@pytest.mark.parametrize("setting", DEARER)
def test_hash_that_costs_too_much_is_not_tried(setting: str) -> None:
    begun = time.process_time()
    assert not audit._matches("password", setting)
    assert time.process_time() - begun < 1


@pytest.mark.parametrize("setting", ["$6$salt$", "$5$rounds=5000$salt$", "$1$salt$", "$y$j9T$salt$", "ab"])
def test_password_behind_a_usual_hash_is_found(setting: str) -> None:
    assert audit._matches("password", crypt("password", setting))
    assert not audit._matches("another", crypt("password", setting))


def test_table_of_sockets_that_no_kernel_wrote_is_passed_over() -> None:
    lines = [
        "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid",
        "   0: 00000000:zzzz 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0",
        "   1: 00000000 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0",
        "   2: 00000000:0016 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0",
    ]
    assert [finding.subject for finding in audit.listening({"tcp": "\n".join(lines)}, [])] == ["tcp/22"]
