"""How an entry starts, fails and ends. Imports neither torch nor TorchRec, which `run_entry` checks first."""

import logging
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from typing import NoReturn

from recsys.config import UserError
from recsys.versions import VersionError, check_versions

_ERROR_KEY = "hilorec/error"


def run_entry(body: Callable[[], None]) -> NoReturn:
    """Run a command's body and end the process.

    What the user can put right ends as one `error:` line on one rank and exit code 2; a rank that fails because another
    did stays silent and exits with 1; any other failure shows its traceback. The body imports what needs torch itself,
    so that a mismatched installation is explained before its import fails.
    """
    quiet_libraries()
    code = 0
    try:
        check_versions()
        body()
    except (UserError, VersionError) as error:
        code = 2
        if _first_to_fail():
            print(f"error: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        code = 130
    except Exception:
        code = 1
        if _first_to_fail(patience_seconds=3.0):
            traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    if code and _process_group_is_up():
        # Tearing down a process group that other ranks have left can hang; the launcher ends them.
        os._exit(code)
    sys.exit(code)


def quiet_libraries() -> None:
    """Silence what torch and TorchRec say of their own insides and a user can do nothing about; errors still show."""
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch(rec)?\.")
    # Warnings that torch attributes to its caller, so that only their text tells them.
    warnings.filterwarnings("ignore", message="Please use DTensor instead")
    warnings.filterwarnings("ignore", message=".*an autograd kernel was not registered")
    for name in ("torchrec", "torch.distributed", "torch.fx._symbolic_trace", "fbgemm_gpu"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # TorchRec says this of every data-parallel table, through the root logger.
    logging.getLogger().addFilter(lambda record: not record.getMessage().startswith("Sharding spec not found"))


def _process_group_is_up() -> bool:
    return "torch" in sys.modules and sys.modules["torch"].distributed.is_initialized()


def _first_to_fail(patience_seconds: float = 0.0) -> bool:
    """Whether this rank's failure is the one to report.

    A connection that breaks because a peer failed is noticed within moments of the peer's own report, hence the wait.
    """
    if not _process_group_is_up():
        return int(os.environ.get("LOCAL_RANK", 0)) == 0
    from torch import distributed as dist

    mine = str(dist.get_rank())
    try:
        store = dist.distributed_c10d._get_default_store()
        until = time.monotonic() + patience_seconds
        while time.monotonic() < until:
            if store.check([_ERROR_KEY]):
                return False
            time.sleep(0.1)
        return bool(store.compare_set(_ERROR_KEY, "", mine).decode() == mine)
    except Exception:  # the store went down with its host: better a second report than none
        return True
