"""Predict: `python -m recsys.predict --artifact DIR --input GLOB --output DIR [--keep COLUMN ...]`.

Or by `--checkpoint DIR [path.to.key=value ...]`.
"""

from recsys.cli import ArgumentParser, run_entry


def main() -> None:
    """Read the arguments and predict."""
    parser = ArgumentParser(
        prog="recsys.predict", description="Probabilities of raw rows, Parquet in and out; processes share the files."
    )
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--artifact", metavar="DIR", help="a directory that recsys.export wrote")
    model.add_argument("--checkpoint", metavar="DIR", help="a directory step-<n> that training wrote")
    parser.add_argument(
        "--input", required=True, action="append", metavar="GLOB", help="files; may be given repeatedly"
    )
    parser.add_argument(
        "--output", required=True, metavar="PATH_OR_URL", help="the folder for a file of each one's name"
    )
    parser.add_argument("--keep", action="append", default=[], metavar="COLUMN", help="written as well; repeatable")
    parser.add_argument("--logit", action="store_true", help="write the logit too")
    parser.add_overrides()
    arguments = parser.parse_args()

    def body() -> None:
        where, keep, logit = (arguments.input, arguments.output), arguments.keep, arguments.logit
        if arguments.artifact is None:
            from recsys.training.scoring import predict_by_checkpoint

            predict_by_checkpoint(arguments.checkpoint, *where, arguments.overrides, keep=keep, logit=logit)
            return
        from recsys.config import ConfigError
        from recsys.host_memory import keep_freed_memory
        from recsys.runtime import leave_a_core
        from recsys.serving.predicting import predict, processes_here, share_of_this_process
        from recsys.serving.scorer import Scorer

        if arguments.overrides:
            raise ConfigError(f"{arguments.overrides[0]}: an artefact's config stands as it is; give a --checkpoint")
        keep_freed_memory()
        share = share_of_this_process()
        leave_a_core(processes_here())
        rows = predict(Scorer(arguments.artifact), *where, keep=keep, logit=logit, share=share)
        print(f"{rows:,} rows predicted")

    # Images that score have neither TorchRec nor fbgemm, and an artefact needs none.
    run_entry(body, checks_versions=arguments.artifact is None, prints_result=False)


if __name__ == "__main__":
    main()
