"""What a person watches and a machine reads: the terminal, TensorBoard, evaluations and summary, from rank 0."""

import json
from collections.abc import Callable, Mapping, Sequence
from math import isfinite, isnan
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Self

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams as hparams_summary

from recsys import terminal
from recsys.model.cost import CostReport
from recsys.training.by_column import GroupFigures
from recsys.training.by_domain import domain_line, domain_rows, draw_domains
from recsys.training.heatmap import cell_text, draw_heat_map
from recsys.training.metrics import Metrics
from recsys.training.routing import RoutingSummary

_FIGURES = ("auc", "log_loss", "ne", "calibration")

EVALUATIONS = "evaluations.jsonl"

MAX_SHOWN_DOMAINS = 64
"""Rows of a heat map; of more domains those of the most inputs are shown."""


class Monitor:
    """What shows and records a run, while entered. On all ranks but the first every method does nothing.

    One live bar where the terminal is one, plain lines where it is not.

    Args:
        output_dir: where `tensorboard/`, `evaluations.jsonl` and `summary.json` go.
        enabled: whether this is the first rank.
        check: called before figures are recorded, and by who else writes there; raises if that would go astray.
    """

    def __init__(self, output_dir: Path, *, enabled: bool, check: Callable[[], None] = lambda: None) -> None:
        self.output_dir = output_dir
        self._enabled = enabled
        self.check = check
        self._console = terminal.console(quiet=not enabled)
        self._writer: SummaryWriter | None = None
        self._first_step: int | None = None
        self._progress = Progress(
            TextColumn("{task.description:<10}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not (enabled and self._console.is_terminal),
        )
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        if self._enabled:
            if self._first_step is not None:
                _drop_evaluations(self.output_dir / EVALUATIONS, self._first_step)
            self._writer = SummaryWriter(str(self.output_dir / "tensorboard"), purge_step=self._first_step)
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()
        if self._writer is not None:
            self._writer.close()

    def goes_on_from(self, step: int) -> None:
        """Before it is entered: what an interrupted run recorded behind that step is not shown."""
        self._first_step = step + 1

    def say(self, what: str | terminal.Drawn) -> None:
        """Print a line or a table."""
        terminal.say(self._console, what)

    def text(self, tag: str, markdown: str) -> None:
        """Record a text."""
        if self._writer is not None:
            self._writer.add_text(tag, markdown)

    def cost(self, report: CostReport) -> None:
        """What an example costs: said in a line or two, recorded as a table and by part."""
        for line in report.lines():
            self.say(line)
        if self._writer is None:
            return
        notes = "".join(f"- {assumption}\n" for assumption in report.assumptions())
        self.text("cost", f"{report.title()}\n\n{terminal.markdown(report.rows())}\n\n{notes}")
        for tag, value in _cost_scalars(report.as_dict()).items():
            self._writer.add_scalar(tag, value, 0)

    def begin_stage(self, name: str, trains: str, num_steps: int) -> None:
        """A stage of `num_steps` steps begins."""
        if self._task is not None:
            self._progress.remove_task(self._task)
        if self._progress.disable:
            self.say(f"{name}: {num_steps:,} steps, training {trains}")
        else:
            self._task = self._progress.add_task(name, total=num_steps, figures="")

    def advance(self, stage_step: int) -> None:
        """A step is done; moves the bar alone."""
        if self._task is not None:
            self._progress.update(self._task, completed=stage_step)

    def train_window(
        self,
        stage: str,
        step: int,
        stage_step: int,
        num_steps: int,
        metrics: Metrics,
        scalars: Mapping[str, float],
    ) -> None:
        """The steps since the last window: their metrics, and scalars by TensorBoard tag.

        `throughput/examples_per_second` and `throughput/data_wait` are among the scalars.
        """
        if self._writer is None:
            return
        self.check()
        self._record("train", step, metrics)
        for tag, value in scalars.items():
            self._writer.add_scalar(tag, value, step)
        rate, wait = scalars["throughput/examples_per_second"], scalars["throughput/data_wait"]
        speed = f"{rate:,.0f} examples/s  data wait {wait:.1%}"
        if self._task is not None:
            figures = f"auc {_number(metrics.auc)}  log loss {_number(metrics.log_loss)}  {speed}"
            self._progress.update(self._task, completed=stage_step, figures=figures)
        else:
            width = len(f"{num_steps:,}")
            self.say(f"{stage:<10} step {stage_step:>{width},}/{num_steps:,}  {_shown(metrics)}  {speed}")

    def checkpoint(self, step: int, seconds: float) -> None:
        """A checkpoint is being written, or is; training has waited for so long."""
        if self._writer is not None:
            self._writer.add_scalar("throughput/checkpoint_wait", seconds, step)

    def routing(self, step: int, window: Mapping[str, RoutingSummary]) -> None:
        """How the experts of each linear were used since the last window."""
        if self._writer is None:
            return
        for name, summary in window.items():
            figures = summary.as_dict()
            for tag in {"paths", "paths_at_least"} & figures.keys():
                self._writer.add_scalar(f"routing_{tag}/{name}", figures.pop(tag), step)
            for (layer, health), load in zip(figures.items(), summary.load().tolist(), strict=True):
                self._writer.add_scalar(f"routing_entropy/{name}/{layer}", health["entropy"], step)
                self._writer.add_scalar(f"routing_cv/{name}/{layer}", health["cv"], step)
                self._writer.add_scalar(f"routing_dead/{name}/{layer}", len(health["dead"]), step)
                for expert, share in enumerate(load, start=1):
                    self._writer.add_scalar(f"routing_load/{name}/{layer}/expert{expert}", share, step)

    def routing_by_domain(self, step: int, epoch: Mapping[str, RoutingSummary], domains: Sequence[str]) -> None:
        """Which experts the domains, named in order, used in an epoch: an image and a table for each linear."""
        if self._writer is None:
            return
        for name, summary in epoch.items():
            inputs = summary.scores.sum((1, 2))
            shown = inputs.argsort(descending=True, stable=True)[:MAX_SHOWN_DOMAINS].sort().values
            loads, rows = summary.domain_load()[shown].numpy(), [domains[index] for index in shown.tolist()]
            layers = [f"layer {number}" for number in range(1, loads.shape[1] + 1)]
            image = draw_heat_map(loads, rows, layers)
            self._writer.add_image(f"routing_by_domain/{name}", image, step, dataformats="HWC")
            table = [
                {
                    "domain": row,
                    **{
                        f"{layer}, expert {expert}": cell_text(value)
                        for layer, values in zip(layers, of_row.tolist(), strict=True)
                        for expert, value in enumerate(values, start=1)
                    },
                }
                for row, of_row in zip(rows, loads, strict=True)
            ]
            self._writer.add_text(f"routing_by_domain/{name}", terminal.markdown(table), step)

    def evaluating(self, split: str, done: int, num_batches: int) -> None:
        """Batches of a split are done; shown on the bar alone."""
        if self._task is not None:
            self._progress.update(self._task, figures=f"evaluating {split}: {done:,}/{num_batches:,}")

    def evaluation(
        self,
        source: str,
        split: str,
        step: int,
        epochs: int,
        metrics: Metrics,
        domains: Mapping[str, Metrics] = MappingProxyType({}),
        columns: Mapping[str, GroupFigures] = MappingProxyType({}),
    ) -> None:
        """Figures of a held-out split: shown, recorded and a line of `evaluations.jsonl`.

        Args:
            source: a stage's name, `final` or `reference`.
            split: `valid` or `test`.
            step: of the run.
            epochs: of the run that have ended.
            metrics: the figures; those that are not finite are null in the file.
            domains: those of each domain, whose AUC is told.
            columns: those of the rows of each value of columns, by the column's name.
        """
        self.check()
        if self._writer is not None:
            about = {"source": source, "split": split, "step": step, "epochs": epochs}
            told = {**about, **metrics.as_dict(), **metrics.told_over_domains}
            if domains:
                told["domains"] = {name: of_domain.auc for name, of_domain in domains.items()}
            if columns:
                told["by"] = {name: figures.over_groups() for name, figures in columns.items()}
            with (self.output_dir / EVALUATIONS).open("a", encoding="utf-8") as file:
                file.write(json.dumps(_without_non_finite(told, "", []), allow_nan=False) + "\n")
        self._record(f"{split}_reference" if source == "reference" else split, step, metrics)
        if self._task is not None:
            self._progress.update(self._task, figures="")
        self.say(f"{source:<10} {split:<5} {_shown(metrics)}  {metrics.examples:,} examples")
        if self._writer is not None:
            for name, figures in columns.items():
                self.say(f"{'':<10} {split:<5} by {figures.line(name)}")
                if not isnan(figures.gauc):
                    self._writer.add_scalar(f"{split}_gauc/{name}", figures.gauc, step)
                if source == "final" and figures.names:
                    rows, which = figures.table()
                    self.say(terminal.table(rows, f"By {name}{which}"))

    def domains(
        self,
        split: str,
        step: int,
        metrics: Metrics,
        domains: Mapping[str, Metrics],
        reference: Mapping[str, Metrics],
        *,
        with_table: bool,
    ) -> None:
        """Figures of each domain of a held-out split: a line, and a picture and a table.

        Args:
            split: `valid` or `test`.
            step: of the run.
            metrics: of all rows.
            domains: figures by name.
            reference: those of the reference column, empty without one.
            with_table: whether the table is shown on the terminal too.
        """
        self.say(f"{'':<10} {split:<5} {domain_line(metrics)}")
        if self._writer is None:
            return
        for figure in ("wauc", "mean_auc", "worst_auc"):
            value = getattr(metrics.over_domains, figure)
            if value is not None:
                self._writer.add_scalar(f"{split}/{figure}", value, step)
        rows, title = domain_rows(domains, reference)
        if rows:
            self._writer.add_text(f"{split}_by_domain", terminal.markdown(rows), step)
            image = draw_domains(domains)
            self._writer.add_image(f"{split}_by_domain", image, step, dataformats="HWC")
            if with_table:
                self.say(terminal.table(rows, title))

    def close_run(self, summary: Mapping[str, Any], hyperparameters: Mapping[str, str | int | float | bool]) -> None:
        """Write summary.json, record hyperparameters with the final figures, print the closing table.

        A figure that is not finite, such as the entropy of experts that no row was sampled of, is null in the file, as
        JSON has no word for it, and named on the terminal.
        """
        if self._writer is None:
            return
        self.check()
        path = self.output_dir / "summary.json"
        nulled: list[str] = []
        summary = _without_non_finite(summary, "", nulled)
        path.write_text(json.dumps(summary, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        if nulled:
            self.say(f"warning: null in summary.json, as they are not finite: {', '.join(nulled)}")
        rows = _summary_rows(summary)
        held_out = summary["test"] or summary["valid"] or {}
        final = {f"final/{key}": held_out[key] for key in _FIGURES if held_out.get(key) is not None}
        cost = {tag: value for tag, value in _cost_scalars(summary["cost"]).items() if tag.endswith("/total")}
        for part in hparams_summary(dict(hyperparameters), {**final, **cost}):
            self._writer._get_file_writer().add_summary(part)
        for tag, value in final.items():
            self._writer.add_scalar(tag, value, summary["steps"])
        self.text("stages", terminal.markdown(rows))
        self._progress.stop()
        self.say(terminal.table(rows, "Summary"))
        files = f"summary.json, {EVALUATIONS}, config.yaml, plan.txt, checkpoints/, tensorboard/"
        self.say(f"Outputs in {self.output_dir}: {files}")
        self.say(f"Last checkpoint: {summary['checkpoint']}")

    def _record(self, split: str, step: int, metrics: Metrics) -> None:
        if self._writer is None:
            return
        for figure in _FIGURES:
            value = getattr(metrics, figure)
            if value is not None:
                self._writer.add_scalar(f"{split}/{figure}", value, step)
        if metrics.auc_error:
            self._writer.add_scalar(f"{split}/auc_error", metrics.auc_error, step)


def _drop_evaluations(path: Path, first_step: int) -> None:
    """Leave out what an interrupted run recorded from a step on, and what it was writing as it was cut off."""
    if path.exists():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] < first_step]
        path.write_text("".join(kept), encoding="utf-8")


def _without_non_finite(value: Any, path: str, nulled: list[str]) -> Any:
    """A value of JSON types with None for each number that is not finite, whose paths are added to `nulled`."""
    if isinstance(value, Mapping):
        return {key: _without_non_finite(item, f"{path}.{key}".lstrip("."), nulled) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_non_finite(item, f"{path}.{number}", nulled) for number, item in enumerate(value)]
    if isinstance(value, float) and not isfinite(value):
        nulled.append(path)
        return None
    return value


def _cost_scalars(cost: Mapping[str, Any]) -> dict[str, float]:
    tags = {"flops": "cost/flops_per_example", "parameters": "cost/parameters"}
    return {f"{tag}/{part}": value for figure, tag in tags.items() for part, value in cost[figure].items()}


def _shown(metrics: Metrics) -> str:
    values = {figure: getattr(metrics, figure) for figure in _FIGURES}
    return "  ".join(f"{name.replace('_', ' ')} {_number(value)}" for name, value in values.items())


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _summary_rows(summary: Mapping[str, Any]) -> list[dict[str, str]]:
    def row(name: str, stage: Mapping[str, Any] | None, metrics: Mapping[str, Any] | None) -> dict[str, str]:
        return {
            "": name,
            "steps": f"{stage['steps']:,}" if stage else "",
            "seconds": f"{stage['seconds']:.1f}" if stage else "",
            "examples/s": f"{stage['examples_per_second']:,.0f}" if stage else "",
            "data wait": f"{stage['data_wait']:.1%}" if stage else "",
            **{figure.replace("_", " "): _number(metrics[figure]) if metrics else "" for figure in _FIGURES},
        }

    rows = [row(f"{name}, valid", stage, stage["valid"]) for name, stage in summary["stages"].items()]
    if summary["test"]:
        rows.append(row("test", None, summary["test"]))
    if summary["reference"]:
        rows.append(row(f"test, {summary['reference']['column']}", None, summary["reference"]))
    return rows
