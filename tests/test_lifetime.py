"""A rank ends with what launched it, shown without a launcher; tests/launch/test_stopping.py kills real ones."""

import os
import subprocess
import sys
import time
from pathlib import Path
from subprocess import PIPE

import pytest

from recsys.lifetime import ancestors

ROOT = Path(__file__).parents[1]

# A parent that starts a process as torchrun would, tells its id and ends when told to.
PARENT = """
import os, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], env={**os.environ, "TORCHELASTIC_RUN_ID": "x"})
sys.stdin.read()
"""
CHILD = """
import os, time
from recsys.lifetime import end_with_launcher
end_with_launcher()
end_with_launcher()
print(os.getpid(), flush=True)
time.sleep(300)
"""


def environment(**more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("TORCHX", "HILOREC"))}
    return {**kept, "PYTHONPATH": str(ROOT), **more}


def is_running(pid: int) -> bool:
    """Whether a process is there and no zombie, which nobody but its parent can take away."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def ends(pid: int) -> bool:
    until = time.monotonic() + 60
    while is_running(pid) and time.monotonic() < until:
        time.sleep(0.05)
    return not is_running(pid)


def orphaned(parent_code: str) -> int:
    """The process that a parent has started and left, which was killed."""
    command = [sys.executable, "-c", parent_code, CHILD]
    with subprocess.Popen(command, stdin=PIPE, stdout=PIPE, text=True, env=environment()) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert is_running(child)
        parent.kill()
    return child


def test_a_rank_ends_with_its_parent() -> None:
    assert ends(orphaned(PARENT))


# As torchx launches a torchrun, which starts a rank: neither ends by itself, nor does torchrun on SIGTERM.
TORCHRUN = """
import os, signal, subprocess, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print(os.getpid(), flush=True)
subprocess.Popen([sys.executable, "-c", sys.argv[1]], env={**os.environ, "TORCHELASTIC_RUN_ID": "x"})
while True:
    signal.pause()
"""
TORCHX = """
import os, signal, subprocess, sys
job = {"TORCHX_JOB_ID": "local_cwd://torchx/x", "HILOREC_LAUNCHER_PID": str(os.getpid())}
subprocess.Popen([sys.executable, "-c", *sys.argv[1:]], env={**os.environ, **job})
signal.pause()
"""


def test_torchrun_ends_with_its_torchx_even_if_it_does_not_end_when_asked_to() -> None:
    command = [sys.executable, "-c", TORCHX, TORCHRUN, CHILD]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment()) as torchx:
        assert torchx.stdout is not None
        torchrun, rank = (int(torchx.stdout.readline()) for _ in range(2))
        assert is_running(torchrun) and is_running(rank)
        torchx.kill()
        left = [pid for pid in (torchrun, rank) if not ends(pid)]
        for pid in left:
            os.kill(pid, 9)
    assert not left


def test_a_process_that_no_torchrun_started_outlives_its_parent() -> None:
    child = orphaned(PARENT.replace('"TORCHELASTIC_RUN_ID": "x"', ""))
    time.sleep(1.5)
    assert is_running(child)
    os.kill(child, 9)


def begin(**more: str) -> subprocess.CompletedProcess[str]:
    code = "from recsys.cli import run_entry; run_entry(lambda: print('begun'))"
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=environment(TORCHELASTIC_RUN_ID="x", LOCAL_RANK="0", **more),
    )


def test_a_rank_whose_torchx_has_ended_does_not_begin() -> None:
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    pid = gone.stdout.strip()
    done = begin(TORCHX_JOB_ID="local_cwd://torchx/x", HILOREC_LAUNCHER_PID=pid)
    assert (done.returncode, done.stdout) == (2, "")
    expected = f"error: the torchx that launched this run (process {pid}) has ended; launch the run again\n"
    assert done.stderr == expected


@pytest.mark.parametrize("job", ["slurm://torchx/x", "kubernetes://torchx/default:x", "local_docker://torchx/x", ""])
def test_other_schedulers_outlive_the_torchx_that_submitted(job: str) -> None:
    assert begin(TORCHX_JOB_ID=job, HILOREC_LAUNCHER_PID="999999999").stdout == "begun\n"


def test_a_rank_below_its_torchx_begins() -> None:
    assert begin(TORCHX_JOB_ID="local_cwd://torchx/x", HILOREC_LAUNCHER_PID=str(os.getpid())).stdout == "begun\n"


def test_ancestors_begin_with_the_parent_and_end_with_the_first_process() -> None:
    code = "from recsys.lifetime import ancestors; print(*ancestors())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), check=True)
    found = [int(pid) for pid in done.stdout.split()]
    assert found == [os.getpid(), *ancestors()]
