"""Look at checkpoints, compare them, write one as a plain file, delete old ones.

`python -m recsys.checkpoint list FOLDER`. One process; neither TorchRec nor a process group.
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from recsys.cli import ArgumentParser, run_entry


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Read the command line and do what it asks for; the exit code is 1 where two checkpoints differ."""
    options = _parser().parse_args(arguments)

    def body() -> int | None:
        from recsys.checkpoint import tools

        code: int | None = getattr(tools, f"run_{options.command}")(options)
        return code

    run_entry(body)


def _path(text: str) -> Path:
    """A path as it is typed, `~` being the home directory."""
    return Path(os.path.expanduser(text))


def _count(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) < 2**63:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of at least 1")
    return int(text)


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="python -m recsys.checkpoint", description=__doc__.splitlines()[0], allow_abbrev=False)
    commands = parser.add_subparsers(title="what to do", required=True, metavar="WHAT", dest="command")
    common = ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print JSON instead of text")
    folder = ArgumentParser(add_help=False)
    folder.add_argument("folder", type=_path, metavar="FOLDER", help="a run's output_dir, or its checkpoints folder")
    directory = ArgumentParser(add_help=False)
    directory.add_argument("directory", type=_path, metavar="DIR", help="a directory step-<n>")

    commands.add_parser("list", parents=[common, folder], help="the checkpoints of a run")
    commands.add_parser("inspect", parents=[common, directory], help="what is in a checkpoint")
    commands.add_parser("verify", parents=[common, directory], help="whether it is what was written, all of it read")
    diff = commands.add_parser("diff", parents=[common], help="what differs between two; ends with 1 where they do")
    diff.add_argument("first", type=_path, metavar="A")
    diff.add_argument("second", type=_path, metavar="B")

    unshard = commands.add_parser("unshard", parents=[common, directory], help="the model as one safetensors file")
    unshard.add_argument("--output", type=_path, required=True, metavar="FILE", help="replaced if it is there")
    unshard.add_argument("--optimizer", action="store_true", help="with the state of optimizers")
    _add_prune(commands, [common, folder])
    return parser


def _add_prune(commands: "argparse._SubParsersAction[ArgumentParser]", parents: Sequence[ArgumentParser]) -> None:
    prune = commands.add_parser("prune", parents=parents, help="delete checkpoints, by the rule of config.checkpoints")
    prune.add_argument("--keep-last", type=_count, required=True, metavar="N", help="the newest")
    prune.add_argument("--keep-best", type=_count, default=0, metavar="K", help="the best on the valid split")
    prune.add_argument("--keep-best-by", choices=("log_loss", "auc"), default="log_loss")
    prune.add_argument("--keep-every-steps", type=_count, metavar="STEPS", help="every step that this divides")
    prune.add_argument("--yes", action="store_true", help="delete; without it, only say what would be deleted")


if __name__ == "__main__":
    main()
