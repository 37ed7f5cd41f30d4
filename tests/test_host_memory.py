"""What a process may have of its host's memory, and that what it frees stays its own."""

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest

from recsys.host_memory import host_memory

GIB = 1 << 30
FAULTS = """
import resource, sys
import numpy as np
from recsys.host_memory import keep_freed_memory

if sys.argv[1] == "keep":
    keep_freed_memory()
for turn in range(51):
    if turn == 1:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for megabytes in (24, 2):
        np.empty(megabytes << 18, np.float32).fill(1)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library is not glibc")
def test_freed_memory_is_used_again_without_asking_for_its_pages() -> None:
    def faults(how: str) -> int:
        done = subprocess.run(
            [sys.executable, "-c", FAULTS, how],
            capture_output=True,
            text=True,
            check=True,
            env={"NUMPY_MADVISE_HUGEPAGE": "0"},
        )
        return int(done.stdout)

    assert faults("keep") < 500 < faults("leave") / 5


@pytest.mark.parametrize(
    ("groups", "limits", "expected"),
    [
        ("0::/", {}, 64),
        ("0::/a/b", {"a/b/memory.max": "max", "a/memory.max": f"{8 * GIB}", "memory.max": f"{16 * GIB}"}, 8),
        ("0::/not/seen/here", {"memory.max": f"{4 * GIB}"}, 4),  # of a container
        ("5:cpu:/x\n4:memory:/a\n0::/", {"memory/a/memory.limit_in_bytes": f"{2 * GIB}"}, 2),
        ("4:memory:/a", {"memory/a/memory.limit_in_bytes": "9223372036854771712"}, 64),
        (None, {"memory.max": f"{4 * GIB}"}, 64),
        ("\nodd\n0::/\udcff", {"memory.max": f"{4 * GIB}"}, 4),  # a name that is no UTF-8
        ("0::/", {"memory.max": "9" * 5000}, 64),
    ],
)
def test_host_memory_is_what_the_control_group_leaves_of_it(
    tmp_path: Path, groups: str | None, limits: dict[str, str], expected: int
) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text(f"MemTotal:  {64 << 20} kB\nMemFree: 1 kB\n")
    if groups is not None:
        (tmp_path / "proc/self/cgroup").write_text(f"{groups}\n", errors="surrogateescape")
    for name, limit in limits.items():
        path = tmp_path / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{limit}\n")
    assert host_memory(tmp_path) == expected * GIB
