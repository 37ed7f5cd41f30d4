"""HiloRec's own TorchX components: `torchx run -s <scheduler> hilorec.train --config <file> ...`."""

from pathlib import Path
from typing import Dict, List, Optional

from torchx import specs

from launch import dist


def train(
    *overrides: str,
    config: str = "configs/default.yaml",
    j: str = "1x2",
    image: Optional[str] = None,
    name: str = "",
    h: Optional[str] = None,
    cpu: int = 2,
    gpu: int = 0,
    memMB: int = 8192,
    env: Optional[Dict[str, str]] = None,
    max_retries: int = 0,
    mounts: Optional[List[str]] = None,
    rdzv_port: int = 0,
) -> specs.AppDef:
    """Train by one config file on nodes x processes.

    torchx run -s slurm hilorec.train --config configs/production.yaml -j 2x8 -h gpu.xlarge

    Args:
        overrides: config overrides, path=value
        config: the config file, relative to the working directory or the image's
        j: [{min_nodes}:]{nodes}x{processes per node}; with gpus, one process for each
        image: container image, where the scheduler uses one: by default hilorec:cuda with gpus, else hilorec:cpu
        name: job name as {experiment}/{run}; defaults to hilorec/ and the config file's name
        h: a registered named resource (takes precedence over cpu, gpu, memMB)
        cpu: number of cpus per node
        gpu: number of gpus per node
        memMB: memory per node in MB
        env: environment variables for the run (ENV1=v1,ENV2=v2)
        max_retries: how often torchrun may start the processes again, and the scheduler, if it retries, the job
        mounts: mounts for the container (type=<bind/volume>,src=/host,dst=/job[,readonly])
        rdzv_port: port on the first node at which several nodes meet; 0: drawn for the job
    """
    return dist.ddp(
        "--config",
        config,
        *overrides,
        m="recsys.train",
        image=image or _image(gpu, h),
        name=name or f"hilorec/{Path(config).stem}",
        h=h,
        cpu=cpu,
        gpu=gpu,
        memMB=memMB,
        j=j,
        env=env,
        max_retries=max_retries,
        rdzv_port=rdzv_port,
        mounts=mounts,
    )


def _image(gpu: int, h: Optional[str]) -> str:
    """The image that docker/Dockerfile builds for such hosts, by the name that its first lines give it."""
    return "hilorec:cuda" if specs.resource(gpu=gpu, h=h).gpu > 0 else "hilorec:cpu"
