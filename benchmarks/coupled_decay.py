"""How far sweeps of coupled weight decay are from its dense form, in which every step's gradient has the term.

    python -m benchmarks.coupled_decay

One table of 1,000 rows is trained by fbgemm on a log of two ids a row, half of which hardly any step looks up, by a
linear schedule from the rate to 0, with a sweep every k steps. A loop in double precision is the dense form. Told are
the L2 norm of the difference of the tables over that of the table, the difference of the log loss on the last steps'
rows against their true probabilities, and, to compare with, what the decay does at all.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    EmbeddingLocation,
    SplitTableBatchedEmbeddingBagsCodegen,
)
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from benchmarks.report import RESULTS, Line, environment, show, write
from recsys.cli import run_entry
from recsys.config import SparseOptimizerConfig
from recsys.sharding.rows import Piece, Rows

ROWS, DIM, BATCH = 1_000, 8, 128
EVERY = (1, 8, 32, 128)
CASES = (("sgd", 5.0, 1e-4), ("adagrad", 0.05, 3e-5), ("rowwise_adagrad", 0.05, 3e-4))
"""Optimizer, rate, decay."""
_FUSED = {
    "sgd": EmbOptimType.EXACT_SGD,
    "adagrad": EmbOptimType.EXACT_ADAGRAD,
    "rowwise_adagrad": EmbOptimType.EXACT_ROWWISE_ADAGRAD,
}
_EPS = 1e-8
_JUDGED_STEPS = 256


class Log:
    """What is learnt: ids by a power law, each with a logit of its own whose sum is a row's.

    Args:
        steps: how many batches.

    Attributes:
        ids: (steps, BATCH, 2).
        labels: (steps, BATCH), drawn.
        probabilities: (steps, BATCH), of which they are drawn.
        weights: (ROWS, DIM) that the table begins with.
        head: (DIM,) fixed, from a sum of embeddings to the logit.
    """

    def __init__(self, steps: int) -> None:
        random = np.random.default_rng(0)
        shares = 1 / np.arange(1, ROWS + 1)
        self.ids = torch.from_numpy(random.choice(ROWS, (steps, BATCH, 2), p=shares / shares.sum()))
        self.ids[..., 1] = (self.ids[..., 1] * 7 + 3) % ROWS
        logits = torch.from_numpy(random.normal(size=ROWS))
        self.probabilities = logits[self.ids].sum(-1).sigmoid()
        self.labels = (torch.from_numpy(random.random((steps, BATCH))) < self.probabilities).double()
        self.weights = torch.from_numpy(random.normal(size=(ROWS, DIM)) * 0.01)
        self.head = torch.from_numpy(random.normal(size=DIM) / DIM**0.5)

    def loss(self, pooled: Tensor, step: int) -> Tensor:
        """Of a step's sums of embeddings, (BATCH, DIM)."""
        found: Tensor = binary_cross_entropy_with_logits(pooled @ self.head.to(pooled), self.labels[step].to(pooled))
        return found

    def log_loss(self, weights: Tensor) -> float:
        """Of a table, against the true probabilities of the last steps' rows."""
        logits = (weights @ self.head)[self.ids[-_JUDGED_STEPS:]].sum(-1)
        return float(binary_cross_entropy_with_logits(logits, self.probabilities[-_JUDGED_STEPS:]))


def dense(log: Log, kind: str, rate: float, decay: float) -> Tensor:
    """The table (ROWS, DIM) whose every row has the decay in every step's gradient."""
    weights, steps = log.weights.clone(), len(log.ids)
    squares = torch.zeros(ROWS, 1 if kind == "rowwise_adagrad" else DIM, dtype=torch.double)
    for step in range(steps):
        leaf = weights.clone().requires_grad_()
        log.loss(leaf[log.ids[step]].sum(1), step).backward()
        assert leaf.grad is not None
        gradient, now = leaf.grad + decay * weights, rate * (1 - step / steps)
        if kind == "sgd":
            weights -= now * gradient
        else:
            square = gradient.square()
            squares += square.mean(1, keepdim=True) if kind == "rowwise_adagrad" else square
            weights -= now * gradient / (squares.sqrt() + _EPS)
    return weights


def swept(log: Log, kind: str, rate: float, decay: float, every: int) -> Tensor:
    """The table (ROWS, DIM) that fbgemm trains, with a sweep every so many steps; a decay of 0 is none at all."""
    module = SplitTableBatchedEmbeddingBagsCodegen(
        [(ROWS, DIM, EmbeddingLocation.HOST, ComputeDevice.CPU)], optimizer=_FUSED[kind], learning_rate=0.0, eps=_EPS
    )
    (weights,) = module.split_embedding_weights()
    weights.copy_(log.weights)
    config = SparseOptimizerConfig.model_validate(
        {"type": kind, "eps": _EPS, "weight_decay": decay, "weight_decay_mode": "coupled", "coupled_every": every}
        if decay
        else {"type": kind, "eps": _EPS}
    )
    rows = Rows([(module, [Piece("table", 0, 0, None)])], config, {}, torch.device("cpu"))
    steps, offsets = len(log.ids), torch.arange(0, 2 * BATCH + 1, 2)
    for step in range(steps):
        now = rate * (1 - step / steps)
        module.set_learning_rate(now)
        rows.begin_step(now)
        log.loss(module(log.ids[step].flatten(), offsets), step).backward()
    rows.settle()
    trained: Tensor = weights.double().clone()
    return trained


def measure(steps: int) -> list[Line]:
    """All cases: `effect` of the decay, and by k the `difference` of tables and of the `log loss`."""
    log, lines = Log(steps), []
    for kind, rate, decay in CASES:
        expected, without = dense(log, kind, rate, decay), swept(log, kind, rate, 0.0, 1)
        by_every = {every: swept(log, kind, rate, decay, every) for every in EVERY}
        of_case: Line = {
            "kind": "case",
            "optimizer": kind,
            "rate": rate,
            "decay": decay,
            "effect": _relative(without, expected),
            "difference": {every: _relative(found, expected) for every, found in by_every.items()},
            "log loss": {every: log.log_loss(found) - log.log_loss(expected) for every, found in by_every.items()},
        }
        lines.append(of_case)
    return lines


def _relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def main() -> None:
    """Measure, and report."""
    parser = argparse.ArgumentParser(prog="benchmarks.coupled_decay", description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=1024, help="of each training (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where the results go (benchmarks/results)")
    arguments = parser.parse_args()
    if arguments.steps < 1:
        parser.error("--steps must be at least 1")
    run_entry(lambda: _report(arguments.steps, arguments.output, measure(arguments.steps)))


def _report(steps: int, output: Path, lines: Sequence[Line]) -> None:
    rows = [
        {
            "": f"{line['optimizer']}, rate {line['rate']:g}, decay {line['decay']:g}",
            "the term's own effect": f"{line['effect']:.1%}",
            **{f"k = {every}": f"{line['difference'][every]:.2%}, {line['log loss'][every]:+.0e}" for every in EVERY},
        }
        for line in lines
    ]
    title = "Coupled weight decay by sweeps"
    show(title, rows)
    how = (
        f"{steps:,} steps of {BATCH} rows on a table of {ROWS:,} rows of {DIM} numbers: the L2 norm of the difference "
        "from the dense form's table over that of its own, and the difference of the log loss."
    )
    command = "python -m benchmarks.coupled_decay" + ("" if steps == 1024 else f" --steps {steps}")
    write(output / "coupled_decay_cpu", title, [how, rows], {"command": command, **environment()}, lines)


if __name__ == "__main__":
    main()
