"""Figures over domains, against their definitions; the table, the line and the picture of few domains and of many."""

import numpy as np
import pytest
from scipy.stats import mannwhitneyu

from recsys.training.by_domain import LARGEST, WORST, domain_line, domain_rows, draw_domains
from recsys.training.metrics import Metrics, OverDomains, weighted_metrics


def drawn(sizes: dict[str, int], seed: int = 0) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Logits and labels of each domain; those whose name says so have one class."""
    random = np.random.default_rng(seed)
    found = {}
    for name, size in sizes.items():
        labels = random.random(size) < 0.4
        if name.startswith("all "):
            labels[:] = True
        elif size:
            labels[:2] = True, False
        found[name] = random.normal(size=size) + labels * random.random(), labels
    return found


def measured(rows: dict[str, tuple[np.ndarray, np.ndarray]]) -> dict[str, Metrics]:
    return {name: weighted_metrics(logits, labels, np.ones(len(labels))) for name, (logits, labels) in rows.items()}


def test_figures_over_domains_are_their_definitions() -> None:
    """AUCs by scipy's Mann-Whitney statistic; who has one class, or no row, is left out and named."""
    rows = drawn({"home": 300, "cart": 50, "all clicked": 20, "search": 120})
    domains = measured(rows) | {"closed": Metrics(0, 0, None, 0.0, None, None, None)}
    aucs, sizes = {}, {}
    for name in ("home", "cart", "search"):
        logits, labels = rows[name]
        statistic = mannwhitneyu(logits[labels], logits[~labels]).statistic
        aucs[name], sizes[name] = statistic / (labels.sum() * (~labels).sum()), len(labels)
    over = OverDomains.of(domains)
    assert over.wauc == pytest.approx(np.average(list(aucs.values()), weights=list(sizes.values())))
    assert over.mean_auc == pytest.approx(np.mean(list(aucs.values())))
    assert over.worst == min(aucs, key=lambda name: aucs[name]) and over.worst_auc == pytest.approx(min(aucs.values()))
    assert over.one_class == ("all clicked",) and over.domains == 4 and over.wauc_error == 0


def test_one_domain_has_the_auc_of_all_rows() -> None:
    domains = measured(drawn({"home": 80}))
    over = OverDomains.of(domains)
    assert over.wauc == over.mean_auc == over.worst_auc == domains["home"].auc


def test_bounds_are_weighted_like_their_figures() -> None:
    domains = {
        name: Metrics(rows, 1, auc, error, 0.5, 1.0, 1.0)
        for name, rows, auc, error in (("a", 30, 0.8, 0.01), ("b", 10, 0.6, 0.05))
    }
    over = OverDomains.of(domains)
    assert over.wauc == pytest.approx(0.75) and over.wauc_error == pytest.approx(0.02)
    rows, _ = domain_rows(domains, {})
    assert [row["auc error"] for row in rows] == ["1.0e-02", "5.0e-02"]


def test_domains_of_one_class_alone_have_no_figure() -> None:
    domains = measured(drawn({"all one": 5, "all two": 6}))
    over = OverDomains.of(domains)
    assert (over.wauc, over.mean_auc, over.worst_auc, over.worst) == (None, None, None, None)
    assert domain_line(Metrics(11, 11, None, 0.0, 0.5, None, 1.0, over)) == (
        "2 domains; of one class, and without AUC: all one, all two"
    )
    image = draw_domains(domains)
    assert image.ndim == 3 and image.dtype == np.uint8


def test_few_domains_are_all_shown_the_largest_first() -> None:
    domains = measured(drawn({"small": 20, "all large": 200, "none": 0, "middle": 60}))
    rows, title = domain_rows(domains, {"middle": Metrics(60, 24, 0.25, 0.0, 0.5, 1.0, 1.0)})
    assert [row[""] for row in rows] == ["all large", "middle", "small"] and title == "By domain"
    assert rows[0]["auc"] == rows[0]["auc above reference"] == rows[2]["auc above reference"] == "-"
    assert float(rows[1]["auc above reference"]) == pytest.approx((domains["middle"].auc or 0) - 0.25, abs=1e-4)


def test_of_many_domains_the_largest_and_the_worst_of_the_others_are_shown_and_the_rest_counted() -> None:
    domains = measured(drawn({f"{'all ' if n % 9 == 0 else ''}d{n}": 400 - 7 * n for n in range(50)}))
    rows, title = domain_rows(domains, {})
    names = [row[""] for row in rows]
    by_size = sorted(domains, key=lambda name: -domains[name].examples)
    assert names[:LARGEST] == by_size[:LARGEST]
    others = {name: domains[name].auc for name in by_size[LARGEST:] if domains[name].auc is not None}
    assert set(names[LARGEST:]) == set(sorted(others, key=lambda name: others[name] or 0)[:WORST])
    assert title == "By domain: the 12 largest, and the 8 worst of the other 38"


def test_the_line_names_the_worst_and_counts_what_has_no_auc() -> None:
    domains = measured(drawn({"home": 300, "cart": 50, **{f"all {n}": 3 for n in range(7)}}))
    over = OverDomains.of(domains)
    line = domain_line(Metrics(1, 1, None, 0.0, None, None, None, over))
    assert line.startswith(
        f"9 domains: wauc {over.wauc:.4f}  mean auc {over.mean_auc:.4f}  worst {over.worst_auc:.4f} ("
    )
    assert line.endswith("without AUC: all 0, all 1, all 2, all 3, all 4 and 2 more")


def test_bars_are_as_long_as_their_figures() -> None:
    aucs = {"home": 0.9, "cart": 0.6, "search": 0.75}
    domains = {name: Metrics(100, 50, auc, 0.0, 0.5, 1.0, 1.0) for name, auc in aucs.items()}
    image = draw_domains(domains).astype(int)
    blue = (np.abs(image - [0x7A, 0xAA, 0xD5]).sum(2) == 0).sum(1)
    edges = np.flatnonzero(np.diff((blue > 0).astype(int))) + 1
    lengths = [int(part.max()) for part in np.split(blue, edges) if part.any()]
    assert len(lengths) == 3
    ratios = [length / lengths[0] for length in lengths]
    assert ratios == pytest.approx([(auc - 0.5) / 0.4 for auc in aucs.values()], abs=0.02)
