"""How long a rank may live: no longer than the launcher that started it. Imports no torch, so that it comes first."""

import ctypes
import functools
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from recsys.errors import UserError

LAUNCHER_PID = "HILOREC_LAUNCHER_PID"
"""Environment variable in which `launch` leaves the id of the process that launches; `launch/dist.py` names it too."""

_POLL_SECONDS = 1.0
_PR_SET_PDEATHSIG = 1  # of linux/prctl.h


class OrphanError(UserError):
    """What launched this process has ended before it began."""


@functools.cache
def end_with_launcher() -> None:
    """Have this process killed when the torchrun that started it ends, or the torchx above that on the same machine.

    Neither can be relied on to end its processes: one that is killed does not. Does nothing in a process that torchrun
    has not started, and nothing more when called again. Call it in the main thread, and as early as possible: a
    torchrun that ends before is not noticed by a rank that no torchx launched.

    Raises:
        OrphanError: the torchx that launched this run has ended already.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    agent = os.getppid()
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != agent:  # it ended just before, and no signal will come
        os.kill(os.getpid(), signal.SIGKILL)
    launcher = _local_launcher()
    if launcher is None:
        return
    if launcher not in ancestors():
        # Who the parent is now cannot be told, so that nobody is signalled; torchrun runs out of restarts.
        raise OrphanError(f"the torchx that launched this run (process {launcher}) has ended; launch the run again")
    threading.Thread(target=_watch, args=(agent, launcher), name="launcher watch", daemon=True).start()


def ancestors() -> Iterator[int]:
    """Process ids of the parent, its parent and so on."""
    pid = os.getppid()
    while pid > 0:
        yield pid
        try:
            stat = Path(f"/proc/{pid}/stat").read_text()
        except OSError:  # it has just ended
            return
        pid = int(stat.rpartition(")")[2].split()[1])  # the name in parentheses may hold anything


def _local_launcher() -> int | None:
    """The torchx that keeps this run as its own processes; other schedulers outlive it, and docker hides it."""
    is_local = os.environ.get("TORCHX_JOB_ID", "").startswith("local_cwd://")
    pid = os.environ.get(LAUNCHER_PID)
    return int(pid) if is_local and pid else None


def _watch(agent: int, launcher: int) -> None:
    while launcher in ancestors():
        time.sleep(_POLL_SECONDS)
    if os.getppid() == agent:
        # With torchrun end all of its ranks. SIGTERM would come from each of them, and a second one has torchrun forget
        # the threads that follow its ranks' output: it then waits for those for ever.
        os.kill(agent, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)
