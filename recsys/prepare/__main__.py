"""Write data sets as Parquet shards and vocabularies of them, and validate what a config reads.

`python -m recsys.prepare synthetic --output DIR`; `python -m recsys.prepare validate --config FILE`.
"""

import argparse
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from pydantic import ValidationError
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from recsys.cli import ArgumentParser, run_entry
from recsys.config import Config, load_config
from recsys.data.storage import DataError
from recsys.prepare import writing
from recsys.prepare.criteo import by_day, criteo_schema
from recsys.prepare.movielens import convert_movielens_1m, convert_movielens_100k
from recsys.prepare.synthetic import NUM_SURFACES, write_synthetic
from recsys.prepare.tabular import MAX_VALUES, Schema, convert_text, load_schema
from recsys.prepare.taobao import SEED, convert_taobao_themes
from recsys.terminal import Rows, say, table, without_empty

if TYPE_CHECKING:
    from recsys.prepare.validation import Finding, Report

_DRIFTS = 8
"""Of the largest that are shown."""


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Read the command line, write or examine what it asks for, tell what was written or found.

    The exit code is 2 where what the user asked for cannot be done, or data are found that cannot be used.
    """
    options = _parser().parse_args(arguments)

    def body() -> int | None:
        try:
            status: int | None = options.run(options)
        except OSError as error:
            raise DataError(" ".join(str(error).split())) from None
        return status

    run_entry(body)


def _path(text: str) -> Path:
    """A path as it is typed, `~` being the home directory: no shell expands that in `--output=~/log`."""
    return Path(os.path.expanduser(text))


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="python -m recsys.prepare", description=__doc__.splitlines()[0], allow_abbrev=False)
    commands = parser.add_subparsers(title="what to do", required=True, metavar="WHAT")
    output = ArgumentParser(add_help=False)
    output.add_argument("--output", type=_path, required=True, help="folder to write")
    _add_converters(commands, output)
    _add_synthetic(commands, output)
    _add_examiners(commands)
    return parser


def _add_converters(commands: "argparse._SubParsersAction[ArgumentParser]", output: ArgumentParser) -> None:
    replace = ArgumentParser(add_help=False)
    replace.add_argument("--overwrite", action="store_true", help="replace the data set that is there")
    text = ArgumentParser(add_help=False)
    text.add_argument(
        "--source",
        type=_path,
        nargs="+",
        required=True,
        metavar="FILE",
        help="text, also .gz, .bz2, .zst; csv: also Parquet",
    )
    text.add_argument("--skip-malformed", action="store_true", help="leave out and count rows that are wrong")
    text.add_argument(
        "--max-values",
        type=int,
        default=MAX_VALUES,
        help="different values to count for all vocabularies together, and different keys to hold",
    )

    converters = {
        "movielens-100k": (
            convert_movielens_100k,
            "MovieLens-100K",
            "ml-100k.zip, or a folder of its or RecBole's files",
        ),
        "movielens-1m": (convert_movielens_1m, "MovieLens-1M", "ml-1m.zip, or the folder it unpacks to"),
    }
    for name, (convert, title, source) in converters.items():
        public = commands.add_parser(name, parents=[output, replace], help=f"{title} from its official files")
        public.add_argument("--source", type=_path, required=True, help=source)
        public.set_defaults(run=_public, convert=convert)

    taobao = commands.add_parser(
        "taobao-themes", parents=[output, replace], help="Taobao's clicks in themes (Tianchi 9716), a domain each"
    )
    taobao.add_argument("--source", type=_path, required=True, help="folder with the CSV files of clicks and vectors")
    taobao.add_argument("--themes", type=int, required=True, metavar="N", help="the first N of the click log")
    taobao.add_argument("--seed", type=int, default=SEED, help="draws negatives and splits (default: %(default)s)")
    taobao.add_argument("--skip-malformed", action="store_true", help="leave out and count rows that are wrong")
    taobao.set_defaults(run=_taobao)

    criteo = commands.add_parser(
        "criteo",
        parents=[output, replace, text],
        help="Criteo's click logs of the Kaggle challenge or the terabyte",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    criteo.add_argument("--ids", choices=("vocabulary", "hash"), default="vocabulary")
    # Without defaults, so that one that the ids do not take is refused.
    criteo.add_argument(
        "--min-count",
        type=int,
        default=argparse.SUPPRESS,
        help="for vocabularies: rarer values share row 0 of the table (default: 10)",
    )
    criteo.add_argument(
        "--buckets", type=int, default=argparse.SUPPRESS, help="for hashes: rows of each table (default: 1000000)"
    )
    criteo.add_argument("--split", choices=("order", "last-file"), default="order", help="what is held out")
    criteo.add_argument("--valid", type=float, default=0.1, help="share of the rows before those of test")
    criteo.add_argument("--test", type=float, default=0.1, help="share of the last rows")
    criteo.add_argument("--embedding-dim", type=int, default=writing.EMBEDDING_DIM, help="that dataset.yaml says")
    criteo.set_defaults(run=_criteo)

    csv = commands.add_parser(
        "csv", parents=[output, replace, text], help="any CSV, JSON Lines or Parquet, by a schema"
    )
    csv.add_argument("--schema", type=_path, required=True, help="YAML file that says what is in the files")
    csv.set_defaults(run=lambda options: _text(options, options.source, load_schema(options.schema)))


def _add_synthetic(commands: "argparse._SubParsersAction[ArgumentParser]", output: ArgumentParser) -> None:
    synthetic = commands.add_parser(
        "synthetic",
        parents=[output],
        help="the embedded default: clicks in several domains, true probabilities known",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    synthetic.add_argument("--seed", type=int, default=1, help="draws the world and the rows")
    synthetic.add_argument("--train-rows", type=int, default=800_000)
    synthetic.add_argument("--valid-rows", type=int, default=60_000)
    synthetic.add_argument("--test-rows", type=int, default=60_000)
    synthetic.add_argument("--files", type=int, default=8, help="of each split")
    synthetic.add_argument("--row-group-rows", type=int, default=8192)
    synthetic.add_argument("--num-users", type=int, default=2_000)
    synthetic.add_argument("--num-items", type=int, default=1_000)
    synthetic.add_argument("--flat", action="store_true", help="draw what users like item by item, not by the tree")
    synthetic.add_argument("--num-domains", type=int, default=NUM_SURFACES, help="what divides the rows, unequally")
    synthetic.add_argument(
        "--conflict", type=float, default=0.0, help="of tastes between domains: 0 none, 1 opposite in every other one"
    )
    synthetic.set_defaults(run=_synthetic)


def _add_examiners(commands: "argparse._SubParsersAction[ArgumentParser]") -> None:
    config = ArgumentParser(add_help=False)
    config.add_config_arguments()
    vocabulary = commands.add_parser(
        "vocabulary", parents=[config], help="the vocabularies of a config, counted in its train split"
    )
    vocabulary.add_argument("--feature", action="append", default=[], help="only this one's; may be repeated")
    vocabulary.add_argument("--min-count", type=int, default=1, help="leave rarer values out (default: %(default)s)")
    vocabulary.add_argument("--overwrite", action="store_true", help="replace files that are there")
    vocabulary.set_defaults(run=_vocabulary)

    validate = commands.add_parser(
        "validate", parents=[config], help="check what a config's splits hold before training reads them"
    )
    validate.add_argument("--sample", type=_count, metavar="N", help="read about N rows of each split, not all")
    validate.add_argument("--json", action="store_true", help="print JSON instead of tables")
    validate.set_defaults(run=_validate)


def _public(options: argparse.Namespace) -> None:
    options.convert(options.source, options.output, overwrite=options.overwrite)
    _report(options.output)


def _taobao(options: argparse.Namespace) -> None:
    with _Passes() as passes:
        convert_taobao_themes(
            options.source,
            options.output,
            themes=options.themes,
            seed=options.seed,
            skip_malformed=options.skip_malformed,
            overwrite=options.overwrite,
            progress=passes,
        )
    _report(options.output)


def _criteo(options: argparse.Namespace) -> None:
    sources = by_day(options.source)
    try:
        schema = criteo_schema(
            sources,
            ids=options.ids,
            min_count=getattr(options, "min_count", None),
            buckets=getattr(options, "buckets", None),
            split=options.split,
            valid=options.valid,
            test=options.test,
            embedding_dim=options.embedding_dim,
        )
    except ValidationError as error:
        fault = error.errors()[0]
        option = "".join(f"--{key}: ".replace("_", "-") for key in fault["loc"])
        raise DataError(f"{option}{fault['msg'].removeprefix('Value error, ')}") from None
    _text(options, sources, schema)


def _text(options: argparse.Namespace, sources: Sequence[Path], schema: Schema) -> None:
    with _Passes() as passes:
        convert_text(
            sources,
            options.output,
            schema,
            skip_malformed=options.skip_malformed,
            overwrite=options.overwrite,
            max_values=options.max_values,
            progress=passes,
        )
    _report(options.output)


class _Passes(Progress):
    """How far each pass over the files is: a bar where there is a terminal, a line for each tenth where not."""

    def __init__(self) -> None:
        columns = (
            TextColumn("{task.description:<16}"),
            BarColumn(),
            TextColumn("{task.fields[rows]:,} rows"),
            TimeRemainingColumn(),
        )
        console = Console(soft_wrap=True)
        super().__init__(*columns, console=console, disable=not console.is_terminal)
        self._passes: dict[str, TaskID] = {}
        self._tenths = 0

    def __call__(self, what: str, rows: int, done: int, total: int) -> None:
        if what not in self._passes:
            self._passes[what] = self.add_task(what, total=total, rows=0)
            self._tenths = 0
        self.update(self._passes[what], completed=done, rows=rows)
        if self.disable and (tenths := done * 10 // max(1, total)) > self._tenths:
            self._tenths = tenths
            self.console.print(f"{what}: {tenths * 10} %, {rows:,} rows", highlight=False)


def _synthetic(options: argparse.Namespace) -> None:
    write_synthetic(
        options.output,
        seed=options.seed,
        train_rows=options.train_rows,
        valid_rows=options.valid_rows,
        test_rows=options.test_rows,
        files=options.files,
        row_group_rows=options.row_group_rows,
        num_users=options.num_users,
        num_items=options.num_items,
        hierarchy=not options.flat,
        num_domains=options.num_domains,
        conflict=options.conflict,
    )
    _report(options.output)


def _vocabulary(options: argparse.Namespace) -> None:
    from recsys.prepare.vocabularies import (
        build_vocabularies,
    )  # reads shards, and so imports torch; converters need not wait

    config = load_config(options.config, options.overrides)
    console = Console(soft_wrap=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("counting, row groups")
        built = build_vocabularies(
            config,
            options.feature,
            min_count=options.min_count,
            overwrite=options.overwrite,
            on_row_group=lambda done, total: progress.update(task, completed=done, total=total),
        )
    rows = [
        {
            "vocabulary": str(of.file),
            "features": ", ".join(of.features),
            "values": f"{of.found:,}",
            "kept": f"{of.kept:,}",
            "coverage": f"{of.coverage:.2%}",
            "table rows: has": f"{min(_table_rows(config, of.features)):,}",
            "needs": f"{of.kept + 1:,}",
        }
        for of in built
    ]
    say(console, table(rows, left=("vocabulary", "features")))


def _table_rows(config: Config, features: Iterable[str]) -> Iterator[int]:
    """Rows of each table that the features look up."""
    return (config.tables[config.features.sparse[name].table].num_embeddings for name in features)


def _count(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of at least 1")
    return int(text)


def _validate(options: argparse.Namespace) -> int:
    from recsys.prepare.validation import validate  # which imports torch

    config = load_config(options.config, options.overrides)
    progress_console = Console(stderr=True)
    with Progress(console=progress_console, transient=True, disable=not progress_console.is_terminal) as progress:
        tasks: dict[str, TaskID] = {}

        def on_row_group(split: str, done: int, total: int) -> None:
            if split not in tasks:
                tasks[split] = progress.add_task(f"{split}, row groups", total=total)
            progress.update(tasks[split], completed=done)

        report = validate(config, options.sample, on_row_group=on_row_group)
    if options.json:
        print(json.dumps({"name": config.name, "sample": options.sample, **report.as_dict()}, indent=2))
    else:
        _print_validation(report)
    return 2 if report.errors else 0


def _print_validation(report: "Report") -> None:
    console = Console(soft_wrap=True)
    splits = report.splits
    overview = [
        (name, f"{it.files:,}", f"{it.row_groups:,}", f"{it.rows:,}", f"{it.rows_read:,}", _percent(it.label_rate, 2))
        for name, it in splits.items()
    ]
    _draw(console, ("split", "files", "row groups", "rows", "read", "label rate"), overview)
    shown, train = next(iter(splits.items()), ("", None))
    sparse, dense = [], []
    for feature, it in train.sparse.items() if train else ():
        nulls = _shares(
            split.sparse[feature].null_rate if feature in split.sparse else None for split in splits.values()
        )
        ids = "-" if it.least is None else f"{it.least:,} .. {it.greatest:,}"
        length = f"{it.mean_length:.1f} ({it.longest:,})" if it.longest > 1 else "-"
        counted = " ".join(f"{share:.1%} {kind.replace('_', ' ')}" for kind, share in it.counted.items() if share)
        rows = f"{report.tables[it.table].rows:,}"
        cut = _percent(it.cut_rate or None)
        sparse.append((feature, nulls, ids, rows, f"{it.distinct:,}", length, cut, counted or "-"))
    for feature, figures in train.dense.items() if train else ():
        nulls = _shares(split.dense[feature].null_rate if feature in split.dense else None for split in splits.values())
        numbers = (f"{number:.3g}" for number in (figures.mean, figures.std, figures.least, figures.greatest))
        filled, clipped = _percent(figures.not_finite_rate or None), _percent(figures.clipped_rate or None)
        dense.append((feature, nulls, *numbers, filled, clipped))
    _draw(console, ("sparse", "nulls %", "ids", "rows", "distinct", "length", "cut", "put aside"), sparse)
    _draw(console, ("dense", "nulls %", "mean", "std", "least", "greatest", "not finite", "clipped"), dense)
    beyond = [it for it in report.drift if it.psi > it.noise]
    drift = [(it.of, it.measure, it.data, f"{it.psi:.4f}", f"< {it.noise:.4f}") for it in beyond[:_DRIFTS]]
    _draw(console, ("drift from train", "of", "in", "PSI", "sampling gives"), drift)
    if train:
        console.print(
            f"nulls: in {', '.join(splits)}; the rest of {shown}. rows: of the table. distinct: an estimate, within "
            "2 %. length: mean (most).",
            "No drift beyond what sampling gives." if not beyond else f"{len(beyond)} distributions drift.",
            highlight=False,
        )
    findings: list[tuple[str, Finding]] = [("error", it) for it in report.errors]
    findings += [("warning", it) for it in report.warnings]
    for severity, finding in findings:
        console.print(f"{severity}: {finding.message}", highlight=False, markup=False)
    console.print(f"{len(report.errors)} errors, {len(report.warnings)} warnings", highlight=False)


def _percent(share: float | None, digits: int = 1) -> str:
    return "-" if share is None else f"{share:.{digits}%}"


def _shares(shares: Iterable[float | None]) -> str:
    return " ".join("-" if share is None else f"{100 * share:.1f}" for share in shares)


def _draw(console: Console, columns: Sequence[str], cells: Sequence[Sequence[str]]) -> None:
    """Print rows with the columns that say anything; nothing where there are no rows."""
    rows: Rows = [dict(zip(columns, row, strict=True)) for row in cells]
    if rows:
        say(console, table(without_empty(rows)))


def _report(output: Path) -> None:
    """Print the splits of a data set as a table."""
    summary = writing.read_summary(output)
    assert summary is not None  # it has just been written
    rows = [
        {
            "split": split,
            "rows": f"{told['rows']:,}",
            "files": str(told["files"]),
            "label rate": "-" if told["label_rate"] is None else f"{told['label_rate']:.2%}",
        }
        for split, told in summary["splits"].items()
    ]
    console = Console(soft_wrap=True)
    say(console, table(rows))
    for by, count in summary.get("left_out", {}).items():
        console.print(f"{by}: {count:,} rows left out", highlight=False, markup=False)
    for file, count in summary.get("skipped", {}).items():
        console.print(f"{file}: {count:,} malformed rows left out", highlight=False, markup=False)
    for file in summary.get("empty", []):
        console.print(f"{file}: no rows", highlight=False, markup=False)
    console.print(f"{summary['name']} written to {output}", highlight=False, markup=False)


if __name__ == "__main__":
    main()
