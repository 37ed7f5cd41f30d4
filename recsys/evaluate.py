"""Evaluate a checkpoint: `python -m recsys.evaluate --checkpoint DIR [--split test] [path.to.key=value ...]`."""

from recsys.cli import ArgumentParser, run_entry


def main() -> None:
    """Read the arguments and evaluate."""
    parser = ArgumentParser(
        prog="recsys.evaluate", description="Figures of a checkpoint on a split, on any number of ranks."
    )
    parser.add_argument("--checkpoint", required=True, help="a directory step-<n> that training wrote")
    parser.add_argument("--split", default="test", choices=("train", "valid", "test"))
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument(
        "--predictions", metavar="PATH_OR_URL", help="a new directory for label and probability of each row, as Parquet"
    )
    parser.add_argument(
        "--by", metavar="COLUMN", action="append", default=[], help="figures of the rows of each value, and their GAUC"
    )
    parser.add_overrides()
    arguments = parser.parse_args()

    def body() -> None:
        from recsys.training.evaluation import evaluate_checkpoint

        evaluate_checkpoint(
            arguments.checkpoint,
            arguments.split,
            arguments.overrides,
            as_json=arguments.json,
            predictions=arguments.predictions,
            by=arguments.by,
        )

    run_entry(body)


if __name__ == "__main__":
    main()
