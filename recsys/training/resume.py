"""Where a run goes on: the newest whole checkpoint of one that was cut off, if the config is still the same."""

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from recsys.checkpoint.layout import META, PROGRESS, CheckpointError, checkpoints, read_meta
from recsys.config import Config, ConfigError, Difference, differences, load_checkpoint_config
from recsys.runtime import Ranks
from recsys.training.checkpoint import together, verified

AUTO, NEVER = "auto", "never"

_FREE = (
    "device",
    "output_dir",
    "resume",
    "rank_timeout_seconds",
    "logging.*",
    "checkpoints.*",
    "metrics.by",
    "metrics.train_auc",
    "data.reader_threads",
    "data.prefetch_batches",
)
"""What has no part in what a run computes."""

_HARMLESS = (
    *_FREE,
    "name",
    *(f"data.{key}" for key in ("train", "valid", "test", "reference", "batch_size", "eval_batch_size")),
    *(f"tables.*.{key}" for key in ("sharding", "compute_kernel", "min_partition", "init*", "max_norm", "data_type")),
    *(
        f"optimizers.*.{key}"
        for key in ("weight_decay*", "coupled_every", "max_*", "eps", "betas", "momentum", "fused")
    ),
    "optimizers.average*",
    "compute.*",
    *(f"stages.*.{key}" for key in ("epochs", "steps", "*learning_rate", "schedule*", "warmup_steps", "*_weight")),
    *(f"stages.*.{key}" for key in ("patience", "plateau*", "monitor")),
    "metrics.*",
)
"""What may change where another run is gone on with: its tensors fit, and its rows are told apart."""


def newest_whole(folder: Path, ranks: Ranks, say: Callable[[str], object]) -> Path | None:
    """The newest checkpoint in a folder whose files are what was written, None without any; a collective call.

    Those that are damaged are passed over with a warning, and so are those that would go back to a best state that is.

    Args:
        folder: of a run's checkpoints.
        ranks: this process among all.
        say: given the warnings.
    """
    # The first rank's view counts: a disk that all share may show it to others a little later.
    names = together(ranks, f"{folder} cannot be read", lambda: [path.name for path in checkpoints(folder)])[0]
    for directory in (folder / name for name in names):
        try:
            _check_whole(directory, ranks)
        except CheckpointError as error:
            say(f"warning: {directory} is passed over: {error}")
        else:
            return directory
    return None


def _check_whole(directory: Path, ranks: Ranks) -> None:
    """Verify a checkpoint, and the one that has the best state of its phase; a collective call.

    Raises:
        CheckpointError: either is not there, or damaged.
    """
    meta = verified(directory, ranks)
    if meta.best_step in (None, meta.step):
        return
    try:
        verified(directory.with_name(f"step-{meta.best_step}"), ranks)
    except CheckpointError as error:
        raise CheckpointError(f"{directory} needs the best state of its phase as well: {error}") from None


def checkpoint_to_resume(
    config: Config, ranks: Ranks, say: Callable[[str], object], *, unfinished: bool
) -> Path | None:
    """The checkpoint from which a run goes on, None if it begins anew; a collective call.

    Args:
        config: the run's; `resume` says whether and from where.
        ranks: this process among all.
        say: given warnings, and what changes where another run is gone on with.
        unfinished: whether `output_dir` holds a run that was cut off.

    Raises:
        CheckpointError: `resume` names no checkpoint that is whole, or one that holds no run's progress.
        ConfigError: the config differs from the checkpoint's; the message has each difference, and the ways out.
    """
    if config.resume == NEVER or (config.resume == AUTO and not unfinished):
        return None
    if config.resume == AUTO:
        found = newest_whole(Path(config.output_dir) / "checkpoints", ranks, say)
        if found is None:
            say(f"The run in {config.output_dir} was cut off before it had a checkpoint; it begins anew")
            return None
        _compare(found, config, _FREE, "resume=never, which begins anew and keeps what is there under another name")
        return found
    given = Path(config.resume)
    if (given / META).exists():
        _check_whole(given, ranks)
    else:
        folder = given / "checkpoints" if (given / "checkpoints").is_dir() else given
        if (found := newest_whole(folder, ranks, say)) is None:
            raise CheckpointError(
                f"resume: there is no whole checkpoint in {given}; name a run's directory, or a step-<n>"
            )
        given = found
    if not (given / PROGRESS).exists():
        raise CheckpointError(
            f"resume: {given} is of format {read_meta(given).format}, which does not hold how far its run had come; "
            "evaluate it, or begin from its weights by warm_start"
        )
    for change in _compare(given, config, _HARMLESS, "warm_start, which takes weights alone into another run"):
        say(f"{change} (since {given})")
    return given


def _compare(directory: Path, config: Config, allowed: Sequence[str], way_out: str) -> list[Difference]:
    """The differences that are allowed, those that mean nothing left out."""
    then = load_checkpoint_config(directory)
    found = list(differences(then.model_dump(mode="json"), config.model_dump(mode="json")))
    if refused := [one for one in found if not _is_among(one.path, allowed)]:
        told = "; ".join(map(str, refused))
        raise ConfigError(f"{directory} is of another config ({told}); set it back, or take {way_out}")
    return [one for one in found if not _is_among(one.path, _FREE)]


def _is_among(path: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(path, pattern) for pattern in patterns)
