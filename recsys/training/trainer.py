"""A run from config to summary: data, model, stages, evaluation, checkpoints."""

import math
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from torch import Tensor
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from recsys.config import Config, StageConfig
from recsys.data.parquet import Loader, ParquetShards
from recsys.data.splits import open_splits
from recsys.data.stream import Epoch
from recsys.model.ranker import RankerOutput, build_ranker
from recsys.runtime import Ranks, derive_seed, process_group
from recsys.sharding.plan import plan_rows, plan_table
from recsys.sharding.shard import COLLECTION, shard
from recsys.training.checkpoint import CheckpointMeta, load_model_and_tables_optimizers, save_checkpoint
from recsys.training.evaluation import evaluate
from recsys.training.metrics import BinaryMetrics, Metrics
from recsys.training.monitor import Monitor
from recsys.training.stages import Stage, begin_stage
from recsys.versions import git_commit, versions


def train(config: Config) -> dict[str, Any]:
    """Run all stages of a config on all ranks and return the summary; what is written is in `config.output_dir`.

    Raises:
        ConfigError: a setting that the device or the data cannot meet.
        DataError: shards that cannot be trained on.
    """
    with process_group(config.device) as ranks:
        splits = open_splits(config, ranks, config.data.splits)
        output_dir = Path(config.output_dir)
        if ranks.is_first:
            _make_way(output_dir)
        with Monitor(output_dir, enabled=ranks.is_first) as monitor:
            return Trainer(config, ranks, splits, monitor).run()


@dataclass
class _Progress:
    """How far the run is."""

    step: int = 0
    epoch: int = 0


@dataclass
class _Window:
    """Sums since the last line of the log, on the device until it is written."""

    metrics: BinaryMetrics
    losses: Tensor | None = None
    steps: int = 0
    examples: int = 0
    waited: float = 0.0
    began: float = field(default_factory=time.perf_counter)

    def add(self, output: RankerOutput, examples: int) -> None:
        self.metrics.update(output.logits, output.labels)
        losses = torch.stack([output.bce, output.balance, output.z])
        self.losses = losses if self.losses is None else self.losses + losses
        self.steps += 1
        self.examples += examples

    def mean_losses(self) -> dict[str, float]:
        """Per step, over all ranks; a collective call."""
        assert self.losses is not None
        losses = self.losses / self.steps
        dist.all_reduce(losses)
        bce, balance, z = (losses / dist.get_world_size()).tolist()
        return {"train/bce": bce, "train/balance": balance, "train/z": z}


@dataclass
class _Best:
    """The best state of a stage so far: which epoch's (0: as it began), and its figures."""

    epoch: int
    metrics: Metrics


class Trainer:
    """Trains one config's ranker; see `train`.

    Args:
        config: the run.
        ranks: this process among all.
        splits: opened shards, `train` at least.
        monitor: where the run is shown and recorded.

    Attributes:
        sharded: the ranker on its ranks, with the tables' optimizers.
        dense_arch: its replicated part, never wrapped.
    """

    def __init__(self, config: Config, ranks: Ranks, splits: dict[str, ParquetShards], monitor: Monitor) -> None:
        self.config, self.ranks, self.splits, self.monitor = config, ranks, splits, monitor
        ranker = build_ranker(config, seed=derive_seed(config.seed, "dense arch"))
        self.dense_arch = ranker.dense_arch
        self.sharded = shard(ranker, config, ranks, seed=derive_seed(config.seed, "tables"))
        self._progress = _Progress()
        self._best_directory = Path(config.output_dir) / "checkpoints" / "best"

    def run(self) -> dict[str, Any]:
        """All stages, then the held-out splits."""
        config, monitor = self.config, self.monitor
        self._announce()
        # Dropout must differ between ranks; nothing else draws from the global generator from here on.
        torch.manual_seed(derive_seed(config.seed, f"dropout {self.ranks.rank}"))
        stages: dict[str, Any] = {}
        valid: Metrics | None = None
        checkpoint = Path()
        for name in config.stages:
            stages[name], valid, checkpoint = self._run_stage(name, valid)
        # The last stage has just evaluated the valid split, so only the test split is new.
        test: Metrics | None = None
        reference: Metrics | None = None
        if "test" in self.splits:
            test, reference = self._evaluate("final", "test")
        seconds = sum(stage["seconds"] for stage in stages.values())
        summary: dict[str, Any] = {
            "name": config.name,
            "steps": self._progress.step,
            "stages": stages,
            "valid": valid.as_dict() if valid else None,
            "test": test.as_dict() if test else None,
            "reference": {"column": config.data.reference, **reference.as_dict()} if reference else None,
            "examples_per_second": sum(stage["examples"] for stage in stages.values()) / seconds,
            "checkpoint": str(checkpoint),
            "world_size": self.ranks.world_size,
            "device": str(self.ranks.device.type),
            "seed": config.seed,
            "versions": versions(),
            "commit": git_commit(),
        }
        monitor.close_run(summary, _hyperparameters(config))
        return summary

    def _announce(self) -> None:
        config, ranks, monitor = self.config, self.ranks, self.monitor
        parameters = sum(parameter.numel() for parameter in self.dense_arch.parameters())
        rows = plan_rows(self.sharded.plan, config.tables, COLLECTION)
        count = "1 rank" if ranks.world_size == 1 else f"{ranks.world_size} ranks"
        sizes = ", ".join(f"{sum(shards.row_counts):,} {split} rows" for split, shards in self.splits.items())
        monitor.say(f"{config.name}: {count} on {ranks.device.type}, {parameters:,} dense parameters, {sizes}")
        monitor.say(plan_table(rows))
        if not ranks.is_first:
            return
        output_dir = Path(config.output_dir)
        (output_dir / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
        with (output_dir / "plan.txt").open("w", encoding="utf-8") as file:
            Console(file=file, width=160).print(plan_table(rows))
        monitor.text("config", f"```yaml\n{config.to_yaml()}```")
        lines = ["| " + " | ".join(rows[0]) + " |", "|" + " --- |" * len(rows[0])]
        monitor.text("plan", "\n".join([*lines, *("| " + " | ".join(row.values()) + " |" for row in rows)]))

    def _run_stage(self, name: str, before: Metrics | None) -> tuple[dict[str, Any], Metrics | None, Path]:
        """Train one stage; `before` are the valid figures of the state in which it begins, if they are known."""
        stage_config = self.config.stages[name]
        per_epoch = self._epoch(0).num_steps
        num_steps = stage_config.steps or per_epoch * (stage_config.epochs or 0)
        stage = begin_stage(self.sharded, self.dense_arch, self.config, name, num_steps=num_steps)
        self.monitor.begin_stage(name, stage_config.trains, num_steps)
        pipeline = TrainPipelineSparseDist(
            self.sharded.ranker, stage.optimizer, self.ranks.device, execute_all_batches=True
        )
        best: _Best | None = None
        if stage_config.patience is not None:
            before = before or self._evaluate(name, "valid")[0]
            best = _Best(0, before)
            self._save(self._best_directory, stage, 0)
        stage_step, epochs, seconds, waited, examples = 0, 0, 0.0, 0.0, 0
        metrics: Metrics | None = None
        while stage_step < num_steps:
            began, evaluating = time.perf_counter(), 0.0
            with self._loader() as loader:
                for done, rows, paused in self._steps(pipeline, stage, stage_step, loader):
                    stage_step, examples, evaluating = done, examples + rows, evaluating + paused
                waited += loader.wait_seconds
            seconds += time.perf_counter() - began - evaluating
            self._progress.epoch += 1
            epochs += 1
            if best is not None:
                pipeline.detach()
                metrics, _ = self._evaluate(name, "valid")
                if _better(metrics, best.metrics, stage_config):
                    best = _Best(epochs, metrics)
                    self._save(self._best_directory, stage, stage_step)
                elif epochs - best.epoch >= (stage_config.patience or 0):
                    break
        pipeline.detach()
        if best is not None:
            if best.epoch != epochs:
                load_model_and_tables_optimizers(self._best_directory, self.sharded, self.dense_arch)
                of = f"epoch {best.epoch}" if best.epoch else "the state it began with"
                self.monitor.say(f"{name:<10} back to its best, {of}")
            metrics = best.metrics
            if self.ranks.is_first:
                shutil.rmtree(self._best_directory)
        elif "valid" in self.splits:
            metrics, _ = self._evaluate(name, "valid")
        checkpoint = self._best_directory.with_name(f"step-{self._progress.step}")
        self._save(checkpoint, stage, stage_step)
        summary = {
            "trains": stage_config.trains,
            "steps": stage_step,
            "epochs": epochs,
            "best_epoch": best.epoch if best else None,
            "examples": examples,
            "seconds": seconds,
            "examples_per_second": examples / seconds,
            "data_wait": waited / seconds,
            "valid": metrics.as_dict() if metrics else None,
            "checkpoint": str(checkpoint),
        }
        return summary, metrics, checkpoint

    def _steps(
        self, pipeline: TrainPipelineSparseDist[Any, Any], stage: Stage, stage_step: int, loader: Loader
    ) -> Iterator[tuple[int, int, float]]:
        """Take the steps of one epoch, or those left of the stage; yields stage step, examples, seconds paused."""
        epoch, logging = self._epoch(self._progress.epoch), self.config.logging
        self.sharded.ranker.train()
        batches = islice(iter(loader), stage.num_steps - stage_step)
        window = self._window(loader)
        for epoch_step in range(min(epoch.num_steps, stage.num_steps - stage_step)):
            rates = stage.set_learning_rates(stage_step)
            output: RankerOutput = pipeline.progress(batches)
            rows = epoch.global_batch_rows(epoch_step)
            window.add(output, rows)
            stage_step += 1
            self._progress.step += 1
            self.monitor.advance(stage_step)
            paused = 0.0
            if stage_step % logging.every_steps == 0:
                self._log(stage, stage_step, window, loader, rates)
                window = self._window(loader)
            if logging.eval_every_steps and stage_step % logging.eval_every_steps == 0:
                began = time.perf_counter()
                pipeline.detach()  # the next progress attaches it again, batches in flight included
                self._evaluate(stage.name, "valid")
                paused = time.perf_counter() - began
                window.began += paused
            yield stage_step, rows, paused

    def _log(self, stage: Stage, stage_step: int, window: _Window, loader: Loader, rates: dict[str, float]) -> None:
        seconds = time.perf_counter() - window.began
        gradients = [p.grad for p in self.dense_arch.parameters() if p.grad is not None]
        scalars = {
            **window.mean_losses(),
            **{f"learning_rate/{name}": rate for name, rate in rates.items()},
            "throughput/examples_per_second": window.examples / seconds,
            "throughput/data_wait": (loader.wait_seconds - window.waited) / seconds,
            "gradient_norm/dense": torch.nn.utils.get_total_norm(gradients).item(),
        }
        step = self._progress.step
        self.monitor.train_window(stage.name, step, stage_step, stage.num_steps, window.metrics.compute(), scalars)
        self.monitor.routing(self.dense_arch, step)

    def _window(self, loader: Loader) -> _Window:
        limits = self.config.metrics
        metrics = BinaryMetrics(exact_examples=limits.exact_examples, num_bins=limits.num_bins)
        return _Window(metrics, waited=loader.wait_seconds)

    def _epoch(self, number: int) -> Epoch:
        data = self.config.data
        return Epoch(
            self.splits["train"].row_counts,
            self.ranks.world_size,
            data.batch_size,
            seed=derive_seed(self.config.seed, "order"),
            epoch=number,
            shuffle=data.shuffle,
            window_row_groups=data.window_row_groups,
        )

    def _loader(self) -> Loader:
        return Loader(
            self.splits["train"],
            self._epoch(self._progress.epoch),
            self.ranks.rank,
            prefetch_batches=self.config.data.prefetch_batches,
            pin_memory=self.ranks.device.type == "cuda",
        )

    def _evaluate(self, source: str, split: str) -> tuple[Metrics, Metrics | None]:
        """Figures of a split and of its reference column, shown and recorded under a stage's name or `final`."""
        model, reference = evaluate(
            self.sharded.ranker,
            self.splits[split],
            self.config,
            self.ranks,
            on_batch=partial(self.monitor.evaluating, split),
        )
        self.monitor.evaluation(source, split, self._progress.step, model)
        if reference is not None and split == "test":
            self.monitor.evaluation("reference", split, self._progress.step, reference)
        return model, reference

    def _save(self, directory: Path, stage: Stage, stage_step: int) -> None:
        meta = CheckpointMeta(stage.name, self._progress.step, stage_step, self.ranks.world_size)
        save_checkpoint(directory, self.config, meta, self.sharded, self.dense_arch, stage.dense_optimizer)


def _better(metrics: Metrics, best: Metrics, stage: StageConfig) -> bool:
    new, old = getattr(metrics, stage.monitor), getattr(best, stage.monitor)
    if new is None or math.isnan(new):
        return False
    return bool(old is None or (new > old if stage.monitor == "auc" else new < old))


def _make_way(output_dir: Path) -> None:
    """Keep an earlier run of the same name under the time at which it ended."""
    if (output_dir / "config.yaml").exists():
        stamp = datetime.fromtimestamp(output_dir.stat().st_mtime).strftime("%Y%m%d-%H%M%S")
        kept = output_dir.with_name(f"{output_dir.name}-{stamp}")
        output_dir.rename(kept)
        print(f"An earlier run was in {output_dir}; it is kept as {kept}", flush=True)
    output_dir.mkdir(parents=True, exist_ok=True)


def _hyperparameters(config: Config) -> dict[str, str | int | float | bool]:
    """Scalars of the config that one compares runs by, by path."""
    found: dict[str, str | int | float | bool] = {"seed": config.seed, "data.batch_size": config.data.batch_size}

    def add(path: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, item in value.items():
                add(f"{path}.{key}", item)
        elif value is not None:
            found[path] = value if isinstance(value, str | int | float | bool) else str(value)

    for section in ("model", "optimizers", "stages"):
        add(section, config.model_dump()[section])
    return found
