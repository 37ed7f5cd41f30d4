"""Steps without a model, as torchrun and TorchX run them: `steps.py FOLDER [grace]` ends when a signal asks it to.

Each rank leaves its process id in FOLDER/<attempt>-<rank>.pid once it takes steps, and what it saved in <rank>.saved.
"""

import os
import sys
import time
from pathlib import Path

from recsys.cli import run_entry


def steps() -> None:
    from recsys.errors import Stopped
    from recsys.runtime import process_group
    from recsys.training.signals import Agreement, StopRequest

    folder, grace = Path(sys.argv[1]), float(sys.argv[2]) if len(sys.argv) > 2 else 20.0
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    with process_group("cpu") as ranks, StopRequest(grace) as stop, Agreement(ranks) as agreement:
        (folder / f"{attempt}-{ranks.rank}.part").write_text(str(os.getpid()))
        (folder / f"{attempt}-{ranks.rank}.part").rename(folder / f"{attempt}-{ranks.rank}.pid")
        step = 0
        while True:
            step += 1
            time.sleep(0.01)
            agreed = agreement.exchange(stop.signal, save=False)
            if agreed.stop is not None:
                while (folder / "slow").exists():  # as a save that does not end
                    time.sleep(0.01)
                (folder / f"{ranks.rank}.saved").write_text(f"{agreed.stop.name} {step}")
                raise Stopped(agreed.stop, step)


if __name__ == "__main__":
    run_entry(steps)
