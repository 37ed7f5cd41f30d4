"""What a process is set up to do."""

import ctypes
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
import numpy as np
from recsys.runtime import keep_freed_memory

if sys.argv[1] == "keep":
    keep_freed_memory()
for turn in range(51):
    if turn == 1:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for megabytes in (24, 2):
        np.empty(megabytes << 18, np.float32).fill(1)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


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
