"""TorchX's `dist` components, with the script allowed as the first positional argument.

    torchx run -s local_cwd dist.ddp -j 1x4 recsys/train.py --config configs/movielens_1m.yaml

Everything else, `--script` and `-m` included, is TorchX's own.
"""

import contextlib
import dataclasses
import os
import random
import socket
import sys
from collections.abc import Iterator
from typing import Dict, List, Optional

import torchx
from torchx import specs
from torchx.components import dist, structured_arg
from torchx.specs import finder

from launch.schedulers import Role, literal, literal_to_ranks

_STOCK_CPU = 2
_SHUTDOWN_SECONDS = "300"
_STOCK_PORT = 29500
_LAST_PORT = 65_535
_PORTS = range(20_000, 30_000)  # none that Linux gives to outgoing connections, nor Kubernetes to node ports


def ddp(
    *script_args: str,
    script: Optional[str] = None,
    m: Optional[str] = None,
    image: str = torchx.IMAGE,
    name: str = "/",
    h: Optional[str] = None,
    cpu: int = _STOCK_CPU,
    gpu: int = 0,
    memMB: int = 1024,
    j: str = "1x2",
    env: Optional[Dict[str, str]] = None,
    max_retries: int = 0,
    rdzv_port: int = 0,
    rdzv_backend: str = "c10d",
    mounts: Optional[List[str]] = None,
    debug: bool = False,
    tee: int = 3,
) -> specs.AppDef:
    """Run a script or module under torchrun, data-parallel over nodes and processes.

    Give the script as the first argument after the options (dist.ddp -j 1x4 recsys/train.py --config x.yaml),
    or by --script, or a module by -m.

    OMP_NUM_THREADS, unless set by env, shares the CPUs of a node that cpu or h ask for among its processes. With
    local_cwd it is this machine's OMP_NUM_THREADS, or else shares this machine's CPUs if neither cpu nor h was given.

    A $ in an argument is a $, but for the macros ${app_id} and ${replica_id} of TorchX, and ${local_rank} of torchrun.

    torchrun gives its processes 300 s to end after a signal, unless TORCH_ELASTIC_SHUTDOWN_TIMEOUT says otherwise, here
    or in the environment; up to 2.11, torch knows only 30 s. Processes that fail are started again as often as
    max_retries says, before the scheduler starts the job again; PET_MAX_RESTARTS says otherwise. On this machine, they
    end when the torchx that launched them does. A HiloRec run that asks for gpus and finds none ends, unless its device
    is cpu.

    Args:
        script_args: the script, unless --script or -m names it, then its arguments
        script: script or binary to run within the image
        m: python module to run
        image: container image, where the scheduler uses one
        name: job name as {experiment}/{run}, {experiment}/, /{run} or {run}; the script's name by default
        h: a registered named resource (takes precedence over cpu, gpu, memMB)
        cpu: number of cpus per node
        gpu: number of gpus per node
        memMB: memory per node in MB
        j: [{min_nodes}:]{nodes}x{processes per node}; with gpus, processes must not exceed gpus
        env: environment variables for the run (ENV1=v1,ENV2=v2)
        max_retries: how often torchrun may start the processes again, and the scheduler, if it retries, the job
        rdzv_port: port on the first node at which several nodes meet; 0: one of 20000 to 29999 that is free here, drawn
            anew for each job, so that two jobs that share a node do not meet. A single node picks a free port
        rdzv_backend: rendezvous backend, with several nodes
        mounts: mounts for the container (type=<bind/volume>,src=/host,dst=/job[,readonly])
        debug: run with PyTorch's and NCCL's debug flags
        tee: streams shown as well as kept in files; 0: none, 1: stdout, 2: stderr, 3: both
    """
    script, m, rest = _target(list(script_args), script, m)
    check_numbers(j, cpu=cpu, gpu=gpu, memMB=memMB, max_retries=max_retries, rdzv_port=rdzv_port)
    env = {name: literal(value) for name, value in (env or {}).items()}
    on_this_machine = set_threads(env, j, cpu, h)
    with refusing():
        gpus = specs.resource(gpu=gpu, h=h).gpu
    if gpus > 0:
        env["HILOREC_GPUS"] = str(gpus)  # recsys/runtime.py holds a run to it
    timeout = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
    env.setdefault(timeout, os.environ.get(timeout) or _SHUTDOWN_SECONDS)
    if max_retries:
        env.setdefault("PET_MAX_RESTARTS", os.environ.get("PET_MAX_RESTARTS") or str(max_retries))
    on_this_machine["HILOREC_LAUNCHER_PID"] = str(os.getpid())  # recsys/lifetime.py ends ranks with torchx
    with refusing():
        app = dist.ddp(
            *map(literal_to_ranks, rest),
            script=script,
            m=m,
            image=image,
            name=name,
            h=h,
            cpu=cpu,
            gpu=gpu,
            memMB=memMB,
            j=j,
            env=env,
            max_retries=max_retries,
            rdzv_port=rdzv_port or (_free_port() if dist.parse_nnodes(j)[1] > 1 else _STOCK_PORT),
            rdzv_backend=rdzv_backend,
            mounts=mounts,
            debug=debug,
            tee=tee,
        )
    (role,) = app.roles
    shallow = {part.name: getattr(role, part.name) for part in dataclasses.fields(role)}
    return dataclasses.replace(app, roles=[Role(**shallow, on_this_machine=on_this_machine)])


def spmd(
    *args: str,
    script: Optional[str] = None,
    m: Optional[str] = None,
    image: str = torchx.IMAGE,
    name: str = "/",
    h: str = "gpu.small",
    j: str = "1x1",
    env: Optional[Dict[str, str]] = None,
    max_retries: int = 0,
    mounts: Optional[List[str]] = None,
    debug: bool = False,
) -> specs.AppDef:
    """Run a script or module on a named type of host, one process per GPU unless -j says otherwise.

    Args:
        args: the script, unless --script or -m names it, then its arguments
        script: script or binary to run within the image
        m: python module to run
        image: container image, where the scheduler uses one
        name: job name as {experiment}/{run}, {experiment}/, /{run} or {run}; the script's name by default
        h: the type of host, a registered named resource
        j: {nodes}x{processes per node}; {nodes} alone takes the host's number of gpus
        env: environment variables for the run (ENV1=v1,ENV2=v2)
        max_retries: the number of scheduler retries allowed
        mounts: mounts for the container (type=<bind/volume>,src=/host,dst=/job[,readonly])
        debug: run with PyTorch's and NCCL's debug flags
    """
    return ddp(
        *args,
        script=script,
        m=m,
        image=image,
        name=name,
        h=h,
        j=str(structured_arg.StructuredJArgument.parse_from(h, j)),
        env=env,
        max_retries=max_retries,
        mounts=mounts,
        debug=debug,
    )


def _target(args: List[str], script: Optional[str], m: Optional[str]) -> tuple[Optional[str], Optional[str], List[str]]:
    """What to run, and with which arguments."""
    if script is None and m is None and args and not args[0].startswith("-"):
        script, *args = args
    if (script is None) == (m is None):
        # The one exception that `torchx run` reports as a message and not as a traceback.
        raise finder.ComponentValidationException(
            "say what to run once: dist.ddp [options] SCRIPT [args], or --script SCRIPT, or -m MODULE"
        )
    return script, m, args


@contextlib.contextmanager
def refusing() -> Iterator[None]:
    """What TorchX refuses by a traceback (-j, -h, --mounts), as the one exception that it reports as a message."""
    try:
        yield
    except (KeyError, ValueError) as error:
        told = str(error.args[0] if error.args else error)
        told = f"--mounts: a mount has no {told}" if told in ("src", "dst") else told
        raise finder.ComponentValidationException(told) from error


def check_numbers(j: str, **given: int) -> None:
    """Refuse numbers that no job can have, which TorchX takes, or refuses by a traceback.

    Args:
        j: nodes and processes per node.
        given: options, by name.
    """
    with refusing():
        fewest, most, processes, _ = dist.parse_nnodes(j)
    if not (1 <= fewest <= most and processes >= 1):
        raise finder.ComponentValidationException(
            f"-j {j}: a job has a node and a process at least, and no more nodes at least than at most"
        )
    for name, number in given.items():
        least, most = (0, _LAST_PORT if name.endswith("port") else sys.maxsize)
        least += name in ("cpu", "memMB")
        if not least <= number <= most:
            told = f"at least {least}" if number < least else f"at most {most}"
            raise finder.ComponentValidationException(f"--{name} {number}: give {told}")


def set_threads(env: Dict[str, str], j: str, cpu: int, h: Optional[str]) -> Dict[str, str]:
    """Share the CPUs of a node among its processes, so that torchrun need not fall back to one thread and warn.

    Args:
        env: gets OMP_NUM_THREADS, unless it has it.
        j: nodes and processes per node.
        cpu: number of CPUs per node.
        h: a named resource, which takes precedence over `cpu`.

    Returns:
        What holds instead where processes are this machine's own.
    """
    if "OMP_NUM_THREADS" in env:
        return {}
    with refusing():
        _, _, processes, _ = dist.parse_nnodes(j)
        cpus = int(specs.resource(cpu=cpu, h=h).cpu)
    env["OMP_NUM_THREADS"] = str(max(1, cpus // processes))
    here = len(os.sched_getaffinity(0)) if cpu == _STOCK_CPU and h is None else cpus
    return {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(max(1, here // processes))}


def _free_port() -> int:
    """A port that nothing listens at on this machine, and that hardly another job draws."""
    for port in random.sample(_PORTS, 100):
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
    raise finder.ComponentValidationException("no free port of 100 between 20000 and 29999; set --rdzv_port")
