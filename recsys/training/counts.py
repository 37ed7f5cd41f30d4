"""How often values were cut, replaced or left out: over all ranks, and in words."""

from collections import Counter
from collections.abc import Sequence

import torch
import torch.distributed as dist

Counts = Counter[tuple[str, str]]
"""By kind and feature; those of `recsys.data.features.Columns.counted`."""


def reduce_counts(counts: Counts, counted: Sequence[tuple[str, str]], device: torch.device) -> Counts:
    """The sum over all ranks; a collective call where there is anything that may be counted.

    Args:
        counts: of this rank.
        counted: all that may be, the same on every rank.
        device: where the process group computes.
    """
    if not counted:
        return counts
    sums = torch.tensor([counts[key] for key in counted], device=device)
    dist.all_reduce(sums)
    return +Counter(dict(zip(counted, sums.tolist(), strict=True)))


def num_skipped(counts: Counts) -> int:
    """Rows that were left out."""
    return sum(number for (kind, _), number in counts.items() if kind == "skipped")


def by_kind(counts: Counts) -> dict[str, dict[str, int]]:
    """`{kind: {feature: number}}`."""
    kinds: dict[str, dict[str, int]] = {}
    for (kind, feature), number in counts.items():
        kinds.setdefault(kind, {})[feature] = number
    return kinds


def in_words(counts: Counts) -> str:
    """`cut: tags 12, words 3; skipped: label 1`."""
    kinds = by_kind(counts).items()
    return "; ".join(f"{kind}: " + ", ".join(f"{name} {n:,}" for name, n in of.items()) for kind, of in kinds)
