"""Predict: `python -m recsys.predict --artifact DIR --input GLOB --output DIR [--keep COLUMN ...]`."""

from recsys.cli import ArgumentParser, run_entry


def main() -> None:
    """Read the arguments and predict."""
    parser = ArgumentParser(
        prog="recsys.predict", description="Probabilities of raw rows, Parquet in and out; processes share the files."
    )
    parser.add_argument("--artifact", required=True, help="a directory that recsys.export wrote")
    parser.add_argument(
        "--input", required=True, action="append", metavar="GLOB", help="files; may be given repeatedly"
    )
    parser.add_argument(
        "--output", required=True, metavar="PATH_OR_URL", help="the folder for a file of each one's name"
    )
    parser.add_argument("--keep", action="append", default=[], metavar="COLUMN", help="written as well; repeatable")
    parser.add_argument("--logit", action="store_true", help="write the logit too")
    arguments = parser.parse_args()

    def body() -> None:
        from recsys.serving.predicting import predict, share_of_this_process
        from recsys.serving.scorer import Scorer

        rows = predict(
            Scorer(arguments.artifact),
            arguments.input,
            arguments.output,
            keep=arguments.keep,
            logit=arguments.logit,
            share=share_of_this_process(),
        )
        print(f"{rows:,} rows predicted")

    run_entry(body)


if __name__ == "__main__":
    main()
