"""Check this machine and its packages: `python -m recsys.doctor [--json]`.

Exits with 1 when a check fails, and says for each failure what mends it.
"""

import json
import multiprocessing
import os
import platform
import shutil
import socket
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from recsys.cli import ArgumentParser, run_entry
from recsys.terminal import say, table
from recsys.versions import VersionError, check_versions, git_commit, nvidia_driver, versions

GIB = 1 << 30
MIN_DISK = 2 * GIB
MIN_SHM = GIB // 4
EXCHANGE_SECONDS = 60
_TEXTS = ("package", "version", "check", "result", "found")


@dataclass(frozen=True)
class Check:
    """What one check found; the remedy is empty where it passed."""

    name: str
    detail: str
    remedy: str = ""

    @property
    def ok(self) -> bool:
        """Whether the check passed."""
        return not self.remedy


def check_trio() -> Check:
    """Torch, torchrec and fbgemm belong together."""
    try:
        check_versions()
    except VersionError as error:
        return Check("versions", error.problem, error.remedy.removeprefix("Mend it with:").strip())
    return Check("versions", "torch, torchrec and fbgemm match")


def check_operators() -> Check:
    """The operators of fbgemm are registered, and look up and train a table."""
    name = "fbgemm operators"
    try:
        import torch
        from fbgemm_gpu.split_embedding_configs import EmbOptimType
        from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
        from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
            ComputeDevice,
            SplitTableBatchedEmbeddingBagsCodegen,
        )

        gpu = torch.cuda.is_available()
        device = torch.device("cuda" if gpu else "cpu")
        table = SplitTableBatchedEmbeddingBagsCodegen(
            [
                (
                    8,
                    4,
                    EmbeddingLocation.DEVICE if gpu else EmbeddingLocation.HOST,
                    ComputeDevice.CUDA if gpu else ComputeDevice.CPU,
                )
            ],
            optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD,
            learning_rate=0.1,
            device=device,
        )
        (weights,) = table.split_embedding_weights()
        weights.data.fill_(1.0)
        lengths = torch.tensor([2, 1], device=device)
        offsets = torch.ops.fbgemm.asynchronous_complete_cumsum(lengths)
        pooled = table(torch.tensor([0, 1, 7], device=device), offsets)
        if pooled[:, 0].tolist() != [2.0, 1.0]:
            raise RuntimeError(f"pooling rows of ones gave {pooled[:, 0].tolist()} in place of [2.0, 1.0]")
        pooled.sum().backward()
        if not bool((weights[[0, 1, 7]] < 1).all()):
            raise RuntimeError("the fused optimizer did not update the rows")
    except Exception as error:
        return Check(
            name,
            _brief(error),
            f"install the pinned set again: rm -rf .venv && make setup FLAVOUR={_flavour()}",
        )
    return Check(name, f"lookup and fused row-wise Adagrad work on {device.type}")


def check_devices() -> Check:
    """Where an NVIDIA driver and the CUDA packages are, torch sees the GPUs."""
    cpus = f"{len(os.sched_getaffinity(0))} CPU cores, {platform.machine()}"
    try:
        import torch

        gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    except Exception as error:
        return Check("devices", _brief(error), "install the pinned set again: rm -rf .venv && make setup")
    if gpus:
        return Check("devices", f"{cpus}; {len(gpus)} GPUs: {', '.join(sorted(set(gpus)))}")
    if "fbgemm-gpu" in versions():
        return Check(
            "devices",
            f"{cpus}; the CUDA packages are installed but torch sees no GPU",
            "load the NVIDIA driver (Docker: --gpus all) until nvidia-smi works, or make setup FLAVOUR=cpu",
        )
    unused = "; an NVIDIA driver is loaded but the CPU packages are installed: make setup FLAVOUR=cuda uses it"
    return Check("devices", f"{cpus}; no GPU{unused if nvidia_driver() else ''}")


def check_name() -> Check:
    """This machine's own name resolves: it is where torchrun tells ranks to meet."""
    host, full = socket.gethostname(), socket.getfqdn()
    try:
        addresses = sorted({str(info[4][0]) for info in socket.getaddrinfo(full, None)})
    except OSError as error:
        return Check(
            "host name",
            f"{full} does not resolve: {error.strerror or error}",
            f"add it to /etc/hosts: 127.0.1.1 {host}; or, for ranks on one machine, export PET_LOCAL_ADDR=127.0.0.1 "
            "(torchrun's --local-addr); without either they look for one another in silence, for minutes",
        )
    return Check("host name", f"{full} is {', '.join(addresses)}")


def check_exchange() -> Check:
    """Two processes on this machine exchange data by an all-to-all over gloo, as the sharded tables do."""
    name = "all-to-all"
    remedy = (
        "let processes of this machine connect to each other: the firewall must admit it; or name the network "
        "interface: export GLOO_SOCKET_IFNAME=lo"
    )
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        ranks = []
        for rank in range(2):
            receiver, sender = spawn.Pipe(duplex=False)
            process = spawn.Process(target=_exchange, args=(rank, f"{folder}/store", sender), daemon=True)
            process.start()
            sender.close()
            ranks.append((process, receiver))
        problems = []
        for rank, (process, receiver) in enumerate(ranks):
            # The process group's own timeout fires first; this one is for a process that hangs elsewhere.
            if not receiver.poll(EXCHANGE_SECONDS + 30):
                problems.append(f"rank {rank} did not answer")
                process.kill()
            else:
                try:
                    problem = receiver.recv()
                except EOFError:
                    problem = "died"
                if problem:
                    problems.append(f"rank {rank}: {problem}")
            process.join()
    if problems:
        return Check(name, "; ".join(problems), remedy)
    return Check(name, "two processes exchanged data over gloo")


def _exchange(rank: int, store: str, answer: "Connection[str, Any]") -> None:
    """One rank of the exchange; answers with what went wrong, or nothing."""
    try:
        import torch
        import torch.distributed as dist

        dist.init_process_group(
            "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=2,
            timeout=timedelta(seconds=EXCHANGE_SECONDS),
        )
        got = torch.empty(2)
        dist.all_to_all_single(got, torch.tensor([10.0 * rank, 10.0 * rank + 1]))
        dist.destroy_process_group()
        expected = [float(rank), 10.0 + rank]
        answer.send("" if got.tolist() == expected else f"received {got.tolist()} in place of {expected}")
    except Exception as error:
        answer.send(_brief(error))


def check_disk() -> Check:
    """There is room for checkpoints here."""
    free = shutil.disk_usage(Path.cwd()).free
    remedy = "" if free >= MIN_DISK else f"free at least {_gib(MIN_DISK)}, or set output_dir to a larger disk"
    return Check("disk", f"{_gib(free)} free in the working directory", remedy)


def check_shm() -> Check:
    """There is shared memory for processes to exchange tensors by."""
    shm = Path("/dev/shm")
    if not shm.exists():
        return Check("shared memory", "no /dev/shm on this system")
    free = shutil.disk_usage(shm).free
    remedy = "" if free >= MIN_SHM else "enlarge /dev/shm; in Docker: --shm-size=1g"
    return Check("shared memory", f"{_gib(free)} free in /dev/shm", remedy)


CHECKS: tuple[Callable[[], Check], ...] = (
    check_trio,
    check_operators,
    check_devices,
    check_name,
    check_exchange,
    check_disk,
    check_shm,
)


def report(checks: list[Check], console: Console) -> None:
    """Print versions and checks as tables, and a way out for each failure."""
    installed = {**versions(), "commit": git_commit() or "not a checkout"}
    say(console, table([{"package": name, "version": of} for name, of in installed.items()], "Versions", left=_TEXTS))
    found = [{"check": it.name, "result": "ok" if it.ok else "failed", "found": it.detail} for it in checks]
    say(console, table(found, "Checks", left=_TEXTS, styles={"ok": "green", "failed": "red"}))
    for check in checks:
        if not check.ok:
            # Printed plainly: a command must not be broken over lines.
            console.print(Text.assemble((f"{check.name}: ", "bold red"), check.remedy), soft_wrap=True)


def main() -> None:
    """Read the arguments, run all checks and report; the exit code is 1 if any failed."""
    parser = ArgumentParser(prog="python -m recsys.doctor", description="Check this machine and its packages.")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    as_json = parser.parse_args().json
    run_entry(lambda: _examine(as_json=as_json), checks_versions=False)


def _examine(*, as_json: bool) -> int:
    console = Console()
    with Console(stderr=True).status("checking: this takes some seconds"):
        checks = [check() for check in CHECKS]
    ok = all(check.ok for check in checks)
    if as_json:
        found = {
            "ok": ok,
            "versions": versions(),
            "commit": git_commit(),
            "checks": [{**asdict(check), "ok": check.ok} for check in checks],
        }
        print(json.dumps(found, indent=2))
    else:
        report(checks, console)
    return 0 if ok else 1


def _brief(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__


def _flavour() -> str:
    return "cuda" if nvidia_driver() else "cpu"


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB"


if __name__ == "__main__":
    main()
