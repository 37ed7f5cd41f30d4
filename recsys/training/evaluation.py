"""Evaluating a ranker on a split, over all ranks."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from recsys.checkpoint.layout import VOCABULARIES, read_meta
from recsys.config import Config, ConfigError, load_checkpoint_config
from recsys.data.kinds import read_kinds
from recsys.data.parquet import ParquetShards
from recsys.data.splits import eval_order, open_loader, open_splits
from recsys.model.ranker import Ranker, RankerOutput
from recsys.prepare.synthetic import require_embedded
from recsys.runtime import Ranks, full_precision, once_on_each_machine, process_group
from recsys.terminal import console, say, table
from recsys.training.by_column import ByColumns, GroupFigures, check_columns, told_by_column
from recsys.training.by_domain import domain_line, domain_rows
from recsys.training.checkpoint import load_ranker, verified
from recsys.training.counts import Counts, by_kind, in_words, reduce_counts
from recsys.training.metrics import BinaryMetrics, GroupedMetrics, Metrics, OverDomains
from recsys.training.predictions import writing_predictions


class Evaluation(NamedTuple):
    """Figures of all rows of a split, over all ranks.

    Attributes:
        model: of the ranker.
        reference: of the reference column, if there is one.
        counts: how often values were cut, replaced or left out.
        domains: of the ranker on each domain's rows, by the domain's name; empty where the config names no domains.
        reference_domains: the same of the reference column.
        columns: of the rows of each value of columns, by the column's name; of no rows on all ranks but the first.
    """

    model: Metrics
    reference: Metrics | None
    counts: Counts
    domains: Mapping[str, Metrics]
    reference_domains: Mapping[str, Metrics]
    columns: Mapping[str, GroupFigures]


def _ignore(output: RankerOutput) -> None:
    pass


def evaluate_checkpoint(
    directory: str,
    split: str,
    overrides: Sequence[str] = (),
    *,
    as_json: bool = False,
    predictions: str | None = None,
    by: Sequence[str] = (),
) -> dict[str, Metrics]:
    """Figures of a checkpoint's model on a split, printed by the first rank; those of a reference column beside it.

    Vocabularies are those that the checkpoint holds, whatever has become of the files that its config names, and
    features hold what they held in training. Whoever wrote the checkpoint, nothing but `predictions` is written: an
    embedded log that is not there is not made.

    Args:
        directory: of the checkpoint.
        split: train, valid or test.
        overrides: of the config that the checkpoint holds.
        as_json: print one JSON object instead of a table.
        predictions: where to write them (see `writing_predictions`), if anywhere. Where `data.label` is null, they are
            all that there is.
        by: columns of the split's files, whose values' rows have figures of their own; without any, `metrics.by`.

    Raises:
        CheckpointError: no checkpoint is there, or it does not fit.
        ConfigError: the config has no such split, an override is wrong, or rows without label are to be measured.
        DataError: as `recsys.data.parquet.ParquetShards` and `writing_predictions`.
    """
    path = Path(os.path.expanduser(directory))
    meta = read_meta(path)
    config = load_checkpoint_config(path, overrides)
    labelled = config.data.label is not None
    if not (labelled or predictions):
        raise ConfigError("data.label: null leaves nothing to measure; pass --predictions, or name the label")
    if by and not labelled:
        raise ConfigError("data.label: null leaves nothing to measure by column; leave --by out, or name the label")
    by = tuple(dict.fromkeys(by or config.metrics.by)) if labelled else ()
    with process_group(config.device, config.rank_timeout_seconds) as ranks:
        verified(path, ranks)
        once_on_each_machine(ranks, partial(require_embedded, config))
        shards = open_splits(config, [split], path / VOCABULARIES, read_kinds(path), also=by)[split]
        check_columns(by, shards)
        ranker = load_ranker(path, config, ranks)
        with (
            writing_predictions(predictions, ranks, with_label=labelled, with_domain=config.data.domain is not None)
            if predictions
            else nullcontext(_ignore)
        ) as on_output:
            found = evaluate(ranker, shards, config, ranks, by=by, on_output=on_output)
            model, reference, counts, domains, _, columns = found
        results = {"model": model} if labelled else {}
        results |= {"reference": reference} if reference else {}
        about: dict[str, Any] = {"checkpoint": directory, "split": split, "step": meta.step}
        if predictions:
            # Rows whose label is null may be left out; without any label, none is.
            rows = model.examples if labelled else sum(shards.row_counts)
            about |= {"predictions": predictions, "rows": rows}
        if ranks.is_first and as_json:
            over = reference.told_over_domains if reference else {}
            figures = {name: it.as_dict() | (over if it is reference else {}) for name, it in results.items()}
            of_domains = {"domains": {name: it.as_dict() for name, it in domains.items()}} if domains else {}
            of_domains |= {**model.told_over_domains, **told_by_column(columns)}
            print(json.dumps({**about, **figures, **of_domains, "data": by_kind(counts)}, indent=2))
        elif ranks.is_first:
            warnings = [*shards.warnings, *([f"{split}: {in_words(counts)}"] if counts else [])]
            _show(about, results, found, warnings)
        return results


@full_precision()
@torch.no_grad()
def evaluate(
    ranker: Ranker,
    shards: ParquetShards,
    config: Config,
    ranks: Ranks,
    *,
    by: Sequence[str] = (),
    on_batch: Callable[[int, int], None] = lambda done, num_batches: None,
    on_output: Callable[[RankerOutput], None] = _ignore,
) -> Evaluation:
    """Figures of the ranker on every row of a split, and those of the reference column if there is one.

    Without a label, figures are of no rows.

    A collective call; the figures are the same on all ranks and, but for rounding, for any number of them. The ranker
    must not be attached to a pipeline. Its training mode is kept.

    Args:
        ranker: sharded.
        shards: the split.
        config: for batch size, features and metrics.
        ranks: this process among all.
        by: columns of the split's files, whose values' rows have figures of their own; the split is no domain's alone.
        on_batch: told after each batch how many are done, and of how many.
        on_output: given what the ranker says of each of this rank's batches.
    """
    epoch = eval_order(shards, config, ranks.world_size)
    limits, domain = config.metrics.limits, config.data.domain
    model, reference = BinaryMetrics(**limits), BinaryMetrics(**limits)
    by_domain, reference_by_domain = (
        GroupedMetrics(len(domain.labels), **limits) if domain and is_there else None
        for is_there in (True, config.data.reference)
    )
    by_columns = ByColumns(by, shards, epoch, ranks) if by else None
    labelled, was_training = config.data.label is not None, ranker.training
    ranker.eval()
    with open_loader(shards, [epoch], config, ranks) as loader:
        for step, batch in enumerate(loader):
            if labelled and config.data.reference:
                reference.update(_logits(batch.reference), batch.labels)
                if reference_by_domain is not None:
                    reference_by_domain.update(_logits(batch.reference), batch.labels, batch.domain)
            if not labelled:  # one for each row is needed, but no figure is made of it
                batch = replace(batch, labels=torch.full((batch.sparse_features.stride(),), torch.nan))
            _, output = ranker(batch.to(ranks.device, non_blocking=True))
            if labelled:
                model.update(output.logits, output.labels)
            if labelled and by_domain is not None:
                by_domain.update(output.logits, output.labels, output.domain)
            if by_columns is not None:
                by_columns.update(output.logits, output.labels)
            on_output(output)
            on_batch(step + 1, epoch.num_steps)
    ranker.train(was_training)
    counts = reduce_counts(loader.counts, shards.columns.counted, ranks.device)
    if not labelled:
        return Evaluation(model.compute(), None, counts, {}, {}, {})
    domains, of_reference = (
        dict(zip(domain.labels, grouped.compute(), strict=True)) if domain and grouped else {}
        for grouped in (by_domain, reference_by_domain)
    )
    return Evaluation(
        _with_domains(model.compute(), domains),
        _with_domains(reference.compute(), of_reference) if config.data.reference else None,
        counts,
        domains,
        of_reference,
        by_columns.compute() if by_columns is not None else {},
    )


def _with_domains(metrics: Metrics, domains: Mapping[str, Metrics]) -> Metrics:
    return replace(metrics, over_domains=OverDomains.of(domains)) if domains else metrics


def _show(
    about: Mapping[str, Any],
    results: Mapping[str, Metrics],
    found: Evaluation,
    warnings: Sequence[str],
) -> None:
    """Print what came of a checkpoint as tables."""
    where = f"{about['checkpoint']}, {about['split']}"
    if "predictions" in about:
        say(console(), f"{about['rows']:,} predictions in {about['predictions']} ({where})")
    if results:
        say(console(), table([_row(name, metrics) for name, metrics in results.items()], where))
    if found.domains:
        rows, title = domain_rows(found.domains, found.reference_domains)
        say(console(), table(rows, title))
        say(console(), domain_line(found.model))
        if found.reference:
            say(console(), f"reference, {domain_line(found.reference)}")
    for name, figures in found.columns.items():
        rows, which = figures.table()
        if rows:
            say(console(), table(rows, f"By {name}{which}"))
        say(console(), figures.line(name))
    for warning in warnings:
        say(console(), f"warning: {warning}")


def _row(name: str, metrics: Metrics) -> dict[str, str]:
    """A row of the table of figures."""
    shown = {
        figure.replace("_", " "): "-" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.6f}"
        for figure, value in metrics.as_dict().items()
    }
    return {"": name, **shown}


def _logits(probabilities: Tensor) -> Tensor:
    # A reference that is certain must not make its log loss infinite, so it counts as wrong once in 10^12 at worst.
    return torch.logit(probabilities, eps=1e-12)
