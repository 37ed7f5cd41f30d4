"""torchrun, but that schedulers learn how a run ended: `python -m recsys.agent` and torchrun's arguments.

torchrun ends with 1 whatever its ranks end with, after a traceback of its own, and starts again even ranks that will
end alike. This one ends with the exit code of the rank that failed first, and does not start again what ended with 2:
what a person has to put right. What may go well another time ends with 75 (`recsys.errors.TEMPORARY`).
"""

import sys
from typing import Any, cast

from torch.distributed import DistError, run
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous import (
    RendezvousConnectionError,
    RendezvousError,
    RendezvousHandler,
    RendezvousInfo,
)
from torch.distributed.launcher import api

from recsys.cli import guard_streams
from recsys.errors import TEMPORARY, UserError
from recsys.watch import answer_within

_NOT_MET = (RendezvousError, DistError)
"""The second, of the store itself, where its host goes as hosts meet, and by `--master-addr`."""


_STORE_SECONDS, _GONE_SECONDS = 30.0, 5.0
"""For which the rendezvous is waited for, and once it has not answered: over a link that is cut it never does."""


class _Rendezvous:
    """A rendezvous whose host, or the link to it, may go while ranks are at work: they notice, and tell of it."""

    def __init__(self, handler: RendezvousHandler) -> None:
        self._handler, self._is_gone = handler, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._handler, name)

    def next_rendezvous(self) -> RendezvousInfo:
        """Meet, by a new store for the ranks.

        torchrun keeps the first one, and tells hosts that come later nothing of it: they and all others then end.
        """
        self._handler._bootstrap_store_info = None  # type: ignore[attr-defined]
        met = self._handler.next_rendezvous()
        self._is_gone = False
        return met

    def num_nodes_waiting(self) -> int:
        """How many hosts wait to join; torchrun ends the ranks where nobody can tell."""
        if not self._is_gone:
            try:
                return answer_within(_STORE_SECONDS, self._handler.num_nodes_waiting)
            except (RendezvousConnectionError, TimeoutError):
                self._is_gone = True
        return 0

    def shutdown(self) -> bool:
        """Leave for good; whether the others can know."""
        try:
            return answer_within(_GONE_SECONDS if self._is_gone else _STORE_SECONDS, self._handler.shutdown)
        except TimeoutError:
            return False


class _Agent(LocalElasticAgent):
    """torchrun's agent, which has no restarts left once a rank ended with what a person has to put right.

    Hosts of a job end as their own ranks do, also where another has gone before them.
    """

    def __init__(self, spec: WorkerSpec, *arguments: Any, **options: Any) -> None:
        spec.rdzv_handler = cast(RendezvousHandler, _Rendezvous(spec.rdzv_handler))
        super().__init__(spec, *arguments, **options)
        self._failures: dict[int, ProcessFailure] = {}

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result: RunResult = super()._monitor_workers(worker_group)
        self._failures = result.failures
        if any(failure.exitcode == UserError.exit_code for failure in self._failures.values()):
            self._remaining_restarts = 0
        return result

    def _restart_workers(self, worker_group: WorkerGroup) -> None:
        try:
            super()._restart_workers(worker_group)
        except _NOT_MET as error:
            if not self._failures:
                raise
            print(f"warning: the hosts do not meet again ({_named(error)})", file=sys.stderr)
            raise ChildFailedError(worker_group.spec.get_entrypoint_name(), self._failures) from error


def main() -> None:
    """Launch ranks as torchrun does, and end as they do."""
    guard_streams(prints_result=False)
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
    if isinstance(error, _NOT_MET):
        told = f"error: hosts did not meet ({_named(error)}); see that all --nnodes run and reach --rdzv-endpoint"
        return told, TEMPORARY
    raise error


def _named(error: Exception) -> str:
    return ": ".join(filter(None, [type(error).__name__, str(error)]))


def _of_ranks(error: BaseException | None) -> ChildFailedError | None:
    """What ranks ended with, also where torchrun then failed to leave a rendezvous whose host had gone.

    That error takes the place of the ranks' own (pytorch/pytorch issue 194871).
    """
    while error is not None and not isinstance(error, ChildFailedError):
        error = error.__context__
    return error


if __name__ == "__main__":
    main()
