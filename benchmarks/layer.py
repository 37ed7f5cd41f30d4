"""What an expert layer costs beside the linear it stands for.

    python -m benchmarks.layer [--dims D] [--experts LxK]

Square layers, float32 on a CPU and bfloat16 under autocast on a GPU. All forms of one size are timed in turns, so that
whatever else slows the machine slows all of them; a ratio is taken within a turn, and its median told. On a single CPU
thread the time is the process's own instead of the wall's: the same on a quiet machine, and nearer to that on a busy
one. The input requires a gradient, as it does in the middle of a tower.
"""

import argparse
import re
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.report import RESULTS, Line, environment, show, write
from recsys.cli import run_entry
from recsys.model.experts.hilomoe import HiLoMoELinear
from recsys.terminal import Rows

PASSES = ("forward", "forward and backward")
FORMS = {
    "dense": "nn.Linear",
    "stack": "L of them, one after another",
    "formula": "the paper's as written: each layer's query, scores and experts in turn, in the input's space",
    "autograd": "HiLoMoELinear with `fused = False`: the backward pass is autograd's",
    "fused": "HiLoMoELinear as it comes",
    "compiled": "HiLoMoELinear under torch.compile",
}
TURN_SECONDS = 0.03
"""What a form repeats its pass for in one turn, at least."""
TARGETS = (
    ("forward", "fused", "dense", 1.5),
    ("forward", "fused", "formula", 0.35),
    ("forward and backward", "fused", "dense", 1.7),
)
TARGET_SIZE = (512, 6, 8)
CHOICES = (
    "Where L K is not small beside d nothing makes the experts free: their two GEMMs alone are 2 L K / d of the "
    "linear's, and the time grows with L as they do. "
    "What lost, tried while the layer was made. Rows first and experts last, the layout that a linear gives: on a CPU "
    "a softmax over 8 neighbouring numbers takes many times as long as one over 8 long rows, and was most of the "
    "layer's time at widths of 64 and 128. Joining all earlier scores for each layer's logits, instead of adding a "
    "layer's scores to all later logits at once. Leaving the backward pass to autograd: the column `autograd`. One "
    "autograd function over the whole layer, base linear included, with no option of the routing: faster by the "
    "overhead of a few calls at widths of 64 and 128, not at 512; the options' gradients would all have to be written "
    "by hand. No Triton kernel was written. On an H200 a layer takes as long at width 64 as at 1024, so its time is "
    "the host's, for some launches of kernels: what would help there is fewer of them, as in a CUDA graph."
)

Seconds = Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]]
"""Of one pass, by size, kind of pass, form and turn."""


class Formula(nn.Module):
    """The paper's formulas with the parameters of a layer, nothing reused."""

    def __init__(self, layer: HiLoMoELinear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """Compute every layer's scores and experts from its own query."""
        layer = self.layer
        query, y = x, nn.functional.linear(x, layer.weight, layer.bias)
        keys, ups = layer.lora_A.split(layer.num_experts), layer.lora_B.split(layer.num_experts, 1)
        for number, (key, up) in enumerate(zip(keys, ups, strict=True)):
            scores = (query @ key.t() * layer.in_features**-0.5).softmax(-1)
            y = y + (scores * (x @ key.t())) @ up.t()
            if number < layer.num_layers - 1:
                query = query + scores @ key
        return y


class Device:
    """Where the layers run, and in which precision."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.dtype = torch.bfloat16 if name == "cuda" else torch.float32

        self.takes_cpu_time = name == "cpu" and torch.get_num_threads() == 1

    @property
    def told(self) -> dict[str, Any]:
        """What a report says of it."""
        clock = "CPU time" if self.takes_cpu_time else "wall time"
        threads = torch.get_num_threads()
        return {"device": self.name, "dtype": str(self.dtype), "threads": threads, "clock": clock}

    def clock(self) -> float:
        """The time when all that was asked of the device is done."""
        if self.takes_cpu_time:
            return time.process_time()
        if self.name == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def run(self, module: nn.Module, x: Tensor, d_y: Tensor, kind: str) -> None:
        """Take one pass of a kind."""
        with torch.autocast(self.name, self.dtype, enabled=self.name == "cuda"):
            if kind == "forward":
                with torch.no_grad():
                    module(x)
                return
            y = module(x)
        torch.autograd.grad(y, [x, *module.parameters()], d_y.to(y.dtype))


def main() -> None:
    """Measure what the command line asks for, and report."""
    parser = argparse.ArgumentParser(prog="benchmarks.layer", description="Time the expert layer.")
    parser.add_argument("--dims", type=int, nargs="+", default=[64, 128, 512, 1024], help="widths (%(default)s)")
    parser.add_argument(
        "--experts", nargs="+", default=["1x8", "3x8", "6x8", "8x16"], metavar="LxK", help="sizes (%(default)s)"
    )
    parser.add_argument("--batch", type=int, default=4096, help="rows (default: %(default)s)")
    parser.add_argument("--turns", type=int, default=15, help="of each form (default: %(default)s)")
    parser.add_argument(
        "--compiled", nargs="*", metavar="LxK", help="the sizes to compile too, which takes minutes (default: all)"
    )
    parser.add_argument("--note", help="what a reader of the figures must know, such as what else the machine did")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where the results go (benchmarks/results)")
    arguments = parser.parse_args()
    if min(arguments.batch, arguments.turns, *arguments.dims) < 1:
        parser.error("--dims, --batch and --turns must be at least 1")
    if arguments.compiled is None:
        arguments.compiled = arguments.experts
    for size in (*arguments.experts, *arguments.compiled):
        if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", size):
            parser.error(f"{size} is no size such as 3x8: 3 layers of 8 experts")
    run_entry(lambda: _benchmark(arguments))


def _benchmark(arguments: argparse.Namespace) -> None:
    sizes = [(dim, *_parsed(size)) for dim in arguments.dims for size in arguments.experts]
    compiled = {_parsed(size) for size in arguments.compiled}
    device = Device("cuda" if torch.cuda.is_available() else "cpu")
    times: dict[str, dict[str, dict[str, list[float]]]] = {}
    memory: dict[str, dict[str, dict[str, float]]] = {}
    for dim, num_layers, num_experts in sizes:
        name = _name(dim, num_layers, num_experts)
        torch.manual_seed(0)
        x = torch.randn(arguments.batch, dim, device=device.name, requires_grad=True)
        d_y = torch.randn(arguments.batch, dim, device=device.name)
        forms = _forms(dim, num_layers, num_experts, device, compiled=(num_layers, num_experts) in compiled)
        memory[name] = {form: memory_of(device, module, x, d_y) for form, module in forms.items() if form != "compiled"}
        times[name] = {kind: time_passes(device, forms, x, d_y, kind, arguments.turns) for kind in PASSES}
        print(f"{name}: done", flush=True)
    _report(arguments, sizes, device, times, memory)


def _parsed(size: str) -> tuple[int, int]:
    num_layers, num_experts = size.split("x")
    return int(num_layers), int(num_experts)


def _name(dim: int, num_layers: int, num_experts: int) -> str:
    return f"d {dim}, L {num_layers}, K {num_experts}"


def _forms(dim: int, num_layers: int, num_experts: int, device: Device, *, compiled: bool) -> dict[str, nn.Module]:
    """Each form, those of the expert layer with the same parameters, U not zero."""
    fused = HiLoMoELinear(dim, dim, num_layers, num_experts, up_init="normal", device=device.name)
    autograd = HiLoMoELinear(dim, dim, num_layers, num_experts, device=device.name)
    autograd.load_state_dict(fused.state_dict())
    autograd.fused = False
    forms = {
        "dense": nn.Linear(dim, dim, device=device.name),
        "stack": nn.Sequential(*(nn.Linear(dim, dim, device=device.name) for _ in range(num_layers))),
        "formula": Formula(fused),
        "autograd": autograd,
        "fused": fused,
    }
    if compiled:
        torch._dynamo.reset()  # or the sizes before this one would count towards its limit of recompilations
        forms["compiled"] = torch.compile(fused, fullgraph=True, dynamic=False)  # type: ignore[assignment]
    return forms


def time_passes(
    device: Device, forms: Mapping[str, nn.Module], x: Tensor, d_y: Tensor, kind: str, turns: int
) -> dict[str, list[float]]:
    """Seconds of one pass of each form, by turn."""
    passes = {form: partial(device.run, module, x, d_y, kind) for form, module in forms.items()}
    return time_in_turns(device, passes, turns)


def time_in_turns(device: Device, passes: Mapping[str, Callable[[], None]], turns: int) -> dict[str, list[float]]:
    """Seconds of each pass, by turn."""
    seconds: dict[str, list[float]] = {form: [] for form in passes}
    repeats: dict[str, int] = {}
    for form, one in passes.items():
        _seconds(device, one, 2)  # the first compiles
        repeats[form] = max(1, round(TURN_SECONDS / _seconds(device, one, 1)))
    for _ in range(turns):
        for form, one in passes.items():
            seconds[form].append(_seconds(device, one, repeats[form]))
    return seconds


def _seconds(device: Device, one: Callable[[], None], repeats: int) -> float:
    began = device.clock()
    for _ in range(repeats):
        one()
    return (device.clock() - began) / repeats


class _LargestTensor(TorchDispatchMode):
    """Bytes of the largest tensor that any operation returns."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel() * tensor.element_size())
        return result


def memory_of(device: Device, module: nn.Module, x: Tensor, d_y: Tensor) -> dict[str, float]:
    """MiB: largest tensor made, what the forward pass keeps for the backward pass, and a GPU's peak over both.

    The input and the parameters are kept in any case and do not count.
    """
    with _LargestTensor() as mode:  # type: ignore[no-untyped-call]
        device.run(module, x, d_y, PASSES[1])
    given = {tensor.untyped_storage().data_ptr() for tensor in (x, *module.parameters())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in given:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with (
        torch.autocast(device.name, device.dtype, enabled=device.name == "cuda"),
        saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        y = module(x)
    figures = {"largest tensor": mode.largest / 2**20, "kept for backward": sum(kept.values()) / 2**20}
    del y
    if device.name == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        device.run(module, x, d_y, PASSES[1])
        figures["peak"] = (torch.cuda.max_memory_allocated() - before) / 2**20
    return figures


def median_ratio(seconds: Mapping[str, Sequence[float]], form: str, other: str) -> float:
    """Of two forms, the median over turns of the ratio within a turn."""
    return median(a / b for a, b in zip(seconds[form], seconds[other], strict=True))


def _report(
    arguments: argparse.Namespace,
    sizes: Sequence[tuple[int, int, int]],
    device: Device,
    times: Seconds,
    memory: Mapping[str, Mapping[str, Mapping[str, float]]],
) -> None:
    forms = [form for form in FORMS if form != "compiled" or arguments.compiled]
    title = f"One expert layer on {device.name}"
    clock = device.told["clock"]
    parts: list[str | Rows] = [
        f"Batch {arguments.batch}, {str(device.dtype).removeprefix('torch.')}, threads: {torch.get_num_threads()}. "
        f"Milliseconds of one pass ({clock}), medians of {arguments.turns} turns; in brackets the ratio to "
        "`dense`, the median of the turns' own. The gradients are those of the input and of all parameters.",
        "\n".join(f"- `{form}`: {FORMS[form]}" for form in forms),
    ]
    for kind in PASSES:
        rows = [_row(name, seconds[kind], forms) for name, seconds in times.items()]
        show(f"{title}: {kind}", rows)
        parts += [f"## {kind.capitalize()}", rows]
    targets, growth = _targets(times), _growth(sizes, times)
    if targets:
        rows = [
            {
                target["size"]: target["ratio"],
                "at most": f"{target['at most']:.2f}",
                "found": f"{target['found']:.2f}",
                "": target["outcome"],
            }
            for target in targets
        ]
        show("Targets", rows)
        parts += ["## Targets", rows]
    if growth:
        rows = [{"": of["sizes"], **{form: f"{ratio:.2f}" for form, ratio in of["ratios"].items()}} for of in growth]
        show("Growth", rows)
        explained = (
            "The ratio to `dense` of the most layers over that of the fewest, at the same width and experts per layer."
        )
        parts += ["## Growth with L", explained, rows]
    parts += ["## Memory", "MiB, beside input, parameters and their gradients.", _memory_rows(memory)]
    parts += ["## Choices", CHOICES]
    parts += [arguments.note] if arguments.note else []
    command = ["python", "-m", "benchmarks.layer", "--dims", *map(str, arguments.dims), "--experts", *arguments.experts]
    command += ["--batch", str(arguments.batch), "--turns", str(arguments.turns)]
    command += ["--compiled", *arguments.compiled]
    about = {
        "command": shlex.join(command),
        "note": arguments.note,
        **device.told,
        "batch_size": arguments.batch,
        **environment(),
    }
    lines: list[Line] = [
        {
            "kind": "time",
            "size": name,
            "pass": kind,
            "milliseconds": {form: 1000 * median(seconds) for form, seconds in of[kind].items()},
            "ratios to dense": {form: median_ratio(of[kind], form, "dense") for form in of[kind]},
        }
        for name, of in times.items()
        for kind in PASSES
    ]
    lines += [{"kind": "memory", "size": name, "MiB": of} for name, of in memory.items()]
    lines += [{"kind": "target", **target} for target in targets]
    lines += [{"kind": "growth", **of} for of in growth]
    write(arguments.output / f"layer_{device.name}", title, parts, about, lines)


def _row(name: str, seconds: Mapping[str, Sequence[float]], forms: Sequence[str]) -> dict[str, str]:
    return {
        "": name,
        **{
            form: f"{1000 * median(seconds[form]):.2f} ({median_ratio(seconds, form, 'dense'):.2f})"
            if form in seconds
            else "-"
            for form in forms
        },
        "fused / formula": f"{median_ratio(seconds, 'fused', 'formula'):.2f}",
    }


def _targets(times: Seconds) -> list[dict[str, Any]]:
    """How the ratios that were aimed at came out; none where their size was not measured."""
    name = _name(*TARGET_SIZE)
    if name not in times:
        return []
    found = [
        (kind, form, other, limit, median_ratio(times[name][kind], form, other)) for kind, form, other, limit in TARGETS
    ]
    return [
        {
            "size": name,
            "ratio": f"{kind}, {form} / {other}",
            "at most": limit,
            "found": ratio,
            "outcome": "met" if ratio <= limit else "missed",
        }
        for kind, form, other, limit, ratio in found
    ]


def _growth(sizes: Sequence[tuple[int, int, int]], times: Seconds) -> list[dict[str, Any]]:
    """How much dearer more layers are, at the same width and experts per layer."""
    found = []
    for dim, num_experts in dict.fromkeys((dim, num_experts) for dim, _, num_experts in sizes):
        layers = [num_layers for *size, num_layers in ((d, k, n) for d, n, k in sizes) if size == [dim, num_experts]]
        few, many = _name(dim, min(layers), num_experts), _name(dim, max(layers), num_experts)
        for kind in PASSES if few != many else ():
            growth = {
                form: median_ratio(times[many][kind], form, "dense") / median_ratio(times[few][kind], form, "dense")
                for form in FORMS
                if form not in ("dense", "compiled")
            }
            found.append(
                {"sizes": f"d {dim}, K {num_experts}, {kind}, L {max(layers)} / L {min(layers)}", "ratios": growth}
            )
    return found


def _memory_rows(memory: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Rows:
    return [
        {
            "": f"{name}: {figure}",
            **{form: f"{figures[figure]:.1f}" for form, figures in of.items()},
        }
        for name, of in memory.items()
        for figure in next(iter(of.values()))
    ]


if __name__ == "__main__":
    main()
