"""The output directory: proved usable, owned by one run at a time, an earlier run in it kept.

A run holds `run.lock` for as long as it lasts and leaves `run.json`, the marker by which it is known: only what bears
one is ever moved aside. The lock is `flock`'s: the system gives it up when the process that holds it ends, however it
ends.
"""

import errno
import fcntl
import itertools
import json
import os
import shutil
import socket
import stat
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from torch.distributed.checkpoint.api import CheckpointException

from recsys.config import ConfigError
from recsys.errors import TEMPORARY, UserError

State = Literal["fresh", "unfinished", "finished"]

FORMAT = 1
MARKER = "run.json"
LOCK = "run.lock"

WRITTEN = ("config.yaml", "plan.txt", "evaluations.jsonl", "summary.json", "tensorboard", "checkpoints")
"""Names that a run writes beside its marker and lock; in a directory without a marker they are somebody else's."""

PATIENCE_SECONDS = 5.0
"""How long a run waits for a lock: one that was killed may take a moment to end."""

_POLL_SECONDS = 0.1
_PROBE_BYTES = 1 << 16
_MAX_MARKER_BYTES = 1 << 16
_STATES: Mapping[Any, State] = {"running": "unfinished", "finished": "finished"}
_ELSEWHERE = "set output_dir to another directory"

_REMEDIES = {
    errno.ENOSPC: "free some space, or set output_dir to a directory on another disk",
    errno.EDQUOT: "free some space, or set output_dir to a directory on another disk",
    errno.EBUSY: "it is a mount point; move what is in it by hand, or set output_dir to a directory below it",
    errno.ENOSYS: "its file system has no locks; mount it with them, or set output_dir to a directory on another disk",
    errno.ENOLCK: "its file system has no locks; mount it with them, or set output_dir to a directory on another disk",
    errno.EOPNOTSUPP: "its file system has no locks; mount it with them, or set output_dir to one on another disk",
}

_OF_DISKS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.ESTALE, errno.ENODEV, errno.ENXIO}
"""Errors that only a disk raises, whatever file they name."""


class InUseError(ConfigError):
    """Another run has the directory: another time it may be free."""

    exit_code = TEMPORARY


class OutputError(UserError):
    """The output directory cannot be written to any more, or is another by now; the message names it."""


class OutputDirectory:
    """A run's output directory, its own while entered. On all ranks but the first every method does nothing.

    Entering makes the directory, proves that it can be written to, locks it and looks what is in it. If the run is
    refused before `begin`, leaving takes away what entering made.

    Args:
        path: `output_dir` of the config; a link to a directory stays one.
        enabled: whether this is the first rank.
        patience: seconds to wait while another run holds the directory.

    Raises:
        ConfigError: on entering: the directory cannot be used, another run holds it, what is in it is not a run's, or
            an earlier run in it would have to be moved aside and cannot be.

    Attributes:
        path: as given.
        state: what entering found: `fresh` where no run is, `unfinished` where one began and did not end, `finished`.
            None before, and on all ranks but the first.
    """

    def __init__(self, path: Path, *, enabled: bool = True, patience: float = PATIENCE_SECONDS) -> None:
        self.path = path
        self.state: State | None = None
        self._enabled = enabled
        self._patience = patience
        self._real = path  # where links lead: moved aside and made anew, so that they stay what they are
        self._marker: dict[str, Any] | None = None
        self._lock: int | None = None
        self._made: list[Path] = []
        self._has_begun = False

    def __enter__(self) -> Self:
        if self._enabled:
            try:
                self._open()
            except BaseException:
                self._leave()
                raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave()

    def begin(self, name: str, *, anew: bool) -> Path | None:
        """Mark the directory as that of a run which has not ended.

        Args:
            name: of the run.
            anew: whether an unfinished run is moved aside too, as a finished one always is, instead of gone on with.

        Returns:
            Where an earlier run is kept, if one was moved aside.

        Raises:
            ConfigError: the earlier run cannot be moved aside, or the directory cannot be written to.
        """
        if not self._enabled:
            return None
        kept, started = None, _now()
        if self.state == "finished" or (self.state == "unfinished" and anew):
            kept = self._move_aside()
        elif self._marker is not None:
            started = self._marker["started"]
        self._has_begun = True
        with _refusing(f"{self.path} cannot be written to"):
            self._mark(state="running", name=name, started=started, finished=None)
        return kept

    def check(self) -> None:
        """See that the directory is still the one in which this run began; costs a look at two files.

        Raises:
            OutputError: it was moved, deleted or replaced, so that what is written now would be lost or another's.
        """
        if self._lock is None:
            return
        with naming_disk(self.path):
            if not _is_at(self._lock, self.path / LOCK):
                raise OutputError(
                    f"output_dir: {self.path} is no longer the directory in which this run began: it, or its {LOCK}, "
                    "was moved, deleted or replaced meanwhile. The run ends; what it saved is where it was moved to"
                )

    @contextmanager
    def naming_failures(self) -> Iterator[None]:
        """As `naming_disk`, for all that a run writes here; the first rank tells a directory that went away as such.

        Raises:
            OutputError: the disk fails, or the directory was moved, deleted or replaced.
        """
        try:
            with naming_disk(self.path):
                yield
        except OutputError:
            self.check()
            raise

    def finish(self) -> None:
        """Mark the run as finished; the last thing that it writes.

        Raises:
            OutputError: the directory was moved, deleted or replaced, or its disk fails.
        """
        if not self._enabled:
            return
        self.check()
        assert self._marker is not None, "a run finishes that has not begun"
        with naming_disk(self.path):
            self._mark(**{**self._marker, "state": "finished", "finished": _now()})

    def _open(self) -> None:
        path = self.path
        with _refusing(f"{path} cannot be a directory"):
            if path.is_symlink() and not os.path.exists(path):
                raise FileNotFoundError(errno.ENOENT, f"it is a link to {os.readlink(path)}, which is not there")
            self._real = Path(os.path.realpath(path))
            for folder, what in (
                (os.path.expanduser("~"), "the home directory"),
                (os.getcwd(), "the working directory"),
            ):
                if Path(os.path.realpath(folder)).is_relative_to(self._real):
                    raise ConfigError(
                        f"output_dir: {path} is {what}, or one above it; name a directory of the run's own, such as "
                        "outputs/default"
                    )
        self._made = [folder for folder in (self._real, *self._real.parents) if not os.path.lexists(folder)]
        self._take(self._patience)
        with (
            _refusing(f"{path} cannot be written to"),
            tempfile.TemporaryFile(dir=self._real, prefix=".probe-") as probe,
        ):
            probe.write(bytes(_PROBE_BYTES))
            probe.flush()
            os.fsync(probe.fileno())
        with _refusing(f"{path} cannot be read"):
            self._marker = _read_marker(path)
            self.state = self._state()
        if self.state == "finished" and os.path.ismount(self._real):
            with self._moving():
                raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))

    def _take(self, patience: float) -> None:
        """Lock the directory, and say in the lock's file who holds it."""
        self._lock = _acquire(self.path, self._real, patience)
        holder = {"host": socket.gethostname(), "pid": os.getpid(), "since": _now()}
        with _refusing(f"{self.path} cannot be written to"):
            os.ftruncate(self._lock, 0)
            os.pwrite(self._lock, json.dumps(holder).encode(), 0)

    def _state(self) -> State:
        if self._marker is not None:
            return _STATES[self._marker["state"]]
        found = [name for name in WRITTEN if os.path.lexists(self.path / name)]
        if {"config.yaml", "summary.json"} <= set(found) and any(self.path.glob("checkpoints/step-*/meta.json")):
            return "finished"  # by a version that left no marker
        if found:
            raise ConfigError(
                f"output_dir: {self.path} holds {', '.join(found)}, where a run would write, but no {MARKER}, by which "
                f"a run is known (one of an older version that did not end has none); move it away, or {_ELSEWHERE}"
            )
        return "fresh"

    def _moving(self) -> AbstractContextManager[None]:
        return _refusing(f"the earlier run in {self.path} cannot be moved aside")

    def _move_aside(self) -> Path:
        """Keep the earlier run under the time at which it ended, and own a new directory in its place."""
        assert self._lock is not None
        files = (self._real / name for name in (*WRITTEN, MARKER))
        with self._moving():
            ended = max(os.lstat(file).st_mtime for file in files if os.path.lexists(file))
            kept = _new_beside(self._real, datetime.fromtimestamp(ended).strftime("%Y%m%d-%H%M%S"))
            try:
                self._real.rename(kept)  # takes the place of the empty directory
            except OSError:
                kept.rmdir()
                raise
            (kept / LOCK).unlink(missing_ok=True)
        os.close(self._lock)
        self._lock = None
        # Another run may have come first and found a fresh directory: it is not waited for, but left alone.
        self._take(patience=0.0)
        is_plain = not self.path.is_symlink() and self.path.name == self._real.name
        return self.path.with_name(kept.name) if is_plain else kept

    def _mark(self, **content: Any) -> None:
        """Replace the marker, which is there whole or not at all, also after a loss of power."""
        self._marker = {"format": FORMAT, **content, "host": socket.gethostname(), "pid": os.getpid()}
        partial = self.path / f".{MARKER}.partial"
        with partial.open("w", encoding="utf-8") as file:
            file.write(json.dumps(self._marker, indent=2) + "\n")
            file.flush()
            os.fsync(file.fileno())
        partial.replace(self.path / MARKER)
        folder = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def _leave(self) -> None:
        if not self._has_begun:
            with suppress(OSError):
                if self._lock is not None and _is_at(self._lock, self._real / LOCK):
                    (self._real / LOCK).unlink()
            for folder in self._made:
                with suppress(OSError):  # it is not empty, or was never made
                    folder.rmdir()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


@contextmanager
def naming_disk(path: Path) -> Iterator[None]:
    """Make of a failure of the disk while something is written an `OutputError`; other errors pass.

    Those that PyTorch's distributed checkpoints wrap are found: they may be another rank's, and torch tells of a full
    disk in words of its own.

    Args:
        path: what is written, for messages; any failure of a file below it counts as the disk's.
    """
    try:
        yield
    except UserError:
        raise
    except (Exception, CheckpointException) as error:
        causes = [cause for cause, _ in error.failures.values()] if isinstance(error, CheckpointException) else [error]
        told = next(filter(None, (_failure_of_disk(cause, path) for cause in causes)), None)
        if told is None:
            raise
        raise OutputError(f"output_dir: {told}") from None


def _failure_of_disk(error: BaseException, path: Path) -> str | None:
    """A failure in one line if it is a disk's."""
    if isinstance(error, OSError):
        # TensorBoard names its files in bytes.
        file = Path(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes | os.PathLike) else None
        if error.errno in _OF_DISKS or (file and file.is_relative_to(path)):
            return f"{file or path}: {_reason(error)}"
    if isinstance(error, RuntimeError) and "inline_container.cc" in str(error):  # of torch's writer of zip files
        free = "unknown"
        with suppress(OSError):
            free = f"{shutil.disk_usage(path if path.exists() else path.parent).free:,} bytes"
        text = str(error).splitlines()[0]
        return f"{path} cannot be written whole ({text}); free on its disk: {free}; {_REMEDIES[errno.ENOSPC]}"
    return None


def _reason(error: BaseException) -> str:
    """Why something cannot be used, with the way out."""
    number = error.errno if isinstance(error, OSError) else None
    text = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
    return f"{' '.join(text.split())}; {_REMEDIES.get(number or 0, _ELSEWHERE)}"


@contextmanager
def _refusing(what: str) -> Iterator[None]:
    """Make of a failure to use the directory a `ConfigError` that begins with `what`."""
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"output_dir: {what}: {_reason(error)}") from None


def _acquire(path: Path, real: Path, patience: float) -> int:
    """Lock a directory, made if it is not there; gives the descriptor of the lock's file.

    Raises:
        ConfigError: it cannot be made or written to, or has no locks.
        InUseError: it is locked until the patience ends.
    """
    file, holder = real / LOCK, "that is just taking it or leaving it"
    until = time.monotonic() + patience
    while True:
        # Each time anew: the run that holds it may move the directory aside, or take it away if it is refused.
        with _refusing(f"{path} cannot be a directory"):
            real.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack, _refusing(f"{path} cannot be written to"), suppress(FileNotFoundError):
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
            stack.callback(os.close, descriptor)
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise ValueError(f"{LOCK} is no regular file")
            if _locked(descriptor, path) and _is_at(descriptor, file):
                stack.pop_all()
                return descriptor
            holder = _holder(descriptor)
        if time.monotonic() >= until:
            raise InUseError(
                f"output_dir: {path} is in use by another run ({holder}); wait for it to end, end it, or {_ELSEWHERE}"
            )
        time.sleep(_POLL_SECONDS)


def _locked(descriptor: int, path: Path) -> bool:
    """Lock an open file unless another process has; over NFS, some servers say EACCES of that."""
    with _refusing(f"{path} cannot be locked"):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            return False
    return True


def _is_at(descriptor: int, file: Path) -> bool:
    """Whether an open file is still the one of that name."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(file))
    except (FileNotFoundError, NotADirectoryError):
        return False


def _holder(descriptor: int) -> str:
    try:
        holder = json.loads(os.pread(descriptor, _MAX_MARKER_BYTES, 0))
        return " ".join(f"process {holder['pid']} on {holder['host']}, since {holder['since']}".split())
    except (ValueError, TypeError, LookupError, RecursionError):
        return f"its {LOCK} does not say which"


def _read_marker(directory: Path) -> dict[str, Any] | None:
    """The marker in a directory, if one is there.

    Raises:
        ConfigError: what is there is none that this version knows.
    """
    file = directory / MARKER
    if not os.path.lexists(file):
        return None
    with _refusing(f"{file} is no marker of a run"):
        if not stat.S_ISREG(os.lstat(file).st_mode):
            raise ValueError("it is no regular file")
        with file.open("rb") as stream:
            marker = json.loads(stream.read(_MAX_MARKER_BYTES))
        if not isinstance(marker, dict) or "format" not in marker:
            raise ValueError("it has no format")
        if marker["format"] != FORMAT:
            raise ValueError(f"it has format {json.dumps(marker['format'])[:80]}, this version knows {FORMAT}")
        if marker.get("state") not in list(_STATES) or not isinstance(marker.get("started"), str):
            raise ValueError("it does not say when the run started and how far it came")
        return marker


def _new_beside(directory: Path, stamp: str) -> Path:
    """An empty directory beside another, named after it and the stamp, with a number if that is taken."""
    for suffix in itertools.chain([""], (f"-{number}" for number in itertools.count(2))):
        made = directory.with_name(f"{directory.name}-{stamp}{suffix}")
        with suppress(FileExistsError):
            made.mkdir()
            return made
    raise AssertionError("there are numbers without end")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
