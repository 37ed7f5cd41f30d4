"""Where data lie: from the patterns of a config to files."""

import glob
from collections.abc import Sequence

from recsys.config import UserError


class DataError(UserError):
    """The data cannot be trained on as they are; the message names file, row group and column, and the way out."""


def find_files(patterns: Sequence[str], *, source: str) -> list[str]:
    """The files that any of the patterns matches, sorted by path, once each.

    Args:
        patterns: globs or paths, relative to the working directory.
        source: config path of the patterns, for messages.

    Raises:
        DataError: a pattern matches no file.
    """
    files: set[str] = set()
    for pattern in patterns:
        matches = glob.glob(pattern, recursive=True)
        if not matches:
            raise DataError(f"{source}: no file matches {pattern!r} (paths are relative to the working directory)")
        files.update(matches)
    return sorted(files)
