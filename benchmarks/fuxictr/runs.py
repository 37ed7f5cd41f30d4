"""Runs of FuxiCTR, each a process of its own environment, whose scores are measured by the code that measures ours."""

import hashlib
import json
import os
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch

from benchmarks.fuxictr.checkout import checkout_commit
from benchmarks.fuxictr.export import DATA_SET, LABEL
from benchmarks.fuxictr.models import Settings
from benchmarks.report import number
from recsys.errors import UserError
from recsys.training.metrics import BinaryMetrics

Figures = dict[str, float]

MEASURED_ALIKE = 1e-5
"""How near FuxiCTR's own test figures must be to ours; both are exact, from the same float32 probabilities."""

_EPS = float(np.finfo(np.float64).eps)
_DRIVER = Path(__file__).with_name("driver.py").resolve()

_FIXED: Settings = {
    "task": "binary_classification",
    "loss": "binary_crossentropy",
    "optimizer": "adam",
    "metrics": ["AUC", "logloss"],
    "monitor_mode": "max",
    "save_best_only": True,
    "eval_steps": None,  # once per epoch
    "data_format": "parquet",
    "shuffle": True,
    "streaming": False,
    "num_workers": 0,
    "gpu": -1,
    "verbose": 0,
}


@dataclass(frozen=True)
class Bench:
    """Runs of FuxiCTR on one export: where they run, where they are kept and what was measured of them."""

    python: Path
    checkout: Path
    rows: Path
    embedding_dim: int
    jobs: int

    @property
    def _driver(self) -> list[str | Path]:
        # Isolated and without bytecode: nothing of ours is imported there, nothing is written into the checkout.
        return [self.python, "-I", "-B", _DRIVER, self.checkout]

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
        """The checkout's, None outside git."""
        return checkout_commit(self.checkout)

    def train(self, model: str, points: Sequence[Settings], seeds: Sequence[int]) -> list[Figures | None]:
        """Figures of every seed at every point, points first; None for what failed."""
        runs = [self._prepare(model, settings, seed) for settings in points for seed in seeds]
        with ThreadPoolExecutor(self.jobs) as pool:
            complete = list(pool.map(self._run, runs))
        return [self._figures(run) if done else None for run, done in zip(runs, complete, strict=True)]

    def _prepare(self, model: str, settings: Settings, seed: int) -> Path:
        """The folder of a run, named by all that the run depends on."""
        params = _FIXED | settings | {"model": model, "model_id": model, "seed": seed}
        params |= {"dataset_id": DATA_SET, "embedding_dim": self.embedding_dim}
        for key in ("embedding_regularizer", "net_regularizer"):
            params[key] = float(params[key]) if params[key] else None  # FuxiCTR ignores one that is an int
        if model == "FinalMLP":
            params |= {"mlp1_dropout": params["net_dropout"], "mlp2_dropout": params["net_dropout"]}
        if model == "DLRM":
            params |= {"top_mlp_dropout": params["net_dropout"]}
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
    probabilities = torch.from_numpy(np.load(scores)).clamp(_EPS, 1 - _EPS)
    labels = torch.tensor(pq.read_table(rows, columns=[LABEL]).column(LABEL).to_numpy())
    metrics = BinaryMetrics(exact_examples=len(labels))
    metrics.update(probabilities.logit(), labels)
    measured = metrics.compute()
    named = {"AUC": measured.auc, "log loss": measured.log_loss, "NE": measured.ne, "calibration": measured.calibration}
    return {name: value for name, value in named.items() if value is not None}
