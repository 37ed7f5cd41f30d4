"""Runs under every launcher, each of whose processes can be found and signalled."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from faults.rank import NOTES, forked
from ranks import start

ROOT = Path(__file__).parents[2]
RANK = str(ROOT / "tests" / "faults" / "rank.py")
BINARIES = Path(sys.executable).parent

LAUNCHERS = ("forked", "python", "torchrun", "torchx")

_POLL_SECONDS = 0.02


class Launch(Protocol):
    """A run that was launched."""

    def poll(self) -> int | None:
        """The exit status, None while the run lasts."""

    def ranks(self) -> list[int]:
        """Process ids of ranks that are running."""

    def pids(self, role: str) -> list[int]:
        """Process ids of what has a role (`rank`, `torchrun`, `torchx`), as far as it is running."""

    def left(self) -> list[int]:
        """Process ids of all that is running."""

    def wait(self, timeout: float) -> int | None:
        """Wait for the end; None if it does not come in time."""
        until = time.monotonic() + timeout
        while (status := self.poll()) is None and time.monotonic() < until:
            time.sleep(_POLL_SECONDS)
        return status

    def clear(self) -> None:
        """End what is left, by its ids."""
        for pid in self.left():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.wait(10)


class Forked(Launch):
    """Ranks forked with all imports done; as torchrun does, the first that fails has the others ended.

    One that died of a signal leaves them a second, one that ended by itself 30.
    """

    def __init__(self, world_size: int, arguments: list[str], folder: Path, environment: dict[str, str]) -> None:
        task: tuple[Callable[..., None], tuple[Any, ...]] = (forked, (environment, arguments, str(folder / "log")))
        self._processes, self._store = start(world_size, [task] * world_size)
        self._failed_at: float | None = None

    def poll(self) -> int | None:
        for process in self._processes:
            process.join(0.0)
        codes = [process.exitcode for process in self._processes]
        failed = [code for code in codes if code]
        if failed and self._failed_at is None:
            self._failed_at = time.monotonic()
            for process in self._processes:
                process.terminate()
        if failed and self._failed_at and time.monotonic() > self._failed_at + (1.0 if min(failed) < 0 else 30.0):
            for process in self._processes:
                process.kill()
        return None if None in codes else next(iter(failed), 0)

    def ranks(self) -> list[int]:
        return [process.pid for process in self._processes if process.pid and is_running(process.pid)]

    def pids(self, role: str) -> list[int]:
        return self.ranks()

    def left(self) -> list[int]:
        return self.ranks()


class Commanded(Launch):
    """A run by a command line, in a session of its own."""

    def __init__(self, launcher: str, command: list[str], folder: Path, environment: dict[str, str]) -> None:
        self._launcher = launcher
        self._marker = f"{NOTES}={environment[NOTES]}".encode()
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("TORCHX", "HILOREC"))}
        kept |= {"PATH": f"{BINARIES}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
        kept |= {"LOGLEVEL": "WARNING", "OMP_NUM_THREADS": "1", **environment}
        with (folder / "log").open("a") as log:
            self._process = subprocess.Popen(
                command, cwd=folder, env=kept, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    def poll(self) -> int | None:
        return self._process.poll()

    def ranks(self) -> list[int]:
        if self._launcher == "python":
            return [self._process.pid] if is_running(self._process.pid) else []
        return [pid for pid, environ in self._found() if any(one.startswith(b"LOCAL_RANK=") for one in environ)]

    def pids(self, role: str) -> list[int]:
        if role == "rank":
            return self.ranks()
        if role == self._launcher:
            return [self._process.pid] if is_running(self._process.pid) else []
        return list({parent(pid) for pid in self.ranks()})  # torchrun, below torchx

    def left(self) -> list[int]:
        return [pid for pid, _ in self._found()]

    def _found(self) -> list[tuple[int, list[bytes]]]:
        """Running processes that have inherited this run's environment."""
        found = []
        for folder in Path("/proc").iterdir():
            if folder.name.isdecimal() and int(folder.name) != os.getpid():
                with suppress(OSError):
                    environ = (folder / "environ").read_bytes().split(b"\0")
                    if self._marker in environ and is_running(int(folder.name)):
                        found.append((int(folder.name), environ))
        return found


def launch(
    launcher: str, world_size: int, restarts: int, arguments: list[str], folder: Path, environment: dict[str, str]
) -> Launch:
    """Launch a run.

    Args:
        launcher: one of `LAUNCHERS`.
        world_size: number of ranks; `python` has one.
        restarts: how often torchrun may start the ranks again.
        arguments: of `recsys/train.py`.
        folder: to run in; output goes to `log` in it.
        environment: more variables; `FAULTS_NOTES` tells the processes from those of other runs.
    """
    if launcher == "forked":
        return Forked(world_size, arguments, folder, environment)
    if launcher == "python":
        command = [sys.executable]
    elif launcher == "torchrun":
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world_size)]
        command += ["--max-restarts", str(restarts)]
    else:
        command = [str(BINARIES / "torchx"), "run", "-s", "local_cwd", "-cfg", "log_dir=logs", "dist.ddp"]
        command += ["-j", f"1x{world_size}", *(["--max_retries", str(restarts)] if restarts else [])]
    return Commanded(launcher, [*command, RANK, *arguments], folder, environment)


def warm_up() -> None:
    """Have the imports done from which ranks are forked."""
    processes, _store = start(1, [(int, ())])
    processes[0].join()


def is_running(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return stat(pid)[0] != "Z"
    except OSError:
        return False


def parent(pid: int) -> int:
    """Process id of the parent."""
    return int(stat(pid)[1])


def stat(pid: int) -> list[str]:
    """What the kernel tells of a process behind its name: state, parent and so on."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
