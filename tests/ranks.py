"""Running code on several ranks, quickly: processes are forked from a server that has imported the project once."""

import multiprocessing
import os
import runpy
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["recsys.training.evaluation", "recsys.training.run"])


@dataclass(frozen=True)
class Finished:
    """How a command ended on one rank."""

    code: int
    stdout: str
    stderr: str


def run_ranks(world_size: int, function: Callable[..., Any], *arguments: Any, timeout: float = 120.0) -> list[Any]:
    """Call `function(ranks, *arguments)` on every rank of a gloo process group and return the results by rank.

    Function and arguments are pickled. A rank that fails or is not done in time fails the test with its traceback.
    """
    pipes = [_CONTEXT.Pipe(duplex=False) for _ in range(world_size)]
    processes, _store = start(world_size, [(_call, (sender, function, arguments)) for _, sender in pipes])
    try:
        results = []
        for receiver, _ in pipes:
            if not receiver.poll(timeout):
                raise TimeoutError(f"a rank gave no result within {timeout} s")
            failed, result = receiver.recv()
            if failed:
                raise AssertionError(f"a rank failed:\n{result}{_of_others(pipes, processes, receiver)}")
            results.append(result)
        return results
    finally:
        _end(processes)


def _of_others(pipes: list[Any], processes: list[ForkServerProcess], first: Connection) -> str:
    """What the other ranks say, as the first that is heard of may have failed by the end of another."""
    told = ""
    for rank, ((receiver, _), process) in enumerate(zip(pipes, processes, strict=True)):
        if receiver is first:
            continue
        failed, result = receiver.recv() if receiver.poll(5.0) else (False, None)
        process.join(5.0)
        told += f"\nrank {rank}, whose exit code is {process.exitcode}: {result if failed else 'no error'}"
    return told


def run_module(world_size: int, module: str, *arguments: str, timeout: float = 120.0) -> list[Finished]:
    """Run `python -m module arguments` on every rank, as torchrun would, and tell how each ended.

    As torchrun does, the first rank to fail ends the others, though with a moment to end by themselves.
    """
    with tempfile.TemporaryDirectory() as folder:
        processes, _store = start(world_size, [(_main, (folder, module, arguments))] * world_size)
        stuck = _await(processes, timeout)
        _end(processes)
        finished = [
            Finished(
                process.exitcode or 0,
                (Path(folder) / f"{rank}.out").read_text(),
                (Path(folder) / f"{rank}.err").read_text(),
            )
            for rank, process in enumerate(processes)
        ]
        assert not stuck, f"ranks {stuck} hang: {finished}"
        return finished


def _await(processes: list[ForkServerProcess], timeout: float) -> list[int]:
    """Wait until all have ended, those that a failed one leaves behind by force; the ranks that did not in time."""
    until = time.monotonic() + timeout
    while running := [process for process in processes if process.exitcode is None]:
        if not wait([process.sentinel for process in running], max(until - time.monotonic(), 0.0)):
            return [rank for rank, process in enumerate(processes) if process.exitcode is None]
        for process in running:
            process.join(0.0)
        if any(process.exitcode for process in processes):
            for process in processes:
                process.join(2.0)
            for process in processes:
                process.terminate()
    return []


def start(
    world_size: int, tasks: list[tuple[Callable[..., None], tuple[Any, ...]]]
) -> tuple[list[ForkServerProcess], TCPStore]:
    """Start a call on each rank, by rank, as torchrun would; the store at which they meet is given too, to be kept."""
    # As under torchrun, the store at which ranks meet outlives each of them.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    processes = []
    for rank, (target, arguments) in enumerate(tasks):
        environment = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "OMP_NUM_THREADS": "1",
        }
        processes.append(_CONTEXT.Process(target=_enter, args=(environment, os.getcwd(), target, arguments)))
        processes[-1].start()
    return processes, store


def _enter(environment: dict[str, str], folder: str, target: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    os.environ.update(environment)
    os.chdir(folder)
    import torch

    torch.set_num_threads(1)
    target(*arguments)


def _call(sender: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    from recsys.cli import quiet_libraries
    from recsys.runtime import process_group

    quiet_libraries()
    try:
        with process_group("cpu") as ranks:
            result = function(ranks, *arguments)
        sender.send((False, result))
    except BaseException:
        sender.send((True, traceback.format_exc()))
        sys.stderr.flush()
        os._exit(1)


def _main(folder: str, module: str, arguments: tuple[str, ...]) -> None:
    rank = os.environ["RANK"]
    for number, suffix in ((1, "out"), (2, "err")):
        os.dup2(os.open(Path(folder) / f"{rank}.{suffix}", os.O_CREAT | os.O_WRONLY), number)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__")


def _end(processes: list[ForkServerProcess]) -> None:
    for process in processes:
        process.join(5.0)
        if process.exitcode is None:
            with suppress(ProcessLookupError):
                process.kill()
            process.join()
