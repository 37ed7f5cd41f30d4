"""What adapting a linear to domains costs beside the linear itself.

    python -m benchmarks.domains [--domains N] [--ranks R]

Square layers under rows of all domains, sorted by domain, as the dense arch gives them; forms are timed in turns, as
`benchmarks.layer` does. Domains have unequal numbers of rows: each has twice the share of the one four places after it.
"""

import argparse
import copy
import shlex
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.layer import PASSES, Device, Seconds, median_ratio, memory_of, time_passes
from benchmarks.report import RESULTS, Line, environment, show, write
from recsys.cli import run_entry
from recsys.errors import UserError
from recsys.host_memory import keep_freed_memory
from recsys.model.experts.domains import (
    MAX_FOLDED_BYTES,
    DomainAdaptation,
    DomainExpert,
    DomainGate,
    DomainLinear,
    adapt,
)
from recsys.terminal import Rows

FORMS = {
    "dense": "nn.Linear",
    "mlora": "DomainLinear of MLoRA, sorting of the rows included",
    "loop": "the same by a loop over domains",
    "merged": "each domain's weight W + B A made, and a loop over domains",
    "folded": "each domain's weight kept, and multiplied group by group: what serves a frozen model",
    "moe_mlora": "DomainLinear of MoE-MLoRA: as many experts as domains, a gate of the domain",
}
TRAINED = ("dense", "mlora", "loop", "merged", "moe_mlora")


class _Told(nn.Module):
    """A layer whose adaptation is told the rows' domains at every call."""

    def __init__(self, layer: DomainLinear, adaptation: DomainAdaptation, domains: Tensor) -> None:
        super().__init__()
        self.layer, self.adaptation, self.domains = layer, adaptation, domains

    def forward(self, x: Tensor) -> Tensor:
        """Rows are sorted already, so the order that is asked for is theirs."""
        with self.adaptation.call(self.domains):
            y: Tensor = self.layer(x)
        return y


class _Loop(nn.Module):
    """MLoRA domain by domain, adding to the linear or merged with it."""

    def __init__(self, layer: DomainLinear, counts: Sequence[int], *, merged: bool) -> None:
        super().__init__()
        self.layer, self.counts, self.merged = layer, counts, merged

    def forward(self, x: Tensor) -> Tensor:
        """Groups of rows one after another."""
        layer, parts = self.layer, []
        for rows, expert in zip(x.split(list(self.counts)), layer.domain_experts, strict=True):
            assert isinstance(expert, DomainExpert)
            down, up, bias = expert.lora_A, expert.lora_B, expert.bias
            if self.merged:
                parts.append(F.linear(rows, layer.weight + up @ down, layer.bias + bias))
            else:
                parts.append(F.linear(F.linear(rows, down), up, bias))
        return torch.cat(parts) if self.merged else F.linear(x, layer.weight, layer.bias) + torch.cat(parts)


def main() -> None:
    """Measure what the command line asks for, and report."""
    parser = argparse.ArgumentParser(prog="benchmarks.domains", description="Time linears that adapt to domains.")
    parser.add_argument("--domains", type=int, nargs="+", default=[2, 8, 20, 64], help="n (%(default)s)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 8, 64], help="r (%(default)s)")
    parser.add_argument("--dim", type=int, default=256, help="width (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=4096, help="rows (default: %(default)s)")
    parser.add_argument("--turns", type=int, default=15, help="of each form (default: %(default)s)")
    parser.add_argument("--note", help="what a reader of the figures must know, such as what else the machine did")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where the results go (benchmarks/results)")
    arguments = parser.parse_args()
    if min(arguments.batch, arguments.turns, arguments.dim, *arguments.domains, *arguments.ranks) < 1:
        parser.error("all sizes must be at least 1")
    run_entry(lambda: _benchmark(arguments))


def _benchmark(arguments: argparse.Namespace) -> None:
    keep_freed_memory()  # as training does
    device = Device("cuda" if torch.cuda.is_available() else "cpu")
    times: dict[str, dict[str, dict[str, list[float]]]] = {}
    memory: dict[str, float] = {}
    sizes = {f"n {n}, r {rank}": (n, rank) for n in arguments.domains for rank in arguments.ranks}
    for name, (num_domains, rank) in sizes.items():
        torch.manual_seed(0)
        x = torch.randn(arguments.batch, arguments.dim, device=device.name, requires_grad=True)
        d_y = torch.randn(arguments.batch, arguments.dim, device=device.name)
        forms = _forms(arguments.dim, num_domains, rank, arguments.batch, device)
        memory[name] = memory_of(device, forms["moe_mlora"], x, d_y)["largest tensor"]
        trained = {form: forms[form] for form in TRAINED}
        times[name] = {
            PASSES[0]: time_passes(device, forms, x, d_y, PASSES[0], arguments.turns),
            PASSES[1]: time_passes(device, trained, x, d_y, PASSES[1], arguments.turns),
        }
        print(f"{name}: done", flush=True)
    _report(arguments, sizes, device, times, memory)


def _forms(dim: int, num_domains: int, rank: int, batch: int, device: Device) -> dict[str, nn.Module]:
    shares = torch.tensor([2.0 ** (-domain / 4) for domain in range(num_domains)])
    counts = (shares / shares.sum() * batch).floor().long()
    counts[0] += batch - counts.sum()
    domains = torch.repeat_interleave(torch.arange(num_domains), counts).to(device.name)

    def layer_of(adaptation: DomainAdaptation) -> DomainLinear:
        layer = adapt(nn.Linear(dim, dim), adaptation, rank)
        for parameter in layer.domain_experts.parameters():
            nn.init.normal_(parameter, std=0.1)
        return layer.to(device.name)

    own = DomainAdaptation(num_domains)
    mixed = DomainAdaptation(num_domains, num_domains, DomainGate(num_domains, num_domains)).to(device.name)
    mixed.use_gate()
    mlora, mixture = layer_of(own), layer_of(mixed)
    frozen, of_frozen = copy.deepcopy((mixture, mixed))
    if not of_frozen.fold([frozen]):
        raise UserError(
            f"--domains {num_domains}: weights of width {dim} for all would take more than the "
            f"{MAX_FOLDED_BYTES >> 20} MiB up to which models are folded; give fewer, or a smaller --dim"
        )
    return {
        "dense": nn.Linear(dim, dim, device=device.name),
        "mlora": _Told(mlora, own, domains),
        "loop": _Loop(mlora, counts.tolist(), merged=False),
        "merged": _Loop(mlora, counts.tolist(), merged=True),
        "folded": _Told(frozen, of_frozen, domains),
        "moe_mlora": _Told(mixture, mixed, domains),
    }


def _flops_ratio(dim: int, experts: int, rank: int) -> float:
    """FLOPs of a linear with so many experts on every row over those of the linear: 2 d^2 + 4 E r d over 2 d^2."""
    return 1 + 2 * experts * rank / dim


def _report(
    arguments: argparse.Namespace,
    sizes: dict[str, tuple[int, int]],
    device: Device,
    times: Seconds,
    memory: dict[str, float],
) -> None:
    clock = device.told["clock"]
    title = f"Linears that adapt to domains on {device.name}"
    parts: list[str | Rows] = [
        f"Width {arguments.dim}, batch {arguments.batch}, {str(device.dtype).removeprefix('torch.')}, threads: "
        f"{torch.get_num_threads()}. Milliseconds of one pass ({clock}), medians of {arguments.turns} turns; in "
        "brackets the ratio to `dense`, the median of the turns' own. FLOPs are those of the forms over `dense`'s.",
        "\n".join(f"- `{form}`: {text}" for form, text in FORMS.items()),
    ]
    lines: list[Line] = []
    for kind in PASSES:
        rows = []
        for name, (num_domains, rank) in sizes.items():
            of = times[name][kind]
            ratios = {form: median_ratio(of, form, "dense") for form in of}
            milliseconds = {form: 1000 * median(seconds) for form, seconds in of.items()}
            flops = {
                "mlora": _flops_ratio(arguments.dim, 1, rank),
                "moe_mlora": _flops_ratio(arguments.dim, num_domains, rank),
            }
            rows.append(
                {
                    "": name,
                    **{form: f"{milliseconds[form]:.2f} ({ratios[form]:.2f})" for form in of},
                    "mlora's FLOPs": f"{flops['mlora']:.2f}",
                    "moe_mlora's FLOPs": f"{flops['moe_mlora']:.2f}",
                    "moe_mlora / its FLOPs": f"{ratios['moe_mlora'] / flops['moe_mlora']:.2f}",
                }
            )
            line: dict[str, Any] = {"kind": "time", "size": name, "pass": kind, "milliseconds": milliseconds}
            lines.append({**line, "ratios to dense": ratios, "flops over dense": flops})
        show(f"{title}: {kind}", rows)
        parts += [f"## {kind.capitalize()}", rows]
    largest = [{"": name, "MiB": f"{of:.1f}"} for name, of in memory.items()]
    parts += ["## Memory", "The largest tensor that a pass of `moe_mlora` makes.", largest]
    parts += [arguments.note] if arguments.note else []
    lines += [{"kind": "memory", "size": name, "MiB": of} for name, of in memory.items()]
    command = ["python", "-m", "benchmarks.domains", "--domains", *map(str, arguments.domains)]
    command += ["--ranks", *map(str, arguments.ranks), "--dim", str(arguments.dim)]
    command += ["--batch", str(arguments.batch), "--turns", str(arguments.turns)]
    about = {
        "command": shlex.join(command),
        "note": arguments.note,
        **device.told,
        "batch_size": arguments.batch,
        **environment(),
    }
    write(arguments.output / f"domains_{device.name}", title, parts, about, lines)


if __name__ == "__main__":
    main()
