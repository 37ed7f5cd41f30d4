"""MovieLens-1M as papers that use FuxiCTR's code report it, from the official files, so that figures can be compared.

    python -m benchmarks.movielens_published --source ml-1m.zip --output data/movielens_1m_published

Ratings of 3 are left out, 4 and 5 are positive. Seven fields: user, gender, age, occupation, movie, year of release in
nine bins, and at most five genres, of whose embeddings the mean is taken. Of the 739,012 rows, shuffled at random, the
first 80 % are for training, the next 10 % for validation: 591,209, 73,901 and 73,902. The shuffle is Python's, seeded
with 2019; that of the papers is not known.
"""

import argparse
import random
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recsys.cli import run_entry
from recsys.config import BucketizeIdsConfig, SparseFeatureConfig
from recsys.data.storage import DataError
from recsys.prepare.movielens import AGES, GENDERS, GENRES_1M, OCCUPATIONS_1M, features, read_movielens_1m
from recsys.prepare.sources import Ints, check_free, write_data_set

SEED = 2019
DECADES = tuple(range(1930, 2001, 10))
MAX_GENRES = 5
_NEUTRAL = 3
_FIELDS = ("user_id", "gender", "age", "occupation", "movie_id", "year", "genres")


def main() -> None:
    """Write the data set that the command line asks for."""
    parser = argparse.ArgumentParser(prog="benchmarks.movielens_published", description=__doc__.partition("\n")[0])
    parser.add_argument("--source", type=Path, required=True, help="ml-1m.zip, or the folder of its files")
    parser.add_argument("--output", type=Path, required=True, help="becomes the data set")
    parser.add_argument("--overwrite", action="store_true", help="replace the data set that is there")
    arguments = parser.parse_args()

    def body() -> None:
        try:
            convert(arguments.source, arguments.output, overwrite=arguments.overwrite)
        except OSError as error:
            raise DataError(" ".join(str(error).split())) from None

    run_entry(body)


def convert(source: Path, output: Path, *, overwrite: bool = False) -> None:
    """Write the rows of the protocol as a data set of Parquet shards.

    Raises:
        FileNotFoundError: `source` or one of its files is missing.
        FileExistsError: `output` is not empty, and `overwrite` is not set or it holds no data set.
        DataError: a file does not say what it should; the message names file and line.
    """
    check_free(output, overwrite)
    ratings = read_movielens_1m(source)
    raw = ratings.filter(pc.not_equal(ratings["rating"], _NEUTRAL)).select([*_FIELDS, "label"])
    write_data_set(
        output,
        raw,
        shuffled_splits(raw.num_rows),
        name="movielens-1m-published",
        columns=_columns(raw),
        vocabularies={"gender": list(GENDERS), "genres": list(GENRES_1M)},
        sparse=_features(),
        mapped_as={},
        domain=None,
        overwrite=overwrite,
    )
    print(f"{output}: {raw.num_rows:,} rows", file=sys.stderr)


def shuffled_splits(rows: int) -> dict[str, Ints]:
    """The places of each split's rows: 80 %, 10 % and the rest of all places in a random order."""
    places = list(range(rows))
    random.Random(SEED).shuffle(places)
    ends = [int(rows * 0.8), int(rows * 0.8) + int(rows * 0.1)]
    return dict(zip(("train", "valid", "test"), np.split(np.array(places, np.int64), ends), strict=True))


def _columns(raw: pa.Table) -> dict[str, dict[str, object]]:
    sizes = {
        "user_id": pc.max(raw["user_id"]).as_py() + 1,
        "gender": len(GENDERS),
        "age": len(AGES),
        "occupation": OCCUPATIONS_1M,
        "movie_id": pc.max(raw["movie_id"]).as_py() + 1,
        "year": len(DECADES) + 1,
        "genres": len(GENRES_1M),
    }
    columns: dict[str, dict[str, object]] = {
        name: {"type": "list<int64>" if name == "genres" else "int64", "size": size} for name, size in sizes.items()
    }
    return columns | {"label": {"type": "int8", "meaning": "1 for a rating of 4 or 5, 0 for 1 or 2"}}


def _features() -> dict[str, SparseFeatureConfig]:
    ours = features()
    year = BucketizeIdsConfig(type="bucketize", boundaries=tuple(map(float, DECADES)), applied=True)
    changed = {
        "year": SparseFeatureConfig(table="year", ids=year),
        "genres": ours["genres"].model_copy(update={"max_length": MAX_GENRES}),
    }
    return {name: changed.get(name, ours[name]) for name in _FIELDS}


if __name__ == "__main__":
    main()
