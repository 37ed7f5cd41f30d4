"""A log as it comes, strings, weights, gaps and all, trained on and evaluated over two ranks."""

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ranks import run_module, run_ranks
from runs import reseal, train_on
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import tiny_config
from torchrec import KeyedTensor

from recsys.config import Config, SparseOptimizerConfig, validate
from recsys.data.batch import Part, build_batch
from recsys.data.features import build_columns
from recsys.model.ranker import build_ranker
from recsys.prepare.vocabularies import build_vocabularies
from recsys.runtime import Ranks
from recsys.sharding.shard import local_parts, shard

ROWS = {"train": 610, "valid": 90, "test": 120}
EPOCHS = 3


def raw_table(rows: int, seed: int) -> pa.Table:
    """Ratings that follow the query and the words; nulls, empty lists, unknown words, ids out of range, infinities."""
    random = np.random.default_rng(seed)
    queries, words = ["hat", "red shoes", "grün"], ["a", "b", "c", "rare"]
    query = random.integers(0, 3, rows)
    lists = [random.choice(words, random.integers(0, 6), p=[0.4, 0.3, 0.29, 0.01]).tolist() for _ in range(rows)]
    scores = [random.random(len(one)).astype(np.float32) for one in lists]
    dwell = random.exponential(2.0, rows)
    dwell[random.random(rows) < 0.05] = np.inf
    rating = np.clip(1 + query + random.integers(0, 3, rows), 1, 5)
    return pa.table(
        {
            "user": random.integers(0, 50, rows),
            "query": pa.array([queries[place] for place in query]).dictionary_encode(),
            "words": pa.array(lists, pa.list_(pa.string())),
            "scores": pa.array(scores, pa.list_(pa.float32())),
            "dwell": pa.array(dwell, mask=random.random(rows) < 0.1),
            "at": pa.array(1_700_000_000 + random.integers(0, 10**6, rows), pa.timestamp("s")),
            "rating": pa.array(rating, mask=random.random(rows) < 0.1),
            "importance": random.random(rows) * 2,
        }
    )


def real_config(directory: Path) -> Config:
    raw = tiny_config(directory, directory / "out")
    del raw["data"]["reference"], raw["data"]["domain"]
    raw["data"] |= {"label": "rating >= 4", "label_null": "skip", "weight": "importance"}
    raw["tables"] = {
        "user": {"num_embeddings": 40, "embedding_dim": 8},
        "query": {"num_embeddings": 64, "embedding_dim": 8, "sharding": ["data_parallel"]},
        "word": {"num_embeddings": 8, "embedding_dim": 8, "pooling": "sum", "sharding": ["column_wise"]},
        "hour": {"num_embeddings": 24, "embedding_dim": 4},
        "dwell": {"num_embeddings": 3, "embedding_dim": 4, "pooling": "sum", "sharding": ["data_parallel"]},
    }
    raw["tables"]["word"]["min_partition"] = 4
    raw["features"] = {
        "sparse": {
            "user": {"table": "user", "out_of_range": "hash"},
            "query": {"table": "query", "ids": {"type": "hash", "salt": 7}},
            "words": {
                "table": "word",
                "ids": {"type": "vocabulary", "file": str(directory / "words.parquet")},
                "weights": "scores",
                "max_length": 3,
                "keep": "last",
            },
            "first_words": {
                "table": "word",
                "column": "words",
                "ids": {"type": "vocabulary", "file": str(directory / "words.parquet")},
            },
            "word_hashes": {"table": "query", "column": "words", "ids": {"type": "hash", "salt": 7}},
            "word_users": {"table": "user", "column": "words", "ids": {"type": "hash"}},
            "hour": {"table": "hour", "column": "at", "ids": {"type": "datetime", "part": "hour"}},
            "patience": {"table": "dwell", "column": "dwell", "ids": {"type": "bucketize", "boundaries": [1, 3]}},
        },
        "dense": {
            "dwell": {
                "fill": 0.5,
                "clip": [0, 10],
                "log1p": True,
                "standardize": {"mean": 1.0, "std": 0.6},
                "not_finite": "fill",
            }
        },
    }
    raw["stages"] = {"backbone": {**raw["stages"]["backbone"], "epochs": EPOCHS}, "joint": raw["stages"]["joint"]}
    raw["stages"]["joint"] |= {"steps": 3, "warmup_steps": 0}
    return validate(Config, raw, source="test")


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Splits in two files of several row groups, and the vocabulary of the words but the rare one."""
    directory = tmp_path_factory.mktemp("real")
    for seed, (split, rows) in enumerate(ROWS.items()):
        (directory / split).mkdir()
        table = raw_table(rows, seed)
        for part in range(2):
            piece = table.slice(rows * part // 2, rows * (part + 1) // 2 - rows * part // 2)
            pq.write_table(piece, directory / split / f"{part}.parquet", row_group_size=70)
    build_vocabularies(real_config(directory), min_count=50)
    return directory


@pytest.fixture(scope="module")
def run(log: Path) -> dict[str, Any]:
    """The summary of the run on two ranks."""
    summaries = run_ranks(2, train_on, real_config(log))
    return summaries[0]  # type: ignore[no-any-return]


def expected_counts(table: pa.Table) -> dict[str, dict[str, int]]:
    rows = table.to_pylist()
    kept = [row["words"][-3:] for row in rows]
    return {
        "hashed": {"user": sum(row["user"] >= 40 for row in rows)},
        "out_of_vocabulary": {
            "words": sum(words.count("rare") for words in kept),
            "first_words": sum(row["words"].count("rare") for row in rows),
        },
        "cut": {"words": sum(len(row["words"]) for row in rows) - sum(map(len, kept))},
        "not_finite": {"dwell": sum(row["dwell"] == np.inf for row in rows)},
        "skipped": {"label": sum(row["rating"] is None for row in rows)},
    }


def test_every_example_is_counted_once_and_every_change_to_it(run: dict[str, Any], log: Path) -> None:
    expected = expected_counts(pq.read_table(log / "train"))
    skipped = expected["skipped"]["label"]
    stage = run["stages"]["backbone"]
    assert stage["examples"] == EPOCHS * (ROWS["train"] - skipped)
    test = pq.read_table(log / "test")
    assert run["test"]["examples"] == ROWS["test"] - expected_counts(test)["skipped"]["label"]
    # The joint stage takes 3 more steps, of rows that no table knows here.
    for kind, features in expected.items():
        for feature, number in features.items():
            assert EPOCHS * number <= run["data"]["train"][kind][feature] < (EPOCHS + 1) * number, (kind, feature)
    # Of the held-out rows, those of one pass, however many there were.
    for split in ("valid", "test"):
        held_out = expected_counts(pq.read_table(log / split))
        some = {kind: {name: n for name, n in features.items() if n} for kind, features in held_out.items()}
        assert run["data"][split] == {kind: features for kind, features in some.items() if features}
    assert json.loads((log / "out" / "summary.json").read_text())["data"] == run["data"]


def test_counts_are_in_tensorboard(run: dict[str, Any], log: Path) -> None:
    events = EventAccumulator(str(log / "out" / "tensorboard"))
    events.Reload()
    tags = {tag for tag in events.Tags()["scalars"] if tag.startswith("data/")}
    assert tags == {f"data/{kind}/{name}" for kind, features in run["data"]["train"].items() for name in features}
    assert 0 < sum(event.value for event in events.Scalars("data/cut/words")) <= run["data"]["train"]["cut"]["words"]


def test_it_learns(run: dict[str, Any]) -> None:
    assert run["test"]["auc"] > 0.75


def test_evaluation_takes_the_vocabularies_of_the_checkpoint(run: dict[str, Any], log: Path, tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(run["checkpoint"], tmp_path / "step"))
    assert sorted(path.name for path in (checkpoint / "vocabularies").iterdir()) == [
        "digests.json",
        "first_words.parquet",
        "words.parquet",
    ]
    absent = [f"features.sparse.{name}.ids.file=absent.parquet" for name in ("words", "first_words")]
    (finished,) = run_module(1, "recsys.evaluate", "--checkpoint", str(checkpoint), "--json", *absent)
    assert finished.code == 0, finished.stderr
    figures = json.loads(finished.stdout)
    assert figures["model"]["auc"] == pytest.approx(run["test"]["auc"], abs=1e-6)
    assert figures["data"] == run["data"]["test"]
    (finished,) = run_module(1, "recsys.evaluate", "--checkpoint", str(checkpoint), *absent)
    assert f"warning: test: hashed: user {figures['data']['hashed']['user']}; out_of_vocabulary: " in finished.stdout
    pq.write_table(pa.table({"value": ["c", "a"], "count": [2, 1]}), checkpoint / "vocabularies" / "words.parquet")
    reseal(checkpoint)
    (finished,) = run_module(1, "recsys.evaluate", "--checkpoint", str(checkpoint), "--json")
    assert finished.code == 2
    assert "words.parquet is not the vocabulary that was saved" in finished.stderr


def test_a_checkpoint_alone_gives_the_columns_to_serve_with(run: dict[str, Any], log: Path) -> None:
    trained = build_columns(real_config(log))
    served = build_columns(real_config(log), Path(run["checkpoint"]) / "vocabularies")
    table = raw_table(50, 9)
    request = table.drop(["rating", "importance"])
    layout = served.layout(served.check_features(request.schema, "request"))
    one = served.decode_features(request, layout, "request")
    other = trained.decode(table, layout, "file")
    assert np.array_equal(one.dense, other.dense) and np.array_equal(one.single, other.single)
    for here, there in zip(one.lists, other.lists, strict=True):
        assert np.array_equal(here.values, there.values) and np.array_equal(here.offsets, there.offsets)
        assert (here.weights is None) == (there.weights is None)
        assert here.weights is None or there.weights is None or np.array_equal(here.weights, there.weights)


def lookups(config: Config, rank: int) -> Any:
    """A batch of the train split's row group `rank`."""
    columns = build_columns(config)
    table = pq.read_table(f"{config.data.train}".replace("*", str(rank)))
    layout = columns.layout(columns.check_schema(table.schema, "file"))
    rows = columns.decode(table, layout, "file")
    return build_batch([Part(rows, 0, 60)], layout, 1, loss_scale=1.0, pin_memory=False)


Parts = list[tuple[int, Any, Any]]
"""First column of each part of a table that a rank has, before and after a step."""

POOLED = {"words": "word", "first_words": "word", "word_hashes": "query", "word_users": "user"}


def pooled_and_stepped(ranks: Ranks, config: Config) -> tuple[dict[str, Any], dict[str, Parts]]:
    """This rank's pooled features by name, and its parts of the tables by name."""
    ranker = build_ranker(config, seed=1)
    sharded = shard(ranker, config, ranks, seed=2)
    state = ranker.collections["embedding_bag_collection"].state_dict()
    parts = {name: local_parts(state[f"embedding_bags.{name}.weight"]) for name in set(POOLED.values())}
    before = {name: [tensor.detach().numpy().copy() for tensor, _, _ in of] for name, of in parts.items()}
    for group in sharded.sparse_optimizer.param_groups:
        group["lr"] = 0.5
    sharded.sparse_optimizer.step()  # the fused optimizer takes the rate over
    features = lookups(config, ranks.rank).sparse_features
    pooled = ranker.collections["embedding_bag_collection"](features)
    pooled.values().sum().backward()
    assert ranker.mean_pooling is not None
    (sums,) = KeyedTensor.regroup([pooled], [ranker.feature_names])
    dims = list(config.embedding_dims.values())
    whole = ranker.mean_pooling(sums, features).detach().split(dims, 1)
    return {name: of.numpy() for name, of in zip(ranker.feature_names, whole, strict=True)}, {
        name: [(column, old, new.detach().numpy()) for old, (new, _, column) in zip(before[name], of, strict=True)]
        for name, of in parts.items()
    }


def test_weighted_lists_pool_and_learn_over_two_ranks(log: Path) -> None:
    config = real_config(log)
    sgd = config.optimizers.model_copy(update={"sparse": SparseOptimizerConfig(type="sgd")})
    config = config.model_copy(update={"optimizers": sgd})
    results = run_ranks(2, pooled_and_stepped, config)
    before = {name: np.zeros((config.tables[name].num_embeddings, 8), np.float32) for name in set(POOLED.values())}
    after = np.zeros_like(before["word"])
    for _, tables in results:
        for name, parts in tables.items():
            for column, old, new in parts:
                before[name][:, column : column + old.shape[1]] = old
                if name == "word":
                    after[:, column : column + old.shape[1]] = new
    weights = np.zeros(8, np.float32)
    for rank, (sums, _) in enumerate(results):
        features = lookups(config, rank).sparse_features
        for name, table in POOLED.items():
            bags = features[name]
            offsets, ids, given = bags.offsets().numpy(), bags.values().numpy(), bags.weights().numpy()
            expected = np.stack([given[a:b] @ before[table][ids[a:b]] for a, b in itertools.pairwise(offsets)])
            if config.tables[table].pooling == "mean":  # beside tables with weights, as ever
                assert (given == 1).all()
                expected /= np.maximum(np.diff(offsets), 1)[:, None]
            np.testing.assert_allclose(sums[name], expected, rtol=1e-5, atol=1e-6)
            if table == "word":
                np.add.at(weights, ids, given)
    # TorchRec takes the mean of gradients over ranks.
    expected = np.repeat(0.5 * weights[:, None] / 2, 8, 1)
    np.testing.assert_allclose(before["word"] - after, expected, rtol=1e-4, atol=1e-6)
