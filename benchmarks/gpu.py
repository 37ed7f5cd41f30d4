"""All that needs a GPU, one after another: the tests that are marked so, and the benchmarks, with their pages.

    python -m benchmarks.gpu [--only PART ...] [--output DIR]

Each part is a process of its own, is ended when its time is over, and fails alone: the page `gpu_<device>` says what
became of each, and the exit code is 1 where one failed. Without a GPU nothing is run.
"""

import argparse
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import torch

from benchmarks.report import RESULTS, ROOT, Line, environment, show, write
from recsys.cli import run_entry
from recsys.config import ConfigError

PARTS: dict[str, tuple[int, tuple[str, ...]]] = {
    # Eight at once, as a test's time is that of processes which start; a test sees to it that no other file has any.
    "tests": (160, ("-m", "pytest", "-n", "8", "-m", "gpu", "-q", "tests/training/test_cuda.py")),
    "kernels": (70, ("-m", "benchmarks.kernels", "model.tower={type: dcn_v2}", "device=cuda")),
    "step": (
        130,
        ("-m", "benchmarks.step", "--steps", "20", "--turns", "3", "data.batch_size=2048", "device=cuda"),
    ),
    "layer": (60, ("-m", "benchmarks.layer", "--dims", "512", "--experts", "6x8", "--turns", "5", "--compiled")),
    "domains": (40, ("-m", "benchmarks.domains", "--domains", "2", "20", "--ranks", "8", "--turns", "5")),
    "checkpoint": (140, ("-m", "benchmarks.checkpoint", "--device", "cuda", "--turns", "1", "--steps", "400")),
}
"""Each part with the most seconds that it may take, ten minutes together, and what Python is given."""


def main() -> None:
    """Run the parts, and report."""
    parser = argparse.ArgumentParser(prog="benchmarks.gpu", description="Run all that needs a GPU.")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where the pages go (benchmarks/results)")
    parser.add_argument("--only", choices=tuple(PARTS), nargs="+", default=tuple(PARTS), help="parts to run (all)")
    arguments = parser.parse_args()
    run_entry(lambda: _run(arguments.only, arguments.output.resolve()))


def _run(names: Sequence[str], output: Path) -> int:
    if not torch.cuda.is_available():
        raise ConfigError("no GPU: torch sees none on this machine; make doctor says why")
    return run_parts(names, output, torch.cuda.get_device_name(0), "cuda", say=lambda text: print(text, flush=True))


def run_parts(names: Sequence[str], output: Path, hardware: str, device: str, say: Callable[[str], object]) -> int:
    """Run parts one after another and write the page of what became of them.

    Args:
        names: of `PARTS`.
        output: where pages go.
        hardware: what they run on, for the page.
        device: as pages are named by.
        say: told of each part.

    Returns:
        The exit code: 1 where a part failed, or was ended.
    """
    lines: list[Line] = []
    for name in names:
        limit, arguments = PARTS[name]
        told = [*arguments, *(() if name == "tests" else ("--output", str(output)))]
        say(f"{name}: at most {limit} s")
        began = time.perf_counter()
        code = _code_of([sys.executable, *told], limit)
        seconds = time.perf_counter() - began
        outcome = f"ended after {limit} s" if code is None else "done" if code == 0 else f"failed with {code}"
        say(f"{name}: {outcome}")
        command = shlex.join(["python", *arguments])
        lines.append({"kind": "part", "part": name, "command": command, "outcome": outcome, "seconds": round(seconds)})
    rows = [{"": str(of["part"]), "outcome": str(of["outcome"]), "seconds": f"{of['seconds']}"} for of in lines]
    show("All that needs a GPU", rows)
    about = {"name": "gpu", "command": "python -m benchmarks.gpu", "device": device, **environment()}
    commands = "\n".join(f"- {of['part']}: `{of['command']}`" for of in lines)
    write(output / f"gpu_{device}", f"All that needs a GPU, on {hardware}", [rows, commands], about, lines)
    return int(any(of["outcome"] != "done" for of in lines))


def _code_of(command: Sequence[str], limit: int) -> int | None:
    """The exit code of a command; None where its time was over, when it is ended with all that it started."""
    with subprocess.Popen(command, cwd=ROOT, start_new_session=True) as process:
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            return None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


if __name__ == "__main__":
    main()
