"""HiloRec's own TorchX components: `torchx run -s <scheduler> hilorec.train --config <file> ...`.

TorchX reads a component's parameters and their descriptions from its signature and docstring. Those that all components
share, where they run, stand once, in `Host` and `Hosts`.
"""

import functools
import inspect
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Union

from torchx import specs
from torchx.specs.finder import ComponentValidationException

from launch import dist
from launch.schedulers import Role, literal

# What all schedulers take, with an id and the number of a node behind it, in the 63 letters of Kubernetes.
_NAME = re.compile(r"[A-Za-z](?:[\w-]{0,30}[A-Za-z0-9])?", re.ASCII)
_VARIABLE = re.compile(r"(?:^|[,;])\s*([A-Za-z_]\w*)=", re.ASCII)


@dataclass(frozen=True)
class Host:
    """Where one process runs.

    Attributes:
        image: container image, where the scheduler uses one: by default hilorec:cuda with gpus, else hilorec:cpu
        name: job name as {experiment}/{run} or {run}, of letters, digits, - and _
        h: a registered named resource (takes precedence over cpu, gpu, memMB)
        cpu: number of cpus per node
        memMB: memory per node in MB
        env: environment variables for the run (ENV1=v1,ENV2=v2); a comma belongs to the value unless a NAME= follows
        mounts: mounts for the container (type=<bind/volume>,src=/host,dst=/job[,readonly])
        max_retries: how often the scheduler, if it does so, and torchrun, where it is used, may start the job again
    """

    image: Optional[str] = None
    name: str = ""
    h: Optional[str] = None
    cpu: int = 2
    memMB: int = 8192
    env: Optional[str] = None
    mounts: Optional[List[str]] = None
    max_retries: int = 0

    def run(self, about: str, module: str, *arguments: str, port: Optional[int] = None) -> specs.AppDef:
        """A job of one process, `python -m module` with the arguments, and the port at which it listens."""
        experiment, run = self._names(about)
        dist.check_numbers("1x1", cpu=self.cpu, memMB=self.memMB, max_retries=self.max_retries, port=port or 0)
        with dist.refusing():
            resource = specs.resource(cpu=self.cpu, memMB=self.memMB, h=self.h)
            mounts = specs.parse_mounts(self.mounts or [])
        env = {name: literal(value) for name, value in self._environment().items()}
        on_this_machine = dist.set_threads(env, "1x1", self.cpu, self.h)
        role = Role(
            name=about,
            image=self.image or "hilorec:cpu",
            entrypoint="python",
            args=["-m", module, *map(literal, arguments)],
            env={**env, "TORCHX_TRACKING_EXPERIMENT_NAME": experiment},
            resource=resource,
            port_map={"http": port} if port else {},
            max_retries=self.max_retries,
            mounts=mounts,
            on_this_machine=on_this_machine,
        )
        return specs.AppDef(name=run, roles=[role])

    def _names(self, about: str) -> List[str]:
        """Names of experiment and run: those given, else `hilorec` and what it is about, such as a config."""
        given = self.name.split("/") if "/" in self.name else ["", self.name]
        if len(given) != 2 or not all(_NAME.fullmatch(name) for name in given if name):
            raise ComponentValidationException(
                f"--name {self.name}: give {{experiment}}/{{run}} or {{run}}, each a letter and then at most 31 "
                "letters, digits, - and _, not - or _ last; schedulers make names of it"
            )
        plain = re.sub(r"[^A-Za-z0-9_-]+", "-", about)
        plain = (plain if plain[:1].isalpha() else f"run-{plain}")[:32].rstrip("-_")
        return [name or default for name, default in zip(given, ["hilorec", plain], strict=True)]

    def _environment(self) -> Dict[str, str]:
        """The variables of `env`; TorchX's own reading refuses values with `=` by a traceback."""
        if not self.env:
            return {}
        found = list(_VARIABLE.finditer(self.env))
        if not found or found[0].start() != 0:
            raise ComponentValidationException(f"--env {self.env}: give variables as NAME=value,NAME=value")
        ends = [match.start() for match in found[1:]] + [len(self.env)]
        return {match[1]: self.env[match.end() : end] for match, end in zip(found, ends, strict=True)}


@dataclass(frozen=True)
class Hosts(Host):
    """Where ranks run.

    Attributes:
        j: [{min_nodes}:]{nodes}x{processes per node}; with gpus, one process for each
        gpu: number of gpus per node; a run that asks for some and finds none ends, unless its device is cpu
        interface: network interface of NCCL and gloo on every node, such as eth0, or several, such as ib0,ib1
        rdzv_port: port on the first node at which several nodes meet; 0: a free one, drawn for the job
    """

    j: str = "1x2"
    gpu: int = 0
    interface: Optional[str] = None
    rdzv_port: int = 0

    @property
    def gpus(self) -> int:
        """GPUs of a node."""
        with dist.refusing():
            return int(specs.resource(gpu=self.gpu, h=self.h).gpu)

    def run_ranks(self, module: str, *arguments: str, about: Optional[str] = None) -> specs.AppDef:
        """A job of nodes x processes under torchrun, named for what it is about, by default the module."""
        experiment, run = self._names(about or module.rpartition(".")[2])
        env = self._environment()
        if self.interface:
            env = {"NCCL_SOCKET_IFNAME": f"={self.interface}", "GLOO_SOCKET_IFNAME": self.interface, **env}
        app = dist.ddp(
            *arguments,
            m=module,
            image=self.image or ("hilorec:cuda" if self.gpus > 0 else "hilorec:cpu"),
            name=f"{experiment}/{run}",
            h=self.h,
            cpu=self.cpu,
            gpu=self.gpu,
            memMB=self.memMB,
            j=self.j,
            env=env,
            max_retries=self.max_retries,
            rdzv_port=self.rdzv_port,
            mounts=self.mounts,
        )
        (role,) = app.roles
        role.args[1] = re.sub("^torchrun", "python -m recsys.agent", role.args[1])
        return app


def _component(body: Callable[..., specs.AppDef]) -> Callable[..., specs.AppDef]:
    """The component that TorchX is to see: the body's last parameter, `where`, becomes what its class consists of."""
    *own, where = inspect.signature(body).parameters.values()
    place = where.annotation
    shared = [
        inspect.Parameter(part.name, inspect.Parameter.KEYWORD_ONLY, default=part.default, annotation=part.type)
        for part in fields(place)
    ]

    @functools.wraps(body)
    def component(*overrides: str, **options: Any) -> specs.AppDef:
        if stray := [text for text in overrides if text.startswith("-") or "=" not in text]:
            raise ComponentValidationException(
                f"{stray[0]!r} among the overrides: they are path.to.key=value, and follow all options"
            )
        placed = {part.name: options.pop(part.name) for part in fields(place) if part.name in options}
        return body(*overrides, where=place(**placed), **options)

    component.__signature__ = inspect.Signature([*own, *shared], return_annotation=specs.AppDef)  # type: ignore[attr-defined]
    described = [(inspect.getdoc(kind) or "").split("Attributes:\n")[1] for kind in reversed(place.__mro__[:-1])]
    component.__doc__ = "\n".join([inspect.getdoc(body) or "", *map(str.rstrip, described)])
    return component


def _options(**given: Union[str, float, List[str], None]) -> List[str]:
    """Options of a command: those that are given, a list's as often as it has values, a flag's without one."""
    words = []
    for name, values in given.items():
        for value in values if isinstance(values, list) else [values]:
            if value is not None and value is not False:
                words += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return words


@_component
def train(
    *overrides: str,
    config: str = "configs/default.yaml",
    output_dir: Optional[str] = None,
    where: Hosts,
) -> specs.AppDef:
    """Train by one config file on nodes x processes.

    torchx run -s slurm hilorec.train --config configs/production.yaml -j 2x8 -h gpu.xlarge

    A job that is started again goes on from its last checkpoint, unless the config's resume is never.

    Args:
        overrides: config overrides, path=value
        config: the config file, relative to the working directory or the image's
        output_dir: where all of the run is written, on a file system that all nodes share; the config's by default
    """
    settings = [] if output_dir is None else [f"output_dir={output_dir}"]
    return where.run_ranks("recsys.train", "--config", config, *settings, *overrides, about=Path(config).stem)


@_component
def evaluate(
    *overrides: str,
    checkpoint: str,
    split: str = "test",
    predictions: Optional[str] = None,
    by: Optional[List[str]] = None,
    json: bool = False,
    where: Hosts,
) -> specs.AppDef:
    """Tell the figures of a checkpoint on a split, on nodes x processes.

    Args:
        overrides: overrides of the run's config, path=value
        checkpoint: a directory step-<n> that training wrote
        split: train, valid or test
        predictions: a new directory, or URL, for label and probability of each row, as Parquet
        by: columns of whose values figures are told (COLUMN,COLUMN)
        json: print JSON instead of a table (True, False)
    """
    options = _options(checkpoint=checkpoint, split=split, predictions=predictions, by=by, json=json)
    return where.run_ranks("recsys.evaluate", *options, *overrides)


@_component
def predict(
    *overrides: str,
    input: List[str],
    output: str,
    artifact: Optional[str] = None,
    checkpoint: Optional[str] = None,
    keep: Optional[List[str]] = None,
    logit: bool = False,
    where: Hosts,
) -> specs.AppDef:
    """Write the probabilities of raw rows, by an artefact or by a checkpoint, on nodes x processes.

    Args:
        overrides: overrides of the run's config, with a checkpoint, path=value
        input: globs of Parquet files (GLOB,GLOB)
        output: the folder, or URL, for a file of each one's name
        artifact: a directory that recsys.export wrote; it is scored on cpus
        checkpoint: a directory step-<n> that training wrote, in the place of an artefact
        keep: columns that are written as well (COLUMN,COLUMN)
        logit: write the logit too (True, False)
    """
    if (artifact is None) == (checkpoint is None):
        raise ComponentValidationException("give one of --artifact and --checkpoint")
    if artifact is not None and (overrides or where.gpus):
        raise ComponentValidationException("--artifact takes neither overrides nor gpus; give a --checkpoint for these")
    options = _options(artifact=artifact, checkpoint=checkpoint, input=input, output=output, keep=keep, logit=logit)
    return where.run_ranks("recsys.predict", *options, *overrides)


@_component
def export(
    *,
    checkpoint: str,
    output: str,
    tables: Optional[str] = None,
    format: Optional[List[str]] = None,
    split: Optional[str] = None,
    max_rows: Optional[int] = None,
    bound: Optional[float] = None,
    calibration: Optional[str] = None,
    calibration_rows: Optional[int] = None,
    json: bool = False,
    where: Host,
) -> specs.AppDef:
    """Write what a checkpoint's model needs to answer, in one process on cpus.

    Args:
        checkpoint: a directory step-<n> that training wrote
        output: the artefact's directory; nothing may be there
        tables: precision in which the embedding tables are kept, float32, float16 or int8
        format: programs for other runtimes to write too (torch-export,aoti)
        split: compared on, train, valid or test
        max_rows: compared at least
        bound: by which a probability may differ
        calibration: none, platt or isotonic
        calibration_rows: positives that a calibrator needs, and as many negatives
        json: print JSON instead of a sentence (True, False)
    """
    options = _options(
        checkpoint=checkpoint,
        output=output,
        tables=tables,
        format=format,
        split=split,
        max_rows=max_rows,
        bound=bound,
        calibration=calibration,
        calibration_rows=calibration_rows,
        json=json,
    )
    return where.run("export", "recsys.export", *options)


@_component
def tensorboard(*, logdir: str = "outputs", host: str = "127.0.0.1", port: int = 6006, where: Host) -> specs.AppDef:
    """Show the runs below a directory, until the job is ended.

    Args:
        logdir: directory, or URL, below which runs have written
        host: address to serve at, by default this machine alone; 0.0.0.0 in a container whose port is to be reached
        port: port to serve at
    """
    options = _options(logdir=logdir, host=host, port=port)
    return where.run("tensorboard", "tensorboard.main", *options, port=port)
