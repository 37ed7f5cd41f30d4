"""What a run would be: `python -m recsys.plan [--config PATH] [--nodes N] [--nproc N] [path.to.key=value ...]`.

Prints where each table would be, what memory that takes, and what an example costs. It starts no process, reads no data
and allocates no table, so that a run on machines that are elsewhere can be planned here.
"""

import argparse
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recsys.cli import ArgumentParser, run_entry
from recsys.config import Config, ConfigError, load_config
from recsys.errors import UserError
from recsys.files import read_json
from recsys.terminal import console, say, table

if TYPE_CHECKING:
    from recsys.runtime import Ranks
    from recsys.sharding.machine import Machine

_GPU_GIB = 80.0
_HOST_GIB_FOR_EACH_GPU = 128.0
_MOST_RANKS = 1 << 14
_MAX_PLAN_BYTES = 64 << 20


def main() -> None:
    """Read the arguments and print the plan."""
    parser = ArgumentParser(
        prog="recsys.plan", description="Where a config's tables would be, and what an example costs."
    )
    parser.add_argument("--nodes", "--nnodes", type=_count, default=1, help="machines (default: %(default)s)")
    processes = parser.add_mutually_exclusive_group()
    processes.add_argument("--nproc", type=_count, default=1, help="processes on each machine (default: %(default)s)")
    processes.add_argument(
        "--gpus-per-node", type=_count, metavar="N", help="as --nproc, each process with a GPU, here or elsewhere"
    )
    parser.add_argument("--hbm", type=_positive, metavar="GIB", help="memory of each GPU")
    parser.add_argument("--ddr", type=_positive, metavar="GIB", help="host memory of each machine")
    parser.add_argument("--intra-bw", type=_positive, metavar="GB/S", help="between two ranks of one machine")
    parser.add_argument("--inter-bw", type=_positive, metavar="GB/S", help="between two machines, for each rank")
    parser.add_argument(
        "--ids",
        type=_feature_and_mean,
        action="append",
        default=[],
        metavar="FEATURE=MEAN",
        help="ids of a feature in the mean example, where that is not 1; may be repeated",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--diff", type=Path, metavar="FILE", help="tell what moved since a plan that --json printed")
    parser.add_config_arguments()
    arguments = parser.parse_args()

    def body() -> None:
        config = load_config(arguments.config, arguments.overrides)
        before = _read_plan(arguments.diff) if arguments.diff else None
        _print_plan(config, arguments, before)

    run_entry(body)


def _print_plan(config: Config, arguments: argparse.Namespace, before: list[dict[str, str]] | None) -> None:
    from recsys.model.cost import cost_report
    from recsys.model.ranker import build_ranker
    from recsys.sharding.memory import memory_rows
    from recsys.sharding.plan import PLAN_TEXTS, plan_moves, plan_rows
    from recsys.sharding.shard import plan_tables
    from recsys.training.dense_optimizer import check_dense_optimizer

    ids = dict(arguments.ids)
    report = cost_report(config, ids)
    first = _ranks(config, arguments)
    machine, told = _machine(first, arguments)
    ranker = build_ranker(config, seed=0)
    check_dense_optimizer(ranker.dense_arch, config.optimizers.dense)
    _, plan = plan_tables(ranker, config, first, ids, machine)
    rows = plan_rows(plan, config.tables)
    moves = None if before is None else plan_moves(before, rows)
    if arguments.json:
        whole: dict[str, Any] = {"name": config.name, "world_size": first.world_size, "device": first.device.type}
        whole |= {"machine": asdict(machine), "plan": rows}
        whole |= {"memory": [{"hbm": one.hbm, "ddr": one.ddr} for one in plan.memory], "cost": report.as_dict()}
        print(json.dumps(whole if moves is None else {**whole, "moves": moves}, indent=2))
        return
    terminal = console()
    say(terminal, table(rows, "Embedding plan", left=PLAN_TEXTS))
    if moves:
        say(terminal, table(moves, f"Moved since {arguments.diff}", left=("table", "from", "to")))
    elif moves is not None:
        say(terminal, f"No table moved since {arguments.diff}")
    say(terminal, table(memory_rows(plan.memory, machine, first), "Memory of the tables by rank, estimated"))
    say(terminal, f"- {told}")
    say(terminal, table(report.rows(), report.title()))
    for assumption in report.assumptions():
        say(terminal, f"- {assumption}")


def _ranks(config: Config, arguments: argparse.Namespace) -> "Ranks":
    """The first of the ranks that are planned for."""
    import torch

    from recsys.runtime import Ranks, device_type

    device, processes = str(config.device), arguments.nproc
    if arguments.gpus_per_node:
        if device == "cpu":
            raise ConfigError("device: --gpus-per-node plans for GPUs, and device is cpu; set device=cuda")
        device, processes = "cuda", arguments.gpus_per_node
    if arguments.nodes * processes > _MOST_RANKS:
        raise UserError(f"{arguments.nodes * processes:,} ranks are more than the {_MOST_RANKS:,} that can be planned")
    device = device_type(device, processes)
    if arguments.hbm and device == "cpu":
        raise ConfigError("device: --hbm is the memory of GPUs, and the plan is for CPUs; say --gpus-per-node")
    return Ranks(0, arguments.nodes * processes, 0, processes, torch.device(device))


def _machine(ranks: "Ranks", arguments: argparse.Namespace) -> tuple["Machine", str]:
    """The machine to plan for, and in words what it has and how that is known."""
    import torch

    from recsys.sharding.machine import RESERVED, Machine, this_machine

    gpus = ranks.local_world_size if ranks.device.type == "cuda" else 0
    is_here = torch.cuda.device_count() >= gpus
    if is_here:
        here = this_machine(ranks)
    else:
        here = Machine(round(_GPU_GIB * 2**30), round(_HOST_GIB_FOR_EACH_GPU * 2**30) * gpus)
    bandwidths = (None if one is None else one * 1e9 for one in (arguments.intra_bw, arguments.inter_bw))
    hbm, ddr = (
        of if given is None else round(given * 2**30)
        for given, of in ((arguments.hbm, here.hbm), (arguments.ddr, here.ddr))
    )
    known = "as here" if is_here else "assumed"

    def of(size: int, given: float | None) -> str:
        return f"{size / 2**30:,.1f} GiB ({known if given is None else 'as told'})"

    told = f"each machine has {of(ddr, arguments.ddr)} of host memory for its {ranks.local_world_size} ranks"
    told += f", and GPUs of {of(hbm, arguments.hbm)}" if gpus else ""
    return Machine(hbm, ddr, *bandwidths), f"{told}; {RESERVED:.0%} of all memory is kept from tables"


def _read_plan(path: Path) -> list[dict[str, str]]:
    """The rows of a plan that `--json` printed."""
    found = read_json(path, _MAX_PLAN_BYTES)
    rows = found.get("plan") if isinstance(found, dict) else None
    keys = {"table", "sharding", "kernel", "ranks", "shards"}
    if not isinstance(rows, list) or not all(
        isinstance(row, dict) and keys <= row.keys() and all(isinstance(cell, str) for cell in row.values())
        for row in rows
    ):
        raise UserError(f"{path}: it is no plan; --diff takes what recsys.plan --json printed")
    return rows


def _positive(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 1e-6 <= number <= 1e9:  # beyond, what the planner makes of it is infinite or nothing
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1e-6 to 1e9")
    return number


def _count(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of at least 1")
    return int(text)


def _feature_and_mean(text: str) -> tuple[str, float]:
    feature, _, mean = text.partition("=")
    try:
        number = float(mean)
    except ValueError:
        number = math.nan
    if not 0 <= number <= 1e9:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form feature=mean")
    return feature, number


if __name__ == "__main__":
    main()
