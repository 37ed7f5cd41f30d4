"""Memory of this host: what a process may have of it, and what the C library keeps. Imports no torch."""

import ctypes
from collections.abc import Iterator
from pathlib import Path

_DIGITS = 20  # of more bytes than 64 bits count
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # of malloc.h
_NEVER = (1 << 31) - 1


def host_memory(root: Path = Path("/")) -> int:
    """Bytes of host memory that this process may use with all others of its control group (cgroup).

    Args:
        root: of the file system that tells.
    """
    fields = (root / "proc/meminfo").read_text().split()
    whole = 1024 * int(fields[fields.index("MemTotal:") + 1])
    return min([whole, *_limits(root)])


def _limits(root: Path) -> Iterator[int]:
    """Of this process's control group and of those above it, of either version; a container may not see its own."""
    try:
        groups = (root / "proc/self/cgroup").read_text(errors="surrogateescape").splitlines()
    except OSError:
        return
    for _, controllers, path in (line.split(":", 2) for line in groups if line.count(":") > 1):
        if controllers not in ("", "memory"):
            continue
        mount, name = ("memory", "memory.limit_in_bytes") if controllers else ("", "memory.max")
        top = root / "sys/fs/cgroup" / mount
        group = top / path.lstrip("/")
        for folder in (group, *(parent for parent in group.parents if parent.is_relative_to(top))):
            try:
                limit = (folder / name).read_text().strip()
            except OSError:
                continue
            if limit.isdecimal() and len(limit) < _DIGITS:  # and not "max"
                yield int(limit)


def keep_freed_memory() -> None:
    """Have the C library keep freed memory for what is allocated next; does nothing where it is not glibc.

    Decoded rows and batches are large and live for moments. Left alone, glibc hands such memory back to the system, and
    the kernel clears and maps the pages of the next, under a lock that all threads share. The process keeps what it
    held at most until it ends.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        for option, size in ((_TRIM_THRESHOLD, _NEVER), (_TOP_PAD, 64 << 20), (_MMAP_THRESHOLD, 32 << 20)):
            set_option(option, size)
