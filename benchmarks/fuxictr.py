"""How good FuxiCTR's models are on a config's rows and features: `benchmarks/fuxictr.py --checkout DIR --python PATH`.

The rows are exported once, ids, lists and numbers as our tables see them, in the form that FuxiCTR trains from without
preprocessing. Each run is a process of FuxiCTR's own environment (fuxictr_driver.py); its scores are measured here, by
the code that measures ours. A run that is complete under the same settings, rows and FuxiCTR is not run again.
docs/benchmarks.md says how to set it up.
"""

import argparse
import hashlib
import itertools
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from report import RESULTS, environment, number, show, shown_path, write

from recsys.cli import run_entry
from recsys.config import Config, ConfigError, load_config
from recsys.data.order import RowSlice
from recsys.data.rows import Rows, SparseLayout
from recsys.data.splits import open_splits
from recsys.errors import UserError
from recsys.runtime import Ranks, process_group
from recsys.training.metrics import BinaryMetrics

Settings = dict[str, Any]
Figures = dict[str, float]
Ids = NDArray[np.int64]

SPLITS = ("train", "valid", "test")
DATA_SET = "rows"
LABEL = ".label"
"""No feature can have this name."""

MEASURED_ALIKE = 1e-5
"""How near FuxiCTR's own test figures must be to ours; both are exact, from the same float32 probabilities."""

EPS = float(np.finfo(np.float64).eps)
SUMMARY_FIGURES = ("test AUC", "test log loss", "best valid AUC")
TRIAL_FIGURES = ("best valid AUC", "test AUC", "epochs")
WHERE = '--checkout "$HILOREC_FUXICTR" --python "$HILOREC_FUXICTR_PYTHON"'
DRIVER = Path(__file__).with_name("fuxictr_driver.py").resolve()

ALL_MODELS: Settings = {
    "batch_size": 4096,
    "learning_rate": 1e-3,
    "embedding_regularizer": 0,
    "net_regularizer": 0,
    "net_dropout": 0,
    "epochs": 100,
    "early_stop_patience": 2,
    "reduce_lr_on_plateau": True,
    "monitor": "AUC",
}
MODELS: dict[str, Settings] = {
    "DNN": {"hidden_units": [400, 400, 400], "hidden_activations": "ReLU", "batch_norm": False},
    "DCNv2": {
        "model_structure": "parallel",
        "num_cross_layers": 3,
        "parallel_dnn_hidden_units": [400, 400, 400],
        "stacked_dnn_hidden_units": [],
        "dnn_activations": "ReLU",
        "use_low_rank_mixture": False,
        "low_rank": 32,
        "num_experts": 4,
        "batch_norm": False,
    },
    "FinalMLP": {
        "mlp1_hidden_units": [400, 400, 400],
        "mlp1_hidden_activations": "ReLU",
        "mlp1_batch_norm": False,
        "mlp2_hidden_units": [400],
        "mlp2_hidden_activations": "ReLU",
        "mlp2_batch_norm": False,
        "use_fs": True,
        "fs_hidden_units": [400],
        "fs1_context": [],
        "fs2_context": [],
        "num_heads": 2,
    },
    "MaskNet": {
        "model_type": "SerialMaskNet",
        "dnn_hidden_units": [400, 400, 400],
        "dnn_hidden_activations": "ReLU",
        "parallel_num_blocks": 1,
        "parallel_block_dim": 64,
        "reduction_ratio": 1,
        "emb_layernorm": True,
        "net_layernorm": True,
    },
}
"""Every setting of each model: FuxiCTR ignores those it does not know, so others are refused here."""

FIXED: Settings = {
    "task": "binary_classification",
    "loss": "binary_crossentropy",
    "optimizer": "adam",
    "metrics": ["AUC", "logloss"],
    "monitor_mode": "max",
    "save_best_only": True,
    "eval_steps": None,  # once an epoch
    "data_format": "parquet",
    "shuffle": True,
    "streaming": False,
    "num_workers": 0,
    "gpu": -1,
    "verbose": 0,
}


def main() -> None:
    arguments = parse(sys.argv[1:])
    run_entry(lambda: benchmark(arguments))


def parse(command_line: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks/fuxictr.py", description="Train FuxiCTR's models once a seed.")
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
    parser.add_argument("--output", type=Path, default=RESULTS, help="where the results go (default: beside this file)")
    parser.add_argument("overrides", nargs="*", metavar="path.to.key=value", help="settings that replace the config's")
    arguments = parser.parse_args(command_line)
    if arguments.jobs < 1:
        parser.error("--jobs must be at least 1")
    return arguments


def benchmark(arguments: argparse.Namespace) -> None:
    config = load_config(arguments.config, arguments.overrides)
    settings = {model: _settings(model, arguments.set) for model in arguments.models}
    grid = _grid(arguments.search)
    embedding_dim = _embedding_dim(config)
    for checkout_file in (arguments.checkout / "fuxictr" / "version.py", arguments.checkout / "model_zoo"):
        if not checkout_file.exists():
            raise UserError(f"--checkout: no {checkout_file}; give a clone of FuxiCTR, which has the model zoo")
    with process_group("cpu") as ranks:
        rows = export_rows(config, ranks, arguments.runs / config.name)
        bench = _Bench(arguments.python, arguments.checkout.resolve(), rows, embedding_dim, arguments.jobs)
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
                "model": f"FuxiCTR {model}",
                "settings": chosen,
                "trials": [{"settings": point, **figures[index]} for index, point in enumerate(grid)],
                "runs": {str(seed): run for seed, run in runs.items() if run is not None},
            }
        if models:
            _report(arguments, config, bench, models, failed)
    if failed:
        raise UserError(f"failed: {', '.join(failed)}; their logs are in the folders named above")


def _settings(model: str, assignments: Sequence[str]) -> Settings:
    """A model's settings: the defaults, then what was given for all models and for it, in the order given."""
    settings = ALL_MODELS | MODELS[model]
    for assignment in assignments:
        key, value = _assignment(assignment, "--set")
        scope, _, name = key.rpartition(".")
        if scope not in ("", *MODELS):
            raise UserError(f"--set {assignment}: no model {scope!r}; there are {', '.join(MODELS)}")
        if scope in ("", model):
            if name not in settings:
                raise UserError(f"--set {assignment}: {model} has no setting {name!r}; it has {', '.join(settings)}")
            settings[name] = _json(value, f"--set {assignment}")
    return settings


def _grid(searches: Sequence[str]) -> list[Settings]:
    """All combinations of the values to try; one empty combination if there are none."""
    axes: dict[str, list[Any]] = {}
    for search in searches:
        key, values = _assignment(search, "--search")
        if key not in ALL_MODELS:
            raise UserError(f"--search {search}: only what all models have is searched: {', '.join(ALL_MODELS)}")
        axes[key] = _json(f"[{values}]", f"--search {search}")
    return [dict(zip(axes, point, strict=True)) for point in itertools.product(*axes.values())]


def _assignment(text: str, option: str) -> tuple[str, str]:
    key, separator, value = text.partition("=")
    if not (separator and key and value):
        raise UserError(f"{option} {text}: not of the form key=value")
    return key, value


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f'{where}: {error}; values are JSON, so that a text stands in "quotes"') from None


def _embedding_dim(config: Config) -> int:
    widths = {table.embedding_dim for table in config.tables.values()}
    if len(widths) > 1:
        raise ConfigError(
            f"tables have embedding_dim {', '.join(map(str, sorted(widths)))}, and FuxiCTR's models take one for all: "
            "give overrides such as tables.<name>.embedding_dim=16"
        )
    return widths.pop()


def export_rows(config: Config, ranks: Ranks, directory: Path) -> Path:
    """Write a config's rows as FuxiCTR trains from them; returns the folder, named by what it holds.

    `<split>.parquet` holds a column a feature and the label, `feature_map.json` the features. Ids are those of our
    tables plus 1, because FuxiCTR pads with 0: an empty bag is 0, as it pools to zeros with us. Features with more than
    one id somewhere are lists padded to the longest, pooled as their table's `pooling` says; features that share a
    table share FuxiCTR's.

    Raises:
        ConfigError: a split is missing.
        DataError: as `ParquetShards`.
    """
    rows: dict[str, list[Rows]] = {}
    ids: dict[str, dict[str, Ids]] = {}
    for split, shards in open_splits(config, SPLITS).items():
        rows[split] = [shards.read(RowSlice(group, 0, count)) for group, count in enumerate(shards.row_counts)]
        ids[split] = _ids(rows[split], shards.layout)

    features: dict[str, dict[str, Any]] = {}
    columns: dict[str, dict[str, NDArray[Any]]] = {split: {} for split in SPLITS}
    for index, name in enumerate(config.features.dense):
        features[name] = {"source": "", "type": "numeric"}
        for split in SPLITS:
            columns[split][name] = np.concatenate([part.dense[index] for part in rows[split]])
    owners: dict[str, str] = {}
    for name, feature in config.features.sparse.items():
        table = config.tables[feature.table]
        longest = max(ids[split][name].shape[1] for split in SPLITS)
        for split in SPLITS:
            found = ids[split][name]
            padded = np.pad(found, ((0, 0), (0, longest - found.shape[1])))
            columns[split][name] = padded if longest > 1 else padded[:, 0]
        features[name] = {
            "source": "",
            "type": "sequence" if longest > 1 else "categorical",
            "padding_idx": 0,
            "vocab_size": table.num_embeddings + 1,
        }
        if longest > 1:
            pooling = "MaskedAveragePooling" if table.pooling == "mean" else "MaskedSumPooling"
            features[name] |= {"max_len": longest, "feature_encoder": f"layers.{pooling}()"}
        if feature.table in owners:
            features[name]["share_embedding"] = owners[feature.table]
        owners.setdefault(feature.table, name)
    for split in SPLITS:
        columns[split][LABEL] = np.concatenate([part.labels for part in rows[split]]).astype(np.int64)
    feature_map = {
        "dataset_id": DATA_SET,
        "num_fields": len(features),
        "total_features": sum(config.tables[table].num_embeddings + 1 for table in owners) + len(config.features.dense),
        "input_length": sum(feature.get("max_len", 1) for feature in features.values()),
        "labels": [LABEL],
        "features": [{name: feature} for name, feature in features.items()],
    }
    return _write_rows(columns, feature_map, directory)


def _ids(rows: Sequence[Rows], layout: SparseLayout) -> dict[str, Ids]:
    """Ids of each feature plus 1, shape (rows, length of the longest list), 0 where a row has no more."""
    found: dict[str, Ids] = {}
    for index, name in enumerate(layout.single):
        found[name] = np.concatenate([part.single[index].astype(np.int64) + 1 for part in rows])[:, None]
    for index, name in enumerate(key for key in layout.keys if key in layout.lists):
        lists = [part.lists[index] for part in rows]
        lengths = np.concatenate([jagged.lengths() for jagged in lists])
        found[name] = np.zeros((len(lengths), max(1, int(lengths.max()))), np.int64)
        found[name][np.arange(found[name].shape[1]) < lengths[:, None]] = np.concatenate([j.values for j in lists]) + 1
    return found


def _write_rows(
    columns: Mapping[str, Mapping[str, NDArray[Any]]], feature_map: Mapping[str, Any], directory: Path
) -> Path:
    digest = hashlib.sha256(json.dumps(feature_map).encode())
    for split in SPLITS:
        for values in columns[split].values():
            digest.update(np.ascontiguousarray(values).data)
    target = directory / f"rows-{digest.hexdigest()[:12]}"
    if target.exists():
        return target
    part = target.with_name(f"{target.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    for split in SPLITS:
        table = pa.table({name: _arrow(values) for name, values in columns[split].items()})
        pq.write_table(table, part / f"{split}.parquet")
    (part / "feature_map.json").write_text(json.dumps(feature_map, indent=2) + "\n", encoding="utf-8")
    return part.rename(target)


def _arrow(values: NDArray[Any]) -> pa.Array:
    flat = pa.array(np.ascontiguousarray(values).reshape(-1))
    return flat if values.ndim == 1 else pa.FixedSizeListArray.from_arrays(flat, values.shape[1])


@dataclass(frozen=True)
class _Bench:
    """Runs of FuxiCTR on one export: where they run, where they are kept and what was measured of them."""

    python: Path
    checkout: Path
    rows: Path
    embedding_dim: int
    jobs: int

    @property
    def _driver(self) -> list[str | Path]:
        # Isolated and without bytecode: nothing of ours is imported there, nothing is written into the checkout.
        return [self.python, "-I", "-B", DRIVER, self.checkout]

    @cached_property
    def versions(self) -> dict[str, str]:
        """Of FuxiCTR and of the packages in its environment.

        Raises:
            UserError: the interpreter does not start, or lacks one of them.
        """
        try:
            found = subprocess.run(self._driver, capture_output=True, text=True)
        except OSError as error:
            raise UserError(f"--python: {self.python} does not start: {error.strerror}") from None
        if found.returncode:
            cause = found.stderr.strip().rpartition("\n")[2]
            raise UserError(f"--python: {self.python} lacks what FuxiCTR needs ({cause}); see docs/benchmarks.md")
        versions: dict[str, str] = json.loads(found.stdout)
        return versions

    @cached_property
    def commit(self) -> str | None:
        """The checkout's, None outside git. Taken without git's optional locks, which would write there."""
        describe = ["describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
        git = ["git", "--no-optional-locks", "-C", str(self.checkout), *describe]
        found = subprocess.run(git, capture_output=True, text=True)
        return found.stdout.strip() if found.returncode == 0 else None

    def train(self, model: str, points: Sequence[Settings], seeds: Sequence[int]) -> list[Figures | None]:
        """Figures of every seed at every point, points first; None for what failed."""
        runs = [self._prepare(model, settings, seed) for settings in points for seed in seeds]
        with ThreadPoolExecutor(self.jobs) as pool:
            complete = list(pool.map(self._run, runs))
        return [self._figures(run) if done else None for run, done in zip(runs, complete, strict=True)]

    def _prepare(self, model: str, settings: Settings, seed: int) -> Path:
        """The folder of a run, named by all that the run depends on."""
        params = FIXED | settings | {"model": model, "model_id": model, "seed": seed}
        params |= {"dataset_id": DATA_SET, "embedding_dim": self.embedding_dim}
        for key in ("embedding_regularizer", "net_regularizer"):
            params[key] = float(params[key]) if params[key] else None  # FuxiCTR ignores one that is an int
        if model == "FinalMLP":
            params |= {"mlp1_dropout": params["net_dropout"], "mlp2_dropout": params["net_dropout"]}
        identity = json.dumps([params, self.rows.name, self.commit, self.versions], sort_keys=True)
        run = self.rows.parent / model / f"{hashlib.sha256(identity.encode()).hexdigest()[:12]}-seed-{seed}"
        run.mkdir(parents=True, exist_ok=True)
        (run / "params.json").write_text(json.dumps(params, indent=2) + "\n", encoding="utf-8")
        return run

    def _run(self, run: Path) -> bool:
        """Train, unless that is done; whether it is then."""
        if (run / "result.json").exists():
            print(f"{run}: is already there", flush=True)
            return True
        print(f"{run}: runs", flush=True)
        command = [*self._driver, self.rows.resolve(), run.resolve()]
        threads = {"OMP_NUM_THREADS": "1", **os.environ}
        with (run / "log.txt").open("wb") as log:
            code = subprocess.run(command, cwd=run, env=threads, stdout=log, stderr=subprocess.STDOUT).returncode
        if code:
            print(f"{run}: FAILED with exit code {code}; see log.txt there", flush=True)
        return code == 0

    def _figures(self, run: Path) -> Figures:
        told = json.loads((run / "result.json").read_text(encoding="utf-8"))
        valid, test = (_measure(run / f"{split}.npy", self.rows / f"{split}.parquet") for split in ("valid", "test"))
        own = told["own test figures"]
        difference = max(abs(own["AUC"] - test["AUC"]), abs(own["logloss"] - test["log loss"]))
        if not difference < MEASURED_ALIKE:
            raise RuntimeError(f"{run}: FuxiCTR measured {own}, we {test}: the scores are not those of these rows")
        figures = {
            **{f"test {name}": value for name, value in test.items()},
            "best valid AUC": valid["AUC"],
            **{name: told[name] for name in ("epochs", "training seconds", "parameters")},
        }
        print(f"{run}: valid AUC {number(valid['AUC'])}, test AUC {number(test['AUC'])}", flush=True)
        return figures


def _measure(scores: Path, rows: Path) -> Figures:
    """What FuxiCTR's probabilities are worth, under the names of our own results; a collective call."""
    # Float32 sigmoids reach 0 and 1, whose logits are infinite; FuxiCTR's log loss clips them alike.
    probabilities = torch.from_numpy(np.load(scores)).clamp(EPS, 1 - EPS)
    labels = torch.tensor(pq.read_table(rows, columns=[LABEL]).column(LABEL).to_numpy())
    metrics = BinaryMetrics(exact_examples=len(labels))
    metrics.update(probabilities.logit(), labels)
    measured = metrics.compute()
    named = {"AUC": measured.auc, "log loss": measured.log_loss, "NE": measured.ne, "calibration": measured.calibration}
    return {name: value for name, value in named.items() if value is not None}


def _report(
    arguments: argparse.Namespace,
    config: Config,
    bench: _Bench,
    models: Mapping[str, Mapping[str, Any]],
    failed: Sequence[str],
) -> None:
    command = ["--config", shown_path(arguments.config)]
    command += ["--models", *arguments.models, "--seeds", *map(str, arguments.seeds)]
    for option in ("set", "search"):
        given = getattr(arguments, option)
        command += [f"--{option}", *given] if given else []
    command += ["--", *arguments.overrides] if arguments.overrides else []
    result = {
        "name": config.name,
        "command": f"python benchmarks/fuxictr.py {WHERE} {shlex.join(command)}",
        "note": arguments.note,
        "threads": int(os.environ.get("OMP_NUM_THREADS", "1")),
        "jobs": arguments.jobs,
        "models": models,
        "failed": list(failed),
        "fuxictr": {"commit": bench.commit, "versions": bench.versions},
        **environment(),
    }
    summary, runs, trials = [], [], []
    searched = [_assignment(search, "--search")[0] for search in arguments.search]
    for model in models.values():
        name = model["model"]
        runs += [{"model": name, "seed": seed, **_shown(run)} for seed, run in model["runs"].items()]
        trials += [
            {
                "model": name,
                **{key: json.dumps(value) for key, value in trial["settings"].items()},
                **_shown({key: trial[key] for key in TRIAL_FIGURES}),
            }
            for trial in model["trials"]
        ]
        row = {"model": name, "seeds": str(len(model["runs"]))}
        values = {figure: [run[figure] for run in model["runs"].values()] for figure in SUMMARY_FIGURES}
        for figure, measured in values.items() if model["runs"] else ():
            spread = f" ± {number(stdev(measured))}" if len(measured) > 1 else ""
            row[figure] = f"{number(mean(measured))}{spread}"
        summary.append(row | {key: json.dumps(model["settings"][key]) for key in searched})
    title = f"FuxiCTR on {config.name}"
    show(title, summary)
    versions = ", ".join(f"{name} {version}" for name, version in bench.versions.items())
    parts: list[str | list[dict[str, str]]] = [
        f"The rows, splits and features of {config.name}, embedding dimension {bench.embedding_dim}, on the CPU, "
        f"OMP_NUM_THREADS={result['threads']}. Mean ± standard deviation over the seeds. Early stopping is FuxiCTR's, "
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
    write(arguments.output / f"fuxictr_{config.name}", title, parts, result)


def _shown(values: Mapping[str, Any]) -> dict[str, str]:
    return {key: number(value) if isinstance(value, float) else str(value) for key, value in values.items()}


if __name__ == "__main__":
    main()
