"""What the cases of a grid cost beside one another: a batch in training and in serving, time and memory.

    python -m benchmarks.cost GRID.yaml --cases CASE [CASE ...]

Each case's dense arch is built as its config has it, and given random embeddings of its width, and rows of all domains,
as many of each. Tables are left out: they are the same for all. Cases are timed in turns, each against the first:
training with all experts and the gate at work, as the last of a mixture's stages has them; serving as `Scorer` does it,
in evaluation mode, and folded where a model can be.
"""

import argparse
import copy
import shlex
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

from benchmarks.layer import PASSES, Device, median_ratio, memory_of, time_in_turns
from benchmarks.quality.grid import cases_of, load_grid
from benchmarks.report import RESULTS, Line, environment, show, shown_path, write
from recsys.cli import run_entry
from recsys.config import Config
from recsys.errors import UserError
from recsys.host_memory import keep_freed_memory
from recsys.model.dense_arch import DenseArch
from recsys.model.experts.attach import domain_linears
from recsys.model.ranker import build_ranker
from recsys.terminal import Rows

FORWARD, BACKWARD = PASSES
SERVING = "serving"
"""A forward pass of a model that Scorer has made ready."""


class _OnABatch(nn.Module):
    """A dense arch that is given the rows' domains and dense features at every call."""

    def __init__(self, dense_arch: DenseArch, dense_features: Tensor, domain: Tensor) -> None:
        super().__init__()
        self.dense_arch, self.dense_features, self.domain = dense_arch, dense_features, domain

    def forward(self, pooled: Tensor) -> Tensor:
        """(B, W) -> (B, 1)."""
        logits: Tensor = self.dense_arch(pooled, self.dense_features, self.domain).logits
        return logits.unsqueeze(1)


def main() -> None:
    """Measure what the command line asks for, and report."""
    parser = argparse.ArgumentParser(prog="benchmarks.cost", description="Time the cases of a grid.")
    parser.add_argument("grid", metavar="GRID.yaml", help="docs/benchmarks.md has the keys")
    parser.add_argument("--cases", nargs="+", required=True, metavar="CASE", help="the first is what others go against")
    parser.add_argument("--batch", type=int, default=4096, help="rows (default: %(default)s)")
    parser.add_argument("--turns", type=int, default=15, help="of each case (default: %(default)s)")
    parser.add_argument("--note", help="what a reader of the figures must know, such as what else the machine did")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where the results go (benchmarks/results)")
    arguments = parser.parse_args()
    if min(arguments.batch, arguments.turns) < 1:
        parser.error("--batch and --turns must be at least 1")
    run_entry(lambda: _benchmark(arguments))


def _benchmark(arguments: argparse.Namespace) -> None:
    keep_freed_memory()  # as training does
    grid = load_grid(arguments.grid)
    configs = {case.name: case.runs[0].config for case in cases_of(grid, Path("outputs")) if case.runs}
    if unknown := [name for name in arguments.cases if name not in configs]:
        raise UserError(f"--cases {unknown[0]}: no such case; there are {', '.join(configs)}")
    device = Device("cuda" if torch.cuda.is_available() else "cpu")
    trained = {name: _model(configs[name], arguments.batch, device) for name in arguments.cases}
    served = {name: _served(model) for name, model in trained.items()}
    inputs = {name: _pooled(configs[name], arguments.batch, device) for name in arguments.cases}
    d_y = torch.randn(arguments.batch, 1, device=device.name)
    times = {}
    for kind, models, run in ((BACKWARD, trained, BACKWARD), (SERVING, served, FORWARD)):
        passes = {name: partial(device.run, model, inputs[name], d_y, run) for name, model in models.items()}
        times[kind] = time_in_turns(device, passes, arguments.turns)
        print(f"{kind}: done", flush=True)
    memory = {name: memory_of(device, model, inputs[name], d_y) for name, model in trained.items()}
    _report(arguments, device, trained, served, times, memory)


def _model(config: Config, batch: int, device: Device) -> _OnABatch:
    """A case's dense arch, training, its gate at work, experts no longer at zero."""
    dense_arch = build_ranker(config, seed=config.seed).dense_arch
    assert isinstance(dense_arch, DenseArch)
    torch.manual_seed(config.seed)
    for linear in domain_linears(dense_arch).values():
        for parameter in linear.domain_experts.parameters():
            nn.init.normal_(parameter, std=0.01)
    adaptation = dense_arch.domain_adaptation
    if adaptation is not None and adaptation.gate is not None:
        adaptation.use_gate()
    domain = torch.randperm(batch) % max(config.num_domains, 1)
    dense_features = torch.randn(batch, len(config.features.dense))
    model = _OnABatch(dense_arch, dense_features, domain).to(device.name)
    model.dense_features, model.domain = dense_features.to(device.name), domain.to(device.name)
    return model


def _served(model: _OnABatch) -> _OnABatch:
    """The same as `Scorer` has it."""
    served = copy.deepcopy(model).eval().requires_grad_(False)
    adaptation = served.dense_arch.domain_adaptation
    if adaptation is not None:
        adaptation.fold(domain_linears(served.dense_arch).values())
    return served


def _pooled(config: Config, batch: int, device: Device) -> Tensor:
    width = sum(config.embedding_dims.values())
    return torch.randn(batch, width, device=device.name, requires_grad=True)


def _report(
    arguments: argparse.Namespace,
    device: Device,
    trained: dict[str, _OnABatch],
    served: dict[str, _OnABatch],
    times: dict[str, dict[str, list[float]]],
    memory: dict[str, dict[str, float]],
) -> None:
    clock = device.told["clock"]
    name = Path(arguments.grid).stem
    title = f"What cases of {name} cost on {device.name}"
    first = arguments.cases[0]
    rows: list[dict[str, str]] = []
    lines: list[Line] = []
    for case, model in trained.items():
        parameters = sum(parameter.numel() for parameter in model.parameters())
        adaptation = served[case].dense_arch.domain_adaptation
        milliseconds = {kind: 1000 * median(of[case]) for kind, of in times.items()}
        ratios = {kind: median_ratio(of, case, first) for kind, of in times.items()}
        folded = adaptation is not None and adaptation.folded
        rows.append(
            {
                "case": case,
                **{f"{kind}, ms": f"{milliseconds[kind]:.1f} ({ratios[kind]:.2f})" for kind in times},
                "folded": "yes" if folded else "no",
                "dense parameters": f"{parameters:,}",
                **{f"{of}, MiB": f"{figure:.1f}" for of, figure in memory[case].items()},
            }
        )
        line: Line = {"kind": "case", "case": case, "milliseconds": milliseconds, "folded": folded}
        lines.append({**line, "ratios to the first": ratios, "parameters": parameters, "MiB": memory[case]})
    show(title, rows)
    parts: list[str | Rows] = [
        f"The dense arch on batches of {arguments.batch}, {str(device.dtype).removeprefix('torch.')}, threads: "
        f"{torch.get_num_threads()}: milliseconds ({clock}), medians of {arguments.turns} turns; in brackets the "
        f"ratio to {first}, the median of the turns' own. Serving is a forward pass of the model as `Scorer` has it.",
        rows,
        *([arguments.note] if arguments.note else []),
    ]
    command = ["python", "-m", "benchmarks.cost", shown_path(arguments.grid), "--cases", *arguments.cases]
    command += ["--batch", str(arguments.batch), "--turns", str(arguments.turns)]
    about = {
        "command": shlex.join(command),
        "note": arguments.note,
        **device.told,
        **environment(),
    }
    write(arguments.output / f"cost_{name}_{device.name}", title, parts, about, lines)


if __name__ == "__main__":
    main()
