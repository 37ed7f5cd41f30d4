"""`python -m faults [--kills N] [--seed N] [--folder FOLDER] [--report [STEM]]`, with tests/ on the path."""

import argparse
import signal
import sys
from pathlib import Path

from faults.harness import Workshop, trials
from faults.report import report

ROOT = Path(__file__).parents[2]


def main() -> int:
    """Carry out what is not done yet, and write the page if that is asked for; 1 if there is a fault."""
    parser = argparse.ArgumentParser(prog="python -m faults", description="Kill runs and hold what they end with.")
    parser.add_argument("--kills", type=int, default=200, help="how many in all (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="by which trials are drawn (default: %(default)s)")
    parser.add_argument("--folder", type=Path, default=ROOT / "outputs" / "faults", help="holds what is done so far")
    parser.add_argument(
        "--report",
        type=Path,
        nargs="?",
        const=ROOT / "benchmarks" / "results" / "faults",
        metavar="STEM",
        help="write STEM.md and STEM.jsonl (default: %(const)s)",
    )
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was launched is ended, too
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # ignored in the background of a shell, and by all it starts
    workshop = Workshop(options.folder, options.seed)
    for plan, outcome in trials(workshop, options.kills):
        made = sum(len(line["kills"]) for line in workshop.lines("trial"))
        sizes = "-".join(map(str, plan.world_sizes))
        killed = ", ".join(f"{kill['by']} {kill['to']} ({kill['moment']})" for kill in outcome.kills) or "not killed"
        print(f"{made:>4} trial {plan.number}: {plan.launcher} {sizes}: {killed}: {outcome.seconds:.0f} s", flush=True)
        if faults := outcome.faults():
            print(f"     FAULT {', '.join(faults)}: see {workshop.folder}/trial-{plan.number}", flush=True)
    done = workshop.lines("trial")
    if options.report:
        command = f"make test-faults ARGS='--kills {options.kills} --seed {options.seed} --report'"
        report(options.report, done, workshop.lines("reference"), options.seed, command)
    return 1 if any(line["faults"] for line in done) else 0


if __name__ == "__main__":
    sys.exit(main())
