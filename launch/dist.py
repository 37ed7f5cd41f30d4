"""TorchX's `dist` components, with the script allowed as the first positional argument.

    torchx run -s local_cwd dist.ddp -j 1x4 recsys/train.py --config configs/movielens_1m.yaml

Everything else, `--script` and `-m` included, is TorchX's own.
"""

import os
from typing import Dict, List, Optional

import torchx
from torchx import specs
from torchx.components import dist, structured_arg
from torchx.specs import finder

_STOCK_CPU = 2
_SHUTDOWN_SECONDS = "300"


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
    rdzv_port: int = 29500,
    rdzv_backend: str = "c10d",
    mounts: Optional[List[str]] = None,
    debug: bool = False,
    tee: int = 3,
) -> specs.AppDef:
    """Run a script or module under torchrun, data-parallel over nodes and processes.

    Give the script as the first argument after the options (dist.ddp -j 1x4 recsys/train.py --config x.yaml),
    or by --script, or a module by -m.

    OMP_NUM_THREADS, unless set here or in the environment, shares the CPUs of a node among its processes:
    those asked for by cpu or h, or this machine's when neither was given.

    torchrun gives its processes 300 s to end after a signal, unless TORCH_ELASTIC_SHUTDOWN_TIMEOUT says otherwise, here
    or in the environment; up to 2.11, torch knows only 30 s. Processes that fail are started again as often as
    max_retries says, before the scheduler starts the job again; PET_MAX_RESTARTS says otherwise. On this machine, they
    end when the torchx that launched them does.

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
        rdzv_port: port on the first node at which several nodes meet; a single node picks a free port
        rdzv_backend: rendezvous backend, with several nodes
        mounts: mounts for the container (type=<bind/volume>,src=/host,dst=/job[,readonly])
        debug: run with PyTorch's and NCCL's debug flags
        tee: streams shown as well as kept in files; 0: none, 1: stdout, 2: stderr, 3: both
    """
    script, m, rest = _target(list(script_args), script, m)
    env = dict(env or {})
    env.setdefault("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS") or _threads(j, cpu, h))
    timeout = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
    env.setdefault(timeout, os.environ.get(timeout) or _SHUTDOWN_SECONDS)
    if max_retries:
        env.setdefault("PET_MAX_RESTARTS", os.environ.get("PET_MAX_RESTARTS") or str(max_retries))
    env["HILOREC_LAUNCHER_PID"] = str(os.getpid())  # recsys/lifetime.py reads it where processes are torchx's own
    return dist.ddp(
        *rest,
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
        rdzv_port=rdzv_port,
        rdzv_backend=rdzv_backend,
        mounts=mounts,
        debug=debug,
        tee=tee,
    )


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


def _threads(j: str, cpu: int, h: Optional[str]) -> str:
    """Threads per process, so that torchrun need not fall back to one and warn."""
    if h is not None:
        cpus = int(specs.resource(h=h).cpu)
    elif cpu != _STOCK_CPU:
        cpus = cpu
    else:
        cpus = len(os.sched_getaffinity(0))
    _, _, processes, _ = dist.parse_nnodes(j)
    return str(max(1, cpus // processes))
