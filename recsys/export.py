"""Export a checkpoint: `python -m recsys.export --checkpoint DIR --output DIR [--tables int8]`."""

import json
import os
import re
from pathlib import Path

from recsys.cli import ArgumentParser, run_entry


def main() -> None:
    """Read the arguments and export."""
    parser = ArgumentParser(prog="recsys.export", description="Write what a checkpoint's model needs to answer.")
    parser.add_argument("--checkpoint", required=True, help="a directory step-<n> that training wrote")
    parser.add_argument("--output", required=True, help="the artefact's directory; nothing may be there")
    parser.add_argument(
        "--tables",
        default="float32",
        choices=("float32", "float16", "int8"),
        help="precision in which the embedding tables are kept (default: %(default)s)",
    )
    parser.add_argument(
        "--format",
        action="append",
        default=[],
        choices=("torch-export", "aoti"),
        help="write the dense part as a program for other runtimes too; may be given repeatedly",
    )
    parser.add_argument("--split", choices=("train", "valid", "test"), help="compared on (default: test, else valid)")
    parser.add_argument("--max-rows", type=int, default=100_000, help="compared at least (default: %(default)s)")
    parser.add_argument("--bound", type=float, help="by which a probability may differ (1e-6, 1e-3 or 2e-2)")
    parser.add_argument(
        "--calibration",
        default="none",
        choices=("none", "platt", "isotonic"),
        help="make the logits' probabilities those of the valid split (default: %(default)s)",
    )
    parser.add_argument(
        "--calibration-rows",
        type=int,
        default=1_000,
        help="positives that a calibrator needs, and as many negatives; domains with fewer have that of all rows "
        "(default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a sentence")
    arguments = parser.parse_args()

    def body() -> None:
        from recsys.config import ConfigError
        from recsys.serving.formats import CAUTIONS, PROGRAMS
        from recsys.terminal import console, say, table
        from recsys.training.calibrating import rows_of
        from recsys.training.parity import export

        if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", arguments.output):
            raise ConfigError("--output is a URL, and an artefact is written to a disk; copy it there afterwards")
        if os.environ.get("WORLD_SIZE", "1") != "1":
            raise ConfigError("recsys.export runs in one process; start it without torchrun")
        output = Path(os.path.expanduser(arguments.output))
        parity = export(
            Path(os.path.expanduser(arguments.checkpoint)),
            output,
            tables=arguments.tables,
            split=arguments.split,
            max_rows=arguments.max_rows,
            bound=arguments.bound,
            formats=list(dict.fromkeys(arguments.format)),
            calibration=None if arguments.calibration == "none" else arguments.calibration,
            calibration_rows=arguments.calibration_rows,
        )
        if arguments.json:
            print(json.dumps({"artifact": str(output), **parity.as_dict()}, indent=2))
            return
        print(f"Written: {output}")
        model = "calibrated model" if parity.calibration else "model"
        print(
            f"Its probabilities are the {model}'s on {parity.rows:,} {parity.split} rows within "
            f"{parity.max_difference:.1e}, {parity.mean_difference:.1e} on average"
        )
        if parity.model and parity.artifact:
            before, after = parity.model.as_dict(), parity.artifact.as_dict()
            changes = [
                f"{figure.replace('_', ' ')} {before[figure]:.6f} -> {after[figure]:.6f}"
                for figure in ("auc", "log_loss", "calibration")
                if before[figure] is not None
            ]
            print(f"From the {model} to the artefact: {', '.join(changes)}")
        for kind, difference in parity.programs.items():
            print(f"{PROGRAMS[kind]}: within {difference:.1e}; it {CAUTIONS[kind]}")
        if parity.calibration:
            told = parity.calibration
            title = f"{told['method']} calibration, fitted on {told['fitted_on']['split']}, on {parity.split}"
            say(console(), table(rows_of(told), title, left=("", "calibrator")))

    run_entry(body)


if __name__ == "__main__":
    main()
