"""The model card of an artefact: what it is, what it was trained on, how good it is, and what it does not know.

All of it is what the config, the checkpoint and the comparison with the trainer's model say.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from recsys.checkpoint import layout
from recsys.checkpoint.layout import CheckpointMeta
from recsys.checkpoint.report import read_object
from recsys.config import Config, DenseFeatureConfig
from recsys.data.features import Columns, SparseColumn
from recsys.data.ids import BucketizedIds, DatetimeIds, HashedIds, PlainIds, VocabularyIds
from recsys.files import FileError, read_json
from recsys.model.cost import cost_report, model_name
from recsys.serving.formats import CAUTIONS, PROGRAMS
from recsys.serving.schema import RawTypes
from recsys.serving.tables import Precision
from recsys.terminal import markdown
from recsys.training.calibrating import rows_of

CARD = "README.md"
_MAX_SUMMARY = 64 << 20
_SHOWN = 60
_FIGURES = ("examples", "positives", "auc", "log_loss", "ne", "calibration")


def model_card(
    checkpoint: Path,
    config: Config,
    columns: Columns,
    types: RawTypes,
    *,
    tables: Precision,
    parity: Mapping[str, Any],
    split_rows: int,
) -> str:
    """The card in Markdown.

    Args:
        checkpoint: that was exported.
        config: of its run.
        columns: of raw rows.
        types: of raw columns.
        tables: precision in which the tables are kept.
        parity: figures of the comparison with the trainer's model, as `recsys.training.parity.Parity` has them.
        split_rows: how many rows the split has that the two were compared on.

    Raises:
        CheckpointError: the checkpoint's progress or plan cannot be read.
    """
    meta = layout.read_meta(checkpoint)
    progress = (read_object(checkpoint / layout.PROGRESS) or {}).get("progress") or {}
    plan = read_object(checkpoint / layout.PLAN) or {}
    sections = {
        f"{config.name}: model card": _identity(config, meta, tables),
        "Data": _data(config, progress, parity["split"], split_rows),
        "Columns": markdown(_columns(columns, types), left=("column", "type", "becomes", "null")),
        "Figures": _figures(checkpoint, config, meta, parity),
        "Calibration": _calibration(config, parity),
        "Beside the trainer's model": _parity(parity),
        "Cost": _cost(config),
        "Embedding plan": _plan(config, plan, meta),
        "Versions": _versions(meta),
        "Known limits": _limits(config, columns, tables, progress),
    }
    first, *others = (f"{title}\n\n{text}\n" for title, text in sections.items())
    return "# " + "\n## ".join([first, *others])


def _identity(config: Config, meta: CheckpointMeta, tables: Precision) -> str:
    features, paths = config.features, config.model.paths
    averaged = f"; the probability is the mean of those of its {len(paths)} towers" if paths else ""
    return (
        f"Gives the probability of label 1 for rows of {len(features.sparse)} sparse and {len(features.dense)} dense "
        f"features. Model: {model_name(config.model)}{averaged}. From the checkpoint of step "
        f"{meta.step:,} (stage {meta.stage}), trained on {meta.world_size} rank{'s' * (meta.world_size > 1)} with seed "
        f"{config.seed}. Its tables are kept in {tables}. `schema.json` and `schema.arrows` say what rows must look "
        "like, `vectors.json` what becomes of some."
    )


def _data(config: Config, progress: Mapping[str, Any], split: str, split_rows: int) -> str:
    data = config.data
    rows = [
        {
            "split": name,
            "files": _code(", ".join(data.patterns(name))),
            "rows": f"{split_rows:,}" if name == split else "-",
        }
        for name in data.splits
    ]
    lines = [markdown(rows, left=["files"]), ""]
    told = {
        "Label": data.label,
        "Weight of a row in the loss": data.weight,
        "Reference": data.reference,
        "Domains": f"{data.domain.column}: {_some(data.domain.labels)}" if data.domain else None,
    }
    lines += [f"- {name}: {_code(text)}" for name, text in told.items() if text]
    if data.label_null == "skip":
        lines.append("- Rows without a label were left out")
    if stages := progress.get("totals"):
        trained = [
            {
                "stage": _text(name),
                "trains": config.stages[name].trains if name in config.stages else "-",
                "steps": f"{of['steps']:,}",
                "epochs": str(of["epochs"]),
                "rows read": f"{of['examples']:,}",
            }
            for name, of in stages.items()
        ]
        lines += ["", "Trained in stages:", "", markdown(trained, left=["trains"])]
    return "\n".join(lines)


def _columns(columns: Columns, types: RawTypes) -> list[dict[str, str]]:
    domain = columns.domain and columns.domain.column

    def row(name: str, column: str, how: str, null: str) -> dict[str, str]:
        kinds = " or ".join(map(str, types[column]))
        null = "refused" if column == domain and columns.domain and columns.domain.unseen == "error" else null
        return {"feature": _text(name), "column": _code(column), "type": kinds, "becomes": how, "null": null}

    rows = [
        row(name, one.settings.column or name, f"{_of_ids(one)}, table {one.settings.table}", "no id")
        for name, one in columns.sparse.items()
    ]
    rows += [row(name, one.column or name, _of_dense(one), _null(one)) for name, one in columns.dense.items()]
    return rows + ([row("(domain)", domain, "which experts or calibrator", "of no domain")] if domain else [])


def _null(dense: DenseFeatureConfig) -> str:
    return "refused" if dense.fill is None else f"{dense.fill:g}"


def _of_ids(sparse: SparseColumn) -> str:
    match sparse.ids:
        case HashedIds(num_rows=rows, salt=salt):
            return f"hash (salt {salt}) into {rows:,} rows"
        case VocabularyIds(vocabulary=vocabulary):
            return f"vocabulary of {len(vocabulary):,} values"
        case BucketizedIds(num_rows=rows):
            return f"{rows} buckets"
        case DatetimeIds(part=part, timezone=timezone):
            return f"{part} in {timezone}"
    return f"row 0 .. {sparse.ids.num_rows - 1}"


def _of_dense(dense: DenseFeatureConfig) -> str:
    told = [f"at least {dense.minimum:g}"] if dense.minimum is not None else []
    told += [f"within {dense.clip[0]:g} .. {dense.clip[1]:g}"] if dense.clip else []
    told += ["log(1 + x)"] if dense.log1p else []
    told += [f"(x - {dense.standardize.mean:g}) / {dense.standardize.std:g}"] if dense.standardize else []
    return ", ".join(told) or "itself"


def _figures(checkpoint: Path, config: Config, meta: CheckpointMeta, parity: Mapping[str, Any]) -> str:
    found = {"valid, at the checkpoint": meta.valid}
    if (summary := _summary(checkpoint, config, meta)) is not None:
        found["test, at the run's end"] = summary.get("test")
        domains = summary.get("domains") or {}
        found |= {f"test, domain {_code(name)}": figures for name, figures in domains.items()}
    rows_of = f"{parity['rows']:,} rows of {parity['split']}"
    found[f"{rows_of}, the trainer's model{_calibrated(parity)}"] = parity["model"]
    found[f"{rows_of}, this artefact"] = parity["artifact"]
    rows = [
        {"on": name, **{figure: _figure(told.get(figure)) for figure in _FIGURES}}
        for name, told in found.items()
        if told
    ]
    if not rows:
        return "None: no rows with labels were held out."
    return markdown(rows) + "\n\n`log_loss` is in nats, `ne` that over the one of always predicting the label rate."


def _figure(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.6f}"


def _summary(checkpoint: Path, config: Config, meta: CheckpointMeta) -> Mapping[str, Any] | None:
    """What the run left beside its checkpoints at its end, if that is what this one holds."""
    try:
        found = read_json(checkpoint.resolve().parent.parent / "summary.json", _MAX_SUMMARY)
    except FileError:  # the run is not over, or the checkpoint was copied elsewhere
        return None
    is_of_it = isinstance(found, dict) and (found.get("name"), found.get("steps")) == (config.name, meta.step)
    return found if is_of_it else None


def _calibrated(parity: Mapping[str, Any]) -> str:
    """What the model is beside being the trainer's, where its logits are compared as calibrators make them."""
    return ", calibrated" if parity["calibration"] else ""


def _calibration(config: Config, parity: Mapping[str, Any]) -> str:
    figures = parity["artifact"]
    average = "Not known: the rows compared have no positive label."
    if figures and figures["calibration"] is not None:
        average = (
            f"On {parity['rows']:,} rows of {parity['split']} the probabilities add up to {figures['calibration']:.4f} "
            "times the number of positive labels; 1 is right on average."
        )
    if not (told := parity["calibration"]):
        return f"{average} No calibrator was fitted."
    split, fitted_on = parity["split"], told["fitted_on"]
    rows = [{**row, "": _code(row[""])} if number else row for number, row in enumerate(rows_of(told))]
    of_fit = ", the rows that it was fitted on, which tell nothing of others," if split == fitted_on["split"] else ""
    weighted = f", each row counted by its {_code(config.data.weight)}" if config.data.weight else ""
    return (
        f"{average} It is calibrated ({told['method']}), as fitted on {fitted_on['positives']:,} positives and "
        f"{fitted_on['negatives']:,} negatives of {fitted_on['split']}. On {split}{of_fit} that changed{weighted}:\n\n"
        f"{markdown(rows, left=['calibrator'])}"
    )


def _parity(parity: Mapping[str, Any]) -> str:
    lines = [
        f"On {parity['rows']:,} rows of {parity['split']} a probability differs by {parity['max_difference']:.1e} at "
        f"most from that of the model as it was trained{_calibrated(parity)}, by {parity['mean_difference']:.1e} on "
        "average."
    ]
    before = " before calibration" if parity["calibration"] else ""
    lines += [
        f"- {_code(PROGRAMS[kind])}: by {difference:.1e} at most; it gives logits{before}, and {CAUTIONS[kind]}"
        for kind, difference in parity["programs"].items()
    ]
    return "\n".join(lines)


def _cost(config: Config) -> str:
    report = cost_report(config)
    assumptions = "\n".join(f"- {text}" for text in report.assumptions())
    return f"{report.title()}:\n\n{markdown(report.rows())}\n\n{assumptions}"


def _plan(config: Config, plan: Mapping[str, Any], meta: CheckpointMeta) -> str:
    rows = []
    for name, table in config.tables.items():
        told = plan.get(name) or {}
        size = table.num_embeddings * table.embedding_dim * table.itemsize / 2**20
        rows.append(
            {
                "table": _text(name),
                "rows x dim": f"{table.num_embeddings:,} x {table.embedding_dim}",
                "pooling": table.pooling,
                "sharding": str(told.get("sharding", "-")),
                "kernel": str(told.get("kernel", "-")),
                "ranks": " ".join(map(str, told.get("ranks", ()))) or "-",
                "MiB": f"{size:,.2f}",
            }
        )
    ranks = f"{meta.world_size} rank{'s' * (meta.world_size > 1)}"
    drawn = markdown(rows, left=("pooling", "sharding", "kernel", "ranks"))
    return f"Where the tables were in training, on {ranks}; here each of them is whole.\n\n{drawn}"


def _versions(meta: CheckpointMeta) -> str:
    rows = [{"": name, "version": str(told)} for name, told in sorted(meta.versions.items())]
    return markdown(rows, left=["version"]) if rows else "The checkpoint does not say."


def _limits(config: Config, columns: Columns, tables: Precision, progress: Mapping[str, Any]) -> str:
    lines = [f"- {_text(name)}: {limit}" for name, sparse in columns.sparse.items() for limit in _limits_of(sparse)]
    shared = {name: [key for key, of in config.features.sparse.items() if of.table == name] for name in config.tables}
    lines += [f"- {_text(name)}: one table of {', '.join(of)}" for name, of in shared.items() if len(of) > 1]
    refusing = [name for name, dense in config.features.dense.items() if dense.fill is None]
    lines += [f"- A null is refused in {', '.join(map(_text, refusing))}"] if refusing else []
    if config.data.domain and config.data.domain.unseen == "error":
        lines.append(f"- No other domains than {_some(config.data.domain.labels)} are known")
    if tables != "float32":
        lines.append(f"- Embeddings are rounded to {tables}")
    for split, kinds in (progress.get("counts") or {}).items():
        for kind, features in kinds.items():
            told = ", ".join(f"{_text(name)} {number:,}" for name, number in features.items() if number)
            lines += [f"- Values that were {kind} in the rows read of {split}: {told}"] if told else []
    return "\n".join(lines) or "None that the config or the data tell of."


def _limits_of(sparse: SparseColumn) -> list[str]:
    settings = sparse.settings
    found: list[str] = []
    match sparse.ids:
        case VocabularyIds(vocabulary=vocabulary, unknown_is_row_0=row_0):
            all_others = "share row 0" if row_0 else "count as none"
            found.append(f"{len(vocabulary):,} values are known, all others {all_others}")
        case HashedIds(num_rows=rows):
            found.append(f"two given values meet in one of {rows:,} rows with probability {1 / rows:.1e}")
        case PlainIds(num_rows=rows, out_of_range=policy):
            becomes = {"error": "refused", "hash": "hashed into all rows", "clip_to_oov": "row 0"}[policy]
            found.append(f"ids beyond 0 .. {rows - 1:,} are {becomes}")
    if settings.max_length is not None:
        found.append(f"of lists, the {settings.keep} {settings.max_length:,} values count")
    return found


def _some(names: Sequence[str]) -> str:
    """Names of which there may be many."""
    more = f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
    return ", ".join(map(_text, names[:_SHOWN])) + more


def _text(value: str) -> str:
    """A text in a line."""
    return " ".join(value.split())


def _code(value: str) -> str:
    return f"`{_text(value).replace('`', chr(39))}`"
