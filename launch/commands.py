"""TorchX's commands with our Slurm scheduler, whose refusals end in one line; entry points of `torchx.cli.cmds`."""

import argparse
import sys
import threading
from typing import NoReturn

from torchx import schedulers
from torchx.cli import cmd_cancel, cmd_describe, cmd_list, cmd_log, cmd_run, cmd_status
from torchx.runner import Runner
from torchx.util.types import to_dict

from launch import slurm

# A group `torchx.schedulers` of ours would take the place of all of TorchX's schedulers, in the order of the alphabet,
# the first of which TorchX takes where no -s says which.
schedulers.DEFAULT_SCHEDULER_MODULES["slurm"] = slurm.__name__


class _Command:
    """A command that says in one `error:` line what was refused, and ends with exit code 2."""

    def run(self, args: argparse.Namespace) -> None:
        """Run TorchX's command.

        Args:
            args: its arguments
        """
        others, threading.excepthook = threading.excepthook, _told_by_main
        try:
            super().run(args)  # type: ignore[misc]
        except slurm.Refused as error:
            _refuse(f"slurm: {error}")
        finally:
            threading.excepthook = others


class Cancel(_Command, cmd_cancel.CmdCancel):
    """`torchx cancel`."""


class Describe(_Command, cmd_describe.CmdDescribe):
    """`torchx describe`."""


class List(_Command, cmd_list.CmdList):
    """`torchx list`."""


class Log(_Command, cmd_log.CmdLog):
    """`torchx log`."""


class Run(_Command, cmd_run.CmdRun):
    """`torchx run`, which takes no setting of a scheduler that it does not know, as TorchX does in silence."""

    def _run(self, runner: Runner, args: argparse.Namespace) -> None:
        options, given = runner.scheduler_run_opts(args.scheduler), args.scheduler_args or ""
        try:
            unknown = [name for name in to_dict(given) if options.get(name) is None]
            options.cfg_from_str(given)
        except ValueError as error:
            _refuse(f"-cfg {given}: {error}")
        if unknown:
            known = ", ".join(name for name, _ in options)
            _refuse(f"-cfg {unknown[0]}: {args.scheduler} has no such setting; there are {known}")
        super()._run(runner, args)


class Status(_Command, cmd_status.CmdStatus):
    """`torchx status`."""


def _refuse(why: str) -> NoReturn:
    print(f"error: {why}", file=sys.stderr)
    sys.exit(2)


def _told_by_main(of: threading.ExceptHookArgs) -> None:
    """Leave to the main thread, which raises it again, what a thread that reads a log was refused."""
    if not issubclass(of.exc_type, slurm.Refused):
        threading.__excepthook__(of)
