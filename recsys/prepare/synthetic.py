"""The embedded default data set: a click log of several surfaces whose true click probabilities are known.

Every row is a user who is shown an item on a surface (`domain`). The click logit is the sum of

- an affinity, the product of the user's hidden taste and the item's hidden traits over a few factors, each
  weighed by the domain's own gain: the part that no model without interactions can learn;
- biases of user, category, brand, item, tags, device, region and domain;
- non-linear effects of the dense features, two of which differ between domains or user segments.

Tastes gather around a few hidden segments, which `profile_id`, `recent_categories` and the user's own rows
tell of. Items form a tree, category > brand > item: with `hierarchy=True` the traits and the bias of an item
are its category's plus a smaller part of its brand's plus a still smaller one of its own. With
`hierarchy=False` the tree is still in the columns, but traits and biases of the same size are drawn item by
item, so that knowing the tree helps nobody: the control on which a hierarchical model must not win by
construction.

`conflict` c turns the taste that counts in domains of odd number: by the angle whose cosine is 1 - 2 c, so that at
1 whoever likes something in an even domain dislikes it as much in an odd one. Turning leaves a taste as strong as
it was, so the best AUC stays about the same. `num_domains` n other than the four that are drawn by hand have
shares of the rows proportional to 1 / 2, 1 / 3, .. 1 / (n + 1), gains of 1, and biases and peaks drawn at random.

A missing value acts as zero effect, so the probability that is written is the best that can be said from the
columns (but for tastes and traits, which must be learned). The AUC, WAUC (mean over domains, weighted by rows)
and log loss that `dataset.json` gives for each split are those of that probability: the ceiling of every model.
"""

import shlex
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from recsys.config import Config, ConfigError, DenseFeatureConfig, SparseFeatureConfig
from recsys.data.storage import DataError
from recsys.prepare import writing

NUM_BRANDS = 200
NUM_CATEGORIES = 20
NUM_TAGS = 100
NUM_PROFILES = 24
NUM_REGIONS = 50
NUM_DEVICES = 5
MAX_TAGS = 4
MAX_RECENT = 8

_SEGMENTS = 6
_CLICK_RATE = 0.25
_FACTORS = 2  # a plane, in which a taste can be turned by an angle
_AFFINITY = 0.8
# Squares add to 1 or so: an item's traits are as large with the tree as without it.
_LEVELS = {"category": 0.9, "brand": 0.4, "item": 0.2}

_TABLES = {
    "user_id": "user",
    "item_id": "item",
    "brand_id": "brand",
    "category_id": "category",
    "recent_categories": "category",
    "tag_ids": "tag",
    "profile_id": "profile",
    "region_id": "region",
    "device_id": "device",
    "domain": "domain",
}
_SPARSE = {column: SparseFeatureConfig(table=table) for column, table in _TABLES.items()}
_DENSE = {
    "time_of_day": DenseFeatureConfig(),
    "session_depth": DenseFeatureConfig(log1p=True),
    "freshness": DenseFeatureConfig(fill=0.0),
    "discount": DenseFeatureConfig(fill=0.0),
    "price": DenseFeatureConfig(log1p=True),
}
_SPLITS = ("train", "valid", "test")
_VERSION = 1  # rises whenever the same arguments come to give other rows

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class _Domains:
    """What the domains are, largest first; arrays of shape (domains,), gains of shape (domains, taste factors)."""

    shares: Floats
    biases: Floats
    peaks: Floats  # the hour of most clicks, as time_of_day counts
    gains: Floats

    @classmethod
    def drawn(cls, rng: np.random.Generator, n: int) -> "_Domains":
        """Those of a log of `n` domains."""
        shares = 1.0 / np.arange(2, n + 2)
        return cls(shares / shares.sum(), rng.normal(0, 0.4, n), rng.uniform(-0.5, 0.5, n), np.ones((n, _FACTORS)))


# Of the default log.
_SURFACES = _Domains(
    shares=np.array([0.45, 0.30, 0.15, 0.10]),
    biases=np.array([0.0, 0.6, -0.5, 0.3]),
    peaks=np.array([0.30, -0.10, 0.10, -0.35]),
    # Each surface shows another side of a taste, the last turns one over.
    gains=np.array(
        [
            [1.0, 1.0],
            [1.5, 0.0],
            [0.0, 1.5],
            [1.0, -1.0],
        ]
    ),
)
NUM_SURFACES = len(_SURFACES.shares)


def write_embedded(config: Config) -> None:
    """Write the embedded synthetic log if the config asks for it and it is not there.

    Raises:
        ConfigError: its directory cannot be written, or a figure is out of range.
    """
    if (spec := config.data.synthetic) is not None:
        try:
            write_synthetic(Path(spec.directory), **spec.model_dump(exclude={"directory"}))
        except (ValueError, OSError) as error:
            raise ConfigError(f"data.synthetic: {error}") from None


def require_embedded(config: Config) -> None:
    """Make sure that the embedded synthetic log is there, if the config asks for it, without writing anything.

    Raises:
        ConfigError: it is not; the message says how to make it.
    """
    if (spec := config.data.synthetic) is None:
        return
    given = spec.model_dump(exclude={"directory"})
    try:
        found = _holds(Path(spec.directory), _spec(**given))
    except DataError as error:
        raise ConfigError(f"data.synthetic: {error}") from None
    if not found:
        flat = [] if given.pop("hierarchy") else ["--flat"]
        options = [f"--{name.replace('_', '-')} {value}" for name, value in given.items()]
        # The directory may be anyone's text, and whoever reads the line may run it.
        directory = shlex.quote(spec.directory) if spec.directory.isprintable() else "DIR"
        raise ConfigError(
            f"data.synthetic: {spec.directory!a} does not hold the log that the config describes, and evaluating "
            f"does not write; make it with python -m recsys.prepare synthetic {' '.join([*options, *flat])} "
            f"--output {directory}, or set data.synthetic=null to read other files"
        )


def write_synthetic(
    directory: Path,
    *,
    seed: int,
    train_rows: int,
    valid_rows: int,
    test_rows: int,
    files: int = 8,
    row_group_rows: int = 8192,
    num_users: int = 2_000,
    num_items: int = 1_000,
    hierarchy: bool = True,
    num_domains: int = NUM_SURFACES,
    conflict: float = 0.0,
) -> None:
    """Write the synthetic click log as Parquet shards, unless `directory` already holds just that one.

    The same arguments give the same bytes, under the same versions of NumPy and Arrow. A synthetic data set
    of other arguments is replaced as a whole. Several processes may call this at once.

    Args:
        directory: becomes the data set: `dataset.json` and a folder of Parquet files for each split.
        seed: draws both the hidden world and the rows.
        train_rows: rows of the split to learn from, drawn like those of the other two.
        valid_rows: rows of the split to choose by.
        test_rows: rows of the split to report.
        files: files of each split.
        row_group_rows: rows of each Parquet row group, the last of a file aside.
        num_users: size of `user_id`.
        num_items: size of `item_id`.
        hierarchy: whether what users like follows the tree of categories, brands and items.
        num_domains: size of `domain`, largest first; four are the surfaces that are drawn by hand.
        conflict: c, from 0 to 1: 1 - 2 c is the cosine between a user's tastes in domains of even and of odd number.

    Raises:
        DataError: an argument is out of range, or `directory` is a mount point.
        FileExistsError: `directory` holds something else than a synthetic data set.
    """
    spec = _spec(
        seed=seed,
        train_rows=train_rows,
        valid_rows=valid_rows,
        test_rows=test_rows,
        files=files,
        row_group_rows=row_group_rows,
        num_users=num_users,
        num_items=num_items,
        hierarchy=hierarchy,
        num_domains=num_domains,
        conflict=conflict,
    )
    if _holds(directory, spec):
        return
    if directory.exists() and not _is_replaceable(directory):
        raise FileExistsError(f"{directory} holds something else than a synthetic data set; name another folder")
    with writing.staged(
        directory, keep=lambda: _holds(directory, spec), replace=lambda: _is_replaceable(directory)
    ) as stage:
        world = _World(spec)
        splits = {split: _write_split(stage, split, spec, world) for split in _SPLITS}
        summary = {"name": "synthetic", "spec": spec.summary(), "columns": _columns(spec), "splits": splits}
        writing.write_summary(stage, summary)
        data = {"reference": "true_probability", "domain": {"column": "domain", "num_domains": num_domains}}
        writing.write_config(stage, summary, sparse=_SPARSE, dense=_DENSE, data=data)


@dataclass(frozen=True)
class _Spec:
    """Everything the bytes depend on."""

    seed: int
    rows: dict[str, int]
    files: int
    row_group_rows: int
    num_users: int
    num_items: int
    hierarchy: bool
    num_domains: int
    conflict: float

    def __post_init__(self) -> None:
        lowest = {
            "seed": (self.seed, 0),
            **{f"{split}_rows": (rows, 1) for split, rows in self.rows.items()},
            "files": (self.files, 1),
            "row_group_rows": (self.row_group_rows, 1),
            "num_users": (self.num_users, 1),
            "num_items": (self.num_items, NUM_BRANDS),
            "num_domains": (self.num_domains, 1),
        }
        for name, (value, least) in lowest.items():
            if value < least:
                raise DataError(f"{name} must be at least {least}, not {value}")
        if not 0 <= self.conflict <= 1:
            raise DataError(f"conflict must be from 0 to 1, not {self.conflict}")

    def summary(self) -> dict[str, Any]:
        told = {"version": _VERSION, **asdict(self)}
        # As long as nobody turns these dials, the log is the one that was written before there were any.
        untouched = {"num_domains": NUM_SURFACES, "conflict": 0.0}
        return {name: value for name, value in told.items() if untouched.get(name) != value}


def _spec(*, train_rows: int, valid_rows: int, test_rows: int, **other: Any) -> _Spec:
    """The arguments of `write_synthetic`."""
    return _Spec(rows={"train": train_rows, "valid": valid_rows, "test": test_rows}, **other)


def _holds(directory: Path, spec: _Spec) -> bool:
    """Tell whether `directory` is the complete data set of `spec`."""
    summary = writing.read_summary(directory)
    return summary is not None and summary.get("spec") == spec.summary() and writing.is_complete(directory, summary)


def _is_replaceable(directory: Path) -> bool:
    """Tell whether nothing is lost with `directory`: it is empty, or can be made again."""
    if not directory.is_dir():
        return not directory.exists()
    summary = writing.read_summary(directory)
    return (summary is not None and summary.get("name") == "synthetic") or not any(directory.iterdir())


class _World:
    """What holds behind all rows: the tree, the hidden tastes and traits, and every bias."""

    def __init__(self, spec: _Spec) -> None:
        rng = np.random.default_rng([spec.seed, 0])
        users, items = spec.num_users, spec.num_items

        self.user_cdf = _zipf_cdf(rng, users, exponent=0.6)
        self.item_cdf = _zipf_cdf(rng, items, exponent=0.8)
        self.brand_category = _parents(rng, NUM_BRANDS, NUM_CATEGORIES)
        self.item_brand = _parents(rng, items, NUM_BRANDS)
        self.item_category = self.brand_category[self.item_brand]

        self.user_segment = rng.integers(_SEGMENTS, size=users)
        segment_taste = _spread(rng, _SEGMENTS)
        self.user_taste = segment_taste[self.user_segment] + rng.normal(0, 0.1, (users, _FACTORS))

        category_traits = _spread(rng, NUM_CATEGORIES)
        brand_traits = rng.normal(size=(NUM_BRANDS, _FACTORS))
        own_traits = rng.normal(size=(items, _FACTORS))
        category_bias = rng.normal(size=NUM_CATEGORIES)
        brand_bias = rng.normal(size=NUM_BRANDS)
        own_bias = rng.normal(size=items)
        if spec.hierarchy:
            self.item_traits = self._down_the_tree(category_traits, brand_traits, own_traits)
            item_bias = self._down_the_tree(category_bias, brand_bias, own_bias)
        else:
            self.item_traits, item_bias = own_traits, own_bias
            category_traits = np.zeros_like(category_traits)

        # An item's tags are fixed: slots 0..count-1 of its row.
        self.item_tags = rng.integers(NUM_TAGS, size=(items, MAX_TAGS))
        self.item_tag_count = rng.integers(MAX_TAGS + 1, size=items)
        self.item_has_tags = rng.random(items) >= 0.03
        self.item_tag_count[~self.item_has_tags] = 0
        tag_bias = rng.normal(0, 0.2, NUM_TAGS)
        tagged = np.arange(MAX_TAGS) < self.item_tag_count[:, None]
        self.item_bias = 0.8 * item_bias + (tag_bias[self.item_tags] * tagged).sum(axis=1)
        self.item_price = rng.normal(size=items)
        self.segment_price = rng.normal(0, 0.7, _SEGMENTS)

        self.user_bias = rng.normal(0, 0.15, users)
        self.device_bias = rng.normal(0, 0.3, NUM_DEVICES)
        self.user_region = rng.choice(NUM_REGIONS, size=users, p=_zipf(NUM_REGIONS, exponent=0.8))
        self.region_bias = rng.normal(0, 0.3, NUM_REGIONS)

        # A profile is one of the few of the user's segment, or now and then any at all.
        honest = rng.random(users) < 0.97
        of_segment = self.user_segment + _SEGMENTS * rng.integers(NUM_PROFILES // _SEGMENTS, size=users)
        self.user_profile = np.where(honest, of_segment, rng.integers(NUM_PROFILES, size=users))
        self.user_has_profile = rng.random(users) >= 0.05

        popularity = np.bincount(self.item_category, np.diff(self.item_cdf, prepend=0.0), NUM_CATEGORIES)
        liking = popularity * np.exp(1.5 * segment_taste @ category_traits.T)
        self.recent_cdf = np.cumsum(liking / liking.sum(axis=1, keepdims=True), axis=1)

        # Drawn last, so that worlds of any number of domains have everything else in common.
        self.domains = _SURFACES if spec.num_domains == NUM_SURFACES else _Domains.drawn(rng, spec.num_domains)
        self.cosine = 1.0 - 2.0 * spec.conflict

        self.intercept = 0.0
        self.intercept = self._calibrated(self.rows(np.random.default_rng([spec.seed, 1]), 50_000).logit)

    def _down_the_tree(self, category: Floats, brand: Floats, item: Floats) -> Floats:
        """Add up what each level gives to an item; an argument has a row for each member of its level."""
        return (
            _LEVELS["category"] * category[self.item_category]
            + _LEVELS["brand"] * brand[self.item_brand]
            + _LEVELS["item"] * item
        )

    def taste(self, user: Ints, domain: Ints) -> Floats:
        """Each user's taste in a domain, of shape (rows, factors)."""
        cos = np.where(domain % 2, self.cosine, 1.0)
        sin = np.where(domain % 2, np.sqrt(1.0 - self.cosine**2), 0.0)
        one, other = self.user_taste[user].T
        return np.stack([cos * one - sin * other, sin * one + cos * other], axis=1)

    def affinity(self, user: Ints, item: Ints, domain: Ints) -> Floats:
        """What each user's taste in a domain makes of an item's traits; all of shape (rows,)."""
        gains = self.domains.gains[domain]
        affinity: Floats = (gains * self.taste(user, domain) * self.item_traits[item]).sum(axis=1)
        return affinity

    @staticmethod
    def _calibrated(logit: Floats) -> float:
        """Bisect for the intercept that makes `_CLICK_RATE` the mean click probability."""
        low, high = -20.0, 20.0
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (middle, high) if _sigmoid(logit + middle).mean() < _CLICK_RATE else (low, middle)
        return low

    def rows(self, rng: np.random.Generator, n: int) -> "_Rows":
        """Draw `n` rows."""
        user = np.searchsorted(self.user_cdf, rng.random(n), side="right")
        item = np.searchsorted(self.item_cdf, rng.random(n), side="right")
        segment = self.user_segment[user]
        domain = rng.choice(len(self.domains.shares), size=n, p=self.domains.shares)
        device = rng.choice(NUM_DEVICES, size=n, p=_zipf(NUM_DEVICES, exponent=1.0))
        region, has_region = self.user_region[user], rng.random(n) >= 0.05

        time = rng.beta(2.0, 1.5, n) - 0.5
        depth = rng.exponential(1.0, n)
        freshness, has_freshness = rng.random(n), rng.random(n) >= 0.08
        discount = np.where(rng.random(n) < 0.4, rng.uniform(0.05, 0.6, n), 0.0)
        has_discount = rng.random(n) >= 0.05
        price_level = self.item_price[item] + rng.normal(0, 0.3, n)

        logit = (
            self.intercept
            + _AFFINITY * self.affinity(user, item, domain)
            + self.user_bias[user]
            + self.item_bias[item]
            + self.device_bias[device]
            + self.region_bias[region] * has_region
            + self.domains.biases[domain]
            + 0.3 * np.cos(2 * np.pi * (time - self.domains.peaks[domain]))
            - 0.25 * np.minimum((price_level - self.segment_price[segment]) ** 2, 4.0)
            - 0.8 * np.log1p(depth)
            + 0.6 * freshness**2 * has_freshness
            + 0.5 * (discount > 0.2) * has_discount
        )
        probability = _sigmoid(logit)

        recent_count = rng.integers(MAX_RECENT + 1, size=n)
        has_recent = rng.random(n) >= 0.05
        recent_count[~has_recent] = 0
        draws = rng.random(recent_count.sum())
        # One search for all segments: segment s's distribution lies in [s, s + 1).
        ladder = (self.recent_cdf + np.arange(_SEGMENTS)[:, None]).ravel()
        place = np.searchsorted(ladder, draws + np.repeat(segment, recent_count), side="right")
        recent = np.minimum(place - NUM_CATEGORIES * np.repeat(segment, recent_count), NUM_CATEGORIES - 1)

        tagged = np.arange(MAX_TAGS) < self.item_tag_count[item][:, None]
        brand = self.item_brand[item]
        label = rng.random(n) < probability
        table = pa.table(
            {
                "user_id": pa.array(user, pa.int64()),
                "profile_id": pa.array(self.user_profile[user], pa.int64(), mask=~self.user_has_profile[user]),
                "region_id": pa.array(region, pa.int64(), mask=~has_region),
                "device_id": pa.array(device, pa.int64()),
                "item_id": pa.array(item, pa.int64()),
                "brand_id": pa.array(brand, pa.int64()),
                "category_id": pa.array(self.brand_category[brand], pa.int64()),
                "tag_ids": _lists(self.item_tag_count[item], self.item_tags[item][tagged], self.item_has_tags[item]),
                "recent_categories": _lists(recent_count, recent, has_recent),
                "domain": pa.array(domain, pa.int64()),
                "time_of_day": pa.array(time, pa.float32()),
                "session_depth": pa.array(depth, pa.float32()),
                "freshness": pa.array(freshness.astype(np.float32), mask=~has_freshness),
                "discount": pa.array(discount.astype(np.float32), mask=~has_discount),
                "price": pa.array(20.0 * np.exp(1.5 * price_level), pa.float32()),
                "label": pa.array(label, pa.bool_()).cast(pa.int8()),
                "true_probability": pa.array(probability, pa.float32()),
            }
        )
        return _Rows(table, logit, domain, label, probability.astype(np.float32))


@dataclass(frozen=True)
class _Rows:
    """Some rows as they are written, and what is reckoned from them; every array is of shape (rows,)."""

    table: pa.Table
    logit: Floats
    domain: Ints
    label: Bools
    probability: npt.NDArray[np.float32]


def _write_split(stage: Path, split: str, spec: _Spec, world: _World) -> dict[str, Any]:
    """Write one split, a file at a time, and return its entry in `dataset.json`."""
    written = []
    bounds = writing.part_bounds(spec.rows[split], spec.files)
    for part, (first, end) in enumerate(bounds):
        # Each file has its own stream of random numbers, so memory holds one file whatever the split's size.
        rng = np.random.default_rng([spec.seed, 2 + _SPLITS.index(split), part])
        rows = world.rows(rng, end - first)
        writing.write_part(rows.table, stage, split, part, row_group_rows=spec.row_group_rows)
        written.append((rows.domain, rows.label, rows.probability))
    domain, label, probability = (np.concatenate(arrays) for arrays in zip(*written, strict=True))
    of_domain = np.split(
        np.argsort(domain, kind="stable"), np.bincount(domain, minlength=spec.num_domains).cumsum()[:-1]
    )
    domains = {str(one): _ceiling(label[rows], probability[rows]) for one, rows in enumerate(of_domain)}
    return {
        "files": len(bounds),
        **_ceiling(label, probability),
        "bayes_wauc": _wauc(domains.values()),
        "domains": domains,
    }


def _wauc(domains: Iterable[dict[str, Any]]) -> float | None:
    """Mean AUC of domains, weighted by their rows; those that have none are left out."""
    known = [one for one in domains if one["bayes_auc"] is not None]
    rows = sum(one["rows"] for one in known)
    return sum(one["rows"] * one["bayes_auc"] for one in known) / rows if rows else None


def _ceiling(label: Bools, probability: npt.NDArray[np.float32]) -> dict[str, Any]:
    """Rows, label rate, and the AUC and log loss of the true probability; None where they are not defined."""
    rows = len(label)
    if rows == 0:
        return {"rows": 0, "label_rate": None, "bayes_auc": None, "bayes_log_loss": None}
    p = probability.astype(np.float64)
    positives = int(label.sum())
    auc = None
    if 0 < positives < rows:
        # Mann-Whitney: the mean rank of the positives, ties sharing theirs.
        _, inverse, counts = np.unique(p, return_inverse=True, return_counts=True)
        rank = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
        auc = float((rank[label].sum() - positives * (positives + 1) / 2) / (positives * (rows - positives)))
    return {
        "rows": rows,
        "label_rate": positives / rows,
        "bayes_auc": auc,
        "bayes_log_loss": float(-np.where(label, np.log(p), np.log1p(-p)).mean()),
    }


def _columns(spec: _Spec) -> dict[str, dict[str, Any]]:
    """What each column means; an id column's size is one more than its largest id can be."""

    def ids(size: int, meaning: str, type_: str = "int64") -> dict[str, Any]:
        return {"type": type_, "size": size, "meaning": meaning}

    def dense(meaning: str) -> dict[str, Any]:
        return {"type": "float32", "meaning": meaning}

    return {
        "user_id": ids(spec.num_users, "who sees the item; frequency falls off by a power law"),
        "profile_id": ids(NUM_PROFILES, "what the user declares to be; null where nothing is declared"),
        "region_id": ids(NUM_REGIONS, "where the user is; null where unknown"),
        "device_id": ids(NUM_DEVICES, "what the user holds"),
        "item_id": ids(spec.num_items, "what is shown; frequency falls off by a power law"),
        "brand_id": ids(NUM_BRANDS, "the item's brand; each brand is of one category"),
        "category_id": ids(NUM_CATEGORIES, "the brand's category"),
        "tag_ids": ids(NUM_TAGS, "the item's tags; empty: none, null: not known", "list<int64>"),
        "recent_categories": ids(
            NUM_CATEGORIES,
            "categories the user looked at lately; empty: none, null: not known",
            "list<int64>",
        ),
        "domain": ids(spec.num_domains, "the surface on which the item is shown"),
        "time_of_day": dense("fraction of the day, from noon: [-0.5, 0.5)"),
        "session_depth": dense("how far into the session, in mean sessions: 0 and up"),
        "freshness": dense("1 for a new item, falling to 0; null where unknown"),
        "discount": dense("share of the price taken off, 0 for none; null where unknown"),
        "price": dense("heavy-tailed: take its logarithm"),
        "label": {"type": "int8", "meaning": "1 for a click"},
        "true_probability": {"type": "float32", "meaning": "of the click, as drawn from: never a feature"},
    }


def _lists(counts: Ints, values: Ints, valid: Bools) -> pa.ListArray:
    """Build a list for each row from the rows' values end to end; null where not `valid` (count 0)."""
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    return pa.ListArray.from_arrays(
        pa.array(offsets, pa.int32()), pa.array(values, pa.int64()), mask=pa.array(~valid, pa.bool_())
    )


def _sigmoid(x: Floats) -> Floats:
    return 1.0 / (1.0 + np.exp(-x))


def _zipf(size: int, *, exponent: float) -> Floats:
    """Power-law probabilities by rank, flat at the head so that the first ranks do not swallow the rest."""
    weight = (np.arange(size) + 5.0) ** -exponent
    share: Floats = weight / weight.sum()
    return share


def _zipf_cdf(rng: np.random.Generator, size: int, *, exponent: float) -> Floats:
    """Cumulative power-law probabilities of ids whose ranks are shuffled; the last is 1."""
    cdf: Floats = np.cumsum(rng.permutation(_zipf(size, exponent=exponent)))
    cdf /= cdf[-1]
    return cdf


def _spread(rng: np.random.Generator, size: int) -> Floats:
    """Draw `size` factor vectors, each factor of mean 0 and variance 1, so that no world is dull."""
    drawn = rng.normal(size=(size, _FACTORS))
    spread: Floats = (drawn - drawn.mean(axis=0)) / drawn.std(axis=0)
    return spread


def _parents(rng: np.random.Generator, children: int, parents: int) -> Ints:
    """Give every child a parent: some parents have many children, none has none."""
    extra = rng.choice(parents, size=children - parents, p=_zipf(parents, exponent=0.5))
    return rng.permutation(np.concatenate([np.arange(parents), extra]))
