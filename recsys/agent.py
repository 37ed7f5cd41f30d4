"""torchrun, but that schedulers learn how a run ended: `python -m recsys.agent` and torchrun's arguments.

torchrun ends with 1 whatever its ranks end with, after a traceback of its own, and starts again even ranks that will
end alike. This one ends with the exit code of the rank that failed first, and does not start again what ended with 2:
what a person has to put right. What may go well another time ends with 75 (`recsys.errors.TEMPORARY`).
"""

import sys

from torch.distributed import run
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousError
from torch.distributed.launcher import api

from recsys.errors import TEMPORARY, UserError


class _Agent(LocalElasticAgent):
    """torchrun's agent, which has no restarts left once a rank ended with what a person has to put right."""

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result: RunResult = super()._monitor_workers(worker_group)
        if any(failure.exitcode == UserError.exit_code for failure in result.failures.values()):
            self._remaining_restarts = 0
        return result


def main() -> None:
    """Launch ranks as torchrun does, and end as they do."""
    api.LocalElasticAgent = _Agent  # type: ignore[misc]
    try:
        run.main()
    except Exception as error:
        told, code = _end(error)
        print(told, file=sys.stderr, flush=True)
        sys.exit(code)


def _end(error: Exception) -> tuple[str, int]:
    """What is to be told of an end, and its exit code.

    Raises:
        Exception: `error`, where it is of none of the ends that are known.
    """
    if isinstance(error, SignalException):
        return str(error), 128 + error.sigval
    if failed := _of_ranks(error):
        codes = [failure.exitcode for failure in failed.failures.values()]
        code = UserError.exit_code if UserError.exit_code in codes else failed.get_first_failure()[1].exitcode
        return str(failed), code if code > 0 else 128 - code  # a signal's number is negative here
    if isinstance(error, RendezvousError):
        why = ": ".join(filter(None, [type(error).__name__, str(error)]))
        return f"error: hosts did not meet ({why}); see that all --nnodes run and reach --rdzv-endpoint", TEMPORARY
    raise error


def _of_ranks(error: BaseException | None) -> ChildFailedError | None:
    """What ranks ended with, also where torchrun then failed to leave a rendezvous whose host had gone.

    That error takes the place of the ranks' own (pytorch/pytorch issue 194871).
    """
    while error is not None and not isinstance(error, ChildFailedError):
        error = error.__context__
    return error


if __name__ == "__main__":
    main()
