"""A run from config to summary: data, model, stages, evaluation, checkpoints."""

import math
import shutil
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from torch import Tensor
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from recsys.config import Config, StageConfig
from recsys.data.loader import Loader
from recsys.data.location import locate
from recsys.data.parquet import ParquetShards
from recsys.data.splits import open_loader, open_splits
from recsys.data.stream import Epoch
from recsys.model.cost import cost_report
from recsys.model.ranker import RankerOutput, build_ranker
from recsys.runtime import Ranks, derive_seed, process_group
from recsys.sharding.plan import plan_rows, plan_table
from recsys.sharding.shard import COLLECTION, shard
from recsys.training.checkpoint import (
    CheckpointMeta,
    copy_checkpoint,
    load_model_and_tables_optimizers,
    save_checkpoint,
)
from recsys.training.counts import Counts, by_kind, in_words, num_skipped, reduce_counts
from recsys.training.evaluation import evaluate
from recsys.training.metrics import BinaryMetrics, Metrics
from recsys.training.monitor import Monitor, markdown_table
from recsys.training.routing import DEAD_LOAD, RoutingStatistics, RoutingSummary, dead_experts
from recsys.training.stages import Stage, begin_stage, stage_lengths
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
        monitor = Monitor(output_dir, enabled=ranks.is_first)
        trainer = Trainer(config, ranks, splits, monitor)
        # Only now, when whatever could be refused has been.
        if ranks.is_first:
            _make_way(output_dir)
        with monitor:
            return trainer.run()


@dataclass
class _Totals:
    """What a stage has done so far; `seconds` are those of training, evaluation left out, `routing` is of one epoch."""

    steps: int = 0
    epochs: int = 0
    examples: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    routing: dict[str, RoutingSummary] = field(default_factory=dict)


@dataclass
class _Window:
    """Sums since the last line of the log, on the device until it is written."""

    metrics: BinaryMetrics
    losses: Tensor | None = None
    steps: int = 0
    examples: int = 0
    waited: float = 0.0
    counts: Counts = field(default_factory=Counter)
    began: float = field(default_factory=time.perf_counter)

    def add(self, output: RankerOutput, examples: int) -> None:
        self.metrics.update(output.logits, output.labels)
        losses = torch.stack([output.bce, output.balance, output.z, output.diversity])
        self.losses = losses if self.losses is None else self.losses + losses
        self.steps += 1
        self.examples += examples

    def mean_losses(self) -> dict[str, float]:
        """Per step, over all ranks; a collective call."""
        assert self.losses is not None
        losses = self.losses / self.steps
        dist.all_reduce(losses)
        names = ("bce", "balance", "z", "diversity")
        means = (losses / dist.get_world_size()).tolist()
        return {f"train/{name}": mean for name, mean in zip(names, means, strict=True)}


class Trainer:
    """Trains one config's ranker; see `train`.

    Args:
        config: the run.
        ranks: this process among all.
        splits: opened shards, `train` at least.
        monitor: where the run is shown and recorded.

    Raises:
        ConfigError: a setting that the device or the data cannot meet.
        DataError: the storage that checkpoints are copied to refuses or does not answer.

    Attributes:
        sharded: the ranker on its ranks, with the tables' optimizers.
        dense_arch: its replicated part, never wrapped.
    """

    def __init__(self, config: Config, ranks: Ranks, splits: dict[str, ParquetShards], monitor: Monitor) -> None:
        self.config, self.ranks, self.splits, self.monitor = config, ranks, splits, monitor
        ranker = build_ranker(config, seed=derive_seed(config.seed, "dense arch"))
        self.dense_arch = ranker.dense_arch
        self.sharded = shard(ranker, config, ranks, seed=derive_seed(config.seed, "tables"))
        self._step = 0  # over all stages
        self._epochs = 0  # begun so far, each with an order of its own
        self._num_steps = stage_lengths(config.stages, self._epoch(0).num_steps)
        self._cost = cost_report(config)
        # Over all ranks: of the train rows of all stages, of one pass over the others.
        self._counts: dict[str, Counts] = {split: Counter() for split in splits}
        self._best_directory = Path(config.output_dir) / "checkpoints" / "best"
        copy_to = config.checkpoints.copy_to
        self._copies = copy_to and locate(copy_to, source="checkpoints.copy_to").checked("checkpoints.copy_to")

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
            "steps": self._step,
            "stages": stages,
            "valid": valid.as_dict() if valid else None,
            "test": test.as_dict() if test else None,
            "reference": {"column": config.data.reference, **reference.as_dict()} if reference else None,
            "examples_per_second": sum(stage["examples"] for stage in stages.values()) / seconds,
            "data": {split: by_kind(counts) for split, counts in self._counts.items()},
            "cost": self._cost.as_dict(),
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
        monitor.cost(self._cost)
        if not ranks.is_first:
            return
        output_dir = Path(config.output_dir)
        (output_dir / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
        with (output_dir / "plan.txt").open("w", encoding="utf-8") as file:
            Console(file=file, width=160).print(plan_table(rows))
        monitor.text("config", f"```yaml\n{config.to_yaml()}```")
        monitor.text("plan", markdown_table(rows))

    def _run_stage(self, name: str, before: Metrics | None) -> tuple[dict[str, Any], Metrics | None, Path]:
        """Train one stage; `before` are the valid figures of the state in which it begins, if they are known."""
        settings, totals, num_steps = self.config.stages[name], _Totals(), self._num_steps[name]
        stage = begin_stage(self.sharded, self.dense_arch, self.config, name, num_steps=num_steps)
        self.monitor.begin_stage(name, settings.trains, num_steps)
        pipeline = TrainPipelineSparseDist(self.sharded.ranker, stage.optimizer, self.ranks.device)
        valid: Metrics | None = None
        best_epoch: int | None = None
        orders = map(self._epoch, count(self._epochs))
        with open_loader(self.splits["train"], orders, self.config, self.ranks) as loader:
            train_epoch = partial(self._train_epoch, pipeline, loader, stage, totals)
            if settings.patience is not None:
                valid, best_epoch = self._train_to_best(pipeline, train_epoch, stage, totals, before)
            else:
                while totals.steps < num_steps:
                    train_epoch()
                pipeline.detach()
                if "valid" in self.splits:
                    valid, _ = self._evaluate(name, "valid")
        checkpoint = self._best_directory.with_name(f"step-{self._step}")
        self._save(checkpoint, stage, totals)
        if self._copies:
            copy = self._copies / checkpoint.name
            copy_checkpoint(checkpoint, copy)
            self.monitor.say(f"{name:<10} checkpoint copied to {copy}")
        summary = {
            "trains": settings.trains,
            "steps": totals.steps,
            "epochs": totals.epochs,
            "best_epoch": best_epoch,
            "examples": totals.examples,
            "seconds": totals.seconds,
            "examples_per_second": totals.examples / totals.seconds,
            "data_wait": totals.waited / totals.seconds,
            "valid": valid.as_dict() if valid else None,
            "routing": {linear: routing.as_dict() for linear, routing in totals.routing.items()},
            "checkpoint": str(checkpoint),
        }
        return summary, valid, checkpoint

    def _train_to_best(
        self,
        pipeline: TrainPipelineSparseDist[Any, Any],
        train_epoch: Callable[[], None],
        stage: Stage,
        totals: _Totals,
        before: Metrics | None,
    ) -> tuple[Metrics, int]:
        """Train until patience ends and go back to the best state: its valid figures and epoch (0: as it began)."""
        if before is None:
            self.monitor.say(f"{stage.name:<10} valid before the first step:")
            before, _ = self._evaluate(stage.name, "valid")
        best, best_epoch = before, 0
        self._save(self._best_directory, stage, totals)
        while totals.steps < stage.num_steps and totals.epochs - best_epoch < (stage.config.patience or 0):
            train_epoch()
            pipeline.detach()
            metrics, _ = self._evaluate(stage.name, "valid")
            if _better(metrics, best, stage.config):
                best, best_epoch = metrics, totals.epochs
                self._save(self._best_directory, stage, totals)
        if best_epoch != totals.epochs:
            load_model_and_tables_optimizers(self._best_directory, self.sharded, self.dense_arch)
            of = f"epoch {best_epoch}" if best_epoch else "the state it began with"
            self.monitor.say(f"{stage.name:<10} back to its best, {of}")
        if self.ranks.is_first:
            shutil.rmtree(self._best_directory)
        return best, best_epoch

    def _train_epoch(
        self, pipeline: TrainPipelineSparseDist[Any, Any], loader: Loader, stage: Stage, totals: _Totals
    ) -> None:
        """Take the steps of one epoch, or those left of the stage."""
        data, logging = self.config.data, self.config.logging
        epoch, steps_left = self._epoch(self._epochs), stage.num_steps - totals.steps
        began, paused, examples_before = time.perf_counter(), 0.0, totals.examples
        routing = RoutingStatistics(self.dense_arch, num_domains=data.domain.num_domains if data.domain else 0)
        self.sharded.ranker.train()
        waited_before, counts_before = loader.wait_seconds, loader.counts.copy()
        batches = islice(iter(loader), steps_left)
        window = self._window(loader)
        for epoch_step in range(min(epoch.num_steps, steps_left)):
            rates = stage.set_learning_rates(totals.steps)
            output: RankerOutput = pipeline.progress(batches)
            examples = epoch.global_batch_rows(epoch_step)
            window.add(output, examples)
            routing.update(output.domain)
            totals.steps += 1
            totals.examples += examples
            self._step += 1
            self.monitor.advance(totals.steps)
            if totals.steps % logging.every_steps == 0:
                self._log(stage, totals.steps, window, loader, rates)
                self.monitor.routing(self._step, routing.window())
                window = self._window(loader)
            if logging.eval_every_steps and totals.steps % logging.eval_every_steps == 0:
                stopped = time.perf_counter()
                pipeline.detach()  # the next step attaches it again, batches in flight included
                self._evaluate(stage.name, "valid")
                paused += time.perf_counter() - stopped
                window.began += time.perf_counter() - stopped
        counts = self._reduced(loader.counts - counts_before)
        self._counts["train"] += counts
        totals.examples -= num_skipped(counts)
        if counts:
            self.monitor.say(f"warning: {stage.name} epoch {totals.epochs + 1}: {in_words(counts)}")
        totals.waited += loader.wait_seconds - waited_before
        totals.seconds += time.perf_counter() - began - paused
        totals.epochs += 1
        self._epochs += 1
        totals.routing = routing.epoch()
        self._report_routing(stage, totals.epochs, totals.routing, totals.examples - examples_before)

    def _report_routing(self, stage: Stage, epoch: int, routing: dict[str, RoutingSummary], examples: int) -> None:
        """Warn of experts that were dead for an epoch, or what the stage took of it; show who used which."""
        for dead in dead_experts(routing):
            self.monitor.say(
                f"warning: {stage.name} epoch {epoch}: {dead} dead (below {DEAD_LOAD:.0%} of a uniform load over "
                f"{examples:,} examples); raise balance_weight where experts train, or model.hilomoe.top_k if it is set"
            )
        if self.config.data.domain is not None:
            self.monitor.routing_by_domain(self._step, routing, self.config.data.domain.labels)

    def _log(self, stage: Stage, stage_step: int, window: _Window, loader: Loader, rates: dict[str, float]) -> None:
        seconds = time.perf_counter() - window.began
        gradients = [p.grad for p in self.dense_arch.parameters() if p.grad is not None]
        losses = window.mean_losses()
        if not stage.config.diversity_weight:
            del losses["train/diversity"]  # it was not computed
        counts = self._reduced(loader.counts - window.counts)
        scalars = {
            **losses,
            **{f"learning_rate/{name}": rate for name, rate in rates.items()},
            **{f"data/{kind}/{feature}": counts[kind, feature] for kind, feature in self._counted},
            "throughput/examples_per_second": (window.examples - num_skipped(counts)) / seconds,
            "throughput/data_wait": (loader.wait_seconds - window.waited) / seconds,
            "gradient_norm/dense": torch.nn.utils.get_total_norm(gradients).item(),
        }
        step = self._step
        self.monitor.train_window(stage.name, step, stage_step, stage.num_steps, window.metrics.compute(), scalars)

    def _window(self, loader: Loader) -> _Window:
        return _Window(
            BinaryMetrics(**self.config.metrics.model_dump()), waited=loader.wait_seconds, counts=loader.counts.copy()
        )

    @property
    def _counted(self) -> tuple[tuple[str, str], ...]:
        return self.splits["train"].columns.counted

    def _reduced(self, counts: Counts) -> Counts:
        return reduce_counts(counts, self._counted, self.ranks.device)

    def _epoch(self, number: int) -> Epoch:
        """The order of an epoch."""
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

    def _evaluate(self, source: str, split: str) -> tuple[Metrics, Metrics | None]:
        """Figures of a split and of its reference column, shown and recorded under a stage's name or `final`."""
        model, reference, counts = evaluate(
            self.sharded.ranker,
            self.splits[split],
            self.config,
            self.ranks,
            on_batch=partial(self.monitor.evaluating, split),
        )
        self.monitor.evaluation(source, split, self._step, model)
        if counts != self._counts[split]:  # they are the same each time
            self._counts[split] = counts
            self.monitor.say(f"warning: {split}: {in_words(counts)}")
        if reference is not None and split == "test":
            self.monitor.evaluation("reference", split, self._step, reference)
        return model, reference

    def _save(self, directory: Path, stage: Stage, totals: _Totals) -> None:
        meta = CheckpointMeta(stage.name, self._step, totals.steps, self.ranks.world_size)
        vocabularies = self.splits["train"].columns.vocabularies
        save_checkpoint(
            directory, self.config, meta, self.sharded, self.dense_arch, stage.dense_optimizer, vocabularies
        )


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
