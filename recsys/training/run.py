"""A run from config to summary: data, model, stages in order, evaluation, checkpoints."""

import json
import math
from collections import Counter
from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, NoReturn

import torch
from rich.console import Console
from torch import Tensor

from recsys import watch
from recsys.checkpoint.layout import CONFIG, PLAN, PROGRESS, VOCABULARIES, CheckpointMeta, tidy
from recsys.config import Config, ConfigError, StageConfig, WarmStartConfig, load_checkpoint_config
from recsys.data.kinds import write_kinds
from recsys.data.lengths import mean_lengths
from recsys.data.loader import Loader
from recsys.data.order import Epoch
from recsys.data.parquet import ParquetShards
from recsys.data.splits import open_loader, open_splits, train_order
from recsys.data.storage import locate
from recsys.data.vocabulary import save_vocabularies
from recsys.errors import Stopped
from recsys.model.cost import cost_report
from recsys.model.experts import domain_adaptation
from recsys.model.ranker import build_ranker
from recsys.prepare.synthetic import write_embedded
from recsys.runtime import Ranks, derive_seed, is_told_to_be_first, once_on_each_machine, process_group
from recsys.sharding.plan import PLAN_TEXTS, plan_as_dict, plan_rows
from recsys.sharding.shard import shard
from recsys.terminal import markdown, table
from recsys.training.averages import Averages, check_start
from recsys.training.by_column import check_columns, told_by_column
from recsys.training.by_domain import domain_line
from recsys.training.checkpoint import (
    Checkpoints,
    copy_checkpoint,
    dense_optimizer_state,
    load_dense_optimizer,
    load_model_and_tables_optimizers,
    load_own,
    model_state,
    pending_state,
    table_optimizer_state,
    together,
    verified,
)
from recsys.training.compute import begin_computing
from recsys.training.counts import by_kind, in_words
from recsys.training.dense_optimizer import check_dense_optimizer
from recsys.training.domain_rows import DomainRows
from recsys.training.evaluation import Evaluation, evaluate
from recsys.training.finite import Moment, NotFinite, check_predictions, check_weights, end_not_finite
from recsys.training.learnable import check_labels
from recsys.training.metrics import Metrics, far_off
from recsys.training.monitor import Monitor
from recsys.training.norms import count_statistics, trained_norms
from recsys.training.optimizers import Phase, phase_lengths, phases, settle_gate
from recsys.training.output import OutputDirectory, State
from recsys.training.progress import Best, Progress, StageTotals
from recsys.training.resume import checkpoint_to_resume
from recsys.training.signals import Agreement, StopRequest
from recsys.training.stage import PhaseTrainer
from recsys.training.warm_start import warm_start
from recsys.versions import git_commit, versions


def train(config: Config) -> dict[str, Any]:
    """Run all stages of a config on all ranks and return the summary; what is written is in `config.output_dir`.

    Raises:
        MeetingError: the environment tells wrongly which rank this is, or the ranks do not come together.
        ConfigError: a setting that the device or the data cannot meet, there is no label, or the output directory
            cannot be used or is another run's.
        DataError: shards that cannot be trained on.
        OutputError: the disk of the output directory fails, or the directory is moved away under the run.
    """
    if config.data.label is None:
        raise ConfigError("data.label: null is for evaluating with --predictions; name one, as training learns from it")
    # Before the ranks meet: who cannot have the directory need not read data first.
    output = OutputDirectory(Path(config.output_dir), enabled=is_told_to_be_first())
    with output, process_group(config.device, config.rank_timeout_seconds) as ranks:
        begin_computing(config.compute, ranks.device)
        once_on_each_machine(ranks, partial(write_embedded, config))
        splits = open_splits(config, config.data.splits, also=config.metrics.by)
        check_labels(config, splits, ranks)
        for split in ("valid", "test"):
            if split in splits:
                check_columns(config.metrics.by, splits[split])
        monitor = Monitor(output.path, enabled=ranks.is_first, check=output.check)
        trainer = Trainer(config, ranks, splits, monitor)

        def look() -> State | None:
            if output.state == "unfinished":
                tidy(trainer.checkpoints.folder)  # before any is chosen: one that was about to be replaced is whole
            return output.state

        # The first rank's, whose directory it is.
        unfinished = together(ranks, f"{output.path} cannot be read", look)[0] == "unfinished"
        start = checkpoint_to_resume(config, ranks, monitor.say, unfinished=unfinished)
        if start is not None:
            trainer.progress_in(start)
        elif config.warm_start is not None:
            trainer.warm_start(config.warm_start)
        # Only now, when whatever could be refused has been.
        inside = start and _inside(output.path, start)
        kept = output.begin(config.name, anew=inside is None)
        if kept is not None:
            monitor.say(f"An earlier run was in {output.path}; it is kept as {kept}")
        kept = together(ranks, f"{output.path} cannot be read", lambda: kept)[0]
        if inside is not None:
            start = (kept or output.path) / inside
        if start is not None:
            trainer.resume(start)
        with output.naming_failures(), monitor:
            summary = trainer.run()
        output.finish()
        return summary


class Trainer:
    """The training of one config's ranker; see `train`.

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
        progress: how far the run has come.
    """

    def __init__(self, config: Config, ranks: Ranks, splits: dict[str, ParquetShards], monitor: Monitor) -> None:
        self.config, self.ranks, self.splits, self.monitor = config, ranks, splits, monitor
        ranker = build_ranker(config, seed=derive_seed(config.seed, "dense arch"))
        self.dense_arch = ranker.dense_arch
        check_dense_optimizer(self.dense_arch, config.optimizers.dense)
        ids = mean_lengths(splits["train"])
        self.sharded = shard(ranker, config, ranks, seed=derive_seed(config.seed, "tables"), ids_per_example=ids)
        self.progress = Progress(counts={split: Counter() for split in splits})
        self._rows = DomainRows(config, splits, ranks, monitor.say)
        check_start(config.optimizers.average, phase_lengths(config, lambda phase: self._order(phase, 0).num_steps))
        self._cost = cost_report(config)
        self._versions = {**versions(), "commit": git_commit()}
        self.checkpoints = Checkpoints(
            Path(config.output_dir) / "checkpoints", config.checkpoints, ranks, self._write_files
        )
        self._stop, self._agreement = StopRequest(config.checkpoints.grace_seconds), Agreement(ranks)
        self._resumed: Path | None = None  # until the phase that it stands in has begun
        self._own: dict[str, Tensor] = {}
        copy_to = config.checkpoints.copy_to
        self._copies = copy_to and locate(copy_to, source="checkpoints.copy_to").checked("checkpoints.copy_to")

    def progress_in(self, directory: Path) -> Progress:
        """How far the run of a checkpoint had come, standing where this one would go on.

        Raises:
            CheckpointError: the checkpoint's record of it is none.
            PositionError: the data are not those that it was trained on.
        """
        progress = Progress.from_json((directory / PROGRESS).read_bytes(), str(directory / PROGRESS))
        progress.begin_again(progress.epoch_of(self._order(self._phase_of(progress), progress.epoch)))
        return progress

    def resume(self, directory: Path) -> None:
        """Go on from a checkpoint of a run of this config, on any number of ranks; a collective call.

        Raises:
            CheckpointError: it is damaged, or holds another model.
            PositionError: the data are not those that it was trained on.
        """
        meta, then = verified(directory, self.ranks), load_checkpoint_config(directory)
        anew = load_model_and_tables_optimizers(directory, self.sharded, self.dense_arch, self.config.tables)
        self.progress = self.progress_in(directory)
        for split in self.splits:  # one may be new since
            self.progress.counts.setdefault(split, Counter())
        self._take_up_stage(then)
        if meta.world_size == self.ranks.world_size:
            self._own = load_own(directory, f"rank{self.ranks.rank}.")
            if _figures(then, self.progress.stage) != _figures(self.config, self.progress.stage):
                self._own = {name: value for name, value in self._own.items() if not name.startswith("open.")}
        best = None if self.progress.phase_over else self.progress.best
        self.checkpoints.begin_from(directory, best.step if best else None)
        if self.progress.phase_over:
            self._take_up_max_norms(directory)
        else:
            self._resumed = directory
        self.monitor.goes_on_from(self.progress.step)
        self.monitor.say(
            f"Resumed from {directory}: {_where(self.progress, len(phases(self.config, self.progress.stage)))}"
        )
        if anew:
            more = f" and {len(anew) - 1} more" if len(anew) > 1 else ""
            self.monitor.say(f"warning: the checkpoint has nothing for {anew[0]}{more}: state that begins anew")

    def _take_up_stage(self, then: Config) -> None:
        """Go on with a stage that had ended where it is longer than `then`, in the checkpoint's config."""
        progress, stages = self.progress, self.config.stages
        if stages[progress.stage].chosen_by is None:
            progress.best = None
            progress.phase_over &= progress.phase_steps >= self._phase_length(stages[progress.stage])
        names = list(stages)
        for name in names[: names.index(progress.stage) + progress.phase_over]:
            if then.stages[name] != stages[name]:
                self.monitor.say(f"warning: stage {name} has ended, so what differs in stages.{name} changes nothing")

    def _take_up_max_norms(self, directory: Path, averages: Averages | None = None) -> None:
        """Scale the rows of a checkpoint that was just read down to `max_norm`, where that is another since.

        No step may look them up any more.
        """
        tables, then = self.config.tables, load_checkpoint_config(directory).tables
        if any(table.max_norm not in (None, then[name].max_norm) for name, table in tables.items()):
            self.sharded.rows.catch_up()
            self.sharded.rows.renormalise()
            with averages.in_place() if averages else nullcontext():
                self.sharded.rows.renormalise()

    def warm_start(self, settings: WarmStartConfig) -> None:
        """Begin with weights of another run; a collective call, as `recsys.training.warm_start.warm_start`."""
        warm_start(
            settings, self.config, self.sharded, self.dense_arch, self.splits["train"], self.ranks, self.monitor.say
        )

    def run(self) -> dict[str, Any]:
        """All stages, or those that are left, then the held-out splits.

        Raises:
            Stopped: a signal asked for it, and the run is saved.
        """
        with self._stop, self._agreement, watch.positioned(self._position):
            return self._run()

    def _position(self) -> str:
        progress = self.progress
        return f"step {progress.step} of {progress.stage}" if progress.stage else ""

    def _run(self) -> dict[str, Any]:
        self._announce()
        # Dropout must differ between ranks; nothing else draws from the global generator from here on.
        since = f" since {self.progress.step}" if self.progress.step else ""
        torch.manual_seed(derive_seed(self.config.seed, f"dropout {self.ranks.rank}{since}"))
        if "rng.cpu" in self._own:
            _set_rng(self._own, self.ranks.device)
        if self.progress.phase_over and self.checkpoints.begun is not None:
            self._copy(self.checkpoints.begun)  # the run may have been cut off before it was, or within
        if not self.progress.stage:
            self.sharded.rows.renormalise()  # tables may be evaluated, or frozen, before a step looks rows up
        names = list(self.config.stages)
        for name in names[names.index(self.progress.stage) if self.progress.stage else 0 :]:
            self._run_stage(name)
        # The last stage has just evaluated the valid split, so only the test split is new.
        test = self._evaluate("final", "test") if "test" in self.splits else None
        self._warn_far_off("final test", test.model if test else None)
        self.checkpoints.close()
        summary = self._summary(test)
        self.monitor.close_run(summary, _hyperparameters(self.config))
        return summary

    def _summary(self, test: Evaluation | None) -> dict[str, Any]:
        config, progress = self.config, self.progress
        stages = {name: _stage_summary(config.stages[name], totals) for name, totals in progress.totals.items()}
        seconds = sum(stage["seconds"] for stage in stages.values())
        return {
            "name": config.name,
            "steps": progress.step,
            "stages": stages,
            "valid": progress.valid.as_dict() if progress.valid else None,
            "test": test.model.as_dict() if test else None,
            "reference": {
                "column": config.data.reference,
                **test.reference.as_dict(),
                **test.reference.told_over_domains,
            }
            if test and test.reference
            else None,
            "domains": {name: metrics.as_dict() for name, metrics in test.domains.items()} if test else {},
            **(test.model.told_over_domains if test else {}),
            **(told_by_column(test.columns) if test else {}),
            "examples_per_second": sum(stage["examples"] for stage in stages.values()) / seconds,
            "data": {split: by_kind(counts) for split, counts in progress.counts.items()},
            "cost": self._cost.as_dict(),
            "checkpoint": str(progress.of_stage.checkpoint),
            "checkpoint_wait": self.checkpoints.waited,
            "world_size": self.ranks.world_size,
            "device": str(self.ranks.device.type),
            "seed": config.seed,
            "versions": versions(),
            "commit": git_commit(),
        }

    def _announce(self) -> None:
        config, ranks, monitor = self.config, self.ranks, self.monitor
        parameters = sum(parameter.numel() for parameter in self.dense_arch.parameters())
        rows = plan_rows(self.sharded.plan, config.tables)
        plan = table(rows, "Embedding plan", left=PLAN_TEXTS)
        count = "1 rank" if ranks.world_size == 1 else f"{ranks.world_size} ranks"
        sizes = ", ".join(f"{sum(shards.row_counts):,} {split} rows" for split, shards in self.splits.items())
        monitor.say(f"{config.name}: {count} on {ranks.device.type}, {parameters:,} dense parameters, {sizes}")
        for warning in (warning for shards in self.splits.values() for warning in shards.warnings):
            monitor.say(f"warning: {warning}")
        monitor.say(plan)
        monitor.cost(self._cost)
        if not ranks.is_first:
            return
        output_dir = Path(config.output_dir)
        (output_dir / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
        with (output_dir / "plan.txt").open("w", encoding="utf-8") as file:
            Console(file=file, width=160).print(plan)
        monitor.text("config", f"```yaml\n{config.to_yaml()}```")
        monitor.text("plan", markdown(rows))

    def _run_stage(self, name: str) -> None:
        """Train the phases of one stage, those that are left of it where the run was resumed within it."""
        progress = self.progress
        if progress.stage != name:
            progress.begin_stage(name)
        of_stage = phases(self.config, name)
        for phase in of_stage[progress.phase :]:
            if phase.number != progress.phase:
                progress.begin_phase(phase.number)
            if not progress.phase_over:
                if phase.expert is not None:
                    progress.valid = None  # which is of other rows, or of another expert
                self._run_phase(name)
        if of_stage[-1].expert is not None:
            self._end_experts(name)

    def _end_experts(self, name: str) -> None:
        """Figures of the experts of a stage together, each of which was measured by itself."""
        adaptation = domain_adaptation(self.dense_arch)
        assert adaptation is not None
        adaptation.expert = None
        if "valid" in self.splits:
            self.progress.valid = self.progress.of_stage.valid = self._evaluate(name, "valid").model
            self._warn_far_off(f"{name} valid", self.progress.valid)

    def _run_phase(self, name: str) -> None:
        """Train a phase, evaluate what it leads to and save it."""
        progress, settings = self.progress, self.config.stages[name]
        num_steps = self._phase_length(settings)
        phase = self._phase
        trains: str = settings.trains
        if phase.domain is not None:
            assert self.config.data.domain is not None
            domain = self.config.data.domain.labels[phase.domain]
            trains = f"expert {phase.expert} of {self.config.num_domain_experts}, of domain {domain}"
        self.monitor.begin_stage(name, trains, num_steps)
        trainer = PhaseTrainer(
            self.config,
            self.ranks,
            self.sharded,
            self.dense_arch,
            progress,
            self.monitor,
            counted=self.splits["train"].columns.counted,
            num_steps=num_steps,
            evaluate=lambda: self._evaluate_within_epoch(trainer),
            after_step=lambda: self._after_step(trainer),
            end_not_finite=self._end_not_finite,
        )
        if self._resumed is not None:
            load_dense_optimizer(self._resumed, trainer.optimizers.dense)
            trainer.averages.load(self._resumed)
            self._take_up_max_norms(self._resumed, trainer.averages)
            if progress.is_within_epoch:
                trainer.load_open_state(
                    {name.removeprefix("open."): value for name, value in self._own.items() if name.startswith("open.")}
                )
            self._resumed = None
        under_way = self._epoch(progress.epoch)
        # What is over, though not done with, has nothing left to read.
        first = progress.epoch + (progress.is_within_epoch and progress.epoch_step >= under_way.num_steps)
        shards = self._rows.of(phase, "train")
        with open_loader(shards, map(self._epoch, count(first)), self.config, self.ranks) as loader:
            if settings.chosen_by is not None:
                self._train_to_best(trainer, loader)
            else:
                while not trainer.is_over:
                    trainer.train_epoch(self._epoch(progress.epoch), loader)
                trainer.detach()
                self.sharded.rows.settle()
                are_averages = trainer.averages.differ
                trainer.averages.become_weights()
                if are_averages:
                    self._count_statistics()
                self._check_weights()  # which names them, as predictions cannot
                if "valid" not in self.splits:
                    check_predictions(self.sharded.ranker, loader, self.ranks, self._moment())
                progress.valid = self._evaluate(name, "valid").model if "valid" in self.splits else None
        totals = progress.of_stage
        totals.valid = progress.valid
        self._warn_far_off(f"{name} valid", progress.valid)
        totals.checkpoint = self.checkpoints.folder / f"step-{progress.step}"
        progress.phase_over = True
        self._save(trainer, kept="stage", valid=progress.valid)
        self._copy(totals.checkpoint)

    def _copy(self, directory: Path) -> None:
        """Copy the checkpoint of a stage's end where the config has that."""
        if self._copies:
            self.checkpoints.wait()
            copy = self._copies / directory.name
            copy_checkpoint(directory, copy)
            self.monitor.say(f"{self.progress.stage:<10} checkpoint copied to {copy}")

    def _phase_length(self, stage: StageConfig) -> int:
        """Steps that the phase under way lasts at most, those taken included: at least these, if it is shorter now."""
        progress = self.progress
        if stage.epochs is None:
            assert stage.steps is not None
            return max(stage.steps, progress.phase_steps)
        if not progress.is_within_epoch:
            left = max(stage.epochs - progress.phase_epochs, 0)
            return progress.phase_steps + left * self._epoch(progress.epoch).num_steps
        left = self._epoch(progress.epoch).num_steps - progress.epoch_step
        full = self._epoch(progress.epoch + 1).num_steps
        more = left + (stage.epochs - progress.phase_epochs - 1) * full
        return progress.phase_steps + max(more, 0)

    def _train_to_best(self, trainer: PhaseTrainer, loader: Loader) -> None:
        """Train until patience ends and go back to the best state, that in which the phase began included."""
        progress, name = self.progress, self.progress.stage
        settings = self.config.stages[name]
        patience = math.inf if settings.patience is None else settings.patience
        if progress.best is None:
            if progress.valid is None or progress.phase_steps:
                before = f"step {progress.phase_steps + 1:,}" if progress.phase_steps else "the first step"
                self.monitor.say(f"{name:<10} valid before {before}:")
                progress.valid = self._evaluate_under_way(trainer)
            progress.best = Best(progress.phase_epochs, progress.step, progress.valid)
            if not self._is_saved:
                self._save(trainer, valid=progress.valid)

        def is_over() -> bool:
            assert progress.best is not None
            return trainer.is_over or progress.phase_epochs - progress.best.epoch >= patience

        while not is_over():
            trainer.train_epoch(self._epoch(progress.epoch), loader)
            trainer.detach()
            metrics = self._evaluate_under_way(trainer)
            is_better = _better(metrics, progress.best.metrics, settings)
            is_cut = progress.plateau.evaluated(settings, is_better=is_better)
            if is_better:
                progress.best = Best(progress.phase_epochs, progress.step, metrics)
                self._save(trainer, valid=metrics)
            if is_cut and not is_over():
                self.monitor.say(f"{name:<10} learning rates are cut to {progress.plateau.share:.3g} of the stage's")
                if settings.plateau and settings.plateau.restore_best:
                    self._go_back(progress.best, trainer)
                    settle_gate(self.dense_arch, self._phase)  # which that of before the phase does not use
        best = progress.best
        if best.step != progress.step:
            self._go_back(best, trainer)
        self.sharded.rows.settle()  # of the best state too, which can be a checkpoint of any step
        trainer.averages.become_weights()
        progress.valid, progress.of_stage.best_epoch = best.metrics, best.epoch

    def _go_back(self, best: Best, trainer: PhaseTrainer) -> None:
        """Go on from the best state of the phase."""
        self.checkpoints.wait()
        directory = self.checkpoints.folder / f"step-{best.step}"
        verified(directory, self.ranks)
        load_model_and_tables_optimizers(directory, self.sharded, self.dense_arch, self.config.tables)
        trainer.averages.load(directory)
        self._take_up_max_norms(directory, trainer.averages)
        of = f"epoch {best.epoch}" if best.epoch else "the state it began with"
        self.monitor.say(f"{self.progress.stage:<10} back to its best, {of}")
        trainer.optimizers.begin_anew()
        if best.step > self.progress.step - self.progress.phase_steps:  # else it is of the phase before
            load_dense_optimizer(directory, trainer.optimizers.dense)

    def _evaluate_within_epoch(self, trainer: PhaseTrainer) -> None:
        metrics = self._evaluate_under_way(trainer)
        if self.config.checkpoints.keep_best:
            self._save(trainer, valid=metrics)

    def _after_step(self, trainer: PhaseTrainer) -> None:
        """Save the run if that is due, and end it if a signal asked for that."""
        config, progress = self.config.checkpoints, self.progress
        agreed = self._agreement.exchange(self._stop.signal, self.checkpoints.falls_due())
        if agreed.stop:
            self.monitor.say(f"{agreed.stop.name}: saving the run at step {progress.step:,}")
        is_due = agreed.stop or agreed.save or (config.every_steps and progress.phase_steps % config.every_steps == 0)
        if is_due and not self._is_saved:
            self._save(trainer)
        if agreed.stop:
            self.checkpoints.wait()
            raise Stopped(agreed.stop, progress.step)

    def _epoch(self, number: int) -> Epoch:
        """The order of an epoch, or of what is left of it."""
        return self.progress.epoch_of(self._order(self._phase, number))

    @property
    def _phase(self) -> Phase:
        """The phase under way; before any, the first."""
        return self._phase_of(self.progress)

    def _phase_of(self, progress: Progress) -> Phase:
        return phases(self.config, progress.stage or next(iter(self.config.stages)))[progress.phase]

    def _order(self, phase: Phase, number: int) -> Epoch:
        """The order of the rows that a phase reads in an epoch."""
        return train_order(self._rows.of(phase, "train"), self.config, self.ranks.world_size, number)

    def _evaluate_under_way(self, trainer: PhaseTrainer) -> Metrics:
        """Figures of the valid split within a phase, of its averages where it has some."""
        self.sharded.rows.settle()  # the weights, before they make way
        with trainer.averages.in_place():
            if trainer.averages.differ:
                self._count_statistics()
            return self._evaluate(self.progress.stage, "valid").model

    def _count_statistics(self) -> None:
        """Have batch norms fit averages of weights, which are there: by the first rows of the run's first epoch."""
        if norms := trained_norms(self.dense_arch):
            phase, device = self._phase, self.ranks.device
            with open_loader(self._rows.of(phase, "train"), [self._order(phase, 0)], self.config, self.ranks) as loader:
                batches = (batch.to(device, non_blocking=True) for batch in loader)
                count_statistics(self.sharded.ranker, norms, batches)

    def _evaluate(self, source: str, split: str) -> Evaluation:
        """Figures of a split and of its reference column, shown and recorded under a stage's name or `final`."""
        progress = self.progress
        self.sharded.rows.settle()
        of_one = self._is_of_one_expert  # and so of its domain's rows alone
        found = evaluate(
            self.sharded.ranker,
            self._rows.of(self._phase, split) if of_one else self.splits[split],
            self.config,
            self.ranks,
            by=() if of_one else self.config.metrics.by,
            on_batch=partial(self.monitor.evaluating, split),
        )
        domains = {} if of_one else found.domains
        self.monitor.evaluation(source, split, progress.step, progress.epoch, found.model, domains, found.columns)
        if domains:
            self.monitor.domains(
                split, progress.step, found.model, domains, found.reference_domains, with_table=source == "final"
            )
        if found.counts != progress.counts[split]:  # they are the same each time
            progress.counts[split] = found.counts
            self.monitor.say(f"warning: {split}: {in_words(found.counts)}")
        if found.reference is not None and split == "test":
            self.monitor.evaluation("reference", split, progress.step, progress.epoch, found.reference)
            if found.reference_domains:
                self.monitor.say(f"{'':<10} {split:<5} {domain_line(found.reference)}")
        return found

    @property
    def _is_of_one_expert(self) -> bool:
        """Whether the model has one domain expert for all rows, as in the phase that trains it."""
        adaptation = domain_adaptation(self.dense_arch)
        return adaptation is not None and adaptation.expert is not None

    @property
    def _is_saved(self) -> bool:
        """Whether the run's own folder has a checkpoint of where the run stands."""
        return self.checkpoints.begun == self.checkpoints.folder / f"step-{self.progress.step}"

    def _moment(self) -> Moment:
        return Moment(self.progress.step, self.progress.stage, self.checkpoints.last_good)

    def _check_weights(self) -> None:
        check_weights(model_state(self.sharded, self.dense_arch), self.ranks, self._moment())

    def _warn_far_off(self, what: str, metrics: Metrics | None) -> None:
        if metrics and (told := far_off(metrics)):
            self.monitor.say(f"warning: {what}: {told}")

    def _end_not_finite(self, found: NotFinite) -> NoReturn:
        """End the run at a step of the epoch under way."""
        progress = self.progress
        end_not_finite(
            found,
            self._rows.of(self._phase, "train"),
            self._epoch(progress.epoch),
            progress.epoch_step - 1 - (progress.step - found.step),
            self.ranks,
            Path(self.config.output_dir),
            self._moment(),
        )

    def _save(self, trainer: PhaseTrainer, *, kept: str | None = None, valid: Metrics | None = None) -> None:
        """Begin to write a checkpoint from which the run goes on as if nothing had happened."""
        self.monitor.check()
        trainer.check_finite()
        self._check_weights()
        progress, rank = self.progress, f"rank{self.ranks.rank}."
        own = {**{f"open.{name}": value for name, value in trainer.open_state().items()}, **_rng(self.ranks.device)}
        state = {
            **model_state(self.sharded, self.dense_arch),
            **table_optimizer_state(self.sharded),
            **pending_state(self.sharded),
            **dense_optimizer_state(trainer.optimizers.dense),
            **trainer.averages.state(),
            **{rank + name: value for name, value in own.items()},
        }
        meta = CheckpointMeta(
            progress.stage,
            progress.step,
            progress.of_stage.steps,
            self.ranks.world_size,
            kept=kept,
            best_step=progress.best.step if progress.best and not progress.phase_over else None,
            valid=valid.as_dict() if valid else None,
            versions=self._versions,
        )
        waited = self.checkpoints.waited
        self.checkpoints.save(state, progress.to_json(self._epoch(progress.epoch)), meta)
        self.monitor.checkpoint(progress.step, self.checkpoints.waited - waited)

    def _write_files(self, directory: Path) -> None:
        """What is the same in all checkpoints of the run."""
        train = self.splits["train"]
        (directory / CONFIG).write_text(self.config.to_yaml(), encoding="utf-8")
        (directory / PLAN).write_text(
            json.dumps(plan_as_dict(self.sharded.plan, self.config.tables), indent=2) + "\n", encoding="utf-8"
        )
        save_vocabularies(train.columns.vocabularies, directory / VOCABULARIES)
        write_kinds(train.kinds.as_dict(), directory)


def _stage_summary(settings: StageConfig, totals: StageTotals) -> dict[str, Any]:
    """What summary.json tells of a stage."""
    return {
        "trains": settings.trains,
        "steps": totals.steps,
        "epochs": totals.epochs,
        "best_epoch": totals.best_epoch,
        "examples": totals.examples,
        "seconds": totals.seconds,
        "examples_per_second": totals.examples / totals.seconds,
        "data_wait": totals.waited / totals.seconds,
        "losses": totals.losses,
        "valid": totals.valid.as_dict() if totals.valid else None,
        **(totals.valid.told_over_domains if totals.valid else {}),
        "routing": totals.routing,
        "checkpoint": str(totals.checkpoint),
    }


def _better(metrics: Metrics, best: Metrics, stage: StageConfig) -> bool:
    new, old = getattr(metrics, stage.monitor), getattr(best, stage.monitor)
    if new is None or math.isnan(new):
        return False
    return bool(old is None or (new < old if stage.monitor == "log_loss" else new > old))


def _figures(config: Config, stage: str) -> tuple[Any, ...]:
    """What the sums of the figures under way depend on."""
    return config.metrics, config.stages[stage].loss_weights


def _where(progress: Progress, num_phases: int) -> str:
    """Where a run stands, in words; so many phases has its stage."""
    phase = "" if num_phases == 1 else f", phase {progress.phase + 1} of {num_phases}"
    if progress.phase_over:
        return f"{progress.stage}{phase} has ended, {progress.step:,} steps in all"
    of = "it" if phase else "the stage"
    return f"{progress.stage}{phase}, step {progress.phase_steps:,} of {of}, {progress.step:,} in all"


def _inside(folder: Path, path: Path) -> Path | None:
    """A path within a folder, whatever links lead to either, from there on; None where it lies elsewhere."""
    folder, path = folder.resolve(), path.resolve()
    return path.relative_to(folder) if path.is_relative_to(folder) else None


def _rng(device: torch.device) -> dict[str, Tensor]:
    """States of the generators from which dropout draws."""
    states = {"rng.cpu": torch.get_rng_state()}
    return states | ({"rng.cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def _set_rng(states: Mapping[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(states["rng.cpu"])
    if device.type == "cuda" and "rng.cuda" in states:
        torch.cuda.set_rng_state(states["rng.cuda"], device)


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
