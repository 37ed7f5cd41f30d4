"""Figures of domains as a person sees them: a line, a table of the largest and the worst, a picture of bars."""

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from recsys.training.metrics import Metrics, OverDomains

LARGEST, WORST = 12, 8
"""Rows of a table where there are more domains than both together: so many of the most examples, and of the others so
many of the least AUC."""

_BAR_WIDTH, _BAR_HEIGHT, _GAP, _MARGIN, _FONT_SIZE = 360, 20, 12, 12, 13
_BAR, _LINE, _TEXT = "#7aaad5", "#9e1e2a", "#333333"


def domain_line(metrics: Metrics) -> str:
    """What the figures over domains are, in words.

    Args:
        metrics: with figures over domains.
    """
    over = metrics.over_domains
    assert over is not None
    domains = "1 domain" if over.domains == 1 else f"{over.domains:,} domains"
    left_out = ""
    if over.one_class:
        names = ", ".join(over.one_class[:5])
        more = len(over.one_class) - 5
        left_out = f"; of one class, and without AUC: {names}{f' and {more:,} more' if more > 0 else ''}"
    if over.wauc is None or over.mean_auc is None or over.worst_auc is None:
        return f"{domains}{left_out}"
    error = f" +- {over.wauc_error:.1e}" if over.wauc_error else ""
    return (
        f"{domains}: wauc {over.wauc:.4f}{error}  mean auc {over.mean_auc:.4f}  "
        f"worst {over.worst_auc:.4f} ({over.worst}){left_out}"
    )


def largest_and_worst(aucs: NDArray[np.float64]) -> tuple[list[int], str]:
    """Which of some groups a table has, and that in words, where it has not all.

    Args:
        aucs: (G,) of groups, those of the most examples first; NaN of those that have none.
    """
    if len(aucs) <= LARGEST + WORST:
        return list(range(len(aucs))), ""
    others = LARGEST + np.flatnonzero(~np.isnan(aucs[LARGEST:]))
    worst = others[np.argsort(aucs[others], kind="stable")[:WORST]]
    told = f": the {LARGEST} largest, and the {len(worst)} worst of the other {len(aucs) - LARGEST:,}"
    return [*range(LARGEST), *np.sort(worst).tolist()], told


def _shown(domains: Mapping[str, Metrics]) -> tuple[list[str], str]:
    """Names of the domains that a table or a picture has, and which these are, in words; none without examples."""
    largest = sorted((name for name in domains if domains[name].examples), key=lambda name: -domains[name].examples)
    shown, which = largest_and_worst(np.array([domains[name].auc for name in largest], np.float64))
    return [largest[place] for place in shown], which


def domain_rows(domains: Mapping[str, Metrics], reference: Mapping[str, Metrics]) -> tuple[list[dict[str, str]], str]:
    """A table of domains and its title.

    Args:
        domains: figures of the model by name.
        reference: of a reference column, which the model's AUC is told to be above; empty without one.
    """
    shown, which = _shown(domains)
    rows, is_binned = [], any(metrics.auc_error for metrics in domains.values())
    for name in shown:
        metrics, other = domains[name], reference.get(name)
        row = {"": name, "examples": f"{metrics.examples:,}", "positives": f"{metrics.positives:,}"}
        for figure in ("auc", "log_loss", "ne", "calibration"):
            value = getattr(metrics, figure)
            row[figure.replace("_", " ")] = "-" if value is None else f"{value:.4f}"
            if figure == "auc" and is_binned:
                row["auc error"] = f"{metrics.auc_error:.1e}"
        if reference:
            row["auc above reference"] = (
                "-" if metrics.auc is None or other is None or other.auc is None else f"{metrics.auc - other.auc:+.4f}"
            )
        rows.append(row)
    return rows, f"By domain{which}"


def draw_domains(domains: Mapping[str, Metrics]) -> NDArray[np.uint8]:
    """Bars of the AUC of the domains that a table has, from .5 or below to 1, and a line at the WAUC of all.

    Args:
        domains: figures by name.

    Returns:
        An RGB image (height, width, 3).
    """
    font = ImageFont.load_default(_FONT_SIZE)
    names, _ = _shown(domains)
    aucs = {name: domains[name].auc for name in names}
    known = [auc for auc in aucs.values() if auc is not None]
    low = min(0.5, math.floor(min(known, default=0.5) * 10) / 10)
    labels = {name: f"{name} ({domains[name].examples:,})" for name in names}
    left = _MARGIN + math.ceil(max((font.getlength(label) for label in labels.values()), default=0)) + _GAP
    top = _MARGIN + _BAR_HEIGHT
    height = top + len(names) * (_BAR_HEIGHT + 4) + _MARGIN
    image = Image.new("RGB", (left + _BAR_WIDTH + 76 + _MARGIN, height), "white")
    draw = ImageDraw.Draw(image)

    def place(auc: float) -> float:
        return left + (auc - low) / (1 - low) * _BAR_WIDTH

    for number, name in enumerate(names):
        y = top + number * (_BAR_HEIGHT + 4)
        draw.text((left - _GAP / 2, y + _BAR_HEIGHT / 2), labels[name], fill=_TEXT, font=font, anchor="rm")
        auc = aucs[name]
        if auc is not None:
            draw.rectangle((left, y, place(auc), y + _BAR_HEIGHT), fill=_BAR)
        text = "one class" if auc is None else f"{auc:.4f}"
        draw.text((left + _BAR_WIDTH + _GAP / 2, y + _BAR_HEIGHT / 2), text, fill=_TEXT, font=font, anchor="lm")
    if (wauc := OverDomains.of(domains).wauc) is not None:
        draw.line((place(wauc), top - 4, place(wauc), height - _MARGIN), fill=_LINE, width=2)
        draw.text((place(wauc), _MARGIN + 2), f"wauc {wauc:.4f}", fill=_LINE, font=font, anchor="mm")
    return np.asarray(image)
