"""How good FuxiCTR's models are on a config's rows and features, beside ours.

    python -m benchmarks.fuxictr --checkout DIR --python PATH --config FILE

The rows are exported once, ids, lists and numbers as our tables see them, in the form that FuxiCTR trains from without
preprocessing. Each run is a process of FuxiCTR's own environment (driver.py); its scores are measured here, by the code
that measures ours. A run that is complete under the same settings, rows and FuxiCTR is not run again.
docs/benchmarks.md says how to set it up.
"""

import argparse
import json
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks.fuxictr.checkout import check_checkout
from benchmarks.fuxictr.export import export_rows
from benchmarks.fuxictr.models import MODELS, assignment, points, settings_of
from benchmarks.fuxictr.runs import MEASURED_ALIKE, Bench
from benchmarks.report import RESULTS, Line, environment, number, show, shown_path, write
from recsys.cli import run_entry
from recsys.config import Config, ConfigError, load_config
from recsys.errors import UserError
from recsys.prepare.synthetic import write_embedded
from recsys.runtime import process_group

_SUMMARY_FIGURES = ("test AUC", "test log loss", "best valid AUC")
_TRIAL_FIGURES = ("best valid AUC", "test AUC", "epochs")
_WHERE = '--checkout "$HILOREC_FUXICTR" --python "$HILOREC_FUXICTR_PYTHON"'


def main() -> None:
    """Train and measure what the command line asks for."""
    arguments = parse(sys.argv[1:])
    run_entry(lambda: benchmark(arguments))


def parse(command_line: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="benchmarks.fuxictr", description="Train FuxiCTR's models once per seed.")
    parser.add_argument("--checkout", type=Path, required=True, help="clone of https://github.com/reczoo/FuxiCTR")
    parser.add_argument("--python", type=Path, required=True, help="interpreter of the environment made for it")
    parser.add_argument("--config", required=True, help="YAML file whose rows and features are used")
    parser.add_argument("--models", nargs="+", choices=tuple(MODELS), default=list(MODELS), help="default: all")
    parser.add_argument("--seeds", nargs="+", type=int, default=[17, 18, 19], help="default: 17 18 19")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="[MODEL.]KEY=JSON", help="settings of all models or of one"
    )
    parser.add_argument(
        "--search",
        nargs="+",
        default=[],
        metavar="KEY=JSON,JSON",
        help="values to try in all combinations on the first seed; the highest valid AUC chooses for all seeds",
    )
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default: 1)")
    parser.add_argument("--note", help="what a reader of the figures must know, such as what else the machine did")
    parser.add_argument("--runs", type=Path, default=Path("outputs/fuxictr"), help="where the runs go")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where the results go (benchmarks/results)")
    parser.add_argument("overrides", nargs="*", metavar="path.to.key=value", help="settings that replace the config's")
    arguments = parser.parse_args(command_line)
    if arguments.jobs < 1:
        parser.error("--jobs must be at least 1")
    return arguments


def benchmark(arguments: argparse.Namespace) -> None:
    """Search on the first seed, train every seed with what was best, and report.

    Raises:
        UserError: a setting, the checkout or its environment is not fit, or a run failed; what ended well is reported.
    """
    config = load_config(arguments.config, arguments.overrides)
    settings = {model: settings_of(model, arguments.set) for model in arguments.models}
    grid = points(arguments.search)
    embedding_dim = _embedding_dim(config)
    check_checkout(arguments.checkout)
    with process_group("cpu"):
        write_embedded(config)
        rows = export_rows(config, arguments.runs / config.name)
        bench = Bench(arguments.python, arguments.checkout.resolve(), rows, embedding_dim, arguments.jobs)
        models: dict[str, dict[str, Any]] = {}
        failed: list[str] = []
        for model in arguments.models:
            trials = bench.train(model, [settings[model] | point for point in grid], arguments.seeds[:1])
            if None in trials:
                failed.append(model)
                continue
            figures = [trial for trial in trials if trial is not None]
            best = max(range(len(grid)), key=lambda index: figures[index]["best valid AUC"])
            chosen = settings[model] | grid[best]
            runs = dict(zip(arguments.seeds, bench.train(model, [chosen], arguments.seeds), strict=True))
            if None in runs.values():
                failed.append(model)
            models[model] = {
                "name": f"FuxiCTR {model}",
                "settings": chosen,
                "trials": list(zip(grid, figures, strict=True)),
                "runs": {seed: run for seed, run in runs.items() if run is not None},
            }
        if models:
            _report(arguments, config, bench, models, failed)
    if failed:
        raise UserError(f"failed: {', '.join(failed)}; their logs are in the folders named above")


def _embedding_dim(config: Config) -> int:
    widths = {table.embedding_dim for table in config.tables.values()}
    if len(widths) > 1:
        raise ConfigError(
            f"tables have embedding_dim {', '.join(map(str, sorted(widths)))}, and FuxiCTR's models take one for all: "
            "give overrides such as tables.<name>.embedding_dim=16"
        )
    return widths.pop()


def _report(
    arguments: argparse.Namespace,
    config: Config,
    bench: Bench,
    models: Mapping[str, Mapping[str, Any]],
    failed: Sequence[str],
) -> None:
    command = ["--config", shown_path(arguments.config)]
    command += ["--models", *arguments.models, "--seeds", *map(str, arguments.seeds)]
    for option in ("set", "search"):
        given = getattr(arguments, option)
        command += [f"--{option}", *given] if given else []
    command += ["--", *arguments.overrides] if arguments.overrides else []
    about = {
        "name": config.name,
        "command": f"python -m benchmarks.fuxictr {_WHERE} {shlex.join(command)}",
        "note": arguments.note,
        "threads": int(os.environ.get("OMP_NUM_THREADS", "1")),
        "jobs": arguments.jobs,
        "failed": list(failed),
        "fuxictr": {"commit": bench.commit, "versions": bench.versions},
        **environment(),
    }
    lines: list[Line] = []
    summary, runs, trials = [], [], []
    searched = [assignment(search, "--search")[0] for search in arguments.search]
    for key, model in models.items():
        name = model["name"]
        lines.append({"kind": "model", "model": key, "name": name, "settings": model["settings"]})
        lines += [
            {"kind": "trial", "model": key, "settings": point, "figures": trial} for point, trial in model["trials"]
        ]
        lines += [{"kind": "run", "model": key, "seed": seed, "figures": run} for seed, run in model["runs"].items()]
        runs += [{"model": name, "seed": str(seed), **_shown(run)} for seed, run in model["runs"].items()]
        trials += [
            {
                "model": name,
                **{setting: json.dumps(value) for setting, value in point.items()},
                **_shown({figure: trial[figure] for figure in _TRIAL_FIGURES}),
            }
            for point, trial in model["trials"]
        ]
        row = {"model": name, "seeds": str(len(model["runs"]))}
        values = {figure: [run[figure] for run in model["runs"].values()] for figure in _SUMMARY_FIGURES}
        for figure, measured in values.items() if model["runs"] else ():
            spread = f" ± {number(stdev(measured))}" if len(measured) > 1 else ""
            row[figure] = f"{number(mean(measured))}{spread}"
        summary.append(row | {setting: json.dumps(model["settings"][setting]) for setting in searched})
    title = f"FuxiCTR on {config.name}"
    show(title, summary)
    versions = ", ".join(f"{name} {version}" for name, version in bench.versions.items())
    parts: list[str | list[dict[str, str]]] = [
        f"The rows, splits and features of {config.name}, embedding dimension {bench.embedding_dim}, on the CPU, "
        f"OMP_NUM_THREADS={about['threads']}. Mean ± standard deviation over the seeds. Early stopping is FuxiCTR's, "
        f"on the valid split. AUC and log loss are exact; FuxiCTR's own differ by less than {MEASURED_ALIKE:g}. "
        "Training seconds are without evaluation.",
        *([f"FAILED, with figures missing: {', '.join(failed)}."] if failed else []),
        summary,
        runs,
    ]
    if arguments.search:
        parts += [f"What was tried on seed {arguments.seeds[0]}; the highest valid AUC chose.", trials]
    parts += [arguments.note] if arguments.note else []
    parts.append(f"FuxiCTR's checkout was at {bench.commit}, its environment had {versions}.")
    write(arguments.output / f"fuxictr_{config.name}", title, parts, about, lines)


def _shown(values: Mapping[str, Any]) -> dict[str, str]:
    return {key: number(value) if isinstance(value, float) else str(value) for key, value in values.items()}


if __name__ == "__main__":
    main()
