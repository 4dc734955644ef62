"""crypt(3) of the system's libcrypt. Keeps no password."""

from __future__ import annotations

import ctypes
import functools
import secrets
import string

from stockade.errors import HostError

__all__ = ["crypt", "new_setting"]

_SALT = string.ascii_letters + string.digits + "./"


@functools.cache
def _library() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL("libcrypt.so.1", use_errno=True)
    except OSError as error:
        raise HostError(
            f"a password cannot be hashed: {error}", hint="install it: `apt-get install libcrypt1`"
        ) from error
    library.crypt.argtypes = [ctypes.c_char_p, ctypes.c_char_p]
    library.crypt.restype = ctypes.c_char_p
    return library


def new_setting() -> str:
    """A setting with a fresh salt for SHA-512 crypt, which every libc can check (crypt(5))."""
    return "$6$" + "".join(secrets.choice(_SALT) for _ in range(16)) + "$"


def crypt(password: str, setting: str) -> str:
    """Hash of `password` as shadow(5) holds it. `setting` is from `new_setting`, or an earlier hash."""
    result: bytes | None = _library().crypt(password.encode(), setting.encode("ascii"))
    # libxcrypt gives a "failure token" that starts with `*` instead of NULL.
    if result is None or result.startswith(b"*"):
        raise HostError("`libcrypt.so.1` cannot hash with SHA-512", hint="install Debian's `libcrypt1`")
    return result.decode("ascii")
