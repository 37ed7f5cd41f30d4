"""Files of others, opened so that they can neither hang nor outgrow their bound: regular ones, of so many bytes."""

import json
import math
import os
import stat
from io import FileIO
from pathlib import Path
from typing import Any

from recsys.errors import UserError

_MAX_DIGITS = 400
"""Of a number in JSON: beyond any double that is written out; Python refuses to read much longer integers."""


class FileError(UserError):
    """A file cannot be read as what it should be; the message names it and says why, in one line.

    Attributes:
        reason: why, for those who name the file themselves.
    """

    def __init__(self, path: Path, reason: str) -> None:
        shown = str(path) if str(path).isprintable() else ascii(str(path))
        super().__init__(f"{shown}: {reason}")
        self.reason = reason


class FileTooLargeError(FileError):
    """A file has more bytes than are read."""


def open_regular(path: Path, *, follow: bool = False) -> FileIO:
    """Open a regular file for reading, without waiting for a pipe or a device that stands in its place.

    Args:
        path: the file.
        follow: whether the file itself may be a link; the folders above it may be in any case.

    Raises:
        FileError: it cannot be opened, or is no regular file.
    """
    try:
        found = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | (0 if follow else os.O_NOFOLLOW))
    except OSError as error:
        is_link = not follow and os.path.islink(path)
        raise FileError(path, "it is a link" if is_link else error.strerror or str(error)) from None
    except ValueError:  # NUL, or half of a surrogate pair
        raise FileError(path, "it holds a character that no path can") from None
    # Seen through what is open now: whatever a name stands for may change between two looks at it.
    if not stat.S_ISREG(os.fstat(found).st_mode):
        os.close(found)
        raise FileError(path, "it is no regular file")
    return FileIO(found)


def read_regular(path: Path, max_bytes: int, *, follow: bool = False) -> bytes:
    """The bytes of a regular file.

    Raises:
        FileError: as `open_regular`, or it has more than `max_bytes`.
    """
    with open_regular(path, follow=follow) as file:
        try:
            # A file may say that it has no bytes, as those of /proc do, or grow meanwhile.
            content = bytearray()
            while part := file.read(min(1 << 20, max_bytes + 1 - len(content))):
                content += part
        except OSError as error:
            raise FileError(path, error.strerror or str(error)) from None
    if len(content) > max_bytes:
        raise FileTooLargeError(path, f"it has more than {max_bytes:,} bytes")
    return bytes(content)


def read_json(path: Path, max_bytes: int) -> Any:
    """What a regular file of JSON holds; links are not followed.

    Raises:
        FileError: as `read_regular`, or it is no JSON in UTF-8 that any reader would understand alike: a key stands
            twice in an object, a number is no finite one, a text holds half of a surrogate pair, or it nests too deep.
    """
    content = read_regular(path, max_bytes)
    try:
        value = json.loads(
            content.decode("utf-8"),
            object_pairs_hook=_distinct,
            parse_int=_integer,
            parse_float=_finite,
            parse_constant=_no_constant,
        )
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise FileError(path, "it nests too deep") from None
    except UnicodeDecodeError as error:
        raise FileError(path, f"it is not UTF-8 text: {error.reason} at byte {error.start}") from None
    except UnicodeEncodeError:
        raise FileError(path, "a text holds half of a surrogate pair") from None
    except ValueError as error:
        raise FileError(path, f"it is not JSON: {error}") from None
    return value


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("an object has one key twice")
    return found


def _integer(text: str) -> int:
    if len(text) > _MAX_DIGITS:
        raise ValueError(f"a number has {len(text):,} digits")
    return int(text)


def _finite(text: str) -> float:
    if len(text) > _MAX_DIGITS or not math.isfinite(number := float(text)):
        raise ValueError("a number is beyond any double")
    return number


def _no_constant(name: str) -> Any:
    raise ValueError(f"it holds {name}, which is no number of JSON")
