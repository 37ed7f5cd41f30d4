"""What ends a command early with one line, and where that is told."""

import json
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import ClassVar

TEMPORARY = os.EX_TEMPFAIL
"""Exit code 75 of what may go well when it is tried again, as sysexits.h has it."""


class UserError(ValueError):
    """Something that the user can put right; the message names the thing and the way out, and is all that is shown.

    Attributes:
        exit_code: 2, or `TEMPORARY` where nothing needs to be put right before it is tried again.
    """

    exit_code: ClassVar[int] = 2


class Stopped(Exception):
    """A run that a signal asked to stop has saved and ends; raised on every rank, told by the first.

    Args:
        by: the signal.
        step: of the run, as saved.

    Attributes:
        exit_code: 128 + the signal's number, such as 143 for SIGTERM and 130 for SIGINT.
    """

    def __init__(self, by: signal.Signals, step: int) -> None:
        super().__init__(f"stopped by {by.name} at step {step}; run the same command to go on")
        self.exit_code = 128 + by


_LOST = "told_of_lost_store"


def is_first_here_to_tell() -> bool:
    """Whether this rank is to tell, for all that the same launcher started here, that the store is lost.

    The store is where ranks agree who tells of all else. By torchrun they share a folder for each attempt, that of the
    folders in which each leaves its failure; where there is none, every rank tells.
    """
    folder = Path(os.environ.get("TORCHELASTIC_ERROR_FILE", "")).parent
    if "TORCHELASTIC_RUN_ID" not in os.environ or folder.name != os.environ.get("LOCAL_RANK"):
        return True
    try:
        (folder.parent / _LOST).touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:  # better a second report than none
        pass
    return True


def report_failure(text: str) -> None:
    """Print a failure, and leave it where torchrun and TorchX look for the cause that their own reports name.

    Where nobody listens or a disk is full it goes untold: its process is to end nonetheless.
    """
    with suppress(OSError, ValueError):  # ValueError: of a stream that is closed
        print(f"{text}\n", end="", file=sys.stderr, flush=True)  # in one piece: ranks may share their stderr
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        cause = {"message": text, "extraInfo": {"py_callstack": text, "timestamp": str(int(time.time()))}}
        with suppress(OSError):
            Path(path).write_text(json.dumps({"message": cause}), encoding="utf-8")
