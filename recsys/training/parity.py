"""An export, held against the model that it comes from before it gets its name."""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from recsys.checkpoint.layout import VOCABULARIES
from recsys.config import Config, ConfigError, load_checkpoint_config
from recsys.data.batch import Batch, Part, build_batch
from recsys.data.kinds import read_kinds
from recsys.data.order import RowSlice
from recsys.data.parquet import ParquetShards
from recsys.data.rows import Rows
from recsys.data.splits import open_splits
from recsys.model.ranker import Ranker
from recsys.prepare.synthetic import require_embedded
from recsys.runtime import once_on_each_machine, process_group
from recsys.serving.artifact import ArtifactError, add_calibration, publish, write_artifact
from recsys.serving.calibration import Method
from recsys.serving.formats import PROGRAMS, Format, Program, load_program, write_program
from recsys.serving.schema import ARROW_SCHEMA, JSON_SCHEMA, arrow_schema, json_schema, raw_types
from recsys.serving.scorer import Scorer
from recsys.serving.tables import Precision
from recsys.training.calibrating import Examples, Fitted, calibrated, effects, fit
from recsys.training.card import CARD, model_card
from recsys.training.checkpoint import load_ranker
from recsys.training.metrics import BinaryMetrics, Metrics
from recsys.training.vectors import VECTORS, vectors

FITTED_ON = "valid"
"""The split that calibrators are fitted on."""

BOUNDS: dict[Precision, float] = {"float32": 1e-6, "float16": 1e-3, "int8": 2e-2}
"""By precision of the tables, by how much a probability may differ at most."""


class Parity(NamedTuple):
    """An artefact beside the model that it comes from, on the same rows.

    Attributes:
        split: whose rows.
        rows: how many.
        max_difference: largest difference of a probability.
        mean_difference: their mean.
        model: figures of the model, None without labels; its logits calibrated, if the artefact's are.
        artifact: figures of the artefact.
        programs: by format, the largest difference of a probability of the dense part's program, before calibration.
        calibration: what calibrators were fitted on, and figures of the model's own logits and of calibrated ones on
            the same rows, as `recsys.training.calibrating.effects` has them; None without calibrators.
    """

    split: str
    rows: int
    max_difference: float
    mean_difference: float
    model: Metrics | None
    artifact: Metrics | None
    programs: Mapping[Format, float]
    calibration: Mapping[str, Any] | None = None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        figures = {"model": self.model, "artifact": self.artifact}
        told = {name: metrics.as_dict() if metrics else None for name, metrics in figures.items()}
        return {**self._asdict(), **told}


def export(
    checkpoint: Path,
    output: Path,
    *,
    tables: Precision,
    split: str | None,
    max_rows: int,
    bound: float | None,
    formats: Sequence[Format] = (),
    calibration: Method | None = None,
    calibration_rows: int = 1_000,
) -> Parity:
    """Write an artefact, and give it its name if it says what the checkpoint's model says.

    Args:
        checkpoint: of any number of ranks and any plan.
        output: the artefact's directory; nothing may be there.
        tables: precision in which the tables are kept.
        split: of the checkpoint's config, on whose rows the two are compared; None is `test`, or else `valid`.
        max_rows: how many rows are compared at least, if the split has as many: whole row groups are.
        bound: by how much a probability may differ; None is that of `BOUNDS`.
        formats: programs of the dense part that are written as well; they are held to the same bound.
        calibration: how calibrators are fitted on all rows of the valid split; None serves the logits as they are.
        calibration_rows: how many positives of it a calibrator needs at least, and how many negatives; domains of
            fewer have that of all rows.

    Raises:
        ArtifactError: something is there, the disk refuses, or a probability differs by more than the bound.
        CalibrationError: the valid split has too few rows, or the model's logits do not rise with its labels.
        CheckpointError: the checkpoint is damaged.
        ConfigError: the config has no such split, or nothing to fit calibrators on.
        DataError: as `recsys.data.parquet.ParquetShards`.
    """
    bound = BOUNDS[tables] if bound is None else bound
    config = load_checkpoint_config(checkpoint)
    split = split or ("test" if config.data.test else "valid")
    if split not in config.data.splits:
        there = ", ".join(config.data.splits)
        raise ConfigError(f"data.{split} is not set, to compare the artefact with the model on; give --split ({there})")
    if max_rows < 1:
        raise ConfigError(f"--max-rows: {max_rows} rows compare nothing; give 1 or more")
    if config.model.domain_experts is not None:
        _check_domain(config, "train without model.domain_experts")
    if calibration:
        _check_calibration(config, calibration_rows)
    written = write_artifact(checkpoint, output, tables=tables)
    try:
        with process_group("cpu") as ranks:
            once_on_each_machine(ranks, partial(require_embedded, config))
            names = dict.fromkeys([split, FITTED_ON] if calibration else [split])
            splits = open_splits(config, list(names), checkpoint / VOCABULARIES, read_kinds(checkpoint))
            ranker = load_ranker(checkpoint, config, ranks)
            fitted = None
            if calibration:
                outputs = _outputs(ranker, splits[FITTED_ON])
                rows = Examples.joined(Examples.of(logits, batch) for _, batch, logits in outputs)
                fitted = fit(rows, calibration, split=FITTED_ON, minimum=calibration_rows, domain=config.data.domain)
                add_calibration(written, fitted.calibration)
            scorer = Scorer(written)
            programs = {kind: _program(scorer, kind, written / PROGRAMS[kind]) for kind in formats}
            parity = _compare(ranker, scorer, programs, splits[split], split, max_rows, fitted)
        if not parity.max_difference <= bound:  # NaN is beyond any bound
            raise ArtifactError(
                f"the export differs from its model by {parity.max_difference:.2e} in a probability of {parity.rows:,} "
                f"{split} rows, by more than {bound:.0e}; keep the tables in a higher precision, or raise --bound"
            )
        for kind, difference in parity.programs.items():
            if not difference <= bound:
                raise ArtifactError(
                    f"--format {kind}: the program differs from the model by {difference:.2e} in a probability of "
                    f"{parity.rows:,} {split} rows, by more than {bound:.0e}; leave it out, or raise --bound"
                )
        _describe(written, checkpoint, config, scorer, splits[split], parity)
        publish(written, output, parity.as_dict())
    finally:
        shutil.rmtree(written, ignore_errors=True)  # which has its name by now, if all went well
    return parity


def _check_calibration(config: Config, minimum: int) -> None:
    if FITTED_ON not in config.data.splits:
        raise ConfigError(f"data.{FITTED_ON} is not set; calibrators are fitted on it: leave --calibration out")
    if config.data.label is None:
        raise ConfigError("data.label is null, and calibrators are fitted to labels; leave --calibration out")
    _check_domain(config, "leave --calibration out")
    if minimum < 1:
        raise ConfigError(f"--calibration-rows: {minimum} rows fit nothing; give 1 or more")


def _check_domain(config: Config, way_out: str) -> None:
    """Refuse a column of domains that raw rows do not have."""
    domain = config.data.domain
    for name, feature in config.features.sparse.items():
        if domain and (feature.column or name) == domain.column and feature.ids and feature.ids.applied:
            raise ConfigError(
                f"data.domain.column: {domain.column!r} is also read by features.sparse.{name}, whose ids were mapped "
                "before training: rows to score have raw values there, which tell no domain; give the domain a column "
                f"of its own, or {way_out}"
            )


def _describe(
    written: Path, checkpoint: Path, config: Config, scorer: Scorer, shards: ParquetShards, parity: Parity
) -> None:
    """Write into an artefact what those need who ask it: schemas of rows, test vectors and the model card."""
    columns = scorer.raw_columns
    types = raw_types(columns, shards.schemas, shards.kinds.as_dict(), shards.layout.lists)
    objects = {
        JSON_SCHEMA: json_schema(columns, types, config.name),
        VECTORS: vectors(scorer, columns, types, shards),
    }
    card = model_card(
        checkpoint,
        config,
        columns,
        types,
        tables=scorer.artifact.manifest.tables,
        parity=parity.as_dict(),
        split_rows=sum(shards.row_counts),
    )
    try:
        for name, told in objects.items():
            (written / name).write_text(json.dumps(told, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        with pa.ipc.new_stream(str(written / ARROW_SCHEMA), arrow_schema(columns, types)):
            pass  # no rows
        (written / CARD).write_text(card, encoding="utf-8")
    except OSError as error:
        raise ArtifactError(f"{written} cannot be written: {error.strerror or error}") from None


@torch.no_grad()  # not inference_mode: fbgemm has kernels of this name for a CPU under autograd alone
def _outputs(ranker: Ranker, shards: ParquetShards) -> Iterator[tuple[Rows, Batch, Tensor]]:
    """Each row group in the order of the files, its rows that have a label, and the model's logits of those."""
    ranker.eval()
    for group, count in enumerate(shards.row_counts):
        decoded = shards.read(RowSlice(group, 0, count))
        batch = build_batch(
            [Part(decoded, 0, count)], shards.layout, len(shards.columns.dense), loss_scale=1.0, pin_memory=False
        )
        yield decoded, batch, ranker(batch)[1].logits


def _compare(
    ranker: Ranker,
    scorer: Scorer,
    programs: Mapping[Format, Program],
    shards: ParquetShards,
    split: str,
    max_rows: int,
    fitted: Fitted | None,
) -> Parity:
    """Both on whole row groups, in the order of the files."""
    figures = BinaryMetrics(), BinaryMetrics()
    compared: list[Examples] = []
    rows, most, total = 0, 0.0, 0.0
    of_programs = dict.fromkeys(programs, 0.0)
    for decoded, batch, logits in _outputs(ranker, shards):
        expected = logits.double()
        if fitted is not None:
            compared.append(Examples.of(logits, batch))
            expected = torch.from_numpy(calibrated(fitted.calibration, compared[-1].logits, compared[-1].domains))
        labelled = torch.from_numpy(~np.isnan(decoded.labels)) if len(decoded.labels) else slice(None)
        found = scorer.logits(decoded, shards.layout)[labelled]
        if len(decoded.labels):
            for metrics, of_side in zip(figures, (expected, found), strict=True):
                metrics.update(of_side, batch.labels)
        differences = _differences(expected, found)
        rows += len(differences)
        total += float(differences.sum())
        most = _larger(most, differences)
        for kind, program in programs.items():
            said = program(*scorer.inputs(decoded, shards.layout))[labelled]
            of_programs[kind] = _larger(of_programs[kind], _differences(logits, said))
        if rows >= max_rows:
            break
    if not rows:
        raise ArtifactError(f"data.{split} has no row to compare the artefact with its model on; name another --split")
    has_labels = shards.columns.label is not None
    model, artifact = (metrics.compute() if has_labels else None for metrics in figures)
    effect = None if fitted is None else effects(fitted, Examples.joined(compared), shards.columns.domain)
    return Parity(split, rows, most, total / rows, model, artifact, of_programs, effect)


def _differences(expected: Tensor, found: Tensor) -> Tensor:
    """Of probabilities (N,), from logits."""
    return (expected.double().sigmoid() - found.double().sigmoid()).abs()


def _larger(most: float, differences: Tensor) -> float:
    """The largest so far; NaN stays."""
    return float(np.maximum(most, float(differences.max()))) if len(differences) else most


def _program(scorer: Scorer, kind: Format, path: Path) -> Program:
    """Write the program of a scorer's dense part, and load it."""
    config = scorer.artifact.config
    width = sum(config.embedding_dims.values())
    write_program(scorer.dense_arch, width, len(config.features.dense), kind, path)
    return load_program(kind, path)
