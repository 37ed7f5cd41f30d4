"""The commands of `python -m recsys.checkpoint`: what each of them prints, and its exit code.

Each takes the options that the command line gives it.
"""

import json
from argparse import Namespace
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from recsys.checkpoint import layout, report
from recsys.checkpoint.comparing import Comparison, compare
from recsys.checkpoint.report import Contents, checkpoints_folder, list_checkpoints
from recsys.checkpoint.unsharding import model_name, model_or_optimizer_name, unshard
from recsys.config import CheckpointsConfig, shortened
from recsys.terminal import Rows, console, say, table

_MOST = 20
"""Lines of each kind of difference that are shown; JSON has all."""


def run_list(options: Namespace) -> None:
    """Print the checkpoints of a run."""
    found = list_checkpoints(checkpoints_folder(options.folder))
    if options.json:
        _print_json([one.as_dict() for one in found])
        return
    _draw([one.as_row() for one in found], left=("checkpoint", "stage", "kept as", "whole"))
    for one in found:
        if one.wrong:
            _say(f"{one.directory.name} is not whole: {one.wrong}")


def run_inspect(options: Namespace) -> None:
    """Print what is in a checkpoint."""
    contents = report.inspect(options.directory)
    if options.json:
        _print_json(contents.as_dict())
        return
    for line in _about(contents):
        _say(line)
    plan = [
        {
            "table": _printable(name),
            "sharding": _printable(of.get("sharding")),
            "ranks": _printable(of.get("ranks")),
            "shards as row, column, rows, columns": _printable(of.get("shards") or "replicated"),
        }
        for name, of in (contents.plan or {}).items()
    ]
    _draw(plan, "Plan", left=tuple(plan[0]) if plan else ())
    tensors = [
        {
            "group": one.group,
            "tensor": _printable(one.name),
            "shape": " x ".join(map(str, one.shape)) or "scalar",
            "type": one.dtype,
            "bytes": f"{one.bytes:,}",
            "parts": f"{one.parts:,}",
        }
        for one in contents.tensors
    ]
    _draw(tensors, "Tensors", left=("group", "tensor", "shape", "type"))


def _about(contents: Contents) -> Iterator[str]:
    """What a checkpoint says of itself and of its run, line by line."""
    meta = contents.meta
    yield (
        f"{contents.directory}: format {meta.format}, step {meta.step:,}, stage {_printable(meta.stage)} (step "
        f"{meta.stage_step:,} of it), written by {meta.world_size} ranks"
    )
    if meta.valid:
        yield "valid: " + ", ".join(f"{_printable(name)} {_printable(value)}" for name, value in meta.valid.items())
    if (progress := contents.progress) is None:
        yield "progress: none, so that its run cannot be resumed"
    else:
        names = ("stage", "phase", "phase_steps", "phase_epochs", "phase_over", "step", "epoch", "epoch_step", "best")
        yield "progress: " + ", ".join(f"{name} {_printable(progress.get(name))}" for name in names)
        yield f"position: {_printable(contents.position)}"
    sizes: dict[str, int] = {}
    for tensor in contents.tensors:
        sizes[tensor.group] = sizes.get(tensor.group, 0) + tensor.bytes
    yield "bytes: " + ", ".join(f"{group} {size:,}" for group, size in sizes.items())


def run_verify(options: Namespace) -> None:
    """Read a checkpoint as a whole, and tell what it was held against."""
    found = report.verify(options.directory)
    if options.json:
        _print_json({"checkpoint": str(options.directory), **vars(found)})
        return
    if found.files:
        _say(f"{options.directory}: {found.files} files have the size and SHA-256 with which they were written")
    else:
        _say(
            f"{options.directory}: format 1 has no digests of its files; no more was looked at than is said below, not "
            "its config, vocabularies and index"
        )
    _say(f"{found.tensors} tensors were read, and have the CRC-32 with which each of their parts was written")
    if found.files and found.unlisted:
        _say(f"not looked at, as meta.json does not name them: {', '.join(map(_printable, found.unlisted))}")


def run_diff(options: Namespace) -> int:
    """Print what differs between two checkpoints; 1 where anything does."""
    found = compare(options.first, options.second)
    if options.json:
        _print_json({"first": str(options.first), "second": str(options.second), **found.as_dict()})
    else:
        for line in _told(found):
            _say(line)
    return 0 if found.is_equal else 1


def _told(found: Comparison) -> Iterator[str]:
    """What differs, line by line."""
    for file, keys in found.keys.items():
        yield from _first([f"{file}: {one}" for one in keys], f"keys of {file}")
    yield from _first([f"only in A: {name}" for name in found.only_first], "tensors only in A")
    yield from _first([f"only in B: {name}" for name in found.only_second], "tensors only in B")
    shapes = [f"{name}: {then} in A, {now} in B" for name, (then, now) in found.shapes.items()]
    yield from _first(shapes, "tensors of other shapes")
    values = [
        f"{one.name}: {one.differing:,} of {one.elements:,} elements differ ({one.share:.2%}), by at most "
        f"{one.largest:.3g}"
        for one in found.values
    ]
    yield from _first(values, "tensors of other values")
    yield f"{found.equal:,} tensors are equal, {'and so is all else' if found.is_equal else 'other things differ'}"


def _first(lines: Sequence[str], of: str) -> Iterator[str]:
    yield from map(_printable, lines[:_MOST])
    if len(lines) > _MOST:
        yield f"and {len(lines) - _MOST:,} more {of}; --json has all"


def run_unshard(options: Namespace) -> None:
    """Write a checkpoint's model as one file."""
    names = model_or_optimizer_name if options.optimizer else model_name
    shapes = unshard(options.directory, options.output, names=names)
    size = options.output.stat().st_size
    if options.json:
        _print_json({"output": str(options.output), "bytes": size, "tensors": shapes})
    else:
        _say(f"{len(shapes)} tensors of {options.directory} written to {options.output} ({size:,} bytes)")


def run_prune(options: Namespace) -> None:
    """Delete the checkpoints that the options do not have kept, or tell which those are."""
    names = ("keep_last", "keep_best", "keep_best_by", "keep_every_steps")
    config = CheckpointsConfig(**{name: getattr(options, name) for name in names})
    folder = checkpoints_folder(options.folder)
    list_checkpoints(folder)  # which says where there are none
    gone = layout.superseded(folder, config)
    if options.yes:
        for directory in gone:
            layout.delete(directory)
    if options.json:
        _print_json({"deleted": options.yes, "checkpoints": [str(directory) for directory in gone]})
        return
    for directory in gone:
        _say(f"{'deleted' if options.yes else 'would delete'} {directory}")
    if not gone:
        _say("all checkpoints are kept")
    elif not options.yes:
        _say("nothing was deleted; add --yes to do so")


def _printable(what: object) -> str:
    """What a checkpoint says, as part of a line of any terminal, whoever wrote it."""
    text = what if isinstance(what, str) else json.dumps(what)
    return shortened(text.encode("unicode_escape").decode(), 300)


def _print_json(what: Any) -> None:
    print(json.dumps(what, indent=2))


def _say(line: str) -> None:
    say(console(), line)


def _draw(rows: Rows, title: str | None = None, *, left: Collection[str]) -> None:
    if rows:
        say(console(), table(rows, title, left=left))
