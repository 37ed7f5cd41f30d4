"""What a run would be: `python -m recsys.plan [--config PATH] [--nnodes N] [--nproc N] [path.to.key=value ...]`.

Prints where each table would be and what an example costs. It starts no process, reads no data and allocates no table,
so that a run on GPUs can be planned where there are none.
"""

import argparse
import json
import math

from recsys.cli import ArgumentParser, run_entry
from recsys.config import Config, load_config
from recsys.terminal import console, say, table


def main() -> None:
    """Read the arguments and print the plan."""
    parser = ArgumentParser(
        prog="recsys.plan", description="Where a config's tables would be, and what an example costs."
    )
    parser.add_argument("--nnodes", type=_count, default=1, help="machines (default: %(default)s)")
    parser.add_argument("--nproc", type=_count, default=1, help="processes on each machine (default: %(default)s)")
    parser.add_argument(
        "--ids",
        type=_feature_and_mean,
        action="append",
        default=[],
        metavar="FEATURE=MEAN",
        help="ids of a feature in the mean example, where that is not 1; may be repeated",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_config_arguments()
    arguments = parser.parse_args()

    def body() -> None:
        config = load_config(arguments.config, arguments.overrides)
        _print_plan(config, arguments.nnodes, arguments.nproc, dict(arguments.ids), as_json=arguments.json)

    run_entry(body)


def _print_plan(config: Config, nnodes: int, nproc: int, ids: dict[str, float], *, as_json: bool) -> None:
    import torch

    from recsys.model.cost import cost_report
    from recsys.model.ranker import build_ranker
    from recsys.runtime import Ranks, device_type
    from recsys.sharding.plan import PLAN_TEXTS, plan_rows
    from recsys.sharding.shard import plan_tables
    from recsys.training.dense_optimizer import check_dense_optimizer

    report = cost_report(config, ids)
    first = Ranks(0, nnodes * nproc, 0, nproc, torch.device(device_type(config.device, nproc)))
    ranker = build_ranker(config, seed=0)
    check_dense_optimizer(ranker.dense_arch, config.optimizers.dense)
    _, plan = plan_tables(ranker, config, first)
    rows = plan_rows(plan, config.tables)
    if as_json:
        run = {"name": config.name, "world_size": first.world_size, "device": first.device.type}
        print(json.dumps({**run, "plan": rows, "cost": report.as_dict()}, indent=2))
        return
    terminal = console()
    say(terminal, table(rows, "Embedding plan", left=PLAN_TEXTS))
    say(terminal, table(report.rows(), report.title()))
    for assumption in report.assumptions():
        say(terminal, f"- {assumption}")


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
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form feature=mean")
    return feature, number


if __name__ == "__main__":
    main()
