"""The image store: one directory for each image, with its file and its record. Nothing in it is changed once made."""

from __future__ import annotations

import lzma
import os
import re
import shutil
import subprocess
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from stockade import places
from stockade.errors import HostError, NotFoundError, StateError, UsageError
from stockade.records.image import Image, ImageStart

from . import sparse
from .whole import absent, named, new_file

__all__ = ["add", "add_file", "export", "file", "link", "load", "names", "remove", "tried", "verify"]

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}\Z")
_SHA256 = re.compile(r"[0-9a-f]{64}\Z")
_CHUNK = 1 << 20
_LARGEST = 1 << 40


def file(name: str) -> Path:
    """The image's file."""
    return places.images() / name / "disk"


def names() -> list[str]:
    """Names of all images, sorted."""
    return named(places.images(), "image.json")


def _absent(name: str) -> NotFoundError:
    return absent(f"there is no image `{name}`", name, names(), listed_by="image list")


def load(name: str) -> Image:
    """The image `name`; NotFoundError where there is none, StateError for a damaged record or a changed file."""
    check_name(name)
    try:
        image = msgspec.json.decode((places.images() / name / "image.json").read_bytes(), type=Image)
    except FileNotFoundError:
        raise _absent(name) from None
    except msgspec.MsgspecError as error:
        raise StateError(f"the record of image `{name}` is damaged: {error}", hint="import it again") from error
    status = file(name).stat()
    if (status.st_size, int(status.st_mtime)) != (image.size, image.mtime):
        raise StateError(
            f"the file of image `{name}` was changed after the image was made",
            hint=f"its contents are no longer what was recorded: `stockade image rm {name}`, then import it again",
        )
    return image


def check_name(name: str) -> None:
    """UsageError for what cannot be a name."""
    if not _NAME.match(name):
        raise UsageError(
            f"`{name}` is no name for an image",
            hint="names are lower case letters, digits, `.`, `_` and `-`, and start with a letter or digit",
        )


def link(image: Image, target: Path) -> None:
    """Put the image's file at `target`: another name of the same file, or a copy on another file system."""
    try:
        os.link(file(image.name), target)
    except OSError:
        with open(file(image.name), "rb", buffering=0) as source, open(target, "xb", buffering=0) as copy:
            sparse.copy(source.fileno(), copy.fileno())
            os.fchmod(copy.fileno(), 0o444)
            os.utime(copy.fileno(), (image.mtime, image.mtime))


def add(name: str, fill: Callable[[Path], Image]) -> Image:
    """Make the image `name`: `fill` writes the file at the path that it gets and returns the record without its digest.

    The digest, the size and the time are filled in. StateError when there is one of that name; whole or not at all.
    """
    check_name(name)
    store = places.images()
    store.mkdir(mode=0o700, parents=True, exist_ok=True)
    if os.path.lexists(store / name):
        raise StateError(f"there is an image `{name}` already", hint=f"`stockade image rm {name}` removes it")
    _sweep(store)
    fresh = store / f".new-{os.getpid()}-{name}"
    fresh.mkdir(mode=0o700)
    try:
        disk = fresh / "disk"
        image = fill(disk)
        digest = sparse.file_sha256(disk)
        image = msgspec.structs.replace(
            image, name=name, sha256=digest, size=disk.stat().st_size, mtime=pinned_time(digest),
            created=image.created or time.time(),
        )  # fmt: skip
        if os.geteuid() == 0:
            os.chown(disk, 0, 0)
        disk.chmod(0o444)
        os.utime(disk, (image.mtime, image.mtime))
        (fresh / "image.json").write_bytes(msgspec.json.format(msgspec.json.encode(image), indent=2) + b"\n")
        os.rename(fresh, store / name)
    except FileExistsError as error:
        raise StateError(
            f"there is an image `{name}` already", hint=f"`stockade image rm {name}` removes it"
        ) from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return image


def pinned_time(digest: str) -> int:
    """The modification time of an image's file: between 2001 and 2033, and different for different contents."""
    return 1_000_000_000 + int(digest[:12], 16) % 1_000_000_000


def _sweep(store: Path) -> None:
    """What a killed process left half made."""
    for path in store.glob(".new-*"):
        maker = path.name.split("-")[1]
        if not Path(f"/proc/{maker}").exists():
            shutil.rmtree(path, ignore_errors=True)


def add_file(
    name: str, source: Path, *, sha256: str | None, unchecked: bool = False, start: ImageStart | None = None,
    trusted: bool = False,
) -> Image:  # fmt: skip
    """Import a file: an ext4 image, plain or as .xz, .zst or .gz. The digest is checked before anything uses it.

    `sha256` is that of `source` as it lies there, or of the image in it. UsageError without one, unless `unchecked`.
    StateError when it is another, or the file is damaged or no file system.
    """
    if sha256 is None and not unchecked:
        raise UsageError(
            f"`{source}` has no SHA-256 to check it by",
            hint="give the one that its maker published with `--sha256`, or `--unchecked` to do without",
        )
    if sha256 is not None and not _SHA256.match(sha256):
        raise UsageError(f"`{sha256}` is no SHA-256", hint="it has 64 hexadecimal digits, as `sha256sum` prints it")
    outer = sparse.file_sha256(source)

    def fill(disk: Path) -> Image:
        _unpack(source, disk)
        if sha256 is not None and sha256 not in (outer, sparse.file_sha256(disk)):
            raise StateError(
                f"`{source}` is not what was asked for: its SHA-256 is {outer}, not {sha256}",
                hint="get the file again, from where the digest comes from",
            )
        _check_file_system(source, disk)
        return Image(
            name=name, sha256="", size=0, mtime=0, origin="import", source=source.name, quarantine=not trusted,
            start=start or ImageStart(init="/sbin/init"),
        )  # fmt: skip

    return add(name, fill)


def _check_file_system(source: Path, disk: Path) -> None:
    # ext4.h: the superblock at 1024, s_magic at 0x38 in it.
    with open(disk, "rb") as opened:
        opened.seek(1024 + 0x38)
        magic = opened.read(2)
    if magic != b"\x53\xef":
        raise StateError(
            f"`{source}` holds no ext4 file system", hint="an image is one file system, without a partition table"
        )


def _unpack(source: Path, disk: Path) -> None:
    """Write the image in `source` to `disk`, with holes for zeros."""
    with open(source, "rb") as opened:
        head = opened.read(6)
        opened.seek(0)
        if head.startswith(b"\xfd7zXZ\0"):
            pieces = _decompressed(iter(lambda: opened.read(_CHUNK), b""), lzma.LZMADecompressor)
        elif head.startswith(b"\x1f\x8b"):
            pieces = _decompressed(iter(lambda: opened.read(_CHUNK), b""), lambda: zlib.decompressobj(31))
        elif head.startswith(b"\x28\xb5\x2f\xfd"):
            pieces = _zstd(source)
        else:
            with open(disk, "xb", buffering=0) as target:
                sparse.copy(opened.fileno(), target.fileno())
            return
        try:
            with open(disk, "xb", buffering=0) as target:
                at = 0
                for piece in pieces:
                    _write_sparse(target.fileno(), piece, at)
                    at += len(piece)
                    if at > _LARGEST:
                        raise StateError(f"`{source}` unpacks to more than {_LARGEST} bytes")
                os.ftruncate(target.fileno(), at)
        except (lzma.LZMAError, zlib.error, EOFError) as error:
            raise StateError(f"`{source}` is damaged: {error}", hint="get the file again") from error


def _write_sparse(target: int, data: bytes, at: int) -> None:
    for start in range(0, len(data), 65536):
        part = data[start : start + 65536]
        if part.count(0) != len(part):
            os.pwrite(target, part, at + start)


def _decompressed(blocks: Iterator[bytes], make: Callable[[], object]) -> Iterator[bytes]:
    """Unpack a stream of members one after the other; EOFError for one that is cut off."""
    unpacker: object | None = None
    for block in blocks:
        while block:
            if unpacker is None:
                unpacker = make()
            piece = unpacker.decompress(block)  # type: ignore[attr-defined]
            if piece:
                yield piece
            if unpacker.eof:  # type: ignore[attr-defined]
                block = unpacker.unused_data  # type: ignore[attr-defined]
                unpacker = None
            else:
                block = b""
    if unpacker is not None:
        raise EOFError("it is cut off")


def _zstd(source: Path) -> Iterator[bytes]:
    if shutil.which("zstd") is None:
        raise HostError("`zstd` is not installed", hint="`apt-get install zstd`")
    process = subprocess.Popen(
        ["zstd", "-dcq", "--", os.fspath(source)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None and process.stderr is not None
    try:
        yield from iter(lambda: process.stdout.read(_CHUNK), b"")  # type: ignore[union-attr]
        text = process.stderr.read().decode("utf-8", "replace").strip()
        if process.wait(60) != 0:
            raise EOFError(text or "zstd failed")
    finally:
        process.kill()
        process.wait(60)
        process.stdout.close()
        process.stderr.close()


def tried(name: str) -> None:
    """Note that an imported image has been booted on a throw-away disk without a network."""
    image = load(name)
    if image.quarantine:
        fresh = places.images() / name / f".image.json.{os.getpid()}"
        known = msgspec.structs.replace(image, quarantine=False)
        fresh.write_bytes(msgspec.json.format(msgspec.json.encode(known), indent=2) + b"\n")
        fresh.replace(places.images() / name / "image.json")


def verify(name: str) -> bool:
    """Whether the image's contents still have the recorded digest."""
    image = load(name)
    return sparse.file_sha256(file(name)) == image.sha256


_COMPRESSORS = {".xz": ["xz", "-T0", "-c"], ".zst": ["zstd", "-q", "-c"], ".gz": ["gzip", "-n", "-c"]}


def export(name: str, target: Path) -> str:
    """Write the image to `target`, compressed as its name says (.xz, .zst, .gz); returns the file's SHA-256.

    FileExistsError when there is one.
    """
    load(name)
    compressor = next((words for suffix, words in _COMPRESSORS.items() if target.name.endswith(suffix)), None)
    with new_file(target) as out:
        if compressor is None:
            with open(file(name), "rb", buffering=0) as source:
                sparse.copy(source.fileno(), out.fileno())
        else:
            _compress(compressor, file(name), out.fileno())
    return sparse.file_sha256(target)


def _compress(words: list[str], source: Path, out: int) -> None:
    try:
        with open(source, "rb") as opened:
            done = subprocess.run(words, stdin=opened, stdout=out, stderr=subprocess.PIPE, timeout=3600, check=False)
    except FileNotFoundError as error:
        raise HostError(f"`{words[0]}` is not installed", hint=f"`apt-get install {words[0]}`") from error
    if done.returncode != 0:
        raise StateError(f"`{words[0]}` failed: {done.stderr.decode('utf-8', 'replace').strip()}")


def remove(name: str, users: list[str]) -> None:
    """Remove an image. StateError while guests (`users`) are made of it, although those would go on working."""
    check_name(name)
    if not (places.images() / name).is_dir():
        raise _absent(name)
    if users:
        raise StateError(
            f"image `{name}` is used by {', '.join(f'`{user}`' for user in users)}",
            hint="`stockade guest rm` them first; `--force` removes it all the same: the guests keep their base",
        )
    gone = places.images() / f".new-0-{name}"
    os.rename(places.images() / name, gone)
    shutil.rmtree(gone)
