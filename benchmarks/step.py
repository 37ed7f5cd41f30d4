"""How long a training step takes and where the time goes.

    python -m benchmarks.step [--config PATH] [path.to.key=value ...]

Runs alone or under torchrun. The same tables are trained under a dense tower and under a HiLoMoE tower in each kind of
stage, in turns, so that whatever else slows the machine slows all of them; so is the dense tower with each of the
options that cost time. Where the config has `model.replaces`, that tower is measured as well: two `model.paths`, say,
beside one tower of as many FLOPs. Each turn measures

- whole steps through the pipeline and the loader, as the trainer takes them, metrics included, log lines not;
- steps on batches at hand and without the pipeline, in parts. The graph is cut before the dense arch and the device
  synchronised at each border, so a part never hides behind another.

What the parts leave of the whole is the rest: the pipeline's own work, negative where the pipeline overlaps parts.
"""

import argparse
import json
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import count, islice
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from benchmarks.report import RESULTS, Line, environment, number, show, shown_path, write
from recsys.cli import run_entry
from recsys.config import DEFAULT_CONFIG, Config, ConfigError, load_config
from recsys.data.batch import Batch
from recsys.data.order import Epoch
from recsys.data.parquet import ParquetShards
from recsys.data.splits import open_loader, open_splits
from recsys.model.cost import PARTS as COST_PARTS
from recsys.model.cost import CostReport, cost_report
from recsys.model.ranker import Ranker, build_ranker
from recsys.prepare.synthetic import write_embedded
from recsys.runtime import Ranks, once_on_each_machine, process_group
from recsys.sharding.shard import ShardedRanker, shard
from recsys.training.averages import Averages
from recsys.training.compute import begin_computing
from recsys.training.metrics import BinaryMetrics
from recsys.training.optimizers import PhaseOptimizers, begin_phase
from recsys.training.progress import Progress

WARM_UP = 10
"""Steps before the clock starts: they trace the model, make the optimizers' state and use up what was read ahead."""

_RATES = {"steps": WARM_UP, "learning_rate": 1e-3, "sparse_learning_rate": 0.02}
_LOSSES = {"balance_weight": 0.01, "z_weight": 0.001}
STAGES: dict[str, dict[str, Any]] = {
    "backbone": {"trains": "backbone", **_RATES},
    "experts": {"trains": "experts", **_RATES, **_LOSSES},
    "joint": {"trains": "all", **_RATES, **_LOSSES},
}
"""One of each kind; the config's own may lack one, and what they are for does not change a step's time."""

OPTIONS: dict[str, tuple[str, ...]] = {
    "batch norm": ("model.tower.normalization=batch",),
    "embedding dropout": ("model.embedding_dropout=0.1",),
    "Muon": ("optimizers.dense.type=muon",),
    "clipping": ("optimizers.dense.max_grad_norm=1.0",),
    "averages": ("optimizers.average={tables: none}",),
    "averages, sweeps": ("optimizers.average={tables: sweep}",),
    "averages, touched": ("optimizers.average={tables: touched}",),
    "decoupled decay": ("optimizers.sparse={weight_decay: 1e-4, weight_decay_mode: decoupled}",),
    "coupled decay": ("optimizers.sparse={weight_decay: 1e-6, weight_decay_mode: coupled}",),
}
"""What is tried on the dense tower, by name; batch norm only where the config has one tower."""

ON_GPU: dict[str, tuple[str, ...]] = {
    "fused AdamW": ("optimizers.dense.fused=true",),
    "bfloat16": ("compute.autocast=bfloat16",),
    "TF32": ("compute.tf32=true",),
    "compiled": ("compute.compile=true",),
    "compiled, bfloat16, fused AdamW": (
        "compute={compile: true, autocast: bfloat16}",
        "optimizers.dense.fused=true",
    ),
}
"""The same, tried on GPUs alone."""
REPLACED = "replaced tower"
"""The case of `model.replaces`."""

PARTS = ("sparse forward", "sparse backward", "dense forward", "dense backward", "dense optimizer")


@dataclass(frozen=True)
class Case:
    """What is measured.

    Attributes:
        name: in the report.
        config: of the dense arch and the stages.
        stage: one of the config's.
        sharded: what trains it, with the tables.
        dense_arch: on the device.
    """

    name: str
    config: Config
    stage: str
    sharded: ShardedRanker
    dense_arch: nn.Module


def main() -> None:
    """Measure what the command line asks for, and report."""
    parser = argparse.ArgumentParser(prog="benchmarks.step", description="Time the training step and its parts.")
    parser.add_argument("--config", default=DEFAULT_CONFIG, help="YAML file; its stages are not used (%(default)s)")
    parser.add_argument("--data", help="where the synthetic log of the config is or goes (default: a temporary place)")
    parser.add_argument("--steps", type=int, default=30, help="steps of a turn (default: %(default)s)")
    parser.add_argument("--turns", type=int, default=7, help="of each case (default: %(default)s)")
    parser.add_argument("--note", help="what a reader of the figures must know, such as what else the machine did")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where the results go (benchmarks/results)")
    parser.add_argument("overrides", nargs="*", metavar="path.to.key=value", help="settings that replace the file's")
    arguments = parser.parse_args()
    if arguments.steps < 1 or arguments.turns < 1:
        parser.error("--steps and --turns must be at least 1")
    run_entry(lambda: _benchmark(arguments))


def _benchmark(arguments: argparse.Namespace) -> None:
    config = _load(arguments, {"joint": STAGES["joint"]})
    if config.model.hilomoe is None:
        raise ConfigError("model.hilomoe is null, so there is no HiLoMoE tower to compare the dense one with")
    if arguments.data is not None and config.data.synthetic is None:
        raise ConfigError("--data is for the synthetic log, and data.synthetic is not set")
    with process_group(config.device) as ranks, _log_directory(config, arguments.data, ranks) as log:
        config = _load(arguments, STAGES, *log)
        dense = partial(_load, arguments, {"joint": STAGES["joint"]}, *log, "model.hilomoe=null")
        once_on_each_machine(ranks, partial(write_embedded, config))
        shards = open_splits(config, ["train"])["train"]
        cases, costs = _cases(config, dense, ranks), cost_report(dense())
        turns: dict[str, list[dict[str, float]]] = {case.name: [] for case in cases}
        with ExitStack() as stack:
            stream = _Stream(shards, config, ranks, stack)
            for turn in range(arguments.turns):
                for case in cases:
                    turns[case.name].append(_turn(case, stream, ranks, arguments.steps))
                if ranks.is_first:
                    print(f"turn {turn + 1} of {arguments.turns}", flush=True)
        dist.barrier()  # no rank may take the log away while another still reads it
        if ranks.is_first:
            _report(arguments, config, costs, ranks, turns)


def _cases(config: Config, dense: Callable[..., Config], ranks: Ranks) -> list[Case]:
    """All that is measured.

    Args:
        config: with experts, and all stages.
        dense: gives the config of the dense tower, with overrides.
        ranks: this process among all.
    """

    def case(name: str, config: Config) -> Case:
        sharded = shard(build_ranker(config, seed=0), config, ranks, seed=0)
        return Case(name, config, "joint", sharded, sharded.ranker.dense_arch)

    plain, with_experts = dense(), case("HiLoMoE", config)
    options = OPTIONS if plain.model.tower else {name: of for name, of in OPTIONS.items() if name != "batch norm"}
    options = options | (ON_GPU if ranks.device.type == "cuda" else {})
    cases = [
        case("dense tower", plain),
        *(case(name, dense(*overrides)) for name, overrides in options.items()),
        *(replace(with_experts, name=f"HiLoMoE, {stage}", stage=stage) for stage in STAGES),
    ]
    if plain.model.replaces is not None:
        of_it = {"tower": plain.model.replaces, "paths": None, "replaces": None}
        cases.append(case(REPLACED, plain.model_copy(update={"model": plain.model.model_copy(update=of_it)})))
    return cases


def _load(arguments: argparse.Namespace, stages: Mapping[str, Any], *overrides: str) -> Config:
    return load_config(arguments.config, [*arguments.overrides, *overrides, f"stages={json.dumps(stages)}"])


@contextmanager
def _log_directory(config: Config, given: str | None, ranks: Ranks) -> Iterator[list[str]]:
    """Overrides that put the synthetic log of a config where all ranks find it; none for a config with other data."""
    if config.data.synthetic is None:
        yield []
        return
    with ExitStack() as stack:
        shared = [given]
        if given is None and ranks.is_first:
            shared = [stack.enter_context(TemporaryDirectory(prefix="hilorec-"))]
        dist.broadcast_object_list(shared)
        splits = [f"data.{split}={json.dumps(f'{shared[0]}/{split}/*.parquet')}" for split in config.data.splits]
        yield [f"data.synthetic.directory={json.dumps(shared[0])}", *splits]


class _Stream:
    """A rank's batches, epoch after epoch without end, and how long they were waited for.

    Args:
        shards: what to read.
        config: how to read it.
        ranks: this process among all.
        stack: what stops the reading.

    Attributes:
        batches: the one iterator of all of them.
    """

    def __init__(self, shards: ParquetShards, config: Config, ranks: Ranks, stack: ExitStack) -> None:
        self._shards, self._config, self._ranks = shards, config, ranks
        self._loader = stack.enter_context(open_loader(shards, map(self._order, count()), config, ranks))
        self.batches = self._batches()

    @property
    def wait_seconds(self) -> float:
        return self._loader.wait_seconds

    def _batches(self) -> Iterator[Batch]:
        while True:
            yield from self._loader

    def _order(self, epoch: int) -> Epoch:
        data = self._config.data
        return Epoch(
            self._shards.row_counts,
            self._ranks.world_size,
            data.batch_size,
            epoch=epoch,
            shuffle=data.shuffle,
            window_row_groups=data.window_row_groups,
        )


def _turn(case: Case, stream: _Stream, ranks: Ranks, steps: int) -> dict[str, float]:
    """Measure a case: seconds per step, whole and in parts, over all ranks; a collective call."""
    sharded = case.sharded
    begin_computing(case.config.compute, ranks.device)
    stage = begin_phase(sharded, case.dense_arch, case.config, case.stage, num_steps=WARM_UP + steps)
    sharded.ranker.train()
    progress = Progress()
    averages = Averages(case.config.optimizers.average, sharded, case.dense_arch, progress)

    def after_step() -> None:
        progress.phase_steps += 1
        averages.step_done()

    whole = _whole_steps(sharded.ranker, stage, stream, ranks, steps, after_step)
    parts = _divided_steps(sharded.ranker, stage, list(islice(stream.batches, 1 + steps)), ranks)
    sharded.rows.settle()  # as at the end of every phase
    averages.become_weights()
    figures = torch.tensor(
        [whole["examples"], whole["step"], whole["data wait"], *(parts[name] for name in PARTS)], dtype=torch.float64
    )
    dist.all_reduce(figures)
    examples, *seconds = figures.tolist()
    step, wait, *divided = [value / ranks.world_size for value in seconds]
    return {
        "examples/s": examples / steps / step,
        "step": step,
        "data wait": wait,
        **dict(zip(PARTS, divided, strict=True)),
        "rest": step - wait - sum(divided),
    }


def _whole_steps(
    ranker: Ranker,
    stage: PhaseOptimizers,
    stream: _Stream,
    ranks: Ranks,
    steps: int,
    after_step: Callable[[], None],
) -> dict[str, float]:
    """Take steps as the trainer does: this rank's examples in all; mean seconds per step and of its wait for data."""
    pipeline = TrainPipelineSparseDist(ranker, stage.all, ranks.device)
    metrics = BinaryMetrics(exact_examples=1 << 22, num_bins=1 << 16)
    examples, began, waited = 0, 0.0, 0.0
    for step in range(WARM_UP + steps):
        if step == WARM_UP:
            began, waited, examples = _clock(ranks), stream.wait_seconds, 0
        stage.set_learning_rates(step)
        output = pipeline.progress(stream.batches)
        after_step()
        metrics.update(output.logits, output.labels)
        examples += len(output.labels)
    seconds = _clock(ranks) - began
    pipeline.detach()
    return {
        "examples": examples,
        "step": seconds / steps,
        "data wait": (stream.wait_seconds - waited) / steps,
    }


def _divided_steps(ranker: Ranker, stage: PhaseOptimizers, batches: Sequence[Batch], ranks: Ranks) -> dict[str, float]:
    """Take steps in parts: mean seconds of each, over all batches but the first, which is to warm up."""
    seconds = dict.fromkeys(PARTS, 0.0)
    cut = _Cut(ranks)
    handle = ranker.dense_arch.register_forward_pre_hook(cut)
    for index, batch in enumerate([batch.to(ranks.device) for batch in batches]):
        stage.all.zero_grad()
        dist.barrier()  # or a rank's wait for the one behind it would count as its sparse forward
        began = _clock(ranks)
        loss, _ = ranker(batch)
        forward = _clock(ranks)
        loss.backward()
        backward = _clock(ranks)
        if cut.pooled.requires_grad:
            cut.pooled.backward(cut.leaf.grad)
        sparse_backward = _clock(ranks)
        stage.dense.step()
        dense_update = _clock(ranks)
        for name, optimizer in stage.all.optimizers:
            if name != "dense":
                optimizer.step()
        sparse_update = _clock(ranks)
        if index == 0:
            continue
        seconds["sparse forward"] += cut.reached - began
        seconds["sparse backward"] += sparse_backward - backward + sparse_update - dense_update
        seconds["dense forward"] += forward - cut.reached
        seconds["dense backward"] += backward - forward
        seconds["dense optimizer"] += dense_update - sparse_backward
    handle.remove()
    return {name: value / (len(batches) - 1) for name, value in seconds.items()}


class _Cut:
    """Hook before the dense arch that divides the graph there and notes when the forward pass came by.

    Attributes:
        pooled: end of the sparse part, with its graph unless the embeddings are frozen.
        leaf: beginning of the dense part, the same values.
        reached: time.
    """

    pooled: Tensor
    leaf: Tensor
    reached: float

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks

    def __call__(self, _: nn.Module, inputs: tuple[Tensor, Any, Any]) -> tuple[Tensor, Any, Any]:
        self.pooled, *rest = inputs
        self.leaf = self.pooled.detach().requires_grad_(self.pooled.requires_grad)
        self.reached = _clock(self._ranks)
        return (self.leaf, *rest)


def _clock(ranks: Ranks) -> float:
    """The time when all that was asked of the device is done."""
    if ranks.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _report(
    arguments: argparse.Namespace,
    config: Config,
    costs: CostReport,
    ranks: Ranks,
    turns: Mapping[str, Sequence[Mapping[str, float]]],
) -> None:
    cases = {
        name: {figure: median(turn[figure] for turn in measured) for figure in measured[0]}
        for name, measured in turns.items()
    }

    def ratio(name: str, other: str, figure: str) -> float:
        return median(a[figure] / b[figure] for a, b in zip(turns[name], turns[other], strict=True))

    ratios = {
        **{
            f"step with {name} / dense step": ratio(name, "dense tower", "step")
            for name in turns
            if name in OPTIONS | ON_GPU
        },
        "HiLoMoE step / dense step": ratio("HiLoMoE, joint", "dense tower", "step"),
        "experts stage / joint stage": ratio("HiLoMoE, experts", "HiLoMoE, joint", "step"),
        "backbone stage / joint stage": ratio("HiLoMoE, backbone", "HiLoMoE, joint", "step"),
    }
    if REPLACED in turns:
        ratios["dense step / step of the tower that is replaced"] = ratio("dense tower", REPLACED, "step")
    command = ["torchrun", "--nproc-per-node", str(ranks.world_size)] if ranks.world_size > 1 else ["python"]
    command += ["-m", "benchmarks.step", "--config", shown_path(arguments.config)]
    command += ["--steps", str(arguments.steps), "--turns", str(arguments.turns)]
    about = {
        "name": config.name,
        "command": shlex.join([*command, *arguments.overrides]),
        "note": arguments.note,
        "ranks": ranks.world_size,
        "threads_per_rank": torch.get_num_threads(),
        "device": ranks.device.type,
        "batch_size": config.data.batch_size,
        "flops_per_example": {cost.model: cost.over(COST_PARTS)[0] for cost in (costs.cost, costs.against) if cost},
        **environment(),
    }
    lines: list[Line] = [{"kind": "case", "case": name, "medians": figures} for name, figures in cases.items()]
    lines += [{"kind": "ratio", "ratio": name, "median": value} for name, value in ratios.items()]
    lines += [
        {"kind": "turn", "case": name, "turn": turn, "figures": figures}
        for name, measured in turns.items()
        for turn, figures in enumerate(measured, start=1)
    ]
    split = [_split_row(name, figures, turns[name]) for name, figures in cases.items()]
    detail = [{"ms": name, **{part: _milliseconds(figures[part]) for part in PARTS}} for name, figures in cases.items()]
    shown_ratios = [{"ratio of times": name, "": f"{value:.2f}"} for name, value in ratios.items()]
    title = f"Training step: {config.name} on {ranks.device.type}"
    for rows in (split, detail, shown_ratios):
        show(title, rows)
    how = (
        f"Ranks: {ranks.world_size}; threads and batch of each: {torch.get_num_threads()}, {config.data.batch_size}. "
        f"Medians of {arguments.turns} turns of {arguments.steps} steps; examples/s over all ranks, with the range of "
        "the turns."
    )
    borders = (
        "Sparse: input distribution, lookup, output distribution; gradients' way back and the tables' update. Dense: "
        "forward and backward of projection, tower, head and losses with DDP's reduction, and the optimizer. Both are "
        "taken without the pipeline; the rest is what they and the data wait leave of the whole step, negative where "
        "the pipeline overlaps them. In the experts stage the embeddings are frozen, so they have no backward."
    )
    note = [arguments.note] if arguments.note else []
    stem = arguments.output / f"step_{ranks.device.type}"
    write(stem, title, [how, split, shown_ratios, detail, borders, *note], about, lines)


def _split_row(name: str, figures: Mapping[str, float], turns: Sequence[Mapping[str, float]]) -> dict[str, str]:
    rates = [turn["examples/s"] for turn in turns]
    sums = {
        "data wait": figures["data wait"],
        **{kind: sum(figures[part] for part in PARTS if part.startswith(kind)) for kind in ("sparse", "dense")},
        "rest": figures["rest"],
    }
    return {
        "": name,
        "examples/s": f"{number(figures['examples/s'])} ({number(min(rates))} to {number(max(rates))})",
        "step, ms": _milliseconds(figures["step"]),
        **{f"{part}, ms": f"{_milliseconds(value)} ({value / figures['step']:.0%})" for part, value in sums.items()},
    }


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.2f}"


if __name__ == "__main__":
    main()
