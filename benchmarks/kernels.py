"""How many kernels a training step of the dense arch launches, as it comes and under the keys of `compute`.

    python -m benchmarks.kernels [--config PATH] [path.to.key=value ...]

A GPU that is given small kernels one by one waits for the host between them, so that below some batch size a step takes
as long as launching them does. On a GPU these are CUDA kernels; on a CPU they are the calls of operators that compute
something, of which a GPU makes about a kernel each: an estimate. A step is forward, backward and the optimizer, of the
dense arch alone, after those that compile and make state.
"""

import argparse
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch._inductor import metrics
from torch.autograd.profiler_util import EventList
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from benchmarks.report import RESULTS, Line, environment, show, shown_path, write
from recsys.cli import run_entry
from recsys.config import DEFAULT_CONFIG, Config, load_config
from recsys.model.ranker import build_ranker
from recsys.runtime import device_type
from recsys.training.compute import as_computed, begin_computing
from recsys.training.dense_optimizer import build_dense_optimizer

CASES: Mapping[str, tuple[str, ...]] = {
    "as it comes": (),
    "fused AdamW": ("optimizers.dense.fused=true",),
    "bfloat16": ("compute.autocast=bfloat16",),
    "compiled": ("compute.compile=true",),
    "compiled, fused AdamW": ("compute.compile=true", "optimizers.dense.fused=true"),
    "compiled, fused AdamW, bfloat16": (
        "compute.compile=true",
        "optimizers.dense.fused=true",
        "compute.autocast=bfloat16",
    ),
}
PARTS = ("forward and backward", "optimizer")
_WARM_UP = 3
_VIEWS = frozenset(
    f"aten::{name}"
    for name in [
        "view",
        "reshape",
        "_reshape_alias",
        "as_strided",
        "as_strided_",
        "transpose",
        "t",
        "numpy_T",
        "permute",
        "slice",
        "select",
        "split",
        "split_with_sizes",
        "unbind",
        "chunk",
        "narrow",
        "expand",
        "expand_as",
        "view_as",
        "squeeze",
        "unsqueeze",
        "flatten",
        "unflatten",
        "_unsafe_view",
        "detach",
        "alias",
        "empty",
        "empty_like",
        "empty_strided",
        "result_type",
        "is_nonzero",
        "item",
        "_local_scalar_dense",
        "resolve_conj",
        "resolve_neg",
        "lift_fresh",
        "to",
    ]
)
"""Operators that compute nothing."""


def main() -> None:
    """Count what the command line asks for, and report."""
    parser = argparse.ArgumentParser(prog="benchmarks.kernels", description="Count the kernels of a step.")
    parser.add_argument("--config", default=DEFAULT_CONFIG, help="YAML file, whose dense arch is taken (%(default)s)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where the results go (benchmarks/results)")
    parser.add_argument("overrides", nargs="*", metavar="path.to.key=value", help="settings that replace the file's")
    arguments = parser.parse_args()
    run_entry(lambda: _benchmark(arguments))


def _benchmark(arguments: argparse.Namespace) -> None:
    counts: dict[str, dict[str, int]] = {}
    for name, overrides in CASES.items():
        config = load_config(arguments.config, [*arguments.overrides, *overrides])
        device = torch.device(device_type(config.device, 1))
        counts[name] = count_kernels(config, device)
    rows = [{"": name, **{part: f"{of[part]:,}" for part in PARTS}} for name, of in counts.items()]
    title = f"Kernels of a training step's dense part: {config.name} on {device.type}"
    show(title, rows)
    command = ["python", "-m", "benchmarks.kernels", "--config", shown_path(arguments.config), *arguments.overrides]
    about = {"name": config.name, "command": shlex.join(command), "device": device.type, **environment()}
    lines: list[Line] = [{"kind": "case", "case": name, "kernels": of} for name, of in counts.items()]
    how = f"Of one step of {config.data.batch_size} rows, DDP and the loss left out. " + (
        "Kernels that the GPU ran, copies included."
        if device.type == "cuda"
        else "Calls of operators that compute something, and of compiled kernels: about what a GPU would launch."
    )
    write(arguments.output / f"kernels_{device.type}", title, [how, rows], about, lines)


def count_kernels(config: Config, device: torch.device) -> dict[str, int]:
    """Kernels of one training step of a config's dense arch by `PARTS`.

    Raises:
        ConfigError: the device lacks what the config asks for.
    """
    begin_computing(config.compute, device)
    rows = config.data.batch_size
    dense_arch = build_ranker(config, seed=0).dense_arch.to(device)
    computed = as_computed(dense_arch, config.compute, rows).train()
    optimizer = build_dense_optimizer(dense_arch, config.optimizers.dense)
    inputs = (
        torch.randn(rows, sum(config.embedding_dims.values()), device=device, requires_grad=True),
        torch.randn(rows, len(config.features.dense), device=device),
        torch.zeros(rows, dtype=torch.int64, device=device),
    )
    labels = torch.ones(rows, device=device)

    def forward_and_backward() -> None:
        output: Any = computed(*inputs, {"balance": 0.01, "z": 0.001})
        (F.binary_cross_entropy_with_logits(output.logits, labels) + sum(output.losses.values())).backward()

    metrics.reset()
    for _ in range(_WARM_UP):
        optimizer.zero_grad()
        forward_and_backward()
        optimizer.step()
    # Those that Inductor makes for a CPU are nothing that a profile shows.
    compiled = 0 if device.type == "cuda" else metrics.generated_kernel_count
    optimizer.zero_grad()
    counts = [_kernels(call, device) for call in (forward_and_backward, optimizer.step)]
    return dict(zip(PARTS, (counts[0] + compiled, counts[1]), strict=True))


def _kernels(call: Any, device: torch.device) -> int:
    """What a call launches."""
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities, acc_events=True) as profiled:
        call()
        if on_gpu:
            torch.cuda.synchronize()
    events: EventList = profiled.events()
    if on_gpu:
        # Named regions, such as the optimizer's step, are told as if the device had run them.
        on_it = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
        return sum(not event.is_user_annotation for event in on_it)
    return sum(_computes(event) and not any(map(_has_one_that_computes, event.cpu_children)) for event in events)


def _computes(event: Any) -> bool:
    """Whether an event is an operator that computes something, itself or by those that it calls."""
    return event.name.startswith(("aten::", "mkldnn::", "mkl::")) and event.name not in _VIEWS


def _has_one_that_computes(event: Any) -> bool:
    return _computes(event) or any(map(_has_one_that_computes, event.cpu_children))


if __name__ == "__main__":
    main()
