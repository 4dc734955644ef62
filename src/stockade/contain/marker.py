"""The file `network` beside a plan: what a launch of the jail does outside. Opens nothing."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from stockade.records.launch import IdRange
    from stockade.records.spec import Network

__all__ = ["Outside", "read", "write"]

_NAME = "network"
_NOBODY = 65534


class Outside(msgspec.Struct, frozen=True, kw_only=True):
    """Published ports, egress, and sockets that the service is given. `ids` are uid and gid of the helpers."""

    publish: tuple[str, ...] = ()
    egress: bool = False
    listen: tuple[str, ...] = ()
    ids: tuple[str, str]


def write(network: Network, ids: IdRange, generation: Path) -> None:
    """Keep what launches of the jail in `generation` do outside. No file without any of it."""
    marker = generation / _NAME
    served = network.mode == "private" and (network.publish or network.egress)
    if not (served or network.listen):
        marker.unlink(missing_ok=True)
        return
    fresh = generation / f".{_NAME}.new"
    # A helper that root starts becomes nobody, of the ids that the jail owns.
    nobody = min(_NOBODY, ids.count - 1)
    wanted = Outside(
        publish=network.publish, egress=network.egress, listen=network.listen,
        ids=(str(ids.first + nobody), str(ids.first_gid + nobody)),
    )  # fmt: skip
    fresh.write_bytes(msgspec.json.encode(wanted))
    fresh.replace(marker)


def read(generation: Path) -> Outside | None:
    """What launches of the jail in `generation` do outside, None for nothing; msgspec.DecodeError when damaged."""
    try:
        return msgspec.json.decode((generation / _NAME).read_bytes(), type=Outside)
    except FileNotFoundError:
        return None
