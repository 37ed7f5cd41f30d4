"""How an entry starts, fails and ends. Imports neither torch nor TorchRec, which `run_entry` checks first."""

import argparse
import contextlib
import io
import logging
import os
import re
import select
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import Any, NoReturn, cast

from recsys import watch
from recsys.config import DEFAULT_CONFIG
from recsys.errors import Stopped, UserError, report_failure
from recsys.lifetime import end_with_launcher
from recsys.versions import VersionError, check_versions

_ERROR_KEY, _STOPPED_KEY = "hilorec/error", "hilorec/stopped"
_PATIENCE_SECONDS = 5.0
_CAUSE = 300  # characters of a failure's text in a line about another
_COMMUNICATION = re.compile(r"gloo|nccl|connect|time(d|[ -])?out|socket|store|peer|pipe", re.IGNORECASE)


class ArgumentParser(argparse.ArgumentParser):
    """Options and overrides in any order: `seed=3 --config c.yaml data.batch_size=64`."""

    _is_intermixing = False

    def parse_known_args(  # type: ignore[override]
        self, args: Any = None, namespace: Any = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """As `argparse` has it, positional arguments before, between and behind the options."""
        if self._is_intermixing or self._subparsers is not None:
            return super().parse_known_args(args, namespace)
        self._is_intermixing = True
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self._is_intermixing = False

    def print_help(self, file: Any = None) -> None:
        """Print it as a result, after which `argparse` ends the process."""
        if file is None:
            run_entry(super().print_help, checks_versions=False)
        super().print_help(file)

    def error(self, message: str) -> NoReturn:
        """End as `argparse` does, with exit code 2 also where nobody takes stderr."""
        guard_streams(prints_result=True)
        super().error(message)

    def add_config_arguments(self) -> None:
        """Add `--config`, the default one unless it is given, and overrides of its keys."""
        self.add_argument("--config", default=DEFAULT_CONFIG, help="YAML file (default: %(default)s)")
        self.add_overrides()

    def add_overrides(self) -> None:
        """Add overrides of a config's keys."""
        help_ = "settings that replace the config's; they may stand before, between and behind the options"
        self.add_argument("overrides", nargs="*", metavar="path.to.key=value", help=help_)


def run_entry(body: Callable[[], int | None], *, checks_versions: bool = True, prints_result: bool = True) -> NoReturn:
    """Run a command's body and end the process, with the exit code that the body returns, if any.

    What the user can put right ends as one `error:` line on one rank and exit code 2, or 75 where it may go well when
    tried again; a rank that fails because another did stays silent and exits with 1; any other failure shows its
    traceback. `Stopped` ends as one line of the first rank and the exit code that it holds. The body imports what needs
    torch itself, so that a mismatched installation is explained before its import fails. A rank does not outlive its
    launcher.

    Args:
        body: the command.
        checks_versions: whether a mismatched installation ends the command; the doctor looks for itself.
        prints_result: whether what it prints is what it is for; else it goes on when nobody takes that any more.
    """
    quiet_libraries()
    guard_streams(prints_result)
    code = 0
    try:
        end_with_launcher()
        if checks_versions:
            check_versions()
        code = body() or 0
        sys.stdout.flush()
    except Stopped as stop:
        code = stop.exit_code
        _tell_once(str(stop))
    except (UserError, VersionError) as error:
        code = error.exit_code if isinstance(error, UserError) else UserError.exit_code
        if watch.current is not None:
            watch.current.fail(error)
        if _is_ours_to_tell(caused_by_a_peer=False):
            report_failure(f"error: {error}")
    except KeyboardInterrupt:
        code = 130
    except Exception:
        code = 1
        _tell_failure()
    try:
        for stream in filter(None, (sys.stdout, sys.stderr)):  # one that was closed at the start is None
            stream.flush()
    except (OSError, ValueError):
        if not code:
            raise
    if code and _process_group_is_up():
        # Tearing down a process group that other ranks have left can hang; the launcher ends them.
        os._exit(code)
    sys.exit(code)


def _have_streams() -> None:
    """Give a process that has no stdout or stderr, or whose own is closed, ones that take all and keep nothing.

    Else the next file that is opened gets their number, and whatever libraries print.
    """
    while (number := os.open(os.devnull, os.O_RDWR)) < 3:
        pass
    os.close(number)
    for name in ("stdout", "stderr"):
        if getattr(getattr(sys, name), "closed", getattr(sys, name) is None):
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115  # for as long as the process


class _Guarded(io.RawIOBase):
    """The file of stdout or stderr, which fails once at most.

    Args:
        stream: the stream itself, which is kept: else its file is closed, and what is written goes to the next one that
            is opened and gets its number.
        lost: is told of what the disk or the reader does not take; unless it raises, that and all that follows is lost.
    """

    def __init__(self, stream: io.TextIOWrapper, lost: Callable[[OSError], None]) -> None:
        self._stream, self._number, self._lost, self._is_lost = stream, stream.fileno(), lost, False

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._number

    def isatty(self) -> bool:
        return os.isatty(self._number)

    def write(self, data: Any) -> int:
        """Write all of it: a text without a buffer does not look how much was."""
        left = memoryview(data)
        while len(left) and not self._is_lost:
            try:
                left = left[os.write(self._number, left) :]
            except BlockingIOError:
                select.select([], [self._number], [])
            except OSError as error:
                self._is_lost = True  # and what is left in a buffer does not fail once more
                self._lost(error)
        return len(data)


def guard_streams(prints_result: bool) -> None:
    """Have what stdout does not take end the command or be warned of, and what stderr does not take be lost.

    Args:
        prints_result: as of `run_entry`.
    """
    _have_streams()
    # A terminal that lacks a letter is no reason to fail.
    sys.stdout = _guarded(sys.stdout, _refuse if prints_result else _warn, errors="replace")
    sys.stderr = _guarded(sys.stderr, lambda error: None)


def _refuse(error: OSError) -> NoReturn:
    raise UserError(f"stdout takes no more ({error.strerror})") from error


def _warn(error: OSError) -> None:
    told = f"warning: stdout takes no more ({error.strerror}); the run goes on, and its files are whole"
    print(told, file=sys.stderr, flush=True)


def _guarded(stream: Any, lost: Callable[[OSError], None], errors: str | None = None) -> Any:
    """The stream, guarded if it is a file and not, as in a program that calls this one, a text in memory or zipped."""
    if not isinstance(stream, io.TextIOWrapper):
        return stream
    raw = getattr(stream.buffer, "raw", stream.buffer)
    if not isinstance(raw, io.FileIO | _Guarded):
        stream.reconfigure(errors=errors)
        return stream
    with contextlib.suppress(OSError):
        stream.flush()  # what that program has printed comes first
    guard = _Guarded(stream, lost)
    return io.TextIOWrapper(
        cast(Any, guard if stream.write_through else io.BufferedWriter(guard)),  # as Python does if PYTHONUNBUFFERED
        encoding=stream.encoding,
        errors=errors or stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


def quiet_libraries() -> None:
    """Silence what torch and TorchRec say of their own insides and a user can do nothing about; errors still show."""
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch(rec)?\.")
    # Warnings that torch attributes to its caller, so that only their text tells them.
    warnings.filterwarnings("ignore", message="Please use DTensor instead")
    warnings.filterwarnings("ignore", message=".*an autograd kernel was not registered")
    for said in ("`_get_pg_default_device` will be", "Multiple backends are registered with this ProcessGroup"):
        warnings.filterwarnings("ignore", message=said)  # by torch 2.11
    warnings.filterwarnings("ignore", message="TBE B200 optimization")  # by fbgemm 1.6, of any GPU
    warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores")  # by Inductor; compute.tf32 says it
    inductor = "torch._inductor.select_algorithm"  # of 2.11, of any product that it might have chosen otherwise
    for name in ("torchrec", "torch.distributed", "torch.fx._symbolic_trace", inductor, "fbgemm_gpu"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # What TensorBoard's writing thread fails of is raised by the next call that records something.
    hook = threading.excepthook
    threading.excepthook = lambda failure: (
        None if type(failure.thread).__name__ == "_AsyncWriterThread" else hook(failure)
    )
    # Through the root logger: TorchRec of every data-parallel table, and fbgemm 1.6 of itself.
    noise = ("Sharding spec not found", "_fbgemm_torch_compat_table has no entry")
    logging.getLogger().addFilter(lambda record: not any(text in record.getMessage() for text in noise))


def _tell_failure() -> None:
    """Report the exception under way, or, where it is but what the loss of another rank comes to, that loss."""
    trace, error = traceback.format_exc().rstrip(), sys.exc_info()[1]
    cause = " ".join(str(error).split())[:_CAUSE]
    watching = watch.current
    if watching is not None and error is not None:
        # A launcher that sees another rank end ends this one, from which the others have yet to hear that it is there.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        watching.fail(error)
    if _is_ours_to_tell(caused_by_a_peer=True):
        lost = watching.blame(cause) if watching is not None and _COMMUNICATION.search(cause) else None
        if lost != "":
            report_failure(lost or trace)
        if lost is not None and watching is not None:
            _print_at_once(f"{watching}\n{trace}")
            watching.told()
    elif watching is not None and watching.is_condemned:
        _print_at_once(f"{watching}\n{trace}")
        watching.await_told()


def _print_at_once(text: str) -> None:
    print(f"{text}\n", end="", file=sys.stderr, flush=True)  # in one piece: ranks may share their stderr


def _tell_once(text: str) -> None:
    """Have the first rank print a line that holds for all; the others wait until it has, as their end may end it."""
    if not _process_group_is_up():
        report_failure(text)
        return
    from torch import distributed as dist

    store = dist.distributed_c10d._get_default_store()
    if dist.get_rank() == 0:
        report_failure(text)
        # A launcher that sees another rank end ends this one, whose exit code is to be the one that it reports.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        store.set(_STOPPED_KEY, "")
    else:
        with contextlib.suppress(dist.DistError):  # the first rank, or the store, is gone: so is who would wait
            store.wait([_STOPPED_KEY], timedelta(seconds=_PATIENCE_SECONDS))


def _process_group_is_up() -> bool:
    return "torch" in sys.modules and sys.modules["torch"].distributed.is_initialized()


def _is_ours_to_tell(*, caused_by_a_peer: bool) -> bool:
    """Whether this rank is the one to report its failure; the others wait a moment for the launcher to end them.

    They must not end first: the launcher would end the one that reports before it has done so.

    Args:
        caused_by_a_peer: whether it may be but the consequence of another rank's failure, such as a connection that
            broke, which that rank is then about to report itself.
    """
    if not _process_group_is_up():
        # What goes wrong this early goes wrong alike on every rank. A rank that is still there after the wait is alone
        # with its failure, or on another machine than the first and not ended with it: the first of each tells.
        if (os.environ.get("RANK") or "0") != "0":  # which may be no number, as the failure then says
            is_first_here = (os.environ.get("LOCAL_RANK") or "0") == "0"
            time.sleep(_PATIENCE_SECONDS * (1 if is_first_here else 2))
        return True
    from torch import distributed as dist

    mine = str(dist.get_rank())

    def claimed() -> bool:
        store = dist.distributed_c10d._get_default_store()
        until = time.monotonic() + (_PATIENCE_SECONDS if caused_by_a_peer else 0.0)
        while time.monotonic() < until and not store.check([_ERROR_KEY]):
            time.sleep(0.1)
        return bool(store.compare_set(_ERROR_KEY, "", mine).decode() == mine)

    try:
        is_ours = watch.answer_within(2 * _PATIENCE_SECONDS, claimed)
    except Exception:  # the store went down with its host, or its link: better a second report than none
        return True
    if not is_ours:
        time.sleep(_PATIENCE_SECONDS)
    return is_ours
