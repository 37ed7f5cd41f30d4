"""How good a config's model is: `benchmarks/quality.py --config PATH [--seeds N] [path.to.key=value ...]`.

Trains the config once a seed, each run a `torchrun -m recsys.train` of its own, and reports mean and spread. A seed
whose run is complete under the same settings is not run again, so an interrupted benchmark goes on where it was.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from report import RESULTS, environment, number, show, shown_path, write

from recsys.cli import run_entry
from recsys.config import DEFAULT_CONFIG, Config, ConfigError, load_config


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks/quality.py", description="Train a config once a seed.")
    parser.add_argument("--config", default=DEFAULT_CONFIG, help="YAML file (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="runs; their seeds follow the config's (default: 3)")
    parser.add_argument("--nproc", type=int, default=2, help="ranks of each run (default: 2)")
    parser.add_argument("--name", help="of this variant of the config, which the overrides make")
    parser.add_argument("--note", help="what a reader of the figures must know, such as what else the machine did")
    parser.add_argument("--runs", default="outputs/quality", help="where the runs go (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where the results go (default: beside this file)")
    parser.add_argument("overrides", nargs="*", metavar="path.to.key=value", help="settings that replace the file's")
    arguments = parser.parse_args()
    if arguments.seeds < 1 or arguments.nproc < 1:
        parser.error("--seeds and --nproc must be at least 1")
    run_entry(lambda: _benchmark(arguments))


def _benchmark(arguments: argparse.Namespace) -> None:
    config = load_config(arguments.config, arguments.overrides)
    if config.data.test is None:
        raise ConfigError("data.test is not set; quality is what a model shows on held-out data")
    label = "_".join(filter(None, (config.name, arguments.name)))
    summaries: dict[int, dict[str, Any]] = {}
    failed: dict[int, int] = {}
    for seed in range(config.seed, config.seed + arguments.seeds):
        directory = Path(arguments.runs) / label / f"seed-{seed}"
        overrides = [*arguments.overrides, f"seed={seed}", f"output_dir={directory}"]
        run = load_config(arguments.config, overrides)
        summary = _summary(directory, run, arguments.nproc)
        if summary is not None:
            print(f"{label}: seed {seed} is already there", flush=True)
        else:
            print(f"{label}: seed {seed} runs", flush=True)
            code = _train(arguments.config, overrides, arguments.nproc, seed)
            summary = _summary(directory, run, arguments.nproc)
            if code or summary is None:
                failed[seed] = code
                print(f"{label}: seed {seed} FAILED with exit code {code}", flush=True)
                continue
        summaries[seed] = summary
        print(f"{label}: seed {seed} test AUC {number(summary['test']['auc'])}", flush=True)
    if summaries:
        _report(arguments, config, label, summaries, failed)
    if failed:
        print(f"{label}: failed: {', '.join(f'seed {seed}' for seed in failed)}", file=sys.stderr)
        sys.exit(1)


def _summary(directory: Path, config: Config, nproc: int) -> dict[str, Any] | None:
    """What a complete run of these settings told, if there is one."""
    path = directory / "summary.json"
    if not path.exists() or (directory / "config.yaml").read_text(encoding="utf-8") != config.to_yaml():
        return None
    summary: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return summary if summary["world_size"] == nproc else None


def _train(config: str, overrides: Sequence[str], nproc: int, seed: int) -> int:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(nproc)]
    command = [*launch, "-m", "recsys.train", "--config", config, *overrides]
    threads = max(1, len(os.sched_getaffinity(0)) // nproc)
    environment = {"OMP_NUM_THREADS": str(threads), **os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as run:
        assert run.stdout is not None
        for line in run.stdout:
            print(f"seed {seed} | {line}", end="", flush=True)
    return run.returncode


def _figures(summary: Mapping[str, Any]) -> dict[str, float | None]:
    """What is reported of a run; None where it is undefined, as an AUC of one class."""
    test, reference, stages = summary["test"], summary["reference"], summary["stages"].values()
    valid = {name: stage["valid"]["auc"] for name, stage in summary["stages"].items() if stage["valid"]}
    figures: dict[str, float | None] = {
        "test AUC": test["auc"],
        "test log loss": test["log_loss"],
        "test NE": test["ne"],
        "test calibration": test["calibration"],
        "best valid AUC": max((auc for auc in valid.values() if auc is not None), default=None),
        **{f"valid AUC after {name}": auc for name, auc in valid.items()},
    }
    if reference is not None:
        known = test["auc"] is not None
        figures[f"test AUC of {reference['column']}"] = reference["auc"]
        figures["gap to it"] = reference["auc"] - test["auc"] if known else None
    figures["examples/s"] = summary["examples_per_second"]
    figures["training seconds"] = sum(stage["seconds"] for stage in stages)
    return figures


def _statistics(values: Sequence[float | None]) -> dict[str, float | None]:
    known = [value for value in values if value is not None]
    if len(known) < len(values):  # a mean over some of the runs would pass for one over all
        return dict.fromkeys(("mean", "standard deviation", "min", "max"))
    deviation = stdev(known) if len(known) > 1 else None
    return {"mean": mean(known), "standard deviation": deviation, "min": min(known), "max": max(known)}


def _report(
    arguments: argparse.Namespace,
    config: Config,
    label: str,
    summaries: Mapping[int, Mapping[str, Any]],
    failed: Mapping[int, int],
) -> None:
    runs = {seed: _figures(summary) for seed, summary in summaries.items()}
    statistics = {name: _statistics([run[name] for run in runs.values()]) for name in next(iter(runs.values()))}
    first = next(iter(summaries.values()))
    command = ["python", "benchmarks/quality.py", "--config", shown_path(arguments.config)]
    command += ["--seeds", str(arguments.seeds), "--nproc", str(arguments.nproc)]
    command += ["--name", arguments.name] if arguments.name else []
    # The runs tell which code trained them: with some of them kept from before it need not be today's.
    commits = ", ".join(sorted({str(summary["commit"]) for summary in summaries.values()}))
    result = {
        "name": label,
        "command": shlex.join([*command, *arguments.overrides]),
        "note": arguments.note,
        "ranks": arguments.nproc,
        "device": first["device"],
        "statistics": statistics,
        "runs": {str(seed): run for seed, run in runs.items()},
        "failed": {str(seed): code for seed, code in failed.items()},
        **environment(),
        "commit": commits,
    }
    rows = [
        {"figure": name, **{key: number(value) for key, value in values.items()}} for name, values in statistics.items()
    ]
    show(f"{label}, {len(runs)} seeds", rows)
    parts: list[str | list[dict[str, str]]] = [
        f"{len(runs)} seeds, {arguments.nproc} ranks each on {first['device']}. Best valid AUC is the highest after "
        "any stage; a stage that found nothing better than what it began with leaves that. Training seconds are the "
        "stages', without evaluation.",
        *(f"FAILED: seed {seed}, exit code {code}; its figures are missing below." for seed, code in failed.items()),
        rows,
        [{"seed": str(seed), **{name: number(value) for name, value in run.items()}} for seed, run in runs.items()],
        *([arguments.note] if arguments.note else []),
    ]
    write(arguments.output / f"quality_{label}", f"Quality: {label}", parts, result)


if __name__ == "__main__":
    main()
